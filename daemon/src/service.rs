// SPDX-License-Identifier: GPL-2.0-only

//! The event loop. It carries: requests from the device, signals, outcomes of the job, words of the
//! guard and calls of the control socket to the [`Backup`] that decides, and what that decides to where
//! it is done.
//!
//! It never blocks on a file system: that is the [`Job`]'s part. It knows neither the layout of frames
//! nor how a freeze is done.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use hv_vss_uapi::{op, thawed};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token, Waker};
use sd_notify::NotifyState;
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook_mio::v1_0::Signals;

use crate::backup::{name_of, Backup, Break, Effects, NoRehearsal, Rehearsal, Verdict};
use crate::calls::{self, Called, Calling, Context, HookOutcome, Left, Means};
use crate::check;
use crate::config::{Config, ConfigError};
use crate::control::{self, reply_of, Client, Control, InForce, Method, Status, NO_BACKUP};
use crate::device::{Abi, Device, DeviceError, Incoming, Request};
use crate::disks;
use crate::door::Door;
use crate::fifreeze::Fifreeze;
use crate::guard::{Event, Guard, GuardError};
use crate::held::{self, Held};
use crate::history::{Draft, Entry, History, HistoryError, Unfinished};
use crate::hooks::Found;
use crate::job::{About, Job, Outcome, Setting, Worker, LOOK};
use crate::logbook::{words, Level, Logbook};
use crate::process;
use crate::progress::Stage;
use crate::record::{Ends, RecordError, RunDir};
use crate::recovery::{self, Recovery};
use crate::sys;
use crate::waiting::Waiting;

const DEVICE: Token = Token(0);
const SIGNALS: Token = Token(1);
const JOB: Token = Token(2);
const GUARD: Token = Token(3);
const LOCKS: Token = Token(4);
/// And all above.
const CONTROL: Token = Token(5);

/// First and longest pause between attempts to open a device that went away.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// How long a plan that was looked over need not be so again.
const PREPARED: Duration = Duration::from_secs(1);
/// How long a start waits for the log.
const FIRST_LINES: Duration = Duration::from_millis(500);
/// How long a stop waits for the last entry of the history. The next start adds what it does not see there.
const LAST_ENTRY: Duration = Duration::from_secs(5);
/// How often it is looked whether a guard that was killed is out of the kernel.
const GRAVE: Duration = Duration::from_secs(1);
/// How long after it was tried last what could not be let go is tried again.
const OWED: Duration = Duration::from_secs(30);
/// First and longest pause before it is looked again whether somebody's lock is let go.
const AGAIN: (Duration, Duration) = (Duration::from_millis(10), OWED);
const CHECK_STACK_BYTES: usize = 64 * 1024;
/// How often the log says so while nothing is frozen.
const REPORT: Duration = Duration::from_secs(10);
/// Why there is no freeze.
const NOT_UNDONE: &str = "the freeze of another process is not undone";
const NO_GUARD: &str = "there is no guard process";
const NO_DEVICE: &str = "its device is gone; it is opened again when it comes";

/// Why the service cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Without a guard nothing could ever be frozen.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The directory for lock and record cannot be used.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The event loop itself failed.
    #[error("the event loop fails to {doing}")]
    Loop {
        /// What it was about to do.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

fn failed(doing: &'static str) -> impl FnOnce(io::Error) -> ServiceError {
    move |source| ServiceError::Loop { doing, source }
}

/// Opens the device at `path`. One that is busy is waited for, where that will be over: when a dead
/// daemon keeps it that is still inside the kernel, and for as long as it takes if a service manager has
/// started us. What can be thawed of what a dead one has frozen is thawed meanwhile, its hooks are let go, and
/// whoever asks hears that it waits. Who asks for the configuration to be read again sets `to_reload`.
pub fn open_device(
    path: &Path,
    run: &RunDir,
    log: &Logbook,
    to_reload: &AtomicBool,
) -> Result<Device, DeviceError> {
    let managed = std::env::var_os("NOTIFY_SOCKET").is_some();
    let mut said = false;
    let mut left: Option<Calling> = None;
    let mut waiting: Option<Waiting> = None;
    let pause = |waiting: &mut Option<Waiting>| {
        match waiting.as_mut().map(|it| it.reply_for(recovery::PAUSE)) {
            Some(Ok(asked)) => {
                to_reload.fetch_or(asked, Ordering::SeqCst);
            }
            Some(Err(error)) => {
                log.warning(format!("nobody can ask what it waits for: {error}"));
                *waiting = None;
            }
            None => thread::sleep(recovery::PAUSE),
        }
        notify(log, &[NotifyState::Watchdog]);
    };
    loop {
        if left.take_if(|it| it.is_over()).is_some() {
            log.info("the hooks that a dead daemon has left are let go");
        }
        if left.is_some() {
            // A request that came meanwhile could not be served.
            pause(&mut waiting);
            continue;
        }
        let dead = match Device::open(path) {
            // Beside another that serves it does not matter who has died.
            Err(error) if error.is_busy() => {
                let other = control::who_serves(run)
                    .ok()
                    .filter(|it| *it != std::process::id());
                match other.is_none() && recovery::owner_lingers(run) {
                    // One that has died may have come out just now.
                    false if !managed => return Device::open(path),
                    dead => dead,
                }
            }
            other => return other,
        };
        if !said {
            let who = match dead {
                true => "a dead daemon is still inside the kernel and keeps the device",
                false => "another program serves the device",
            };
            log.warning(format!("{who}: waiting for it"));
            notify(log, &[NotifyState::Ready, NotifyState::Status(who)]);
            said = true;
            if dead {
                if let Err(error) = recovery::thaw(run, log, recovery::By::Start) {
                    log.error(words(&error));
                }
                // Applications must not wait for what hangs in the kernel.
                left = let_go_what_is_left(run, log, drop);
            }
            waiting = answer_meanwhile(run, log, who);
        }
        pause(&mut waiting);
    }
}

/// Who is asked while the device is waited for, which `who` has. Without that it is waited for all the same.
fn answer_meanwhile(run: &RunDir, log: &Logbook, who: &str) -> Option<Waiting> {
    let doing = format!("{who}: waiting for it");
    let listening = run
        .check()
        .map_err(|error| words(&error))
        .and_then(|()| Waiting::listen(run, doing).map_err(|error| error.to_string()));
    listening.unwrap_or_else(|error| {
        log.warning(format!("nobody can ask what it waits for: {error}"));
        None
    })
}

/// Without that what a dead process has left is undone with the next backup.
fn watch_ends(run: &RunDir, registry: &Registry, log: &Logbook) -> Option<Ends> {
    let watched = run.ends().map_err(|error| words(&error)).and_then(|ends| {
        let registered =
            registry.register(&mut SourceFd(&ends.as_raw_fd()), LOCKS, Interest::READABLE);
        registered.map(|()| ends).map_err(|error| error.to_string())
    });
    watched
        .inspect_err(|error| log.warning(format!("the death of a rehearsal is not seen: {error}")))
        .ok()
}

/// Lets go what a dead daemon or rehearsal has called, if it has left any hooks, or what we could not let go.
fn let_go_what_is_left(
    run: &RunDir,
    log: &Logbook,
    tell: impl Fn(HookOutcome) + Send + 'static,
) -> Option<Calling> {
    let own = std::process::id();
    let is_ours = matches!(calls::left_in(run), Ok(Some(it)) if it.pid == own);
    let left = Calling::recover(run, log, tell).unwrap_or_else(|error| {
        log.error(format!("hooks that a dead process has called: {error}"));
        None
    });
    if left.is_some() && !is_ours {
        log.warning("a dead process has left hooks that are now let go");
    }
    left
}

/// Tells the service manager, if there is one.
fn notify(log: &Logbook, states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log.warning(format!("the service manager cannot be told: {error}"));
    }
}

