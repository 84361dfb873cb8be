// SPDX-License-Identifier: GPL-2.0-only

//! One freeze from end to end: look, plan, open, sync, freeze, wait, thaw.
//!
//! All of this may take long or hang (a look-up below a dead network mount, a freeze behind a
//! security agent), and the event loop must stay able to answer the host. So for a backup it
//! happens on a thread of its own, a [`Job`], and the loop hears of it through a callback. It knows
//! no host and no frames.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Sender};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use crate::config::Config;
use crate::freeze::{FreezeError, Kernel, Limits, Session, Summary, Target, ThawError};
use crate::guard::{Guard, GuardError};
use crate::logbook::{words, Logbook, Sink};
use crate::machine::{LookError, Machine};
use crate::mounts::DevId;
use crate::open::{open_file_system, OpenError};
use crate::plan::{plan, Plan};
use crate::record::{Entry, Lock, Record, RecordError, RecordFile, RunDir};
use crate::sys;

/// How often the machine is looked at anew when it changed between reading and opening.
const ATTEMPTS: usize = 5;
/// Dirty pages on the whole machine (1 MiB) up to which it counts as clean.
const CLEAN_PAGES: u64 = 256;
/// Enough for the look-ups; everything large is on the heap.
const STACK_BYTES: usize = 256 * 1024;

