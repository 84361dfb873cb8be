// SPDX-License-Identifier: GPL-2.0-only

//! What each block device stands on, as sysfs tells it: partitions of disks, the devices below dm
//! and md, the file behind a loop device, and which devices a user-space program serves.
//!
//! Facts only; what follows for the order of freezing is decided in [`crate::plan`]. It opens no
//! file system that might be frozen: sysfs, and the nodes of loop devices in `/dev`. What has to ask a file
//! system, be it through the kernel, is asked [apart](Questions): one whose server or disk is dead must not
//! cost the order of all others, nor their thaw.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, DirEntry, File};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{open, OFlag};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use crate::apart::{Patience, Questions};
use crate::disks::{self, HostDisk};
use crate::mounts::{is_anonymous, is_served, may_be_a_node, DevId, Mount};
use crate::superblocks::{self, dev_in, folder_of, Entry, Superblock};
use crate::sys::{self, LoopBacking};
use crate::unlisted::UNREACHED;

/// How long all that hangs may hold up one look: a thaw may wait for it.
const PATIENCE: Duration = Duration::from_secs(1);

/// What was asked does not answer in time.
struct Silent;

/// A block device and what is below it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// The kernel's name, such as `dm-3`.
    pub name: String,
    /// What a device of the device mapper is called by whoever made it, with its kind before it: `LVM-`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mapper_uuid: Option<String>,
    /// The disk, if this is a partition of one, the devices below, if it is dm or md, and the block
    /// device that a loop device is over.
    pub below: Vec<DevId>,
    /// The file behind a loop device.
    pub backing: Option<Backing>,
    /// Whether a program in user space may serve it, one that may itself need a file system here
    /// (nbd, ublk, iSCSI, NVMe over fabrics, drbd, rbd, zvols): whatever is not known to be hardware.
    pub user_space: bool,
}

/// The file behind a loop device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backing {
    /// `st_dev` of that file, when the device could be asked: that asks the file system, which may hang.
    pub dev: Option<DevId>,
    /// Its path as sysfs shows it, which is relative to some mount namespace's root.
    pub path: PathBuf,
}

/// Block devices by number, and what lies between them and the file systems.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Every device below a file system of interest.
    pub devices: BTreeMap<DevId, Device>,
    /// For superblocks with an anonymous number (btrfs, bcachefs): the devices they are on.
    pub members: BTreeMap<DevId, Vec<DevId>>,
    /// For superblocks of which nobody tells which of several they are: the devices of all of those.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub perhaps: BTreeMap<DevId, Vec<DevId>>,
    /// Further `st_dev`s of a superblock (btrfs gives each subvolume one), to the superblock's own.
    pub aliases: BTreeMap<DevId, DevId>,
    /// For superblocks whose journal, log or data is on further devices: which.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub logs: BTreeMap<DevId, Vec<DevId>>,
    /// The disks that the host gives, whatever is on them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disks: BTreeMap<DevId, HostDisk>,
    /// What is made of those disks, to any depth: what is directly above each device.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub above: BTreeMap<DevId, Above>,
    /// Superblocks that may have a part of further devices, which nobody names.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub unclear: BTreeSet<DevId>,
    /// How many errors ext4 remembers of a superblock that is read-only, on a disk that is not.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub errors: BTreeMap<DevId, u64>,
    /// Superblocks that have become read-only though nobody has changed their mounts, as far as that was seen.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub turned: BTreeSet<DevId>,
    /// Superblocks whose device is no more.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub gone: BTreeSet<DevId>,
    /// Where sysfs lists a superblock that is mounted, if it does.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub listed: BTreeMap<DevId, Entry>,
    /// Superblocks that are alive though no table shows them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unmounted: Vec<Unmounted>,
    /// Superblocks of which some are mounted by a name that leads to no device, and at least one is not
    /// mounted: nobody tells which.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unclear_unmounted: Vec<Unmounted>,
    /// Whether somebody who was asked did not answer in time: the next time he may.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unanswered: bool,
}

impl Topology {
    /// The one with this number is that one.
    fn mounted_as(&mut self, dev: DevId, it: &Superblock) {
        self.members.insert(dev, it.devices.clone());
        self.listed.extend(it.listed.clone().map(|it| (dev, it)));
    }

    /// Whether one that is mounted is known to be that one.
    fn is_mounted(&self, it: &Superblock) -> bool {
        let mut mounted = self.listed.values();
        it.listed
            .as_ref()
            .is_some_and(|it| mounted.any(|mounted| mounted == it))
    }
}

/// What is directly above a block device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Above {
    /// The kernel's name of that device.
    pub name: String,
    /// Its partitions.
    pub partitions: Vec<DevId>,
    /// The devices of dm, md and the like that are mapped to it.
    pub holders: Vec<DevId>,
}

/// A superblock that is alive though no mount table shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unmounted {
    /// Its type, or its driver's.
    pub fs_type: String,
    /// The kernel's name of its device, or its UUID.
    pub name: String,
    /// The devices that it is on. Never empty.
    pub devices: Vec<DevId>,
    /// Where sysfs lists it, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listed: Option<Entry>,
    /// Why nobody can reach it, if that is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreachable: Option<String>,
}

