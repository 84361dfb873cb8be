// SPDX-License-Identifier: GPL-2.0-only

//! What has become read-only since the machine was looked at last, and not on purpose: whoever makes a
//! superblock read-only (`mount -o remount,ro`) makes the mount so, too, by which he does it. A mount of its own
//! that was read-only before (a root that is never written to, beside folders that are) tells nothing.

use std::collections::{BTreeMap, BTreeSet};

use crate::mounts::{DevId, Mount};

/// What tells it.
#[derive(Debug, Default)]
pub struct Turned {
    /// For each superblock that was writable, which of its mounts were made for writing, by their numbers.
    writable: BTreeMap<DevId, BTreeMap<u64, bool>>,
    /// What another process has found so, which has seen it writable.
    told: BTreeSet<DevId>,
}

impl Turned {
    /// For who has seen nothing yet, by what another one has found, which looks at the machine all the time.
    pub fn told(told: BTreeSet<DevId>) -> Self {
        Turned {
            told,
            ..Turned::default()
        }
    }

    /// Remembers what is writable in these tables, and returns what was and is no longer, as long as nobody has
    /// changed one of its mounts.
    pub fn find(&mut self, tables: &[Mount]) -> BTreeSet<DevId> {
        let mut writable = BTreeMap::<DevId, BTreeMap<u64, bool>>::new();
        let mut turned = BTreeSet::new();
        for mount in tables {
            if mount.writable {
                let its = writable.entry(mount.dev).or_default();
                its.insert(mount.id, mount.for_writing);
            } else if self.writable.contains_key(&mount.dev) || self.told.contains(&mount.dev) {
                turned.insert(mount.dev);
            }
        }
        for mount in tables {
            let then = self.writable.get(&mount.dev);
            let then = then.and_then(|it| it.get(&mount.id));
            if then.is_some_and(|it| *it != mount.for_writing) {
                turned.remove(&mount.dev);
            }
        }
        self.writable.retain(|dev, _| turned.contains(dev));
        self.told.retain(|dev| turned.contains(dev));
        self.writable.extend(writable);
        turned
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::parse;

    fn table(of_mounts: [&str; 2], of_superblock: &str) -> Vec<Mount> {
        let lines = of_mounts.iter().zip(1..).map(|(it, id)| {
            format!("{id} 0 8:2 / /fat{id} {it} - vfat /dev/sda2 {of_superblock}\n")
        });
        parse(lines.collect::<String>().as_bytes(), 0).unwrap()
    }

    #[test]
    fn who_is_told_knows_as_long_as_it_is_read_only() {
        let turned = DevId { major: 8, minor: 2 };
        let other = DevId { major: 8, minor: 3 };
        let mut told = Turned::told(BTreeSet::from([turned, other]));
        for (of_superblock, found) in [("ro", true), ("ro", true), ("rw", false)] {
            let all = told.find(&table(["ro", "rw"], of_superblock));
            assert_eq!(all == BTreeSet::from([turned]), found, "{all:?}");
        }
    }

    #[test]
    fn nobody_has_made_read_only_what_is_mounted_as_it_was() {
        let mut turned = Turned::default();
        let mut find = |of_mounts, of_superblock| {
            let found = turned.find(&table(of_mounts, of_superblock));
            !found.is_empty()
        };
        assert!(!find(["ro", "rw"], "ro"), "nobody has seen it otherwise");
        assert!(!find(["ro", "rw"], "rw"));
        for _ in 0..2 {
            assert!(find(["ro", "rw"], "ro"));
        }
        assert!(!find(["ro", "ro"], "ro"), "somebody has, too");
        assert!(!find(["ro", "rw"], "ro"));
        assert!(!find(["ro", "rw"], "rw"));
        assert!(!find(["ro", "ro"], "ro"));
    }
}
