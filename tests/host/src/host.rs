// SPDX-License-Identifier: GPL-2.0-only

//! The handles that a test holds: the host, its channels, and the log of what travelled.

use crate::ic::heartbeat::Heartbeat;
use crate::ic::shutdown::Shutdown;
use crate::ic::vss::Vss;
use crate::ic::{IcHeader, Version};
use crate::vm::Exit;
use crate::vmbus::protocol::{Guid, VmbusVersion};
use std::time::Duration;

/// What the host offers.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// The VMBus versions that it accepts. Without any from 5.0 on it has no connection 4 either, as
    /// an older host.
    pub vmbus_versions: Vec<VmbusVersion>,
    /// Whether VSS is offered from the start (else after [`Channel::offer`]).
    pub vss: bool,
    /// Whether the heartbeat is offered from the start.
    pub heartbeat: bool,
    /// Whether shutdown is offered from the start.
    pub shutdown: bool,
}

impl Default for HostConfig {
    /// All versions, all components.
    fn default() -> Self {
        HostConfig {
            vmbus_versions: VmbusVersion::ALL.to_vec(),
            vss: true,
            heartbeat: true,
            shutdown: true,
        }
    }
}

/// What can go wrong between host and guest.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The event that was waited for did not come.
    #[error("{channel}: no {what} within {after:?}; seen on the channel:\n{seen}\nthe console ends:\n{console}")]
    Timeout {
        /// Where.
        channel: &'static str,
        /// What was waited for.
        what: String,
        /// How long.
        after: Duration,
        /// The channel's last events, one a line.
        seen: String,
        /// The last lines of the guest's console.
        console: String,
    },
    /// The guest ended while it was waited for.
    #[error("{channel}: the guest ended ({exit:?}) before {what}; the console ends:\n{console}")]
    GuestGone {
        /// Where.
        channel: &'static str,
        /// What was waited for.
        what: String,
        /// How the guest ended.
        exit: Exit,
        /// The last lines of the guest's console.
        console: String,
    },
    /// The channel is not open, or was closed before the answer came.
    #[error("{channel}: the guest has not opened the channel, or closed it before {what}")]
    NotOpen {
        /// Where.
        channel: &'static str,
        /// What was to be done.
        what: String,
    },
    /// The packet is larger than the ring that the guest gave.
    #[error(
        "{channel}: a packet of {packet} bytes can never fit the guest's ring of {ring} bytes"
    )]
    TooLarge {
        /// Where.
        channel: &'static str,
        /// Bytes in the ring, descriptor and trailer included.
        packet: usize,
        /// Data bytes of the ring.
        ring: usize,
    },
    /// More disks than a FREEZE can name.
    #[error("a FREEZE cannot name {luns} disks")]
    TooManyLuns {
        /// How many.
        luns: usize,
    },
    /// The guest's answer makes no sense.
    #[error("{channel}: bad reply: {what}")]
    BadReply {
        /// Where.
        channel: &'static str,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The guest accepts none of the versions.
    #[error("{channel}: the guest refused all versions (framework {frameworks:?}, messages {messages:?})")]
    NegotiationRefused {
        /// Where.
        channel: &'static str,
        /// Framework versions that were offered.
        frameworks: Vec<Version>,
        /// Message versions that were offered.
        messages: Vec<Version>,
    },
    /// The guest answered with a status other than success.
    #[error("the guest refused to {what}: status {status:#x}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Its status.
        status: u32,
    },
    /// The transaction was never sent on this channel, or is forgotten.
    #[error("{channel}: no transaction {tx:?}")]
    UnknownTransaction {
        /// Where.
        channel: &'static str,
        /// Which.
        tx: Tx,
    },
}

/// Names one packet that was sent: the transaction id in its descriptor, which the guest repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub struct Tx(pub u64);

/// What a negotiation settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Negotiated {
    /// The framework version that the guest chose.
    pub framework: Version,
    /// The message version that the guest chose.
    pub message: Version,
}

