// SPDX-License-Identifier: GPL-2.0-only

//! Freezes the planned file systems and thaws exactly those that it froze.
//!
//! A [`Session`] owns the descriptors that were opened before the first freeze. The thaw goes through
//! the same descriptors, so renames and unmounts in between lose nothing. Dropping a session thaws what
//! is still frozen.
//!
//! All is tried wave after wave; what gets in the way is dealt with while nothing is frozen, and then
//! it is tried again: nobody stands still because of another's trouble. It decides no order (that is
//! [`crate::plan`]), does not know what is behind the [`Door`], and knows no host.
//!
//! Here is how a session goes about all of it: `write_back` is what comes before, `work` what is done to one
//! file system at a time, by several threads, `target` where each stands, `learnt` what the next one knows.

mod learnt;
mod target;
mod work;
mod write_back;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use self::work::{is, lock, ms, Obstacle, Pace, Work};
use crate::apart::Apart;
use crate::door::{Door, DoorError};
use crate::ground::Watched;
use crate::logbook::Logbook;
use crate::mounts::DevId;
use crate::pool::Pool;
use crate::progress::{Progress, Stage};
use crate::sys;

use self::learnt::InThaw;
pub use self::learnt::{GivenUp, Learnt, Stuck};
use self::target::State;
pub use self::target::{How, Stay, Target};

/// How often one that waits for its turn looks whether all is off.
const ABORT_TICK: Duration = Duration::from_millis(20);
/// How often it is looked whether it still is.
const BUSY_TICK: Duration = Duration::from_millis(20);
/// How long the thaw of a wave may hold up that of the next.
const THAW_TIME: Duration = Duration::from_millis(500);
/// How long what may be stuck in a freeze or a thaw of somebody who has just ended may take to come back.
const STUCK_TIME: Duration = Duration::from_secs(1);
/// How long it takes to end what has nothing left to do.
const MOMENT: Duration = Duration::from_micros(100);
/// How long a look whether all is still frozen is waited for.
const LOOK_TIME: Duration = Duration::from_millis(200);
/// How often it is tried again to thaw what could not be when its session ended.
pub(crate) const RETRY: Duration = Duration::from_secs(1);
/// Enough to wait for a freeze and say that it is over.
const STACK_BYTES: usize = 64 * 1024;
/// How often those that are frozen are thawed again because of one that is slow.
const BACK_OFFS: usize = 3;

/// Why a freeze did not come about. By the time it is returned, everything is thawed again.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// Nothing may be frozen at all.
    #[error(transparent)]
    Door(#[from] DoorError),
    /// One file system failed to freeze.
    #[error("{name} cannot be frozen")]
    Failed {
        /// Which.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// One would have been left out or only synced, or its disk has not taken all of it, and the configuration is strict.
    #[error("{name} {why}, and the configuration is strict")]
    Strict {
        /// Which.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// Something below what is to be frozen goes on, and the configuration is strict.
    #[error("the configuration is strict, and {}", .layers.join("; "))]
    Moving {
        /// What does, in words.
        layers: Vec<String>,
    },
    /// There is nothing to freeze, and the configuration is strict.
    #[error("there is nothing to freeze, and the configuration is strict")]
    Nothing,
    /// Something is wrong with each that there is to freeze.
    #[error(
        "nothing at all would be frozen: something is wrong with each file system that could be"
    )]
    Lost,
    /// One that was to be frozen again does not come back from its thaw.
    #[error("{name} hangs: its thaw has not come back")]
    Hung {
        /// Which.
        name: String,
    },
    /// It was called off.
    #[error("the freeze was called off")]
    Aborted,
}

/// Why a thaw was not the clean end of a backup. Nothing that could be thawed is left frozen, and what hangs
/// in its thaw is thawed by the kernel when its disk comes back.
#[derive(Debug, thiserror::Error)]
pub enum ThawError {
    /// Somebody else had thawed some of them before, for good or for a while.
    #[error("thawed by somebody else while the backup was running: {}", .names.join(", "))]
    Early {
        /// Which.
        names: Vec<String>,
    },
    /// They were mounted or made writable after the freeze, and the configuration is strict.
    #[error("mounted or made writable while the rest was frozen, and the configuration is strict: {}", .names.join(", "))]
    Late {
        /// Which.
        names: Vec<String>,
    },
    /// Something that no freeze holds has written, or it is not known whether it has, and the configuration is strict.
    #[error("written to while all on it was frozen, and the configuration is strict: {}", .nodes.join(", "))]
    Written {
        /// To which disks.
        nodes: Vec<String>,
    },
    /// Something below what was frozen has begun, and the configuration is strict.
    #[error("the configuration is strict, and meanwhile {}", .layers.join("; "))]
    Moving {
        /// What did, in words.
        layers: Vec<String>,
    },
    /// They hang in their thaw, and nobody knows whether they were frozen until then, or the configuration is
    /// strict.
    #[error("the thaw has not come back: {}", .names.join(", "))]
    Hung {
        /// Which.
        names: Vec<String>,
    },
    /// The kernel refuses.
    #[error("{name} cannot be thawed")]
    Failed {
        /// Which.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Whether a backup that has frozen so many, and has lost so many to what is wrong with them, is of anything at all; an
/// error where it is none: good without one is one thing, good without all another.
pub fn is_of_anything(frozen: usize, losses: usize, is_strict: bool) -> Result<bool, FreezeError> {
    match (frozen, losses) {
        (0, 0) if is_strict => Err(FreezeError::Nothing),
        (0, 0) => Ok(false),
        (0, _) => Err(FreezeError::Lost),
        _ => Ok(true),
    }
}

/// How many file systems ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Frozen by this session.
    pub ours: usize,
    /// Frozen by somebody else before.
    pub foreign: usize,
    /// Synced, because they cannot freeze.
    pub synced: usize,
    /// Neither.
    pub left_out: usize,
}

/// How a session goes about its work.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Whether a file system that is not frozen fails the whole.
    pub strict: bool,
    /// How many are worked on at a time.
    pub parallel: usize,
    /// How long the freeze of one may take, or its thaw, or its sync with nothing written back; then it hangs.
    pub give_up: Duration,
    /// How long what somebody else has frozen is waited for, in all.
    pub patience: Duration,
    /// How long at least those that are frozen wait for one that is not yet, after all others are.
    pub lag: Duration,
}

