// SPDX-License-Identifier: GPL-2.0-only

//! Which file systems are frozen, and in which order: a pure function of what was read.
//!
//! Each writable superblock on a block device appears once, whichever mounts show it. Waves are
//! frozen one after the other, the members of a wave at the same time, and thawed in reverse:
//!
//! - a file system whose device is (in the end) a file stands on the file system that holds the
//!   file, and comes before it;
//! - what a user-space program serves comes before all that is not, because the program may need
//!   any of it;
//! - root comes last, save for what root itself stands on.
//!
//! No I/O here: the same table gives the same plan, so recorded tables can be tested.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::mounts::{DevId, Mount};
use crate::topology::{Backing, Topology, ANONYMOUS_TYPES};

/// One place where a file system can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The mount namespace, as in [`Mount::namespace`].
    pub namespace: usize,
    /// The mount's id.
    pub id: u64,
    /// The path in that namespace.
    pub path: PathBuf,
    /// Whether another mount lies right over it, so that the path leads elsewhere.
    pub covered: bool,
}

/// A superblock, once, with all places that show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// Its device number, which names it.
    pub dev: DevId,
    /// Its type.
    pub fs_type: String,
    /// What was named as its source when it was mounted.
    pub source: Option<OsString>,
    /// Where it can be reached, the best way first. Never empty.
    pub places: Vec<Place>,
}

impl fmt::Display for FileSystem {
    /// The path that an operator knows it by, with type and device.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dev, fs_type, .. } = self;
        match self.places.first() {
            Some(place) => {
                // Escaped, so that a newline in a name cannot forge a log line.
                let path = place.path.to_string_lossy();
                write!(f, "{} ({fs_type}, {dev}", path.escape_debug())?;
                if place.namespace != 0 {
                    write!(f, ", in another mount namespace")?;
                }
                write!(f, ")")
            }
            None => write!(f, "({fs_type}, {dev})"),
        }
    }
}

/// Why a file system is not frozen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Its superblock is read-only: there is nothing to hold back.
    ReadOnly,
    /// It is not on a block device of this machine: network, memory, overlay, FUSE, ...
    NoBlockDevice,
    /// The configuration says so; the text names the rule.
    Excluded(String),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::ReadOnly => f.write_str("read-only"),
            Reason::NoBlockDevice => f.write_str("not on a block device"),
            Reason::Excluded(rule) => write!(f, "excluded by {rule}"),
        }
    }
}

/// A file system that is not frozen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// Which.
    pub file_system: FileSystem,
    /// Why.
    pub reason: Reason,
}

/// What is frozen, in order, and what is not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The waves, first to last.
    pub waves: Vec<Vec<FileSystem>>,
    /// All else that is mounted.
    pub left_out: Vec<LeftOut>,
}

/// Makes the plan. `excluded` names the rule by which a file system is left out, if one does.
pub fn plan(
    mounts: &[Mount],
    topology: &Topology,
    excluded: &dyn Fn(&FileSystem) -> Option<String>,
) -> Plan {
    let mut plan = Plan::default();
    let mut chosen = Vec::new();
    for (file_system, writable) in superblocks(mounts) {
        let on_block =
            file_system.dev.major != 0 || ANONYMOUS_TYPES.contains(&file_system.fs_type.as_str());
        let reason = if !on_block {
            Some(Reason::NoBlockDevice)
        } else if !writable {
            Some(Reason::ReadOnly)
        } else {
            excluded(&file_system).map(Reason::Excluded)
        };
        match reason {
            Some(reason) => plan.left_out.push(LeftOut {
                file_system,
                reason,
            }),
            None => chosen.push(file_system),
        }
    }
    let order = Order::new(mounts, topology, &chosen).waves();
    let mut chosen: Vec<_> = chosen.into_iter().map(Some).collect();
    for wave in order {
        let members = wave
            .into_iter()
            .filter_map(|i| chosen.get_mut(i).and_then(Option::take));
        plan.waves.push(members.collect());
    }
    plan
}

