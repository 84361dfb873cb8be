// SPDX-License-Identifier: GPL-2.0-only

//! The moving parts behind the handles: control plane, rings and SynIC tied together, under one lock.
//!
//! Virtual CPUs come in with hypercalls, tests with wishes; each carries out at once what follows from
//! it, so there is no thread in between and a latency is the guest's, not this program's. It does not
//! know KVM, nor what the devices' packets mean.

use crate::device::{Device, Outgoing, Place, Wishes};
use crate::event::{Event, EventKind};
use crate::guest_ring::{GuestRing, GuestRingError};
use crate::synic::{Posted, Registers, SynIc};
use crate::vm::Exit;
use crate::vmbus::control::{Effect, Offer, Opening, Server, MESSAGE_PORT};
use crate::vmbus::protocol::{VmbusVersion, MAX_MESSAGE};
use crate::vmbus::ring::{Field, Reader, RingError, RingMem, Sent, Writer};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::little_endian::U32;
use zerocopy::FromBytes;

/// How many events are kept, and how many broken rules; beyond that the oldest go.
const KEEP: usize = 100_000;

/// What is left of the broken rules that went.
const MORE: &str = "more rules were broken than are kept";

/// Type of a VMBus message in a SynIC slot.
const CHANNEL_MESSAGE: u32 = 1;

/// Hypercall codes and results (`HVCALL_*`, `HV_STATUS_*` in `hvgdk_mini.h`).
mod hypercall {
    pub(super) const POST_MESSAGE: u64 = 0x5c;
    pub(super) const SIGNAL_EVENT: u64 = 0x5d;
    pub(super) const FAST: u64 = 1 << 16;
    pub(super) const SUCCESS: u64 = 0;
    pub(super) const INVALID_CODE: u64 = 2;
    pub(super) const INVALID_INPUT: u64 = 3;
    pub(super) const INVALID_PARAMETER: u64 = 5;
    pub(super) const INVALID_CONNECTION_ID: u64 = 0x12;
}

/// Takes a lock whose holder cannot have left half-done work that matters.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One of the two rings of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The host writes, the guest reads.
    ToGuest,
    /// The guest writes, the host reads.
    FromGuest,
}

/// What the host does when the guest asks to open a channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnOpen {
    /// It opens it.
    #[default]
    Open,
    /// It answers that this has failed.
    Refuse,
    /// It does not answer.
    Ignore,
}

struct Link {
    reader: Reader<GuestRing>,
    writer: Writer<GuestRing>,
    target_vp: u32,
}

/// One channel and what is going on there.
pub(crate) struct Chan {
    device: Box<dyn Device>,
    place: Place,
    link: Option<Link>,
    /// How often the guest has opened it.
    pub openings: u64,
    /// Taken back and not yet released.
    pub revoked: bool,
    /// What becomes of the next wish to open it.
    pub on_open: OnOpen,
    /// Packets that wait for room in the ring.
    outbox: VecDeque<Outgoing>,
}

/// Why a packet cannot be sent.
pub(crate) enum SendError {
    NotOpen,
    TooLarge { packet: usize, ring: usize },
}

impl Chan {
    fn new(device: Box<dyn Device>) -> Self {
        Chan {
            place: device.offer(),
            device,
            link: None,
            openings: 0,
            revoked: false,
            on_open: OnOpen::default(),
            outbox: VecDeque::new(),
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.link.is_some()
    }

    /// Whether packets still wait for room.
    pub(crate) fn has_unsent(&self) -> bool {
        !self.outbox.is_empty()
    }

    fn ring(&self, side: Side) -> Option<&GuestRing> {
        let link = self.link.as_ref()?;
        Some(match side {
            Side::ToGuest => link.writer.mem(),
            Side::FromGuest => link.reader.mem(),
        })
    }

    /// Writes a header field of a ring as it is; returns what was there.
    pub(crate) fn poke(&self, side: Side, field: Field, value: u32) -> Option<u32> {
        let ring = self.ring(side)?;
        let before = ring.load(field).ok()?;
        ring.store(field, value).ok()?;
        Some(before)
    }

    /// Whether the guest has read all that was sent to it; `None` when the channel is not open.
    pub(crate) fn is_read(&self) -> Option<bool> {
        let read = self.link.as_ref()?.writer.is_read().ok()?;
        Some(self.outbox.is_empty() && read)
    }

    /// See [`Writer::resync`]; `None` when the channel is not open.
    pub(crate) fn resync(&mut self) -> Option<bool> {
        self.outbox.clear();
        self.link.as_mut()?.writer.resync().ok()
    }
}

/// All of the host's state.
pub(crate) struct Bus {
    started: Instant,
    memory: GuestMemoryMmap,
    synic: Arc<SynIc>,
    server: Server,
    channels: Vec<Chan>,
    /// Messages that wait for the guest's slot.
    messages: VecDeque<(u32, Vec<u8>)>,
    log: VecDeque<Event>,
    /// The rules that the guest has broken, once more: nothing else drives them out.
    violations: VecDeque<Event>,
    pub gone: Option<Exit>,
}

impl Bus {
    /// A bus with these devices, each offered from the start or not.
    pub(crate) fn new(
        memory: GuestMemoryMmap,
        synic: Arc<SynIc>,
        versions: Vec<VmbusVersion>,
        devices: Vec<(Box<dyn Device>, bool)>,
    ) -> Self {
        let mut offers = Vec::new();
        let mut channels = Vec::new();
        for (device, wanted) in devices {
            let channel = Chan::new(device);
            let offer = Offer {
                relid: channel.place.relid,
                class: channel.place.class,
                instance: channel.place.instance,
                connection_id: channel.place.connection_id(),
                pipe: channel.place.pipe,
            };
            offers.push((offer, wanted));
            channels.push(channel);
        }
        Bus {
            started: Instant::now(),
            memory,
            synic,
            server: Server::new(versions, offers),
            channels,
            messages: VecDeque::new(),
            log: VecDeque::new(),
            violations: VecDeque::new(),
            gone: None,
        }
    }

