// SPDX-License-Identifier: GPL-2.0-only

//! What has become read-only since the machine was looked at last, and not on purpose: whoever makes a
//! superblock read-only (`mount -o remount,ro`) makes the mount so, too, by which he does it. A mount of its own
//! that was read-only before (a root that is never written to, beside folders that are) tells nothing.

use std::collections::{BTreeMap, BTreeSet};

use crate::mounts::{DevId, Mount};

/// For each superblock that was writable, which of its mounts were made for writing, by their numbers.
#[derive(Debug, Default)]
pub struct Turned(BTreeMap<DevId, BTreeMap<u64, bool>>);

impl Turned {
    /// Remembers what is writable in these tables, and returns what was and is no longer, as long as nobody has
    /// changed one of its mounts.
    pub fn find(&mut self, tables: &[Mount]) -> BTreeSet<DevId> {
        let mut writable = BTreeMap::<DevId, BTreeMap<u64, bool>>::new();
        let mut turned = BTreeSet::new();
        for mount in tables {
            if mount.writable {
                let its = writable.entry(mount.dev).or_default();
                its.insert(mount.id, mount.for_writing);
            } else if self.0.contains_key(&mount.dev) {
                turned.insert(mount.dev);
            }
        }
        for mount in tables {
            let then = self.0.get(&mount.dev).and_then(|it| it.get(&mount.id));
            if then.is_some_and(|it| *it != mount.for_writing) {
                turned.remove(&mount.dev);
            }
        }
        self.0.retain(|dev, _| turned.contains(dev));
        self.0.extend(writable);
        turned
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::parse;

    #[test]
    fn nobody_has_made_read_only_what_is_mounted_as_it_was() {
        let table = |of_mounts: [&str; 2], of_superblock: &str| {
            let lines = of_mounts.iter().zip(1..).map(|(it, id)| {
                format!("{id} 0 8:2 / /fat{id} {it} - vfat /dev/sda2 {of_superblock}\n")
            });
            parse(lines.collect::<String>().as_bytes(), 0).unwrap()
        };
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