/// What a session works with.
#[derive(Clone)]
pub struct Means {
    /// Through which it freezes.
    pub door: Arc<dyn Door>,
    /// Where to say what happens.
    pub log: Logbook,
    /// How to go about it.
    pub limits: Limits,
    /// Set at any time, it makes a session stop and thaw.
    pub abort: Arc<AtomicBool>,
    /// Where to show what it is at.
    pub progress: Arc<Progress>,
    /// The threads that work for it.
    pub pool: Arc<Pool>,
    /// And what works beside those.
    pub aside: Arc<Pool>,
    /// Those that sync.
    pub apart: Arc<Apart>,
}

/// The freeze of one backup, from open descriptors to thaw.
pub struct Session {
    work: Arc<Work>,
    waves: Vec<Vec<usize>>,
    pool: Arc<Pool>,
    aside: Arc<Pool>,
    apart: Arc<Apart>,
}

impl Session {
    /// Prepares a session on `targets`.
    pub fn new(mut targets: Vec<Target>, means: Means, learnt: &Learnt) -> io::Result<Self> {
        let Means {
            door,
            log,
            limits,
            abort,
            progress,
            pool,
            aside,
            apart,
        } = means;
        delay_the_lone(&mut targets);
        let mut waves: Vec<Vec<usize>> = Vec::new();
        for (i, target) in targets.iter_mut().enumerate() {
            target.usual = learnt.usual.get(&target.dev).copied();
            if waves.len() <= target.wave {
                waves.resize(target.wave + 1, Vec::new());
            }
            if let Some(wave) = waves.get_mut(target.wave) {
                wave.push(i);
            }
        }
        let widest = waves.iter().map(Vec::len).max().unwrap_or(0);
        // Nor does the caller thaw: that may hang.
        pool.grow(widest.min(limits.parallel).max(1))?;
        // A wave of one needs somebody beside it only where others stand still meanwhile.
        if targets.len() > 1 || door.watched_every().is_some() {
            aside.grow(1)?;
        }
        Ok(Session {
            pool,
            aside,
            apart,
            waves,
            work: Arc::new(Work {
                targets,
                door,
                log,
                limits,
                abort,
                progress,
                armed: Mutex::new(Instant::now()),
                pace: Mutex::new(Pace {
                    last: Instant::now(),
                    longest: Duration::ZERO,
                }),
                obstacles: Mutex::new(Vec::new()),
                busy_until: Mutex::new(None),
                failure: Mutex::new(None),
                refused: Mutex::new(None),
                lost: Mutex::new(Vec::new()),
                early: Mutex::new(Vec::new()),
                thaw_failure: Mutex::new(None),
                has_ended_freezes: AtomicBool::new(false),
                over: AtomicBool::new(false),
            }),
        })
    }

    /// The file systems, in the order in which they were given.
    pub fn targets(&self) -> &[Target] {
        &self.work.targets
    }

    /// What has become of each file system.
    pub fn account(&self) -> Vec<Stay> {
        self.work.targets.iter().map(Target::account).collect()
    }

    /// When whoever is to thaw in need began to mind the deadline.
    pub fn armed_at(&self) -> Instant {
        *lock(&self.work.armed)
    }

    /// The host knows that all is frozen.
    pub fn settle(&self) {
        self.end_freezes();
        self.work.door.settle(&self.work.targets);
    }

    /// From here on nothing is frozen but to ask whether it is. What was not heard of that is said again.
    fn end_freezes(&self) {
        let Work {
            door,
            has_ended_freezes,
            ..
        } = &*self.work;
        if !has_ended_freezes.load(Ordering::SeqCst) {
            has_ended_freezes.store(door.freezes_are_over(), Ordering::SeqCst);
        }
    }

