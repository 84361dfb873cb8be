// SPDX-License-Identifier: GPL-2.0-only

//! An integration component as a device: it sends requests when a test wants it to, and files what
//! the guest sends as answers or as strays.
//!
//! Of the messages it knows the header that names an answer's status, nothing more.

use crate::bus::{lock, Bus, SendError};
use crate::channel::{Negotiated, Tx, IN_BAND};
use crate::device::{Device, Outgoing, Place, Wishes};
use crate::event::EventKind;
use crate::ic::{IcHeader, Version};
use crate::vmbus::ring::{Descriptor, Packet};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use zerocopy::FromBytes;

/// How many unasked packets and open transactions are kept; beyond that the oldest go.
const KEEP: usize = 100_000;

/// What an integration component is, for good.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Component {
    pub place: Place,
    /// Type of its messages.
    pub message_type: u16,
    /// Message version of requests before any negotiation.
    pub default_version: Version,
}

/// A packet that was sent, or is about to be.
struct Transaction {
    name: String,
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
#[derive(Default)]
pub(crate) struct Dialogue {
    /// What the last negotiation on this opening settled.
    pub negotiated: Option<Negotiated>,
    /// What is sent before the guest is told that the channel is open.
    pub greeting: Vec<Vec<u8>>,
    /// How many transactions there were, on all channels that share this.
    count: Arc<AtomicU64>,
    open: bool,
    opening: u64,
    transactions: BTreeMap<Tx, Transaction>,
    strays: VecDeque<Vec<u8>>,
}

impl Dialogue {
    /// One whose transactions have numbers that no other with the same `count` uses.
    pub(crate) fn new(count: Arc<AtomicU64>) -> Self {
        Dialogue {
            count,
            ..Dialogue::default()
        }
    }

    /// Opens the transaction of a packet that is about to be sent.
    fn begin(&mut self, name: &str) -> Tx {
        if self.transactions.len() >= KEEP {
            self.transactions.pop_first();
        }
        let tx = Tx(self.count.fetch_add(1, Relaxed) + 1);
        let transaction = Transaction {
            name: name.to_string(),
            opening: self.opening,
            sent: None,
            reply: None,
        };
        self.transactions.insert(tx, transaction);
        tx
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
        self.transactions.clear();
        self.strays.clear();
    }

    /// Files a packet from the guest and says what it was.
    fn arrived(&mut self, tx: Tx, bytes: Vec<u8>, at: Instant) -> EventKind {
        let header = IcHeader::read_from_prefix(&bytes).ok();
        let transaction = self.transactions.get_mut(&tx);
        if let (Some((header, _)), Some(transaction)) = (header, transaction) {
            if let (Some(sent), None) = (transaction.sent, &transaction.reply) {
                let latency = at.saturating_duration_since(sent);
                transaction.reply = Some(RawReply { bytes, at, latency });
                return EventKind::Reply {
                    tx,
                    name: transaction.name.clone(),
                    status: header.status.get(),
                    latency,
                };
            }
        }
        if self.strays.len() >= KEEP {
            self.strays.pop_front();
        }
        let len = bytes.len();
        self.strays.push_back(bytes);
        EventKind::Stray { tx, bytes: len }
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
        dialogue.open = true;
        dialogue.opening = opening;
        dialogue.negotiated = None;
        for payload in dialogue.greeting.clone() {
            wishes.send.push(Outgoing {
                transaction: dialogue.begin("greeting").0,
                descriptor: IN_BAND,
                payload,
            });
        }
    }

    fn packet(&mut self, packet: Packet, at: Instant, wishes: &mut Wishes) {
        let tx = Tx(packet.transaction);
        let kind = lock(&self.dialogue).arrived(tx, packet.payload, at);
        wishes.notes.push(kind);
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

/// Puts a packet on its way and opens the transaction that its answer belongs to; `payload` is made
/// from the transaction.
pub(crate) fn send(
    bus: &mut Bus,
    relid: u32,
    dialogue: &Mutex<Dialogue>,
    name: &str,
    descriptor: Descriptor,
    payload: impl FnOnce(Tx) -> Vec<u8>,
) -> Result<Tx, SendError> {
    let tx = lock(dialogue).begin(name);
    let packet = Outgoing {
        transaction: tx.0,
        descriptor,
        payload: payload(tx),
    };
    let result = bus.send(relid, packet);
    if result.is_err() {
        lock(dialogue).transactions.remove(&tx);
    }
    result.map(|()| tx)
}
