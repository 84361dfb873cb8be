// SPDX-License-Identifier: GPL-2.0-only

//! An integration component as a device: it sends requests when a test wants it to, judges what the
//! guest sends, and files it as answers or as strays.
//!
//! Of the messages it knows the header and the offer of versions, nothing more.

use crate::bus::{lock, Bus, SendError};
use crate::channel::{Negotiated, Tx};
use crate::device::{Device, Outgoing, Place, Wishes};
use crate::event::EventKind;
use crate::ic::judge::{judge, Asked};
use crate::ic::{message_type, negotiate_body, Envelope, IcHeader, Version};
use crate::profile::{Carriage, Profile};
use crate::vmbus::protocol::packet_type;
use crate::vmbus::ring::{Descriptor, Packet};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use zerocopy::FromBytes;

/// How many unasked packets and open transactions are kept; beyond that the oldest go.
const KEEP: usize = 100_000;

/// In a descriptor: the sender wants to know when the packet is dealt with
/// (`VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED`).
const COMPLETION_REQUESTED: u16 = 1;

/// What an integration component is, for good.
#[derive(Clone, Copy)]
pub(crate) struct Component {
    pub place: Place,
    /// Type of its messages.
    pub message_type: u16,
    /// Message version of requests before any negotiation.
    pub default_version: Version,
    /// The message versions that it offers in a host of this kind.
    pub versions: fn(&Profile) -> &'static [Version],
}

/// A packet that was sent, or is about to be.
struct Transaction {
    name: String,
    /// Its number in the ring, which an answer has, too.
    id: u64,
    /// What an answer has to repeat; `None` for a packet that is not to be judged by.
    request: Option<Asked>,
    /// Which opening of the channel it belongs to.
    opening: u64,
    sent: Option<Instant>,
    reply: Option<RawReply>,
}

/// An answer as it came.
pub(crate) struct RawReply {
    pub bytes: Vec<u8>,
    pub at: Instant,
    pub latency: Duration,
}

/// What asking for a reply can bring.
pub(crate) enum ReplyState {
    Here(RawReply),
    NotYet,
    /// The channel was closed since the request.
    Closed,
    Unknown,
}

/// What was asked over one channel and what came back. It is looked at under the bus's lock.
pub(crate) struct Dialogue {
    /// The framework versions that are offered.
    pub frameworks: &'static [Version],
    /// The message versions that are offered.
    pub versions: &'static [Version],
    pub carriage: Carriage,
    /// The offer that was in the ring when the guest opened the channel, if nobody has waited for its
    /// answer.
    pub first_offer: Option<Tx>,
    /// What the last negotiation on this opening settled.
    pub negotiated: Option<Negotiated>,
    /// What is sent before the guest is told that the channel is open.
    pub greeting: Vec<Vec<u8>>,
    /// How many transactions there were, on all channels that share this.
    count: Arc<AtomicU64>,
    open: bool,
    opening: u64,
    transactions: BTreeMap<Tx, Transaction>,
    /// The last of the transactions that were forgotten.
    forgotten: Tx,
    /// How many of them the guest may still answer on this opening: so many packets that answer nothing are
    /// not held against it.
    forgiven: usize,
    strays: VecDeque<Vec<u8>>,
}

impl Dialogue {
    /// One whose transactions have numbers that no other with the same `count` uses, of a component
    /// that offers these message versions.
    pub(crate) fn new(
        count: Arc<AtomicU64>,
        profile: &Profile,
        versions: &'static [Version],
    ) -> Self {
        Dialogue {
            frameworks: profile.frameworks,
            versions,
            carriage: profile.carriage,
            first_offer: None,
            negotiated: None,
            greeting: Vec::new(),
            count,
            open: false,
            opening: 0,
            transactions: BTreeMap::new(),
            forgotten: Tx(0),
            forgiven: 0,
            strays: VecDeque::new(),
        }
    }

    /// The descriptor of a proper message.
    pub(crate) fn descriptor(&self) -> Descriptor {
        let completion = match self.carriage {
            Carriage::Packets => COMPLETION_REQUESTED,
            Carriage::Pipe => 0,
        };
        Descriptor::new(packet_type::DATA_INBAND, completion)
    }

    /// The transaction id of a message.
    pub(crate) fn message_id(&self, tx: Tx) -> u8 {
        match self.carriage {
            Carriage::Packets => tx.0 as u8,
            Carriage::Pipe => 0,
        }
    }

