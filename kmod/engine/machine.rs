// SPDX-License-Identifier: GPL-2.0

//! The state machine: requests of the host, the daemon that serves them, and the freeze in between.
//!
//! Requests wait in a short queue and are served in order; only the first one, the head, is ever
//! shown to the daemon. Here are the host's side, how requests end and what follows from it, time and
//! sleep; the daemon's side is in `machine/daemon.rs`. These rules hold everywhere:
//!
//! - each request is answered once: by the daemon, by the clock, or by what makes an answer of the
//!   daemon impossible. Its time counts from its arrival;
//! - an answer counts only for a request that this daemon has read and that is still open, so a
//!   late or stray one can never hit the next request. v1 answers carry no id; there the rule rests
//!   on the daemon reading and answering in turn, as every v1 daemon does;
//! - a freeze that did not last is remembered until the host has been told, and every THAW until
//!   then is failed, whatever the daemon says of it; so is every THAW before the first FREEZE that the
//!   module has seen (see [`Freeze`]);
//! - a freeze has to last until the host has sent its THAW, read or not, and no longer. What is let go from then on
//!   breaks nothing: by the module, at the deadline or before the machine sleeps, and for the daemon. But that THAW is
//!   good only if the daemon that made the freeze answers it so, for nobody else knows whether all of it lasted: it
//!   fails when that daemon closes the device first, when the device goes, and when its time is over. What the daemon
//!   itself tells as ended counts as long as the THAW is open: it may have ended before;
//! - a FREEZE that a read was shown the daemon may have, also when it ends before the read does: it is
//!   given a THAW like one that has read it;
//! - what may be frozen and is of no use to the host any more is thawed: the module lets go of what it
//!   holds, and a daemon that freezes by itself is given a THAW, whether the host asks for one or not.
//!   That THAW stays until a daemon has answered it, also when the device goes and comes back (see
//!   [`Left`]). What it has frozen beside what the module held it thaws when it reads that this is let go; if it
//!   closes the device before, the next one is given that THAW.

use super::freeze::Freeze;
use super::notes::bump;
use super::notes::NotNow;
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
use daemon::Daemon;

#[cfg(not(hv_vss_kernel))]
mod check;
mod daemon;
mod view;

#[cfg(not(hv_vss_kernel))]
pub use check::Shape;
pub use daemon::Token;

/// How long things may take, in milliseconds, and how many file systems the module can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Time for a FREEZE (mainline: 15 minutes).
    pub freeze_ms: u32,
    /// Time for any other request (mainline: 30 seconds).
    pub other_ms: u32,
    /// How long a request waits for a daemon that is not there or does not read; 0 fails it at once,
    /// as mainline does, when no daemon is there. For one that does not read it waits for [`WAKE_MS`] at the least,
    /// and the machine's sleep for [`REOPEN_MS`] for one that is to thaw.
    pub grace_ms: u32,
    /// How many file systems the module can hold for the daemon at a time; 0 when it cannot.
    pub max_held: u32,
}

/// How long a request waits at the least for a daemon that is there and has let one run out, in milliseconds: it reads
/// when its poll says that there is something.
const WAKE_MS: u32 = 1_000;

/// How long the machine's sleep waits at the least for a daemon that has closed the device, in milliseconds:
/// mainline's thaws before it opens it again.
const REOPEN_MS: u32 = 2_000;

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
    /// [`thawed`]. Returns whether there was anything to thaw.
    fn let_go(&mut self, reason: u32) -> bool;
    /// Takes note of something that happened.
    fn note(&mut self, note: Note);
}

/// A request that has just come.
struct Arrival<'a> {
    now: u64,
    operation: u8,
    request_id: u64,
    packet: &'a mut [u8],
}

impl Arrival<'_> {
    /// For the notes, without an id.
    fn subject(&self) -> Subject {
        Subject {
            id: 0,
            transaction: self.request_id,
            operation: self.operation,
        }
    }
}