/// Reads what is below every file system that may be on block devices: among `mounts`, and those of
/// `superblocks` that no mount shows.
///
/// What cannot be read is left out: a device may vanish at any time, and an order that lacks one
/// edge is better than no backup.
pub fn read(mounts: &[Mount], superblocks: &[Superblock]) -> Topology {
    let patience = Patience::new(PATIENCE);
    let mut topology = Topology {
        disks: disks::of_host(),
        ..Topology::default()
    };
    for mount in mounts.iter().filter(|m| m.is_on_disks()) {
        if mount.dev.major == 0 {
            add_alias(&mut topology, mount, &patience);
            topology.members.entry(mount.dev).or_default();
        }
    }
    for mount in once_each(mounts).filter(|m| m.writable && m.is_on_disks()) {
        if mount.dev.major != 0 && folder_of(mount.dev).is_none() && has_sysfs() {
            topology.gone.insert(mount.dev);
        }
    }
    find_errors(&mut topology, mounts);
    let uuid_at = |mount: &Mount| uuid_at(mount, &patience);
    let named_devices = |mount: &Mount| named_devices(mount, &patience);
    assign_members(&mut topology, mounts, superblocks, named_devices, uuid_at);
    find_unmounted(&mut topology, mounts, superblocks);
    find_logs(&mut topology, mounts, superblocks, &patience);
    leave_out_parts(&mut topology, holds_a_file_system);
    let own = mounts.iter().filter(|m| m.writable).map(|m| m.dev);
    let members = topology.members.values().chain(topology.perhaps.values());
    let members = members.flatten().copied();
    let unmounted = topology.unmounted.iter();
    let unmounted = unmounted.chain(&topology.unclear_unmounted);
    let unmounted = unmounted.flat_map(|it| it.devices.clone());
    let logs = topology.logs.values().flatten().copied();
    let all: BTreeSet<DevId> = own.chain(members).chain(unmounted).chain(logs).collect();
    for dev in all.into_iter().filter(|dev| dev.major != 0) {
        add(&mut topology, dev, &patience);
    }
    find_subvolumes_of_images(&mut topology, mounts, &patience);
    for dev in topology.disks.keys().copied().collect::<Vec<_>>() {
        add_above(&mut topology.above, dev);
    }
    topology.unanswered = patience.was_tried();
    topology
}

/// One mount of each superblock, for what goes for all of them: anybody may have made many.
fn once_each(mounts: &[Mount]) -> impl Iterator<Item = &Mount> {
    let mut seen = BTreeSet::new();
    mounts.iter().filter(move |it| seen.insert(it.dev))
}

/// This device and all that is made of it, to any depth.
pub fn all_above(dev: DevId) -> BTreeSet<DevId> {
    let mut all = BTreeMap::new();
    add_above(&mut all, dev);
    all.into_keys().collect()
}

/// This device and all that is made of it.
fn add_above(all: &mut BTreeMap<DevId, Above>, dev: DevId) {
    let Some(folder) = folder_of(dev).filter(|_| !all.contains_key(&dev)) else {
        return;
    };
    let numbers = |found: Vec<PathBuf>| found.iter().filter_map(|it| dev_in(it)).collect();
    let partitions = list(&folder).filter(|it| it.join("partition").exists());
    let above = Above {
        name: name_of(&folder),
        partitions: numbers(partitions.collect()),
        holders: numbers(list(&folder.join("holders")).collect()),
    };
    let next = [above.partitions.as_slice(), &above.holders].concat();
    all.insert(dev, above);
    next.into_iter().for_each(|dev| add_above(all, dev));
}

fn name_of(folder: &Path) -> String {
    let name = folder.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

fn find_errors(topology: &mut Topology, mounts: &[Mount]) {
    for mount in once_each(mounts).filter(|m| !m.writable) {
        let count = errors_on(&mount.fs_type, mount.dev);
        topology
            .errors
            .extend(count.map(|count| (mount.dev, count)));
    }
}

/// How many errors an ext4 on this device has met, if it is one. A disk that is read-only itself takes no note of an
/// error, so nothing is said of what is on one.
pub fn errors_on(fs_type: &str, dev: DevId) -> Option<u64> {
    if !["ext2", "ext3", "ext4"].contains(&fs_type) {
        return None;
    }
    let read = |path: PathBuf| fs::read_to_string(path).ok();
    let disk = folder_of(dev)?;
    let entry = Path::new("/sys/fs/ext4").join(name_of(&disk));
    let count = read(entry.join("errors_count"))?.trim().parse().ok()?;
    (read(disk.join("ro"))?.trim() == "0").then_some(count)
}

/// Whether what is on this may have a whole copy on some of its disks: one of the devices that it stands on is a RAID of
/// md or LVM that is more than stripes, or one disk by several ways (multipath), or it is a btrfs with such a profile.
pub fn may_keep_copies(below: &BTreeSet<DevId>, listed: Option<&Entry>) -> bool {
    let is_raid = |dev: &DevId| {
        let read = |path| fs::read_to_string(folder_of(*dev)?.join(path)).ok();
        let level = read("md/level");
        let name = read("dm/name").unwrap_or_default();
        let uuid = read("dm/uuid").unwrap_or_default();
        level.is_some_and(|it| !["raid0", "linear"].contains(&it.trim_end()))
            // What a mirror of LVM stands on.
            || name.contains("_rimage_")
            || name.contains("_mimage_")
            // As multipathd has it, whatever the name is.
            || uuid.starts_with("mpath-")
    };
    let profiles = listed.filter(|it| it.fs_type == "btrfs").map(|it| {
        let data = format!("/sys/fs/btrfs/{}/allocation/data", it.name);
        fs::read_dir(data).into_iter().flatten().flatten()
    });
    let is_copied = |it: DirEntry| {
        let name = it.file_name();
        name.as_bytes().starts_with(b"raid") && name != "raid0"
    };
    below.iter().any(is_raid) || profiles.into_iter().flatten().any(is_copied)
}

fn has_sysfs() -> bool {
    Path::new("/sys/dev/block").exists()
}

fn add_alias(topology: &mut Topology, mount: &Mount, patience: &Patience) {
    static ASKED: Questions<DevId> = Questions::new();
    // Nor is looked up what lies over it, whose server may be dead, or its own.
    let is_served = is_served(&mount.fs_type);
    if mount.namespace != 0 || !mount.walkable || mount.hidden || is_served {
        return;
    }
    let path = mount.path.clone();
    let found = patience.ask(&ASKED, mount.dev, &[], |_| fs::symlink_metadata(path).ok());
    if let Some(meta) = found.flatten() {
        let alias = DevId::from_raw(meta.dev());
        if alias.major == 0 && alias != mount.dev {
            topology.aliases.insert(alias, mount.dev);
        }
    }
}

/// Finds which of the listed superblocks are mounted, and the devices of those with an anonymous number: it is the
/// one that the file system says it is, where it can be asked. Devices tell nothing: a seed of btrfs is one of
/// several. The name of its source is what it was when it was mounted, and may lead nowhere by now (`/dev/root`),
/// or to another's device; so it counts only for what cannot be asked, and among those that no other is. Where it
/// tells nothing either, it is the one that is left, or may be each of those.
fn assign_members(
    topology: &mut Topology,
    mounts: &[Mount],
    superblocks: &[Superblock],
    named_devices: impl Fn(&Mount) -> Vec<DevId>,
    uuid_at: impl Fn(&Mount) -> Result<Option<String>, Silent>,
) {
    for mount in once_each(mounts).filter(|it| it.dev.major != 0) {
        let dev = mount.dev;
        let mut all = superblocks.iter();
        let its = all.find(|it| it.devices == [dev]).or_else(|| {
            // One on several devices may have the number of one of them, as bcachefs has.
            let is_its =
                |it: &&Superblock| it.fs_type == mount.fs_type && it.devices.contains(&dev);
            superblocks.iter().find(is_its)
        });
        let listed = its.and_then(|it| it.listed.clone());
        topology.listed.extend(listed.map(|it| (dev, it)));
        if is_anonymous(&mount.fs_type) {
            let all = its.map_or_else(|| named_devices(mount), |it| it.devices.clone());
            if its.is_none() && all.len() < named_nodes(mount).len() {
                topology.unclear.insert(dev);
            }
            let others = all.into_iter().filter(|it| *it != dev);
            let members = [dev].into_iter().chain(others);
            topology.members.insert(dev, members.collect());
        }
    }
    let of = |dev: DevId| mounts.iter().filter(move |m| m.dev == dev);
    let mut unasked = Vec::new();
    for dev in topology.members.keys().copied().collect::<Vec<_>>() {
        let named = match of(dev).find_map(|it| uuid_at(it).transpose()) {
            // The name may be another's, and nobody says that it is not.
            Some(Err(Silent)) => continue,
            Some(Ok(uuid)) => superblocks.iter().find(|it| it.name == uuid),
            None => None,
        };
        match named {
            Some(it) => topology.mounted_as(dev, it),
            None => unasked.push(dev),
        }
    }
    let mut asked = BTreeSet::new();
    for mount in unasked.into_iter().flat_map(of) {
        if !asked.insert((mount.dev, &mount.source)) {
            continue;
        }
        if !topology.members.get(&mount.dev).is_some_and(Vec::is_empty) {
            continue;
        }
        let named = named_devices(mount);
        let is_on = |it: &&Superblock| it.devices.iter().any(|dev| named.contains(dev));
        let is_its = |it: &&Superblock| it.fs_type == mount.fs_type;
        let mut all = superblocks.iter().filter(is_on).filter(is_its).peekable();
        let is_on_none = all.peek().is_none();
        match all.find(|it| !topology.is_mounted(it)) {
            Some(it) => topology.mounted_as(mount.dev, it),
            None if is_on_none && left(topology, superblocks, &mount.fs_type).is_empty() => {
                topology.members.insert(mount.dev, named);
            }
            None => {}
        }
    }
    assign_what_is_left(topology, mounts, superblocks);
}

/// Those of a type that are listed, and of which no one that is mounted is known to be it.
fn left<'a>(
    topology: &Topology,
    superblocks: &'a [Superblock],
    fs_type: &str,
) -> Vec<&'a Superblock> {
    let of_type = superblocks.iter().filter(|it| it.fs_type == fs_type);
    of_type.filter(|it| !topology.is_mounted(it)).collect()
}

