// SPDX-License-Identifier: GPL-2.0-only

//! What lies between file systems and disks and copies data from one disk to another by itself: no freeze
//! holds it back. A copy of one disk from before and of another from after does not fit together then, if
//! the host does not take both at the same moment.
//!
//! md says what it is at (`sync_action`, `Documentation/admin-guide/md.rst`) and whether its journal writes back
//! (`journal_mode`, `Documentation/driver-api/md/raid5-cache.rst`), bcache whether it has something to write back
//! (`state`, `Documentation/admin-guide/bcache.rst`), and LVM calls the volume by which it moves extents `pvmove`
//! and a number. Of its caches and RAID only the device mapper tells, which is asked for the status of each target
//! (`Documentation/admin-guide/device-mapper`). A kind of target that is not known to copy nothing may do so.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::uio::pread;

use crate::apart::{Lot, Questions};
use crate::mounts::DevId;
use crate::superblocks::folder_of;
use crate::sys;
use crate::topology::{below, Device};

/// Of whom the device mapper is asked.
pub const MAPPER: &str = "/dev/mapper/control";

/// How long it may take to answer, and how long as writers wait: a moment, as a rule.
const PATIENCE: Duration = Duration::from_secs(1);
const MOMENT: Duration = Duration::from_millis(100);

/// The devices that may be at such a thing. What they say is open, so that no path has to be looked up
/// to hear it again.
#[derive(Debug, Default)]
pub struct Layers(Vec<Layer>);

#[derive(Debug)]
struct Layer {
    /// The kernel's name.
    name: String,
    sign: Sign,
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
    /// It says so, and may have anybody wait for that.
    Asked(Asked, Arc<File>),
}

/// Who is asked of a device, apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    /// The device mapper, by its own node.
    Mapper(DevId),
    /// bcache, by its state: it answers under a lock (`bch_register_lock`) that it keeps while it writes to disks. Its
    /// cache does not count as what it stands on.
    Bcache(DevId),
    /// md, by the mode of its journal, under a lock (`mddev_lock`) that it keeps while it writes to disks.
    Journal(DevId),
}

/// "check" only reads; "repair" writes what it finds wrong.
const MD: &[&str] = &["resync", "recover", "reshape", "repair"];

/// What a journal of RAID is at that answers writes and has them on its own disk only, for as long as it likes. How much
/// that is it does not say.
const WRITE_BACK: &str = "write-back";

/// The kinds of targets that answer a write only when it is on all the disks where it belongs, or copy only as a part of
/// one.
const QUIET: &[&str] = &[
    "crypt",
    "delay",
    "error",
    "flakey",
    "linear",
    "multipath",
    "snapshot",
    "snapshot-origin",
    "striped",
    "switch",
    "thin",
    "thin-pool",
    "unstriped",
    "verity",
    "zero",
];

impl Layers {
    /// Those among `all` devices below these, themselves among them, as far as they stand on more than one disk.
    pub fn of(all: &BTreeMap<DevId, Device>, devices: &BTreeSet<DevId>) -> Self {
        let is_mapped = |folder: &Path| folder.join("dm").exists();
        let mut mapper = None;
        let layers = all.keys().flat_map(|dev| {
            let Some(folder) = folder_of(*dev) else {
                return Vec::new();
            };
            let mut open = || Some(Arc::new(File::open(MAPPER).ok()?));
            let mapped = || {
                mapper = mapper
                    .take()
                    .or_else(|| is_mapped(&folder).then(&mut open)?);
                let asked = mapper.as_ref().filter(|_| is_mapped(&folder))?;
                Some(Sign::Asked(Asked::Mapper(*dev), Arc::clone(asked)))
            };
            let mut layers = layers(*dev, &folder, mapped);
            let is_lowest = |it: &DevId| all.get(it).is_some_and(|it| it.below.is_empty());
            let stands_on_several = || below(all, *dev).into_iter().filter(is_lowest).count() > 1;
            let stands_on_it = |it: &&DevId| below(all, **it).contains(dev);
            layers.retain(|it| it.is_bcache() || stands_on_several());
            for it in &mut layers {
                it.carries = devices.iter().filter(stands_on_it).copied().collect();
            }
            layers
        });
        Layers(layers.collect())
    }

    /// Those that are at it now, and at what.
    pub fn at_work(&self) -> BTreeSet<String> {
        at_work(self.0.iter(), PATIENCE)
    }

    /// Those of them below one of these devices, which are of those that were asked for.
    pub fn at_work_below(&self, devices: &BTreeSet<DevId>) -> BTreeSet<String> {
        let below = self.0.iter().filter(|it| !it.carries.is_disjoint(devices));
        at_work(below, PATIENCE)
    }