/// Each superblock once, in the order of the table, with whether it is writable.
fn superblocks(mounts: &[Mount]) -> Vec<(FileSystem, bool)> {
    let mut found: Vec<(FileSystem, bool)> = Vec::new();
    let mut index = BTreeMap::new();
    // A mount is covered when another one is attached to its own root.
    let covers: BTreeSet<(usize, u64, &Path)> = mounts
        .iter()
        .map(|m| (m.namespace, m.parent, m.path.as_path()))
        .collect();
    for mount in mounts {
        let place = Place {
            namespace: mount.namespace,
            id: mount.id,
            path: mount.path.clone(),
            covered: mount.parent != mount.id
                && covers.contains(&(mount.namespace, mount.id, mount.path.as_path())),
        };
        let at = *index.entry(mount.dev).or_insert(found.len());
        match found.get_mut(at) {
            Some((file_system, _)) => file_system.places.push(place),
            None => found.push((
                FileSystem {
                    dev: mount.dev,
                    fs_type: mount.fs_type.clone(),
                    source: mount.source.clone(),
                    places: vec![place],
                },
                mount.writable,
            )),
        }
    }
    for (file_system, _) in &mut found {
        file_system
            .places
            .sort_by_key(|p| (p.namespace, p.covered, p.path.as_os_str().len()));
    }
    found
}

/// The relation "stands on" between the chosen file systems, by index.
struct Order {
    /// For each: the file systems that hold the files its devices are made of.
    stands_on: Vec<BTreeSet<usize>>,
    /// For each: whether a user-space program has a part in serving it.
    user_space: Vec<bool>,
    root: Option<usize>,
}

impl Order {
    fn new(mounts: &[Mount], topology: &Topology, chosen: &[FileSystem]) -> Self {
        let by_dev: BTreeMap<DevId, usize> =
            chosen.iter().enumerate().map(|(i, f)| (f.dev, i)).collect();
        let mut order = Order {
            stands_on: Vec::new(),
            user_space: Vec::new(),
            // Of several mounts on "/", the last one is the one in use.
            root: mounts
                .iter()
                .rfind(|m| m.namespace == 0 && m.path == Path::new("/"))
                .and_then(|m| by_dev.get(&m.dev).copied()),
        };
        for (i, file_system) in chosen.iter().enumerate() {
            let mut below = BTreeSet::new();
            let mut user_space = false;
            for device in devices_below(topology, file_system.dev) {
                user_space |= device.user_space;
                let Some(backing) = &device.backing else {
                    continue;
                };
                match holder(mounts, topology, backing) {
                    Holder::Superblock(dev) => below.extend(by_dev.get(&dev)),
                    // Where the file really is cannot be told: as early as a user-space device.
                    Holder::Unknown => user_space = true,
                    Holder::Memory => {}
                }
            }
            // A stale path may lead to what is mounted on the device itself.
            below.remove(&i);
            order.stands_on.push(below);
            order.user_space.push(user_space);
        }
        order.inherit_user_space();
        order
    }

    /// What stands on a file system that a user-space program serves, is served by it too.
    fn inherit_user_space(&mut self) {
        for i in 0..self.stands_on.len() {
            let served = |j: &usize| self.user_space.get(*j) == Some(&true);
            let inherits = self.foundations(i).iter().any(served);
            if let Some(flag) = self.user_space.get_mut(i) {
                *flag |= inherits;
            }
        }
    }

    /// All that `i` stands on, to any depth.
    fn foundations(&self, i: usize) -> BTreeSet<usize> {
        let mut found = BTreeSet::new();
        let mut todo = vec![i];
        while let Some(next) = todo.pop() {
            for &below in self.stands_on.get(next).into_iter().flatten() {
                if found.insert(below) {
                    todo.push(below);
                }
            }
        }
        found
    }

    /// Every pair (earlier, later), as for each the set of those that come earlier.
    fn predecessors(&self) -> Vec<BTreeSet<usize>> {
        let count = self.stands_on.len();
        let mut earlier = vec![BTreeSet::new(); count];
        let mut add = |before: usize, after: usize| {
            if let Some(set) = earlier.get_mut(after) {
                set.insert(before);
            }
        };
        let under_root = self.root.map(|r| self.foundations(r)).unwrap_or_default();
        for (i, below) in self.stands_on.iter().enumerate() {
            below.iter().for_each(|&j| add(i, j));
            let Some(root) = self.root else { continue };
            if i != root && !under_root.contains(&i) {
                add(i, root);
            }
        }
        for (i, _) in self.user_space.iter().enumerate().filter(|(_, &u)| u) {
            // Root and what is under it stay last even when a program serves them: it then has
            // nothing else to stand on.
            if Some(i) == self.root || under_root.contains(&i) {
                continue;
            }
            for (j, _) in self.user_space.iter().enumerate().filter(|(_, &u)| !u) {
                add(i, j);
            }
        }
        earlier
    }

