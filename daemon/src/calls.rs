// SPDX-License-Identifier: GPL-2.0-only

//! Calls hooks: one after the other with `freeze`, and, after the thaw, each that was started with
//! `thaw`, the last one first.
//!
//! It has a thread of its own, for as long as there are hooks to be called or to be let go, and waits on
//! nothing but time, a process, what that writes and the word to let go. Each call has a process group
//! of its own; when its time is over all of it is killed. It begins as this very program and becomes the hook then
//! ([`crate::children`]): to get at either may take as long as anything, and nothing of the hook is run
//! before it is on record which process it is. What a hook writes is read all the time, since
//! one that stays over the freeze would hang otherwise, and is logged after the thaw. What it leaves running then has a
//! reader as long as this process lives. Only a call with `thaw` that has run the hook ends what is owed to it. What is
//! not there for the moment, as while a package is upgraded, is waited for a little. What does not let itself be looked
//! up, must not be run or cannot be stays on record, and is tried again: by the daemon twice a minute, with each backup
//! that calls any, at the next start and by hand; after a day it is given up on. What one that ended well leaves running
//! is its [`Session`]: should that end by itself, the application is no longer ready. A record
//! of what is to be let go is in the run directory, for whoever comes after a death. It freezes nothing and
//! decides of no backup.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::Child;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{killpg, Signal};
use nix::sys::wait::{waitid, Id, WaitPidFlag, WaitStatus};
use nix::unistd::{pipe2, Pid};
use sd_notify::NotifyState;
use serde::{Deserialize, Serialize};

use crate::backup::{name_of_type, Verdict};
use crate::children::{self, Starting};
use crate::clock::boot_time;
use crate::hooks::{Found, Hook, Verb};
use crate::logbook::{words, Logbook};
use crate::process;
use crate::progress::Progress;
use crate::record::{Lock, RecordError, RunDir};
use crate::sys;

/// Bytes of what a call writes that are kept.
const MOST_OUTPUT: usize = 8192;
/// The word to let go when nobody can tell how the backup went: no [`Verdict`] is that one.
const NOT_KNOWN: u8 = u8::MAX;
/// Reads of a pipe at a time, of 1 KiB each.
const MOST_READS: usize = 64;
/// How long after the end of a call what it has left running is looked at: a logger at the end of its pipe ends
/// with it, if somewhat later, and is nothing that an application is kept ready by.
const SETTLED: Duration = Duration::from_millis(500);
/// How often one that does not come to its start is left for the word to let go, and one that is to end looked at.
const TICK: Duration = Duration::from_millis(20);
/// How long after a call that could not be started it is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// How long one that was called is waited for that cannot be run at the thaw, all of them together: its file is being
/// replaced by another.
const GAP: Duration = Duration::from_secs(5);
/// How long after it was first tried what is owed to one is given up on. Its application goes on without by then, or is
/// known to somebody who sees to it.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(24 * 60 * 60);
/// How often the service manager is asked for time as long as hooks are let go, and for how much: each call has a limit
/// of its own, and all of them together may take longer than a stop of the service.
const ASKS: Duration = Duration::from_secs(1);
const TIME: Duration = Duration::from_secs(30);
/// How long what was killed may take to end.
const GRACE: Duration = Duration::from_secs(2);
/// Where hooks, and whoever else is started by name, find programs.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const STACK_BYTES: usize = 128 * 1024;
/// Bytes that a list of file systems may have: a variable of more than 128 KiB (`MAX_ARG_STRLEN` of the kernel)
/// keeps a program from being started.
const LONGEST_LIST: usize = 120 * 1024;

/// What a backup is about, for whoever is called, as environment variables.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context(Vec<(String, String)>);

impl Context {
    /// Lists have blanks between their elements, and octal escapes for blanks within, as in the mount
    /// table. Of file systems that do not fit there is the number.
    pub fn new(
        request: u64,
        backup_type: Option<u32>,
        disks: &[String],
        file_systems: &[String],
    ) -> Self {
        let backup_type = backup_type.map_or("".into(), name_of_type);
        let list = |all: &[String]| all.iter().map(|it| escape(it)).collect::<Vec<_>>();
        let mut file_systems = list(file_systems);
        let all = file_systems.len();
        let mut room = LONGEST_LIST;
        let fits = file_systems.iter().take_while(|it| {
            let left = room.checked_sub(it.len() + 1);
            room = left.unwrap_or(0);
            left.is_some()
        });
        let listed = fits.count();
        file_systems.truncate(listed);
        let variable = |name: &str, value: String| (format!("HV_VSS_{name}"), value);
        let mut variables = vec![
            variable("REQUEST", request.to_string()),
            variable("BACKUP_TYPE", backup_type.into()),
            variable("DISKS", list(disks).join(" ")),
            variable("FILE_SYSTEMS", file_systems.join(" ")),
        ];
        if listed < all {
            variables.push(variable("FILE_SYSTEMS_MORE", (all - listed).to_string()));
        }
        Context(variables)
    }
}

fn escape(text: &str) -> String {
    let escaped = |c: char| match c {
        ' ' | '\t' | '\n' | '\\' => format!("\\{:03o}", u32::from(c)),
        other => other.into(),
    };
    text.chars().map(escaped).collect()
}

/// How the last backup is named in the environment of a call.
fn word_for(verdict: Option<Verdict>) -> &'static str {
    match verdict {
        Some(Verdict::Good) => "good",
        Some(Verdict::Broken) => "broken",
        Some(Verdict::Failed) => "failed",
        None => "unknown",
    }
}

