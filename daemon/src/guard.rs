// SPDX-License-Identifier: GPL-2.0-only

//! The dead-man's switch: a process of its own that thaws when the daemon cannot.
//!
//! The daemon hands it a copy of each descriptor before the first freeze ([`Guard::arm`]). From
//! then on the guard thaws everything when the daemon dies (its end of the socket closes, or its
//! first thread is gone while another still hangs in the kernel) and when the deadline passes,
//! whatever the daemon does, and at once when the daemon says so. It reads no table and looks up no
//! path of a disk: it knows descriptors, waves and times, and not what a host is. How it thaws is in
//! [`crate::rescue`].
//!
//! It lives in a session of its own and blocks every signal, so that nothing but SIGKILL, sent to it
//! alone, takes it before its time. What was not handed over whole is not guarded: then it ends, which
//! the daemon takes for its death.
//!
//! The messages are packets on a Unix socket: a `Message`, for `ADD` and `START` followed by the
//! wave of each descriptor to thaw as a `u32`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::SigSet;
use nix::sys::socket::{
    sendmsg, socketpair, AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::children;
use crate::clock::boot_time;
use crate::freeze::Target;
use crate::process;
use crate::record::{Lock, RunDir};
use crate::rescue::{self, Crew, Member, Rescue};
use crate::sys;

/// The name of the guard on the command line of `hv_vss_daemon`; not for people.
pub const SUBCOMMAND: &str = "guard";

/// Daemon to guard: descriptors that are about to be frozen, more than fit into one message.
const ADD: u32 = 1;
/// Daemon to guard: the first freeze follows. Carries the deadline, and as descriptors the lock and
/// what is about to be frozen.
const START: u32 = 2;
/// Daemon to guard: one of them is not the daemon's to thaw.
const FORGET: u32 = 3;
/// Daemon to guard: one of those may be the daemon's after all, should that die.
const CLAIM: u32 = 9;
/// Daemon to guard: it is.
const OWN: u32 = 11;
/// Daemon to guard: all freezes have ended; from here on nothing becomes frozen.
const FROZEN: u32 = 4;
/// Daemon to guard: all is thawed, let go of everything.
const DONE: u32 = 5;
/// Guard to daemon: ready to be armed, after its start and after each `DONE`.
const READY: u32 = 6;
/// Guard to daemon: the deadline has passed, everything is being thawed.
const OVERDUE: u32 = 7;
/// Daemon to guard: thaw everything now. The daemon does as well, but it may be held up.
const RELEASE: u32 = 8;

/// Daemon to guard: the daemon is about to thaw, and has a deadline for that in the place of the last one.
const THAWING: u32 = 10;

/// Descriptors in `START` that are not to be thawed: the lock.
const OWN_DESCRIPTORS: usize = 1;

/// How long a guard may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take to let go and be ready again.
const REST_TIMEOUT: Duration = Duration::from_secs(2);
/// Messages that are heard before the deadline is looked at again, however many there are.
const MOST_AT_ONCE: usize = 1024;
/// How often the guard looks after the daemon while something is frozen.
const TICK: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Message {
    kind: u32,
    /// For `START`: 1 when a host waits, 0 for a rehearsal.
    for_host: u32,
    /// For `START` and `THAWING`: the deadline in nanoseconds of `CLOCK_BOOTTIME`. For `FORGET`, `CLAIM` and `OWN`:
    /// which, counted over all that was added.
    value: u64,
}

/// Why there is no guard.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// It cannot be started.
    #[error("cannot start the guard process")]
    Start(#[source] io::Error),
    /// It did not say that it is ready.
    #[error("the guard process does not answer")]
    Silent,
    /// It is gone.
    #[error("the guard process is gone")]
    Gone(#[source] io::Error),
}

impl GuardError {
    /// Whether it has yet to hear what was said before: what was said is to be said again.
    pub fn is_busy(&self) -> bool {
        matches!(self, GuardError::Gone(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

/// What the guard has to say to the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The deadline has passed; it is thawing everything.
    Overdue,
    /// It is dead.
    Died,
}

/// The daemon's end: a running guard.
#[derive(Debug)]
pub struct Guard {
    socket: OwnedFd,
    child: Mutex<Child>,
    process: Option<(u32, u64)>,
    /// Its `/proc/<pid>/stat`.
    stat: File,
    /// Since when it has been told to let go, and has not said that it is ready again.
    owes: Mutex<Option<Instant>>,
}

impl Guard {
    /// Starts a guard, from the very program that is running, and waits until it is ready. Not to
    /// be called while anything is frozen.
    pub fn start(run: &RunDir) -> Result<Self, GuardError> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .map_err(|e| GuardError::Start(e.into()))?;
        let mut command = children::this_program(SUBCOMMAND);
        command.arg(run.path()).env_clear();
        let said = io::stderr();
        let fds = [theirs.as_fd(), said.as_fd(), said.as_fd()];
        let starting = children::start("guard", command, &fds);
        let child = starting.and_then(|it| it.in_time(START_TIMEOUT));
        let child = child.map_err(GuardError::Start)?;
        drop(theirs);
        let pid = child.id();
        let guard = Guard {
            socket,
            process: process::start_of(pid).map(|start| (pid, start)),
            stat: File::open(format!("/proc/{pid}/stat")).map_err(GuardError::Start)?,
            child: Mutex::new(child),
            owes: Mutex::new(None),
        };
        let limit = PollTimeout::try_from(START_TIMEOUT).unwrap_or(PollTimeout::MAX);
        if !wait_readable(guard.socket.as_fd(), limit).map_err(GuardError::Start)? {
            return Err(GuardError::Silent);
        }
        let mut reply = Message::default();
        match sys::receive(guard.socket.as_fd(), reply.as_mut_bytes()) {
            Ok((size, _)) if size == size_of::<Message>() && reply.kind == READY => Ok(guard),
            _ => Err(GuardError::Silent),
        }
    }

    /// Its process, with the time of its start.
    pub fn process(&self) -> Option<(u32, u64)> {
        self.process
    }

    /// Makes it responsible for `targets` from now until [`Guard::done`]; it thaws them at the
    /// deadline, which is so far from now. The descriptors are in its hands (or in its socket,
    /// which is as good) when this returns.
    pub fn arm(
        &self,
        targets: &[Target],
        deadline: Duration,
        lock: &Lock,
        for_host: bool,
    ) -> Result<(), GuardError> {
        let mut rest = targets;
        // As many as fit go with the last message, so that there is only that one as a rule.
        while rest.len() > sys::MAX_DESCRIPTORS - OWN_DESCRIPTORS {
            let (chunk, later) = rest.split_at(sys::MAX_DESCRIPTORS.min(rest.len()));
            self.hand_over(ADD, 0, chunk, &[], 0)?;
            rest = later;
        }
        let own = [lock.as_raw_fd()];
        let deadline = (boot_time() + deadline).as_nanos() as u64;
        self.hand_over(START, for_host.into(), rest, &own, deadline)
    }

    fn hand_over(
        &self,
        kind: u32,
        for_host: u32,
        targets: &[Target],
        own: &[RawFd],
        value: u64,
    ) -> Result<(), GuardError> {
        let raw = targets.iter().map(|t| t.as_fd().as_raw_fd());
        let fds: Vec<RawFd> = own.iter().copied().chain(raw).collect();
        let waves: Vec<u32> = targets.iter().map(|t| t.wave as u32).collect();
        let message = Message {
            kind,
            for_host,
            value,
        };
        self.send(message, waves.as_bytes(), &fds)
    }

    /// Takes target number `index` out of its hands: somebody else has frozen that one.
    pub fn forget(&self, index: usize) -> Result<(), GuardError> {
        self.tell(FORGET, index as u64)
    }

    /// Says that the one with that number may be the daemon's after all: it is thawed should that die.
    pub fn claim(&self, index: usize) -> Result<(), GuardError> {
        self.tell(CLAIM, index as u64)
    }

    /// Says that this one is the daemon's after all: it is thawed with all others.
    pub fn own(&self, index: usize) -> Result<(), GuardError> {
        self.tell(OWN, index as u64)
    }

    /// Says that no further freeze will follow.
    pub fn frozen(&self) -> Result<(), GuardError> {
        self.tell(FROZEN, 0)
    }

    /// Says that the daemon is about to thaw. At this deadline, which is so far from now, it thaws what is left.
    pub fn thawing(&self, deadline: Duration) -> Result<(), GuardError> {
        self.tell(THAWING, (boot_time() + deadline).as_nanos() as u64)
    }

    /// Has it thaw everything now, and whatever becomes frozen from now on until [`Guard::done`].
    pub fn release(&self) -> Result<(), GuardError> {
        self.tell(RELEASE, 0)
    }

    /// Says that everything is thawed.
    pub fn done(&self) -> Result<(), GuardError> {
        let mut owes = self.lock_owes();
        let now = Instant::now();
        owes.get_or_insert(now);
        let told = self.tell(DONE, 0);
        if told.as_ref().is_err_and(GuardError::is_busy) {
            // It would take what it is handed next for more of the same.
            *owes = now.checked_sub(REST_TIMEOUT).or(*owes);
        }
        told
    }

    fn tell(&self, kind: u32, value: u64) -> Result<(), GuardError> {
        let message = Message {
            kind,
            for_host: 0,
            value,
        };
        self.send(message, &[], &[])
    }

    fn send(&self, message: Message, more: &[u8], fds: &[RawFd]) -> Result<(), GuardError> {
        send(self.socket.as_fd(), message, more, fds).map_err(GuardError::Gone)
    }

    /// What it has said since it was last asked; never waits.
    pub fn event(&self) -> Option<Event> {
        while wait_readable(self.socket.as_fd(), PollTimeout::ZERO).unwrap_or(true) {
            let mut message = Message::default();
            match sys::receive(self.socket.as_fd(), message.as_mut_bytes()) {
                Ok((size, _)) if size == size_of::<Message>() && message.kind == READY => {
                    *self.lock_owes() = None;
                }
                Ok((size, _)) if size == size_of::<Message>() && message.kind == OVERDUE => {
                    return Some(Event::Overdue);
                }
                _ => return Some(Event::Died),
            }
        }
        None
    }

    /// Why it would not mind what it is handed, if that is so: that would stay in its socket. What it has said is
    /// to be heard first ([`Guard::event`]).
    pub fn is_unfit(&self) -> Option<&'static str> {
        if self.unfit_at().is_some_and(|at| at <= Instant::now()) {
            return Some("hangs");
        }
        let mut text = [0; process::STAT_BYTES];
        let size = self.stat.read_at(&mut text, 0).unwrap_or(0);
        let stat = text.get(..size).unwrap_or_default();
        match (process::has_ended(stat), process::is_stopped_by(stat)) {
            // Its end of the socket is open as long as one of its threads is inside the kernel.
            (true, _) => Some("has been killed"),
            (false, true) => Some("has been stopped by somebody"),
            (false, false) => None,
        }
    }

    /// From when on it counts as one that hangs, unless it is ready before.
    pub fn unfit_at(&self) -> Option<Instant> {
        self.lock_owes().map(|since| since + REST_TIMEOUT)
    }

    /// Ends one that is not needed any more. Not to be called while it minds anything.
    pub fn dismiss(&self) {
        // If it has ended by itself, so much the better.
        let _ = self.lock_child().kill();
    }

    /// Collects one that has died, or been dismissed: false as long as it is still inside the kernel.
    pub fn is_gone(&self) -> bool {
        // There is nothing to learn from how it ended.
        !matches!(self.lock_child().try_wait(), Ok(None))
    }

    fn lock_owes(&self) -> MutexGuard<'_, Option<Instant>> {
        self.owes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRawFd for Guard {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Without its other end the guard ends by itself, once nothing is frozen.
        let both = nix::sys::socket::Shutdown::Both;
        let _ = nix::sys::socket::shutdown(self.as_raw_fd(), both);
    }
}

fn send(socket: BorrowedFd<'_>, message: Message, more: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let parts = [io::IoSlice::new(message.as_bytes()), io::IoSlice::new(more)];
    let rights = [ControlMessage::ScmRights(fds)];
    let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
    // A guard that is stopped must not stop the daemon.
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(socket.as_raw_fd(), &parts, rights, flags, None)?;
    Ok(())
}

fn wait_readable(fd: BorrowedFd<'_>, limit: PollTimeout) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    match poll(&mut fds, limit) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// The guard process itself: serves the socket on standard input until the daemon is gone and
/// nothing is left to thaw.
pub fn main(run: &Path) -> Result<(), GuardError> {
    // Only a name for ps(1): the program was started by way of /proc/self/exe.
    let _ = nix::sys::prctl::set_name(c"hv_vss_guard");
    // What is sent to the daemon's group or session, or by a service manager to all processes at once,
    // must not take the guard before the daemon; it ends when the daemon does.
    nix::unistd::setsid().map_err(|e| GuardError::Start(e.into()))?;
    let signals = SigSet::all().thread_block();
    signals.map_err(|e| GuardError::Start(e.into()))?;
    // Without privilege none of this succeeds, and neither does a freeze.
    let _ = process::escape_oom_killer();
    let _ = process::go_along();
    let _ = process::leave_no_dump();
    let _ = process::raise_descriptor_limit();
    process::lock_memory().map_err(GuardError::Start)?;
    let stdin = io::stdin();
    let parent = std::os::unix::process::parent_id();
    let mut watch = Watch {
        socket: stdin.as_fd(),
        // Read again and again, so it is opened only once.
        daemon: File::open(format!("/proc/{parent}/stat")).map_err(GuardError::Start)?,
        run: RunDir::new(run),
        gone: false,
        daemon_dead: false,
        crew: Crew::start().map_err(GuardError::Start)?,
        armed: Armed::default(),
    };
    watch.rehearse();
    watch.tell(READY).map_err(GuardError::Gone)?;
    watch.run()
}

/// What was handed over for one freeze.
#[derive(Default)]
struct Armed {
    members: Vec<Arc<Member>>,
    started: Option<Started>,
    /// Set by FROZEN, or by the daemon's end: no freeze is under way any more.
    settled: Arc<AtomicBool>,
}

impl Armed {
    /// False when not all have come that were announced.
    fn add(&mut self, fds: Vec<OwnedFd>, waves: &[u8]) -> bool {
        let waves = waves.chunks_exact(size_of::<u32>());
        if fds.len() != waves.len() {
            return false;
        }
        let wave = |bytes| u32::read_from_bytes(bytes).unwrap_or(0);
        let members = fds.into_iter().zip(waves);
        let members = members.map(|(fd, bytes)| Member::new(fd, wave(bytes)));
        self.members.extend(members);
        true
    }
}

/// What START brings.
struct Started {
    deadline: Duration,
    for_host: bool,
    /// Held until everything is thawed.
    _lock: OwnedFd,
    rescue: Rescue,
    /// For what the daemon may have frozen after the rescue, before it died.
    last_rescue: Option<Rescue>,
    /// The daemon has asked for it.
    released: bool,
    stage: Stage,
}

/// Where the guard stands with what it was handed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The daemon is to thaw.
    Watching,
    /// The guard does.
    Thawing,
    /// It has.
    Thawed,
}

struct Watch<'a> {
    socket: BorrowedFd<'a>,
    daemon: File,
    run: RunDir,
    /// Its end of the socket is closed.
    gone: bool,
    /// Its first thread has ended, as of the last look.
    daemon_dead: bool,
    crew: Arc<Crew>,
    armed: Armed,
}

impl Watch<'_> {
    fn run(&mut self) -> Result<(), GuardError> {
        loop {
            let readable = wait_readable_unless(self.socket, self.gone, self.pause())
                .map_err(GuardError::Gone)?;
            if readable {
                self.hear_all()?;
            } else if self.armed.started.is_some() {
                self.daemon_dead = self.daemon_is_dead();
            }
            if self.must_thaw() {
                self.begin_rescue();
            }
            if self.continue_rescue() {
                self.close_record();
                return Ok(());
            }
        }
    }

    fn pause(&self) -> PollTimeout {
        let pause = match &self.armed.started {
            None => return PollTimeout::NONE,
            Some(started) => match started.stage {
                Stage::Watching => started.deadline.saturating_sub(boot_time()).min(TICK),
                Stage::Thawing => rescue::TICK,
                Stage::Thawed => return PollTimeout::NONE,
            },
        };
        // Rounded up, or the last millisecond would be spent spinning.
        PollTimeout::try_from(pause + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
    }

    /// Hears all that the daemon has said before anything is done about it: after a stop, what it
    /// thawed itself long ago would be thawed here, and with it what it has frozen since.
    fn hear_all(&mut self) -> Result<(), GuardError> {
        for _ in 0..MOST_AT_ONCE {
            self.hear();
            let more = wait_readable_unless(self.socket, self.gone, PollTimeout::ZERO);
            if !more.map_err(GuardError::Gone)? {
                break;
            }
        }
        Ok(())
    }

    fn hear(&mut self) {
        let mut packet = [0u8; size_of::<Message>() + 4 * sys::MAX_DESCRIPTORS];
        let (size, mut fds) = match sys::receive(self.socket, &mut packet) {
            Ok(received) => received,
            // It died with something of ours unheard, and what it had said itself comes after this.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return,
            Err(_) => {
                self.lose_daemon();
                return;
            }
        };
        let packet = packet.get(..size).unwrap_or_default();
        let Ok((message, waves)) = Message::read_from_prefix(packet) else {
            self.lose_daemon();
            return;
        };
        match message.kind {
            ADD => self.gone |= !self.armed.add(fds, waves),
            START if fds.len() >= OWN_DESCRIPTORS => {
                let targets = fds.split_off(OWN_DESCRIPTORS);
                let Some(lock) = fds.pop().filter(|_| self.armed.add(targets, waves)) else {
                    self.lose_daemon();
                    return;
                };
                let Armed {
                    members, settled, ..
                } = &self.armed;
                let rescue = || Rescue::new(members, settled, &self.crew);
                self.armed.started = Some(Started {
                    deadline: Duration::from_nanos(message.value),
                    for_host: message.for_host != 0,
                    _lock: lock,
                    rescue: rescue(),
                    last_rescue: Some(rescue()),
                    released: false,
                    stage: Stage::Watching,
                });
            }
            START => self.lose_daemon(),
            FORGET | CLAIM | OWN => {
                let member = self.armed.members.get(message.value as usize);
                if let Some(member) = member {
                    match message.kind {
                        FORGET => member.forget(),
                        CLAIM => member.claim(),
                        _ => member.own(),
                    }
                }
            }
            RELEASE => {
                if let Some(started) = &mut self.armed.started {
                    started.released = true;
                }
            }
            THAWING => {
                if let Some(started) = &mut self.armed.started {
                    started.deadline = Duration::from_nanos(message.value);
                }
            }
            FROZEN => self.armed.settled.store(true, Ordering::SeqCst),
            DONE => {
                self.let_go();
                // If this fails, the daemon is gone, which the next round sees.
                let _ = self.tell(READY);
            }
            _ => {}
        }
    }

    /// Lets go of all that was handed over.
    fn let_go(&mut self) {
        let Armed {
            members, started, ..
        } = std::mem::take(&mut self.armed);
        drop(started);
        rescue::let_go(members);
    }

    fn tell(&self, kind: u32) -> io::Result<()> {
        let message = Message {
            kind,
            ..Message::default()
        };
        send(self.socket, message, &[], &[])
    }

    fn lose_daemon(&mut self) {
        self.gone = true;
        self.armed.settled.store(true, Ordering::SeqCst);
    }

    fn must_thaw(&self) -> bool {
        let Some(started) = &self.armed.started else {
            return false;
        };
        started.stage == Stage::Watching && (self.gone || self.daemon_dead || self.is_due(started))
    }

    fn is_due(&self, started: &Started) -> bool {
        started.released || boot_time() >= started.deadline
    }

    /// Whether the daemon was killed although its end of the socket is still open: that end closes
    /// only when its last thread has ended, and one that freezes cannot be interrupted.
    fn daemon_is_dead(&self) -> bool {
        let mut text = [0; process::STAT_BYTES];
        let Ok(size) = self.daemon.read_at(&mut text, 0) else {
            return true;
        };
        process::has_ended(text.get(..size).unwrap_or_default())
    }

    fn begin_rescue(&mut self) {
        let Some(started) = &mut self.armed.started else {
            return;
        };
        started.stage = Stage::Thawing;
        if self.gone || self.daemon_dead {
            self.armed.members.iter().for_each(|it| it.inherit());
        }
        started.rescue.begin();
        if !self.gone && !started.released {
            // As above.
            let _ = self.tell(OVERDUE);
        }
    }

    /// Goes on with a rescue, if one is under way. True when the daemon is gone and nothing is left
    /// frozen.
    fn continue_rescue(&mut self) -> bool {
        let Some(started) = &mut self.armed.started else {
            return self.gone;
        };
        if started.stage == Stage::Thawing && started.rescue.advance() {
            started.stage = Stage::Thawed;
            started.rescue.end();
        }
        if !self.gone || started.stage != Stage::Thawed {
            return false;
        }
        match started.last_rescue.take() {
            None => true,
            Some(last) => {
                self.armed.members.iter().for_each(|it| it.inherit());
                started.rescue = last;
                started.rescue.begin();
                started.stage = Stage::Thawing;
                false
            }
        }
    }

    /// Leaves word for the daemon's next start. Nothing is frozen any more but what was before.
    fn close_record(&self) {
        let Some(started) = &self.armed.started else {
            return;
        };
        // When one of these fails, the record still lists what was frozen, and the next start finds all
        // of it thawed: the same word, only longer.
        let word = match started.for_host {
            true => self.run.leave_word("the daemon died while it had frozen"),
            false => Ok(()),
        };
        let _ = word.and_then(|()| self.run.close());
    }

    /// Goes through everything that a rescue needs, so that its pages are in memory: a thaw that
    /// fails, the look at the daemon.
    fn rehearse(&mut self) {
        if let Ok(fd) = File::open("/proc/self/stat") {
            let settled = Arc::new(AtomicBool::new(true));
            let mut rescue = Rescue::new(&[Member::new(fd.into(), 0)], &settled, &self.crew);
            rescue.begin();
            while !rescue.advance() {
                let _ = wait_readable_unless(self.socket, true, PollTimeout::from(1u8));
            }
        }
        self.daemon_is_dead();
        boot_time();
    }
}

/// A guard whose part somebody else plays.
#[cfg(test)]
pub(crate) mod played {
    use super::*;
    use std::process::Command;

    /// The other end.
    pub(crate) struct Played(pub(super) OwnedFd);

    /// Both ends.
    pub(crate) fn guard() -> (Arc<Guard>, Played) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
        let (socket, theirs) = pair.unwrap();
        let guard = Guard {
            socket,
            process: None,
            stat: File::open("/proc/self/stat").unwrap(),
            child: Mutex::new(Command::new("true").spawn().unwrap()),
            owes: Mutex::new(None),
        };
        (Arc::new(guard), Played(theirs))
    }

    impl Played {
        /// What it was told since it was last asked.
        pub(crate) fn heard(&self) -> Vec<(&'static str, u64)> {
            let mut packet = [0u8; size_of::<Message>() + 4 * sys::MAX_DESCRIPTORS];
            let mut all = Vec::new();
            while let Ok((size, _)) = sys::receive(self.0.as_fd(), &mut packet) {
                let Ok((message, _)) = Message::read_from_prefix(&packet[..size]) else {
                    break;
                };
                all.push(match message.kind {
                    START => ("start", 0),
                    FORGET => ("forget", message.value),
                    CLAIM => ("claim", message.value),
                    OWN => ("own", message.value),
                    FROZEN => ("frozen", 0),
                    RELEASE => ("release", 0),
                    THAWING => ("thawing", 0),
                    DONE => ("done", 0),
                    _ => ("?", 0),
                });
            }
            all
        }
    }
}

/// Waits for `fd`, or only for the time to pass when there is nothing more to hear from it.
fn wait_readable_unless(fd: BorrowedFd<'_>, deaf: bool, limit: PollTimeout) -> io::Result<bool> {
    if !deaf {
        return wait_readable(fd, limit);
    }
    match poll(&mut [], limit) {
        Ok(_) | Err(Errno::EINTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guard that the test plays, for a daemon that does as well, and where that has its lock.
    fn watched(name: &str, test: impl FnOnce(Arc<Guard>, Watch<'_>, &Lock)) {
        let name = format!("hv-vss-{name}-{}", std::process::id());
        let run = RunDir::new(std::env::temp_dir().join(name));
        let (guard, played) = played::guard();
        let watch = Watch {
            socket: played.0.as_fd(),
            daemon: File::open("/proc/self/stat").unwrap(),
            run: run.clone(),
            gone: false,
            daemon_dead: false,
            crew: Arc::default(),
            armed: Armed::default(),
        };
        test(guard, watch, &run.lock().unwrap());
        std::fs::remove_dir_all(run.path()).unwrap();
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_daemon_that_is_about_to_thaw_has_another_deadline_for_that() {
        watched("thawing", |guard, mut watch, lock| {
            guard.arm(&[], Duration::ZERO, lock, true).unwrap();
            watch.hear_all().unwrap();
            assert!(watch.must_thaw());
            // It was said before the last one had passed, as far as anybody can tell.
            for (deadline, must_thaw) in [(LONG, false), (Duration::ZERO, true)] {
                guard.thawing(deadline).unwrap();
                watch.hear_all().unwrap();
                assert_eq!(watch.must_thaw(), must_thaw, "{deadline:?}");
            }
        });
    }

    #[test]
    fn what_a_daemon_has_said_before_its_death_is_heard_whatever_it_had_not_heard() {
        watched("unheard", |guard, mut watch, lock| {
            watch.tell(READY).unwrap();
            guard.arm(&[], LONG, lock, true).unwrap();
            drop(guard);
            watch.hear_all().unwrap();
            assert!(watch.must_thaw());
        });
    }

    #[test]
    fn what_was_announced_and_has_not_come_is_an_error() {
        let fd = || OwnedFd::from(File::open("/dev/null").unwrap());
        let waves = [0u32, 1];
        let mut armed = Armed::default();
        assert!(armed.add(vec![fd(), fd()], waves.as_bytes()));
        assert!(!armed.add(vec![fd()], waves.as_bytes()));
        assert!(!armed.add(vec![fd(), fd(), fd()], waves.as_bytes()));
        assert_eq!(armed.members.len(), 2);
    }
}
