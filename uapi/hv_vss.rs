// SPDX-License-Identifier: GPL-2.0

//! The contract between `hv_vss.ko` and whoever holds `/dev/vmbus/hv_vss`.
//!
//! This is the Rust mirror of `hv_vss.h`; the two are compared, field by field, by
//! `uapi/tests/layout.rs`. One source serves both sides: cargo compiles it as the crate
//! `hv_vss_uapi`, the kernel build compiles it into the module. It knows layouts and numbers only:
//! no kernel, no descriptors, no files.
//!
//! Two ABIs share the device:
//!
//! - **v1** is mainline's (`include/uapi/linux/hyperv.h`): 12-byte [`VssMsg`]s in both directions
//!   and a 4-byte reply to the registration.
//! - **v2** is this project's: frames that begin with [`FrameHdr`]. It is offered beside v1; which
//!   of the two is in force is settled by the first write after open.
//!
//! Integers are in the machine's byte order, but for those in a [`FreezeInfo`], which are the host's:
//! little-endian. No structure has padding, and each has the same layout for 32-bit and 64-bit user
//! space. What may change from version to version, and how each side gets along with a newer one, is
//! said in `hv_vss.h`.
#![cfg_attr(not(hv_vss_kernel), no_std)]

use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Where the device is, below `/dev`.
pub const DEVICE_NAME: &str = "vmbus/hv_vss";

/// Operations of the VSS integration component (`enum hv_vss_op` in `<linux/hyperv.h>`), as they
/// stand in [`VssHdr::operation`].
pub mod op {
    /// Announces a backup set; acknowledged, no action.
    pub const CREATE: u8 = 0;
    /// Drops a backup set; acknowledged, no action.
    pub const DELETE: u8 = 1;
    /// Asks whether the guest can be backed up while it runs.
    pub const HOT_BACKUP: u8 = 2;
    /// Asks for device-mapper information; answered by the kernel with flags 0.
    pub const GET_DM_INFO: u8 = 3;
    /// The backup is complete; acknowledged, no action.
    pub const BU_COMPLETE: u8 = 4;
    /// Freeze the file systems (VSS 5.0 and later).
    pub const FREEZE: u8 = 5;
    /// Thaw the file systems (VSS 5.0 and later).
    pub const THAW: u8 = 6;
    /// Auto-recovery of a snapshot; acknowledged, no action.
    pub const AUTO_RECOVER: u8 = 7;
    /// Older v1 registration, which gets no reply (`VSS_OP_REGISTER`).
    pub const REGISTER: u8 = 128;
    /// v1 registration that is answered with a `u32` (`VSS_OP_REGISTER1`).
    pub const REGISTER1: u8 = 129;
}

/// Flags of a HOT_BACKUP answer: the guest needs no auto-recovery (`VSS_HBU_NO_AUTO_RECOVERY`).
pub const HBU_NO_AUTO_RECOVERY: u32 = 5;

/// Status codes that travel to the host (`HV_S_OK`, `HV_E_FAIL`, ... in `<linux/hyperv.h>`).
pub mod status {
    /// Success.
    pub const OK: u32 = 0;
    /// The operation failed (`HV_E_FAIL`).
    pub const FAIL: u32 = 0x8000_4005;
    /// The operation is not supported (`HV_ERROR_NOT_SUPPORTED`).
    pub const NOT_SUPPORTED: u32 = 0x8007_0032;
}

/// `struct hv_vss_hdr`: 8 bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct VssHdr {
    /// One of [`op`].
    pub operation: u8,
    /// Zero.
    pub reserved: [u8; 7],
}

/// `struct hv_vss_msg`: 12 bytes, the whole of a v1 message.
///
/// In a v1 answer the first four bytes are the status instead of the header: see
/// [`VssMsg::answer_v1`] and [`VssMsg::status_v1`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct VssMsg {
    /// What is asked.
    pub hdr: VssHdr,
    /// `vss_cf.flags` of HOT_BACKUP, `dm_info.flags` of GET_DM_INFO.
    pub flags: [u8; 4],
}

impl VssMsg {
    /// A request or registration for `operation`, all else zero.
    pub const fn new(operation: u8) -> Self {
        VssMsg {
            hdr: VssHdr {
                operation,
                reserved: [0; 7],
            },
            flags: [0; 4],
        }
    }

