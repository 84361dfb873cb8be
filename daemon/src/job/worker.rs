// SPDX-License-Identifier: GPL-2.0-only

//! The thread on which backups happen, and what the event loop has of it: orders, words and outcomes.
//!
//! Between backups that thread has a plan ready for the next one. Beside it are two for what takes long and is no freeze.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, sync_channel, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::Arc;
use std::thread::Builder;
use std::time::{Duration, Instant};

use nix::unistd::{gettid, Pid};

use super::{Account, Freezer, Frozen, JobError, Setting, Shown, STACK_BYTES};
use crate::backup::Begun;
use crate::calls::Context;
use crate::clock::boot_time;
use crate::config::Config;
use crate::freeze::ThawError;
use crate::hooks::Found;
use crate::logbook::{Held, Logbook};
use crate::process;
use crate::progress::{Progress, Stage};
use crate::record::RunDir;
use crate::sys;

/// How long whoever freezes may take to say whether something has come: a moment, as a rule.
const ASIDE: Duration = Duration::from_secs(1);
const LATER_STACK_BYTES: usize = 128 * 1024;
/// What may wait for a disk. It is more only when that hangs.
const MOST_LATER: usize = 16;

/// What the event loop hears from a job.
#[derive(Debug)]
pub enum Outcome {
    /// There are hooks to be called first. It waits for [`Job::go_on`].
    Hooks(Vec<Found>, Context),
    /// The freeze has ended, one way or the other. After a failure nothing is frozen and the job
    /// is over.
    Frozen(Result<Begun, JobError>),
    /// Others have thawed these.
    Lost(Vec<String>),
    /// The thaw has ended, and with it the job; what has come of it.
    Thawed(Result<(), ThawError>, Account),
}

/// The thread on which backups happen, one after the other. It lives as long as the process: a thread
/// takes longer to start than a clean file system to freeze.
pub struct Worker {
    thread: Pid,
    /// Whether that looks over the plan for the next one, by turns with all others.
    is_at_a_plan: Arc<AtomicBool>,
    orders: Sender<Order>,
    /// To a thread of its own: a disk may hang, or be frozen by somebody else for as long as they like, and
    /// no backup waits for that.
    later: SyncSender<Look>,
    /// To another one, if it was ever needed: what is asked of it may cure what the first one hangs in. It has the
    /// descriptors of all, and so must not hang itself.
    aside: Option<SyncSender<Then>>,
    shown: Shown,
}

/// What needs a disk; what it returns is to be done then.
type Look = Box<dyn FnOnce() -> Then + Send>;
type Then = Box<dyn FnOnce() + Send>;

enum Order {
    Prepare(Arc<Config>, Logbook),
    Undo(RunDir, Logbook, Then),
    Do(Then),
    Backup(Box<Backup>),
}

/// What the host says of a backup, or whoever rehearses one.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// The number of its FREEZE.
    pub request: u64,
    /// Its kind, in the host's own number.
    pub backup_type: Option<u32>,
    /// No hooks are called: it is a rehearsal of the freeze alone.
    pub without_hooks: bool,
}

/// What the event loop tells the worker of a backup under way.
enum Word {
    /// All hooks are ready.
    GoOn,
    /// The host has its answer: [`Frozen::settle`].
    Settle,
    /// Whether something has come that is not frozen is to be said there.
    HasNews(Sender<bool>),
    /// What hangs in its thaw is left by then, if that is to be.
    Thaw(Option<Instant>),
}

struct Backup {
    setting: Setting,
    /// What the host says of it.
    about: About,
    words: Receiver<Word>,
    /// Dropped when nothing more is to be done for it.
    over: Sender<()>,
    tell: Box<dyn Fn(Outcome) + Send>,
}

