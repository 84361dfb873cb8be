// SPDX-License-Identifier: GPL-2.0-only

//! What the threads do that freeze, thaw and look after one file system each, and what they share.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::target::{thawed, State, Target};
use super::{FreezeError, Limits, ThawError, ABORT_TICK, LOOK_TIME, RETRY, STUCK_TIME};
use crate::door::Door;
use crate::logbook::Logbook;
use crate::progress::Progress;

/// What gets in the way of a freeze and is dealt with while nothing is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// Somebody else has frozen it: that may be over soon.
    Busy(usize),
    /// It cannot freeze and is to be synced.
    Unfreezable(usize),
    /// It takes so long that the others were thawed again.
    Slow,
}

/// How the freeze has gone so far, for the one who looks on.
pub(super) struct Pace {
    /// When the last one was frozen.
    pub(super) last: Instant,
    /// How long any took.
    pub(super) longest: Duration,
}

/// What the workers share.
pub(super) struct Work {
    pub(super) targets: Vec<Target>,
    pub(super) door: Arc<dyn Door>,
    pub(super) log: Logbook,
    pub(super) limits: Limits,
    pub(super) abort: Arc<AtomicBool>,
    pub(super) progress: Arc<Progress>,
    pub(super) armed: Mutex<Instant>,
    pub(super) pace: Mutex<Pace>,
    pub(super) obstacles: Mutex<Vec<Obstacle>>,
    /// From then on what is busy is taken for frozen by somebody else.
    pub(super) busy_until: Mutex<Option<Instant>>,
    pub(super) failure: Mutex<Option<FreezeError>>,
    /// What was refused for a reason that may be its own, or ours and then the same with any.
    pub(super) refused: Mutex<Option<(String, Errno)>>,
    /// What was found not to be frozen any more, and has not been told yet.
    pub(super) lost: Mutex<Vec<String>>,
    pub(super) early: Mutex<Vec<String>>,
    pub(super) thaw_failure: Mutex<Option<ThawError>>,
    /// No freeze is under way any more, and whoever minds what is frozen has heard of that.
    pub(super) has_ended_freezes: AtomicBool,
    /// Its session has ended: what is still frozen by then is up to whoever is at it.
    pub(super) over: AtomicBool,
}

impl Work {
    pub(super) fn gave_up(&self) -> bool {
        self.abort.load(Ordering::SeqCst) || lock(&self.failure).is_some()
    }

    pub(super) fn fail(&self, error: FreezeError) {
        // The first failure is the cause; later ones are its company.
        lock(&self.failure).get_or_insert(error);
    }

    pub(super) fn which(&self, pick: impl Fn(&Target) -> bool) -> Vec<usize> {
        let targets = self.targets.iter().enumerate();
        targets.filter(|(_, t)| pick(t)).map(|(i, _)| i).collect()
    }

    /// Says that this one is not ours to thaw.
    pub(super) fn leave(&self, index: usize) {
        let is_heard = self.door.leave(index);
        if let Some(target) = self.targets.get(index) {
            target.left.store(true, Ordering::SeqCst);
            target.unheard.store(!is_heard, Ordering::SeqCst);
        }
    }

    /// Freezes one, whatever its state. What says that somebody else has frozen it is left to them, also while that is
    /// waited for: it is ours when a freeze of ours has succeeded, and until then nobody thaws it unless this process
    /// dies in the very call.
    pub(super) fn freeze_or_leave(&self, index: usize, target: &Target) -> io::Result<()> {
        let was_left = target.left.load(Ordering::SeqCst);
        if was_left {
            self.door.claim(index);
        }
        let frozen = self.door.freeze(target.as_fd());
        match &frozen {
            Ok(()) if was_left => {
                target.left.store(false, Ordering::SeqCst);
                target.unheard.store(false, Ordering::SeqCst);
                self.door.own(index);
            }
            Err(error) if was_left || is(error, Errno::EBUSY) => self.leave(index),
            _ => {}
        }
        frozen
    }