/// A hook that was called with `freeze`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owed {
    /// Which.
    pub hook: Hook,
    /// The process of its last call, with the time of its start, if that has been seen.
    pub process: Option<(u32, u64)>,
    /// If that was with `thaw`: when it began, in seconds since the machine was booted. Such a call is left its time
    /// also by whoever comes after a death.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub thaws_since_s: Option<u64>,
    /// What it was not let go for, once that was tried.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub lacks: Option<Lack>,
}

impl Owed {
    /// Why it is not let go yet, if that was tried, for people.
    pub fn in_words(&self) -> Option<String> {
        let Lack { why, .. } = self.lacks.as_ref()?;
        Some(format!(
            "hook {} is not let go yet: {why}",
            self.hook.name()
        ))
    }
}

/// Why a hook could not be let go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lack {
    /// When that was first tried, in seconds since the machine was booted: the record lasts no longer.
    pub since_s: u64,
    /// When it was last.
    pub why: String,
}

impl Lack {
    /// Whether it is given up on, so many seconds after the machine was booted.
    fn is_over(&self, now_s: u64) -> bool {
        now_s.saturating_sub(self.since_s) >= GIVEN_UP_AFTER.as_secs()
    }
}

/// Hooks that are to be let go, on record for whoever comes after a death.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookRecord {
    /// The process that has called them, or lets them go.
    pub pid: u32,
    /// What it has told them.
    pub context: Context,
    /// Milliseconds that each call may take.
    pub limit_ms: u64,
    /// In the order of their calls.
    pub owed: Vec<Owed>,
}

/// What is on record of hooks, or why that cannot be read.
pub type Left = Result<Option<HookRecord>, String>;

/// That in `run`.
pub fn left_in(run: &RunDir) -> Left {
    run.read_hooks().map_err(|error| words(&error))
}

/// One call that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Called {
    /// The hook's name.
    pub name: String,
    /// What it was called with.
    pub verb: Verb,
    /// When.
    pub since: Instant,
    /// How long it took.
    pub took: Duration,
    /// What was wrong with it; it may be that it was not run.
    pub fault: Option<String>,
}

/// What a hook that ended well has left running, to keep its application ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The hook's name.
    pub hook: String,
    /// Whether there is no backup without it.
    pub required: bool,
    /// Its process group, whose first process is not reaped as long as this is there.
    group: u32,
    /// One of its processes, with the time of its start.
    process: (u32, u64),
}

impl Session {
    /// What is to be said of one that has ended then.
    pub fn has_ended_in_words(&self, when: &str) -> String {
        let hook = &self.hook;
        format!("hook {hook}: what it had left running has ended {when}")
    }

    /// Whether nothing of it is left but what does nothing any more but end. As a rule one process tells.
    fn has_ended(&mut self) -> bool {
        let (pid, start) = self.process;
        if process::start_of(pid) == Some(start) && !process::is_dead(pid) {
            return false;
        }
        match process::member_of(self.group) {
            Some(other) => self.process = other,
            None => return true,
        }
        false
    }
}

/// Those of a backup under way.
#[derive(Clone, Debug, Default)]
struct Sessions(Arc<Mutex<Vec<Session>>>);

impl Sessions {
    fn all(&self) -> MutexGuard<'_, Vec<Session>> {
        // It is whole after each change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that ended well, of which it is to be seen what it has left running.
struct Settling {
    hook: String,
    required: bool,
    group: u32,
    /// When.
    at: Instant,
}

/// What the event loop hears.
#[derive(Debug)]
pub enum HookOutcome {
    /// All are ready, or one that is required is not.
    Quiesced(Result<(), String>),
    /// All have been let go that could be.
    Released {
        /// All calls.
        called: Vec<Called>,
        /// What is not let go yet, and why.
        owed: Vec<String>,
        /// What is on record then: what those before have left where there is no room for another.
        left: Left,
    },
}

/// What a call needs.
#[derive(Clone)]
pub struct Means {
    /// Where the record is.
    pub run: RunDir,
    /// Where to say what happens.
    pub log: Logbook,
    /// How long each call may take.
    pub limit: Duration,
    /// What the hooks are told.
    pub context: Context,
}

/// The hooks of one backup, from the first call to the last.
pub struct Calling {
    word: UnixStream,
    thread: JoinHandle<()>,
    sessions: Sessions,
}

impl Calling {
    /// Calls `hooks` with `freeze`. `tell` is called from another thread.
    pub fn start(
        hooks: Vec<Found>,
        means: Means,
        progress: Arc<Progress>,
        tell: impl Fn(HookOutcome) + Send + 'static,
    ) -> Result<Self, String> {
        let lock = means.run.lock_hooks().map_err(|error| words(&error))?;
        // A rehearsal may have died beside the daemon.
        let left = on_record(&means.run, &means.log, &lock).map_err(|error| words(&error))?;
        let (word, theirs) = UnixStream::pair().map_err(|e| e.to_string())?;
        let sessions = Sessions::default();
        let its = sessions.clone();
        let body = move || {
            let mut calls = Calls::new(means, Some(theirs), Some(lock));
            calls.sessions = its;
            if let Some(left) = left {
                calls.let_go(left);
            }
            let result = calls.freeze(hooks, &progress);
            if calls.word.is_none() {
                tell(HookOutcome::Quiesced(result));
            }
            let verdict = calls.wait();
            tell(calls.release(verdict));
        };
        Self::spawn(word, sessions, body)
    }

