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
use crate::open::{open_all_within, OpenError};
use crate::plan::{plan, FileSystem, LeftOut, Plan, Reason, Scope, READ_ONLY_SINCE_AN_ERROR};
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
    /// The disks below those.
    pub disks: Vec<DevId>,
    /// As [`FileSystem::below`].
    pub below: Option<BTreeSet<DevId>>,
    /// As [`FileSystem::stands_on`].
    pub stands_on: Option<BTreeSet<DevId>>,
    /// Anything on it.
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

/// What a backup would freeze now, and what it would not: the plan, after a try to open each.
pub fn survey(config: &Config) -> Result<Plan, GatherError> {
    let opened = Cache::default().open(config, &[], false)?;
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
        self.layers = Arc::new(Layers::below(chosen.flat_map(|it| &it.devices)));
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
    /// these addresses. If it `may_believe`, a plan that is likely to hold is not looked at.
    pub fn gather(
        &mut self,
        config: &Config,
        disks: &[String],
        may_believe: bool,
    ) -> Result<Gathered, GatherError> {
        let Opening {
            plan,
            scope,
            mut open,
            states,
            stuck,
            is_believed,
        } = self.open(config, disks, may_believe)?;
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
            | Reason::Busy(_) => true,
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
            tell_failed(config.give_up, &ways, &mut plan);
            let (plan, stuck, has_changed) = open_all(config.give_up, &ways, plan, &mut open)?;
            if has_changed {
                // What a path leads to is not always told: a mount that was moved is in its table as before.
                self.marks = None;
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

/// Leaves out what would not freeze before something else has ended.
fn leave_out_busy(plan: &mut Plan) {
    if !plan.waves.iter().flatten().any(is_btrfs) {
        return;
    }
    let busy = busy::shown();
    plan.leave_out(|file_system| {
        let devices = &file_system.devices;
        let mut busy = busy.iter();
        let found = busy.find(|(of, _)| of.iter().any(|dev| devices.contains(dev)));
        found.map(|(_, operation)| Reason::Busy(operation.clone()))
    });
}

/// Tells what an error has made read-only from what somebody has, where that has to be asked for. Of what does not
/// answer it stays unknown.
fn tell_failed(limit: Duration, ways: &Ways, plan: &mut Plan) {
    let is_asked = |it: &LeftOut| it.reason == Reason::TurnedReadOnly && is_btrfs(&it.file_system);
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
    let asked = which(open, is_btrfs);
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
    let failed = failed(&open);
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
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::io;
    use std::rc::Rc;

    use proptest::prelude::*;

    use crate::apart::Patience;
    use crate::machine::Machine;
    use crate::mounts::parse;
    use crate::plan::Place;
    use crate::topology::{Backing, Device, Topology, Unmounted};

    /// File systems are on disks 100:0 and up. Those below 3 are of a type that lists in sysfs what is
    /// alive.
    const DISKS: u32 = 6;
    const LISTED: std::ops::Range<u32> = 0..3;

    fn disk(minor: u32) -> DevId {
        DevId { major: 100, minor }
    }

    /// A loop device on a file in the file system with that number.
    fn image_in(minor: u32) -> DevId {
        DevId { major: 200, minor }
    }

    /// A superblock, from its first mount to its last use.
    #[derive(Clone)]
    struct Alive {
        generation: u64,
        read_only: bool,
        /// Whether it is in use without a mount that a table shows.
        held: bool,
    }

    /// A mount namespace: its number, and its mounts by number, with disk and path.
    #[derive(Clone, Default)]
    struct Space {
        id: u64,
        mounts: BTreeMap<u64, (u32, String)>,
    }

    /// A machine as the kernel tells of it; what it does not tell is not told here either.
    #[derive(Default)]
    struct Model {
        /// The own namespace first.
        spaces: Vec<Space>,
        alive: BTreeMap<u32, Alive>,
        /// The disks that are mapped to an image.
        mapped: BTreeMap<u32, u32>,
        /// The disks whose file system was extended to an image.
        grown: BTreeMap<u32, u32>,
        /// How many mounts were made.
        made: u64,
        /// The last number given to anything.
        last: u64,
        own_table_has_changed: bool,
        uevents: u64,
        /// What happens as soon as the tables have been read.
        meanwhile: Option<Step>,
        /// A disk whose file system has shut down.
        shut_down: Option<u32>,
    }

    #[derive(Clone, Debug)]
    enum Step {
        Mount {
            space: usize,
            disk: u32,
            read_only: bool,
        },
        MountNowhere {
            disk: u32,
        },
        Unmount {
            space: usize,
            nth: usize,
            lazily: bool,
        },
        Release {
            disk: u32,
        },
        Remount {
            space: usize,
            nth: usize,
            read_only: bool,
        },
        /// Between reading the tables and looking at what they show.
        RemountMeanwhile {
            space: usize,
            nth: usize,
            read_only: bool,
        },
        /// An error makes it read-only, and nobody tells.
        Fail {
            disk: u32,
        },
        Move {
            space: usize,
            nth: usize,
        },
        NewSpace,
        EndSpace {
            space: usize,
        },
        /// dm tells of it, md does not.
        Map {
            disk: u32,
            image: Option<u32>,
            tells: bool,
        },
        Grow {
            disk: u32,
            image: u32,
        },
        OtherDevice,
        Prepare,
        Backup,
    }

    impl Model {
        fn number(&mut self) -> u64 {
            self.last += 1;
            self.last
        }

        fn raise(&mut self, disk: u32, read_only: bool, held: bool) {
            let generation = self.number();
            let new = Alive {
                generation,
                read_only,
                held: false,
            };
            self.alive.entry(disk).or_insert(new).held |= held;
        }

        /// Superblocks that nothing uses any more are gone.
        fn bury(&mut self) {
            let mounts = self.spaces.iter().flat_map(|it| it.mounts.values());
            let used: BTreeSet<u32> = mounts.map(|(disk, _)| *disk).collect();
            self.alive.retain(|disk, it| it.held || used.contains(disk));
        }

        /// The number of the nth mount in a namespace.
        fn nth(&self, space: usize, nth: usize) -> Option<u64> {
            let ids: Vec<u64> = self.spaces.get(space)?.mounts.keys().copied().collect();
            ids.get(nth % ids.len().max(1)).copied()
        }

        fn apply(&mut self, step: &Step) {
            match *step {
                Step::Mount {
                    space,
                    disk,
                    read_only,
                } => {
                    self.raise(disk, read_only, false);
                    self.made += 1;
                    let id = self.number();
                    if let Some(it) = self.spaces.get_mut(space) {
                        it.mounts.insert(id, (disk, format!("/m{id}")));
                        self.own_table_has_changed |= space == 0;
                    }
                    self.bury();
                }
                Step::MountNowhere { disk } => {
                    self.raise(disk, false, true);
                    self.made += 1;
                }
                Step::Unmount { space, nth, lazily } => {
                    let Some(id) = self.nth(space, nth) else {
                        return;
                    };
                    let gone = self.spaces[space].mounts.remove(&id);
                    if let Some(it) = gone.and_then(|(disk, _)| self.alive.get_mut(&disk)) {
                        it.held |= lazily;
                    }
                    self.own_table_has_changed |= space == 0;
                    self.bury();
                }
                Step::Release { disk } => {
                    if let Some(it) = self.alive.get_mut(&disk) {
                        it.held = false;
                    }
                    self.bury();
                }
                Step::Remount {
                    space,
                    nth,
                    read_only,
                } => {
                    let Some(id) = self.nth(space, nth) else {
                        return;
                    };
                    let disk = self.spaces[space].mounts[&id].0;
                    if let Some(it) = self.alive.get_mut(&disk) {
                        it.read_only = read_only;
                    }
                    self.own_table_has_changed |= space == 0;
                }
                Step::RemountMeanwhile {
                    space,
                    nth,
                    read_only,
                } => {
                    self.meanwhile = Some(Step::Remount {
                        space,
                        nth,
                        read_only,
                    });
                }
                Step::Fail { disk } => {
                    if let Some(it) = self.alive.get_mut(&disk) {
                        it.read_only = true;
                    }
                }
                Step::Move { space, nth } => {
                    let Some(id) = self.nth(space, nth) else {
                        return;
                    };
                    let new = self.number();
                    if let Some(mount) = self.spaces[space].mounts.get_mut(&id) {
                        mount.1 = format!("/moved{new}");
                    }
                    self.own_table_has_changed |= space == 0;
                }
                Step::NewSpace => {
                    let mut copy = Space {
                        id: self.number(),
                        ..Space::default()
                    };
                    for mount in self.spaces[0].mounts.clone().into_values() {
                        copy.mounts.insert(self.number(), mount);
                    }
                    self.spaces.push(copy);
                }
                Step::EndSpace { space } => {
                    if space > 0 && space < self.spaces.len() {
                        self.spaces.remove(space);
                        self.bury();
                    }
                }
                Step::Map { disk, image, tells } => {
                    // An image in a file system that was made later would be a circle here.
                    let image = image.filter(|it| *it < disk);
                    // What is not mapped does not become so without a word.
                    if tells || (self.mapped.contains_key(&disk) && image.is_some()) {
                        self.uevents += u64::from(tells);
                        match image {
                            Some(image) => self.mapped.insert(disk, image),
                            None => self.mapped.remove(&disk),
                        };
                    }
                }
                // An image in a file system that was made later would be a circle here.
                Step::Grow { disk, image } if image < disk => drop(self.grown.insert(disk, image)),
                Step::Grow { .. } => {}
                Step::OtherDevice => self.uevents += 1,
                Step::Prepare | Step::Backup => {}
            }
        }

        fn tables(&self) -> Vec<String> {
            let line = |id: &u64, (disk, path): &(u32, String)| {
                let way = if self.alive[disk].read_only {
                    "ro"
                } else {
                    "rw"
                };
                let state = match self.shut_down {
                    Some(it) if it == *disk => ",shutdown",
                    _ => "",
                };
                format!("{id} 1 100:{disk} / {path} {way} - ext4 /dev/d{disk} {way}{state}\n")
            };
            let table = |it: &Space| it.mounts.iter().map(|(id, m)| line(id, m)).collect();
            self.spaces.iter().map(table).collect()
        }

        fn topology(&self) -> Topology {
            let mut topology = Topology::default();
            for (&from, &to) in &self.mapped {
                let below = vec![image_in(to)];
                topology.devices.insert(
                    disk(from),
                    Device {
                        below,
                        ..Device::default()
                    },
                );
                let backing = Some(Backing {
                    dev: Some(disk(to)),
                    path: "/image".into(),
                });
                topology.devices.insert(
                    image_in(to),
                    Device {
                        backing,
                        ..Device::default()
                    },
                );
            }
            for (&from, &to) in &self.grown {
                let backing = Some(Backing {
                    dev: Some(disk(to)),
                    path: "/image".into(),
                });
                topology.devices.insert(
                    image_in(to),
                    Device {
                        backing,
                        ..Device::default()
                    },
                );
                let members = vec![disk(from), image_in(to)];
                topology.members.insert(disk(from), members);
            }
            let mounts = self.spaces.iter().flat_map(|it| it.mounts.values());
            let shown: BTreeSet<u32> = mounts.map(|(disk, _)| *disk).collect();
            // Those that are not listed are found by their devices.
            topology.unmounted = (self.alive.keys())
                .filter(|disk| !shown.contains(disk))
                .map(|&minor| Unmounted {
                    fs_type: "ext4".into(),
                    name: format!("d{minor}"),
                    devices: [disk(minor)]
                        .into_iter()
                        .chain(self.grown.get(&minor).map(|to| image_in(*to)))
                        .collect(),
                })
                .collect();
            topology
        }
    }

    #[derive(Clone)]
    struct Shared(Rc<RefCell<Model>>);

    impl Signals for Shared {
        type Ways = Vec<(u64, usize, Option<u64>)>;
        type States = Self::Ways;
        type Alive = (BTreeMap<u32, u64>, BTreeMap<u32, u32>, u64);
        type At = (u64, u64);

        fn look(&mut self) -> Result<Machine<Self::Ways>, LookError> {
            let ways = self.ways().map_err(LookError::Namespaces)?;
            let model = self.0.borrow();
            let mut mounts = Vec::new();
            for (number, table) in model.tables().iter().enumerate() {
                mounts.extend(parse(table.as_bytes(), number)?);
            }
            let topology = model.topology();
            drop(model);
            let meanwhile = self.0.borrow_mut().meanwhile.take();
            if let Some(step) = meanwhile {
                self.0.borrow_mut().apply(&step);
            }
            Ok(Machine {
                ways,
                mounts,
                topology,
                unseen: Vec::new(),
            })
        }

        fn table_has_changed(&mut self) -> io::Result<bool> {
            Ok(std::mem::take(
                &mut self.0.borrow_mut().own_table_has_changed,
            ))
        }

        fn uevents(&mut self) -> io::Result<u64> {
            Ok(self.0.borrow().uevents)
        }

        fn shows_at_a_glance(_alive: &Self::Alive) -> bool {
            true
        }

        fn alive(&mut self, _at_a_glance: bool) -> io::Result<Self::Alive> {
            let model = self.0.borrow();
            let listed = model.alive.iter().filter(|(disk, _)| LISTED.contains(disk));
            let listed = listed.map(|(disk, it)| (*disk, it.generation)).collect();
            Ok((listed, model.grown.clone(), model.made))
        }

        fn slaves(&mut self, dev: DevId) -> Vec<DevId> {
            let model = self.0.borrow();
            let image = model.mapped.get(&dev.minor).filter(|_| dev.major == 100);
            image.map(|it| image_in(*it)).into_iter().collect()
        }

        fn ways(&mut self) -> io::Result<Self::Ways> {
            let model = self.0.borrow();
            let state = |it: &Space| (it.id, it.mounts.len(), it.mounts.keys().last().copied());
            Ok(model.spaces.iter().skip(1).map(state).collect())
        }

        fn states(ways: &Self::Ways) -> Option<Self::States> {
            Some(ways.clone())
        }

        fn find(
            &mut self,
            ways: &Self::Ways,
            place: &Place,
            _: DevId,
            _: &Patience,
        ) -> Option<(u64, u64)> {
            let space = match place.namespace {
                0 => 0,
                n => ways.get(n - 1)?.0,
            };
            Some((space, place.id))
        }

        fn is_read_only(&mut self, (space, mount): &(u64, u64)) -> Option<bool> {
            let model = self.0.borrow();
            let space = model.spaces.iter().find(|it| it.id == *space)?;
            let (disk, _) = space.mounts.get(mount)?;
            Some(model.alive[disk].read_only)
        }
    }

    fn step() -> impl Strategy<Value = Step> {
        let (space, nth, disk) = (0..4usize, 0..8usize, 0..DISKS);
        let image = proptest::option::of(0..DISKS);
        prop_oneof![
            4 => (space.clone(), disk.clone(), any::<bool>())
                .prop_map(|(space, disk, read_only)| Step::Mount { space, disk, read_only }),
            1 => disk.clone().prop_map(|disk| Step::MountNowhere { disk }),
            3 => (space.clone(), nth.clone(), any::<bool>())
                .prop_map(|(space, nth, lazily)| Step::Unmount { space, nth, lazily }),
            1 => disk.clone().prop_map(|disk| Step::Release { disk }),
            3 => (space.clone(), nth.clone(), any::<bool>())
                .prop_map(|(space, nth, read_only)| Step::Remount { space, nth, read_only }),
            2 => (space.clone(), nth.clone(), any::<bool>())
                .prop_map(|(space, nth, read_only)| Step::RemountMeanwhile { space, nth, read_only }),
            1 => disk.clone().prop_map(|disk| Step::Fail { disk }),
            1 => (space.clone(), nth).prop_map(|(space, nth)| Step::Move { space, nth }),
            1 => Just(Step::NewSpace),
            1 => space.prop_map(|space| Step::EndSpace { space }),
            4 => (disk, image, any::<bool>())
                .prop_map(|(disk, image, tells)| Step::Map { disk, image, tells }),
            1 => (0..DISKS, 0..DISKS).prop_map(|(disk, image)| Step::Grow { disk, image }),
            1 => Just(Step::OtherDevice),
            3 => Just(Step::Prepare),
            4 => Just(Step::Backup),
        ]
    }

    /// What is frozen, and in which wave.
    fn wave_of(plan: &Plan) -> BTreeMap<u32, usize> {
        let waves = plan.waves.iter().enumerate();
        let members = waves.flat_map(|(n, wave)| wave.iter().map(move |it| (it.dev.minor, n)));
        members.collect()
    }

    /// What a plan made anew would freeze is frozen, and in an order that is right now. What has become read-only
    /// since is not among it, as far as a mount shows that: it may have met an error.
    fn check(
        model: &Model,
        kept: &BTreeMap<u32, usize>,
        anew: &BTreeMap<u32, usize>,
    ) -> Result<(), TestCaseError> {
        // One that is gone is found to be when it is opened.
        let writable = |disk: &&u32| model.alive.get(disk).is_some_and(|it| !it.read_only);
        let kept_writable: Vec<&u32> = kept.keys().filter(writable).collect();
        let anew_writable: Vec<&u32> = anew.keys().filter(writable).collect();
        prop_assert_eq!(kept_writable, anew_writable);
        let mounts = model.spaces.iter().flat_map(|it| it.mounts.values());
        let shown: BTreeSet<u32> = mounts.map(|(disk, _)| *disk).collect();
        for disk in kept.keys().filter(|it| shown.contains(it)) {
            let is_writable = model.alive.get(disk).is_none_or(|it| !it.read_only);
            prop_assert!(is_writable, "{} is read-only", disk);
        }
        for disk in anew.keys() {
            prop_assert!(kept.contains_key(disk), "{} is missing", disk);
        }
        for (from, to) in model.mapped.iter().chain(&model.grown) {
            if let (Some(inner), Some(outer)) = (kept.get(from), kept.get(to)) {
                prop_assert!(inner < outer, "{} is on a file in {}", from, to);
            }
        }
        Ok(())
    }

    /// Takes these steps, and checks at each backup.
    fn walk(steps: &[Step]) -> Result<(), TestCaseError> {
        let model = Shared(Rc::new(RefCell::new(Model {
            spaces: vec![Space::default()],
            ..Model::default()
        })));
        let config = Config::default();
        let mut cache = Cache::with(model.clone());
        for step in steps {
            model.0.borrow_mut().apply(step);
            match step {
                Step::Prepare => drop(cache.prepare(&config).unwrap()),
                Step::Backup => {
                    if !cache.is_credible() || !cache.holds() {
                        cache.plan(&config).unwrap();
                    }
                    // It is begun anew for those.
                    let is_as_planned = |cache: &mut Cache<Shared>| {
                        let Cache {
                            read_only, signals, ..
                        } = cache;
                        read_only.writable_now(signals).is_empty()
                            && read_only.turned(signals).is_empty()
                    };
                    while !is_as_planned(&mut cache) {
                        cache.plan(&config).unwrap();
                    }
                    // Had nobody to look before, it is not to happen under this look.
                    model.0.borrow_mut().meanwhile = None;
                    let machine = model.clone().look().unwrap();
                    let anew = plan(&machine.mounts, &machine.topology, &|_| None);
                    check(&model.0.borrow(), &wave_of(&cache.plan), &wave_of(&anew))?;
                }
                _ => {}
            }
        }
        model.0.borrow_mut().meanwhile = None;
        // And a plan that still holds is used, or the whole room would be for nothing.
        cache.plan(&config).unwrap();
        let marks = cache.marks.take().unwrap();
        prop_assert!(marks
            .unchanged(&mut cache.signals, &cache.read_only, false)
            .is_some());
        Ok(())
    }

    #[test]
    fn a_strict_backup_fails_for_what_never_freezes_and_for_what_is_out_of_order() {
        let table = "\
1 0 100:1 / / rw - ext4 /dev/d1 rw
2 1 0:50 / /pool rw - zfs tank rw
3 1 100:2 / /down rw - ext4 /dev/d2 rw,shutdown
4 1 100:3 / /unwanted rw - ext4 /dev/d3 rw,shutdown
5 1 100:4 / /media ro - iso9660 /dev/d4 ro
6 1 100:5 / /turned rw - vfat /dev/d5 ro
";
        let unwanted = |it: &FileSystem| (it.dev == disk(3)).then(|| "a rule".to_owned());
        let mounts = parse(table.as_bytes(), 0).unwrap();
        let plan = plan(&mounts, &Topology::default(), &unwanted);
        let said: Vec<String> = strict_about(&plan).iter().map(Missing::to_string).collect();
        assert_eq!(
            said,
            [
                "/down (ext4, 100:2) is left out: out of order: shut down after an error",
                "/turned (vfat, 100:5) is left out: read-only though mounted for writing, perhaps since an error",
                "/pool (zfs, 0:50) is left out: it has no means to freeze",
            ]
        );
    }

    #[test]
    fn what_has_turned_read_only_is_no_loss_only_if_it_says_so_itself() {
        let is_a_loss = |said| why_turned(said).is_a_loss();
        let lost = [Some(true), Some(false), None].map(is_a_loss);
        assert_eq!(lost, [true, false, true]);
    }

    #[test]
    fn a_plan_is_believed_that_held_and_leads_where_nobody_has_to_mount_anything() {
        let model = Shared(Rc::new(RefCell::new(Model {
            spaces: vec![Space::default()],
            ..Model::default()
        })));
        let config = Config::default();
        let mut cache = Cache::with(model.clone());
        let apply = |step: &Step| model.0.borrow_mut().apply(step);
        let prepare = |cache: &mut Cache<Shared>| drop(cache.prepare(&config).unwrap());
        apply(&mount(4));
        (0..2).for_each(|_| prepare(&mut cache));
        assert!(cache.is_credible());
        cache.doubt();
        assert!(!cache.is_credible(), "it may have changed");
        prepare(&mut cache);
        assert!(cache.is_credible(), "it was looked at");
        apply(&Step::MountNowhere { disk: 5 });
        (0..2).for_each(|_| prepare(&mut cache));
        assert!(!cache.is_credible(), "no path leads to one of them");
    }

    fn mount(disk: u32) -> Step {
        Step::Mount {
            space: 0,
            disk,
            read_only: false,
        }
    }

    #[test]
    fn a_mount_after_the_plan_is_in_the_first_backup_and_in_the_second() {
        let steps = [
            mount(4),
            Step::Prepare,
            mount(5),
            Step::Backup,
            Step::Backup,
        ];
        walk(&steps).unwrap();
    }

    #[test]
    fn what_becomes_writable_while_the_machine_is_looked_at_is_in_the_backup() {
        let read_only = Step::Mount {
            space: 0,
            disk: 5,
            read_only: true,
        };
        let meanwhile = Step::RemountMeanwhile {
            space: 0,
            nth: 1,
            read_only: false,
        };
        walk(&[mount(4), read_only, meanwhile, Step::Backup]).unwrap();
    }

    #[test]
    fn what_becomes_writable_is_named_though_another_is_out_of_order_and_an_unmount_is_not() {
        let model = Shared(Rc::new(RefCell::new(Model {
            spaces: vec![Space::default()],
            shut_down: Some(4),
            ..Model::default()
        })));
        let mut cache = Cache::with(model.clone());
        let read_only = |disk| Step::Mount {
            space: 0,
            disk,
            read_only: true,
        };
        let apply = |step: &Step| model.0.borrow_mut().apply(step);
        [mount(4), read_only(5), read_only(3)]
            .iter()
            .for_each(apply);
        cache.prepare(&Config::default()).unwrap();
        assert!(cache.marks.is_none(), "nothing tells when it is repaired");
        let writable = |cache: &mut Cache<Shared>| cache.read_only.writable_now(&mut cache.signals);
        assert!(writable(&mut cache).is_empty());
        apply(&Step::Remount {
            space: 0,
            nth: 1,
            read_only: false,
        });
        assert_eq!(writable(&mut cache), ["/m4 (ext4, 100:5)"]);
        apply(&Step::Unmount {
            space: 0,
            nth: 1,
            lazily: false,
        });
        assert!(writable(&mut cache).is_empty());
    }

    #[test]
    fn what_an_error_makes_read_only_without_a_word_is_in_no_backup_after_that() {
        let fail = Step::Fail { disk: 4 };
        let steps = [
            mount(3),
            mount(4),
            Step::Prepare,
            fail,
            Step::Backup,
            Step::Backup,
        ];
        walk(&steps).unwrap();
    }

    #[test]
    fn a_disk_that_is_mapped_anew_without_a_word_is_in_its_new_place() {
        let map = |image, tells| Step::Map {
            disk: 5,
            image: Some(image),
            tells,
        };
        let mounts = [mount(3), mount(4), mount(5)];
        let steps = [
            &mounts[..],
            &[map(3, true), Step::Backup, map(4, false), Step::Backup],
        ];
        walk(&steps.concat()).unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]
        #[test]
        fn whatever_happens_a_backup_has_the_plan_that_would_be_made_anew(
            steps in proptest::collection::vec(step(), 1..60)
        ) {
            walk(&steps)?;
        }
    }
}
