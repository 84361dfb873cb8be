// SPDX-License-Identifier: GPL-2.0-only

//! What lies between file systems and disks and copies data from one disk to another by itself: no freeze
//! holds it back. A copy of one disk from before and of another from after does not fit together then, if
//! the host does not take both at the same moment.
//!
//! md says what it is at (`sync_action`, `Documentation/admin-guide/md.rst`), bcache whether it has
//! something to write back (`state`, `Documentation/admin-guide/bcache.rst`), and LVM calls the volume by
//! which it moves extents `pvmove` and a number. Of caches and RAID of the device mapper only an ioctl
//! would tell; those are not looked at.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::mounts::DevId;
use crate::superblocks::folder_of;
use crate::topology::{lowest_below, slaves};

/// The devices that may be at such a thing, by their folders in sysfs.
#[derive(Debug, Default)]
pub struct Layers(Vec<PathBuf>);

impl Layers {
    /// Those below these devices, themselves among them, as far as they stand on more than one disk.
    pub fn below<'a>(devices: impl IntoIterator<Item = &'a DevId>) -> Self {
        let mut todo: Vec<DevId> = devices.into_iter().copied().collect();
        let mut seen = BTreeSet::new();
        let mut layers = Vec::new();
        while let Some(dev) = todo.pop() {
            if !seen.insert(dev) {
                continue;
            }
            let Some(folder) = folder_of(dev) else {
                continue;
            };
            let lower = slaves(&folder);
            if !lower.is_empty() && lowest_below(dev).len() > 1 {
                layers.push(folder);
            }
            todo.extend(lower);
        }
        Layers(layers)
    }

    /// Those that are at it now, and at what.
    pub fn at_work(&self) -> BTreeSet<String> {
        let words = self.0.iter().filter_map(|folder| {
            let name = folder.file_name()?.to_string_lossy();
            Some(format!("{name} ({})", at_work(folder)?))
        });
        words.collect()
    }
}

/// What the device with this folder copies by itself, if anything.
fn at_work(folder: &Path) -> Option<String> {
    let read = |name: &str| {
        let text = fs::read_to_string(folder.join(name)).ok()?;
        Some(text.trim().to_owned())
    };
    // "check" reads only; "repair" writes what it finds wrong.
    let md = read("md/sync_action")
        .filter(|it| matches!(it.as_str(), "resync" | "recover" | "reshape" | "repair"));
    let bcache = || {
        let dirty = read("bcache/state").filter(|it| it == "dirty");
        dirty.map(|_| "write-back".to_owned())
    };
    let lvm = || {
        let name = read("dm/name")?;
        let (_, volume) = name.rsplit_once('-')?;
        let number = volume.strip_prefix("pvmove")?;
        let is_its = read("dm/uuid")?.starts_with("LVM-") && number.parse::<u32>().is_ok();
        is_its.then(|| "pvmove".to_owned())
    };
    md.or_else(bcache).or_else(lvm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_says_what_it_is_at() {
        let root = std::env::temp_dir().join(format!("hv-vss-moving-{}", std::process::id()));
        let put = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        };
        put("md0/md/sync_action", "resync");
        put("md1/md/sync_action", "idle");
        put("md2/md/sync_action", "check");
        put("bcache0/bcache/state", "dirty");
        put("bcache1/bcache/state", "clean");
        put("dm-0/dm/name", "vg-pvmove0");
        put("dm-0/dm/uuid", "LVM-abc");
        put("dm-1/dm/name", "vg-pvmove0");
        put("dm-1/dm/uuid", "");
        put("dm-2/dm/name", "vg-pvmoves");
        put("dm-2/dm/uuid", "LVM-abc");
        put("sda/size", "8");
        let names = [
            "md0", "md1", "md2", "bcache0", "bcache1", "dm-0", "dm-1", "dm-2", "sda",
        ];
        let layers = Layers(names.map(|it| root.join(it)).to_vec());
        let seen: Vec<String> = layers.at_work().into_iter().collect();
        assert_eq!(
            seen,
            ["bcache0 (write-back)", "dm-0 (pvmove)", "md0 (resync)"]
        );
        fs::remove_dir_all(&root).unwrap();
    }
}
