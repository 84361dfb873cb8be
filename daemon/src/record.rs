// SPDX-License-Identifier: GPL-2.0-only

//! What is kept under `/run` about a freeze: a lock, so that two cannot freeze at once, and a
//! record of what is frozen, for whoever has to clean up when daemon and guard are both gone.
//!
//! `/run` is memory, so both can be used while disks are frozen. A record is there from before the
//! first freeze until all is thawed, and never in between without what it has to say: it is replaced,
//! not rewritten. Beside it is the word for a later daemon that a freeze has ended before its THAW, so
//! that this THAW must be failed, and the record of hooks that were called and have to be let go.
//!
//! Each record has a lock, which whoever owns it has open to write. So its end, be it a death, closes a file that was
//! written to, and the kernel tells ([`Ends`]): nobody has to look now and then.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, AsRawFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::statfs::{statfs, FsType, TMPFS_MAGIC};
use serde::{de::DeserializeOwned, Deserialize, Serialize};

use crate::calls::HookRecord;
use crate::mounts::DevId;

/// Where it is kept. No setting: whoever undoes after a death, and the next daemon, would have to know the one
/// that the dead daemon went by.
pub const RUN_DIR: &str = "/run/hv_vss";

const LOCK: &str = "lock";
const HOOKS_LOCK: &str = "hooks.lock";

/// `RAMFS_MAGIC` of `linux/magic.h`.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// Why the files under `/run` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A file or the directory cannot be used.
    #[error("cannot {doing} {path}")]
    Io {
        /// What was to be done with it.
        doing: &'static str,
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody else is freezing: a daemon, a rehearsal, or the guard of one.
    #[error("somebody else holds {path}: another daemon or a rehearsal has frozen something")]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// They would be frozen themselves.
    #[error("{path} is on a disk; it must be on a tmpfs")]
    OnDisk {
        /// The directory.
        path: PathBuf,
    },
    /// The record is not one.
    #[error("{path} is not a record of ours")]
    Malformed {
        /// The record.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// One frozen file system in the record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The superblock's device number, by which it is found again.
    pub dev: DevId,
    /// The devices that it is on. By one of them it is found when it is mounted nowhere any more and its
    /// number is an anonymous one, which no device has.
    #[serde(default)]
    pub devices: Vec<DevId>,
    /// For people: path, type and device.
    pub name: String,
}

/// What is frozen, and by whom.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The process that froze.
    pub pid: u32,
    /// Its guard, with the time of its start.
    pub guard: Option<(u32, u64)>,
    /// Whether a host waits for it, as against a rehearsal.
    pub for_host: bool,
    /// In the order of the freeze.
    pub frozen: Vec<Entry>,
    /// What somebody has left who has died, where not all that it lists could be thawed. Whoever ends the freeze
    /// of this one leaves that behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub earlier: Option<Box<Record>>,
}

impl Entry {
    /// Whether that is of the same file system, or of one on the same devices, which are never of two at a time; some
    /// of them may be, those of a seed of btrfs.
    fn is_or_was(&self, other: &Entry) -> bool {
        let is_own = self.dev.major != 0 && self.dev == other.dev;
        is_own || (!self.devices.is_empty() && self.devices == other.devices)
    }
}

impl Record {
    /// All that it lists and of which nobody knows that it is thawed, as if one had frozen it.
    pub fn as_one(self) -> Record {
        let Some(earlier) = self.earlier else {
            return self;
        };
        let earlier = earlier.as_one();
        let is_known = |it: &Entry| self.frozen.iter().any(|ours| ours.dev == it.dev);
        let theirs = earlier.frozen.into_iter().filter(|it| !is_known(it));
        Record {
            for_host: self.for_host || earlier.for_host,
            frozen: theirs.chain(self.frozen.iter().cloned()).collect(),
            earlier: None,
            ..self
        }
    }

    /// Leaves out what is among these: somebody has frozen them since, so it had been thawed. Whether anything was.
    pub fn leave_out(&mut self, these: &[Entry]) -> bool {
        let before = self.frozen.len();
        self.frozen
            .retain(|it| !these.iter().any(|other| other.is_or_was(it)));
        self.frozen.len() < before
    }
}

/// The directory that holds both: [`RUN_DIR`], save for tests.
#[derive(Clone, Debug)]
pub struct RunDir(PathBuf);

/// The lock, held. A copy of its descriptor may be handed on. When this is dropped, the lock ends for all
/// who have one; when its process dies, it ends with the last one.
pub type Lock = Flock<File>;

