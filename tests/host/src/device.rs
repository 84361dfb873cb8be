// SPDX-License-Identifier: GPL-2.0-only

//! What a device on the bus is: something with a place there, whose channel the guest opens, sends
//! packets on, and closes.
//!
//! The bus carries the packets and knows nothing of what is in them; a device knows nothing of rings
//! and memory pages. Everything here happens under the bus's lock, so a device does no more than is
//! done at once: what takes time belongs on a thread of its own, which sends with [`crate::Host`].

use crate::event::EventKind;
use crate::vmbus::protocol::Guid;
use crate::vmbus::ring::{Descriptor, Packet};
use std::time::Instant;

/// What the guest is told when the device is offered. It never changes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// In the log.
    pub name: &'static str,
    /// The channel's number on the bus.
    pub relid: u32,
    /// What kind of device it is.
    pub class: Guid,
    /// Which one.
    pub instance: Guid,
    /// Whether it is offered as a message pipe.
    pub pipe: bool,
}

impl Place {
    /// The connection on which the guest signals it.
    pub(crate) fn connection_id(&self) -> u32 {
        0x1_0000 + self.relid
    }
}

/// A packet on its way to the guest.
#[derive(Debug)]
pub(crate) struct Outgoing {
    /// By this the device knows it again in [`Device::sent`].
    pub transaction: u64,
    /// The transaction id in its descriptor.
    pub id: u64,
    pub descriptor: Descriptor,
    pub payload: Vec<u8>,
}

/// What a device wants done when it has been opened or has looked at a packet.
#[derive(Default)]
pub(crate) struct Wishes {
    /// To be sent, in this order.
    pub send: Vec<Outgoing>,
    /// For the log.
    pub notes: Vec<EventKind>,
}

/// A device.
pub(crate) trait Device: Send {
    /// Where it is on the bus.
    fn offer(&self) -> Place;

    /// The guest has opened its channel, for this time since the machine was started. It will be told
    /// so when what the device wants sent is in its ring.
    fn opened(&mut self, opening: u64, wishes: &mut Wishes);

    /// The guest has sent a packet, which was seen at this moment.
    fn packet(&mut self, packet: Packet, at: Instant, wishes: &mut Wishes);

    /// A packet of this transaction has just been put into the guest's ring. What is returned is
    /// for the log.
    fn sent(&mut self, transaction: u64, bytes: usize, at: Instant) -> Option<EventKind>;

    /// The channel is closed, by the guest or by the host. Once this returns, the device does not
    /// touch memory that the guest had lent it.
    fn closed(&mut self);
}
