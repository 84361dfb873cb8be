// SPDX-License-Identifier: GPL-2.0-only

//! Which file systems are frozen, and in which order: a pure function of what was read.
//!
//! Each writable superblock on a block device appears once, whichever mounts show it, and if none
//! does. Waves are frozen one after the other, the members of a wave at the same time, and thawed in
//! reverse:
//!
//! - a file system whose device is (in the end) a file stands on the file system that holds the
//!   file, and comes before it;
//! - what a user-space program serves comes before all that is not, because the program may need
//!   any of it, and one after the other, the youngest first, because it may need another such, which was
//!   there before it: by when its superblock came to be, as it may have been mounted once more since;
//! - root comes last, save for what root itself stands on. Where root is an overlay, that is what
//!   holds its upper layer.
//!
//! No I/O here: the same table gives the same plan, so recorded tables can be tested.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::ground::{devices_below, holder, AtRest, Disk, GoesOn, Ground, Holder, Watched};
use crate::machine::Unseen;
use crate::mounts::{self, has_means_to_freeze, DevId, Mount};
use crate::superblocks::Entry;
use crate::topology::{Topology, Unmounted};

/// One place where a file system can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The mount namespace, as in [`Mount::namespace`].
    pub namespace: usize,
    /// The mount's id.
    pub id: u64,
    /// The path in that namespace.
    pub path: PathBuf,
    /// As [`Mount::is_whole`].
    pub whole: bool,
    /// As [`Mount::subvolume`].
    pub subvolume: Option<PathBuf>,
    /// As [`Mount::walkable`].
    pub walkable: bool,
    /// As [`Mount::layers`].
    pub layers: Option<DevId>,
    /// As [`Mount::hidden`].
    pub hidden: bool,
    /// As [`Mount::was_at`].
    pub was_at: Option<PathBuf>,
}

impl Place {
    /// The path that an operator knows, whether or not it leads there still.
    pub fn known_path(&self) -> &Path {
        self.was_at.as_ref().unwrap_or(&self.path)
    }
}

/// A superblock, once, with all places that show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// Its device number, which names it.
    pub dev: DevId,
    /// Its type. Of one that is mounted nowhere its driver's, which may serve several.
    pub fs_type: String,
    /// What was named as its source when it was mounted.
    pub source: Option<OsString>,
    /// The block devices that it is on, as far as they are known; its journals and logs last.
    pub devices: Vec<DevId>,
    /// The block devices of all those that it may be, where nobody tells which it is.
    pub perhaps_on: Vec<DevId>,
    /// Where sysfs lists it, as far as that is known.
    pub listed: Option<Entry>,
    /// The lowest devices below those, and below what holds a file that it is on. Others may have a
    /// part of them as well. Empty when they are not known.
    pub disks: Vec<DevId>,
    /// Those and all devices in between; `None` where it may have a part of any other as well.
    pub below: Option<BTreeSet<DevId>>,
    /// The other superblocks that hold what it is on, to any depth, of those that are frozen. `None` where
    /// that may be any.
    pub stands_on: Option<BTreeSet<DevId>>,
    /// Where it can be reached, the best way first. Empty when it is mounted nowhere.
    pub places: Vec<Place>,
}

impl FileSystem {
    /// The devices that it is on, or may be.
    pub fn may_be_on(&self) -> impl Iterator<Item = &DevId> {
        self.devices.iter().chain(&self.perhaps_on)
    }

    /// As far as is known before it is tried. Whatever is on a block device is tried all the same.
    pub fn has_means_to_freeze(&self) -> bool {
        has_means_to_freeze(&self.fs_type)
    }
}

impl fmt::Display for FileSystem {
    /// The path that an operator knows it by, with type and device.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dev, fs_type, .. } = self;
        match self.places.first() {
            Some(place) => {
                // Escaped, so that a newline in a name cannot forge a log line.
                let path = place.known_path().to_string_lossy();
                write!(f, "{} ({fs_type}, {dev}", path.escape_debug())?;
                if place.was_at.is_some() {
                    write!(f, ", mounted no longer, open at {}", place.path.display())?;
                }
                if place.namespace != 0 {
                    write!(f, ", in another mount namespace")?;
                }
                write!(f, ")")
            }
            None => {
                let source = self.source.as_deref().unwrap_or_default();
                let source = source.to_string_lossy();
                write!(f, "{} ({fs_type}, {dev}, ", source.escape_debug())?;
                write!(f, "in use but mounted nowhere)")
            }
        }
    }
}

