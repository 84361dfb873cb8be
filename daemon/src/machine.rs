// SPDX-License-Identifier: GPL-2.0-only

//! A look at the whole machine: all mount tables and the block topology, at one moment.
//!
//! It holds what is needed to reach the file systems that it saw, the other namespaces among it,
//! and is dropped before anything is frozen. What follows from what it saw is decided in
//! [`crate::plan`].

use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{open, OFlag};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use crate::logbook::words;
use crate::lost::Lost;
use crate::mounts::{self, of_interest, DevId, Mount, MountsError, NEVER_HELD};
use crate::namespaces::Namespaces;
use crate::superblocks::{self, Entry, Superblock};
use crate::sys;
use crate::topology::{self, Topology};
use crate::turned::Turned;
use crate::unlisted;

/// Why the machine cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// No procfs.
    #[error("cannot open /proc")]
    Proc(#[source] std::io::Error),
    /// The own mount table cannot be read.
    #[error(transparent)]
    Mounts(#[from] MountsError),
    /// The other namespaces cannot be found.
    #[error("cannot find the mount namespaces")]
    Namespaces(#[source] std::io::Error),
    /// Which superblocks are alive cannot be found out.
    #[error("cannot read what /sys/fs says of file systems")]
    Superblocks(#[source] std::io::Error),
    /// One of them cannot be entered.
    #[error("cannot look into another mount namespace")]
    Enter(#[source] std::io::Error),
}

/// The way to what was seen.
#[derive(Debug)]
pub struct Ways {
    /// The root of procfs, usable inside any namespace.
    pub proc: Arc<OwnedFd>,
    /// The other namespaces.
    pub namespaces: Namespaces,
}

/// What was seen, and the way to it.
#[derive(Debug)]
pub struct Machine<W = Ways> {
    /// The way.
    pub ways: W,
    /// The tables of all namespaces; of the others only what is on block devices. And what no table shows
    /// any longer, where it is held.
    pub mounts: Vec<Mount>,
    /// What the block devices stand on.
    pub topology: Topology,
    /// The namespaces that could not be looked into, with the reason: there may be file systems nobody knows of.
    pub unseen: Vec<Unseen>,
}

/// What there was when the machine was looked at last.
#[derive(Debug, Default)]
pub struct Memory {
    lost: Lost,
    turned: Turned,
}

impl Memory {
    /// That of who has seen nothing yet, and is told what has turned read-only.
    pub fn told(turned: BTreeSet<DevId>) -> Self {
        Memory {
            turned: Turned::told(turned),
            ..Memory::default()
        }
    }
}

/// A namespace that could not be looked into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unseen {
    /// For people.
    pub name: String,
    /// Why.
    pub reason: String,
}

impl fmt::Display for Unseen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is left out: {}", self.name, self.reason)
    }
}

impl Machine {
    /// Reads everything anew.
    pub fn look() -> Result<Self, LookError> {
        Self::look_through(Arc::new(open_proc()?), &mut Memory::default())
    }

    /// The same for who has a procfs open already, and remembers what was seen last.
    pub fn look_through(proc: Arc<OwnedFd>, memory: &mut Memory) -> Result<Self, LookError> {
        // Before the tables: what vanishes in between is shown by none and has to be open still.
        let alive = alive()?;
        let namespaces = Namespaces::find().map_err(LookError::Namespaces)?;
        let (mut mounts, mut unseen) = tables(proc.as_fd(), &namespaces, PATIENCE)?;
        let mut superblocks = superblocks::of(&alive);
        let (lost, may_be_more) = memory.lost.find(&mounts, &superblocks);
        mounts.extend(lost);
        if may_be_more && !sys::tells_superblocks() {
            unseen.push(Unseen {
                name: "what is open on file systems that are mounted no longer".to_owned(),
                reason: "there is more than can be looked at".to_owned(),
            });
        }
        add_unlisted(&mut superblocks, &mounts);
        let mut topology = topology::read(&mounts, &superblocks);
        topology.turned = memory.turned.find(&mounts);
        Ok(Machine {
            ways: Ways { proc, namespaces },
            mounts,
            topology,
            unseen,
        })
    }
}

/// Opens the root of procfs.
pub fn open_proc() -> Result<OwnedFd, LookError> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open("/proc", flags, Mode::empty()).map_err(|e| LookError::Proc(e.into()))
}

/// The tables of all namespaces, those of the others within this time, and those without which something may be missing.
fn tables(
    proc: BorrowedFd<'_>,
    namespaces: &Namespaces,
    patience: Duration,
) -> Result<(Vec<Mount>, Vec<Unseen>), LookError> {
    let mut mounts = mounts::read(proc, 0)?;
    let mut unseen = Vec::new();
    let until = Instant::now() + patience;
    for number in namespaces.smallest_first() {
        let seen = namespaces.within(number, || mounts::read_until(proc, number, until));
        match seen.map_err(LookError::Enter).and_then(|it| Ok(it?)) {
            Ok(seen) => mounts.extend(of_interest(seen)),
            Err(LookError::Mounts(error)) if error.is_too_much() && tells_all() => {}
            Err(error) => unseen.push(Unseen {
                name: namespaces.name(number),
                reason: words(&error),
            }),
        }
    }
    Ok((mounts, unseen))
}

