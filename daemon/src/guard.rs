// SPDX-License-Identifier: GPL-2.0-only

//! The dead-man's switch: a process of its own that thaws when the daemon cannot.
//!
//! The daemon hands it a copy of each descriptor before the first freeze ([`Guard::arm`]). From
//! then on the guard thaws everything when the daemon dies (its end of the socket closes, or its
//! first thread is gone while another still hangs in the kernel) and when the deadline passes,
//! whatever the daemon does. It reads no table and looks up no path: it knows descriptors, waves
//! and times, and not what a host is. All that it needs to thaw, threads included, is there before
//! anything is frozen, since when the daemon falls to the OOM killer there may be no memory.
//!
//! The messages are packets on a Unix socket: a `Message`, for `ADD` and `START` followed by the
//! wave of each descriptor to thaw as a `u32`.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{
    sendmsg, socketpair, AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType,
};
use nix::time::{clock_gettime, ClockId};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::freeze::Target;
use crate::process;
use crate::record::{Lock, RecordFile, RunDir};
use crate::sys;

/// The name of the guard on the command line of `hv_vss_daemon`; not for people.
pub const SUBCOMMAND: &str = "guard";

/// Daemon to guard: descriptors that are about to be frozen, more than fit into one message.
const ADD: u32 = 1;
/// Daemon to guard: the first freeze follows. Carries the deadline, and as descriptors the record,
/// the lock and what is about to be frozen.
const START: u32 = 2;
/// Daemon to guard: one of them is not the daemon's to thaw.
const FORGET: u32 = 3;
/// Daemon to guard: all freezes have ended; from here on nothing becomes frozen.
const FROZEN: u32 = 4;
/// Daemon to guard: all is thawed, let go of everything.
const DONE: u32 = 5;
/// Guard to daemon: ready to be armed.
const READY: u32 = 6;
/// Guard to daemon: the deadline has passed, everything is being thawed.
const OVERDUE: u32 = 7;

/// Descriptors in `START` that are not to be thawed: record and lock.
const OWN_DESCRIPTORS: usize = 2;

/// How long a guard may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the guard looks after the daemon while something is frozen.
const TICK: Duration = Duration::from_millis(100);
/// How often while it thaws.
const THAW_TICK: Duration = Duration::from_millis(10);
/// How long one wave may hold up the thaw of the next.
const WAVE_LIMIT: Duration = Duration::from_millis(150);
/// Threads that wait to thaw; more are started when all of them hang.
const THREADS: usize = 8;
const STACK_BYTES: usize = 32 * 1024;

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Message {
    kind: u32,
    /// For `START`: 1 when a host waits, 0 for a rehearsal.
    for_host: u32,
    /// For `START`: the deadline in nanoseconds of `CLOCK_BOOTTIME`. For `FORGET`: which, counted
    /// over all that was added.
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
}

impl Guard {
    /// Starts a guard, from the very program that is running, and waits until it is ready. Not to
    /// be called while anything is frozen.
    pub fn start(run: &RunDir) -> Result<Self, GuardError> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .map_err(|e| GuardError::Start(e.into()))?;
        let child = Command::new("/proc/self/exe")
            .arg0("hv_vss_daemon")
            .arg(SUBCOMMAND)
            .arg(run.path())
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .env_clear()
            .spawn()
            .map_err(GuardError::Start)?;
        let guard = Guard {
            socket,
            child: Mutex::new(child),
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

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.lock_child().id()
    }

