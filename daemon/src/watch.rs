// SPDX-License-Identifier: GPL-2.0-only

//! Whether the machine still looks as it did when a plan was made, so that the plan can be used
//! again without reading all tables anew, and whether something has come since that was made.
//!
//! The kernel is asked for what any change leaves behind: the own mount table knows whether it was
//! changed since it was last asked, the other namespaces are told by their newest mount and their
//! count, what is mounted where no table shows it is listed in sysfs, the read-only superblocks that
//! were left out are looked at, and so are the others, which an error makes read-only without a word, and each change of a block device is a uevent, which are counted, or
//! one of what it is mapped to. Mounts have numbers that only grow, so that one of our own shows whether
//! anybody else has made any, wherever that may be attached, or nowhere. Nothing is waited for, so it costs nothing as long as nobody asks; and
//! nothing is held that would keep a namespace or a mount from vanishing. Kernels before 6.12 do not
//! tell all of this: there a plan is never used twice.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{open, OFlag};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::stat::Mode;

use crate::apart::{Patience, Questions};
use crate::machine::{self, LookError, Machine, Memory, Ways};
use crate::mounts::{self, DevId, Mount};
use crate::namespaces::{self, Namespaces, State};
use crate::plan::{FileSystem, LeftOut, Place, Plan, Reason};
use crate::superblocks::{self, Listed, Lists};
use crate::sys;
use crate::topology;

/// So many mounts that were made only for their numbers are there before that takes time which is waited for.
const MOST_KEPT: usize = 64;
/// How long a look at new mounts may take while all is frozen: anybody may make many, and one over the other.
const GLANCE: Duration = Duration::from_millis(200);

/// How long all look-ups of one plan may be held up by those that hang.
const PATIENCE: Duration = Duration::from_secs(1);

/// What tells of changes, and of the machine itself: the kernel, or a model of it in tests.
pub trait Signals {
    /// The way to what was seen.
    type Ways;
    /// What changes with each mount and unmount in the other namespaces.
    type States: PartialEq;
    /// The superblocks that are alive.
    type Alive: PartialEq + Clone;
    /// A mount by which a superblock can be looked at without reaching it.
    type At;

    /// Reads everything anew.
    fn look(&mut self) -> Result<Machine<Self::Ways>, LookError>;
    /// Whether the own table has changed since this was last asked: each change is told once.
    fn table_has_changed(&mut self) -> io::Result<bool>;
    /// How many changes of devices there have been.
    fn uevents(&mut self) -> io::Result<u64>;
    /// Which superblocks are alive. While all is frozen it is asked `at_a_glance`: no path is looked up then.
    fn alive(&mut self, at_a_glance: bool) -> io::Result<Self::Alive>;
    /// Whether a glance shows all that there is to be seen of these.
    fn shows_at_a_glance(alive: &Self::Alive) -> bool;
    /// Nobody waits: what was put off can be done.
    fn rest(&mut self) {}
    /// The devices that one is mapped to by now.
    fn slaves(&mut self, dev: DevId) -> Vec<DevId>;
    /// The way to what is there now.
    fn ways(&mut self) -> io::Result<Self::Ways>;
    /// The states of the other namespaces when this way was found; `None` where nobody tells.
    fn states(ways: &Self::Ways) -> Option<Self::States>;
    /// Where the file system with this number can be looked at, if this place shows it. What hangs is waited for
    /// with `patience`.
    fn find(
        &mut self,
        ways: &Self::Ways,
        place: &Place,
        dev: DevId,
        patience: &Patience,
    ) -> Option<Self::At>;
    /// Whether what is mounted there is read-only; `None` when it is mounted there no longer.
    fn is_read_only(&mut self, at: &Self::At) -> Option<bool>;
}

/// What there was to hear before the machine was looked at.
pub struct Before<S: Signals> {
    uevents: u64,
    alive: S::Alive,
}

impl<S: Signals> Before<S> {
    /// Listens: what changes from now on is noticed. `None` where that cannot be promised.
    pub fn listen(signals: &mut S) -> Option<Self> {
        // What it has to tell is in the tables that are read next.
        signals.table_has_changed().ok()?;
        Some(Before {
            uevents: signals.uevents().ok()?,
            alive: signals.alive(false).ok()?,
        })
    }

