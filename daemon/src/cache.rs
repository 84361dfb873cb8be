// SPDX-License-Identifier: GPL-2.0-only

//! The plan for the next backup, kept as long as it holds, and the way from it to descriptors.
//!
//! The one room that owns "has anything changed": what the [`Signals`] say, and what an open shows
//! that they did not. Whoever asks gets everything that is to be frozen, open, with the name and the
//! reason of whatever is not. It freezes nothing.

use std::collections::btree_map::{BTreeMap, Entry};
use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::statvfs::{fstatvfs, FsFlags};

use crate::apart::Questions;
use crate::busy;
use crate::config::{Config, IdleRule};
use crate::freeze::Stuck;
use crate::ground::{GoesOn, Watched};
use crate::machine::{LookError, Unseen, Ways};
use crate::mounts::DevId;
use crate::moving::Layers;
use crate::namespaces::State;
use crate::open::{as_path, open_all_within, OpenError};
use crate::plan::{
    plan, tells_of_errors, FileSystem, LeftOut, Plan, Reason, Scope, READ_ONLY_SINCE_AN_ERROR,
};
use crate::stalled::Suspects;
use crate::superblocks;
use crate::topology;
use crate::watch::{Before, Come, Kernel, Marks, ReadOnly, Scene, Signals};

/// How often the machine is looked at anew when it changed between reading and opening. What was
/// opened stays open, so only what comes and goes all the time can use them up.
const ATTEMPTS: usize = 8;

/// Why what is to be frozen cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum GatherError {
    /// What is mounted could not be found out.
    #[error(transparent)]
    Look(#[from] LookError),
    /// A file system could not be opened for want of something that is this process's own.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The host backs up a part of something, and the configuration is strict.
    #[error("the configuration is strict, and {}", .torn.join("; "))]
    Torn {
        /// Of what, in words.
        torn: Vec<String>,
    },
    /// Not everything on disks here can be frozen, and the configuration is strict.
    #[error("the configuration is strict, and {}", list(.missing))]
    Strict {
        /// What cannot.
        missing: Vec<Missing>,
    },
}

fn list(missing: &[Missing]) -> String {
    let words: Vec<String> = missing.iter().map(ToString::to_string).collect();
    words.join("; ")
}

/// A file system that is to be frozen, open.
#[derive(Debug)]
pub struct Opened {
    /// Its superblock.
    pub dev: DevId,
    /// For people.
    pub name: String,
    /// Its type.
    pub fs_type: String,
    /// Its wave in the plan, from 0.
    pub wave: usize,
    /// As [`FileSystem::devices`].
    pub devices: Vec<DevId>,
    /// As [`FileSystem::perhaps_on`].
    pub perhaps_on: Vec<DevId>,
    /// As [`FileSystem::listed`].
    pub listed: Option<superblocks::Entry>,
    /// The disks below those.
    pub disks: Vec<DevId>,
    /// As [`FileSystem::below`].
    pub below: Option<BTreeSet<DevId>>,
    /// As [`FileSystem::stands_on`].
    pub stands_on: Option<BTreeSet<DevId>>,
    /// Anything on it, perhaps as a path only.
    pub fd: OwnedFd,
}

/// One that an operator should know is not frozen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Which.
    pub name: String,
    /// Why.
    pub reason: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is left out: {}", self.name, self.reason)
    }
}