    /// Adds to what is known, whatever came of the freeze.
    pub fn learn(&self, learnt: &mut Learnt) {
        learnt.hung.retain(|it| it.thread.strong_count() > 0);
        learnt.in_thaw.retain(|it| it.work.strong_count() > 0);
        let each = self.work.targets.iter().enumerate();
        let in_thaw = each.filter(|(_, it)| it.is_thawing());
        learnt.in_thaw.extend(in_thaw.map(|(index, it)| InThaw {
            dev: it.dev,
            name: it.name.clone(),
            index,
            work: Arc::downgrade(&self.work),
        }));
        for target in &self.work.targets {
            match *target.state() {
                State::Ours { .. } | State::Thawing { .. } | State::Thawed { .. } => {
                    learnt.unfreezable.remove(&target.dev);
                }
                State::Synced | State::Unsynced => {
                    learnt.unfreezable.insert(target.dev);
                }
                State::Open | State::Freezing { .. } | State::Foreign | State::Broken => {}
            }
            if target.given_up.load(Ordering::SeqCst) {
                learnt.called_off.insert(target.dev, target.name.clone());
            }
            if let Some(took) = target.took() {
                learnt.usual.insert(target.dev, took);
            }
        }
        // What was unmounted is of no use any more.
        let there = |dev: &DevId| self.work.targets.iter().any(|t| t.dev == *dev);
        learnt.usual.retain(|dev, _| there(dev));
        learnt.unfreezable.retain(there);
    }

    /// Freezes wave after wave. On any failure everything is thawed before it returns. The caller has `meanwhile` done
    /// once the kernel is at work on the last wave, unless there is none.
    pub fn freeze(
        &self,
        learnt: &mut Learnt,
        mut meanwhile: Option<impl FnOnce()>,
    ) -> Result<Summary, FreezeError> {
        let result = self.freeze_or_not(learnt, &mut meanwhile);
        self.learn(learnt);
        if result.is_err() {
            learnt.ask_all();
        }
        result
    }

    fn freeze_or_not(
        &self,
        learnt: &mut Learnt,
        meanwhile: &mut Option<impl FnOnce()>,
    ) -> Result<Summary, FreezeError> {
        let work = &self.work;
        self.leave_out_hung(learnt);
        let is_known = |it: &Target| it.is_due() && self.is_unfreezable(it, learnt);
        let known: Vec<usize> = work.which(is_known);
        self.sync_unfreezable(&known, learnt);
        work.progress.enter(Stage::Freezing, work.targets.len());
        *lock(&work.armed) = Instant::now();
        work.door.arm(&work.targets)?;
        // Nor is a thaw of what hangs to be tried.
        for index in work.which(|it| *it.state() == State::Broken) {
            work.leave(index);
        }
        let frozen = self.freeze_armed(&known, learnt, meanwhile);
        self.leave_again();
        if frozen.is_err() {
            // What went wrong with the thaw is logged; the freeze's own failure is the news.
            let _ = self.thaw();
            self.disarm();
        }
        frozen
    }

    fn freeze_armed(
        &self,
        known: &[usize],
        learnt: &mut Learnt,
        meanwhile: &mut Option<impl FnOnce()>,
    ) -> Result<Summary, FreezeError> {
        let work = &self.work;
        self.ask_again(known);
        self.leave_out_above_foreign();
        for attempt in 0.. {
            self.leave_out_busy();
            *lock(&work.pace) = Pace {
                last: Instant::now(),
                longest: Duration::ZERO,
            };
            for (number, wave) in self.waves.iter().enumerate() {
                let is_last = number + 1 == self.waves.len();
                let meanwhile = meanwhile.take_if(|_| is_last);
                self.freeze_wave(wave, attempt < BACK_OFFS, meanwhile);
                if work.gave_up() || !lock(&work.obstacles).is_empty() {
                    break;
                }
            }
            let obstacles = std::mem::take(&mut *lock(&work.obstacles));
            if work.gave_up() || obstacles.is_empty() {
                break;
            }
            self.overcome(&obstacles, learnt);
        }
        self.has_not_failed()?;
        let summary = self.summary();
        match lock(&work.refused).take() {
            Some((name, errno)) if summary.ours == 0 => Err(FreezeError::Failed {
                name,
                source: errno.into(),
            }),
            _ => Ok(summary),
        }
    }

    /// An error if it has come to one, or is called off.
    pub fn has_not_failed(&self) -> Result<(), FreezeError> {
        if !self.work.gave_up() {
            return Ok(());
        }
        let failure = lock(&self.work.failure).take();
        Err(failure.unwrap_or(FreezeError::Aborted))
    }

    /// Whether it is known not to freeze, and is only synced. Another file system may have its number by now: where
    /// nothing may be left out, nothing is that nobody has asked, and whoever is asked says so at once.
    fn is_unfreezable(&self, target: &Target, learnt: &Learnt) -> bool {
        !self.work.limits.strict && learnt.is_unfreezable(target.dev)
    }

    /// Leaves out what hangs and would so in its freeze, with what stands on that. Where a freeze can be called off,
    /// what may stand on it is tried, as nobody may know what that is on.
    fn leave_out_hung(&self, learnt: &mut Learnt) {
        self.leave_out_hung_on(&BTreeSet::new(), learnt);
    }