    /// Those of them that have begun since `before` was all. It waits no longer than a moment, since writers do:
    /// bcache is not asked, nor a journal. They begin only with a write from above, and all there is frozen.
    pub fn begun_below(
        &self,
        devices: &BTreeSet<DevId>,
        before: &BTreeSet<String>,
    ) -> BTreeSet<String> {
        let below = self.0.iter().filter(|it| !it.carries.is_disjoint(devices));
        let now = at_work(below.filter(|it| !it.begins_with_a_write()), MOMENT);
        now.difference(before).cloned().collect()
    }
}

/// What these do, in words. One that has to be asked, and does not say it within `limit`, may do anything.
fn at_work<'a>(layers: impl Iterator<Item = &'a Layer>, limit: Duration) -> BTreeSet<String> {
    at_work_by(layers, limit, Asked::answer)
}

fn at_work_by<'a>(
    layers: impl Iterator<Item = &'a Layer>,
    limit: Duration,
    answer: impl Fn(Asked, &OwnedFd) -> Copying + Send + Sync + 'static,
) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut asked = Vec::new();
    for layer in layers {
        let what = match &layer.sign {
            Sign::Presence(what) => Some((*what).to_owned()),
            Sign::Word(file, words) => word(file).filter(|it| words.contains(&it.as_str())),
            Sign::Asked(it, file) => {
                asked.push((layer, *it, file));
                None
            }
        };
        found.extend(what.map(|it| layer.copies(&it)));
    }
    let lots = asked.iter().map(|(_, it, file)| Lot {
        abouts: vec![*it],
        fds: vec![file.as_fd()],
    });
    let lots = lots.collect();
    let them: Vec<Asked> = asked.iter().map(|(_, it, _)| *it).collect();
    let ask = move |number: usize, fds: &[OwnedFd]| {
        let (it, fd) = them.get(number).zip(fds.first())?;
        Some(answer(*it, fd))
    };
    static ASKED: Questions<Asked> = Questions::new();
    ASKED.ask_all(lots, limit, ask, |number, said| {
        let said = said.ok().flatten().unwrap_or(Copying::Unknown);
        found.extend(asked.get(number).and_then(|it| it.0.by_answer(said)));
    });
    found
}

impl Layer {
    fn is_bcache(&self) -> bool {
        matches!(self.sign, Sign::Asked(Asked::Bcache(_), _))
    }

    fn begins_with_a_write(&self) -> bool {
        self.is_bcache() || matches!(self.sign, Sign::Asked(Asked::Journal(_), _))
    }

    fn copies(&self, what: &str) -> String {
        format!("{} ({what}) copies from disk to disk", self.name)
    }

    fn by_answer(&self, said: Copying) -> Option<String> {
        match said {
            Copying::Nothing => None,
            Copying::At(what) => Some(self.copies(what)),
            Copying::Unknown => Some(format!(
                "{} does not say whether it copies from disk to disk",
                self.name
            )),
        }
    }
}

impl Asked {
    fn answer(self, fd: &OwnedFd) -> Copying {
        match self {
            Asked::Mapper(dev) => of_targets(sys::mapper_status(fd.as_fd(), dev)),
            // They may be gone.
            Asked::Bcache(_) => match word(fd).as_deref() {
                Some("dirty") => Copying::At("dirty"),
                _ => Copying::Nothing,
            },
            Asked::Journal(_) => match word(fd).as_deref() {
                Some("write-through [write-back]") => Copying::At(WRITE_BACK),
                _ => Copying::Nothing,
            },
        }
    }
}

/// What a device of the device mapper is at by its targets.
fn of_targets(said: io::Result<Vec<sys::Mapped>>) -> Copying {
    match said {
        Ok(all) => {
            let mut all = all.iter().map(|it| copying(&it.kind, &it.status));
            all.find(|it| *it != Copying::Nothing)
                .unwrap_or(Copying::Nothing)
        }
        // It is gone.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Copying::Nothing,
        Err(_) => Copying::Unknown,
    }
}

/// What a target of the device mapper is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copying {
    Nothing,
    At(&'static str),
    Unknown,
}