/// Why a freeze did not come about. Nothing is frozen then.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// What is mounted could not be found out.
    #[error(transparent)]
    Look(#[from] LookError),
    /// A file system could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// No threads.
    #[error("cannot start the threads that freeze")]
    Threads(#[source] io::Error),
    /// Somebody else freezes, or `/run` cannot be used.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Without a guard nothing is frozen.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The freeze itself failed.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
}

/// What a freeze needs to know and to have.
#[derive(Clone)]
pub struct Setting {
    /// What the operator chose.
    pub config: Arc<Config>,
    /// Where to say what happens.
    pub log: Logbook,
    /// Who thaws if this process cannot.
    pub guard: Arc<Guard>,
    /// Whether a host waits, as against a rehearsal.
    pub for_host: bool,
}

/// Makes the plan for the machine as it is.
pub fn make_plan(config: &Config) -> Result<(Machine, Plan), LookError> {
    let machine = Machine::look()?;
    let plan = plan(&machine.mounts, &machine.topology, &|f| config.excludes(f));
    Ok((machine, plan))
}

/// Plans, and opens everything that is to be frozen.
fn gather(config: &Config, log: &Logbook) -> Result<Vec<Target>, JobError> {
    let mut attempt = 1;
    loop {
        let (machine, plan) = make_plan(config)?;
        match open_all(&machine, &plan, config.strict, log) {
            Ok(targets) => return Ok(targets),
            // Something was unmounted meanwhile, most likely.
            Err(_) if attempt < ATTEMPTS => attempt += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

fn open_all(
    machine: &Machine,
    plan: &Plan,
    strict: bool,
    log: &Logbook,
) -> Result<Vec<Target>, OpenError> {
    let mut targets = Vec::new();
    for (wave, members) in plan.waves.iter().enumerate() {
        for file_system in members {
            let name = file_system.to_string();
            match open_file_system(machine, file_system) {
                Ok(fd) => targets.push(Target::new(file_system.dev, name, wave, fd)),
                Err(error) if error.is_broken() && !strict => {
                    log.warning(format!("{error}; it is out of order and left out"));
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(targets)
}

/// A freeze in force, with all that has to be undone after it.
pub struct Frozen {
    session: Session,
    /// How many ended how.
    pub summary: Summary,
    setting: Setting,
    run: RunDir,
    record: RecordFile,
    lock: Option<Lock>,
}

/// Freezes everything that the plan says. The log is held from just before the first freeze.
pub fn freeze_all(setting: &Setting, abort: &Arc<AtomicBool>) -> Result<Frozen, JobError> {
    let Setting {
        config, log, guard, ..
    } = setting;
    let run = RunDir::new(&config.run_dir);
    let lock = run.lock()?;
    let limits = Limits {
        strict: config.strict,
        parallel: config.parallel,
    };
    let foreign_guard = Arc::clone(guard);
    let on_foreign = move |index| {
        // A guard that is gone thaws nothing, so there is nothing it would have to forget.
        let _ = foreign_guard.forget(index);
    };
    let session = Session::new(
        gather(config, log)?,
        Arc::new(Kernel),
        log.clone(),
        limits,
        Arc::clone(abort),
        Box::new(on_foreign),
    )
    .map_err(JobError::Threads)?;
    if is_worth_a_sync() {
        session.sync();
    }
    let record = run.write(&record_of(&session, setting.for_host, |_| true), &lock)?;
    log.hold();
    let frozen = guard
        .arm(
            session.targets(),
            config.deadline,
            &record,
            &lock,
            setting.for_host,
        )
        .map_err(JobError::from)
        .and_then(|()| Ok(session.freeze()?));
    match frozen {
        Ok(summary) => Ok(Frozen {
            session,
            summary,
            setting: setting.clone(),
            run,
            record,
            lock: Some(lock),
        }),
        Err(error) => {
            drop(session);
            clean_up(guard, &run, log);
            Err(error)
        }
    }
}

/// Whether so much is dirty that writing it back beforehand makes the freeze shorter. With little,
/// the freeze writes it as fast, and the sync would only delay it.
fn is_worth_a_sync() -> bool {
    let Ok(text) = std::fs::read_to_string("/proc/vmstat") else {
        return true;
    };
    let pages: u64 = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| matches!(*name, "nr_dirty" | "nr_writeback"))
        .filter_map(|(_, value)| value.parse::<u64>().ok())
        .sum();
    pages > CLEAN_PAGES
}

fn record_of(session: &Session, for_host: bool, listed: fn(&Target) -> bool) -> Record {
    let targets = session.targets().iter().filter(|t| listed(t));
    Record {
        pid: std::process::id(),
        for_host,
        frozen: targets
            .map(|t| Entry {
                dev: t.dev,
                name: t.name.clone(),
            })
            .collect(),
    }
}

/// After the thaw: nothing for the guard to do, nothing for the record to say.
fn clean_up(guard: &Guard, run: &RunDir, log: &Logbook) {
    // A guard that is gone is noticed, and replaced, by whoever watches it.
    let _ = guard.done();
    if let Err(error) = run.remove() {
        log.warning(words(&error));
    }
}

impl Frozen {
    /// Tells the guard that no further freeze follows, and takes from the record what is not
    /// frozen or not ours. Apart from [`freeze_all`] because the host need not wait for it.
    pub fn settle(&self) {
        let Setting {
            guard,
            log,
            for_host,
            ..
        } = &self.setting;
        // A guard that is gone is noticed by whoever watches it.
        let _ = guard.frozen();
        if self.summary.foreign + self.summary.synced == 0 {
            return;
        }
        let ours = record_of(&self.session, *for_host, Target::is_ours);
        if let Err(error) = self.record.rewrite(&ours) {
            log.warning(words(&error));
        }
    }

    /// Thaws what was frozen. Everything is tried, whatever fails. To drop it afterwards takes a
    /// while, which nobody need wait for.
    pub fn thaw(&mut self) -> Result<(), ThawError> {
        let result = self.session.thaw();
        if self.session.targets().iter().any(Target::is_ours) {
            // That stays in the guard's hands and in the record, and nothing else may be frozen
            // beside it: the lock is kept until this process ends.
            std::mem::forget(self.lock.take());
        } else {
            clean_up(&self.setting.guard, &self.run, &self.setting.log);
        }
        result
    }
}

/// Goes once through everything between the first freeze and the last thaw, on a file system that
/// cannot freeze (procfs), so that the pages it takes are in memory and stay there.
pub fn warm_up() -> io::Result<()> {
    let fd = File::open("/proc/self/stat")?;
    let target = Target::new(DevId::default(), "warm-up".into(), 0, fd.into());
    let limits = Limits {
        strict: false,
        parallel: 2,
    };
    let session = Session::new(
        vec![target],
        Arc::new(Kernel),
        Logbook::new(Sink::Memory),
        limits,
        Arc::default(),
        Box::new(|_| {}),
    )?;
    // It fails to freeze anything, which is the point.
    let _ = session.freeze();
    let _ = session.thaw();
    Ok(())
}

/// What the event loop hears from a job.
#[derive(Debug)]
pub enum Outcome {
    /// The freeze has ended, one way or the other. After a failure nothing is frozen and the job
    /// is over.
    Frozen(Result<Summary, JobError>),
    /// The thaw has ended, and with it the job.
    Thawed(Result<(), ThawError>),
}

/// A backup under way.
pub struct Job {
    thaw: Sender<()>,
    abort: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Job {
    /// Starts one. `tell` is called from the job's thread.
    pub fn start(setting: Setting, tell: impl Fn(Outcome) + Send + 'static) -> io::Result<Self> {
        let (thaw, commands) = channel::<()>();
        let abort = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&abort);
        let body = move || match freeze_all(&setting, &flag) {
            Err(error) => tell(Outcome::Frozen(Err(error))),
            Ok(mut frozen) => {
                tell(Outcome::Frozen(Ok(frozen.summary)));
                frozen.settle();
                // Both mean the same: the word to thaw, and the loss of whoever could say it.
                let _ = commands.recv();
                tell(Outcome::Thawed(frozen.thaw()));
            }
        };
        let builder = Builder::new().name("backup".into()).stack_size(STACK_BYTES);
        Ok(Job {
            thaw,
            abort,
            thread: builder.spawn(body)?,
        })
    }

    /// Asks for the thaw of what is frozen.
    pub fn thaw(&self) {
        // A job that is over needs no word.
        let _ = self.thaw.send(());
    }

    /// Calls the freeze off, under way or in force; what is frozen is thawed.
    pub fn abort(&self) {
        self.abort.store(true, Ordering::SeqCst);
        self.thaw();
    }

    /// Waits for the thread of a job that has told its last outcome.
    pub fn join(self) {
        // A panic has already been printed, and dropping the session has thawed.
        let _ = self.thread.join();
        sys::give_back_memory();
    }
}
