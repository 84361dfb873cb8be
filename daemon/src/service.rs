// SPDX-License-Identifier: GPL-2.0-only

//! The event loop: requests come in from the device, answers go out, and in between it decides.
//!
//! It never blocks on a file system: that is the [`Job`]'s part. One backup at a time; whatever
//! ends a freeze before the host's THAW makes that THAW fail, so that a broken backup is never
//! reported as good. It knows neither the layout of frames nor how a freeze is done.

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use hv_vss_uapi::{op, status, thawed};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook_mio::v1_0::Signals;

use crate::commands::{self, By, Recovered};
use crate::config::Config;
use crate::device::{Abi, Device, DeviceError, Incoming, Request};
use crate::guard::{Event, Guard, GuardError};
use crate::job::{Job, Outcome, Setting, Worker};
use crate::logbook::{words, Logbook};
use crate::record::{RecordError, RunDir};

const DEVICE: Token = Token(0);
const SIGNALS: Token = Token(1);
const JOB: Token = Token(2);
const GUARD: Token = Token(3);

/// First and longest pause between attempts to open a device that went away.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// How often a dead process is looked after that is still inside the kernel.
const RECOVERY_PAUSE: Duration = Duration::from_millis(250);
/// How long a plan that was looked over need not be so again.
const PREPARED: Duration = Duration::from_secs(1);
/// How long before the kernel gives up a freeze is called off, so that the host hears why.
const MARGIN: Duration = Duration::from_secs(2);

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

/// Where the backup stands.
enum Phase {
    Idle,
    /// Until the job tells; answered with failure at `give_up`.
    Freezing {
        job: Job,
        request: Request,
        give_up: Instant,
    },
    /// Answered; the id is that of the FREEZE.
    Frozen {
        job: Job,
        id: u64,
    },
    Thawing {
        job: Job,
        request: Request,
    },
    /// Called off: the job still has to end, but nobody waits for its answer.
    Ending {
        job: Job,
    },
}

/// Waits for the device at `path` while a daemon keeps it that is dead but still inside the kernel,
/// and thaws meanwhile what can be thawed of what that one has frozen.
pub fn take_over(path: &Path, config: &Config, log: &Logbook) -> Result<Device, DeviceError> {
    log.warning("a dead daemon is still inside the kernel and keeps the device: waiting for it");
    if let Err(error) = commands::thaw(config, log, By::Start) {
        log.error(words(&error));
    }
    loop {
        match Device::open(path) {
            Err(error) if error.is_busy() && commands::owner_has_ended(config) => {
                thread::sleep(RECOVERY_PAUSE);
            }
            other => return other,
        }
    }
}

/// The running daemon.
pub struct Service {
    path: PathBuf,
    config: Arc<Config>,
    log: Logbook,
    poll: Poll,
    signals: Signals,
    device: Option<Device>,
    guard: Option<Arc<Guard>>,
    worker: Worker,
    /// When the plan for the next backup was last looked over.
    prepared: Instant,
    /// When to try next to open a device that went away, and the pause after that.
    retry: Option<(Instant, Duration)>,
    phase: Phase,
    /// Undoes what a dead process freezes even now.
    recovery: Option<JoinHandle<()>>,
    /// Why the last freeze ended before its THAW, until the next FREEZE.
    broken: Option<&'static str>,
    outcomes: (Sender<Outcome>, Receiver<Outcome>),
    waker: Arc<Waker>,
    backups: u64,
    stopping: bool,
    /// How often the service manager wants to hear from us, and when next.
    watchdog: Option<(Duration, Instant)>,
}

impl Service {
    /// Serves `device`, which was opened from `path` and is opened from there again should it go
    /// away. What an earlier daemon left frozen is thawed first.
    pub fn new(
        device: Device,
        path: &Path,
        config: Config,
        log: Logbook,
    ) -> Result<Self, ServiceError> {
        RunDir::new(&config.run_dir).check()?;
        let poll = Poll::new().map_err(failed("open"))?;
        let registry = poll.registry();
        let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(failed("catch signals"))?;
        registry
            .register(&mut signals, SIGNALS, Interest::READABLE)
            .map_err(failed("watch signals"))?;
        let waker = Waker::new(registry, JOB).map_err(failed("make a waker"))?;
        let mut service = Service {
            path: path.to_owned(),
            config: Arc::new(config),
            log,
            signals,
            device: None,
            guard: None,
            prepared: Instant::now(),
            worker: Worker::start().map_err(failed("start a thread"))?,
            retry: None,
            phase: Phase::Idle,
            recovery: None,
            broken: None,
            outcomes: channel(),
            waker: Arc::new(waker),
            backups: 0,
            stopping: false,
            watchdog: sd_notify::watchdog_enabled().map(|limit| (limit / 2, Instant::now())),
            poll,
        };
        service.recover();
        service.start_guard()?;
        service.adopt(device)?;
        service.prepare();
        Ok(service)
    }