/// Hears when a lock is let go, by whoever had it last: also by this very process. The kernel tells of the close a moment
/// before it lets go the lock, and whoever runs first on the processor that it is told on can look in between.
#[derive(Debug)]
pub struct Ends(Inotify);

impl Ends {
    /// Whether one was since this was asked last.
    pub fn any(&self) -> bool {
        let mut any = false;
        while self.0.read_events().is_ok_and(|it| !it.is_empty()) {
            any = true;
        }
        any
    }
}

impl AsRawFd for Ends {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Default for RunDir {
    fn default() -> Self {
        RunDir::new(RUN_DIR)
    }
}

impl RunDir {
    /// The directory at `path`; it is made when it is first needed.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        RunDir(path.into())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    fn record(&self) -> PathBuf {
        self.0.join("frozen.json")
    }

    fn hooks(&self) -> PathBuf {
        self.0.join("hooks.json")
    }

    /// Where a record of hooks is put that nobody can read.
    pub fn hooks_aside(&self) -> PathBuf {
        self.0.join("hooks.json.bad")
    }

    fn word(&self) -> PathBuf {
        self.0.join("broken")
    }

    fn spare_word(&self) -> PathBuf {
        self.0.join("broken.spare")
    }

    /// Makes the directory, and makes sure that it is in memory: on anything else the record could
    /// not be changed while that is frozen.
    pub fn check(&self) -> Result<(), RecordError> {
        let path = &self.0;
        self.make()?;
        let found = statfs(path).map_err(|e| failed("look at", path)(e.into()))?;
        if [TMPFS_MAGIC, RAMFS_MAGIC].contains(&found.filesystem_type()) {
            return Ok(());
        }
        Err(RecordError::OnDisk { path: path.clone() })
    }