/// The same by its kind and status.
fn copying(kind: &str, status: &str) -> Copying {
    let words: Vec<&str> = status.split_ascii_whitespace().collect();
    let number = |at: usize| words.get(at)?.parse::<usize>().ok();
    let is_done = |at: usize| {
        let (done, all) = words.get(at)?.split_once('/')?;
        Some(done == all)
    };
    let (is_at_rest, what) = match kind {
        "raid" => {
            // "A" is a journal that writes through.
            let journal = words.get(7).filter(|it| **it == "a");
            let journal = journal.map(|_| WRITE_BACK);
            let at = words.get(4).map(|action| {
                let at = MD.iter().find(|it| *it == action);
                at.copied().or(journal)
            });
            (at.map(|it| it.is_none()), at.flatten().unwrap_or_default())
        }
        "cache" => (number(10).map(|dirty| dirty == 0), "dirty"),
        // It frees what it has written back.
        "writecache" => (
            number(1).zip(number(2)).map(|(all, free)| all == free),
            "dirty",
        ),
        "clone" => (is_done(3), "clone"),
        "mirror" => (number(0).and_then(|legs| is_done(legs + 1)), "resync"),
        "snapshot-merge" => (Some(false), "merge"),
        _ => (QUIET.contains(&kind).then_some(true), ""),
    };
    match is_at_rest {
        Some(true) => Copying::Nothing,
        Some(false) => Copying::At(what),
        None => Copying::Unknown,
    }
}

/// The device with this folder, if it is of a kind that copies by itself, once for each sign of that; `mapped` is the
/// sign of one of the device mapper's that may be.
fn layers(dev: DevId, folder: &Path, mapped: impl FnOnce() -> Option<Sign>) -> Vec<Layer> {
    let open = |name: &str| File::open(folder.join(name)).ok();
    let name = folder.file_name().unwrap_or_default();
    let name = name.to_string_lossy().into_owned();
    // The disk below it has that file, too.
    let is_bcache = name.starts_with("bcache");
    let md = || Some(Sign::Word(open("md/sync_action")?, MD));
    let bcache = || {
        let state = open("bcache/state").filter(|_| is_bcache)?;
        Some(Sign::Asked(Asked::Bcache(dev), Arc::new(state)))
    };
    let lvm = || {
        let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
        let name = read("dm/name")?;
        let (_, volume) = name.trim_end().rsplit_once('-')?;
        let number = volume.strip_prefix("pvmove")?;
        let is_its = read("dm/uuid")?.starts_with("LVM-") && number.parse::<u32>().is_ok();
        is_its.then_some(Sign::Presence("pvmove"))
    };
    let journal = open("md/journal_mode");
    let journal = journal.map(|it| Sign::Asked(Asked::Journal(dev), Arc::new(it)));
    let sign = md().or_else(bcache).or_else(lvm).or_else(mapped);
    let layer = |sign| Layer {
        sign,
        carries: BTreeSet::new(),
        name: name.clone(),
    };
    sign.into_iter().chain(journal).map(layer).collect()
}

