// SPDX-License-Identifier: GPL-2.0-only

//! What a file system stands on, all the way down: block devices, the files that some of them are made
//! of, the file systems which hold those, and in the end disks.
//!
//! A pure function of what was read, for [`crate::plan`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::mounts::{DevId, Mount};
use crate::topology::{Backing, Device, Topology};

/// A disk, as far as it matters which one it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The kernel's name.
    pub name: String,
    /// Where the host has it, if it is one of the host's.
    pub address: Option<String>,
    /// Whether a program or another machine may serve it: it is neither the host's nor hardware or memory.
    pub served: bool,
    /// The devices whose counters tell whether something was written there past the file systems, if it is
    /// one of the host's: itself, if nothing between it and them writes by itself, as md, thin volumes and
    /// caches may. Else the topmost ones: what is written by itself goes to those below only.
    pub watched: Vec<Watched>,
}

/// A device by whose counter it is told that something was written to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Watched {
    /// Its number.
    pub dev: DevId,
    /// The kernel's name.
    pub name: String,
    /// The partitions on it, where what is written to those does not count.
    pub without: Vec<DevId>,
    /// Of a disk: the topmost devices that are made of it, for when something on it goes on.
    pub instead: Vec<Watched>,
}

impl Watched {
    /// Whether it is a disk of which this is a partition.
    fn has_partition(&self, dev: DevId) -> bool {
        let mut outside = self.instead.iter().filter(|it| it.dev == self.dev);
        outside.any(|it| it.without.contains(&dev))
    }

    /// Whether it counts what is written to something that is on these devices, all that there are down to
    /// the disks.
    pub fn counts(&self, below: &BTreeSet<DevId>) -> bool {
        below.contains(&self.dev) && !self.without.iter().any(|it| below.contains(it))
    }
}

impl fmt::Display for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/dev/{}", self.name)?;
        match self.without.is_empty() {
            true => Ok(()),
            false => f.write_str(" outside of its partitions"),
        }
    }
}

/// What is written to although all is frozen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GoesOn {
    /// For people.
    pub name: String,
    /// What it is on.
    pub devices: Vec<DevId>,
    /// Those and all that is below; `None` where that may be any.
    pub below: Option<BTreeSet<DevId>>,
}

/// Where nothing should be written to once all is frozen, and where nobody can tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AtRest {
    /// Those by which it is told, each with the partitions on it that are written to all the same.
    pub watched: BTreeMap<Watched, Vec<DevId>>,
    /// The others, each with one that goes on there.
    pub unwatched: BTreeMap<Watched, String>,
    /// One that goes on and may be on any of them by way of a program, which serves its device: what is written there
    /// may be its.
    pub perhaps: Option<String>,
}

impl AtRest {
    /// Those of `watched` that are left by what goes on: it takes away only the devices that count it, and all where its
    /// own are not known, as with ZFS.
    pub fn of(watched: impl IntoIterator<Item = Watched>, goes_on: &[GoesOn]) -> Self {
        let mut anywhere = goes_on.iter().filter(|it| it.below.is_none());
        let unknown = anywhere.clone().find(|it| it.devices.is_empty());
        let mut at_rest = AtRest {
            perhaps: anywhere.next().map(|it| it.name.clone()),
            ..AtRest::default()
        };
        for it in watched {
            match unknown {
                Some(part) => drop(at_rest.unwatched.insert(it, part.name.clone())),
                None => at_rest.add(it, goes_on),
            }
        }
        at_rest
    }

    fn add(&mut self, it: Watched, goes_on: &[GoesOn]) {
        let mut others = Vec::new();
        let counted = goes_on.iter();
        let counted = counted.filter_map(|part| Some((part, part.below.as_ref()?)));
        for (part, below) in counted.filter(|(_, below)| it.counts(below)) {
            match part.devices.as_slice() {
                // It counts each write to both at once.
                [dev] if it.has_partition(*dev) && *below == BTreeSet::from([*dev, it.dev]) => {
                    others.push(*dev);
                }
                // Of what is written to a stripe or a mirror it has a part or several copies, and of what is written
                // to a volume all, at another time: before the volume counts a write, parts of it are done.
                _ if it.instead.is_empty() => {
                    self.unwatched.insert(it, part.name.clone());
                    return;
                }
                _ => {
                    for it in it.instead {
                        self.add(it, goes_on);
                    }
                    return;
                }
            }
        }
        self.watched.insert(it, others);
    }