    /// Asks the disks of all that is to be frozen whether they answer, and leaves out what is on one that does not,
    /// where a freeze that hangs could not be called off: it would fail this backup, and each that comes before its
    /// disk is back. What is known to hang is not asked. `ask` names those that are silent for so long, or none when it
    /// is off. Nothing is frozen yet.
    pub fn ask_disks(
        &self,
        learnt: &mut Learnt,
        ask: impl FnOnce(&BTreeSet<DevId>, Duration, &dyn Fn() -> bool) -> BTreeSet<DevId>,
    ) {
        let work = &self.work;
        learnt.silent.clear();
        if work.door.can_call_off() {
            return;
        }
        self.leave_out_hung(learnt);
        if work.gave_up() {
            return;
        }
        work.progress.enter(Stage::Asking, 0);
        let due = work.targets.iter().filter(|it| it.is_due());
        let disks = due.flat_map(Target::all_below).collect();
        let silent = ask(&disks, work.limits.give_up, &|| work.gave_up());
        if !silent.is_empty() {
            self.leave_out_hung_on(&silent, learnt);
        }
    }

    /// As [`Session::leave_out_hung`], and what is on these disks as well.
    fn leave_out_hung_on(&self, silent: &BTreeSet<DevId>, learnt: &mut Learnt) {
        let (work, limit) = (&self.work, self.work.limits.give_up);
        let asks_all = !std::mem::replace(&mut learnt.has_asked, true);
        let until = Instant::now() + STUCK_TIME;
        let mut hung = learnt.stuck.clone();
        let before = learnt.called_off.len();
        let is_here = |dev: &DevId| work.targets.iter().any(|it| it.dev == *dev);
        learnt.called_off.retain(|dev, _| is_here(dev));
        if learnt.called_off.len() < before {
            // It may be back before it has come back.
            learnt.ask_all();
        }
        for target in &work.targets {
            let dev = &target.dev;
            let is_known = learnt.called_off.contains_key(dev);
            let is_stuck = || work.door.is_stuck(target.as_fd());
            let mut was_left = (asks_all || is_known) && is_stuck();
            while was_left && !is_known && Instant::now() < until {
                // Whoever held it may have ended in this very moment, and most come back in the next.
                thread::sleep(BUSY_TICK);
                was_left = is_stuck();
            }
            match was_left {
                true => learnt.called_off.insert(*dev, target.name.clone()),
                false => learnt.called_off.remove(dev),
            };
            let disk = target.all_below().find(|it| silent.contains(it));
            let why = if let Some(disk) = disk.filter(|_| target.is_due()) {
                learnt.silent.insert(*dev, (target.name.clone(), disk));
                let limit = limit.as_secs();
                format!("hangs: {disk} does not answer within {limit} s (give_up)")
            } else if self.is_unfreezable(target, learnt) {
                // It is known not to freeze, and left out when it is to be synced.
                hung.extend(learnt.hangs(*dev).then(|| target.as_stuck()));
                continue;
            } else if was_left || learnt.hangs_in_thaw(*dev) {
                "hangs: an earlier freeze or thaw of it has not come back".into()
            } else if learnt.has_hung_for(target, limit) {
                let limit = limit.as_secs();
                format!("hangs: in {limit} s nothing of it was written back (give_up)")
            } else {
                continue;
            };
            hung.push(target.as_stuck());
            if target.is_due() {
                work.give_up_on(target, State::Broken, why);
            }
        }
        let (verb, stands_on): (_, fn(&Target, &Stuck) -> bool) = match work.door.can_call_off() {
            true => ("stands", |target, it| target.stands_on(it.dev)),
            false => ("may stand", |target, it| {
                target.may_stand_on(it.dev, it.wave)
            }),
        };
        for target in work.targets.iter().filter(|it| it.is_due()) {
            let mut below = hung.iter().filter(|it| it.dev != target.dev);
            if let Some(below) = below.find(|it| stands_on(target, it)) {
                let why = format!("{verb} on {}, which hangs", below.name);
                work.give_up_on(target, State::Broken, why);
            }
        }
    }

    /// Leaves out what has begun something since it was planned that a freeze would wait for. Whoever is asked
    /// may need memory, so only with nothing frozen.
    fn leave_out_busy(&self) {
        let work = &self.work;
        if work.targets.iter().any(Target::is_ours) {
            return;
        }
        for target in work.targets.iter().filter(|it| it.is_due()) {
            let why = target.busy.as_ref().and_then(|busy| busy(target.as_fd()));
            if let Some(why) = why {
                work.give_up_on(target, State::Broken, format!("is {why}"));
            }
        }
    }

    /// What is not frozen although it was to be, other than these.
    fn going_on<'a>(&'a self, but: &'a BTreeSet<DevId>) -> impl Iterator<Item = &'a Target> {
        let is_frozen = |it: &Target| matches!(*it.state(), State::Ours { .. } | State::Foreign);
        let targets = self.work.targets.iter();
        targets.filter(move |it| !but.contains(&it.dev) && !is_frozen(it))
    }