    /// A v1 answer: `status` lies over the first four bytes.
    pub const fn answer_v1(status: u32) -> Self {
        let s = status.to_ne_bytes();
        VssMsg {
            hdr: VssHdr {
                operation: s[0],
                reserved: [s[1], s[2], s[3], 0, 0, 0, 0],
            },
            flags: [0; 4],
        }
    }

    /// The status of a v1 answer.
    pub const fn status_v1(&self) -> u32 {
        let r = &self.hdr.reserved;
        u32::from_ne_bytes([self.hdr.operation, r[0], r[1], r[2]])
    }
}

/// Version number of ABI v2, in [`FrameHdr::version`].
pub const ABI_V2: u32 = 2;

/// Kinds of v2 frames, in [`FrameHdr::kind`].
pub mod frame {
    /// Daemon to kernel: [`super::Register`].
    pub const REGISTER: u32 = 1;
    /// Kernel to daemon: [`super::Registered`], the first frame after a registration.
    pub const REGISTERED: u32 = 2;
    /// Kernel to daemon: [`super::Request`] and its payload.
    pub const REQUEST: u32 = 3;
    /// Daemon to kernel: [`super::Answer`].
    pub const ANSWER: u32 = 4;
    /// Both ways: [`super::Thawed`], a freeze that ended before the host's THAW.
    pub const THAWED: u32 = 5;
}

/// `struct hv_vss_frame`: the 24 bytes that start every v2 frame.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct FrameHdr {
    /// [`ABI_V2`].
    pub version: u32,
    /// Size of the whole frame in bytes, this header included.
    pub size: u32,
    /// One of [`frame`]. A daemon skips kinds that it does not know.
    pub kind: u32,
    /// Zero.
    pub reserved: u32,
    /// The request this frame belongs to; 0 when it belongs to none. Never 0 in a request.
    pub id: u64,
}

/// `struct hv_vss_register`: 32 bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Register {
    /// Kind [`frame::REGISTER`], id 0.
    pub frame: FrameHdr,
    /// Highest ABI version that the daemon speaks.
    pub max_version: u32,
    /// What the daemon knows; no bit has a meaning yet.
    pub features: u32,
}

/// Bits of [`Registered::features`].
pub mod feature {
    /// [`super::IOC_FREEZE`] and [`super::IOC_THAW`].
    pub const HOLD: u32 = 1;
    /// [`super::IocFreeze::fd`] and [`super::IocThaw::fd`] may be open as paths only (`O_PATH`).
    pub const PATHS: u32 = 2;
}

/// `struct hv_vss_registered`: 40 bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Registered {
    /// Kind [`frame::REGISTERED`], id 0.
    pub frame: FrameHdr,
    /// The ABI version in force from here on.
    pub abi_version: u32,
    /// Size in bytes of the largest frame that the kernel will queue: what a read buffer must hold.
    pub max_frame: u32,
    /// Bits of [`feature`]: what this kernel offers.
    pub features: u32,
    /// File systems that can be held at a time.
    pub max_held: u32,
}

/// `struct hv_vss_request`: `fixed_size` bytes, of which these 48 are known, and `payload_size` more.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Request {
    /// Kind [`frame::REQUEST`]; its size includes the payload.
    pub frame: FrameHdr,
    /// Milliseconds from the read on until the kernel gives up on this request.
    pub time_left_ms: u32,
    /// Bytes that follow the fixed part: for FREEZE a [`FreezeInfo`], otherwise 0.
    pub payload_size: u32,
    /// What the host asks.
    pub msg: VssMsg,
    /// Where the payload begins, in bytes from the start of the frame.
    pub fixed_size: u32,
}

/// `struct hv_vss_answer`: 32 bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Answer {
    /// Kind [`frame::ANSWER`], with the id of the request.
    pub frame: FrameHdr,
    /// One of [`status`], or any other HRESULT for the host.
    pub status: u32,
    /// The operation of the request: an answer to another operation is refused.
    pub operation: u32,
}

/// Why a freeze ended early, in [`Thawed::reason`].
pub mod thawed {
    /// The daemon's deadline passed.
    pub const DEADLINE: u32 = 1;
    /// An operator asked for it.
    pub const OPERATOR: u32 = 2;
    /// The daemon or its guard died or failed.
    pub const CRASH: u32 = 3;
    /// Somebody else thawed a file system that the daemon had frozen.
    pub const FOREIGN: u32 = 4;
    /// The machine is about to sleep.
    pub const SLEEP: u32 = 5;
    /// The FREEZE has failed, or the THAW after it.
    pub const CALLED_OFF: u32 = 6;
    /// The device went away: in traces, since a read gets `ENODEV` then.
    pub const GONE: u32 = 7;
}