    /// Lets go what somebody who has died has called, as far as it is on record in `run`.
    pub fn recover(
        run: &RunDir,
        log: &Logbook,
        tell: impl Fn(HookOutcome) + Send + 'static,
    ) -> Result<Option<Self>, String> {
        let left = Calls::left(run, log).map_err(|error| words(&error))?;
        let Some(mut calls) = left else {
            return Ok(None);
        };
        let (word, _) = UnixStream::pair().map_err(|e| e.to_string())?;
        let body = move || tell(calls.release(None));
        Self::spawn(word, Sessions::default(), body).map(Some)
    }

    fn spawn(
        word: UnixStream,
        sessions: Sessions,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<Self, String> {
        let builder = Builder::new().name("hooks".into()).stack_size(STACK_BYTES);
        let thread = builder.spawn(body).map_err(|e| e.to_string())?;
        Ok(Calling {
            word,
            thread,
            sessions,
        })
    }

    /// Lets them go, now that nothing is frozen any more but what hangs; `None` when nobody can tell how the
    /// backup went. A call under way is killed first. Only the first word counts.
    pub fn release(&self, verdict: Option<Verdict>) {
        let word = verdict.map_or(NOT_KNOWN, |it| it as u8);
        // It fails only when the thread has ended, and with it everything.
        let _ = (&self.word).write_all(&[word]);
    }

    /// The sessions that have ended by themselves, each once; none any more once hooks are let go. It waits
    /// for no disk.
    pub fn sessions_ended(&self) -> Vec<Session> {
        let mut ended = Vec::new();
        self.sessions.all().retain_mut(|it| {
            let has_ended = it.has_ended();
            if has_ended {
                ended.push(it.clone());
            }
            !has_ended
        });
        ended
    }

    /// Whether all have been let go.
    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the end of those that have told that they are released.
    pub fn join(self) {
        // A panic has ended the process.
        let _ = self.thread.join();
    }
}

/// Lets go what somebody who has died has called, before it returns; whether there was any.
pub fn recover(run: &RunDir, log: &Logbook) -> Result<bool, RecordError> {
    // Who has just been killed lets go the lock at once, unless it hangs in the kernel.
    let until = Instant::now() + GRACE;
    let is_dying = || {
        let owner = run.read_hooks().ok().flatten();
        owner.is_some_and(|it| process::is_dead(it.pid)) && !run.is_free_of_hooks()
    };
    while is_dying() && Instant::now() < until {
        std::thread::sleep(TICK);
    }
    let left = Calls::left(run, log)?;
    Ok(left.map(|mut calls| calls.thaw(None)).is_some())
}

/// What is on record, for whoever has the lock. What cannot be read has been left by somebody who has died, of another
/// version perhaps: nobody knows its hooks, and no backup may fail for that for ever. It is put aside.
fn on_record(run: &RunDir, log: &Logbook, lock: &Lock) -> Result<Option<HookRecord>, RecordError> {
    match run.read_hooks() {
        Err(error @ RecordError::Malformed { .. }) => {
            run.put_hooks_aside(lock)?;
            let (error, aside) = (words(&error), run.hooks_aside());
            log.error(format!(
                "{error}: it is now {}, and hooks that it may name are not let go",
                aside.display()
            ));
            Ok(None)
        }
        other => other,
    }
}

/// What a call writes, as far as it is kept.
struct Output {
    /// Whose it is, for the log.
    who: String,
    /// Until nobody can write any more.
    pipe: Option<File>,
    kept: Vec<u8>,
    lost: usize,
}

impl Output {
    /// Takes what has come, but no more at a time than a pipe holds: who writes without end must not keep this
    /// thread from all else.
    fn drain(&mut self) {
        let mut part = [0; 1024];
        for _ in 0..MOST_READS {
            let Some(pipe) = &mut self.pipe else { return };
            match pipe.read(&mut part) {
                Ok(0) => self.pipe = None,
                Ok(n) => {
                    let room = MOST_OUTPUT.saturating_sub(self.kept.len()).min(n);
                    self.kept.extend(part.iter().take(room));
                    self.lost += n - room;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.pipe = None,
            }
        }
    }
}

/// Where those write to that hooks have left running when all were let go. Without a reader the next line would be
/// the end of them (`SIGPIPE`), long after a backup that was good. Nothing of it is kept.
struct Leftover {
    epoll: Epoll,
    /// By the numbers of their descriptors.
    pipes: Mutex<HashMap<u64, File>>,
}

/// One for all backups, once there is any: it has a thread.
static LEFTOVER: Mutex<Option<Arc<Leftover>>> = Mutex::new(None);

impl Leftover {
    /// Reads this until nobody can write any more.
    fn put(pipe: File) -> io::Result<()> {
        // It is whole after each change.
        let mut one = LEFTOVER.lock().unwrap_or_else(PoisonError::into_inner);
        let leftover = match &*one {
            Some(leftover) => leftover,
            None => one.insert(Self::start()?),
        };
        let key = u64::try_from(pipe.as_raw_fd()).map_err(io::Error::other)?;
        // It is in there before it is told of.
        let mut pipes = leftover.pipes();
        let event = EpollEvent::new(EpollFlags::EPOLLIN, key);
        leftover.epoll.add(&pipe, event)?;
        pipes.insert(key, pipe);
        Ok(())
    }

    fn start() -> io::Result<Arc<Self>> {
        let leftover = Arc::new(Leftover {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            pipes: Mutex::default(),
        });
        let its = Arc::clone(&leftover);
        let builder = Builder::new()
            .name("leftover".into())
            .stack_size(STACK_BYTES);
        builder.spawn(move || its.read())?;
        Ok(leftover)
    }

