// SPDX-License-Identifier: GPL-2.0-only

//! What an operator can do by hand: `status`, `history`, `check`, `list`, `freeze --for`, `reload` and
//! `thaw`.
//!
//! No host takes part. Texts go to standard output, the course of a rehearsal to the log.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize as _, Serialize};
use serde_json::Value;

use crate::backup::{lasts, Rehearsal, Verdict};
use crate::cache::{survey, GatherError};
use crate::calls::{self, Calling, Context, HookOutcome, Means};
use crate::check;
use crate::config::{Config, ConfigError};
use crate::control::{self, ControlError, Method};
use crate::door::DoorError;
use crate::fifreeze::Fifreeze;
use crate::freeze::FreezeError;
use crate::ground::Disk;
use crate::guard::{Event, Guard, GuardError};
use crate::history::{Entry, History, HistoryError};
use crate::hooks::Found;
use crate::job::{About, Freezer, JobError, Setting};
use crate::logbook::{words, Logbook};
use crate::machine::{LookError, Table};
use crate::mounts::{self, DevId};
use crate::plan::{FileSystem, Place, Plan, Reason, Scope};
use crate::progress::Stage;
use crate::record::{RecordError, RunDir};
use crate::recovery::{self, By, Recovered, RecoveryError};
use crate::report::{self, Outcome, Status};
use crate::timeline::{self, TimelineError};

/// How often it is asked whether a rehearsal is to end.
const GLANCE: Duration = Duration::from_millis(100);

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The machine could not be looked at.
    #[error(transparent)]
    Look(#[from] LookError),
    /// What is to be frozen could not be opened.
    #[error(transparent)]
    Gather(#[from] GatherError),
    /// The rehearsal did not freeze.
    #[error(transparent)]
    Freeze(#[from] JobError),
    /// No guard, no freeze.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The rehearsal did not thaw cleanly.
    #[error(transparent)]
    Thaw(#[from] crate::freeze::ThawError),
    /// The hooks were not ready for it.
    #[error("{0}")]
    Hooks(String),
    /// The rehearsal did not last.
    #[error("the rehearsal was ended before its time: {0}")]
    Ended(&'static str),
    /// It cannot last so long.
    #[error("{0}")]
    TooLong(String),
    /// What came of it only a daemon tells.
    #[error("no daemon serves, and of a rehearsal without one there is no JSON: it says what comes of it in its log")]
    NoJson,
    /// The daemon that serves goes by another configuration.
    #[error(
        "a daemon serves, and rehearses by its own configuration: without --config, after `hv_vss reload` if that is to \
         be another"
    )]
    ByItsOwn,
    /// Record or lock cannot be used.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Not all is thawed.
    #[error(transparent)]
    Recovery(#[from] RecoveryError),
    /// What is remembered cannot be read.
    #[error(transparent)]
    History(#[from] HistoryError),
    /// There is no such backup.
    #[error("backup number {0}, counted from the last, is not remembered")]
    NotRemembered(usize),
    /// It cannot be drawn.
    #[error(transparent)]
    Timeline(#[from] TimelineError),
    /// What was drawn cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// Where to.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no daemon to ask.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// Where it might be asked is not known.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It goes by the configuration that it had.
    #[error("{0}; the daemon that serves goes by the configuration that it had")]
    NotReloaded(String),
    /// What the module holds for it nobody else can thaw.
    #[error(
        "the daemon that serves (process {0}) does not reply: what the module may hold for it is thawed once it does, at \
         its deadline, or when it has ended (kill -9 {0})"
    )]
    Silent(u32),
    /// The list cannot be written, or what the daemon replies is not understood.
    #[error("JSON that is not as it should be")]
    Json(#[from] serde_json::Error),
}

impl CommandError {
    /// The exit status that tells it from others; `None` where it is a failure like any.
    pub fn outcome(&self) -> Option<Outcome> {
        match self {
            CommandError::Control(error) if error.is_busy() => Some(Outcome::UnderWay),
            CommandError::Record(RecordError::Locked { .. })
            | CommandError::Freeze(JobError::Freeze(FreezeError::Door(DoorError::Record(
                RecordError::Locked { .. },
            )))) => Some(Outcome::UnderWay),
            CommandError::Freeze(_)
            | CommandError::Thaw(_)
            | CommandError::Hooks(_)
            | CommandError::Ended(_) => Some(Outcome::NotGood),
            _ => None,
        }
    }
}

/// `list --json`: one file system.
#[derive(Serialize)]
struct Row<'a> {
    /// Each path once, the best way first.
    paths: Vec<String>,
    /// All mounts.
    mounts: Vec<MountRow>,
    #[serde(rename = "type")]
    fs_type: &'a str,
    source: Option<String>,
    dev: String,
    /// The disks that it is on, by name; empty when they are not known.
    disks: Vec<&'a str>,
    /// Counted from 1; absent when it is not frozen.
    #[serde(skip_serializing_if = "Option::is_none")]
    wave: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    left_out_because: Option<String>,
}

/// One mount of it.
#[derive(Serialize)]
struct MountRow {
    /// 0 is the daemon's own namespace.
    namespace: usize,
    path: String,
    /// Whether the whole file system is there, or a whole subvolume.
    whole: bool,
}

/// One disk.
#[derive(Serialize)]
struct DiskRow<'a> {
    /// The kernel's.
    name: &'a str,
    dev: String,
    /// Where the host has it, as `controller:port:target:unit`; absent when it is none of the host's.
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<&'a str>,
    /// Whether the last backup was of it; absent when that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    in_last_backup: Option<bool>,
    /// What is on it, frozen or not.
    file_systems: Vec<String>,
}

impl fmt::Display for DiskRow<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}", self.name, self.dev)?;
        match self.address {
            Some(address) => write!(f, ", the host's {address}")?,
            None => write!(f, ", none of the host's")?,
        }
        if self.in_last_backup == Some(true) {
            write!(f, ", in the last backup")?;
        }
        write!(f, ")")?;
        match self.file_systems.is_empty() {
            true => Ok(()),
            false => write!(f, ": {}", self.file_systems.join(", ")),
        }
    }
}