/// `struct hv_vss_thawed`: 32 bytes. After it the host's THAW is failed. From the kernel: it has thawed
/// what it held for the daemon, while the device is there.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Thawed {
    /// Kind [`frame::THAWED`], with the id of the FREEZE request that ended.
    pub frame: FrameHdr,
    /// One of [`thawed`]; one that is not known counts as well.
    pub reason: u32,
    /// Zero.
    pub reserved: u32,
}

/// `struct hv_vss_ioc_freeze`: 32 bytes, the argument of [`IOC_FREEZE`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct IocFreeze {
    /// Id of the FREEZE request that it is for; 0 when it is for none.
    pub id: u64,
    /// A descriptor on the file system.
    pub fd: i32,
    /// Zero.
    pub flags: u32,
    /// With the first: milliseconds from now until all is thawed; 0 for the module's own limit.
    pub deadline_ms: u32,
    /// With the first: how many will be held at a time.
    pub count: u32,
    /// Zero.
    pub reserved: u64,
}

/// `struct hv_vss_ioc_thaw`: 16 bytes, the argument of [`IOC_THAW`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct IocThaw {
    /// The id that it was frozen with: what is held with another is not touched.
    pub id: u64,
    /// A descriptor on the file system, or -1 for all that is held with this id.
    pub fd: i32,
    /// Zero.
    pub flags: u32,
}

/// The type byte of both ioctls.
pub const IOC_TYPE: u8 = 0xb9;

/// `_IOW(IOC_TYPE, nr, T)` of the kernel's generic `asm/ioctl.h`, as on x86 and arm64.
const fn iow<T>(nr: u8) -> u32 {
    (1 << 30) | ((size_of::<T>() as u32) << 16) | ((IOC_TYPE as u32) << 8) | nr as u32
}

/// Freezes the file system of an open descriptor and holds it ([`IocFreeze`]). Its errors, among them `ENOMEM`
/// when there is no memory for [`IocFreeze::count`], are in `hv_vss.h`.
pub const IOC_FREEZE: u32 = iow::<IocFreeze>(0x56);
/// Thaws one that is held, or all of one id ([`IocThaw`]).
pub const IOC_THAW: u32 = iow::<IocThaw>(0x57);

/// LUN records in a [`FreezeInfo`] (`LunCount` is at most this).
pub const MAX_LUNS: usize = 260;

/// `struct hv_vss_lun`: one disk of the backup set, 24 bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Lun {
    /// 1 SCSI, 2 IDE.
    pub bus_type: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// Instance GUID of the controller, in its wire form (first three fields little-endian).
    pub controller: [u8; 16],
    /// Port of the controller.
    pub port: u8,
    /// Target on the port.
    pub target: u8,
    /// Logical unit of the target.
    pub lun: u8,
    /// Zero.
    pub reserved2: u8,
}

/// `struct hv_vss_freeze_info`: what follows the [`VssHdr`] of the host's FREEZE, 6,252 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FreezeInfo {
    /// The host's backup type (full, copy, ...), as it sent it.
    pub backup_type: u32,
    /// The host's flags, as it sent them.
    pub flags: u32,
    /// How many of `luns` count.
    pub lun_count: u32,
    /// The disks that the host will snapshot.
    pub luns: [Lun; MAX_LUNS],
}

/// Size in bytes of the largest v2 frame: a FREEZE request with its [`FreezeInfo`].
pub const MAX_FRAME: usize = size_of::<Request>() + size_of::<FreezeInfo>();

const _: () = assert!(size_of::<VssMsg>() == 12);
const _: () = assert!(size_of::<FrameHdr>() == 24);
const _: () = assert!(size_of::<Register>() == 32);
const _: () = assert!(size_of::<Registered>() == 40);
const _: () = assert!(size_of::<Request>() == 48);
const _: () = assert!(size_of::<Answer>() == 32);
const _: () = assert!(size_of::<Thawed>() == 32);
const _: () = assert!(size_of::<IocFreeze>() == 32);
const _: () = assert!(size_of::<IocThaw>() == 16);
const _: () = assert!(size_of::<Lun>() == 24);
const _: () = assert!(size_of::<FreezeInfo>() == 6252);
const _: () = assert!(MAX_FRAME == 6300);