    /// Without those that are told by one of these devices, which do not count.
    pub fn but(mut self, not_counting: &BTreeSet<DevId>) -> Self {
        let is_told = |it: &Watched, others: &[DevId]| {
            let mut counted = it.without.iter().chain(others).chain([&it.dev]);
            !counted.any(|dev| not_counting.contains(dev))
        };
        for (it, others) in std::mem::take(&mut self.watched) {
            if is_told(&it, &others) {
                self.watched.insert(it, others);
            } else {
                self.unwatched.insert(it, NOT_COUNTED.into());
            }
        }
        self
    }

    /// The devices that have to count for it to be told.
    pub fn counted(&self) -> BTreeSet<DevId> {
        let own = self.watched.keys();
        let own = own.flat_map(|it| it.without.iter().chain([&it.dev]));
        own.chain(self.watched.values().flatten())
            .copied()
            .collect()
    }

    /// What is not looked at and why, in words; `None` when there is nothing of that kind.
    pub fn unwatched(&self) -> Option<String> {
        let words = |(it, because): (&Watched, &String)| format!("{it} ({because})");
        let words: Vec<String> = self.unwatched.iter().map(words).collect();
        let is_any = !words.is_empty();
        is_any.then(|| {
            format!(
                "what programs write to devices themselves while all is frozen is not seen where something goes on, or nothing \
                 is counted: {}",
                words.join(", ")
            )
        })
    }
}

/// Why what is written to a device is not known.
pub const NOT_COUNTED: &str = "its counters are off: queue/iostats";

/// How the UUIDs begin of what the device mapper has in one layer and that writes only what it is given to
/// write: volumes of LVM, encryption, several paths to a disk. An integrity device, which writes its journal
/// or bitmap seconds later, has another (`CRYPT-INTEGRITY`), and what somebody has mapped by hand has none.
const QUIET: [&str; 5] = ["LVM-", "CRYPT-LUKS", "CRYPT-PLAIN", "CRYPT-BITLK", "mpath-"];

fn is_quiet(device: &Device) -> bool {
    let uuid = device.mapper_uuid.as_deref().unwrap_or_default();
    QUIET.iter().any(|kind| uuid.starts_with(kind))
}

/// What a superblock is on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Footing {
    /// The lowest devices below it, and below whatever holds a file that it is on. Empty when nothing is
    /// known of them.
    pub disks: BTreeSet<DevId>,
    /// Those and all that is between; `None` where it may have a part of any other as well.
    pub below: Option<BTreeSet<DevId>>,
}

/// All devices that a superblock is on, or may be, to any depth: those of its own, and its journals and logs.
pub fn devices_below<'a>(
    topology: &'a Topology,
    superblock: DevId,
    devices: &[DevId],
) -> Vec<(DevId, &'a Device)> {
    let mut todo = devices.to_vec();
    let further = [&topology.logs, &topology.perhaps];
    todo.extend(
        further
            .iter()
            .filter_map(|it| it.get(&superblock))
            .flatten(),
    );
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    while let Some(next) = todo.pop() {
        if !seen.insert(next) {
            continue;
        }
        if let Some(device) = topology.devices.get(&next) {
            todo.extend(&device.below);
            found.push((next, device));
        }
    }
    found
}

/// What holds the file behind a loop device.
pub enum Holder {
    /// This one.
    Superblock(DevId),
    /// It is not on a disk at all.
    Memory,
    /// Nobody can tell.
    Unknown,
}

