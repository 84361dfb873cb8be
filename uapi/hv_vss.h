/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * The contract between hv_vss.ko and whoever holds /dev/vmbus/hv_vss.
 *
 * Two ABIs share the device; the first write after open settles which one is in force:
 *
 *  v1  mainline's, see <linux/hyperv.h>: struct hv_vss_msg both ways and a 4-byte reply to the
 *      registration (VSS_OP_REGISTER1). Programs for the old header work unchanged.
 *  v2  frames that begin with struct hv_vss_frame. A kernel that only knows v1 answers the
 *      registration of v2 with EINVAL: then register as v1 on the same descriptor.
 *
 * Two byte orders meet here. Every integer in a frame is in the machine's. What the host sent goes
 * through as it is: struct hv_vss_freeze_info and what is in it are little-endian, as all that
 * travels on VMBus. (The machines that Linux runs on under Hyper-V are little-endian, so that the two
 * are the same there.) No structure has padding, and each has the same layout for 32-bit and 64-bit
 * programs.
 *
 * One open at a time: the next one gets EBUSY. After fork(), or when the descriptor was passed on
 * (SCM_RIGHTS), all holders share one registration, one queue of requests and what is held frozen;
 * what is said of closing below happens when the last of them closes it. One read returns one
 * message, one write is one message. A read into a buffer that is too short gets EINVAL and loses
 * nothing. A write that is refused changes nothing:
 *
 *  EINVAL   wrong length, version, size, kind, or a reserved field that is not zero
 *  EPROTO   well formed, but not now: anything else before the registration, or a second one
 *  ESTALE   there is no open request with this id that this descriptor has read: it has ended
 *           (time over), or never was; in v1: there is no open request that was read
 *  EBADMSG  the id is right, but the request was for another operation
 *  ENODEV   the device is gone; a poll says POLLERR and POLLHUP, and a read ENODEV. Close the
 *           descriptor and open the device again when it is back
 *
 * What a request asks of the daemon; it answers each of them, once, with HV_S_OK or an error:
 *
 *  VSS_OP_HOT_BACKUP  Could a backup be taken? Nothing is frozen.
 *  VSS_OP_FREEZE      Have every file system on this machine's disks stand still, with all that was
 *                     written before on the disk. After HV_S_OK they stay so until THAW.
 *  VSS_OP_THAW        Let all of them go on. HV_S_OK says that none has gone on before: the backup
 *                     is good. Comes also when no FREEZE has succeeded, and is then a matter of
 *                     making sure.
 *
 * The daemon has one request in hand at a time: the next one can be read when it is answered or has
 * failed. Only a THAW may come while the daemon still works on the FREEZE before it, which has then
 * been failed already: the FREEZE is to be given up, its answer gets ESTALE. Other operations of the
 * host are answered by the kernel; a daemon fails one that it does not know.
 *
 * Closing the descriptor fails the request that was read, and ends what is held. A request that was
 * not read yet waits a moment for the next daemon. When it is closed between a FREEZE that succeeded
 * and its THAW, the THAW is failed too, since nobody has watched over the freeze.
 *
 * A THAW need not be the host's. Whatever the daemon may have frozen by itself, and the host has no
 * use for any more, the daemon is told to thaw: when a FREEZE fails that it has read and not answered,
 * when the host could not be told of its success, when a THAW of the host fails unanswered, before the
 * machine sleeps, which waits for it. That THAW stays, across a close and also when the device goes and
 * comes back, until a daemon has answered it, and may thus be the first request that a new daemon reads.
 * It is answered as always. Only unloading the module forgets it.
 *
 * Nor does the module know after it was loaded what was frozen before: until a FREEZE has ended since, each
 * THAW of the host is handed on, and failed whatever the daemon answers.
 *
 * Held freezes (HV_VSS_FEATURE_HOLD): a v2 daemon can have the kernel freeze for it, with
 * HV_VSS_IOC_FREEZE. What is held so belongs to this open of the device: nobody else can thaw it, and
 * the kernel thaws it when the last holder closes the descriptor or dies, when the deadline passes, when
 * the FREEZE that it was for fails or its THAW ends, before the machine sleeps, and when the device goes.
 * It begins with what was frozen last and waits for none before it begins the next, so that one that
 * hangs holds up no other: which of them is thawed first is not said. But for the close, and for what it
 * has answered or told itself, the daemon then reads an HV_VSS_FRAME_THAWED, or ENODEV when the device has
 * gone, and the host's THAW is failed. But a freeze has to last only until the host has sent its THAW: what is
 * let go after that, at the deadline or before the machine sleeps, breaks nothing. That THAW is then read first and
 * the notice behind it, so that the daemon knows, and it is good if this daemon answers it so.
 * What a daemon has frozen by itself beside what it holds for a FREEZE it thaws when it reads that notice, or ENODEV:
 * it is given no THAW for that, and the machine's sleep does not wait for it. When it closes the descriptor before it
 * has read of that, the next daemon is told to thaw, unless the device has gone by then.
 * A daemon that crashes closes nothing before its core is dumped, for which it may have to wait until what it
 * holds is thawed: PR_SET_DUMPABLE of prctl(2) should be 0, and the deadline short.
 * A daemon that freezes by other means needs none of this.
 *
 * What may change, and what not. A structure grows at its end only, a frame's size says how much there
 * is: who reads takes what it knows of it and passes over the rest. Bits of a feature word that the
 * reader does not know are passed over, too; a notice of a thaw counts whatever its reason. A frame of a
 * kind that it does not know is passed over by a daemon, and refused by the kernel, so that the daemon
 * knows. Of an argument of an ioctl the size is part of the command's number: a longer one is another
 * command. Reserved fields are written as 0. What needs more than that of the other side is done only
 * after that side has shown the feature bit for it: the daemon in its registration, the kernel in the
 * reply. Numbers are never used for something else.
 */