    /// Waits until `at`, or until as many have ended as began before: the slow ones were quick this
    /// time, or it is all off.
    pub(super) fn wait_turn(
        &self,
        at: Instant,
        before: usize,
        (ended, changed): &(Mutex<usize>, Condvar),
    ) {
        let mut ended = lock(ended);
        loop {
            let left = at.saturating_duration_since(Instant::now());
            if left.is_zero() || *ended >= before || self.gave_up() {
                return;
            }
            let waited = changed.wait_timeout(ended, left.min(ABORT_TICK));
            ended = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// How long those that are frozen wait for those of a wave that are not yet.
    pub(super) fn patience_ends(&self, begin: Instant, usual: Duration) -> Instant {
        if !self.targets.iter().any(Target::is_ours) {
            return Instant::now() + self.limits.lag;
        }
        let pace = lock(&self.pace);
        let expected = begin + usual.max(pace.longest);
        pace.last.max(expected) + self.limits.lag.max(pace.longest / 2)
    }

    pub(super) fn freeze_one(&self, index: usize, target: &Target) {
        if self.gave_up() || !lock(&self.obstacles).is_empty() {
            return;
        }
        let (name, start) = (&target.name, Instant::now());
        {
            let mut state = target.state();
            if self.abort.load(Ordering::SeqCst) {
                // It may have been left alone.
                return;
            }
            target.given_up.store(false, Ordering::SeqCst);
            *state = State::Freezing { since: start };
        }
        self.progress.begin(name, start);
        let result = self.freeze_or_leave(index, target);
        let took = start.elapsed();
        self.progress.end(name);
        let state = match result {
            Ok(()) => {
                *lock(&target.written) = target.writes.sectors();
                State::Ours { since: start, took }
            }
            Err(_) => State::Open,
        };
        if !target.end_freezing(state) {
            if result.is_ok() {
                // In the very moment. What it cannot thaw now the door goes on with.
                let _ = self.door.thaw(target.as_fd());
            }
            return self.leave_out_stuck(target);
        }
        match result {
            Ok(()) => {
                self.log.info(format!("{name} frozen, took {}", ms(took)));
                let mut pace = lock(&self.pace);
                pace.last = Instant::now();
                pace.longest = pace.longest.max(took);
                drop(pace);
                if self.abort.load(Ordering::SeqCst) {
                    // It hung while the rest was called off; others wait for it now.
                    self.thaw_one(target);
                } else if lock(&self.obstacles).contains(&Obstacle::Slow)
                    && self.targets.iter().any(Target::is_freezing)
                {
                    // The others were thawed meanwhile because of one that is slower still.
                    self.take_back(target);
                }
            }
            Err(e) => {
                // It was called off with all others, because of what stands on it.
                let is_stuck = self.door.can_call_off() && took >= self.limits.give_up;
                target.given_up.store(is_stuck, Ordering::SeqCst);
                self.meet(index, target, e);
            }
        }
    }

    /// The freeze of one was called off alone and may yet hang in the kernel. Where nobody knows what it is on, or
    /// what another is, that other is tried: what holds it waits for nothing that is on it, and what is on it
    /// is called off as well at the worst.
    fn leave_out_stuck(&self, target: &Target) {
        let (name, limit) = (&target.name, self.limits.give_up.as_secs());
        let why = format!("takes longer than {limit} s to freeze (give_up)");
        self.give_up_on(target, State::Broken, why);
        for other in self.targets.iter().filter(|it| it.is_due()) {
            // What is stuck in an image waits for what that is on, and must not meet it frozen.
            if target.stands_on(other.dev) {
                let why = format!("holds what {name} is on, which hangs in its freeze");
                self.give_up_on(other, State::Broken, why);
            } else if other.stands_on(target.dev) {
                let why = format!("stands on {name}, which hangs in its freeze");
                self.give_up_on(other, State::Broken, why);
            }
        }
    }

    /// What comes of an error at the freeze of one.
    pub(super) fn meet(&self, index: usize, target: &Target, error: io::Error) {
        let name = &target.name;
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EBUSY) if self.is_patient() => {
                lock(&self.obstacles).push(Obstacle::Busy(index));
            }
            Some(Errno::EBUSY) if self.door.watched_every().is_some() => {
                if let Some(why) = self.door.is_half_frozen(target) {
                    return self.give_up_on(target, State::Broken, why);
                }
                target.set_frozen(State::Foreign);
                self.log.warning(format!(
                    "{name} was frozen by somebody else before; it counts and stays theirs"
                ));
            }
            Some(Errno::EOPNOTSUPP | Errno::ENOTTY) => {
                lock(&self.obstacles).push(Obstacle::Unfreezable(index));
            }
            // What is ours, and would be the same with any other. The kernel gives each failure a number, if not a name.
            None | Some(Errno::EBADF | Errno::EPROTO | Errno::ESTALE) => {
                self.log.error(format!("{name} cannot be frozen: {error}"));
                self.fail(FreezeError::Failed {
                    name: name.clone(),
                    source: error,
                });
            }
            // It may have no room or no memory, or a security module may guard it alone. Or the module has no room for
            // any, or we may freeze none.
            Some(
                errno @ (Errno::ENOSPC
                | Errno::ENOMEM
                | Errno::EINTR
                | Errno::EPERM
                | Errno::EACCES),
            ) => {
                *lock(&self.refused) = Some((name.clone(), errno));
                self.give_up_on(target, State::Broken, format!("cannot be frozen: {error}"));
            }
            // The file system's own words, and what a disk that fails a write-back makes of it: nobody has a
            // list of those.
            Some(_) => {
                self.give_up_on(target, State::Broken, format!("is out of order: {error}"));
            }
        }
    }