/// One that is mounted is listed, as far as its type is: it is the one that is left, or one of several.
fn assign_what_is_left(topology: &mut Topology, mounts: &[Mount], superblocks: &[Superblock]) {
    let mut unknown: BTreeMap<&str, Vec<DevId>> = BTreeMap::new();
    for mount in once_each(mounts) {
        if topology.members.get(&mount.dev).is_some_and(Vec::is_empty) {
            unknown.entry(&mount.fs_type).or_default().push(mount.dev);
        }
    }
    for (fs_type, unknown) in unknown {
        match (
            unknown.as_slice(),
            left(topology, superblocks, fs_type).as_slice(),
        ) {
            (_, []) => {}
            ([dev], [it]) => topology.mounted_as(*dev, it),
            (unknown, left) => {
                let devices: BTreeSet<DevId> =
                    left.iter().flat_map(|it| it.devices.clone()).collect();
                let perhaps = |dev: &DevId| (*dev, devices.iter().copied().collect());
                topology.perhaps.extend(unknown.iter().map(perhaps));
            }
        }
    }
}

/// The UUID of a btrfs that is mounted here, as sysfs writes it. It answers under a lock that a commit keeps
/// while it waits for a disk (`write_all_supers` in `fs/btrfs/disk-io.c`).
fn uuid_at(mount: &Mount, patience: &Patience) -> Result<Option<String>, Silent> {
    static ASKED: Questions<DevId> = Questions::new();
    let can_be_asked = mount.namespace == 0 && mount.walkable && !mount.hidden;
    if mount.fs_type != "btrfs" || !can_be_asked {
        return Ok(None);
    }
    let (path, id) = (mount.path.clone(), mount.id);
    let ask = move || {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let fd = open(&path, flags, Mode::empty()).ok()?;
        let found = sys::identify(fd.as_fd()).ok()?;
        let uuid = sys::btrfs_uuid(fd.as_fd()).ok()?;
        (found.mount_id == Some(id)).then(|| superblocks::in_words(uuid))
    };
    patience
        .ask(&ASKED, mount.dev, &[], move |_| ask())
        .ok_or(Silent)
}

/// The block devices that a mount names as its source.
fn named_devices(mount: &Mount, patience: &Patience) -> Vec<DevId> {
    let nodes = named_nodes(mount).into_iter();
    nodes
        .filter_map(|node| device_named(mount, node, patience))
        .collect()
}

/// What a mount names as its source: with any other type than bcachefs one node, whose name may have a colon,
/// as all have that are named after where a disk of Hyper-V is.
fn named_nodes(mount: &Mount) -> Vec<&OsStr> {
    let source = mount.source.as_deref().unwrap_or_default();
    if mount.fs_type != "bcachefs" {
        return vec![source];
    }
    // All of its devices.
    let parts = source.as_bytes().split(|&b| b == b':');
    parts.map(OsStr::from_bytes).collect()
}