/// Everything that a backup needs to have open.
#[derive(Debug, Default)]
pub struct Gathered {
    /// What is to be frozen, by wave. What is known to have no means to freeze is in the first one,
    /// where it turns out so.
    pub targets: Vec<Opened>,
    /// What is on disks here and is not frozen all the same, for the log.
    pub missing: Vec<Missing>,
    /// With how many of those something is wrong.
    pub losses: usize,
    /// The disks that the host backs up, each with what is on it, for the log.
    pub disks: Vec<String>,
    /// What is on some of those disks and on others as well, for the log: the backup has a part of it.
    pub torn: Vec<String>,
    /// The same of what may have a whole copy there.
    pub halved: Vec<String>,
    /// Why it is not only for those disks though it was to be.
    pub not_only_listed: Option<String>,
    /// The devices of the backup's disks that nothing should be written to once all is frozen, but by what goes on.
    pub watched: BTreeSet<Watched>,
    /// What does.
    pub goes_on: Vec<GoesOn>,
    /// What there was when it was planned.
    pub then: Scene,
    /// What may move data from disk to disk below it.
    pub layers: Arc<Layers>,
    /// What hangs when it is opened, and is missing.
    pub stuck: Vec<Stuck>,
    /// Whether the plan was only believed to hold: [`Cache::holds`] is to be asked before anybody relies on it.
    pub is_believed: bool,
}

/// What a backup would freeze now, and what it would not: the plan, after a try to open each. `turned` is what the daemon
/// that serves knows to have turned read-only, which cannot be seen afterwards.
pub fn survey(config: &Config, turned: BTreeSet<DevId>) -> Result<Plan, GatherError> {
    let opened = Cache::with(Kernel::told(turned)).open(config, &[], false, &|_| false)?;
    Ok(opened.plan)
}

/// A plan, and what would show that it no longer holds.
pub struct Cache<S: Signals = Kernel> {
    signals: S,
    plan: Plan,
    /// Without these the plan is of no use a second time.
    marks: Option<Marks<S>>,
    /// Whether it held when that was asked last.
    held: bool,
    /// What it leaves out for being read-only, and what it does not.
    read_only: ReadOnly<S>,
    /// The superblocks that there were before it was made, as far as anybody tells.
    alive: Option<S::Alive>,
    /// What may move data from disk to disk below all that is in it.
    layers: Arc<Layers>,
    /// What may have writes to that wait.
    suspects: Suspects,
    /// The rules that were reported for doing nothing.
    idle: BTreeSet<IdleRule>,
}

impl<S: Signals> Cache<S> {
    /// One that will listen to these.
    pub fn with(signals: S) -> Self {
        Cache {
            signals,
            plan: Plan::default(),
            marks: None,
            held: true,
            read_only: ReadOnly::default(),
            alive: None,
            layers: Arc::default(),
            suspects: Suspects::default(),
            idle: BTreeSet::new(),
        }
    }

    /// Makes a plan, unless the one that is there still holds, and returns the way to what is planned.
    /// Where a later change would go unnoticed, each call makes one.
    fn plan(&mut self, config: &Config) -> Result<S::Ways, LookError> {
        if let Some(ways) = self.still(false) {
            return Ok(ways);
        }
        let before = Before::listen(&mut self.signals);
        self.alive = match &before {
            Some(before) => Some(before.alive().clone()),
            None => self.signals.alive(false).ok(),
        };
        let machine = self.signals.look()?;
        self.plan = plan(&machine.mounts, &machine.topology, &|f| config.excludes(f));
        self.plan.unseen.clone_from(&machine.unseen);
        let chosen = self.plan.waves.iter().flatten().chain(&self.plan.synced);
        // What they stand on changes with a word that the marks hear.
        let devices = chosen.flat_map(FileSystem::may_be_on).copied().collect();
        let below = topology::all_below(&devices);
        self.layers = Arc::new(Layers::of(&below, &devices));
        self.suspects = Suspects::of(&below, &devices);
        self.read_only = ReadOnly::of(&mut self.signals, &machine.ways, &self.plan);
        let (signals, read_only) = (&mut self.signals, &self.read_only);
        let complete = |it: Before<S>| it.complete(signals, &machine, &self.plan, read_only);
        self.marks = before.and_then(complete);
        Ok(machine.ways)
    }