/// Which superblock holds the file behind a loop device: the one with that number. No path is asked,
/// which may be of another namespace, or have another file by now.
pub fn holder(mounts: &[Mount], topology: &Topology, backing: &Backing) -> Holder {
    let Some(dev) = backing.dev else {
        return Holder::Unknown;
    };
    if let Some(&superblock) = topology.aliases.get(&dev) {
        return Holder::Superblock(superblock);
    }
    let with_that_number = mounts.iter().find(|m| m.dev == dev);
    match with_that_number {
        _ if dev.major != 0 => Holder::Superblock(dev),
        Some(m) if m.is_on_disks() => Holder::Superblock(dev),
        Some(m) if is_memory(m) => Holder::Memory,
        // An overlay, or a subvolume or layer that no table lists.
        _ => Holder::Unknown,
    }
}

fn is_memory(mount: &Mount) -> bool {
    matches!(mount.fs_type.as_str(), "tmpfs" | "ramfs" | "devtmpfs")
}

/// The way down from superblocks to disks.
pub struct Ground<'a> {
    mounts: &'a [Mount],
    topology: &'a Topology,
    /// The devices of each superblock.
    devices: BTreeMap<DevId, &'a [DevId]>,
}

impl<'a> Ground<'a> {
    /// That of these superblocks, by number, each with its own devices.
    pub fn new(
        mounts: &'a [Mount],
        topology: &'a Topology,
        devices: BTreeMap<DevId, &'a [DevId]>,
    ) -> Self {
        Ground {
            mounts,
            topology,
            devices,
        }
    }

    fn below(&self, superblock: DevId) -> Vec<(DevId, &'a Device)> {
        let devices = self.devices.get(&superblock).copied().unwrap_or_default();
        devices_below(self.topology, superblock, devices)
    }

    /// What a superblock is on.
    pub fn of(&self, superblock: DevId) -> Footing {
        let (mut disks, mut all) = (BTreeSet::new(), BTreeSet::new());
        let mut is_certain = true;
        let mut seen = BTreeSet::from([superblock]);
        let mut todo = vec![superblock];
        while let Some(next) = todo.pop() {
            is_certain &= !self.topology.unclear.contains(&next);
            is_certain &= !self.topology.perhaps.contains_key(&next);
            for (dev, device) in self.below(next) {
                all.insert(dev);
                if !device.below.is_empty() {
                    continue;
                }
                match device.backing.as_ref().and_then(|it| self.holder(it)) {
                    Some(holder) if !seen.insert(holder) => {}
                    Some(holder) => todo.push(holder),
                    None => {
                        is_certain &= !self.is_served(device);
                        disks.insert(dev);
                    }
                }
            }
        }
        is_certain &= !disks.is_empty();
        if self.topology.gone.contains(&superblock) {
            // Nothing is written there any more.
            (all, is_certain) = (BTreeSet::from([superblock]), true);
        }
        Footing {
            disks,
            below: is_certain.then_some(all),
        }
    }

    /// Whether what is on such a disk may lie on another one of this machine: a program may serve it, or it
    /// is a file that is not in memory.
    fn is_served(&self, disk: &Device) -> bool {
        let is_file = disk
            .backing
            .as_ref()
            .is_some_and(|it| !matches!(holder(self.mounts, self.topology, it), Holder::Memory));
        disk.user_space || is_file
    }

    /// What holds the file behind a loop device, if that is one of these superblocks.
    fn holder(&self, backing: &Backing) -> Option<DevId> {
        match holder(self.mounts, self.topology, backing) {
            Holder::Superblock(dev) => self.devices.contains_key(&dev).then_some(dev),
            Holder::Memory | Holder::Unknown => None,
        }
    }

    /// The disks that the host gives, and all those of these.
    pub fn describe(&self, footings: &[Footing]) -> BTreeMap<DevId, Disk> {
        let restless: BTreeSet<DevId> = self
            .devices
            .keys()
            .flat_map(|superblock| self.disks_that_change_by_themselves(*superblock))
            .collect();
        let hosts = self.topology.disks.iter().map(|(dev, it)| {
            let disk = Disk {
                name: it.name.clone(),
                address: Some(it.address.clone()),
                served: false,
                watched: match restless.contains(dev) {
                    true => self.topmost(*dev),
                    false => vec![Watched {
                        dev: *dev,
                        name: it.name.clone(),
                        without: Vec::new(),
                        instead: self.topmost(*dev),
                    }],
                },
            };
            (*dev, disk)
        });
        let others = footings.iter().flat_map(|it| &it.disks);
        let others = others.filter_map(|dev| {
            let device = self.topology.devices.get(dev)?;
            let disk = Disk {
                name: device.name.clone(),
                address: None,
                served: device.user_space,
                watched: Vec::new(),
            };
            Some((*dev, disk))
        });
        // Of two that are the same one the last stays.
        others.chain(hosts).collect()
    }