/// The device with the node that a mount names. Whoever looks elsewhere than in `/dev` may hang there.
fn device_named(mount: &Mount, node: &OsStr, patience: &Patience) -> Option<DevId> {
    static ASKED: Questions<DevId> = Questions::new();
    if !may_be_a_node(Path::new(node)) {
        return None;
    }
    let node = node.to_owned();
    patience.ask(&ASKED, mount.dev, &[], move |_| device_at(&node))?
}

/// The number of the block device whose node is here.
pub fn device_at(path: &OsStr) -> Option<DevId> {
    let meta = fs::metadata(path).ok()?;
    let is_device = meta.file_type().is_block_device();
    is_device.then(|| DevId::from_raw(meta.rdev()))
}

/// Superblocks that no table shows. Where it could not be found which of those that are listed a mounted one is, it may
/// be any of its type; if there are more, the rest is mounted nowhere.
fn find_unmounted(topology: &mut Topology, mounts: &[Mount], superblocks: &[Superblock]) {
    let mut hidden: BTreeMap<&str, Vec<Unmounted>> = BTreeMap::new();
    for it in superblocks {
        if topology.is_mounted(it) {
            continue;
        }
        hidden.entry(&it.fs_type).or_default().push(Unmounted {
            fs_type: it.fs_type.clone(),
            name: it.name.clone(),
            devices: it.devices.clone(),
            listed: it.listed.clone(),
            unreachable: it.unreachable.clone(),
        });
    }
    let without_devices = |fs_type: &str| {
        let of_type = mounts.iter().filter(|m| m.fs_type == fs_type);
        let members = |dev: &DevId| topology.members.get(dev);
        let unknown = of_type.filter(|m| members(&m.dev).is_some_and(Vec::is_empty));
        unknown.map(|m| m.dev).collect::<BTreeSet<_>>().len()
    };
    let (mut certain, mut unclear) = (Vec::new(), Vec::new());
    for (fs_type, found) in hidden {
        match without_devices(fs_type) {
            0 => certain.extend(found),
            count if found.len() > count => unclear.extend(found),
            _ => {}
        }
    }
    topology.unmounted = certain;
    topology.unclear_unmounted = unclear;
}

/// Types with further devices that nobody names, or nobody where none is mounted.
const UNCLEAR: [&str; 4] = ["f2fs", "jfs", "reiserfs", "xfs"];

/// Journals, logs and data that have a device of their own: xfs names them among its options, and reiserfs its
/// journal where it was told of that; ext4 names its journal's thread after the device. f2fs tells of its first device
/// only, jfs not of its log, and without a mount xfs tells of none.
fn find_logs(
    topology: &mut Topology,
    mounts: &[Mount],
    superblocks: &[Superblock],
    patience: &Patience,
) {
    for mount in once_each(mounts).filter(|m| m.is_on_disks()) {
        let named = ["logdev", "rtdev", "jdev"].into_iter();
        for path in named.filter_map(|name| mount.option(name)) {
            let logs = topology.logs.entry(mount.dev).or_default();
            match device_named(mount, path, patience) {
                Some(dev) if logs.contains(&dev) => {}
                Some(dev) => logs.push(dev),
                None => drop(topology.unclear.insert(mount.dev)),
            }
        }
        let names_all = mount.fs_type == "xfs" || mount.option("jdev").is_some();
        if UNCLEAR.contains(&mount.fs_type.as_str()) && !names_all {
            topology.unclear.insert(mount.dev);
        }
    }
    let unmounted = topology.unmounted.iter();
    let unmounted = unmounted.filter(|it| UNCLEAR.contains(&it.fs_type.as_str()));
    let unclear = unmounted.filter_map(|it| it.devices.first());
    topology.unclear.extend(unclear);
    for superblock in superblocks.iter().filter(|it| it.fs_type == "ext4") {
        if let (Some(dev), Some(journal)) = (superblock.devices.first(), journal_of(superblock)) {
            topology.logs.entry(*dev).or_default().push(journal);
        }
    }
    topology.logs.retain(|_, devices| !devices.is_empty());
}

/// The kernel says of a log, or of a further device of f2fs, that a superblock is on it: that is the other one's, and
/// cannot be reached there. Where somebody has devices that nobody names, each may be one of them, unless it `is_whole`:
/// there is a file system on it.
fn leave_out_parts(topology: &mut Topology, is_whole: impl Fn(DevId) -> bool) {
    let parts: BTreeSet<DevId> = topology.logs.values().flatten().copied().collect();
    let is_any = !topology.unclear.is_empty();
    let is_part = |it: &Unmounted| {
        let mut devices = it.devices.iter();
        devices.any(|dev| parts.contains(dev) || is_any && !is_whole(*dev))
    };
    let answers = |it: &Unmounted| it.unreachable.as_deref() == Some(UNREACHED);
    (topology.unmounted).retain(|it| !answers(it) || !is_part(it));
}

/// Whether there is a file system on this device by itself, as FUSE knows of those that are served from one, and udev of
/// what it has found there.
fn holds_a_file_system(dev: DevId) -> bool {
    // The connection has the kernel's own number of the device.
    let number = dev.major << 20 | dev.minor;
    let connection = Path::new("/sys/fs/fuse/connections").join(number.to_string());
    let found = fs::read_to_string(format!("/run/udev/data/b{dev}")).unwrap_or_default();
    let mut found = found.lines();
    connection.exists() || found.any(|it| it == "E:ID_FS_USAGE=filesystem")
}

/// The device that holds the journal of an ext4, if it is another. A journal inside is called
/// `DEVICE-INODE`.
fn journal_of(superblock: &Superblock) -> Option<DevId> {
    let folder = Path::new("/sys/fs/ext4").join(&superblock.name);
    let task = fs::read_to_string(folder.join("journal_task")).ok()?;
    let name = fs::read_to_string(Path::new("/proc").join(task.trim()).join("comm")).ok()?;
    let device = name.trim().strip_prefix("jbd2/")?;
    dev_in(&Path::new("/sys/class/block").join(device))
}