#[derive(Serialize)]
struct Listing<'a> {
    frozen: Vec<Row<'a>>,
    /// What has no means to freeze.
    synced: Vec<Row<'a>>,
    left_out: Vec<Row<'a>>,
    /// Rules of the configuration that match nothing, and those that leave out nothing of a file system
    /// because they are for a part of it.
    idle_rules: BTreeSet<String>,
    partial_rules: Vec<String>,
    disks: Vec<DiskRow<'a>>,
    /// Whether a backup freezes only what is on the disks that the host names.
    listed_disks_only: bool,
}

/// Text as it is, and octal escapes as in the mount table for bytes that are none.
fn text_of(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.push_str(&mounts::escape(chunk.invalid()));
    }
    text
}

fn row<'a>(
    plan: &'a Plan,
    file_system: &'a FileSystem,
    wave: Option<usize>,
    reason: Option<&Reason>,
) -> Row<'a> {
    let mount = |place: &Place| MountRow {
        namespace: place.namespace,
        path: text_of(place.path.as_os_str().as_bytes()),
        whole: place.whole,
    };
    let mounts: Vec<MountRow> = file_system.places.iter().map(mount).collect();
    let mut seen = BTreeSet::new();
    let paths = mounts.iter().map(|it| &it.path);
    let source = file_system.source.as_ref();
    let disks = file_system.disks.iter().filter_map(|it| plan.disks.get(it));
    Row {
        paths: paths.filter(|it| seen.insert(*it)).cloned().collect(),
        mounts,
        fs_type: &file_system.fs_type,
        source: source.map(|it| text_of(it.as_bytes())),
        dev: file_system.dev.to_string(),
        disks: disks.map(|it| it.name.as_str()).collect(),
        wave,
        left_out_because: reason.map(ToString::to_string),
    }
}

/// What would be frozen, in which order, and what would not and why: as text or as JSON. Everything
/// is opened as for a backup, so that what cannot be reached is known. What only the daemon knows that serves with `run`,
/// if one does and replies in time, counts as well.
pub fn list(config: &Config, run: &RunDir, json: bool) -> Result<String, CommandError> {
    let status = control::ask(run, Method::Status).ok();
    let turned = status.as_ref().map(control::turned_in);
    let plan = survey(config, turned.unwrap_or_default())?;
    // What is not remembered, or not for everybody to read, is missing in the list.
    let last = History::new(&config.state_dir).read_in_time().ok();
    let last = last
        .and_then(|it| it.into_iter().last())
        .filter(|it| it.disks.is_some());
    let scope = last.map(|it| plan.find(&it.listed));
    let listing = listing(&plan, scope.as_ref(), config);
    match json {
        true => as_json(&listing),
        false => Ok(as_text(&plan, &listing)),
    }
}

