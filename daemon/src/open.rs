// SPDX-License-Identifier: GPL-2.0-only

//! Gets a descriptor for each planned file system, and makes sure that it is the right one.
//!
//! Between reading the table and opening a path, mounts come and go: the path may lead to the
//! parent file system, to whatever was mounted over it, to a FIFO. So no device and no FIFO is opened,
//! and what was opened is compared with what was planned before it is used. What no path leads
//! to, or only one that a program or another machine has to answer for, is mounted once more, attached
//! nowhere. Any open may hang: the file system may have to read, or to wait for the lock of somebody who does (btrfs
//! and xfs lock the folder), and a security agent may take its time. So nothing is opened but apart.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CString, OsStr};
use std::io;
use std::iter;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{open, openat, OFlag};
use nix::mount::{umount2, MntFlags};
use nix::sys::socket::{socketpair, AddressFamily, SockFlag, SockType};
use nix::sys::stat::Mode;

use crate::apart::{Lot, Questions};
use crate::machine::Ways;
use crate::mounts::{self, Attached, DevId, ENOUGH};
use crate::namespaces::Namespaces;
use crate::plan::{FileSystem, Place};
use crate::superblocks::{self, Entry};
use crate::sys::{self, Identity};
use crate::unlisted;

/// Why one place could not be used.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The path cannot be opened.
    #[error("cannot open {}", shown(.path))]
    Open {
        /// Which path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Neither a directory nor a regular file.
    #[error("{} is neither a directory nor a regular file", shown(.path))]
    Special {
        /// Which path.
        path: PathBuf,
    },
    /// It leads to another file system than planned.
    #[error("{} leads to another file system ({found}) by now", shown(.path))]
    Other {
        /// Which path.
        path: PathBuf,
        /// Device number of what is there.
        found: DevId,
    },
    /// The way leads through what a program or another machine has to answer for.
    #[error("{} is below what may not answer", shown(.path))]
    Foreign {
        /// Which path.
        path: PathBuf,
    },
    /// The way leads through layers, and something on it does not answer, or says no.
    #[error("cannot open {}, which is below layers", shown(.path))]
    Layers {
        /// Which path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It cannot be mounted once more.
    #[error("{} cannot be mounted once more", shown(.device))]
    Again {
        /// Its device.
        device: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Its device has no node.
    #[error("no node of device {0} is where it should be")]
    NoNode(DevId),
    /// The superblock is gone.
    #[error("it is mounted no longer")]
    Gone,
    /// The program that serves it has to be asked, and says nothing.
    #[error("its server does not answer")]
    Silent,
    /// Whoever opens it hangs.
    #[error("opening {} does not come back", shown(.path))]
    Stuck {
        /// Which path.
        path: PathBuf,
    },
    /// The kernel has it locked, and does not say how it is.
    #[error("the kernel has it locked, as while it is being unmounted")]
    Locked,
    /// It was not even asked, or what it answered has not come: this process lacks something.
    #[error("cannot even try {}", shown(.path))]
    Lack {
        /// Which path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Escaped, so that a newline in a name cannot forge a log line.
fn shown(path: &Path) -> String {
    path.to_string_lossy().escape_debug().to_string()
}

impl PlaceError {
    fn open(path: &Path, source: io::Error) -> Self {
        PlaceError::Open {
            path: path.to_owned(),
            source,
        }
    }

    fn source(&self) -> Option<&io::Error> {
        match self {
            PlaceError::Open { source, .. }
            | PlaceError::Layers { source, .. }
            | PlaceError::Again { source, .. }
            | PlaceError::Lack { source, .. } => Some(source),
            _ => None,
        }
    }

    fn errno(&self) -> Option<Errno> {
        self.source()?.raw_os_error().map(Errno::from_raw)
    }

    /// Whether this is what a mount over the place, or over a folder on the way there, looks like, or
    /// an unmount meanwhile.
    fn may_be_elsewhere(&self) -> bool {
        match self {
            PlaceError::Other { .. } | PlaceError::Gone => true,
            _ => matches!(self.errno(), Some(Errno::ENOENT | Errno::ENOTDIR)),
        }
    }
}

/// Why a file system could not be opened at all.
#[derive(Debug, thiserror::Error)]
#[error("cannot reach {file_system}: {}", self.tried())]
pub struct OpenError {
    /// Which, in words.
    pub file_system: String,
    /// What came of each place, in the order tried.
    pub tried: Vec<PlaceError>,
}

impl OpenError {
    fn of(file_system: &FileSystem, tried: Vec<PlaceError>) -> Self {
        OpenError {
            file_system: file_system.to_string(),
            tried,
        }
    }

    /// Whether no other way is of any use.
    fn is_final(&self) -> bool {
        self.is_broken() || self.is_our_own() || self.is_stuck()
    }

    /// Whether it hangs when it is opened, as it would in its freeze.
    pub fn is_stuck(&self) -> bool {
        let is_stuck = |it: &PlaceError| matches!(it, PlaceError::Stuck { .. });
        self.tried.iter().any(is_stuck)
    }

    /// The same of a way through layers: what the kernel says there may be of one of those.
    fn below_layers(mut self) -> Self {
        let layers = |error| match error {
            PlaceError::Open { path, source } => PlaceError::Layers { path, source },
            other => other,
        };
        self.tried = self.tried.into_iter().map(layers).collect();
        self
    }

    /// What this other way leads to, if there is one, or what came of all.
    fn or_by(
        mut self,
        other: impl FnOnce() -> Option<Result<OwnedFd, OpenError>>,
    ) -> Result<OwnedFd, OpenError> {
        if self.is_final() {
            return Err(self);
        }
        match other() {
            None => Err(self),
            Some(opened) => opened.map_err(|error| {
                self.tried.extend(error.tried);
                self
            }),
        }
    }

    /// Whether the file system itself is out of order (its device failed, or it shut down after an
    /// error), so that nothing can be written to it any more.
    pub fn is_broken(&self) -> bool {
        let broken = |e: &PlaceError| {
            let by_path = matches!(e, PlaceError::Open { .. });
            by_path
                && matches!(
                    e.errno(),
                    Some(
                        Errno::EIO
                            | Errno::ENXIO
                            | Errno::ENODEV
                            | Errno::ESHUTDOWN
                            | Errno::EUCLEAN
                    )
                )
        };
        self.tried.iter().any(broken)
    }

    /// Whether it looks as if it was unmounted or moved since the table was read.
    pub fn may_be_gone(&self) -> bool {
        let tried = &self.tried;
        !self.is_broken() && tried.iter().any(PlaceError::may_be_elsewhere)
    }

    /// Whether it is this process that lacks something. That follows from where the error arose, for a program may
    /// answer whatever it likes.
    pub fn is_our_own(&self) -> bool {
        let is_lack = |it: &PlaceError| matches!(it, PlaceError::Lack { .. });
        self.tried.iter().any(is_lack)
    }

    /// The same of a path that nobody but the kernel answers for: what it lacks is not the file system's.
    fn by_the_kernel(mut self) -> Self {
        let lack = |error| match error {
            PlaceError::Open { path, source } if sys::is_our_own(&source) => {
                PlaceError::Lack { path, source }
            }
            other => other,
        };
        self.tried = self.tried.into_iter().map(lack).collect();
        self
    }

    /// What was tried and what came of it, in words.
    pub fn tried(&self) -> String {
        let words = self.tried.iter().map(|e| match e {
            PlaceError::Open { source, .. }
            | PlaceError::Layers { source, .. }
            | PlaceError::Again { source, .. }
            | PlaceError::Lack { source, .. } => format!("{e}: {source}"),
            _ => e.to_string(),
        });
        words.collect::<Vec<_>>().join("; ")
    }
}

/// How long a look-up through layers may take: there is another way.
const LAYERS_TIME: Duration = Duration::from_secs(2);

/// How one may be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    /// With the program that has to answer for it.
    Served,
    /// By a path in one namespace.
    Path,
    /// By a path that leads through layers.
    Layers,
    /// Mounted once more: the kernel lets nobody do so while another writes it back or unmounts it, which takes as long
    /// as its disk does.
    Again,
}

/// One to be opened one way.
struct Walk {
    way: Way,
    /// What may hang: that superblock, or the layers on the way.
    about: DevId,
    /// Where it is opened.
    namespace: usize,
    /// As it looks there.
    file_system: FileSystem,
}

impl Walk {
    fn new(way: Way, file_system: &FileSystem, namespace: usize) -> Self {
        let places = file_system.places.iter();
        let places = places.filter(|place| place.namespace == namespace);
        Walk {
            way,
            about: file_system.dev,
            namespace,
            file_system: FileSystem {
                dev: file_system.dev,
                fs_type: file_system.fs_type.clone(),
                source: file_system.source.clone(),
                devices: file_system.devices.clone(),
                listed: file_system.listed.clone(),
                disks: Vec::new(),
                below: None,
                stands_on: None,
                perhaps_on: Vec::new(),
                places: places.cloned().collect(),
            },
        }
    }

    /// Where it is mounted first.
    fn at_first(way: Way, file_system: &FileSystem) -> Self {
        let first = file_system.places.first();
        Walk::new(way, file_system, first.map_or(0, |it| it.namespace))
    }

    /// Why it is not open when nothing has come of it in time, or does not as long as another hangs there.
    fn silent(&self) -> PlaceError {
        let path = self.path();
        match self.way {
            Way::Served => PlaceError::Silent,
            Way::Path => PlaceError::Stuck { path },
            Way::Layers => {
                let source = io::ErrorKind::TimedOut.into();
                PlaceError::Layers { path, source }
            }
            Way::Again => PlaceError::Locked,
        }
    }

    /// It is not open for want of something that has nothing to do with it.
    fn lack(&self, source: io::Error) -> OpenError {
        let path = self.path();
        OpenError::of(&self.file_system, vec![PlaceError::Lack { path, source }])
    }

    fn path(&self) -> PathBuf {
        let first = self.file_system.places.first();
        first.map(|it| it.path.clone()).unwrap_or_default()
    }
}

/// The ways to this one, the best first: what hangs in its layers can be mounted once more all the same.
fn ways_to(file_system: &FileSystem) -> Box<dyn Iterator<Item = Walk> + '_> {
    if mounts::is_served(&file_system.fs_type) {
        return Box::new(iter::once(Walk::at_first(Way::Served, file_system)));
    }
    let walkable = || file_system.places.iter().filter(|place| place.walkable);
    let shown = walkable().filter(|place| !place.hidden);
    let mut seen = BTreeSet::new();
    let each = shown.chain(walkable()).map(|place| place.namespace);
    // There may be any number of them, and there is another way.
    let each = each.filter(move |namespace| seen.insert(*namespace));
    let each = each.take(ENOUGH);
    let by_path = each.map(|namespace| Walk::new(Way::Path, file_system, namespace));
    let below_layers = iter::once_with(|| {
        let (layers, below) = below_layers(file_system)?;
        let walk = Walk::at_first(Way::Layers, &below);
        Some(Walk {
            about: layers,
            ..walk
        })
    });
    let again = iter::once_with(|| Walk::at_first(Way::Again, file_system));
    Box::new(by_path.chain(below_layers.flatten()).chain(again))
}

/// Opens it as a path only, at once, without a word to any file system: nothing is waited for. `None` if that takes
/// more, or if it is mounted elsewhere by now. Mounts get numbers that others have had, so this counts only if no mount
/// has changed since it was planned.
pub fn as_path(file_system: &FileSystem) -> Option<OwnedFd> {
    let mut places = file_system.places.iter();
    let shown = places.find(|it| it.namespace == 0 && it.walkable && !it.hidden)?;
    let fd = sys::open_in_memory(&shown.path).ok()?;
    let is_it = sys::mount_id(fd.as_fd()).is_ok_and(|id| id == shown.id);
    is_it.then_some(fd)
}

/// Opens these, each by the first of its ways that leads to it. Each way may take no longer than `limit`, and those
/// that hang are waited for together.
pub fn open_all_within(
    limit: Duration,
    ways: &Ways,
    file_systems: &[&FileSystem],
) -> Vec<Result<OwnedFd, OpenError>> {
    open_all_by(Way::open, limit, ways, file_systems)
}

fn open_all_by(
    open: fn(Way) -> Open,
    limit: Duration,
    ways: &Ways,
    file_systems: &[&FileSystem],
) -> Vec<Result<OwnedFd, OpenError>> {
    let closed = |it: &&FileSystem| Err(OpenError::of(it, foreign(it)));
    let mut all: Vec<Result<OwnedFd, OpenError>> = file_systems.iter().map(closed).collect();
    let mut left: Vec<_> = file_systems.iter().map(|it| ways_to(it)).collect();
    loop {
        let each = all.iter().zip(&mut left).enumerate();
        let next = each.filter_map(|(index, (opened, left))| {
            let is_closed = opened.as_ref().is_err_and(|it| !it.is_final());
            let next = is_closed.then(|| left.next()).flatten();
            next.map(|walk| (index, walk))
        });
        let (layers, others): (Vec<_>, Vec<_>) = next.partition(|(_, it)| it.way == Way::Layers);
        if layers.is_empty() && others.is_empty() {
            return all;
        }
        for (limit, walks) in [(limit, others), (limit.min(LAYERS_TIME), layers)] {
            walk_apart(open, limit, ways, walks, |index, opened| {
                match (all.get_mut(index), opened) {
                    (Some(Err(before)), Err(error)) => before.tried.extend(error.tried),
                    (Some(it), opened) => *it = opened,
                    (None, _) => {}
                }
            });
        }
    }
}

/// So many may be open on the way back while nobody takes them.
const AT_ONCE: usize = 128;

/// Goes these ways, which have a number each, by who has nothing else open, in one namespace only: the others, what is
/// mounted there, and the device of the module must not stay because of a thread that hangs. All in one namespace are
/// at the price of one hand-over; what hangs is not tried again as long as it does. `heard` gets what came of each.
fn walk_apart(
    open: fn(Way) -> Open,
    limit: Duration,
    ways: &Ways,
    mut walks: Vec<(usize, Walk)>,
    mut heard: impl FnMut(usize, Result<OwnedFd, OpenError>),
) {
    static WALKED: Questions<(Way, DevId)> = Questions::new();
    if walks.is_empty() {
        return;
    }
    let flags = SockFlag::SOCK_CLOEXEC;
    let line = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
    let (line, theirs) = match line {
        Ok(ends) => ends,
        Err(errno) => {
            for (index, walk) in walks {
                heard(index, Err(walk.lack(errno.into())));
            }
            return;
        }
    };
    walks.sort_by_key(|(_, it)| it.namespace);
    let walks = Arc::new(walks);
    let together = walks.chunk_by(|(_, one), (_, next)| one.namespace == next.namespace);
    let together = together.flat_map(|some| some.chunks(AT_ONCE));
    let together: Vec<(&[(usize, Walk)], Namespaces)> = together
        .map(|some| {
            let namespace = some.first().map_or(0, |(_, it)| it.namespace);
            // Without it they say themselves that it is not there.
            (some, ways.namespaces.only(namespace).unwrap_or_default())
        })
        .collect();
    let needed = [theirs.as_fd(), ways.proc.as_fd()];
    let lots = together.iter().map(|(some, only)| Lot {
        abouts: some.iter().map(|(_, it)| (it.way, it.about)).collect(),
        fds: needed.into_iter().chain(only.fds()).collect(),
    });
    let asked = Arc::clone(&walks);
    let walk = move |number: usize, fds: &[OwnedFd]| match asked.get(number) {
        Some((_, it)) => open_handed(fds, it.namespace, &it.file_system, open(it.way), number),
        None => Ok(()),
    };
    let mut fds = BTreeMap::new();
    WALKED.ask_all(lots.collect(), limit, walk, |number, said| {
        let Some((index, walk)) = walks.get(number) else {
            return;
        };
        let opened = match said {
            Ok(Ok(())) => {
                sent_with(line.as_fd(), number, &mut fds).map_err(|error| walk.lack(error))
            }
            Ok(Err(error)) if walk.way == Way::Path => Err(error.by_the_kernel()),
            Ok(Err(error)) => Err(error),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                Err(OpenError::of(&walk.file_system, vec![walk.silent()]))
            }
            Err(error) => Err(walk.lack(error)),
        };
        heard(*index, opened);
    });
}

/// What was sent with this number, and has been; what comes before it is kept.
fn sent_with(
    line: BorrowedFd<'_>,
    number: usize,
    kept: &mut BTreeMap<usize, OwnedFd>,
) -> io::Result<OwnedFd> {
    loop {
        if let Some(fd) = kept.remove(&number) {
            return Ok(fd);
        }
        let mut its = [0; size_of::<usize>()];
        let (_, mut fds) = sys::receive(line, &mut its)?;
        let fd = fds.pop().ok_or(io::ErrorKind::UnexpectedEof)?;
        kept.insert(usize::from_ne_bytes(its), fd);
    }
}

/// What opens it.
type Open = fn(&Ways, &FileSystem) -> Result<OwnedFd, OpenError>;

impl Way {
    fn open(self) -> Open {
        match self {
            Way::Served => open_file_system,
            Way::Path => by_path,
            Way::Layers => by_layers,
            Way::Again => mount_again,
        }
    }
}

/// The same file system as it looks through the layers nearest to it that are on the way, for who may hang there, and
/// those layers. `None` if no place is below some.
fn below_layers(file_system: &FileSystem) -> Option<(DevId, FileSystem)> {
    let mut found = file_system.clone();
    let layers = found.places.iter().find_map(|place| place.layers)?;
    found.places.retain(|place| place.layers == Some(layers));
    for place in &mut found.places {
        (place.walkable, place.layers) = (true, None);
    }
    Some((layers, found))
}

/// Opens it with what was handed over: a line over which to give what was opened, with this number, the root of
/// procfs, and the namespace it is in unless it is the own one.
fn open_handed(
    fds: &[OwnedFd],
    namespace: usize,
    file_system: &FileSystem,
    open: Open,
    number: usize,
) -> Result<(), OpenError> {
    let cannot = |source| {
        let path = PathBuf::new();
        OpenError::of(file_system, vec![PlaceError::Lack { path, source }])
    };
    let [line, proc, namespaces @ ..] = fds else {
        return Err(cannot(io::ErrorKind::NotFound.into()));
    };
    let copy = |it: &OwnedFd| it.try_clone().map_err(cannot);
    let ways = Ways {
        proc: Arc::new(copy(proc)?),
        namespaces: Namespaces::alone(namespace, namespaces.first().map(copy).transpose()?),
    };
    let opened = open(&ways, file_system)?;
    sys::send_with(line.as_fd(), &number.to_ne_bytes(), &[opened.as_fd()]).map_err(cannot)
}

/// Opens `file_system` through the first of its places that still leads to it. If there is none, or none that can
/// be walked to, it is mounted once more. The way through layers is the last: whoever goes it may hang.
pub fn open_file_system(ways: &Ways, file_system: &FileSystem) -> Result<OwnedFd, OpenError> {
    let below_layers = || {
        let (_, below) = below_layers(file_system)?;
        Some(by_layers(ways, &below))
    };
    let opened = by_path(ways, file_system);
    let opened = opened.or_else(|error| error.or_by(|| Some(mount_again(ways, file_system))));
    opened.or_else(|error| error.or_by(below_layers))
}

/// Opens what [`below_layers`] has found.
fn by_layers(ways: &Ways, below: &FileSystem) -> Result<OwnedFd, OpenError> {
    by_path(ways, below).map_err(OpenError::below_layers)
}

/// The places of one whose paths nobody walks to.
fn foreign(file_system: &FileSystem) -> Vec<PlaceError> {
    let places = file_system.places.iter();
    let foreign = places.filter(|place| !place.walkable && place.layers.is_none());
    let path = |place: &Place| place.path.clone();
    foreign
        .map(|it| PlaceError::Foreign { path: path(it) })
        .collect()
}

/// Opens it through the first of its places that can be walked to and still leads to it. If none does because other mounts lie over all
/// of them, or over folders above, those are taken away in a private copy of the namespace, where nobody else
/// notices.
fn by_path(ways: &Ways, file_system: &FileSystem) -> Result<OwnedFd, OpenError> {
    let mut tried = Vec::new();
    let proc = ways.proc.as_fd();
    let namespaces = &ways.namespaces;
    let walkable = || file_system.places.iter().filter(|place| place.walkable);
    for place in walkable().filter(|place| !place.hidden).take(ENOUGH) {
        let opened = namespaces.within(place.namespace, || open_place(proc, file_system, place));
        match opened {
            Ok(Ok(fd)) => return Ok(fd),
            Ok(Err(error)) => tried.push(error),
            Err(source) => tried.push(PlaceError::open(&place.path, source)),
        }
    }
    let error = OpenError::of(file_system, tried);
    if error.is_final() {
        return Err(error);
    }
    if error.tried.is_empty() || error.tried.iter().any(PlaceError::may_be_elsewhere) {
        for place in walkable().take(ENOUGH) {
            let uncover = || uncover(proc, file_system, place);
            if let Ok(Ok(fd)) = namespaces.within_copy(place.namespace, uncover) {
                return Ok(fd);
            }
        }
    }
    Err(error)
}

/// Mounts it once more and opens its root there.
fn mount_again(ways: &Ways, file_system: &FileSystem) -> Result<OwnedFd, OpenError> {
    mount_if_alive(ways, file_system).map_err(|it| OpenError::of(file_system, vec![it]))
}

/// The same, only while it is alive, or that would be more than a look. Of a btrfs the last devices come first: by one of
/// its seed the kernel mounts that.
fn mount_if_alive(ways: &Ways, file_system: &FileSystem) -> Result<OwnedFd, PlaceError> {
    let mut devices = file_system.devices.clone();
    match file_system.fs_type.as_str() {
        "btrfs" => devices.reverse(),
        _ => devices.truncate(1),
    }
    let mut refused = None;
    for device in devices {
        match mount_by(device, ways, file_system) {
            Err(error) => refused = refused.or(Some(error)),
            opened => return opened,
        }
    }
    Err(refused.unwrap_or(PlaceError::NoNode(DevId::default())))
}

/// The same by this device of it.
fn mount_by(device: DevId, ways: &Ways, file_system: &FileSystem) -> Result<OwnedFd, PlaceError> {
    let node = node_of(device);
    // One that is just being unmounted is listed as long as its disk takes, and mounted anew by whoever has
    // waited for that. The kernel, where it tells, waits with its answer.
    let asked = node.as_deref().filter(|_| sys::tells_superblocks());
    let told = asked.map(unlisted::is_alive);
    let listed = listed(file_system);
    let is_alive = match told {
        // Of one with an anonymous number not each kernel tells: 6.1 and 6.12 compare that with the device's.
        Some(false) if mounts::is_anonymous(&file_system.fs_type) => listed.is_some(),
        Some(is_alive) => is_alive,
        None => listed.is_some() || is_shown(ways, file_system),
    };
    if !is_alive {
        return Err(PlaceError::Gone);
    }
    let node = node.ok_or(PlaceError::NoNode(device))?;
    let again = |source| PlaceError::Again {
        device: node.clone(),
        source,
    };
    let c_string = |text: &OsStr| CString::new(text.as_bytes()).map_err(|e| again(e.into()));
    let source = c_string(node.as_os_str())?;
    let mount = |fs_type: &str, read_only| {
        let fs_type = CString::new(fs_type)?;
        sys::mount_detached(&fs_type, &source, read_only)
    };
    let (_, root) = unlisted::mount_once_more(types_of(file_system), mount).map_err(again)?;
    let fd = open_root(&root).map_err(again)?;
    // A superblock that is new is not the one that was written to.
    let same = listed.is_none() || self::listed(file_system) == listed;
    match same && is_that(file_system, fd.as_fd()) {
        true => Ok(fd),
        false => Err(PlaceError::Gone),
    }
}

fn open_root(root: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    Ok(openat(root, ".", flags, Mode::empty())?)
}

/// The types that it may have: the driver of `ext4` serves three.
fn types_of(file_system: &FileSystem) -> Vec<&str> {
    match file_system.fs_type.as_str() {
        "ext4" if file_system.places.is_empty() => vec!["ext4", "ext3", "ext2"],
        other => vec![other],
    }
}

/// Whether a btrfs that is open is the one that is planned, as it says itself.
fn is_that(file_system: &FileSystem, fd: BorrowedFd<'_>) -> bool {
    let Some(listed) = file_system
        .listed
        .as_ref()
        .filter(|it| it.fs_type == "btrfs")
    else {
        return true;
    };
    sys::btrfs_uuid(fd).is_ok_and(|it| superblocks::in_words(it) == listed.name)
}

/// Where sysfs lists it, if it does still.
fn listed(file_system: &FileSystem) -> Option<Entry> {
    let driver = match file_system.fs_type.as_str() {
        "ext2" | "ext3" => "ext4",
        other => other,
    };
    let entries = superblocks::entries(&BTreeSet::from([driver.to_owned()])).ok()?;
    entries.into_iter().find(|entry| match &file_system.listed {
        Some(it) => it == entry,
        None => {
            let devices = superblocks::devices_of(entry);
            devices.iter().any(|dev| file_system.devices.contains(dev))
        }
    })
}

/// Whether a table still shows it.
fn is_shown(ways: &Ways, file_system: &FileSystem) -> bool {
    let in_table = |namespace: usize| {
        let table = mounts::read(ways.proc.as_fd(), namespace).unwrap_or_default();
        table.iter().any(|m| m.dev == file_system.dev)
    };
    let namespaces: BTreeSet<usize> = file_system.places.iter().map(|p| p.namespace).collect();
    namespaces.into_iter().any(|n| {
        let looked = ways.namespaces.within(n, || in_table(n));
        looked.unwrap_or(false)
    })
}

/// The node of a block device, by the name that the kernel has for it.
pub fn node_of(device: DevId) -> Option<PathBuf> {
    let facts = std::fs::read_to_string(superblocks::folder_of(device)?.join("uevent")).ok()?;
    let name = facts
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))?;
    let node = Path::new("/dev").join(name);
    let found = std::fs::metadata(&node).ok()?;
    (DevId::from_raw(found.rdev()) == device).then_some(node)
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