    /// Cleans up after a daemon and a guard that were both killed.
    fn recover(&mut self) {
        match commands::thaw(&self.config, &self.log, By::Start) {
            Ok(Recovered::Nothing) => {}
            Ok(Recovered::CutShort { for_host }) => {
                self.log
                    .warning("an earlier daemon died while it had frozen; all is thawed");
                if for_host {
                    self.broken = Some("the daemon that had frozen died");
                }
            }
            Ok(Recovered::InUse) => {
                self.log
                    .warning("the freeze of another process is still being undone");
                self.broken = Some("the freeze of another process was in force");
                self.recover_later();
            }
            // Serving goes on: the next freeze may well work.
            Err(error) => {
                self.log.error(words(&error));
                self.broken = Some("what an earlier daemon had frozen could not be thawed");
            }
        }
    }

    /// Waits for a dead owner that is still inside the kernel: what it freezes there nobody else
    /// would thaw. Until then there is no freeze of ours.
    fn recover_later(&mut self) {
        let (config, log) = (Arc::clone(&self.config), self.log.clone());
        let wait = move || loop {
            thread::sleep(RECOVERY_PAUSE);
            match commands::thaw(&config, &log, By::Later) {
                Ok(Recovered::InUse) => {}
                Ok(Recovered::Nothing | Recovered::CutShort { .. }) => {
                    log.info("the freeze of another process is undone");
                    return;
                }
                Err(error) => {
                    log.error(words(&error));
                    return;
                }
            }
        };
        let builder = thread::Builder::new().name("recovery".into());
        match builder.spawn(wait) {
            Ok(thread) => self.recovery = Some(thread),
            Err(error) => self.log.error(format!("cannot wait for it: {error}")),
        }
    }

    fn start_guard(&mut self) -> Result<(), ServiceError> {
        let guard = Guard::start(&RunDir::new(&self.config.run_dir))?;
        self.poll
            .registry()
            .register(&mut SourceFd(&guard.as_raw_fd()), GUARD, Interest::READABLE)
            .map_err(failed("watch the guard"))?;
        self.guard = Some(Arc::new(guard));
        Ok(())
    }

    /// Replaces a guard that died, unless something is frozen: then no program is started.
    fn need_guard(&mut self) -> Option<Arc<Guard>> {
        if self.guard.is_none() && matches!(self.phase, Phase::Idle) {
            match self.start_guard() {
                Ok(()) => self.log.info("the guard is replaced"),
                Err(error) => self.log.error(words(&error)),
            }
        }
        self.guard.clone()
    }

    fn on_guard(&mut self) {
        while let Some(guard) = self.guard.clone() {
            match guard.event() {
                Some(event) => self.on_guard_event(&guard, event),
                None => return,
            }
        }
    }

    fn on_guard_event(&mut self, guard: &Guard, event: Event) {
        if event == Event::Died {
            self.log.error("the guard process died");
            let registry = self.poll.registry();
            // It is closed anyway when the last copy of the handle goes.
            let _ = registry.deregister(&mut SourceFd(&guard.as_raw_fd()));
            guard.bury();
            self.guard = None;
        }
        let (why, reason) = match event {
            Event::Overdue => ("the deadline passed", thawed::DEADLINE),
            Event::Died => ("the guard process died", thawed::CRASH),
        };
        if let Phase::Frozen { id, .. } = self.phase {
            self.log
                .error(format!("{why}: thawing before the host said so"));
            self.tell_thawed(id, reason);
        }
        self.call_off(why);
        self.need_guard();
    }

