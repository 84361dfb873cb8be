// SPDX-License-Identifier: GPL-2.0-only

//! What an operator can do by hand: `list`, `freeze --for` and `thaw`.
//!
//! No host takes part. Texts go to standard output, the course of a rehearsal to the log.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::config::Config;
use crate::guard::{Event, Guard, GuardError};
use crate::job::{freeze_all, make_plan, JobError, Setting};
use crate::logbook::Logbook;
use crate::machine::{LookError, Machine, Table};
use crate::open::{open_file_system, OpenError};
use crate::plan::{plan, FileSystem, Plan, Reason};
use crate::record::{Entry, Record, RecordError, RunDir};
use crate::sys;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The machine could not be looked at.
    #[error(transparent)]
    Look(#[from] LookError),
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
    paths: Vec<String>,
    #[serde(rename = "type")]
    fs_type: &'a str,
    source: Option<String>,
    dev: String,
    /// Counted from 1; absent when it is not frozen.
    #[serde(skip_serializing_if = "Option::is_none")]
    wave: Option<usize>,
    /// Whether its type is known to have no means to freeze, so that it is only synced.
    sync_only: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    left_out_because: Option<String>,
}

#[derive(Serialize)]
struct Listing<'a> {
    frozen: Vec<Row<'a>>,
    left_out: Vec<Row<'a>>,
}

/// Types whose superblock has neither hook that FIFREEZE wants (`fs/ioctl.c`), as of Linux 7.3.
const SYNC_ONLY: [&str; 12] = [
    "vfat", "msdos", "exfat", "ntfs3", "fuseblk", "hfs", "hfsplus", "minix", "udf", "ufs", "affs",
    "bfs",
];

fn row<'a>(file_system: &'a FileSystem, wave: Option<usize>, reason: Option<&Reason>) -> Row<'a> {
    let mut paths: Vec<String> = Vec::new();
    for place in &file_system.places {
        let path = place.path.to_string_lossy().into_owned();
        if !paths.contains(&path) && paths.len() < 16 {
            paths.push(path);
        }
    }
    let source = file_system.source.as_ref();
    Row {
        paths,
        fs_type: &file_system.fs_type,
        source: source.map(|s| s.to_string_lossy().into_owned()),
        dev: file_system.dev.to_string(),
        wave,
        sync_only: SYNC_ONLY.contains(&file_system.fs_type.as_str()),
        left_out_because: reason.map(ToString::to_string),
    }
}

/// What would be frozen, in which order, and what would not and why: as text or as JSON.
pub fn list(config: &Config, json: bool) -> Result<String, CommandError> {
    let (_, plan) = make_plan(config)?;
    if json {
        return Ok(serde_json::to_string_pretty(&listing(&plan))? + "\n");
    }
    Ok(as_text(&plan))
}

/// What [`list`] is made from, as JSON: for reports, and for tests of the plan.
pub fn table() -> Result<String, CommandError> {
    Ok(serde_json::to_string_pretty(&Table::record()?)? + "\n")
}

fn listing(plan: &Plan) -> Listing<'_> {
    let frozen = plan.waves.iter().enumerate().flat_map(|(wave, members)| {
        let number = Some(wave + 1);
        members.iter().map(move |f| row(f, number, None))
    });
    let left_out = plan.left_out.iter();
    Listing {
        frozen: frozen.collect(),
        left_out: left_out
            .map(|l| row(&l.file_system, None, Some(&l.reason)))
            .collect(),
    }
}

fn as_text(plan: &Plan) -> String {
    let mut text = String::new();
    for (wave, members) in plan.waves.iter().enumerate() {
        text.push_str(&format!("wave {}\n", wave + 1));
        for file_system in members {
            let sync_only = SYNC_ONLY.contains(&file_system.fs_type.as_str());
            let note = if sync_only {
                ": cannot freeze, synced only"
            } else {
                ""
            };
            text.push_str(&format!("  {file_system}{note}\n"));
        }
    }
    if plan.waves.is_empty() {
        text.push_str("nothing to freeze\n");
    }
    text.push_str("left out\n");
    let mut without_device: Vec<&str> = Vec::new();
    for left in &plan.left_out {
        if left.reason == Reason::NoBlockDevice {
            let fs_type = left.file_system.fs_type.as_str();
            if !without_device.contains(&fs_type) {
                without_device.push(fs_type);
            }
        } else {
            text.push_str(&format!("  {}: {}\n", left.file_system, left.reason));
        }
    }
    if !without_device.is_empty() {
        let types = without_device.join(", ");
        text.push_str(&format!("  {types}: {}\n", Reason::NoBlockDevice));
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
    let guard = Arc::new(Guard::start(&RunDir::new(&config.run_dir))?);
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

/// Thaws whatever the record lists, if its owner is gone; with `force` even if not.
pub fn thaw(config: &Config, log: &Logbook, force: bool) -> Result<Recovered, CommandError> {
    let run = RunDir::new(&config.run_dir);
    let Some(record) = run.read()? else {
        return Ok(Recovered::Nothing);
    };
    let lock = match run.lock() {
        Ok(lock) => Some(lock),
        Err(RecordError::Locked { .. }) if force => None,
        Err(RecordError::Locked { .. }) => return Ok(Recovered::InUse),
        Err(error) => return Err(error.into()),
    };
    let for_host = record.for_host;
    thaw_record(&record, log)?;
    if lock.is_none() {
        // The owner keeps its record; it finds out that it was thawed.
        return Ok(Recovered::InUse);
    }
    run.remove()?;
    Ok(Recovered::CutShort { for_host })
}

fn thaw_record(record: &Record, log: &Logbook) -> Result<(), CommandError> {
    if record.frozen.is_empty() {
        return Ok(());
    }
    let machine = Machine::look()?;
    let everything = plan(&machine.mounts, &machine.topology, &|_| None);
    let mut failed = 0;
    for entry in record.frozen.iter().rev() {
        if let Err(error) = thaw_entry(&machine, &everything, entry, log) {
            log.error(error);
            failed += 1;
        }
    }
    match failed {
        0 => Ok(()),
        count => Err(CommandError::NotThawed(count)),
    }
}

fn thaw_entry(
    machine: &Machine,
    everything: &Plan,
    entry: &Entry,
    log: &Logbook,
) -> Result<(), String> {
    let name = &entry.name;
    let mut mounted = everything.waves.iter().flatten();
    let Some(file_system) = mounted.find(|f| f.dev == entry.dev) else {
        log.warning(format!("{name} is not mounted any more"));
        return Ok(());
    };
    let fd = open_file_system(&machine.ways, file_system).map_err(|e| e.to_string())?;
    match sys::thaw(fd.as_fd()) {
        Ok(()) => log.info(format!("{name} thawed")),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            log.info(format!("{name} is not frozen"));
        }
        Err(e) => return Err(format!("{name} cannot be thawed: {e}")),
    }
    Ok(())
}