/// What comes from the threads that do what takes time.
enum News {
    Job(Outcome),
    Hooks(HookOutcome),
    /// What a dead process had frozen is thawed, as far as can be.
    Undone,
    /// For whoever has asked for it.
    Config(Option<Client>, Box<Result<Config, ConfigError>>),
    Reply((Client, Result<Vec<u8>, String>)),
}

/// The running daemon.
pub struct Service {
    poll: Poll,
    signals: Signals,
    outcomes: Receiver<News>,
    machine: Backup,
    hands: Hands,
    control: Control,
    /// Tells of the end of whoever has a record in the run directory, if anything does.
    ends: Option<Ends>,
    /// When to look whether somebody has died there, unless that was looked at since.
    look: Option<Instant>,
    /// How long after that to look again should the lock still be there.
    pause: Duration,
    /// Guards that have been killed and may still be inside the kernel.
    buried: Vec<Arc<Guard>>,
    /// Those who wait to hear that all is thawed.
    waiting: Vec<Client>,
    /// The configuration that is in force once no backup is under way.
    next_config: Option<Config>,
    stopping: bool,
    /// How often the service manager wants to hear from us, and when next.
    watchdog: Option<(Duration, Instant)>,
}

/// What does what the machine decides.
struct Hands {
    path: PathBuf,
    run: RunDir,
    config: Arc<Config>,
    /// From where it is read again.
    config_path: Option<PathBuf>,
    log: Logbook,
    device: Option<Device>,
    guard: Option<Arc<Guard>>,
    worker: Worker,
    /// When the plan for the next backup was last looked over.
    prepared: Instant,
    /// When to try next to open a device that went away, and the pause after that.
    retry: Option<(Instant, Duration)>,
    job: Option<Job>,
    /// What is frozen, by name.
    held: Vec<String>,
    /// From the first call of a hook to the last.
    calling: Option<Calling>,
    /// All calls of hooks of a backup under way that have been let go already, beside what hangs.
    called: Vec<Called>,
    /// What is not let go yet, and why, and when that is tried next.
    owed: (Vec<String>, Option<Instant>),
    /// What was left when that was tried last. To try is to have the lock, the end of which is told as that of any.
    in_vain: Left,
    /// When the log says next what the freeze is at.
    report: Instant,
    recovery: Recovery,
    tell: (Sender<News>, Arc<Waker>),
    backups: u64,
    /// What is to be remembered of the one under way.
    draft: Option<Draft>,
    /// Who has asked for the one under way, if it is a rehearsal: of that nothing is remembered.
    rehearses: Option<Client>,
    /// What came of one, for whoever has asked for it.
    rehearsed: Option<(Client, Entry)>,
    /// What is going on, as it was last shown.
    doing: String,
    /// What is to be remembered of the one under way, for a later daemon.
    unfinished: Unfinished,
    /// Whether an earlier one may have left that.
    left: bool,
    /// There as long as a check is under way.
    checking: Weak<()>,
    /// Closes when the last entry of the history is written.
    written: Option<Receiver<()>>,
    /// How the last backup went.
    last: String,
    /// What the history is to have of it, if it lets itself be written.
    last_entry: Option<Entry>,
}

impl Service {
    /// Serves `device`, which was opened from `path` and is opened from there again should it go
    /// away, by `config`, which was read from `config_path`. What an earlier daemon left frozen, as `run` has it, is
    /// thawed first.
    pub fn new(
        device: Device,
        path: &Path,
        run: RunDir,
        config: Config,
        config_path: Option<PathBuf>,
        log: Logbook,
    ) -> Result<Self, ServiceError> {
        run.check()?;
        let poll = Poll::new().map_err(failed("open"))?;
        let registry = poll.registry();
        let all = [SIGTERM, SIGINT, SIGQUIT, SIGHUP];
        let mut signals = Signals::new(all).map_err(failed("catch signals"))?;
        registry
            .register(&mut signals, SIGNALS, Interest::READABLE)
            .map_err(failed("watch signals"))?;
        let waker = Waker::new(registry, JOB).map_err(failed("make a waker"))?;
        let ends = watch_ends(&run, registry, &log);
        let control = Control::listen(&run, registry, CONTROL).map_err(failed("be asked"))?;
        let mut recovery = Recovery::start(&run, &log);
        let mut unfinished = Unfinished::new(&run);
        // The module remembers it, too, but not when it was unloaded meanwhile.
        let broken = recovery.broken.take().or_else(|| unfinished.broken());
        let (sender, outcomes) = channel();
        let tell = (sender, Arc::new(waker));
        let calling = let_go_what_is_left(&run, &log, teller(&tell, News::Hooks));
        let mut service = Service {
            signals,
            outcomes,
            machine: Backup::new(config.deadline, broken, calling.is_some()),
            hands: Hands {
                path: path.to_owned(),
                run: run.clone(),
                config: Arc::new(config),
                config_path,
                log,
                device: None,
                guard: None,
                worker: Worker::start().map_err(failed("start a thread"))?,
                prepared: Instant::now(),
                retry: None,
                job: None,
                calling,
                called: Vec::new(),
                owed: (Vec::new(), None),
                in_vain: Ok(None),
                report: Instant::now(),
                recovery,
                tell,
                backups: 0,
                draft: None,
                rehearses: None,
                rehearsed: None,
                unfinished,
                left: true,
                checking: Weak::new(),
                written: None,
                held: Vec::new(),
                doing: String::new(),
                last: NO_BACKUP.into(),
                last_entry: None,
            },
            control,
            ends,
            // Who ended before ends were watched for may have let go its lock since that was looked at.
            look: Some(Instant::now()),
            pause: AGAIN.0,
            buried: Vec::new(),
            waiting: Vec::new(),
            next_config: None,
            stopping: false,
            watchdog: sd_notify::watchdog_enabled().map(|limit| (limit / 2, Instant::now())),
            poll,
        };
        service.hands.remember_what_is_left();
        service.adopt(device)?;
        service.hands.warn();
        service.hands.look_over();
        // What it is at is in the log when it first answers.
        service.hands.log.drain(FIRST_LINES);
        Ok(service)
    }

