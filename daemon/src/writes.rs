// SPDX-License-Identifier: GPL-2.0-only

//! How much was written to what a file system is on, as the counters of its block devices say.
//!
//! With FIFREEZE anybody can thaw and freeze again between two looks, and then no look at the freeze
//! shows it. What was written in between does. Facts only; what follows is decided in
//! [`crate::freeze`].

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

use crate::apart::{Lot, Questions};
use crate::ground::Watched;
use crate::mounts::{unescape, DevId};
use crate::process;
use crate::superblocks::dev_in;
use crate::topology::all_below;

/// Where `Documentation/block/stat.rst` has "write sectors" in a line of `stat`. The kernel adds to it
/// before whoever waits for the write hears of its end. Discards and flushes are counted elsewhere.
const WRITE_SECTORS: usize = 6;

/// What else tells there that a disk gets on: requests that read, write, discard, flush.
const DONE: [usize; 5] = [0, 4, WRITE_SECTORS, 11, 15];

/// And what it has in hand.
const IN_FLIGHT: usize = 8;

/// Since when what the device mapper has made counts only if its queue says so. Before, it counts all, and its queue
/// says that it does not (`alloc_io` in `drivers/md/dm.c`).
const MAPPED_GO_BY_IOSTATS: (u32, u32) = (6, 4);

/// Since when a loop device that writes past the cache waits for what its file is on to be thawed. Stable kernels from
/// before have learnt it since, which their first two numbers do not tell.
const LOOPS_HEED_FREEZES: (u32, u32) = (6, 16);

/// How long a look-up of what is swapped to may take, or of what is exported, or at whether something counts.
const PATIENCE: Duration = Duration::from_secs(1);

/// The counters behind one file system, open. A device that has none, or that does not count, adds nothing: see
/// [`not_counting`].
#[derive(Debug, Default)]
pub struct Writes(Vec<File>);

impl Writes {
    /// Those of these devices.
    pub fn of(devices: &[DevId]) -> Self {
        let stat = |dev: &DevId| File::open(format!("/sys/dev/block/{dev}/stat")).ok();
        Writes::from(devices.iter().filter_map(stat).collect::<Vec<_>>())
    }

    /// How many sectors were written since they were set up. `None` once one of them has gone: what is left
    /// of the sum would be less than before, and that is nobody's write.
    pub fn sectors(&self) -> Option<u64> {
        self.0.iter().map(sectors_of).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<Vec<File>> for Writes {
    /// Those that these files show, each a `stat` of sysfs.
    fn from(stats: Vec<File>) -> Self {
        Writes(stats)
    }
}

fn sectors_of(stat: &File) -> Option<u64> {
    look_at(stat, parse)
}

fn look_at(stat: &File, parse: impl Fn(&str) -> Option<u64>) -> Option<u64> {
    // Seventeen numbers of at most twenty digits.
    let mut text = [0; 512];
    let read = stat.read_at(&mut text, 0).ok()?;
    parse(std::str::from_utf8(text.get(..read)?).ok()?)
}

/// The folder of a device in sysfs.
fn folder_of(dev: &DevId) -> PathBuf {
    format!("/sys/dev/block/{dev}").into()
}

/// Those of these devices that are not known to count: their counters stand still whatever is written.
pub fn not_counting(devices: BTreeSet<DevId>) -> BTreeSet<DevId> {
    // The kernel that runs stays what it is.
    static MAPPED_ALL_COUNT: LazyLock<bool> =
        LazyLock::new(|| process::kernel_version().is_some_and(|it| it < MAPPED_GO_BY_IOSTATS));
    let devices: Vec<DevId> = devices.into_iter().collect();
    let says_so = queues_of(&devices);
    let each = devices.into_iter().zip(says_so);
    let silent = each.filter(|(dev, says_so)| {
        let is_mapped = || folder_of(dev).join("dm").exists();
        !(says_so.unwrap_or(false) || *MAPPED_ALL_COUNT && is_mapped())
    });
    silent.map(|(dev, _)| dev).collect()
}

/// Whether the queue of each of these devices says that it counts; `None` where there is no queue.
fn queues_of(devices: &[DevId]) -> Vec<Option<bool>> {
    static ASKED: Questions<DevId> = Questions::new();
    let folders = devices.iter().map(folder_of).collect();
    queues_in(&ASKED, PATIENCE, devices, folders)
}

/// The same of those with these folders. To look at that takes a lock of the queue, which may be held as long as a disk
/// hangs: what does not say it in time says no.
fn queues_in(
    questions: &'static Questions<DevId>,
    limit: Duration,
    devices: &[DevId],
    folders: Vec<PathBuf>,
) -> Vec<Option<bool>> {
    let look = move |number: usize, _: &[_]| folders.get(number).and_then(|it| queue_in(it));
    let mut all = vec![Some(false); devices.len()];
    let lot = Lot {
        abouts: devices.to_vec(),
        fds: Vec::new(),
    };
    questions.ask_all(vec![lot], limit, look, |number, said| {
        if let (Some(it), Ok(said)) = (all.get_mut(number), said) {
            *it = said;
        }
    });
    all
}

fn queue_in(folder: &Path) -> Option<bool> {
    // A partition has the queue of its disk.
    let queues = ["queue/iostats", "../queue/iostats"];
    let mut said = queues.iter().map(|it| fs::read_to_string(folder.join(it)));
    Some(said.find_map(Result::ok)?.trim_end() != "0")
}

/// What a look at the devices of one file system shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// A number that changes as long as something comes to its end there. `None` where that does not show: a device
    /// has no counters, or its queue does not count, or it has gone.
    pub done: Option<u64>,
    /// Whether they have something in hand, and all that comes to its end there is in that number, also what came
    /// before this look.
    pub is_counted: bool,
    /// Those of them, and of the devices below, that have something in hand, each with such a number of its own. A
    /// device in between may have nothing in hand while one below it hangs: what waits is counted when it is let in.
    pub in_hand: Vec<(DevId, u64)>,
}

/// Whether the devices of one file system get on with what they have in hand. They are opened at the first
/// look: as a rule nobody looks.
#[derive(Debug)]
pub struct WriteBack {
    devices: Vec<DevId>,
    /// All that those stand on.
    below: Vec<DevId>,
    opened: OnceLock<Opened>,
}

/// Those that may count, of both.
#[derive(Debug)]
struct Opened {
    /// `None` if there is one that does not.
    devices: Option<Vec<Counted>>,
    below: Vec<Counted>,
}

/// A device that may count.
#[derive(Debug)]
struct Counted {
    dev: DevId,
    stat: File,
    /// Whether its queue says that it does.
    says_so: bool,
    /// Whether it is suspended, for what the device mapper has made: what comes then is not in hand.
    suspended: Option<File>,
}

impl WriteBack {
    /// That of these devices, which stand on those below.
    pub fn to(devices: Vec<DevId>, below: impl IntoIterator<Item = DevId>) -> Self {
        let below = below.into_iter().filter(|it| !devices.contains(it));
        WriteBack {
            below: below.collect(),
            devices,
            opened: OnceLock::new(),
        }
    }