    /// The way to what is planned, if there is a plan and nothing has changed since it was made, as far as a glance
    /// tells or as far as anybody does.
    fn still(&mut self, at_a_glance: bool) -> Option<S::Ways> {
        let marks = self.marks.take()?;
        let still = marks.unchanged(&mut self.signals, &self.read_only, at_a_glance);
        self.held = still.is_some();
        let (marks, ways) = still?;
        self.marks = Some(marks);
        Some(ways)
    }

    /// Whether a plan that was believed holds. No path is looked up for it.
    pub fn holds(&mut self) -> bool {
        self.still(true).is_some()
    }

    /// Whether the plan is likely to hold: it did when that was asked last, and what tells in a moment tells
    /// nothing. [`Cache::holds`] is to be asked before anybody relies on it. Not where a glance does not tell
    /// that, nor where the way leads to other namespaces, which would have to be found, or nowhere: what it takes a
    /// mount to open changes what the plan goes by.
    fn is_credible(&mut self) -> bool {
        let is_own = |it: &FileSystem| {
            it.places.iter().all(|place| place.namespace == 0)
                && it
                    .places
                    .iter()
                    .any(|place| place.walkable && !place.hidden)
        };
        let mut chosen = self.plan.waves.iter().flatten().chain(&self.plan.synced);
        let is_shown = self.marks.as_ref().is_some_and(Marks::show_at_a_glance);
        if !self.held || !is_shown || !chosen.all(is_own) {
            return false;
        }
        // A change is told once.
        let marks = self.marks.take();
        self.marks = marks.filter(|it| it.may_hold(&mut self.signals));
        self.marks.is_some()
    }

    /// What the plan leaves out for having turned read-only, perhaps since an error.
    pub fn left_out_as_turned(&self) -> Vec<DevId> {
        let left_out = self.plan.left_out.iter();
        let turned = left_out.filter(|it| it.reason == Reason::TurnedReadOnly);
        turned.map(|it| it.file_system.dev).collect()
    }

    /// Has the plan looked at before it is used again, as when it has turned out not to hold, or when others were
    /// asked to do something that may change the machine.
    pub fn doubt(&mut self) {
        self.held = false;
    }

    /// Has the next plan made anew, as by another configuration. What the signals remember stays.
    pub fn forget_plan(&mut self) {
        self.marks = None;
        self.idle.clear();
    }

    /// Has a plan ready for the next backup, as far as a later change will not go unnoticed. Returns
    /// the rules of the configuration that do nothing, once.
    pub fn prepare(&mut self, config: &Config) -> Result<Vec<IdleRule>, LookError> {
        let planned = self.plan(config);
        self.signals.rest();
        planned?;
        let idle = config.idle_rules(&self.plan);
        let news = idle.difference(&self.idle).cloned().collect();
        self.idle = idle;
        Ok(news)
    }
}

impl Default for Cache {
    /// One that listens to the kernel.
    fn default() -> Self {
        Cache::with(Kernel::default())
    }
}

/// What is to be frozen, by the paths that an operator knows, and the nodes of the disks that the host
/// backs up; of a disk that is not known, its address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Planned {
    /// As they are mounted now.
    pub paths: Vec<String>,
    /// Such as `/dev/sdb`.
    pub disks: Vec<String>,
}

impl Cache {
    /// What a backup of the disks with these addresses is to freeze.
    pub fn planned(&mut self, config: &Config, disks: &[String]) -> Result<Planned, LookError> {
        self.plan(config)?;
        let (plan, scope) = self.plan_of(config, disks);
        let members = plan.waves.iter().flatten();
        let paths = members.filter_map(|it| it.places.first());
        let known = plan
            .disks
            .iter()
            .filter(|(dev, _)| scope.disks.contains(dev));
        let nodes = known.map(|(_, disk)| format!("/dev/{}", disk.name));
        Ok(Planned {
            paths: paths.map(|it| it.path.to_string_lossy().into()).collect(),
            disks: nodes.chain(scope.strange).collect(),
        })
    }

