// SPDX-License-Identifier: GPL-2.0-only

//! Gets a descriptor for each planned file system, and makes sure that it is the right one.
//!
//! Between reading the table and opening a path, mounts come and go: the path may lead to the
//! parent file system, to whatever was mounted over it, to a FIFO. So nothing is opened that could
//! block, and what was opened is compared with what was planned before it is used.

use std::collections::BTreeSet;
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

    /// Whether this is what a mount over the place, or over a folder on the way there, looks like.
    fn may_be_hidden(&self) -> bool {
        match self {
            PlaceError::Other { .. } => true,
            PlaceError::Special { .. } => false,
            PlaceError::Open { source, .. } => matches!(
                source.raw_os_error().map(Errno::from_raw),
                Some(Errno::ENOENT | Errno::ENOTDIR)
            ),
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
/// If none does because other mounts lie over all of them, or over folders above, those are taken
/// away in a private copy of the namespace, where nobody else notices.
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
    if tried.iter().any(PlaceError::may_be_hidden) {
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

/// In a private copy of a namespace: unmounts whatever lies over `place`, or over a folder on the
/// way there, until it leads to `file_system`. Mounts have other ids in the copy, so its own table
/// is read.
fn uncover(
    proc: BorrowedFd<'_>,
    file_system: &FileSystem,
    place: &Place,
) -> Result<OwnedFd, PlaceError> {
    let path = place.path.as_path();
    let gone = |errno: Errno| PlaceError::open(path, errno.into());
    loop {
        let table = mounts::read(proc, place.namespace).map_err(|_| gone(Errno::ENOENT))?;
        let target = table
            .iter()
            .find(|m| m.dev == file_system.dev && m.path == path)
            .ok_or_else(|| gone(Errno::ENOENT))?;
        if let Ok((fd, found)) = open_path(proc, path) {
            if found.dev() == file_system.dev || found.mount_id == Some(target.id) {
                return Ok(fd);
            }
        }
        // Each round takes one mount away, and never one that the target is attached to.
        let cover = cover(&table, target).ok_or_else(|| gone(Errno::ENOENT))?;
        let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        umount2(&cover.path, flags).map_err(gone)?;
    }
}

/// The first mount on the way to `target` that does not lead there.
fn cover<'a>(table: &'a [Mount], target: &Mount) -> Option<&'a Mount> {
    let way = attached_to(table, target);
    table
        .iter()
        .filter(|m| way.contains(&m.parent) && !way.contains(&m.id))
        .filter(|m| target.path.starts_with(&m.path))
        .min_by_key(|m| m.path.components().count())
}

/// `mount` and all that it is attached to, directly or not.
fn attached_to(table: &[Mount], mount: &Mount) -> BTreeSet<u64> {
    let mut way = BTreeSet::new();
    let mut next = Some(mount);
    while let Some(mount) = next {
        // A circle would be a table that contradicts itself.
        if !way.insert(mount.id) {
            break;
        }
        next = table.iter().find(|m| m.id == mount.parent);
    }
    way
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
    fn what_lies_over_the_way_is_found_from_the_root_on() {
        let line = |id: u64, parent: u64, dev: &str, path: &str| {
            format!("{id} {parent} {dev} / {path} rw - ext4 /dev/x rw\n")
        };
        let text = [
            line(1, 0, "8:1", "/"),
            line(2, 1, "8:2", "/a/b"),
            // Over the place itself, over the folder above it, and one that is in nobody's way.
            line(3, 2, "0:3", "/a/b"),
            line(4, 1, "0:4", "/a"),
            line(5, 1, "0:5", "/ab"),
        ];
        let table = mounts::parse(text.concat().as_bytes(), 0).unwrap();
        let cover_of = |table: &[Mount]| cover(table, &table[1]).map(|m| m.id);
        assert_eq!(cover_of(&table), Some(4));
        let rest: Vec<Mount> = table.iter().filter(|m| m.id != 4).cloned().collect();
        assert_eq!(cover_of(&rest), Some(3));
        let rest: Vec<Mount> = rest.into_iter().filter(|m| m.id != 3).collect();
        assert_eq!(cover_of(&rest), None);
    }

    #[test]
    fn a_circle_of_mounts_ends() {
        let line = |id, parent| format!("{id} {parent} 8:1 / /x rw - ext4 /dev/sda1 rw\n");
        let table = mounts::parse([line(7, 8), line(8, 7)].concat().as_bytes(), 0).unwrap();
        assert_eq!(attached_to(&table, &table[0]), BTreeSet::from([7, 8]));
    }
}
