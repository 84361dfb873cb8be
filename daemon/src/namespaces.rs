// SPDX-License-Identifier: GPL-2.0-only

//! The other mount namespaces: containers, services with private mounts, CSI volumes.
//!
//! A file system that is mounted only there is written to all the same, so it has to be found and
//! opened. Both happen on a short-lived thread that enters the namespace; the rest of the process
//! never leaves its own. What is looked for there is not known here.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use nix::mount::{mount, MsFlags};
use nix::sched::{setns, unshare, CloneFlags};
use nix::sys::stat::fstat;

use crate::sys::{self, MntNsInfo};

/// The namespaces other than the daemon's own. [`crate::mounts::Mount::namespace`] counts them
/// from 1.
#[derive(Debug, Default)]
pub struct Namespaces {
    /// `None` where one is not needed.
    others: Vec<Option<OwnedFd>>,
    /// One for each of the others, on kernels that tell.
    states: Option<Vec<State>>,
}

/// What changes when anything is mounted in a namespace or taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Number and count of mounts.
    info: MntNsInfo,
    /// The mount that was added last. With the count it shows each change: what is added is newer,
    /// what is taken away is missing.
    newest: u64,
}

impl State {
    /// The number of the namespace, never used again.
    pub fn id(&self) -> u64 {
        self.info.mnt_ns_id
    }

    /// The number of the mount that was added last, never used again.
    pub fn newest(&self) -> u64 {
        self.newest
    }
}

impl Namespaces {
    /// Finds all that there are: from the kernel's own list where it has one (6.12), which also
    /// shows those without a process, else from the processes.
    ///
    /// While this is alive the namespaces cannot vanish, so it is to be dropped soon.
    pub fn find() -> io::Result<Self> {
        Self::find_beside(&own()?)
    }

    /// The same for who has [`own`] already.
    pub fn find_beside(own: &File) -> io::Result<Self> {
        match listed(own.as_fd()) {
            Ok(found) => Ok(found),
            Err(_) => Ok(Namespaces {
                others: of_processes(own)?.into_iter().map(Some).collect(),
                states: None,
            }),
        }
    }

    /// The state in which each of them was when it was found, in their order; `None` on kernels that
    /// do not tell (before 6.12).
    pub fn states(&self) -> Option<&[State]> {
        self.states.as_deref()
    }

    /// This one alone, under its number, for who may hang in it: as long as one is open, so is all that is
    /// mounted there.
    pub fn only(&self, number: usize) -> io::Result<Self> {
        let it = match number {
            0 => None,
            number => Some(self.other(number)?.try_clone_to_owned()?),
        };
        Ok(Namespaces::alone(number, it))
    }

    /// The same, of which this is the descriptor.
    pub fn alone(number: usize, it: Option<OwnedFd>) -> Self {
        let mut others = Vec::new();
        if let (Some(before), Some(it)) = (number.checked_sub(1), it) {
            others.resize_with(before, || None);
            others.push(Some(it));
        }
        Namespaces {
            others,
            states: None,
        }
    }

    /// Those that are open.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.others.iter().flatten().map(AsFd::as_fd)
    }

    fn other(&self, number: usize) -> io::Result<BorrowedFd<'_>> {
        let it = number
            .checked_sub(1)
            .and_then(|n| self.others.get(n)?.as_ref());
        Ok(it.ok_or(io::ErrorKind::NotFound)?.as_fd())
    }

    /// The numbers of all, where the kernel tells how many mounts there are in each, those with few first.
    pub fn smallest_first(&self) -> Vec<usize> {
        let mut numbers: Vec<usize> = (1..=self.count()).collect();
        let states = self.states().unwrap_or_default();
        numbers.sort_by_key(|it| states.get(it - 1).map(|state| state.info.nr_mounts));
        numbers
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.others.len()
    }

    /// What this one is called, by the number that lsns(8) has for it.
    pub fn name(&self, number: usize) -> String {
        let found = self.other(number).ok().and_then(|it| fstat(it).ok());
        let inode = found.map_or_else(|| "?".into(), |it| it.st_ino.to_string());
        format!("mount namespace {inode}")
    }

    /// Runs `work` inside namespace `number`; 0 is the own one, where it runs right here.
    ///
    /// Fails with `ENOENT` when there is no such namespace, and with what the kernel says when it
    /// cannot be entered.
    pub fn within<T: Send>(&self, number: usize, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        if number == 0 {
            return Ok(work());
        }
        let namespace = self.other(number)?;
        on_a_thread(move || {
            enter(namespace)?;
            Ok(work())
        })
    }

    /// Runs `work` inside a private copy of namespace `number`, in which it may unmount what is in
    /// its way: nobody else sees that, and the copy vanishes afterwards.
    pub fn within_copy<T: Send>(
        &self,
        number: usize,
        work: impl FnOnce() -> T + Send,
    ) -> io::Result<T> {
        let namespace = match number {
            0 => None,
            n => Some(self.other(n)?),
        };
        on_a_thread(move || {
            match namespace {
                Some(namespace) => enter(namespace)?,
                None => unshare(CloneFlags::CLONE_FS)?,
            }
            unshare(CloneFlags::CLONE_NEWNS)?;
            // Or an unmount would be repeated in the original.
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
            Ok(work())
        })
    }
}