/// A THAW that the daemon has to do though no host waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OwedThaw {
    id: u64,
    /// Since when it is owed.
    since: u64,
    /// Once the daemon has read it: when that is forgotten, so that it can be read again.
    deadline: Option<u64>,
    /// No daemon is there, and none has come in time.
    deserted: bool,
}

impl OwedThaw {
    fn new(id: u64, since: u64) -> Self {
        OwedThaw {
            id,
            since,
            deadline: None,
            deserted: false,
        }
    }

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

/// What the daemon has to be told of a hold that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Notice {
    id: u64,
    /// One of [`thawed`].
    reason: u32,
    /// The THAW that the host had sent before, to a freeze that was whole. It is to be read before, so that the daemon
    /// knows that.
    behind: Option<u64>,
    /// The daemon has said since that it has thawed all, without having read this.
    is_settled: bool,
}

impl Notice {
    /// Whether the daemon may have frozen by itself for this request, and nobody has said that it has thawed that.
    fn is_open(&self) -> bool {
        self.id != 0 && !self.is_settled
    }
}

/// What a machine leaves undone for the next one, when its device goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// The host counts on a freeze that did not last, and has not been told by a THAW that failed.
    pub untold: bool,
    /// No FREEZE has ended since the module was loaded, so nobody knows whether the host counts on one.
    pub unseen: bool,
    /// A daemon may have frozen something by itself, and none has answered a THAW since.
    pub owes_thaw: bool,
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
    /// The daemon holds something in the module, since [`Engine::holds`] with this id.
    hold: Option<u64>,
    /// The FREEZE for which the daemon had the module thaw the last that was held, and has held nothing since.
    emptied: Option<u64>,
    /// What the daemon has to be told of a hold that has ended.
    notice: Option<Notice>,
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
    /// A machine with nobody on either side, after one that has `left` this.
    pub fn new(config: Config, store: B, left: Left) -> Self {
        let mut engine = Engine {
            config,
            queue: Queue::new(store),
            daemon: Daemon::Absent,
            reply_waits: false,
            quiet_since: Some(0),
            freeze: match left {
                Left { untold: true, .. } => Freeze::Broken { told: false },
                Left { unseen: true, .. } => Freeze::Unseen,
                Left { .. } => Freeze::None,
            },
            hold: None,
            emptied: None,
            notice: None,
            owed_thaw: None,
            calling_off: false,
            sleeping: false,
            next_id: 1,
            versions: None,
            stats: Stats::default(),
        };
        if left.owes_thaw {
            engine.owed_thaw = Some(OwedThaw::new(engine.take_id(), 0));
        }
        engine
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
                let request = Arrival {
                    now,
                    operation,
                    request_id,
                    packet,
                };
                self.request(request, effects);
            }
        }
    }

    /// A request of the host: for the daemon, or answered in here.
    fn request(&mut self, request: Arrival<'_>, effects: &mut impl Effects) {
        let now = request.now;
        match request.operation {
            op::FREEZE => match self.refuses_freezes() {
                Some(why) => self.refuse(request, why, effects),
                None => self.enqueue(request, effects),
            },
            op::HOT_BACKUP => self.enqueue(request, effects),
            op::THAW => {
                // The host does not wait for the FREEZE any more, so nobody has to finish it.
                self.fail_freezes(now, thawed::CALLED_OFF, effects);
                self.enqueue(request, effects);
            }
            _ => {
                self.direct(request, status::OK, effects);
            }
        }
        self.advance(now, effects);
    }

    fn enqueue(&mut self, request: Arrival<'_>, effects: &mut impl Effects) {
        let Arrival { now, operation, .. } = request;
        let subject = Subject {
            id: self.take_id(),
            ..request.subject()
        };
        let deadline = after(now, self.config.time_for(operation));
        match self.queue.push(subject, now, deadline, request.packet) {
            Some(()) => effects.note(Note::Received(subject)),
            None => {
                bump(&mut self.stats.overruns);
                self.refuse(request, NotNow::Full, effects);
            }
        }
    }

    /// Why a FREEZE that comes now is refused at once, if it is.
    pub(super) fn refuses_freezes(&self) -> Option<NotNow> {
        match (self.sleeping, self.calling_off) {
            (true, _) => Some(NotNow::Sleeps),
            (_, true) => Some(NotNow::CallsOff),
            _ => None,
        }
    }

    /// Fails a request that is not even queued.
    fn refuse(&mut self, request: Arrival<'_>, why: NotNow, effects: &mut impl Effects) {
        let Arrival { now, operation, .. } = request;
        effects.note(Note::Refused {
            subject: request.subject(),
            why,
        });
        bump(&mut self.stats.op(operation).failures);
        let sent = self.direct(request, status::FAIL, effects);
        let ending = Ending::Failed(thawed::CALLED_OFF);
        match operation {
            op::FREEZE => self.freeze_ended(now, 0, false, ending, sent, effects),
            op::THAW => self.thaw_ended(now, ending, status::FAIL, sent, effects),
            _ => {}
        }
    }

    /// Answers a request that the daemon has no part in; false when the host cannot hear it.
    fn direct(&mut self, request: Arrival<'_>, code: u32, effects: &mut impl Effects) -> bool {
        wire::answer(request.packet, request.operation, code);
        effects.note(Note::Direct {
            subject: request.subject(),
            status: code,
        });
        self.send(request.packet, request.request_id, effects)
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
        if operation == op::THAW && self.freeze.is_torn() {
            self.break_freeze(thawed::CRASH, effects);
        }
        let code = match ending {
            Ending::Answered(code) if operation == op::THAW => self.freeze.thaw_status(code),
            Ending::Answered(code) => code,
            Ending::Failed(_) => status::FAIL,
        };
        let is_done = ending == Ending::Answered(status::OK);
        if operation == op::THAW && is_done && self.freeze == Freeze::Unseen {
            effects.note(Note::Unvouched(request.subject()));
        }
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
                self.freeze_ended(now, request.id, request.shown, ending, sent, effects);
            }
            op::THAW => self.thaw_ended(now, ending, code, sent, effects),
            _ => {}
        }
    }

    /// A FREEZE has ended, which the daemon was `shown` or not; `sent` says whether the host knows.
    fn freeze_ended(
        &mut self,
        now: u64,
        id: u64,
        shown: bool,
        ending: Ending,
        sent: bool,
        effects: &mut impl Effects,
    ) {
        if ending == Ending::Answered(status::OK) {
            let whole = self.emptied != Some(id);
            self.freeze = Freeze::Held { id, whole };
            if sent {
                return;
            }
        }
        // Whoever gives up a FREEZE thaws what was frozen before, too.
        let broken = if shown || !sent {
            self.break_freeze(thawed::CALLED_OFF, effects)
        } else {
            None
        };
        self.freeze = self.freeze.after_failed_freeze(sent);
        match (ending, broken) {
            (Ending::Failed(reason), _) if shown => {
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

    /// The freeze in force ends, and is in force no more unless the host has sent the THAW for it. Returns its id
    /// if it is broken.
    fn cut_short(&mut self, reason: u32, effects: &mut impl Effects) -> Option<u64> {
        match self.thaw_is_sent() {
            true => None,
            false => self.break_freeze(reason, effects),
        }
    }

    /// Whether a THAW of the host is open. As long as a freeze is in force it is the one for that.
    fn thaw_is_sent(&self) -> bool {
        self.queue.iter().any(|r| r.operation == op::THAW)
    }

    /// The daemon has said that nothing is frozen; what the module may still hold must not stay.
    fn thawed(&mut self, effects: &mut impl Effects) {
        self.hold = None;
        if let Some(notice) = &mut self.notice {
            notice.is_settled = true;
        }
        effects.let_go(thawed::CALLED_OFF);
    }

    /// Has thawed what was frozen for FREEZE `id`: by the module, or else by the daemon. One that has held for it reads
    /// of that, and thaws what it may have frozen by itself as well.
    fn undo(&mut self, now: u64, id: u64, reason: u32, effects: &mut impl Effects) {
        if self.let_go(reason, effects) != Some(id) {
            self.owe_thaw(now, effects);
        }
    }

    /// Lets go of what the module holds, and has the daemon told if that is anything. Returns the id for
    /// which it did: a daemon that could hold nothing may have frozen by itself.
    fn let_go(&mut self, reason: u32, effects: &mut impl Effects) -> Option<u64> {
        let held = effects.let_go(reason);
        let id = self.hold.take().filter(|_| held)?;
        self.give_notice(id, reason);
        Some(id)
    }

    /// What was held for `id` is let go, of which the daemon is to be told.
    fn give_notice(&mut self, id: u64, reason: u32) {
        let is_whole = matches!(self.freeze, Freeze::Held { whole: true, .. });
        let is_unread = |r: &&Request| is_whole && r.operation == op::THAW && !r.is_read();
        self.notice = Some(Notice {
            id,
            reason,
            behind: self.queue.iter().find(is_unread).map(|r| r.id),
            is_settled: false,
        });
    }

    /// Has the daemon do a THAW, or the next one if there is none, unless one is in its hands.
    fn owe_thaw(&mut self, now: u64, effects: &mut impl Effects) {
        if self.owed_thaw.is_some() || self.is_doing(op::THAW) {
            return;
        }
        let owed = OwedThaw::new(self.take_id(), now);
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
        let owed = self.owed_thaw.and_then(|owed| match owed.deadline {
            None if !self.registered() && !owed.deserted => self.return_limit(),
            deadline => deadline,
        });
        requests.chain(owed).min()
    }

    /// While nobody serves requests: until when one that came at `arrived` waits for somebody who does.
    fn grace(&self, arrived: u64) -> Option<u64> {
        let since = self.quiet_since?;
        let least_ms = if self.registered() { WAKE_MS } else { 0 };
        let wait_ms = self.config.grace_ms.max(least_ms);
        Some(after(arrived.max(since), wait_ms))
    }

    /// While nobody serves requests: until when somebody may come who does the THAW that is owed. However long
    /// ago it came to be owed: what may be frozen was left when the daemon went.
    fn return_limit(&self) -> Option<u64> {
        let since = self.quiet_since?;
        Some(after(since, self.config.grace_ms.max(REOPEN_MS)))
    }

    /// When the time of a request is over, as things are now. While nobody serves requests, those that
    /// nobody has read have only the grace time.
    fn limit(&self, request: &Request) -> u64 {
        match self.grace(request.arrived) {
            Some(grace) if !request.is_read() => grace.min(request.deadline),
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
        let deserted = !self.registered() && self.return_limit().is_some_and(|end| end <= now);
        if let Some(owed) = &mut self.owed_thaw {
            owed.deserted = deserted;
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
        if let Some(id) = self.cut_short(reason, effects) {
            self.undo(now, id, reason, effects);
        }
        self.let_go(reason, effects);
        self.advance(now, effects);
    }

    /// What is left undone; after [`Engine::close`], for the machine of the device that comes next.
    pub fn left(&self) -> Left {
        Left {
            untold: self.freeze == Freeze::Broken { told: false },
            unseen: self.freeze == Freeze::Unseen,
            owes_thaw: self.owed_thaw.is_some(),
        }
    }

    /// While the machine prepares to sleep: whether the daemon has thawed what it froze by itself, or
    /// nobody is left to do it. One that has gone may be about to open the device again, as mainline's is
    /// after an answer that was refused: it is given the time for that.
    pub fn thawed_for_sleep(&self) -> bool {
        let is_owed = self.owed_thaw.is_some_and(|owed| !owed.deserted);
        // A freeze in force has its THAW on the way.
        let to_do = is_owed || self.freeze.held().is_some();
        self.sleeping && !to_do && !self.is_doing(op::THAW)
    }

    /// The machine is awake again and user space runs.
    pub fn resume(&mut self) {
        self.sleeping = false;
    }
}

/// `ms` milliseconds after `now`.
fn after(now: u64, ms: u32) -> u64 {
    now.saturating_add(u64::from(ms).saturating_mul(1000))
}