    /// How many file systems may be frozen at the same time.
    pub fn widest_wave(&self) -> usize {
        self.plan.waves.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// The plan for a backup of the disks with these addresses, and those disks.
    fn plan_of(&self, config: &Config, disks: &[String]) -> (Plan, Scope) {
        let mut plan = self.plan.clone();
        let scope = plan.find(disks);
        if config.listed_disks_only && why_not_only(disks, &scope).is_none() {
            plan.leave_out_all_but(&scope.disks);
        }
        (plan, scope)
    }

    /// Opens everything that is to be frozen, as planned before or anew, for a backup of the disks with
    /// these addresses. If it `may_believe`, a plan that is likely to hold is not looked at, and of what is in that it is
    /// enough to have the path open where it `will_do`.
    pub fn gather(
        &mut self,
        config: &Config,
        disks: &[String],
        may_believe: bool,
        will_do: &dyn Fn(DevId) -> bool,
    ) -> Result<Gathered, GatherError> {
        let Opening {
            plan,
            scope,
            mut open,
            states,
            stuck,
            is_believed,
        } = self.open(config, disks, may_believe, will_do)?;
        let mut gathered = Gathered {
            not_only_listed: why_not_only(disks, &scope).filter(|_| config.listed_disks_only),
            then: self
                .signals
                .then(self.alive.clone(), states.as_deref(), &plan),
            stuck,
            is_believed,
            layers: Arc::clone(&self.layers),
            watched: plan.watched(&scope),
            goes_on: plan.goes_on(),
            ..Gathered::default()
        };
        let known = scope.disks.iter().map(|dev| plan.words_for(*dev));
        let strange = scope.strange.iter();
        let strange = strange.map(|it| format!("{it}, which is no disk that is known here"));
        gathered.disks = known.chain(strange).collect();
        // Of one that is not known nobody can say that nothing here is on it.
        if scope.strange.is_empty() && !scope.disks.is_empty() {
            (gathered.torn, gathered.halved) = torn_by(&plan, &scope.disks);
        }
        let never_held = plan.synced.iter().map(|it| (0, it));
        let waves = plan.waves.iter().enumerate();
        let held = waves.flat_map(|(wave, members)| members.iter().map(move |it| (wave, it)));
        for (wave, file_system) in never_held.chain(held) {
            gathered
                .targets
                .extend(open.remove(&file_system.dev).map(|fd| Opened {
                    dev: file_system.dev,
                    name: file_system.to_string(),
                    fs_type: file_system.fs_type.clone(),
                    wave,
                    devices: file_system.devices.clone(),
                    perhaps_on: file_system.perhaps_on.clone(),
                    listed: file_system.listed.clone(),
                    disks: file_system.disks.clone(),
                    below: file_system.below.clone(),
                    stands_on: file_system.stands_on.clone(),
                    fd,
                }));
        }
        let is_worth_a_word = |it: &&LeftOut| match it.reason {
            Reason::Excluded(_)
            | Reason::Broken(_)
            | Reason::Unreachable(_)
            | Reason::Elsewhere
            | Reason::TurnedReadOnly
            | Reason::MadeReadOnly
            | Reason::Busy(_)
            | Reason::Stalled(_) => true,
            Reason::ReadOnly | Reason::NoBlockDevice => false,
        };
        let left_out = plan.left_out.iter().filter(is_worth_a_word);
        let unseen = plan.unseen.iter().map(not_seen);
        gathered.missing = left_out.map(missing).chain(unseen).collect();
        gathered.losses = plan.losses().count() + plan.unseen.len();
        if config.strict {
            let missing = strict_about(&plan);
            if !missing.is_empty() {
                return Err(GatherError::Strict { missing });
            }
            if !gathered.torn.is_empty() {
                let torn = gathered.torn;
                return Err(GatherError::Torn { torn });
            }
        }
        Ok(gathered)
    }

    /// Whether nothing can be written to that could not be then: there is nothing new, and what was left out
    /// for being read-only is not writable, as far as the kernel tells. No path is looked up. It is asked
    /// once; before it is asked again, [`Cache::rewind`].
    pub fn is_all_there(&mut self, then: &Scene) -> bool {
        !self.signals.has_news(then) && self.read_only.writable_now(&mut self.signals).is_empty()
    }

    /// Names what is read-only by now and was to be frozen, perhaps since an error: it is no better for being
    /// frozen. No path is looked up.
    pub fn turned(&mut self) -> Vec<String> {
        self.read_only.turned(&mut self.signals)
    }

    /// What of that is listed by the kernel and was not then, by the names that it has there: so much can be
    /// told without a look at a path, while all is frozen.
    pub fn names_since(&self, then: &Scene) -> Vec<String> {
        self.signals.names_since(then)
    }

    /// Has [`Cache::is_all_there`] ready to be asked again. It is apart because that counts while writers
    /// wait.
    pub fn rewind(&mut self) {
        self.signals.rewind();
    }

    /// What has come since then and would be in a backup of these disks, or missing in it: it makes a plan
    /// unless nothing has changed, as a backup would.
    pub fn come_since(
        &mut self,
        then: &Scene,
        config: &Config,
        disks: &[String],
    ) -> Result<Vec<Come>, LookError> {
        self.plan(config)?;
        Ok(then.known.come_since(&self.plan_of(config, disks).0))
    }

    /// The same as long as the plan holds: nothing is looked up for it.
    pub fn come_if_it_holds(
        &mut self,
        then: &Scene,
        config: &Config,
        disks: &[String],
    ) -> Option<Vec<Come>> {
        self.still(false)?;
        Some(then.known.come_since(&self.plan_of(config, disks).0))
    }

    /// What may move data from disk to disk below what is planned.
    pub fn layers(&self) -> &Layers {
        &self.layers
    }

    /// Opens what the plan for these disks says, and returns it without what could not be opened, with
    /// the reason.
    fn open(
        &mut self,
        config: &Config,
        disks: &[String],
        may_believe: bool,
        will_do: &dyn Fn(DevId) -> bool,
    ) -> Result<Opening, GatherError> {
        let mut open = BTreeMap::new();
        let mut attempt = 1;
        loop {
            let may_believe = may_believe && attempt == 1 && self.is_credible();
            let own_way = may_believe.then(|| self.signals.own_way().ok()).flatten();
            let is_believed = own_way.is_some();
            let ways = match own_way {
                Some(ways) => ways,
                None => self.plan(config)?,
            };
            let states = match &self.marks {
                Some(marks) => Some(marks.states().clone()),
                None => Kernel::states(&ways),
            };
            let (mut plan, scope) = self.plan_of(config, disks);
            leave_out_busy(&mut plan);
            leave_out_stalled(&mut plan, &self.suspects);
            leave_out_namesakes(&mut plan);
            tell_failed(config.give_up, &ways, &mut plan);
            if is_believed {
                // What a btrfs is at, it tells only whoever has it open.
                let all = plan.waves.iter().flatten();
                let by_path = all.filter(|it| will_do(it.dev) && !is_btrfs(it));
                open.extend(by_path.filter_map(|it| Some((it.dev, as_path(it)?))));
            }
            let (plan, stuck, has_changed) = open_all(config.give_up, &ways, plan, &mut open)?;
            if has_changed {
                // What a path leads to is not always told: a mount that was moved is in its table as before.
                self.marks = None;
                if is_believed {
                    // Nor is it told then what was opened as a path: a mount may have the number of another.
                    open.clear();
                }
            }
            if !has_changed || attempt == ATTEMPTS {
                return Ok(Opening {
                    plan,
                    scope,
                    open,
                    states,
                    stuck,
                    is_believed,
                });
            }
            attempt += 1;
        }
    }
}

/// What a backup of these disks has only a part of, in words, and after that what may have a whole copy there.
fn torn_by(plan: &Plan, disks: &BTreeSet<DevId>) -> (Vec<String>, Vec<String>) {
    let words = |(it, others): (&FileSystem, Vec<String>)| {
        let below = it.below.as_ref();
        let has_copies =
            below.is_some_and(|below| topology::may_keep_copies(below, it.listed.as_ref()));
        let others = others.join(", ");
        let text = match has_copies {
            false => "only a part of it is in the backup",
            true => "what is in the backup is enough only where it has a whole copy there",
        };
        (
            has_copies,
            format!("{it} is on {others} as well, which the host does not back up: {text}"),
        )
    };
    let (halved, torn): (Vec<_>, Vec<_>) = plan
        .torn_by(disks)
        .map(words)
        .partition(|(has_copies, _)| *has_copies);
    let texts = |all: Vec<(bool, String)>| all.into_iter().map(|(_, text)| text).collect();
    (texts(torn), texts(halved))
}

/// Leaves out what would not freeze before something else has ended.
fn leave_out_busy(plan: &mut Plan) {
    if !plan.waves.iter().flatten().any(is_btrfs) {
        return;
    }
    let busy = busy::shown();
    plan.leave_out(|file_system| {
        let operation = busy.get(file_system.listed.as_ref()?);
        operation.cloned().map(Reason::Busy)
    });
}

/// Leaves out what is on a device that has writes wait, and what stands on that.
fn leave_out_stalled(plan: &mut Plan, suspects: &Suspects) {
    let stalled = suspects.stalled();
    let why = |it: &FileSystem| {
        let is_on = |on: &BTreeSet<DevId>| it.may_be_on().any(|dev| on.contains(dev));
        stalled.iter().find(|(on, _)| is_on(on))
    };
    let all = plan.waves.iter().flatten().chain(&plan.synced);
    let all: BTreeMap<DevId, String> = all
        .filter_map(|it| Some((it.dev, why(it)?.1.clone())))
        .collect();
    if all.is_empty() {
        return;
    }
    plan.leave_out(|it| {
        let mut below = it.stands_on.iter().flatten();
        let why = all.get(&it.dev);
        let why = why.or_else(|| below.find_map(|dev| all.get(dev)))?;
        Some(Reason::Stalled(why.clone()))
    });
}

/// Leaves out what has the number of another that is planned: what is opened is told by that. Two have one where what
/// is mounted nowhere is known by its devices alone, as what has sprouted from a seed of btrfs.
fn leave_out_namesakes(plan: &mut Plan) {
    let mut numbers = BTreeSet::new();
    plan.leave_out(|it| {
        let is_first = numbers.insert(it.dev);
        let why = "another file system has the same number, and is opened as that";
        (!is_first).then(|| Reason::Unreachable(why.into()))
    });
}

/// Tells what an error has made read-only from what somebody has, where that has to be asked for. Of what does not
/// answer it stays unknown.
fn tell_failed(limit: Duration, ways: &Ways, plan: &mut Plan) {
    let tells = |it: &LeftOut| tells_of_errors(&it.file_system.fs_type);
    let is_asked = |it: &LeftOut| it.reason == Reason::TurnedReadOnly && tells(it);
    let turned = plan.left_out.iter().filter(|it| is_asked(it));
    let turned: Vec<&FileSystem> = turned.map(|it| &it.file_system).collect();
    let opened = open_all_within(limit, ways, &turned);
    let failed = failed(&reached(&turned, &opened));
    for left in plan.left_out.iter_mut().filter(|it| is_asked(it)) {
        left.reason = why_turned(failed.get(&left.file_system.dev).copied());
    }
}

/// One that is open.
type Reached<'a> = (&'a FileSystem, BorrowedFd<'a>);

/// Those that could be opened.
fn reached<'a>(
    all: &[&'a FileSystem],
    opened: &'a [Result<OwnedFd, OpenError>],
) -> Vec<Reached<'a>> {
    let each = all.iter().zip(opened);
    let reached = each.filter_map(|(it, opened)| Some((*it, opened.as_ref().ok()?.as_fd())));
    reached.collect()
}