/// An image in a subvolume that is not mounted by itself has a number that no table lists. The path is
/// believed where it leads to that very number.
fn find_subvolumes_of_images(topology: &mut Topology, mounts: &[Mount], patience: &Patience) {
    static ASKED: Questions<DevId> = Questions::new();
    let listed = |dev: &DevId| mounts.iter().any(|m| m.dev == *dev);
    let images: Vec<(DevId, PathBuf)> = topology
        .devices
        .values()
        .filter_map(|device| device.backing.as_ref())
        .filter_map(|backing| Some((backing.dev?, backing.path.clone())))
        .filter(|(dev, _)| dev.major == 0 && !listed(dev) && !topology.aliases.contains_key(dev))
        .collect();
    for (dev, path) in images {
        let below = mounts
            .iter()
            .filter(|m| m.namespace == 0 && path.starts_with(&m.path))
            // Of equally long ones the last counts: it lies over the others.
            .max_by_key(|m| m.path.components().count());
        let is_reached = |m: &&Mount| m.walkable && !m.hidden;
        let below = below.filter(|m| m.is_on_disks() && m.dev.major == 0 && !is_served(&m.fs_type));
        let Some(mount) = below.filter(is_reached) else {
            continue;
        };
        let found = patience.ask(&ASKED, mount.dev, &[], |_| fs::symlink_metadata(path).ok());
        if found
            .flatten()
            .is_some_and(|meta| DevId::from_raw(meta.dev()) == dev)
        {
            topology.aliases.insert(dev, mount.dev);
        }
    }
}

/// These devices and all that they stand on, to any depth.
pub fn all_below(devices: &BTreeSet<DevId>) -> BTreeMap<DevId, Device> {
    let patience = Patience::new(PATIENCE);
    let mut topology = Topology::default();
    for dev in devices {
        add(&mut topology, *dev, &patience);
    }
    topology.devices
}

/// This device and all below it, of these.
pub fn below(all: &BTreeMap<DevId, Device>, dev: DevId) -> BTreeSet<DevId> {
    let (mut found, mut todo) = (BTreeSet::new(), vec![dev]);
    while let Some(next) = todo.pop() {
        if found.insert(next) {
            todo.extend(all.get(&next).into_iter().flat_map(|it| &it.below));
        }
    }
    found
}

fn add(topology: &mut Topology, dev: DevId, patience: &Patience) {
    if topology.devices.contains_key(&dev) {
        return;
    }
    let Some(folder) = folder_of(dev) else { return };
    let device = describe(&folder, |node| {
        static ASKED: Questions<DevId> = Questions::new();
        let ask = move || sys::loop_backing(File::open(node).ok()?.as_fd()).ok();
        patience.ask(&ASKED, dev, &[], move |_| ask())?
    });
    let below = device.below.clone();
    topology.devices.insert(dev, device);
    for lower in below {
        add(topology, lower, patience);
    }
}

/// The devices that this one is mapped to, if it is dm, md or the like.
pub fn slaves(dir: &Path) -> Vec<DevId> {
    list(&dir.join("slaves"))
        .filter_map(|slave| dev_in(&slave))
        .collect()
}

fn describe(dir: &Path, ask: impl FnOnce(PathBuf) -> Option<LoopBacking>) -> Device {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let disk = dir.parent().filter(|_| dir.join("partition").exists());
    let mut below = match disk {
        Some(disk) => dev_in(disk).into_iter().collect(),
        None => slaves(dir),
    };
    let mut backing = None;
    if name.starts_with("loop") {
        match behind_loop(dir, &name, ask) {
            Some(Behind::Device(dev)) => below.push(dev),
            Some(Behind::File(file)) => backing = Some(file),
            None => {}
        }
    }
    Device {
        user_space: below.is_empty() && backing.is_none() && !is_kernels_own(&name, dir),
        mapper_uuid: fs::read_to_string(dir.join("dm/uuid")).ok(),
        below,
        backing,
        name: name.into_owned(),
    }
}

/// What a loop device is over.
enum Behind {
    File(Backing),
    Device(DevId),
}

/// By its path, and by what the device says when it is asked at its node: the kernel gets that from the file system
/// that holds the file.
fn behind_loop(
    dir: &Path,
    name: &str,
    ask: impl FnOnce(PathBuf) -> Option<LoopBacking>,
) -> Option<Behind> {
    let mut path = fs::read(dir.join("loop/backing_file")).ok()?;
    if path.last() == Some(&b'\n') {
        path.pop();
    }
    match ask(Path::new("/dev").join(name)) {
        Some(found) if found.rdev != 0 => Some(Behind::Device(DevId::from_raw(found.rdev))),
        found => Some(Behind::File(Backing {
            dev: found.map(|it| DevId::from_raw(it.dev)),
            path: std::ffi::OsString::from_vec(path).into(),
        })),
    }
}

/// Whether the kernel alone moves the data of a device that stands on no other: a disk on a bus that
/// is hardware, or memory.
fn is_kernels_own(name: &str, dir: &Path) -> bool {
    const MEMORY: [&str; 3] = ["ram", "zram", "nullb"];
    // Mapped to nothing, or not set up.
    const MAPPED: [&str; 3] = ["dm-", "md", "loop"];
    let virtual_ones = MEMORY.iter().chain(&MAPPED);
    virtual_ones
        .map(|prefix| name.strip_prefix(prefix))
        .any(|rest| rest.is_some_and(|it| it.starts_with(|c: char| c.is_ascii_digit())))
        || is_hardware(dir)
        || has_local_paths_only(dir)
}

/// Judges by the place in the device tree: below a bus that is one, and not below the `session` of an
/// iSCSI initiator, which an adapter on such a bus may have, too. Nor below what only looks like one: behind the
/// virtio of vDPA there may be a program (VDUSE), and nothing virtual has hardware of its own.
fn is_hardware(dir: &Path) -> bool {
    const BUSES: [&str; 8] = ["pci", "vmbus", "virtio", "xen", "mmc", "nd", "ccw", "vio"];
    const SERVED: [&str; 2] = ["vdpa", "vduse"];
    let of_session = |part: &OsStr| part.as_bytes().starts_with(b"session");
    // The way to it begins with the link that leads there.
    let parts: Vec<_> = dir.iter().collect();
    let is_virtual = parts.windows(2).any(|it| it == ["devices", "virtual"]);
    if is_virtual || dir.components().any(|part| of_session(part.as_os_str())) {
        return false;
    }
    let subsystem = |device: &Path| {
        let link = fs::read_link(device.join("subsystem")).ok()?;
        link.file_name().map(OsStr::to_owned)
    };
    let all: Vec<_> = dir.ancestors().filter_map(subsystem).collect();
    let is_below = |known: &[&str]| all.iter().any(|it| known.iter().any(|known| it == known));
    is_below(&BUSES) && !is_below(&SERVED)
}

