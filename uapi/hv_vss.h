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
 * All integers are in the machine's byte order. No structure has padding, and each has the same
 * layout for 32-bit and 64-bit programs.
 *
 * One process at a time can have the device open; the next one gets EBUSY. One read returns one
 * message, one write is one message. A read into a buffer that is too short gets EINVAL and loses
 * nothing. A write that is refused changes nothing:
 *
 *  EINVAL   wrong length, version, size, kind, reason, or a reserved field that is not zero
 *  EPROTO   well formed, but not now: anything else before the registration, or a second one
 *  ESTALE   there is no open request with this id that this descriptor has read: it has ended
 *           (time over), or never was; in v1: there is no open request that was read
 *  EBADMSG  the id is right, but the request was for another operation
 *  ENODEV   the device is gone; a poll says POLLERR and POLLHUP, and a read ENODEV. Close the
 *           descriptor and open the device again when it is back
 *
 * Closing the descriptor with a request open fails that request at once. When it is closed between
 * a FREEZE that succeeded and its THAW, the THAW is failed too, since nobody has watched over the
 * freeze; it is still handed to a daemon that has registered by then, so that it can thaw.
 *
 * When the machine is about to sleep while something may be frozen, the daemon reads a THAW that no
 * host has asked for, and the machine waits some seconds for its answer. When it hibernates, a
 * registered daemon reads one afterwards, too. It answers as always; the registration stays in force.
 */
#ifndef HV_VSS_H
#define HV_VSS_H

#include <linux/types.h>
#include <linux/hyperv.h>

/* hv_vss_frame.version, and the ABI version that v2 stands for. */
#define HV_VSS_ABI_V2			2

/* hv_vss_frame.kind: */
#define HV_VSS_FRAME_REGISTER		1	/* to the kernel: struct hv_vss_register */
#define HV_VSS_FRAME_REGISTERED		2	/* to the daemon: struct hv_vss_registered */
#define HV_VSS_FRAME_REQUEST		3	/* to the daemon: struct hv_vss_request */
#define HV_VSS_FRAME_ANSWER		4	/* to the kernel: struct hv_vss_answer */
#define HV_VSS_FRAME_THAWED		5	/* to the kernel: struct hv_vss_thawed */

/* hv_vss_thawed.reason: */
#define HV_VSS_THAWED_DEADLINE		1	/* the daemon's own time limit */
#define HV_VSS_THAWED_OPERATOR		2	/* somebody asked for it */
#define HV_VSS_THAWED_CRASH		3	/* the daemon or its guard died or failed */
#define HV_VSS_THAWED_FOREIGN		4	/* another program thawed what the daemon had frozen */

/* Records in hv_vss_freeze_info.luns. */
#define HV_VSS_MAX_LUNS			260

/* Bytes of the largest frame: a FREEZE request with its struct hv_vss_freeze_info. */
#define HV_VSS_MAX_FRAME		6300

/* What every v2 frame begins with: 24 bytes. */
struct hv_vss_frame {
	__u32 version;		/* HV_VSS_ABI_V2 */
	__u32 size;		/* bytes of the whole frame, this header included */
	__u32 kind;		/* a reader skips kinds that it does not know */
	__u32 reserved;		/* 0 */
	__u64 id;		/* the request it belongs to; 0 when it belongs to none */
};

/* Daemon to kernel, the first write: 32 bytes. */
struct hv_vss_register {
	struct hv_vss_frame frame;	/* id 0 */
	__u32 max_version;		/* highest ABI version that the daemon speaks, at least 2 */
	__u32 flags;			/* 0 */
};

/* Kernel to daemon, the first read: 32 bytes. */
struct hv_vss_registered {
	struct hv_vss_frame frame;	/* id 0 */
	__u32 abi_version;		/* in force from here on */
	__u32 max_frame;		/* bytes that a read buffer must hold */
};

/* Kernel to daemon: 48 bytes and payload_size more. */
struct hv_vss_request {
	struct hv_vss_frame frame;	/* its size includes the payload; id is never 0 */
	__u32 time_left_ms;		/* counted from the read; then the kernel gives up on it */
	__u32 payload_size;		/* FREEZE: 0 or a struct hv_vss_freeze_info; else 0 */
	struct hv_vss_msg msg;		/* msg.vss_hdr.operation says what the host asks */
	__u32 reserved;			/* 0 */
};

/* Daemon to kernel: 32 bytes. */
struct hv_vss_answer {
	struct hv_vss_frame frame;	/* with the id of the request */
	__u32 status;			/* HV_S_OK, HV_E_FAIL or another HRESULT, for the host */
	__u32 operation;		/* that of the request */
};

/*
 * Daemon to kernel: 32 bytes. The freeze has ended before the host's THAW. Tell it as soon as it
 * is known, after the FREEZE was answered and before the THAW is: that THAW is then failed.
 */
struct hv_vss_thawed {
	struct hv_vss_frame frame;	/* with the id of the FREEZE */
	__u32 reason;			/* HV_VSS_THAWED_... */
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

#endif /* HV_VSS_H */