    fn waves(&self) -> Vec<Vec<usize>> {
        let earlier = self.predecessors();
        let mut waves = Vec::new();
        let mut left: BTreeSet<usize> = (0..earlier.len()).collect();
        while let Some(&first) = left.first() {
            let mut wave: Vec<usize> = left
                .iter()
                .copied()
                .filter(|&i| earlier.get(i).is_some_and(|set| set.is_disjoint(&left)))
                .collect();
            if wave.is_empty() {
                // Only a table that contradicts itself has a circle; it is opened anywhere.
                wave.push(first);
            }
            wave.iter().for_each(|i| {
                left.remove(i);
            });
            waves.push(wave);
        }
        waves
    }
}

/// All devices that the superblock `dev` is on, to any depth.
fn devices_below(topology: &Topology, dev: DevId) -> Vec<&crate::topology::Device> {
    let mut todo = match topology.members.get(&dev) {
        Some(members) => members.clone(),
        None => vec![dev],
    };
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    while let Some(next) = todo.pop() {
        if !seen.insert(next) {
            continue;
        }
        if let Some(device) = topology.devices.get(&next) {
            todo.extend(&device.below);
            found.push(device);
        }
    }
    found
}

enum Holder {
    Superblock(DevId),
    /// Not on a disk at all.
    Memory,
    Unknown,
}

/// Which superblock holds the file behind a loop device.
fn holder(mounts: &[Mount], topology: &Topology, backing: &Backing) -> Holder {
    if let Some(dev) = backing.dev {
        if let Some(&superblock) = topology.aliases.get(&dev) {
            return Holder::Superblock(superblock);
        }
        if dev.major != 0 || mounts.iter().any(|m| m.dev == dev && is_anonymous(m)) {
            return Holder::Superblock(dev);
        }
        if mounts.iter().any(|m| m.dev == dev && is_memory(m)) {
            return Holder::Memory;
        }
    }
    // A btrfs subvolume that is not mounted by itself has a number that no table lists, and a
    // device without a node cannot be asked: then only the path is left.
    let by_path = mounts
        .iter()
        .filter(|m| m.namespace == 0 && backing.path.starts_with(&m.path))
        // Of equally long ones the last counts: it lies over the others.
        .max_by_key(|m| m.path.components().count());
    match by_path {
        Some(m) if m.dev.major != 0 && backing.dev.is_none() => Holder::Superblock(m.dev),
        Some(m) if is_anonymous(m) => Holder::Superblock(m.dev),
        Some(m) if is_memory(m) => Holder::Memory,
        _ => Holder::Unknown,
    }
}

fn is_anonymous(mount: &Mount) -> bool {
    ANONYMOUS_TYPES.contains(&mount.fs_type.as_str())
}