impl Worker {
    /// Starts it.
    pub fn start() -> io::Result<Self> {
        let (sender, orders) = channel();
        let (begin, begun) = channel();
        let is_at_a_plan = Arc::new(AtomicBool::new(false));
        let its_plan = Arc::clone(&is_at_a_plan);
        let shown = Shown::default();
        let its = shown.clone();
        let body = move || {
            let mut freezer = Freezer::new();
            freezer.shown = its;
            let _ = begin.send(gettid());
            let at_a_plan = its_plan;
            let mut next: Option<Order> = None;
            while let Some(order) = next.take().or_else(|| orders.recv().ok()) {
                match order {
                    Order::Prepare(config, log) => {
                        // Nobody waits for that. In a backup the host does, and then others for what is
                        // frozen: this thread goes first there, with those that it starts, where it may.
                        let _ = process::go_along();
                        // In this order: whoever sends one that is not seen here sees this.
                        at_a_plan.store(true, Ordering::SeqCst);
                        next = orders.try_recv().ok();
                        // A backup looks over what it needs, and has it done again.
                        if !matches!(next, Some(Order::Backup(_))) {
                            freezer.look_over(&config, &log);
                        }
                        at_a_plan.store(false, Ordering::SeqCst);
                        let _ = process::go_first();
                    }
                    Order::Undo(run, log, then) => {
                        freezer.undo(&run, &log);
                        then();
                    }
                    Order::Do(then) => then(),
                    Order::Backup(backup) => backup.run(&mut freezer),
                }
            }
        };
        let builder = Builder::new().name("backup".into()).stack_size(STACK_BYTES);
        builder.spawn(body)?;
        let thread = begun.recv().map_err(io::Error::other)?;
        let orders = sender.clone();
        let look = move |look: Look| {
            // Without a worker nobody is left to tell.
            let _ = orders.send(Order::Do(look()));
        };
        let later = Self::line("later", true, look)?;
        Ok(Worker {
            thread,
            is_at_a_plan,
            orders: sender,
            later,
            aside: None,
            shown,
        })
    }

    /// To a new thread that does this with each.
    fn line<T: Send + 'static>(
        name: &str,
        may_hang: bool,
        each: impl Fn(T) + Send + 'static,
    ) -> io::Result<SyncSender<T>> {
        let (sender, all) = sync_channel(MOST_LATER);
        let body = move || {
            let _ = process::go_along();
            // Standard input is nothing of ours. Should it hang when the process dies, and be it behind a
            // freeze of ours, all else is closed; where the kernel cannot do that, it is as before.
            let _kept = may_hang.then(|| sys::keep_only(0));
            all.into_iter().for_each(each);
        };
        let builder = Builder::new().name(name.into());
        builder.stack_size(LATER_STACK_BYTES).spawn(body)?;
        Ok(sender)
    }

    /// Has a plan made for the next backup, unless the last one still holds.
    pub fn prepare(&self, config: &Arc<Config>, log: &Logbook) {
        // Without a worker the next backup fails, and that is where it is said.
        let order = Order::Prepare(Arc::clone(config), log.clone());
        let _ = self.orders.send(order);
    }

    /// Names what hangs, and why backups are without it, as far as the last one, or a rehearsal, has seen.
    pub fn given_up(&self) -> Vec<String> {
        let seen = self.shown.seen();
        let all = seen.given_up.iter().filter(|it| it.lasts());
        all.map(ToString::to_string).collect()
    }

    /// The numbers of what has turned read-only, perhaps since an error, as far as the plan for the next backup has it.
    pub fn turned(&self) -> Vec<String> {
        let seen = self.shown.seen();
        seen.turned.iter().map(ToString::to_string).collect()
    }

    /// Has undone what somebody has left frozen in `run` who has died, and `then` done, whatever came of it.
    pub fn undo(&self, run: &RunDir, log: &Logbook, then: impl FnOnce() + Send + 'static) {
        let order = Order::Undo(run.clone(), log.clone(), Box::new(then));
        // Without a worker the next backup fails, and that is where it is said.
        let _ = self.orders.send(order);
    }

    /// Has `look`, which needs a disk and no descriptor that is open already, done when that can be had, and
    /// `then`, which needs none, when no backup is under way. False when too much waits already.
    pub fn later<T: Send + 'static>(
        &self,
        look: impl FnOnce() -> T + Send + 'static,
        then: impl FnOnce(T) + Send + 'static,
    ) -> bool {
        let look: Look = Box::new(|| {
            let seen = look();
            Box::new(move || then(seen))
        });
        self.later.try_send(look).is_ok()
    }

    /// Has `step` done, which ends in time whatever it needs: at once, whatever [`Worker::later`] or this hangs in, and also
    /// while a backup is under way. False when too much waits already.
    pub fn aside(&mut self, step: impl FnOnce() + Send + 'static) -> bool {
        if self.aside.is_none() {
            self.aside = Self::line("aside", false, |step: Then| step()).ok();
        }
        let aside = self.aside.as_ref();
        aside.is_some_and(|it| it.try_send(Box::new(step)).is_ok())
    }

    /// Begins a backup, for which the log is held. `tell` is called from the worker's thread. `None`
    /// when that has died.
    pub fn begin(
        &self,
        setting: Setting,
        about: About,
        held: Held,
        tell: impl Fn(Outcome) + Send + 'static,
    ) -> Option<Job> {
        let (speaker, words) = channel();
        let (sender, over) = channel();
        let backup = Backup {
            setting: setting.clone(),
            about,
            words,
            over: sender,
            tell: Box::new(tell),
        };
        self.orders.send(Order::Backup(Box::new(backup))).ok()?;
        if self.is_at_a_plan.load(Ordering::SeqCst) {
            process::have_go_first(self.thread, true);
        }
        Some(Job {
            setting,
            speaker,
            over,
            held,
        })
    }
}

