// SPDX-License-Identifier: GPL-2.0

//! The state machine: requests of the host, the daemon that serves them, and the freeze in between.
//!
//! Requests wait in a short queue and are served in order; only the first one, the head, is ever
//! shown to the daemon. These rules hold everywhere:
//!
//! - each request is answered once: by the daemon, by the clock, or by what makes an answer of the
//!   daemon impossible. Its time counts from its arrival;
//! - an answer counts only for a request that this daemon has read and that is still open, so a
//!   late or stray one can never hit the next request. v1 answers carry no id; there the rule rests
//!   on the daemon reading and answering in turn, as every v1 daemon does;
//! - a freeze that did not last is remembered until the host has been told, and every THAW until
//!   then is failed, whatever the daemon says of it (see [`Freeze`]);
//! - what may be frozen and is of no use to the host any more is thawed: the module lets go of what it
//!   holds, and a daemon that freezes by itself is given a THAW, whether the host asks for one or not.
//!   That THAW stays until a daemon has answered it.

use super::frames;
use super::frames::First;
use super::frames::Frame;
use super::frames::Refusal;
use super::freeze::Freeze;
use super::notes::bump;
use super::notes::Note;
use super::notes::Stats;
use super::notes::Subject;
use super::queue::Queue;
use super::queue::Request;
use super::queue::Stage;
use super::uapi::op;
use super::uapi::status;
use super::uapi::thawed;
use super::wire;
use super::wire::Kind;
use super::wire::Version;
use core::ops::DerefMut;

/// How long things may take, in milliseconds, and how many file systems the module can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Time for a FREEZE (mainline: 15 minutes).
    pub freeze_ms: u32,
    /// Time for any other request (mainline: 30 seconds).
    pub other_ms: u32,
    /// How long a request waits for a daemon that is not there or does not read; 0 fails it at once,
    /// as mainline does when no daemon is there.
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

impl Config {
    /// The time that a request has for `operation`.
    fn time_for(&self, operation: u8) -> u32 {
        if operation == op::FREEZE {
            self.freeze_ms
        } else {
            self.other_ms
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

/// A THAW that the daemon has to do though no host waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OwedThaw {
    id: u64,
    since: u64,
    /// Once the daemon has read it: when that is forgotten, so that it can be read again.
    deadline: Option<u64>,
}

impl OwedThaw {
    fn subject(&self) -> Subject {
        Subject {
            id: self.id,
            transaction: 0,
            operation: op::THAW,
        }
    }

    fn is_read(&self) -> bool {
        self.deadline.is_some()
    }

    fn is_over(&self, now: u64) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }
}

/// How a request ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// The daemon has answered with this status.
    Answered(u32),
    /// There will be no answer. What the daemon may have frozen is thawed, and this is the reason
    /// that it is given, one of [`thawed`].
    Failed(u32),
}

/// See [`Engine::shape`].
#[cfg(not(hv_vss_kernel))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    requests: [Option<(u8, Stage)>; super::QUEUE],
    daemon: Daemon,
    reply_waits: bool,
    notice_waits: bool,
    quiet: bool,
    holds: bool,
    freeze: &'static str,
    told: bool,
    owed_thaw: Option<bool>,
    calling_off: bool,
    sleeping: bool,
}

/// What [`Engine::peek`] has shown and [`Engine::taken`] takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// The reply to a registration.
    Reply,
    /// The notice that what was held for this request is thawed.
    Notice(u64),
    /// The THAW with this id, which no host waits for.
    Thaw(u64),
    /// The host's request with this id.
    Request(u64),
}