    /// Whether something of that is on that device.
    pub fn goes_on_on(&self, device: &Watched, but: &BTreeSet<DevId>) -> bool {
        let known = |it: &Target| it.below.as_ref().is_some_and(|it| device.counts(it));
        self.going_on(but).any(known)
    }

    /// The name of one of that which may be on any device.
    pub fn goes_on_anywhere(&self, but: &BTreeSet<DevId>) -> Option<String> {
        let mut targets = self.going_on(but);
        Some(targets.find(|it| it.below.is_none())?.name.clone())
    }

    fn summary(&self) -> Summary {
        let mut summary = Summary::default();
        for target in &self.work.targets {
            match *target.state() {
                State::Ours { .. } => summary.ours += 1,
                State::Foreign => summary.foreign += 1,
                State::Synced => summary.synced += 1,
                State::Unsynced | State::Broken => summary.left_out += 1,
                State::Open
                | State::Freezing { .. }
                | State::Thawing { .. }
                | State::Thawed { .. } => {}
            }
        }
        summary
    }

    /// Sees to it that what could not freeze the last time still cannot: another file system may have
    /// its number by now. Nothing is frozen yet.
    fn ask_again(&self, known: &[usize]) {
        let targets = known
            .iter()
            .filter_map(|i| Some((*i, self.work.targets.get(*i)?)));
        for (index, target) in targets.filter(|(_, t)| *t.state() == State::Synced) {
            if self.work.freeze_or_leave(index, target).is_ok() {
                *target.state() = State::Ours {
                    since: Instant::now(),
                    took: Duration::ZERO,
                };
                self.work.take_back(target);
            }
        }
    }

    /// Leaves out what stands on what somebody else keeps frozen: its own freeze would wait for them, and could not be
    /// called off. Nothing is frozen yet, nor is after this.
    fn leave_out_above_foreign(&self) {
        let work = &self.work;
        if work.door.can_call_off() {
            return;
        }
        let above = |below: &Target| {
            let dev = below.dev;
            let due = work.targets.iter().filter(|it| it.is_due());
            due.filter(move |it| it.dev != dev && it.stands_on(dev))
        };
        for index in work.which(|it| it.is_due() && above(it).next().is_some()) {
            let Some(target) = work.targets.get(index).filter(|_| !work.gave_up()) else {
                return;
            };
            let since = Instant::now();
            work.progress.begin(&target.name, since);
            let asked = work.freeze_or_leave(index, target);
            work.progress.end(&target.name);
            match asked {
                Ok(()) => {
                    let took = Duration::ZERO;
                    *target.state() = State::Ours { since, took };
                    work.take_back(target);
                }
                Err(error) if is(&error, Errno::EBUSY) => self.wait_for(index, false),
                // What else is wrong with it is met when it is its turn.
                Err(_) => {}
            }
            if *target.state() == State::Foreign {
                let why = format!("stands on {}, which somebody else has frozen", target.name);
                for it in above(target) {
                    work.give_up_on(it, State::Broken, why.clone());
                }
            }
        }
    }

    /// Deals with what got in the way, with nothing frozen but what is first in order anyway.
    fn overcome(&self, obstacles: &[Obstacle], learnt: &mut Learnt) {
        // What was slow would be so again. With it the next attempt begins, if nothing is above it.
        let keep = obstacles.iter().all(|it| *it == Obstacle::Slow);
        let stages =
            self.stages(|target| target.is_ours() && !(keep && self.is_first(target.wave)));
        self.take_back_all(&self.pool, stages);
        let unfreezable = obstacles.iter().filter_map(|it| match it {
            Obstacle::Unfreezable(index) => Some(*index),
            Obstacle::Busy(_) | Obstacle::Slow => None,
        });
        self.sync_unfreezable(&unfreezable.collect::<Vec<_>>(), learnt);
        let mut busy = obstacles.iter().filter_map(|it| match it {
            Obstacle::Busy(index) => Some(*index),
            Obstacle::Unfreezable(_) | Obstacle::Slow => None,
        });
        let last = busy.next_back();
        busy.for_each(|index| self.wait_for(index, false));
        last.into_iter()
            .for_each(|index| self.wait_for(index, true));
    }

    /// Whether no wave before this one has anything to be frozen.
    fn is_first(&self, number: usize) -> bool {
        let before = self.waves.iter().take(number).flatten();
        let mut before = before.filter_map(|i| self.work.targets.get(*i));
        !before.any(|t| t.is_due() || t.is_ours())
    }