    /// Looks at all of them.
    pub fn look(&self) -> Look {
        let Opened { devices, below } = self.opened.get_or_init(|| {
            let open = |devices: &[DevId]| {
                let each = devices.iter().zip(queues_of(devices));
                let opened = each.map(|(dev, says_so)| Counted::open(dev, says_so?));
                opened.collect::<Vec<_>>()
            };
            let devices = open(&self.devices).into_iter().collect::<Option<Vec<_>>>();
            Opened {
                devices: devices.filter(|it| !it.is_empty()),
                below: open(&self.below).into_iter().flatten().collect(),
            }
        });
        let tells = |it: &Counted| it.counts() || it.is_suspended();
        let own = devices.as_deref().unwrap_or_default();
        let shows = devices.is_some() && own.iter().all(tells);
        let done = || own.iter().map(Counted::done).sum::<Option<u64>>();
        let in_hand = own.iter().chain(below).filter(|it| it.waits());
        Look {
            done: shows.then(done).flatten(),
            is_counted: own.iter().all(Counted::counts) && own.iter().any(Counted::waits),
            in_hand: in_hand
                .filter_map(|it| Some((it.dev, it.done()?)))
                .collect(),
        }
    }
}

impl Counted {
    fn open(dev: &DevId, says_so: bool) -> Option<Self> {
        let device = folder_of(dev);
        Some(Counted {
            dev: *dev,
            stat: File::open(device.join("stat")).ok()?,
            says_so,
            suspended: File::open(device.join("dm/suspended")).ok(),
        })
    }

    /// What is mapped counts on 6.1 though its queue says that it does not. Where nothing is counted, nothing is
    /// ever in hand.
    fn counts(&self) -> bool {
        self.says_so || self.has_in_hand()
    }

    fn done(&self) -> Option<u64> {
        look_at(&self.stat, parse_done)
    }

    fn has_in_hand(&self) -> bool {
        look_at(&self.stat, |text| number_at(text, IN_FLIGHT)).is_some_and(|it| it > 0)
    }

    /// Then it gets on with nothing, whether it counts or not.
    fn is_suspended(&self) -> bool {
        let suspended = self.suspended.as_ref();
        suspended.and_then(|it| look_at(it, |text| number_at(text, 0))) == Some(1)
    }

    fn waits(&self) -> bool {
        self.has_in_hand() || self.is_suspended()
    }
}

fn number_at(text: &str, at: usize) -> Option<u64> {
    text.split_ascii_whitespace().nth(at)?.parse().ok()
}

fn parse_done(stat: &str) -> Option<u64> {
    let numbers: Vec<u64> = stat
        .split_ascii_whitespace()
        .map(|it| it.parse().ok())
        .collect::<Option<_>>()?;
    numbers.get(WRITE_SECTORS)?;
    // Kernels before 5.5 count no flushes.
    Some(DONE.iter().filter_map(|at| numbers.get(*at)).sum())
}

fn parse(stat: &str) -> Option<u64> {
    number_at(stat, WRITE_SECTORS)
}

/// Devices that nothing should be written to for a while.
#[derive(Debug, Default)]
pub struct AtRest(Vec<Disk>);

#[derive(Debug)]
struct Disk {
    watched: Watched,
    writes: Writes,
    /// The devices on it that are written to all the same.
    others: Writes,
    /// What they showed at [`AtRest::begin`]; `None` when the disk was gone.
    before: Option<Shown>,
}

/// Sectors written, as a look at both shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shown {
    /// To the disk.
    all: u64,
    /// To the others on it, before that was read and after.
    others: (u64, u64),
}