impl Backup {
    fn run(self, freezer: &mut Freezer) {
        freezer.learnt.begin();
        // What is frozen would hold up hooks.
        freezer.undo(&self.setting.run, &self.setting.log);
        let quiesced = self.quiesce(freezer);
        let frozen = quiesced.and_then(|warnings| Ok((freezer.freeze(&self.setting)?, warnings)));
        let counters = match frozen {
            Err(error) => {
                (self.tell)(Outcome::Frozen(Err(error)));
                None
            }
            Ok((mut frozen, warnings)) => {
                frozen.warnings.extend(warnings);
                (self.tell)(Outcome::Frozen(Ok(frozen.begun())));
                let by = self.wait(&frozen, freezer);
                let result = freezer.thaw(&mut frozen, &self.setting, by);
                (self.tell)(Outcome::Thawed(result, frozen.account()));
                Some(frozen.tidy())
            }
        };
        let Backup { setting, over, .. } = self;
        let log = setting.log.clone();
        // The door is closed before anybody hears that it is over.
        drop(setting);
        drop(over);
        if let Some(counters) = counters {
            counters.say(&log);
        }
    }

    /// Has the hooks called, if there are any, and waits until they are ready. Returns the warnings of those that are
    /// not called.
    fn quiesce(&self, freezer: &mut Freezer) -> Result<Vec<String>, JobError> {
        let (to_call, warnings) = freezer.hooks(&self.setting, &self.about)?;
        let Some((found, context)) = to_call else {
            return Ok(warnings);
        };
        (self.tell)(Outcome::Hooks(found, context));
        match self.words.recv() {
            Ok(Word::GoOn) => {
                self.setting.progress.enter(Stage::Looking, 0);
                Ok(warnings)
            }
            _ => Err(JobError::CalledOff),
        }
    }

    /// Waits for the word to thaw. Returns by when what hangs in that is to be left.
    fn wait(&self, frozen: &Frozen, freezer: &mut Freezer) -> Option<Instant> {
        let every = self.setting.door.watched_every();
        // At the deadline the guard thaws, and that must be that: also for whoever was stopped or asleep until then.
        let until = frozen.session.armed_at() + self.setting.config.deadline;
        let until = boot_time() + until.saturating_duration_since(Instant::now());
        loop {
            let watched = every.filter(|pause| boot_time() + *pause * 4 < until);
            let word = match watched {
                None => self
                    .words
                    .recv()
                    .map_err(|_| RecvTimeoutError::Disconnected),
                Some(pause) => self.words.recv_timeout(pause),
            };
            match word {
                Ok(Word::Settle) => frozen.settle(),
                // Who asked may have gone on without it.
                Ok(Word::HasNews(tell)) => drop(tell.send(freezer.has_news(frozen))),
                // Nobody says that twice.
                Ok(Word::GoOn) => {}
                // The loss of whoever could say it means the same as the word to thaw.
                Err(RecvTimeoutError::Disconnected) => return None,
                Ok(Word::Thaw(by)) => return by,
                Err(RecvTimeoutError::Timeout) if boot_time() >= until => {}
                Err(RecvTimeoutError::Timeout) => {
                    let lost = frozen.look_after();
                    if !lost.is_empty() {
                        (self.tell)(Outcome::Lost(lost));
                    }
                }
            }
        }
    }
}

