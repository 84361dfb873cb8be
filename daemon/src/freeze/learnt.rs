// SPDX-License-Identifier: GPL-2.0-only

//! What one freeze leaves for the next to know: how long each took, what cannot freeze, and what hangs.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Weak;
use std::time::{Duration, Instant};

use super::target::Target;
use super::work::Work;
use super::write_back::Syncing;
use crate::mounts::DevId;
use crate::writes::Look;

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
    pub(super) called_off: BTreeMap<DevId, String>,
    /// Whose thaw has not come back, as long as its thread is there.
    pub(super) in_thaw: Vec<InThaw>,
    /// What could not be opened, in the last look before this freeze.
    pub(super) stuck: Vec<Stuck>,
    /// What is on a disk that did not answer when all were asked, and which.
    pub(super) silent: BTreeMap<DevId, (String, DevId)>,
    /// What could not be written back for this backup, in words.
    pub(super) unwritten: BTreeMap<DevId, String>,
    /// Whether it is known of all: an earlier process, or the module, may have left any in a freeze or a thaw.
    pub(super) has_asked: bool,
}

/// A file system that hangs, for what may stand on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// Its superblock.
    pub dev: DevId,
    /// For people.
    pub name: String,
    /// Its wave in the plan, from 0.
    pub wave: usize,
}

/// One whose sync has not returned.
pub(super) struct Hung {
    pub(super) dev: DevId,
    pub(super) name: String,
    pub(super) thread: Weak<()>,
    pub(super) quiet: Quiet,
    /// It takes so long that it is not one that is slow, as far as was seen.
    pub(super) is_given_up: bool,
}

/// One whose thaw has not come back.
pub(super) struct InThaw {
    pub(super) dev: DevId,
    pub(super) name: String,
    /// Its number among these.
    pub(super) index: usize,
    pub(super) work: Weak<Work>,
}

/// A file system without which backups are, as it hangs.
#[derive(Clone, Debug)]
pub struct GivenUp {
    name: String,
    why: String,
    /// There as long as it does; `None` where that is only known once the next freeze asks. It is never made a strong
    /// one: who drops the last of those closes what hangs.
    life: Option<Weak<dyn Any + Send + Sync>>,
}

impl GivenUp {
    fn new(name: &str, why: impl Into<String>) -> Self {
        GivenUp {
            name: name.to_owned(),
            why: why.into(),
            life: None,
        }
    }

    fn lasting(self, life: Weak<dyn Any + Send + Sync>) -> Self {
        let life = Some(life);
        GivenUp { life, ..self }
    }

    /// Whether it still hangs, as far as is known.
    pub fn lasts(&self) -> bool {
        let life = self.life.as_ref();
        life.is_none_or(|it| it.strong_count() > 0)
    }
}

impl fmt::Display for GivenUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.why)
    }
}

/// How many times as long a file system may have nothing done with nothing in hand as with something: it may compute,
/// or what its disk hangs in may not be counted.
const IDLE_TIMES: u32 = 3;

/// For how long nothing has come of the sync of one.
#[derive(Clone)]
pub(super) struct Quiet {
    /// Since when all that it is on has been at this, by [`Look`].
    done: Option<u64>,
    since: Instant,
    /// And each that has had something in hand all the time.
    in_hand: BTreeMap<DevId, (u64, Instant)>,
}

impl Quiet {
    pub(super) fn begin() -> Self {
        Quiet {
            done: None,
            since: Instant::now(),
            in_hand: BTreeMap::new(),
        }
    }

    /// Looks again: for how long nothing has come of what one had in hand, however the others get on, or, which
    /// counts less, of all of them. Where nobody can tell it is never quiet.
    pub(super) fn lasts(&mut self, target: &Target) -> Duration {
        let look = target.written_back.as_ref().map(|it| it());
        self.goes_on(Instant::now(), look.unwrap_or_default())
    }

    fn goes_on(&mut self, now: Instant, look: Look) -> Duration {
        let Look { done, in_hand, .. } = look;
        if done.is_none() || done != self.done {
            self.done = done;
            self.since = now;
        }
        let before = std::mem::take(&mut self.in_hand);
        let since = |dev, done| match before.get(&dev) {
            Some((then, since)) if *then == done => *since,
            _ => now,
        };
        let in_hand = in_hand.into_iter();
        self.in_hand = in_hand
            .map(|(dev, done)| (dev, (done, since(dev, done))))
            .collect();
        let hang = self.in_hand.values().map(|(_, since)| now - *since);
        hang.fold((now - self.since) / IDLE_TIMES, Duration::max)
    }
}

impl Learnt {
    /// Another backup begins.
    pub fn begin(&mut self) {
        self.unwritten.clear();
    }

    /// What could not be written back for it, in words.
    pub fn unwritten(&self) -> impl Iterator<Item = &String> {
        self.unwritten.values()
    }

    /// Whether it was frozen the last time.
    pub fn has_frozen(&self, dev: DevId) -> bool {
        self.usual.contains_key(&dev) && !self.is_unfreezable(dev)
    }

    /// Whether it had no means to freeze the last time.
    pub fn is_unfreezable(&self, dev: DevId) -> bool {
        self.unfreezable.contains(&dev)
    }

