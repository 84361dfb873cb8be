// SPDX-License-Identifier: GPL-2.0-only

//! What each block device stands on, as sysfs tells it: partitions of disks, the devices below dm
//! and md, the file behind a loop device, and which devices a user-space program serves.
//!
//! Facts only; what follows for the order of freezing is decided in [`crate::plan`]. It opens no
//! file system that might be frozen: sysfs, and the nodes of loop devices in `/dev`.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::mounts::{DevId, Mount};
use crate::sys;

/// A block device and what is below it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// The kernel's name, such as `dm-3`.
    pub name: String,
    /// The disk, if this is a partition of one, and the devices below, if it is dm or md.
    pub below: Vec<DevId>,
    /// The file behind a loop device.
    pub backing: Option<Backing>,
    /// Whether a program in user space may serve it, one that may itself need a file system here:
    /// nbd, ublk, iSCSI, NVMe over fabrics, drbd, rbd.
    pub user_space: bool,
}

/// The file behind a loop device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backing {
    /// `st_dev` of that file, when the device could be asked.
    pub dev: Option<DevId>,
    /// Its path as sysfs shows it, which is relative to some mount namespace's root.
    pub path: PathBuf,
}

/// Block devices by number, and the members of file systems that are on several.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Every device below a file system of interest.
    pub devices: BTreeMap<DevId, Device>,
    /// For superblocks with an anonymous number (btrfs, bcachefs): the devices they are on.
    pub members: BTreeMap<DevId, Vec<DevId>>,
    /// Further `st_dev`s of a superblock (btrfs gives each subvolume one), to the superblock's own.
    pub aliases: BTreeMap<DevId, DevId>,
}

/// File systems whose superblock has an anonymous number although it is on block devices.
pub const ANONYMOUS_TYPES: [&str; 2] = ["btrfs", "bcachefs"];

/// Reads what is below every file system among `mounts` that may be on block devices.
///
/// What cannot be read is left out: a device may vanish at any time, and an order that lacks one
/// edge is better than no backup.
pub fn read(mounts: &[Mount]) -> Topology {
    let mut topology = Topology::default();
    let mut groups = None;
    for mount in mounts.iter().filter(|m| m.writable) {
        if mount.dev.major != 0 {
            add(&mut topology, mount.dev);
        } else if ANONYMOUS_TYPES.contains(&mount.fs_type.as_str()) {
            add_alias(&mut topology, mount);
            if topology.members.contains_key(&mount.dev) {
                continue;
            }
            let groups = groups.get_or_insert_with(btrfs_groups);
            let members = members_of(mount, groups);
            for dev in &members {
                add(&mut topology, *dev);
            }
            topology.members.insert(mount.dev, members);
        }
    }
    topology
}

fn add_alias(topology: &mut Topology, mount: &Mount) {
    if mount.namespace != 0 {
        return;
    }
    if let Ok(meta) = std::fs::symlink_metadata(&mount.path) {
        let alias = DevId::from_raw(meta.dev());
        if alias.major == 0 && alias != mount.dev {
            topology.aliases.insert(alias, mount.dev);
        }
    }
}

/// The block devices of the file system that `mount` shows: the named source, and for btrfs all
/// that belong to the same file system.
fn members_of(mount: &Mount, groups: &[Vec<DevId>]) -> Vec<DevId> {
    let Some(source) = &mount.source else {
        return Vec::new();
    };
    // bcachefs names all of its devices, with colons between them.
    let named: Vec<DevId> = source
        .as_bytes()
        .split(|&b| b == b':')
        .filter_map(|part| std::fs::metadata(OsStr::from_bytes(part)).ok())
        .filter(|meta| meta.file_type().is_block_device())
        .map(|meta| DevId::from_raw(meta.rdev()))
        .collect();
    let group = groups
        .iter()
        .find(|group| group.iter().any(|d| named.contains(d)));
    group.cloned().unwrap_or(named)
}

/// The devices of each mounted btrfs, from `/sys/fs/btrfs/<uuid>/devices`.
fn btrfs_groups() -> Vec<Vec<DevId>> {
    list(Path::new("/sys/fs/btrfs"))
        .map(|fs| {
            list(&fs.join("devices"))
                .filter_map(|d| dev_in(&d))
                .collect()
        })
        .collect()
}

fn add(topology: &mut Topology, dev: DevId) {
    if topology.devices.contains_key(&dev) {
        return;
    }
    let numbers = Path::new("/sys/dev/block");
    // The link leads to the device's place in the tree, and that place says what it is.
    let Ok(place) = std::fs::read_link(numbers.join(dev.to_string())) else {
        return;
    };
    let device = describe(&numbers.join(place));
    let below = device.below.clone();
    topology.devices.insert(dev, device);
    for lower in below {
        add(topology, lower);
    }
}

fn describe(dir: &Path) -> Device {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let disk = dir.parent().filter(|_| dir.join("partition").exists());
    let below = match disk {
        Some(disk) => dev_in(disk).into_iter().collect(),
        None => list(&dir.join("slaves"))
            .filter_map(|slave| dev_in(&slave))
            .collect(),
    };
    Device {
        below,
        backing: backing_of(dir, &name),
        user_space: served_by_user_space(dir, &name),
        name: name.into_owned(),
    }
}

fn backing_of(dir: &Path, name: &str) -> Option<Backing> {
    if !name.starts_with("loop") {
        return None;
    }
    let mut path = std::fs::read(dir.join("loop/backing_file")).ok()?;
    if path.last() == Some(&b'\n') {
        path.pop();
    }
    let dev = File::open(Path::new("/dev").join(name))
        .and_then(|node| sys::loop_backing_dev(node.as_fd()))
        .ok()
        .map(DevId::from_raw);
    Some(Backing {
        dev,
        path: std::ffi::OsString::from_vec(path).into(),
    })
}

/// Judges by the kernel's name for the device and by its place in the device tree: iSCSI disks are
/// below a `session`, NVMe over fabrics below `nvme-fabrics`, or below the subsystem that stands for
/// all paths to it.
fn served_by_user_space(dir: &Path, name: &str) -> bool {
    const NAMES: [&str; 4] = ["nbd", "ublk", "drbd", "rbd"];
    NAMES.iter().any(|prefix| name.starts_with(prefix))
        || dir.components().any(|part| {
            let part = part.as_os_str().as_bytes();
            part.starts_with(b"session") || part == b"nvme-fabrics"
        })
        || has_remote_path(dir)
}

/// Whether a disk of an NVMe subsystem, the folder that it is in, is reached over a network or from
/// this machine itself: the controllers there name their transport.
fn has_remote_path(dir: &Path) -> bool {
    const REMOTE: [&str; 4] = ["tcp", "rdma", "fc", "loop"];
    let subsystem = dir.parent().filter(|_| {
        dir.components()
            .any(|it| it.as_os_str() == "nvme-subsystem")
    });
    let mut controllers = subsystem.into_iter().flat_map(list);
    controllers.any(|controller| {
        let transport = std::fs::read_to_string(controller.join("transport"));
        transport.is_ok_and(|it| REMOTE.contains(&it.trim()))
    })
}

fn dev_in(dir: &Path) -> Option<DevId> {
    std::fs::read_to_string(dir.join("dev")).ok()?.parse().ok()
}

fn list(dir: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
}
