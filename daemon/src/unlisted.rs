// SPDX-License-Identifier: GPL-2.0-only

//! Superblocks that neither a mount table nor sysfs shows: FAT, exFAT, NTFS, JFS and others that were
//! unmounted lazily and are in use still, be it by a working directory, a mapping, a swap file or a loop
//! device alone, or that are mounted where no namespace is found. The kernel says of a block device
//! whether a superblock is on it when it is asked for its quotas: it looks for that first, whether or not it
//! has any.
//!
//! It only asks of devices on which none is known. What that may wait for is a superblock that is just
//! being unmounted, on a slow disk for long; so it is asked aside, and there is a limit.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::apart::{Lot, Questions};
use crate::mounts::{is_served, DevId};
use crate::superblocks::{self, Superblock};
use crate::sys;

/// How long the kernel may take to answer for one device.
const PATIENCE: Duration = Duration::from_secs(5);
/// The type of one that nobody can reach.
const UNKNOWN: &str = "?";
/// Why, if it does not answer.
const LOCKED: &str = "the kernel has it locked, as while it is being unmounted";
/// Why, if it does.
pub const UNREACHED: &str = "it cannot be mounted once more as anything that the kernel knows";

/// A superblock by its type, or why nobody can reach it.
type Found = Result<String, &'static str>;

/// A block device.
#[derive(Clone, Debug)]
struct Device {
    dev: DevId,
    /// The kernel's name.
    name: String,
    node: PathBuf,
}

/// Those on the block devices here, but for these. Nothing where the kernel knows no quotas.
pub fn find(shown: &BTreeSet<DevId>) -> Vec<Superblock> {
    if !sys::tells_superblocks() {
        return Vec::new();
    }
    let left = devices().filter(|it| !shown.contains(&it.dev));
    find_with(left, PATIENCE, type_on)
}

/// Those of `left` with a superblock, of which `ask` has the type; of one that does not answer in time it is not
/// known, and such are waited for together.
fn find_with(
    left: impl Iterator<Item = Device>,
    patience: Duration,
    ask: fn(&Device) -> Option<Found>,
) -> Vec<Superblock> {
    static ASKED: Questions<DevId> = Questions::new();
    let left: Arc<[Device]> = left.collect();
    let lot = Lot {
        abouts: left.iter().map(|it| it.dev).collect(),
        fds: Vec::new(),
    };
    let asked = Arc::clone(&left);
    let question = move |number: usize, _: &[OwnedFd]| asked.get(number).and_then(ask);
    let mut types = BTreeMap::new();
    ASKED.ask_all(vec![lot], patience, question, |number, answer| {
        types.insert(number, answer.unwrap_or(Some(Err(LOCKED))));
    });
    let superblock = |(device, found): (&Device, Option<Found>)| {
        let found = found?;
        Some(Superblock {
            unreachable: found.as_ref().err().map(|it| (*it).to_owned()),
            fs_type: found.unwrap_or_else(|_| UNKNOWN.into()),
            name: device.name.clone(),
            devices: vec![device.dev],
            listed: None,
        })
    };
    let each = left.iter().zip(types.into_values());
    each.filter_map(superblock).collect()
}

fn devices() -> impl Iterator<Item = Device> {
    let all = fs::read_dir("/sys/class/block").into_iter().flatten();
    all.flatten().filter_map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        let node = Path::new("/dev").join(name.replace('!', "/"));
        let found = fs::metadata(&node).ok()?;
        let dev = DevId::from_raw(found.rdev());
        let is_it = found.file_type().is_block_device();
        is_it.then_some(Device { dev, name, node })
    })
}

/// Whether a superblock is on the device with this node, where the kernel [tells](sys::tells_superblocks).
pub fn is_alive(node: &Path) -> bool {
    let node = CString::new(node.as_os_str().as_bytes());
    node.is_ok_and(|it| sys::has_superblock(&it))
}

/// The type of the superblock on this device, if there is one. Those that sysfs lists are found there.
fn type_on(device: &Device) -> Option<Found> {
    let node = CString::new(device.node.as_os_str().as_bytes()).ok()?;
    let text = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let listed = superblocks::types();
    // Of those that need no block device the line begins with "nodev".
    let types = text.lines().filter_map(|line| line.strip_prefix('\t'));
    let types = types.filter(|it| !is_served(it) && !listed.contains(*it));
    let mount = |fs_type: &str, read_only| {
        let fs_type = CString::new(fs_type)?;
        sys::mount_detached(&fs_type, &node, read_only)
    };
    type_with(types, || is_alive(&device.node), mount)
}