    /// These hang, and are not among what is to be frozen: they cannot even be opened.
    pub fn set_stuck(&mut self, stuck: Vec<Stuck>) {
        self.stuck = stuck;
    }

    /// The module may have undone something by itself, and be stuck in that.
    pub fn ask_all(&mut self) {
        self.has_asked = false;
    }

    /// Whether its thaw has not come back.
    pub(super) fn hangs_in_thaw(&self, dev: DevId) -> bool {
        let mut its = self.in_thaw.iter().filter(|it| it.dev == dev);
        its.any(|it| {
            let work = it.work.upgrade();
            let target = work.as_ref().and_then(|work| work.targets.get(it.index));
            target.is_some_and(Target::is_thawing)
        })
    }

    /// What hangs, each once, in the order of the devices. It takes memory.
    pub fn given_up(&self) -> Vec<GivenUp> {
        let hung = self.hung.iter().filter(|it| it.is_given_up).map(|it| {
            let given_up = GivenUp::new(&it.name, "its sync has not come back");
            (it.dev, given_up.lasting(it.thread.clone()))
        });
        let in_thaw = self.in_thaw.iter().map(|it| {
            let given_up = GivenUp::new(&it.name, "its thaw has not come back");
            (it.dev, given_up.lasting(it.work.clone()))
        });
        let called_off = self.called_off.iter().map(|(dev, name)| {
            let why = "a freeze or thaw of it had not come back when that was last asked";
            (*dev, GivenUp::new(name, why))
        });
        let stuck = self.stuck.iter().map(|it| {
            let why = "it could not be opened, that did not come back";
            (it.dev, GivenUp::new(&it.name, why))
        });
        let silent = self.silent.iter().map(|(dev, (name, disk))| {
            let why = format!("{disk} did not answer when it was last asked");
            (*dev, GivenUp::new(name, why))
        });
        let mut all = BTreeMap::new();
        let each = hung.chain(in_thaw).chain(called_off);
        let each = each.chain(stuck).chain(silent);
        for (dev, given_up) in each.filter(|(_, it)| it.lasts()) {
            all.entry(dev).or_insert(given_up);
        }
        all.into_values().collect()
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
        hung.is_some_and(|it| {
            let has_hung = it.quiet.lasts(target) >= limit;
            it.is_given_up |= has_hung;
            has_hung
        })
    }

    /// One has not returned: its own, or an earlier one that it waits for.
    pub(super) fn left_behind(&mut self, it: Syncing<'_>) {
        let Syncing {
            target,
            thread,
            quiet,
            has_hung,
            ..
        } = it;
        let dev = target.dev;
        match thread {
            Some(thread) => self.hung.push(Hung {
                dev,
                name: target.name.clone(),
                thread,
                quiet,
                is_given_up: has_hung,
            }),
            None => {
                for it in self.hung.iter_mut().filter(|it| it.dev == dev) {
                    it.quiet = quiet.clone();
                    it.is_given_up |= has_hung;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// For how long nothing has come of it after looks at these seconds, with what is done in all, and what one
    /// has done that has something in hand.
    fn lasts(looks: &[(u64, Option<u64>, Option<u64>)]) -> Duration {
        let mut quiet = Quiet::begin();
        let begin = quiet.since;
        let mut lasts = Duration::ZERO;
        for (second, done, in_hand) in looks {
            let in_hand = in_hand.map(|done| (DevId::default(), done));
            let look = Look {
                done: *done,
                is_counted: true,
                in_hand: in_hand.into_iter().collect(),
            };
            lasts = quiet.goes_on(begin + Duration::from_secs(*second), look);
        }
        lasts
    }

    #[test]
    fn what_gets_nothing_done_hangs_and_with_nothing_in_hand_later() {
        // It has something in hand, and nothing comes of it.
        assert_eq!(
            lasts(&[(0, Some(1), Some(1)), (10, Some(1), Some(1))]),
            LIMIT
        );
        // It computes, or what it waits for is not counted.
        assert!(lasts(&[(0, Some(1), None), (29, Some(1), None)]) < LIMIT);
        assert_eq!(lasts(&[(0, Some(1), None), (30, Some(1), None)]), LIMIT);
        // What has begun since then has its own time.
        let begins = [
            (0, Some(1), None),
            (20, Some(1), Some(1)),
            (29, Some(1), Some(1)),
        ];
        assert!(lasts(&begins) < LIMIT);
    }

    #[test]
    fn one_that_hangs_is_seen_beside_others_that_get_on() {
        let member = [
            (0, Some(1), Some(7)),
            (5, Some(2), Some(7)),
            (10, Some(3), Some(7)),
        ];
        assert_eq!(lasts(&member), LIMIT);
        let slow = [
            (0, Some(1), Some(7)),
            (9, Some(2), Some(8)),
            (18, Some(3), Some(9)),
        ];
        assert!(lasts(&slow) < LIMIT);
    }

    #[test]
    fn where_nobody_can_tell_it_is_never_quiet() {
        assert_eq!(
            lasts(&[(0, None, None), (1000, None, None)]),
            Duration::ZERO
        );
    }
}