    fn read(&self) {
        // Who writes without end must not be in the way of anybody. It takes no privilege.
        let _ = process::go_along();
        let mut events = [EpollEvent::empty(); 8];
        loop {
            // It fails only when a signal comes.
            let happened = self.epoll.wait(&mut events, EpollTimeout::NONE);
            for event in events.iter().take(happened.unwrap_or(0)) {
                self.read_one(event.data());
            }
        }
    }

    /// As much as there is, up to 4 KiB.
    fn read_one(&self, key: u64) {
        let mut pipes = self.pipes();
        let Some(pipe) = pipes.get_mut(&key) else {
            return;
        };
        match pipe.read(&mut [0; 4096]) {
            Ok(1..) => {}
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Ok(0) | Err(_) => {
                // It fails only where it is not in there.
                let _ = self.epoll.delete(&*pipe);
                pipes.remove(&key);
            }
        }
    }

    fn pipes(&self) -> MutexGuard<'_, HashMap<u64, File>> {
        self.pipes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A process that waits for the word to become a hook.
struct Call {
    child: Child,
    pidfd: OwnedFd,
    /// Without that word, be it that we die, it ends.
    word: UnixStream,
}

/// One that was given the word.
struct Running {
    child: Child,
    pidfd: OwnedFd,
    /// It is closed once it is the hook, or says why it cannot be.
    word: UnixStream,
}

impl Running {
    /// Whether it is the hook, or has ended as that.
    fn has_begun(&self) -> Result<(), String> {
        let mut number = [0; 4];
        match (&self.word).read(&mut number) {
            Ok(4) => {
                let error = io::Error::from_raw_os_error(i32::from_ne_bytes(number));
                Err(format!("it cannot be run: {error}"))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err("it has not begun".into()),
            _ => Ok(()),
        }
    }
}

impl Call {
    /// Which it is, with the time of its start.
    fn process(&self) -> Option<(u32, u64)> {
        let pid = self.child.id();
        process::start_of(pid).map(|start| (pid, start))
    }

    fn go_on(mut self) -> Running {
        // It fails when the process has ended, and that is seen.
        let _ = self.word.write_all(&[0]);
        Running {
            child: self.child,
            pidfd: self.pidfd,
            word: self.word,
        }
    }

    fn call_off(mut self) {
        kill(self.child.id());
        // One that cannot be killed is left behind.
        let _ = self.child.try_wait();
    }
}

/// How a call ended.
enum End {
    Good,
    Bad(String),
    /// Nothing of the hook was run.
    NotRun(String),
    /// It was killed before it was the hook, or as it became that.
    NotBegun(String),
    /// The word to let go has come first.
    CutShort,
}

impl End {
    /// What was wrong with it.
    fn fault(&self) -> Option<&str> {
        match self {
            End::Good => None,
            End::Bad(why) | End::NotRun(why) | End::NotBegun(why) => Some(why),
            End::CutShort => Some("called off"),
        }
    }
}

struct Calls {
    means: Means,
    /// From whoever has all thawed.
    words: Option<UnixStream>,
    word: Option<Option<Verdict>>,
    /// Held from the first call to the last, unless it is that of a dead process.
    _lock: Option<Lock>,
    record: HookRecord,
    /// The processes of the calls with `freeze`. They are not reaped before they are let go: a process
    /// group has its number as long as its first process is there.
    children: Vec<Option<Child>>,
    /// How many of those on record, the first, are still owed from an earlier backup.
    inherited: usize,
    /// Whether this process has said already what it could not let go of those.
    has_said: bool,
    /// The one that is looked at next is the first.
    settling: Vec<Settling>,
    sessions: Sessions,
    outputs: Vec<Output>,
    called: Vec<Called>,
    /// When the service manager is to be asked for time again; only while hooks are let go.
    asks: Option<Instant>,
}

impl Calls {
    fn new(means: Means, words: Option<UnixStream>, lock: Option<Lock>) -> Self {
        let record = HookRecord {
            pid: std::process::id(),
            context: means.context.clone(),
            limit_ms: u64::try_from(means.limit.as_millis()).unwrap_or(u64::MAX),
            owed: Vec::new(),
        };
        Calls {
            means,
            words,
            word: None,
            _lock: lock,
            record,
            children: Vec::new(),
            inherited: 0,
            has_said: false,
            settling: Vec::new(),
            sessions: Sessions::default(),
            outputs: Vec::new(),
            called: Vec::new(),
            asks: None,
        }
    }

    /// What a dead process has on record; none whose owner lives, for that one lets go by itself.
    fn left(run: &RunDir, log: &Logbook) -> Result<Option<Self>, RecordError> {
        if matches!(run.read_hooks(), Ok(None)) {
            return Ok(None);
        }
        let lock = match run.lock_hooks() {
            Ok(lock) => Some(lock),
            // A thread of a dead process that is inside the kernel keeps it.
            Err(RecordError::Locked { .. }) => None,
            Err(error) => return Err(error),
        };
        // Who held the lock until now may have let go meanwhile.
        let record = match &lock {
            Some(lock) => on_record(run, log, lock)?,
            None => run.read_hooks()?,
        };
        let Some(record) = record else {
            return Ok(None);
        };
        if lock.is_none() && !process::is_dead(record.pid) {
            return Ok(None);
        }
        Self::take_over(run, log, record, lock).map(Some)
    }

