// SPDX-License-Identifier: GPL-2.0-only

//! What an operator can do by hand: `list`, `freeze --for` and `thaw`.
//!
//! No host takes part. Texts go to standard output, the course of a rehearsal to the log.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Sender};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::cache::{survey, GatherError};
use crate::config::Config;
use crate::guard::{Event, Guard, GuardError};
use crate::job::{freeze_all, JobError, Setting};
use crate::logbook::Logbook;
use crate::machine::{LookError, Machine, Table};
use crate::mounts;
use crate::open::{open_file_system, OpenError};
use crate::plan::{plan, FileSystem, Place, Plan, Reason};
use crate::process;
use crate::record::{Entry, Record, RecordError, RunDir};
use crate::sys;

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
    /// The guard ended the rehearsal.
    #[error("the rehearsal was ended by its guard: {0}")]
    Ended(&'static str),
    /// Record or lock cannot be used.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A frozen file system cannot be reached.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Some could not be thawed; which ones has been said.
    #[error("{0} file systems could not be thawed")]
    NotThawed(usize),
    /// The list cannot be written.
    #[error("cannot write the list")]
    Json(#[from] serde_json::Error),
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

#[derive(Serialize)]
struct Listing<'a> {
    frozen: Vec<Row<'a>>,
    /// What has no means to freeze.
    synced: Vec<Row<'a>>,
    left_out: Vec<Row<'a>>,
    /// Rules of the configuration that match nothing.
    idle_rules: BTreeSet<String>,
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

fn row<'a>(file_system: &'a FileSystem, wave: Option<usize>, reason: Option<&Reason>) -> Row<'a> {
    let mount = |place: &Place| MountRow {
        namespace: place.namespace,
        path: text_of(place.path.as_os_str().as_bytes()),
        whole: place.whole,
    };
    let mounts: Vec<MountRow> = file_system.places.iter().map(mount).collect();
    let mut seen = BTreeSet::new();
    let paths = mounts.iter().map(|it| &it.path);
    let source = file_system.source.as_ref();
    Row {
        paths: paths.filter(|it| seen.insert(*it)).cloned().collect(),
        mounts,
        fs_type: &file_system.fs_type,
        source: source.map(|it| text_of(it.as_bytes())),
        dev: file_system.dev.to_string(),
        wave,
        left_out_because: reason.map(ToString::to_string),
    }
}

/// What would be frozen, in which order, and what would not and why: as text or as JSON. Everything
/// is opened as for a backup, so that what cannot be reached is known.
pub fn list(config: &Config, json: bool) -> Result<String, CommandError> {
    let plan = survey(config)?;
    let idle_rules = config.idle_rules(&plan);
    if json {
        return Ok(serde_json::to_string_pretty(&listing(&plan, idle_rules))? + "\n");
    }
    Ok(as_text(&plan, &idle_rules))
}

/// What [`list`] is made from, as JSON: for reports, and for tests of the plan.
pub fn table() -> Result<String, CommandError> {
    Ok(serde_json::to_string_pretty(&Table::record()?)? + "\n")
}

fn listing(plan: &Plan, idle_rules: BTreeSet<String>) -> Listing<'_> {
    let frozen = plan.waves.iter().enumerate().flat_map(|(wave, members)| {
        let number = Some(wave + 1);
        members.iter().map(move |f| row(f, number, None))
    });
    let left_out = plan.left_out.iter();
    Listing {
        frozen: frozen.collect(),
        synced: plan.synced.iter().map(|f| row(f, None, None)).collect(),
        left_out: left_out
            .map(|l| row(&l.file_system, None, Some(&l.reason)))
            .collect(),
        idle_rules,
    }
}

fn as_text(plan: &Plan, idle_rules: &BTreeSet<String>) -> String {
    let mut text = String::new();
    for (wave, members) in plan.waves.iter().enumerate() {
        text.push_str(&format!("wave {}\n", wave + 1));
        for file_system in members {
            text.push_str(&format!("  {file_system}\n"));
        }
    }
    if plan.waves.is_empty() {
        text.push_str("nothing to freeze\n");
    }
    if !plan.synced.is_empty() {
        text.push_str("synced, without means to freeze\n");
    }
    for file_system in &plan.synced {
        text.push_str(&format!("  {file_system}\n"));
    }
    text.push_str("left out\n");
    for left in &plan.left_out {
        text.push_str(&format!("  {}: {}\n", left.file_system, left.reason));
    }
    if !idle_rules.is_empty() {
        text.push_str("rules that match nothing\n");
    }
    for rule in idle_rules {
        text.push_str(&format!("  {rule}\n"));
    }
    text
}

/// A rehearsal: freezes as for a backup, stays frozen for `time`, thaws. Sends `stop` to end early.
pub fn freeze_for(
    config: Config,
    log: &Logbook,
    time: Duration,
    stop: &Stop,
) -> Result<(), CommandError> {
    let run = RunDir::new(&config.run_dir);
    run.check()?;
    let guard = Arc::new(Guard::start(&run)?);
    let setting = Setting {
        config: Arc::new(config),
        log: log.clone(),
        guard: Arc::clone(&guard),
        for_host: false,
    };
    let abort = Arc::new(AtomicBool::new(false));
    log.begin_backup(0, Instant::now());
    let result = rehearse(&setting, &abort, time, stop);
    log.end_backup();
    log.release();
    result
}