/// Which namespace and which root directory a thread has is its own affair only after it stopped
/// sharing them.
fn enter(namespace: BorrowedFd<'_>) -> io::Result<()> {
    unshare(CloneFlags::CLONE_FS)?;
    setns(namespace, CloneFlags::CLONE_NEWNS)?;
    Ok(())
}

fn on_a_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let table = sys::Table::own();
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("namespace".into());
        let builder = builder.stack_size(128 * 1024);
        let thread = builder.spawn_scoped(scope, move || {
            table.adopt();
            work()
        })?;
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}

/// The namespace that this process is in.
pub fn own() -> io::Result<File> {
    File::open("/proc/self/ns/mnt")
}

/// Walks the kernel's list from the own namespace in both directions.
fn listed(own: BorrowedFd<'_>) -> io::Result<Namespaces> {
    let mut found = Namespaces::default();
    let mut states = Some(Vec::new());
    for after in [true, false] {
        let begin = found.others.len();
        loop {
            let from = match found.others.get(begin..) {
                Some([.., Some(last)]) => last.as_fd(),
                _ => own,
            };
            let Some((next, info)) = sys::neighbour_namespace(from, after)? else {
                break;
            };
            match (&mut states, sys::newest_mount(info.mnt_ns_id)) {
                (Some(states), Ok(newest)) => states.push(State { info, newest }),
                _ => states = None,
            }
            found.others.push(Some(next));
        }
    }
    found.states = states;
    Ok(found)
}

/// The namespaces that have processes. One that ends meanwhile is none any more.
fn of_processes(own: &File) -> io::Result<Vec<OwnedFd>> {
    let mut links = Vec::new();
    for entry in Path::new("/proc").read_dir()? {
        let entry = entry?;
        let name = entry.file_name();
        if name.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            links.push(entry.path().join("ns/mnt"));
        }
    }
    let seen = BTreeSet::from([own.metadata()?.ino()]);
    new_ones(seen, links, |link| File::open(link))
}

/// Each once of those that these links lead to, without those that were seen. One counts as seen when it is open: the
/// process may end before, and others of the same namespace stay. Fails when it is we who cannot open any more: the rest
/// would be missing without a word.
fn new_ones(
    mut seen: BTreeSet<u64>,
    links: Vec<PathBuf>,
    open: impl Fn(&Path) -> io::Result<File>,
) -> io::Result<Vec<OwnedFd>> {
    let number = |link: &Path| std::fs::metadata(link).map(|it| it.ino());
    let mut others = Vec::new();
    for link in links {
        if !number(&link).is_ok_and(|it| !seen.contains(&it)) {
            continue;
        }
        let opened = match open(&link) {
            Err(error) if sys::is_our_own(&error) => return Err(error),
            opened => opened.ok(),
        };
        // Its process may be in another by now.
        let is_new = |it: &File| it.metadata().is_ok_and(|it| seen.insert(it.ino()));
        others.extend(opened.filter(is_new).map(OwnedFd::from));
    }
    Ok(others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_nothing_is_mounted_no_mount_is_the_newest() {
        let own = sys::namespace_id(own().unwrap().as_fd());
        // Kernels before 6.12 do not tell.
        if own.is_ok_and(|own| sys::newest_mount(own).is_ok()) {
            // No namespace has this number, which looks the same as one without mounts.
            assert_eq!(sys::newest_mount(1 << 62).unwrap(), 0);
        }
    }

    #[test]
    fn where_the_first_process_ends_the_next_leads_to_its_namespace() {
        let dir = std::env::temp_dir().join(format!("hv-vss-ns-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let links: Vec<PathBuf> = ["1", "2", "3"].map(|it| dir.join(it)).into();
        std::fs::write(&links[0], "").unwrap();
        for link in &links[1..] {
            std::fs::hard_link(&links[0], link).unwrap();
        }
        let ended = links[0].clone();
        let open = |link: &Path| match link == ended {
            true => Err(io::ErrorKind::NotFound.into()),
            false => File::open(link),
        };
        let found = |open: &dyn Fn(&Path) -> io::Result<File>| {
            new_ones(BTreeSet::new(), links.clone(), open).map(|it| it.len())
        };
        assert_eq!(found(&open).unwrap(), 1);
        // That no more can be opened is no end of a process.
        let full = |_: &Path| Err(io::Error::from_raw_os_error(libc::EMFILE));
        assert!(found(&full).is_err());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn of_one_that_may_hang_no_other_is_kept_open() {
        let any = || Some(OwnedFd::from(own().unwrap()));
        let all = Namespaces {
            others: vec![any(), any(), any()],
            states: None,
        };
        for number in 0..=3 {
            let only = all.only(number).unwrap();
            let open = (1..=3).filter(|it| only.other(*it).is_ok());
            let expected = (number != 0).then_some(number);
            assert_eq!(open.collect::<Vec<_>>(), Vec::from_iter(expected));
        }
        assert!(all.only(4).is_err());
    }
}