#ifndef HV_VSS_H
#define HV_VSS_H

#include <linux/ioctl.h>
#include <linux/types.h>
#include <linux/hyperv.h>

/* hv_vss_frame.version, and the ABI version that v2 stands for. */
#define HV_VSS_ABI_V2			2

/* hv_vss_frame.kind: */
#define HV_VSS_FRAME_REGISTER		1	/* to the kernel: struct hv_vss_register */
#define HV_VSS_FRAME_REGISTERED		2	/* to the daemon: struct hv_vss_registered */
#define HV_VSS_FRAME_REQUEST		3	/* to the daemon: struct hv_vss_request */
#define HV_VSS_FRAME_ANSWER		4	/* to the kernel: struct hv_vss_answer */
#define HV_VSS_FRAME_THAWED		5	/* both ways: struct hv_vss_thawed */

/* hv_vss_thawed.reason: */
#define HV_VSS_THAWED_DEADLINE		1	/* the daemon's own time limit */
#define HV_VSS_THAWED_OPERATOR		2	/* somebody asked for it */
#define HV_VSS_THAWED_CRASH		3	/* the daemon or its guard died or failed */
#define HV_VSS_THAWED_FOREIGN		4	/* another program thawed what the daemon had frozen */
#define HV_VSS_THAWED_SLEEP		5	/* the machine is about to sleep */
#define HV_VSS_THAWED_CALLED_OFF	6	/* the FREEZE has failed, or the THAW after it */
#define HV_VSS_THAWED_GONE		7	/* the device went away: in traces, a read gets ENODEV */

/* Feature bits, in hv_vss_registered.features: */
#define HV_VSS_FEATURE_HOLD		0x1	/* HV_VSS_IOC_FREEZE and HV_VSS_IOC_THAW */
#define HV_VSS_FEATURE_PATHS		0x2	/* their fd may be open with O_PATH */

/* Records in hv_vss_freeze_info.luns. */
#define HV_VSS_MAX_LUNS			260

/* Bytes of the largest frame: a FREEZE request with its struct hv_vss_freeze_info. */
#define HV_VSS_MAX_FRAME		6300

/* What every v2 frame begins with: 24 bytes. */
struct hv_vss_frame {
	__u32 version;		/* HV_VSS_ABI_V2 */
	__u32 size;		/* bytes of the whole frame, this header included */
	__u32 kind;		/* HV_VSS_FRAME_...; a daemon skips those that it does not know */
	__u32 reserved;		/* 0 */
	__u64 id;		/* the request it belongs to; 0 when it belongs to none */
};

/* Daemon to kernel, the first write: 32 bytes or more. */
struct hv_vss_register {
	struct hv_vss_frame frame;	/* id 0 */
	__u32 max_version;		/* highest ABI version that the daemon speaks, at least 2 */
	__u32 features;			/* what the daemon knows; no bit has a meaning yet */
};

/* Kernel to daemon, the first read: 40 bytes or more. */
struct hv_vss_registered {
	struct hv_vss_frame frame;	/* id 0 */
	__u32 abi_version;		/* in force from here on */
	__u32 max_frame;		/* bytes that a read buffer must hold */
	__u32 features;			/* HV_VSS_FEATURE_...: what this kernel offers */
	__u32 max_held;			/* file systems that can be held at a time */
};

/* Kernel to daemon: fixed_size bytes (48 or more) and payload_size more. */
struct hv_vss_request {
	struct hv_vss_frame frame;	/* its size includes the payload; id is never 0 */
	__u32 time_left_ms;		/* from the read on; then the kernel gives up on it */
	__u32 payload_size;		/* FREEZE: 0 or a struct hv_vss_freeze_info; else 0 */
	struct hv_vss_msg msg;		/* msg.vss_hdr.operation says what the host asks */
	__u32 fixed_size;		/* where the payload begins, counted from the frame's start */
};

