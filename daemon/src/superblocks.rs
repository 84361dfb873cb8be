// SPDX-License-Identifier: GPL-2.0-only

//! The superblocks that the kernel lists in `/sys/fs`, whether or not any mount table shows them.
//!
//! A file system that was unmounted lazily while somebody used it, or that is mounted where no
//! namespace is, is written to all the same. Those types that can be frozen nearly all say there which
//! of them are alive: by the kernel's name of the device, or with a list of the devices. It only reads
//! sysfs and reaches no file system.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, DirEntry, File};
use std::io::{self, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::mounts::DevId;
use crate::sys;

/// Where they are listed.
const ROOT: &str = "/sys/fs";

/// One that is alive, or something else in its type's folder.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Entry {
    /// The folder: the type, or of `ext2` and `ext3` the driver, `ext4`.
    pub fs_type: String,
    /// The device, or a UUID.
    pub name: String,
    /// The number of its folder, which no other gets: it is greater than those of all that were there before
    /// (`kernfs_new_node`).
    pub inode: u64,
}

/// A superblock that is alive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Its type, as far as [`Entry::fs_type`] has it.
    pub fs_type: String,
    /// The device, or a UUID.
    pub name: String,
    /// The devices that it is on. Never empty.
    pub devices: Vec<DevId>,
    /// Where sysfs lists it, if it does.
    pub listed: Option<Entry>,
    /// Why nobody can reach it, if that is so.
    pub unreachable: Option<String>,
}

/// What is never written to, and listed all the same: that one comes is no news, and containers have many.
const NEVER_WRITTEN: &str = "erofs";

/// The types that need a block device, can be written to and have a folder there.
pub fn types() -> BTreeSet<String> {
    let text = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let mut types = types_in(&text);
    types.retain(|name| Path::new(ROOT).join(name).exists());
    types
}

/// Those of them that the kernel knows by this text, whether or not they have a folder.
fn types_in(filesystems: &str) -> BTreeSet<String> {
    // Of those that need no device the line begins with "nodev".
    let names = filesystems
        .lines()
        .filter_map(|line| line.strip_prefix('\t'));
    let written = names.filter(|name| *name != NEVER_WRITTEN);
    written.map(str::to_owned).collect()
}

/// The folders of all types, open: whether one has come or gone can be told from them even while the
/// root is frozen, since nothing is looked up.
pub struct Lists {
    root: File,
    /// How many folders that had when they were opened: a type that is new has a new one, and hardly any
    /// ever goes.
    types: u64,
    lists: Vec<File>,
}

/// What was listed at some time. Two that are equal list the same superblocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed(Vec<u8>);

impl Listed {
    /// The names of those that were not there before: the device, or a UUID.
    pub fn since(&self, before: &Listed) -> Vec<String> {
        let then: BTreeSet<(u64, &[u8])> = before.folders().collect();
        let new = self.folders().filter(|it| !then.contains(it));
        new.map(|(_, name)| String::from_utf8_lossy(name).into_owned())
            .collect()
    }

    /// Whether there may be one that was not there before. One that has gone is no news; nobody tells where
    /// one of the two is missing.
    pub fn has_news(before: Option<&Listed>, now: Option<&Listed>) -> bool {
        match (before, now) {
            (Some(before), Some(now)) => !now.since(before).is_empty(),
            (before, now) => before.is_some() != now.is_some(),
        }
    }

    /// Number and name of each folder that is listed.
    /// Whether there is one of a kind that may have several devices: those are listed by their UUID.
    pub fn may_have_members(&self) -> bool {
        let is_uuid =
            |name: &[u8]| name.len() == 36 && name.iter().filter(|b| **b == b'-').count() == 4;
        self.folders().any(|(_, name)| is_uuid(name))
    }

    fn folders(&self) -> impl Iterator<Item = (u64, &[u8])> {
        // `struct linux_dirent64`: d_ino, d_off, d_reclen, d_type, and the name up to a zero.
        let mut rest = self.0.as_slice();
        std::iter::from_fn(move || {
            let inode = u64::from_ne_bytes(rest.get(..8)?.try_into().ok()?);
            let len = u16::from_ne_bytes(rest.get(16..18)?.try_into().ok()?);
            let name = rest.get(19..usize::from(len))?.split(|&b| b == 0).next()?;
            rest = rest.get(usize::from(len)..)?;
            Some((inode, name))
        })
    }
}

impl Lists {
    /// Opens the folders of all types that are there.
    pub fn open() -> io::Result<Self> {
        let root = File::open(ROOT)?;
        // One whose type is gone by now lists nothing.
        let folder = |name: String| File::open(Path::new(ROOT).join(name)).ok();
        Ok(Lists {
            types: root.metadata()?.nlink(),
            root,
            lists: types().into_iter().filter_map(folder).collect(),
        })
    }

    /// Has [`Lists::read`] begin at the beginning. It is apart because that counts while writers wait.
    pub fn rewind(&self) -> io::Result<()> {
        let mut lists = self.lists.iter();
        lists.try_for_each(|mut list| list.rewind())
    }

    /// What they list now, after [`Lists::rewind`]. `None` where there are more types by now.
    pub fn read(&self) -> io::Result<Option<Listed>> {
        if self.root.metadata()?.nlink() != self.types {
            return Ok(None);
        }
        let mut all = Vec::with_capacity(4096);
        for list in &self.lists {
            sys::list_folder(list.as_fd(), &mut all)?;
        }
        Ok(Some(Listed(all)))
    }
}