    /// Whether what is busy is waited for, or has been for long enough.
    fn is_patient(&self) -> bool {
        lock(&self.busy_until).is_none_or(|until| Instant::now() < until)
    }

    /// Leaves one out.
    pub(super) fn give_up_on(&self, target: &Target, state: State, why: String) {
        let name = &target.name;
        *target.state() = state;
        if self.limits.strict {
            let (name, why) = (name.clone(), why.clone());
            self.fail(FreezeError::Strict { name, why });
        } else {
            self.log.warning(format!("{name} {why}; it is left out"));
        }
        *lock(&target.why) = Some(why);
    }

    /// Thaws one that will be frozen again, so that it may be thawed already.
    pub(super) fn take_back(&self, target: &Target) {
        let Some((since, took)) = target.begin_thaw() else {
            return;
        };
        // It may hang, as a freeze may.
        self.progress.begin(&target.name, Instant::now());
        let result = self.door.thaw(target.as_fd());
        self.progress.end(&target.name);
        match result {
            Err(source) if !is(&source, Errno::EINVAL) => {
                *target.state() = State::Ours { since, took };
                let name = target.name.clone();
                self.fail(FreezeError::Failed { name, source });
            }
            _ => *target.state() = thawed(since, took),
        }
    }

    /// One was not frozen all the time.
    fn note_early(&self, name: &str) {
        let mut early = lock(&self.early);
        if !early.iter().any(|it| it == name) {
            early.push(name.into());
        }
    }

    /// The same, found out by what was written.
    fn note_written(&self, name: &str) {
        self.log.error(format!(
            "{name} was written to while it should have been frozen: somebody had thawed it for a while"
        ));
        self.note_early(name);
    }

    /// Finds out what of ours is not frozen any more. This may hang behind whoever syncs a disk that does, and its
    /// thaw comes all the same: it is queued behind it in the kernel, where it does not end with the daemon. No thaw
    /// would come of what others have frozen: that is asked once, in the end.
    pub(super) fn look_after_all(&self) {
        for target in &self.targets {
            let Some(_turn) = target.turn.take_within(Duration::ZERO) else {
                continue;
            };
            if !target.is_ours() || self.door.freeze(target.as_fd()).is_err() {
                continue;
            }
            if !target.is_ours() {
                // Its thaw has come meanwhile. If that is what has undone this freeze, it was not frozen before.
                let undone = self.door.thaw(target.as_fd());
                if !undone.is_err_and(|error| is(&error, Errno::EINVAL)) {
                    continue;
                }
            }
            self.note_early(&target.name);
            lock(&self.lost).push(target.name.clone());
        }
    }

    /// Finds out whether others have thawed meanwhile what they had frozen, and thaws what that has frozen, or what is
    /// ours.
    pub(super) fn ask_and_thaw(&self, target: &Target) {
        let asks = *target.state() == State::Foreign;
        target.asks.store(asks, Ordering::SeqCst);
        self.ask_foreign(target);
        self.thaw_one(target);
        target.asks.store(false, Ordering::SeqCst);
    }