    /// The superblocks that there were.
    pub fn alive(&self) -> &S::Alive {
        &self.alive
    }

    /// Completes it with what was seen and with what the plan depends on. `None` where a change of
    /// that cannot be noticed.
    pub fn complete(
        self,
        signals: &mut S,
        machine: &Machine<S::Ways>,
        plan: &Plan,
        read_only: &ReadOnly<S>,
    ) -> Option<Marks<S>> {
        if !machine.unseen.is_empty() || machine.topology.unanswered {
            // Nothing tells when they can be looked into, or answer.
            return None;
        }
        for left in &plan.left_out {
            match left.reason {
                // Nothing tells when one is repaired.
                Reason::Broken(_) | Reason::Unreachable(_) => return None,
                ref it if it.is_read_only() && !read_only.has(&left.file_system) => return None,
                // The last three are of one backup only.
                Reason::ReadOnly
                | Reason::TurnedReadOnly
                | Reason::MadeReadOnly
                | Reason::NoBlockDevice
                | Reason::Excluded(_)
                | Reason::Elsewhere
                | Reason::Busy(_)
                | Reason::Stalled(_) => {}
            }
        }
        let mut mapped = Vec::new();
        for (dev, device) in &machine.topology.devices {
            let slaves = signals.slaves(*dev);
            if slaves.is_empty() {
                continue;
            }
            if slaves != device.below {
                return None;
            }
            mapped.push((*dev, slaves));
        }
        Some(Marks {
            before: self,
            states: S::states(&machine.ways)?,
            mapped,
        })
    }
}

/// What the machine looked like.
pub struct Marks<S: Signals> {
    before: Before<S>,
    states: S::States,
    /// What the mapped devices are mapped to.
    mapped: Vec<(DevId, Vec<DevId>)>,
}

impl<S: Signals> Marks<S> {
    /// Whether nothing tells of a change that does so in a moment: more may have changed.
    pub fn may_hold(&self, signals: &mut S) -> bool {
        signals.table_has_changed().is_ok_and(|it| !it)
            && signals.uevents().is_ok_and(|it| it == self.before.uevents)
    }

    /// Whether a glance is enough to tell that nothing has changed.
    pub fn show_at_a_glance(&self) -> bool {
        self.mapped.is_empty() && S::shows_at_a_glance(&self.before.alive)
    }

    /// The states of the other namespaces.
    pub fn states(&self) -> &S::States {
        &self.states
    }

    /// The marks and the way to what was seen, if nothing has changed since, as far as a glance tells or as far
    /// as anybody does. Otherwise they are gone: a change that was heard once is not heard again.
    pub fn unchanged(
        self,
        signals: &mut S,
        read_only: &ReadOnly<S>,
        at_a_glance: bool,
    ) -> Option<(Self, S::Ways)> {
        if signals.table_has_changed().ok()?
            || signals.uevents().ok()? != self.before.uevents
            || signals.alive(at_a_glance).ok()? != self.before.alive
        {
            return None;
        }
        let ways = signals.ways().ok()?;
        let same = S::states(&ways).is_some_and(|it| it == self.states)
            && (self.mapped.iter()).all(|(dev, below)| signals.slaves(*dev) == *below)
            && read_only.is_as_it_was(signals)
            // Whoever glances asks for that when all is frozen.
            && (at_a_glance || read_only.turned(signals).is_empty());
        same.then_some((self, ways))
    }
}

/// Read-only superblocks that were left out for it, and writable ones that were not, with their names, as far as
/// they can be looked at without reaching them.
pub struct ReadOnly<S: Signals> {
    left_out: Vec<Seen<S>>,
    chosen: Vec<Seen<S>>,
}

/// A superblock by its number, its name, and a mount of it.
type Seen<S> = (DevId, String, <S as Signals>::At);

impl<S: Signals> Default for ReadOnly<S> {
    /// None.
    fn default() -> Self {
        ReadOnly {
            left_out: Vec::new(),
            chosen: Vec::new(),
        }
    }
}

