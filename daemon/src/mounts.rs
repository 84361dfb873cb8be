// SPDX-License-Identifier: GPL-2.0-only

//! The mount table: what is mounted where, from `mountinfo` in procfs.
//!
//! Lines are taken apart by `procfs-core`; what it leaves as it stands in the file (octal escapes,
//! the difference between a mount's and a superblock's options) is put right here. It looks at no
//! path and opens nothing but the table itself.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt as _;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::time::Instant;

use nix::fcntl::{openat, OFlag};
use nix::sys::stat::Mode;
use procfs_core::process::MountInfo;
use procfs_core::ProcError;
use serde::{de::Error as _, Deserialize, Deserializer, Serialize, Serializer};

/// Why the mount table could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MountsError {
    /// The table could not be read.
    #[error("cannot read the mount table of namespace {namespace}")]
    Read {
        /// Which namespace, as in [`Mount::namespace`].
        namespace: usize,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A line is not in the form that proc(5) describes.
    #[error("line {number} of the mount table is malformed: {line}")]
    Line {
        /// Counted from 1.
        number: usize,
        /// The line, with bytes outside ASCII escaped.
        line: String,
        /// What the parser said.
        source: ProcError,
    },
    /// The third column is not `major:minor`.
    #[error("line {number} of the mount table has a malformed device number: {value}")]
    Device {
        /// Counted from 1.
        number: usize,
        /// The column as it stands.
        value: String,
    },
}

impl MountsError {
    /// Whether there is more of a table than is read of it.
    pub fn is_too_much(&self) -> bool {
        let kinds = [io::ErrorKind::TimedOut, io::ErrorKind::FileTooLarge];
        matches!(self, MountsError::Read { source, .. } if kinds.contains(&source.kind()))
    }
}

/// The number of a device, or of a superblock that is on none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevId {
    /// Major number; 0 for superblocks without a block device of their own.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl DevId {
    /// From a `dev_t` as `stat(2)` has it.
    pub fn from_raw(dev: u64) -> Self {
        DevId {
            major: libc::major(dev),
            minor: libc::minor(dev),
        }
    }
}

impl fmt::Display for DevId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for DevId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.trim().split_once(':').ok_or(())?;
        Ok(DevId {
            major: major.parse().map_err(drop)?,
            minor: minor.parse().map_err(drop)?,
        })
    }
}

impl Serialize for DevId {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DevId {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        text.parse()
            .map_err(|()| D::Error::custom(format!("no device number: {text}")))
    }
}

/// One line of a mount table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Which mount namespace shows it: 0 is the daemon's own, others count from 1.
    pub namespace: usize,
    /// The mount's id, unique among those that exist.
    pub id: u64,
    /// The id of the mount it is attached to.
    pub parent: u64,
    /// The superblock's device number, the same for each mount of the same superblock.
    pub dev: DevId,
    /// Which directory (or file) of the file system is mounted.
    pub root: PathBuf,
    /// Where, as seen from the namespace's root.
    pub path: PathBuf,
    /// Type of the file system.
    pub fs_type: String,
    /// What the mounter named as the source: a device node or any other text.
    pub source: Option<OsString>,
    /// Whether the *superblock* is writable, whatever this mount's own options are.
    pub writable: bool,
    /// Whether this mount itself was made for writing.
    pub for_writing: bool,
    /// Whether the way to its path leads through nothing that another machine or a program has to
    /// answer for: the look-up cannot be refused or hang there.
    pub walkable: bool,
    /// The mount nearest to it on the way that is made of layers, by the number of its superblock, if such are all
    /// that it is not `walkable` for. Each look-up there asks the layers: it is up to those whether it hangs.
    pub layers: Option<DevId>,
    /// Whether another mount lies over it, or over a folder on the way, so that its path leads
    /// elsewhere.
    pub hidden: bool,
    /// Where it was mounted, if no table shows it any longer. Its path is only a way to it then.
    pub was_at: Option<PathBuf>,
    /// What the file system says of itself: options by name, with their values where they have one.
    pub options: BTreeMap<String, OsString>,
    /// The ids of further ones that it stands for, as [`of_interest`] has left them out.
    pub alike: Vec<u64>,
}

