// SPDX-License-Identifier: GPL-2.0-only

//! What one freeze leaves for the next to know: how long each took, what cannot freeze, and what hangs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Weak;
use std::time::{Duration, Instant};

use super::target::Target;
use super::work::Work;
use super::write_back::Syncing;
use crate::mounts::DevId;

/// What one freeze leaves for the next to know.
#[derive(Default)]
pub struct Learnt {
    /// How long the freeze of each file system took.
    pub(super) usual: BTreeMap<DevId, Duration>,
    /// What has no means to freeze.
    pub(super) unfreezable: BTreeSet<DevId>,
    /// Whose sync has not returned, as long as its thread is there.
    pub(super) hung: Vec<Hung>,
    /// Whose freeze was called off, and may not have come back.
    pub(super) called_off: BTreeSet<DevId>,
    /// Whose thaw has not come back, as long as its thread is there.
    pub(super) in_thaw: Vec<(Weak<Work>, usize)>,
    /// Whether it is known of all: an earlier process, or the module, may have left any in a freeze or a thaw.
    pub(super) has_asked: bool,
}

/// One whose sync has not returned.
pub(super) struct Hung {
    pub(super) dev: DevId,
    pub(super) thread: Weak<()>,
    pub(super) quiet: Quiet,
}

/// For how long nothing has come of the sync of one.
#[derive(Clone, Copy)]
pub(super) struct Quiet {
    /// By [`Look`](crate::writes::Look).
    pub(super) done: Option<u64>,
    pub(super) since: Instant,
}

impl Quiet {
    pub(super) fn begin() -> Self {
        Quiet {
            done: None,
            since: Instant::now(),
        }
    }

    /// Looks again. Where nobody can tell it is never quiet.
    pub(super) fn lasts(&mut self, target: &Target) -> Duration {
        let look = target.written_back.as_ref().and_then(|it| it());
        let done = look.map(|it| it.done);
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
    pub(super) fn hangs_in_thaw(&self, dev: DevId) -> bool {
        self.in_thaw.iter().any(|(work, index)| {
            let work = work.upgrade();
            let target = work.as_ref().and_then(|it| it.targets.get(*index));
            target.is_some_and(|it| it.dev == dev && it.is_thawing())
        })
    }

    pub(super) fn hangs(&self, dev: DevId) -> bool {
        let mut hung = self.hung.iter();
        hung.any(|it| it.dev == dev && it.thread.strong_count() > 0)
    }

    /// Whether the sync of one that can freeze has not returned, with nothing written for so long: as the disk
    /// of a slow one is not.
    pub(super) fn has_hung_for(&mut self, target: &Target, limit: Duration) -> bool {
        let mut hung = self.hung.iter_mut();
        let hung = hung.find(|it| it.dev == target.dev && it.thread.strong_count() > 0);
        hung.is_some_and(|it| it.quiet.lasts(target) >= limit)
    }

    /// One has not returned: its own, or an earlier one that it waits for.
    pub(super) fn left_behind(&mut self, it: Syncing<'_>) {
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