impl<S: Signals> ReadOnly<S> {
    /// Those of a plan.
    pub fn of(signals: &mut S, ways: &S::Ways, plan: &Plan) -> Self {
        let patience = Patience::new(PATIENCE);
        let mut find = |file_system: &FileSystem| {
            // A walk through what another has to answer for, or to what lies over it, is not worth it.
            let places = file_system.places.iter();
            let places = places.filter(|p| (p.walkable || p.layers.is_some()) && !p.hidden);
            let mut places = places.take(mounts::ENOUGH);
            let at = places.find_map(|place| {
                let at = signals.find(ways, place, file_system.dev, &patience)?;
                // It may be different by now, and then that has to be heard of.
                signals.is_read_only(&at).map(|_| at)
            })?;
            Some((file_system.dev, file_system.to_string(), at))
        };
        let left_out = plan.left_out.iter();
        let left_out = left_out.filter(|it| it.reason.is_read_only());
        let chosen = plan.waves.iter().flatten().chain(&plan.synced);
        let chosen = chosen.filter(|it| !mounts::is_served(&it.fs_type));
        ReadOnly {
            left_out: left_out.filter_map(|it| find(&it.file_system)).collect(),
            chosen: chosen.filter_map(&mut find).collect(),
        }
    }

    fn has(&self, file_system: &FileSystem) -> bool {
        let mut left_out = self.left_out.iter();
        left_out.any(|(dev, ..)| *dev == file_system.dev)
    }

    /// Whether all of those that were left out are mounted and read-only still.
    fn is_as_it_was(&self, signals: &mut S) -> bool {
        let mut left_out = self.left_out.iter();
        left_out.all(|(_, _, at)| signals.is_read_only(at) == Some(true))
    }

    /// The names of those that are writable by now. One that was unmounted is not.
    pub fn writable_now(&self, signals: &mut S) -> Vec<String> {
        names_where(&self.left_out, signals, false)
    }

    /// The names of those that were writable and are not by now. An error may have made them so, which nobody tells,
    /// and the kernel takes what is read-only for frozen whatever it has not written.
    pub fn turned(&self, signals: &mut S) -> Vec<String> {
        names_where(&self.chosen, signals, true)
    }
}

fn names_where<S: Signals>(all: &[Seen<S>], signals: &mut S, read_only: bool) -> Vec<String> {
    let found = all.iter();
    let found = found.filter(|(_, _, at)| signals.is_read_only(at) == Some(read_only));
    found.map(|(_, name, _)| name.clone()).collect()
}

/// The superblocks that are alive, as far as sysfs lists them, and what else tells of others where the kernel
/// does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alive {
    listed: Listed,
    /// The devices of those that may have several.
    members: BTreeSet<(OsString, OsString)>,
    /// The newest mount of the own namespace.
    newest: Option<u64>,
    /// How many mounts were made by anybody else, anywhere.
    made: Option<u64>,
}

/// By what it is told whether a superblock is one that was there before.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Superblock {
    /// When it came to be, where sysfs lists it: no other has that.
    born: Option<u64>,
    /// The devices that it is on. An anonymous number is none: whoever comes next gets it.
    devices: Vec<DevId>,
    /// What is on no device that is known is told by its type and source: the name of a data set of ZFS.
    named: (String, Option<OsString>),
}

impl Superblock {
    fn of(it: &FileSystem) -> Self {
        let own = Some(it.dev).filter(|dev| dev.major != 0);
        Superblock {
            born: it.listed.as_ref().map(|it| it.inode),
            devices: own.into_iter().chain(it.devices.iter().copied()).collect(),
            named: (it.fs_type.clone(), it.source.clone()),
        }
    }

    fn is(&self, other: &Superblock) -> bool {
        match (self.born, other.born) {
            (Some(one), Some(other)) => one == other,
            _ if self.devices.is_empty() || other.devices.is_empty() => self.named == other.named,
            _ => self.devices.iter().any(|dev| other.devices.contains(dev)),
        }
    }
}