    /// Waits until one is not frozen by somebody else any more, or has been for too long to wait for. With the last
    /// one that is waited for the next attempt may begin.
    fn wait_for(&self, index: usize, is_last: bool) {
        let work = &self.work;
        let Some(target) = work.targets.get(index) else {
            return;
        };
        let begin = Instant::now();
        lock(&work.busy_until).get_or_insert(begin + work.limits.patience);
        loop {
            // Once it is free its freeze may hang like any other.
            self.freeze_wave(&[index], false, None::<fn()>);
            let obstacles = std::mem::take(&mut *lock(&work.obstacles));
            if !obstacles.contains(&Obstacle::Busy(index)) || work.gave_up() {
                break;
            }
            thread::sleep(BUSY_TICK);
        }
        if !target.is_ours() {
            return;
        }
        let waited = ms(begin.elapsed());
        let name = &target.name;
        work.log.info(format!(
            "{name} was frozen by somebody else, it is not after {waited}"
        ));
        if !is_last || !self.is_first(target.wave) {
            work.take_back(target);
        }
    }

    /// Freezes one wave. What is usually quick begins later than what is slow, so that all end at about
    /// the same time and nobody stands still only because others take longer.
    fn freeze_wave(
        &self,
        wave: &[usize],
        may_back_off: bool,
        mut meanwhile: Option<impl FnOnce()>,
    ) {
        let work = &self.work;
        let target = |i: &usize| work.targets.get(*i);
        let usual = |i: &usize| target(i).and_then(|t| t.usual);
        let due: Vec<usize> = wave
            .iter()
            .filter(|i| target(i).is_some_and(Target::is_due))
            .copied()
            .collect();
        let longest = due.iter().filter_map(usual).max().unwrap_or_default();
        let mut members: Vec<(usize, Duration)> = due
            .iter()
            // It may take half as long again. What is not known may take long and begins at once.
            .map(|i| (*i, usual(i).map_or(Duration::MAX, |t| t + t / 2)))
            .collect();
        members.sort_by_key(|(_, lead)| std::cmp::Reverse(*lead));
        let (count, begin) = (members.len(), Instant::now());
        let shared = Arc::clone(work);
        let ended = (Mutex::new(0), Condvar::new());
        let run_one = move |n: usize| {
            let Some((index, lead)) = members.get(n).copied() else {
                return;
            };
            shared.wait_turn(begin + longest.saturating_sub(lead), n, &ended);
            if let Some(target) = shared.targets.get(index) {
                shared.freeze_one(index, target);
            }
            let mut count = lock(&ended.0);
            *count += 1;
            // Nobody waits for the last one.
            if *count < members.len() {
                ended.1.notify_all();
            }
        };
        // Nobody else is to be thawed or left alone should it be called off.
        let is_alone = work.targets.len() == 1;
        if is_alone {
            // To wake another, and to be woken, takes longer than to look when it is done.
            run_one(0);
            if let Some(meanwhile) = meanwhile.take() {
                meanwhile();
            }
        } else if count > 0 {
            let step = Arc::new(run_one);
            let mut may_back_off = may_back_off;
            let mut left = vec![false; work.targets.len()];
            self.pool.run_watched(count, step, || {
                if let Some(meanwhile) = meanwhile.take() {
                    // On a single processor they would begin later: the caller goes before them.
                    thread::sleep(MOMENT);
                    meanwhile();
                }
                let next = self.call_off_stuck();
                let next = self.leave_alone(&mut left).or(next);
                if !may_back_off {
                    return next;
                }
                let at = work.patience_ends(begin, longest);
                may_back_off = Instant::now() < at;
                if !may_back_off {
                    self.back_off();
                }
                Some(next.map_or(at, |next| next.min(at)))
            });
        }
    }

    /// Calls off what has been freezing for too long, where the door can: whoever is inside of it comes back
    /// at once then, and what becomes of it is undone. Not below what is known to stand on it and frozen: the thaw
    /// of that would have to wait for it. Says when to look again.
    fn call_off_stuck(&self) -> Option<Instant> {
        let work = &self.work;
        if !work.door.can_call_off() {
            return None;
        }
        let (now, limit) = (Instant::now(), work.limits.give_up);
        let mut next = now + limit;
        for (index, target) in work.targets.iter().enumerate() {
            let State::Freezing { since } = *target.state() else {
                continue;
            };
            if since + limit > now {
                next = next.min(since + limit);
                continue;
            }
            let mut others = work.targets.iter();
            let holds = |it: &Target| it.is_ours() || it.is_thawing();
            let is_below = others.any(|it| holds(it) && it.stands_on(target.dev));
            if is_below || !target.give_up() {
                continue;
            }
            let shared = Arc::clone(work);
            // Should it be frozen by now, its thaw may hang, and so may that of one before.
            self.aside.leave_what_hangs();
            self.aside.run_within(LOOK_TIME, move || {
                if let Some(target) = shared.targets.get(index) {
                    // Whether it was is seen by whoever is inside.
                    let _ = shared.door.call_off(target.as_fd());
                }
            });
        }
        Some(next)
    }

    /// Where others can thaw what is frozen, whoever minds it does when it is called off, and goes on as long as one
    /// hangs. What is not frozen by then will not be, and must not be thawed under somebody who freezes it
    /// meanwhile. Says when to look again.
    fn leave_alone(&self, left: &mut [bool]) -> Option<Instant> {
        let work = &self.work;
        work.door.watched_every()?;
        if work.abort.load(Ordering::SeqCst) {
            let each = work.targets.iter().zip(left).enumerate();
            for (index, (target, left)) in each.filter(|(_, (_, left))| !**left) {
                *left = !target.may_be_frozen();
                if *left {
                    work.leave(index);
                }
            }
        }
        self.leave_again();
        Some(Instant::now() + ABORT_TICK)
    }

