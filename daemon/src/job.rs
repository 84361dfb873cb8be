// SPDX-License-Identifier: GPL-2.0-only

//! One backup, on a thread of its own: look, plan, open, sync, freeze, wait, thaw.
//!
//! All of this may take long or hang (a look-up below a dead network mount, a freeze behind a
//! security agent), and the event loop must stay able to answer the host. So it happens here, and
//! the loop hears of it through a callback. It knows no host and no frames.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Sender};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use crate::freeze::{FreezeError, Kernel, Session, Summary, Target, ThawError};
use crate::logbook::Logbook;
use crate::mounts::{self, MountsError};
use crate::open::{open_file_system, OpenError};
use crate::plan::{plan, Plan};
use crate::topology;

/// How often the table is read anew when it changed between reading and opening.
const ATTEMPTS: usize = 5;
/// Enough for the look-ups; everything large is on the heap.
const STACK_BYTES: usize = 256 * 1024;

/// What an operator can choose about a freeze.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Whether a file system that cannot freeze fails the backup.
    pub strict: bool,
    /// How many file systems are worked on at a time.
    pub parallel: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            strict: false,
            parallel: 32,
        }
    }
}

/// Why a backup did not get as far as frozen.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The mount table could not be read.
    #[error(transparent)]
    Mounts(#[from] MountsError),
    /// A file system could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// No threads.
    #[error("cannot start the threads that freeze")]
    Threads(#[source] io::Error),
    /// The freeze itself failed.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
}

/// Reads the machine's state and makes the plan for it.
pub fn make_plan() -> Result<Plan, MountsError> {
    let mounts = mounts::read(Path::new("/proc/self/mountinfo"), 0)?;
    let topology = topology::read(&mounts);
    Ok(plan(&mounts, &topology, &|_| None))
}

/// Plans, and opens everything that is to be frozen.
pub fn prepare(
    settings: &Settings,
    log: &Logbook,
    abort: &Arc<AtomicBool>,
) -> Result<Session, JobError> {
    let mut attempt = 1;
    let targets = loop {
        match open_all(make_plan()?, settings, log) {
            Ok(targets) => break targets,
            Err(_) if attempt < ATTEMPTS => attempt += 1,
            Err(error) => return Err(error.into()),
        }
    };
    Session::new(
        targets,
        Box::new(Kernel),
        log.clone(),
        settings.strict,
        settings.parallel,
        Arc::clone(abort),
    )
    .map_err(JobError::Threads)
}

fn open_all(plan: Plan, settings: &Settings, log: &Logbook) -> Result<Vec<Target>, OpenError> {
    let mut targets = Vec::new();
    for (wave, members) in plan.waves.iter().enumerate() {
        for file_system in members {
            match open_file_system(file_system) {
                Ok(fd) => targets.push(Target::new(file_system.to_string(), wave, fd)),
                Err(error) if error.is_broken() && !settings.strict => {
                    log.warning(format!("{error}; it is out of order and left out"));
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(targets)
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
    pub fn start(
        settings: Settings,
        log: Logbook,
        tell: impl Fn(Outcome) + Send + 'static,
    ) -> io::Result<Self> {
        let (thaw, commands) = channel::<()>();
        let abort = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&abort);
        let body = move || {
            let frozen = prepare(&settings, &log, &flag).and_then(|session| {
                session.sync();
                log.hold();
                let summary = session.freeze()?;
                Ok((session, summary))
            });
            match frozen {
                Err(error) => tell(Outcome::Frozen(Err(error))),
                Ok((session, summary)) => {
                    tell(Outcome::Frozen(Ok(summary)));
                    // Both mean the same: the word to thaw, and the loss of whoever could say it.
                    let _ = commands.recv();
                    tell(Outcome::Thawed(session.thaw()));
                }
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

    /// Calls a freeze off that is still under way; what is frozen by then is thawed.
    pub fn abort(&self) {
        self.abort.store(true, Ordering::SeqCst);
        self.thaw();
    }

    /// Waits for the thread of a job that has told its last outcome.
    pub fn join(self) {
        // A panic has already been printed, and dropping the session has thawed.
        let _ = self.thread.join();
    }
}