    /// Serves until a signal says stop.
    pub fn run(mut self) -> Result<(), ServiceError> {
        // The host waits for each answer, and others for what is frozen. What takes long is done by other threads.
        let _ = process::go_second();
        notify(&self.hands.log, &[NotifyState::Ready]);
        self.hands.show("idle");
        let mut events = Events::with_capacity(8);
        loop {
            match self.poll.poll(&mut events, self.timeout()) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => other.map_err(failed("wait"))?,
            }
            let woken = |token| events.iter().any(|event| event.token() == token);
            // What has happened to the freeze comes before what is asked next about it.
            while let Ok(news) = self.outcomes.try_recv() {
                match news {
                    News::Job(outcome) => self.on_outcome(outcome),
                    News::Hooks(outcome) => self.on_hooks(outcome),
                    News::Undone if self.machine.is_at_rest() => self.let_go_what_is_left(),
                    News::Undone => self.look_at_once(),
                    News::Config(client, loaded) => self.on_config(client, *loaded),
                    News::Reply((client, reply)) => self.control.reply_with(client, reply),
                }
            }
            if woken(SIGNALS) {
                for signal in self.signals.pending().collect::<Vec<_>>() {
                    match signal {
                        SIGHUP => {
                            // Why not, it has said.
                            let _ = self.hands.reload(None);
                        }
                        _ => self.stop(),
                    }
                }
            }
            if woken(GUARD) {
                self.on_guard();
            }
            if woken(LOCKS) && self.ends.as_ref().is_some_and(Ends::any) {
                self.look_at_once();
            }
            // And what the host asks before what is due as long as it has not asked, should this have been stopped.
            if woken(DEVICE) {
                self.on_device();
            }
            self.on_time();
            for event in events.iter().filter(|event| event.token() >= CONTROL) {
                self.control.ready(self.poll.registry(), event.token());
            }
            self.see_to_rehearsal();
            if self.machine.is_idle() {
                self.rest();
            }
            // A reply makes room for the next call.
            while let Some((client, method)) = self.control.next_call() {
                self.on_call(client, method);
            }
            if self.machine.is_over() {
                if let Some(written) = self.hands.written.take() {
                    // Nothing is ever said there; it closes.
                    let _ = written.recv_timeout(LAST_ENTRY);
                }
                self.hands.log.info("stopped, nothing is frozen");
                return Ok(());
            }
        }
    }

    /// Ends a rehearsal that nobody waits for, and says what came of one that has ended.
    fn see_to_rehearsal(&mut self) {
        let has_gone = |it: Client| !self.control.is_there(it);
        if self.hands.rehearses.is_some_and(has_gone) {
            self.machine
                .nobody_rehearses(Instant::now(), &mut self.hands);
        }
        if let Some((client, entry)) = self.hands.rehearsed.take() {
            let reply = reply_of(&BTreeMap::from([("rehearsal", entry)]));
            let reply = reply.map_err(|error| error.to_string());
            self.control.reply_with(client, reply);
        }
    }

    /// What is done, and may only be done, while nothing is frozen.
    fn rest(&mut self) {
        self.buried.retain(|it| !it.is_gone());
        let is_overdue = |it: &Arc<Guard>| it.unfit_at().is_some_and(|at| at <= Instant::now());
        if self.hands.guard.as_ref().is_some_and(is_overdue) {
            self.dismiss_unfit_guard();
        }
        for client in std::mem::take(&mut self.waiting) {
            self.control.reply(client, json!({ "thawed": true }));
        }
        self.see_to_guard();
        if let Some(config) = self.next_config.take() {
            self.adopt_config(config);
        }
        let now = Instant::now();
        // Taken before it is acted upon: whatever that does, it is not due any more.
        if self.machine.is_at_rest() && self.look.take_if(|at| *at <= now).is_some() {
            self.undo_what_is_left();
        }
        if self.machine.is_at_rest() && self.hands.owes_by_now() {
            self.let_go_what_is_left();
        }
    }

    /// Has undone what somebody has left who has died beside this: a rehearsal.
    fn undo_what_is_left(&mut self) {
        let Hands {
            run, log, worker, ..
        } = &self.hands;
        if !matches!(run.read(), Ok(Some(_))) {
            self.let_go_what_is_left();
        } else if run.is_free() {
            let tell = teller(&self.hands.tell, |()| News::Undone);
            worker.undo(run, log, move || tell(()));
        } else {
            self.look_again();
        }
    }

    /// Whoever has the lock lives, or its guard is at the thaw, and the end of that is told as well; or it has just ended,
    /// and what was told came before the lock was let go.
    fn look_again(&mut self) {
        self.look = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(AGAIN.1);
    }

    /// Somebody may have died there just now.
    fn look_at_once(&mut self) {
        (self.look, self.pause) = (Some(Instant::now()), AGAIN.0);
    }

    /// Lets go its hooks, if nobody else does, and what we could not let go ourselves.
    fn let_go_what_is_left(&mut self) {
        let Hands { run, log, tell, .. } = &self.hands;
        let left = calls::left_in(run);
        if left == Ok(None) {
            return self.hands.owe(Vec::new());
        }
        if left == self.hands.in_vain && !self.hands.owes_by_now() {
            return;
        }
        if !run.is_free_of_hooks() {
            self.hands.owed.1 = self.hands.owed.1.map(|_| Instant::now() + OWED);
            return self.look_again();
        }
        self.hands.calling = let_go_what_is_left(run, log, teller(tell, News::Hooks));
        match self.hands.calling {
            Some(_) => self.machine.releases(),
            // What cannot be read now may be then.
            None => {
                self.hands.in_vain = left;
                self.hands.owed.1 = Some(Instant::now() + OWED);
            }
        }
    }

    /// Has a guard ready where one is wanted.
    fn see_to_guard(&mut self) {
        // Holding through the module takes no guard.
        let holds = self
            .hands
            .device
            .as_ref()
            .is_none_or(|it| it.hold().is_some());
        if self.hands.guard.is_none() && !holds && !self.stopping {
            match self.start_guard() {
                Ok(()) => self.hands.log.info("the guard is replaced"),
                Err(error) => self.hands.log.error(words(&error)),
            }
        }
    }

    /// When it is tried next to open a device that went away, and the pause after that: while something may be frozen
    /// nothing is looked up, and who stops serves nobody.
    fn retry(&self) -> Option<(Instant, Duration)> {
        let may = self.machine.is_idle() && !self.stopping;
        self.hands.retry.filter(|_| may)
    }

    fn timeout(&self) -> Option<Duration> {
        let idle = self.machine.is_idle();
        let retry = self.retry().map(|(at, _)| at);
        let watchdog = self.watchdog.map(|(_, at)| at);
        let now = Instant::now();
        let look = self.machine.is_freezing().then(|| now + LOOK);
        let guard = self.hands.guard.as_ref().filter(|_| idle);
        let unfit = guard.and_then(|it| it.unfit_at());
        let grave = (idle && !self.buried.is_empty()).then(|| now + GRAVE);
        let next = self.machine.next().into_iter();
        let next = next.chain(retry).chain(watchdog).chain(look);
        let owed = self.hands.owed.1.filter(|_| self.machine.is_at_rest());
        let again = self.look.filter(|_| self.machine.is_at_rest());
        let next = next.chain(unfit).chain(grave).chain(owed).chain(again);
        let next = next.min()?;
        Some(next.saturating_duration_since(now))
    }

    fn start_guard(&mut self) -> Result<(), ServiceError> {
        let guard = Guard::start(&self.hands.run)?;
        self.poll
            .registry()
            .register(&mut SourceFd(&guard.as_raw_fd()), GUARD, Interest::READABLE)
            .map_err(failed("watch the guard"))?;
        self.hands.guard = Some(Arc::new(guard));
        Ok(())
    }

    fn forget_guard(&mut self) -> Option<Arc<Guard>> {
        let guard = self.hands.guard.take()?;
        let registry = self.poll.registry();
        // It is closed anyway when the last copy of the handle goes.
        let _ = registry.deregister(&mut SourceFd(&guard.as_raw_fd()));
        Some(guard)
    }

    /// Ends a guard that would not mind what it is handed. Only while nothing is.
    fn dismiss_unfit_guard(&mut self) {
        self.on_guard();
        let Some(why) = self.hands.guard.as_ref().and_then(|it| it.is_unfit()) else {
            return;
        };
        self.hands.log.warning(format!("the guard process {why}"));
        if let Some(guard) = self.forget_guard() {
            guard.dismiss();
            self.buried.push(guard);
        }
    }

    /// Before a freeze: it may have been killed or stopped since.
    fn look_at_guard(&mut self) {
        self.dismiss_unfit_guard();
        self.see_to_guard();
    }

    fn on_guard(&mut self) {
        while let Some(event) = self.hands.guard.as_ref().and_then(|it| it.event()) {
            let (why, reason) = match event {
                Event::Overdue => ("the deadline passed", thawed::DEADLINE),
                Event::Died => ("the guard process died", thawed::CRASH),
            };
            if event == Event::Died {
                self.hands.log.error(why);
                let guard = self.forget_guard();
                self.buried.extend(guard);
            }
            self.end_early(why.into(), reason);
        }
    }

    fn end_early(&mut self, why: std::borrow::Cow<'static, str>, reason: u32) {
        let reason = Some(reason);
        let broken = Break { why, reason };
        self.machine
            .end_early(Instant::now(), broken, &mut self.hands);
    }

    fn adopt(&mut self, device: Device) -> Result<(), ServiceError> {
        let held = device.hold().map(|it| it.most);
        if held.is_none() && self.hands.guard.is_none() {
            self.start_guard()?;
        }
        if held.is_some() {
            if let Some(guard) = self.forget_guard() {
                guard.dismiss();
                self.buried.push(guard);
            }
        }
        self.poll
            .registry()
            .register(
                &mut SourceFd(&device.as_raw_fd()),
                DEVICE,
                Interest::READABLE,
            )
            .map_err(failed("watch the device"))?;
        let abi = match device.abi() {
            Abi::V1 => "v1",
            Abi::V2 => "v2",
        };
        let (path, log) = (self.hands.path.display(), &self.hands.log);
        log.info(format!("registered with {path}, ABI {abi}"));
        log.info(match held {
            Some(most) => format!(
                "the module holds what is frozen (up to {most} file systems): nobody else can thaw \
                 it, and it is thawed when this process ends"
            ),
            None => {
                "the module does not hold what is frozen: FIFREEZE, minded by a guard process; \
                     others can thaw it, and then the backup fails"
                    .into()
            }
        });
        self.hands.device = Some(device);
        self.hands.retry = None;
        Ok(())
    }

    fn on_device(&mut self) {
        while let Some(device) = &mut self.hands.device {
            match device.read() {
                Ok(None) => return,
                Ok(Some(Incoming::Request(request))) => {
                    if self.machine.is_idle() && request.operation == op::FREEZE {
                        self.look_at_guard();
                    }
                    self.machine
                        .request(Instant::now(), request, &mut self.hands);
                }
                Ok(Some(Incoming::Thawed(id, reason))) => {
                    let (now, why) = (Instant::now(), (reason, why_thawed(reason)));
                    self.machine.notice(now, id, why, &mut self.hands);
                }
                Ok(Some(Incoming::Odd(what))) => {
                    let text = format!("the kernel sent {what}; ignored");
                    self.hands.log.warning(text);
                }
                Err(error) => self.lose_device(&error),
            }
        }
    }

    /// The module was unbound, or worse: nobody will ever say THAW on this descriptor.
    fn lose_device(&mut self, error: &DeviceError) {
        if let Some(device) = self.hands.device.take() {
            // Closing takes it out of the poll as well.
            let _ = self
                .poll
                .registry()
                .deregister(&mut SourceFd(&device.as_raw_fd()));
        }
        let text = format!("{}; opening it again", words(error));
        self.hands.log.warning(text);
        self.hands.retry = Some((Instant::now(), BACK_OFF.0));
        self.machine.device_lost(Instant::now(), &mut self.hands);
    }

    fn on_time(&mut self) {
        let now = Instant::now();
        self.machine.time(now, &mut self.hands);
        if self.machine.is_freezing() {
            self.look_at_freeze(now);
        }
        if let Some((pause, at)) = self.watchdog.filter(|(_, at)| *at <= now) {
            self.watchdog = Some((pause, at.max(now) + pause));
            notify(&self.hands.log, &[NotifyState::Watchdog]);
        }
        let Some((_, pause)) = self.retry().filter(|(at, _)| *at <= now) else {
            return;
        };
        let opened = Device::open(&self.hands.path).map(|device| self.adopt(device));
        if let Ok(Err(error)) = &opened {
            self.hands.log.error(words(error));
        }
        if !matches!(opened, Ok(Ok(()))) {
            self.hands.retry = Some((now + pause, (pause * 2).min(BACK_OFF.1)));
        }
    }

    /// Gives up on a freeze that takes too long, and says of one that may what it is at.
    fn look_at_freeze(&mut self, now: Instant) {
        // By then whoever freezes is at work, and nothing of that waits for this.
        if self.hands.draft.as_ref().is_some_and(|it| it.age() >= LOOK) {
            self.hands.note();
        }
        let Some(job) = &self.hands.job else { return };
        if let Some(why) = job.stuck(now) {
            self.end_early(why.into(), thawed::DEADLINE);
        } else if now >= self.hands.report && job.progress().stage() != Stage::Freezing {
            let text = job.progress().words(now);
            self.hands.log.info(text);
            self.hands.log.flush();
            self.hands.report = now + REPORT;
        }
    }

    fn stop(&mut self) {
        if !self.stopping {
            self.hands.log.info("asked to stop");
            notify(&self.hands.log, &[NotifyState::Stopping]);
        }
        self.stopping = true;
        self.machine.stop(Instant::now(), &mut self.hands);
    }

    fn on_outcome(&mut self, outcome: Outcome) {
        let now = Instant::now();
        match outcome {
            // One that was called off by then has ended.
            Outcome::Hooks(found, context) if self.machine.is_freezing() => {
                if let Err(error) = self.hands.call(found, context) {
                    let why = format!("hooks cannot be called: {error}");
                    self.machine.quiesced(now, Err(why), &mut self.hands);
                }
            }
            Outcome::Hooks(..) => {}
            Outcome::Frozen(mut result) => {
                if let Ok(begun) = &mut result {
                    self.hands.held = std::mem::take(&mut begun.names);
                }
                // Until its answer a freeze is no better than what it was made ready by.
                let ended = self.hands.sessions_ended("before all was frozen");
                if let Some(why) = ended.filter(|_| result.is_ok()) {
                    self.end_early(why.into(), thawed::CALLED_OFF);
                }
                let result = result.map_err(|error| words(&error));
                self.machine.frozen(now, result, &mut self.hands);
            }
            Outcome::Lost(names) => {
                let why = format!("somebody else thawed {}", names.join(", "));
                self.end_early(why.into(), thawed::FOREIGN);
            }
            Outcome::Thawed(result, account) => {
                if let Some(draft) = &mut self.hands.draft {
                    draft.thawed(account);
                }
                // What is frozen is as it was by then, and that is what the backup has.
                self.hands.sessions_ended("while all was frozen");
                let result = result.map_err(|error| words(&error));
                self.machine.thawed(result, &mut self.hands);
            }
        }
    }

    fn on_hooks(&mut self, outcome: HookOutcome) {
        match outcome {
            HookOutcome::Quiesced(result) => {
                self.machine
                    .quiesced(Instant::now(), result, &mut self.hands);
            }
            HookOutcome::Released { called, owed, left } => {
                self.hands.owe(owed);
                self.hands.in_vain = left;
                if let Some(calling) = self.hands.calling.take() {
                    calling.join();
                }
                self.hands.called = called;
                if self.hands.job.is_none() {
                    self.hands.remember_backup();
                }
                self.machine.released(&mut self.hands);
            }
        }
    }

    /// Goes by another configuration, at once or after the backup under way; or, when it is not one, by the one that
    /// there is.
    fn on_config(&mut self, client: Option<Client>, loaded: Result<Config, ConfigError>) {
        let reply = match loaded {
            Ok(config) if self.machine.is_idle() => {
                self.adopt_config(config);
                json!({ "reloaded": true })
            }
            Ok(config) => {
                self.next_config = Some(config);
                json!({ "reloaded": false, "later": true })
            }
            Err(error) => {
                let error = words(&error);
                let log = &self.hands.log;
                log.error(format!("{error}; the configuration stays as it was"));
                json!({ "reloaded": false, "error": error })
            }
        };
        if let Some(client) = client {
            self.control.reply(client, reply);
        }
    }

    fn adopt_config(&mut self, config: Config) {
        self.next_config = None;
        self.machine.set_deadline(config.deadline);
        let hands = &mut self.hands;
        hands.config = Arc::new(config);
        hands.log.info("the configuration is read again");
        hands.warn();
        hands.look_over();
    }

    /// Why a FREEZE would be refused as things are, if it would.
    fn refuses(&self) -> Option<String> {
        let job = self.hands.job.as_ref();
        let is_stuck = job.is_some_and(|it| it.stuck(Instant::now()).is_some());
        if self.machine.refuses(is_stuck) {
            let inside = self.hands.inside();
            return Some(inside.unwrap_or("the last one was called off and has not ended".into()));
        }
        match self.machine.is_idle() {
            true => self.hands.may_begin().err().map(str::to_owned),
            false => None,
        }
    }

    fn rehearse(&mut self, client: Client, rehearsal: Rehearsal) {
        if self.machine.is_idle() {
            self.look_at_guard();
        }
        if !self.control.is_there(client) {
            return self
                .control
                .reply_with(client, Err("nobody waits for it".into()));
        }
        let now = Instant::now();
        match self.machine.rehearse(now, rehearsal, &mut self.hands) {
            Ok(()) => self.hands.rehearses = Some(client),
            Err(NoRehearsal::Busy(why)) => self.control.say_busy(client, why),
            Err(NoRehearsal::Failed(why)) => self.control.reply_with(client, Err(why)),
        }
    }

    fn on_call(&mut self, client: Client, method: Method) {
        match method {
            Method::Reload => {
                // Else it would take longer than anybody waits.
                let waits = self.machine.is_idle().then_some(client);
                let reply = match self.hands.reload(waits) {
                    Err(why) => json!({ "reloaded": false, "error": why }),
                    Ok(()) if waits.is_some() => return,
                    Ok(()) => json!({ "reloaded": false, "later": true }),
                };
                self.control.reply(client, reply);
            }
            Method::Thaw if self.machine.is_idle() => {
                self.control.reply(client, json!({ "thawed": false }));
            }
            Method::Thaw => {
                let why = "an operator asked for the thaw";
                self.end_early(why.into(), thawed::OPERATOR);
                self.waiting.push(client);
            }
            Method::Rehearse(rehearsal) => self.rehearse(client, rehearsal),
            Method::History => {
                if let Err(why) = self.hands.read_history(client) {
                    self.control.reply_with(client, Err(why.into()));
                }
            }
            Method::Check => {
                if let Err(why) = self.hands.check(client) {
                    self.control.reply_with(client, Err(why));
                }
            }
            Method::Status => {
                let hands = &self.hands;
                let door = hands.device.as_ref().map(|it| match it.hold() {
                    Some(_) => "held",
                    None => "fifreeze",
                });
                let most = hands.device.as_ref().and_then(|it| Some(it.hold()?.most));
                let now = Instant::now();
                let job = hands.job.as_ref().filter(|_| self.machine.is_freezing());
                let status = Status {
                    phase: self.machine.phase(),
                    doing: job.map(|it| it.progress().words(now)).or(hands.inside()),
                    refuses: self.refuses(),
                    door,
                    most,
                    frozen: &hands.held,
                    given_up: hands.worker.given_up(),
                    turned: hands.worker.turned(),
                    owed: &hands.owed.0,
                    backups: hands.backups,
                    last: &hands.last,
                    last_backup: hands.last_entry.as_ref(),
                    configuration: Some(InForce {
                        path: hands.config_path.as_ref().map(|it| it.to_string_lossy()),
                        in_force: hands.config.to_value(),
                    }),
                    ..Status::at_rest()
                };
                self.control.reply_status(client, &status);
            }
        }
    }
}