/// Of these those that are `so`, as they are asked.
fn which<'a>(
    open: &[Reached<'a>],
    so: impl Fn(&FileSystem) -> bool,
) -> Vec<(DevId, BorrowedFd<'a>)> {
    let found = open.iter().filter(|(it, _)| so(it));
    found.map(|(it, fd)| (it.dev, *fd)).collect()
}

fn is_btrfs(file_system: &FileSystem) -> bool {
    file_system.fs_type == "btrfs"
}

/// Why one is read-only that was mounted for writing, by what it says of whether it met an error.
fn why_turned(has_failed: Option<bool>) -> Reason {
    match has_failed {
        Some(true) => Reason::Broken(READ_ONLY_SINCE_AN_ERROR.into()),
        Some(false) => Reason::MadeReadOnly,
        None => Reason::TurnedReadOnly,
    }
}

/// Of these, read-only, whether they have met an error, where that has to be asked for and is said.
fn failed(open: &[Reached<'_>]) -> BTreeMap<DevId, bool> {
    let asked = which(open, |it| tells_of_errors(&it.fs_type));
    let each = asked.iter().zip(busy::have_failed(&asked));
    let said = each.filter_map(|((dev, _), has_failed)| Some((*dev, has_failed?)));
    said.collect()
}

/// Why these, open, are left out all the same: what is asked only now, for no table shows it. Those that hang are waited
/// for together.
fn told_by(limit: Duration, open: &[Reached<'_>]) -> BTreeMap<DevId, Reason> {
    let asked = which(open, is_btrfs);
    let each = asked.iter().zip(busy::unshown(&asked));
    let busy = each.filter_map(|((dev, _), what)| Some((*dev, Reason::Busy(what?.into()))));
    let mut told: BTreeMap<DevId, Reason> = busy.collect();
    let asked = which(open, |it| it.places.is_empty());
    let each = asked.iter().zip(are_read_only(limit, &asked));
    let read_only = each.filter(|(_, is_read_only)| *is_read_only);
    let read_only: BTreeSet<DevId> = read_only.map(|((dev, _), _)| *dev).collect();
    let mut open = open.to_vec();
    open.retain(|(it, _)| read_only.contains(&it.dev));
    let mut failed = failed(&open);
    // It tells of none by its descriptor.
    let ext4 = open.iter().filter_map(|(it, _)| {
        let count = topology::errors_on(&it.fs_type, it.dev)?;
        Some((it.dev, count > 0))
    });
    failed.extend(ext4);
    told.extend(read_only.into_iter().map(|dev| {
        // Nobody tells for what one was mounted that is mounted nowhere.
        let reason = match failed.get(&dev) {
            Some(true) => Reason::Broken(READ_ONLY_SINCE_AN_ERROR.into()),
            Some(false) | None => Reason::ReadOnly,
        };
        (dev, reason)
    }));
    told
}

/// A plan and all that it needs.
struct Opening {
    plan: Plan,
    /// The disks that it is for.
    scope: Scope,
    /// The descriptors of what is in it.
    open: BTreeMap<DevId, OwnedFd>,
    /// How the other namespaces were when it was planned.
    states: Option<Vec<State>>,
    /// What hangs when it is opened.
    stuck: Vec<Stuck>,
    /// Whether nobody has looked if the plan holds.
    is_believed: bool,
}

/// Why a backup that is to be of its disks only is of all, if it is: whoever leaves out what might be in
/// the backup makes a bad one.
fn why_not_only(disks: &[String], scope: &Scope) -> Option<String> {
    if disks.is_empty() {
        return Some("nobody says which disks the backup is of: it is for all".into());
    }
    let strange = scope.strange.first()?;
    Some(format!(
        "{strange} is no disk that is known here: the backup is for all"
    ))
}

/// Opens all of `plan` that is not in `open` yet, and moves what cannot be opened to what is left
/// out. Says as well what hangs when it is opened, and whether the plan seems to be out of date. Each has so much time
/// to be opened.
fn open_all(
    limit: Duration,
    ways: &Ways,
    mut plan: Plan,
    open: &mut BTreeMap<DevId, OwnedFd>,
) -> Result<(Plan, Vec<Stuck>, bool), OpenError> {
    let (mut has_changed, mut stuck) = (false, Vec::new());
    let Plan {
        waves,
        synced,
        left_out,
        ..
    } = &mut plan;
    let chosen = waves.iter().flatten().chain(&*synced);
    let closed: Vec<_> = chosen.filter(|it| !open.contains_key(&it.dev)).collect();
    let opened = open_all_within(limit, ways, &closed);
    let mut told = told_by(limit, &reached(&closed, &opened));
    let mut opened = opened.into_iter();
    let waves_too = waves.iter_mut().enumerate();
    for (wave, members) in waves_too.chain([(0, synced)]) {
        let mut reached = Vec::new();
        for file_system in std::mem::take(members) {
            if let Entry::Vacant(place) = open.entry(file_system.dev) {
                // One for each that is not open, in this order.
                let Some(opened) = opened.next() else {
                    continue;
                };
                match (opened, told.remove(&file_system.dev)) {
                    (Ok(_), Some(reason)) => {
                        left_out.push(LeftOut {
                            file_system,
                            reason,
                        });
                        continue;
                    }
                    (Ok(fd), None) => drop(place.insert(fd)),
                    (Err(error), _) if error.is_our_own() => return Err(error),
                    (Err(error), _) => {
                        has_changed |= error.may_be_gone();
                        stuck.extend(error.is_stuck().then(|| Stuck {
                            dev: file_system.dev,
                            name: file_system.to_string(),
                            wave,
                        }));
                        left_out.push(left_out_for(file_system, &error));
                        continue;
                    }
                }
            }
            reached.push(file_system);
        }
        *members = reached;
    }
    waves.retain(|members| !members.is_empty());
    Ok((plan, stuck, has_changed))
}

/// Whether each of these is on a read-only superblock, or a read-only mount. The kernel asks the file system, which may
/// have to read a lot for it: one that says nothing is tried.
fn are_read_only(limit: Duration, open: &[(DevId, BorrowedFd<'_>)]) -> Vec<bool> {
    static ASKED: Questions<DevId> = Questions::new();
    let ask =
        |fd: BorrowedFd<'_>| fstatvfs(fd).is_ok_and(|it| it.flags().contains(FsFlags::ST_RDONLY));
    let said = ASKED.ask_each(open, limit, ask);
    said.into_iter().map(Result::unwrap_or_default).collect()
}

fn left_out_for(file_system: FileSystem, error: &OpenError) -> LeftOut {
    LeftOut {
        file_system,
        reason: if error.is_broken() {
            Reason::Broken(error.tried())
        } else {
            Reason::Unreachable(error.tried())
        },
    }
}

fn missing(left: &LeftOut) -> Missing {
    Missing {
        name: left.file_system.to_string(),
        reason: left.reason.to_string(),
    }
}

fn not_seen(Unseen { name, reason }: &Unseen) -> Missing {
    Missing {
        name: name.clone(),
        reason: reason.clone(),
    }
}

/// What a strict backup fails for: that, and what is known to have no means to freeze.
fn strict_about(plan: &Plan) -> Vec<Missing> {
    let never_held = plan.synced.iter().map(|it| Missing {
        name: it.to_string(),
        reason: "it has no means to freeze".into(),
    });
    let lost = plan.losses().map(missing);
    let unseen = plan.unseen.iter().map(not_seen);
    lost.chain(never_held).chain(unseen).collect()
}

#[cfg(test)]
mod tests;
