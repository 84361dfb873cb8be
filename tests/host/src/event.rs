// SPDX-License-Identifier: GPL-2.0-only

//! The log of what happened between host and guest, for timelines and error messages.

use crate::channel::{Negotiated, Tx};
use std::time::Duration;

/// Something that happened between host and guest.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Event {
    /// When, on the clock of [`crate::Host::now`].
    pub at: Duration,
    /// On which channel: `vss`, `heartbeat`, `shutdown`, `balloon`, or `vmbus` for the bus itself.
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
    /// The guest asked to open the channel and was refused, as a test had told the host to do.
    OpenRefused,
    /// The guest asked to open the channel and got no answer, as a test had told the host to do.
    OpenIgnored,
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

impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{:12.6}] {}: ", self.at.as_secs_f64(), self.channel)?;
        match &self.kind {
            EventKind::Connected { version } => write!(f, "guest connected with version {version}"),
            EventKind::Unloaded => f.write_str("guest left the bus"),
            EventKind::Offered => f.write_str("offered"),
            EventKind::Opened { ring } => write!(f, "opened, {ring} bytes of ring"),
            EventKind::OpenRefused => f.write_str("refused to open"),
            EventKind::OpenIgnored => f.write_str("asked to open, not answered"),
            EventKind::Closed => f.write_str("closed"),
            EventKind::Rescinded => f.write_str("rescinded"),
            EventKind::Released => f.write_str("released by the guest"),
            EventKind::Negotiated(Some(chosen)) => write!(
                f,
                "guest chose framework {} and messages {}",
                chosen.framework, chosen.message
            ),
            EventKind::Negotiated(None) => f.write_str("guest refused all versions"),
            EventKind::Sent { tx, name, bytes } => {
                write!(f, "-> {name} ({bytes} bytes, transaction {})", tx.0)
            }
            EventKind::Reply {
                tx,
                name,
                status,
                latency,
            } => write!(
                f,
                "<- {name}: status {status:#x} after {:.3} ms (transaction {})",
                latency.as_secs_f64() * 1e3,
                tx.0
            ),
            EventKind::Stray { tx, bytes } => {
                write!(f, "<- stray packet ({bytes} bytes, transaction {})", tx.0)
            }
            EventKind::Violation(what) => write!(f, "the guest broke a rule: {what}"),
            EventKind::Crash => f.write_str("guest reports a crash"),
        }
    }
}
