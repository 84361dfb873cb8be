// SPDX-License-Identifier: GPL-2.0-only

//! Freezes the planned file systems and thaws exactly those that it froze.
//!
//! A [`Session`] owns the descriptors that were opened before the first freeze. The thaw goes through
//! the same descriptors, so renames and unmounts in between lose nothing. Dropping a session thaws what
//! is still frozen.
//!
//! All is tried wave after wave; what gets in the way is dealt with while nothing is frozen, and then
//! it is tried again ([`Obstacle`]): nobody stands still because of another's trouble. It decides no
//! order (that is [`crate::plan`]), does not know what is behind the [`Door`], and knows no host.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::apart::Apart;
use crate::door::{Door, DoorError};
use crate::ground::Watched;
use crate::logbook::Logbook;
use crate::mounts::DevId;
use crate::pool::Pool;
use crate::progress::{Progress, Stage};
use crate::sys;
use crate::writes::Writes;

/// How often one that waits for its turn looks whether all is off.
const ABORT_TICK: Duration = Duration::from_millis(20);
/// How often it is looked whether it still is.
const BUSY_TICK: Duration = Duration::from_millis(20);
/// How long the thaw of a wave may hold up that of the next.
const THAW_TIME: Duration = Duration::from_millis(500);
/// How long what may be stuck in a freeze or a thaw of somebody who has just ended may take to come back.
const STUCK_TIME: Duration = Duration::from_secs(1);
/// How long a look whether all is still frozen is waited for.
const LOOK_TIME: Duration = Duration::from_millis(200);
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
    /// One would have been left out or only synced, and the configuration is strict.
    #[error("{name} {why}, and the configuration is strict")]
    Strict {
        /// Which.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// Something below what is to be frozen goes on, and the configuration is strict.
    #[error("data is moved from disk to disk, and the configuration is strict: {}", .layers.join(", "))]
    Moving {
        /// What does.
        layers: Vec<String>,
    },
    /// There is nothing to freeze, and the configuration is strict.
    #[error("there is nothing to freeze, and the configuration is strict")]
    Nothing,
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
    /// Something that no freeze holds has written, and the configuration is strict.
    #[error("written to while all on it was frozen, and the configuration is strict: {}", .nodes.join(", "))]
    Written {
        /// To which disks.
        nodes: Vec<String>,
    },
    /// Something below what was frozen has begun, and the configuration is strict.
    #[error("data was moved from disk to disk, and the configuration is strict: {}", .layers.join(", "))]
    Moving {
        /// What did.
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
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

/// From now on it is thawed.
fn thawed(since: Instant, took: Duration) -> State {
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
    /// When it was about to be frozen.
    pub since: Option<Instant>,
    /// How long that took.
    pub took: Option<Duration>,
    /// When it was thawed.
    pub until: Option<Instant>,
}

/// What a file system, open, is at that its freeze would wait for, and all its writers with it, in words.
pub type Busy = Box<dyn Fn(BorrowedFd<'_>) -> Option<String> + Send + Sync>;

/// A number that changes as long as what a file system is on gets on with what is written to it; `None` where
/// nobody can tell.
pub type WrittenBack = Box<dyn Fn() -> Option<u64> + Send + Sync>;

/// One file system to freeze.
pub struct Target {
    /// Its superblock.
    pub dev: DevId,
    /// For people.
    pub name: String,
    /// Its wave in the plan, from 0.
    pub wave: usize,
    /// The disks that it is on, perhaps with others.
    disks: Vec<DevId>,
    /// Those and all devices in between; `None` where it may have a part of any other.
    below: Option<BTreeSet<DevId>>,
    /// The file systems that hold what it is on; `None` where that may be any.
    stands_on: Option<BTreeSet<DevId>>,
    /// How long its freeze took the last time.
    usual: Option<Duration>,
    /// Tells what it is at that a freeze would wait for, if it is of a kind that may be.
    busy: Option<Busy>,
    /// Tells one that is slow from one that hangs.
    written_back: Option<WrittenBack>,
    fd: OwnedFd,
    /// What was written to its devices, where that tells whether it was frozen all the time.
    writes: Writes,
    /// That, when it was frozen; `None` when nobody could tell.
    written: Mutex<Option<u64>>,
    state: Mutex<State>,
    /// Its freeze has taken for too long and was called off.
    given_up: AtomicBool,
    /// Held by whoever thaws it or looks after it, so that none is taken for the other.
    turn: Mutex<()>,
}

impl Target {
    /// A file system that is open as `fd`.
    pub fn new(dev: DevId, name: String, wave: usize, fd: OwnedFd) -> Self {
        Target {
            dev,
            name,
            wave,
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
            given_up: AtomicBool::new(false),
            turn: Mutex::new(()),
        }
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

    /// As long as this changes, its disk does not hang.
    pub fn written_back(self, written_back: WrittenBack) -> Self {
        let written_back = Some(written_back);
        Target {
            written_back,
            ..self
        }
    }

    /// Whether it may be written only while `other` is.
    fn may_stand_on(&self, other: &Target) -> bool {
        match &self.stands_on {
            Some(known) => known.contains(&other.dev),
            None => self.wave < other.wave,
        }
    }

    /// From its freeze to its thaw nothing may be written there.
    pub fn with_writes(self, writes: Writes) -> Self {
        Target { writes, ..self }
    }

    /// It is frozen, by this session or by somebody else.
    fn set_frozen(&self, state: State) {
        *lock(&self.written) = self.writes.sectors();
        *self.state() = state;
    }

    /// Whether anything was written since then: somebody has thawed it for a while. A disk that has gone
    /// does not tell.
    fn was_written(&self) -> bool {
        let both = lock(&self.written).zip(self.writes.sectors());
        both.is_some_and(|(then, now)| now != then)
    }

    /// Whether it is known that nothing was.
    fn is_as_it_was(&self) -> bool {
        let both = lock(&self.written).zip(self.writes.sectors());
        let is_counted = || self.written_back.as_ref().is_some_and(|it| it().is_some());
        both.is_some_and(|(then, now)| now == then) && is_counted()
    }

    /// Whether this session froze it and has not thawed it yet.
    pub fn is_ours(&self) -> bool {
        matches!(*self.state(), State::Ours { .. })
    }

    /// If it is ours its thaw begins: when its freeze began and how long that took.
    fn begin_thaw(&self) -> Option<(Instant, Duration)> {
        let mut state = self.state();
        let State::Ours { since, took } = *state else {
            return None;
        };
        *state = State::Thawing { since, took };
        Some((since, took))
    }

    /// Whether its thaw, under way on another thread, has not come back.
    fn is_thawing(&self) -> bool {
        matches!(*self.state(), State::Thawing { .. })
    }

    fn is_freezing(&self) -> bool {
        matches!(*self.state(), State::Freezing { .. })
    }

    /// Its freeze has come to this, unless it was given up on before.
    fn end_freezing(&self, state: State) -> bool {
        let mut now = self.state();
        let is_wanted = !self.given_up.load(Ordering::SeqCst);
        if is_wanted {
            *now = state;
        }
        is_wanted
    }

    /// Gives up on its freeze, once, if that has not ended before: what is frozen by now is not to be thawed
    /// under whoever counts on it.
    fn give_up(&self) -> bool {
        let now = self.state();
        matches!(*now, State::Freezing { .. }) && !self.given_up.swap(true, Ordering::SeqCst)
    }

    /// Whether it is to be frozen and is not.
    fn is_due(&self) -> bool {
        matches!(*self.state(), State::Open | State::Thawed { .. })
    }

    fn account(&self) -> Stay {
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
        Stay {
            name: self.name.clone(),
            how,
            since,
            took,
            until,
        }
    }

    /// How long its freeze took, if this session froze it.
    fn took(&self) -> Option<Duration> {
        match *self.state() {
            State::Ours { took, .. } | State::Thawing { took, .. } | State::Thawed { took, .. } => {
                Some(took)
            }
            _ => None,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // It holds a plain value, whole at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Target {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
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
    /// How many are written back at a time, before the freeze.
    pub write_back: usize,
    /// How long the sync of one that cannot freeze may take.
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

/// What one freeze leaves for the next to know.
#[derive(Default)]
pub struct Learnt {
    /// How long the freeze of each file system took.
    usual: BTreeMap<DevId, Duration>,
    /// What has no means to freeze.
    unfreezable: BTreeSet<DevId>,
    /// Whose sync has not returned, as long as its thread is there.
    hung: Vec<Hung>,
    /// Whose freeze was called off, and may not have come back.
    called_off: BTreeSet<DevId>,
    /// Whose thaw has not come back, as long as its thread is there.
    in_thaw: Vec<(Weak<Work>, usize)>,
    /// Whether it is known of all: an earlier process, or the module, may have left any in a freeze or a thaw.
    has_asked: bool,
}

/// One whose sync has not returned.
struct Hung {
    dev: DevId,
    thread: Weak<()>,
    quiet: Quiet,
}

/// For how long nothing has come of the sync of one.
#[derive(Clone, Copy)]
struct Quiet {
    /// By [`WrittenBack`].
    done: Option<u64>,
    since: Instant,
}

impl Quiet {
    fn begin() -> Self {
        Quiet {
            done: None,
            since: Instant::now(),
        }
    }

    /// Looks again. Where nobody can tell it is never quiet.
    fn lasts(&mut self, target: &Target) -> Duration {
        let done = target.written_back.as_ref().and_then(|it| it());
        if done.is_none() || done != self.done {
            let since = Instant::now();
            *self = Quiet { done, since };
        }
        self.since.elapsed()
    }
}

impl Learnt {
    /// Whether it had no means to freeze the last time.
    pub fn is_unfreezable(&self, dev: DevId) -> bool {
        self.unfreezable.contains(&dev)
    }

    /// The module may have undone something by itself, and be stuck in that.
    pub fn ask_all(&mut self) {
        self.has_asked = false;
    }

    /// Whether its thaw has not come back.
    fn hangs_in_thaw(&self, dev: DevId) -> bool {
        self.in_thaw.iter().any(|(work, index)| {
            let work = work.upgrade();
            let target = work.as_ref().and_then(|it| it.targets.get(*index));
            target.is_some_and(|it| it.dev == dev && it.is_thawing())
        })
    }

    fn hangs(&self, dev: DevId) -> bool {
        let mut hung = self.hung.iter();
        hung.any(|it| it.dev == dev && it.thread.strong_count() > 0)
    }

    /// Whether the sync of one that can freeze has not returned, with nothing written for so long: as the disk
    /// of a slow one is not.
    fn has_hung_for(&mut self, target: &Target, limit: Duration) -> bool {
        let mut hung = self.hung.iter_mut();
        let hung = hung.find(|it| it.dev == target.dev && it.thread.strong_count() > 0);
        hung.is_some_and(|it| it.quiet.lasts(target) >= limit)
    }

    /// One has not returned: its own, or an earlier one that it waits for.
    fn left_behind(&mut self, it: Syncing<'_>) {
        let Syncing {
            target,
            thread,
            quiet,
            ..
        } = it;
        let dev = target.dev;
        match thread {
            Some(thread) => self.hung.push(Hung { dev, thread, quiet }),
            None => {
                let earlier = self.hung.iter_mut().filter(|it| it.dev == dev);
                earlier.for_each(|it| it.quiet = quiet);
            }
        }
    }
}

/// What gets in the way of a freeze and is dealt with while nothing is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Obstacle {
    /// Somebody else has frozen it: that may be over soon.
    Busy(usize),
    /// It cannot freeze and is to be synced.
    Unfreezable(usize),
    /// It takes so long that the others were thawed again.
    Slow,
}

/// How the freeze has gone so far, for the one who looks on.
struct Pace {
    /// When the last one was frozen.
    last: Instant,
    /// How long any took.
    longest: Duration,
}

/// What the workers share.
struct Work {
    targets: Vec<Target>,
    door: Arc<dyn Door>,
    log: Logbook,
    limits: Limits,
    abort: Arc<AtomicBool>,
    progress: Arc<Progress>,
    armed: Mutex<Instant>,
    pace: Mutex<Pace>,
    obstacles: Mutex<Vec<Obstacle>>,
    /// From then on what is busy is taken for frozen by somebody else.
    busy_until: Mutex<Option<Instant>>,
    failure: Mutex<Option<FreezeError>>,
    /// What had no room, on its disk or in the module.
    no_room: Mutex<Option<String>>,
    /// What was found not to be frozen any more, and has not been told yet.
    lost: Mutex<Vec<String>>,
    early: Mutex<Vec<String>>,
    thaw_failure: Mutex<Option<ThawError>>,
}

/// The freeze of one backup, from open descriptors to thaw.
pub struct Session {
    work: Arc<Work>,
    waves: Vec<Vec<usize>>,
    pool: Arc<Pool>,
    aside: Arc<Pool>,
    apart: Arc<Apart>,
    /// Dropped when all else is.
    closed_last: Vec<Sender<()>>,
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
            closed_last: Vec::new(),
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
                no_room: Mutex::new(None),
                lost: Mutex::new(Vec::new()),
                early: Mutex::new(Vec::new()),
                thaw_failure: Mutex::new(None),
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
        self.work.door.settle(&self.work.targets);
    }

    /// Adds to what is known, whatever came of the freeze.
    pub fn learn(&self, learnt: &mut Learnt) {
        learnt.hung.retain(|it| it.thread.strong_count() > 0);
        learnt.in_thaw.retain(|(work, _)| work.strong_count() > 0);
        let in_thaw = self.work.which(Target::is_thawing).into_iter();
        let in_thaw = in_thaw.map(|index| (Arc::downgrade(&self.work), index));
        learnt.in_thaw.extend(in_thaw);
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
                learnt.called_off.insert(target.dev);
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

    /// Writes back what is dirty while everybody can still write, so that the freeze itself has
    /// little left to flush. Waves keep their order: what a loop device writes lands in the file
    /// system below it.
    ///
    /// Few at a time, and of those on one disk one at a time: a journal is written behind the data of
    /// its file system, so a writer that needs the journal waits until the device has taken that, which
    /// is the longer the more share the processor or the disk. What is known not to freeze is left to
    /// [`Session::freeze`].
    ///
    /// A disk may be slow, and is waited for. One that hangs, with nothing written to it for as long as one may
    /// take, is waited for no longer, and by nobody. What has not returned, then or when it is called off, is
    /// left behind, and nobody begins it anew before it has.
    pub fn sync(&self, learnt: &mut Learnt) {
        self.leave_out_hung(learnt);
        let most = self.work.limits.write_back;
        self.work.progress.enter(Stage::Syncing, most);
        for wave in &self.waves {
            let known = |i: &&usize| {
                let target = self.work.targets.get(**i);
                target.is_some_and(|t| learnt.unfreezable.contains(&t.dev) || !t.is_due())
            };
            let wave: Vec<usize> = wave.iter().filter(|i| !known(i)).copied().collect();
            self.sync_lanes(self.lanes(&wave), most.max(1), learnt);
        }
    }

    /// So many lanes at a time, each from its first member to its last.
    fn sync_lanes(&self, lanes: Vec<Vec<usize>>, most: usize, learnt: &mut Learnt) {
        let work = &self.work;
        let (tell, told) = channel();
        let mut waiting: VecDeque<_> = lanes.into_iter().map(VecDeque::from).collect();
        let mut under_way: Vec<Syncing<'_>> = Vec::new();
        let mut looked = Instant::now();
        while !work.abort.load(Ordering::SeqCst) {
            while under_way.len() < most {
                let Some(mut lane) = waiting.pop_front() else {
                    break;
                };
                let index = lane.pop_front();
                let target = index.and_then(|index| work.targets.get(index));
                if let Some((index, target)) = index.zip(target) {
                    let since = Instant::now();
                    work.progress.begin(&target.name, since);
                    let earlier = learnt.hung.iter().find(|it| it.dev == target.dev);
                    under_way.push(Syncing {
                        index,
                        target,
                        since,
                        // What is known to hang is not waited for again.
                        quiet: earlier.map_or_else(Quiet::begin, |it| it.quiet),
                        has_hung: false,
                        thread: None,
                        rest: lane,
                    });
                }
            }
            if under_way.is_empty() {
                return;
            }
            let due = under_way.iter_mut().filter(|it| it.thread.is_none());
            for it in due.filter(|it| !learnt.hangs(it.target.dev)) {
                it.quiet = Quiet::begin();
                it.thread = Some(self.begin_sync(it.index, it.target, &tell));
            }
            if let Ok((index, result)) = told.recv_timeout(ABORT_TICK) {
                if let Some(at) = under_way.iter().position(|it| it.index == index) {
                    let ended = under_way.swap_remove(at);
                    work.note_sync(ended.target, ended.since, result);
                    waiting.push_front(ended.rest);
                }
            }
            if looked.elapsed() < ABORT_TICK {
                continue;
            }
            looked = Instant::now();
            let limit = work.limits.give_up;
            for it in &mut under_way {
                it.has_hung = it.quiet.lasts(it.target) >= limit;
            }
            let (hung, others): (Vec<_>, Vec<_>) =
                under_way.into_iter().partition(|it| it.has_hung);
            under_way = others;
            for mut it in hung {
                work.progress.end(&it.target.name);
                // They may well hang as it does, all at the same time then.
                let rest = std::mem::take(&mut it.rest);
                let alone = rest.into_iter().map(|index| VecDeque::from([index]));
                waiting.extend(alone);
                learnt.left_behind(it);
            }
        }
        for it in under_way {
            learnt.left_behind(it);
        }
    }

    /// Begins to sync one on a thread that tells when it is done, with `index`.
    fn begin_sync(&self, index: usize, target: &Target, tell: &Sender<Synced>) -> Weak<()> {
        self.sync_apart(index, target, tell).unwrap_or_else(|_| {
            // No memory for a thread, or a kernel without the call: then here, at the risk that it hangs.
            let result = self.work.door.syncer()(target.as_fd());
            // It is heard below.
            let _ = tell.send((index, result));
            Weak::new()
        })
    }

    /// The same where there is such a thread.
    fn sync_apart(
        &self,
        index: usize,
        target: &Target,
        tell: &Sender<Synced>,
    ) -> io::Result<Weak<()>> {
        let (sync, tell) = (self.work.door.syncer(), tell.clone());
        self.apart.hand_over(&[target.as_fd()], move |fds| {
            for fd in fds {
                // Nobody is left to hear of it when it took too long.
                let _ = tell.send((index, sync(fd.as_fd())));
            }
        })
    }

    /// Divides these so that no two groups have a disk in common.
    fn lanes(&self, wave: &[usize]) -> Vec<Vec<usize>> {
        let mut lanes: Vec<(Vec<usize>, Vec<DevId>)> = Vec::new();
        for index in wave {
            let Some(target) = self.work.targets.get(*index) else {
                continue;
            };
            let shares =
                |(_, disks): &(_, Vec<DevId>)| target.disks.iter().any(|d| disks.contains(d));
            let (joined, apart): (Vec<_>, Vec<_>) = lanes.into_iter().partition(shares);
            lanes = apart;
            let (mut members, mut disks) = (Vec::new(), target.disks.clone());
            for (theirs, on) in joined {
                members.extend(theirs);
                disks.extend(on);
            }
            members.push(*index);
            lanes.push((members, disks));
        }
        lanes.into_iter().map(|(members, _)| members).collect()
    }

    /// Freezes wave after wave. On any failure everything is thawed before it returns.
    pub fn freeze(&self, learnt: &mut Learnt) -> Result<Summary, FreezeError> {
        let result = self.freeze_or_not(learnt);
        self.learn(learnt);
        if result.is_err() {
            learnt.ask_all();
        }
        result
    }

    fn freeze_or_not(&self, learnt: &mut Learnt) -> Result<Summary, FreezeError> {
        let work = &self.work;
        let known = |t: &Target| learnt.unfreezable.contains(&t.dev);
        let known: Vec<usize> = work.which(known);
        self.leave_out_hung(learnt);
        self.sync_unfreezable(&known, learnt);
        work.progress.enter(Stage::Freezing, work.targets.len());
        *lock(&work.armed) = Instant::now();
        work.door.arm(&work.targets)?;
        // Nor is a thaw of what hangs to be tried.
        for index in work.which(|it| *it.state() == State::Broken) {
            work.door.leave(index);
        }
        let frozen = self.freeze_armed(&known, learnt);
        if frozen.is_err() {
            // What went wrong with the thaw is logged; the freeze's own failure is the news.
            let _ = self.thaw();
            self.disarm();
        }
        frozen
    }

    fn freeze_armed(&self, known: &[usize], learnt: &mut Learnt) -> Result<Summary, FreezeError> {
        let work = &self.work;
        self.ask_again(known);
        for attempt in 0.. {
            self.leave_out_busy();
            *lock(&work.pace) = Pace {
                last: Instant::now(),
                longest: Duration::ZERO,
            };
            for wave in &self.waves {
                self.freeze_wave(wave, attempt < BACK_OFFS);
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
        if work.gave_up() {
            let failure = lock(&work.failure).take();
            return Err(failure.unwrap_or(FreezeError::Aborted));
        }
        let summary = self.summary();
        match lock(&work.no_room).take() {
            Some(name) if summary.ours == 0 => Err(FreezeError::Failed {
                name,
                source: Errno::ENOSPC.into(),
            }),
            _ => Ok(summary),
        }
    }

    /// Leaves out what hangs and would so in its freeze, with what stands on that.
    fn leave_out_hung(&self, learnt: &mut Learnt) {
        let (work, limit) = (&self.work, self.work.limits.give_up);
        let asks_all = !std::mem::replace(&mut learnt.has_asked, true);
        let until = Instant::now() + STUCK_TIME;
        let mut hung: Vec<&Target> = Vec::new();
        for target in &work.targets {
            let dev = &target.dev;
            let is_known = learnt.called_off.contains(dev);
            let is_stuck = || work.door.is_stuck(target.as_fd());
            let mut was_left = (asks_all || is_known) && is_stuck();
            while was_left && !is_known && Instant::now() < until {
                // Whoever held it may have ended in this very moment, and most come back in the next.
                thread::sleep(BUSY_TICK);
                was_left = is_stuck();
            }
            match was_left {
                true => learnt.called_off.insert(*dev),
                false => learnt.called_off.remove(dev),
            };
            let why = if learnt.unfreezable.contains(dev) {
                // It is known not to freeze, and left out when it is to be synced.
                hung.extend(learnt.hangs(*dev).then_some(target));
                continue;
            } else if was_left || learnt.hangs_in_thaw(*dev) {
                "hangs: an earlier freeze or thaw of it has not come back".into()
            } else if learnt.has_hung_for(target, limit) {
                let limit = limit.as_secs();
                format!("hangs: in {limit} s nothing of it was written back (give_up)")
            } else {
                continue;
            };
            hung.push(target);
            if target.is_due() {
                work.give_up_on(target, State::Broken, why);
            }
        }
        for target in work.targets.iter().filter(|it| it.is_due()) {
            let mut below = hung.iter().filter(|it| it.dev != target.dev);
            if let Some(below) = below.find(|it| target.may_stand_on(it)) {
                let why = format!("may stand on {}, which hangs", below.name);
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

    /// Whether something that may be on that device is not frozen although it was to be, other than these.
    pub fn goes_on_on(&self, device: &Watched, but: &BTreeSet<DevId>) -> bool {
        let targets = self.work.targets.iter();
        let mut targets = targets.filter(|it| !but.contains(&it.dev));
        targets.any(|target| {
            let is_frozen = matches!(*target.state(), State::Ours { .. } | State::Foreign);
            let below = target.below.as_ref();
            !is_frozen && below.is_none_or(|below| device.counts(below))
        })
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
        let targets = known.iter().filter_map(|i| self.work.targets.get(*i));
        for target in targets.filter(|t| *t.state() == State::Synced) {
            if self.work.door.freeze(target.as_fd()).is_ok() {
                *target.state() = State::Ours {
                    since: Instant::now(),
                    took: Duration::ZERO,
                };
                self.work.take_back(target);
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
        for obstacle in obstacles {
            if let Obstacle::Busy(index) = obstacle {
                self.wait_for(*index);
            }
        }
    }

    /// Whether no wave before this one has anything to be frozen.
    fn is_first(&self, number: usize) -> bool {
        let before = self.waves.iter().take(number).flatten();
        let mut before = before.filter_map(|i| self.work.targets.get(*i));
        !before.any(|t| t.is_due() || t.is_ours())
    }

    /// Waits until one is not frozen by somebody else any more, or has been for too long to wait for.
    fn wait_for(&self, index: usize) {
        let work = &self.work;
        let Some(target) = work.targets.get(index) else {
            return;
        };
        let now = Instant::now();
        let until = *lock(&work.busy_until).get_or_insert(now + work.limits.patience);
        while !work.gave_up() {
            let since = Instant::now();
            match work.door.freeze(target.as_fd()) {
                Err(e) if is(&e, Errno::EBUSY) && Instant::now() < until => {
                    thread::sleep(BUSY_TICK);
                }
                Ok(()) => {
                    let took = since.elapsed();
                    target.set_frozen(State::Ours { since, took });
                    let waited = ms(now.elapsed());
                    let name = &target.name;
                    work.log.info(format!(
                        "{name} was frozen by somebody else, it is not after {waited}"
                    ));
                    if !self.is_first(target.wave) {
                        work.take_back(target);
                    }
                    return;
                }
                // The next attempt meets it.
                Err(_) => return,
            }
        }
    }

    /// Syncs what cannot freeze, each on a thread of its own: it may hang, also when all else is frozen.
    /// Nothing is frozen yet.
    fn sync_unfreezable(&self, indices: &[usize], learnt: &mut Learnt) {
        let work = &self.work;
        if work.gave_up() {
            return;
        }
        let (tell, told) = channel();
        let mut waited_for: Vec<(usize, &Target, Weak<()>)> = Vec::new();
        for index in indices {
            let index = *index;
            let Some(target) = work.targets.get(index) else {
                continue;
            };
            if work.limits.strict {
                work.give_up_on(target, State::Unsynced, "has no means to freeze".into());
                continue;
            }
            if learnt.hangs(target.dev) {
                let why = "cannot freeze, and its last sync has not returned";
                work.give_up_on(target, State::Unsynced, why.into());
                continue;
            }
            match self.sync_apart(index, target, &tell) {
                Ok(thread) => waited_for.push((index, target, thread)),
                Err(e) => {
                    let why = format!("cannot freeze, and there is no thread to sync it: {e}");
                    work.give_up_on(target, State::Unsynced, why);
                }
            }
        }
        let until = Instant::now() + work.limits.give_up;
        while !waited_for.is_empty() && !work.abort.load(Ordering::SeqCst) {
            let left = until.saturating_duration_since(Instant::now());
            let Ok((index, result)) = told.recv_timeout(left.min(ABORT_TICK)) else {
                if left.is_zero() {
                    break;
                }
                continue;
            };
            waited_for.retain(|(it, ..)| *it != index);
            let Some(target) = work.targets.get(index) else {
                continue;
            };
            match result {
                Ok(()) => {
                    *target.state() = State::Synced;
                    let name = &target.name;
                    work.log.warning(format!(
                        "{name} has no means to freeze: synced instead, writes to it go on"
                    ));
                }
                Err(e) => {
                    let why = format!("cannot freeze and cannot be synced: {e}");
                    work.give_up_on(target, State::Unsynced, why);
                }
            }
        }
        for (_, target, thread) in waited_for {
            let limit = work.limits.give_up.as_secs();
            let why = format!("cannot freeze, and its sync takes longer than {limit} s");
            work.give_up_on(target, State::Unsynced, why);
            learnt.hung.push(Hung {
                dev: target.dev,
                thread,
                quiet: Quiet::begin(),
            });
        }
    }

    /// Freezes one wave. What is usually quick begins later than what is slow, so that all end at about
    /// the same time and nobody stands still only because others take longer.
    fn freeze_wave(&self, wave: &[usize], may_back_off: bool) {
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
        let is_alone = work.targets.len() == 1 || !work.door.can_call_off();
        if count == 1 && is_alone && !work.targets.iter().any(Target::is_ours) {
            // Nobody stands still because of it, and nobody could call it off alone.
            run_one(0);
        } else if count > 0 {
            let step = Arc::new(run_one);
            let mut may_back_off = may_back_off;
            self.pool.run_watched(count, step, || {
                let next = self.call_off_stuck();
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
    /// at once then, and what becomes of it is undone. Not below what is frozen: the thaw of that may have to
    /// wait for it. Says when to look again.
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
            let is_below = others.any(|it| holds(it) && it.may_stand_on(target));
            if is_below || !target.give_up() {
                continue;
            }
            let shared = Arc::clone(work);
            // Should it be frozen by now, its thaw may hang.
            self.aside.run_within(LOOK_TIME, move || {
                if let Some(target) = shared.targets.get(index) {
                    // Whether it was is seen by whoever is inside.
                    let _ = shared.door.call_off(target.as_fd());
                }
            });
        }
        Some(next)
    }

    /// Lets those go on that stand still only because others take long to freeze: not those that stand on
    /// one of these. A thaw writes, and that would wait until the other is thawed again.
    fn back_off(&self) {
        let work = &self.work;
        let slow = work.which(Target::is_freezing);
        let slow: Vec<&Target> = slow.iter().filter_map(|i| work.targets.get(*i)).collect();
        let may_go = |t: &&Target| t.is_ours() && !slow.iter().any(|it| t.may_stand_on(it));
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
        if self.run_stages(pool, stages, Work::take_back) {
            return;
        }
        if let Some(target) = work.targets.iter().find(|it| it.is_thawing()) {
            let name = target.name.clone();
            work.fail(FreezeError::Hung { name });
        }
    }

    /// Does that. One that hangs holds up the others for a moment only, and is left to itself in the end.
    /// Whether none was.
    fn run_stages(&self, pool: &Pool, stages: Stages, step: fn(&Work, &Target)) -> bool {
        let Stages { members, ends } = stages;
        let work = Arc::clone(&self.work);
        let run_one = move |n: usize| {
            let target = members.get(n).and_then(|index| work.targets.get(*index));
            target.into_iter().for_each(|it| step(&work, it));
        };
        let limit = self.work.limits.give_up;
        pool.run_in_stages(&ends, THAW_TIME, limit, Arc::new(run_one))
    }

    /// Thaws what this session froze, the last wave first. Everything is tried, whatever fails, and a thaw
    /// that hangs holds up the others for a moment only. It is left in the kernel's hands in the end
    /// ([`Session::in_thaw`]): what such a disk has is from before, so that it is no loss where all of it was
    /// frozen until then.
    pub fn thaw(&self) -> Result<(), ThawError> {
        let strict = self.work.limits.strict;
        let watched = self.work.door.watched_every().is_some();
        let is_foreign = |target: &Target| *target.state() == State::Foreign;
        let mut stages = Stages::default();
        stages.add(self.work.which(is_foreign).into_iter());
        let ours = self.stages(|target| !is_foreign(target));
        stages.then(ours);
        self.run_stages(&self.pool, stages, |work, target| {
            work.ask_foreign(target);
            work.thaw_one(target);
        });
        if let Some(failure) = lock(&self.work.thaw_failure).take() {
            return Err(failure);
        }
        let names = std::mem::take(&mut *lock(&self.work.early));
        if !names.is_empty() {
            return Err(ThawError::Early { names });
        }
        // Where others can thaw, the call itself would have said whether they had.
        let may_be_lost =
            |it: &Target| it.is_thawing() && (strict || (watched && !it.is_as_it_was()));
        match self.names(may_be_lost) {
            names if names.is_empty() => Ok(()),
            names => Err(ThawError::Hung { names }),
        }
    }

    /// Names what hangs in its thaw.
    pub fn in_thaw(&self) -> Vec<String> {
        self.names(Target::is_thawing)
    }

    fn names(&self, pick: impl Fn(&Target) -> bool) -> Vec<String> {
        let targets = self.work.targets.iter().filter(|it| pick(it));
        targets.map(|it| it.name.clone()).collect()
    }

    /// Has copies of all descriptors closed after these, elsewhere. The last one that is closed on what was
    /// unmounted meanwhile unmounts it in fact, and waits for its disk.
    fn leave_copies(&self) -> Vec<Sender<()>> {
        let fds: Vec<BorrowedFd<'_>> = self.work.targets.iter().map(AsFd::as_fd).collect();
        let leave = |fds: &[BorrowedFd<'_>]| {
            let (closed, last) = channel::<()>();
            let close = move |fds| {
                // Nothing is ever said there; it closes.
                let _ = last.recv();
                drop(fds);
            };
            // Without a thread for it they are closed here.
            self.apart.hand_over(fds, close).ok().map(|_| closed)
        };
        let chunks = fds.chunks(sys::MAX_DESCRIPTORS);
        chunks.filter_map(leave).collect()
    }

    /// Gives up what is needed only as long as anything is frozen. It takes a while, which nobody need
    /// wait for.
    pub fn disarm(&self) {
        let left = self.work.targets.iter().filter(|it| it.is_ours());
        let left: Vec<BorrowedFd<'_>> = left.map(AsFd::as_fd).collect();
        self.work.door.disarm(&left);
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

/// One whose sync has returned, and what of it.
type Synced = (usize, io::Result<()>);

/// One whose sync is under way, or about to be.
struct Syncing<'a> {
    index: usize,
    target: &'a Target,
    since: Instant,
    quiet: Quiet,
    /// It is not waited for any longer.
    has_hung: bool,
    /// There as long as it is; `None` while an earlier sync of the same is waited for.
    thread: Option<Weak<()>>,
    /// What is to be synced after it.
    rest: VecDeque<usize>,
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
        self.closed_last = self.leave_copies();
    }
}

impl Work {
    fn gave_up(&self) -> bool {
        self.abort.load(Ordering::SeqCst) || lock(&self.failure).is_some()
    }

    fn fail(&self, error: FreezeError) {
        // The first failure is the cause; later ones are its company.
        lock(&self.failure).get_or_insert(error);
    }

    fn which(&self, pick: impl Fn(&Target) -> bool) -> Vec<usize> {
        let targets = self.targets.iter().enumerate();
        targets.filter(|(_, t)| pick(t)).map(|(i, _)| i).collect()
    }

    fn note_sync(&self, target: &Target, since: Instant, result: io::Result<()>) {
        let name = &target.name;
        self.progress.end(name);
        match result {
            Ok(()) => {
                let took = ms(since.elapsed());
                self.log.info(format!("{name} synced in {took}"));
            }
            // The freeze will meet the same error, if it matters.
            Err(e) => self.log.warning(format!("{name} cannot be synced: {e}")),
        }
    }

    /// Waits until `at`, or until as many have ended as began before: the slow ones were quick this
    /// time, or it is all off.
    fn wait_turn(&self, at: Instant, before: usize, (ended, changed): &(Mutex<usize>, Condvar)) {
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
    fn patience_ends(&self, begin: Instant, usual: Duration) -> Instant {
        if !self.targets.iter().any(Target::is_ours) {
            return Instant::now() + self.limits.lag;
        }
        let pace = lock(&self.pace);
        let expected = begin + usual.max(pace.longest);
        pace.last.max(expected) + self.limits.lag.max(pace.longest / 2)
    }

    fn freeze_one(&self, index: usize, target: &Target) {
        if self.gave_up() || !lock(&self.obstacles).is_empty() {
            return;
        }
        let (name, start) = (&target.name, Instant::now());
        target.given_up.store(false, Ordering::SeqCst);
        *target.state() = State::Freezing { since: start };
        self.progress.begin(name, start);
        let result = self.door.freeze(target.as_fd());
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

    /// The freeze of one was called off alone and may yet hang in the kernel.
    fn leave_out_stuck(&self, target: &Target) {
        let (name, limit) = (&target.name, self.limits.give_up.as_secs());
        let why = format!("takes longer than {limit} s to freeze (give_up)");
        self.give_up_on(target, State::Broken, why);
        for other in self.targets.iter().filter(|it| it.is_due()) {
            // What is stuck in an image waits for what that is on, and must not meet it frozen.
            if target.may_stand_on(other) {
                let why = format!("may hold what {name} is on, which hangs in its freeze");
                self.give_up_on(other, State::Broken, why);
            } else if other.may_stand_on(target) {
                let why = format!("may stand on {name}, which hangs in its freeze");
                self.give_up_on(other, State::Broken, why);
            }
        }
    }

    /// What comes of an error at the freeze of one.
    fn meet(&self, index: usize, target: &Target, error: io::Error) {
        let name = &target.name;
        match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
            Errno::EBUSY if self.is_patient() => {
                lock(&self.obstacles).push(Obstacle::Busy(index));
            }
            Errno::EBUSY if self.door.watched_every().is_some() => {
                self.door.leave(index);
                target.set_frozen(State::Foreign);
                self.log.warning(format!(
                    "{name} was frozen by somebody else before; it counts and stays theirs"
                ));
            }
            Errno::EOPNOTSUPP | Errno::ENOTTY => {
                lock(&self.obstacles).push(Obstacle::Unfreezable(index));
            }
            // What is ours, and would be the same with any other.
            Errno::EBADF
            | Errno::EPERM
            | Errno::EACCES
            | Errno::EPROTO
            | Errno::ESTALE
            | Errno::EINTR
            | Errno::ENOMEM
            | Errno::UnknownErrno => {
                self.log.error(format!("{name} cannot be frozen: {error}"));
                self.fail(FreezeError::Failed {
                    name: name.clone(),
                    source: error,
                });
            }
            // The file system's own words, and what a disk that fails a write-back makes of it: nobody has a
            // list of those. One of them the module says as well, when it has no room for any.
            errno => {
                if errno == Errno::ENOSPC {
                    *lock(&self.no_room) = Some(name.clone());
                }
                self.give_up_on(target, State::Broken, format!("is out of order: {error}"));
            }
        }
    }

    /// Whether what is busy is waited for, or has been for long enough.
    fn is_patient(&self) -> bool {
        lock(&self.busy_until).is_none_or(|until| Instant::now() < until)
    }

    /// Leaves one out.
    fn give_up_on(&self, target: &Target, state: State, why: String) {
        let name = target.name.clone();
        *target.state() = state;
        if self.limits.strict {
            self.fail(FreezeError::Strict { name, why });
        } else {
            self.log.warning(format!("{name} {why}; it is left out"));
        }
    }

    /// Thaws one that will be frozen again, so that it may be thawed already.
    fn take_back(&self, target: &Target) {
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

    /// Finds out what is not frozen any more.
    fn look_after_all(&self) {
        for target in &self.targets {
            let _turn = lock(&target.turn);
            let state = *target.state();
            let is_frozen = matches!(state, State::Ours { .. } | State::Foreign);
            if is_frozen && self.door.freeze(target.as_fd()).is_ok() {
                if state == State::Foreign {
                    // It is nobody's any more.
                    *target.state() = State::Open;
                    let _ = self.door.thaw(target.as_fd());
                }
                self.note_early(&target.name);
                lock(&self.lost).push(target.name.clone());
            }
        }
    }

    /// Finds out whether others have thawed meanwhile what they had frozen.
    fn ask_foreign(&self, target: &Target) {
        let _turn = lock(&target.turn);
        if *target.state() != State::Foreign {
            return;
        }
        let name = &target.name;
        let was_written = target.was_written();
        if self.door.freeze(target.as_fd()).is_ok() {
            // It is nobody's any more. If it cannot be thawed, that is the news.
            *target.state() = State::Ours {
                since: Instant::now(),
                took: Duration::ZERO,
            };
            self.log
                .error(format!("{name} had been thawed by whoever froze it"));
            self.note_early(name);
        } else if was_written {
            self.note_written(name);
        }
    }

    fn thaw_one(&self, target: &Target) {
        // Whoever looks after it may hang, and then so does this.
        let Some((since, took)) = target.begin_thaw() else {
            return;
        };
        let _turn = lock(&target.turn);
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
            Err(e) if is(&e, Errno::EINVAL) && self.abort.load(Ordering::SeqCst) => {
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
                lock(&self.thaw_failure).get_or_insert(ThawError::Failed {
                    name: name.clone(),
                    source,
                });
            }
        }
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno as i32)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // All that is kept in these is whole after each single assignment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ms(time: Duration) -> String {
    format!("{:.3} ms", time.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests;