/// Types whose superblock has an anonymous number although it is on disks, and that can be frozen.
const ANONYMOUS_TYPES: [&str; 2] = ["btrfs", "bcachefs"];
/// The same, but nothing can hold them (OpenZFS has neither hook that FIFREEZE wants).
pub const NEVER_HELD: &str = "zfs";
/// Types of which any kernel from 6.1 on can freeze a superblock: those that have one of the two hooks that
/// FIFREEZE wants. No kernel tells without being asked to freeze.
const FREEZE: [&str; 11] = [
    "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "jfs", "nilfs2", "gfs2", "reiserfs", "bcachefs",
];
/// The type that is on a disk and served by a program, which may add its own name after a point.
const SERVED: &str = "fuseblk";
/// The type that a program serves from wherever it likes; it may add its name likewise.
const FUSE: &str = "fuse";
/// Types without a device below which a look-up is the kernel's own affair.
const WALKED: [&str; 7] = [
    "tmpfs", "ramfs", "devtmpfs", "rootfs", "proc", "sysfs", "autofs",
];
/// Types that are made of layers. No table tells what those are on, and who has to answer for it: their paths are
/// of whoever mounted them, in another namespace as a rule, and may be unmounted there.
const LAYERED: [&str; 2] = ["overlay", "aufs"];

impl Mount {
    /// Whether its superblock is on disks of this machine.
    pub fn is_on_disks(&self) -> bool {
        let fs_type = self.fs_type.as_str();
        self.dev.major != 0 || is_anonymous(fs_type) || !self.can_be_held()
    }

    /// Whether a program serves it that has a device of this machine open by itself, if what it is called
    /// after is one, and not by the kernel as [`SERVED`]: fuse2fs, and ntfs-3g where it may not. Only root of
    /// the own namespace is believed: whoever mounts calls it what he likes, and may be anybody.
    pub fn may_be_from_a_device(&self) -> bool {
        let fs_type = self.fs_type.as_str();
        let is_fuse = fs_type == FUSE || fs_type.strip_prefix(FUSE).is_some_and(is_name);
        let is_roots = self.namespace == 0 && self.option("user_id") == Some(OsStr::new("0"));
        let source = Path::new(self.source.as_deref().unwrap_or_default());
        is_fuse && is_roots && may_be_a_node(source) && source != Path::new("/dev/fuse")
    }

    /// False for what is on disks and known to have no means to freeze.
    pub fn can_be_held(&self) -> bool {
        self.fs_type != NEVER_HELD && !self.may_be_from_a_device()
    }

    /// Whether a look-up inside of it asks nobody but the kernel. That goes for the own root whatever it is, on a
    /// live system or in a container layers as a rule: whatever this process does goes through it.
    fn is_walked(&self) -> bool {
        let fs_type = self.fs_type.as_str();
        let is_own_root = || self.namespace == 0 && self.path == Path::new("/");
        WALKED.contains(&fs_type)
            || self.is_on_disks() && !is_served(fs_type)
            || self.is_layered() && is_own_root()
    }

    fn is_layered(&self) -> bool {
        LAYERED.contains(&self.fs_type.as_str())
    }

    /// Whether the whole file system is mounted here, or a whole subvolume of it, and not a folder or
    /// a file inside.
    pub fn is_whole(&self) -> bool {
        self.root == self.subvolume().unwrap_or(Path::new("/"))
    }

    /// The subvolume that is mounted here, or of which a folder is. `None` where it is of the whole.
    pub fn subvolume(&self) -> Option<&Path> {
        let path = Path::new(self.option("subvol")?);
        (path != Path::new("/")).then_some(path)
    }

    /// Its own id and those of the others that it stands for.
    pub fn ids(&self) -> impl Iterator<Item = u64> + '_ {
        self.alike.iter().copied().chain([self.id])
    }

    /// The value of an option of the superblock, empty for one that has none.
    pub fn option(&self, name: &str) -> Option<&OsStr> {
        self.options.get(name).map(OsString::as_os_str)
    }
}

/// Whether what is of this type has means to freeze, as far as is known before it is tried.
pub fn has_means_to_freeze(fs_type: &str) -> bool {
    FREEZE.contains(&fs_type)
}

/// Whether a superblock of this type has an anonymous number although it is on disks.
pub fn is_anonymous(fs_type: &str) -> bool {
    ANONYMOUS_TYPES.contains(&fs_type)
}

