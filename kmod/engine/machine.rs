// SPDX-License-Identifier: GPL-2.0

//! The state machine: requests of the host, the daemon that serves them, and the freeze in between.
//!
//! Requests wait in a short queue and are served in order; only the first one, the head, is ever
//! shown to the daemon. Three rules hold everywhere:
//!
//! - each request is answered once: by the daemon, by the clock, or by the daemon's death;
//! - an answer counts only for a request that this daemon has read and that is still open, so a
//!   late or stray one can never hit the next request. v1 answers carry no id; there the rule rests
//!   on the daemon reading and answering in turn, as every v1 daemon does;
//! - a freeze that did not last is remembered until the next FREEZE succeeds, and every THAW in
//!   between is failed towards the host, whatever the daemon says of it.

use super::frames;
use super::frames::First;
use super::frames::Frame;
use super::frames::Refusal;
use super::notes::bump;
use super::notes::Note;
use super::notes::Stats;
use super::notes::Subject;
use super::uapi::op;
use super::uapi::status;
use super::uapi::thawed;
use super::wire;
use super::wire::Kind;
use super::wire::Version;
use core::ops::DerefMut;

/// Requests that may be open at a time. A real host has one; the rest is for hosts that do not wait.
pub const QUEUE: usize = 4;

/// Longest packet in bytes that is kept for an answer: an IC message of 13,312 bytes with its pipe
/// header, rounded up to the 8 bytes that VMBus counts in. Longer ones are answered at once.
pub const PACKET_MAX: usize = 13_320;

/// How long things may take, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Time for a FREEZE (mainline: 15 minutes).
    pub freeze_ms: u32,
    /// Time for any other request (mainline: 30 seconds).
    pub other_ms: u32,
    /// How long a request waits for a daemon to register; 0 fails it at once, as mainline does.
    pub grace_ms: u32,
    /// How many file systems the module can hold for the daemon at a time; 0 when it cannot.
    pub max_held: u32,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            freeze_ms: 15 * 60 * 1000,
            other_ms: 30 * 1000,
            grace_ms: 5 * 1000,
            max_held: 0,
        }
    }
}

/// What the machine asks its surroundings to do. Called in the middle of an event, so none of
/// them may call back.
pub trait Effects {
    /// Sends `packet` to the host as the answer to the VMBus request `request_id`; false when it
    /// could not be sent.
    fn send(&mut self, packet: &[u8], request_id: u64) -> bool;
    /// Thaws what the module holds for the daemon, without waiting for it; `reason` is one of
    /// [`thawed`]. Harmless when nothing is held.
    fn let_go(&mut self, reason: u32);
    /// Takes note of something that happened.
    fn note(&mut self, note: Note);
}

/// Who has the device open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Daemon {
    /// Nobody.
    Absent,
    /// Somebody who has not registered yet.
    Open,
    /// A daemon that speaks v1.
    V1,
    /// A daemon that speaks v2.
    V2,
}

/// The freeze between a FREEZE and its THAW.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Freeze {
    /// The host asked for none, or it ended well.
    None,
    /// FREEZE `id` succeeded and its daemon is still there.
    Held { id: u64 },
    /// The last successful FREEZE did not last until its THAW.
    Broken,
}

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    /// Behind another one; has no deadline yet.
    Queued,
    /// At the head, but there is no daemon.
    Held,
    /// At the head; the daemon may read it.
    Offered,
    /// At the head; the daemon has read it.
    Read,
}

/// Where a request came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// The host: `len` bytes of packet wait in `slot` of the store.
    Host {
        slot: usize,
        len: usize,
        request_id: u64,
    },
    /// Suspend, which lets the daemon thaw. Nobody waits for the answer.
    Suspend,
}

/// A request that the daemon has to serve. Times are microseconds of the caller's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    id: u64,
    operation: u8,
    origin: Origin,
    stage: Stage,
    arrived: u64,
    deadline: u64,
}

impl Request {
    /// For the notes.
    fn subject(&self) -> Subject {
        Subject {
            id: self.id,
            transaction: match self.origin {
                Origin::Host { request_id, .. } => request_id,
                Origin::Suspend => 0,
            },
            operation: self.operation,
        }
    }
}