/// Why the module has thawed what it held, in words.
fn why_thawed(reason: u32) -> &'static str {
    match reason {
        thawed::DEADLINE => "the module thawed, the deadline passed",
        thawed::OPERATOR => "the module thawed, somebody asked for it",
        thawed::SLEEP => "the module thawed, the machine was about to sleep",
        thawed::CALLED_OFF => "the module thawed, the host was told that the FREEZE failed",
        thawed::GONE => "the module thawed, the device went away",
        _ => "the module thawed by itself",
    }
}

/// Says to the event loop, from another thread, what `wrap` makes of it.
fn teller<T: Send + 'static>(
    (sender, waker): &(Sender<News>, Arc<Waker>),
    wrap: fn(T) -> News,
) -> impl Fn(T) + Send + 'static {
    let (sender, waker) = (sender.clone(), Arc::clone(waker));
    move |outcome| {
        // Both fail only when the loop is gone, and then nobody is left to tell.
        let _ = sender.send(wrap(outcome));
        let _ = waker.wake();
    }
}

impl Hands {
    /// These are not let go yet.
    fn owe(&mut self, hooks: Vec<String>) {
        let next = (!hooks.is_empty()).then(|| Instant::now() + OWED);
        self.owed = (hooks, next);
    }

    /// Whether what is not let go yet is to be tried again.
    fn owes_by_now(&self) -> bool {
        let (_, next) = self.owed;
        next.is_some_and(|it| it <= Instant::now())
    }