/// Whether a disk of an NVMe subsystem, the folder that it is in, is reached over PCI Express only,
/// and neither over a network nor from this machine itself: the controllers there name their transport.
fn has_local_paths_only(dir: &Path) -> bool {
    let subsystem = dir.parent().filter(|_| {
        dir.components()
            .any(|it| it.as_os_str() == "nvme-subsystem")
    });
    let controllers = subsystem.into_iter().flat_map(list);
    let transports: Vec<String> = controllers
        .filter_map(|it| fs::read_to_string(it.join("transport")).ok())
        .collect();
    !transports.is_empty() && transports.iter().all(|it| it.trim() == "pcie")
}

fn list(dir: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::parse;
    use crate::plan::plan;
    use std::time::Instant;

    fn superblock(name: &str, devices: &[&str]) -> Superblock {
        Superblock {
            fs_type: "btrfs".into(),
            name: name.into(),
            devices: devices.iter().map(|it| it.parse().unwrap()).collect(),
            listed: Some(Entry {
                fs_type: "btrfs".into(),
                name: name.into(),
                inode: 7,
            }),
            unreachable: None,
        }
    }

    /// What is mounted nowhere, and what may be, where the one that is mounted is what it says that it is.
    fn unmounted(
        mounts: &[Mount],
        superblocks: &[Superblock],
        named: &str,
        uuid: Option<&str>,
    ) -> [Vec<String>; 2] {
        let mut topology = Topology::default();
        topology.members.insert(mounts[0].dev, Vec::new());
        let named = |_: &Mount| named.parse().into_iter().collect();
        let uuid = |_: &Mount| Ok(uuid.map(str::to_owned));
        assign_members(&mut topology, mounts, superblocks, named, uuid);
        find_unmounted(&mut topology, mounts, superblocks);
        let names = |all: Vec<Unmounted>| all.into_iter().map(|it| it.name).collect();
        [topology.unmounted, topology.unclear_unmounted].map(names)
    }

    #[test]
    fn one_more_than_is_mounted_is_mounted_nowhere_though_nobody_tells_which() {
        let mounts = parse(b"1 0 0:40 / / rw - btrfs /dev/root rw\n", 0).unwrap();
        let (one, other) = (superblock("one", &["8:1"]), superblock("other", &["8:2"]));
        let alone = std::slice::from_ref(&one);
        let none: [&[&str]; 2] = [&[], &[]];
        assert_eq!(unmounted(&mounts, alone, "", None), none);
        let both = [one.clone(), other];
        let unclear: [&[&str]; 2] = [&[], &["one", "other"]];
        assert_eq!(unmounted(&mounts, &both, "", None), unclear);
        let second: [&[&str]; 2] = [&["other"], &[]];
        assert_eq!(unmounted(&mounts, &both, "", Some("one")), second);
        assert_eq!(unmounted(&mounts, &both, "8:1", None), second);
    }

    #[test]
    fn of_two_that_have_a_device_in_common_one_may_be_mounted_nowhere() {
        let mounts = parse(b"1 0 0:40 / /a rw - btrfs /dev/sda1 rw\n", 0).unwrap();
        // A seed, and what has sprouted from it twice.
        let all = [
            superblock("a", &["8:1", "8:2"]),
            superblock("b", &["8:1", "8:3"]),
            superblock("seed", &["8:1"]),
        ];
        let found = unmounted(&mounts, &all, "8:1", Some("b"));
        assert_eq!(found, [vec!["a", "seed"], vec![]]);
    }

    #[test]
    fn one_on_several_devices_that_has_the_number_of_one_is_mounted() {
        let mounts = parse(b"1 0 8:16 / /a rw - bcachefs /dev/sdb:/dev/sdc rw\n", 0).unwrap();
        let its = Superblock {
            fs_type: "bcachefs".into(),
            ..superblock("a", &["8:16", "8:32"])
        };
        let mut topology = Topology::default();
        let no_name = |_: &Mount| Vec::new();
        assign_members(
            &mut topology,
            &mounts,
            std::slice::from_ref(&its),
            no_name,
            |_| Ok(None),
        );
        find_unmounted(&mut topology, &mounts, &[its]);
        assert_eq!(topology.unmounted.len(), 0);
        assert_eq!(topology.listed.len(), 1);
    }

    #[test]
    fn all_devices_of_one_that_has_the_number_of_one_of_them_are_its() {
        let line = b"1 0 8:32 / /a rw - bcachefs /dev/sdb:/dev/sdc rw\n";
        let mounts = parse(line, 0).unwrap();
        let its = Superblock {
            fs_type: "bcachefs".into(),
            ..superblock("a", &["8:16", "8:32"])
        };
        let planned = |superblocks: &[Superblock], named: &[&str]| {
            let mut topology = Topology::default();
            let named = |_: &Mount| named.iter().map(|it| it.parse().unwrap()).collect();
            assign_members(&mut topology, &mounts, superblocks, named, |_| Ok(None));
            for dev in ["8:16", "8:32"] {
                topology
                    .devices
                    .insert(dev.parse().unwrap(), Device::default());
            }
            let plan = plan(&mounts, &topology, &|_| None);
            let it = &plan.waves[0][0];
            let words = |all: &[DevId]| all.iter().map(ToString::to_string).collect::<Vec<_>>();
            (words(&it.devices), words(&it.disks), it.below.is_some())
        };
        let both = |of: [&str; 2]| of.map(str::to_owned).to_vec();
        // The one that has its number comes first: by that it is mounted once more.
        let all = (both(["8:32", "8:16"]), both(["8:16", "8:32"]), true);
        assert_eq!(planned(&[its], &[]), all);
        assert_eq!(planned(&[], &["8:16", "8:32"]), all);
        // One of those that it was mounted by has gone.
        let one = || vec!["8:32".to_owned()];
        assert_eq!(planned(&[], &["8:32"]), (one(), one(), false));
    }

    #[test]
    fn the_name_of_another_that_is_mounted_is_not_its_name() {
        let table = "1 0 0:40 / /a rw - btrfs /dev/mapper/a rw\n\
                     2 0 0:41 / /b rw - btrfs /dev/mapper/a rw\n";
        let mounts = parse(table.as_bytes(), 0).unwrap();
        let all = [superblock("one", &["8:1"]), superblock("other", &["8:2"])];
        let mut topology = Topology::default();
        for mount in &mounts {
            topology.members.insert(mount.dev, Vec::new());
        }
        // The first cannot be asked.
        let uuid = |it: &Mount| Ok((it.id == 2).then(|| "one".to_owned()));
        let named = |_: &Mount| vec!["8:1".parse().unwrap()];
        assign_members(&mut topology, &mounts, &all, named, uuid);
        let members: Vec<usize> = topology.members.values().map(Vec::len).collect();
        // It is the one that is left.
        assert_eq!(members, [1, 1]);
    }

    #[test]
    fn what_a_file_system_says_that_it_is_counts_more_than_the_name_that_it_was_mounted_by() {
        let mounts = parse(b"1 0 0:40 / / rw - btrfs /dev/mapper/a rw\n", 0).unwrap();
        let superblocks = [superblock("one", &["8:1"]), superblock("other", &["8:2"])];
        let members = |name: &str, uuid: Result<Option<&str>, ()>| {
            let mut topology = Topology::default();
            topology.members.insert(mounts[0].dev, Vec::new());
            let named = |_: &Mount| vec![name.parse().unwrap()];
            let uuid = |_: &Mount| match uuid {
                Ok(uuid) => Ok(uuid.map(str::to_owned)),
                Err(()) => Err(Silent),
            };
            assign_members(&mut topology, &mounts, &superblocks, named, uuid);
            let members = topology.members.remove(&mounts[0].dev).unwrap();
            members.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        // Somebody else has the name by now.
        assert_eq!(members("8:2", Ok(Some("one"))), ["8:1"]);
        assert_eq!(members("8:2", Ok(None)), ["8:2"]);
        // Of those that are listed it is one all the same.
        assert!(members("8:3", Ok(Some("none"))).is_empty());
        // Of who does not answer that is not known.
        assert!(members("8:2", Err(())).is_empty());
    }

    #[test]
    fn one_that_nobody_tells_of_is_the_one_that_is_left_or_may_be_any_that_is() {
        // Another namespace has its node.
        let table = "1 0 0:40 / /a rw - btrfs /run/a rw\n2 0 0:41 / /b rw - btrfs /run/b rw\n";
        let both = parse(table.as_bytes(), 1).unwrap();
        let all = [
            superblock("one", &["8:1"]),
            superblock("other", &["8:2", "8:3"]),
        ];
        let found = |mounts: &[Mount], superblocks: &[Superblock], is_silent: bool| {
            let mut topology = Topology::default();
            for mount in mounts {
                topology.members.insert(mount.dev, Vec::new());
            }
            let uuid = |_: &Mount| match is_silent {
                true => Err(Silent),
                false => Ok(None),
            };
            let no_name = |_: &Mount| Vec::new();
            assign_members(&mut topology, mounts, superblocks, no_name, uuid);
            let words = |of: &BTreeMap<DevId, Vec<DevId>>| {
                let all = of.values().map(|it| it.iter().map(ToString::to_string));
                all.map(|it| it.collect::<Vec<_>>().join(" "))
                    .collect::<Vec<_>>()
            };
            let listed = topology.listed.len();
            (words(&topology.members), words(&topology.perhaps), listed)
        };
        let words = |all: &[&str]| all.iter().map(ToString::to_string).collect::<Vec<_>>();
        let known = (words(&["8:2 8:3"]), words(&[]), 1);
        let any = |of: usize| {
            (
                vec![String::new(); of],
                vec!["8:1 8:2 8:3".to_owned(); of],
                0,
            )
        };
        for is_silent in [false, true] {
            assert_eq!(found(&both[..1], &all[1..], is_silent), known);
            assert_eq!(found(&both[..1], &all, is_silent), any(1));
            assert_eq!(found(&both, &all, is_silent), any(2));
        }
        // Nobody lists it.
        let none = (words(&[""]), words(&[]), 0);
        assert_eq!(found(&both[..1], &[], false), none);
    }

    #[test]
    fn what_cannot_be_reached_is_named_unless_it_is_a_part_of_another() {
        let dev = |text: &str| text.parse().unwrap();
        let lost = Unmounted {
            unreachable: Some(UNREACHED.into()),
            devices: vec![dev("8:5")],
            ..Unmounted::default()
        };
        let is_named = |logs: &[&str], unclear: &[&str], is_whole: bool| {
            let logs = logs.iter().map(|it| dev(it)).collect();
            let mut topology = Topology {
                unmounted: vec![lost.clone()],
                logs: [(dev("8:1"), logs)].into(),
                unclear: unclear.iter().map(|it| dev(it)).collect(),
                ..Topology::default()
            };
            leave_out_parts(&mut topology, |_| is_whole);
            !topology.unmounted.is_empty()
        };
        assert!(is_named(&[], &[], false) && is_named(&["8:6"], &[], false));
        assert!(!is_named(&["8:5"], &[], true) && !is_named(&[], &["8:7"], false));
        // One somewhere hides none that is known to be there.
        assert!(is_named(&[], &["8:7"], true));
    }

    #[test]
    fn what_may_have_a_journal_that_nobody_names_is_unclear() {
        let table = b"\
1 0 8:1 / /jfs rw - jfs /dev/sda1 rw
2 0 8:2 / /reiserfs rw - reiserfs /dev/sda2 rw
3 0 8:3 / /named rw - reiserfs /dev/sda3 rw,jdev=/dev/hv-vss-none
4 0 8:4 / /f2fs rw - f2fs /dev/sda4 rw
5 0 8:5 / /xfs rw - xfs /dev/sda5 rw
6 0 8:6 / /vfat rw - vfat /dev/sda6 rw
";
        let mounts = parse(table, 0).unwrap();
        let unmounted = |(fs_type, dev): (&str, &str)| Unmounted {
            fs_type: fs_type.into(),
            devices: vec![dev.parse().unwrap()],
            ..Unmounted::default()
        };
        let lost = [("jfs", "8:17"), ("xfs", "8:18"), ("vfat", "8:19")];
        let mut topology = Topology {
            unmounted: lost.map(unmounted).into(),
            ..Topology::default()
        };
        find_logs(&mut topology, &mounts, &[], &Patience::new(PATIENCE));
        let unclear: Vec<String> = topology.unclear.iter().map(ToString::to_string).collect();
        // No device has that name.
        assert_eq!(unclear, ["8:1", "8:2", "8:3", "8:4", "8:17", "8:18"]);
    }

    #[test]
    fn what_a_program_serves_hides_no_superblock() {
        let table = b"1 0 0:31 / /a rw - fuse.fuse2fs /dev/sdb1 rw,user_id=0\n";
        let mounts = parse(table, 0).unwrap();
        let found = unmounted(&mounts, &[superblock("one", &["8:17"])], "8:17", None);
        assert_eq!(found, [vec!["one"], vec![]]);
    }

    #[test]
    fn only_bcachefs_names_more_than_one_node() {
        let nodes = |fs_type: &str| {
            let line =
                format!("1 0 0:31 / /a rw - {fs_type} /dev/disk/by-path/acpi-VMBUS:00-x rw\n");
            let mounts = parse(line.as_bytes(), 0).unwrap();
            named_nodes(&mounts[0]).len()
        };
        assert_eq!((nodes("fuse.fuse2fs"), nodes("bcachefs")), (1, 2));
    }

    #[test]
    fn a_source_is_looked_for_in_dev_only() {
        // Whoever follows this one is out of `/dev`, as from a data set of this name, whose parts are folders.
        let out = std::env::temp_dir().join(format!("hv-vss-source-{}", std::process::id()));
        let any = fs::read_dir("/sys/class/block").into_iter().flatten();
        let node = any.flatten().find_map(|it| {
            let node = Path::new("/dev").join(it.file_name());
            device_at(node.as_os_str()).map(|_| node)
        });
        let Some(node) = node else {
            // There is none in a container.
            return;
        };
        std::os::unix::fs::symlink(&node, &out).unwrap();
        let found = |source: &Path| {
            let line = format!("1 0 0:31 / /a rw - zfs {} rw\n", source.display());
            let mounts = parse(line.as_bytes(), 0).unwrap();
            named_devices(&mounts[0], &Patience::new(PATIENCE)).len()
        };
        let around = Path::new("/dev/..").join(out.strip_prefix("/").unwrap());
        let seen = [node.as_path(), &out, &around].map(found);
        fs::remove_file(&out).unwrap();
        assert_eq!(seen, [1, 0, 0]);
    }

    #[test]
    fn a_disk_of_virtio_is_hardware_unless_a_program_may_serve_it_as_vdpa() {
        let root = std::env::temp_dir().join(format!("hv-vss-buses-{}", std::process::id()));
        // A device, by the subsystem of each on the way to it.
        let is_hardware_below = |subsystems: &[&str]| {
            let mut dir = root.join(subsystems.join("-"));
            for (number, subsystem) in subsystems.iter().enumerate() {
                dir.push(format!("device{number}"));
                fs::create_dir_all(&dir).unwrap();
                let bus = Path::new("/sys/bus").join(subsystem);
                std::os::unix::fs::symlink(bus, dir.join("subsystem")).unwrap();
            }
            is_hardware(&dir.join("block/vda"))
        };
        assert!(is_hardware_below(&["pci", "virtio"]));
        assert!(!is_hardware_below(&["platform"]));
        assert!(!is_hardware_below(&["vduse", "vdpa", "virtio"]));
        assert!(!is_hardware_below(&["pci", "vdpa", "virtio"]));
        // As sysfs has it: from the list of numbers to its place in the tree.
        let disk = root.join("devices/virtual/vduse/block/vda");
        let numbers = root.join("dev/block");
        for dir in [&disk, &numbers] {
            fs::create_dir_all(dir).unwrap();
        }
        let subsystem = root.join("devices/virtual/vduse/subsystem");
        std::os::unix::fs::symlink("/sys/bus/virtio", subsystem).unwrap();
        let link = numbers.join("254:0");
        std::os::unix::fs::symlink("../../devices/virtual/vduse/block/vda", &link).unwrap();
        let found = numbers.join(fs::read_link(link).unwrap());
        assert!(found.exists() && !is_hardware(&found));
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn a_loop_device_whose_file_system_does_not_answer_is_over_a_file_that_is_nobody_knows_where() {
        static ASKED: Questions<DevId> = Questions::new();
        let root = std::env::temp_dir().join(format!("hv-vss-loop-{}", std::process::id()));
        let dir = root.join("loop7");
        fs::create_dir_all(dir.join("loop")).unwrap();
        fs::write(dir.join("loop/backing_file"), "/mnt/dead/a\n").unwrap();
        let patience = Patience::new(Duration::from_millis(300));
        let (release, hang) = std::sync::mpsc::channel::<()>();
        let device = |number: u32, answer: Box<dyn FnOnce() -> Option<LoopBacking> + Send>| {
            let dev = DevId {
                major: 7,
                minor: number,
            };
            describe(&dir, |_| {
                patience.ask(&ASKED, dev, &[], move |_| answer())?
            })
        };
        let began = Instant::now();
        let dead = device(
            7,
            Box::new(move || {
                let _ = hang.recv();
                None
            }),
        );
        let unknown = Backing {
            dev: None,
            path: "/mnt/dead/a".into(),
        };
        assert_eq!(dead.backing, Some(unknown));
        assert!(!dead.user_space && dead.below.is_empty());
        assert_eq!(patience.left(), Duration::ZERO);
        assert!(patience.was_tried());
        // Another one is asked all the same, each time for a moment.
        let answer = LoopBacking {
            dev: 0x801,
            rdev: 0,
        };
        let asked = || {
            device(8, Box::new(move || Some(answer)))
                .backing
                .unwrap()
                .dev
        };
        while asked() != Some("8:1".parse().unwrap()) {
            assert!(began.elapsed() < Duration::from_secs(60));
        }
        drop(release);
        fs::remove_dir_all(&root).unwrap();
    }
}