/// See [`Engine::shape`].
#[cfg(not(hv_vss_kernel))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    requests: [Option<(u8, Stage, bool)>; QUEUE],
    daemon: Daemon,
    freeze: &'static str,
    reply_waits: bool,
    suspended: bool,
}

/// What [`Engine::peek`] has shown and [`Engine::taken`] takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// The reply to a registration.
    Reply,
    /// The notice that what was held for this request is thawed.
    Notice(u64),
    /// The request with this id.
    Request(u64),
}

/// The machine. `B` is the store for open packets: it should hold [`QUEUE`] times [`PACKET_MAX`]
/// bytes; a smaller one means a shorter queue.
///
/// # Invariants
///
/// - Open requests stand at the front of `requests`, ids ascending, each with a slot of its own.
/// - The head is [`Stage::Held`] without a registered daemon, [`Stage::Offered`] or [`Stage::Read`]
///   with one; all others are [`Stage::Queued`].
/// - [`Freeze::Held`] only with a registered daemon.
pub struct Engine<B> {
    config: Config,
    store: B,
    requests: [Option<Request>; QUEUE],
    daemon: Daemon,
    reply_waits: bool,
    freeze: Freeze,
    /// What the daemon has held last: the id that it gave to [`Engine::hold`].
    held: Option<u64>,
    /// What the daemon has to be told: id and reason of a hold that ended.
    notice: Option<(u64, u32)>,
    /// From the moment that the machine prepares to sleep until it is awake again.
    sleeping: bool,
    next_id: u64,
    versions: Option<(Version, Version)>,
    stats: Stats,
}

impl<B: DerefMut<Target = [u8]>> Engine<B> {
    /// A machine with nobody on either side.
    pub fn new(config: Config, store: B) -> Self {
        Engine {
            config,
            store,
            requests: [None; QUEUE],
            daemon: Daemon::Absent,
            reply_waits: false,
            freeze: Freeze::None,
            held: None,
            notice: None,
            sleeping: false,
            next_id: 1,
            versions: None,
            stats: Stats::default(),
        }
    }

    // --- The host's side ---

    /// A packet from the host, pipe header first, in a private copy that becomes the answer.
    /// `request_id` is the VMBus request id.
    pub fn packet(
        &mut self,
        now: u64,
        packet: &mut [u8],
        request_id: u64,
        effects: &mut impl Effects,
    ) {
        match wire::kind(packet) {
            Kind::Malformed => {
                bump(&mut self.stats.bad_packets);
                effects.note(Note::BadPacket { len: packet.len() });
            }
            Kind::Negotiate => {
                bump(&mut self.stats.negotiations);
                self.versions = wire::negotiate(packet);
                effects.note(match self.versions {
                    Some((framework, message)) => Note::Negotiated { framework, message },
                    None => Note::NotNegotiated,
                });
                self.send(packet, request_id, effects);
            }
            Kind::Vss(op::FREEZE) if self.sleeping => {
                bump(&mut self.stats.op(op::FREEZE).requests);
                bump(&mut self.stats.op(op::FREEZE).failures);
                self.direct(packet, op::FREEZE, status::FAIL, request_id, effects);
            }
            Kind::Vss(operation @ (op::HOT_BACKUP | op::FREEZE | op::THAW)) => {
                bump(&mut self.stats.op(operation).requests);
                if self.enqueue(now, operation, packet, request_id, effects) {
                    self.start_head(now, effects);
                } else {
                    bump(&mut self.stats.overruns);
                    bump(&mut self.stats.op(operation).failures);
                    self.direct(packet, operation, status::FAIL, request_id, effects);
                }
            }
            Kind::Vss(operation) => {
                bump(&mut self.stats.op(operation).requests);
                self.direct(packet, operation, status::OK, request_id, effects);
            }
        }
    }

