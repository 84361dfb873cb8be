// SPDX-License-Identifier: GPL-2.0-only

//! A look at the whole machine: all mount tables and the block topology, at one moment.
//!
//! It holds what is needed to reach the file systems that it saw, the other namespaces among it,
//! and is dropped before anything is frozen. What follows from what it saw is decided in
//! [`crate::plan`].

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{open, OFlag};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use crate::lost::Lost;
use crate::mounts::{self, Mount, MountsError};
use crate::namespaces::Namespaces;
use crate::superblocks::{self, Entry, Superblock};
use crate::topology::{self, Topology};
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
    /// One of them cannot be read, so that there may be file systems nobody knows of.
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
}

impl Machine {
    /// Reads everything anew.
    pub fn look() -> Result<Self, LookError> {
        Self::look_through(Arc::new(open_proc()?), &mut Lost::default())
    }

    /// The same for who has a procfs open already, and remembers what was mounted.
    pub fn look_through(proc: Arc<OwnedFd>, lost: &mut Lost) -> Result<Self, LookError> {
        // Before the tables: what vanishes in between is shown by none and has to be open still.
        let alive = alive()?;
        let namespaces = Namespaces::find().map_err(LookError::Namespaces)?;
        let mut mounts = mounts::read(proc.as_fd(), 0)?;
        for number in 1..=namespaces.count() {
            let seen = namespaces
                .within(number, || mounts::read(proc.as_fd(), number))
                .map_err(LookError::Enter)??;
            mounts.extend(of_interest(seen));
        }
        let mut superblocks = superblocks::of(&alive);
        let lost = lost.find(&mounts, &superblocks);
        mounts.extend(lost);
        add_unlisted(&mut superblocks, &mounts);
        let topology = topology::read(&mounts, &superblocks);
        Ok(Machine {
            ways: Ways { proc, namespaces },
            mounts,
            topology,
        })
    }
}

/// Opens the root of procfs.
pub fn open_proc() -> Result<OwnedFd, LookError> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open("/proc", flags, Mode::empty()).map_err(|e| LookError::Proc(e.into()))
}

/// Of another namespace's table the rest (overlay, proc, tmpfs, ...) is of no interest.
fn of_interest(table: Vec<Mount>) -> impl Iterator<Item = Mount> {
    table.into_iter().filter(Mount::is_on_disks)
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