    /// Calls hooks, for which the job waits.
    fn call(&mut self, hooks: Vec<Found>, context: Context) -> Result<(), String> {
        let progress = self.job.as_ref().map(|job| Arc::clone(job.progress()));
        let means = Means {
            run: self.run.clone(),
            log: self.log.clone(),
            limit: self.config.hooks.limit,
            context,
        };
        self.note();
        let tell = teller(&self.tell, News::Hooks);
        let calling = Calling::start(hooks, means, progress.unwrap_or_default(), tell)?;
        self.calling = Some(calling);
        Ok(())
    }

    /// Says of which hooks what they had left running has ended by itself, and `when`; returns that of one that
    /// is required.
    fn sessions_ended(&mut self, when: &str) -> Option<String> {
        let mut why = None;
        for session in self.calling.as_ref()?.sessions_ended() {
            let text = session.has_ended_in_words(when);
            self.log.warning(&text);
            if let Some(draft) = &mut self.draft {
                draft.warn(text.clone());
            }
            if session.required {
                why.get_or_insert(text);
            }
        }
        why
    }

    /// A backup that may be remembered.
    fn draft(&self, request: &Request) -> Draft {
        let about = request.about;
        let kind = about.map(|it| it.backup_type);
        let disks = about.map(|_| self.disks_of(request));
        Draft::new(request.id, kind, disks, self.is_held())
    }