/// Why a file system is not frozen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Its superblock is read-only: there is nothing to hold back.
    ReadOnly,
    /// The same, though it was mounted for writing. Whoever administers the machine may have made it so, or
    /// the kernel after an error: nobody tells.
    TurnedReadOnly,
    /// The same of one that tells, or whose type no error makes so: somebody has made it read-only.
    MadeReadOnly,
    /// It is not on a block device of this machine: network, memory, overlay, FUSE, ...
    NoBlockDevice,
    /// The configuration says so; the text names the rule.
    Excluded(String),
    /// It is out of order, so that nothing can be written to it; the text says in what way.
    Broken(String),
    /// There is no way to it; the text says what was tried.
    Unreachable(String),
    /// None of the disks that the host backs up has a part of it.
    Elsewhere,
    /// It would not freeze before something else has ended, and its writers would wait for that; the text
    /// says what.
    Busy(String),
    /// What is written to it waits for somebody to do something, and so would its freeze; the text says what.
    Stalled(String),
}

impl Reason {
    /// Whether an operator who wants everything frozen has to hear of it.
    pub fn is_a_loss(&self) -> bool {
        match self {
            Reason::Broken(_)
            | Reason::Unreachable(_)
            | Reason::Busy(_)
            | Reason::Stalled(_)
            | Reason::TurnedReadOnly => true,
            Reason::ReadOnly
            | Reason::MadeReadOnly
            | Reason::NoBlockDevice
            | Reason::Excluded(_)
            | Reason::Elsewhere => false,
        }
    }

    /// Whether it holds only as long as the superblock is read-only.
    pub fn is_read_only(&self) -> bool {
        matches!(
            self,
            Reason::ReadOnly | Reason::TurnedReadOnly | Reason::MadeReadOnly
        )
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::ReadOnly => f.write_str("read-only"),
            Reason::TurnedReadOnly => {
                f.write_str("read-only though mounted for writing, perhaps since an error")
            }
            Reason::MadeReadOnly => {
                f.write_str("read-only though mounted for writing, and not since an error")
            }
            Reason::NoBlockDevice => f.write_str("not on a block device"),
            Reason::Excluded(rule) => write!(f, "excluded by {rule}"),
            Reason::Broken(how) => write!(f, "out of order: {how}"),
            Reason::Unreachable(why) => write!(f, "cannot be reached: {why}"),
            Reason::Elsewhere => f.write_str("on no disk of this backup"),
            Reason::Busy(with) => {
                write!(f, "busy: it cannot be frozen before its {with} has ended")
            }
            Reason::Stalled(why) => write!(f, "would hang: {why}"),
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
    /// On disks here, and with no means to freeze: these are synced before.
    pub synced: Vec<FileSystem>,
    /// All else.
    pub left_out: Vec<LeftOut>,
    /// The disks that the host gives, and all others that something here is on.
    pub disks: BTreeMap<DevId, Disk>,
    /// Where nobody could look: there may be more.
    pub unseen: Vec<Unseen>,
}

/// Of which disks a backup is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// By number, those that are known.
    pub disks: BTreeSet<DevId>,
    /// The addresses of those that are not.
    pub strange: Vec<String>,
}

impl Plan {
    /// Looks up disks that the host has named by their addresses.
    pub fn find(&self, addresses: &[String]) -> Scope {
        let mut scope = Scope::default();
        for address in addresses {
            let is_it = |(_, disk): &(&DevId, &Disk)| disk.address.as_ref() == Some(address);
            match self.disks.iter().find(is_it) {
                Some((dev, _)) => drop(scope.disks.insert(*dev)),
                None => scope.strange.push(address.clone()),
            }
        }
        scope
    }

    /// A disk by the path of its node, and what is on it, in words.
    pub fn words_for(&self, dev: DevId) -> String {
        let name = self.disks.get(&dev).map_or("?", |it| &it.name);
        let names: Vec<String> = self.on_disk(dev).map(ToString::to_string).collect();
        match names.is_empty() {
            true => format!("/dev/{name}, without a file system in use"),
            false => format!("/dev/{name} with {}", names.join(", ")),
        }
    }

    /// What is on a disk, frozen or not.
    pub fn on_disk(&self, dev: DevId) -> impl Iterator<Item = &FileSystem> {
        self.file_systems()
            .filter(move |it| it.disks.contains(&dev))
    }