/// Whether anything was written to a disk but for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    Nothing,
    Something,
    Unknown,
}

impl Shown {
    /// What it tells of the time since that look.
    fn rest_since(self, before: Self) -> Rest {
        let all = self.all.wrapping_sub(before.all);
        // What of that was for the others lies between these.
        let least = self.others.0.wrapping_sub(before.others.1);
        let most = self.others.1.wrapping_sub(before.others.0);
        if all > most {
            Rest::Something
        } else if all > least {
            Rest::Unknown
        } else {
            Rest::Nothing
        }
    }
}

impl Disk {
    /// Looks at what was written to it. The others may be written to meanwhile, so it is done until they are not, or
    /// often enough: that takes no millisecond. `None` once something has gone.
    fn look(&self) -> Option<Shown> {
        const OFTEN: usize = 64;
        let mut earlier = self.others.sectors()?;
        let mut best: Option<Shown> = None;
        for _ in 0..OFTEN {
            let all = self.writes.sectors()?;
            let later = self.others.sectors()?;
            let shown = Shown {
                all,
                others: (earlier, later),
            };
            let all_so_far = best.into_iter().chain([shown]);
            best = all_so_far.min_by_key(|it| it.others.1.wrapping_sub(it.others.0));
            if later == earlier {
                break;
            }
            earlier = later;
        }
        best
    }
}

/// A disk that something was written to, or may have been.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its node, and which part of it.
    pub node: String,
    /// Whether something was. Else what is written to the others did not stand still for long enough to tell.
    pub is_certain: bool,
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let perhaps = if self.is_certain { "" } else { "perhaps " };
        write!(f, "{perhaps}{}", self.node)
    }
}

impl AtRest {
    /// These, from [`AtRest::begin`] on, each with the devices on it that are written to all the same.
    pub fn new(watched: impl IntoIterator<Item = (Watched, Vec<DevId>)>) -> Self {
        let disk = |(watched, mut others): (Watched, Vec<DevId>)| {
            others.extend(&watched.without);
            Disk {
                writes: Writes::of(&[watched.dev]),
                others: Writes::of(&others),
                watched,
                before: None,
            }
        };
        AtRest(watched.into_iter().map(disk).collect())
    }

    /// From now on; not those on which something else goes on, which are named.
    pub fn begin(&mut self, goes_on: impl Fn(&Watched) -> bool) -> Vec<String> {
        let all = std::mem::take(&mut self.0).into_iter();
        let (off, on): (Vec<Disk>, Vec<Disk>) = all.partition(|disk| goes_on(&disk.watched));
        self.0 = on;
        for disk in &mut self.0 {
            disk.before = disk.look();
        }
        off.iter().map(|it| it.watched.to_string()).collect()
    }

    /// Those that something was written to since, or may have been.
    pub fn written(&self) -> Vec<Written> {
        let written = |disk: &Disk| {
            let rest = disk.look()?.rest_since(disk.before?);
            (rest != Rest::Nothing).then(|| Written {
                node: disk.watched.to_string(),
                is_certain: rest == Rest::Something,
            })
        };
        self.0.iter().filter_map(written).collect()
    }
}

/// The files that the kernel swaps to: pages go there at any time, past the file system and its freeze.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SwapFiles {
    /// `st_dev` of each that was found.
    on: Vec<DevId>,
    /// Whether there is one that was not: it may be anywhere.
    is_one_lost: bool,
}

impl SwapFiles {
    /// Those that there are.
    pub fn find() -> Self {
        let swaps = fs::read("/proc/swaps").unwrap_or_default();
        Self::among(found_at(of_kind(&swaps, b"file").collect()))
    }

    fn among(found: Vec<Option<Found>>) -> Self {
        let mut files = SwapFiles::default();
        for it in found {
            match it {
                Some(Found::File(dev)) => files.on.push(dev),
                Some(Found::Device(_)) | None => files.is_one_lost = true,
            }
        }
        files
    }

    /// Whether one of them may be on the file system with this number: a subvolume of btrfs has a number of its own.
    pub fn may_be_on(&self, dev: DevId) -> bool {
        let mut files = self.on.iter();
        self.is_one_lost || files.any(|it| *it == dev || (it.major == 0 && dev.major == 0))
    }

    /// Whether there is one that was not found.
    pub fn is_one_lost(&self) -> bool {
        self.is_one_lost
    }
}

/// The files that others have as disks, by way of the kernel: not all of it heeds a freeze when it writes to a file, so that
/// what is there already is written over meanwhile (`fd_execute_rw_aio` in `drivers/target/target_core_file.c`,
/// `nvmet_file_submit_bvec` in `drivers/nvme/target/io-cmd-file.c`, and in earlier kernels `lo_rw_aio` in
/// `drivers/block/loop.c`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Images(Vec<Image>);

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Image {
    /// What has it as a disk.
    name: String,
    /// The loop device that is over it, if it is one.
    device: Option<DevId>,
    /// `st_dev` of the file. `None` when it was not found: it may be anywhere.
    on: Option<DevId>,
}

