// SPDX-License-Identifier: GPL-2.0-only

//! By which counters of the disks it is told that something was written past a freeze, and where that is not told.

use std::collections::BTreeSet;

use super::target;
use crate::cache::Opened;
use crate::freeze::Target;
use crate::ground::{self, GoesOn};
use crate::logbook::Logbook;
use crate::mounts::DevId;
use crate::topology;
use crate::writes::{self, Images, SwapFiles, Writes};

/// What the kernel swaps to, which is in no file system, so that nobody misses it in a copy: partitions and the
/// like, and file systems with a file for it. `None` where some of that may be anywhere.
pub(super) fn swapped_to(targets: &[Opened]) -> Option<Vec<GoesOn>> {
    let (files, wholes) = (SwapFiles::find(), writes::swapped_to_as_a_whole());
    let wholes = wholes.filter(|_| !files.is_one_lost())?;
    let below_files = targets.iter().filter(|it| files.may_be_on(it.dev));
    let below_files = below_files.map(|it| GoesOn {
        name: format!("swap in a file of {}", it.name),
        devices: it.devices.clone(),
        below: it.below.clone(),
    });
    let wholes = wholes.into_iter().map(|dev| GoesOn {
        name: format!("swap on {dev}"),
        devices: vec![dev],
        below: Some(
            topology::all_below(&BTreeSet::from([dev]))
                .into_keys()
                .collect(),
        ),
    });
    Some(below_files.chain(wholes).collect())
}

/// By whose counters it would be told that something was written while all is frozen. One that is off tells nothing, and
/// whether one is must be asked of its device: that is said when the host has all its answers.
pub struct Counters {
    at_rest: ground::AtRest,
    /// By name, each with its devices, what others might thaw.
    thawed: Vec<(String, Vec<DevId>)>,
}

impl Counters {
    pub(super) fn new(at_rest: ground::AtRest) -> Self {
        let thawed = Vec::new();
        Counters { at_rest, thawed }
    }

    /// Says which are off.
    pub fn say(self, log: &Logbook) {
        let mut counted = self.at_rest.counted();
        counted.extend(self.thawed.iter().flat_map(|(_, devices)| devices));
        let not_counting = writes::not_counting(counted);
        if let Some(why) = self.at_rest.but(&not_counting).unwatched() {
            log.info(why);
        }
        let blind = self.thawed.iter().filter_map(|(name, devices)| {
            let why = why_untold(devices, &not_counting)?;
            Some(format!("{name} ({why})"))
        });
        let blind: Vec<String> = blind.collect();
        if !blind.is_empty() {
            let names = blind.join(", ");
            log.info(format!(
                "if others thaw one of these for a moment and freeze it again, that is not seen: {names}"
            ));
        }
    }
}

/// Where others can thaw, what is written tells of it, unless the kernel itself writes there, or nothing is counted.
pub(super) fn look_out_for_writes(
    targets: Vec<Opened>,
    images: &Images,
    counters: &mut Counters,
    log: &Logbook,
) -> Vec<Target> {
    let swap_files = SwapFiles::find();
    let each = targets.iter();
    let thawed = each.map(|it| (it.name.clone(), it.devices.clone()));
    counters.thawed = thawed.collect();
    if swap_files.is_one_lost() {
        log.info(
            "a file that is swapped to cannot be found, and may be in any file system: if others thaw one for a \
             moment and freeze it again, that is not seen",
        );
    }
    let each = targets.into_iter().map(|it| {
        if swap_files.may_be_on(it.dev) {
            if !swap_files.is_one_lost() {
                let name = &it.name;
                log.info(format!(
                    "{name} has a file that is swapped to: if others thaw it for a moment and freeze it \
                     again, that is not seen"
                ));
            }
            return target(it);
        }
        let exported = images.that_may_be_on(it.dev);
        if !exported.is_empty() {
            let (name, exported) = (&it.name, exported.join(", "));
            log.info(format!(
                "{name} has, or may have, the file of {exported}, to which the kernel may write all the same: if others \
                 thaw it for a moment and freeze it again, that is not seen"
            ));
            return target(it);
        }
        let writes = Writes::of(&it.devices);
        target(it).with_writes(writes)
    });
    each.collect()
}

/// Why what is written to a file system on these devices is not known, if it is not.
fn why_untold(devices: &[DevId], not_counting: &BTreeSet<DevId>) -> Option<&'static str> {
    match devices {
        [] => Some("its devices are not known"),
        all if all.iter().any(|it| not_counting.contains(it)) => Some(ground::NOT_COUNTED),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_nothing_tells_of_no_thaw_by_others() {
        let dev = |minor| DevId { major: 8, minor };
        let off = BTreeSet::from([dev(16)]);
        assert_eq!(why_untold(&[dev(0)], &off), None);
        // A copy of what is written to one of them is written to the other, or is not.
        let both = why_untold(&[dev(0), dev(16)], &off);
        assert!(both.is_some_and(|it| it.contains("iostats")));
        assert!(why_untold(&[], &off).is_some_and(|it| it.contains("not known")));
    }
}