    /// Answers a request that the daemon has no part in.
    fn direct(
        &mut self,
        packet: &mut [u8],
        operation: u8,
        code: u32,
        request_id: u64,
        effects: &mut impl Effects,
    ) {
        wire::answer(packet, operation, code);
        let subject = Subject {
            id: 0,
            transaction: request_id,
            operation,
        };
        effects.note(Note::Direct {
            subject,
            status: code,
        });
        self.send(packet, request_id, effects);
    }

    fn send(&mut self, packet: &[u8], request_id: u64, effects: &mut impl Effects) {
        if !effects.send(packet, request_id) {
            bump(&mut self.stats.unsent);
            effects.note(Note::NotSent);
        }
    }

    /// Puts a request at the end of the queue; false when there is no room for it.
    fn enqueue(
        &mut self,
        now: u64,
        operation: u8,
        packet: &[u8],
        request_id: u64,
        effects: &mut impl Effects,
    ) -> bool {
        let Some(slot) = self.free_slot() else {
            return false;
        };
        let len = packet.len();
        match self.slot(slot).and_then(|s| s.get_mut(..len)) {
            Some(place) => place.copy_from_slice(packet),
            None => return false,
        }
        let id = self.take_id();
        let request = Request {
            id,
            operation,
            origin: Origin::Host {
                slot,
                len,
                request_id,
            },
            stage: Stage::Queued,
            arrived: now,
            deadline: 0,
        };
        match self.requests.iter_mut().find(|r| r.is_none()) {
            Some(place) => *place = Some(request),
            None => return false,
        }
        effects.note(Note::Received(request.subject()));
        true
    }

    /// A slot of the store that no open request uses.
    fn free_slot(&self) -> Option<usize> {
        (0..QUEUE).find(|slot| {
            !self.requests.iter().flatten().any(|r| match r.origin {
                Origin::Host { slot: used, .. } => used == *slot,
                Origin::Suspend => false,
            })
        })
    }

    fn slot(&mut self, slot: usize) -> Option<&mut [u8]> {
        self.store.chunks_exact_mut(PACKET_MAX).nth(slot)
    }

    fn take_id(&mut self) -> u64 {
        let id = self.next_id;
        // OVERFLOW: at one request a nanosecond this lasts five centuries; 0 would mean "none".
        self.next_id = id.wrapping_add(1).max(1);
        id
    }

    fn head(&self) -> Option<&Request> {
        self.requests.first().and_then(|r| r.as_ref())
    }

    fn head_mut(&mut self) -> Option<&mut Request> {
        self.requests.first_mut().and_then(|r| r.as_mut())
    }

    // --- The life of the head ---

    /// Shows a fresh head to the daemon, or lets it wait for one. Without grace every request that
    /// is queued fails here.
    fn start_head(&mut self, now: u64, effects: &mut impl Effects) {
        let registered = self.registered();
        let config = self.config;
        while let Some(head) = self.head_mut() {
            if head.stage != Stage::Queued {
                return;
            }
            if registered {
                head.stage = Stage::Offered;
                head.deadline = after(now, config.time_for(head.operation));
                effects.note(Note::Offered(head.subject()));
                return;
            }
            if config.grace_ms > 0 {
                head.stage = Stage::Held;
                head.deadline = after(now, config.grace_ms);
                effects.note(Note::Held(head.subject()));
                return;
            }
            self.close_head(now, status::FAIL, effects);
        }
    }

    /// Ends the head with `code` and starts the next one.
    fn finish(&mut self, now: u64, code: u32, effects: &mut impl Effects) {
        self.close_head(now, code, effects);
        self.start_head(now, effects);
    }

    /// Takes the head from the queue and tells the host how it ended.
    fn close_head(&mut self, now: u64, mut code: u32, effects: &mut impl Effects) {
        let Some(request) = self.pop_head() else {
            return;
        };
        let Request { id, operation, .. } = request;
        let latency_us = now.saturating_sub(request.arrived);
        if let Origin::Host {
            slot,
            len,
            request_id,
        } = request.origin
        {
            code = self.settle(id, operation, code, effects);
            let stats = self.stats.op(operation);
            stats.last_us = latency_us;
            stats.max_us = stats.max_us.max(latency_us);
            if code != status::OK {
                bump(&mut stats.failures);
            }
            let sent = self
                .slot(slot)
                .and_then(|s| s.get_mut(..len))
                .is_some_and(|packet| {
                    wire::answer(packet, operation, code);
                    effects.send(packet, request_id)
                });
            if !sent {
                bump(&mut self.stats.unsent);
                effects.note(Note::NotSent);
            }
        }
        effects.note(Note::Answered {
            subject: request.subject(),
            status: code,
            latency_us,
        });
    }