/// How long the tables of the other namespaces may take together. Anybody may have some of his own, as high a stack of
/// mounts as he likes in each, and of each mount there the kernel goes down all the way to say where it is.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether each superblock on a disk is found without any table: sysfs lists it, or the kernel tells of its device. That
/// goes for all types but one.
fn tells_all() -> bool {
    let types = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let mut types = types.split_whitespace();
    sys::tells_superblocks() && !types.any(|it| it == NEVER_HELD)
}

fn alive() -> Result<BTreeSet<Entry>, LookError> {
    superblocks::entries(&superblocks::types()).map_err(LookError::Superblocks)
}

/// Adds those that neither sysfs nor these mounts show.
fn add_unlisted(superblocks: &mut Vec<Superblock>, mounts: &[Mount]) {
    let listed = superblocks.iter().flat_map(|it| it.devices.clone());
    let shown = mounts.iter().map(|it| it.dev).chain(listed).collect();
    superblocks.extend(unlisted::find(&shown));
}

/// All that a plan is made from, as it was read, for keeping: the same table gives the same plan.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// For people: which machine, and how it came to be.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub about: String,
    /// The lines of each namespace's `mountinfo`, the own one first, with bytes outside ASCII
    /// escaped.
    pub namespaces: Vec<Vec<String>>,
    /// What the block devices stand on.
    pub topology: Topology,
}

impl Table {
    /// Reads what [`Machine::look`] reads.
    pub fn record() -> Result<Self, LookError> {
        let proc = open_proc()?;
        let namespaces = Namespaces::find().map_err(LookError::Namespaces)?;
        let mut table = Table::default();
        for number in 0..=namespaces.count() {
            let text = namespaces
                .within(number, || mounts::read_text(proc.as_fd(), number))
                .map_err(LookError::Enter)??;
            let lines = text.split(|&b| b == b'\n').filter(|line| !line.is_empty());
            table.namespaces.push(lines.map(mounts::escape).collect());
        }
        let mounts = table.mounts()?;
        let mut superblocks = superblocks::of(&alive()?);
        add_unlisted(&mut superblocks, &mounts);
        table.topology = topology::read(&mounts, &superblocks);
        Ok(table)
    }

    /// The mounts, as [`Machine::mounts`] has them.
    pub fn mounts(&self) -> Result<Vec<Mount>, MountsError> {
        let mut mounts = Vec::new();
        for (number, lines) in self.namespaces.iter().enumerate() {
            let table = mounts::parse(lines.join("\n").as_bytes(), number)?;
            match number {
                0 => mounts.extend(table),
                _ => mounts.extend(of_interest(table)),
            }
        }
        Ok(mounts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_whose_tables_take_too_long_are_no_loss_where_the_kernel_tells_without_them() {
        use nix::sched::{unshare, CloneFlags};
        let (tell, told) = std::sync::mpsc::channel();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            let flags = CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS;
            tell.send(unshare(flags).is_ok()).unwrap();
            let _ = wait.recv();
        });
        // That takes privilege.
        let is_there = told.recv().unwrap();
        let namespaces = Namespaces::find().unwrap();
        if is_there && namespaces.states().is_some() {
            let proc = open_proc().unwrap();
            let (mounts, unseen) = tables(proc.as_fd(), &namespaces, Duration::ZERO).unwrap();
            assert!(mounts.iter().all(|it| it.namespace == 0));
            assert_ne!(namespaces.count(), 0);
            let expected = if tells_all() { 0 } else { namespaces.count() };
            assert_eq!(unseen.len(), expected);
            // In their order there is time for all.
            let (_, unseen) = tables(proc.as_fd(), &namespaces, PATIENCE).unwrap();
            assert_eq!(unseen, []);
        }
        drop(done);
        other.join().unwrap();
    }

    #[test]
    fn a_namespace_that_cannot_be_entered_is_named_and_costs_nobody_else() {
        let proc = open_proc().unwrap();
        // Nobody enters that.
        let other = Some(open("/dev/null", OFlag::O_RDONLY, Mode::empty()).unwrap());
        let namespaces = Namespaces::alone(1, other);
        let (mounts, unseen) = tables(proc.as_fd(), &namespaces, PATIENCE).unwrap();
        assert!(mounts.iter().any(|it| it.namespace == 0));
        assert_eq!(unseen.len(), 1);
        let said = unseen[0].to_string();
        assert!(said.starts_with("mount namespace "), "{said}");
    }
}