    /// What this record says is to be let go, which is ours from here on. None of it is at freeze any more; what is at
    /// thaw is waited for when its turn comes.
    fn take_over(
        run: &RunDir,
        log: &Logbook,
        mut record: HookRecord,
        lock: Option<Lock>,
    ) -> Result<Self, RecordError> {
        let means = Means {
            run: run.clone(),
            log: log.clone(),
            limit: Duration::from_millis(record.limit_ms),
            context: record.context.clone(),
        };
        for owed in &record.owed {
            let Some((pid, start)) = owed.process else {
                continue;
            };
            if owed.thaws_since_s.is_none() && process::start_of(pid) == Some(start) {
                let name = owed.hook.name();
                log.warning(format!("hook {name} of a dead daemon still runs: killed"));
                kill_and_wait(pid);
            }
        }
        // Nobody else lets them go as long as we live.
        let has_said = record.pid == std::process::id();
        record.pid = std::process::id();
        if record.owed.is_empty() {
            run.remove_hooks()?;
        } else if let Err(error) = run.write_hooks(&record) {
            log.warning(words(&error));
        }
        let children = record.owed.iter().map(|_| None).collect();
        Ok(Calls {
            inherited: record.owed.len(),
            has_said,
            record,
            children,
            ..Calls::new(means, None, lock)
        })
    }

    /// Lets go what this record of a dead process says, and goes on owing what cannot be let go yet.
    fn let_go(&mut self, record: HookRecord) {
        let Means { run, log, .. } = &self.means;
        match Calls::take_over(run, log, record, None) {
            Ok(mut left) => {
                left.thaw(None);
                self.record.owed = left.record.owed;
                self.children = left.children;
                self.inherited = self.record.owed.len();
                self.has_said = true;
            }
            Err(error) => log.error(words(&error)),
        }
    }

    /// Calls all of them with `freeze`, until one fails that is required.
    fn freeze(&mut self, hooks: Vec<Found>, progress: &Progress) -> Result<(), String> {
        for found in hooks {
            let name = found.hook.name();
            progress.begin(&name, Instant::now());
            let is_run = found.fault.is_none();
            let end = match found.fault {
                Some(fault) => End::Bad(format!("it is not run: {fault}")),
                None => self.call_to_freeze(found.hook, found.required),
            };
            progress.end(&name);
            match end {
                End::Good => {}
                End::CutShort => break,
                End::Bad(why) | End::NotRun(why) | End::NotBegun(why) if found.required => {
                    return Err(format!("hook {name}: {why}"));
                }
                End::Bad(why) | End::NotRun(why) | End::NotBegun(why) => {
                    let text = format!("hook {name}, which is optional: {why}");
                    self.means.log.warning(text);
                    if !is_run {
                        self.called.push(Called {
                            name,
                            verb: Verb::Freeze,
                            since: Instant::now(),
                            took: Duration::ZERO,
                            fault: Some(why),
                        });
                    }
                }
            }
        }
        Ok(())
    }

    fn call_to_freeze(&mut self, hook: Hook, required: bool) -> End {
        let since = Instant::now();
        let until = since + self.means.limit;
        let end = match self.spawn(&hook, Verb::Freeze, None, until) {
            Ok(call) => self.freeze_by(&hook, required, call, until),
            Err(_) if self.word.is_some() => End::CutShort,
            Err(error) => End::Bad(format!("it cannot be started: {error}")),
        };
        self.note(&hook, Verb::Freeze, since, &end);
        end
    }

    fn freeze_by(&mut self, hook: &Hook, required: bool, call: Call, until: Instant) -> End {
        self.record.owed.push(Owed {
            hook: hook.clone(),
            process: call.process(),
            thaws_since_s: None,
            lacks: None,
        });
        if let Err(error) = self.means.run.write_hooks(&self.record) {
            self.record.owed.pop();
            call.call_off();
            return End::Bad(words(&error));
        }
        // From here on it is let go, whatever happens, unless it says itself that it is not the hook.
        let running = call.go_on();
        let end = self.watch(&running, until, true);
        let mut child = running.child;
        match end {
            End::NotRun(_) => {
                // It has ended.
                let _ = child.try_wait();
                self.record.owed.pop();
                self.write_record();
                return end;
            }
            End::Good => self.settling.push(Settling {
                hook: hook.name(),
                required,
                group: child.id(),
                at: Instant::now() + SETTLED,
            }),
            _ => {}
        }
        self.children.push(Some(child));
        self.is_owed_once(hook);
        end
    }

    /// The last one on record was called, which may still be owed what an earlier backup owes it: one call serves
    /// for both.
    fn is_owed_once(&mut self, hook: &Hook) {
        let mut inherited = self.record.owed.iter().take(self.inherited);
        if let Some(at) = inherited.position(|it| it.hook == *hook) {
            self.record.owed.remove(at);
            self.children.remove(at);
            self.inherited -= 1;
        }
    }

    /// What is on record is on disk, or the log says why not.
    fn write_record(&self) {
        let run = &self.means.run;
        let done = match self.record.owed.is_empty() {
            true => run.remove_hooks(),
            false => run.write_hooks(&self.record),
        };
        if let Err(error) = done {
            self.means.log.warning(words(&error));
        }
    }

    /// Until the word to let go comes, which may have come already. Returns how the backup went.
    fn wait(&mut self) -> Option<Verdict> {
        loop {
            if let Some(verdict) = self.word {
                return verdict;
            }
            self.look(None, None);
        }
    }

    /// Lets all go that can be, and tells of it.
    fn release(&mut self, verdict: Option<Verdict>) -> HookOutcome {
        let called = self.thaw(verdict);
        let owed = self.record.owed.iter().filter_map(Owed::in_words);
        HookOutcome::Released {
            called,
            owed: owed.collect(),
            left: left_in(&self.means.run),
        }
    }

