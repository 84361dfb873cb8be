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
use crate::topology::{Topology, Unmounted};
use crate::unlisted::UNKNOWN;

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
}

impl Reason {
    /// Whether an operator who wants everything frozen has to hear of it.
    pub fn is_a_loss(&self) -> bool {
        match self {
            Reason::Broken(_)
            | Reason::Unreachable(_)
            | Reason::Busy(_)
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

    /// The file systems that are written to once all is frozen that is planned.
    pub fn goes_on(&self) -> Vec<GoesOn> {
        let goes_on =
            |it: &&LeftOut| !it.reason.is_read_only() && it.reason != Reason::NoBlockDevice;
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
    pub fn leave_out(&mut self, why: impl Fn(&FileSystem) -> Option<Reason>) {
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
    let order = Order::new(mounts, topology, &stack, &chosen);
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
    unreachable: Option<&'static str>,
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
        let unreachable = self
            .unreachable
            .map(|it| Reason::Unreachable(it.to_owned()));
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

/// Whether a superblock is read-only although its mounts here, or where there is none here those elsewhere,
/// were made for writing: whoever makes it so on purpose (`mount -o remount,ro`) makes a mount so, too. But
/// that one may have been unmounted since, a mount of its own may be read-only, and a superblock below one
/// that is not; where ext4 says whether there was an error, that decides.
fn has_turned_read_only(mounts: &[&Mount], errors: Option<u64>) -> bool {
    let turns = |m: &&Mount| !m.writable && !READ_ONLY_BY_NATURE.contains(&m.fs_type.as_str());
    if !mounts.iter().all(turns) {
        return false;
    }
    let is_here = |m: &&&Mount| m.namespace == 0;
    let any_here = mounts.iter().any(|m| is_here(&m));
    let mut asked = mounts.iter().filter(|m| !any_here || is_here(m));
    match errors {
        Some(count) => count > 0 && asked.any(|m| m.for_writing),
        None => asked.all(|m| m.for_writing),
    }
}

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
    let unclear = |found| {
        Superblock {
        unreachable: Some(
            "of this and others of its type one at least is mounted nowhere, and nobody tells which",
        ),
        ..unmounted(found)
    }
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
    let errors = topology.errors.get(&first.dev).copied();
    let has_turned = has_turned_read_only(group, errors);
    let after_an_error = (has_turned && errors.is_some()).then_some(READ_ONLY_SINCE_AN_ERROR);
    Some(Superblock {
        file_system: FileSystem {
            dev: first.dev,
            fs_type: first.fs_type.clone(),
            source: first.source.clone(),
            devices,
            disks: Vec::new(),
            below: None,
            stands_on: None,
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
            disks: Vec::new(),
            below: None,
            stands_on: None,
            places: Vec::new(),
        },
        on_disks: true,
        writable: true,
        has_turned: false,
        can_be_held: true,
        trouble: None,
        unreachable: (found.fs_type == UNKNOWN)
            .then_some("the kernel has it locked, as while it is being unmounted"),
    }
}

/// What holds what, of all superblocks: also of those that are not frozen, which may stand between two that are.
#[derive(Default)]
struct Stack {
    /// For each: the superblocks that hold the files its devices are made of.
    holders: BTreeMap<DevId, BTreeSet<DevId>>,
    /// Those that a user-space program has a part in serving.
    served: BTreeSet<DevId>,
}

impl Stack {
    fn new(mounts: &[Mount], topology: &Topology, superblocks: &[Superblock]) -> Self {
        let mut stack = Stack::default();
        for file_system in superblocks.iter().map(|it| &it.file_system) {
            let dev = file_system.dev;
            let mut holders = BTreeSet::new();
            let mut is_served = mounts::is_served(&file_system.fs_type);
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
    fn new(mounts: &[Mount], topology: &Topology, stack: &Stack, chosen: &[FileSystem]) -> Self {
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
        let born = chosen.iter().map(|it| topology.born_of(&it.devices));
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
mod tests {
    use super::*;
    use crate::mounts::parse;
    use crate::topology::{Backing, Device};

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
    fn what_a_program_serves_from_a_device_here_is_synced_and_not_passed_over() {
        let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 0:31 / /served rw - fuse.fuse2fs /dev/sdb1 rw,user_id=0
3 1 0:32 / /elsewhere rw - fuse.tool /dev/none rw,user_id=0
4 1 0:33 / /far rw - fuse.sshfs host:/home rw
";
        let mut topology = Topology::default();
        topology.members.insert(dev("0:31"), vec![dev("8:17")]);
        topology.members.insert(dev("0:32"), Vec::new());
        let mounts = parse(table.as_bytes(), 0).unwrap();
        let plan = plan(&mounts, &topology, &|_| None);
        let synced: Vec<_> = plan.synced.iter().map(ToString::to_string).collect();
        assert_eq!(synced, ["/served (fuse.fuse2fs, 0:31)"]);
        assert_eq!(plan.synced[0].devices, [dev("8:17")]);
        let left_out: Vec<_> = plan.left_out.iter().map(|it| it.reason.clone()).collect();
        assert_eq!(left_out, [Reason::NoBlockDevice, Reason::NoBlockDevice]);
        // Nobody walks through it to what is mounted below.
        let below = "5 2 8:2 / /served/in rw - ext4 /dev/sda2 rw\n";
        let mounts = parse([table, below].concat().as_bytes(), 0).unwrap();
        assert!(!mounts[4].walkable);
    }

    #[test]
    fn one_that_the_kernel_has_locked_is_named_and_not_tried() {
        let topology = Topology {
            unmounted: vec![Unmounted {
                fs_type: UNKNOWN.into(),
                name: "sdc1".into(),
                devices: vec![dev("8:33")],
            }],
            ..Topology::default()
        };
        let plan = plan(&[], &topology, &|_| None);
        assert!(plan.waves.is_empty());
        assert!(plan.left_out[0].reason.is_a_loss());
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
        assert!(lower.places[1].hidden);
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
    fn a_loop_device_that_cannot_be_asked_comes_before_all_that_may_hold_its_file() {
        // Its path would lead to /srv, or to memory, if it were of this namespace.
        let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /srv rw - ext4 /dev/sda2 rw
3 1 7:0 / /l rw - ext4 /dev/loop0 rw
4 1 0:30 / /tmp rw - tmpfs tmpfs rw
5 1 7:1 / /m rw - ext4 /dev/loop1 rw
6 1 7:2 / /in-memory rw - ext4 /dev/loop2 rw
";
        let topology = topology(vec![
            ("7:0", loop_on("/srv/images/a.img", None)),
            ("7:1", loop_on("/tmp/b.img", Some("0:99"))),
            ("7:2", loop_on("/tmp/c.img", Some("0:30"))),
        ]);
        assert_eq!(
            waves(table, &topology),
            [
                vec!["/m"],
                vec!["/l"],
                vec!["/in-memory", "/srv"],
                vec!["/"]
            ]
        );
    }

    #[test]
    fn what_programs_serve_is_frozen_one_by_one_the_last_mounted_first() {
        let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 43:0 / /first rw - ext4 /dev/nbd0 rw
3 1 8:2 / /plain rw - ext4 /dev/sda2 rw
4 1 43:1 / /second rw - ext4 /dev/nbd1 rw
5 1 7:0 / /image rw - ext4 /dev/loop0 rw
";
        // The image was mounted last, and yet the second is served from it.
        let topology = topology(vec![
            ("43:0", served()),
            ("43:1", served()),
            ("7:0", loop_on("/second/img", Some("43:1"))),
        ]);
        assert_eq!(
            waves(table, &topology),
            [
                vec!["/image"],
                vec!["/second"],
                vec!["/first"],
                vec!["/plain"],
                vec!["/"]
            ]
        );
    }

    #[test]
    fn what_programs_serve_is_frozen_by_the_age_of_the_superblock_where_sysfs_tells_it() {
        // One that only a container has mounted, one that was mounted once more, and two of a type that sysfs
        // does not list, with no path and with one.
        let here = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 43:0 / /nbd0 rw - ext4 /dev/nbd0 rw
3 1 43:1 / /nbd1 rw - vfat /dev/nbd1 rw
4 1 43:2 / /again rw - ext4 /dev/nbd2 rw
";
        let there = "5 0 43:3 / /inside rw - xfs /dev/nbd3 rw\n";
        let mut mounts = parse(here.as_bytes(), 0).unwrap();
        mounts.extend(parse(there.as_bytes(), 1).unwrap());
        let nbds = ["43:0", "43:1", "43:2", "43:3", "43:4"];
        let mut topology = topology(nbds.map(|it| (it, served())).to_vec());
        topology.unmounted.push(Unmounted {
            fs_type: "ext4".into(),
            name: "nbd4".into(),
            devices: vec![dev("43:4")],
        });
        let order = |topology: &Topology| -> Vec<String> {
            let plan = plan(&mounts, topology, &|_| None);
            let all = plan.waves.iter().flatten();
            all.map(|it| it.dev.to_string()).collect()
        };
        let by_table = ["43:4", "43:3", "43:2", "43:1", "43:0", "8:1"];
        assert_eq!(order(&topology), by_table);
        let born = [("43:4", 2), ("43:3", 5), ("43:2", 7), ("43:0", 9)];
        topology.born = born.map(|(it, at)| (dev(it), at)).into();
        // That of which nothing is known keeps its place.
        let by_age = ["43:0", "43:2", "43:3", "43:1", "43:4", "8:1"];
        assert_eq!(order(&topology), by_age);
    }

    #[test]
    fn what_is_excluded_may_stand_between_two_that_are_frozen() {
        let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /disk rw - ext4 /dev/sda2 rw
3 1 7:0 / /image rw - ext4 /dev/loop0 rw
4 1 7:1 / /inner rw - ext4 /dev/loop1 rw
";
        let mut topology = topology(vec![
            ("7:0", loop_on("/disk/image", Some("8:2"))),
            ("7:1", loop_on("/image/image", Some("7:0"))),
        ]);
        let mounts = parse(table.as_bytes(), 0).unwrap();
        let without = |excluded: &str, topology: &Topology| {
            let is_it = |it: &FileSystem| it.places[0].path == Path::new(excluded);
            let plan = plan(&mounts, topology, &|it| is_it(it).then(|| "a rule".into()));
            let waves = plan.waves.into_iter();
            let found = waves.map(|wave| {
                let members = wave.into_iter();
                let words = members.map(|it| (it.dev.to_string(), it.stands_on));
                words.collect::<Vec<_>>()
            });
            found.collect::<Vec<_>>()
        };
        let on = |devs: &[&str]| Some(devs.iter().map(|it| dev(it)).collect::<BTreeSet<_>>());
        let alone = |it: &str, on| vec![(it.to_owned(), on)];
        let expected = [
            alone("7:1", on(&["8:2"])),
            alone("8:2", on(&[])),
            alone("8:1", on(&[])),
        ];
        assert_eq!(without("/image", &topology), expected);
        // The same if it is that which a program serves, or what is below the root.
        topology.devices.insert(dev("7:0"), served());
        let expected = [
            alone("7:1", None),
            alone("8:2", on(&[])),
            alone("8:1", on(&[])),
        ];
        assert_eq!(without("/image", &topology), expected);
        let root = loop_on("/image/root", Some("7:0"));
        topology.devices.insert(dev("8:1"), root);
        topology.devices.remove(&dev("7:0"));
        let found = without("/", &topology);
        let devs = found.iter().map(|wave| wave.iter().map(|it| it.0.as_str()));
        let devs: Vec<Vec<&str>> = devs.map(Iterator::collect).collect();
        assert_eq!(devs, [vec!["8:2", "7:1"], vec!["7:0"]]);
    }

    #[test]
    fn an_image_in_what_a_program_serves_is_frozen_before_all_that_the_program_may_use() {
        let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /var rw - ext4 /dev/sda2 rw
3 1 8:3 / /ntfs rw - fuseblk /dev/sda3 rw
4 1 0:50 / /far rw - fuse.sshfs far: rw
5 1 7:0 / /image rw - ext4 /dev/loop0 rw
6 1 7:1 / /other rw - ext4 /dev/loop1 rw
";
        let topology = topology(vec![
            ("7:0", loop_on("/ntfs/image", Some("8:3"))),
            ("7:1", loop_on("/far/image", Some("0:50"))),
        ]);
        let mounts = parse(table.as_bytes(), 0).unwrap();
        let plan = plan(&mounts, &topology, &|_| None);
        let of = |wave: &Vec<FileSystem>| wave.iter().map(|it| it.dev.to_string()).collect();
        let waves: Vec<Vec<String>> = plan.waves.iter().map(of).collect();
        assert_eq!(waves, [["7:1"], ["7:0"], ["8:3"], ["8:2"], ["8:1"]]);
    }

    #[test]
    fn a_journal_on_another_device_counts_as_below() {
        let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /srv rw - ext4 /dev/sda2 rw
3 1 8:3 / /data rw - ext4 /dev/sda3 rw
";
        let mut topology = topology(vec![("7:0", loop_on("/srv/journal", Some("8:2")))]);
        topology.logs.insert(dev("8:3"), vec![dev("7:0")]);
        assert_eq!(
            waves(table, &topology),
            [vec!["/data"], vec!["/srv"], vec!["/"]]
        );
    }

    #[test]
    fn the_disks_are_the_lowest_devices() {
        let part = Device {
            below: vec![dev("8:0")],
            ..Device::default()
        };
        let topology = topology(vec![
            ("8:0", Device::default()),
            ("8:1", part.clone()),
            ("8:2", part),
        ]);
        let table = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n\
                     2 1 8:2 / /srv rw - xfs /dev/sda2 rw\n";
        let plan = plan(&parse(table.as_bytes(), 0).unwrap(), &topology, &|_| None);
        let disks: Vec<_> = plan.file_systems().map(|it| it.disks.clone()).collect();
        assert_eq!(disks, [vec![dev("8:0")], vec![dev("8:0")]]);
    }

    /// A disk of the host and one more, partitions and a mapped device on the first, an image on that, one
    /// of unknown place and one in memory; a log on the first, of what is on the second.
    fn two_disks_and_images() -> Plan {
        let mut topology = topology(vec![
            ("8:0", disk(&[])),
            ("8:1", disk(&["8:0"])),
            ("253:0", disk(&["8:1"])),
            ("8:16", disk(&[])),
            ("8:32", disk(&[])),
            ("8:33", disk(&["8:0"])),
            ("7:0", loop_on("/srv/img", Some("253:0"))),
            ("7:1", loop_on("/away/img", None)),
            ("7:2", loop_on("/run/img", Some("0:9"))),
        ]);
        for (number, name) in [("8:0", "sda"), ("8:16", "sdb"), ("8:48", "sdd")] {
            let found = crate::disks::HostDisk {
                name: name.into(),
                address: format!("host:{number}"),
            };
            topology.disks.insert(dev(number), found);
        }
        topology.logs.insert(dev("8:32"), vec![dev("8:33")]);
        let table = "\
1 0 8:16 / / rw - ext4 /dev/sdb rw
2 1 253:0 / /srv rw - xfs /dev/dm-0 rw
3 1 7:0 / /image rw - ext4 /dev/loop0 rw
4 1 7:1 / /unknown rw - ext4 /dev/loop1 rw
5 1 0:9 / /run rw - tmpfs tmpfs rw
6 1 7:2 / /in-memory rw - ext4 /dev/loop2 rw
7 1 8:32 / /log-elsewhere rw - xfs /dev/sdc rw
";
        plan(&parse(table.as_bytes(), 0).unwrap(), &topology, &|_| None)
    }

    #[test]
    fn what_is_on_a_disk_is_also_what_is_on_files_there() {
        let plan = two_disks_and_images();
        let on = |number| -> Vec<String> {
            let found = plan.on_disk(dev(number));
            found
                .map(|it| it.places[0].path.display().to_string())
                .collect()
        };
        let mut on_first = on("8:0");
        on_first.sort();
        assert_eq!(on_first, ["/image", "/log-elsewhere", "/srv"]);
        let with_a_log = plan.waves.iter().flatten();
        let mut with_a_log = with_a_log.filter(|it| it.devices.len() > 1);
        let devices = with_a_log.next().map(|it| it.devices.as_slice());
        assert_eq!(devices, Some(&[dev("8:32"), dev("8:33")][..]));
        assert_eq!(on("8:16"), ["/"]);
        assert!(on("8:48").is_empty());
        let scope = plan.find(&["host:8:48".into(), "host:9".into(), "host:8:0".into()]);
        assert_eq!(scope.disks, BTreeSet::from([dev("8:0"), dev("8:48")]));
        assert_eq!(scope.strange, ["host:9"]);
    }

    #[test]
    fn of_some_disks_only_what_has_no_part_of_them_is_left_out() {
        let mut plan = two_disks_and_images();
        plan.leave_out_all_but(&BTreeSet::from([dev("8:0")]));
        let mut frozen: Vec<String> = plan
            .waves
            .iter()
            .flatten()
            .map(|it| it.places[0].path.display().to_string())
            .collect();
        frozen.sort();
        assert_eq!(frozen, ["/image", "/log-elsewhere", "/srv", "/unknown"]);
        let elsewhere = plan.left_out.iter();
        let elsewhere = elsewhere.filter(|it| it.reason == Reason::Elsewhere);
        let mut names: Vec<String> = elsewhere.map(|it| it.file_system.to_string()).collect();
        names.sort();
        assert_eq!(names, ["/ (ext4, 8:16)", "/in-memory (ext4, 7:2)"]);
    }

    #[test]
    fn what_is_lost_on_other_disks_is_no_loss_for_some() {
        let mut plan = two_disks_and_images();
        // The root is elsewhere, the image is not, of the next nobody knows, and the disk of the last is gone.
        let broken = ["8:16", "7:0", "7:1", "8:32"].map(dev);
        let down = |it: &FileSystem| {
            let is_broken = broken.contains(&it.dev);
            is_broken.then(|| Reason::Broken("down".into()))
        };
        plan.leave_out(down);
        let gone = plan.left_out.iter_mut().map(|it| &mut it.file_system);
        for it in gone.filter(|it| it.dev == dev("8:32")) {
            it.disks.clear();
            it.below = Some(BTreeSet::from([it.dev]));
        }
        plan.leave_out_all_but(&BTreeSet::from([dev("8:0")]));
        let lost = plan.left_out.iter().filter(|it| it.reason.is_a_loss());
        let lost: BTreeSet<String> = lost.map(|it| it.file_system.dev.to_string()).collect();
        let expected = ["7:0", "7:1", "8:32"].map(str::to_owned);
        assert_eq!(lost, BTreeSet::from(expected));

        // These have turned read-only, and nobody has asked yet whether an error has made them so.
        let mut plan = two_disks_and_images();
        let turned = ["8:16", "253:0"].map(dev);
        plan.leave_out(|it| turned.contains(&it.dev).then_some(Reason::TurnedReadOnly));
        plan.leave_out_all_but(&BTreeSet::from([dev("8:0")]));
        let left = plan.left_out.iter();
        let to_ask = left.filter(|it| it.reason == Reason::TurnedReadOnly);
        let to_ask: Vec<DevId> = to_ask.map(|it| it.file_system.dev).collect();
        assert_eq!(to_ask, [dev("253:0")]);
    }

    #[test]
    fn a_disk_is_at_rest_if_all_on_it_is_frozen_and_nothing_in_between_writes_by_itself() {
        let named = |name: &str, below: &[&str]| Device {
            name: name.into(),
            mapper_uuid: name.starts_with("dm-").then(|| "LVM-0".into()),
            ..disk(below)
        };
        let mut topology = topology(vec![
            ("8:0", named("sda", &[])),
            ("8:1", named("sda1", &["8:0"])),
            ("253:0", named("dm-0", &["8:1"])),
            ("8:16", named("sdb", &[])),
            ("9:0", named("md0", &["8:16"])),
            ("8:32", named("sdc", &[])),
            ("8:64", named("sde", &[])),
            ("253:1", named("dm-1", &["8:64"])),
            ("253:2", named("dm-2", &["253:1"])),
            ("8:80", named("sdf", &[])),
            (
                "253:3",
                Device {
                    mapper_uuid: Some("CRYPT-INTEGRITY-x".into()),
                    ..named("dm-3", &["8:80"])
                },
            ),
        ]);
        for (number, name) in [
            ("8:0", "sda"),
            ("8:16", "sdb"),
            ("8:32", "sdc"),
            ("8:48", "sdd"),
            ("8:64", "sde"),
            ("8:80", "sdf"),
        ] {
            let found = crate::disks::HostDisk {
                name: name.into(),
                address: format!("host:{number}"),
            };
            topology.disks.insert(dev(number), found);
        }
        let table = "\
1 0 253:0 / / rw - ext4 /dev/dm-0 rw
2 1 9:0 / /md rw - ext4 /dev/md0 rw
3 1 8:32 / /excluded rw - ext4 /dev/sdc rw
4 1 253:2 / /thin rw - ext4 /dev/dm-2 rw
5 1 253:3 / /integrity rw - ext4 /dev/dm-3 rw
";
        let rule = |it: &FileSystem| (it.dev == dev("8:32")).then(|| "a rule".to_owned());
        let plan = plan(&parse(table.as_bytes(), 0).unwrap(), &topology, &rule);
        let nodes = |scope: &Scope| -> Vec<String> {
            let at_rest = plan.at_rest(scope).watched.into_keys();
            at_rest.map(|it| it.to_string()).collect()
        };
        assert_eq!(nodes(&Scope::default()), ["/dev/sda", "/dev/sdd"]);
        let scope = plan.find(&["host:8:48".into(), "host:8:64".into()]);
        assert_eq!(nodes(&scope), ["/dev/sdd"]);
    }

    #[test]
    fn of_a_disk_below_layers_that_write_by_themselves_the_topmost_devices_are_at_rest() {
        let named = |name: &str, below: &[&str]| Device {
            name: name.into(),
            ..disk(below)
        };
        let mut topology = topology(vec![
            ("8:0", named("sda", &[])),
            ("8:1", named("sda1", &["8:0"])),
            ("253:0", named("dm-0", &["8:1"])),
            ("253:1", named("dm-1", &["253:0"])),
        ]);
        let host_disk = crate::disks::HostDisk {
            name: "sda".into(),
            address: "host:sda".into(),
        };
        topology.disks.insert(dev("8:0"), host_disk);
        for (number, name, partitions, holders) in [
            ("8:0", "sda", &["8:1"][..], &[][..]),
            ("8:1", "sda1", &[], &["253:0"]),
            ("253:0", "dm-0", &[], &["253:1", "253:2", "253:3"]),
            ("253:1", "dm-1", &[], &[]),
            ("253:2", "dm-2", &[], &[]),
            ("253:3", "dm-3", &[], &[]),
        ] {
            let numbers = |all: &[&str]| all.iter().map(|it| dev(it)).collect();
            let above = crate::topology::Above {
                name: name.into(),
                partitions: numbers(partitions),
                holders: numbers(holders),
            };
            topology.above.insert(dev(number), above);
        }
        let mounts = parse(b"1 0 253:1 / / rw - ext4 /dev/dm-1 rw\n", 0).unwrap();
        let at_rest = |topology: &Topology, rule: &dyn Fn(&FileSystem) -> Option<String>| {
            let at_rest = plan(&mounts, topology, rule).at_rest(&Scope::default());
            at_rest.watched.into_keys().collect::<Vec<_>>()
        };
        let words = |all: &[Watched]| all.iter().map(ToString::to_string).collect::<Vec<_>>();
        let all = at_rest(&topology, &|_| None);
        let outside = "/dev/sda outside of its partitions";
        assert_eq!(
            words(&all),
            [outside, "/dev/dm-1", "/dev/dm-2", "/dev/dm-3"]
        );
        // What is known to be written to.
        let swap = ["253:2", "253:0", "8:1", "8:0"].map(dev).into();
        let mut but_swap = all;
        but_swap.retain(|it| !it.counts(&swap));
        assert_eq!(words(&but_swap), [outside, "/dev/dm-1", "/dev/dm-3"]);
        let excluded = at_rest(&topology, &|_| Some("a rule".into()));
        assert_eq!(words(&excluded), [outside, "/dev/dm-2", "/dev/dm-3"]);
        // What holds the whole disk writes past its partitions.
        let whole = topology.above.get_mut(&dev("8:0")).unwrap();
        whole.holders.push(dev("253:3"));
        let multipath = at_rest(&topology, &|_| None);
        assert_eq!(words(&multipath), ["/dev/dm-1", "/dev/dm-2", "/dev/dm-3"]);
    }

    #[test]
    fn what_may_have_a_part_of_any_disk_is_never_left_out_for_others() {
        let table = "\
1 0 8:0 / / rw - ext4 /dev/sda rw
2 1 8:16 / /several rw - f2fs /dev/sdb rw
3 1 8:32 / /one rw - ext4 /dev/sdc rw
";
        let mut topology = topology(vec![
            ("8:0", disk(&[])),
            ("8:16", disk(&[])),
            ("8:32", disk(&[])),
        ]);
        topology.unclear.insert(dev("8:16"));
        let mut plan = plan(&parse(table.as_bytes(), 0).unwrap(), &topology, &|_| None);
        plan.leave_out_all_but(&BTreeSet::from([dev("8:0")]));
        let left_out: Vec<String> = plan
            .left_out
            .iter()
            .map(|it| it.file_system.to_string())
            .collect();
        assert_eq!(left_out, ["/one (ext4, 8:32)"]);
    }

    #[test]
    fn what_is_mounted_nowhere_is_planned_and_named_by_its_device() {
        let table = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n";
        let mut topology = topology(vec![("7:0", loop_on("/img", Some("8:1")))]);
        topology.unmounted.push(Unmounted {
            fs_type: "xfs".into(),
            name: "loop0".into(),
            devices: vec![dev("7:0")],
        });
        let plan = plan(&parse(table.as_bytes(), 0).unwrap(), &topology, &|_| None);
        let names: Vec<String> = plan.waves.iter().flatten().map(|f| f.to_string()).collect();
        assert_eq!(
            names,
            [
                "loop0 (xfs, 7:0, in use but mounted nowhere)",
                "/ (ext4, 8:1)"
            ]
        );
    }

    #[test]
    fn whether_there_was_an_error_is_asked_where_mounts_do_not_tell() {
        let here = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /turned rw - ext4 /dev/sda2 ro
3 1 8:2 /a /bind ro - ext4 /dev/sda2 ro
4 1 8:3 / /made-read-only ro - ext4 /dev/sda3 ro
5 1 8:3 /a /made rw - ext4 /dev/sda3 ro
6 1 8:4 / /only-the-superblock rw - ext4 /dev/sda4 ro
7 1 8:5 / /fsck-was-never-run ro - ext4 /dev/sda5 ro
8 1 8:8 / /unknown rw - ext4 /dev/sda8 ro
9 1 8:8 /a /unknown-bind ro - ext4 /dev/sda8 ro
";
        let there = "\
11 0 8:6 / /in-a-container rw - xfs /dev/sda6 rw
12 11 8:7 / /turned-there rw - btrfs /dev/sda7 ro
13 11 8:9 / /read-only-there ro - ext4 /dev/sda9 ro
";
        let mut mounts = parse(here.as_bytes(), 0).unwrap();
        mounts.extend(parse(there.as_bytes(), 1).unwrap());
        let mut topology = Topology::default();
        for (number, count) in [("8:2", 1), ("8:3", 0), ("8:4", 0), ("8:5", 7)] {
            topology.errors.insert(dev(number), count);
        }
        let plan = plan(&mounts, &topology, &|_| None);
        let not_only_read_only = plan.left_out.iter();
        let not_only_read_only = not_only_read_only.filter(|it| it.reason != Reason::ReadOnly);
        let said: Vec<_> = not_only_read_only
            .map(|it| {
                (
                    it.file_system.places[0].path.to_str(),
                    it.reason.is_a_loss(),
                )
            })
            .collect();
        // The second has not been asked yet.
        let expected = [(Some("/turned"), true), (Some("/turned-there"), true)];
        assert_eq!(said, expected);
        assert_eq!(plan.left_out.len(), 7);
    }

    #[test]
    fn what_may_be_mounted_nowhere_is_a_loss() {
        let table = "1 0 0:40 / / rw - btrfs /dev/root rw\n";
        let mut topology = Topology::default();
        topology.members.insert(dev("0:40"), Vec::new());
        topology.unclear_unmounted = ["8:1", "8:2"]
            .map(|number| Unmounted {
                fs_type: "btrfs".into(),
                name: number.into(),
                devices: vec![dev(number)],
            })
            .into();
        let plan = plan(&parse(table.as_bytes(), 0).unwrap(), &topology, &|_| None);
        assert_eq!(plan.waves.concat().len(), 1);
        assert_eq!(plan.left_out.len(), 2);
        assert!(plan.left_out.iter().all(|it| it.reason.is_a_loss()));
    }

    #[test]
    fn what_is_out_of_order_is_left_out_by_name_unless_a_rule_did_so_before() {
        let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /errors rw - ext4 /dev/sda2 rw,errors=remount-ro,emergency_ro
3 1 8:3 / /down rw - ext4 /dev/sda3 rw,shutdown
4 1 8:4 / /gone rw - xfs /dev/sda4 rw
5 1 8:5 / /turned rw - ext4 /dev/sda5 ro
6 1 8:6 / /on-purpose ro - ext4 /dev/sda6 ro
7 1 8:7 / /image rw - squashfs /dev/sda7 ro
8 1 8:8 / /unwanted rw - ext4 /dev/sda8 rw,shutdown
9 1 8:10 / /turned-and-unwanted rw - ext4 /dev/sda10 ro
10 1 0:40 / /made-read-only ro - btrfs /dev/sda9 ro
11 1 0:40 / /bind rw - btrfs /dev/sda9 ro
12 1 8:11 / /cluster rw - ocfs2 /dev/sda11 ro
13 1 11:0 / /media rw - iso9660 /dev/sr0 ro
14 1 0:50 / /home/.zfs/snapshot/old rw - zfs tank/home@old ro
15 1 8:12 / /made-so rw - xfs /dev/sda12 ro
";
        let mut topology = Topology::default();
        topology.gone.insert(dev("8:4"));
        let mounts = parse(table.as_bytes(), 0).unwrap();
        let unwanted = |f: &FileSystem| {
            [dev("8:8"), dev("8:10")]
                .contains(&f.dev)
                .then(|| "a rule".to_owned())
        };
        let plan = plan(&mounts, &topology, &unwanted);
        let left_out: Vec<String> = plan
            .left_out
            .iter()
            .map(|l| format!("{}: {}", l.file_system.places[0].path.display(), l.reason))
            .collect();
        assert_eq!(
            left_out,
            [
                "/errors: out of order: read-only since an error",
                "/down: out of order: shut down after an error",
                "/gone: out of order: its disk is gone",
                "/turned: read-only though mounted for writing, perhaps since an error",
                "/on-purpose: read-only",
                "/image: read-only",
                "/unwanted: excluded by a rule",
                "/turned-and-unwanted: excluded by a rule",
                "/bind: read-only",
                "/cluster: read-only though mounted for writing, perhaps since an error",
                "/media: read-only",
                "/home/.zfs/snapshot/old: read-only",
                "/made-so: read-only though mounted for writing, and not since an error",
            ]
        );
        // Nobody can be asked what has made it so.
        let lost = plan.losses().flat_map(|it| &it.file_system.places);
        let lost: Vec<String> = lost.map(|it| it.path.display().to_string()).collect();
        assert_eq!(lost, ["/errors", "/down", "/gone", "/turned", "/cluster"]);
        assert_eq!(plan.waves.concat().len(), 1);
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