    /// The addresses of the disks that it is for.
    fn disks_of(&self, request: &Request) -> Vec<String> {
        let device = self.device.as_ref().filter(|_| request.about.is_some());
        let luns = device.map_or(&[][..], Device::disks);
        luns.iter().map(disks::address_of).collect()
    }

    /// Puts what came of the backup that has ended into the history, with all calls of hooks.
    fn remember_backup(&mut self) {
        let called = std::mem::take(&mut self.called);
        if let Some(client) = self.rehearses.take() {
            let draft = self.draft.take();
            self.rehearsed = draft.map(|it| (client, it.finish(called)));
        } else if let Some(draft) = self.draft.take() {
            let erase = self.unfinished.eraser();
            let entry = draft.finish(called);
            if !entry.warnings.is_empty() {
                self.last.push_str(", with warnings");
                self.show(self.doing.clone());
            }
            self.write_down(entry, erase);
        }
    }

    /// Puts into the history what an earlier daemon has not, unless what that has frozen still is.
    fn remember_what_is_left(&mut self) {
        if !self.left || !matches!(self.run.read(), Ok(None)) {
            return;
        }
        self.left = false;
        match self.unfinished.left() {
            Ok(None) => {}
            Ok(Some(entry)) => {
                let erase = self.unfinished.eraser();
                self.write_down(entry, erase);
            }
            // It would say the same at each start.
            Err(error) => {
                self.log.warning(words(&error));
                let erased = self.unfinished.eraser()();
                self.say_failure(erased);
            }
        }
    }

