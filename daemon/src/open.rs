// SPDX-License-Identifier: GPL-2.0-only

//! Gets a descriptor for each planned file system, and makes sure that it is the right one.
//!
//! Between reading the table and opening a path, mounts come and go: the path may lead to the
//! parent file system, to whatever was mounted over it, to a FIFO. So nothing is opened that could
//! block, and what was opened is compared with what was planned before it is used.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{open, OFlag};
use nix::sys::stat::Mode;

use crate::plan::{FileSystem, Place};
use crate::sys;

/// Why one place could not be used.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The path cannot be opened.
    #[error("cannot open {path}")]
    Open {
        /// Which path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Neither a directory nor a regular file.
    #[error("{path} is neither a directory nor a regular file")]
    Special {
        /// Which path.
        path: PathBuf,
    },
    /// It leads to another file system than planned.
    #[error("{path} leads to another file system ({found}) by now")]
    Other {
        /// Which path.
        path: PathBuf,
        /// Device number of what is there.
        found: crate::mounts::DevId,
    },
}

/// Why a file system could not be opened at all.
#[derive(Debug, thiserror::Error)]
#[error("cannot reach {file_system}: {}", list(.tried))]
pub struct OpenError {
    /// Which, in words.
    pub file_system: String,
    /// What came of each place, in the order tried.
    pub tried: Vec<PlaceError>,
}

impl OpenError {
    /// Whether the file system itself is out of order (its device failed, or it shut down after an
    /// error), so that nothing can be written to it any more.
    pub fn is_broken(&self) -> bool {
        self.tried.iter().any(|e| match e {
            PlaceError::Open { source, .. } => matches!(
                source.raw_os_error().map(Errno::from_raw),
                Some(Errno::EIO | Errno::ENXIO | Errno::ENODEV | Errno::ESHUTDOWN | Errno::EUCLEAN)
            ),
            _ => false,
        })
    }
}

fn list(errors: &[PlaceError]) -> String {
    let words = errors.iter().map(|e| match e {
        PlaceError::Open { source, .. } => format!("{e}: {source}"),
        _ => e.to_string(),
    });
    words.collect::<Vec<_>>().join("; ")
}

/// Opens `file_system` through the first of its places that still leads to it.
pub fn open_file_system(file_system: &FileSystem) -> Result<OwnedFd, OpenError> {
    let mut tried = Vec::new();
    for place in &file_system.places {
        match open_place(file_system, place) {
            Ok(fd) => return Ok(fd),
            Err(error) => tried.push(error),
        }
    }
    Err(OpenError {
        file_system: file_system.to_string(),
        tried,
    })
}

fn open_place(file_system: &FileSystem, place: &Place) -> Result<OwnedFd, PlaceError> {
    let path = place.path.as_path();
    let fail = |errno: Errno| PlaceError::Open {
        path: path.to_owned(),
        source: errno.into(),
    };
    // A directory can be opened at once: nothing happens but the look-up.
    let fd = match open_nonblocking(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
        Err(Errno::ENOTDIR) => open_file(path)?,
        other => other.map_err(fail)?,
    };
    let found = sys::identify(fd.as_fd()).map_err(|source| PlaceError::Open {
        path: path.to_owned(),
        source,
    })?;
    let dev = crate::mounts::DevId {
        major: found.major,
        minor: found.minor,
    };
    // Subvolumes of btrfs have numbers of their own, so there the mount's id decides.
    let same = if file_system.dev.major != 0 {
        dev == file_system.dev
    } else {
        dev == file_system.dev || found.mount_id == Some(place.id)
    };
    if same {
        Ok(fd)
    } else {
        Err(PlaceError::Other {
            path: path.to_owned(),
            found: dev,
        })
    }
}

/// Opens a mount point that is no directory, looking at its type before doing anything to it: to
/// open a FIFO or a device node has effects of its own.
fn open_file(path: &Path) -> Result<OwnedFd, PlaceError> {
    let fail = |source: io::Error| PlaceError::Open {
        path: path.to_owned(),
        source,
    };
    let handle = open_nonblocking(path, OFlag::O_PATH).map_err(|e| fail(e.into()))?;
    let found = sys::identify(handle.as_fd()).map_err(fail)?;
    if found.mode & libc::S_IFMT != libc::S_IFREG {
        return Err(PlaceError::Special {
            path: path.to_owned(),
        });
    }
    let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&handle));
    open_nonblocking(Path::new(&again), OFlag::O_RDONLY).map_err(|e| fail(e.into()))
}

fn open_nonblocking(path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let common = OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    open(path, flags | common, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::{self, DevId};
    use std::os::unix::fs::MetadataExt;

    fn file_system(path: &Path, dev: DevId) -> FileSystem {
        FileSystem {
            dev,
            fs_type: "ext4".into(),
            source: None,
            places: vec![Place {
                namespace: 0,
                id: 0,
                path: path.to_owned(),
                covered: false,
            }],
        }
    }

    fn dev_of(path: &Path) -> DevId {
        DevId::from_raw(std::fs::metadata(path).unwrap().dev())
    }

    #[test]
    fn every_mounted_directory_is_what_it_is_planned_as() {
        let table = mounts::read(Path::new("/proc/self/mountinfo"), 0).unwrap();
        let root = table.iter().rfind(|m| m.path == Path::new("/")).unwrap();
        let mut planned = file_system(Path::new("/"), root.dev);
        planned.places[0].id = root.id;
        open_file_system(&planned).unwrap();
    }

    #[test]
    fn a_path_that_leads_elsewhere_is_refused() {
        let planned = file_system(Path::new("/proc"), dev_of(Path::new("/")));
        let error = open_file_system(&planned).unwrap_err();
        assert!(
            error.to_string().contains("leads to another file system"),
            "{error}"
        );
        assert!(!error.is_broken());
    }

    #[test]
    fn a_fifo_is_neither_opened_nor_waited_for() {
        let dir = std::env::temp_dir().join(format!("hv-vss-open-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let fifo = dir.join("fifo");
        nix::unistd::mkfifo(&fifo, Mode::S_IRUSR).unwrap();
        let plain = dir.join("plain");
        std::fs::write(&plain, b"x").unwrap();
        let mut planned = file_system(&fifo, dev_of(&dir));
        let error = open_file_system(&planned).unwrap_err();
        assert!(
            matches!(error.tried[..], [PlaceError::Special { .. }]),
            "{error}"
        );
        // Another place of the same file system is taken instead, here a regular file.
        let other = file_system(&plain, planned.dev);
        planned.places.extend(other.places);
        open_file_system(&planned).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
