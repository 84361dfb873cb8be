// SPDX-License-Identifier: GPL-2.0-only

//! The host side of the time synchronisation integration component (`struct ictimesync_data`).

use crate::channel::{IcChannel, Reply};
use crate::host::HostError;
use crate::ic::Version;
use crate::vmbus::protocol::Guid;
use std::ops::Deref;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Device class of time synchronisation (`HV_TS_GUID`).
pub const CLASS: Guid = Guid::new(
    0x9527e630,
    0xd0ae,
    0x497b,
    [0xad, 0xce, 0xe8, 0x0a, 0xb0, 0x17, 0x5c, 0xaf],
);

/// The message versions that a current host offers.
pub const VERSIONS: [Version; 3] = [Version::new(1, 0), Version::new(3, 0), REFERENCE];

/// From this version on a message says at which moment of the guest's own clock the host's time was read.
const REFERENCE: Version = Version::new(4, 0);

/// The flag of a message after which the guest's clock is set, however far it is off
/// (`ICTIMESYNCFLAG_SYNC`).
pub const SYNC: u8 = 1;

/// From the beginning of 1601, where the host's time begins, to that of 1970 (`WLTIMEDELTA`).
pub const BEFORE_UNIX: Duration = Duration::from_secs(11_644_473_600);

/// `struct ictimesync_data`: of all versions before 4.0.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Sample {
    /// The host's time in units of 100 ns since 1601.
    pub parent_time: U64,
    /// Zero.
    pub child_time: U64,
    /// Zero.
    pub round_trip_time: U64,
    /// [`SYNC`] or another.
    pub flags: u8,
}

const _: () = assert!(size_of::<Sample>() == 25);

/// `struct ictimesync_ref_data`: from version 4.0 on. openvmm's has two more bytes at its end than the kernel's,
/// whose is packed.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReferenceSample {
    /// The host's time in units of 100 ns since 1601.
    pub parent_time: U64,
    /// The guest's reference time at that moment, in units of 100 ns.
    pub reference_time: U64,
    /// [`SYNC`] or another.
    pub flags: u8,
    /// No leap second is near: 0.
    pub leap: u8,
    /// Of the host's clock; 0 says nothing.
    pub stratum: u8,
    /// Zero.
    pub reserved: [u8; 5],
}

const _: () = assert!(size_of::<ReferenceSample>() == 24);

/// The message that has the guest set its clock: that time was it when the guest's reference time was this.
fn message(version: Version, time: SystemTime, reference_time: u64) -> Vec<u8> {
    // A time before 1970 is none that a host has.
    let since_1601 = BEFORE_UNIX + time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let parent_time = U64::new((since_1601.as_nanos() / 100) as u64);
    if version >= REFERENCE {
        let sample = ReferenceSample {
            parent_time,
            reference_time: U64::new(reference_time),
            flags: SYNC,
            leap: 0,
            stratum: 0,
            reserved: [0; 5],
        };
        sample.as_bytes().to_vec()
    } else {
        let sample = Sample {
            parent_time,
            child_time: U64::new(0),
            round_trip_time: U64::new(0),
            flags: SYNC,
        };
        sample.as_bytes().to_vec()
    }
}

/// The time synchronisation channel. All that an [`IcChannel`] can do, it can do too.
#[derive(Clone)]
pub struct TimeSync {
    channel: IcChannel,
}

impl Deref for TimeSync {
    type Target = IcChannel;

    fn deref(&self) -> &IcChannel {
        &self.channel
    }
}

impl TimeSync {
    pub(crate) fn new(channel: IcChannel) -> Self {
        TimeSync { channel }
    }

    /// Has the guest set its clock to this time, which it does soon after it has answered; negotiates first
    /// when the channel has not been negotiated since it was opened.
    pub fn set(&self, time: SystemTime, timeout: Duration) -> Result<Reply, HostError> {
        let version = self.channel.agree_once(timeout)?.message;
        let reference_time = self.channel.host.reference_time()?;
        let message = message(version, time, reference_time);
        let tx = self.channel.send_request("time sync", &message)?;
        self.channel.wait(tx, timeout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_that_of_the_version_agreed_on() {
        let time = UNIX_EPOCH + Duration::from_secs(1);
        let since_1601 = (11_644_473_601_u64 * 10_000_000).to_le_bytes();
        for old in [Version::new(1, 0), Version::new(3, 0)] {
            let message = message(old, time, 0x1234);
            assert_eq!(message[..8], since_1601);
            assert_eq!(message[8..24], [0; 16]);
            assert_eq!(message[24..], [SYNC]);
        }
        let message = message(Version::new(4, 0), time, 0x1234);
        assert_eq!(message[..8], since_1601);
        assert_eq!(message[8..16], 0x1234_u64.to_le_bytes());
        assert_eq!(message[16..], [SYNC, 0, 0, 0, 0, 0, 0, 0]);
    }
}