    /// Does `then` once the history has the entry.
    fn write_down(
        &mut self,
        entry: Entry,
        then: impl FnOnce() -> Result<(), HistoryError> + Send + 'static,
    ) {
        self.last_entry = Some(entry.in_short());
        let history = History::new(&self.config.state_dir);
        let log = self.log.clone();
        let (writing, written) = channel::<()>();
        self.written = Some(written);
        let added = move |done: Result<Option<HistoryError>, HistoryError>| {
            let warn = |error: HistoryError| log.warning(words(&error));
            match done {
                Ok(too_long) => too_long.into_iter().chain(then().err()).for_each(warn),
                Err(error) => warn(error),
            }
            drop(writing);
            sys::give_back_memory();
        };
        if !self.worker.later(move || history.add(&entry), added) {
            let folder = self.config.state_dir.display();
            self.log.warning(format!(
                "{folder} does not let itself be used: this backup is not in the history"
            ));
        }
    }

    /// Leaves what is known of the backup under way for a later daemon, now that whoever freezes is at work.
    fn note(&mut self) {
        let noted = self.unfinished.note();
        self.say_failure(noted);
    }

    fn say_failure(&self, done: Result<(), HistoryError>) {
        if let Err(error) = done {
            self.log.warning(words(&error));
        }
    }

    /// Has the configuration read again for `client`, if anybody waits for that; or says why not.
    fn reload(&mut self, client: Option<Client>) -> Result<(), &'static str> {
        let tell = teller(&self.tell, |(client, it)| {
            News::Config(client, Box::new(it))
        });
        let path = self.config_path.clone();
        let read = move || tell((client, Config::load_in_time(path.as_deref())));
        // The setting that cures what the history, or whoever freezes, hangs in may be in it.
        if self.worker.aside(read) {
            return Ok(());
        }
        let why = "the configuration is not read: a disk does not let itself be used";
        self.log.warning(why);
        Err(why)
    }

    /// Has the history read for whoever asks.
    fn read_history(&self, client: Client) -> Result<(), &'static str> {
        let history = History::new(&self.config.state_dir);
        let tell = teller(&self.tell, News::Reply);
        let read = move || {
            let all = history.read().map_err(|error| words(&error))?;
            reply_of(&BTreeMap::from([("backups", all)])).map_err(|error| error.to_string())
        };
        let then = move |reply| {
            tell((client, reply));
            sys::give_back_memory();
        };
        match self.worker.later(read, then) {
            true => Ok(()),
            false => Err("a disk does not let itself be used"),
        }
    }

    /// Has `check` done for whoever asks, by a process of its own: it takes memory, and whatever it looks at may
    /// hang.
    fn check(&mut self, client: Client) -> Result<(), String> {
        if self.checking.strong_count() > 0 {
            return Err("another check is under way".into());
        }
        let life = Arc::new(());
        self.checking = Arc::downgrade(&life);
        let device = self.path.clone();
        let tell = teller(&self.tell, News::Reply);
        let body = move || {
            let reply = check::by_another(&device);
            drop(life);
            tell((client, reply));
        };
        let builder = thread::Builder::new().name("check".into());
        let started = builder.stack_size(CHECK_STACK_BYTES).spawn(body);
        started.map(drop).map_err(|error| error.to_string())
    }

    /// Says what of the configuration does nothing, and what the kernel makes of writers that wait for as long
    /// as they may.
    fn warn(&self) {
        if let Some(text) = self.config.in_vain() {
            self.log.warning(text);
        }
        if let Some(found) = check::hung_task(&self.config) {
            self.log.warning(found.text);
        }
    }

    /// Has the plan for the next backup looked over.
    fn look_over(&mut self) {
        self.prepared = Instant::now();
        self.worker.prepare(&self.config, &self.log);
    }

    /// Shows in `systemctl status` what is going on.
    fn show(&mut self, what: impl Into<String>) {
        self.doing = what.into();
        let text = format!("{}; {}", self.doing, self.last);
        notify(&self.log, &[NotifyState::Status(&text)]);
    }

    /// What goes on although no backup is under way: what a freeze that was called off is still at, or that
    /// of another process.
    fn inside(&self) -> Option<String> {
        let job = self.job.as_ref();
        if let Some(names) = job.and_then(|it| it.progress().under_way()) {
            return Some(format!("called off, still inside the freeze of {names}"));
        }
        (!self.recovery.is_over()).then(|| NOT_UNDONE.into())
    }

    /// Whether there is all that a freeze takes; or why not.
    fn may_begin(&self) -> Result<(), &'static str> {
        if !self.recovery.is_over() {
            return Err(NOT_UNDONE);
        }
        let holds = self.device.as_ref().map(|it| it.hold().is_some());
        match (holds, &self.guard) {
            (Some(true), _) | (_, Some(_)) => Ok(()),
            (None, None) => Err(NO_DEVICE),
            (Some(false), None) => Err(NO_GUARD),
        }
    }

    /// Whether the module holds what is frozen.
    fn is_held(&self) -> bool {
        self.device.as_ref().is_some_and(|it| it.hold().is_some())
    }

    /// The door for this freeze, if there is one; none is the host's for a rehearsal.
    fn door(&self, request: Option<&Request>) -> Result<Arc<dyn Door>, String> {
        self.may_begin()?;
        let deadline = self.config.deadline;
        if let Some(hold) = self.device.as_ref().and_then(Device::hold) {
            let id = request.map_or(held::NOBODY, |it| it.id);
            return Ok(Arc::new(Held::new(hold.clone(), id, deadline)));
        }
        let guard = self.guard.clone().ok_or(NO_GUARD)?;
        // One that has waited for the end of another comes without a look at the guard before it.
        if let Some(why) = guard.is_unfit() {
            return Err(format!("the guard process {why}"));
        }
        let (run, log) = (self.run.clone(), self.log.clone());
        let for_host = request.is_some();
        Ok(Arc::new(Fifreeze::new(guard, run, deadline, for_host, log)))
    }

    /// Has the job begin, number 0 for a rehearsal.
    fn begin_job(
        &mut self,
        door: Arc<dyn Door>,
        number: u64,
        about: About,
        disks: Vec<String>,
        text: String,
    ) -> Result<(), String> {
        let now = Instant::now();
        // Words can wait until the host has its answer.
        let held = self.log.hold(number, now);
        self.log.info(text);
        let tell = teller(&self.tell, News::Job);
        let setting = Setting {
            config: Arc::clone(&self.config),
            log: self.log.clone(),
            door,
            run: self.run.clone(),
            abort: Arc::default(),
            progress: Arc::default(),
            disks,
        };
        let job = self.worker.begin(setting, about, held, tell);
        self.job = Some(job.ok_or("the thread that freezes has died")?);
        self.report = now + REPORT;
        Ok(())
    }
}