    /// The devices of the disks of a backup by which it is told that something was written there past all that is
    /// frozen. Where the host has named no disks, those of all its disks.
    pub fn watched(&self, scope: &Scope) -> BTreeSet<Watched> {
        let is_of_it = |(dev, disk): &(&DevId, &Disk)| match scope.disks.is_empty() {
            true => disk.address.is_some(),
            false => scope.disks.contains(dev),
        };
        let disks = self.disks.iter().filter(is_of_it);
        disks.flat_map(|(_, disk)| &disk.watched).cloned().collect()
    }

    /// The file systems that are written to once all is frozen that is planned. Nothing can be to what is out of order.
    pub fn goes_on(&self) -> Vec<GoesOn> {
        let goes_on = |it: &&LeftOut| {
            let stands = matches!(it.reason, Reason::NoBlockDevice | Reason::Broken(_));
            !it.reason.is_read_only() && !stands
        };
        let left_out = self.left_out.iter().filter(goes_on);
        let moving = left_out.map(|it| &it.file_system).chain(&self.synced);
        let moving = moving.map(|it| GoesOn {
            name: it.to_string(),
            devices: it.devices.clone(),
            below: it.below.clone(),
        });
        moving.collect()
    }

    /// By which of those devices it is told whatever goes on.
    pub fn at_rest(&self, scope: &Scope) -> AtRest {
        AtRest::of(self.watched(scope), &self.goes_on())
    }

    /// What is to be frozen and is on some of these disks and on others as well, each with the nodes of those: a copy of
    /// only a part of it may be of no use.
    pub fn torn_by<'a>(
        &'a self,
        disks: &'a BTreeSet<DevId>,
    ) -> impl Iterator<Item = (&'a FileSystem, Vec<String>)> {
        let chosen = self.waves.iter().flatten().chain(&self.synced);
        chosen.filter_map(|it| {
            let others = it.disks.iter().filter(|dev| !disks.contains(dev));
            let node_of = |dev| self.disks.get(dev).map_or("?", |it| &it.name);
            let others: Vec<String> = others.map(|dev| format!("/dev/{}", node_of(dev))).collect();
            let is_torn = !others.is_empty() && others.len() < it.disks.len();
            is_torn.then_some((it, others))
        })
    }

    /// Leaves out what has no part of any of these disks. Where that is not certain, it stays. What is lost there
    /// is no loss for these: that is so of what is out of order as well, and of what may yet turn out to be. Of one
    /// whose disk is gone nobody knows which that was.
    pub fn leave_out_all_but(&mut self, disks: &BTreeSet<DevId>) {
        let is_elsewhere = |it: &FileSystem| {
            let is_certain = it.below.is_some() && !it.disks.is_empty();
            is_certain && !it.disks.iter().any(|dev| disks.contains(dev))
        };
        for left in &mut self.left_out {
            if left.reason.is_a_loss() && is_elsewhere(&left.file_system) {
                left.reason = Reason::Elsewhere;
            }
        }
        self.leave_out(|it| is_elsewhere(it).then_some(Reason::Elsewhere));
    }

    /// Leaves out whatever there is a reason for.
    pub fn leave_out(&mut self, mut why: impl FnMut(&FileSystem) -> Option<Reason>) {
        for members in self.waves.iter_mut().chain([&mut self.synced]) {
            for file_system in std::mem::take(members) {
                match why(&file_system) {
                    None => members.push(file_system),
                    Some(reason) => self.left_out.push(LeftOut {
                        file_system,
                        reason,
                    }),
                }
            }
        }
        self.waves.retain(|members| !members.is_empty());
    }

    /// What is synced for want of means to freeze, as far as is known before it is tried.
    pub fn only_synced(&self) -> impl Iterator<Item = &FileSystem> {
        let frozen = self.waves.iter().flatten();
        let without_means = frozen.filter(|it| !it.has_means_to_freeze());
        self.synced.iter().chain(without_means)
    }

    /// What something is wrong with.
    pub fn losses(&self) -> impl Iterator<Item = &LeftOut> {
        self.left_out.iter().filter(|it| it.reason.is_a_loss())
    }

    /// All file systems, whatever becomes of them.
    pub fn file_systems(&self) -> impl Iterator<Item = &FileSystem> {
        let left_out = self.left_out.iter().map(|it| &it.file_system);
        let frozen = self.waves.iter().flatten();
        frozen.chain(&self.synced).chain(left_out)
    }
}

