// SPDX-License-Identifier: GPL-2.0-only

//! Mounts that have gone from all tables while somebody has a file open through them: unmounted lazily,
//! and written to all the same. Of most types sysfs lists the superblock ([`crate::superblocks`]). Of the
//! others (FAT, exFAT, NTFS, JFS, and those that list something else there) nobody does, and it is only
//! known that a mount was there once; who holds it shows in `/proc/PID/fdinfo`.
//!
//! Processes are looked at only when such a mount has gone, and as long as it is held. What is held by a
//! working directory or a mapping alone shows as [`crate::unlisted`]; what a program serves does not: to look
//! for that may ask a server that hangs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::apart::Questions;
use crate::mounts::{is_served, DevId, Mount};
use crate::open::node_of;
use crate::superblocks::{folder_of, Superblock};
use crate::sys;
use crate::unlisted;

/// The mounts by which it would be noticed: those of the last tables, and those that were lost before.
#[derive(Debug, Default)]
pub struct Lost(Vec<Mount>);

/// What of it is held.
#[derive(Debug, Default)]
struct Held {
    /// A file or folder that is open there, for each superblock.
    found: BTreeMap<DevId, PathBuf>,
    /// Whether there was no time to look at all that is open.
    is_a_part: bool,
}

impl Lost {
    /// Remembers what these tables show and is not among the superblocks that are listed, and returns what
    /// they show no longer and is held: as it was mounted, with a file that is open there for a path. And whether
    /// there may be more.
    pub fn find(&mut self, tables: &[Mount], listed: &[Superblock]) -> (Vec<Mount>, bool) {
        self.find_with(tables, listed, held)
    }

    fn find_with(
        &mut self,
        tables: &[Mount],
        listed: &[Superblock],
        held: impl FnOnce(&BTreeMap<u64, &Mount>) -> Held,
    ) -> (Vec<Mount>, bool) {
        let shown: BTreeSet<DevId> = tables.iter().map(|it| it.dev).collect();
        let taken: BTreeSet<u64> = tables.iter().flat_map(Mount::ids).collect();
        // The number of a mount that is gone for good may be another's.
        self.0.retain(|it| !shown.contains(&it.dev));
        for mount in &mut self.0 {
            mount.alike.retain(|id| !taken.contains(id));
        }
        self.0
            .retain(|it| !it.alike.is_empty() || !taken.contains(&it.id));
        let ids = self
            .0
            .iter()
            .flat_map(|it| it.ids().map(move |id| (id, it)));
        let gone: BTreeMap<u64, &Mount> = ids.filter(|(id, _)| !taken.contains(id)).collect();
        let Held { found, is_a_part } = match gone.is_empty() {
            true => Held::default(),
            false => held(&gone),
        };
        self.0.retain(|it| is_a_part || found.contains_key(&it.dev));
        let here = self.0.iter().filter(|it| it.namespace == 0);
        let was_here: BTreeSet<DevId> = here.map(|it| it.dev).collect();
        let lost = self.0.iter().filter_map(|mount| {
            // How it was mounted elsewhere counts for as much as if it were mounted.
            let counts = mount.namespace == 0 || !was_here.contains(&mount.dev);
            let path = found.get(&mount.dev).filter(|_| counts)?;
            Some(Mount {
                // The file is open for all to see.
                namespace: 0,
                path: path.clone(),
                walkable: true,
                layers: None,
                hidden: false,
                was_at: Some(mount.path.clone()),
                ..mount.clone()
            })
        });
        let lost = lost.collect();
        let listed: BTreeSet<DevId> = listed.iter().flat_map(|it| it.devices.clone()).collect();
        let unlisted = |it: &&Mount| {
            let is_on_a_disk = it.dev.major != 0 && !is_served(&it.fs_type);
            is_on_a_disk && it.writable && !listed.contains(&it.dev)
        };
        self.0.extend(tables.iter().filter(unlisted).cloned());
        (lost, is_a_part)
    }
}

/// How long one may take to say what is open there: whatever does not hang answers long before.
const ANSWER_TIME: Duration = Duration::from_secs(1);

/// How long a look at all that is open may take: some 500,000 descriptors. There may be any number of them.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whether a superblock may be on this device still. One that has gone for good would be looked for without end.
fn may_be_alive(dev: DevId) -> bool {
    static ASKED: Questions<DevId> = Questions::new();
    let look = move |_| {
        let is_there = folder_of(dev).is_some_and(|it| it.exists());
        is_there && node_of(dev).is_none_or(|node| unlisted::is_alive(&node))
    };
    // Nobody knows of one that does not answer.
    let alive = ASKED.ask(dev, &[], ANSWER_TIME, look);
    alive.unwrap_or(true)
}