/// What [`list`] is made from, as JSON: for reports, and for tests of the plan.
pub fn table() -> Result<String, CommandError> {
    Ok(serde_json::to_string_pretty(&Table::record()?)? + "\n")
}

/// The waves of what has means to freeze.
fn waves(plan: &Plan) -> Vec<Vec<&FileSystem>> {
    let waves = plan.waves.iter().map(|members| {
        let members = members.iter().filter(|it| it.has_means_to_freeze());
        members.collect::<Vec<_>>()
    });
    waves.filter(|members| !members.is_empty()).collect()
}

fn listing<'a>(plan: &'a Plan, scope: Option<&Scope>, config: &Config) -> Listing<'a> {
    let frozen = waves(plan).into_iter().enumerate();
    let frozen = frozen.flat_map(|(wave, members)| {
        let number = Some(wave + 1);
        let members = members.into_iter();
        members.map(move |f| row(plan, f, number, None))
    });
    let disk = |(dev, disk): (&DevId, &'a Disk)| DiskRow {
        name: &disk.name,
        dev: dev.to_string(),
        address: disk.address.as_deref(),
        in_last_backup: scope.map(|it| it.disks.contains(dev)),
        file_systems: plan.on_disk(*dev).map(ToString::to_string).collect(),
    };
    let left_out = plan.left_out.iter();
    let rules = config.idle_rules(plan).into_iter();
    let (partial, idle): (Vec<_>, Vec<_>) = rules.partition(|it| it.part_of.is_some());
    Listing {
        frozen: frozen.collect(),
        synced: plan
            .only_synced()
            .map(|f| row(plan, f, None, None))
            .collect(),
        left_out: left_out
            .map(|l| row(plan, &l.file_system, None, Some(&l.reason)))
            .collect(),
        idle_rules: idle.into_iter().map(|it| it.rule).collect(),
        partial_rules: partial.iter().map(ToString::to_string).collect(),
        disks: plan.disks.iter().map(disk).collect(),
        listed_disks_only: config.listed_disks_only,
    }
}

fn as_text(plan: &Plan, listing: &Listing<'_>) -> String {
    let mut text = String::new();
    let waves = waves(plan);
    for (wave, members) in waves.iter().enumerate() {
        text.push_str(&format!("wave {}\n", wave + 1));
        for file_system in members {
            text.push_str(&format!("  {file_system}\n"));
        }
    }
    if waves.is_empty() {
        text.push_str("nothing to freeze\n");
    }
    if !listing.synced.is_empty() {
        text.push_str("synced, without means to freeze\n");
    }
    for file_system in plan.only_synced() {
        text.push_str(&format!("  {file_system}\n"));
    }
    text.push_str("left out\n");
    for left in &plan.left_out {
        text.push_str(&format!("  {}: {}\n", left.file_system, left.reason));
    }
    text.push_str("disks");
    if listing.listed_disks_only {
        text.push_str("; of a backup only what is on those that the host names is frozen");
    }
    text.push('\n');
    for disk in &listing.disks {
        text.push_str(&format!("  {disk}\n"));
    }
    let idle_rules = &listing.idle_rules;
    if !idle_rules.is_empty() {
        text.push_str("rules that match nothing\n");
    }
    for rule in idle_rules {
        text.push_str(&format!("  {rule}\n"));
    }
    for words in &listing.partial_rules {
        text.push_str(&format!("{words}\n"));
    }
    text
}