    /// The devices above a disk that nothing is above, and what lies outside of the partitions of those that
    /// have some.
    fn topmost(&self, disk: DevId) -> Vec<Watched> {
        let mut todo = vec![disk];
        let (mut seen, mut topmost) = (BTreeSet::new(), Vec::new());
        while let Some(dev) = todo.pop() {
            let Some(above) = self.topology.above.get(&dev).filter(|_| seen.insert(dev)) else {
                continue;
            };
            todo.extend(above.partitions.iter().chain(&above.holders));
            // What a holder of the whole writes to partitions goes past them.
            if above.holders.is_empty() {
                topmost.push(Watched {
                    dev,
                    name: above.name.clone(),
                    without: above.partitions.clone(),
                    instead: Vec::new(),
                });
            }
        }
        topmost.sort_unstable();
        topmost
    }

    /// The lowest devices of it, if something above them may write by itself: md, what the device mapper
    /// has in more than one layer (thin volumes, caches, RAID, snapshots), and in one layer whatever is not
    /// known to be [`QUIET`].
    fn disks_that_change_by_themselves(&self, superblock: DevId) -> BTreeSet<DevId> {
        let below = self.below(superblock);
        let lower = |device: &Device| {
            let lower = device.below.iter();
            let names = lower.filter_map(|dev| self.topology.devices.get(dev));
            names.map(|it| it.name.clone()).collect::<Vec<_>>()
        };
        let changes =
            |device: &Device| match (device.name.starts_with("dm-"), lower(device).as_slice()) {
                (_, []) => false,
                (true, below) => !is_quiet(device) || below.iter().any(|it| it.starts_with("dm-")),
                // A partition is called after its disk.
                (false, [disk]) => !device.name.starts_with(disk.as_str()),
                (false, _) => true,
            };
        if !below.iter().any(|(_, device)| changes(device)) {
            return BTreeSet::new();
        }
        let lowest = below.iter().filter(|(_, device)| device.below.is_empty());
        lowest.map(|(dev, _)| *dev).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_on_takes_away_only_the_devices_that_count_it() {
        let dev = |text: &str| -> DevId { text.parse().unwrap() };
        let devs = |all: &[&str]| -> Vec<DevId> { all.iter().map(|it| dev(it)).collect() };
        let watched = |text: &str, name: &str, without: &[&str]| Watched {
            dev: dev(text),
            name: name.into(),
            without: devs(without),
            instead: Vec::new(),
        };
        // Below LVM on its third partition are two volumes.
        let outside = watched("8:0", "sda", &["8:1", "8:2", "8:3"]);
        let parts = [
            outside,
            watched("8:1", "sda1", &[]),
            watched("8:2", "sda2", &[]),
            watched("253:0", "dm-0", &[]),
            watched("253:1", "dm-1", &[]),
        ];
        let disk = Watched {
            instead: parts.to_vec(),
            ..watched("8:0", "sda", &[])
        };
        let found = |goes_on: &[(&[&str], Option<&[&str]>)]| {
            let goes_on = goes_on.iter().map(|(devices, below)| GoesOn {
                name: "it".into(),
                devices: devs(devices),
                below: below.map(|it| devs(it).into_iter().collect()),
            });
            let goes_on: Vec<GoesOn> = goes_on.collect();
            let AtRest {
                watched,
                unwatched,
                perhaps,
            } = AtRest::of([disk.clone()], &goes_on);
            let is_any_anywhere = goes_on.iter().any(|it| it.below.is_none());
            assert_eq!(perhaps.is_some(), is_any_anywhere);
            let words = |it: &Watched| it.to_string();
            let others = watched.values().flatten().copied();
            (
                watched.keys().map(words).collect::<Vec<_>>().join(", "),
                others.collect::<Vec<_>>(),
                unwatched.keys().map(words).collect::<Vec<_>>().join(", "),
            )
        };
        let whole = |others: &[&str]| ("/dev/sda".to_owned(), devs(others), String::new());
        assert_eq!(found(&[]), whole(&[]));
        let partition: (&[&str], Option<&[&str]>) = (&["8:2"], Some(&["8:2", "8:0"]));
        assert_eq!(found(&[partition]), whole(&["8:2"]));
        // On another disk.
        assert_eq!(found(&[(&["8:18"], Some(&["8:18", "8:16"]))]), whole(&[]));
        // A volume, and one of two disks.
        let rest = "/dev/sda outside of its partitions, /dev/sda1, /dev/sda2, ";
        let volume: &[&str] = &["253:1", "8:3", "8:0"];
        let without = |volume: &str, left: &str| {
            let left = format!("{rest}{left}");
            (left, Vec::new(), volume.to_owned())
        };
        assert_eq!(
            found(&[(&["253:1"], Some(volume))]),
            without("/dev/dm-1", "/dev/dm-0")
        );
        let striped: &[&str] = &["253:0", "8:3", "8:18", "8:0", "8:16"];
        assert_eq!(
            found(&[(&["253:0"], Some(striped))]),
            without("/dev/dm-0", "/dev/dm-1")
        );
        // A partition beside a volume: each takes away itself.
        let left = "/dev/sda outside of its partitions, /dev/sda1, /dev/dm-0";
        let both = (left.to_owned(), vec![], "/dev/sda2, /dev/dm-1".to_owned());
        assert_eq!(found(&[partition, (&["253:1"], Some(volume))]), both);
        // One whose counters are off, or those of what goes on there, tells nothing.
        let told = |off: &[&str]| {
            let goes_on = GoesOn {
                name: "it".into(),
                devices: devs(&["8:2"]),
                below: Some(devs(&["8:2", "8:0"]).into_iter().collect()),
            };
            let at_rest = AtRest::of([disk.clone()], &[goes_on]);
            assert_eq!(
                at_rest.counted(),
                devs(&["8:0", "8:2"]).into_iter().collect()
            );
            let at_rest = at_rest.but(&devs(off).into_iter().collect());
            (at_rest.watched.len(), at_rest.unwatched())
        };
        assert_eq!(told(&["8:1", "253:0"]), (1, None));
        for off in ["8:0", "8:2"] {
            let (watched, unwatched) = told(&[off]);
            let words = "counted: /dev/sda (its counters are off: queue/iostats)";
            assert!(watched == 0 && unwatched.unwrap().ends_with(words), "{off}");
        }
        // What may be anywhere by way of a program takes nothing away, and what is on disks that are not known all.
        let nothing = (String::new(), Vec::new(), "/dev/sda".to_owned());
        assert_eq!(found(&[partition, (&[], None)]), nothing);
        assert_eq!(found(&[(&["253:9"], None)]), whole(&[]));
        assert_eq!(found(&[partition, (&["253:9"], None)]), whole(&["8:2"]));
    }

    #[test]
    fn a_volume_on_a_whole_disk_is_not_taken_off_what_the_disk_counts() {
        let watched = |text: &str, name: &str, instead: &[Watched]| Watched {
            dev: text.parse().unwrap(),
            name: name.into(),
            without: Vec::new(),
            instead: instead.to_vec(),
        };
        let volumes = [watched("253:0", "dm-0", &[]), watched("253:1", "dm-1", &[])];
        let [goes_on, other] = &volumes;
        let disk = watched("8:0", "sda", &volumes);
        let goes_on_there = GoesOn {
            name: "it".into(),
            devices: vec![goes_on.dev],
            below: Some(BTreeSet::from([goes_on.dev, disk.dev])),
        };
        let at_rest = AtRest::of([disk], &[goes_on_there]);
        assert_eq!(at_rest.watched, BTreeMap::from([(other.clone(), vec![])]));
        assert!(at_rest.unwatched.into_keys().eq([goes_on.clone()]));
    }
}
