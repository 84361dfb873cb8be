// SPDX-License-Identifier: GPL-2.0-only

//! The handles of channels: [`Channel`] for what all have (open, rescind, offer), [`IcChannel`] for
//! those on which the host asks and the guest answers (negotiation, requests, raw packets).
//!
//! What travels in a request's body is not known here; the integration components put their
//! own handles on top.

use crate::bus::{lock, Chan, OnOpen, SendError, Side};
use crate::device::{Outgoing, Place};
use crate::event::{Event, EventKind};
use crate::host::{Host, HostError};
use crate::ic::device::{self, Component, Dialogue, RawReply, ReplyState};
use crate::ic::{parse_negotiated, status};
use crate::ic::{Envelope, IcHeader, Version};
use crate::vmbus::protocol::Guid;
use crate::vmbus::ring::{Descriptor, Field};
use std::ops::Deref;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use zerocopy::FromBytes;

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
    /// When it arrived, on the clock of [`crate::Host::now`].
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

/// One channel of the host. Clones are handles to the same channel, and any thread may use them.
///
/// The channel can be opened by the guest, closed, taken back and offered again; a handle outlives
/// all of that.
#[derive(Clone)]
pub struct Channel {
    pub(crate) host: Host,
    pub(crate) place: Place,
}

impl Channel {
    /// `vss`, `heartbeat`, `shutdown`, `balloon` or `scsi-0` and so on.
    pub fn name(&self) -> &'static str {
        self.place.name
    }

    /// Class GUID of the device.
    pub fn class(&self) -> Guid {
        self.place.class
    }

    /// Instance GUID, as in the name of the guest's directory below `/sys/bus/vmbus/devices`.
    pub fn instance(&self) -> Guid {
        self.place.instance
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
        self.host.change(|bus| bus.rescind(self.place.relid));
    }

    /// Leaves the channel to the guest until that leaves the bus, and does not offer it when it comes
    /// back: a device that was removed while the guest hibernated.
    pub fn withhold(&self) {
        self.host.change(|bus| bus.withhold(self.place.relid));
    }

    /// Offers the channel again. When the guest has yet to release it, the offer follows the release.
    pub fn offer(&self) {
        self.host.change(|bus| bus.offer(self.place.relid));
    }

    /// What the host does from now on when the guest asks to open the channel.
    pub fn on_open(&self, what: OnOpen) {
        self.host.change(|bus| {
            if let Some(chan) = bus.channel(self.place.relid) {
                chan.on_open = what;
            }
        });
    }

    /// Writes a field in the header of one of the rings, whoever's field it is, and returns what was
    /// there. Neither side is signalled.
    pub fn poke(&self, side: Side, field: Field, value: u32) -> Result<u32, HostError> {
        let old = self.host.change(|bus| {
            let chan = bus.channel(self.place.relid)?;
            chan.poke(side, field, value)
        });
        old.ok_or_else(|| self.not_open("a write to the ring's header"))
    }

    /// Signals the guest, whatever is in the ring.
    pub fn signal(&self) {
        self.host.change(|bus| bus.signal_channel(self.place.relid));
    }

    /// Whether the guest has read all that was sent to it.
    pub fn is_read(&self) -> Result<bool, HostError> {
        self.host
            .change(|bus| bus.channel(self.place.relid)?.is_read())
            .ok_or_else(|| self.not_open("look into its ring"))
    }

    /// Gives up what was sent and not read, and goes on where the guest reads: after packets or
    /// indices that lied. Says whether the guest had read all; one that was led astray may still be
    /// on the move, and is shown the end anew by the next call.
    pub fn resync(&self) -> Result<bool, HostError> {
        self.host
            .change(|bus| bus.channel(self.place.relid)?.resync())
            .ok_or_else(|| self.not_open("new start in its ring"))
    }

    /// Waits until all that was sent is in the guest's ring.
    pub fn wait_sent(&self, timeout: Duration) -> Result<(), HostError> {
        self.wait_chan("room for the packets", timeout, |chan| {
            (!chan.has_unsent()).then_some(Ok(()))
        })
    }

    /// The events of this channel.
    pub fn events(&self) -> Vec<Event> {
        let bus = self.host.bus();
        let events = bus.log().filter(|event| event.channel == self.place.name);
        events.cloned().collect()
    }

    fn with<T: Default>(&self, f: impl FnOnce(&Chan) -> T) -> T {
        let mut bus = self.host.bus();
        bus.channel(self.place.relid)
            .map(|chan| f(chan))
            .unwrap_or_default()
    }

    fn wait_chan(
        &self,
        what: &str,
        timeout: Duration,
        mut f: impl FnMut(&Chan) -> Option<Result<(), HostError>>,
    ) -> Result<(), HostError> {
        self.host.wait_for(self.place.name, what, timeout, |bus| {
            bus.channel(self.place.relid).and_then(|chan| f(chan))
        })
    }

    pub(crate) fn not_open(&self, what: &str) -> HostError {
        HostError::NotOpen {
            channel: self.place.name,
            what: what.to_string(),
        }
    }

    pub(crate) fn not_sent(&self, what: &str, error: SendError) -> HostError {
        match error {
            SendError::NotOpen => self.not_open(what),
            SendError::TooLarge { packet, ring } => HostError::TooLarge {
                channel: self.place.name,
                packet,
                ring,
            },
        }
    }
}