    /// Leaves those alone of which that was not heard.
    fn leave_again(&self) {
        let is_unheard = |it: &Target| it.unheard.load(Ordering::SeqCst) && !it.may_be_frozen();
        for index in self.work.which(is_unheard) {
            self.work.leave(index);
        }
    }

    /// Lets those go on that stand still only because others take long to freeze: not those that stand on
    /// one of these. A thaw writes, and that would wait until the other is thawed again.
    fn back_off(&self) {
        let work = &self.work;
        let slow = work.which(Target::is_freezing);
        let slow: Vec<&Target> = slow.iter().filter_map(|i| work.targets.get(*i)).collect();
        let may_go =
            |t: &&Target| t.is_ours() && !slow.iter().any(|it| t.may_stand_on(it.dev, it.wave));
        let free = self.stages(|target| may_go(&target));
        if slow.is_empty() || free.ends.is_empty() {
            return;
        }
        // From here on no other freeze of this wave begins.
        lock(&work.obstacles).push(Obstacle::Slow);
        // The others are at the freeze.
        self.take_back_all(&self.aside, free);
        let names: Vec<&str> = slow.iter().map(|t| t.name.as_str()).collect();
        let names = names.join(", ");
        work.log.info(format!(
            "{names} takes long to freeze: the others go on until then"
        ));
    }

    /// Looks whether all that is frozen still is; names what is not. Only for a door where others can
    /// thaw it: what they have thawed is frozen again and found out, but has been written meanwhile.
    ///
    /// A look may hang, behind somebody who syncs a disk that does, and whoever asks has a THAW to hear. What
    /// it finds is told later then.
    pub fn look_after(&self) -> Vec<String> {
        self.end_freezes();
        let work = Arc::clone(&self.work);
        self.aside
            .run_within(LOOK_TIME, move || work.look_after_all());
        std::mem::take(&mut *lock(&self.work.lost))
    }

    /// What is to be done to these, the last wave first.
    fn stages(&self, pick: impl Fn(&Target) -> bool) -> Stages {
        let mut stages = Stages::default();
        for wave in self.waves.iter().rev() {
            let targets = wave.iter().copied();
            stages.add(targets.filter(|i| self.work.targets.get(*i).is_some_and(&pick)));
        }
        stages
    }

    /// Thaws these, that will be frozen again. One that hangs fails the freeze: by the next one it is known.
    fn take_back_all(&self, pool: &Pool, stages: Stages) {
        let work = &self.work;
        if self.run_stages(pool, stages, None, Work::take_back) {
            return;
        }
        if let Some(target) = work.targets.iter().find(|it| it.is_thawing()) {
            let name = target.name.clone();
            work.fail(FreezeError::Hung { name });
        }
    }

    /// Does that. One that hangs holds up the others for a moment only, and is left to itself in the end, `by` then
    /// at the latest. Whether none was.
    fn run_stages(
        &self,
        pool: &Pool,
        stages: Stages,
        by: Option<Instant>,
        step: fn(&Work, &Target),
    ) -> bool {
        let Stages { members, ends } = stages;
        let work = Arc::clone(&self.work);
        let run_one = move |n: usize| {
            let target = members.get(n).and_then(|index| work.targets.get(*index));
            target.into_iter().for_each(|it| step(&work, it));
        };
        // Those before the last stage may take their time first.
        let earlier = THAW_TIME
            * u32::try_from(ends.len())
                .unwrap_or(u32::MAX)
                .saturating_sub(1);
        let left = by.map(|by| by.saturating_duration_since(Instant::now() + earlier));
        let give_up = self.work.limits.give_up;
        let limit = left.map_or(give_up, |left| left.min(give_up));
        pool.run_in_stages(&ends, THAW_TIME, limit, Arc::new(run_one))
    }

    /// Thaws what this session froze, the last wave first. Everything is tried, whatever fails, and a thaw
    /// that hangs holds up the others for a moment only. It is left in the kernel's hands in the end
    /// ([`Session::in_thaw`]): what such a disk has is from before, so that it is no loss where all of it was
    /// frozen until then.
    pub fn thaw(&self) -> Result<(), ThawError> {
        self.thaw_by(None)
    }

