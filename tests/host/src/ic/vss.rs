// SPDX-License-Identifier: GPL-2.0-only

//! The host side of the VSS integration component: its messages, and a handle that sends them.
//!
//! Layouts are those of `include/uapi/linux/hyperv.h` (short messages) and of openvmm's
//! `hyperv_ic_protocol::vss` (FREEZE with its list of disks).

use crate::channel::{IcChannel, Reply, Tx};
use crate::host::HostError;
use crate::ic::Version;
use crate::vmbus::protocol::Guid;
use std::ops::Deref;
use std::time::Duration;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Device class of VSS (`HV_VSS_GUID`).
pub const CLASS: Guid = Guid::new(
    0x35fa2e29,
    0xea23,
    0x4236,
    [0x96, 0xae, 0x3a, 0x6e, 0xba, 0xcb, 0xa4, 0x40],
);

/// The message versions that a current host offers: Windows 8, 8.1, 10 and later.
pub const VERSIONS: [Version; 4] = [
    Version::new(4, 0),
    Version::new(5, 0),
    Version::new(6, 0),
    Version::new(7, 0),
];

/// An operation (`enum hv_vss_op`). Any number can be sent, so this is not an enum.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(transparent)]
pub struct Op(pub u8);

impl Op {
    /// Announces a backup set.
    pub const CREATE: Op = Op(0);
    /// Drops a backup set.
    pub const DELETE: Op = Op(1);
    /// Asks whether the guest can be backed up while it runs.
    pub const HOT_BACKUP: Op = Op(2);
    /// Asks for device-mapper information.
    pub const GET_DM_INFO: Op = Op(3);
    /// The backup is complete.
    pub const BU_COMPLETE: Op = Op(4);
    /// Freeze the file systems.
    pub const FREEZE: Op = Op(5);
    /// Thaw the file systems.
    pub const THAW: Op = Op(6);
    /// Auto-recovery of a snapshot.
    pub const AUTO_RECOVER: Op = Op(7);
    /// Cluster query, from version 6.0.
    pub const CLUSTER_QUERY: Op = Op(8);

    /// The name of a known operation.
    pub fn name(self) -> Option<&'static str> {
        Some(match self {
            Op::CREATE => "CREATE",
            Op::DELETE => "DELETE",
            Op::HOT_BACKUP => "HOT_BACKUP",
            Op::GET_DM_INFO => "GET_DM_INFO",
            Op::BU_COMPLETE => "BU_COMPLETE",
            Op::FREEZE => "FREEZE",
            Op::THAW => "THAW",
            Op::AUTO_RECOVER => "AUTO_RECOVER",
            Op::CLUSTER_QUERY => "CLUSTER_QUERY",
            _ => return None,
        })
    }
}

impl std::fmt::Display for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "operation {}", self.0),
        }
    }
}

impl std::fmt::Debug for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// Flags of a HOT_BACKUP answer: no auto-recovery needed (`VSS_HBU_NO_AUTO_RECOVERY`).
pub const HBU_NO_AUTO_RECOVERY: u32 = 5;

/// Bytes of a short message, its 8-byte header included.
pub const SHORT_MESSAGE: usize = 32;

/// Records in the list of a FREEZE or AUTO_RECOVER message.
pub const MAX_LUNS: usize = 260;

/// One disk of the backup set: 24 bytes.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Lun {
    /// 1 SCSI, 2 IDE.
    pub bus_type: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// Instance GUID of the controller.
    pub controller: Guid,
    /// Port of the controller.
    pub port: u8,
    /// Target on the port.
    pub target: u8,
    /// Logical unit of the target.
    pub lun: u8,
    /// Zero.
    pub reserved2: u8,
}

const _: () = assert!(size_of::<Lun>() == 24);

impl Lun {
    /// A SCSI disk of the controller with this instance GUID.
    pub const fn scsi(controller: Guid, port: u8, target: u8, lun: u8) -> Self {
        Lun {
            bus_type: 1,
            reserved: [0; 3],
            controller,
            port,
            target,
            lun,
            reserved2: 0,
        }
    }
}

/// What follows the 8-byte header of a FREEZE: 6,252 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FreezeBody {
    /// Backup type (full, copy, ...).
    pub backup_type: U32,
    /// Flags.
    pub flags: U32,
    /// How many of `luns` count.
    pub lun_count: U32,
    /// The disks.
    pub luns: [Lun; MAX_LUNS],
}

const _: () = assert!(size_of::<FreezeBody>() + 8 == 6260);

impl FreezeBody {
    /// A backup of these disks, or `None` when they are more than [`MAX_LUNS`].
    pub fn new(backup_type: u32, flags: u32, luns: &[Lun]) -> Option<Self> {
        let mut body = FreezeBody {
            backup_type: U32::new(backup_type),
            flags: U32::new(flags),
            lun_count: U32::new(luns.len().try_into().ok()?),
            luns: [Lun::default(); MAX_LUNS],
        };
        body.luns.get_mut(..luns.len())?.copy_from_slice(luns);
        Some(body)
    }
}