fn rehearse(
    setting: &Setting,
    abort: &Arc<AtomicBool>,
    time: Duration,
    stop: &Stop,
) -> Result<(), CommandError> {
    let frozen = freeze_all(setting, abort)?;
    frozen.settle();
    let end = Instant::now() + time;
    let event = loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || stop.wait(left.min(Duration::from_millis(100))) {
            break None;
        }
        match setting.guard.event() {
            None => {}
            event => break event,
        }
    };
    if event.is_some() {
        // From here on an early thaw is no surprise.
        abort.store(true, Ordering::SeqCst);
    }
    let thawed = frozen.thaw();
    frozen.tidy();
    thawed?;
    match event {
        None => Ok(()),
        Some(Event::Overdue) => Err(CommandError::Ended("the deadline passed")),
        Some(Event::Died) => Err(CommandError::Ended("it died")),
    }
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

/// What came of the record of an earlier freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovered {
    /// There was none: no freeze was cut short.
    Nothing,
    /// One was cut short; nothing of it is frozen any more.
    CutShort {
        /// Whether a host waited for it, whose THAW must now fail.
        for_host: bool,
    },
    /// Whoever froze is still alive, and the record is theirs.
    InUse,
}

/// Who thaws what a record lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// An operator, or the stop step of the service: whoever else is at it. A host that waits has
    /// yet to be told, which is left to the next start.
    Operator,
    /// A daemon that starts: unless the owner lives, for that one thaws by itself.
    Start,
    /// The same daemon later, while a dead owner is still inside the kernel: only when that is over.
    Later,
}

/// Thaws whatever the record lists. Does not return before all of it is thawed, however long that
/// takes the kernel; what hangs holds up nothing else.
pub fn thaw(config: &Config, log: &Logbook, by: By) -> Result<Recovered, CommandError> {
    let run = RunDir::new(&config.run_dir);
    let Some(record) = run.read()? else {
        return Ok(Recovered::Nothing);
    };
    let for_host = record.for_host;
    match run.lock() {
        Ok(lock) => {
            thaw_record(&record, log)?;
            if by == By::Operator && for_host {
                run.empty(&lock)?;
            } else {
                run.remove()?;
            }
            Ok(Recovered::CutShort { for_host })
        }
        // The owner keeps its record; it finds out that it was thawed.
        Err(RecordError::Locked { .. }) => {
            let allowed = match by {
                By::Operator => true,
                By::Start => has_ended(record.pid),
                By::Later => false,
            };
            if allowed {
                thaw_record(&record, log)?;
            }
            Ok(Recovered::InUse)
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether a freeze is on record whose owner has ended, though it may still be inside the kernel.
pub fn owner_has_ended(config: &Config) -> bool {
    let record = RunDir::new(&config.run_dir).read();
    matches!(record, Ok(Some(record)) if has_ended(record.pid))
}

fn has_ended(pid: u32) -> bool {
    std::fs::read(format!("/proc/{pid}/stat")).map_or(true, |stat| process::has_ended(&stat))
}

/// How long one that hangs may hold up the next.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long those that hang may take in the end.
const LIMIT: Duration = Duration::from_secs(10);

/// What came of one thaw: its name and what the kernel said.
type Thawed = (String, io::Result<()>);

fn thaw_record(record: &Record, log: &Logbook) -> Result<(), CommandError> {
    if record.frozen.is_empty() {
        return Ok(());
    }
    let machine = Machine::look()?;
    let everything = plan(&machine.mounts, &machine.topology, &|_| None);
    let (tell, told) = channel();
    let mut under_way = Vec::new();
    let mut failed = 0;
    let mut over = |(name, result): Thawed, under_way: &mut Vec<String>| {
        under_way.retain(|it| *it != name);
        match result {
            Ok(()) => log.info(format!("{name} thawed")),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                log.info(format!("{name} is not frozen"));
            }
            Err(e) => {
                log.error(format!("{name} cannot be thawed: {e}"));
                failed += 1;
            }
        }
    };
    for entry in record.frozen.iter().rev() {
        let name = entry.name.clone();
        match open_entry(&machine, &everything, entry) {
            Ok(Some(fd)) => {
                under_way.push(name.clone());
                if let Err(error) = start_thaw(name.clone(), fd, tell.clone()) {
                    over((name, Err(error)), &mut under_way);
                } else if let Ok(thawed) = told.recv_timeout(PATIENCE) {
                    over(thawed, &mut under_way);
                }
            }
            Ok(None) => log.warning(format!("{name} is not mounted any more")),
            Err(error) => over((name, Err(io::Error::other(error))), &mut under_way),
        }
    }
    let until = Instant::now() + LIMIT;
    while !under_way.is_empty() {
        match told.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(thawed) => over(thawed, &mut under_way),
            Err(_) => break,
        }
    }
    for name in &under_way {
        log.error(format!(
            "{name} hangs in the kernel and is thawed when that ends"
        ));
    }
    match failed + under_way.len() {
        0 => Ok(()),
        count => Err(CommandError::NotThawed(count)),
    }
}

/// Opens what a record lists; `None` when it is not mounted any more.
fn open_entry(
    machine: &Machine,
    everything: &Plan,
    entry: &Entry,
) -> Result<Option<OwnedFd>, OpenError> {
    let file_system = everything.file_systems().find(|f| f.dev == entry.dev);
    file_system
        .map(|it| open_file_system(&machine.ways, it))
        .transpose()
}

/// Thaws on a thread of its own, which may hang: behind a freeze that does, for one.
fn start_thaw(name: String, fd: OwnedFd, tell: Sender<Thawed>) -> io::Result<()> {
    let thaw = move || {
        // Nobody listens any more when it took too long.
        let _ = tell.send((name, sys::thaw(fd.as_fd())));
    };
    thread::Builder::new().spawn(thaw).map(drop)
}