    /// The offer of these versions as a message.
    pub(crate) fn offer(&self, frameworks: &[Version], messages: &[Version], tx: Tx) -> Vec<u8> {
        // The guest looks at the lists only; the versions in the header mean nothing yet.
        let none = Version::new(0, 0);
        let envelope = Envelope {
            framework: none,
            message_type: message_type::NEGOTIATE,
            message: none,
            transaction: self.message_id(tx),
        };
        envelope.request(&negotiate_body(frameworks, messages))
    }

    /// Opens the transaction of a packet that is about to be sent, and says which number that has in the ring.
    fn begin(&mut self, name: &str) -> (Tx, u64) {
        if self.transactions.len() >= KEEP {
            self.transactions.pop_first();
        }
        let tx = Tx(self.count.fetch_add(1, Relaxed) + 1);
        let id = match self.carriage {
            Carriage::Packets => tx.0,
            Carriage::Pipe => 0,
        };
        let transaction = Transaction {
            name: name.to_string(),
            id,
            request: None,
            opening: self.opening,
            sent: None,
            reply: None,
        };
        self.transactions.insert(tx, transaction);
        (tx, id)
    }

    /// A packet with its transaction opened, in which `payload` makes what is after the descriptor.
    /// Its answer is not judged.
    pub(crate) fn raw(
        &mut self,
        name: &str,
        descriptor: Descriptor,
        payload: impl FnOnce(&Dialogue, Tx) -> Vec<u8>,
    ) -> Outgoing {
        let (tx, id) = self.begin(name);
        Outgoing {
            transaction: tx.0,
            id,
            descriptor,
            payload: payload(self, tx),
        }
    }

    /// The same for a proper message with its proper descriptor, whose answer is judged.
    pub(crate) fn request(
        &mut self,
        name: &str,
        payload: impl FnOnce(&Dialogue, Tx) -> Vec<u8>,
    ) -> Outgoing {
        let packet = self.raw(name, self.descriptor(), payload);
        if let Some(transaction) = self.transactions.get_mut(&Tx(packet.transaction)) {
            transaction.request = Asked::by(&packet.payload);
        }
        packet
    }

    pub(crate) fn take_reply(&mut self, tx: Tx) -> ReplyState {
        let Some(transaction) = self.transactions.get_mut(&tx) else {
            return ReplyState::Unknown;
        };
        if let Some(reply) = transaction.reply.take() {
            self.transactions.remove(&tx);
            return ReplyState::Here(reply);
        }
        if !self.open || transaction.opening != self.opening {
            self.transactions.remove(&tx);
            return ReplyState::Closed;
        }
        ReplyState::NotYet
    }

    pub(crate) fn take_strays(&mut self) -> Vec<Vec<u8>> {
        self.strays.drain(..).collect()
    }

    /// Forgets all that was sent and all that came: what comes now answers nothing.
    pub(crate) fn forget(&mut self) {
        let open = |it: &&Transaction| it.opening == self.opening && it.reply.is_none();
        self.forgiven += self.transactions.values().filter(open).count();
        self.forgotten = Tx(self.count.load(Relaxed));
        self.transactions.clear();
        self.strays.clear();
    }

    /// Whether the guest has it and has not answered, on this opening.
    fn waits(&self, it: &Transaction) -> bool {
        it.opening == self.opening && it.sent.is_some() && it.reply.is_none()
    }

    /// The requests that the guest owes an answer, by name: none once the channel is closed.
    pub(crate) fn unanswered(&self) -> Vec<String> {
        let all = self.transactions.values().filter(|_| self.open);
        let owed = all.filter(|it| it.request.is_some() && self.waits(it));
        owed.map(|it| it.name.clone()).collect()
    }

    /// Which transaction a packet from the guest belongs to, if to any.
    fn belongs_to(&self, packet: &Packet) -> Tx {
        match self.carriage {
            Carriage::Packets => Tx(packet.transaction),
            // All have the same number. It is the oldest that it is like; if it is like none, the oldest
            // that waits, of which it will be held to be a bad answer.
            Carriage::Pipe => {
                let waiting = || self.transactions.iter().filter(|(_, it)| self.waits(it));
                let is_like = |it: &Transaction| {
                    let asked = it.request.as_ref();
                    asked.is_some_and(|asked| asked.is_like(&packet.payload))
                };
                let like = waiting().find(|(_, it)| is_like(it));
                like.or_else(|| waiting().next())
                    .map_or(Tx(0), |(tx, _)| *tx)
            }
        }
    }