/// A rehearsal by the daemon that serves, which freezes as it would for a backup, and ends it should this process end.
/// Returns what came of it, as text or as JSON; `None` where no daemon serves. `path` is the configuration that was
/// asked for.
pub fn rehearse_there(
    run: &RunDir,
    path: Option<&Path>,
    rehearsal: Rehearsal,
    json: bool,
) -> Result<Option<(String, Outcome)>, CommandError> {
    let serves = match control::ask(run, Method::Status) {
        // One that waits for a device serves nobody.
        Ok(status) => !status["door"].is_null(),
        Err(ControlError::Nobody) => false,
        Err(error) => return Err(error.into()),
    };
    match (serves, path) {
        (true, Some(_)) => return Err(CommandError::ByItsOwn),
        (true, None) => {}
        (false, _) if json => return Err(CommandError::NoJson),
        (false, _) => return Ok(None),
    }
    let reply = control::ask_patiently(run, Method::Rehearse(rehearsal), |_| ())?;
    let reply = &reply["rehearsal"];
    let entry = Entry::deserialize(reply)?;
    let text = match json {
        true => as_json(reply)?,
        false => report::rehearsal(&entry),
    };
    Ok(Some((text, report::outcome_of(&[entry]))))
}

/// A rehearsal without a daemon: calls hooks, if it is to, and freezes as for a backup, stays frozen for `time`, thaws.
/// Sends `stop` to end early. It freezes through FIFREEZE, with a guard of its own.
pub fn freeze_for(
    config: Config,
    log: &Logbook,
    rehearsal: Rehearsal,
    stop: &Stop,
) -> Result<(), CommandError> {
    let Rehearsal { time, with_hooks } = rehearsal;
    lasts(time, config.deadline).map_err(CommandError::TooLong)?;
    let run = RunDir::default();
    run.check()?;
    // What somebody has left frozen who has died would count as frozen by others.
    recovery::thaw(&run, log, By::Start)?;
    let guard = Arc::new(Guard::start(&run)?);
    let deadline = config.deadline;
    let door = Fifreeze::new(
        Arc::clone(&guard),
        run.clone(),
        deadline,
        false,
        log.clone(),
    );
    let setting = Setting {
        config: Arc::new(config),
        log: log.clone(),
        door: Arc::new(door),
        run: run.clone(),
        abort: Arc::default(),
        progress: Arc::default(),
        disks: Vec::new(),
    };
    let find = move |freezer: &mut Freezer, setting: &Setting| match with_hooks {
        // What is not called is in the log.
        true => Ok(freezer.hooks(setting, &About::default())?.0),
        false => Ok(None),
    };
    let held = log.hold(0, Instant::now());
    let (freezer, hooks) = unless_stopped(Freezer::new(), &setting, stop, find)?;
    let hooks = hooks.map(|it| Rehearsed::call(&run, &setting, it));
    let mut hooks = hooks.transpose()?;
    let ready = hooks.as_ref().map_or(Ok(()), |it| it.wait(stop));
    let result =
        ready.and_then(|()| rehearse(freezer, &setting, hooks.as_ref(), &guard, time, stop));
    drop(held);
    if let Some(hooks) = hooks.take() {
        let verdict = match &result {
            Ok(()) => Verdict::Good,
            Err(CommandError::Ended(_) | CommandError::Thaw(_)) => Verdict::Broken,
            Err(_) => Verdict::Failed,
        };
        hooks.let_go(verdict);
    }
    result
}

/// The hooks of a rehearsal.
struct Rehearsed {
    calling: Calling,
    told: Receiver<HookOutcome>,
}

impl Rehearsed {
    fn call(
        run: &RunDir,
        setting: &Setting,
        (found, context): (Vec<Found>, Context),
    ) -> Result<Self, CommandError> {
        let means = Means {
            run: run.clone(),
            log: setting.log.clone(),
            limit: setting.config.hooks.limit,
            context,
        };
        let (tell, told) = channel();
        let tell = move |outcome| {
            // Somebody listens until all are let go.
            let _ = tell.send(outcome);
        };
        let calling = Calling::start(found, means, Arc::clone(&setting.progress), tell);
        let calling = calling.map_err(CommandError::Hooks)?;
        Ok(Rehearsed { calling, told })
    }

    /// Waits until they are ready.
    fn wait(&self, stop: &Stop) -> Result<(), CommandError> {
        loop {
            match self.told.try_recv() {
                Ok(HookOutcome::Quiesced(result)) => return result.map_err(CommandError::Hooks),
                Ok(HookOutcome::Released { .. }) | Err(TryRecvError::Disconnected) => {
                    return Err(CommandError::Hooks("hooks have ended".into()))
                }
                Err(TryRecvError::Empty) => {}
            }
            if stop.wait(Duration::from_millis(10)) {
                return Err(CommandError::Hooks("the rehearsal was stopped".into()));
            }
        }
    }

