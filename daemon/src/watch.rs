// SPDX-License-Identifier: GPL-2.0-only

//! Whether the machine still looks as it did when a plan was made, so that the plan can be used
//! again without reading all tables anew.
//!
//! The kernel is asked for what any change leaves behind: the own mount table knows whether it was
//! changed since it was last asked, the other namespaces are told by their newest mount and their
//! count, what is mounted where no table shows it is listed in sysfs, the read-only superblocks that
//! were left out are looked at, and each change of a block device is a uevent, which are counted, or
//! one of what it is mapped to. Nothing is waited for, so it costs nothing as long as nobody asks; and
//! nothing is held that would keep a namespace or a mount from vanishing. Kernels before 6.12 do not
//! tell all of this: there a plan is never used twice.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::{open, OFlag};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::stat::Mode;

use crate::machine::{self, LookError, Machine, Ways};
use crate::mounts::{self, DevId};
use crate::namespaces::{self, Namespaces, State};
use crate::plan::{FileSystem, LeftOut, Place, Plan, Reason};
use crate::superblocks::{self, Listed, Lists};
use crate::sys;
use crate::topology;

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
    /// Which superblocks are alive.
    fn alive(&mut self) -> io::Result<Self::Alive>;
    /// The devices that one is mapped to by now.
    fn slaves(&mut self, dev: DevId) -> Vec<DevId>;
    /// The way to what is there now.
    fn ways(&mut self) -> io::Result<Self::Ways>;
    /// The states of the other namespaces when this way was found; `None` where nobody tells.
    fn states(ways: &Self::Ways) -> Option<Self::States>;
    /// Where the file system with this number can be looked at, if this place shows it. Nothing is looked up
    /// that may hang.
    fn find(&mut self, ways: &Self::Ways, place: &Place, dev: DevId) -> Option<Self::At>;
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
            alive: signals.alive().ok()?,
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
        for left in &plan.left_out {
            match left.reason {
                // Nothing tells when one is repaired.
                Reason::Broken(_) | Reason::Unreachable(_) => return None,
                Reason::ReadOnly if !read_only.has(&left.file_system) => return None,
                // The last two are of one backup only.
                Reason::ReadOnly
                | Reason::NoBlockDevice
                | Reason::Excluded(_)
                | Reason::Elsewhere
                | Reason::Busy(_) => {}
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
    /// The marks and the way to what was seen, if nothing has changed since. Otherwise they are gone:
    /// a change that was heard once is not heard again.
    pub fn unchanged(self, signals: &mut S, read_only: &ReadOnly<S>) -> Option<(Self, S::Ways)> {
        if signals.table_has_changed().ok()?
            || signals.uevents().ok()? != self.before.uevents
            || signals.alive().ok()? != self.before.alive
        {
            return None;
        }
        let ways = signals.ways().ok()?;
        let same = S::states(&ways).is_some_and(|it| it == self.states)
            && (self.mapped.iter()).all(|(dev, below)| signals.slaves(*dev) == *below)
            && read_only.is_as_it_was(signals);
        same.then_some((self, ways))
    }
}

/// Read-only superblocks that were left out for it, with their names, as far as they can be looked at
/// without reaching them.
pub struct ReadOnly<S: Signals>(Vec<(DevId, String, S::At)>);

impl<S: Signals> Default for ReadOnly<S> {
    /// None.
    fn default() -> Self {
        ReadOnly(Vec::new())
    }
}

impl<S: Signals> ReadOnly<S> {
    /// Those of a plan.
    pub fn of(signals: &mut S, ways: &S::Ways, plan: &Plan) -> Self {
        let left_out = plan.left_out.iter();
        let left_out = left_out.filter(|it| it.reason == Reason::ReadOnly);
        let found = left_out.filter_map(|LeftOut { file_system, .. }| {
            // A walk through what may hang, or to what lies over it, is not worth it.
            let places = file_system.places.iter();
            let mut places = places.filter(|p| p.walkable && !p.hidden);
            let at = places.find_map(|place| {
                let at = signals.find(ways, place, file_system.dev)?;
                // It may be writable by now, and then that has to be heard of.
                signals.is_read_only(&at).map(|_| at)
            })?;
            Some((file_system.dev, file_system.to_string(), at))
        });
        ReadOnly(found.collect())
    }

    fn has(&self, file_system: &FileSystem) -> bool {
        self.0.iter().any(|(dev, ..)| *dev == file_system.dev)
    }

    /// Whether all of them are mounted and read-only still.
    fn is_as_it_was(&self, signals: &mut S) -> bool {
        let mut all = self.0.iter();
        all.all(|(_, _, at)| signals.is_read_only(at) == Some(true))
    }

    /// The names of those that are writable by now. One that was unmounted is not.
    pub fn writable_now(&self, signals: &mut S) -> Vec<String> {
        let all = self.0.iter();
        let writable = all.filter(|(_, _, at)| signals.is_read_only(at) == Some(false));
        writable.map(|(_, name, _)| name.clone()).collect()
    }
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
        }
    }
}

impl Kernel {
    /// Whether there may be a superblock that was not there then, as far as anybody tells. Nothing is looked
    /// up for it, so that it can be asked once after each [`Signals::alive`] while all is frozen.
    pub fn has_news(&self, then: Option<&Listed>) -> bool {
        let now = self.lists.as_ref().map(|it| it.read().ok().flatten());
        now.is_some_and(|now| Listed::has_news(then, now.as_ref()))
    }
}

/// What there is no way to tell.
fn told<T>(it: Option<&T>) -> io::Result<&T> {
    it.ok_or_else(|| io::ErrorKind::Unsupported.into())
}

impl Signals for Kernel {
    type Ways = Ways;
    type States = Vec<State>;
    type Alive = Listed;
    type At = MountAt;

    fn look(&mut self) -> Result<Machine, LookError> {
        match &self.proc {
            Some(proc) => Machine::look_through(Arc::clone(proc)),
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

    fn alive(&mut self) -> io::Result<Listed> {
        let lists = told(self.lists.as_ref())?;
        let listed = lists.rewind().and_then(|()| lists.read())?;
        let listed = match listed {
            Some(it) => it,
            // There is a new type.
            None => {
                let lists = self.lists.insert(Lists::open()?);
                told(lists.read()?.as_ref())?.clone()
            }
        };
        told(self.lists.as_ref())?.rewind()?;
        Ok(listed)
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

    fn find(&mut self, ways: &Ways, file_system: &FileSystem) -> Option<MountAt> {
        let states = ways.namespaces.states()?;
        let namespace = match place.namespace {
            0 => self.number?,
            n => states.get(n - 1)?.id(),
        };
        let look = || {
            let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
            let fd = open(&place.path, flags, Mode::empty())?;
            sys::unique_mount_id(fd.as_fd())
        };
        let mount = ways.namespaces.within(place.namespace, look).ok()?.ok()?;
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