/// Of these mounts, by number, what is open through them.
fn held(gone: &BTreeMap<u64, &Mount>) -> Held {
    let mut held = Held::default();
    let mut all: BTreeSet<DevId> = gone.values().map(|it| it.dev).collect();
    if sys::tells_superblocks() {
        all.retain(|dev| may_be_alive(*dev));
    }
    if all.is_empty() {
        return held;
    }
    let until = Instant::now() + PATIENCE;
    let own = std::process::id().to_string();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let is_process = name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
        // What we have open ourselves is for a backup only.
        if !is_process || name.as_encoded_bytes() == own.as_bytes() {
            continue;
        }
        let infos = fs::read_dir(process.path().join("fdinfo"));
        for info in infos.into_iter().flatten().flatten() {
            held.is_a_part = held.found.len() < all.len() && Instant::now() >= until;
            if held.is_a_part || held.found.len() == all.len() {
                return held;
            }
            let text = fs::read_to_string(info.path()).unwrap_or_default();
            let mount = mount_in(&text).and_then(|it| gone.get(&it));
            let Some(mount) = mount.filter(|it| all.contains(&it.dev)) else {
                continue;
            };
            let link = process.path().join("fd").join(info.file_name());
            if !held.found.contains_key(&mount.dev) && may_be_on(mount.dev, &link) {
                held.found.insert(mount.dev, link);
            }
        }
    }
    held
}

/// Whether this link leads to a file or folder of that file system: what was opened may be a device or a FIFO on it.
/// Where nobody says so, it may: that is found out when it is opened.
fn may_be_on(dev: DevId, link: &Path) -> bool {
    static ASKED: Questions<DevId> = Questions::new();
    let link = link.to_owned();
    let ask = move |_| {
        let found = fs::metadata(link);
        found.is_ok_and(|it| DevId::from_raw(it.dev()) == dev && (it.is_file() || it.is_dir()))
    };
    ASKED.ask(dev, &[], ANSWER_TIME, ask).unwrap_or(true)
}