    pub(crate) fn since_start(&self, at: Instant) -> Duration {
        at.saturating_duration_since(self.started)
    }

    pub(crate) fn version(&self) -> Option<VmbusVersion> {
        self.server.version()
    }

    pub(crate) fn log(&self) -> impl DoubleEndedIterator<Item = &Event> {
        self.log.iter()
    }

    pub(crate) fn violations(&self) -> impl Iterator<Item = &Event> {
        self.violations.iter()
    }

    pub(crate) fn channel(&mut self, relid: u32) -> Option<&mut Chan> {
        self.channels.iter_mut().find(|c| c.place.relid == relid)
    }

    pub(crate) fn note(&mut self, channel: &'static str, kind: EventKind) {
        self.note_at(Instant::now(), channel, kind);
    }

    fn note_at(&mut self, at: Instant, channel: &'static str, kind: EventKind) {
        if self.log.len() >= KEEP {
            self.log.pop_front();
        }
        let at = self.since_start(at);
        let event = Event { at, channel, kind };
        if matches!(event.kind, EventKind::Violation(_)) {
            self.violations.push_back(event.clone());
        }
        if self.violations.len() > KEEP {
            self.violations.pop_front();
            // The oldest that is left stands for those that went.
            if let Some(oldest) = self.violations.front_mut() {
                oldest.kind = EventKind::Violation(MORE.to_owned());
            }
        }
        self.log.push_back(event);
    }

    fn name(&mut self, relid: u32) -> &'static str {
        self.channel(relid).map_or("vmbus", |c| c.place.name)
    }

    // What the virtual CPUs bring.

    /// The guest changed the registers of a SynIC.
    pub(crate) fn synic_changed(&mut self, vp: u32, registers: Registers) {
        if let Err(error) = self.synic.set_registers(vp, registers) {
            self.note("vmbus", EventKind::Violation(chain(&error)));
        }
        self.flush_messages();
    }

    /// The guest may have freed a message slot.
    pub(crate) fn slot_acknowledged(&mut self) {
        self.flush_messages();
    }

    /// A hypercall that KVM left to us; returns its result.
    pub(crate) fn hypercall(&mut self, input: u64, params: [u64; 2]) -> u64 {
        let fast = input & hypercall::FAST != 0;
        let [first, _] = params;
        match (input & 0xffff, fast) {
            (hypercall::POST_MESSAGE, false) => self.post_message(first),
            (hypercall::SIGNAL_EVENT, true) => self.signal_event(first as u32),
            (hypercall::SIGNAL_EVENT, false) => {
                let mut id = [0; 4];
                match self.memory.read_slice(&mut id, GuestAddress(first)) {
                    Ok(()) => self.signal_event(u32::from_le_bytes(id)),
                    Err(_) => hypercall::INVALID_INPUT,
                }
            }
            (hypercall::POST_MESSAGE, true) => hypercall::INVALID_INPUT,
            _ => hypercall::INVALID_CODE,
        }
    }