    /// Serves until a signal says stop.
    pub fn run(mut self) -> Result<(), ServiceError> {
        self.notify(NotifyState::Ready);
        let mut events = Events::with_capacity(8);
        loop {
            match self.poll.poll(&mut events, self.timeout()) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => other.map_err(failed("wait"))?,
            }
            let woken = |token| events.iter().any(|event| event.token() == token);
            // What has happened to the freeze comes before what is asked next about it.
            while let Ok(outcome) = self.outcomes.1.try_recv() {
                self.on_outcome(outcome);
            }
            if woken(SIGNALS) && self.signals.pending().next().is_some() {
                self.stop();
            }
            if woken(GUARD) {
                self.on_guard();
            }
            self.on_time();
            if woken(DEVICE) {
                self.on_device();
            }
            if self.stopping && matches!(self.phase, Phase::Idle) {
                self.log.info("stopped, nothing is frozen");
                return Ok(());
            }
        }
    }

    fn timeout(&self) -> Option<Duration> {
        let give_up = match &self.phase {
            Phase::Freezing { give_up, .. } => Some(*give_up),
            _ => None,
        };
        // No look-up while something may be frozen, so no attempt to open the device either.
        let idle = matches!(self.phase, Phase::Idle);
        let retry = self.retry.filter(|_| idle).map(|(at, _)| at);
        let watchdog = self.watchdog.map(|(_, at)| at);
        let next = give_up.into_iter().chain(retry).chain(watchdog).min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    fn adopt(&mut self, device: Device) -> Result<(), ServiceError> {
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
        let path = self.path.display();
        self.log.info(format!("registered with {path}, ABI {abi}"));
        self.device = Some(device);
        self.retry = None;
        Ok(())
    }

    fn on_device(&mut self) {
        while let Some(device) = &mut self.device {
            match device.read() {
                Ok(None) => return,
                Ok(Some(Incoming::Request(request))) => self.on_request(request),
                Ok(Some(Incoming::Odd(what))) => {
                    self.log.warning(format!("the kernel sent {what}; ignored"));
                }
                Err(error) => self.lose_device(&error),
            }
        }
    }

    /// The module was unbound, or worse: nobody will ever say THAW on this descriptor.
    fn lose_device(&mut self, error: &DeviceError) {
        if let Some(device) = self.device.take() {
            // Closing takes it out of the poll as well.
            let _ = self
                .poll
                .registry()
                .deregister(&mut SourceFd(&device.as_raw_fd()));
        }
        self.log
            .warning(format!("{}; opening it again", words(error)));
        self.retry = Some((Instant::now(), BACK_OFF.0));
        self.call_off("the device went away");
    }

    fn on_time(&mut self) {
        let now = Instant::now();
        if matches!(&self.phase, Phase::Freezing { give_up, .. } if *give_up <= now) {
            self.log
                .error("the freeze takes too long for the host; called off");
            self.call_off("the freeze took too long");
        }
        if let Some((pause, at)) = self.watchdog.filter(|(_, at)| *at <= now) {
            self.watchdog = Some((pause, at.max(now) + pause));
            self.notify(NotifyState::Watchdog);
        }
        let idle = matches!(self.phase, Phase::Idle);
        let Some((at, pause)) = self.retry.filter(|_| idle) else {
            return;
        };
        if at > now || self.stopping {
            return;
        }
        match Device::open(&self.path) {
            Ok(device) => {
                if let Err(error) = self.adopt(device) {
                    self.log.error(words(&error));
                }
            }
            Err(_) => self.retry = Some((now + pause, (pause * 2).min(BACK_OFF.1))),
        }
    }

    /// Tells the service manager, if there is one.
    fn notify(&self, state: NotifyState) {
        if let Err(error) = sd_notify::notify(&[state]) {
            let text = format!("the service manager cannot be told: {error}");
            self.log.warning(text);
        }
    }

    fn stop(&mut self) {
        if !self.stopping {
            self.log.info("asked to stop");
            self.notify(NotifyState::Stopping);
        }
        self.stopping = true;
        if let Phase::Frozen { id, .. } = self.phase {
            self.log
                .warning("stopped while frozen: thawing before the host said so");
            self.tell_thawed(id, thawed::OPERATOR);
        }
        self.call_off("the daemon was stopped");
    }

    fn tell_thawed(&mut self, id: u64, reason: u32) {
        let told = self.device.as_ref().map(|d| d.thawed_early(id, reason));
        if let Some(Err(error)) = told {
            self.log.warning(words(&error));
        }
    }

    /// Ends whatever freeze is under way or in force. A FREEZE not yet answered is failed.
    fn call_off(&mut self, why: &'static str) {
        self.phase = match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Idle => return,
            Phase::Freezing { job, request, .. } => {
                job.abort();
                self.answer(&request, status::FAIL);
                Phase::Ending { job }
            }
            Phase::Frozen { job, .. } => {
                job.abort();
                Phase::Ending { job }
            }
            // The thaw is on its way; only its success is no longer worth anything.
            Phase::Thawing { job, request } => {
                job.abort();
                Phase::Thawing { job, request }
            }
            Phase::Ending { job } => Phase::Ending { job },
        };
        self.broken = Some(why);
    }

    /// Answers, and says whether the kernel took it.
    fn answer(&mut self, request: &Request, status: u32) -> bool {
        let Some(device) = &self.device else {
            return false;
        };
        match device.answer(request, status) {
            Ok(()) => true,
            Err(error) => {
                let name = name_of(request.operation);
                self.log.warning(format!(
                    "the answer to {name} was refused: {}",
                    words(&error)
                ));
                false
            }
        }
    }

    fn on_request(&mut self, request: Request) {
        match request.operation {
            op::FREEZE => self.on_freeze(request),
            op::THAW => self.on_thaw(request),
            other => {
                self.answer(&request, status::OK);
                self.log
                    .info(format!("{} from the host, acknowledged", name_of(other)));
                if other == op::HOT_BACKUP && self.prepared.elapsed() > PREPARED {
                    // The host asks whether it could take a backup, so it may take one soon.
                    self.prepare();
                }
            }
        }
    }

    fn on_freeze(&mut self, request: Request) {
        match &mut self.phase {
            Phase::Idle => {}
            Phase::Frozen { id, .. } => {
                *id = request.id;
                self.log
                    .warning("FREEZE from the host, although frozen already");
                self.answer(&request, status::OK);
                return;
            }
            Phase::Freezing { .. } | Phase::Thawing { .. } | Phase::Ending { .. } => {
                self.log
                    .error("FREEZE from the host while the last one has not ended: refused");
                self.answer(&request, status::FAIL);
                return;
            }
        }
        if self.stopping {
            self.answer(&request, status::FAIL);
            return;
        }
        if self.recovery.as_ref().is_some_and(|it| !it.is_finished()) {
            self.log.error(
                "FREEZE from the host is refused: the freeze of another process is not undone",
            );
            self.answer(&request, status::FAIL);
            return;
        }
        let Some(guard) = self.need_guard() else {
            self.log
                .error("FREEZE from the host is refused: there is no guard process");
            self.answer(&request, status::FAIL);
            return;
        };
        let now = Instant::now();
        self.backups += 1;
        self.broken = None;
        self.log.begin_backup(self.backups, now);
        // Words can wait until the host has its answer.
        self.log.hold();
        self.log.info(describe(&request));
        let outcomes = self.outcomes.0.clone();
        let waker = Arc::clone(&self.waker);
        let tell = move |outcome| {
            // Both fail only when the loop is gone, and then nobody is left to tell.
            let _ = outcomes.send(outcome);
            let _ = waker.wake();
        };
        let setting = Setting {
            config: Arc::clone(&self.config),
            log: self.log.clone(),
            guard,
            for_host: true,
        };
        let Some(job) = self.worker.begin(setting, tell) else {
            self.log
                .error("FREEZE from the host is refused: the thread that freezes has died");
            self.answer(&request, status::FAIL);
            self.log.end_backup();
            self.log.release();
            return;
        };
        let time_left = request.time_left.max(MARGIN * 2) - MARGIN;
        let time_left = time_left.min(self.config.prepare + self.config.deadline);
        self.phase = Phase::Freezing {
            job,
            give_up: now + time_left,
            request,
        };
    }

    fn on_thaw(&mut self, request: Request) {
        match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Frozen { job, .. } => {
                self.log.info(describe(&request));
                job.thaw();
                self.phase = Phase::Thawing { job, request };
                return;
            }
            Phase::Idle => {}
            Phase::Freezing { job, .. } => {
                // The kernel has given up on that FREEZE and does not want its answer any more.
                job.abort();
                self.broken = Some("the host did not wait for the freeze");
                self.phase = Phase::Ending { job };
            }
            busy @ (Phase::Thawing { .. } | Phase::Ending { .. }) => self.phase = busy,
        }
        match self.broken {
            Some(why) => {
                self.log.error(format!(
                    "THAW from the host fails: {why}, so the backup is not good"
                ));
                self.answer(&request, status::FAIL);
            }
            None => {
                self.log.info("THAW from the host, but nothing is frozen");
                self.answer(&request, status::OK);
            }
        }
    }

    fn on_outcome(&mut self, outcome: Outcome) {
        let phase = std::mem::replace(&mut self.phase, Phase::Idle);
        match (outcome, phase) {
            (Outcome::Frozen(Ok(summary)), Phase::Freezing { job, request, .. }) => {
                let counts = format!(
                    "{} frozen, {} frozen by others, {} only synced",
                    summary.ours, summary.foreign, summary.synced
                );
                if self.answer(&request, status::OK) {
                    job.settle();
                    self.log.info(format!("FREEZE answered: {counts}"));
                    let id = request.id;
                    self.phase = Phase::Frozen { job, id };
                } else {
                    // The host was told that it failed, so it will not say THAW.
                    self.log
                        .error(format!("FREEZE came too late ({counts}); thawing"));
                    job.abort();
                    self.broken = Some("the freeze came too late");
                    self.phase = Phase::Ending { job };
                }
            }
            (Outcome::Frozen(Err(error)), Phase::Freezing { job, request, .. }) => {
                self.log.error(format!(
                    "FREEZE fails, nothing is left frozen: {}",
                    words(&error)
                ));
                self.answer(&request, status::FAIL);
                self.finish(job);
            }
            (Outcome::Thawed(result), Phase::Thawing { job, request }) => {
                if let Err(error) = &result {
                    self.log.error(format!("THAW fails: {}", words(error)));
                }
                let good = result.is_ok() && self.broken.is_none();
                let answer = if good { status::OK } else { status::FAIL };
                self.answer(&request, answer);
                self.log.info(if good {
                    "THAW answered: all that was frozen is thawed, the backup is good"
                } else {
                    "THAW answered with failure: the backup is not good"
                });
                self.finish(job);
            }
            // An aborted freeze may have got through just before: the thaw was asked for, and its
            // outcome is still to come.
            (Outcome::Frozen(Ok(_)), Phase::Ending { job }) => {
                self.phase = Phase::Ending { job };
            }
            (Outcome::Frozen(Err(_)) | Outcome::Thawed(_), Phase::Ending { job }) => {
                self.log
                    .info("the freeze that was called off has ended, nothing is left frozen");
                self.finish(job);
            }
            (outcome, phase) => {
                self.log
                    .warning(format!("unexpected outcome of a job: {outcome:?}"));
                self.phase = phase;
            }
        }
    }

    /// After the last outcome of a job: nothing is frozen, so the log may be written.
    fn finish(&mut self, job: Job) {
        job.join();
        self.log.end_backup();
        self.log.release();
        self.need_guard();
        self.prepare();
    }

    /// Has the plan for the next backup looked over.
    fn prepare(&mut self) {
        self.prepared = Instant::now();
        self.worker.prepare(&self.config, &self.log);
    }
}

fn describe(request: &Request) -> String {
    let mut text = format!("{} from the host", name_of(request.operation));
    if request.id != 0 {
        text.push_str(&format!(", request {}", request.id));
    }
    if let Some(luns) = request.luns {
        text.push_str(&format!(", {luns} disks in the backup"));
    }
    let seconds = request.time_left.as_secs_f64();
    text.push_str(&format!(", to be answered within {seconds:.1} s"));
    text
}

fn name_of(operation: u8) -> String {
    let name = match operation {
        op::CREATE => "CREATE",
        op::DELETE => "DELETE",
        op::HOT_BACKUP => "HOT_BACKUP",
        op::GET_DM_INFO => "GET_DM_INFO",
        op::BU_COMPLETE => "BU_COMPLETE",
        op::FREEZE => "FREEZE",
        op::THAW => "THAW",
        op::AUTO_RECOVER => "AUTO_RECOVER",
        other => return format!("operation {other}"),
    };
    name.to_owned()
}