/// What a plan knows of that is on disks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// What is frozen, synced, or left out for a reason that stays.
    all: Vec<Superblock>,
    /// What is left out for being read-only.
    read_only: Vec<Superblock>,
    /// The superblocks of what is frozen or synced, by number.
    chosen: BTreeSet<DevId>,
    /// The same of what a rule leaves out, or something else that stays.
    others: BTreeSet<DevId>,
}

impl Known {
    /// What this plan knows.
    pub fn of(plan: &Plan) -> Self {
        let chosen = || plan.waves.iter().flatten().chain(&plan.synced);
        let mut known = Known {
            all: chosen().map(Superblock::of).collect(),
            chosen: chosen().map(|it| it.dev).collect(),
            ..Known::default()
        };
        for LeftOut {
            file_system,
            reason,
        } in &plan.left_out
        {
            let it = Superblock::of(file_system);
            match reason {
                Reason::NoBlockDevice => continue,
                reason if reason.is_read_only() => {
                    known.read_only.push(it);
                    continue;
                }
                // A rule leaves it out the next time as well. Another on the same device it may not.
                Reason::Excluded(_) if it.born.is_none() => {}
                _ => known.all.push(it),
            }
            known.others.insert(file_system.dev);
        }
        known
    }

    /// What a later plan has on its disks and this one did not have, with what has become of it.
    pub fn come_since(&self, later: &Plan) -> Vec<Come> {
        let left_out = later.left_out.iter();
        let losses = left_out.filter(|it| it.reason.is_a_loss());
        let losses = losses.map(|it| (&it.file_system, it.reason == Reason::TurnedReadOnly));
        let all = later.waves.iter().flatten().chain(&later.synced);
        let all = all.map(|it| (it, false)).chain(losses);
        let come = |(it, is_read_only): (&FileSystem, bool)| {
            let this = Superblock::of(it);
            let is_in = |known: &[Superblock]| known.iter().any(|it| it.is(&this));
            let was_read_only = is_in(&self.read_only);
            // That of one without a mount shows only when it is reached, and nobody changes it.
            let is_as_before = was_read_only && (it.places.is_empty() || is_read_only);
            (!is_in(&self.all) && !is_as_before).then(|| Come {
                name: it.to_string(),
                was_read_only,
            })
        };
        all.filter_map(come).collect()
    }
}

/// A file system that has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Come {
    /// For people.
    pub name: String,
    /// Whether it was there and read-only.
    pub was_read_only: bool,
}

impl fmt::Display for Come {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.was_read_only {
            true => "made writable",
            false => "mounted",
        };
        write!(f, "{} was {what}", self.name)
    }
}

/// What there was when a plan was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scene {
    /// The superblocks that are listed; `None` if nobody tells.
    listed: Option<Listed>,
    /// By the number of each mount namespace its newest mount; `None` on kernels that do not tell.
    newest: Option<BTreeMap<u64, u64>>,
    /// What the plan knows of.
    pub known: Known,
}

/// The kernel's own signals. What cannot be opened tells nothing, and then no plan is kept.
pub struct Kernel {
    /// The root of procfs.
    proc: Option<Arc<OwnedFd>>,
    /// The own namespace, and its number.
    own: Option<File>,
    number: Option<u64>,
    /// Its mount table, on which poll(2) says whether it has changed since it was last asked.
    table: Option<File>,
    /// `/sys/kernel/uevent_seqnum`.
    uevents: Option<File>,
    /// Where superblocks are listed.
    lists: Option<Lists>,
    /// What there was when the machine was looked at last.
    memory: Memory,
    /// How many mounts were made only for their numbers, and those that are still there.
    own_mounts: u64,
    mounts: Vec<OwnedFd>,
}

/// A mount, by the numbers of its namespace and its own.
pub struct MountAt {
    namespace: u64,
    mount: u64,
    dev: DevId,
}