    fn make(&self) -> Result<(), RecordError> {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.0);
        made.map_err(failed("make", &self.0))
    }

    /// Takes the lock, or fails at once with [`RecordError::Locked`].
    pub fn lock(&self) -> Result<Lock, RecordError> {
        self.lock_file(LOCK)
    }

    /// The same for calling hooks, which goes on beyond a freeze.
    pub fn lock_hooks(&self) -> Result<Lock, RecordError> {
        self.lock_file(HOOKS_LOCK)
    }

    /// Whether nobody has the lock. It is not opened to write for that, which would be told as an [end](Ends).
    pub fn is_free(&self) -> bool {
        self.is_free_file(LOCK)
    }

    /// The same of that for hooks.
    pub fn is_free_of_hooks(&self) -> bool {
        self.is_free_file(HOOKS_LOCK)
    }

    fn is_free_file(&self, name: &str) -> bool {
        let file = File::open(self.0.join(name));
        let locked = file.map(|it| Flock::lock(it, FlockArg::LockExclusiveNonblock));
        !matches!(locked, Ok(Err((_, Errno::EWOULDBLOCK))))
    }

    /// Hears from here on when somebody is done with one of the locks.
    pub fn ends(&self) -> Result<Ends, RecordError> {
        let flags = InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK;
        let inotify = Inotify::init(flags).map_err(|e| failed("watch", &self.0)(e.into()))?;
        for name in [LOCK, HOOKS_LOCK] {
            let path = self.0.join(name);
            self.open_lock(&path)?;
            let watched = inotify.add_watch(&path, AddWatchFlags::IN_CLOSE_WRITE);
            watched.map_err(|e| failed("watch", &path)(e.into()))?;
        }
        Ok(Ends(inotify))
    }

    fn open_lock(&self, path: &Path) -> Result<File, RecordError> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = match options.open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.make()?;
                options.open(path)
            }
            other => other,
        };
        file.map_err(failed("open", path))
    }

    fn lock_file(&self, name: &str) -> Result<Lock, RecordError> {
        let path = self.0.join(name);
        let file = self.open_lock(&path)?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => RecordError::Locked { path },
            errno => failed("lock", &path)(errno.into()),
        })
    }

    /// Puts `record` in the place of the one that is there, if one is. Needs the lock.
    pub fn write(&self, record: &Record, _lock: &Lock) -> Result<(), RecordError> {
        self.write_json(&self.record(), record)
    }

    fn write_json(&self, path: &Path, what: &impl Serialize) -> Result<(), RecordError> {
        let text = serde_json::to_vec(what).map_err(io::Error::from);
        text.and_then(|text| self.replace(path, &text))
            .map_err(failed("write", path))
    }

    fn replace(&self, path: &Path, text: &[u8]) -> io::Result<()> {
        let new = path.with_extension("new");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        options.open(&new)?.write_all(text)?;
        std::fs::rename(&new, path)
    }

    /// The record that is there, if one is.
    pub fn read(&self) -> Result<Option<Record>, RecordError> {
        read_json(self.record())
    }

    /// Puts `record` in the place of what is there of hooks. Needs the lock for them, unless it is that of
    /// a dead process.
    pub fn write_hooks(&self, record: &HookRecord) -> Result<(), RecordError> {
        self.write_json(&self.hooks(), record)
    }

    /// What is there of hooks.
    pub fn read_hooks(&self) -> Result<Option<HookRecord>, RecordError> {
        read_json(self.hooks())
    }

    /// Puts [aside](RunDir::hooks_aside) what is there of hooks and is no record. Needs the lock for them.
    pub fn put_hooks_aside(&self, _lock: &Lock) -> Result<(), RecordError> {
        let path = self.hooks();
        std::fs::rename(&path, self.hooks_aside()).map_err(failed("rename", &path))
    }

    /// All hooks have been let go.
    pub fn remove_hooks(&self) -> Result<(), RecordError> {
        remove_if_there(&self.hooks())
    }

    /// What the record's owner has frozen is thawed: what it has of an earlier one is left, if it has any. Needs the
    /// lock, of which the owner's guard has a copy.
    pub fn close(&self) -> Result<(), RecordError> {
        match self.read()?.and_then(|it| it.earlier) {
            Some(earlier) => self.write_json(&self.record(), &earlier),
            None => self.remove(),
        }
    }

    /// Removes the record: nothing is frozen any more.
    pub fn remove(&self) -> Result<(), RecordError> {
        remove_if_there(&self.record())
    }

    /// Has a word ready, unless it is, that can be left when there is no room left for one.
    pub fn prepare_word(&self) -> Result<(), RecordError> {
        let path = self.spare_word();
        if path.exists() {
            return Ok(());
        }
        let why = "it ended early, and there was no room to say why";
        self.replace(&path, why.as_bytes())
            .map_err(failed("write", &path))
    }

    /// Leaves word for a later daemon why the THAW that the host has yet to ask for must fail.
    pub fn leave_word(&self, why: &str) -> Result<(), RecordError> {
        let path = self.word();
        let left = match self.replace(&path, why.as_bytes()) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.make()?;
                self.replace(&path, why.as_bytes())
            }
            left => left,
        };
        left.or_else(|error| std::fs::rename(self.spare_word(), &path).map_err(|_| error))
            .map_err(failed("write", &path))
    }

    /// The word that was left, if one was.
    pub fn word_left(&self) -> Result<Option<String>, RecordError> {
        read_if_there(&self.word())
    }

    /// Takes the word back: the host has begun anew.
    pub fn take_word_back(&self) -> Result<(), RecordError> {
        remove_if_there(&self.word())
    }
}

fn read_json<T: DeserializeOwned>(path: PathBuf) -> Result<Option<T>, RecordError> {
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed("read", &path)(e)),
    };
    match serde_json::from_slice(&text) {
        Ok(found) => Ok(Some(found)),
        Err(source) => Err(RecordError::Malformed { path, source }),
    }
}

fn read_if_there(path: &Path) -> Result<Option<String>, RecordError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed("read", path)(e)),
    }
}

fn remove_if_there(path: &Path) -> Result<(), RecordError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(e)),
        _ => Ok(()),
    }
}

