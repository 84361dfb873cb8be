// SPDX-License-Identifier: GPL-2.0-only

//! What is kept under `/run` about a freeze: a lock, so that two cannot freeze at once, and a
//! record of what is frozen, for whoever has to clean up when daemon and guard are both gone.
//!
//! `/run` is memory, so both can be used while disks are frozen; and all that happens meanwhile
//! goes through descriptors opened before, without a look-up. A record that is there but empty
//! means that the freeze was cut short and that the guard, or an operator, has thawed all of it: the
//! host has yet to be told.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{statfs, FsType, TMPFS_MAGIC};
use serde::{Deserialize, Serialize};

use crate::mounts::DevId;

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
    #[error("{path}, the run_dir of the configuration, is on a disk; it must be on a tmpfs")]
    OnDisk {
        /// The directory.
        path: PathBuf,
    },
    /// The record is not one.
    #[error("{path} is not a record of frozen file systems")]
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
    /// For people: path, type and device.
    pub name: String,
}

/// What is frozen, and by whom.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The process that froze.
    pub pid: u32,
    /// Whether a host waits for it, as against a rehearsal.
    pub for_host: bool,
    /// In the order of the freeze.
    pub frozen: Vec<Entry>,
}

/// The directory that holds both, usually `/run/hv_vss_daemon`.
#[derive(Clone, Debug)]
pub struct RunDir(PathBuf);

/// The lock, held. Its descriptor may be handed on; the lock ends with the last one.
pub type Lock = Flock<File>;

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
        let path = self.0.join("lock");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = match options.open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.make()?;
                options.open(&path)
            }
            other => other,
        };
        let file = file.map_err(failed("open", &path))?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => RecordError::Locked { path },
            errno => failed("lock", &path)(errno.into()),
        })
    }

    /// Writes `record` anew; the result can be changed without a look-up. Needs the lock.
    pub fn write(&self, record: &Record, _lock: &Lock) -> Result<RecordFile, RecordError> {
        let path = self.record();
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("open", &path))?;
        let file = RecordFile { file, path };
        file.put(record)?;
        Ok(file)
    }

    /// The record that is there, if one is. An empty one has no entries.
    pub fn read(&self) -> Result<Option<Record>, RecordError> {
        let path = self.record();
        let mut text = String::new();
        match File::open(&path).and_then(|mut f| f.read_to_string(&mut text)) {
            Ok(0) => {
                return Ok(Some(Record {
                    for_host: true,
                    ..Record::default()
                }))
            }
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed("read", &path)(e)),
        }
        match serde_json::from_str(&text) {
            Ok(record) => Ok(Some(record)),
            Err(source) => Err(RecordError::Malformed { path, source }),
        }
    }

    /// Empties the record: nothing is frozen any more, and a host does not know yet. Needs the
    /// lock.
    pub fn empty(&self, _lock: &Lock) -> Result<(), RecordError> {
        let path = self.record();
        let file = OpenOptions::new().write(true).open(&path);
        file.and_then(|file| file.set_len(0))
            .map_err(failed("empty", &path))
    }

    /// Removes the record: nothing is frozen any more.
    pub fn remove(&self) -> Result<(), RecordError> {
        let path = self.record();
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(e)),
            _ => Ok(()),
        }
    }
}

/// The open record of a freeze.
#[derive(Debug)]
pub struct RecordFile {
    /// The descriptor that the guard gets a copy of.
    pub file: File,
    path: PathBuf,
}

impl RecordFile {
    /// Replaces what it says, through the open descriptor.
    pub fn rewrite(&self, record: &Record) -> Result<(), RecordError> {
        let emptied = self.file.set_len(0);
        emptied.map_err(failed("write", &self.path))?;
        self.put(record)
    }

    /// Fills a file that is empty.
    fn put(&self, record: &Record) -> Result<(), RecordError> {
        let written = serde_json::to_vec(record)
            .map_err(io::Error::from)
            .and_then(|text| self.file.write_all_at(&text, 0));
        written.map_err(failed("write", &self.path))
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
    fn a_record_is_read_as_it_was_written_and_an_emptied_one_has_no_entries() {
        let scratch = Scratch::new("record");
        let run = RunDir::new(&scratch.0);
        assert_eq!(run.read().unwrap(), None);
        let lock = run.lock().unwrap();
        let record = Record {
            pid: 7,
            for_host: true,
            frozen: vec![Entry {
                dev: "259:3".parse().unwrap(),
                name: "/srv (ext4, 259:3)".into(),
            }],
        };
        let file = run.write(&record, &lock).unwrap();
        assert_eq!(run.read().unwrap(), Some(record));
        file.file.set_len(0).unwrap();
        assert_eq!(run.read().unwrap().unwrap().frozen, []);
        run.remove().unwrap();
        assert_eq!(run.read().unwrap(), None);
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
    fn a_damaged_record_is_named() {
        let scratch = Scratch::new("damaged");
        let run = RunDir::new(&scratch.0);
        let _lock = run.lock().unwrap();
        std::fs::write(run.record(), "{").unwrap();
        let error = run.read().unwrap_err();
        assert!(error.to_string().contains("frozen.json"), "{error}");
    }
}