/// Makes the plan. `excluded` names the rule by which a file system is left out, if one does.
pub fn plan(
    mounts: &[Mount],
    topology: &Topology,
    excluded: &dyn Fn(&FileSystem) -> Option<String>,
) -> Plan {
    let mut plan = Plan::default();
    let mut chosen = Vec::new();
    let superblocks = superblocks(mounts, topology);
    let devices = superblocks.iter().map(|it| &it.file_system);
    let devices = devices.map(|it| (it.dev, it.devices.as_slice())).collect();
    let ground = Ground::new(mounts, topology, devices);
    let footings: Vec<_> = superblocks
        .iter()
        .map(|it| ground.of(it.file_system.dev))
        .collect();
    plan.disks = ground.describe(&footings);
    let stack = Stack::new(mounts, topology, &superblocks);
    for (superblock, footing) in superblocks.into_iter().zip(footings) {
        let reason = superblock.reason(topology, excluded);
        let (mut file_system, held) = (superblock.file_system, superblock.can_be_held);
        let logs = topology.logs.get(&file_system.dev).into_iter().flatten();
        file_system.devices.extend(logs);
        let perhaps_on = topology.perhaps.get(&file_system.dev);
        file_system.perhaps_on = perhaps_on.cloned().unwrap_or_default();
        file_system.disks = footing.disks.into_iter().collect();
        file_system.below = footing.below;
        match reason {
            Some(reason) => plan.left_out.push(LeftOut {
                file_system,
                reason,
            }),
            None if held => chosen.push(file_system),
            None => plan.synced.push(file_system),
        }
    }
    let order = Order::new(mounts, &stack, &chosen);
    let stand_on: Vec<_> = (0..chosen.len())
        .map(|i| order.stands_on(i, &chosen))
        .collect();
    for (file_system, stands_on) in chosen.iter_mut().zip(stand_on) {
        file_system.stands_on = stands_on;
    }
    let order = order.waves();
    let mut chosen: Vec<_> = chosen.into_iter().map(Some).collect();
    for wave in order {
        let members = wave
            .into_iter()
            .filter_map(|i| chosen.get_mut(i).and_then(Option::take));
        plan.waves.push(members.collect());
    }
    plan
}

/// A superblock with what its mounts say of it.
struct Superblock {
    file_system: FileSystem,
    on_disks: bool,
    writable: bool,
    /// Whether it is read-only though mounted for writing, and nobody tells whether since an error.
    has_turned: bool,
    can_be_held: bool,
    /// In what way it is out of order.
    trouble: Option<&'static str>,
    /// Why nobody can reach it.
    unreachable: Option<String>,
}

impl Superblock {
    /// Why it is not frozen, if it is not.
    fn reason(
        &self,
        topology: &Topology,
        excluded: &dyn Fn(&FileSystem) -> Option<String>,
    ) -> Option<Reason> {
        if !self.on_disks {
            return Some(Reason::NoBlockDevice);
        }
        let trouble = match self.trouble {
            None if topology.gone.contains(&self.file_system.dev) => Some("its disk is gone"),
            trouble => trouble,
        };
        if !self.writable && !self.has_turned && trouble.is_none() {
            return Some(Reason::ReadOnly);
        }
        let rule = excluded(&self.file_system).map(Reason::Excluded);
        let trouble = trouble.map(|it| Reason::Broken(it.to_owned()));
        let unreachable = self.unreachable.clone().map(Reason::Unreachable);
        let turned = self.has_turned.then(|| {
            match SHUT_DOWN_RATHER.contains(&self.file_system.fs_type.as_str()) {
                true => Reason::MadeReadOnly,
                false => Reason::TurnedReadOnly,
            }
        });
        rule.or(trouble).or(unreachable).or(turned)
    }
}

/// What a mount says of its superblock when that is out of order.
fn trouble(mount: &Mount) -> Option<&'static str> {
    if mount.option("shutdown").is_some() {
        Some("shut down after an error")
    } else if mount.option("emergency_ro").is_some() {
        Some("read-only since an error")
    } else {
        None
    }
}

/// Why one is out of order that an error has made read-only.
pub const READ_ONLY_SINCE_AN_ERROR: &str = "read-only since an error";

