// SPDX-License-Identifier: GPL-2.0

//! The daemon's side of the machine: who has the device open, what is read and written there, and
//! what the module holds for it.

use super::super::frames;
use super::super::frames::First;
use super::super::frames::Frame;
use super::super::frames::Refusal;
use super::after;
use super::bump;
use super::op;
use super::thawed;
use super::wire;
use super::Effects;
use super::Ending;
use super::Engine;
use super::Freeze;
use super::Note;
use super::Notice;
use super::OwedThaw;
use super::Request;
use super::Stage;
use super::Subject;
use core::ops::DerefMut;

/// Who has the device open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Daemon {
    /// Nobody.
    Absent,
    /// Somebody who has not registered yet.
    Open,
    /// A daemon that speaks v1.
    V1,
    /// A daemon that speaks v2.
    V2,
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

impl<B: DerefMut<Target = [u8]>> Engine<B> {
    // --- Coming and going ---

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
            // No read is under way any more, so one that was shown what is left has failed.
            if let Some(head) = self.queue.head_mut() {
                head.shown = false;
            }
            let is_broken = self.break_freeze(thawed::CRASH, effects).is_some();
            self.let_go(thawed::CRASH, effects);
            // It reads nothing any more of what was let go, and may have frozen by itself as well.
            if is_broken || self.notice.is_some_and(|notice| notice.is_open()) {
                self.owe_thaw(now, effects);
            }
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

