// SPDX-License-Identifier: GPL-2.0-only

//! The handles that a test holds: the host, its channels, and the log of what travelled.

use crate::bus::{lock, Bus, Chan, ChannelInfo, RawReply, ReplyState, SendError};
use crate::console::Console;
use crate::ic::heartbeat::{self, Heartbeat};
use crate::ic::shutdown::{self, Shutdown};
use crate::ic::vss::{self, Vss};
use crate::ic::{message_type, negotiate_body, parse_negotiated, status};
use crate::ic::{Envelope, IcHeader, Version};
use crate::synic::{Registers, SynIc};
use crate::vm::Exit;
use crate::vmbus::protocol::{packet_type, Guid, VmbusVersion};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;
use zerocopy::FromBytes;

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

impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{:12.6}] {}: ", self.at.as_secs_f64(), self.channel)?;
        match &self.kind {
            EventKind::Connected { version } => write!(f, "guest connected with version {version}"),
            EventKind::Unloaded => f.write_str("guest left the bus"),
            EventKind::Offered => f.write_str("offered"),
            EventKind::Opened { ring } => write!(f, "opened, {ring} bytes of ring"),
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

/// Relids, and with them the places of the channels.
const VSS: u32 = 1;
const HEARTBEAT: u32 = 2;
const SHUTDOWN: u32 = 3;

/// The instance GUIDs are this host's own; only the classes are fixed.
const fn instance(relid: u32) -> Guid {
    Guid::new(
        0x6876_5f73,
        0x696d,
        0x4000,
        [0x80, 0, 0, 0, 0, 0, 0, relid as u8],
    )
}

const CHANNELS: [ChannelInfo; 3] = [
    ChannelInfo {
        name: "vss",
        relid: VSS,
        class: vss::CLASS,
        instance: instance(VSS),
        message_type: message_type::VSS,
        default_version: Version::new(5, 0),
    },
    ChannelInfo {
        name: "heartbeat",
        relid: HEARTBEAT,
        class: heartbeat::CLASS,
        instance: instance(HEARTBEAT),
        message_type: message_type::HEARTBEAT,
        default_version: Version::new(3, 0),
    },
    ChannelInfo {
        name: "shutdown",
        relid: SHUTDOWN,
        class: shutdown::CLASS,
        instance: instance(SHUTDOWN),
        message_type: message_type::SHUTDOWN,
        default_version: Version::new(3, 0),
    },
];

struct Shared {
    bus: Mutex<Bus>,
    /// Notified after every change of the bus.
    changed: Condvar,
    console: Arc<Console>,
}

/// The host's side of one guest's VMBus. Clones are handles to the same.
#[derive(Clone)]
pub struct Host {
    shared: Arc<Shared>,
}

impl Host {
    pub(crate) fn new(
        config: &HostConfig,
        memory: GuestMemoryMmap,
        synic: Arc<SynIc>,
        console: Arc<Console>,
    ) -> Self {
        let [vss, heartbeat, shutdown] = CHANNELS;
        let channels = [
            (vss, config.vss),
            (heartbeat, config.heartbeat),
            (shutdown, config.shutdown),
        ];
        let bus = Bus::new(memory, synic, config.vmbus_versions.clone(), &channels);
        Host {
            shared: Arc::new(Shared {
                bus: Mutex::new(bus),
                changed: Condvar::new(),
                console,
            }),
        }
    }

    /// Time since the machine was started: the clock of all events.
    pub fn now(&self) -> Duration {
        self.bus().since_start(Instant::now())
    }

    /// Waits until the guest has connected to the bus, and says with which version.
    pub fn wait_connected(&self, timeout: Duration) -> Result<VmbusVersion, HostError> {
        self.wait_for("vmbus", "connection", timeout, |bus| bus.version().map(Ok))
    }

    /// The VSS integration component.
    pub fn vss(&self) -> Vss {
        let [info, _, _] = CHANNELS;
        Vss::new(self.channel(info))
    }

    /// The heartbeat integration component.
    pub fn heartbeat(&self) -> Heartbeat {
        let [_, info, _] = CHANNELS;
        Heartbeat::new(self.channel(info))
    }

    /// The shutdown integration component.
    pub fn shutdown(&self) -> Shutdown {
        let [_, _, info] = CHANNELS;
        Shutdown::new(self.channel(info))
    }

    /// All events so far, in the order in which they happened (the oldest are dropped beyond
    /// 100,000).
    pub fn events(&self) -> Vec<Event> {
        self.bus().log().cloned().collect()
    }

    fn channel(&self, info: ChannelInfo) -> Channel {
        Channel {
            host: self.clone(),
            info,
        }
    }

    fn bus(&self) -> MutexGuard<'_, Bus> {
        lock(&self.shared.bus)
    }

    /// Changes the bus and wakes whoever waits for a change.
    fn change<T>(&self, f: impl FnOnce(&mut Bus) -> T) -> T {
        let result = f(&mut self.bus());
        self.shared.changed.notify_all();
        result
    }

    /// Waits until `f` has something to say about the bus.
    fn wait_for<T>(
        &self,
        channel: &'static str,
        what: &str,
        timeout: Duration,
        mut f: impl FnMut(&mut Bus) -> Option<Result<T, HostError>>,
    ) -> Result<T, HostError> {
        let start = Instant::now();
        let mut bus = self.bus();
        loop {
            if let Some(result) = f(&mut bus) {
                return result;
            }
            if let Some(error) = self.guest_gone(&bus, channel, what) {
                return Err(error);
            }
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(HostError::Timeout {
                    channel,
                    what: what.to_string(),
                    after: timeout,
                    seen: last_events(&bus, channel),
                    console: self.shared.console.tail(),
                });
            }
            bus = self
                .shared
                .changed
                .wait_timeout(bus, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn guest_gone(&self, bus: &Bus, channel: &'static str, what: &str) -> Option<HostError> {
        bus.gone.clone().map(|exit| HostError::GuestGone {
            channel,
            what: what.to_string(),
            exit,
            console: self.shared.console.tail(),
        })
    }

    // What the machine reports.

    pub(crate) fn hypercall(&self, input: u64, params: [u64; 2]) -> u64 {
        self.change(|bus| bus.hypercall(input, params))
    }

    pub(crate) fn synic_changed(&self, vp: u32, registers: Registers) {
        self.change(|bus| bus.synic_changed(vp, registers));
    }

    pub(crate) fn slot_acknowledged(&self) {
        self.change(Bus::slot_acknowledged);
    }

    pub(crate) fn guest_crashed(&self) {
        self.change(|bus| bus.note("vmbus", EventKind::Crash));
    }

    pub(crate) fn guest_ended(&self, exit: Exit) {
        self.change(|bus| bus.gone = Some(exit));
    }
}

/// The last events of a channel and of the bus, one a line.
fn last_events(bus: &Bus, channel: &str) -> String {
    let events = bus.log().rev();
    let mut lines: Vec<String> = events
        .filter(|event| event.channel == channel || event.channel == "vmbus")
        .take(20)
        .map(ToString::to_string)
        .collect();
    lines.reverse();
    if lines.is_empty() {
        return "(nothing)".to_string();
    }
    lines.join("\n")
}

/// One channel of the host. Clones are handles to the same channel, and any thread may use them.
///
/// The channel can be opened by the guest, closed, taken back and offered again; a handle outlives
/// all of that.
#[derive(Clone)]
pub struct Channel {
    host: Host,
    info: ChannelInfo,
}

impl Channel {
    /// `vss`, `heartbeat` or `shutdown`.
    pub fn name(&self) -> &'static str {
        self.info.name
    }

    /// Class GUID of the device.
    pub fn class(&self) -> Guid {
        self.info.class
    }

    /// Instance GUID, as in the name of the guest's directory below `/sys/bus/vmbus/devices`.
    pub fn instance(&self) -> Guid {
        self.info.instance
    }

    /// Whether the guest has the channel open now.
    pub fn is_open(&self) -> bool {
        self.with(|chan| chan.is_open())
    }

    /// How often the guest has opened the channel: it tells a channel that stayed open from one that
    /// was closed and opened again.
    pub fn openings(&self) -> u64 {
        self.with(|chan| chan.openings)
    }

    /// What the last negotiation on this opening settled.
    pub fn negotiated(&self) -> Option<Negotiated> {
        self.with(|chan| chan.negotiated)
    }

    /// Waits until the guest has the channel open (its driver is bound).
    pub fn wait_open(&self, timeout: Duration) -> Result<(), HostError> {
        self.wait_chan("opening of the channel", timeout, |chan| {
            chan.is_open().then_some(Ok(()))
        })
    }

    /// Waits until the guest has opened the channel at least `count` times and has it open.
    pub fn wait_openings(&self, count: u64, timeout: Duration) -> Result<(), HostError> {
        let what = format!("opening number {count} of the channel");
        self.wait_chan(&what, timeout, |chan| {
            (chan.is_open() && chan.openings >= count).then_some(Ok(()))
        })
    }

    /// Waits until the guest has the channel closed (its driver is unbound).
    pub fn wait_closed(&self, timeout: Duration) -> Result<(), HostError> {
        self.wait_chan("closing of the channel", timeout, |chan| {
            (!chan.is_open()).then_some(Ok(()))
        })
    }

    /// Waits until the guest has released the channel that was taken back.
    pub fn wait_released(&self, timeout: Duration) -> Result<(), HostError> {
        self.wait_chan("release of the channel", timeout, |chan| {
            (!chan.revoked).then_some(Ok(()))
        })
    }

    /// Takes the channel back from the guest, open or not. Without effect on one that is not offered.
    pub fn rescind(&self) {
        self.host.change(|bus| bus.rescind(self.info.relid));
    }

    /// Offers the channel again. When the guest has yet to release it, the offer follows the release.
    pub fn offer(&self) {
        self.host.change(|bus| bus.offer(self.info.relid));
    }

    /// Offers these versions and returns the guest's choice, which later requests carry.
    pub fn negotiate(
        &self,
        frameworks: &[Version],
        messages: &[Version],
        timeout: Duration,
    ) -> Result<Negotiated, HostError> {
        // The guest looks at the lists only; the versions in the header mean nothing yet.
        let none = Version::new(0, 0);
        let body = negotiate_body(frameworks, messages);
        let envelope = |transaction| Envelope {
            framework: none,
            message_type: message_type::NEGOTIATE,
            message: none,
            transaction,
        };
        let tx = self.send_with("negotiate", packet_type::DATA_INBAND, 1, |tx| {
            envelope(tx.0 as u8).request(&body)
        })?;
        let reply = self.wait(tx, timeout)?;
        let chosen = parse_negotiated(reply.body()).map_err(|what| HostError::BadReply {
            channel: self.info.name,
            what,
        })?;
        let chosen = chosen.map(|(framework, message)| Negotiated { framework, message });
        self.host.change(|bus| {
            bus.note(self.info.name, EventKind::Negotiated(chosen));
            if let Some(chan) = bus.channel(self.info.relid) {
                chan.negotiated = chosen;
            }
        });
        match chosen {
            Some(chosen) if reply.status() == status::OK => Ok(chosen),
            _ => Err(HostError::NegotiationRefused {
                channel: self.info.name,
                frameworks: frameworks.to_vec(),
                messages: messages.to_vec(),
            }),
        }
    }

    /// As [`Channel::negotiate`], unless this opening of the channel has been negotiated.
    pub fn negotiate_once(
        &self,
        frameworks: &[Version],
        messages: &[Version],
        timeout: Duration,
    ) -> Result<Negotiated, HostError> {
        match self.negotiated() {
            Some(negotiated) => Ok(negotiated),
            None => self.negotiate(frameworks, messages, timeout),
        }
    }

    /// Sends a request with this IC body and does not wait: requests may overlap. When the ring is
    /// full the packet waits for room (see [`Channel::wait_sent`]). `name` is for the log.
    pub fn send_request(&self, name: &str, body: &[u8]) -> Result<Tx, HostError> {
        let negotiated = self.negotiated().unwrap_or(Negotiated {
            framework: Version::new(3, 0),
            message: self.info.default_version,
        });
        self.send_with(name, packet_type::DATA_INBAND, 1, |tx| {
            let envelope = Envelope {
                framework: negotiated.framework,
                message_type: self.info.message_type,
                message: negotiated.message,
                transaction: tx.0 as u8,
            };
            envelope.request(body)
        })
    }

    /// Sends these bytes as they are after a proper descriptor: any length, any content.
    pub fn send_raw(&self, bytes: &[u8]) -> Result<Tx, HostError> {
        self.send_packet(packet_type::DATA_INBAND, 1, bytes)
    }

    /// As [`Channel::send_raw`], with this packet type and these flags in the descriptor.
    pub fn send_packet(
        &self,
        packet_type: u16,
        packet_flags: u16,
        bytes: &[u8],
    ) -> Result<Tx, HostError> {
        self.send_with("raw", packet_type, packet_flags, |_| bytes.to_vec())
    }

    fn send_with(
        &self,
        name: &str,
        packet_type: u16,
        flags: u16,
        payload: impl FnOnce(Tx) -> Vec<u8>,
    ) -> Result<Tx, HostError> {
        let relid = self.info.relid;
        let channel = self.info.name;
        self.host.change(|bus| {
            if let Some(error) = self.host.guest_gone(bus, channel, name) {
                return Err(error);
            }
            bus.send(relid, name, packet_type, flags, payload)
                .map_err(|error| match error {
                    SendError::NotOpen => self.not_open(name),
                    SendError::TooLarge { packet, ring } => HostError::TooLarge {
                        channel,
                        packet,
                        ring,
                    },
                })
        })
    }

    /// Waits until all that was sent is in the guest's ring.
    pub fn wait_sent(&self, timeout: Duration) -> Result<(), HostError> {
        self.wait_chan("room for the packets", timeout, |chan| {
            (!chan.has_unsent()).then_some(Ok(()))
        })
    }

    /// Waits for the answer to `tx`, and takes it: an answer can be had once.
    pub fn wait(&self, tx: Tx, timeout: Duration) -> Result<Reply, HostError> {
        let what = format!("answer to transaction {}", tx.0);
        let unknown = HostError::UnknownTransaction {
            channel: self.info.name,
            tx,
        };
        let mut unknown = Some(unknown);
        let (raw, at) = self.host.wait_for(self.info.name, &what, timeout, |bus| {
            let Some(chan) = bus.channel(self.info.relid) else {
                return unknown.take().map(Err);
            };
            match chan.take_reply(tx) {
                ReplyState::Here(raw) => {
                    let at = bus.since_start(raw.at);
                    Some(Ok((raw, at)))
                }
                ReplyState::NotYet => None,
                ReplyState::Closed => Some(Err(self.not_open(&what))),
                ReplyState::Unknown => unknown.take().map(Err),
            }
        })?;
        self.reply(raw, at)
    }

    /// The answer to `tx` if it has come, without waiting.
    pub fn try_reply(&self, tx: Tx) -> Option<Reply> {
        let mut bus = self.host.bus();
        match bus.channel(self.info.relid)?.take_reply(tx) {
            ReplyState::Here(raw) => {
                let at = bus.since_start(raw.at);
                self.reply(raw, at).ok()
            }
            ReplyState::NotYet | ReplyState::Closed | ReplyState::Unknown => None,
        }
    }

    fn reply(&self, raw: RawReply, at: Duration) -> Result<Reply, HostError> {
        let (header, _) =
            IcHeader::read_from_prefix(&raw.bytes).map_err(|_| HostError::BadReply {
                channel: self.info.name,
                what: "too short for its headers",
            })?;
        Ok(Reply {
            header,
            raw: raw.bytes,
            latency: raw.latency,
            at,
        })
    }

    /// The packets from the guest that answer nothing, taken.
    pub fn take_strays(&self) -> Vec<Vec<u8>> {
        let mut bus = self.host.bus();
        bus.channel(self.info.relid)
            .map(Chan::take_strays)
            .unwrap_or_default()
    }

    /// The events of this channel.
    pub fn events(&self) -> Vec<Event> {
        let bus = self.host.bus();
        let events = bus.log().filter(|event| event.channel == self.info.name);
        events.cloned().collect()
    }

    fn with<T: Default>(&self, f: impl FnOnce(&Chan) -> T) -> T {
        let mut bus = self.host.bus();
        bus.channel(self.info.relid)
            .map(|chan| f(chan))
            .unwrap_or_default()
    }

    fn wait_chan(
        &self,
        what: &str,
        timeout: Duration,
        mut f: impl FnMut(&Chan) -> Option<Result<(), HostError>>,
    ) -> Result<(), HostError> {
        self.host.wait_for(self.info.name, what, timeout, |bus| {
            bus.channel(self.info.relid).and_then(|chan| f(chan))
        })
    }

    fn not_open(&self, what: &str) -> HostError {
        HostError::NotOpen {
            channel: self.info.name,
            what: what.to_string(),
        }
    }
}