impl Images {
    /// Those that there are, which may take a few seconds.
    pub fn find() -> Self {
        const PLACES: [(&str, &str, &str); 2] = [
            ("/sys/kernel/config/target/core", "fileio_", "info"),
            ("/sys/kernel/config/nvmet/subsystems", "", "device_path"),
        ];
        let list = || {
            let all = PLACES.into_iter();
            let all =
                all.flat_map(|(folder, prefix, file)| exported(folder.as_ref(), prefix, file));
            all.collect()
        };
        let mut all = loops_past_the_cache();
        all.extend(images_among(list, PATIENCE));
        Images(all)
    }

    /// What there is where nobody has told: one that may be anywhere.
    pub fn untold() -> Self {
        Images(vec![Image::untold()])
    }

    /// Without those that are written to only by what is on these devices: that is frozen as well.
    pub fn but(mut self, below: &BTreeSet<DevId>) -> Self {
        self.0
            .retain(|it| it.device.is_none_or(|it| !below.contains(&it)));
        self
    }

    /// The names of those that may be on the file system with this number, as with [`SwapFiles::may_be_on`].
    pub fn that_may_be_on(&self, dev: DevId) -> Vec<&str> {
        let is_it = |on: DevId| on == dev || (on.major == 0 && dev.major == 0);
        let all = self.0.iter().filter(|it| it.on.is_none_or(is_it));
        all.map(|it| it.name.as_str()).collect()
    }

    /// The names of all.
    pub fn names(&self) -> Vec<String> {
        self.0.iter().map(|it| it.name.clone()).collect()
    }
}

impl Image {
    fn untold() -> Self {
        Image {
            name: "something exported that is not told in time".into(),
            device: None,
            on: None,
        }
    }
}

/// The loop devices that write past the cache of what their file is on.
fn loops_past_the_cache() -> Vec<Image> {
    // The kernel that runs stays what it is.
    static HEED: LazyLock<bool> =
        LazyLock::new(|| process::kernel_version().is_some_and(|it| it >= LOOPS_HEED_FREEZES));
    if *HEED {
        return Vec::new();
    }
    let all = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let all = all.filter(|it| it.file_name().as_encoded_bytes().starts_with(b"loop"));
    let all = all.filter(|it| writes_past_the_cache(&it.path()));
    let found = all.filter_map(|it| {
        let name = it.file_name().to_string_lossy().into_owned();
        Some((dev_in(&it.path())?, name))
    });
    let found: BTreeMap<DevId, String> = found.collect();
    // All at once, so that those that hang are waited for no longer than one.
    let known = all_below(&found.keys().copied().collect());
    let images = found.into_iter().filter_map(|(dev, name)| {
        let backing = known.get(&dev)?.backing.as_ref()?;
        Some(Image {
            name,
            device: Some(dev),
            on: backing.dev,
        })
    });
    images.collect()
}

/// Whether the loop device with this folder in sysfs does, and may be written to at all.
fn writes_past_the_cache(folder: &Path) -> bool {
    let says = |file: &str, word: &str| {
        let said = fs::read_to_string(folder.join(file));
        said.is_ok_and(|it| it.trim_end() == word)
    };
    says("loop/dio", "1") && !says("ro", "1")
}

/// Those among what `list` says to be exported, each by a name and a path. Whoever removes one keeps that part of
/// configfs locked until the disk below has done all that it has in hand (`nvmet_ns_disable` in
/// `drivers/nvme/target/core.c`), and to list it takes that lock.
fn images_among(
    list: impl FnOnce() -> Vec<(String, PathBuf)> + Send + 'static,
    limit: Duration,
) -> Vec<Image> {
    static ASKED: Questions<()> = Questions::new();
    let Ok(exported) = ASKED.ask((), &[], limit, move |_| list()) else {
        return vec![Image::untold()];
    };
    let (names, paths): (Vec<String>, Vec<PathBuf>) = exported.into_iter().unzip();
    let images = names.into_iter().zip(found_at(paths));
    let images = images.filter_map(|(name, found)| {
        let on = match found {
            Some(Found::File(dev)) => Some(dev),
            Some(Found::Device(_)) => return None,
            None => None,
        };
        let device = None;
        Some(Image { name, device, on })
    });
    images.collect()
}

/// What is exported by way of configfs: by a name, and the path that this `file` shows, which is two folders down, or three
/// (`namespaces`).
fn exported(folder: &Path, prefix: &str, file: &str) -> Vec<(String, PathBuf)> {
    let list = |folder: PathBuf| {
        let all = fs::read_dir(folder).into_iter().flatten().flatten();
        all.map(|it| it.path()).collect::<Vec<_>>()
    };
    let is_one = |it: &PathBuf| {
        let name = it.file_name().unwrap_or_default();
        name.as_encoded_bytes().starts_with(prefix.as_bytes())
    };
    let groups = list(folder.into()).into_iter().filter(is_one);
    let groups = groups.flat_map(|it| {
        let namespaces = it.join("namespaces");
        if namespaces.exists() {
            list(namespaces)
        } else {
            list(it)
        }
    });
    let found = groups.filter_map(|it| {
        let said = fs::read(it.join(file)).ok()?;
        let path = path_in(&said)?;
        let name = it.strip_prefix(folder).unwrap_or(&it);
        Some((name.to_string_lossy().into_owned(), path))
    });
    found.collect()
}