/// Whether a name is a path below `/dev`. Any other may be that of a pool or of anything, or lead to who does not answer.
pub fn may_be_a_node(name: &Path) -> bool {
    let leads_out = || name.components().any(|it| it == Component::ParentDir);
    name.starts_with("/dev") && !leads_out()
}

/// Whether a program has to answer for what is of this type.
pub fn is_served(fs_type: &str) -> bool {
    let mut rest = [SERVED, FUSE]
        .into_iter()
        .filter_map(|it| fs_type.strip_prefix(it));
    rest.any(|rest| rest.is_empty() || is_name(rest))
}

/// Whether this is the name that a program has added to its type.
fn is_name(rest: &str) -> bool {
    rest.starts_with('.')
}

/// Where the kernel shows a thread the table of the namespace that it is in.
pub const OWN_TABLE: &str = "thread-self/mountinfo";

/// Reads the table of the namespace that the calling thread is in, as that of number `namespace`.
/// `proc` is the root directory of a procfs, open, since a namespace need not have one.
pub fn read(proc: BorrowedFd<'_>, namespace: usize) -> Result<Vec<Mount>, MountsError> {
    parse(&read_text(proc, namespace)?, namespace)
}

/// The same of a table that may be anybody's, until then. It fails with [`io::ErrorKind::TimedOut`] when that has come,
/// and with [`io::ErrorKind::FileTooLarge`] when there is more than 32 MiB of it.
pub fn read_until(
    proc: BorrowedFd<'_>,
    namespace: usize,
    until: Instant,
) -> Result<Vec<Mount>, MountsError> {
    let text = text(proc, namespace, |length| match length {
        _ if Instant::now() >= until => Err(io::ErrorKind::TimedOut.into()),
        length if length > MOST_BYTES => Err(io::ErrorKind::FileTooLarge.into()),
        _ => Ok(()),
    })?;
    parse(&text, namespace)
}

/// The longest table of another namespace that is read: 100,000 mounts, as many as there may be, with 300 bytes each.
const MOST_BYTES: usize = 32 << 20;

/// The same table as the kernel writes it.
pub fn read_text(proc: BorrowedFd<'_>, namespace: usize) -> Result<Vec<u8>, MountsError> {
    text(proc, namespace, |_| Ok(()))
}