fn failed<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> RecordError + 'a {
    move |source| RecordError::Io {
        doing,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("hv-vss-{name}-{}", std::process::id()));
            Scratch(dir)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written_last_and_the_word_is_another_matter() {
        let scratch = Scratch::new("record");
        let run = RunDir::new(&scratch.0);
        assert_eq!(run.read().unwrap(), None);
        let lock = run.lock().unwrap();
        let entry = |dev: &str| Entry {
            dev: dev.parse().unwrap(),
            devices: vec![dev.parse().unwrap()],
            name: "/srv (ext4)".into(),
        };
        let mut record = Record {
            pid: 7,
            guard: Some((8, 4711)),
            for_host: true,
            frozen: vec![entry("259:3"), entry("259:4")],
            earlier: None,
        };
        run.write(&record, &lock).unwrap();
        record.frozen.pop();
        run.write(&record, &lock).unwrap();
        assert_eq!(run.read().unwrap(), Some(record));
        assert_eq!(run.word_left().unwrap(), None);
        run.leave_word("it was stopped").unwrap();
        run.remove().unwrap();
        assert_eq!(run.read().unwrap(), None);
        assert_eq!(run.word_left().unwrap().unwrap(), "it was stopped");
        run.take_word_back().unwrap();
        assert_eq!(run.word_left().unwrap(), None);
    }

    #[test]
    fn a_word_is_left_whatever_has_become_of_the_folder() {
        let scratch = Scratch::new("word");
        let run = RunDir::new(&scratch.0);
        let _lock = run.lock().unwrap();
        run.prepare_word().unwrap();
        // There is no room for another.
        std::fs::create_dir(run.word().with_extension("new")).unwrap();
        run.leave_word("it was stopped").unwrap();
        assert!(run.word_left().unwrap().unwrap().contains("no room"));
        std::fs::remove_dir_all(&scratch.0).unwrap();
        run.leave_word("it was stopped").unwrap();
        assert_eq!(run.word_left().unwrap().unwrap(), "it was stopped");
    }

    #[test]
    fn what_an_earlier_one_has_left_outlives_the_freeze_of_the_next() {
        let scratch = Scratch::new("earlier");
        let run = RunDir::new(&scratch.0);
        let lock = run.lock().unwrap();
        let entry = |dev: &str, devices: &[&str]| Entry {
            dev: dev.parse().unwrap(),
            devices: devices.iter().map(|it| it.parse().unwrap()).collect(),
            name: dev.into(),
        };
        let mut earlier = Record {
            pid: 7,
            for_host: true,
            frozen: vec![
                entry("8:1", &[]),
                entry("8:2", &[]),
                entry("0:40", &["8:3", "8:4"]),
            ],
            ..Record::default()
        };
        let ours = Record {
            pid: 9,
            frozen: vec![entry("8:2", &[]), entry("8:5", &[])],
            earlier: Some(Box::new(earlier.clone())),
            ..Record::default()
        };
        run.write(&ours, &lock).unwrap();
        let all = ours.as_one();
        let devs: Vec<String> = all.frozen.iter().map(|it| it.dev.to_string()).collect();
        assert_eq!(devs, ["8:1", "0:40", "8:2", "8:5"]);
        assert_eq!((all.pid, all.for_host, all.earlier), (9, true, None));
        run.close().unwrap();
        assert_eq!(run.read().unwrap(), Some(earlier.clone()));
        // Another that has sprouted from its seed says nothing of it.
        assert!(!earlier.leave_out(&[entry("0:40", &["8:3", "8:5"])]));
        // The other has been unmounted and mounted since, or it could not have been frozen.
        assert!(earlier.leave_out(&[entry("8:1", &[]), entry("0:41", &["8:3", "8:4"])]));
        assert_eq!(earlier.frozen, [entry("8:2", &[])]);
        assert!(!earlier.leave_out(&[entry("8:1", &[])]));
        run.close().unwrap();
        assert_eq!(run.read().unwrap(), None);
        run.close().unwrap();
    }

    #[test]
    fn two_cannot_hold_the_lock() {
        let scratch = Scratch::new("lock");
        let run = RunDir::new(&scratch.0);
        let lock = run.lock().unwrap();
        assert!(matches!(run.lock(), Err(RecordError::Locked { .. })));
        drop(lock);
        run.lock().unwrap();
    }

    #[test]
    fn the_end_of_a_lock_is_told_when_the_last_copy_is_closed_and_a_look_is_none() {
        let scratch = Scratch::new("ends");
        let run = RunDir::new(&scratch.0);
        let ends = run.ends().unwrap();
        assert!(!ends.any());
        for (lock, is_free) in [
            (run.lock(), RunDir::is_free as fn(&RunDir) -> bool),
            (run.lock_hooks(), RunDir::is_free_of_hooks),
        ] {
            let lock = lock.unwrap();
            let copy = lock.try_clone().unwrap();
            assert!(!is_free(&run));
            drop(lock);
            assert!(is_free(&run));
            assert!(!ends.any());
            drop(copy);
            assert!(ends.any());
            assert!(!ends.any());
        }
    }

    #[test]
    fn a_damaged_record_is_named() {
        let scratch = Scratch::new("damaged");
        let run = RunDir::new(&scratch.0);
        let _lock = run.lock().unwrap();
        std::fs::write(run.record(), "{").unwrap();
        let error = run.read().unwrap_err();
        assert!(error.to_string().contains("frozen.json"), "{error}");
    }
}