    /// Says of which what they had left running has ended by itself, and fails for one that is required.
    fn still_hold(&self, log: &Logbook, when: &str) -> Result<(), CommandError> {
        let mut result = Ok(());
        for session in self.calling.sessions_ended() {
            let text = session.has_ended_in_words(when);
            log.warning(&text);
            if session.required {
                result = Err(CommandError::Hooks(text));
            }
        }
        result
    }

    /// Lets them go, and waits for that. What goes wrong is in the log.
    fn let_go(self, verdict: Verdict) {
        self.calling.release(Some(verdict));
        self.calling.join();
    }
}

/// Has `step` done, unless the word to end comes before, or it takes too long. Where it hangs then with nothing frozen,
/// it is left to its thread, which ends with this process.
fn unless_stopped<T: Send + 'static>(
    mut freezer: Freezer,
    setting: &Setting,
    stop: &Stop,
    step: impl FnOnce(&mut Freezer, &Setting) -> Result<T, JobError> + Send + 'static,
) -> Result<(Freezer, T), JobError> {
    let (tell, told) = channel();
    let its = setting.clone();
    let body = move || {
        let done = step(&mut freezer, &its);
        // Nobody listens any more when it was left alone.
        let _ = tell.send(done.map(|it| (freezer, it)));
    };
    let builder = thread::Builder::new().name("rehearsal".into());
    builder.spawn(body).map_err(JobError::Threads)?;
    let mut is_off = false;
    loop {
        match told.recv_timeout(GLANCE) {
            Ok(done) => return done,
            Err(RecvTimeoutError::Disconnected) => return Err(JobError::CalledOff),
            Err(RecvTimeoutError::Timeout) if !is_off => {}
            Err(RecvTimeoutError::Timeout) => match setting.progress.stage() {
                Stage::Freezing => continue,
                _ => return Err(JobError::CalledOff),
            },
        }
        let now = Instant::now();
        let stuck = setting.stuck(now);
        is_off = stop.wait(Duration::ZERO) || stuck.is_some();
        if let Some(why) = stuck {
            setting.log.error(format!("{why}: it is called off"));
        }
        if is_off {
            setting.call_off(now);
        }
    }
}

fn rehearse(
    freezer: Freezer,
    setting: &Setting,
    hooks: Option<&Rehearsed>,
    guard: &Guard,
    time: Duration,
    stop: &Stop,
) -> Result<(), CommandError> {
    let (mut freezer, mut frozen) = unless_stopped(freezer, setting, stop, Freezer::freeze)?;
    let hold = |when| hooks.map_or(Ok(()), |it| it.still_hold(&setting.log, when));
    let ready = hold("before all was frozen");
    frozen.settle();
    let end = match ready {
        Ok(()) => Instant::now() + time,
        Err(_) => Instant::now(),
    };
    let ended = loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || stop.wait(left.min(GLANCE)) {
            break None;
        }
        if !frozen.look_after().is_empty() {
            break Some("somebody else thawed");
        }
        match guard.event() {
            None => {}
            Some(Event::Overdue) => break Some("the deadline passed"),
            Some(Event::Died) => break Some("its guard died"),
        }
    };
    if ended.is_some() {
        // From here on an early thaw is no surprise.
        setting.abort.store(true, Ordering::SeqCst);
    }
    let thawed = freezer.thaw(&mut frozen, setting, None);
    frozen.tidy().say(&setting.log);
    if let Some(why) = ended {
        return Err(CommandError::Ended(why));
    }
    thawed?;
    if ready.is_ok() {
        // As in a backup that is a warning.
        let _ = hold("while all was frozen");
    }
    ready
}

/// The word to end a rehearsal early; clones share it.
#[derive(Clone, Default)]
pub struct Stop(Arc<(Mutex<bool>, Condvar)>);

impl Stop {
    /// Gives the word.
    pub fn stop(&self) {
        let (flag, condition) = &*self.0;
        // A poisoned flag is as good as any other.
        *flag.lock().unwrap_or_else(|e| e.into_inner()) = true;
        condition.notify_all();
    }

    /// Waits up to `time`; says whether the word was given.
    fn wait(&self, time: Duration) -> bool {
        let (flag, condition) = &*self.0;
        let flag = flag.lock().unwrap_or_else(|e| e.into_inner());
        let waited = condition.wait_timeout_while(flag, time, |stop| !*stop);
        *waited.unwrap_or_else(|e| e.into_inner()).0
    }
}

