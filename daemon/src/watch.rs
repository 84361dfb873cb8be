// SPDX-License-Identifier: GPL-2.0-only

//! Whether the machine still looks as it did when a plan was made, so that the plan can be used
//! again without reading all tables anew.
//!
//! The kernel is asked for what any change leaves behind: the own mount table knows whether it was
//! changed since, the other namespaces are told by their newest mount and their count, the read-only
//! superblocks that were left out are looked at, and each change of a block device is a uevent, which
//! are counted. Nothing is waited for, so it costs nothing as long as nobody asks; and nothing is
//! held that would keep a namespace or a mount from vanishing. Kernels before 6.12 do not tell all
//! of this: there a plan is never used twice.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::{open, OFlag};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::stat::Mode;

use crate::machine::{Machine, Ways};
use crate::mounts;
use crate::namespaces::{self, Namespaces, State};
use crate::plan::{FileSystem, LeftOut, Reason};
use crate::sys;

/// What the machine looked like.
#[derive(Debug)]
pub struct Watch {
    /// The root of procfs.
    proc: Arc<OwnedFd>,
    /// The own namespace.
    own: File,
    /// Its mount table, on which poll(2) says whether it has changed since it was last asked.
    table: File,
    /// `/sys/kernel/uevent_seqnum`, and what it said.
    uevents: File,
    count: u64,
    /// The other namespaces.
    states: Vec<State>,
    /// Read-only superblocks that were left out for it: namespace and mount.
    read_only: Vec<(u64, u64)>,
}

impl Watch {
    /// Looks at the machine: what changes from now on is noticed by [`Watch::unchanged`]. `None` where
    /// that cannot be promised.
    pub fn look() -> Option<(Self, Machine)> {
        let table = File::open(Path::new("/proc").join(mounts::OWN_TABLE)).ok()?;
        let uevents = File::open("/sys/kernel/uevent_seqnum").ok()?;
        let count = number_in(&uevents).ok()?;
        let machine = Machine::look().ok()?;
        let watch = Watch {
            proc: Arc::clone(&machine.ways.proc),
            own: namespaces::own().ok()?,
            table,
            uevents,
            count,
            states: machine.ways.namespaces.states()?.to_vec(),
            read_only: Vec::new(),
        };
        Some((watch, machine))
    }

    /// Notices as well when one of these becomes writable. False when that cannot be promised.
    pub fn mind(&mut self, ways: &Ways, left_out: &[LeftOut]) -> bool {
        let Ok(own) = sys::namespace_id(self.own.as_fd()) else {
            return false;
        };
        for left in left_out.iter().filter(|l| l.reason == Reason::ReadOnly) {
            let Some(mount) = self.find(own, ways, &left.file_system) else {
                return false;
            };
            self.read_only.push(mount);
        }
        true
    }

    /// Namespace and mount by which a read-only file system can be looked at.
    fn find(&self, own: u64, ways: &Ways, file_system: &FileSystem) -> Option<(u64, u64)> {
        file_system.places.iter().find_map(|place| {
            let namespace = match place.namespace {
                0 => own,
                n => self.states.get(n - 1)?.id(),
            };
            let mount = ways
                .namespaces
                .within(place.namespace, || {
                    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
                    let fd = open(&place.path, flags, Mode::empty())?;
                    sys::unique_mount_id(fd.as_fd())
                })
                .ok()?
                .ok()?;
            let found = sys::superblock_of(namespace, mount).ok()?;
            (found.dev == file_system.dev && found.read_only).then_some((namespace, mount))
        })
    }

    /// The way to what was seen, if nothing has changed since.
    pub fn unchanged(&self) -> Option<Ways> {
        let changed = PollFlags::POLLPRI;
        let mut fds = [PollFd::new(self.table.as_fd(), changed)];
        if poll(&mut fds, PollTimeout::ZERO).ok()? != 0
            || number_in(&self.uevents).ok()? != self.count
        {
            return None;
        }
        let namespaces = Namespaces::find_beside(&self.own).ok()?;
        if namespaces.states() != Some(&self.states) {
            return None;
        }
        let still = |&(namespace, mount): &(u64, u64)| {
            sys::superblock_of(namespace, mount).is_ok_and(|found| found.read_only)
        };
        if !self.read_only.iter().all(still) {
            return None;
        }
        Some(Ways {
            proc: Arc::clone(&self.proc),
            namespaces,
        })
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
