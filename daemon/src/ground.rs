// SPDX-License-Identifier: GPL-2.0-only

//! What a file system stands on, all the way down: block devices, the files that some of them are made
//! of, the file systems which hold those, and in the end disks.
//!
//! A pure function of what was read, for [`crate::plan`].

use std::collections::{BTreeMap, BTreeSet};

use crate::mounts::{DevId, Mount};
use crate::topology::{Backing, Device, Topology};

/// A disk, as far as it matters which one it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The kernel's name.
    pub name: String,
    /// Where the host has it, if it is one of the host's.
    pub address: Option<String>,
    /// Whether what is on it may lie on another disk of this machine: a program may serve it.
    pub is_served: bool,
    /// Whether nothing between it and the file systems on it writes by itself, as md, thin volumes and
    /// caches do.
    pub is_plain: bool,
}

/// All devices that a superblock is on, to any depth: those of its own, and its journals and logs.
pub fn devices_below<'a>(
    topology: &'a Topology,
    superblock: DevId,
    devices: &[DevId],
) -> Vec<(DevId, &'a Device)> {
    let mut todo = devices.to_vec();
    todo.extend(topology.logs.get(&superblock).into_iter().flatten());
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

    /// The lowest devices below a superblock, and below whatever holds a file that it is on. Empty when
    /// nothing is known of them.
    pub fn disks(&self, superblock: DevId) -> BTreeSet<DevId> {
        let mut disks = BTreeSet::new();
        let mut seen = BTreeSet::from([superblock]);
        let mut todo = vec![superblock];
        while let Some(next) = todo.pop() {
            let below = self.below(next).into_iter();
            for (dev, device) in below.filter(|(_, device)| device.below.is_empty()) {
                match device.backing.as_ref().and_then(|it| self.holder(it)) {
                    Some(holder) if !seen.insert(holder) => {}
                    Some(holder) => todo.push(holder),
                    None => drop(disks.insert(dev)),
                }
            }
        }
        disks
    }

    /// What holds the file behind a loop device, if that is one of these superblocks.
    fn holder(&self, backing: &Backing) -> Option<DevId> {
        match holder(self.mounts, self.topology, backing) {
            Holder::Superblock(dev) => self.devices.contains_key(&dev).then_some(dev),
            Holder::Memory | Holder::Unknown => None,
        }
    }

    /// The disks that the host gives, and all of these.
    pub fn describe(&self, disks: &[BTreeSet<DevId>]) -> BTreeMap<DevId, Disk> {
        let restless: BTreeSet<DevId> = self
            .devices
            .keys()
            .flat_map(|superblock| self.disks_that_change_by_themselves(*superblock))
            .collect();
        let hosts = self.topology.disks.iter().map(|(dev, it)| {
            let disk = Disk {
                name: it.name.clone(),
                address: Some(it.address.clone()),
                is_served: false,
                is_plain: !restless.contains(dev),
            };
            (*dev, disk)
        });
        let others = disks.iter().flatten().filter_map(|dev| {
            let device = self.topology.devices.get(dev)?;
            // A file that is not in memory lies somewhere on the others.
            let is_file = device.backing.as_ref().is_some_and(|it| {
                !matches!(holder(self.mounts, self.topology, it), Holder::Memory)
            });
            let disk = Disk {
                name: device.name.clone(),
                address: None,
                is_served: device.user_space || is_file,
                is_plain: !restless.contains(dev),
            };
            Some((*dev, disk))
        });
        // Of two that are the same one the last stays.
        others.chain(hosts).collect()
    }

    /// The lowest devices of it, if something above them writes by itself: md, and what the device mapper
    /// has in more than one layer (thin volumes, caches, RAID, snapshots).
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
                (true, below) => below.iter().any(|it| it.starts_with("dm-")),
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
