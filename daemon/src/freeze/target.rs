// SPDX-License-Identifier: GPL-2.0-only

//! One file system of a freeze: what it is, and how far it has come.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::learnt::Stuck;
use super::work::lock;
use crate::mounts::DevId;
use crate::writes::{Look, Writes};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Open,
    /// A thread is inside the call that freezes it.
    Freezing {
        /// Since then.
        since: Instant,
    },
    /// Frozen by this session.
    Ours {
        /// When the call began.
        since: Instant,
        /// How long it took.
        took: Duration,
    },
    /// A thread is inside the call that thaws it; it was ours.
    Thawing {
        /// When the call that froze it began.
        since: Instant,
        /// How long that took.
        took: Duration,
    },
    /// Somebody else had frozen it before: it counts, and stays theirs.
    Foreign,
    /// It cannot freeze; synced instead.
    Synced,
    /// It cannot freeze, and could not be synced either.
    Unsynced,
    /// It is out of order.
    Broken,
    /// It was ours.
    Thawed {
        /// When the call that froze it began.
        since: Instant,
        /// How long the freeze took.
        took: Duration,
        /// When it was thawed at the latest.
        until: Instant,
    },
}

/// Whose turn it is with one: that of whoever thaws it or looks after it, so that none is taken for the other.
#[derive(Default)]
pub(super) struct Turn {
    is_taken: Mutex<bool>,
    free: Condvar,
}

/// Until this is dropped it is nobody else's.
pub(super) struct Taken<'a>(&'a Turn);

impl Turn {
    /// Takes it, if it is free by then.
    pub(super) fn take_within(&self, time: Duration) -> Option<Taken<'_>> {
        let free = self
            .free
            .wait_timeout_while(lock(&self.is_taken), time, |it| *it);
        let (mut is_taken, waited) = free.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() && *is_taken {
            return None;
        }
        *is_taken = true;
        Some(Taken(self))
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        *lock(&self.0.is_taken) = false;
        self.0.free.notify_one();
    }
}

/// From now on it is thawed.
pub(super) fn thawed(since: Instant, took: Duration) -> State {
    let until = Instant::now();
    State::Thawed { since, took, until }
}

/// Whether a file system was frozen for a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// It was.
    Frozen,
    /// By somebody else.
    Foreign,
    /// It was synced, for want of means to freeze.
    Synced,
    /// Neither.
    LeftOut,
}

/// What became of one file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stay {
    /// For people.
    pub name: String,
    /// Whether it was frozen.
    pub how: How,
    /// Why it was left out.
    pub reason: Option<String>,
    /// When it was about to be frozen.
    pub since: Option<Instant>,
    /// How long that took.
    pub took: Option<Duration>,
    /// When it was thawed.
    pub until: Option<Instant>,
}