/// The guest's answer to one request.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Its header, pipe and IC part together.
    pub header: IcHeader,
    /// The whole packet after the ring's descriptor, header included.
    pub raw: Vec<u8>,
    /// From the moment when the request was in the ring to the arrival of this answer.
    pub latency: Duration,
    /// When it arrived, on the clock of [`Host::now`].
    pub at: Duration,
}

impl Reply {
    /// The guest's verdict: see [`crate::ic::status`].
    pub fn status(&self) -> u32 {
        self.header.status.get()
    }

    /// What follows the headers.
    pub fn body(&self) -> &[u8] {
        self.raw.get(size_of::<IcHeader>()..).unwrap_or(&[])
    }
}

/// Something that happened between host and guest.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Event {
    /// When, on the clock of [`Host::now`].
    pub at: Duration,
    /// On which channel: `vss`, `heartbeat`, `shutdown`, or `vmbus` for the bus itself.
    pub channel: &'static str,
    /// What.
    pub kind: EventKind,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub enum EventKind {
    /// The guest connected with this version.
    Connected {
        /// The version, as `major.minor`.
        version: String,
    },
    /// The guest unloaded its VMBus driver (panic, kexec, hibernation).
    Unloaded,
    /// The channel was offered to the guest.
    Offered,
    /// The guest opened the channel.
    Opened {
        /// Data bytes of the ring towards the guest.
        ring: usize,
    },
    /// The guest closed the channel.
    Closed,
    /// The host took the channel back.
    Rescinded,
    /// The guest has forgotten the channel that was taken back.
    Released,
    /// A negotiation ended.
    Negotiated(Option<Negotiated>),
    /// A request or raw packet was put into the ring.
    Sent {
        /// Its transaction.
        tx: Tx,
        /// What it is, in words: `FREEZE`, `raw`, ...
        name: String,
        /// Its bytes after the descriptor.
        bytes: usize,
    },
    /// The guest answered.
    Reply {
        /// The request's transaction.
        tx: Tx,
        /// What the request was, in words.
        name: String,
        /// The guest's verdict.
        status: u32,
        /// From send to arrival.
        latency: Duration,
    },
    /// The guest sent a packet that answers nothing, or that is no proper answer.
    Stray {
        /// Its transaction.
        tx: Tx,
        /// Its bytes after the descriptor.
        bytes: usize,
    },
    /// The guest broke a rule of the bus; the text says which.
    Violation(String),
    /// The guest reported a panic.
    Crash,
}

/// The host's side of one guest's VMBus.
#[derive(Clone)]
pub struct Host {}

impl Host {
    pub(crate) fn new(_config: HostConfig) -> Self {
        Host {}
    }

    /// Time since the machine was started: the clock of all events.
    pub fn now(&self) -> Duration {
        Duration::ZERO
    }

    /// Waits until the guest has connected to the bus, and says with which version.
    pub fn wait_connected(&self, timeout: Duration) -> Result<VmbusVersion, HostError> {
        Err(self.no("connection", timeout))
    }

    /// The VSS integration component.
    pub fn vss(&self) -> Vss {
        Vss::new(Channel { host: self.clone() })
    }

    /// The heartbeat integration component.
    pub fn heartbeat(&self) -> Heartbeat {
        Heartbeat::new(Channel { host: self.clone() })
    }

    /// The shutdown integration component.
    pub fn shutdown(&self) -> Shutdown {
        Shutdown::new(Channel { host: self.clone() })
    }

    /// All events so far, in the order in which they happened (the oldest are dropped beyond
    /// 100,000).
    pub fn events(&self) -> Vec<Event> {
        Vec::new()
    }

    fn no(&self, what: &str, after: Duration) -> HostError {
        HostError::Timeout {
            channel: "vmbus",
            what: what.into(),
            after,
            seen: String::new(),
            console: String::new(),
        }
    }
}