    fn pop_head(&mut self) -> Option<Request> {
        let request = self.requests.first_mut().and_then(|r| r.take());
        self.requests.rotate_left(1);
        request
    }

    /// Draws the consequences of a request that ends with `code` for the freeze, and returns what
    /// the host is to be told.
    fn settle(&mut self, id: u64, operation: u8, code: u32, effects: &mut impl Effects) -> u32 {
        if operation == op::THAW || (operation == op::FREEZE && code != status::OK) {
            self.let_go(thawed::CALLED_OFF, effects);
        }
        match (operation, self.freeze) {
            (op::FREEZE, _) if code == status::OK => self.freeze = Freeze::Held { id },
            // A daemon rolls a failed freeze back, and the one before with it.
            (op::FREEZE, Freeze::Held { id }) => self.break_freeze(id, 0, effects),
            (op::THAW, Freeze::Broken) if code == status::OK => return status::FAIL,
            (op::THAW, Freeze::Held { .. }) if code == status::OK => self.freeze = Freeze::None,
            _ => {}
        }
        code
    }

    fn break_freeze(&mut self, id: u64, reason: u32, effects: &mut impl Effects) {
        self.freeze = Freeze::Broken;
        bump(&mut self.stats.broken);
        effects.note(Note::Broken { id, reason });
    }

    /// Lets go of what is held; the daemon is told.
    fn let_go(&mut self, reason: u32, effects: &mut impl Effects) {
        effects.let_go(reason);
        self.notice = self.held.take().map(|id| (id, reason)).or(self.notice);
    }

    // --- The clock ---

    /// When [`Engine::timer`] has to be called next; `None` when no time is running.
    pub fn deadline(&self) -> Option<u64> {
        self.head().map(|head| head.deadline)
    }