/// The channel of an integration component. All that a [`Channel`] can do, it can do too.
#[derive(Clone)]
pub struct IcChannel {
    channel: Channel,
    component: Component,
    dialogue: Arc<Mutex<Dialogue>>,
}

impl Deref for IcChannel {
    type Target = Channel;

    fn deref(&self) -> &Channel {
        &self.channel
    }
}

impl IcChannel {
    pub(crate) fn new(
        channel: Channel,
        component: Component,
        dialogue: Arc<Mutex<Dialogue>>,
    ) -> Self {
        IcChannel {
            channel,
            component,
            dialogue,
        }
    }

    /// What the last negotiation on this opening settled.
    pub fn negotiated(&self) -> Option<Negotiated> {
        self.dialogue(|dialogue| dialogue.negotiated)
    }

    /// Agrees with the guest on the versions that a host of this kind offers, and returns the guest's
    /// choice, which later requests carry.
    pub fn agree(&self, timeout: Duration) -> Result<Negotiated, HostError> {
        let (first, frameworks, versions) = self.dialogue(|dialogue| {
            let first = dialogue.first_offer.take();
            (first, dialogue.frameworks, dialogue.versions)
        });
        match first {
            Some(tx) => self.agreed(tx, frameworks, versions, timeout),
            None => self.negotiate(frameworks, versions, timeout),
        }
    }

    /// As [`IcChannel::agree`], unless this opening of the channel has been negotiated.
    pub fn agree_once(&self, timeout: Duration) -> Result<Negotiated, HostError> {
        match self.negotiated() {
            Some(negotiated) => Ok(negotiated),
            None => self.agree(timeout),
        }
    }

    /// As [`IcChannel::agree`] with these versions.
    pub fn negotiate(
        &self,
        frameworks: &[Version],
        messages: &[Version],
        timeout: Duration,
    ) -> Result<Negotiated, HostError> {
        let tx = self.send_with("negotiate", |dialogue| {
            dialogue.request("negotiate", |dialogue, tx| {
                dialogue.offer(frameworks, messages, tx)
            })
        })?;
        self.agreed(tx, frameworks, messages, timeout)
    }

    /// Waits for the answer to an offer of these versions.
    fn agreed(
        &self,
        tx: Tx,
        frameworks: &[Version],
        messages: &[Version],
        timeout: Duration,
    ) -> Result<Negotiated, HostError> {
        let reply = self.wait(tx, timeout)?;
        let chosen = parse_negotiated(reply.body()).map_err(|what| HostError::BadReply {
            channel: self.place.name,
            what,
        })?;
        let chosen = chosen.map(|(framework, message)| Negotiated { framework, message });
        self.host.change(|bus| {
            bus.note(self.place.name, EventKind::Negotiated(chosen));
            lock(&self.dialogue).negotiated = chosen;
        });
        match chosen {
            Some(chosen) if reply.status() == status::OK => Ok(chosen),
            _ => Err(HostError::NegotiationRefused {
                channel: self.place.name,
                frameworks: frameworks.to_vec(),
                messages: messages.to_vec(),
            }),
        }
    }