    /// The same, where what hangs is left in the kernel's hands by then.
    pub fn thaw_by(&self, by: Option<Instant>) -> Result<(), ThawError> {
        // Whoever minds what is frozen may be at it, and must not thaw what others freeze while one of ours hangs.
        self.end_freezes();
        let strict = self.work.limits.strict;
        let watched = self.work.door.watched_every().is_some();
        let is_foreign = |target: &Target| *target.state() == State::Foreign;
        let mut stages = Stages::default();
        stages.add(self.work.which(is_foreign).into_iter());
        let ours = self.stages(|target| !is_foreign(target));
        stages.then(ours);
        self.run_stages(&self.pool, stages, by, Work::ask_and_thaw);
        if let Some(failure) = lock(&self.work.thaw_failure).take() {
            return Err(failure);
        }
        let names = std::mem::take(&mut *lock(&self.work.early));
        if !names.is_empty() {
            return Err(ThawError::Early { names });
        }
        // Where others can thaw, the call itself would have said whether they had.
        let may_be_lost = |it: &Target| {
            let has_not_ended = it.is_thawing() || it.unasked.load(Ordering::SeqCst);
            has_not_ended && (strict || (watched && !it.is_as_it_was()))
        };
        match self.names(may_be_lost) {
            names if names.is_empty() => Ok(()),
            names => Err(ThawError::Hung { names }),
        }
    }

    /// Names what is frozen, by whomever.
    pub fn frozen(&self) -> Vec<String> {
        self.names(|it| it.is_ours() || *it.state() == State::Foreign)
    }

    /// Names what hangs in its thaw.
    pub fn in_thaw(&self) -> Vec<String> {
        self.names(Target::is_thawing)
    }

    fn names(&self, pick: impl Fn(&Target) -> bool) -> Vec<String> {
        let targets = self.work.targets.iter().filter(|it| pick(it));
        targets.map(|it| it.name.clone()).collect()
    }

    /// Closes all descriptors but those of what hangs, each elsewhere: the last one that is closed on what was
    /// unmounted meanwhile unmounts it in fact, and waits for its disk. Whoever does that has no other one, and
    /// is waited for a moment only.
    fn close_elsewhere(&self) {
        let until = Instant::now() + LOOK_TIME;
        for target in &self.work.targets {
            let turn = target.turn.take_within(Duration::ZERO);
            if turn.is_none() || target.is_freezing() || target.is_thawing() {
                continue;
            }
            let (go_on, word) = channel::<()>();
            let (tell, told) = channel();
            let close = move |fds| {
                // Nothing is ever said there; it closes.
                let _ = word.recv();
                drop(fds);
            };
            // Nobody listens any more when it took too long.
            let tell = move |()| {
                let _ = tell.send(());
            };
            // Without a thread for it, it is closed here.
            if self
                .apart
                .hand_over(&[target.as_fd()], close, tell)
                .is_err()
            {
                continue;
            }
            // Where that cannot be, it is closed when whoever hangs in another one comes back.
            let _ = sys::replace_by_nothing(target.as_fd());
            drop(go_on);
            let left = until.saturating_duration_since(Instant::now());
            let _ = told.recv_timeout(left);
        }
    }

    /// Gives up what is needed only as long as anything is frozen. It takes a while, which nobody need
    /// wait for. As long as somebody is inside of a freeze, that may come about, and this process may have died by
    /// then: so long all is minded as before.
    pub fn disarm(&self) {
        let work = Arc::clone(&self.work);
        work.over.store(true, Ordering::SeqCst);
        let is_inside = |work: &Work| work.targets.iter().any(Target::is_inside_a_freeze);
        if !is_inside(&work) {
            return work.door.disarm(&work.targets);
        }
        let log = work.log.clone();
        let wait = move || {
            while is_inside(&work) {
                thread::sleep(ABORT_TICK);
            }
            work.door.disarm(&work.targets);
        };
        let builder = Builder::new().name("inside".into());
        if let Err(error) = builder.stack_size(STACK_BYTES).spawn(wait) {
            log.error(format!(
                "nothing more can be frozen: the end of a freeze that hangs is not waited for: {error}"
            ));
        }
    }
}

/// Targets, by number, and how many of them each stage ends with.
#[derive(Default)]
struct Stages {
    members: Vec<usize>,
    ends: Vec<usize>,
}

impl Stages {
    /// These are one more, unless there are none.
    fn add(&mut self, members: impl Iterator<Item = usize>) {
        let before = self.members.len();
        self.members.extend(members);
        if self.members.len() > before {
            self.ends.push(self.members.len());
        }
    }

    /// And these follow.
    fn then(&mut self, other: Stages) {
        let before = self.members.len();
        self.members.extend(other.members);
        self.ends.extend(other.ends.iter().map(|end| before + end));
    }
}

/// Moves what stands on nothing and has nothing on it to the last wave but one; in the last is the root. One
/// that is slow holds up only those that are frozen before it.
fn delay_the_lone(targets: &mut [Target]) {
    let last = targets.iter().map(|t| t.wave).max().unwrap_or(0);
    let known = targets.iter().filter_map(|t| t.stands_on.as_ref());
    let below: BTreeSet<DevId> = known.flatten().copied().collect();
    let is_lone = |t: &&mut Target| {
        t.stands_on.as_ref().is_some_and(BTreeSet::is_empty) && !below.contains(&t.dev)
    };
    for target in targets.iter_mut().filter(is_lone) {
        if target.wave < last {
            target.wave = last - 1;
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.work.targets.iter().any(Target::is_ours) {
            // Nobody is left to hear of a failure; it is in the log.
            let _ = self.thaw();
        }
        self.close_elsewhere();
    }
}

#[cfg(test)]
mod tests;