/// The whole of it, or what stands between `File: ` and `  Size: `.
fn path_in(said: &[u8]) -> Option<PathBuf> {
    let said = String::from_utf8_lossy(said);
    let path = match said.split_once("File: ") {
        Some((_, rest)) => rest.split_once("  Size: ")?.0,
        None => said.trim_end(),
    };
    path.starts_with('/').then(|| path.into())
}

/// The partitions and disks that it swaps to, and those that zram writes to when memory is short. `None` where there is
/// one that is not found.
pub fn swapped_to_as_a_whole() -> Option<Vec<DevId>> {
    let swaps = fs::read("/proc/swaps").unwrap_or_default();
    let behind_zram = |entry: fs::DirEntry| {
        let path = fs::read(entry.path().join("backing_dev")).ok()?;
        let path = path.trim_ascii_end();
        (path != b"none").then(|| PathBuf::from(OsStr::from_bytes(path)))
    };
    let is_zram = |it: &fs::DirEntry| it.file_name().as_encoded_bytes().starts_with(b"zram");
    let all = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let behind_zram = all.filter(is_zram).filter_map(behind_zram);
    let paths = of_kind(&swaps, b"partition").chain(behind_zram);
    let found = found_at(paths.collect()).into_iter();
    let devices = found.map(|it| match it? {
        Found::Device(dev) => Some(dev),
        Found::File(_) => None,
    });
    devices.collect()
}

/// Those of a kind among the lines of `/proc/swaps`.
fn of_kind<'a>(swaps: &'a [u8], kind: &'a [u8]) -> impl Iterator<Item = PathBuf> + 'a {
    swaps.split(|b| *b == b'\n').filter_map(move |line| {
        let words = line.split(u8::is_ascii_whitespace);
        let mut words = words.filter(|it| !it.is_empty());
        let path = words.next()?;
        (words.next()? == kind).then(|| unescape(path).into())
    })
}

/// What is at a path: a file, by the number of its file system, or a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    File(DevId),
    Device(DevId),
}

/// The paths are those of whoever has swapping begun there, or something exported: in another namespace, or below what
/// does not answer, one leads nowhere.
fn found_at(paths: Vec<PathBuf>) -> Vec<Option<Found>> {
    find_each(paths, PATIENCE, |path| {
        let meta = fs::metadata(path).ok()?;
        let kind = meta.file_type();
        if kind.is_block_device() {
            return Some(Found::Device(DevId::from_raw(meta.rdev())));
        }
        kind.is_file()
            .then(|| Found::File(DevId::from_raw(meta.dev())))
    })
}