/// One channel of the host. Clones are handles to the same channel, and any thread may use them.
///
/// The channel can be opened by the guest, closed, taken back and offered again; a handle outlives
/// all of that.
#[derive(Clone)]
pub struct Channel {
    host: Host,
}

impl Channel {
    /// `vss`, `heartbeat` or `shutdown`.
    pub fn name(&self) -> &'static str {
        "vss"
    }

    /// Instance GUID, as in the name of the guest's directory below `/sys/bus/vmbus/devices`.
    pub fn instance(&self) -> Guid {
        Guid::default()
    }

    /// Whether the guest has the channel open now.
    pub fn is_open(&self) -> bool {
        false
    }

    /// Waits until the guest has the channel open (its driver is bound).
    pub fn wait_open(&self, timeout: Duration) -> Result<(), HostError> {
        Err(self.host.no("open", timeout))
    }

    /// Waits until the guest has the channel closed (its driver is unbound).
    pub fn wait_closed(&self, timeout: Duration) -> Result<(), HostError> {
        Err(self.host.no("close", timeout))
    }

    /// Waits until the guest has released the channel that was taken back.
    pub fn wait_released(&self, timeout: Duration) -> Result<(), HostError> {
        Err(self.host.no("release", timeout))
    }

    /// Takes the channel back from the guest, open or not. Without effect on one that is not offered.
    pub fn rescind(&self) {}

    /// Offers the channel again. When the guest has yet to release it, the offer follows the release.
    pub fn offer(&self) {}

    /// Offers these versions and returns the guest's choice, which later requests carry.
    pub fn negotiate(
        &self,
        frameworks: &[Version],
        messages: &[Version],
        timeout: Duration,
    ) -> Result<Negotiated, HostError> {
        let _ = (frameworks, messages);
        Err(self.host.no("answer", timeout))
    }

    /// As [`Channel::negotiate`], unless this opening of the channel has been negotiated.
    pub fn negotiate_once(
        &self,
        frameworks: &[Version],
        messages: &[Version],
        timeout: Duration,
    ) -> Result<Negotiated, HostError> {
        self.negotiate(frameworks, messages, timeout)
    }

    /// Sends a request with this IC body and does not wait: requests may overlap. When the ring is
    /// full the packet waits for room (see [`Channel::wait_sent`]). `name` is for the log.
    pub fn send_request(&self, name: &str, body: &[u8]) -> Result<Tx, HostError> {
        let _ = (name, body);
        Err(self.host.no("x", Duration::ZERO))
    }

    /// Sends these bytes as they are after a proper descriptor: any length, any content.
    pub fn send_raw(&self, bytes: &[u8]) -> Result<Tx, HostError> {
        let _ = bytes;
        Err(self.host.no("x", Duration::ZERO))
    }

    /// As [`Channel::send_raw`], with this packet type and these flags in the descriptor.
    pub fn send_packet(
        &self,
        packet_type: u16,
        packet_flags: u16,
        bytes: &[u8],
    ) -> Result<Tx, HostError> {
        let _ = (packet_type, packet_flags, bytes);
        Err(self.host.no("x", Duration::ZERO))
    }

    /// Waits until all that was sent is in the guest's ring.
    pub fn wait_sent(&self, timeout: Duration) -> Result<(), HostError> {
        Err(self.host.no("x", timeout))
    }

    /// Waits for the answer to `tx`, and takes it: an answer can be had once.
    pub fn wait(&self, tx: Tx, timeout: Duration) -> Result<Reply, HostError> {
        let _ = tx;
        Err(self.host.no("x", timeout))
    }

    /// The answer to `tx` if it has come, without waiting.
    pub fn try_reply(&self, tx: Tx) -> Option<Reply> {
        let _ = tx;
        None
    }

    /// The packets from the guest that answer nothing, taken.
    pub fn take_strays(&self) -> Vec<Vec<u8>> {
        Vec::new()
    }

    /// The events of this channel.
    pub fn events(&self) -> Vec<Event> {
        Vec::new()
    }
}