    /// Files a packet from the guest, and says what it was and what is wrong with it.
    fn arrived(&mut self, packet: Packet, at: Instant, notes: &mut Vec<EventKind>) {
        let tx = self.belongs_to(&packet);
        let header = IcHeader::read_from_prefix(&packet.payload).ok();
        let transaction = self.transactions.get_mut(&tx);
        if let (Some((header, _)), Some(transaction)) = (header, transaction) {
            if let (Some(sent), None) = (transaction.sent, &transaction.reply) {
                let id = transaction.id;
                let judged = transaction.request.as_ref();
                let judged = judged.map(|it| judge(it, id, &packet));
                if let Some(Err(wrong)) = judged {
                    let what = format!("{}: {wrong}", transaction.name);
                    notes.push(EventKind::Violation(what));
                }
                let latency = at.saturating_duration_since(sent);
                transaction.reply = Some(RawReply {
                    bytes: packet.payload,
                    at,
                    latency,
                });
                notes.push(EventKind::Reply {
                    tx,
                    name: transaction.name.clone(),
                    status: header.status.get(),
                    latency,
                });
                return;
            }
        }
        if self.strays.len() >= KEEP {
            self.strays.pop_front();
        }
        let bytes = packet.payload.len();
        self.strays.push_back(packet.payload);
        notes.push(EventKind::Stray { tx, bytes });
        // On a pipe all have the same number: whatever comes late is like any other that does.
        let is_late = self.carriage == Carriage::Pipe || tx <= self.forgotten;
        if is_late && self.forgiven > 0 {
            self.forgiven -= 1;
        } else {
            let what = format!(
                "a packet of {bytes} bytes answers nothing (transaction {})",
                tx.0
            );
            notes.push(EventKind::Violation(what));
        }
    }
}

/// The device on the bus; the handle has the other reference to the dialogue.
pub(crate) struct IcDevice {
    place: Place,
    dialogue: Arc<Mutex<Dialogue>>,
}

impl IcDevice {
    pub(crate) fn new(place: Place, dialogue: Arc<Mutex<Dialogue>>) -> Self {
        IcDevice { place, dialogue }
    }
}

impl Device for IcDevice {
    fn offer(&self) -> Place {
        self.place
    }

    fn opened(&mut self, opening: u64, wishes: &mut Wishes) {
        let mut dialogue = lock(&self.dialogue);
        let Dialogue {
            frameworks,
            versions,
            ..
        } = *dialogue;
        dialogue.open = true;
        dialogue.opening = opening;
        dialogue.forgiven = 0;
        dialogue.negotiated = None;
        dialogue.first_offer = None;
        for payload in dialogue.greeting.clone() {
            let packet = dialogue.request("greeting", |_, _| payload);
            wishes.send.push(packet);
        }
        if dialogue.greeting.is_empty() && dialogue.carriage == Carriage::Pipe {
            let offer = dialogue.request("negotiate", |dialogue, tx| {
                dialogue.offer(frameworks, versions, tx)
            });
            dialogue.first_offer = Some(Tx(offer.transaction));
            wishes.send.push(offer);
        }
    }

    fn packet(&mut self, packet: Packet, at: Instant, wishes: &mut Wishes) {
        lock(&self.dialogue).arrived(packet, at, &mut wishes.notes);
    }

    fn sent(&mut self, transaction: u64, bytes: usize, at: Instant) -> Option<EventKind> {
        let tx = Tx(transaction);
        let mut name = String::new();
        if let Some(transaction) = lock(&self.dialogue).transactions.get_mut(&tx) {
            transaction.sent = Some(at);
            name.clone_from(&transaction.name);
        }
        Some(EventKind::Sent { tx, name, bytes })
    }

    fn closed(&mut self) {
        let mut dialogue = lock(&self.dialogue);
        dialogue.open = false;
        dialogue.negotiated = None;
    }
}

/// Puts a packet on its way that [`Dialogue::request`] or [`Dialogue::raw`] has made.
pub(crate) fn send(
    bus: &mut Bus,
    relid: u32,
    dialogue: &Mutex<Dialogue>,
    packet: impl FnOnce(&mut Dialogue) -> Outgoing,
) -> Result<Tx, SendError> {
    let packet = packet(&mut lock(dialogue));
    let tx = Tx(packet.transaction);
    let result = bus.send(relid, packet);
    if result.is_err() {
        lock(dialogue).transactions.remove(&tx);
    }
    result.map(|()| tx)
}
