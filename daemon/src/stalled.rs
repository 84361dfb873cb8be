// SPDX-License-Identifier: GPL-2.0-only

//! Which devices answer reads and have writes wait until somebody does something: a file system on one syncs and
//! freezes no sooner than that, though a look at its disk shows nothing.
//!
//! A thin pool without room waits for that to be given (`Documentation/admin-guide/device-mapper/thin-provisioning.rst`).
//! A mirror of the device mapper that has lost a disk waits for a program to replace its table (`do_failures` in
//! `drivers/md/dm-raid1.c`). An md whose metadata is kept by a program waits for its word before it is written to
//! (`array_state`, `Documentation/admin-guide/md.rst`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::apart::{Lot, Questions};
use crate::mounts::DevId;
use crate::moving::{self, MAPPER};
use crate::superblocks::folder_of;
use crate::sys::{self, Mapped};
use crate::topology::{below, Device};

/// How long the device mapper may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long the program that keeps the metadata of an md may take for its word, and how often it is looked whether it
/// is given. It writes to the disks of the array first.
const WORD_TIME: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(20);

/// The devices that may come to that, of those that were asked for and what is below them. What they say is open, so
/// that no path has to be looked up to hear it again.
#[derive(Debug, Default)]
pub struct Suspects {
    all: Vec<Suspect>,
    /// Of whom the device mapper is asked, if it is of any.
    mapper: Option<Arc<File>>,
}

#[derive(Debug)]
struct Suspect {
    dev: DevId,
    /// The kernel's name.
    name: String,
    /// Of the devices that were asked for, those that stand on it, itself among them.
    carries: BTreeSet<DevId>,
    /// What an md says that a program keeps the metadata of; the device mapper is asked for the others.
    state: Option<File>,
}

impl Suspects {
    /// Those among `all` devices, below the ones that were `asked` for.
    pub fn of(all: &BTreeMap<DevId, Device>, asked: &BTreeSet<DevId>) -> Self {
        let folders = all.keys().filter_map(|dev| Some((*dev, folder_of(*dev)?)));
        let folders: Vec<_> = folders.collect();
        let is_mapped = |folder: &Path| folder.join("dm").exists();
        let mapped = folders.iter().filter(|(_, folder)| is_mapped(folder));
        let mapped: Vec<DevId> = mapped.map(|(dev, _)| *dev).collect();
        let mapper = match mapped.is_empty() {
            true => None,
            false => File::open(MAPPER).ok().map(Arc::new),
        };
        let told = mapper.as_deref().map(|it| ask(it, &mapped, false));
        let told = told.unwrap_or_default();
        let is_suspect = |dev: &DevId| told.get(dev).is_some_and(|it| it.is_suspect);
        let all = folders.into_iter().filter_map(|(dev, folder)| {
            let state = state_of(&folder);
            let name = folder.file_name()?.to_string_lossy().into_owned();
            let stands_on_it = |it: &&DevId| below(all, **it).contains(&dev);
            (state.is_some() || is_suspect(&dev)).then(|| Suspect {
                dev,
                name,
                carries: asked.iter().filter(stands_on_it).copied().collect(),
                state,
            })
        });
        let all: Vec<Suspect> = all.collect();
        let mapper = mapper.filter(|_| all.iter().any(|it| it.state.is_none()));
        Suspects { all, mapper }
    }

    /// Those that have writes wait now, each with what stands on it of those that were asked for, and why it does, in
    /// words.
    pub fn stalled(&self) -> Vec<(&BTreeSet<DevId>, String)> {
        let mapped = self.all.iter().filter(|it| it.state.is_none());
        let mapped: Vec<DevId> = mapped.map(|it| it.dev).collect();
        let told = self.mapper.as_deref().map(|it| ask(it, &mapped, true));
        let told = told.unwrap_or_default();
        let states = self.all.iter();
        let states = states.filter_map(|it| Some((it.dev, it.state.as_ref()?)));
        let without_a_word = without_a_word(states.collect(), Instant::now() + WORD_TIME, |it| {
            waits_for_a_word(it)
        });
        let stalled = self.all.iter().filter_map(|it| {
            let why = match without_a_word.contains(&it.dev) {
                true => Some(WITHOUT_A_WORD),
                false => told.get(&it.dev)?.why,
            };
            Some((&it.carries, format!("{} {}", it.name, why?)))
        });
        stalled.collect()
    }
}