/// Types whose superblock is read-only however it is mounted: the kernel cannot write them, or, of ZFS, it is
/// that of a snapshot. What is of any other may have turned so when it met an error.
const READ_ONLY_BY_NATURE: [&str; 11] = [
    "squashfs", "erofs", "cramfs", "romfs", "iso9660", "efs", "qnx4", "qnx6", "vxfs", "befs", "zfs",
];

/// Types that an error shuts down and never makes read-only.
const SHUT_DOWN_RATHER: [&str; 1] = ["xfs"];

/// Whether one of this type says when it is asked whether an error has made it read-only.
pub fn tells_of_errors(fs_type: &str) -> bool {
    fs_type == "btrfs"
}

/// Whether a superblock is read-only although its mounts here, or where there is none here those elsewhere,
/// were made for writing: whoever makes it so on purpose (`mount -o remount,ro`) makes a mount so, too. But
/// that one may have been unmounted since, and a mount of its own may be read-only beside others that are not. So
/// one of them is enough where ext4 says whether there was an error, which decides, where it can be asked for that,
/// and where it was seen that nobody has made it so.
fn has_turned_read_only(mounts: &[&Mount], topology: &Topology) -> bool {
    let turns = |m: &&Mount| !m.writable && !READ_ONLY_BY_NATURE.contains(&m.fs_type.as_str());
    if !mounts.iter().all(turns) {
        return false;
    }
    let is_here = |m: &&&Mount| m.namespace == 0;
    let any_here = mounts.iter().any(|m| is_here(&m));
    let mut asked = mounts.iter().filter(|m| !any_here || is_here(m));
    let Some(first) = mounts.first() else {
        return false;
    };
    let tells = tells_of_errors(&first.fs_type) || topology.turned.contains(&first.dev);
    match topology.errors.get(&first.dev) {
        Some(count) => *count > 0 && asked.any(|m| m.for_writing),
        None if tells => asked.any(|m| m.for_writing),
        None => asked.all(|m| m.for_writing),
    }
}

/// Why one cannot be reached that may be one that is mounted.
const UNCLEAR: &str =
    "of this and others of its type one at least is mounted nowhere, and nobody tells which";

/// Each superblock once, in the order of the table, those that are mounted nowhere last.
fn superblocks(mounts: &[Mount], topology: &Topology) -> Vec<Superblock> {
    let mut found: Vec<Vec<&Mount>> = Vec::new();
    let mut index = BTreeMap::new();
    for mount in mounts {
        let at = *index.entry(mount.dev).or_insert(found.len());
        match found.get_mut(at) {
            Some(group) => group.push(mount),
            None => found.push(vec![mount]),
        }
    }
    let mounted = found.iter().filter_map(|group| mounted(group, topology));
    let unclear = |found| Superblock {
        unreachable: Some(UNCLEAR.to_owned()),
        ..unmounted(found)
    };
    mounted
        .chain(topology.unmounted.iter().map(unmounted))
        .chain(topology.unclear_unmounted.iter().map(unclear))
        .collect()
}

/// The superblock of these mounts.
fn mounted(group: &[&Mount], topology: &Topology) -> Option<Superblock> {
    let first = group.first()?;
    let place = |mount: &&Mount| Place {
        namespace: mount.namespace,
        id: mount.id,
        path: mount.path.clone(),
        whole: mount.is_whole(),
        subvolume: mount.subvolume().map(Path::to_owned),
        walkable: mount.walkable,
        layers: mount.layers,
        hidden: mount.hidden,
        was_at: mount.was_at.clone(),
    };
    let mut places: Vec<Place> = group.iter().map(place).collect();
    places.sort_by_key(|p| {
        let length = p.path.as_os_str().len();
        (p.namespace, p.hidden, !p.whole, !p.walkable, length)
    });
    let devices = match topology.members.get(&first.dev) {
        Some(members) => members.clone(),
        None if first.dev.major == 0 => Vec::new(),
        None => vec![first.dev],
    };
    let is_on_disks = first.is_on_disks() && !(first.may_be_from_a_device() && devices.is_empty());
    let has_turned = has_turned_read_only(group, topology);
    let says_so = topology.errors.contains_key(&first.dev);
    let after_an_error = (has_turned && says_so).then_some(READ_ONLY_SINCE_AN_ERROR);
    Some(Superblock {
        file_system: FileSystem {
            dev: first.dev,
            fs_type: first.fs_type.clone(),
            source: first.source.clone(),
            devices,
            listed: topology.listed.get(&first.dev).cloned(),
            disks: Vec::new(),
            below: None,
            stands_on: None,
            perhaps_on: Vec::new(),
            places,
        },
        on_disks: is_on_disks,
        writable: first.writable,
        has_turned,
        can_be_held: first.can_be_held(),
        trouble: group.iter().find_map(|m| trouble(m)).or(after_an_error),
        unreachable: None,
    })
}