/// What a file of sysfs says, without the end of its line.
pub fn word(file: impl AsFd) -> Option<String> {
    let mut text = [0; 32];
    let read = pread(file, &mut text, 0).ok()?;
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
        put("md2/md/journal_mode", "[write-through] write-back");
        put("md3/md/sync_action", "idle");
        put("md3/md/journal_mode", "write-through [write-back]");
        // It has no journal.
        put("md4/md/sync_action", "idle");
        put("md4/md/journal_mode", "");
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
            "md0", "md1", "md2", "md3", "md4", "bcache0", "bcache1", "dm-0", "dm-1", "dm-2", "sda",
        ];
        let dev = |minor| DevId { major: 8, minor };
        let layers = names.iter().flat_map(|it| {
            let carries = BTreeSet::from([dev(u32::from(it.starts_with("md")))]);
            let layer = |layer| Layer {
                carries: carries.clone(),
                ..layer
            };
            let layers = layers(dev(0), &root.join(it), || None).into_iter();
            layers.map(layer).collect::<Vec<_>>()
        });
        let layers = Layers(layers.collect());
        let seen = |layers: &Layers| layers.at_work().into_iter().collect::<Vec<_>>();
        assert_eq!(
            seen(&layers),
            [
                "bcache0 (dirty)",
                "dm-0 (pvmove)",
                "md0 (resync)",
                "md3 (write-back)"
            ]
            .map(copies)
        );
        let of_some = layers.at_work_below(&BTreeSet::from([dev(1)]));
        assert_eq!(
            of_some,
            BTreeSet::from(["md0 (resync)", "md3 (write-back)"].map(copies))
        );
        put("md1/md/sync_action", "recover");
        put("md0/md/sync_action", "idle");
        assert_eq!(
            seen(&layers),
            [
                "bcache0 (dirty)",
                "dm-0 (pvmove)",
                "md1 (recover)",
                "md3 (write-back)"
            ]
            .map(copies)
        );
        // Of those, what was at it before has not begun, and bcache is not asked, nor is a journal.
        let before = BTreeSet::from([copies("dm-0 (pvmove)")]);
        let begun = layers.begun_below(&BTreeSet::from([dev(0), dev(1)]), &before);
        assert_eq!(begun, BTreeSet::from([copies("md1 (recover)")]));
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn the_device_mapper_says_what_its_targets_are_at() {
        use Copying::{At, Nothing, Unknown};
        for (kind, status, is_at) in [
            ("raid", "raid1 2 AA 65536/65536 idle 0 0 -", Nothing),
            ("raid", "raid1 2 AA 65536/65536 check 0 0 -", Nothing),
            ("raid", "raid1 2 Aa 512/65536 recover 0 0 -", At("recover")),
            ("raid", "raid5_ls 3 AAA 0/65536 resync 0 0 -", At("resync")),
            ("raid", "raid1 2 AA 65536/65536", Unknown),
            (
                "raid",
                "raid5_ls 3 AAA 65536/65536 idle 0 0 a",
                At("write-back"),
            ),
            ("raid", "raid5_ls 3 AAA 65536/65536 idle 0 0 A", Nothing),
            ("raid", "raid5_ls 3 AAA 65536/65536 idle 0 0 D", Nothing),
            (
                "cache",
                "8 27/512 128 9/800 1 2 3 4 0 9 0 1 writeback 2 x",
                Nothing,
            ),
            (
                "cache",
                "8 27/512 128 9/800 1 2 3 4 0 9 5 1 writeback 2 x",
                At("dirty"),
            ),
            ("cache", "Fail", Unknown),
            ("writecache", "0 1000 1000 0 1 2", Nothing),
            ("writecache", "0 1000 990 0 1 2", At("dirty")),
            ("clone", "8 33/512 8 900/900 0 0 1 rw", Nothing),
            ("clone", "8 33/512 8 899/900 1 0 1 rw", At("clone")),
            ("mirror", "2 253:1 253:2 400/400 1 AA 1 core", Nothing),
            ("mirror", "2 253:1 253:2 10/400 1 AA 1 core", At("resync")),
            ("snapshot-merge", "16/2048 16", At("merge")),
            ("linear", "", Nothing),
            ("thin", "8192 8191", Nothing),
            ("crypt", "", Nothing),
            // It may have its journal or its data on another disk, and says nothing of that.
            ("integrity", "0 131072 -", Unknown),
            (
                "zoned",
                "64 zones 1/2 cache 3/4 random 5/6 sequential",
                Unknown,
            ),
            ("of-next-year", "", Unknown),
        ] {
            assert_eq!(copying(kind, status), is_at, "{kind} {status}");
        }
    }

    #[test]
    fn of_several_targets_each_counts_and_one_that_does_not_answer_may_copy() {
        let layer = Layer {
            name: "dm-3".into(),
            sign: Sign::Presence(""),
            carries: BTreeSet::new(),
        };
        let by_status = |said| layer.by_answer(of_targets(said));
        let mapped = |kind: &str, status: &str| sys::Mapped {
            kind: kind.into(),
            status: status.into(),
        };
        let both = vec![mapped("linear", ""), mapped("snapshot-merge", "1/2 1")];
        assert_eq!(by_status(Ok(both)), Some(copies("dm-3 (merge)")));
        assert_eq!(by_status(Ok(Vec::new())), None);
        let failed = |code| by_status(Err(io::Error::from_raw_os_error(code)));
        assert_eq!(failed(libc::ENXIO), None);
        let said = failed(libc::ENOMEM);
        assert!(said.is_some_and(|it| it.starts_with("dm-3 does not say")));
    }

    #[test]
    fn a_bcache_that_waits_for_a_disk_holds_up_nobody_and_may_copy() {
        let dev = |minor| DevId { major: 252, minor };
        let file = Arc::new(File::open("/dev/null").unwrap());
        let layer = |minor| Layer {
            name: format!("bcache{minor}"),
            sign: Sign::Asked(Asked::Bcache(dev(minor)), Arc::clone(&file)),
            carries: BTreeSet::new(),
        };
        let layers = [layer(0), layer(1), layer(2)];
        let answer = move |it, _: &OwnedFd| match it {
            Asked::Bcache(it) if it == dev(0) => {
                std::thread::sleep(Duration::from_secs(60));
                Copying::Nothing
            }
            Asked::Bcache(it) if it == dev(1) => Copying::At("dirty"),
            _ => Copying::Nothing,
        };
        let begun = std::time::Instant::now();
        let said = at_work_by(layers.iter(), MOMENT, answer);
        let expected = [
            "bcache0 does not say whether it copies from disk to disk".into(),
            copies("bcache1 (dirty)"),
        ];
        assert_eq!(said, BTreeSet::from(expected));
        assert!(begun.elapsed() < Duration::from_secs(30));
    }

    fn copies(what: &str) -> String {
        format!("{what} copies from disk to disk")
    }
}
