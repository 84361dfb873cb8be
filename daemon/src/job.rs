// SPDX-License-Identifier: GPL-2.0-only

//! One freeze from end to end: look, plan, open, sync, freeze, wait, thaw.
//!
//! All of this may take long or hang (a look-up below a dead network mount, a freeze behind a
//! security agent), and the event loop must stay able to answer the host. So for a backup it
//! happens on a thread of its own, the [`Worker`]'s, and the loop hears of each [`Job`] through a
//! callback. Between backups that thread has a plan ready for the next one. It knows no host and no
//! frames.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use std::thread::Builder;
use std::time::Duration;

use crate::cache::{Cache, GatherError, Gathered, Opened};
use crate::config::Config;
use crate::freeze::{FreezeError, Kernel, Limits, Session, Summary, Target, ThawError};
use crate::guard::{Guard, GuardError};
use crate::logbook::{words, Logbook, Sink};
use crate::mounts::DevId;
use crate::record::{Entry, Lock, Record, RecordError, RecordFile, RunDir};
use crate::sys;

/// Dirty pages on the whole machine (1 MiB) up to which it counts as clean.
const CLEAN_PAGES: u64 = 256;
/// Enough for the look-ups; everything large is on the heap.
const STACK_BYTES: usize = 256 * 1024;

