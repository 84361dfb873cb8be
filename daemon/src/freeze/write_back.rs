// SPDX-License-Identifier: GPL-2.0-only

//! Writes back what is dirty before anything is frozen, and syncs what cannot freeze. What hangs in that is
//! left to its thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{channel, Sender};
use std::sync::Weak;
use std::time::Instant;

use super::learnt::{Hung, Learnt, Quiet};
use super::target::{State, Target};
use super::work::{ms, Work};
use super::{FreezeError, Session, ABORT_TICK};
use crate::mounts::DevId;
use crate::progress::Stage;

impl Session {
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
    pub fn sync(&self, most: usize, learnt: &mut Learnt) {
        self.leave_out_hung(learnt);
        self.work.progress.enter(Stage::Syncing, most);
        for wave in &self.waves {
            let known = |i: &&usize| {
                let target = self.work.targets.get(**i);
                target.is_some_and(|t| self.is_unfreezable(t, learnt) || !t.is_due())
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
                        quiet: earlier.map_or_else(Quiet::begin, |it| it.quiet.clone()),
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
                    work.note_sync(ended.target, ended.since, result, learnt);
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
        let step = move |fds: Vec<OwnedFd>| fds.first().map(|it| sync(it.as_fd()));
        let tell = move |came: Option<_>| {
            if let Some(result) = came {
                // Nobody is left to hear of it when it took too long.
                let _ = tell.send((index, result));
            }
        };
        self.apart.hand_over(&[target.as_fd()], step, tell)
    }

    /// Divides these so that no two groups have a disk in common.
    pub(super) fn lanes(&self, wave: &[usize]) -> Vec<Vec<usize>> {
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

    /// Syncs what cannot freeze, each on a thread of its own: it may hang, also when all else is frozen.
    /// Nothing is frozen yet.
    pub(super) fn sync_unfreezable(&self, indices: &[usize], learnt: &mut Learnt) {
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
                name: target.name.clone(),
                thread,
                quiet: Quiet::begin(),
                is_given_up: true,
            });
        }
    }
}

/// One whose sync has returned, and what of it.
pub(super) type Synced = (usize, io::Result<()>);

/// One whose sync is under way, or about to be.
pub(super) struct Syncing<'a> {
    pub(super) index: usize,
    pub(super) target: &'a Target,
    pub(super) since: Instant,
    pub(super) quiet: Quiet,
    /// It is not waited for any longer.
    pub(super) has_hung: bool,
    /// There as long as it is; `None` while an earlier sync of the same is waited for.
    pub(super) thread: Option<Weak<()>>,
    /// What is to be synced after it.
    pub(super) rest: VecDeque<usize>,
}

impl Work {
    /// The kernel tells of a page that could not be written once, and drops it: what is frozen then is without it, and
    /// the freeze succeeds. Of those that the freeze itself writes back it does not tell: see `CLEAN_PAGES` in
    /// [`crate::job`].
    fn note_sync(
        &self,
        target: &Target,
        since: Instant,
        result: io::Result<()>,
        learnt: &mut Learnt,
    ) {
        let name = &target.name;
        self.progress.end(name);
        let error = match result {
            Ok(()) => {
                let took = ms(since.elapsed());
                return self.log.info(format!("{name} synced in {took}"));
            }
            Err(error) => error,
        };
        let why = format!("has not been written back as a whole: {error}");
        let text = format!("{name} {why}");
        self.log.warning(text.clone());
        if self.limits.strict {
            let name = name.clone();
            self.fail(FreezeError::Strict { name, why });
        }
        learnt.unwritten.insert(target.dev, text);
    }
}