/// One that no mount shows. Whether it is writable shows when it is reached.
fn unmounted(found: &Unmounted) -> Superblock {
    Superblock {
        file_system: FileSystem {
            dev: found.devices.first().copied().unwrap_or_default(),
            fs_type: found.fs_type.clone(),
            source: Some(found.name.clone().into()),
            devices: found.devices.clone(),
            listed: found.listed.clone(),
            disks: Vec::new(),
            below: None,
            stands_on: None,
            perhaps_on: Vec::new(),
            places: Vec::new(),
        },
        on_disks: true,
        writable: true,
        has_turned: false,
        can_be_held: true,
        trouble: None,
        unreachable: found.unreachable.clone(),
    }
}

/// What holds what, of all superblocks: also of those that are not frozen, which may stand between two that are.
#[derive(Default)]
struct Stack {
    /// For each: the superblocks that hold the files its devices are made of.
    holders: BTreeMap<DevId, BTreeSet<DevId>>,
    /// Those that a user-space program has a part in serving, and those that may as well be on anything.
    served: BTreeSet<DevId>,
}

impl Stack {
    fn new(mounts: &[Mount], topology: &Topology, superblocks: &[Superblock]) -> Self {
        let mut stack = Stack::default();
        for superblock in superblocks {
            let file_system = &superblock.file_system;
            let dev = file_system.dev;
            let mut holders = BTreeSet::new();
            let mut is_served = mounts::is_served(&file_system.fs_type);
            // Where its devices are not known, they may be on anything.
            is_served |= superblock.on_disks && file_system.devices.is_empty();
            for (_, device) in devices_below(topology, dev, &file_system.devices) {
                is_served |= device.user_space;
                let Some(backing) = &device.backing else {
                    continue;
                };
                match holder(mounts, topology, backing) {
                    Holder::Superblock(dev) => drop(holders.insert(dev)),
                    // Where the file really is cannot be told: as early as a user-space device.
                    Holder::Unknown => is_served = true,
                    Holder::Memory => {}
                }
            }
            stack.holders.insert(dev, holders);
            stack.served.extend(is_served.then_some(dev));
        }
        stack
    }

    /// All that this one stands on, to any depth.
    fn foundations(&self, dev: DevId) -> BTreeSet<DevId> {
        let mut found = BTreeSet::new();
        let mut todo = vec![dev];
        while let Some(next) = todo.pop() {
            for &below in self.holders.get(&next).into_iter().flatten() {
                if found.insert(below) {
                    todo.push(below);
                }
            }
        }
        // A stale path may lead to what is mounted on the device itself.
        found.remove(&dev);
        found
    }

    /// What stands on a file system that a user-space program serves, is served by it too.
    fn is_served(&self, dev: DevId, foundations: &BTreeSet<DevId>) -> bool {
        self.served.contains(&dev) || !self.served.is_disjoint(foundations)
    }
}

/// The relation "stands on" between the chosen file systems, by index, to any depth.
struct Order {
    /// For each: those that hold what it is on.
    stands_on: Vec<BTreeSet<usize>>,
    /// For each: whether a user-space program has a part in serving it.
    user_space: Vec<bool>,
    /// For each: its place among all by age, as far as that is known.
    ranks: Vec<usize>,
    /// Root and what that stands on.
    last: BTreeSet<usize>,
}