/// Why writes wait.
const FULL: &str = "is full, and what is written there waits until it is given more room";
const LOST_A_DISK: &str =
    "has lost a disk or its log, and what is written there waits until a program (dmeventd) has seen to that";
const WITHOUT_A_WORD: &str =
    "has its metadata kept by a program (mdmon) that does not answer, and what is written there waits for that";

/// What the device mapper tells of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Told {
    /// It may come to that. So may one of which nothing was told.
    is_suspect: bool,
    /// Why it has.
    why: Option<&'static str>,
}

/// Asks the device mapper for each of these, and `in_detail` for what a mirror does when it loses a disk.
fn ask(mapper: &File, all: &[DevId], in_detail: bool) -> BTreeMap<DevId, Told> {
    static ASKED: Questions<DevId> = Questions::new();
    let lot = Lot {
        abouts: all.to_vec(),
        fds: vec![mapper.as_fd()],
    };
    let them = all.to_vec();
    let question = move |number: usize, fds: &[OwnedFd]| {
        let (dev, fd) = them.get(number).zip(fds.first())?;
        let status = sys::mapper_status(fd.as_fd(), *dev);
        let table = || sys::mapper_table(fd.as_fd(), *dev);
        Some(tell(status, in_detail.then_some(table)))
    };
    let mut told = BTreeMap::new();
    ASKED.ask_all(vec![lot], PATIENCE, question, |number, said| {
        let unknown = Told {
            is_suspect: true,
            why: None,
        };
        let said = said.ok().flatten().unwrap_or(unknown);
        told.extend(all.get(number).map(|dev| (*dev, said)));
    });
    told
}

fn tell(
    status: io::Result<Vec<Mapped>>,
    table: Option<impl FnOnce() -> io::Result<Vec<Mapped>>>,
) -> Told {
    let Ok(targets) = status else {
        return Told::default();
    };
    let is = |kind: &'static str| move |it: &&Mapped| it.kind == kind;
    let mut mirrors = targets.iter().filter(is("mirror"));
    let has_lost = mirrors.any(|it| has_lost_a_disk(&it.status));
    let waits = |table: Vec<Mapped>| {
        table
            .iter()
            .any(|it| is("mirror")(&it) && waits(&it.status))
    };
    let mut pools = targets.iter().filter(is("thin-pool"));
    let why = if pools.any(|it| is_full(&it.status)) {
        Some(FULL)
    } else if has_lost && table.is_some_and(|it| it().is_ok_and(waits)) {
        Some(LOST_A_DISK)
    } else {
        None
    };
    let is_suspect = |it: &Mapped| ["thin-pool", "mirror"].contains(&it.kind.as_str());
    Told {
        is_suspect: targets.iter().any(is_suspect),
        why,
    }
}

/// Of the status of a thin pool. One that has errors instead, from the first or after a minute of that, has none wait.
fn is_full(status: &str) -> bool {
    let has = |word: &str| status.split_ascii_whitespace().any(|it| it == word);
    has("out_of_data_space") && has("queue_if_no_space")
}

/// Of the status of a mirror: how much is in sync, how its disks are, each a letter, and its log. One that has failed to
/// be read or to be brought in sync is still written to where it is.
fn has_lost_a_disk(status: &str) -> bool {
    let words: Vec<&str> = status.split_ascii_whitespace().collect();
    let legs = words.first().and_then(|it| it.parse::<usize>().ok());
    let word = |after: usize| legs.and_then(|legs| words.get(legs.checked_add(after)?));
    let health = |letters: &[char]| word(3).is_some_and(|it| it.contains(letters));
    let in_sync = word(1).and_then(|it| it.split_once('/'));
    let is_in_sync = in_sync.is_some_and(|(some, all)| some == all);
    let log = words.last().filter(|it| ["D", "F"].contains(it));
    health(&['D', 'F']) || (health(&['R', 'S', 'U']) && !is_in_sync) || log.is_some()
}

/// Of the table of a mirror: what it does then.
fn waits(table: &str) -> bool {
    let has = |word: &str| table.split_ascii_whitespace().any(|it| it == word);
    has("handle_errors") && !has("keep_log")
}

/// The state of an md whose metadata is kept by a program.
fn state_of(folder: &Path) -> Option<File> {
    let version = fs::read_to_string(folder.join("md/metadata_version")).ok()?;
    let state = version.starts_with("external:");
    state.then(|| File::open(folder.join("md/array_state")).ok())?
}