    /// Lets all go, the last one first. What could not even be run stays on record.
    fn thaw(&mut self, verdict: Option<Verdict>) -> Vec<Called> {
        self.settling.clear();
        self.sessions.all().clear();
        self.say_output();
        self.asks = Some(Instant::now());
        let mut gap = None;
        for at in (0..self.record.owed.len()).rev() {
            let Some(hook) = self.record.owed.get(at).map(|it| it.hook.clone()) else {
                continue;
            };
            let is_inherited = at < self.inherited;
            let done = match is_inherited {
                true => self.thaw_inherited(&hook, at),
                false => self.thaw_own(&hook, at, verdict, &mut gap),
            };
            let is_over = match done {
                Ok(()) => true,
                Err(why) => self.is_given_up(at, why),
            };
            if is_over {
                self.record.owed.remove(at);
                self.children.remove(at);
                self.inherited -= usize::from(is_inherited);
            }
            self.write_record();
        }
        self.say_output();
        self.leave_outputs();
        self.asks = None;
        std::mem::take(&mut self.called)
    }

    /// One of an earlier backup, which was fit when it was called first: that may be long ago.
    fn thaw_inherited(&mut self, hook: &Hook, at: usize) -> Result<(), String> {
        self.outlast(hook, at);
        let since = Instant::now();
        let fault = match hook.look_up() {
            Ok(None) => return self.thaw_one(hook, at, None),
            Ok(Some(fault)) => format!("it is not run: {fault}"),
            Err(error) => error.to_string(),
        };
        self.called.push(Called {
            name: hook.name(),
            verb: hook.release(None),
            since,
            took: since.elapsed(),
            fault: Some(fault.clone()),
        });
        Err(fault)
    }

    /// Leaves the call with `thaw` its time that a dead process has begun. How it ended only a parent is told, and where
    /// that had what it writes to, its next line may be its end: it is called again, whatever came of it.
    fn outlast(&mut self, hook: &Hook, at: usize) {
        let owed = self.record.owed.get(at);
        let call = owed.and_then(|it| it.process.zip(it.thaws_since_s));
        let Some(((pid, start), since_s)) = call else {
            return;
        };
        let Ok(pidfd) = sys::pidfd_open(pid) else {
            return;
        };
        // It is asked once that cannot be another process any more.
        if process::start_of(pid) != Some(start) {
            return;
        }
        let log = &self.means.log;
        let (name, word) = (hook.name(), hook.release(None).as_str());
        log.info(format!(
            "hook {name}, {word}: a daemon that has died has called it, and it still runs: waiting for it"
        ));
        let took = Duration::from_secs(boot_time().as_secs().saturating_sub(since_s));
        let until = Instant::now() + self.means.limit.saturating_sub(took);
        while !self.look(Some(&pidfd), Some(until)) {
            if Instant::now() >= until {
                let why = too_long(self.means.limit);
                self.means
                    .log
                    .warning(format!("hook {name}, {word}: {why}"));
                kill_and_wait(pid);
                return;
            }
        }
    }

    /// One of this backup: what cannot be run is tried again until `gap`, which begins with the first of them.
    fn thaw_own(
        &mut self,
        hook: &Hook,
        at: usize,
        verdict: Option<Verdict>,
        gap: &mut Option<Instant>,
    ) -> Result<(), String> {
        loop {
            let since = Instant::now();
            let done = self.thaw_one(hook, at, verdict);
            if done.is_ok() {
                return done;
            }
            let until = *gap.get_or_insert(since + GAP.min(self.means.limit));
            if Instant::now() >= until {
                return done;
            }
            // What is told of the backup is how it went at last.
            self.called.pop();
            let next = until.min(Instant::now() + AGAIN);
            while Instant::now() < next {
                self.look(None, Some(next));
            }
        }
    }

    /// Says that the one at `at` is not let go. Whether it is given up on.
    fn is_given_up(&mut self, at: usize, why: String) -> bool {
        let log = &self.means.log;
        let Some(owed) = self.record.owed.get_mut(at) else {
            return true;
        };
        let now_s = boot_time().as_secs();
        let since_s = owed.lacks.as_ref().map_or(now_s, |it| it.since_s);
        let is_said = owed.lacks.as_ref().is_some_and(|it| it.why == why) && self.has_said;
        let lacks = owed.lacks.insert(Lack { since_s, why });
        if lacks.is_over(now_s) {
            let (name, why) = (owed.hook.name(), &lacks.why);
            log.error(format!(
                "hook {name} is given up on, which could not be let go for a day: {why}"
            ));
            return true;
        }
        if let Some(text) = owed.in_words().filter(|_| !is_said) {
            log.error(format!("{text}; it is tried again"));
        }
        false
    }