/// The whole body of an IC message with operation `op`: the 8-byte header, then `rest`.
pub fn message(op: Op, rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![op.0, 0, 0, 0, 0, 0, 0, 0];
    bytes.extend_from_slice(rest);
    bytes
}

/// The 24 zero bytes that follow the header of a short message.
pub const SHORT_BODY: [u8; SHORT_MESSAGE - 8] = [0; SHORT_MESSAGE - 8];

/// The VSS channel. All that an [`IcChannel`] can do, it can do too.
///
/// Requests go out with the versions of the last negotiation on this opening of the channel, or
/// with framework 3.0 and VSS 5.0 before any.
#[derive(Clone)]
pub struct Vss {
    channel: IcChannel,
}

impl Deref for Vss {
    type Target = IcChannel;

    fn deref(&self) -> &IcChannel {
        &self.channel
    }
}

impl Vss {
    pub(crate) fn new(channel: IcChannel) -> Self {
        Vss { channel }
    }

    /// Sends THAW.
    pub fn send_thaw(&self) -> Result<Tx, HostError> {
        self.send(Op::THAW, &SHORT_BODY)
    }

    /// Sends operation `op` with `rest` after the 8-byte header, without waiting for the answer:
    /// requests may overlap.
    ///
    /// Pass [`SHORT_BODY`] for a message of the usual short form, or a [`FreezeBody`]'s bytes.
    pub fn send(&self, op: Op, rest: &[u8]) -> Result<Tx, HostError> {
        self.channel
            .send_request(&op.to_string(), &message(op, rest))
    }

    /// Sends a FREEZE at its full size, with these disks, and does not wait.
    pub fn send_freeze(&self, luns: &[Lun]) -> Result<Tx, HostError> {
        let body =
            FreezeBody::new(0, 0, luns).ok_or(HostError::TooManyLuns { luns: luns.len() })?;
        self.send(Op::FREEZE, body.as_bytes())
    }

    /// Sends operation `op` with `rest` after the header and waits for the answer.
    pub fn op(&self, op: Op, rest: &[u8], timeout: Duration) -> Result<Reply, HostError> {
        let tx = self.send(op, rest)?;
        self.channel.wait(tx, timeout)
    }

    /// FREEZE at its full size, with these disks. The guest's verdict is in [`Reply::status`].
    pub fn freeze(&self, luns: &[Lun], timeout: Duration) -> Result<Reply, HostError> {
        let tx = self.send_freeze(luns)?;
        self.channel.wait(tx, timeout)
    }

    /// THAW.
    pub fn thaw(&self, timeout: Duration) -> Result<Reply, HostError> {
        let tx = self.send_thaw()?;
        self.channel.wait(tx, timeout)
    }

    /// HOT_BACKUP; the flags of the answer are in [`vss_flags`].
    pub fn hot_backup(&self, timeout: Duration) -> Result<Reply, HostError> {
        self.op(Op::HOT_BACKUP, &SHORT_BODY, timeout)
    }

    /// GET_DM_INFO; the flags of the answer are in [`vss_flags`].
    pub fn get_dm_info(&self, timeout: Duration) -> Result<Reply, HostError> {
        self.op(Op::GET_DM_INFO, &SHORT_BODY, timeout)
    }
}

/// The u32 that follows the VSS header of an answer: `vss_cf.flags` or `dm_info.flags`.
pub fn vss_flags(reply: &Reply) -> Option<u32> {
    let bytes = reply.body().get(8..12)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freeze_is_6260_bytes_with_its_disks_in_place() {
        let disk = Lun::scsi(CLASS, 1, 2, 3);
        let body = FreezeBody::new(4, 5, &[disk, disk]).expect("two disks fit");
        let bytes = message(Op::FREEZE, body.as_bytes());
        assert_eq!(bytes.len(), 6260);
        assert_eq!(bytes[..8], [5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[8..20], [4, 0, 0, 0, 5, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(bytes[20..24], [1, 0, 0, 0]);
        assert_eq!(bytes[24..28], [0x29, 0x2e, 0xfa, 0x35]);
        assert_eq!(bytes[40..44], [1, 2, 3, 0]);
        assert_eq!(bytes[68..], [0; 6260 - 68]);
    }

    #[test]
    fn more_disks_than_the_list_holds_are_refused() {
        assert!(FreezeBody::new(0, 0, &[Lun::default(); MAX_LUNS]).is_some());
        assert!(FreezeBody::new(0, 0, &[Lun::default(); MAX_LUNS + 1]).is_none());
    }
}