fn waits_for_a_word(state: &File) -> bool {
    moving::word(state).is_some_and(|it| it == "write-pending")
}

/// Those that wait for a word at each look until then.
fn without_a_word<T>(
    mut states: Vec<(DevId, T)>,
    until: Instant,
    waits: impl Fn(&T) -> bool,
) -> BTreeSet<DevId> {
    loop {
        states.retain(|(_, state)| waits(state));
        if states.is_empty() || Instant::now() >= until {
            return states.into_iter().map(|(dev, _)| dev).collect();
        }
        thread::sleep(TICK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn told(kind: &str, status: &str, table: &str) -> Option<&'static str> {
        let all = |text: &str| {
            let (kind, status) = (kind.to_owned(), text.to_owned());
            Ok(vec![Mapped { kind, status }])
        };
        tell(all(status), Some(|| all(table))).why
    }

    #[test]
    fn a_pool_has_writes_wait_when_it_is_full_and_is_not_to_answer_with_errors() {
        let pool = |mode: &str, full: &str| {
            let status = format!("0 19/1024 512/512 - {mode} discard_passdown {full} - 1024");
            told("thin-pool", &status, "")
        };
        assert_eq!(pool("out_of_data_space", "queue_if_no_space"), Some(FULL));
        assert_eq!(pool("out_of_data_space", "error_if_no_space"), None);
        assert_eq!(pool("rw", "queue_if_no_space"), None);
        assert_eq!(pool("ro", "queue_if_no_space"), None);
        assert_eq!(told("thin-pool", "Fail", ""), None);
        assert_eq!(told("thin", "8192 8191", ""), None);
    }

    #[test]
    fn a_mirror_has_writes_wait_when_it_has_lost_something_and_is_to_tell_a_program() {
        let table = "core 1 1024 2 253:1 0 253:2 0 1 handle_errors";
        let mirror = |status: &str, table: &str| told("mirror", status, table);
        for (status, is_so) in [
            ("2 253:1 253:2 400/400 1 AA 1 core", false),
            ("2 253:1 253:2 400/400 1 AD 1 core", true),
            ("2 253:1 253:2 400/400 1 FA 1 core", true),
            ("2 253:1 253:2 400/400 1 AR 1 core", false),
            ("2 253:1 253:2 399/400 1 AR 1 core", true),
            ("2 253:1 253:2 399/400 1 AA 1 core", false),
            ("2 253:1 253:2 400/400 1 AA 3 disk 253:0 A", false),
            ("2 253:1 253:2 400/400 1 AA 3 disk 253:0 D", true),
            ("", false),
        ] {
            let why = is_so.then_some(LOST_A_DISK);
            assert_eq!(mirror(status, table), why, "{status}");
        }
        let lost = "2 253:1 253:2 400/400 1 AD 1 core";
        assert_eq!(mirror(lost, "core 1 1024 2 253:1 0 253:2 0"), None);
        let keeps = "core 1 1024 2 253:1 0 253:2 0 2 handle_errors keep_log";
        assert_eq!(mirror(lost, keeps), None);
    }

    #[test]
    fn an_md_whose_metadata_a_program_keeps_waits_for_its_word() {
        let root = std::env::temp_dir().join(format!("hv-vss-stalled-{}", std::process::id()));
        let put = |name: &str, text: &str| {
            fs::create_dir_all(root.join("md")).unwrap();
            fs::write(root.join("md").join(name), format!("{text}\n")).unwrap();
        };
        put("array_state", "write-pending");
        put("metadata_version", "1.2");
        // The kernel writes its own.
        assert!(state_of(&root).is_none());
        put("metadata_version", "external:/md127/0");
        let state = state_of(&root).unwrap();
        assert!(waits_for_a_word(&state));
        put("array_state", "active");
        assert!(!waits_for_a_word(&state));
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn each_has_all_of_the_time_for_its_word() {
        let [dead, busy] = [127, 126].map(|minor| DevId { major: 9, minor });
        let looks = Cell::new(0);
        // The busy one waits again by the time that is over.
        let waits = |it: &DevId| {
            looks.set(looks.get() + u32::from(*it == dead));
            *it == dead || looks.get() > 1
        };
        let both = vec![(dead, dead), (busy, busy)];
        let without = without_a_word(both, Instant::now() + TICK * 3, waits);
        assert_eq!(without, [dead].into());
        let none = without_a_word(vec![(dead, ())], Instant::now() + WORD_TIME, |()| false);
        assert!(none.is_empty());
    }
}