/// The devices of those that may have several, by the names of both: one that is added to a superblock changes
/// nothing else.
pub fn members() -> BTreeSet<(OsString, OsString)> {
    // In a folder of their own, and among what else there is of it.
    let kinds = [("btrfs", "devices", ""), ("bcachefs", "", "dev-")];
    let mut found = BTreeSet::new();
    for (fs_type, folder, prefix) in kinds {
        for superblock in list(&Path::new(ROOT).join(fs_type)) {
            let names = list(&superblock.path().join(folder)).map(|it| it.file_name());
            let names = names.filter(|it| it.as_encoded_bytes().starts_with(prefix.as_bytes()));
            found.extend(names.map(|it| (superblock.file_name(), it)));
        }
    }
    found
}

/// What the folders of these types hold. One that does not exist holds nothing.
pub fn entries(types: &BTreeSet<String>) -> io::Result<BTreeSet<Entry>> {
    let mut found = BTreeSet::new();
    for fs_type in types {
        let folder = match fs::read_dir(Path::new(ROOT).join(fs_type)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        for entry in folder {
            let entry = entry?;
            found.insert(Entry {
                fs_type: fs_type.clone(),
                name: entry.file_name().to_string_lossy().into_owned(),
                inode: entry.ino(),
            });
        }
    }
    Ok(found)
}

/// Those of `entries` that are superblocks, with their devices.
pub fn of(entries: &BTreeSet<Entry>) -> Vec<Superblock> {
    let superblock = |entry: &Entry| {
        let devices = devices_of(entry);
        (!devices.is_empty()).then(|| Superblock {
            fs_type: entry.fs_type.clone(),
            name: entry.name.clone(),
            devices,
            listed: Some(entry.clone()),
            unreachable: None,
        })
    };
    entries.iter().filter_map(superblock).collect()
}

/// The device that it is named after, or those that its folder lists: btrfs in `devices/NAME`,
/// bcachefs in `dev-NUMBER/block`.
pub fn devices_of(entry: &Entry) -> Vec<DevId> {
    let by_name = Path::new("/sys/class/block").join(&entry.name);
    if let Some(dev) = dev_in(&by_name) {
        return vec![dev];
    }
    let folder = folder_for(entry);
    let is_member = |it: &DirEntry| it.file_name().as_encoded_bytes().starts_with(b"dev-");
    let members = list(&folder).filter(is_member);
    let members = members.map(|it| it.path().join("block"));
    let listed = list(&folder.join("devices")).map(|it| it.path());
    let mut devices: Vec<DevId> = listed.chain(members).filter_map(|it| dev_in(&it)).collect();
    devices.sort_unstable();
    devices
}

/// A UUID in the form that everybody writes.
pub fn in_words(uuid: [u8; 16]) -> String {
    let digits: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    let part = |at| digits.get(at).unwrap_or_default();
    [
        part(0..8),
        part(8..12),
        part(12..16),
        part(16..20),
        part(20..32),
    ]
    .join("-")
}

/// Its folder.
pub fn folder_for(entry: &Entry) -> PathBuf {
    Path::new(ROOT).join(&entry.fs_type).join(&entry.name)
}

/// The number in the folder of a block device.
pub fn dev_in(dir: &Path) -> Option<DevId> {
    fs::read_to_string(dir.join("dev")).ok()?.parse().ok()
}

/// Where the folder of the device with this number is, if it exists.
pub fn folder_of(dev: DevId) -> Option<PathBuf> {
    let numbers = Path::new("/sys/dev/block");
    // The link leads to the device's place in the tree, and that place says what it is.
    let place = fs::read_link(numbers.join(dev.to_string())).ok()?;
    Some(numbers.join(place))
}

fn list(dir: &Path) -> impl Iterator<Item = DirEntry> {
    fs::read_dir(dir).into_iter().flatten().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_never_written_to_is_not_listened_for() {
        let text = "nodev\tsysfs\n\text4\n\terofs\nnodev\toverlay\n\tvfat\n";
        let types: Vec<String> = types_in(text).into_iter().collect();
        assert_eq!(types, ["ext4", "vfat"]);
    }

    #[test]
    fn what_has_come_is_told_from_two_listings() {
        let folder = std::env::temp_dir().join(format!("hv_vss-lists-{}", std::process::id()));
        fs::create_dir_all(folder.join("sda1")).unwrap();
        let open = File::open(&folder).unwrap();
        let list = || {
            let mut all = Vec::new();
            (&open).rewind().unwrap();
            sys::list_folder(open.as_fd(), &mut all).unwrap();
            Listed(all)
        };
        let before = list();
        assert_eq!(list(), before);
        fs::create_dir(folder.join("sdb1")).unwrap();
        let after = list();
        assert_ne!(after, before);
        assert_eq!(after.since(&before), ["sdb1"]);
        assert!(!after.may_have_members());
        let uuid = "0c5a7d3e-93f1-4bb2-8a0e-3d8f8f0c1a55";
        fs::create_dir(folder.join(uuid)).unwrap();
        assert!(list().may_have_members());
        fs::remove_dir(folder.join(uuid)).unwrap();
        assert!(before.since(&after).is_empty());
        let has_news = |before, now| Listed::has_news(before, now);
        assert!(has_news(Some(&before), Some(&after)));
        assert!(!has_news(Some(&after), Some(&before)), "one has gone");
        assert!(!has_news(None, None));
        assert!(has_news(Some(&before), None) && has_news(None, Some(&before)));
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_uuid_is_written_as_in_sysfs() {
        let mut uuid = [0; 16];
        (0x10..)
            .zip(&mut uuid)
            .for_each(|(value, byte)| *byte = value);
        assert_eq!(in_words(uuid), "10111213-1415-1617-1819-1a1b1c1d1e1f");
    }
}