impl Effects for Hands {
    fn answer(&mut self, request: &Request, status: u32) -> bool {
        let Some(device) = &self.device else {
            return false;
        };
        match device.answer(request, status) {
            Ok(()) => true,
            Err(error) => {
                let name = name_of(request.operation);
                let text = format!("the answer to {name} was refused: {}", words(&error));
                self.log.warning(text);
                false
            }
        }
    }

    fn tell_thawed(&mut self, id: u64, reason: u32) {
        let told = self.device.as_ref().map(|d| d.thawed_early(id, reason));
        if let Some(Err(error)) = told {
            self.log.warning(words(&error));
        }
    }

    fn begin(&mut self, request: &Request, text: String) -> Result<(), String> {
        let door = self.door(Some(request))?;
        if let (false, Err(error)) = (self.is_held(), self.run.prepare_word()) {
            // Then there is no room for a record either, and nothing is frozen.
            self.log.warning(words(&error));
        }
        self.remember_what_is_left();
        self.left = false;
        let about = About {
            request: request.id,
            backup_type: request.about.map(|it| it.backup_type),
            without_hooks: false,
        };
        let disks = self.disks_of(request);
        self.begin_job(door, self.backups + 1, about, disks, text)?;
        self.backups += 1;
        let draft = self.draft(request);
        self.unfinished.begin(draft.so_far());
        self.draft = Some(draft);
        Ok(())
    }

    fn rehearse(&mut self, with_hooks: bool, text: String) -> Result<(), String> {
        let door = self.door(None)?;
        let about = About {
            without_hooks: !with_hooks,
            ..About::default()
        };
        self.begin_job(door, 0, about, Vec::new(), text)?;
        self.draft = Some(Draft::new(0, None, None, self.is_held()));
        Ok(())
    }

    fn covers(&self, request: &Request) -> bool {
        let disks = self.disks_of(request);
        self.job.as_ref().is_some_and(|job| job.covers(&disks))
    }

    fn settle(&mut self) {
        if let Some(job) = &self.job {
            job.settle();
        }
        if let Some(draft) = &mut self.draft {
            let us = draft.answered();
            if self.rehearses.is_none() {
                let noted = self.unfinished.answered(us);
                self.say_failure(noted);
            }
        }
        self.show("frozen");
    }

    fn thaw(&mut self, by: Instant) {
        if let Some(job) = &self.job {
            job.thaw(Some(by));
        }
    }

    fn call_off(&mut self) {
        if let Some(job) = &self.job {
            job.call_off();
        }
        if let Some(inside) = self.inside() {
            // Nobody knows for how long, and until then the log says nothing.
            process::tell_kernel(&inside);
            self.show(inside);
        }
    }

    fn refused(&mut self, request: &Request, why: &str) {
        let mut draft = self.draft(request);
        draft.ended(Verdict::Failed, Some(format!("refused: {why}")));
        self.write_down(draft.finish(Vec::new()), || Ok(()));
        self.last = format!("a backup was refused: {why}");
        if self.job.is_some() {
            // The log is held.
            process::tell_kernel(&self.last);
        }
        self.show(self.doing.clone());
    }

    fn go_on(&mut self) {
        if let Some(job) = &self.job {
            job.go_on();
        }
    }

    fn finish(&mut self, verdict: Verdict, why: Option<&str>) {
        if let Some(draft) = &mut self.draft {
            draft.ended(verdict, why.map(str::to_owned));
            if self.rehearses.is_none() {
                // Hooks may yet take long.
                let noted = self.unfinished.put(draft.so_far());
                self.say_failure(noted);
            }
        }
        if let Some(job) = self.job.take() {
            job.join();
        }
        self.held.clear();
        let how = match verdict {
            Verdict::Good => "was good",
            Verdict::Broken | Verdict::Failed => "failed",
        };
        if self.rehearses.is_none() {
            self.last = format!("backup {} {how}", self.backups);
        }
        self.show("idle");
        self.look_over();
    }

    fn release(&mut self, verdict: Option<Verdict>) -> bool {
        match &self.calling {
            Some(calling) => calling.release(verdict),
            None if self.job.is_none() => self.remember_backup(),
            // That is to be finished first.
            None => {}
        }
        self.calling.is_some()
    }

    fn remember(&mut self, broken: Option<&str>) {
        let done = match broken {
            Some(why) => self.run.leave_word(why),
            None => self.run.take_word_back(),
        };
        if let Err(error) = done {
            self.log.warning(words(&error));
        }
    }

    fn prepare(&mut self) {
        if self.prepared.elapsed() > PREPARED {
            self.look_over();
        }
    }

    fn say(&mut self, level: Level, text: String) {
        self.log.say(level, &text);
    }
}