/// A backup under way. The log is held until this is gone.
pub struct Job {
    setting: Setting,
    speaker: Sender<Word>,
    over: Receiver<()>,
    held: Held,
}

impl Job {
    /// Says that all hooks are ready.
    pub fn go_on(&self) {
        self.say(Word::GoOn);
    }

    /// Says that the host knows of the freeze, and that there is time to do what it need not wait for.
    pub fn settle(&self) {
        // Where nobody else can thaw there is nothing to do, and nobody is woken for it: writers wait.
        if self.setting.door.watched_every().is_some() {
            self.say(Word::Settle);
        }
    }

    /// Asks for the thaw of what is frozen, of which what hangs is left by then.
    pub fn thaw(&self, by: Option<Instant>) {
        // At once: whoever is to hear the word may be at a look, and the deadline near.
        self.setting.door.thaw_begins();
        self.say(Word::Thaw(by));
    }

    fn say(&self, word: Word) {
        // A job that is over needs no word.
        let _ = self.speaker.send(word);
    }

    /// Whether it has all frozen, now that it is in force, that a backup of these disks asks for; none are
    /// all that there are.
    pub fn covers(&self, disks: &[String]) -> bool {
        let Setting {
            config, disks: its, ..
        } = &self.setting;
        let mut disks = disks.iter();
        let covers = !config.listed_disks_only
            || its.is_empty()
            || (disks.len() > 0 && disks.all(|disk| its.contains(disk)));
        covers && !self.has_news()
    }

    /// Whether something has come that is not frozen. Where nobody says so in time, THAW will.
    fn has_news(&self) -> bool {
        let (tell, told) = channel();
        self.say(Word::HasNews(tell));
        told.recv_timeout(ASIDE).unwrap_or(false)
    }

    /// Why it is to be called off.
    pub fn stuck(&self, now: Instant) -> Option<String> {
        self.setting.stuck(now)
    }

    /// What it is at.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.setting.progress
    }

    /// Calls the freeze off, under way or in force; what is frozen is thawed.
    pub fn call_off(&self) {
        self.setting.call_off(Instant::now());
        self.say(Word::Thaw(None));
    }

    /// Waits for the end of a job that has told its last outcome.
    pub fn join(self) {
        // Nothing is ever said there; it closes.
        let _ = self.over.recv();
        drop(self.held);
        sys::give_back_memory();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Longer than any step of a test takes.
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn what_hangs_on_a_disk_holds_up_only_what_needs_one_as_well_and_keeps_nothing_open() {
        let mut worker = Worker::start().unwrap();
        let (tell, told) = channel();
        let (release, hang) = channel::<()>();
        let begun = tell.clone();
        let look = move || {
            // With the one by which they are counted.
            let open = std::fs::read_dir("/proc/thread-self/fd").map(Iterator::count);
            begun.send(open.unwrap()).unwrap();
            let _ = hang.recv();
        };
        assert!(worker.later(look, drop));
        assert_eq!(told.recv_timeout(LONG), Ok(2));
        let taken = (10..).take_while(|number| {
            let (tell, number) = (tell.clone(), *number);
            worker.later(move || number, move |it| tell.send(it).unwrap())
        });
        assert_eq!(taken.count(), MOST_LATER);
        // What may be the cure does not wait.
        let cure = tell.clone();
        assert!(worker.aside(move || cure.send(1).unwrap()));
        assert_eq!(told.recv_timeout(LONG), Ok(1));
        // The thread that freezes does not wait.
        let again = tell.clone();
        let done = Order::Do(Box::new(move || tell.send(0).unwrap()));
        worker.orders.send(done).unwrap();
        assert_eq!(told.recv_timeout(LONG), Ok(0));
        // Nor does the cure wait for that thread, should it hang.
        let (end, hang) = channel::<()>();
        let (begun, has_begun) = channel();
        let hangs = Order::Do(Box::new(move || {
            begun.send(()).unwrap();
            let _ = hang.recv();
        }));
        worker.orders.send(hangs).unwrap();
        has_begun.recv_timeout(LONG).unwrap();
        let cure = again.clone();
        assert!(worker.aside(move || cure.send(2).unwrap()));
        assert_eq!(told.recv_timeout(LONG), Ok(2));
        drop(end);
        drop(release);
        for number in 0..MOST_LATER {
            assert_eq!(told.recv_timeout(LONG), Ok(10 + number));
        }
    }
}