fn is_memory(mount: &Mount) -> bool {
    matches!(mount.fs_type.as_str(), "tmpfs" | "ramfs" | "devtmpfs")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::parse;
    use crate::topology::Device;

    fn dev(text: &str) -> DevId {
        text.parse().unwrap()
    }

    fn disk(below: &[&str]) -> Device {
        Device {
            below: below.iter().map(|d| dev(d)).collect(),
            ..Device::default()
        }
    }

    fn loop_on(path: &str, of: Option<&str>) -> Device {
        Device {
            backing: Some(Backing {
                dev: of.map(dev),
                path: path.into(),
            }),
            ..Device::default()
        }
    }

    fn served() -> Device {
        Device {
            user_space: true,
            ..Device::default()
        }
    }

    fn topology(devices: Vec<(&str, Device)>) -> Topology {
        Topology {
            devices: devices.into_iter().map(|(d, dd)| (dev(d), dd)).collect(),
            ..Topology::default()
        }
    }

    /// The waves by path, each sorted.
    fn waves(table: &str, topology: &Topology) -> Vec<Vec<String>> {
        let mounts = parse(table.as_bytes(), 0).unwrap();
        let path = |f: &FileSystem| f.places[0].path.display().to_string();
        let mut waves: Vec<Vec<String>> = plan(&mounts, topology, &|_| None)
            .waves
            .iter()
            .map(|wave| wave.iter().map(path).collect())
            .collect();
        waves.iter_mut().for_each(|w| w.sort());
        waves
    }

    #[test]
    fn each_superblock_once_and_root_last() {
        let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /data rw - xfs /dev/sda2 rw
3 1 8:2 /sub /bind ro - xfs /dev/sda2 rw
4 1 0:40 /@ /btr rw - btrfs /dev/sdb rw
5 1 0:40 /@home /btr/home rw - btrfs /dev/sdb rw
6 1 7:0 / /iso ro - iso9660 /dev/loop0 ro
7 1 0:5 / /nfs rw - nfs4 server:/x rw
8 1 0:6 / /auto rw - autofs systemd-1 rw
";
        assert_eq!(
            waves(table, &Topology::default()),
            [vec!["/btr", "/data"], vec!["/"]]
        );
        let mounts = parse(table.as_bytes(), 0).unwrap();
        let plan = plan(&mounts, &Topology::default(), &|_| None);
        let reasons: Vec<String> = plan.left_out.iter().map(|l| l.reason.to_string()).collect();
        assert_eq!(
            reasons,
            [
                "read-only",
                "not on a block device",
                "not on a block device"
            ]
        );
        assert_eq!(plan.waves[0][0].places.len(), 2);
    }

    #[test]
    fn what_is_covered_is_reached_another_way_if_there_is_one() {
        let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /m rw - ext4 /dev/sda2 rw
3 2 8:3 / /m rw - ext4 /dev/sda3 rw
4 1 8:2 / /other/way rw - ext4 /dev/sda2 rw
";
        let mounts = parse(table.as_bytes(), 0).unwrap();
        let plan = plan(&mounts, &Topology::default(), &|_| None);
        let lower = &plan.waves[0][0];
        assert_eq!(lower.dev, dev("8:2"));
        assert_eq!(lower.places[0].path, Path::new("/other/way"));
        assert!(lower.places[1].covered);
    }

    #[test]
    fn what_sits_on_a_file_comes_before_the_file_to_any_depth() {
        // A partition of a loop device under dm, whose file is on a file system that is itself on
        // a loop device.
        let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 7:1 / /one rw - xfs /dev/loop1 rw
3 1 253:0 / /two rw - ext4 /dev/mapper/two rw
4 1 8:2 / /data rw - ext4 /dev/sda2 rw
";
        let topology = topology(vec![
            ("7:1", loop_on("/data/one.img", Some("8:2"))),
            ("253:0", disk(&["259:7"])),
            ("259:7", disk(&["7:2"])),
            ("7:2", loop_on("/one/two.img", Some("7:1"))),
        ]);
        assert_eq!(
            waves(table, &topology),
            [vec!["/two"], vec!["/one"], vec!["/data"], vec!["/"]]
        );
    }

    #[test]
    fn a_loop_device_that_cannot_be_asked_is_placed_by_its_path() {
        let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /srv rw - ext4 /dev/sda2 rw
3 1 7:0 / /l rw - ext4 /dev/loop0 rw
4 1 0:30 / /tmp rw - tmpfs tmpfs rw
5 1 7:1 / /m rw - ext4 /dev/loop1 rw
";
        let topology = topology(vec![
            ("7:0", loop_on("/srv/images/a.img", None)),
            ("7:1", loop_on("/tmp/b.img", None)),
        ]);
        assert_eq!(
            waves(table, &topology),
            [vec!["/l", "/m"], vec!["/srv"], vec!["/"]]
        );
    }

    #[test]
    fn what_a_program_serves_and_what_stands_on_it_come_first() {
        let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /plain rw - ext4 /dev/sda2 rw
3 1 43:0 / /nbd rw - ext4 /dev/nbd0 rw
4 1 7:0 / /on-nbd rw - ext4 /dev/loop0 rw
";
        let topology = topology(vec![
            ("43:0", served()),
            ("7:0", loop_on("/nbd/img", Some("43:0"))),
        ]);
        assert_eq!(
            waves(table, &topology),
            [vec!["/on-nbd"], vec!["/nbd"], vec!["/plain"], vec!["/"]]
        );
    }

    #[test]
    fn root_comes_before_what_root_itself_stands_on() {
        let table = "\
1 0 7:0 / / rw - ext4 /dev/loop0 rw
2 1 8:1 / /run/live/medium rw - ext4 /dev/sda1 rw
3 1 8:2 / /home rw - ext4 /dev/sda2 rw
";
        let topology = topology(vec![("7:0", loop_on("/live/root.img", Some("8:1")))]);
        assert_eq!(
            waves(table, &topology),
            [vec!["/home"], vec!["/"], vec!["/run/live/medium"]]
        );
    }

    #[test]
    fn a_table_that_contradicts_itself_still_gives_a_plan() {
        let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 7:0 / /a rw - ext4 /dev/loop0 rw
3 1 7:1 / /b rw - ext4 /dev/loop1 rw
";
        let topology = topology(vec![
            ("7:0", loop_on("/b/img", Some("7:1"))),
            ("7:1", loop_on("/a/img", Some("7:0"))),
        ]);
        let planned: usize = waves(table, &topology).iter().map(Vec::len).sum();
        assert_eq!(planned, 3);
    }
}