/// Why a freeze did not come about. Nothing is frozen then.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// What is to be frozen could not be had.
    #[error(transparent)]
    Gather(#[from] GatherError),
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

/// What is known, or open, before it is needed.
struct Prepared {
    cache: Cache,
    /// How long the freeze of each file system took the last time.
    usual: BTreeMap<DevId, Duration>,
    /// `/proc/vmstat`.
    vmstat: Option<File>,
}

impl Prepared {
    fn new() -> Self {
        Prepared {
            cache: Cache::default(),
            usual: BTreeMap::new(),
            vmstat: File::open("/proc/vmstat").ok(),
        }
    }

    /// Has the plan for the next backup ready, and says which rules do nothing.
    fn look_over(&mut self, config: &Config, log: &Logbook) {
        // Why there is no plan is said when one is needed.
        for rule in self.cache.prepare(config).unwrap_or_default() {
            log.warning(format!("the rule to {rule} matches no file system"));
        }
    }

    /// Opens everything that is to be frozen, and says what is not.
    fn targets(&mut self, config: &Config, log: &Logbook) -> Result<Vec<Target>, GatherError> {
        let Gathered { targets, missing } = self.cache.gather(config)?;
        for it in missing {
            log.warning(it.to_string());
        }
        let with_usual = |it: Opened| {
            let mut target = Target::new(it.dev, it.name, it.wave, it.fd);
            target.usual = self.usual.get(&target.dev).copied();
            target
        };
        Ok(targets.into_iter().map(with_usual).collect())
    }
}

/// A freeze in force, with all that has to be undone after it.
pub struct Frozen {
    session: Session,
    /// How many ended how.
    pub summary: Summary,
    setting: Setting,
    run: RunDir,
    record: RecordFile,
    lock: Lock,
}

/// Freezes everything that a plan for the machine as it is now says. The log is held from just
/// before the first freeze at the latest.
pub fn freeze_all(setting: &Setting, abort: &Arc<AtomicBool>) -> Result<Frozen, JobError> {
    freeze_prepared(setting, abort, &mut Prepared::new())
}

fn freeze_prepared(
    setting: &Setting,
    abort: &Arc<AtomicBool>,
    prepared: &mut Prepared,
) -> Result<Frozen, JobError> {
    let Setting {
        config, log, guard, ..
    } = setting;
    let run = RunDir::new(&config.run_dir);
    let lock = run.lock()?;
    let limits = Limits {
        strict: config.strict,
        parallel: config.parallel,
        write_back: config.write_back,
    };
    let foreign_guard = Arc::clone(guard);
    let on_foreign = move |index| {
        // A guard that is gone thaws nothing, so there is nothing it would have to forget.
        let _ = foreign_guard.forget(index);
    };
    let session = Session::new(
        prepared.targets(config, log)?,
        Arc::new(Kernel),
        log.clone(),
        limits,
        Arc::clone(abort),
        Box::new(on_foreign),
    )
    .map_err(JobError::Threads)?;
    if is_worth_a_sync(prepared) {
        // It may take long, and nothing is frozen yet.
        log.release();
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
            lock,
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
fn is_worth_a_sync(prepared: &Prepared) -> bool {
    // The kernel makes up as much of the text as is read, and both counters stand near its beginning.
    let mut text = [0; 1024];
    let vmstat = prepared.vmstat.as_ref();
    let read = vmstat.and_then(|file| file.read_at(&mut text, 0).ok());
    let text = text.get(..read.unwrap_or(0)).unwrap_or_default();
    dirty_pages(text).is_none_or(|pages| pages > CLEAN_PAGES)
}

/// Pages that are to be written back or being so, from (the beginning of) `/proc/vmstat`.
fn dirty_pages(vmstat: &[u8]) -> Option<u64> {
    let counter = |name: &str| {
        let mut lines = vmstat.split(|&b| b == b'\n');
        let value = lines.find_map(|line| {
            let line = std::str::from_utf8(line).ok()?;
            line.strip_prefix(name)?.strip_prefix(' ')
        });
        value?.parse::<u64>().ok()
    };
    counter("nr_dirty")?.checked_add(counter("nr_writeback")?)
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

    /// Thaws what was frozen. Everything is tried, whatever fails. [`Frozen::tidy`] is to follow.
    pub fn thaw(&self) -> Result<(), ThawError> {
        self.session.thaw()
    }

    /// Gives up what is needed only as long as anything is frozen: the guard's part, the record, the
    /// lock. It takes a while, which nobody need wait for.
    pub fn tidy(self) {
        if self.session.targets().iter().any(Target::is_ours) {
            // That stays in the guard's hands and in the record, and nothing else may be frozen
            // beside it: the lock is kept until this process ends.
            std::mem::forget(self.lock);
        } else {
            clean_up(&self.setting.guard, &self.run, &self.setting.log);
        }
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
        write_back: 2,
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

/// The thread on which backups happen, one after the other. It lives as long as the process: a thread
/// takes longer to start than a clean file system to freeze.
pub struct Worker {
    orders: Sender<Order>,
}

enum Order {
    Prepare(Arc<Config>, Logbook),
    Backup(Box<Backup>),
}

/// What the event loop tells the worker of a backup under way.
enum Word {
    /// The host has its answer: [`Frozen::settle`].
    Settle,
    Thaw,
}

struct Backup {
    setting: Setting,
    abort: Arc<AtomicBool>,
    words: Receiver<Word>,
    /// Dropped when nothing more is to be done for it.
    over: Sender<()>,
    tell: Box<dyn Fn(Outcome) + Send>,
}

impl Worker {
    /// Starts it.
    pub fn start() -> io::Result<Self> {
        let (sender, orders) = channel();
        let body = move || {
            let mut prepared = Prepared::new();
            while let Ok(order) = orders.recv() {
                match order {
                    Order::Prepare(config, log) => prepared.look_over(&config, &log),
                    Order::Backup(backup) => backup.run(&mut prepared),
                }
            }
        };
        let builder = Builder::new().name("backup".into()).stack_size(STACK_BYTES);
        builder.spawn(body)?;
        Ok(Worker { orders: sender })
    }

    /// Has a plan made for the next backup, unless the last one still holds.
    pub fn prepare(&self, config: &Arc<Config>, log: &Logbook) {
        // Without a worker the next backup fails, and that is where it is said.
        let order = Order::Prepare(Arc::clone(config), log.clone());
        let _ = self.orders.send(order);
    }

    /// Begins a backup. `tell` is called from the worker's thread. `None` when that has died.
    pub fn begin(&self, setting: Setting, tell: impl Fn(Outcome) + Send + 'static) -> Option<Job> {
        let (speaker, words) = channel();
        let (sender, over) = channel();
        let abort = Arc::new(AtomicBool::new(false));
        let backup = Backup {
            setting,
            abort: Arc::clone(&abort),
            words,
            over: sender,
            tell: Box::new(tell),
        };
        self.orders.send(Order::Backup(Box::new(backup))).ok()?;
        Some(Job {
            speaker,
            abort,
            over,
        })
    }
}

impl Backup {
    fn run(self, prepared: &mut Prepared) {
        match freeze_prepared(&self.setting, &self.abort, prepared) {
            Err(error) => (self.tell)(Outcome::Frozen(Err(error))),
            Ok(frozen) => {
                (self.tell)(Outcome::Frozen(Ok(frozen.summary)));
                // The loss of whoever could say it means the same as the word to thaw.
                while let Ok(Word::Settle) = self.words.recv() {
                    frozen.settle();
                }
                (self.tell)(Outcome::Thawed(frozen.thaw()));
                let targets = frozen.session.targets().iter();
                prepared.usual = targets.filter_map(|t| Some((t.dev, t.took()?))).collect();
                frozen.tidy();
            }
        }
        drop(self.over);
    }
}

/// A backup under way.
pub struct Job {
    speaker: Sender<Word>,
    abort: Arc<AtomicBool>,
    over: Receiver<()>,
}

impl Job {
    /// Says that the host knows of the freeze, and that there is time to do what it need not wait for.
    pub fn settle(&self) {
        self.say(Word::Settle);
    }

    /// Asks for the thaw of what is frozen.
    pub fn thaw(&self) {
        self.say(Word::Thaw);
    }

    fn say(&self, word: Word) {
        // A job that is over needs no word.
        let _ = self.speaker.send(word);
    }

    /// Calls the freeze off, under way or in force; what is frozen is thawed.
    pub fn abort(&self) {
        self.abort.store(true, Ordering::SeqCst);
        self.thaw();
    }

    /// Waits for the end of a job that has told its last outcome.
    pub fn join(self) {
        // Nothing is ever said there; it closes.
        let _ = self.over.recv();
        sys::give_back_memory();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirty_pages_are_those_to_be_written_and_those_being_written() {
        let text = b"nr_free_pages 9\nnr_dirty 300\nnr_writeback 7\nnr_writeback_temp 50\n";
        assert_eq!(dirty_pages(text), Some(307));
        assert_eq!(dirty_pages(b"nr_dirty 300\nnr_dirty_threshold 1\n"), None);
    }
}