/// The machine. `B` is the store for open packets: it should hold [`super::QUEUE`] times
/// [`super::PACKET_MAX`] bytes; a smaller one means a shorter queue.
///
/// # Invariants
///
/// - The head is [`Stage::Held`] without a registered daemon, and only then; all behind it are
///   [`Stage::Queued`].
/// - The daemon has one thing in hand at a time: a request or a THAW that is owed, read and not
///   answered. (Beside it there may be a FREEZE that it has yet to give up, see `calling_off`.)
/// - [`Freeze::Held`] only with a registered daemon, and never while a THAW is owed.
/// - Something is held only for a registered v2 daemon, and not while it has yet to be told that what
///   was held for a FREEZE is thawed.
pub struct Engine<B> {
    config: Config,
    queue: Queue<B>,
    daemon: Daemon,
    reply_waits: bool,
    /// Since when nobody serves requests: there is no daemon, or it has let one run out and has not
    /// been heard of since.
    quiet_since: Option<u64>,
    freeze: Freeze,
    /// The daemon holds something in the module, since [`Engine::hold`] with this id.
    hold: Option<u64>,
    /// What the daemon has to be told of a hold that has ended: its id and the reason.
    notice: Option<(u64, u32)>,
    owed_thaw: Option<OwedThaw>,
    /// The daemon works on a FREEZE that has been failed, until it has answered a THAW.
    calling_off: bool,
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
            queue: Queue::new(store),
            daemon: Daemon::Absent,
            reply_waits: false,
            quiet_since: Some(0),
            freeze: Freeze::None,
            hold: None,
            notice: None,
            owed_thaw: None,
            calling_off: false,
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
            Kind::Vss(operation) => {
                bump(&mut self.stats.op(operation).requests);
                self.request(now, operation, packet, request_id, effects);
            }
        }
    }

    /// A request of the host: for the daemon, or answered in here.
    fn request(
        &mut self,
        now: u64,
        operation: u8,
        packet: &mut [u8],
        request_id: u64,
        effects: &mut impl Effects,
    ) {
        match operation {
            op::HOT_BACKUP => self.enqueue(now, operation, packet, request_id, effects),
            op::FREEZE if self.sleeping || self.calling_off => {
                self.refuse(now, operation, packet, request_id, effects);
            }
            op::FREEZE => self.enqueue(now, operation, packet, request_id, effects),
            op::THAW => {
                // The host does not wait for the FREEZE any more, so nobody has to finish it.
                self.fail_freezes(now, thawed::CALLED_OFF, effects);
                self.enqueue(now, operation, packet, request_id, effects);
            }
            _ => {
                self.direct(operation, status::OK, packet, request_id, effects);
            }
        }
        self.advance(now, effects);
    }

    fn enqueue(
        &mut self,
        now: u64,
        operation: u8,
        packet: &mut [u8],
        request_id: u64,
        effects: &mut impl Effects,
    ) {
        let subject = Subject {
            id: self.take_id(),
            transaction: request_id,
            operation,
        };
        let deadline = after(now, self.config.time_for(operation));
        match self.queue.push(subject, now, deadline, packet) {
            Some(()) => effects.note(Note::Received(subject)),
            None => {
                bump(&mut self.stats.overruns);
                self.refuse(now, operation, packet, request_id, effects);
            }
        }
    }

    /// Fails a request that is not even queued.
    fn refuse(
        &mut self,
        now: u64,
        operation: u8,
        packet: &mut [u8],
        request_id: u64,
        effects: &mut impl Effects,
    ) {
        bump(&mut self.stats.op(operation).failures);
        let sent = self.direct(operation, status::FAIL, packet, request_id, effects);
        let ending = Ending::Failed(thawed::CALLED_OFF);
        match operation {
            op::FREEZE => self.freeze_ended(now, 0, false, ending, sent, effects),
            op::THAW => self.thaw_ended(now, ending, status::FAIL, sent, effects),
            _ => {}
        }
    }

    /// Answers a request that the daemon has no part in; false when the host cannot hear it.
    fn direct(
        &mut self,
        operation: u8,
        code: u32,
        packet: &mut [u8],
        request_id: u64,
        effects: &mut impl Effects,
    ) -> bool {
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
        self.send(packet, request_id, effects)
    }

    fn send(&mut self, packet: &[u8], request_id: u64, effects: &mut impl Effects) -> bool {
        let sent = effects.send(packet, request_id);
        if !sent {
            bump(&mut self.stats.unsent);
            effects.note(Note::NotSent);
        }
        sent
    }

    fn take_id(&mut self) -> u64 {
        let id = self.next_id;
        // OVERFLOW: at one request a nanosecond this lasts five centuries; 0 would mean "none".
        self.next_id = id.wrapping_add(1).max(1);
        id
    }

    // --- The end of a request, and what follows from it ---

    /// Ends the request at `at` in the queue and tells the host.
    fn end(&mut self, now: u64, at: usize, ending: Ending, effects: &mut impl Effects) {
        let Some(request) = self.queue.remove(at) else {
            return;
        };
        let operation = request.operation;
        let code = match ending {
            Ending::Answered(code) if operation == op::THAW => self.freeze.thaw_status(code),
            Ending::Answered(code) => code,
            Ending::Failed(_) => status::FAIL,
        };
        let latency_us = now.saturating_sub(request.arrived);
        let stats = self.stats.op(operation);
        stats.last_us = latency_us;
        stats.max_us = stats.max_us.max(latency_us);
        if code != status::OK {
            bump(&mut stats.failures);
        }
        let subject = request.subject();
        let sent = self.queue.packet(&request).is_some_and(|packet| {
            wire::answer(packet, operation, code);
            effects.send(packet, subject.transaction)
        });
        if !sent {
            bump(&mut self.stats.unsent);
            effects.note(Note::NotSent);
        }
        effects.note(Note::Answered {
            subject,
            status: code,
            latency_us,
        });
        match operation {
            op::FREEZE => {
                self.freeze_ended(now, request.id, request.is_read(), ending, sent, effects)
            }
            op::THAW => self.thaw_ended(now, ending, code, sent, effects),
            _ => {}
        }
    }

    /// A FREEZE has ended, which the daemon had `read` or not; `sent` says whether the host knows.
    fn freeze_ended(
        &mut self,
        now: u64,
        id: u64,
        read: bool,
        ending: Ending,
        sent: bool,
        effects: &mut impl Effects,
    ) {
        if ending == Ending::Answered(status::OK) {
            self.freeze = Freeze::Held { id };
            if sent {
                return;
            }
        }
        // Whoever gives up a FREEZE thaws what was frozen before, too.
        let gone = read || !sent;
        let broken = gone.then(|| self.break_freeze(thawed::CALLED_OFF, effects));
        self.freeze = self.freeze.after_failed_freeze(sent);
        match (ending, broken.flatten()) {
            (Ending::Failed(reason), _) if read => {
                self.calling_off = true;
                self.let_go(reason, effects);
                self.owe_thaw(now, effects);
            }
            (Ending::Answered(code), _) if code != status::OK => self.thawed(effects),
            (_, Some(id)) => {
                self.undo(now, id, thawed::CALLED_OFF, effects);
                self.fail_freezes(now, thawed::CALLED_OFF, effects);
            }
            (_, None) => {}
        }
    }

    /// A THAW has ended and the host was told `code`, if it was `sent`. Without an answer of the
    /// daemon it remains to be done.
    fn thaw_ended(
        &mut self,
        now: u64,
        ending: Ending,
        code: u32,
        sent: bool,
        effects: &mut impl Effects,
    ) {
        self.freeze = self.freeze.after_thaw(code, sent);
        match ending {
            Ending::Answered(_) => {
                self.calling_off = false;
                self.thawed(effects);
            }
            Ending::Failed(reason) => {
                self.let_go(reason, effects);
                self.owe_thaw(now, effects);
            }
        }
    }

    /// Fails every FREEZE that is open.
    fn fail_freezes(&mut self, now: u64, reason: u32, effects: &mut impl Effects) {
        while let Some(at) = self.queue.position(|r| r.operation == op::FREEZE) {
            self.end(now, at, Ending::Failed(reason), effects);
        }
    }

    /// The freeze in force, if there is one, is in force no more. Returns its id.
    fn break_freeze(&mut self, reason: u32, effects: &mut impl Effects) -> Option<u64> {
        let id = self.freeze.held()?;
        self.freeze = Freeze::Broken { told: false };
        bump(&mut self.stats.broken);
        effects.note(Note::Broken { id, reason });
        Some(id)
    }

    /// The daemon has said that nothing is frozen; what the module may still hold must not stay.
    fn thawed(&mut self, effects: &mut impl Effects) {
        self.hold = None;
        effects.let_go(thawed::CALLED_OFF);
    }

    /// Has thawed what was frozen for FREEZE `id`: by the module, or else by the daemon.
    fn undo(&mut self, now: u64, id: u64, reason: u32, effects: &mut impl Effects) {
        if self.let_go(reason, effects) != Some(id) {
            self.owe_thaw(now, effects);
        }
    }

    /// Lets go of what the module holds. If that is anything, the daemon is told, and the id is returned
    /// for which it was held.
    fn let_go(&mut self, reason: u32, effects: &mut impl Effects) -> Option<u64> {
        effects.let_go(reason);
        let id = self.hold.take()?;
        self.notice = Some((id, reason));
        Some(id)
    }

    /// Has the daemon do a THAW, or the next one if there is none, unless one is in its hands.
    fn owe_thaw(&mut self, now: u64, effects: &mut impl Effects) {
        let thawing = self.in_hand().is_some_and(|s| s.operation == op::THAW);
        if thawing || self.owed_thaw.is_some() {
            return;
        }
        let owed = OwedThaw {
            id: self.take_id(),
            since: now,
            deadline: None,
        };
        effects.note(Note::Received(owed.subject()));
        self.owed_thaw = Some(owed);
    }

    /// The daemon has answered the THAW that it owed.
    fn owed_thaw_ended(&mut self, now: u64, code: u32, effects: &mut impl Effects) {
        let Some(owed) = self.owed_thaw.take() else {
            return;
        };
        effects.note(Note::Answered {
            subject: owed.subject(),
            status: code,
            latency_us: now.saturating_sub(owed.since),
        });
        self.calling_off = false;
        self.thawed(effects);
    }

    // --- The clock, and whose turn it is ---

    /// When [`Engine::timer`] has to be called next; `None` when no time is running.
    pub fn deadline(&self) -> Option<u64> {
        let requests = self.queue.iter().map(|request| self.limit(request));
        let owed = self.owed_thaw.and_then(|owed| owed.deadline);
        requests.chain(owed).min()
    }

    /// When the time of a request is over, as things are now. While nobody serves requests, those that
    /// nobody has read have only the grace time.
    fn limit(&self, request: &Request) -> u64 {
        match self.quiet_since {
            Some(since) if !request.is_read() => {
                let grace = after(request.arrived.max(since), self.config.grace_ms);
                grace.min(request.deadline)
            }
            _ => request.deadline,
        }
    }

    /// The clock has moved. Fails what has had its time; harmless at any other time.
    pub fn timer(&mut self, now: u64, effects: &mut impl Effects) {
        self.advance(now, effects);
    }

    /// Fails what has had its time, and says whose turn it is then. Every event ends with this.
    fn advance(&mut self, now: u64, effects: &mut impl Effects) {
        if let Some(owed) = self.owed_thaw.filter(|owed| owed.is_over(now)) {
            effects.note(Note::TimedOut(owed.subject()));
            self.quiet_since.get_or_insert(now);
            self.owed_thaw = None;
            self.owe_thaw(now, effects);
        }
        while let Some(at) = self.queue.position(|r| self.limit(r) <= now) {
            self.time_out(now, at, effects);
        }
        self.offer(effects);
    }

    fn time_out(&mut self, now: u64, at: usize, effects: &mut impl Effects) {
        if let Some(request) = self.queue.iter().nth(at).filter(|r| r.arrived < now) {
            let subject = request.subject();
            bump(&mut self.stats.op(subject.operation).timeouts);
            effects.note(Note::TimedOut(subject));
        }
        self.end(now, at, Ending::Failed(thawed::CALLED_OFF), effects);
        // What is behind the head has not been shown to the daemon.
        if at == 0 && self.registered() {
            self.quiet_since.get_or_insert(now);
        }
    }

    /// Shows the head to the daemon when it is its turn. A THAW of the host does for one that is owed.
    fn offer(&mut self, effects: &mut impl Effects) {
        let registered = self.registered();
        let owed = self.owed_thaw;
        let Some(head) = self.queue.head_mut().filter(|head| !head.is_read()) else {
            return;
        };
        let stage = match owed {
            _ if !registered => Stage::Held,
            Some(owed) if owed.is_read() || head.operation != op::THAW => Stage::Queued,
            _ => Stage::Offered,
        };
        if core::mem::replace(&mut head.stage, stage) == stage {
            return;
        }
        match stage {
            Stage::Held => effects.note(Note::Held(head.subject())),
            Stage::Offered => effects.note(Note::Offered(head.subject())),
            Stage::Queued | Stage::Read => {}
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

    /// The one who had the device open is gone: what it had read and not answered fails at once, and
    /// so will the THAW of a freeze that it held. What it had not read waits for the next one.
    pub fn release(&mut self, now: u64, effects: &mut impl Effects) {
        if self.registered() {
            effects.note(Note::Released);
            if self.queue.head().is_some_and(Request::is_read) {
                self.end(now, 0, Ending::Failed(thawed::CRASH), effects);
            }
            if let Some(id) = self.break_freeze(0, effects) {
                self.undo(now, id, thawed::CRASH, effects);
            }
            self.let_go(thawed::CRASH, effects);
            self.quiet_since = Some(now);
        }
        self.daemon = Daemon::Absent;
        self.reply_waits = false;
        self.notice = None;
        self.calling_off = false;
        if let Some(owed) = &mut self.owed_thaw {
            owed.deadline = None;
        }
        self.advance(now, effects);
    }

    /// The daemon shows that it is there: it polls, or begins to read.
    pub fn alive(&mut self) {
        if self.registered() {
            self.quiet_since = None;
        }
    }

    /// The daemon writes a registration, an answer or a notice of `size` bytes, which begins with
    /// `bytes`: all of it, or as much as any frame has that is known here.
    ///
    /// # Errors
    ///
    /// A [`Refusal`]; nothing has changed then.
    pub fn write(
        &mut self,
        now: u64,
        bytes: &[u8],
        size: usize,
        effects: &mut impl Effects,
    ) -> Result<(), Refusal> {
        let result = self.accept(now, bytes, size, effects);
        match result {
            Ok(()) => {
                self.alive();
                self.advance(now, effects);
            }
            Err(refusal) => {
                self.stats.bad_frames.count(refusal);
                effects.note(Note::BadFrame { refusal });
            }
        }
        result
    }

    fn accept(
        &mut self,
        now: u64,
        bytes: &[u8],
        size: usize,
        effects: &mut impl Effects,
    ) -> Result<(), Refusal> {
        match self.daemon {
            Daemon::Absent => return Err(Refusal::OutOfTurn),
            Daemon::Open => {
                (self.daemon, self.reply_waits) = match frames::first(bytes, size)? {
                    First::V1 { reply } => (Daemon::V1, reply),
                    First::V2 => (Daemon::V2, true),
                };
                bump(&mut self.stats.registrations);
                effects.note(Note::Registered { abi: self.abi() });
            }
            Daemon::V1 => {
                // The status lies over the operation, so nothing that a registered daemon writes
                // may be looked at as a registration.
                let code = frames::answer_v1(bytes, size)?;
                self.in_hand().ok_or(Refusal::Stale)?;
                self.answered(now, code, effects);
            }
            Daemon::V2 => match frames::later(bytes, size)? {
                Frame::Answer {
                    id,
                    status,
                    operation,
                } => {
                    let asked = self.in_hand().filter(|asked| asked.id == id);
                    if asked.ok_or(Refusal::Stale)?.operation != operation {
                        return Err(Refusal::WrongOperation);
                    }
                    self.answered(now, status, effects);
                }
                Frame::Thawed { id, reason } => {
                    if self.freeze != (Freeze::Held { id }) {
                        return Err(Refusal::Stale);
                    }
                    self.break_freeze(reason, effects);
                    self.thawed(effects);
                }
            },
        }
        Ok(())
    }

    /// What the daemon has read and not answered.
    fn in_hand(&self) -> Option<Subject> {
        let head = self.queue.head().filter(|head| head.is_read());
        let owed = self.owed_thaw.filter(OwedThaw::is_read);
        head.map(Request::subject)
            .or(owed.map(|owed| owed.subject()))
    }

    /// The daemon has answered what it has in hand.
    fn answered(&mut self, now: u64, code: u32, effects: &mut impl Effects) {
        if self.owed_thaw.is_some_and(|owed| owed.is_read()) {
            self.owed_thaw_ended(now, code, effects);
        } else {
            self.end(now, 0, Ending::Answered(code), effects);
        }
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
        if self.in_hand().is_some() || !self.registered() {
            return None;
        }
        match self.queue.head() {
            Some(head) if head.stage == Stage::Offered => Some(Token::Request(head.id)),
            _ => self.owed_thaw.map(|owed| Token::Thaw(owed.id)),
        }
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
            Token::Notice(id) => frames::put_thawed(out, id, self.notice?.1),
            Token::Thaw(_) if !v2 => frames::put_request_v1(out, op::THAW),
            Token::Thaw(id) => frames::put_request(out, id, op::THAW, self.config.other_ms, &[]),
            Token::Request(_) if !v2 => frames::put_request_v1(out, self.queue.head()?.operation),
            Token::Request(id) => {
                let head = *self.queue.head()?;
                let left_ms = self.limit(&head).saturating_sub(now) / 1000;
                let left_ms = u32::try_from(left_ms).unwrap_or(u32::MAX);
                let packet = self.queue.packet(&head)?;
                let payload = match wire::freeze_info(packet) {
                    Some(info) if head.operation == op::FREEZE => info.as_slice(),
                    _ => &[],
                };
                frames::put_request(out, id, head.operation, left_ms, payload)
            }
        };
        Some((len?, token))
    }

    /// The daemon has received what [`Engine::peek`] showed. A token of something that has ended
    /// in the meantime does nothing.
    pub fn taken(&mut self, now: u64, token: Token, effects: &mut impl Effects) {
        self.alive();
        let free = self.in_hand().is_none();
        match token {
            Token::Reply => self.reply_waits = false,
            Token::Notice(id) => {
                self.notice = self.notice.filter(|notice| notice.0 != id);
            }
            Token::Thaw(id) => {
                let deadline = after(now, self.config.other_ms);
                let owed = self.owed_thaw.as_mut().filter(|owed| free && owed.id == id);
                if let Some(owed) = owed {
                    owed.deadline = Some(deadline);
                    effects.note(Note::Read(owed.subject()));
                }
            }
            Token::Request(id) => {
                let head = self.queue.head_mut().filter(|head| free && head.id == id);
                // A THAW that has come to be owed meanwhile keeps a FREEZE from being begun, but no
                // HOT_BACKUP from being answered.
                let in_turn =
                    |h: &&mut Request| h.stage == Stage::Offered || h.operation == op::HOT_BACKUP;
                if let Some(head) = head.filter(in_turn) {
                    head.stage = Stage::Read;
                    if head.operation == op::THAW {
                        self.owed_thaw = None;
                    }
                    effects.note(Note::Read(head.subject()));
                }
            }
        }
        self.advance(now, effects);
    }

    // --- What the module holds ---

    /// The daemon wants the module to freeze a file system for the FREEZE `id`, or, with 0, for
    /// nobody. Once this is allowed the daemon counts as holding something, until a FREEZE of it
    /// fails, a THAW ends, or the module lets go.
    ///
    /// # Errors
    ///
    /// A [`Refusal`] when it may not, or not now.
    pub fn hold(&mut self, id: u64) -> Result<(), Refusal> {
        if self.daemon != Daemon::V2 || self.config.max_held == 0 {
            return Err(Refusal::OutOfTurn);
        }
        let asked = self.in_hand();
        let allowed = match id {
            // Nothing may be frozen for the host then, or about to be thawed.
            0 => {
                let idle = asked.is_none_or(|asked| asked.operation == op::HOT_BACKUP);
                idle && self.freeze.held().is_none() && self.owed_thaw.is_none()
            }
            _ => asked.is_some_and(|asked| asked.id == id && asked.operation == op::FREEZE),
        };
        // Nobody counts on what is held for nobody, so its notice may give way to one for a FREEZE, but
        // not the other way round.
        if !allowed || self.sleeping || (id == 0 && self.notice.is_some()) {
            return Err(Refusal::Stale);
        }
        self.alive();
        self.hold = Some(id);
        Ok(())
    }

    /// What was held has been thawed by the module itself, for one of the reasons in [`thawed`]. A
    /// freeze for which it was held is in force no more.
    pub fn lost(&mut self, now: u64, reason: u32, effects: &mut impl Effects) {
        let Some(id) = self.hold.take() else {
            return;
        };
        self.notice = Some((id, reason));
        if id == 0 {
            return;
        }
        let broken = self.break_freeze(reason, effects);
        if broken.is_some_and(|broken| broken != id) {
            self.owe_thaw(now, effects);
        }
        let asked = self.in_hand();
        if asked.is_some_and(|asked| asked.operation == op::FREEZE) {
            self.end(now, 0, Ending::Failed(reason), effects);
        }
        self.advance(now, effects);
    }

    // --- The end of a channel, and sleep ---

    /// The channel is about to close, for one of the reasons in [`thawed`]: open requests fail, as
    /// long as somebody can hear it, and the freeze is in force no more.
    pub fn close(&mut self, now: u64, reason: u32, effects: &mut impl Effects) {
        self.versions = None;
        while self.queue.head().is_some() {
            self.end(now, 0, Ending::Failed(reason), effects);
        }
        self.give_up(now, reason, effects);
    }

    /// The machine is about to sleep, and user space still runs: what is frozen or about to be is
    /// thawed, and until [`Engine::resume`] every FREEZE fails at once.
    pub fn prepare_sleep(&mut self, now: u64, effects: &mut impl Effects) {
        self.sleeping = true;
        self.fail_freezes(now, thawed::SLEEP, effects);
        self.give_up(now, thawed::SLEEP, effects);
    }

    /// Nothing is to be frozen or held from here on.
    fn give_up(&mut self, now: u64, reason: u32, effects: &mut impl Effects) {
        if let Some(id) = self.break_freeze(reason, effects) {
            self.undo(now, id, reason, effects);
        }
        self.let_go(reason, effects);
        self.advance(now, effects);
    }

    /// While the machine prepares to sleep: whether the daemon has thawed what it froze by itself, or
    /// nobody is left to do it.
    pub fn thawed_for_sleep(&self) -> bool {
        let thawing = self
            .in_hand()
            .is_some_and(|asked| asked.operation == op::THAW);
        let thawed = self.owed_thaw.is_none() && !thawing;
        self.sleeping && (thawed || !self.registered())
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
        self.queue.head().map(|head| (head.id, head.operation))
    }

    /// Number of open requests.
    pub fn queued(&self) -> usize {
        self.queue.iter().count()
    }

    /// The freeze in one word.
    pub fn freeze_state(&self) -> &'static str {
        self.freeze.as_str()
    }

    /// What the daemon is doing with the head, in one word.
    pub fn stage_name(&self) -> &'static str {
        match self.queue.head().map(|head| head.stage) {
            None => "idle",
            Some(Stage::Queued) => "queued",
            Some(Stage::Held) => "held",
            Some(Stage::Offered) => "offered",
            Some(Stage::Read) => "read",
        }
    }

    /// The THAW that the daemon is given without the host asking for one: its id, and whether it has
    /// been read.
    pub fn owed_thaw(&self) -> Option<(u64, bool)> {
        self.owed_thaw.map(|owed| (owed.id, owed.is_read()))
    }

    /// The state without ids, times and packets, for tests that visit each state once.
    #[cfg(not(hv_vss_kernel))]
    pub fn shape(&self) -> Shape {
        let mut requests = [None; super::QUEUE];
        for (place, request) in requests.iter_mut().zip(self.queue.iter()) {
            *place = Some((request.operation, request.stage));
        }
        Shape {
            requests,
            daemon: self.daemon,
            reply_waits: self.reply_waits,
            notice_waits: self.notice.is_some(),
            quiet: self.quiet_since.is_some(),
            holds: self.hold.is_some(),
            freeze: self.freeze.as_str(),
            told: self.freeze == (Freeze::Broken { told: true }),
            owed_thaw: self.owed_thaw.map(|owed| owed.is_read()),
            calling_off: self.calling_off,
            sleeping: self.sleeping,
        }
    }

    /// Checks the invariants of the type; tests call it after each event.
    ///
    /// # Errors
    ///
    /// Names the one that does not hold.
    #[cfg(not(hv_vss_kernel))]
    pub fn check(&self) -> Result<(), &'static str> {
        self.queue.check()?;
        let stages = self.queue.iter().map(|r| r.stage).enumerate();
        for (at, stage) in stages {
            if at > 0 && stage != Stage::Queued {
                return Err("not the head, and shown");
            }
            if at == 0 && (stage == Stage::Held) == self.registered() {
                return Err("stage and daemon disagree");
            }
        }
        let head_is_read = self.queue.head().is_some_and(Request::is_read);
        let owed_is_read = self.owed_thaw.is_some_and(|owed| owed.is_read());
        let thawing = self
            .in_hand()
            .is_some_and(|asked| asked.operation == op::THAW);
        let held = self.freeze.held().is_some();
        let holds = self.hold.is_some();
        let must_not_be = [
            (head_is_read && owed_is_read, "two things in hand"),
            (
                owed_is_read && !self.registered(),
                "a THAW in nobody's hands",
            ),
            (held && !self.registered(), "a freeze without a daemon"),
            (
                held && self.owed_thaw.is_some(),
                "a freeze that is to be thawed",
            ),
            (
                holds && self.daemon != Daemon::V2,
                "a hold without a daemon",
            ),
            (
                holds && self.notice.is_some_and(|(id, _)| id != 0),
                "a hold that has ended",
            ),
            (
                (self.reply_waits || self.notice.is_some()) && !self.registered(),
                "a message for nobody",
            ),
            (
                self.quiet_since.is_none() && !self.registered(),
                "nobody is there, and is not quiet",
            ),
            (
                self.calling_off && self.owed_thaw.is_none() && !thawing,
                "a FREEZE that nobody calls off",
            ),
        ];
        match must_not_be.iter().find(|(is, _)| *is) {
            Some((_, what)) => Err(what),
            None => Ok(()),
        }
    }
}

/// `ms` milliseconds after `now`.
fn after(now: u64, ms: u32) -> u64 {
    now.saturating_add(u64::from(ms).saturating_mul(1000))
}