    /// Makes it responsible for `targets` from now until [`Guard::done`]; it thaws them at the
    /// deadline, which is so far from now. The descriptors are in its hands (or in its socket,
    /// which is as good) when this returns.
    pub fn arm(
        &self,
        targets: &[Target],
        deadline: Duration,
        record: &RecordFile,
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
        let own = [record.file.as_raw_fd(), lock.as_raw_fd()];
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

    /// Says that no further freeze will follow.
    pub fn frozen(&self) -> Result<(), GuardError> {
        self.tell(FROZEN, 0)
    }

    /// Says that everything is thawed.
    pub fn done(&self) -> Result<(), GuardError> {
        self.tell(DONE, 0)
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
        if !wait_readable(self.socket.as_fd(), PollTimeout::ZERO).unwrap_or(true) {
            return None;
        }
        let mut message = Message::default();
        match sys::receive(self.socket.as_fd(), message.as_mut_bytes()) {
            Ok((size, _)) if size == size_of::<Message>() && message.kind == OVERDUE => {
                Some(Event::Overdue)
            }
            _ => Some(Event::Died),
        }
    }

    /// Collects one that has died. Not to be called for one that lives.
    pub fn bury(&self) {
        // There is nothing to learn from how it ended.
        let _ = self.lock_child().wait();
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

/// The clock of the deadline; it goes on while the machine is suspended, as the host's does.
fn boot_time() -> Duration {
    // The clock exists on every kernel since 2.6.39, and the call has no other way to fail.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// The guard process itself: serves the socket on standard input until the daemon is gone and
/// nothing is left to thaw.
pub fn main(run: &Path) -> Result<(), GuardError> {
    // Only a name for ps(1): the program was started by way of /proc/self/exe.
    let _ = nix::sys::prctl::set_name(c"hv_vss_guard");
    // A service manager that stops all processes at once must not take the guard before the
    // daemon; it ends when the daemon does.
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals
        .thread_block()
        .map_err(|e| GuardError::Start(e.into()))?;
    // Without privilege none of this succeeds, and neither does a freeze.
    let _ = process::escape_oom_killer();
    let _ = process::go_along();
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
    let ready = Message {
        kind: READY,
        ..Message::default()
    };
    send(watch.socket, ready, &[], &[]).map_err(GuardError::Gone)?;
    watch.run()
}

/// One descriptor in the guard's hands.
struct Member {
    fd: OwnedFd,
    wave: u32,
    forgotten: AtomicBool,
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
    fn add(&mut self, fds: Vec<OwnedFd>, waves: &[u8]) {
        let waves = waves.chunks_exact(size_of::<u32>());
        let members = fds.into_iter().zip(waves).map(|(fd, wave)| {
            Arc::new(Member {
                fd,
                wave: u32::read_from_bytes(wave).unwrap_or(0),
                forgotten: AtomicBool::new(false),
            })
        });
        self.members.extend(members);
    }
}

/// What START brings.
struct Started {
    deadline: Duration,
    for_host: bool,
    record: File,
    /// Held until everything is thawed.
    _lock: OwnedFd,
    rescue: Rescue,
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
                self.hear();
            } else if self.armed.started.is_some() {
                self.daemon_dead = self.daemon_is_dead();
            }
            if self.must_thaw() {
                self.begin_rescue();
            }
            self.continue_rescue();
            let stage = self.armed.started.as_ref().map(|it| it.stage);
            if self.gone && matches!(stage, None | Some(Stage::Thawed)) {
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
                Stage::Thawing => THAW_TICK,
                Stage::Thawed => return PollTimeout::NONE,
            },
        };
        // Rounded up, or the last millisecond would be spent spinning.
        PollTimeout::try_from(pause + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
    }

    fn hear(&mut self) {
        let mut packet = [0u8; size_of::<Message>() + 4 * sys::MAX_DESCRIPTORS];
        let Ok((size, mut fds)) = sys::receive(self.socket, &mut packet) else {
            self.lose_daemon();
            return;
        };
        let packet = packet.get(..size).unwrap_or_default();
        let Ok((message, waves)) = Message::read_from_prefix(packet) else {
            self.lose_daemon();
            return;
        };
        match message.kind {
            ADD => self.armed.add(fds, waves),
            START if fds.len() >= OWN_DESCRIPTORS => {
                let targets = fds.split_off(OWN_DESCRIPTORS);
                self.armed.add(targets, waves);
                if let (Some(lock), Some(record)) = (fds.pop(), fds.pop()) {
                    self.armed.started = Some(Started {
                        deadline: Duration::from_nanos(message.value),
                        for_host: message.for_host != 0,
                        record: record.into(),
                        _lock: lock,
                        rescue: Rescue::new(&self.armed, &self.crew),
                        stage: Stage::Watching,
                    });
                }
            }
            FORGET => {
                let member = self.armed.members.get(message.value as usize);
                if let Some(member) = member {
                    member.forgotten.store(true, Ordering::SeqCst);
                }
            }
            FROZEN => self.armed.settled.store(true, Ordering::SeqCst),
            DONE => self.armed = Armed::default(),
            _ => {}
        }
    }

    fn lose_daemon(&mut self) {
        self.gone = true;
        self.armed.settled.store(true, Ordering::SeqCst);
    }

    fn must_thaw(&self) -> bool {
        let Some(started) = &self.armed.started else {
            return false;
        };
        started.stage == Stage::Watching
            && (self.gone || self.daemon_dead || boot_time() >= started.deadline)
    }

    /// Whether the daemon was killed although its end of the socket is still open: that end closes
    /// only when its last thread has ended, and one that freezes cannot be interrupted.
    fn daemon_is_dead(&self) -> bool {
        let mut text = [0u8; 512];
        let Ok(size) = self.daemon.read_at(&mut text, 0) else {
            return true;
        };
        process::has_ended(text.get(..size).unwrap_or_default())
    }

    fn begin_rescue(&mut self) {
        if let Some(started) = &mut self.armed.started {
            started.stage = Stage::Thawing;
            started.rescue.begin();
        }
        if !self.gone {
            let overdue = Message {
                kind: OVERDUE,
                ..Message::default()
            };
            // If this fails, the daemon is gone, which the next round sees.
            let _ = send(self.socket, overdue, &[], &[]);
        }
    }

    fn continue_rescue(&mut self) {
        let Some(started) = &mut self.armed.started else {
            return;
        };
        if started.stage == Stage::Thawing && started.rescue.advance() {
            started.stage = Stage::Thawed;
            started.rescue.end();
        }
    }

    /// Leaves word for the daemon's next start. Nothing is frozen any more.
    fn close_record(&self) {
        let Some(started) = &self.armed.started else {
            return;
        };
        // When this fails, the record still lists what was frozen, and the next start finds all
        // of it thawed: the same word, only longer.
        let _ = if started.for_host {
            started.record.set_len(0).map_err(|_| ())
        } else {
            self.run.remove().map_err(|_| ())
        };
    }

    /// Goes through everything that a rescue needs, so that its pages are in memory: a thaw that
    /// fails, the look at the daemon.
    fn rehearse(&mut self) {
        if let Ok(fd) = File::open("/proc/self/stat") {
            let member = Member {
                fd: fd.into(),
                wave: 0,
                forgotten: AtomicBool::new(false),
            };
            let armed = Armed {
                members: vec![Arc::new(member)],
                ..Armed::default()
            };
            armed.settled.store(true, Ordering::SeqCst);
            let mut rescue = Rescue::new(&armed, &self.crew);
            rescue.begin();
            while !rescue.advance() {
                let _ = wait_readable_unless(self.socket, true, PollTimeout::from(1u8));
            }
        }
        self.daemon_is_dead();
        boot_time();
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

/// The threads that thaw. They live as long as the guard and wait for a rescue.
#[derive(Default)]
struct Crew {
    state: Mutex<CrewState>,
    /// A rescue begins, or somebody is free again.
    changed: Condvar,
}

#[derive(Default)]
struct CrewState {
    /// The rescue that is under way.
    rescue: Option<Arc<Shared>>,
    /// How many wait for one.
    free: usize,
}

impl Crew {
    fn start() -> io::Result<Arc<Self>> {
        let crew = Arc::new(Crew::default());
        let no_file_system = Arc::new(File::open("/proc/self/stat")?);
        for _ in 0..THREADS {
            let (one, no_file_system) = (Arc::clone(&crew), Arc::clone(&no_file_system));
            let builder = thread::Builder::new().stack_size(STACK_BYTES);
            builder.spawn(move || {
                // It cannot be thawed; this is for the pages of the thread's stack.
                let _ = sys::thaw(no_file_system.as_fd());
                one.wait_and_work();
            })?;
        }
        let incomplete = |state: &mut CrewState| state.free < THREADS;
        let all = crew.changed.wait_while(crew.lock(), incomplete);
        drop(all.unwrap_or_else(PoisonError::into_inner));
        Ok(crew)
    }

    fn lock(&self) -> MutexGuard<'_, CrewState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_and_work(&self) {
        loop {
            let mut state = self.lock();
            state.free += 1;
            self.changed.notify_all();
            let rescue = loop {
                if let Some(rescue) = &state.rescue {
                    break Arc::clone(rescue);
                }
                let woken = self.changed.wait(state);
                state = woken.unwrap_or_else(PoisonError::into_inner);
            };
            state.free -= 1;
            drop(state);
            rescue.work();
        }
    }

    /// Sets all who are free to work; returns how many.
    fn begin(&self, rescue: &Arc<Shared>) -> usize {
        let mut state = self.lock();
        state.rescue = Some(Arc::clone(rescue));
        self.changed.notify_all();
        state.free
    }

    fn end(&self, rescue: &Shared) {
        // First, so that nobody who comes back from it finds it here.
        self.lock().rescue = None;
        rescue.lock().closed = true;
    }
}

/// Thaws everything, the last wave first, without ever waiting for what hangs. Made before there is
/// anything to thaw, so that no memory is wanted then.
struct Rescue {
    crew: Arc<Crew>,
    shared: Arc<Shared>,
    /// The waves not yet begun, first to last.
    waves: Vec<Vec<Arc<Member>>>,
    wave_began: Instant,
    threads: usize,
    most_threads: usize,
}

struct Shared {
    queue: Mutex<Queue>,
    settled: Arc<AtomicBool>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Arc<Member>>,
    /// Threads that are inside the kernel with one.
    busy: usize,
    closed: bool,
}

impl Rescue {
    fn new(armed: &Armed, crew: &Arc<Crew>) -> Self {
        let mut waves: Vec<Vec<Arc<Member>>> = Vec::new();
        for member in &armed.members {
            let wave = member.wave as usize;
            if waves.len() <= wave {
                waves.resize(wave + 1, Vec::new());
            }
            if let Some(wave) = waves.get_mut(wave) {
                wave.push(Arc::clone(member));
            }
        }
        Rescue {
            crew: Arc::clone(crew),
            shared: Arc::new(Shared {
                queue: Mutex::new(Queue {
                    waiting: VecDeque::with_capacity(armed.members.len()),
                    ..Queue::default()
                }),
                settled: Arc::clone(&armed.settled),
            }),
            waves,
            wave_began: Instant::now(),
            threads: 0,
            most_threads: armed.members.len(),
        }
    }

    fn begin(&mut self) {
        self.threads = self.crew.begin(&self.shared);
    }

    fn end(&self) {
        self.crew.end(&self.shared);
    }

    /// Does what is due. True when everything is thawed that was frozen.
    fn advance(&mut self) -> bool {
        let (idle, waiting, busy) = {
            let queue = self.shared.lock();
            let idle = queue.waiting.is_empty() && queue.busy == 0;
            (idle, queue.waiting.len(), queue.busy)
        };
        if idle || self.wave_began.elapsed() > WAVE_LIMIT {
            match self.waves.pop() {
                Some(wave) => {
                    self.shared.lock().waiting.extend(wave);
                    self.wave_began = Instant::now();
                }
                None if idle => return true,
                None => {}
            }
        }
        if waiting > 0 && busy >= self.threads && self.threads < self.most_threads {
            self.start_thread();
        }
        false
    }

    fn start_thread(&mut self) {
        self.threads += 1;
        let shared = Arc::clone(&self.shared);
        let builder = thread::Builder::new().stack_size(STACK_BYTES);
        if builder.spawn(move || shared.work()).is_err() {
            // No memory for a thread: then here, at the risk that it hangs.
            self.shared.attempt_one();
        }
    }
}

impl Drop for Rescue {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        while !self.lock().closed {
            if !self.attempt_one() {
                thread::sleep(THAW_TICK);
            }
        }
    }

    /// Tries to thaw one. False when there is nothing to do at the moment.
    fn attempt_one(&self) -> bool {
        let member = {
            let mut queue = self.lock();
            let Some(member) = queue.waiting.pop_front() else {
                return false;
            };
            queue.busy += 1;
            member
        };
        // Read before the attempt: what is not frozen now could otherwise become so in between.
        let settled = self.settled.load(Ordering::SeqCst);
        let over = member.forgotten.load(Ordering::SeqCst)
            || match sys::thaw(member.fd.as_fd()).map_err(|e| e.raw_os_error()) {
                Ok(()) => true,
                // Not frozen: not any more, or not yet.
                Err(Some(libc::EINVAL)) => settled,
                // It cannot freeze either, and nobody without privilege has frozen anything.
                Err(Some(libc::ENOTTY | libc::EOPNOTSUPP | libc::EPERM)) => true,
                Err(_) => false,
            };
        let mut queue = self.lock();
        queue.busy -= 1;
        if !over {
            queue.waiting.push_back(member);
        }
        over
    }
}