fn text(
    proc: BorrowedFd<'_>,
    namespace: usize,
    go_on: impl Fn(usize) -> io::Result<()>,
) -> Result<Vec<u8>, MountsError> {
    let failed = |source| MountsError::Read { namespace, source };
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let fd = openat(proc, OWN_TABLE, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
    whole_while(&File::from(fd), go_on).map_err(failed)
}

/// The whole text of a file of procfs.
pub fn whole(file: &File) -> io::Result<Vec<u8>> {
    whole_while(file, |_| Ok(()))
}

/// The same, as long as who is told how much of it there is so far lets it go on.
fn whole_while(file: &File, go_on: impl Fn(usize) -> io::Result<()>) -> io::Result<Vec<u8>> {
    // Large reads: the fewer there are, the less can change in between.
    let mut text = vec![0; 1 << 16];
    let mut length = 0;
    loop {
        if length == text.len() {
            text.resize(length * 2, 0);
        }
        let room = text.get_mut(length..).unwrap_or_default();
        match file.read_at(room, length as u64)? {
            0 => break,
            count => length += count,
        }
        go_on(length)?;
    }
    text.truncate(length);
    Ok(text)
}

/// Takes a whole table apart.
pub fn parse(text: &[u8], namespace: usize) -> Result<Vec<Mount>, MountsError> {
    let mut mounts = text
        .split(|&b| b == b'\n')
        .enumerate()
        .filter(|(_, line)| !line.is_empty())
        .map(|(index, line)| parse_line(line, index + 1, namespace))
        .collect::<Result<Vec<Mount>, _>>()?;
    find_ways(&mut mounts);
    Ok(mounts)
}

/// Of another namespace's table what is of interest: the rest (overlay, proc, tmpfs, ...) is not, and of those that are
/// alike a few are enough. Anybody may have 100,000 of them in each of his, and all have to be kept.
pub fn of_interest(table: Vec<Mount>) -> Vec<Mount> {
    let mut kept: Vec<Mount> = Vec::new();
    let mut kinds = BTreeMap::new();
    for mount in table.into_iter().filter(Mount::is_on_disks) {
        let subvolume = mount.subvolume().map(Path::to_owned);
        let is = (mount.for_writing, mount.is_whole(), mount.hidden);
        let kind = (mount.dev, subvolume, is, mount.walkable, mount.layers);
        let (first, count) = kinds.entry(kind).or_insert((kept.len(), 0));
        *count += 1;
        match kept.get_mut(*first).filter(|_| *count > ENOUGH) {
            Some(first) => first.alike.push(mount.id),
            None => kept.push(mount),
        }
    }
    kept
}

/// So many ways to a superblock are kept of each kind.
pub const ENOUGH: usize = 8;

/// Says of each mount whether its path leads to it, and through what.
fn find_ways(mounts: &mut [Mount]) {
    let ways: Vec<_> = {
        let table = Attached::new(mounts);
        let aside = table.aside();
        let mut known = BTreeMap::new();
        let mut way = |m: &Mount| {
            let way = table.way_into(m.parent, &aside, &mut known);
            let is_covered = table.at.contains_key(&(m.id, m.path.as_path()));
            let hidden = !way.leads || aside.contains(&m.id) || is_covered;
            (way, hidden)
        };
        mounts.iter().map(&mut way).collect()
    };
    for (mount, (way, hidden)) in mounts.iter_mut().zip(ways) {
        mount.walkable = way.walkable;
        mount.layers = way.layers;
        mount.hidden = hidden;
    }
}

/// The way from the root to the inside of a mount.
#[derive(Clone, Copy)]
struct Way {
    /// As [`Mount::walkable`] of what is attached there.
    walkable: bool,
    /// As [`Mount::layers`] of that.
    layers: Option<DevId>,
    /// Whether it leads there.
    leads: bool,
}

impl Way {
    const START: Way = Way {
        walkable: true,
        layers: None,
        leads: true,
    };

    /// On into what is attached there.
    fn into(self, mount: &Mount, is_aside: bool) -> Self {
        let are_layers = mount.is_layered() && (self.walkable || self.layers.is_some());
        let is_walked = mount.is_walked();
        Way {
            walkable: self.walkable && is_walked,
            layers: match is_walked {
                true => self.layers,
                false => are_layers.then_some(mount.dev),
            },
            leads: self.leads && !is_aside,
        }
    }
}

/// A table by what is attached to what. Anybody may make a table of his own that is 100,000 mounts high, so what is
/// asked of all of them costs no more for each the more there are.
pub struct Attached<'a> {
    by_id: BTreeMap<u64, &'a Mount>,
    /// By the mount below and the path, the first of those that are attached there.
    at: BTreeMap<(u64, &'a Path), &'a Mount>,
}

impl<'a> Attached<'a> {
    /// Looks over one namespace's whole table.
    pub fn new(table: &'a [Mount]) -> Self {
        let mut at = BTreeMap::new();
        for mount in table.iter().filter(|m| m.parent != m.id) {
            at.entry((mount.parent, mount.path.as_path()))
                .or_insert(mount);
        }
        Attached {
            by_id: table.iter().map(|m| (m.id, m)).collect(),
            at,
        }
    }

    /// The mounts that no path leads to from what they are attached to: another one is over a folder on the way, or
    /// over the same one.
    fn aside(&self) -> BTreeSet<u64> {
        let mut aside: BTreeSet<u64> = self.by_id.keys().copied().collect();
        let mut last: Option<(u64, &Path)> = None;
        // Of those on one mount whatever is below a path comes right after it.
        for (&(below, path), mount) in &self.at {
            if last.is_none_or(|(other, over)| other != below || !path.starts_with(over)) {
                last = Some((below, path));
                aside.remove(&mount.id);
            }
        }
        let is_root = |m: &&Mount| m.parent == m.id || !self.by_id.contains_key(&m.parent);
        let roots = self.by_id.values().copied().filter(is_root);
        for root in roots {
            aside.remove(&root.id);
        }
        aside
    }

    /// The way to the inside of the mount with this number, with what is `known` of others.
    fn way_into(&self, id: u64, aside: &BTreeSet<u64>, known: &mut BTreeMap<u64, Way>) -> Way {
        let (mut up, mut next) = (Vec::new(), id);
        while let Some(mount) = self.by_id.get(&next).filter(|_| !known.contains_key(&next)) {
            // A circle would be a table that contradicts itself.
            known.insert(next, Way::START);
            up.push(*mount);
            next = mount.parent;
        }
        let mut way = known.get(&next).copied().unwrap_or(Way::START);
        for mount in up.into_iter().rev() {
            way = way.into(mount, aside.contains(&mount.id));
            known.insert(mount.id, way);
        }
        way
    }

    /// `mount` and what it is attached to, directly or not, the nearest first.
    fn chain(&self, mount: &'a Mount) -> Vec<&'a Mount> {
        let mut seen = BTreeSet::from([mount.id]);
        let mut chain = vec![mount];
        let mut parent = mount.parent;
        while let Some(next) = self.by_id.get(&parent).filter(|it| seen.insert(it.id)) {
            chain.push(next);
            parent = next.parent;
        }
        chain
    }

    /// The first mount on the way to `mount` that does not lead there.
    pub fn cover(&self, mount: &'a Mount) -> Option<&'a Mount> {
        let mut chain = self.chain(mount);
        chain.reverse();
        let steps = chain.windows(2).filter_map(|step| match step {
            [below, above] => Some((*below, *above)),
            _ => None,
        });
        let between = steps.map(|(below, above)| self.on_the_way(below, above));
        let over = self.at.get(&(mount.id, mount.path.as_path())).copied();
        between.flatten().chain(over).next()
    }

    /// What lies over a folder on the way from `below` to what is attached to that, or over the same one.
    fn on_the_way(&self, below: &Mount, above: &Mount) -> Option<&'a Mount> {
        let folders = match above.path.strip_prefix(&below.path) {
            Ok(rest) => rest.components().count() + 1,
            Err(_) => usize::MAX,
        };
        let mut folders: Vec<&Path> = above.path.ancestors().take(folders).collect();
        folders.reverse();
        let mut attached = folders
            .into_iter()
            .filter_map(|folder| self.at.get(&(below.id, folder)).copied());
        attached.next().filter(|it| it.id != above.id)
    }
}

fn parse_line(line: &[u8], number: usize, namespace: usize) -> Result<Mount, MountsError> {
    let line = escape(line);
    let info = MountInfo::from_line(&line).map_err(|source| MountsError::Line {
        number,
        line: line.clone(),
        source,
    })?;
    let dev = info.majmin.parse().map_err(|()| MountsError::Device {
        number,
        value: info.majmin.clone(),
    })?;
    Ok(Mount {
        namespace,
        id: info.mnt_id.unsigned_abs().into(),
        parent: info.pid.unsigned_abs().into(),
        dev,
        root: unescape(info.root.as_bytes()).into(),
        path: unescape(info.mount_point.as_os_str().as_bytes()).into(),
        fs_type: info.fs_type,
        source: info.mount_source.map(|s| unescape(s.as_bytes())),
        writable: info.super_options.contains_key("rw"),
        for_writing: info.mount_options.contains_key("rw"),
        walkable: true,
        layers: None,
        hidden: false,
        was_at: None,
        options: info
            .super_options
            .into_iter()
            .map(|(name, value)| (name, unescape(value.unwrap_or_default().as_bytes())))
            .collect(),
        alike: Vec::new(),
    })
}

/// Turns bytes outside ASCII into the octal escapes that the kernel uses for blanks, so that names
/// in any encoding pass through the parser, which wants UTF-8.
pub fn escape(line: &[u8]) -> String {
    let mut out = String::with_capacity(line.len());
    for &b in line {
        if b.is_ascii() {
            out.push(b.into());
        } else {
            out.push_str(&format!("\\{b:03o}"));
        }
    }
    out
}

/// Undoes octal escapes (`\040` for a blank); a backslash before anything else stands for itself.
pub fn unescape(mut text: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(text.len());
    while let Some((&first, rest)) = text.split_first() {
        text = rest;
        if first == b'\\' {
            if let [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] = rest {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                text = tail;
                continue;
            }
        }
        out.push(first);
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw,errors=remount-ro\n\
40 22 8:17 / /mnt/a\\040b\\012c\\134d rw shared:9 master:2 - xfs /dev/sdb1 rw,attr2\n\
41 22 8:17 /sub /ro ro,relatime - xfs /dev/sdb1 rw,attr2\n\
42 22 0:50 / /tmp/l\xe9 rw - tmpfs none rw\n";

    #[test]
    fn escapes_and_other_encodings_become_the_real_path() {
        let mounts = parse(TABLE, 0).unwrap();
        assert_eq!(mounts[1].path, Path::new("/mnt/a b\nc\\d"));
        assert_eq!(mounts[3].path.as_os_str().as_bytes(), b"/tmp/l\xe9");
        assert_eq!(mounts[3].source, None);
    }

    #[test]
    fn a_read_only_bind_mount_of_a_writable_superblock_is_writable() {
        let mounts = parse(TABLE, 3).unwrap();
        assert_eq!(mounts[2].path, Path::new("/ro"));
        assert!(mounts[2].writable);
        assert_eq!(mounts[2].namespace, 3);
        assert_eq!(mounts[2].dev.to_string(), "8:17");
        assert!(!mounts[2].for_writing && mounts[1].for_writing);
    }

    #[test]
    fn options_of_the_superblock_have_their_values() {
        let table =
            b"1 0 0:9 / /o rw - overlay o rw,lowerdir=/l,upperdir=/u\\040\\134\\054v,volatile\n";
        let overlay = &parse(table, 0).unwrap()[0];
        assert_eq!(overlay.option("upperdir"), Some(OsStr::new("/u \\,v")));
        assert_eq!(overlay.option("volatile"), Some(OsStr::new("")));
        assert_eq!(overlay.option("workdir"), None);
    }

    #[test]
    fn what_is_below_a_program_or_another_machine_is_not_walked_to() {
        let table = b"\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 0:30 / /run rw - tmpfs tmpfs rw
3 2 0:31 / /run/user/doc rw - fuse.portal portal rw
4 3 8:2 / /run/user/doc/disk rw - ext4 /dev/sda2 rw
5 4 8:3 / /run/user/doc/disk/deep rw - xfs /dev/sda3 rw
6 1 0:32 / /home rw - nfs4 server:/home rw
7 6 8:4 / /home/local rw - xfs /dev/sda4 rw
8 2 8:5 / /run/plain rw - xfs /dev/sda5 rw
9 1 8:6 / /ntfs rw - fuseblk /dev/sda6 rw
10 9 8:7 / /ntfs/in rw - xfs /dev/sda7 rw
11 1 8:8 / /named rw - fuseblk.ntfs /dev/sda8 rw
12 11 8:9 / /named/in rw - xfs /dev/sda9 rw
";
        let mounts = parse(table, 0).unwrap();
        let not: Vec<u64> = mounts
            .iter()
            .filter(|m| !m.walkable)
            .map(|m| m.id)
            .collect();
        assert_eq!(not, [4, 5, 7, 10, 12]);
    }

    #[test]
    fn below_layers_each_look_up_asks_those_save_where_they_are_the_own_root() {
        let table = b"\
1 0 0:30 / / rw - overlay overlay rw,lowerdir=/l
2 1 8:1 / /data rw - ext4 /dev/sda1 rw
3 1 0:31 / /merged rw - overlay overlay rw,lowerdir=/l
4 3 0:32 / /merged/run rw - tmpfs tmpfs rw
5 4 8:2 / /merged/run/disk rw - ext4 /dev/sda2 rw
6 3 0:33 / /merged/fuse rw - fuse.portal portal rw
7 6 8:3 / /merged/fuse/disk rw - ext4 /dev/sda3 rw
";
        let found = |namespace| {
            let mounts = parse(table, namespace).unwrap();
            let disks = mounts.into_iter().filter(|m| m.fs_type == "ext4");
            let way = |m: Mount| (m.walkable, m.layers.map(|dev| dev.to_string()));
            disks.map(way).collect::<Vec<_>>()
        };
        let layers = |dev: &str| (false, Some(dev.to_owned()));
        assert_eq!(found(0), [(true, None), layers("0:31"), (false, None)]);
        // Of another namespace the root is not what everything here goes through.
        let other = [layers("0:30"), layers("0:31"), (false, None)];
        assert_eq!(found(1), other);
    }

    #[test]
    fn what_a_program_serves_may_be_called_after_it() {
        assert!(is_served("fuseblk") && is_served("fuseblk.exfat-fuse"));
        assert!(is_served("fuse.sshfs") && is_served("fuse"));
        assert!(!is_served("fuseblkx") && !is_served("fusectl") && !is_served("ntfs3"));
    }

    #[test]
    fn what_a_program_serves_may_be_from_a_device_by_its_name() {
        let table = b"\
1 0 0:31 / /a rw - fuse.fuse2fs /dev/sdb1 rw,user_id=0
2 0 0:32 / /b rw - fuse /dev/fuse rw,user_id=0
3 0 0:33 / /c rw - fuse.sshfs host:/dev/sdb1 rw,user_id=0
4 0 8:17 / /d rw - fuseblk /dev/sdb1 rw,user_id=0
5 0 0:34 / /e rw - fusectl /dev/sdb1 rw
6 0 0:35 / /f rw - fuse.fuse2fs /dev/sdb1 rw,user_id=1000
7 0 0:36 / /g rw - fuse.fuse2fs /dev/../mnt/dead rw,user_id=0
";
        let may_be = |namespace| -> Vec<bool> {
            let mounts = parse(table, namespace).unwrap();
            mounts.iter().map(Mount::may_be_from_a_device).collect()
        };
        assert_eq!(may_be(0), [true, false, false, false, false, false, false]);
        // Root there may be anybody here.
        assert_eq!(may_be(1), [false; 7]);
    }

    #[test]
    fn what_lies_over_the_way_is_found_from_the_root_on() {
        let line = |id: u64, parent: u64, dev: &str, path: &str| {
            format!("{id} {parent} {dev} / {path} rw - ext4 /dev/x rw\n")
        };
        let text = [
            line(1, 0, "8:1", "/"),
            line(2, 1, "8:2", "/a/b"),
            // Over the place itself, over the folder above it, and one that is in nobody's way.
            line(3, 2, "0:3", "/a/b"),
            line(4, 1, "0:4", "/a"),
            line(5, 1, "0:5", "/ab"),
        ];
        let table = parse(text.concat().as_bytes(), 0).unwrap();
        let cover_of = |table: &[Mount]| Attached::new(table).cover(&table[1]).map(|m| m.id);
        assert_eq!(cover_of(&table), Some(4));
        let rest: Vec<Mount> = table.iter().filter(|m| m.id != 4).cloned().collect();
        assert_eq!(cover_of(&rest), Some(3));
        let rest: Vec<Mount> = rest.into_iter().filter(|m| m.id != 3).collect();
        assert_eq!(cover_of(&rest), None);
        let hidden: Vec<bool> = table.iter().map(|m| m.hidden).collect();
        assert_eq!(hidden, [false, true, true, false, false]);
    }

    #[test]
    fn a_circle_of_mounts_ends() {
        let line = |id, parent| format!("{id} {parent} 8:1 / /x rw - ext4 /dev/sda1 rw\n");
        let table = parse([line(7, 8), line(8, 7)].concat().as_bytes(), 0).unwrap();
        let attached = Attached::new(&table);
        let chain: Vec<u64> = attached.chain(&table[0]).iter().map(|it| it.id).collect();
        assert_eq!(chain, [7, 8]);
    }

    /// By default the kernel lets a namespace have so many mounts, and anybody have one.
    const MOST: u64 = 100_000;

    /// One step for each pair would take hours; a machine that is busy elsewhere takes minutes for this.
    #[test]
    fn a_stack_as_high_as_anybody_can_make_it_costs_no_more_for_each() {
        let line = |id: u64| {
            let parent = id - 1;
            format!("{id} {parent} 8:1 /home/me/a /home/me/a rw - ext4 /dev/sda1 rw\n")
        };
        let root = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n".to_owned();
        let text: String = std::iter::once(root).chain((2..=MOST).map(line)).collect();
        let mut table = parse(text.as_bytes(), 1).unwrap();
        let shown: Vec<u64> = table.iter().filter(|m| !m.hidden).map(|m| m.id).collect();
        assert_eq!(shown, [1, MOST]);
        assert!(table.iter().all(|m| m.walkable));
        // The same with a program at its foot.
        table[1].fs_type = "fuse".to_owned();
        find_ways(&mut table);
        assert_eq!(table.iter().filter(|m| m.walkable).count(), 2);
        let attached = Attached::new(&table);
        assert_eq!(attached.cover(&table[1]).map(|m| m.id), Some(3));
        assert!(attached.cover(&table[table.len() - 1]).is_none());
    }

    #[test]
    fn of_those_that_are_alike_in_another_namespace_a_few_are_kept() {
        let line = |id: u64| {
            let (access, folder) = (
                ["rw", "ro"][id as usize % 2],
                ["", "me"][id as usize / 2 % 2],
            );
            format!("{id} 1 8:1 /{folder} /m{id} {access} - ext4 /dev/sda1 rw\n")
        };
        let text: String = (2..102).map(line).collect();
        let other = "200 1 8:2 / /other rw - xfs /dev/sda2 rw\n201 1 0:9 / /t rw - tmpfs t rw\n";
        let kept = of_interest(parse((text + other).as_bytes(), 1).unwrap());
        assert_eq!(kept.len(), 4 * ENOUGH + 1);
        let mut ids: Vec<u64> = kept.iter().flat_map(Mount::ids).collect();
        ids.sort_unstable();
        assert_eq!(ids, (2..102).chain([200]).collect::<Vec<_>>());
    }

    #[test]
    fn a_folder_is_not_the_whole_and_a_subvolume_is() {
        let table = b"\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:1 /srv /bind rw - ext4 /dev/sda1 rw
3 1 0:40 /@home /home rw - btrfs /dev/sdb rw,subvolid=256,subvol=/@home
4 1 0:40 /@home/me /me rw - btrfs /dev/sdb rw,subvolid=256,subvol=/@home
5 1 0:40 / /top rw - btrfs /dev/sdb rw,subvolid=5,subvol=/
";
        let mounts = parse(table, 0).unwrap();
        let whole: Vec<bool> = mounts.iter().map(Mount::is_whole).collect();
        assert_eq!(whole, [true, false, true, false, true]);
        let home = Some(Path::new("/@home"));
        let subvolumes: Vec<_> = mounts.iter().map(Mount::subvolume).collect();
        assert_eq!(subvolumes, [None, None, home, home, None]);
    }

    #[test]
    fn a_malformed_line_is_an_error_that_names_it() {
        let error = parse(b"22 1 259:2 / / rw\n", 0).unwrap_err();
        assert!(error.to_string().contains("line 1"), "{error}");
        let error = parse(b"22 1 x / / rw - ext4 /dev/a rw\n", 0).unwrap_err();
        assert!(error.to_string().contains("device number: x"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn what_is_hidden_has_a_cover(
            all in proptest::collection::vec((0..9_usize, "(/[ab]){0,3}"), 1..9),
        ) {
            // Each is attached somewhere below one that was there before.
            let mut paths = vec!["/".to_owned()];
            let mut text = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n".to_owned();
            for (parent, folder) in all {
                let parent = parent % paths.len();
                let (id, on) = (paths.len() + 1, parent + 1);
                let path = format!("{}{folder}", paths[parent].trim_end_matches('/'));
                let path = if path.is_empty() { "/".to_owned() } else { path };
                text += &format!("{id} {on} 8:1 / {path} rw - ext4 /dev/sda1 rw\n");
                paths.push(path);
            }
            let table = parse(text.as_bytes(), 0).unwrap();
            let attached = Attached::new(&table);
            for mount in &table {
                proptest::prop_assert_eq!(mount.hidden, attached.cover(mount).is_some(), "{:?}", mount);
            }
        }

        #[test]
        fn no_input_panics(text in proptest::collection::vec(0u8.., 0..200)) {
            let _ = parse(&text, 0);
        }

        #[test]
        fn unescape_undoes_what_the_kernel_does(name in proptest::collection::vec(0u8.., 0..40)) {
            let mangled: Vec<u8> = name.iter().flat_map(|b| match b {
                b' ' | b'\t' | b'\n' | b'\\' | b'#' => format!("\\{b:03o}").into_bytes(),
                _ => vec![*b],
            }).collect();
            let found = unescape(escape(&mangled).as_bytes());
            proptest::prop_assert_eq!(found.as_bytes(), &name);
        }
    }
}
