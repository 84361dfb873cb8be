// SPDX-License-Identifier: GPL-2.0-only

//! What lies between file systems and disks and copies data from one disk to another by itself: no freeze
//! holds it back. A copy of one disk from before and of another from after does not fit together then, if
//! the host does not take both at the same moment.
//!
//! md says what it is at (`sync_action`, `Documentation/admin-guide/md.rst`), bcache whether it has
//! something to write back (`state`, `Documentation/admin-guide/bcache.rst`), and LVM calls the volume by
//! which it moves extents `pvmove` and a number. Of caches and RAID of the device mapper only an ioctl
//! would tell; those are not looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::mounts::DevId;
use crate::superblocks::folder_of;
use crate::topology::{all_below, Device};

/// The devices that may be at such a thing. What they say is open, so that no path has to be looked up
/// to hear it again.
#[derive(Debug, Default)]
pub struct Layers(Vec<Layer>);

#[derive(Debug)]
struct Layer {
    /// The kernel's name.
    name: String,
    sign: Sign,
    /// Its cache does not count as what it stands on.
    is_bcache: bool,
    /// Of the devices that were asked for, those that stand on it, itself among them.
    carries: BTreeSet<DevId>,
}

/// By what it is known that something goes on.
#[derive(Debug)]
enum Sign {
    /// One of these words in a file of sysfs.
    Word(File, &'static [&'static str]),
    /// The device exists.
    Presence(&'static str),
}

/// "check" only reads; "repair" writes what it finds wrong.
const MD: &[&str] = &["resync", "recover", "reshape", "repair"];
const BCACHE: &[&str] = &["dirty"];

impl Layers {
    /// Those below these devices, themselves among them, as far as they stand on more than one disk.
    pub fn below<'a>(devices: impl IntoIterator<Item = &'a DevId>) -> Self {
        let devices: BTreeSet<DevId> = devices.into_iter().copied().collect();
        let all = all_below(devices.iter().copied());
        let layers = all.keys().filter_map(|dev| {
            let layer = layer(&folder_of(*dev)?)?;
            let is_lowest = |it: &DevId| all.get(it).is_some_and(|it| it.below.is_empty());
            let lowest = below(&all, *dev).into_iter().filter(is_lowest);
            let stands_on_it = |it: &&DevId| below(&all, **it).contains(dev);
            (layer.is_bcache || lowest.count() > 1).then(|| Layer {
                carries: devices.iter().filter(stands_on_it).copied().collect(),
                ..layer
            })
        });
        Layers(layers.collect())
    }

    /// Those that are at it now, and at what.
    pub fn at_work(&self) -> BTreeSet<String> {
        at_work(self.0.iter())
    }

    /// Those of them below one of these devices, which are of those that were asked for.
    pub fn at_work_below(&self, devices: &BTreeSet<DevId>) -> BTreeSet<String> {
        at_work(self.0.iter().filter(|it| !it.carries.is_disjoint(devices)))
    }

    /// Those of them that have begun since `before` was all. It never waits, though writers do: bcache,
    /// which answers under a lock that it keeps while it waits for disks, is not asked. It begins only with a
    /// write from above, and all there is frozen.
    pub fn begun_below(
        &self,
        devices: &BTreeSet<DevId>,
        before: &BTreeSet<String>,
    ) -> BTreeSet<String> {
        let below = self.0.iter().filter(|it| !it.carries.is_disjoint(devices));
        let now = at_work(below.filter(|it| !it.is_bcache));
        now.difference(before).cloned().collect()
    }
}

fn at_work<'a>(layers: impl Iterator<Item = &'a Layer>) -> BTreeSet<String> {
    let words = layers.filter_map(|layer| {
        let what = match &layer.sign {
            Sign::Presence(what) => (*what).to_owned(),
            Sign::Word(file, words) => word(file).filter(|it| words.contains(&it.as_str()))?,
        };
        Some(format!("{} ({what})", layer.name))
    });
    words.collect()
}

/// This device and all below it, of these.
fn below(all: &BTreeMap<DevId, Device>, dev: DevId) -> BTreeSet<DevId> {
    let (mut found, mut todo) = (BTreeSet::new(), vec![dev]);
    while let Some(next) = todo.pop() {
        if found.insert(next) {
            todo.extend(all.get(&next).into_iter().flat_map(|it| &it.below));
        }
    }
    found
}

/// The device with this folder, if it is of a kind that copies by itself.
fn layer(folder: &Path) -> Option<Layer> {
    let open = |name: &str| File::open(folder.join(name)).ok();
    let name = folder.file_name()?.to_string_lossy();
    // The disk below it has that file, too.
    let is_bcache = name.starts_with("bcache");
    let md = || Some(Sign::Word(open("md/sync_action")?, MD));
    let bcache = || {
        Some(Sign::Word(
            open("bcache/state").filter(|_| is_bcache)?,
            BCACHE,
        ))
    };
    let lvm = || {
        let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
        let name = read("dm/name")?;
        let (_, volume) = name.trim_end().rsplit_once('-')?;
        let number = volume.strip_prefix("pvmove")?;
        let is_its = read("dm/uuid")?.starts_with("LVM-") && number.parse::<u32>().is_ok();
        is_its.then_some(Sign::Presence("pvmove"))
    };
    Some(Layer {
        sign: md().or_else(bcache).or_else(lvm)?,
        is_bcache,
        carries: BTreeSet::new(),
        name: name.into(),
    })
}

fn word(file: &File) -> Option<String> {
    let mut text = [0; 32];
    let read = file.read_at(&mut text, 0).ok()?;
    let text = String::from_utf8_lossy(text.get(..read)?);
    Some(text.trim().to_owned())
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
        put("sda/bcache/state", "dirty");
        let names = [
            "md0", "md1", "md2", "bcache0", "bcache1", "dm-0", "dm-1", "dm-2", "sda",
        ];
        let dev = |minor| DevId { major: 8, minor };
        let layers = names.iter().filter_map(|it| {
            let layer = layer(&root.join(it))?;
            let carries = BTreeSet::from([dev(u32::from(it.starts_with("md")))]);
            Some(Layer { carries, ..layer })
        });
        let layers = Layers(layers.collect());
        let seen = |layers: &Layers| layers.at_work().into_iter().collect::<Vec<_>>();
        assert_eq!(
            seen(&layers),
            ["bcache0 (dirty)", "dm-0 (pvmove)", "md0 (resync)"]
        );
        let of_some = layers.at_work_below(&BTreeSet::from([dev(1)]));
        assert_eq!(of_some, BTreeSet::from(["md0 (resync)".to_owned()]));
        put("md1/md/sync_action", "recover");
        put("md0/md/sync_action", "idle");
        assert_eq!(
            seen(&layers),
            ["bcache0 (dirty)", "dm-0 (pvmove)", "md1 (recover)"]
        );
        // Of those, what was at it before has not begun, and bcache is not asked.
        let before = BTreeSet::from(["dm-0 (pvmove)".to_owned()]);
        let begun = layers.begun_below(&BTreeSet::from([dev(0), dev(1)]), &before);
        assert_eq!(begun, BTreeSet::from(["md1 (recover)".to_owned()]));
        fs::remove_dir_all(&root).unwrap();
    }
}