    /// Calls the one at `at` with `thaw`; an error says why it has not been run.
    fn thaw_one(&mut self, hook: &Hook, at: usize, verdict: Option<Verdict>) -> Result<(), String> {
        let verb = hook.release(verdict);
        let since = Instant::now();
        let (end, child) = match self.spawn_in_time(hook, verb, verdict) {
            Ok(call) => {
                if let Some(owed) = self.record.owed.get_mut(at) {
                    owed.process = call.process();
                    owed.thaws_since_s = Some(boot_time().as_secs());
                }
                // It is let go also where that cannot be written: at worst twice, should we die.
                if let Err(error) = self.means.run.write_hooks(&self.record) {
                    self.means.log.warning(words(&error));
                }
                let running = call.go_on();
                let until = Instant::now() + self.means.limit;
                (self.watch(&running, until, false), Some(running.child))
            }
            Err(error) => (End::NotRun(format!("it cannot be started: {error}")), None),
        };
        self.note(hook, verb, since, &end);
        self.say_output();
        let first = self.children.get_mut(at).and_then(Option::take);
        if let Some(why) = end.fault() {
            if let End::Bad(_) = end {
                let (log, name) = (&self.means.log, hook.name());
                log.error(format!("hook {name}, {}: {why}", verb.as_str()));
            }
            // A session that it keeps ends with it, but not what this very call has started: that may be the
            // application. When its time was over that is killed already.
            if let Some(first) = &first {
                kill(first.id());
            }
        }
        for mut child in [first, child].into_iter().flatten() {
            // One that cannot be killed is left behind.
            let _ = child.try_wait();
        }
        match end {
            End::NotRun(why) | End::NotBegun(why) => Err(why),
            End::Good | End::Bad(_) | End::CutShort => Ok(()),
        }
    }

    /// What stands against a call may be over in a moment, as a lack of memory.
    fn spawn_in_time(
        &mut self,
        hook: &Hook,
        verb: Verb,
        verdict: Option<Verdict>,
    ) -> io::Result<Call> {
        let until = Instant::now() + self.means.limit;
        loop {
            let call = self.spawn(hook, verb, Some(verdict), until);
            let now = Instant::now();
            if call.is_ok() || now >= until {
                return call;
            }
            self.look(None, Some(until.min(now + AGAIN)));
        }
    }

    fn note(&mut self, hook: &Hook, verb: Verb, since: Instant, end: &End) {
        let (name, took) = (hook.name(), since.elapsed());
        let fault = end.fault().map(str::to_owned);
        let how = fault.as_deref().unwrap_or("ended well");
        let (word, seconds) = (verb.as_str(), took.as_secs_f64());
        let text = format!("hook {name}, {word}: {how} after {seconds:.3} s");
        self.means.log.info(text);
        self.called.push(Called {
            name,
            verb,
            since,
            took,
            fault,
        });
    }

    fn spawn(
        &mut self,
        hook: &Hook,
        verb: Verb,
        verdict: Option<Option<Verdict>>,
        until: Instant,
    ) -> io::Result<Call> {
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
        let (word, waits) = UnixStream::pair()?;
        word.set_nonblocking(true)?;
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let Context(variables) = &self.means.context;
        let mut command = children::becoming(&hook.path);
        command
            .arg(verb.as_str())
            .env_clear()
            .env("PATH", PATH)
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .env("HV_VSS_LIMIT", self.means.limit.as_secs().to_string())
            .process_group(0);
        for name in ["LANG", "TZ"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        if let Some(verdict) = verdict {
            command.env("HV_VSS_OUTCOME", OsStr::new(word_for(verdict)));
        }
        let fds = [waits.as_fd(), theirs.as_fd(), theirs.as_fd()];
        let starting = children::start("hook", command, &fds)?;
        let mut child = self.started(&starting, until, verb == Verb::Freeze)?;
        drop((waits, theirs));
        let pidfd = match sys::pidfd_open(child.id()) {
            Ok(pidfd) => pidfd,
            Err(error) => {
                kill(child.id());
                child.wait()?;
                return Err(error);
            }
        };
        self.outputs.push(Output {
            who: format!("hook {}, {}", hook.name(), verb.as_str()),
            pipe: Some(ours.into()),
            kept: Vec::with_capacity(MOST_OUTPUT),
            lost: 0,
        });
        Ok(Call { child, pidfd, word })
    }

    /// Waits for the start of a call, until then; `may_end` when the word to let go ends that.
    fn started(&mut self, starting: &Starting, until: Instant, may_end: bool) -> io::Result<Child> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if let Some(started) = starting.within(left.min(TICK)) {
                return started;
            }
            self.look(None, Some(Instant::now()));
            if left.is_zero() || may_end && self.word.is_some() {
                return starting.in_time(Duration::ZERO);
            }
        }
    }

    /// Waits for the end of a call, until then; `may_end` when the word to let go ends it.
    fn watch(&mut self, running: &Running, mut until: Instant, may_end: bool) -> End {
        let Running { child, pidfd, .. } = running;
        let limit = self.means.limit;
        let mut killed: Option<End> = None;
        loop {
            if self.look(Some(pidfd), Some(until)) {
                let ended = || match running.has_begun() {
                    Ok(()) => how_it_ended(child.id()),
                    Err(why) => End::NotRun(why),
                };
                return killed.unwrap_or_else(ended);
            }
            if may_end && self.word.is_some() && killed.is_none() {
                killed = Some(End::CutShort);
            } else if Instant::now() < until {
                continue;
            } else if let Some(end) = killed {
                let pid = child.id();
                let text = format!("process {pid} of a hook was killed and does not end");
                self.means.log.error(text);
                return end;
            } else {
                let text = too_long(limit);
                killed = Some(match running.has_begun() {
                    Ok(()) => End::Bad(text),
                    Err(_) => End::NotBegun(text),
                });
            }
            kill(child.id());
            until = Instant::now() + GRACE;
        }
    }