impl Order {
    fn new(mounts: &[Mount], stack: &Stack, chosen: &[FileSystem]) -> Self {
        let by_dev: BTreeMap<DevId, usize> =
            chosen.iter().enumerate().map(|(i, f)| (f.dev, i)).collect();
        let indices = |devs: &BTreeSet<DevId>| -> BTreeSet<usize> {
            devs.iter()
                .filter_map(|dev| by_dev.get(dev))
                .copied()
                .collect()
        };
        let (mut stands_on, mut user_space) = (Vec::new(), Vec::new());
        for file_system in chosen {
            let below = stack.foundations(file_system.dev);
            stands_on.push(indices(&below));
            user_space.push(stack.is_served(file_system.dev, &below));
        }
        let root = root(mounts).into_iter();
        let last = root.flat_map(|dev| {
            let mut devs = stack.foundations(dev);
            devs.insert(dev);
            indices(&devs)
        });
        let born = chosen.iter().map(|it| Some(it.listed.as_ref()?.inode));
        Order {
            stands_on,
            user_space,
            ranks: ranks(&born.collect::<Vec<_>>()),
            last: last.collect(),
        }
    }

    /// As [`FileSystem::stands_on`].
    fn stands_on(&self, i: usize, chosen: &[FileSystem]) -> Option<BTreeSet<DevId>> {
        if self.user_space.get(i) == Some(&true) {
            return None;
        }
        let below = self.stands_on.get(i).into_iter().flatten();
        Some(below.filter_map(|&j| Some(chosen.get(j)?.dev)).collect())
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
        for (i, below) in self.stands_on.iter().enumerate() {
            below.iter().for_each(|&j| add(i, j));
            if !self.last.contains(&i) {
                self.last.iter().for_each(|&j| add(i, j));
            }
        }
        earlier
    }

    fn waves(&self) -> Vec<Vec<usize>> {
        let earlier = self.predecessors();
        let all = 0..earlier.len();
        // Root and what is under it stay last even when a program serves them: it then has nothing
        // else to stand on.
        let is_served =
            |i: &usize| self.user_space.get(*i) == Some(&true) && !self.last.contains(i);
        let (served, others): (BTreeSet<_>, BTreeSet<_>) = all.partition(is_served);
        let mut waves = Vec::new();
        // What stands on a served one is served, so none of these waits for one of the others.
        wave_by_wave(served, &earlier, &mut waves, |ready| {
            let youngest = ready.iter().max_by_key(|i| self.ranks.get(**i));
            youngest.into_iter().copied().collect()
        });
        wave_by_wave(others, &earlier, &mut waves, <[usize]>::to_vec);
        waves
    }
}

/// In which order they came, by when each was born, where that is known. The others, those of types that sysfs
/// does not list, keep their places in the table.
fn ranks(born: &[Option<u64>]) -> Vec<usize> {
    let known = born.iter().enumerate();
    let known: Vec<_> = known.filter_map(|(i, born)| Some(((*born)?, i))).collect();
    let mut by_age = known.clone();
    by_age.sort_unstable();
    let mut ranks: Vec<usize> = (0..born.len()).collect();
    for ((_, place), (_, i)) in known.into_iter().zip(by_age) {
        if let Some(rank) = ranks.get_mut(i) {
            *rank = place;
        }
    }
    ranks
}

/// Puts those of `left` into waves, each of what `choose` takes of those that are ready: nothing of
/// `left` has to come earlier.
fn wave_by_wave(
    mut left: BTreeSet<usize>,
    earlier: &[BTreeSet<usize>],
    waves: &mut Vec<Vec<usize>>,
    choose: impl Fn(&[usize]) -> Vec<usize>,
) {
    while let Some(&first) = left.first() {
        let is_ready = |i: &usize| earlier.get(*i).is_some_and(|set| set.is_disjoint(&left));
        let mut ready: Vec<usize> = left.iter().copied().filter(is_ready).collect();
        if ready.is_empty() {
            // Only a table that contradicts itself has a circle; it is opened anywhere.
            ready.push(first);
        }
        let wave = choose(&ready);
        wave.iter().for_each(|i| {
            left.remove(i);
        });
        waves.push(wave);
    }
}

/// The superblock that holds what is written to the root directory.
fn root(mounts: &[Mount]) -> Option<DevId> {
    let here = || mounts.iter().filter(|m| m.namespace == 0);
    // Of several mounts on "/", the last one is the one in use.
    let root = here().rfind(|m| m.path == Path::new("/"))?;
    let Some(upper) = root.option("upperdir") else {
        return Some(root.dev);
    };
    // Of equally long ones the last counts: it lies over the others.
    let below = here().filter(|m| m.id != root.id && Path::new(upper).starts_with(&m.path));
    let holder = below.max_by_key(|m| m.path.components().count())?;
    Some(holder.dev)
}

#[cfg(test)]
mod tests;
