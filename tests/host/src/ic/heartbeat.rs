// SPDX-License-Identifier: GPL-2.0-only

//! The host side of the heartbeat integration component (`struct heartbeat_msg_data`).

use crate::channel::IcChannel;
use crate::host::HostError;
use crate::ic::Version;
use crate::vmbus::protocol::Guid;
use std::ops::Deref;
use std::time::Duration;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Device class of the heartbeat (`HV_HEART_BEAT_GUID`).
pub const CLASS: Guid = Guid::new(
    0x57164f39,
    0x9115,
    0x4e78,
    [0xab, 0x55, 0x38, 0x2f, 0x3b, 0xd5, 0x42, 0x2d],
);

/// The message versions that a current host offers.
pub const VERSIONS: [Version; 2] = [Version::new(1, 0), Version::new(3, 0)];

/// A heartbeat: the guest adds one to the number and sends it back.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Beat {
    /// Sequence number.
    pub sequence: U64,
    /// Zero.
    pub reserved: [U32; 8],
}

const _: () = assert!(size_of::<Beat>() == 40);

/// The heartbeat channel. All that an [`IcChannel`] can do, it can do too.
#[derive(Clone)]
pub struct Heartbeat {
    channel: IcChannel,
}

impl Deref for Heartbeat {
    type Target = IcChannel;

    fn deref(&self) -> &IcChannel {
        &self.channel
    }
}

impl Heartbeat {
    pub(crate) fn new(channel: IcChannel) -> Self {
        Heartbeat { channel }
    }

    /// Sends one beat with number `sequence` and returns the number and the time of the answer,
    /// negotiating first when the channel has not been negotiated since it was opened.
    pub fn beat(&self, sequence: u64, timeout: Duration) -> Result<(u64, Duration), HostError> {
        self.channel.agree_once(timeout)?;
        let beat = Beat {
            sequence: U64::new(sequence),
            reserved: [U32::new(0); 8],
        };
        let tx = self.channel.send_request("heartbeat", beat.as_bytes())?;
        let reply = self.channel.wait(tx, timeout)?;
        let (answer, _) =
            Beat::read_from_prefix(reply.body()).map_err(|_| HostError::BadReply {
                channel: self.channel.name(),
                what: "too short for a heartbeat",
            })?;
        Ok((answer.sequence.get(), reply.latency))
    }
}
