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

/// The message versions that are offered. From 4.0 on a sample has the guest's own reference time in it,
/// which this host does not know.
pub const VERSIONS: [Version; 2] = [Version::new(1, 0), Version::new(3, 0)];

/// The flag of a message after which the guest's clock is set, however far it is off
/// (`ICTIMESYNCFLAG_SYNC`).
pub const SYNC: u8 = 1;

/// From the beginning of 1601, where the host's time begins, to that of 1970 (`WLTIMEDELTA`).
pub const BEFORE_UNIX: Duration = Duration::from_secs(11_644_473_600);

/// `struct ictimesync_data`.
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
        self.channel.agree_once(timeout)?;
        // A time before 1970 is none that a host has.
        let since_1601 = BEFORE_UNIX + time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let sample = Sample {
            parent_time: U64::new((since_1601.as_nanos() / 100) as u64),
            child_time: U64::new(0),
            round_trip_time: U64::new(0),
            flags: SYNC,
        };
        let tx = self.channel.send_request("time sync", sample.as_bytes())?;
        self.channel.wait(tx, timeout)
    }
}