/// In their order. Those that hang are waited for together.
fn find_each(
    paths: Vec<PathBuf>,
    limit: Duration,
    look: impl Fn(&Path) -> Option<Found> + Send + Sync + 'static,
) -> Vec<Option<Found>> {
    static ASKED: Questions<PathBuf> = Questions::new();
    let mut found = vec![None; paths.len()];
    let lot = Lot {
        abouts: paths.clone(),
        fds: Vec::new(),
    };
    let look = move |number: usize, _: &[_]| look(paths.get(number)?);
    ASKED.ask_all(vec![lot], limit, look, |number, said| {
        if let Some(place) = found.get_mut(number) {
            *place = said.ok().flatten();
        }
    });
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::Barrier;
    use std::time::Instant;

    #[test]
    fn sectors_written_are_the_seventh_number() {
        let line = "    5198     1200   402116     3121     9001      800   331072     5233        0     4100     8354        0        0        0        0        0        0\n";
        assert_eq!(parse(line), Some(331_072));
        assert_eq!(parse("1 2 3"), None);
    }

    #[test]
    fn what_is_exported_is_found_by_what_configfs_shows() {
        let root = std::env::temp_dir().join(format!("hv-vss-exported-{}", std::process::id()));
        let put = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let info = "Status: ACTIVATED  Max Queue Depth: 128  SectorSize: 512  HwMaxSectors: 16384\n        \
                    TCM FILEIO ID: 0        File: /srv/a b.img  Size: 8388608  Mode: O_DSYNC Async: 0\n";
        put("core/fileio_0/a/info", info);
        put(
            "core/iblock_0/b/info",
            "Status: ACTIVATED\n  iBlock device: sda  UDEV PATH: /dev/sda\n",
        );
        put("core/fileio_1/hba_info", "HBA Index: 1\n");
        put("nvmet/nqn/namespaces/1/device_path", "/srv/c.img\n");
        put("nvmet/nqn/namespaces/2/device_path", "(null)\n");
        let found = |folder: &str, prefix, file| exported(&root.join(folder), prefix, file);
        let one = |name: &str, path: &str| vec![(name.to_owned(), PathBuf::from(path))];
        assert_eq!(
            found("core", "fileio_", "info"),
            one("fileio_0/a", "/srv/a b.img")
        );
        assert_eq!(
            found("nvmet", "", "device_path"),
            one("nqn/namespaces/1", "/srv/c.img")
        );
        assert!(found("nothing", "", "info").is_empty());
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn an_image_counts_unless_it_is_of_what_is_frozen_or_elsewhere() {
        let dev = |minor| DevId { major: 8, minor };
        let image = |name: &str, device, on| Image {
            name: name.into(),
            device,
            on,
        };
        let images = Images(vec![
            image("loop0", Some(dev(100)), Some(dev(1))),
            image("loop1", Some(dev(101)), Some(dev(1))),
            image("fileio_0/a", None, Some(dev(2))),
            image("fileio_0/b", None, None),
        ]);
        let images = images.but(&BTreeSet::from([dev(1), dev(100)]));
        assert_eq!(images.that_may_be_on(dev(1)), ["loop1", "fileio_0/b"]);
        assert_eq!(images.that_may_be_on(dev(2)), ["fileio_0/a", "fileio_0/b"]);
        assert_eq!(images.names().len(), 3);
    }

    #[test]
    fn what_is_exported_may_be_anywhere_if_configfs_hangs() {
        static HANGS: Barrier = Barrier::new(2);
        let hang = || {
            HANGS.wait();
            Vec::new()
        };
        let anywhere = [Image::untold()];
        let found = images_among(hang, Duration::from_millis(50));
        assert_eq!(found, anywhere);
        // Nobody waits for it again.
        let found = images_among(Vec::new, Duration::from_secs(60));
        assert_eq!(found, anywhere);
        HANGS.wait();
        let images = Images(anywhere.into());
        assert_eq!(images.that_may_be_on(DevId::default()).len(), 1);
    }

    #[test]
    fn paths_that_hang_are_waited_for_together() {
        static HANG: Barrier = Barrier::new(4);
        const LIMIT: Duration = Duration::from_millis(500);
        let file = Found::File(DevId::default());
        let look = move |path: &Path| {
            if path.starts_with("/hangs") {
                HANG.wait();
            }
            Some(file)
        };
        let paths = ["/hangs/a", "/b", "/hangs/c", "/hangs/d", "/e"];
        let begin = Instant::now();
        let found = find_each(paths.map(PathBuf::from).into(), LIMIT, look);
        assert!(begin.elapsed() < LIMIT * 2, "{:?}", begin.elapsed());
        assert_eq!(found, [None, Some(file), None, None, Some(file)]);
        HANG.wait();
    }

    #[test]
    fn a_loop_device_that_is_not_written_to_writes_past_no_freeze() {
        let root = std::env::temp_dir().join(format!("hv-vss-loops-{}", std::process::id()));
        let writes = |name: &str, dio: &str, ro: &str| {
            let folder = root.join(name);
            fs::create_dir_all(folder.join("loop")).unwrap();
            fs::write(folder.join("loop/dio"), dio).unwrap();
            fs::write(folder.join("ro"), ro).unwrap();
            writes_past_the_cache(&folder)
        };
        assert!(writes("loop0", "1\n", "0\n"));
        assert!(!writes("loop1", "1\n", "1\n"));
        assert!(!writes("loop2", "0\n", "0\n"));
        assert!(!writes_past_the_cache(&root.join("loop3")), "it is unbound");
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn what_comes_to_its_end_gets_on_and_what_waits_does_not() {
        let line = |at: usize| {
            let numbers: Vec<String> = (0..17).map(|it| u64::from(it == at).to_string()).collect();
            numbers.join(" ")
        };
        for at in 0..17 {
            let shows = matches!(at, 0 | 4 | 6 | 11 | 15);
            assert_eq!(parse_done(&line(at)), Some(u64::from(shows)), "{at}");
        }
        assert_eq!(parse_done("1 2 3"), None);
        let counted = |stat: &str, says_so: bool, suspended: Option<&str>| {
            let file = |text: &str| {
                let path = std::env::temp_dir().join(format!("hv-vss-stat-{}", std::process::id()));
                fs::write(&path, text).unwrap();
                let file = File::open(&path).unwrap();
                fs::remove_file(path).unwrap();
                file
            };
            let (stat, suspended) = (file(stat), suspended.map(file));
            Counted {
                dev: DevId::default(),
                stat,
                says_so,
                suspended,
            }
        };
        let waits = |stat: &str, suspended: Option<&str>| counted(stat, true, suspended).waits();
        assert!(waits(&line(IN_FLIGHT), None));
        assert!(!waits(&line(4), None), "it computes");
        assert!(waits(&line(4), Some("1\n")) && !waits(&line(4), Some("0\n")));
        let look = |own: Counted, below: Vec<Counted>| {
            let write_back = WriteBack::to(Vec::new(), []);
            let devices = Some(vec![own]);
            let _ = write_back.opened.set(Opened { devices, below });
            let look = write_back.look();
            let in_hand = look.in_hand.iter().map(|(_, done)| *done);
            (look.done, look.is_counted, in_hand.collect::<Vec<_>>())
        };
        let alone = |own: Counted| look(own, Vec::new());
        assert_eq!(
            alone(counted(&line(4), true, Some("1\n"))),
            (Some(1), true, vec![1])
        );
        // It computes, and what it has written before is nothing that waits.
        assert_eq!(
            alone(counted(&line(4), true, None)),
            (Some(1), false, vec![])
        );
        // One that does not count has nothing in hand, whatever it has done before that.
        let silent = (None, false, vec![]);
        assert_eq!(alone(counted(&line(4), false, Some("0\n"))), silent);
        assert_eq!(alone(counted(&line(4), false, None)), silent);
        // One that is suspended gets on with nothing, but what it did before is known of none that does not count.
        let suspended = counted(&line(4), false, Some("1\n"));
        assert_eq!(alone(suspended), (Some(1), false, vec![1]));
        // What has something in hand counts, whatever its queue says.
        let waiting = || counted(&line(IN_FLIGHT), false, None);
        assert_eq!(alone(waiting()), (Some(0), true, vec![0]));
        // What waits for a device below need not be counted above it, and what is done there is another's as well.
        let idle = || counted(&line(4), true, None);
        assert_eq!(
            look(idle(), vec![idle(), waiting()]),
            (Some(1), false, vec![0])
        );
        // Nobody can tell of a device that is not there, nor of none.
        let nobody = |devices| WriteBack::to(devices, []).look();
        assert_eq!(nobody(vec![DevId::default()]), Look::default());
        assert_eq!(nobody(Vec::new()), Look::default());
    }

    #[test]
    fn a_counter_tells_only_where_it_is_known_to_count() {
        let dir = std::env::temp_dir().join(format!("hv-vss-iostats-{}", std::process::id()));
        let put = |path: &str, text: &str| {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("sda/queue/iostats", "1\n");
        put("sda/sda1/stat", "");
        put("sdb/queue/iostats", "0\n");
        put("sdb/sdb1/stat", "");
        put("silent/stat", "");
        let all = ["sda", "sda/sda1", "sdb", "sdb/sdb1", "silent", "none"];
        assert_eq!(
            all.map(|it| queue_in(&dir.join(it))),
            [Some(true), Some(true), Some(false), Some(false), None, None]
        );
        fs::remove_dir_all(&dir).unwrap();
        let nobody = BTreeSet::from([DevId::default()]);
        assert_eq!(not_counting(nobody.clone()), nobody);
    }

    #[test]
    fn a_queue_that_is_locked_as_long_as_its_disk_hangs_is_not_waited_for() {
        static ASKED: Questions<DevId> = Questions::new();
        let dir = std::env::temp_dir().join(format!("hv-vss-locked-{}", std::process::id()));
        let queue = |disk: &str| {
            let queue = dir.join(disk).join("queue");
            fs::create_dir_all(&queue).unwrap();
            queue.join("iostats")
        };
        fs::write(queue("sda"), "1\n").unwrap();
        // It is not even open before somebody writes to it.
        let locked = queue("sdb");
        nix::unistd::mkfifo(&locked, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let devices = [0, 16].map(|minor| DevId { major: 8, minor });
        let folders = || vec![dir.join("sda"), dir.join("sdb")];
        let begin = Instant::now();
        let ask = |limit| queues_in(&ASKED, Duration::from_secs(limit), &devices, folders());
        assert_eq!(ask(1), [Some(true), Some(false)]);
        assert_eq!(ask(600), [Some(true), Some(false)], "it is not asked again");
        assert!(begin.elapsed() < Duration::from_secs(300));
        fs::write(locked, "1\n").unwrap();
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_is_swapped_to_is_told_by_its_kind() {
        let swaps = b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
                      /dev/sda2                               partition\t999420\t\t0\t\t-2\n\
                      /swap\\040of\xe9/file\\134                    file\t\t999420\t\t0\t\t-3\n";
        let of = |kind| of_kind(swaps, kind).collect::<Vec<_>>();
        let file = OsStr::from_bytes(b"/swap of\xe9/file\\");
        assert_eq!(of(b"file"), [Path::new(file)]);
        assert_eq!(of(b"partition"), [Path::new("/dev/sda2")]);
    }

    #[test]
    fn a_file_that_is_swapped_to_and_not_found_may_be_anywhere() {
        let dev = |text: &str| text.parse().unwrap();
        let among = |found: &[Option<Found>]| SwapFiles::among(found.to_vec());
        let file = Some(Found::File(dev("8:1")));
        let may_be_on =
            |files: &SwapFiles| ["8:1", "8:2", "0:40"].map(|it| files.may_be_on(dev(it)));
        assert_eq!(may_be_on(&among(&[])), [false; 3]);
        assert_eq!(may_be_on(&among(&[file])), [true, false, false]);
        // A subvolume.
        let of_btrfs = Some(Found::File(dev("0:41")));
        assert_eq!(may_be_on(&among(&[of_btrfs])), [false, false, true]);
        assert_eq!(may_be_on(&among(&[file, None])), [true; 3]);
        // Something else has its name here.
        let device = Some(Found::Device(dev("8:1")));
        assert_eq!(may_be_on(&among(&[device])), [true; 3]);
    }

    #[test]
    fn what_is_known_to_go_on_is_not_counted() {
        let dir = std::env::temp_dir().join(format!("hv-vss-writes-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let put = |name: &str, sectors: u64| {
            let path = dir.join(name);
            fs::write(&path, format!("0 0 0 0 0 0 {sectors} 0\n")).unwrap();
            Writes::from(vec![File::open(path).unwrap()])
        };
        let disk = Disk {
            watched: Watched {
                dev: DevId::default(),
                name: "sda".into(),
                without: Vec::new(),
                instead: Vec::new(),
            },
            writes: put("disk", 100),
            others: put("partition", 40),
            before: None,
        };
        let mut at_rest = AtRest(vec![disk]);
        assert!(at_rest.begin(|_| false).is_empty());
        put("disk", 108);
        put("partition", 48);
        assert!(at_rest.written().is_empty());
        put("disk", 116);
        let written = Written {
            node: "/dev/sda".into(),
            is_certain: true,
        };
        assert_eq!(at_rest.written(), [written]);
        assert_eq!(at_rest.begin(|_| true), ["/dev/sda"]);
        put("disk", 124);
        assert!(at_rest.written().is_empty());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_is_written_beside_something_that_never_stands_still_is_seen() {
        let dir = std::env::temp_dir().join(format!("hv-vss-restless-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let line = |sectors: u64| format!("0 0 0 0 0 0 {sectors:020} 0\n");
        let put = |name: &str| {
            let path = dir.join(name);
            fs::write(&path, line(0)).unwrap();
            let open = fs::OpenOptions::new().write(true).open(&path).unwrap();
            (open, File::open(path).unwrap())
        };
        let (disk, all) = put("disk");
        let (partition, others) = put("partition");
        // To look at so many takes a while.
        let others = (0..512).map(|_| others.try_clone().unwrap());
        let watched = Watched {
            dev: DevId::default(),
            name: "sda".into(),
            without: Vec::new(),
            instead: Vec::new(),
        };
        let mut at_rest = AtRest(vec![Disk {
            watched,
            writes: Writes::from(vec![all]),
            others: Writes::from(others.collect::<Vec<_>>()),
            before: None,
        }]);
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for sectors in 1.. {
                    if is_over.load(Ordering::Relaxed) {
                        break;
                    }
                    partition.write_all_at(line(sectors).as_bytes(), 0).unwrap();
                }
            });
            std::thread::sleep(Duration::from_millis(50));
            at_rest.begin(|_| false);
            disk.write_all_at(line(1 << 40).as_bytes(), 0).unwrap();
            let written = at_rest.written();
            is_over.store(true, Ordering::Relaxed);
            let written: Vec<String> = written.iter().map(ToString::to_string).collect();
            assert_eq!(written, ["/dev/sda"]);
        });
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_cannot_be_told_from_what_the_others_write_is_not_known() {
        use Rest::{Nothing, Something, Unknown};
        let shown = |all, earlier, later| Shown {
            all,
            others: (earlier, later),
        };
        let exact = shown(100, 40, 40);
        for (before, now, rest) in [
            (exact, exact, Nothing),
            (exact, shown(108, 48, 48), Nothing),
            (exact, shown(109, 48, 48), Something),
            // The others have between 8 and 16.
            (exact, shown(108, 48, 56), Nothing),
            (exact, shown(109, 48, 56), Unknown),
            (exact, shown(116, 48, 56), Unknown),
            (exact, shown(117, 48, 56), Something),
            // And between 4 and 8.
            (shown(100, 40, 44), shown(104, 48, 48), Nothing),
            (shown(100, 40, 44), shown(108, 48, 48), Unknown),
            (shown(100, 40, 44), shown(109, 48, 48), Something),
            // Counters begin anew at their end.
            (shown(u64::MAX, 40, 40), shown(7, 48, 48), Nothing),
            (shown(u64::MAX, 40, 40), shown(8, 48, 48), Something),
        ] {
            assert_eq!(now.rest_since(before), rest, "{before:?} {now:?}");
        }
        let perhaps = Written {
            node: "/dev/sda".into(),
            is_certain: false,
        };
        assert_eq!(perhaps.to_string(), "perhaps /dev/sda");
    }

    #[test]
    fn a_device_that_is_not_there_adds_nothing() {
        let writes = Writes::of(&[DevId::default()]);
        assert_eq!(writes.sectors(), Some(0));
        assert!(writes.is_empty());
    }

    #[test]
    fn a_disk_that_goes_meanwhile_was_not_written_to() {
        let dir = std::env::temp_dir().join(format!("hv-vss-gone-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let put = |name: &str, text: &str| {
            let path = dir.join(name);
            fs::write(&path, text).unwrap();
            Writes::from(vec![File::open(path).unwrap()])
        };
        let stat = "0 0 0 0 0 0 100 0\n";
        for goes in ["disk", "partition"] {
            let disk = Disk {
                watched: Watched {
                    dev: DevId::default(),
                    name: "sda".into(),
                    without: Vec::new(),
                    instead: Vec::new(),
                },
                writes: put("disk", stat),
                others: put("partition", stat),
                before: None,
            };
            let mut at_rest = AtRest(vec![disk]);
            at_rest.begin(|_| false);
            // As little can be read of it as of the file of a device that is gone.
            put(goes, "");
            assert!(at_rest.written().is_empty(), "{goes}");
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