/// The number of the mount in what `/proc/PID/fdinfo` says of a descriptor.
fn mount_in(fdinfo: &str) -> Option<u64> {
    let mut lines = fdinfo.lines();
    let number = lines.find_map(|it| it.strip_prefix("mnt_id:"))?;
    number.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::{of_interest, parse};
    use crate::plan::plan;
    use crate::topology::Topology;

    const ROOT: &str = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n";
    const FAT: &str = "7 1 8:2 / /fat rw - vfat /dev/sda2 rw\n";

    fn find(
        lost: &mut Lost,
        table: &str,
        held: impl FnOnce(&BTreeMap<u64, &Mount>) -> BTreeMap<DevId, PathBuf>,
    ) -> Vec<Mount> {
        let tables = parse(table.as_bytes(), 0).unwrap();
        let listed = ["8:1", "8:3"].map(|dev| Superblock {
            fs_type: "ext4".into(),
            name: dev.into(),
            devices: vec![dev.parse().unwrap()],
            listed: None,
            unreachable: None,
        });
        let held = |gone: &BTreeMap<u64, &Mount>| all(held(gone));
        lost.find_with(&tables, &listed, held).0
    }

    fn all(found: BTreeMap<DevId, PathBuf>) -> Held {
        let is_a_part = false;
        Held { found, is_a_part }
    }

    fn nobody_asks(_: &BTreeMap<u64, &Mount>) -> BTreeMap<DevId, PathBuf> {
        panic!("processes are looked at");
    }

    #[test]
    fn what_has_gone_from_the_table_is_found_as_long_as_it_is_held() {
        let mut lost = Lost::default();
        let dev = DevId { major: 8, minor: 2 };
        let all = [ROOT, FAT].concat();
        assert!(find(&mut lost, &all, nobody_asks).is_empty());
        assert!(find(&mut lost, &all, nobody_asks).is_empty());
        let link = || BTreeMap::from([(dev, PathBuf::from("/proc/9/fd/3"))]);
        for _ in 0..2 {
            let found = find(&mut lost, ROOT, |gone| {
                assert_eq!(gone.keys().collect::<Vec<_>>(), [&7]);
                link()
            });
            let found: Vec<_> = found.iter().map(|it| (it.dev, &*it.path)).collect();
            assert_eq!(found, [(dev, Path::new("/proc/9/fd/3"))]);
        }
        assert!(find(&mut lost, ROOT, |_| BTreeMap::new()).is_empty());
        assert!(find(&mut lost, ROOT, nobody_asks).is_empty());
    }

    #[test]
    fn it_is_known_by_where_it_was_mounted() {
        let mut tables = parse([ROOT, FAT].concat().as_bytes(), 0).unwrap();
        let bind = b"8 1 8:2 /sub /sub rw - vfat /dev/sda2 rw\n";
        tables.extend(parse(&bind[..], 0).unwrap());
        let there =
            b"21 20 8:2 / /there rw - vfat /dev/sda2 rw\n22 20 8:4 / /only rw - vfat b rw\n";
        tables.extend(parse(&there[..], 1).unwrap());
        let mut lost = Lost::default();
        lost.find_with(&tables, &[], |gone| all(nobody_asks(gone)));
        let dev = |minor| DevId { major: 8, minor };
        let link = |minor| (dev(minor), PathBuf::from(format!("/proc/9/fd/{minor}")));
        let (found, _) = lost.find_with(&[], &[], |_| all(BTreeMap::from([link(2), link(4)])));
        let was_at: Vec<_> = found.iter().map(|it| it.was_at.as_deref()).collect();
        assert_eq!(
            was_at,
            ["/fat", "/sub", "/only"].map(|it| Some(Path::new(it)))
        );
        let plan = plan(&found, &Topology::default(), &|_| None);
        let names: Vec<String> = plan
            .waves
            .concat()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            names,
            [
                "/fat (vfat, 8:2, mounted no longer, open at /proc/9/fd/2)",
                "/only (vfat, 8:4, mounted no longer, open at /proc/9/fd/4)",
            ]
        );
    }

    #[test]
    fn what_there_was_no_time_for_is_looked_for_again() {
        let mut lost = Lost::default();
        find(&mut lost, &[ROOT, FAT].concat(), nobody_asks);
        let root = parse(ROOT.as_bytes(), 0).unwrap();
        for is_a_part in [true, true, false] {
            let mut is_asked = false;
            let (found, is_more) = lost.find_with(&root, &[], |_| {
                is_asked = true;
                Held {
                    found: BTreeMap::new(),
                    is_a_part,
                }
            });
            assert!(is_asked && found.is_empty());
            assert_eq!(is_more, is_a_part);
        }
        find(&mut lost, ROOT, nobody_asks);
    }

    #[test]
    fn it_is_found_by_each_of_its_mounts() {
        let line = |id: u64| format!("{id} 1 8:2 /me /m{id} rw - vfat /dev/sda2 rw\n");
        let text: String = (2..40).map(line).collect();
        let tables = of_interest(parse(text.as_bytes(), 1).unwrap());
        let mut lost = Lost::default();
        lost.find_with(&tables, &[], |gone| all(nobody_asks(gone)));
        // The number of one is another's by now.
        let other = parse(&b"2 1 0:30 / /tmp rw - tmpfs tmpfs rw\n"[..], 0).unwrap();
        let mut ids = Vec::new();
        lost.find_with(&other, &[], |gone| {
            ids.extend(gone.keys().copied());
            Held::default()
        });
        assert_eq!(ids, (3..40).collect::<Vec<_>>());
    }

    #[test]
    fn of_a_type_that_lists_something_else_it_is_found_as_well() {
        let table = "7 1 8:2 / /shared rw - gfs2 /dev/sda2 rw\n";
        let mut lost = Lost::default();
        find(&mut lost, &[ROOT, table].concat(), nobody_asks);
        let dev = DevId { major: 8, minor: 2 };
        let held = find(&mut lost, ROOT, |_| {
            BTreeMap::from([(dev, "/proc/9/fd/3".into())])
        });
        assert_eq!(held.len(), 1);
    }

    #[test]
    fn what_is_listed_or_mounted_again_or_whose_number_is_anothers_is_not_looked_for() {
        let mut lost = Lost::default();
        let listed = "3 1 8:3 / /e rw - ext4 /dev/sda3 rw\n";
        find(&mut lost, &[ROOT, FAT, listed].concat(), nobody_asks);
        let again = FAT.replace("7 1", "8 1");
        find(&mut lost, &[ROOT, &again].concat(), nobody_asks);
        let other = "8 1 0:30 / /tmp rw - tmpfs tmpfs rw\n";
        assert!(find(&mut lost, &[ROOT, other].concat(), nobody_asks).is_empty());
    }

    #[test]
    fn a_descriptor_tells_its_mount() {
        let text = "pos:\t0\nflags:\t0100000\nmnt_id:\t29\nino:\t5\n";
        assert_eq!(mount_in(text), Some(29));
        assert_eq!(mount_in("pos:\t0\n"), None);
    }
}