    /// Finds out whether others have thawed meanwhile what they had frozen.
    fn ask_foreign(&self, target: &Target) {
        let mut targets = self.targets.iter();
        let index = targets.position(|it| std::ptr::eq(it, target));
        let Some(index) = index.filter(|_| *target.state() == State::Foreign) else {
            return;
        };
        if self.abort.load(Ordering::SeqCst) {
            // Whoever minds all may be thawing, and would thaw this one once it is claimed.
            return;
        }
        let name = &target.name;
        let was_written = target.was_written();
        target.unasked.store(true, Ordering::SeqCst);
        // It may hang, and then nobody is to close it.
        let _turn = target.turn.take_within(LOOK_TIME);
        // If nobody has frozen it any more this does, whatever becomes of this process meanwhile.
        let frozen = self.freeze_or_leave(index, target);
        target.unasked.store(false, Ordering::SeqCst);
        if frozen.is_ok() {
            // It is nobody's any more. If it cannot be thawed, that is the news.
            *target.state() = State::Ours {
                since: Instant::now(),
                took: Duration::ZERO,
            };
            self.log
                .error(format!("{name} had been thawed by whoever froze it"));
            return self.note_early(name);
        }
        if was_written {
            self.note_written(name);
        }
    }

    pub(super) fn thaw_one(&self, target: &Target) {
        // Whoever looks after it may hang, and then it is thawed all the same.
        let turn = target.turn.take_within(LOOK_TIME);
        self.thaw_now(target);
        if turn.is_some() {
            return;
        }
        // What that look has found counts, and the thaw does not end before its freeze has.
        target.unasked.store(true, Ordering::SeqCst);
        let has_ended = target.turn.take_within(STUCK_TIME).is_some();
        target.unasked.store(!has_ended, Ordering::SeqCst);
    }

    fn thaw_now(&self, target: &Target) {
        let was_over = self.over.load(Ordering::SeqCst);
        let Some((since, took)) = target.begin_thaw() else {
            return;
        };
        let name = &target.name;
        let was_written = target.was_written();
        let result = self.door.thaw(target.as_fd());
        let stood = since.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                *target.state() = thawed(since, took);
                self.log
                    .info(format!("{name} thawed, was frozen for {stood:.6} s"));
                if was_written && !self.abort.load(Ordering::SeqCst) {
                    self.note_written(name);
                }
            }
            Err(e) if is(&e, Errno::EINVAL) && self.may_be_thawed() => {
                *target.state() = thawed(since, took);
                self.log.info(format!(
                    "{name} is thawed already, was frozen for at most {stood:.6} s"
                ));
            }
            Err(e) if is(&e, Errno::EINVAL) => {
                *target.state() = thawed(since, took);
                self.log
                    .error(format!("{name} had been thawed by somebody else before"));
                self.note_early(name);
            }
            Err(source) => {
                // It stays ours, so that it is tried again when the session is dropped.
                *target.state() = State::Ours { since, took };
                self.log.error(format!("{name} cannot be thawed: {source}"));
                if !self.door.goes_on() && !was_over && self.over.load(Ordering::SeqCst) {
                    return self.thaw_in_the_end(target);
                }
                lock(&self.thaw_failure).get_or_insert(ThawError::Failed {
                    name: name.clone(),
                    source,
                });
            }
        }
    }

    /// Whether it says nothing of the freeze that something is not frozen any more.
    fn may_be_thawed(&self) -> bool {
        self.abort.load(Ordering::SeqCst) || self.door.says_what_it_has_thawed()
    }

    /// Tries again until it is thawed, by whomever: its session has ended meanwhile, and nobody else does.
    fn thaw_in_the_end(&self, target: &Target) {
        while let Some((since, took)) = target.begin_thaw() {
            thread::sleep(RETRY);
            let now = match self.door.thaw(target.as_fd()) {
                Err(error) if !is(&error, Errno::EINVAL) => State::Ours { since, took },
                _ => thawed(since, took),
            };
            *target.state() = now;
        }
        let name = &target.name;
        self.log.warning(format!("{name} is thawed at last"));
    }
}

pub(super) fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno as i32)
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // All that is kept in these is whole after each single assignment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn ms(time: Duration) -> String {
    format!("{:.3} ms", time.as_secs_f64() * 1e3)
}