/// What a file system, open, is at that its freeze would wait for, and all its writers with it, in words.
pub type Busy = Box<dyn Fn(BorrowedFd<'_>) -> Option<String> + Send + Sync>;

/// Whether what a file system is on gets on with what is written to it.
pub type WrittenBack = Box<dyn Fn() -> Look + Send + Sync>;

/// One file system to freeze.
pub struct Target {
    /// Its superblock.
    pub dev: DevId,
    /// For people.
    pub name: String,
    /// Its wave in the plan, from 0.
    pub wave: usize,
    /// The devices that it is on.
    pub devices: Vec<DevId>,
    /// The disks that it is on, perhaps with others.
    pub(super) disks: Vec<DevId>,
    /// Those and all devices in between; `None` where it may have a part of any other.
    pub(super) below: Option<BTreeSet<DevId>>,
    /// The file systems that hold what it is on; `None` where that may be any.
    pub(super) stands_on: Option<BTreeSet<DevId>>,
    /// How long its freeze took the last time.
    pub(super) usual: Option<Duration>,
    /// Tells what it is at that a freeze would wait for, if it is of a kind that may be.
    pub(super) busy: Option<Busy>,
    /// Tells one that is slow from one that hangs.
    pub(super) written_back: Option<WrittenBack>,
    pub(super) fd: OwnedFd,
    /// What was written to its devices, where that tells whether it was frozen all the time.
    pub(super) writes: Writes,
    /// That, when it was frozen; `None` when nobody could tell.
    pub(super) written: Mutex<Option<u64>>,
    pub(super) state: Mutex<State>,
    /// Why it was left out, if it was.
    pub(super) why: Mutex<Option<String>>,
    /// Its freeze has taken for too long and was called off.
    pub(super) given_up: AtomicBool,
    pub(super) turn: Turn,
    /// That it is not ours to thaw was said.
    pub(super) left: AtomicBool,
    /// And was not heard.
    pub(super) unheard: AtomicBool,
    /// Whether others have thawed it meanwhile is being asked, or could not be.
    pub(super) unasked: AtomicBool,
    /// A thread is inside a freeze that asks that, or undoes it.
    pub(super) asks: AtomicBool,
}

impl Target {
    /// A file system that is open as `fd`.
    pub fn new(dev: DevId, name: String, wave: usize, fd: OwnedFd) -> Self {
        Target {
            dev,
            name,
            wave,
            devices: Vec::new(),
            disks: Vec::new(),
            below: None,
            stands_on: None,
            usual: None,
            busy: None,
            written_back: None,
            fd,
            writes: Writes::default(),
            written: Mutex::default(),
            state: Mutex::new(State::Open),
            why: Mutex::default(),
            given_up: AtomicBool::new(false),
            turn: Turn::default(),
            left: AtomicBool::new(false),
            unheard: AtomicBool::new(false),
            unasked: AtomicBool::new(false),
            asks: AtomicBool::new(false),
        }
    }

    /// By these it is found again, whatever has become of its mounts.
    pub fn with_devices(self, devices: Vec<DevId>) -> Self {
        Target { devices, ..self }
    }

    /// What is on the same disks is written back one after the other.
    pub fn with_disks(self, disks: Vec<DevId>) -> Self {
        Target { disks, ..self }
    }

    /// What is written to it is written to these devices, and no others.
    pub fn with_all_below(self, below: Option<BTreeSet<DevId>>) -> Self {
        Target { below, ..self }
    }

    /// It is on files of these file systems.
    pub fn standing_on(self, stands_on: Option<BTreeSet<DevId>>) -> Self {
        Target { stands_on, ..self }
    }

    /// As long as this has something to tell, it is not to be frozen.
    pub fn asked(self, busy: Busy) -> Self {
        let busy = Some(busy);
        Target { busy, ..self }
    }

    /// As long as what is done there changes, its disk does not hang.
    pub fn written_back(self, written_back: WrittenBack) -> Self {
        let written_back = Some(written_back);
        Target {
            written_back,
            ..self
        }
    }

    /// Each device that it is on, as far as those are known; one may come more than once.
    pub(super) fn all_below(&self) -> impl Iterator<Item = DevId> + '_ {
        let below = self.below.iter().flatten();
        self.devices.iter().chain(&self.disks).chain(below).copied()
    }

    /// Whether it may be written only while that one is, of this wave. For whoever cannot help it when that hangs; of what it
    /// may stand on is all that comes later, where nobody knows.
    pub(super) fn may_stand_on(&self, dev: DevId, wave: usize) -> bool {
        match &self.stands_on {
            Some(known) => known.contains(&dev),
            None => self.wave < wave,
        }
    }

    /// Whether it is known to be: to leave one out for what may be would be to leave out all.
    pub(super) fn stands_on(&self, dev: DevId) -> bool {
        let known = self.stands_on.as_ref();
        known.is_some_and(|it| it.contains(&dev))
    }

    /// This one, when it hangs.
    pub(super) fn as_stuck(&self) -> Stuck {
        Stuck {
            dev: self.dev,
            name: self.name.clone(),
            wave: self.wave,
        }
    }

    /// From its freeze to its thaw nothing may be written there.
    pub fn with_writes(self, writes: Writes) -> Self {
        Target { writes, ..self }
    }

    /// It is frozen, by this session or by somebody else.
    pub(super) fn set_frozen(&self, state: State) {
        *lock(&self.written) = self.writes.sectors();
        *self.state() = state;
    }

    /// Whether anything was written since then: somebody has thawed it for a while. A disk that has gone
    /// does not tell.
    pub(super) fn was_written(&self) -> bool {
        let both = lock(&self.written).zip(self.writes.sectors());
        both.is_some_and(|(then, now)| now != then)
    }

    /// Whether it is known that nothing was.
    pub(super) fn is_as_it_was(&self) -> bool {
        let both = lock(&self.written).zip(self.writes.sectors());
        let look = || self.written_back.as_ref().map(|it| it());
        both.is_some_and(|(then, now)| now == then)
            && !self.writes.is_empty()
            && look().is_some_and(|it| it.is_counted)
    }

    /// Whether this session froze it and has not thawed it yet.
    pub fn is_ours(&self) -> bool {
        matches!(*self.state(), State::Ours { .. })
    }

    /// If it is ours its thaw begins: when its freeze began and how long that took.
    pub(super) fn begin_thaw(&self) -> Option<(Instant, Duration)> {
        let mut state = self.state();
        let State::Ours { since, took } = *state else {
            return None;
        };
        *state = State::Thawing { since, took };
        Some((since, took))
    }

    /// Whether its thaw, under way on another thread, has not come back.
    pub(super) fn is_thawing(&self) -> bool {
        matches!(*self.state(), State::Thawing { .. })
    }

    /// Whether this session has frozen it, or may yet.
    pub(super) fn may_be_frozen(&self) -> bool {
        let state = self.state();
        matches!(
            *state,
            State::Freezing { .. } | State::Ours { .. } | State::Thawing { .. }
        )
    }

    /// Whether it may become frozen although its session has ended.
    pub(super) fn is_inside_a_freeze(&self) -> bool {
        self.is_freezing() || self.asks.load(Ordering::SeqCst)
    }

    pub(super) fn is_freezing(&self) -> bool {
        matches!(*self.state(), State::Freezing { .. })
    }

    /// Its freeze has come to this, unless it was given up on before.
    pub(super) fn end_freezing(&self, state: State) -> bool {
        let mut now = self.state();
        let is_wanted = !self.given_up.load(Ordering::SeqCst);
        if is_wanted {
            *now = state;
        }
        is_wanted
    }

    /// Gives up on its freeze, once, if that has not ended before: what is frozen by now is not to be thawed
    /// under whoever counts on it.
    pub(super) fn give_up(&self) -> bool {
        let now = self.state();
        matches!(*now, State::Freezing { .. }) && !self.given_up.swap(true, Ordering::SeqCst)
    }

    /// Whether it is to be frozen and is not.
    pub(super) fn is_due(&self) -> bool {
        matches!(*self.state(), State::Open | State::Thawed { .. })
    }

    pub(super) fn account(&self) -> Stay {
        let (how, since, took, until) = match *self.state() {
            State::Ours { since, took } | State::Thawing { since, took } => {
                (How::Frozen, Some(since), Some(took), None)
            }
            State::Thawed { since, took, until } => {
                (How::Frozen, Some(since), Some(took), Some(until))
            }
            State::Foreign => (How::Foreign, None, None, None),
            State::Synced => (How::Synced, None, None, None),
            State::Open | State::Freezing { .. } | State::Unsynced | State::Broken => {
                (How::LeftOut, None, None, None)
            }
        };
        let is_left_out = how == How::LeftOut;
        Stay {
            name: self.name.clone(),
            how,
            reason: is_left_out.then(|| lock(&self.why).clone()).flatten(),
            since,
            took,
            until,
        }
    }

    /// Whether this session froze it, whatever has become of it since.
    pub fn has_been_ours(&self) -> bool {
        self.took().is_some()
    }

    /// How long its freeze took, if this session froze it.
    pub(super) fn took(&self) -> Option<Duration> {
        match *self.state() {
            State::Ours { took, .. } | State::Thawing { took, .. } | State::Thawed { took, .. } => {
                Some(took)
            }
            _ => None,
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // It holds a plain value, whole at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
impl Target {
    /// As if this session had frozen it.
    pub(crate) fn held(self) -> Self {
        let (since, took) = (Instant::now(), Duration::ZERO);
        self.set_frozen(State::Ours { since, took });
        self
    }
}

impl AsFd for Target {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