/* Daemon to kernel: 32 bytes or more. */
struct hv_vss_answer {
	struct hv_vss_frame frame;	/* with the id of the request */
	__u32 status;			/* HV_S_OK, HV_E_FAIL or another HRESULT, for the host */
	__u32 operation;		/* that of the request */
};

/*
 * The freeze has ended before the host's THAW: 32 bytes or more.
 *
 * Daemon to kernel: tell it as soon as it is known, after the FREEZE was answered and before the THAW
 * is; that THAW is then failed. Kernel to daemon: it has thawed what it held for the daemon, as said above.
 */
struct hv_vss_thawed {
	struct hv_vss_frame frame;	/* with the id of the FREEZE */
	__u32 reason;			/* HV_VSS_THAWED_...; one that is not known counts as well */
	__u32 reserved;			/* 0 */
};

/* One disk that the host will take a snapshot of: 24 bytes. */
struct hv_vss_lun {
	__u8 bus_type;			/* 1 SCSI, 2 IDE */
	__u8 reserved[3];
	__u8 controller[16];		/* instance GUID, its first three fields little-endian */
	__u8 port;
	__u8 target;
	__u8 lun;
	__u8 reserved2;
};

/* What follows a FREEZE request, as the host sent it: 6,252 bytes. */
struct hv_vss_freeze_info {
	__u32 backup_type;		/* full, copy, ... */
	__u32 flags;
	__u32 lun_count;		/* how many of luns count; at most HV_VSS_MAX_LUNS */
	struct hv_vss_lun luns[HV_VSS_MAX_LUNS];
};

/*
 * Freezes the file system of an open descriptor and holds it, until HV_VSS_IOC_THAW or one of the ends
 * named above. For the FREEZE that the daemon has read and not answered yet, or, with id 0, for
 * nobody, as in a rehearsal. Returns when it is frozen. The caller can be killed meanwhile, even when the
 * disk hangs: what comes of the freeze then is undone at once. What others have frozen can be held
 * beside them: it goes on when the last of them lets go.
 *
 *  EBADF       fd is not open, or with O_PATH where that will not do
 *  EBUSY       it is held already, by this daemon or by another exclusive owner. What this one holds with
 *              another id may be thawed before the FREEZE is answered, and then counts for none: thaw it first
 *  EINVAL      flags or reserved is not 0, or count is 0 or more than max_held
 *  ENOMEM      at the first one: there is no memory for count
 *  ENOSPC      more than the first one's count; or, at the first one, what is left of an earlier series
 *              and count are more than max_held together
 *  EOPNOTSUPP  this file system has no means to freeze
 *  EPERM       FIFREEZE would not be allowed either (CAP_SYS_ADMIN for the file system)
 *  EPROTO      not registered, or as v1
 *  ESTALE      no such request is in hand (any more); with id 0: the host is being served, or a notice
 *              has to be read first; the machine is about to sleep; an HV_VSS_IOC_THAW has called it off
 *  ENODEV      the device is gone
 *  EINTR       killed
 *
 * and what the file system says, such as EIO and EROFS.
 */
struct hv_vss_ioc_freeze {	/* 32 bytes */
	__u64 id;		/* the request's, or 0 */
	__s32 fd;		/* open on the file system; with O_PATH where HV_VSS_FEATURE_PATHS says so */
	__u32 flags;		/* 0 */
	__u32 deadline_ms;	/* with the first: from now until all is thawed; 0: the module's limit */
	__u32 count;		/* with the first: how many will be held; memory for them is set aside */
	__u64 reserved;		/* 0 */
};

/*
 * Thaws what is held with this id, and nothing else: one that comes too late ends no other freeze. Returns
 * when it is thawed, or when the caller is killed. What is still being frozen is called off and not waited
 * for: its HV_VSS_IOC_FREEZE ends with ESTALE, and what comes of it is undone at once. So is one that waits
 * for the end of an earlier thaw, also by what gets EBUSY.
 *
 *  EBUSY       its freeze was called off, or its thaw begun, before and has not come back; whatever the id
 *  EINVAL      it is not held (any more), as FITHAW has it; flags is not 0
 *  ESTALE      it is held with another id; nothing has changed
 *
 * and as above. With fd -1: all that is held with this id, begun as named above; 0 also when nothing is.
 *
 * Before it answers a FREEZE a daemon may thaw what it holds for that and freeze it anew: its answer says
 * what stands still then. Where nothing is held any more, and there was something, HV_S_OK is not believed:
 * the THAW after it is failed.
 */
struct hv_vss_ioc_thaw {	/* 16 bytes */
	__u64 id;		/* the one that it was frozen with: the FREEZE's, or 0 */
	__s32 fd;		/* open on the file system, or -1 */
	__u32 flags;		/* 0 */
};

#define HV_VSS_IOC_FREEZE		_IOW(0xB9, 0x56, struct hv_vss_ioc_freeze)
#define HV_VSS_IOC_THAW			_IOW(0xB9, 0x57, struct hv_vss_ioc_thaw)

#endif /* HV_VSS_H */