impl Default for Kernel {
    /// Opens what tells.
    fn default() -> Self {
        let own = namespaces::own().ok();
        Kernel {
            proc: machine::open_proc().ok().map(Arc::new),
            number: own
                .as_ref()
                .and_then(|it| sys::namespace_id(it.as_fd()).ok()),
            own,
            table: File::open(Path::new("/proc").join(mounts::OWN_TABLE)).ok(),
            uevents: File::open("/sys/kernel/uevent_seqnum").ok(),
            lists: Lists::open().ok(),
            memory: Memory::default(),
            own_mounts: 0,
            mounts: Vec::new(),
        }
    }
}

impl Kernel {
    /// One that is told what has turned read-only.
    pub fn told(turned: BTreeSet<DevId>) -> Self {
        Kernel {
            memory: Memory::told(turned),
            ..Kernel::default()
        }
    }

    /// What to tell from, later, what has come since `alive` and these states of the other namespaces were
    /// found, in this order, and the plan was made.
    pub fn then(&self, alive: Option<Alive>, states: Option<&[State]>, plan: &Plan) -> Scene {
        let newest = || {
            let others = states?.iter();
            let own = (self.number?, alive.as_ref()?.newest?);
            Some(others.map(|it| (it.id(), it.newest())).chain([own]))
        };
        Scene {
            newest: newest().map(Iterator::collect),
            listed: alive.map(|it| it.listed),
            known: Known::of(plan),
        }
    }

    /// The way to what is in the own namespace.
    pub fn own_way(&self) -> io::Result<Ways> {
        Ok(Ways {
            proc: Arc::clone(told(self.proc.as_ref())?),
            namespaces: Namespaces::default(),
        })
    }

    /// How many mounts were made by anybody else since the machine was started, and how many by this process for
    /// any other purpose. The one that it takes goes later: that waits for all processors.
    fn mounts_made(&mut self) -> io::Result<u64> {
        let mount = sys::clone_mount(told(self.proc.as_ref())?.as_fd())?;
        self.own_mounts += 1;
        if self.mounts.len() == MOST_KEPT {
            // There was no rest between so many backups.
            self.mounts.clear();
        }
        let number = sys::unique_mount_id(mount.as_fd())?;
        self.mounts.push(mount);
        Ok(number.wrapping_sub(self.own_mounts))
    }

    /// Whether something may have come that was not there then, as far as anybody tells: a superblock of a
    /// type that is listed in sysfs, or a mount of one of another type that can be written to. Where a mount cannot
    /// be asked by itself, also whether one has become read-only. No path is looked up for it, so that it can be asked once after each [`Signals::alive`] while all is frozen.
    pub fn has_news(&self, then: &Scene) -> bool {
        let now = self.lists.as_ref().map(|it| it.read().ok().flatten());
        now.is_some_and(|now| Listed::has_news(then.listed.as_ref(), now.as_ref()))
            // Of whom nothing is known now, though it was then, something may have come.
            || self.has_new_mounts(then).unwrap_or(then.newest.is_some())
    }

    /// Has [`Kernel::has_news`] ready to be asked again.
    pub fn rewind(&self) {
        // What cannot be rewound has nothing to tell, and that is news.
        let _ = self.lists.as_ref().map(Lists::rewind);
    }

    /// The names of the superblocks that are listed in sysfs and were not then: a device, or a UUID. One that
    /// is gone again by now has none.
    pub fn names_since(&self, then: &Scene) -> Vec<String> {
        // It was asked before.
        let now = self.lists.as_ref().filter(|it| it.rewind().is_ok());
        let now = now.and_then(|it| it.read().ok().flatten());
        match (now, &then.listed) {
            (Some(now), Some(then)) => now.since(then),
            _ => Vec::new(),
        }
    }