/// The configuration at `path`, or else that which the daemon that serves was started with.
pub fn config(path: Option<&Path>, run: &RunDir) -> Result<Config, ConfigError> {
    let its = || {
        let status = control::ask(run, Method::Status).ok()?;
        status["configuration"]["path"].as_str().map(PathBuf::from)
    };
    let path = path.map(Path::to_owned).or_else(its);
    Config::load_in_time(path.as_deref())
}

/// Has the daemon that serves read its configuration again. `config` reads it here.
pub fn reload(
    run: &RunDir,
    config: impl FnOnce() -> Result<Config, ConfigError>,
    log: &Logbook,
) -> Result<(), CommandError> {
    // Each file of it may take some seconds, and so may what another has asked for before.
    let reply = control::ask_patiently(run, Method::Reload, |_| {})?;
    reloaded(&reply, config, log)
}

/// What came of it.
fn reloaded(
    reply: &Value,
    config: impl FnOnce() -> Result<Config, ConfigError>,
    log: &Logbook,
) -> Result<(), CommandError> {
    if reply["later"] == true {
        // By then nobody listens to what the daemon says of it.
        config()?;
        log.info(
            "the configuration is in force after what is under way (a backup, or the wait for the device), see the log",
        );
        return Ok(());
    }
    if reply["reloaded"] != true {
        let why = reply["error"].as_str().unwrap_or("it does not say why");
        return Err(CommandError::NotReloaded(why.to_owned()));
    }
    log.info("the configuration is in force");
    Ok(())
}

/// What the daemon is at and how the last backup went, as text or as JSON.
pub fn status(
    run: &RunDir,
    config: impl FnOnce() -> Config,
    json: bool,
    log: &Logbook,
) -> Result<(String, Outcome), CommandError> {
    let daemon = match control::ask(run, Method::Status) {
        Ok(reply) => Some(reply),
        Err(ControlError::Nobody) => None,
        Err(error) => return Err(error.into()),
    };
    let told = daemon.as_ref().and_then(report::last_of);
    let history = History::new(&config().state_dir).read_in_time();
    // A daemon knows best of the last one; and that there is none is worse.
    let history = history.unwrap_or_else(|error| {
        log.warning(words(&error));
        Vec::new()
    });
    let status = Status::new(daemon.as_ref(), &history, told.as_ref());
    let text = match json {
        true => as_json(&status)?,
        false => status.table(),
    };
    Ok((text, status.outcome()))
}

/// The backups that are remembered, as text or as JSON.
pub fn history(config: &Config, json: bool) -> Result<(String, Outcome), CommandError> {
    let all = History::new(&config.state_dir).read_in_time()?;
    let text = match json {
        true => as_json(&all)?,
        false => report::history(&all),
    };
    Ok((text, report::outcome_of(&all)))
}

/// Draws the backup with this number, counted from the last, as a timeline into a file.
pub fn draw(config: &Config, number: usize, file: &Path) -> Result<(), CommandError> {
    let all = History::new(&config.state_dir).read_in_time()?;
    let entry = all.iter().rev().nth(number.saturating_sub(1));
    let entry = entry.ok_or(CommandError::NotRemembered(number))?;
    let svg = timeline::draw(entry)?;
    std::fs::write(file, svg).map_err(|source| CommandError::Write {
        path: file.to_owned(),
        source,
    })
}

/// What a backup needs, looked at for real short of freezing, as text or as JSON: by the configuration at `path`, or
/// else by that which the daemon that serves goes by.
pub fn check(
    device: &Path,
    run: &RunDir,
    path: Option<&Path>,
    json: bool,
) -> Result<(String, Outcome), CommandError> {
    let all = check::check(device, run, path);
    let text = match json {
        true => as_json(&all)?,
        false => report::check(&all),
    };
    Ok((text, report::outcome_of_check(&all)))
}

fn as_json(what: &impl Serialize) -> Result<String, CommandError> {
    Ok(serde_json::to_string_pretty(what)? + "\n")
}

/// Lets go what somebody who has died has called; whether there was any.
fn let_go_hooks(run: &RunDir, log: &Logbook) -> Result<bool, RecoveryError> {
    let were_there = calls::recover(run, log)?;
    // What could not be called, it has said.
    if were_there && matches!(run.read_hooks(), Ok(None)) {
        log.info("hooks that were called are let go");
    }
    Ok(were_there)
}

