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
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::apart::{Lot, Questions};
use crate::mounts::{is_served, DevId};
use crate::superblocks::Superblock;
use crate::sys;

/// How long the kernel may take to answer for one device.
const PATIENCE: Duration = Duration::from_secs(5);
/// The type of one that it does not answer for.
pub const UNKNOWN: &str = "?";

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

/// Those of `left` with a superblock, of the type that `ask` has for it; of one that does not answer in time
/// it is not known, and such are waited for together.
fn find_with(
    left: impl Iterator<Item = Device>,
    patience: Duration,
    ask: fn(&Device) -> Option<String>,
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
        types.insert(number, answer.unwrap_or_else(|_| Some(UNKNOWN.into())));
    });
    let superblock = |(device, fs_type): (&Device, Option<String>)| {
        Some(Superblock {
            fs_type: fs_type?,
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

/// The type of the superblock on this device: the one as which it can be mounted once more. With none it
/// cannot be reached, or the device is the second one of another, of which is known.
fn type_on(device: &Device) -> Option<String> {
    if !is_alive(&device.node) {
        return None;
    }
    let node = CString::new(device.node.as_os_str().as_bytes()).ok()?;
    let text = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    // Of those that need no block device the line begins with "nodev".
    let mut types = text.lines().filter_map(|line| line.strip_prefix('\t'));
    let is_it = types.find(|it| {
        let fs_type = CString::new(*it).ok().filter(|_| !is_served(it));
        // Read-only first: that never changes a superblock that is alive.
        fs_type.is_some_and(|it| {
            let mut ways = [true, false].into_iter();
            ways.any(|read_only| sys::mount_detached(&it, &node, read_only).is_ok())
        })
    });
    is_it.map(str::to_owned)
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
            (device.dev.minor != 3).then(|| "vfat".to_owned())
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
    fn what_is_no_device_has_no_superblock() {
        assert!(!is_alive(Path::new("/")));
        assert!(!is_alive(Path::new("/dev/null")));
    }
}
