// SPDX-License-Identifier: GPL-2.0-only

//! Gets a descriptor for each planned file system, and makes sure that it is the right one.
//!
//! Between reading the table and opening a path, mounts come and go: the path may lead to the
//! parent file system, to whatever was mounted over it, to a FIFO. So nothing is opened that could
//! block, and what was opened is compared with what was planned before it is used.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{open, openat, OFlag};
use nix::mount::{umount2, MntFlags};
use nix::sys::stat::Mode;

use crate::machine::Ways;
use crate::mounts::{self, DevId, Mount};
use crate::plan::{FileSystem, Place};
use crate::sys::{self, Identity};

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
        found: DevId,
    },
}

impl PlaceError {
    fn open(path: &Path, source: io::Error) -> Self {
        PlaceError::Open {
            path: path.to_owned(),
            source,
        }
    }
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
///
/// If none does because other mounts lie over all of them, those are taken away in a private copy
/// of the namespace, where nobody else notices.
pub fn open_file_system(ways: &Ways, file_system: &FileSystem) -> Result<OwnedFd, OpenError> {
    let mut tried = Vec::new();
    let proc = ways.proc.as_fd();
    let namespaces = &ways.namespaces;
    for place in &file_system.places {
        let opened = namespaces.within(place.namespace, || open_place(proc, file_system, place));
        match opened {
            Ok(Ok(fd)) => return Ok(fd),
            Ok(Err(error)) => tried.push(error),
            Err(source) => tried.push(PlaceError::open(&place.path, source)),
        }
    }
    let hidden = |e: &PlaceError| matches!(e, PlaceError::Other { .. });
    if tried.iter().any(hidden) {
        for place in &file_system.places {
            let uncover = || uncover(proc, file_system, place);
            if let Ok(Ok(fd)) = namespaces.within_copy(place.namespace, uncover) {
                return Ok(fd);
            }
        }
    }
    Err(OpenError {
        file_system: file_system.to_string(),
        tried,
    })
}

fn open_place(
    proc: BorrowedFd<'_>,
    file_system: &FileSystem,
    place: &Place,
) -> Result<OwnedFd, PlaceError> {
    let path = place.path.as_path();
    let (fd, found) = open_path(proc, path)?;
    let dev = found.dev();
    // Subvolumes of btrfs have numbers of their own, so there the mount's id decides.
    let same =
        dev == file_system.dev || (file_system.dev.major == 0 && found.mount_id == Some(place.id));
    if same {
        Ok(fd)
    } else {
        Err(PlaceError::Other {
            path: path.to_owned(),
            found: dev,
        })
    }
}

/// In a private copy of a namespace: unmounts whatever `place` leads to, until it leads to
/// `file_system`. Mounts have other ids in the copy, so its own table is read.
fn uncover(
    proc: BorrowedFd<'_>,
    file_system: &FileSystem,
    place: &Place,
) -> Result<OwnedFd, PlaceError> {
    let path = place.path.as_path();
    loop {
        let (fd, found) = open_path(proc, path)?;
        let other = PlaceError::Other {
            path: path.to_owned(),
            found: found.dev(),
        };
        let Ok(table) = mounts::read(proc, place.namespace) else {
            return Err(other);
        };
        let at = |m: &&Mount| Some(m.id) == found.mount_id;
        let Some(top) = table.iter().find(at) else {
            return Err(other);
        };
        if top.dev == file_system.dev {
            return Ok(fd);
        }
        // Each round takes one mount away, and only such as lie over the target: when what is
        // found is what the target was mounted on, the target is gone.
        let target = |m: &&Mount| m.dev == file_system.dev && m.path == path;
        let Some(target) = table.iter().find(target) else {
            return Err(other);
        };
        if is_below(&table, top.id, target.id) {
            return Err(other);
        }
        drop(fd);
        let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        umount2(&top.path, flags).map_err(|e| PlaceError::open(path, e.into()))?;
    }
}

/// Whether mount `lower` is among those that mount `upper` is attached to, directly or not.
fn is_below(table: &[Mount], lower: u64, upper: u64) -> bool {
    let mut next = upper;
    // No chain is longer than the table.
    for _ in 0..table.len() {
        if next == lower {
            return true;
        }
        match table.iter().find(|m| m.id == next) {
            Some(mount) => next = mount.parent,
            None => return false,
        }
    }
    false
}

/// Opens what `path` leads to, if that is a directory or a regular file, and says what it is.
fn open_path(proc: BorrowedFd<'_>, path: &Path) -> Result<(OwnedFd, Identity), PlaceError> {
    // A directory can be opened at once: nothing happens but the look-up.
    let fd = match open_nonblocking(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
        Err(Errno::ENOTDIR) => open_file(proc, path)?,
        other => other.map_err(|e| PlaceError::open(path, e.into()))?,
    };
    let found = sys::identify(fd.as_fd()).map_err(|e| PlaceError::open(path, e))?;
    Ok((fd, found))
}

/// Opens a mount point that is no directory, looking at its type before doing anything to it: to
/// open a FIFO or a device node has effects of its own.
fn open_file(proc: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, PlaceError> {
    let fail = |source| PlaceError::open(path, source);
    let handle = open_nonblocking(path, OFlag::O_PATH).map_err(|e| fail(e.into()))?;
    let found = sys::identify(handle.as_fd()).map_err(fail)?;
    if found.mode & libc::S_IFMT != libc::S_IFREG {
        return Err(PlaceError::Special {
            path: path.to_owned(),
        });
    }
    let again = format!("thread-self/fd/{}", handle.as_raw_fd());
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    openat(proc, again.as_str(), flags, Mode::empty()).map_err(|e| fail(e.into()))
}

fn open_nonblocking(path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let common = OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    open(path, flags | common, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;
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

    fn proc() -> OwnedFd {
        open("/proc", OFlag::O_RDONLY, Mode::empty()).unwrap()
    }

    fn dev_of(path: &Path) -> DevId {
        DevId::from_raw(std::fs::metadata(path).unwrap().dev())
    }

    #[test]
    fn root_is_opened_as_what_it_is_planned_as() {
        let proc = proc();
        let table = mounts::read(proc.as_fd(), 0).unwrap();
        let root = table.iter().rfind(|m| m.path == Path::new("/")).unwrap();
        let mut planned = file_system(Path::new("/"), root.dev);
        planned.places[0].id = root.id;
        open_place(proc.as_fd(), &planned, &planned.places[0]).unwrap();
    }

    #[test]
    fn a_path_that_leads_elsewhere_is_refused() {
        let planned = file_system(Path::new("/proc"), dev_of(Path::new("/")));
        let error = open_place(proc().as_fd(), &planned, &planned.places[0]).unwrap_err();
        assert!(matches!(error, PlaceError::Other { .. }), "{error}");
    }

    #[test]
    fn a_fifo_is_neither_opened_nor_waited_for_but_a_file_will_do() {
        let dir = std::env::temp_dir().join(format!("hv-vss-open-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let fifo = dir.join("fifo");
        nix::unistd::mkfifo(&fifo, Mode::S_IRUSR).unwrap();
        let plain = dir.join("plain");
        std::fs::write(&plain, b"x").unwrap();
        let proc = proc();
        let planned = file_system(&fifo, dev_of(&dir));
        let error = open_place(proc.as_fd(), &planned, &planned.places[0]).unwrap_err();
        assert!(matches!(error, PlaceError::Special { .. }), "{error}");
        let planned = file_system(&plain, dev_of(&dir));
        open_place(proc.as_fd(), &planned, &planned.places[0]).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn attachment_is_followed_to_any_depth_and_a_circle_ends() {
        let line = |id, parent| format!("{id} {parent} 8:1 / /x rw - ext4 /dev/sda1 rw\n");
        let text = [line(1, 0), line(2, 1), line(3, 2), line(7, 8), line(8, 7)].concat();
        let table = mounts::parse(text.as_bytes(), 0).unwrap();
        assert!(is_below(&table, 1, 3));
        assert!(!is_below(&table, 3, 1));
        assert!(!is_below(&table, 1, 7));
    }
}