    /// The clock has moved. Fails the head if its time is over; harmless at any other time.
    pub fn timer(&mut self, now: u64, effects: &mut impl Effects) {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return;
        }
        if let Some(subject) = self.head().map(Request::subject) {
            bump(&mut self.stats.op(subject.operation).timeouts);
            effects.note(Note::TimedOut(subject));
            self.finish(now, status::FAIL, effects);
        }
    }

    // --- The daemon's side ---

    /// Somebody opens the device; false when somebody else has it.
    pub fn open(&mut self) -> bool {
        let free = self.daemon == Daemon::Absent;
        if free {
            self.daemon = Daemon::Open;
        }
        free
    }

    /// The one who had the device open is gone: what it had to answer fails at once, and so will
    /// the THAW of a freeze that it held.
    pub fn release(&mut self, now: u64, effects: &mut impl Effects) {
        let was_registered = self.registered();
        self.daemon = Daemon::Absent;
        self.reply_waits = false;
        (self.held, self.notice) = (None, None);
        if !was_registered {
            return;
        }
        effects.let_go(thawed::CRASH);
        effects.note(Note::Released);
        if let Freeze::Held { id } = self.freeze {
            self.break_freeze(id, 0, effects);
        }
        self.finish(now, status::FAIL, effects);
    }

    /// Bytes that the daemon has written: a registration, an answer or a notice.
    ///
    /// # Errors
    ///
    /// A [`Refusal`]; nothing has changed then.
    pub fn write(
        &mut self,
        now: u64,
        bytes: &[u8],
        effects: &mut impl Effects,
    ) -> Result<(), Refusal> {
        let result = self.accept(now, bytes, effects);
        if let Err(refusal) = result {
            self.stats.bad_frames.count(refusal);
            effects.note(Note::BadFrame { refusal });
        }
        result
    }

    fn accept(
        &mut self,
        now: u64,
        bytes: &[u8],
        effects: &mut impl Effects,
    ) -> Result<(), Refusal> {
        match self.daemon {
            Daemon::Absent => return Err(Refusal::OutOfTurn),
            Daemon::Open => {
                let first = frames::first(bytes)?;
                self.register(now, first, effects);
            }
            Daemon::V1 => {
                // The status lies over the operation, so nothing that a registered daemon writes
                // may be looked at as a registration.
                let code = frames::answer_v1(bytes)?;
                self.open_read(None)?;
                self.finish(now, code, effects);
            }
            Daemon::V2 => match frames::later(bytes)? {
                Frame::Answer {
                    id,
                    status,
                    operation,
                } => {
                    if self.open_read(Some(id))? != operation {
                        return Err(Refusal::WrongOperation);
                    }
                    self.finish(now, status, effects);
                }
                Frame::Thawed { id, reason } => {
                    if self.freeze != (Freeze::Held { id }) {
                        return Err(Refusal::Stale);
                    }
                    self.break_freeze(id, reason, effects);
                }
            },
        }
        Ok(())
    }

    /// The operation of the head, if the daemon has read it and it has this id.
    fn open_read(&self, id: Option<u64>) -> Result<u8, Refusal> {
        self.head()
            .filter(|head| head.stage == Stage::Read && id.is_none_or(|id| id == head.id))
            .map(|head| head.operation)
            .ok_or(Refusal::Stale)
    }

    fn register(&mut self, now: u64, first: First, effects: &mut impl Effects) {
        (self.daemon, self.reply_waits) = match first {
            First::V1 { reply } => (Daemon::V1, reply),
            First::V2 => (Daemon::V2, true),
        };
        bump(&mut self.stats.registrations);
        effects.note(Note::Registered { abi: self.abi() });
        if let Some(head) = self.head_mut() {
            head.stage = Stage::Queued;
        }
        self.start_head(now, effects);
    }

    fn registered(&self) -> bool {
        self.abi() != 0
    }

    /// The ABI version in force towards the daemon, 0 when none is registered.
    pub fn abi(&self) -> u32 {
        match self.daemon {
            Daemon::Absent | Daemon::Open => 0,
            Daemon::V1 => 1,
            Daemon::V2 => 2,
        }
    }

    /// Whether a read would find something.
    pub fn readable(&self) -> bool {
        self.next_out().is_some()
    }

    fn next_out(&self) -> Option<Token> {
        if self.reply_waits {
            return Some(Token::Reply);
        }
        if let Some((id, _)) = self.notice {
            return Some(Token::Notice(id));
        }
        self.head()
            .filter(|head| head.stage == Stage::Offered)
            .map(|head| Token::Request(head.id))
    }

    /// Puts what is to be read next into `out`, which should hold [`super::uapi::MAX_FRAME`] bytes.
    /// Returns its length and the token that [`Engine::taken`] wants once the daemon has it. `None`
    /// when there is nothing, or when it does not fit.
    pub fn peek(&mut self, now: u64, out: &mut [u8]) -> Option<(usize, Token)> {
        let token = self.next_out()?;
        let v2 = self.daemon == Daemon::V2;
        let len = match token {
            Token::Reply if v2 => frames::put_registered(out, self.config.max_held),
            Token::Reply => frames::put_registered_v1(out),
            Token::Notice(_) => {
                let (id, reason) = self.notice?;
                frames::put_thawed(out, id, reason)
            }
            Token::Request(_) => {
                let head = *self.head()?;
                if v2 {
                    let left_ms = head.deadline.saturating_sub(now) / 1000;
                    let left_ms = u32::try_from(left_ms).unwrap_or(u32::MAX);
                    let payload = self.payload(&head);
                    frames::put_request(out, head.id, head.operation, left_ms, payload)
                } else {
                    frames::put_request_v1(out, head.operation)
                }
            }
        };
        Some((len?, token))
    }

    /// The bytes that follow a v2 request.
    fn payload(&mut self, request: &Request) -> &[u8] {
        let packet = match request.origin {
            Origin::Host { slot, len, .. } if request.operation == op::FREEZE => {
                self.slot(slot).and_then(|s| s.get(..len))
            }
            _ => None,
        };
        match packet.and_then(wire::freeze_info) {
            Some(info) => info,
            None => &[],
        }
    }

    /// The daemon has received what [`Engine::peek`] showed. A token of something that has ended
    /// in the meantime does nothing.
    pub fn taken(&mut self, _now: u64, token: Token, effects: &mut impl Effects) {
        if self.next_out() != Some(token) {
            return;
        }
        match token {
            Token::Reply => self.reply_waits = false,
            Token::Notice(_) => self.notice = None,
            Token::Request(_) => {
                if let Some(head) = self.head_mut() {
                    head.stage = Stage::Read;
                    effects.note(Note::Read(head.subject()));
                }
            }
        }
    }

    /// The daemon gives a sign of life that is not a message: it polls, or begins to read.
    pub fn alive(&mut self) {}

    // --- What the module holds ---

    /// The daemon wants the module to freeze a file system for the FREEZE `id`, or, with 0, for
    /// nobody. Once this is allowed the daemon counts as holding something, until the module lets go.
    ///
    /// # Errors
    ///
    /// A [`Refusal`] when it may not, or not now.
    pub fn hold(&mut self, id: u64) -> Result<(), Refusal> {
        if self.daemon != Daemon::V2 || self.config.max_held == 0 {
            return Err(Refusal::OutOfTurn);
        }
        let asked = self.head().filter(|head| head.stage == Stage::Read);
        let allowed = match id {
            0 => {
                let undisturbed = asked.is_none_or(|head| head.operation == op::HOT_BACKUP);
                undisturbed && !matches!(self.freeze, Freeze::Held { .. })
            }
            id => asked.is_some_and(|head| head.id == id && head.operation == op::FREEZE),
        };
        if !allowed || self.sleeping || self.notice.is_some() {
            return Err(Refusal::Stale);
        }
        self.held = Some(id);
        Ok(())
    }

    /// What was held has been thawed by the module itself, for one of the reasons in [`thawed`].
    pub fn lost(&mut self, now: u64, reason: u32, effects: &mut impl Effects) {
        let Some(held) = self.held.take() else {
            return;
        };
        self.notice = Some((held, reason));
        if let Freeze::Held { id } = self.freeze {
            self.break_freeze(id, reason, effects);
        }
        if self.freezing() {
            self.finish(now, status::FAIL, effects);
        }
    }

    /// Whether the daemon works on a FREEZE.
    fn freezing(&self) -> bool {
        self.head()
            .is_some_and(|head| head.stage == Stage::Read && head.operation == op::FREEZE)
    }

    // --- The end of a channel, and sleep ---

    /// The channel is about to close, for one of the reasons in [`thawed`]: open requests fail, as
    /// long as somebody can hear it, and so does the freeze.
    pub fn close(&mut self, now: u64, reason: u32, effects: &mut impl Effects) {
        self.versions = None;
        self.let_go(reason, effects);
        while self.head().is_some() {
            self.close_head(now, status::FAIL, effects);
        }
        if let Freeze::Held { id } = self.freeze {
            self.break_freeze(id, reason, effects);
        }
    }

    /// The machine is about to sleep, and user space still runs. What is frozen or about to be is
    /// thawed, and until [`Engine::resume`] every FREEZE fails at once.
    pub fn prepare_sleep(&mut self, now: u64, effects: &mut impl Effects) {
        self.sleeping = true;
        let frozen = matches!(self.freeze, Freeze::Held { .. }) || self.freezing();
        let held = self.held.is_some();
        self.let_go(thawed::SLEEP, effects);
        while self.head().is_some() {
            self.close_head(now, status::FAIL, effects);
        }
        if let Freeze::Held { id } = self.freeze {
            self.break_freeze(id, thawed::SLEEP, effects);
        }
        if frozen && !held && self.registered() {
            let request = Request {
                id: self.take_id(),
                operation: op::THAW,
                origin: Origin::Suspend,
                stage: Stage::Queued,
                arrived: now,
                deadline: 0,
            };
            if let Some(place) = self.requests.first_mut() {
                *place = Some(request);
            }
            self.start_head(now, effects);
        }
    }

    /// Whether the daemon has thawed for [`Engine::prepare_sleep`], as far as it had to, or nobody is
    /// left to do it.
    pub fn thawed_for_sleep(&self) -> bool {
        let thawing = |head: &Request| head.origin == Origin::Suspend;
        self.sleeping && !self.head().is_some_and(thawing)
    }

    /// The machine is awake again and user space runs.
    pub fn resume(&mut self) {
        self.sleeping = false;
    }

    // --- For those who look ---

    /// Versions agreed with the host: framework, VSS.
    pub fn versions(&self) -> Option<(Version, Version)> {
        self.versions
    }

    /// All counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Id and operation of the request that is being served.
    pub fn open_request(&self) -> Option<(u64, u8)> {
        self.head().map(|head| (head.id, head.operation))
    }

    /// Number of open requests.
    pub fn queued(&self) -> usize {
        self.requests.iter().flatten().count()
    }

    /// The freeze in one word.
    pub fn freeze_state(&self) -> &'static str {
        match self.freeze {
            Freeze::None => "none",
            Freeze::Held { .. } => "held",
            Freeze::Broken => "broken",
        }
    }

    /// What the daemon is doing with the head, in one word.
    pub fn stage_name(&self) -> &'static str {
        match self.head().map(|head| head.stage) {
            None => "idle",
            Some(Stage::Queued) => "queued",
            Some(Stage::Held) => "held",
            Some(Stage::Offered) => "offered",
            Some(Stage::Read) => "read",
        }
    }

    /// The state without ids, times and packets, for tests that visit each state once.
    #[cfg(not(hv_vss_kernel))]
    pub fn shape(&self) -> Shape {
        Shape {
            requests: self
                .requests
                .map(|r| r.map(|r| (r.operation, r.stage, r.origin == Origin::Suspend))),
            daemon: self.daemon,
            freeze: self.freeze_state(),
            reply_waits: self.reply_waits,
            suspended: self.sleeping,
        }
    }

    /// Checks the invariants of the type; tests call it after each event.
    ///
    /// # Errors
    ///
    /// Names the one that does not hold.
    #[cfg(not(hv_vss_kernel))]
    pub fn check(&self) -> Result<(), &'static str> {
        let open = self.queued();
        if self.requests.iter().take(open).any(|r| r.is_none()) {
            return Err("a gap in the queue");
        }
        let mut last_id = 0;
        let mut slots = [false; QUEUE];
        for (at, request) in self.requests.iter().flatten().enumerate() {
            if request.id <= last_id {
                return Err("ids do not ascend");
            }
            last_id = request.id;
            if (at > 0) != (request.stage == Stage::Queued) {
                return Err("stage and place disagree");
            }
            if at == 0 && (request.stage == Stage::Held) == self.registered() {
                return Err("stage and daemon disagree");
            }
            if let Origin::Host { slot, len, .. } = request.origin {
                if len > PACKET_MAX {
                    return Err("a packet longer than its slot");
                }
                match slots.get_mut(slot) {
                    Some(used) if !*used => *used = true,
                    _ => return Err("a slot used twice"),
                }
            } else if !self.registered() || at > 0 {
                return Err("a THAW of suspend without a daemon or behind others");
            }
        }
        if matches!(self.freeze, Freeze::Held { .. }) && !self.registered() {
            return Err("a freeze without a daemon");
        }
        if self.reply_waits && !self.registered() {
            return Err("a reply without a registration");
        }
        Ok(())
    }
}

impl Config {
    /// The time that the daemon has for `operation`.
    fn time_for(&self, operation: u8) -> u32 {
        if operation == op::FREEZE {
            self.freeze_ms
        } else {
            self.other_ms
        }
    }
}

/// `ms` milliseconds after `now`.
fn after(now: u64, ms: u32) -> u64 {
    now.saturating_add(u64::from(ms).saturating_mul(1000))
}