/// The type of one, as far as it is alive: the one as which it can be mounted once more.
fn type_with<'a, T>(
    types: impl IntoIterator<Item = &'a str>,
    is_alive: impl Fn() -> bool,
    mount: impl FnMut(&str, bool) -> io::Result<T>,
) -> Option<Found> {
    if !is_alive() {
        return None;
    }
    match mount_once_more(types, mount) {
        Ok((fs_type, _)) => Some(Ok(fs_type.to_owned())),
        // It may have gone meanwhile.
        Err(_) => is_alive().then_some(Err(UNREACHED)),
    }
}

/// Mounts a superblock that is alive once more, as the first of these types that it can be, and says which. The kernel
/// may have let go of it by then, and does so in earnest: so read-only, which changes none that is alive, and for writing
/// only where it says that this one is. btrfs would make a read-only one writable where it is asked for a writable mount.
pub fn mount_once_more<'a, T>(
    types: impl IntoIterator<Item = &'a str>,
    mut mount: impl FnMut(&str, bool) -> io::Result<T>,
) -> io::Result<(&'a str, T)> {
    let mut refused = io::Error::from_raw_os_error(libc::ENODEV);
    for fs_type in types {
        let mounted = mount(fs_type, true).or_else(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => mount(fs_type, false),
            _ => Err(error),
        });
        match mounted {
            Ok(it) => return Ok((fs_type, it)),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::time::Instant;

    #[test]
    fn those_that_hang_are_named_and_waited_for_together_and_keep_nobody_from_asking_for_the_others(
    ) {
        static HANGS: Barrier = Barrier::new(5);
        const PATIENCE: Duration = Duration::from_millis(500);
        let device = |minor| Device {
            dev: DevId { major: 8, minor },
            name: format!("sda{minor}"),
            node: PathBuf::new(),
        };
        let ask = |device: &Device| {
            if device.dev.minor % 2 == 0 {
                HANGS.wait();
            }
            (device.dev.minor != 3).then(|| Ok("vfat".to_owned()))
        };
        let find = |patience| {
            let found = find_with((1..=8).map(device), patience, ask);
            let words = found
                .iter()
                .map(|it| format!("{} {}", it.name, it.fs_type))
                .collect::<BTreeSet<_>>();
            words.into_iter().collect::<Vec<_>>()
        };
        let expected = [
            "sda1 vfat",
            "sda2 ?",
            "sda4 ?",
            "sda5 vfat",
            "sda6 ?",
            "sda7 vfat",
            "sda8 ?",
        ];
        let begin = Instant::now();
        assert_eq!(find(PATIENCE), expected);
        assert!(begin.elapsed() < PATIENCE * 3, "{:?}", begin.elapsed());
        // Nobody waits for them again.
        assert_eq!(find(Duration::from_secs(60)), expected);
        HANGS.wait();
    }

    #[test]
    fn for_writing_it_is_mounted_only_where_it_is_known_to_be_so() {
        let found = |is_alive: &[bool], busy: &str, is_writable: bool| {
            let mut asked = is_alive.iter();
            let asked = std::cell::RefCell::new(&mut asked);
            let is_alive = || *asked.borrow_mut().next().unwrap();
            let mut tried = Vec::new();
            let found = type_with(["msdos", "vfat"], is_alive, |fs_type, read_only| {
                tried.push(format!("{fs_type} {}", if read_only { "ro" } else { "rw" }));
                let errno = if fs_type == busy {
                    libc::EBUSY
                } else {
                    libc::EINVAL
                };
                let is_it = fs_type == busy && !read_only && is_writable;
                is_it
                    .then_some(())
                    .ok_or(io::Error::from_raw_os_error(errno))
            });
            (found, tried.join(", "))
        };
        let said = |found, tried: &str| (found, tried.to_owned());
        assert_eq!(found(&[false], "vfat", true), said(None, ""));
        let vfat = Some(Ok("vfat".to_owned()));
        assert_eq!(
            found(&[true], "vfat", true),
            said(vfat, "msdos ro, vfat ro, vfat rw")
        );
        let none = "msdos ro, vfat ro";
        assert_eq!(
            found(&[true, true], "", true),
            said(Some(Err(UNREACHED)), none)
        );
        assert_eq!(
            found(&[true, false], "", true),
            said(None, none),
            "it has gone"
        );
        let refused = "msdos ro, msdos rw, vfat ro";
        assert_eq!(
            found(&[true, true], "msdos", false),
            said(Some(Err(UNREACHED)), refused)
        );
    }

    #[test]
    fn what_is_no_device_has_no_superblock() {
        assert!(!is_alive(Path::new("/")));
        assert!(!is_alive(Path::new("/dev/null")));
    }
}