    /// Types that have no block device of their own are listed in sysfs, but for one that nothing can hold.
    fn has_new_mounts(&self, then: &Scene) -> io::Result<bool> {
        let is_news = |dev: DevId, read_only: bool| {
            let known = [&then.known.chosen, &then.known.others];
            dev.major != 0 && !read_only && !known.iter().any(|it| it.contains(&dev))
        };
        let (Some(newest), Some(number)) = (&then.newest, self.number) else {
            // Nobody tells of the other namespaces.
            let text = mounts::whole(told(self.table.as_ref())?)?;
            let mounts = mounts::parse(&text, 0).map_err(io::Error::other)?;
            let has_turned = |it: &Mount| !it.writable && then.known.chosen.contains(&it.dev);
            return Ok(mounts
                .iter()
                .any(|it| is_news(it.dev, !it.writable) || has_turned(it)));
        };
        let namespaces = Namespaces::find_beside(told(self.own.as_ref())?)?;
        let others = told(namespaces.states())?.iter();
        let now = others.map(|it| (it.id(), it.newest()));
        let until = Instant::now() + GLANCE;
        for (id, now) in now.chain([(number, sys::newest_mount(number)?)]) {
            // Numbers only grow, and of a namespace that is new all mounts are.
            let then = newest.get(&id).copied().unwrap_or(0);
            if now <= then {
                continue;
            }
            let mut new = sys::mounts_after(id, then, until)?.into_iter();
            // One that is gone again is no news. Of so many that it takes long one may be.
            if new.any(|it| {
                let found = sys::superblock_of(id, it);
                found.is_ok_and(|it| is_news(it.dev, it.read_only)) || Instant::now() >= until
            }) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// What there is no way to tell.
fn told<T: ?Sized>(it: Option<&T>) -> io::Result<&T> {
    it.ok_or_else(|| io::ErrorKind::Unsupported.into())
}

impl Signals for Kernel {
    type Ways = Ways;
    type States = Vec<State>;
    type Alive = Alive;
    type At = MountAt;

    fn look(&mut self) -> Result<Machine, LookError> {
        match &self.proc {
            Some(proc) => Machine::look_through(Arc::clone(proc), &mut self.memory),
            None => Machine::look(),
        }
    }

    fn table_has_changed(&mut self) -> io::Result<bool> {
        let table = told(self.table.as_ref())?;
        let mut fds = [PollFd::new(table.as_fd(), PollFlags::POLLPRI)];
        Ok(poll(&mut fds, PollTimeout::ZERO)? != 0)
    }

    fn uevents(&mut self) -> io::Result<u64> {
        number_in(told(self.uevents.as_ref())?)
    }

    fn alive(&mut self, at_a_glance: bool) -> io::Result<Alive> {
        let lists = told(self.lists.as_ref())?;
        let listed = lists.rewind().and_then(|()| lists.read())?;
        let listed = match listed {
            Some(it) => it,
            // There is a new type.
            None if at_a_glance => return Err(io::ErrorKind::NotFound.into()),
            None => {
                let lists = self.lists.insert(Lists::open()?);
                told(lists.read()?.as_ref())?.clone()
            }
        };
        told(self.lists.as_ref())?.rewind()?;
        let members = match at_a_glance || !listed.may_have_members() {
            true => BTreeSet::new(),
            false => superblocks::members(),
        };
        Ok(Alive {
            listed,
            members,
            newest: self.number.and_then(|own| sys::newest_mount(own).ok()),
            made: self.mounts_made().ok(),
        })
    }

    fn shows_at_a_glance(alive: &Alive) -> bool {
        alive.members.is_empty()
    }

    fn rest(&mut self) {
        self.mounts.clear();
    }

    fn slaves(&mut self, dev: DevId) -> Vec<DevId> {
        superblocks::folder_of(dev).map_or_else(Vec::new, |dir| topology::slaves(&dir))
    }

    fn ways(&mut self) -> io::Result<Ways> {
        Ok(Ways {
            proc: Arc::clone(told(self.proc.as_ref())?),
            namespaces: Namespaces::find_beside(told(self.own.as_ref())?)?,
        })
    }

    fn states(ways: &Ways) -> Option<Vec<State>> {
        ways.namespaces.states().map(<[State]>::to_vec)
    }

    fn find(
        &mut self,
        ways: &Ways,
        place: &Place,
        dev: DevId,
        patience: &Patience,
    ) -> Option<MountAt> {
        static ASKED: Questions<DevId> = Questions::new();
        let namespace = match place.namespace {
            0 => self.number?,
            n => ways.namespaces.states()?.get(n - 1)?.id(),
        };
        let (number, path) = (place.namespace, place.path.clone());
        let look = move |fds: Vec<OwnedFd>| {
            let look = || {
                let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
                let fd = open(&path, flags, Mode::empty())?;
                sys::unique_mount_id(fd.as_fd())
            };
            Namespaces::alone(number, fds.into_iter().next()).within(number, look)?
        };
        let only = ways.namespaces.only(number).ok()?;
        let fds: Vec<BorrowedFd<'_>> = only.fds().collect();
        // Also what can be walked to may be below an automount, whose daemon is waited for while it unmounts it.
        let about = place.layers.unwrap_or(dev);
        let mount = patience.ask(&ASKED, about, &fds, look)?.ok()?;
        Some(MountAt {
            namespace,
            mount,
            dev,
        })
    }

    fn is_read_only(&mut self, at: &MountAt) -> Option<bool> {
        let found = sys::superblock_of(at.namespace, at.mount).ok()?;
        (found.dev == at.dev).then_some(found.read_only)
    }
}

fn number_in(file: &File) -> io::Result<u64> {
    let mut text = [0; 24];
    let size = file.read_at(&mut text, 0)?;
    let text = text.get(..size).unwrap_or_default();
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{fcntl, FcntlArg};

    use crate::plan::plan;
    use crate::superblocks::Entry;
    use crate::topology::{Topology, Unmounted};

    const THEN: &str = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 0:40 / /btrfs rw - btrfs /dev/sdb rw
3 1 8:3 / /ro ro - ext4 /dev/sda3 ro
4 1 8:4 / /unwanted rw - ext4 /dev/sda4 rw
5 1 0:41 / /run rw - tmpfs tmpfs rw
6 1 8:6 / /ro-too ro - ext4 /dev/sda6 ro
";

    fn planned(table: &str, unmounted: &[u32]) -> Plan {
        let dev = |minor| DevId { major: 8, minor };
        let mut topology = Topology::default();
        for (minor, device, inode) in [(40, 16, 7), (41, 32, 9)] {
            let btrfs = DevId { major: 0, minor };
            topology.members.insert(btrfs, vec![dev(device)]);
            let listed = Entry {
                fs_type: "btrfs".into(),
                name: String::new(),
                inode,
            };
            topology.listed.insert(btrfs, listed);
        }
        let unmounted = unmounted.iter().map(|minor| Unmounted {
            fs_type: "ext4".into(),
            name: format!("sd{minor}"),
            devices: vec![dev(*minor)],
            listed: None,
            unreachable: None,
        });
        topology.unmounted = unmounted.collect();
        let mounts = mounts::parse(table.as_bytes(), 0).unwrap();
        let unwanted = |it: &FileSystem| {
            let mut places = it.places.iter();
            let found = places.any(|it| it.path.starts_with("/unwanted"));
            found.then(|| "a rule".to_owned())
        };
        plan(&mounts, &topology, &unwanted)
    }

    fn come(later: &Plan) -> Vec<String> {
        let known = Known::of(&planned(THEN, &[]));
        let come = known.come_since(later).into_iter();
        come.map(|it| it.to_string()).collect()
    }

    #[test]
    fn what_is_read_only_as_before_has_not_come() {
        let turned = planned(
            &format!("{THEN}20 1 8:20 / /turned rw - vfat /dev/sda20 ro\n"),
            &[],
        );
        assert_eq!(Known::of(&turned).come_since(&turned), Vec::new());
        assert_eq!(come(&turned), ["/turned (vfat, 8:20) was mounted"]);
    }

    #[test]
    fn only_what_would_be_in_a_backup_has_come() {
        assert!(come(&planned(THEN, &[])).is_empty());
        let new = "\
10 1 8:10 / /vfat rw - vfat /dev/sda10 rw
11 1 8:11 / /image rw - erofs /dev/sda11 ro
12 1 8:12 / /unwanted/new rw - ext4 /dev/sda12 rw
13 1 0:50 / /tank rw - zfs tank rw
14 1 8:1 / /bind rw - ext4 /dev/sda1 rw
15 1 0:51 / /tmp rw - tmpfs tmpfs rw
16 1 8:13 / /down rw - ext4 /dev/sda13 rw,shutdown
";
        assert_eq!(
            come(&planned(&format!("{THEN}{new}"), &[])),
            [
                "/vfat (vfat, 8:10) was mounted",
                "/tank (zfs, 0:50) was mounted",
                "/down (ext4, 8:13) was mounted",
            ]
        );
    }

    #[test]
    fn what_has_the_number_of_another_has_come() {
        // That of a memory file system: the kernel gives out the lowest.
        let anonymous = THEN.replace(
            "5 1 0:41 / /run rw - tmpfs tmpfs rw",
            "5 1 0:41 / /new rw - btrfs /dev/sdc rw",
        );
        assert_eq!(
            come(&planned(&anonymous, &[])),
            ["/new (btrfs, 0:41) was mounted"]
        );
        // A loop device that was let go, with what a rule leaves out, and set up anew.
        let device = THEN.replace("/unwanted", "/wanted");
        assert_eq!(
            come(&planned(&device, &[])),
            ["/wanted (ext4, 8:4) was mounted"]
        );
        let data_set = |name: &str| format!("{THEN}7 1 0:50 / /tank rw - zfs {name} rw\n");
        let known = Known::of(&planned(&data_set("tank/a"), &[]));
        assert!(known
            .come_since(&planned(&data_set("tank/a"), &[]))
            .is_empty());
        assert_eq!(
            known.come_since(&planned(&data_set("tank/b"), &[])).len(),
            1
        );
    }

    #[test]
    fn what_is_mounted_no_longer_has_not_come_unless_it_was_not_there() {
        let rest = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n";
        // The btrfs that was mounted before, and one that was read-only.
        assert!(come(&planned(rest, &[16, 3])).is_empty());
        assert_eq!(
            come(&planned(rest, &[20])),
            ["sd20 (ext4, 8:20, in use but mounted nowhere) was mounted"]
        );
    }

    #[test]
    fn the_own_namespace_is_looked_at_whatever_the_others_are_like() {
        let mut kernel = Kernel::default();
        let root = Place {
            namespace: 0,
            id: 0,
            path: "/".into(),
            whole: true,
            subvolume: None,
            walkable: true,
            layers: None,
            hidden: false,
            was_at: None,
        };
        let ways = Ways {
            proc: Arc::new(machine::open_proc().unwrap()),
            namespaces: Namespaces::default(),
        };
        let patience = Patience::new(Duration::from_secs(60));
        let mut find = |place| kernel.find(&ways, place, DevId::default(), &patience);
        let found = find(&root);
        // Who looks may hang, and has nothing open of whoever asks.
        let ours = File::open("/").unwrap();
        // By a number that nobody else's descriptor has.
        let number = fcntl(&ours, FcntlArg::F_DUPFD_CLOEXEC(700)).unwrap();
        let path = format!("/proc/thread-self/fd/{number}").into();
        assert!(find(&Place {
            path,
            ..root.clone()
        })
        .is_none());
        nix::unistd::close(number).unwrap();
        // Kernels before 6.12 do not tell numbers.
        assert_eq!(found.is_some(), kernel.number.is_some());
    }

    #[test]
    fn who_told_of_mounts_then_and_tells_no_longer_may_have_news() {
        let silent = Kernel {
            proc: None,
            own: None,
            number: Some(1),
            table: None,
            uevents: None,
            lists: None,
            own_mounts: 0,
            mounts: Vec::new(),
            memory: Memory::default(),
        };
        let mut then = Scene::default();
        assert!(!silent.has_news(&then), "nobody ever told");
        then.newest = Some(BTreeMap::new());
        assert!(silent.has_news(&then));
    }

    #[test]
    fn what_was_read_only_has_been_made_writable() {
        let later = THEN.replace("/ro ro - ext4 /dev/sda3 ro", "/ro rw - ext4 /dev/sda3 rw");
        assert_eq!(
            come(&planned(&later, &[])),
            ["/ro (ext4, 8:3) was made writable"]
        );
    }
}