/// How long it may take to take away what lies over one: that may be any number.
const UNCOVER_TIME: Duration = Duration::from_secs(1);

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
    let until = Instant::now() + UNCOVER_TIME;
    loop {
        let table = mounts::read_until(proc, place.namespace, until);
        let table = table.map_err(|_| gone(Errno::ENOENT))?;
        let target = table
            .iter()
            .find(|m| m.dev == file_system.dev && m.path == path)
            .ok_or_else(|| gone(Errno::ENOENT))?;
        let Some(cover) = Attached::new(&table).cover(target) else {
            let (fd, found) = open_path(proc, path)?;
            let same = found.dev() == file_system.dev || found.mount_id == Some(target.id);
            return if same {
                Ok(fd)
            } else {
                Err(gone(Errno::ENOENT))
            };
        };
        // Each round takes one mount away, and never one that the target is attached to.
        let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        umount2(&cover.path, flags).map_err(gone)?;
    }
}

/// Opens what `path` leads to, if that is a directory or a regular file, and says what it is.
fn open_path(proc: BorrowedFd<'_>, path: &Path) -> Result<(OwnedFd, Identity), PlaceError> {
    // Nothing is done to a directory that is opened: it may hang, and that is all.
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
    use std::sync::Mutex;

    fn file_system(path: &Path, dev: DevId) -> FileSystem {
        FileSystem {
            dev,
            fs_type: "ext4".into(),
            source: None,
            devices: vec![dev],
            listed: None,
            disks: Vec::new(),
            below: None,
            stands_on: None,
            perhaps_on: Vec::new(),
            places: vec![Place {
                namespace: 0,
                id: 0,
                path: path.to_owned(),
                whole: true,
                subvolume: None,
                walkable: true,
                layers: None,
                hidden: false,
                was_at: None,
            }],
        }
    }

    fn proc() -> OwnedFd {
        open("/proc", OFlag::O_RDONLY, Mode::empty()).unwrap()
    }

    fn here() -> Ways {
        Ways {
            proc: Arc::new(proc()),
            namespaces: Namespaces::default(),
        }
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
    fn of_several_each_is_opened_as_itself() {
        let ways = here();
        let paths = ["/sys", "/", "/nowhere", "/proc"].map(Path::new);
        let planned = paths.map(|path| {
            let dev = path.exists().then(|| dev_of(path));
            file_system(path, dev.unwrap_or_default())
        });
        // In a namespace that is not there it is looked for where it is as well.
        let mut elsewhere = file_system(Path::new("/dev"), dev_of(Path::new("/dev")));
        elsewhere.places.insert(0, elsewhere.places[0].clone());
        elsewhere.places[0].namespace = 7;
        let planned: Vec<&FileSystem> = planned.iter().chain([&elsewhere]).collect();
        let opened = open_all_within(Duration::from_secs(60), &ways, &planned);
        assert_eq!(opened.len(), planned.len());
        for (planned, opened) in planned.iter().zip(opened) {
            match opened {
                Ok(fd) => {
                    let found = sys::identify(fd.as_fd()).unwrap();
                    assert_eq!(found.dev(), planned.dev);
                }
                Err(error) => {
                    assert_eq!(planned.places[0].path, Path::new("/nowhere"));
                    assert!(error.may_be_gone() && !error.is_stuck(), "{error}");
                }
            }
        }
    }

    #[test]
    fn as_a_path_it_is_opened_where_it_was_mounted_and_nothing_else_is() {
        let table = mounts::read(proc().as_fd(), 0).unwrap();
        for (path, is_moved) in [("/", false), ("/dev", false), ("/dev", true)] {
            let path = Path::new(path);
            let mounted = table.iter().rfind(|m| m.path == path).unwrap();
            let mut planned = file_system(path, mounted.dev);
            planned.places[0].id = mounted.id;
            if is_moved {
                planned.places[0].path = "/sys".into();
            }
            // By a number that only the kernel has, and by what it says of it.
            let opened = as_path(&planned);
            let found = opened.map(|fd| sys::identify(fd.as_fd()).unwrap().mount_id);
            assert_eq!(found, (!is_moved).then_some(Some(mounted.id)), "{path:?}");
        }
        let nowhere = file_system(Path::new("/nowhere"), DevId::default());
        assert!(as_path(&nowhere).is_none());
    }

    #[test]
    fn below_layers_it_is_opened_apart_and_what_they_say_is_not_said_of_it() {
        let ways = here();
        let root = Path::new("/");
        let mut planned = file_system(root, dev_of(root));
        planned.places[0].walkable = false;
        planned.places[0].layers = Some("0:99".parse().unwrap());
        let error = by_path(&ways, &planned).unwrap_err();
        assert!(error.tried.is_empty(), "{error}");
        let opened = open_all_within(Duration::from_secs(60), &ways, &[&planned]);
        assert!(opened.iter().all(Result::is_ok), "{opened:?}");
        let broken = || {
            let source = Errno::EIO.into();
            OpenError::of(&planned, vec![PlaceError::open(root, source)])
        };
        assert!(broken().is_broken() && !broken().below_layers().is_broken());
    }

    #[test]
    fn those_that_hang_are_waited_for_together_whatever_the_way() {
        static HANG: Mutex<()> = Mutex::new(());
        const LIMIT: Duration = Duration::from_millis(500);
        let ways = here();
        fn hangs(_: &Ways, it: &FileSystem) -> Result<OwnedFd, OpenError> {
            drop(HANG.lock());
            Err(OpenError::of(it, Vec::new()))
        }
        let elsewhere = |minor| {
            let mut it = file_system(Path::new("/"), DevId { major: 99, minor });
            it.places.clear();
            it
        };
        let planned: Vec<FileSystem> = (0..6).map(elsewhere).collect();
        let planned: Vec<&FileSystem> = planned.iter().collect();
        let hold = HANG.lock().unwrap();
        // As long as they hang nobody waits for them again.
        for limit in [LIMIT, LIMIT * 100] {
            let begin = Instant::now();
            let opened = open_all_by(|_| hangs, limit, &ways, &planned);
            assert_eq!(opened.len(), 6);
            for error in opened.into_iter().map(Result::unwrap_err) {
                let is_locked = matches!(error.tried[..], [PlaceError::Locked]);
                assert!(is_locked, "{error}");
            }
            assert!(begin.elapsed() < LIMIT * 3, "{:?}", begin.elapsed());
        }
        drop(hold);
    }

    #[test]
    fn what_a_program_answers_is_no_lack_of_ours() {
        const LIMIT: Duration = Duration::from_secs(60);
        let root = Path::new("/");
        let with = |minor, fs_type: &str| FileSystem {
            fs_type: fs_type.into(),
            ..file_system(root, DevId { major: 97, minor })
        };
        fn answers(_: &Ways, it: &FileSystem) -> Result<OwnedFd, OpenError> {
            let error = match it.dev.minor {
                0 => return Ok(open("/", OFlag::O_RDONLY, Mode::empty()).unwrap()),
                1 => Errno::EMFILE,
                _ => Errno::ENOMEM,
            };
            let error = PlaceError::open(Path::new("/"), error.into());
            Err(OpenError::of(it, vec![error]))
        }
        let planned = [with(0, "ext4"), with(1, "fuse.sshfs"), with(2, "ext4")];
        let planned: Vec<&FileSystem> = planned.iter().collect();
        let opened = open_all_by(|_| answers, LIMIT, &here(), &planned);
        let opened = opened.into_iter();
        let is_ours = opened.map(|it| it.map(drop).map_err(|error| error.is_our_own()));
        let is_ours: Vec<_> = is_ours.collect();
        assert_eq!(is_ours, [Ok(()), Err(false), Err(true)]);
    }

    /// The limit is that of a whole process.
    #[test]
    fn what_could_not_even_be_asked_is_our_lack_whatever_it_is() {
        use nix::sys::resource::{getrlimit, setrlimit, Resource};
        const CHILD: &str = "HV_VSS_TEST_OPEN";
        if std::env::var_os(CHILD).is_none() {
            let this = std::env::current_exe().unwrap();
            let name = "open::tests::what_could_not_even_be_asked_is_our_lack_whatever_it_is";
            let mut child = std::process::Command::new(this);
            let child = child.args(["--exact", name, "--nocapture"]).env(CHILD, "1");
            let ended = child.output().unwrap();
            let text = String::from_utf8_lossy(&ended.stderr);
            assert!(ended.status.success(), "{text}");
            return;
        }
        let ways = here();
        let planned = file_system(Path::new("/"), dev_of(Path::new("/")));
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let next = open("/", OFlag::O_PATH, Mode::empty()).unwrap();
        let first = u64::try_from(next.as_raw_fd()).unwrap();
        drop(next);
        // Enough for the line, and not for who asks.
        setrlimit(Resource::RLIMIT_NOFILE, first + 3, hard).unwrap();
        let opened = open_all_within(Duration::from_secs(60), &ways, &[&planned]);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        let error = opened.into_iter().next().unwrap().unwrap_err();
        assert!(error.is_our_own(), "{error}");
    }

    #[test]
    fn a_name_forges_no_line_of_the_log() {
        let planned = file_system(Path::new("/a\nerror: /b"), DevId::default());
        let path = || planned.places[0].path.clone();
        let source = || Errno::ENOENT.into();
        let tried = vec![
            PlaceError::open(&path(), source()),
            PlaceError::Special { path: path() },
            PlaceError::Other {
                path: path(),
                found: DevId::default(),
            },
            PlaceError::Foreign { path: path() },
            PlaceError::Stuck { path: path() },
            PlaceError::Layers {
                path: path(),
                source: source(),
            },
            PlaceError::Again {
                device: path(),
                source: source(),
            },
            PlaceError::Lack {
                path: path(),
                source: source(),
            },
        ];
        let said = OpenError::of(&planned, tried).to_string();
        assert!(!said.contains('\n'), "{said}");
        assert_eq!(said.matches("/a\\nerror: /b").count(), 9, "{said}");
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
}