    /// The daemon shows that it is there: it begins to read, say. A poll shows nothing: what polls may be a loop
    /// whose reader hangs.
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
                    if self.freeze.held() != Some(id) {
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
    pub(super) fn in_hand(&self) -> Option<Subject> {
        let head = self.queue.head().filter(|head| head.is_read());
        let owed = self.owed_thaw.filter(OwedThaw::is_read);
        head.map(Request::subject)
            .or(owed.map(|owed| owed.subject()))
    }

    /// Whether the daemon has read a request for `operation` and not answered.
    pub(super) fn is_doing(&self, operation: u8) -> bool {
        self.in_hand().is_some_and(|s| s.operation == operation)
    }

    /// The daemon has answered what it has in hand.
    fn answered(&mut self, now: u64, code: u32, effects: &mut impl Effects) {
        if self.owed_thaw.is_some_and(|owed| owed.is_read()) {
            self.owed_thaw_ended(now, code, effects);
        } else {
            self.end(now, 0, Ending::Answered(code), effects);
        }
    }

    pub(super) fn registered(&self) -> bool {
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
        if let Some(notice) = self.notice_in_turn() {
            return Some(Token::Notice(notice.id));
        }
        if self.in_hand().is_some() || !self.registered() {
            return None;
        }
        match self.queue.head() {
            Some(head) if head.stage == Stage::Offered => Some(Token::Request(head.id)),
            _ => self.owed_thaw.map(|owed| Token::Thaw(owed.id)),
        }
    }

    /// The notice that is to be read, unless a THAW is to be read before.
    fn notice_in_turn(&self) -> Option<Notice> {
        let notice = self.notice?;
        let mut unread = self.queue.iter().filter(|r| !r.is_read());
        match unread.any(|r| Some(r.id) == notice.behind) {
            true => None,
            false => Some(notice),
        }
    }

    /// Puts what is to be read next into `out`, which should hold `MAX_FRAME` bytes.
    /// Returns its length and the token that [`Engine::taken`] wants once the daemon has it: a request may
    /// end before that, and the daemon gets it all the same. `None` when there is nothing, or when it does
    /// not fit.
    pub fn peek(&mut self, now: u64, out: &mut [u8]) -> Option<(usize, Token)> {
        let token = self.next_out()?;
        let v2 = self.daemon == Daemon::V2;
        let len = match token {
            Token::Reply if v2 => frames::put_registered(out, self.config.max_held),
            Token::Reply => frames::put_registered_v1(out),
            Token::Notice(id) => frames::put_thawed(out, id, self.notice?.reason),
            Token::Thaw(_) if !v2 => frames::put_request_v1(out, op::THAW),
            Token::Thaw(id) => frames::put_request(out, id, op::THAW, self.config.other_ms, &[]),
            Token::Request(_) if !v2 => frames::put_request_v1(out, self.queue.head()?.operation),
            Token::Request(id) => {
                let head = *self.queue.head()?;
                let left_ms = head.deadline.saturating_sub(now) / 1000;
                let left_ms = u32::try_from(left_ms).unwrap_or(u32::MAX);
                let packet = self.queue.packet(&head)?;
                let payload = match wire::freeze_info(packet) {
                    Some(info) if head.operation == op::FREEZE => info.as_slice(),
                    _ => &[],
                };
                frames::put_request(out, id, head.operation, left_ms, payload)
            }
        }?;
        if let (Token::Request(_), Some(head)) = (token, self.queue.head_mut()) {
            head.shown = true;
        }
        Some((len, token))
    }

    /// The daemon has received what [`Engine::peek`] showed. A token of something that has ended
    /// in the meantime does nothing.
    pub fn taken(&mut self, now: u64, token: Token, effects: &mut impl Effects) {
        self.alive();
        let free = self.in_hand().is_none();
        match token {
            Token::Reply => self.reply_waits = false,
            Token::Notice(id) => {
                self.notice = self.notice.filter(|notice| notice.id != id);
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

    /// Whether the daemon may have the module freeze a file system for the FREEZE `id`, or, with 0,
    /// for nobody. If the module then does, [`Engine::holds`] follows, before any other event.
    ///
    /// # Errors
    ///
    /// A [`Refusal`] when it may not, or not now.
    pub fn may_hold(&self, id: u64) -> Result<(), Refusal> {
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
            _ => self.is_making(id),
        };
        // Nobody counts on what is held for nobody, so its notice may give way to one for a FREEZE, but
        // not the other way round.
        if !allowed || self.sleeping || (id == 0 && self.notice.is_some()) {
            return Err(Refusal::Stale);
        }
        Ok(())
    }

    /// The module freezes a file system for that. The daemon counts as holding something from then on,
    /// until a FREEZE of it fails, a THAW ends, or the module lets go.
    pub fn holds(&mut self, id: u64) {
        self.alive();
        self.hold = Some(id);
        self.emptied = None;
    }

    /// Whether the daemon may have the module thaw what it holds. If the module then does,
    /// [`Engine::thaws`] follows, before any other event.
    ///
    /// # Errors
    ///
    /// A [`Refusal`] when it may not.
    pub fn may_thaw(&self) -> Result<(), Refusal> {
        match self.daemon {
            Daemon::V2 => Ok(()),
            Daemon::Absent | Daemon::Open | Daemon::V1 => Err(Refusal::OutOfTurn),
        }
    }

    /// Whether the daemon has the FREEZE `id` in hand.
    pub(super) fn is_making(&self, id: u64) -> bool {
        let asked = self.in_hand();
        asked.is_some_and(|asked| asked.id == id && asked.operation == op::FREEZE)
    }

    /// The module thaws something that was held for `id`, and with it `all` that was held at all, for the daemon has
    /// asked for that. Unless the host has sent its THAW, a freeze in force is not whole from then on. Of one that is
    /// being made the daemon says with its answer what stands still; but one for which nothing is held any more does not.
    pub fn thaws(&mut self, id: u64, all: bool) {
        self.alive();
        let early = self.hold.is_some() && !self.thaw_is_sent();
        if let Freeze::Held { whole, .. } = &mut self.freeze {
            *whole &= !early;
        }
        if all {
            self.hold = None;
            self.emptied = Some(id).filter(|id| self.is_making(*id));
        }
    }

    /// What was held has been let go by the module itself, for one of the reasons in [`thawed`]. A freeze for which
    /// it was held is in force no more, unless the host has sent its THAW: then all stood still for as long as it had
    /// to.
    pub fn lost(&mut self, now: u64, reason: u32, effects: &mut impl Effects) {
        let Some(id) = self.hold.take() else {
            return;
        };
        self.give_notice(id, reason);
        // What was held for nobody before that freeze may be part of it.
        let broken = self.cut_short(reason, effects);
        if id == 0 && broken.is_none() {
            return;
        }
        if broken.is_some_and(|broken| broken != id) {
            self.owe_thaw(now, effects);
        }
        let is_making = |head: &Request| head.operation == op::FREEZE && head.shown;
        if self.queue.head().is_some_and(is_making) {
            self.end(now, 0, Ending::Failed(reason), effects);
        }
        self.advance(now, effects);
    }
}