    /// Waits until something happens: to this process, to a pipe, the word to let go; and deals with
    /// all but the first. Returns whether the process has ended.
    fn look(&mut self, process: Option<&OwnedFd>, until: Option<Instant>) -> bool {
        self.see_what_stays();
        self.ask_for_time();
        let settled = self.settling.first().map(|it| it.at);
        let until = until.into_iter().chain(settled).chain(self.asks).min();
        let left = until.map(|it| it.saturating_duration_since(Instant::now()));
        let timeout = match left {
            // Rounded up: it is not looked at over and over in the last millisecond.
            Some(left) => PollTimeout::try_from(left + Duration::from_millis(1)),
            None => Ok(PollTimeout::NONE),
        };
        let waits_for_word = self.words.as_ref().filter(|_| self.word.is_none());
        let pipes = self.outputs.iter().filter_map(|it| it.pipe.as_ref());
        let all = process.map(|it| it.as_fd()).into_iter();
        let all = all.chain(waits_for_word.map(|it| it.as_fd()));
        let all = all.chain(pipes.map(|it| it.as_fd()));
        let mut fds: Vec<PollFd> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let happened = poll(&mut fds, timeout.unwrap_or(PollTimeout::MAX));
        let is_set = |fd: Option<&PollFd>| fd.and_then(PollFd::any).unwrap_or(false);
        let mut fds = fds.iter();
        let has_ended = process.is_some() && is_set(fds.next());
        let has_word = waits_for_word.is_some() && is_set(fds.next());
        if matches!(happened, Ok(0) | Err(Errno::EINTR)) {
            return false;
        }
        if has_word {
            self.hear();
        }
        for output in &mut self.outputs {
            output.drain();
        }
        has_ended
    }

    /// Has whoever may have asked this process to stop wait for it, if it is time for that.
    fn ask_for_time(&mut self) {
        let now = Instant::now();
        if self.asks.is_none_or(|it| it > now) {
            return;
        }
        self.asks = Some(now + ASKS);
        let micros = u32::try_from(TIME.as_micros()).unwrap_or(u32::MAX);
        // Without a service manager it does nothing; one that cannot be told is told again.
        let _ = sd_notify::notify(&[NotifyState::ExtendTimeoutUsec(micros)]);
    }

    /// Takes down what those calls have left running that have settled by now.
    fn see_what_stays(&mut self) {
        let now = Instant::now();
        while self.settling.first().is_some_and(|it| it.at <= now) {
            let call = self.settling.remove(0);
            if let Some(process) = process::member_of(call.group) {
                self.sessions.all().push(Session {
                    hook: call.hook,
                    required: call.required,
                    group: call.group,
                    process,
                });
            }
        }
    }

    fn hear(&mut self) {
        let mut byte = [0];
        let read = self.words.as_mut().map(|it| it.read(&mut byte));
        let all = [Verdict::Good, Verdict::Broken, Verdict::Failed];
        let verdict = all.into_iter().find(|it| *it as u8 == byte[0]);
        // The loss of whoever could say it means the same as the word.
        self.word = Some(verdict.filter(|_| matches!(read, Some(Ok(1)))));
    }

    /// Logs what has been written so far. Nothing is frozen.
    fn say_output(&mut self) {
        for output in &mut self.outputs {
            output.drain();
            let kept = std::mem::take(&mut output.kept);
            let who = &output.who;
            for line in String::from_utf8_lossy(&kept).lines() {
                let line: String = line.chars().filter(|c| !c.is_control()).collect();
                self.means.log.info(format!("{who}: {line}"));
            }
            match std::mem::take(&mut output.lost) {
                0 => {}
                lost => {
                    let text = format!("{who}: {lost} further bytes were not kept");
                    self.means.log.info(text);
                }
            }
        }
        self.outputs.retain(|it| it.pipe.is_some());
    }

    /// Sees to it that what hooks have left running can go on writing when nobody calls any more.
    fn leave_outputs(&mut self) {
        for Output { who, pipe, .. } in std::mem::take(&mut self.outputs) {
            let Some(pipe) = pipe else { continue };
            match Leftover::put(pipe) {
                Ok(()) => self.means.log.info(format!(
                    "{who}: what it has left running can still write, which is not logged any more"
                )),
                Err(error) => self.means.log.error(format!(
                    "{who}: what it has left running cannot write any more, nobody can read it: {error}"
                )),
            }
        }
    }
}

/// What is said of one whose time is over.
fn too_long(limit: Duration) -> String {
    let seconds = limit.as_secs_f64();
    format!("killed, it took longer than {seconds} s (hooks.limit)")
}

/// Kills a whole process group, whose first process has not been reaped.
fn kill(group: u32) {
    if let Ok(group) = i32::try_from(group) {
        // It fails when all of it has ended.
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
}

/// The same for one that is somebody else's child.
fn kill_and_wait(group: u32) {
    let Ok(pidfd) = sys::pidfd_open(group) else {
        return;
    };
    kill(group);
    let until = Instant::now() + GRACE;
    let mut left = GRACE;
    while !left.is_zero() {
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        if !matches!(poll(&mut fds, timeout), Err(Errno::EINTR)) {
            return;
        }
        left = until.saturating_duration_since(Instant::now());
    }
}

/// How a child ended, which is not reaped by that.
fn how_it_ended(pid: u32) -> End {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
    let pid = Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX));
    match waitid(Id::Pid(pid), flags) {
        Ok(WaitStatus::Exited(_, 0)) => End::Good,
        Ok(WaitStatus::Exited(_, code)) => End::Bad(format!("it failed with exit status {code}")),
        Ok(WaitStatus::Signaled(_, signal, _)) => End::Bad(format!("it was killed by {signal}")),
        other => End::Bad(format!("its end is not known: {other:?}")),
    }
}

#[cfg(test)]
mod tests;