    /// Sends a request with this IC body and does not wait: requests may overlap. When the ring is
    /// full the packet waits for room (see [`Channel::wait_sent`]). `name` is for the log.
    pub fn send_request(&self, name: &str, body: &[u8]) -> Result<Tx, HostError> {
        let negotiated = self.negotiated().unwrap_or(Negotiated {
            framework: Version::new(3, 0),
            message: self.component.default_version,
        });
        let message_type = self.component.message_type;
        self.send_with(name, |dialogue| {
            dialogue.request(name, |dialogue, tx| {
                let envelope = Envelope {
                    framework: negotiated.framework,
                    message_type,
                    message: negotiated.message,
                    transaction: dialogue.message_id(tx),
                };
                envelope.request(body)
            })
        })
    }

    /// Sends these bytes as they are after a proper descriptor: any length, any content.
    pub fn send_raw(&self, bytes: &[u8]) -> Result<Tx, HostError> {
        self.send_with("raw", |dialogue| {
            let descriptor = dialogue.descriptor();
            dialogue.raw("raw", descriptor, |_, _| bytes.to_vec())
        })
    }

    /// As [`Channel::send_raw`] with this descriptor, true or not. After one that lies the guest
    /// reads on in the wrong place until [`Channel::resync`].
    pub fn send_packet(&self, descriptor: Descriptor, bytes: &[u8]) -> Result<Tx, HostError> {
        self.send_with("raw", |dialogue| {
            dialogue.raw("raw", descriptor, |_, _| bytes.to_vec())
        })
    }

    fn send_with(
        &self,
        name: &str,
        packet: impl FnOnce(&mut Dialogue) -> Outgoing,
    ) -> Result<Tx, HostError> {
        let relid = self.place.relid;
        let channel = self.place.name;
        self.host.change(|bus| {
            if let Some(error) = self.host.guest_gone(bus, channel, name) {
                return Err(error);
            }
            device::send(bus, relid, &self.dialogue, packet)
                .map_err(|error| self.not_sent(name, error))
        })
    }

    /// From now on these packets are in the guest's ring, in this order, before it is told that it has
    /// opened the channel. They are logged as sent, by the name of `greeting`.
    pub fn greet(&self, packets: &[Vec<u8>]) {
        self.dialogue(|dialogue| dialogue.greeting = packets.to_vec());
    }

    /// Forgets all that was sent and came back so far. What comes for it later is a stray, and nobody's fault:
    /// as many packets as had no answer, until the channel is opened again.
    pub fn forget(&self) {
        self.dialogue(Dialogue::forget);
    }

    /// Waits for the answer to `tx`, and takes it: an answer can be had once.
    pub fn wait(&self, tx: Tx, timeout: Duration) -> Result<Reply, HostError> {
        let what = format!("answer to transaction {}", tx.0);
        let unknown = HostError::UnknownTransaction {
            channel: self.place.name,
            tx,
        };
        let mut unknown = Some(unknown);
        let (raw, at) = self.host.wait_for(self.place.name, &what, timeout, |bus| {
            match lock(&self.dialogue).take_reply(tx) {
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
        let bus = self.host.bus();
        match lock(&self.dialogue).take_reply(tx) {
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
                channel: self.place.name,
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
        self.dialogue(Dialogue::take_strays)
    }

    /// Looks at what was asked and answered, while nothing moves on the bus.
    fn dialogue<T>(&self, f: impl FnOnce(&mut Dialogue) -> T) -> T {
        let _bus = self.host.bus();
        f(&mut lock(&self.dialogue))
    }
}