/// Thaws whatever an unfinished freeze left frozen: through the daemon that serves, should it be its freeze, and
/// what is on record in `run`.
pub fn thaw(run: &RunDir, log: &Logbook) -> Result<(), CommandError> {
    let mut nothing = true;
    let mut failure = None;
    let mut silent = None;
    let mut last = String::new();
    let meanwhile = |status: &Value| {
        let doing = status["doing"].as_str().or(status["phase"].as_str());
        let doing = doing.unwrap_or_default();
        if doing != last {
            doing.clone_into(&mut last);
            log.info(format!(
                "the daemon that serves has not thawed all yet ({doing}): waiting for it"
            ));
        }
    };
    match control::ask_patiently(run, Method::Thaw, meanwhile) {
        Ok(reply) if reply["thawed"] == true => {
            log.info("the daemon that serves has thawed; its backup fails, or what it rehearses");
            nothing = false;
        }
        Ok(_) | Err(ControlError::Nobody) => {}
        Err(error) => {
            log.warning(words(&error));
            silent = Some(error);
        }
    }
    let mut thawed = recovery::thaw(run, log, By::Operator);
    if matches!(thawed, Ok(Recovered::InUse)) && recovery::owner_has_ended(run) {
        log.warning("the process that had frozen is dead, but inside the kernel: waiting for it to come out");
        // Applications must not wait for that.
        match let_go_hooks(run, log) {
            Ok(were_there) => nothing &= !were_there,
            Err(error) => failure = Some(error.into()),
        }
        thawed = recovery::outlast(run, log);
    }
    match thawed {
        // Of what the module holds there is no record.
        Ok(Recovered::Nothing) => {
            if let Some(error) = silent {
                match control::who_serves(run) {
                    Ok(pid) => failure = Some(CommandError::Silent(pid)),
                    Err(ControlError::Nobody) => {}
                    Err(_) => failure = Some(error.into()),
                }
            }
        }
        Ok(Recovered::CutShort) => {
            log.info("all that was recorded as frozen is thawed");
            nothing = false;
        }
        Ok(Recovered::InUse) => {
            log.warning("thawed under a process that is still there");
            nothing = false;
        }
        // Hooks are let go all the same.
        Err(error) => failure = Some(error.into()),
    }
    match let_go_hooks(run, log) {
        Ok(were_there) => nothing &= !were_there,
        Err(error) => failure = Some(error.into()),
    }
    match failure {
        Some(error) => Err(error),
        None => {
            if nothing {
                log.info("nothing is recorded as frozen");
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logbook::Sink;
    use serde_json::json;

    /// The names of all fields in there.
    fn fields_of(value: &Value, into: &mut BTreeSet<String>) {
        match value {
            Value::Object(all) => {
                for (name, value) in all {
                    into.insert(name.clone());
                    fields_of(value, into);
                }
            }
            Value::Array(all) => all.iter().for_each(|it| fields_of(it, into)),
            _ => {}
        }
    }

    #[test]
    fn the_manual_has_each_field_of_the_json() {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("hv_vss_daemon.8");
        let page = std::fs::read_to_string(page).unwrap();
        let section = page.split(".SH JSON\n").nth(1).unwrap();
        let section = section.split("\n.SH ").next().unwrap();
        let entry = crate::history::tests::example();
        let status = Status::new(None, std::slice::from_ref(&entry), None);
        let finding = check::Finding {
            what: "daemon",
            grade: check::Grade::Ok,
            text: String::new(),
        };
        let row = Row {
            paths: Vec::new(),
            mounts: vec![MountRow {
                namespace: 0,
                path: String::new(),
                whole: true,
            }],
            fs_type: "ext4",
            source: None,
            dev: String::new(),
            disks: Vec::new(),
            wave: Some(1),
            left_out_because: Some(String::new()),
        };
        let listing = Listing {
            frozen: vec![row],
            synced: Vec::new(),
            left_out: Vec::new(),
            idle_rules: BTreeSet::new(),
            partial_rules: Vec::new(),
            disks: vec![DiskRow {
                name: "sda",
                dev: String::new(),
                address: Some(""),
                in_last_backup: Some(true),
                file_systems: Vec::new(),
            }],
            listed_disks_only: false,
        };
        for (command, printed) in [
            ("status", serde_json::to_value(status)),
            ("history", serde_json::to_value([entry])),
            ("check", serde_json::to_value([finding])),
            ("list", serde_json::to_value(listing)),
        ] {
            let its = section.split(&format!(".TP\n.B {command}\n")).nth(1);
            let its = its.unwrap_or_else(|| panic!("JSON has no {command}"));
            let its = its.split(".TP\n").next().unwrap();
            let mut fields = BTreeSet::new();
            fields_of(&printed.unwrap(), &mut fields);
            if command == "status" {
                // That is said of the history.
                fields.retain(|it| ["daemon", "last", "is_remembered"].contains(&it.as_str()));
                assert_eq!(fields.len(), 3);
            }
            let mut words = its.split([' ', '\n', ',', ';', '(', ')']);
            let words: BTreeSet<&str> = words.by_ref().collect();
            for field in fields {
                assert!(
                    words.contains(&*field),
                    "of {field} of {command} nothing is said"
                );
            }
        }
    }

    #[test]
    fn a_rehearsal_whose_look_up_hangs_ends_when_it_is_told_to_or_when_that_takes_too_long() {
        for is_told in [true, false] {
            let mut config = Config::default();
            if !is_told {
                config.prepare = Duration::ZERO;
            }
            let log = Logbook::new(Sink::Memory);
            let setting = Setting {
                config: Arc::new(config),
                log: log.clone(),
                door: Arc::new(crate::fifreeze::Unguarded),
                run: RunDir::new("/dev/null"),
                abort: Arc::default(),
                progress: Arc::default(),
                disks: Vec::new(),
            };
            let stop = Stop::default();
            if is_told {
                stop.stop();
            }
            let (ends, hang) = channel::<()>();
            let step = move |_: &mut Freezer, _: &Setting| Ok(hang.recv());
            let ended = unless_stopped(Freezer::new(), &setting, &stop, step);
            assert!(matches!(ended, Err(JobError::CalledOff)));
            assert!(setting.abort.load(Ordering::SeqCst));
            let says_why =
                |(_, text): &(_, String)| text.contains("takes longer than 0 s (prepare)");
            assert_eq!(log.held().iter().any(says_why), !is_told);
            drop(ends);
            // What does not hang is waited for.
            setting.abort.store(false, Ordering::SeqCst);
            setting.progress.enter(Stage::Syncing, 0);
            let step = |_: &mut Freezer, _: &Setting| Ok(7);
            let done = unless_stopped(Freezer::new(), &setting, &Stop::default(), step);
            assert_eq!(done.map(|(_, it)| it).unwrap(), 7);
        }
    }

    #[test]
    fn without_a_daemon_a_history_that_cannot_be_read_is_the_lesser_evil() {
        let dir = std::env::temp_dir().join(format!("hv-vss-status-{}", std::process::id()));
        // Of what should be a file.
        std::fs::create_dir_all(dir.join("history.jsonl")).unwrap();
        let log = Logbook::new(Sink::Memory);
        let config = || {
            let mut config = Config::default();
            config.state_dir = dir.clone();
            config
        };
        let (text, outcome) = status(&RunDir::new(dir.join("run")), config, false, &log).unwrap();
        assert_eq!(outcome, Outcome::NoDaemon);
        assert!(text.contains("none serves"), "{text}");
        let is_named = |(_, text): &(_, String)| text.contains("history.jsonl");
        assert!(log.held().iter().any(is_named), "{:?}", log.held());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_will_not_be_a_configuration_after_the_backup_is_none_now() {
        let log = Logbook::new(Sink::Memory);
        let bad = || Config::load_in_time(Some("/dev/null/no.toml".as_ref()));
        let later = json!({ "reloaded": false, "later": true });
        let good = || Ok(Config::default());
        assert!(reloaded(&later, good, &log).is_ok());
        let error = reloaded(&later, bad, &log).unwrap_err();
        assert!(matches!(error, CommandError::Config(_)), "{error}");
        // Whoever has read it knows better.
        let now = json!({ "reloaded": true });
        assert!(reloaded(&now, bad, &log).is_ok());
        let refused = json!({ "reloaded": false, "error": "x" });
        assert!(reloaded(&refused, good, &log).is_err());
    }
}