    /// `HVCALL_POST_MESSAGE` with its input at `address` (`struct hv_input_post_message`).
    fn post_message(&mut self, address: u64) -> u64 {
        let mut input = [0; 16 + MAX_MESSAGE];
        if self
            .memory
            .read_slice(&mut input, GuestAddress(address))
            .is_err()
        {
            return hypercall::INVALID_INPUT;
        }
        let Ok(([connection, _, message_type, size], payload)) =
            <[U32; 4]>::read_from_prefix(&input)
        else {
            return hypercall::INVALID_INPUT;
        };
        if !self.server.has_connection(connection.get()) {
            return hypercall::INVALID_CONNECTION_ID;
        }
        let Some(payload) = payload.get(..size.get() as usize) else {
            return hypercall::INVALID_PARAMETER;
        };
        if message_type.get() != CHANNEL_MESSAGE {
            return hypercall::INVALID_PARAMETER;
        }
        let effects = self.server.message(connection.get(), payload);
        self.carry_out(effects);
        hypercall::SUCCESS
    }

    fn signal_event(&mut self, connection_id: u32) -> u64 {
        let place = self
            .channels
            .iter()
            .map(|c| c.place)
            .find(|place| place.connection_id() == connection_id);
        match place {
            Some(place) => {
                self.service(place.relid);
                hypercall::SUCCESS
            }
            None => hypercall::INVALID_CONNECTION_ID,
        }
    }

    // What tests want.

    pub(crate) fn offer(&mut self, relid: u32) {
        let effects = self.server.offer(relid);
        self.carry_out(effects);
    }

    pub(crate) fn rescind(&mut self, relid: u32) {
        let effects = self.server.rescind(relid);
        self.carry_out(effects);
    }

    pub(crate) fn withhold(&mut self, relid: u32) {
        self.server.withhold(relid);
    }

    /// Puts a packet on its way.
    pub(crate) fn send(&mut self, relid: u32, packet: Outgoing) -> Result<(), SendError> {
        let channel = self.channel(relid).ok_or(SendError::NotOpen)?;
        let link = channel.link.as_ref().ok_or(SendError::NotOpen)?;
        let ring = link.writer.data_len();
        // Descriptor and trailer; a ring is never filled entirely.
        let bytes = 16 + packet.payload.len().next_multiple_of(8) + 8;
        if bytes >= ring {
            return Err(SendError::TooLarge {
                packet: bytes,
                ring,
            });
        }
        channel.outbox.push_back(packet);
        self.flush_channel(relid);
        Ok(())
    }

    /// The same for what belongs to one opening of the channel: without effect when that is over.
    pub(crate) fn send_within(&mut self, relid: u32, opening: u64, packet: Outgoing) {
        if self.channel(relid).is_some_and(|c| c.openings == opening) {
            // One that was closed in the meantime has nobody to tell.
            let _ = self.send(relid, packet);
        }
    }

    /// Signals the guest on a channel, whether there is something in the ring or not.
    pub(crate) fn signal_channel(&mut self, relid: u32) {
        let link = self.channel(relid).and_then(|c| c.link.as_ref());
        if let Some(target_vp) = link.map(|link| link.target_vp) {
            self.signal(target_vp, relid);
        }
    }

    /// How many pieces of memory the guest shares with the host: two rings in one piece for each
    /// open channel.
    pub(crate) fn gpadls(&self) -> usize {
        self.server.gpadls()
    }

    // How it is done.

    fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Post { vp, message } => self.messages.push_back((vp, message)),
                Effect::Connected(version) => {
                    let version = version.to_string();
                    self.note("vmbus", EventKind::Connected { version });
                }
                Effect::Unloaded => self.note("vmbus", EventKind::Unloaded),
                Effect::Offered(relid) => {
                    let name = self.name(relid);
                    self.note(name, EventKind::Offered);
                }
                Effect::Opened(relid, opening) => self.opened(relid, &opening),
                Effect::Closed(relid) => {
                    let name = self.name(relid);
                    self.close(relid);
                    self.note(name, EventKind::Closed);
                }
                Effect::Rescinded(relid) => {
                    if let Some(channel) = self.channel(relid) {
                        channel.revoked = true;
                    }
                    let name = self.name(relid);
                    self.note(name, EventKind::Rescinded);
                }
                Effect::Released(relid) => {
                    if let Some(channel) = self.channel(relid) {
                        channel.revoked = false;
                    }
                    let name = self.name(relid);
                    self.note(name, EventKind::Released);
                }
                Effect::Retargeted(relid, vp) => {
                    if let Some(link) = self.channel(relid).and_then(|c| c.link.as_mut()) {
                        link.target_vp = vp;
                    }
                }
                Effect::Violation(what) => self.note("vmbus", EventKind::Violation(what)),
            }
        }
        self.flush_messages();
    }

    fn opened(&mut self, relid: u32, opening: &Opening) {
        let name = self.name(relid);
        match self.channel(relid).map(|c| c.on_open).unwrap_or_default() {
            OnOpen::Open => {}
            OnOpen::Refuse => {
                self.note(name, EventKind::OpenRefused);
                let effects = self.server.open_result(relid, false);
                return self.carry_out(effects);
            }
            OnOpen::Ignore => return self.note(name, EventKind::OpenIgnored),
        }
        let link = self.link(opening);
        let good = link.is_ok();
        match link {
            Ok(link) => {
                let ring = link.writer.data_len();
                let mut wishes = Wishes::default();
                if let Some(channel) = self.channel(relid) {
                    channel.link = Some(link);
                    channel.openings += 1;
                    channel.outbox.clear();
                    channel.device.opened(channel.openings, &mut wishes);
                }
                self.note(name, EventKind::Opened { ring });
                for packet in wishes.send {
                    // One that can never fit is not sent, which the log shows.
                    let _ = self.send(relid, packet);
                }
            }
            Err(error) => self.note(name, EventKind::Violation(chain(&error))),
        }
        let effects = self.server.open_result(relid, good);
        self.carry_out(effects);
    }

    fn link(&self, opening: &Opening) -> Result<Link, RingError<GuestRingError>> {
        let ring = |pages: Option<&[u64]>| {
            GuestRing::new(&self.memory, pages.unwrap_or_default()).map_err(RingError::Memory)
        };
        let from_guest = ring(opening.pages.get(..opening.downstream_page))?;
        let to_guest = ring(opening.pages.get(opening.downstream_page..))?;
        Ok(Link {
            reader: Reader::new(from_guest)?,
            writer: Writer::new(to_guest)?,
            target_vp: opening.target_vp,
        })
    }

    fn close(&mut self, relid: u32) {
        if let Some(channel) = self.channel(relid) {
            channel.link = None;
            channel.outbox.clear();
            channel.device.closed();
        }
    }

    fn flush_messages(&mut self) {
        while let Some((vp, message)) = self.messages.front() {
            match self
                .synic
                .post(*vp, CHANNEL_MESSAGE, MESSAGE_PORT.into(), message)
            {
                Ok(Posted::Yes) => {
                    self.messages.pop_front();
                }
                Ok(Posted::Busy) => return,
                Ok(Posted::Off) => {
                    self.messages.pop_front();
                    let what = "the guest has its SynIC off and cannot get a message".to_string();
                    self.note("vmbus", EventKind::Violation(what));
                }
                Err(error) => {
                    self.messages.pop_front();
                    self.note("vmbus", EventKind::Violation(chain(&error)));
                }
            }
        }
    }

    /// Reads all that the guest wrote, then uses the room that it may have made.
    fn service(&mut self, relid: u32) {
        let at = Instant::now();
        loop {
            let Some(channel) = self.channel(relid) else {
                return;
            };
            let name = channel.place.name;
            let Some(link) = &mut channel.link else {
                return;
            };
            match link.reader.receive() {
                Ok(Some((packet, room))) => {
                    let target_vp = link.target_vp;
                    let mut wishes = Wishes::default();
                    channel.device.packet(packet, at, &mut wishes);
                    channel.outbox.extend(wishes.send);
                    for kind in wishes.notes {
                        self.note_at(at, name, kind);
                    }
                    if room {
                        self.signal(target_vp, relid);
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    self.broken(relid, name, &error);
                    return;
                }
            }
        }
        self.flush_channel(relid);
    }

    fn flush_channel(&mut self, relid: u32) {
        loop {
            let Some(channel) = self.channel(relid) else {
                return;
            };
            let name = channel.place.name;
            let (Some(link), Some(next)) = (&mut channel.link, channel.outbox.front()) else {
                return;
            };
            let Outgoing {
                transaction,
                id,
                descriptor,
                ref payload,
            } = *next;
            match link.writer.send_as(descriptor, id, payload) {
                Ok(Sent::Full) => return,
                Ok(Sent::Yes { signal }) => {
                    let at = Instant::now();
                    let target_vp = link.target_vp;
                    let bytes = payload.len();
                    channel.outbox.pop_front();
                    let note = channel.device.sent(transaction, bytes, at);
                    if let Some(kind) = note {
                        self.note_at(at, name, kind);
                    }
                    if signal {
                        self.signal(target_vp, relid);
                    }
                }
                Err(error) => {
                    self.broken(relid, name, &error);
                    return;
                }
            }
        }
    }

    /// A ring that makes no sense cannot be used until the guest opens the channel again.
    fn broken(&mut self, relid: u32, name: &'static str, error: &RingError<GuestRingError>) {
        self.note(name, EventKind::Violation(chain(error)));
        self.close(relid);
    }

    fn signal(&mut self, vp: u32, flag: u32) {
        match self.synic.signal(vp, flag) {
            Ok(true) => {}
            Ok(false) => {
                let what = "the guest has its SynIC off and cannot be signalled".to_string();
                self.note("vmbus", EventKind::Violation(what));
            }
            Err(error) => self.note("vmbus", EventKind::Violation(chain(&error))),
        }
    }
}

/// An error with its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
