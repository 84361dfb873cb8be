// SPDX-License-Identifier: GPL-2.0-only

//! The recipe of one freeze: gather, sync, freeze, wait, thaw.
//!
//! All of this may take long or hang (a look-up below a dead network mount, a freeze behind a
//! security agent), and the event loop must stay able to answer the host. So for a backup it
//! happens on a thread of its own, the [`Worker`]'s, and the loop hears of each [`Job`] through a
//! callback. It knows no host and no frames.

mod counters;
mod worker;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use crate::answers;
use crate::apart::Apart;
use crate::backup::Begun;
use crate::busy;
use crate::cache::{Cache, GatherError, Gathered, Missing, Opened};
use crate::calls::Context;
use crate::config::Config;
use crate::door::Door;
use crate::fifreeze::Unguarded;
use crate::freeze::{
    is_of_anything, FreezeError, GivenUp, Learnt, Limits, Means, Session, Stay, Summary, Target,
    ThawError,
};
use crate::ground::{self, GoesOn};
use crate::hooks::{self, Asked, Found, HookError};
use crate::logbook::{Logbook, Sink};
use crate::machine::LookError;
use crate::mounts::{has_means_to_freeze, DevId};
use crate::moving::Layers;
use crate::plan::Reason;
use crate::pool::Pool;
use crate::process;
use crate::progress::{Progress, Stage};
use crate::record::RunDir;
use crate::recovery::Leavings;
use crate::sys;
use crate::watch::{Come, Scene};
use crate::writes::{AtRest, Images, WriteBack};

pub use self::counters::Counters;
use self::counters::{look_out_for_writes, swapped_to};
pub use self::worker::{About, Job, Outcome, Worker};

/// Dirty pages on the whole machine (64 KiB) up to which it counts as clean.
///
/// If the freeze cannot write back one of those, or one that was dirtied after the sync, nobody names it: FIFREEZE syncs and
/// does not tell of that error (`sync_inodes_sb` in `fs/fs-writeback.c` returns nothing). It is kept for syncfs(2), and for
/// no other call. That one would have to come while all is frozen: one for each file system, which flushes its disk once
/// more and, should that hang, holds what the thaw needs (`s_umount`). So it is not asked for. As long as nobody else has
/// heard of it, the next sync before a backup does, since each opens anew.
const CLEAN_PAGES: u64 = 16;
/// How often it is looked what a freeze is at.
pub const LOOK: Duration = Duration::from_millis(500);
/// How long what somebody else has frozen is waited for.
const BUSY_PATIENCE: Duration = Duration::from_secs(5);
/// How long at least those that are frozen wait for one that is not yet.
const LAG: Duration = Duration::from_millis(30);
/// How long before the answer to FREEZE the last look may be at what has come: what comes after it is named when
/// all is thawed, as what comes after the answer is.
const FRESH: Duration = Duration::from_millis(30);
/// How often it is begun anew because a file system came while others were being frozen.
const ATTEMPTS: usize = 3;
/// Enough for the look-ups; everything large is on the heap.
const STACK_BYTES: usize = 256 * 1024;

/// Why a freeze did not come about. Nothing is frozen then.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// What is to be frozen could not be had.
    #[error(transparent)]
    Gather(#[from] GatherError),
    /// Which hooks there are is not known.
    #[error(transparent)]
    Hooks(#[from] HookError),
    /// A hook that is asked for is not called, and it is to be strict.
    #[error("{} (strict)", .not_called.join("; "))]
    NotCalled {
        /// Which, in words.
        not_called: Vec<String>,
    },
    /// What the hooks are to be told could not be had.
    #[error(transparent)]
    Look(#[from] LookError),
    /// It was called off while hooks were called.
    #[error("the freeze was called off")]
    CalledOff,
    /// No threads.
    #[error("cannot start the threads that freeze")]
    Threads(#[source] io::Error),
    /// The freeze itself failed.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// What was to be frozen was never all there was.
    #[error("file systems came or changed while it was being frozen, {ATTEMPTS} times, and one has become read-only")]
    Restless,
}

/// What a freeze needs to know and to have.
#[derive(Clone)]
pub struct Setting {
    /// What the operator chose.
    pub config: Arc<Config>,
    /// Where to say what happens.
    pub log: Logbook,
    /// Through which it freezes.
    pub door: Arc<dyn Door>,
    /// Where it is kept what is frozen.
    pub run: RunDir,
    /// Set at any time, it ends the freeze.
    pub abort: Arc<AtomicBool>,
    /// Where to show what it is at.
    pub progress: Arc<Progress>,
    /// The addresses of the disks that the host backs up, as far as it has said.
    pub disks: Vec<String>,
}

impl Setting {
    /// Why a freeze under way is to be called off: one takes too long to freeze, or all to be looked up. One that is
    /// only written back costs nobody anything, and may take as long as the host waits.
    pub fn stuck(&self, now: Instant) -> Option<String> {
        let Config {
            give_up, prepare, ..
        } = *self.config;
        // The job itself calls off the freeze of one alone, where that can be.
        if let Some(names) = self.progress.stuck(now, give_up + LOOK) {
            let seconds = give_up.as_secs();
            return Some(format!(
                "{names} takes longer than {seconds} s to freeze (give_up)"
            ));
        }
        let seconds = prepare.as_secs();
        self.progress
            .looks_for(now, prepare)
            .then(|| format!("looking up what is mounted takes longer than {seconds} s (prepare)"))
    }

    /// Calls a freeze off that is under way or in force, and has thawed what is frozen.
    pub fn call_off(&self, now: Instant) {
        let Setting {
            abort,
            door,
            log,
            progress,
            ..
        } = self;
        abort.store(true, Ordering::SeqCst);
        if progress.stage() == Stage::Freezing {
            door.let_go();
        } else {
            // Whatever hangs there, nothing is frozen, nor will be: it can be said at once.
            let mut text = format!("called off: {}", progress.words(now));
            if progress.stage() == Stage::Syncing {
                text.push_str(". How long that may take is up to the host, and to the module");
                text.push_str(" (freeze_timeout_ms)");
            }
            log.warning(text);
            log.flush();
        }
    }
}

/// What came of an attempt. Nothing is frozen but when it is done.
enum Tried<T> {
    Done(T),
    /// Something came during the sync.
    Synced,
    /// Something came during the freeze.
    InVain,
}

/// Makes attempts until one is done; it is told whether it may sync, and whether it is the last one. A sync
/// takes as long as a disk does, and meanwhile something may always come: what has is frozen at once, without
/// another.
fn until_it_is<T>(
    mut attempt: impl FnMut(bool, bool) -> Result<Tried<T>, JobError>,
) -> Result<T, JobError> {
    let mut attempts = 0;
    let mut may_sync = true;
    while attempts < ATTEMPTS {
        match attempt(may_sync, attempts + 1 == ATTEMPTS)? {
            Tried::Done(it) => return Ok(it),
            Tried::Synced => {}
            Tried::InVain => attempts += 1,
        }
        may_sync = false;
    }
    Err(JobError::Restless)
}

/// What the thread that freezes has seen last, for the others.
#[derive(Default)]
struct Seen {
    /// What hangs.
    given_up: Vec<GivenUp>,
    /// What has turned read-only, perhaps since an error.
    turned: Vec<DevId>,
}

#[derive(Clone, Default)]
struct Shown(Arc<Mutex<Seen>>);

impl Shown {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        // It is whole after each change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hooks and what they are told, and warnings of those that are not called.
pub type ToCall = (Option<(Vec<Found>, Context)>, Vec<String>);

/// Whoever freezes, with all that is known, or open, or running, before it is needed.
pub struct Freezer {
    cache: Cache,
    /// By which the plan was made that is in the cache.
    config: Arc<Config>,
    learnt: Learnt,
    shown: Shown,
    leavings: Leavings,
    pool: Arc<Pool>,
    aside: Arc<Pool>,
    apart: Arc<Apart>,
    /// `/proc/vmstat`.
    vmstat: Option<File>,
}

impl Freezer {
    /// One who knows nothing yet.
    #[expect(clippy::new_without_default, reason = "it opens a file")]
    pub fn new() -> Self {
        Freezer {
            cache: Cache::default(),
            config: Arc::default(),
            learnt: Learnt::default(),
            shown: Shown::default(),
            leavings: Leavings::default(),
            pool: Arc::default(),
            aside: Arc::default(),
            apart: Arc::default(),
            vmstat: File::open("/proc/vmstat").ok(),
        }
    }

    /// Has the plan for the next backup ready, and says which rules do nothing.
    fn look_over(&mut self, config: &Arc<Config>, log: &Logbook) {
        self.go_by(config);
        // What hangs is known then when hooks are to be called.
        let _ = hooks::find(&config.hooks);
        // Why there is no plan is said when one is needed.
        for rule in self.cache.prepare(config).unwrap_or_default() {
            log.warning(rule.to_string());
        }
        self.shown.seen().turned = self.cache.left_out_as_turned();
        // Without memory for them it is said when they are needed.
        let _ = self
            .pool
            .grow(self.cache.widest_wave().min(config.parallel));
    }

    /// Thaws what somebody has left frozen who has died since.
    fn undo(&mut self, run: &RunDir, log: &Logbook) {
        self.leavings.thaw(run, log);
    }

    /// The hooks that are to be called first, and what they are told; `None` when there are none. Beside that the
    /// warnings of those that are asked for and not called. If there are any, what is dirty is written back by then. The
    /// log is held by whoever calls.
    pub fn hooks(&mut self, setting: &Setting, about: &About) -> Result<ToCall, JobError> {
        let Setting {
            config,
            progress,
            disks,
            ..
        } = setting;
        if about.without_hooks {
            return Ok((None, Vec::new()));
        }
        let Asked { hooks, not_called } = hooks::find(&config.hooks)?;
        let required = not_called.iter().filter(|it| it.required);
        let required: Vec<String> = required.map(|it| it.text.clone()).collect();
        if config.strict && !required.is_empty() {
            let not_called = required;
            return Err(JobError::NotCalled { not_called });
        }
        let mut warnings = Warnings::new(&setting.log);
        for it in not_called {
            warnings.add(it.text);
        }
        let warnings = warnings.all;
        if hooks.is_empty() {
            return Ok((None, warnings));
        }
        self.go_by(config);
        self.write_back(setting)?;
        progress.enter(Stage::Looking, 0);
        let planned = self.cache.planned(config, disks)?;
        // They do what they like.
        self.cache.doubt();
        let About {
            request,
            backup_type,
            ..
        } = about;
        let context = Context::new(*request, *backup_type, &planned.disks, &planned.paths);
        progress.enter(Stage::Hooks, hooks.len());
        Ok((Some((hooks, context)), warnings))
    }

    /// Writes back what is dirty before hooks are called: that may take minutes, and what they hold stands still from their
    /// call to the thaw. What is left for the freeze is what has become dirty since, and what is known not to freeze, for which
    /// `give_up` is the limit. Nothing is frozen. What hangs, or could not be written, is learnt, and what would fail the
    /// freeze for being strict fails it here, as far as it is known.
    fn write_back(&mut self, setting: &Setting) -> Result<(), JobError> {
        let is_to_sync = self.is_worth_a_sync();
        if !is_to_sync && !setting.config.strict {
            return Ok(());
        }
        let Setting { config, disks, .. } = setting;
        // A path is not enough for a sync.
        let gathered = self.cache.gather(config, disks, false, &|_| false)?;
        let Gathered {
            targets,
            stuck,
            layers,
            ..
        } = gathered;
        moving_below(&layers, &targets, config.strict)?;
        self.learnt.set_stuck(stuck);
        if !is_to_sync {
            return Ok(());
        }
        let session = self.session(targets.into_iter().map(target).collect(), setting)?;
        self.sync(&session, setting);
        self.show_given_up();
        Ok(session.has_not_failed()?)
    }

    /// A session on these, which has done nothing yet.
    fn session(&self, targets: Vec<Target>, setting: &Setting) -> Result<Session, JobError> {
        let Setting {
            config,
            log,
            door,
            abort,
            progress,
            ..
        } = setting;
        let means = Means {
            door: Arc::clone(door),
            log: log.clone(),
            limits: Limits {
                strict: config.strict,
                parallel: config.parallel,
                give_up: config.give_up,
                patience: BUSY_PATIENCE,
                lag: LAG,
            },
            abort: Arc::clone(abort),
            progress: Arc::clone(progress),
            pool: Arc::clone(&self.pool),
            aside: Arc::clone(&self.aside),
            apart: Arc::clone(&self.apart),
        };
        Session::new(targets, means, &self.learnt).map_err(JobError::Threads)
    }

    /// Writes back what is dirty. It may take long, and nothing is frozen yet; and some write back in whoever asks for it,
    /// who goes as this thread does.
    fn sync(&mut self, session: &Session, setting: &Setting) {
        let goes_first = process::goes_first();
        let _ = process::go_ahead();
        let (log, most) = (&setting.log, setting.config.write_back());
        log.aloud(|| session.sync(most, &mut self.learnt));
        if goes_first {
            let _ = process::go_first();
        }
    }

    /// From here on this is the configuration.
    fn go_by(&mut self, config: &Arc<Config>) {
        if !Arc::ptr_eq(&self.config, config) {
            self.config = Arc::clone(config);
            self.cache.forget_plan();
        }
    }

    /// Freezes everything that a plan for the machine as it is now says. What comes while that is under
    /// way is in no plan, so then it is begun anew. Where something comes all the time, the last attempt counts
    /// with a warning: what comes and goes costs nobody else the backup. Whether it is to be in the backup, or a rule
    /// leaves it out, nobody has looked by then; [`Freezer::thaw`] does, and fails if it is to be strict. The log is
    /// held by whoever calls, and speaks only as long as nothing is frozen.
    pub fn freeze(&mut self, setting: &Setting) -> Result<Frozen, JobError> {
        let frozen = until_it_is(|may_sync, is_last| {
            let tried = self.try_to_freeze(setting, may_sync, is_last)?;
            if !matches!(tried, Tried::Done(_)) {
                self.cache.doubt();
                setting
                    .log
                    .info("something has come or changed meanwhile: it is begun anew");
                // What was in memory only is written: nothing is frozen.
                setting.log.aloud(|| ());
            }
            Ok(tried)
        });
        if frozen.is_err() {
            self.show_given_up();
        }
        frozen
    }

    /// Shows what hangs, to be called while nothing else is frozen: it takes memory.
    fn show_given_up(&self) {
        let given_up = self.learnt.given_up();
        self.shown.seen().given_up = given_up;
    }

    /// One attempt at it, after a sync if it may be. The last one counts although something has come meanwhile, and
    /// unless it is to be strict, although something has become read-only.
    fn try_to_freeze(
        &mut self,
        setting: &Setting,
        may_sync: bool,
        is_last: bool,
    ) -> Result<Tried<Frozen>, JobError> {
        let Setting {
            config,
            log,
            door,
            progress,
            disks,
            ..
        } = setting;
        self.go_by(config);
        progress.enter(Stage::Looking, 0);
        let is_to_sync = may_sync && self.is_worth_a_sync();
        // A sync may take long, and the last attempt counts: then it is known before whether the plan holds.
        let may_believe = !is_to_sync && !is_last;
        // Only one that is not going to be frozen has to do more with it.
        let (takes_paths, learnt) = (door.takes_paths(), &self.learnt);
        let will_do = |dev| takes_paths && learnt.has_frozen(dev);
        let Gathered {
            targets,
            missing,
            losses,
            disks,
            torn,
            halved,
            not_only_listed,
            then,
            layers,
            watched,
            goes_on,
            stuck,
            is_believed,
        } = self.cache.gather(config, disks, may_believe, &will_do)?;
        let (devices, moving) = moving_below(&layers, &targets, config.strict)?;
        let mut warnings = Warnings::new(log);
        warnings.of_moving(&moving);
        self.learnt.set_stuck(stuck);
        let learnt = &self.learnt;
        let known = targets.iter();
        // The first time only its type tells.
        let is_known =
            |it: &Opened| learnt.is_unfreezable(it.dev) || !has_means_to_freeze(&it.fs_type);
        let known = known.filter(|it| !config.strict && is_known(it));
        let (known, only_synced): (BTreeSet<DevId>, Vec<GoesOn>) = known
            .map(|it| {
                let goes_on = GoesOn {
                    name: it.name.clone(),
                    devices: it.devices.clone(),
                    below: it.below.clone(),
                };
                (it.dev, goes_on)
            })
            .unzip();
        let at_rest = match watched.is_empty() {
            true => ground::AtRest::default(),
            false => match swapped_to(&targets) {
                Some(swapped_to) => {
                    let goes_on = [goes_on, only_synced, swapped_to].concat();
                    ground::AtRest::of(watched, &goes_on)
                }
                None => {
                    warnings.add(
                        "not all that is swapped to can be found: whether anything else writes to a disk is not known"
                            .into(),
                    );
                    ground::AtRest::default()
                }
            },
        };
        let is_watched = door.watched_every().is_some();
        let frozen_below = targets.iter();
        let frozen_below = frozen_below.flat_map(|it| it.below.iter().flatten().chain(&it.devices));
        let frozen_below: BTreeSet<DevId> = frozen_below.copied().collect();
        let perhaps = at_rest.perhaps.clone();
        let mut counters = Counters::new(at_rest.clone());
        let mut at_rest = AtRest::new(at_rest.watched);
        for it in &disks {
            log.info(format!("in the backup: {it}"));
        }
        for it in halved {
            log.info(it);
        }
        for it in torn {
            warnings.add(it);
        }
        if let Some(why) = not_only_listed {
            warnings.add(why);
        }
        for it in &missing {
            log.warning(it.to_string());
        }
        let targets: Vec<Target> = match is_watched {
            true => {
                let images = Images::find().but(&frozen_below);
                look_out_for_writes(targets, &images, &mut counters, log)
            }
            false => targets.into_iter().map(target).collect(),
        };
        let session = self.session(targets, setting)?;
        if is_to_sync {
            self.sync(&session, setting);
            if !self.cache.is_all_there(&then) || !self.cache.turned().is_empty() {
                return Ok(Tried::Synced);
            }
            self.cache.rewind();
        }
        session.ask_disks(&mut self.learnt, answers::silent);
        sys::set_memory_aside();
        log.seal();
        // While the kernel is at work there is time for a look.
        let cache = &mut self.cache;
        let mut held_at = None;
        let look = is_believed.then_some(|| {
            let at = Instant::now();
            held_at = cache.holds().then_some(at);
        });
        let mut summary = session.freeze(&mut self.learnt, look)?;
        let is_all_there = match held_at {
            Some(at) if at.elapsed() < FRESH => true,
            None if is_believed => self.cache.holds(),
            _ => self.cache.is_all_there(&then),
        };
        let turned = self.cache.turned();
        let counts = match turned.is_empty() {
            true => is_all_there || is_last,
            false => is_last && !config.strict,
        };
        if !counts {
            let thawed = session.thaw();
            session.learn(&mut self.learnt);
            session.disarm();
            return match thawed {
                Err(ThawError::Failed { name, source }) => {
                    Err(FreezeError::Failed { name, source }.into())
                }
                // What hangs is left out then.
                Ok(()) | Err(_) => Ok(Tried::InVain),
            };
        }
        for device in at_rest.begin(|device| session.goes_on_on(device, &known)) {
            log.info(format!(
                "what programs write to {device} itself is not seen: something that is on it is not frozen"
            ));
        }
        let perhaps = perhaps.or_else(|| session.goes_on_anywhere(&known));
        let losses = losses + summary.left_out;
        summary.left_out += missing.len();
        if !is_all_there {
            let names = self.cache.names_since(&then);
            let names = match names.is_empty() {
                true => String::new(),
                false => format!(", the last ones on {}", names.join(", ")),
            };
            warnings.add(format!(
                "file systems come all the time, {ATTEMPTS} times while it was being frozen{names}: what came \
                 last is not frozen, and is named when the rest is thawed unless a rule leaves it out"
            ));
        }
        for name in turned {
            warnings.add(format!(
                "{name} has become read-only while it was being frozen, perhaps since an error"
            ));
        }
        // It is in the log.
        warnings.all.extend(self.learnt.unwritten().cloned());
        match is_of_anything(summary.ours + summary.foreign, losses, config.strict) {
            Ok(true) => {}
            Ok(false) => {
                warnings
                    .add("nothing at all is frozen: no file system was found that can be".into());
            }
            Err(error) => {
                session.disarm();
                return Err(error.into());
            }
        }
        Ok(Tried::Done(Frozen {
            session,
            summary,
            then,
            at_rest,
            counters,
            perhaps,
            frozen_below,
            layers,
            devices,
            moving,
            missing,
            warnings: warnings.all,
        }))
    }

    /// Thaws what was frozen; everything is tried, whatever fails, what hangs is left `by` then, and [`Frozen::tidy`]
    /// is to follow.
    /// Names what was mounted or made writable meanwhile: that is on a disk and was not frozen.
    pub fn thaw(
        &mut self,
        frozen: &mut Frozen,
        setting: &Setting,
        by: Option<Instant>,
    ) -> Result<(), ThawError> {
        let mut written = frozen.at_rest.written();
        let begun_since = |layers: &Layers| layers.begun_below(&frozen.devices, &frozen.moving);
        let mut begun = begun_since(&frozen.layers);
        let thawed = frozen.session.thaw_by(by);
        // Writers go on, and what is looked for now may take a while.
        let _ = process::go_ahead();
        frozen.session.learn(&mut self.learnt);
        self.show_given_up();
        if thawed.is_err() || setting.abort.load(Ordering::SeqCst) {
            // It was not frozen all the time, so it may have been any writer.
            written.clear();
            self.learnt.ask_all();
        }
        // Only now, since writers wait no longer: what has come in the last moment is named as well.
        let mut warnings = Warnings::new(&setting.log);
        let names: Vec<String> = match self.come_since(&mut frozen.then, setting, by) {
            Ok(come) => {
                for it in &come {
                    warnings.add(format!(
                        "{it} while the rest was frozen, and was not frozen"
                    ));
                }
                come.into_iter().map(|it| it.name).collect()
            }
            Err(error) => {
                let text = format!("what came while the rest was frozen is not known: {error}");
                warnings.add(text);
                vec!["something that is not known".into()]
            }
        };
        for name in frozen.session.in_thaw() {
            warnings.add(format!(
                "{name} hangs in its thaw: until its disk comes back nobody writes there, and backups are without it"
            ));
        }
        // What has begun may be on a device that was not there before.
        begun.extend(begun_since(self.cache.layers()));
        let images = match written.iter().any(|it| it.is_certain) {
            true => images_by(by).but(&frozen.frozen_below).names(),
            false => Vec::new(),
        };
        for it in &written {
            let node = &it.node;
            if !it.is_certain {
                warnings.add(format!(
                    "whether anything was written to {node} past what is known to go on there is not known: that did not \
                     stand still for a look"
                ));
                continue;
            }
            let images = (!images.is_empty()).then(|| {
                let images = images.join(", ");
                format!(", or by the kernel to the file of {images}")
            });
            let perhaps = frozen.perhaps.as_ref();
            let perhaps = perhaps.map(|it| format!(", or perhaps by {it}, which is not frozen"));
            warnings.add(format!(
                "something was written to {node} while all that is known to be on it was frozen: by a \
                 program that has the disk itself open, or by what is in no mount table{}{}",
                images.as_deref().unwrap_or_default(),
                perhaps.unwrap_or_default()
            ));
        }
        warnings.of_moving(&begun);
        frozen.warnings.append(&mut warnings.all);
        match (names.is_empty(), written.is_empty(), begun.is_empty()) {
            _ if !setting.config.strict => thawed,
            (true, true, true) => thawed,
            (false, _, _) => thawed.and(Err(ThawError::Late { names })),
            (true, false, _) => {
                let nodes = written.iter().map(ToString::to_string).collect();
                thawed.and(Err(ThawError::Written { nodes }))
            }
            (true, true, false) => {
                let layers = begun.into_iter().collect();
                thawed.and(Err(ThawError::Moving { layers }))
            }
        }
    }

    /// What has come since then and was not frozen, as far as it is known `by` then.
    fn come_since(
        &mut self,
        then: &mut Scene,
        setting: &Setting,
        by: Option<Instant>,
    ) -> Result<Vec<Come>, ComeError> {
        let Setting { config, disks, .. } = setting;
        if let Some(come) = self.cache.come_if_it_holds(then, config, disks) {
            return Ok(come);
        }
        let Some(by) = by else {
            return Ok(self.cache.come_since(then, config, disks)?);
        };
        // To look that up may hang, and the host waits. Whoever hangs in it keeps what is known; the next backup begins
        // without.
        let taken = (std::mem::take(&mut self.cache), std::mem::take(then));
        let (config, disks) = (Arc::clone(config), disks.clone());
        let look = move |taken: &mut (Cache, Scene)| {
            let (cache, then) = taken;
            cache.come_since(then, &config, &disks)
        };
        let (taken, come) = done_by(by, taken, look).ok_or(ComeError::TooLate)?;
        (self.cache, *then) = taken;
        Ok(come?)
    }

    /// Whether something has come that is not frozen, as far as the kernel tells.
    fn has_news(&mut self, frozen: &Frozen) -> bool {
        self.cache.rewind();
        !self.cache.is_all_there(&frozen.then)
    }

    /// Whether so much is dirty that writing it back beforehand makes the freeze shorter.
    fn is_worth_a_sync(&self) -> bool {
        // The kernel makes up as much of the text as is read, and both counters stand near its
        // beginning.
        let mut text = [0; 1024];
        let vmstat = self.vmstat.as_ref();
        let read = vmstat.and_then(|file| file.read_at(&mut text, 0).ok());
        let text = text.get(..read.unwrap_or(0)).unwrap_or_default();
        is_much_dirty(text)
    }
}

/// Why it is not known what has come.
#[derive(Debug, thiserror::Error)]
enum ComeError {
    /// The machine could not be looked at.
    #[error(transparent)]
    Look(#[from] LookError),
    /// Whoever looks hangs.
    #[error("looking that up takes longer than the host waits")]
    TooLate,
}

/// Has `step` done to `taken` on a thread of its own. Both come back, or neither when that is not done by then.
fn done_by<S: Send + 'static, T: Send + 'static>(
    by: Instant,
    mut taken: S,
    step: impl FnOnce(&mut S) -> T + Send + 'static,
) -> Option<(S, T)> {
    let (tell, told) = channel();
    let body = move || {
        let done = step(&mut taken);
        // Nobody listens any more when it took too long.
        let _ = tell.send((taken, done));
    };
    let builder = Builder::new().name("come".into());
    builder.stack_size(STACK_BYTES).spawn(body).ok()?;
    let left = by.saturating_duration_since(Instant::now());
    told.recv_timeout(left).ok()
}

/// What others have as a disk that is a file, as far as it is known `by` then.
fn images_by(by: Option<Instant>) -> Images {
    let Some(by) = by else {
        return Images::find();
    };
    let found = done_by(by, (), |()| Images::find());
    found.map_or_else(Images::untold, |(_, images)| images)
}

/// Warnings that are said and kept: with them a good backup is not all that it might be.
struct Warnings<'a> {
    log: &'a Logbook,
    all: Vec<String>,
}

impl<'a> Warnings<'a> {
    fn new(log: &'a Logbook) -> Self {
        let all = Vec::new();
        Warnings { log, all }
    }

    fn add(&mut self, text: String) {
        self.log.warning(&text);
        self.all.push(text);
    }

    fn of_moving(&mut self, layers: &BTreeSet<String>) {
        for layer in layers {
            self.add(format!(
                "{layer} while what is on it is frozen: copies of those disks that are not of one moment may not fit \
                 together"
            ));
        }
    }
}

/// The devices below these, and what moves data there, in words; an error if that `is_strict`.
fn moving_below(
    layers: &Layers,
    targets: &[Opened],
    is_strict: bool,
) -> Result<(BTreeSet<DevId>, BTreeSet<String>), FreezeError> {
    let devices = targets.iter();
    let devices = devices.flat_map(|it| it.devices.iter().chain(&it.perhaps_on));
    let devices: BTreeSet<DevId> = devices.copied().collect();
    let moving = layers.at_work_below(&devices);
    if is_strict && !moving.is_empty() {
        let layers = moving.into_iter().collect();
        return Err(FreezeError::Moving { layers });
    }
    Ok((devices, moving))
}

fn target(opened: Opened) -> Target {
    let Opened {
        dev,
        name,
        wave,
        disks,
        below,
        stands_on,
        fd,
        fs_type,
        devices,
        perhaps_on,
        listed,
    } = opened;
    let target = Target::new(dev, name, wave, fd).with_disks(disks);
    let target = target.with_devices(devices.clone());
    let write_back = WriteBack::to(
        [devices, perhaps_on].concat(),
        below.iter().flatten().copied(),
    );
    let target = target.with_all_below(below).standing_on(stands_on);
    let target = target.written_back(Box::new(move || write_back.look()));
    match fs_type.as_str() {
        "btrfs" => target.asked(Box::new(move |fd| {
            let operation = busy::with(listed.as_ref(), fd)?;
            Some(Reason::Busy(operation).to_string())
        })),
        _ => target,
    }
}

/// Whether more is dirty than a freeze writes as fast, which a sync would only delay. Where nobody tells, it may be.
fn is_much_dirty(vmstat: &[u8]) -> bool {
    dirty_pages(vmstat).is_none_or(|pages| pages > CLEAN_PAGES)
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

/// A freeze in force, with all that has to be undone after it.
pub struct Frozen {
    session: Session,
    /// How many ended how.
    summary: Summary,
    /// What there was when it was planned.
    then: Scene,
    /// Disks that should not be written to meanwhile.
    at_rest: AtRest,
    /// Of which counters it is to be said if they are off.
    counters: Counters,
    /// One that goes on and may be on any disk.
    perhaps: Option<String>,
    /// What is written to only by what is frozen.
    frozen_below: BTreeSet<DevId>,
    /// What may move data from disk to disk below it, the devices that it is on, and what did so before.
    layers: Arc<Layers>,
    devices: BTreeSet<DevId>,
    moving: BTreeSet<String>,
    /// What is not among it by the plan.
    missing: Vec<Missing>,
    /// What there is to say against it.
    warnings: Vec<String>,
}

/// What came of a backup, for people.
#[derive(Debug, Default)]
pub struct Account {
    /// What has become of each file system that was to be frozen.
    pub stays: Vec<Stay>,
    /// What was left out before.
    pub missing: Vec<Missing>,
    /// What else there is to say against it.
    pub warnings: Vec<String>,
}

impl Frozen {
    fn begun(&self) -> Begun {
        let Summary {
            ours,
            foreign,
            synced,
            left_out,
        } = self.summary;
        let counts = format!(
            "{ours} frozen, {foreign} frozen by others, {synced} only synced, {left_out} left out"
        );
        Begun {
            since: self.session.armed_at(),
            counts,
            names: self.session.frozen(),
        }
    }

    fn account(&mut self) -> Account {
        Account {
            stays: self.session.account(),
            missing: std::mem::take(&mut self.missing),
            warnings: std::mem::take(&mut self.warnings),
        }
    }

    /// What need not be done before the host knows.
    pub fn settle(&self) {
        self.session.settle();
    }

    /// Names what others have thawed since.
    pub fn look_after(&self) -> Vec<String> {
        self.session.look_after()
    }

    /// Gives up what is needed only as long as anything is frozen. It takes a while, which nobody need
    /// wait for, and longer what could not have been seen meanwhile: that can be [said](Counters::say) then.
    pub fn tidy(self) -> Counters {
        self.session.disarm();
        self.counters
    }
}

/// Goes once through everything between the first freeze and the last thaw, on a file system that
/// cannot freeze (procfs), so that the pages it takes are in memory and stay there.
pub fn warm_up() -> io::Result<()> {
    let fd = File::open("/proc/self/stat")?;
    let target = Target::new(DevId::default(), "warm-up".into(), 0, fd.into());
    let mut learnt = Learnt::default();
    let means = Means {
        door: Arc::new(Unguarded),
        log: Logbook::new(Sink::Memory),
        limits: Limits {
            strict: false,
            parallel: 2,
            give_up: Duration::from_secs(1),
            patience: Duration::ZERO,
            lag: LAG,
        },
        abort: Arc::default(),
        progress: Arc::default(),
        pool: Arc::default(),
        aside: Arc::default(),
        apart: Arc::default(),
    };
    let session = Session::new(vec![target], means, &learnt)?;
    // It fails to freeze anything, which is the point.
    let _ = session.freeze(&mut learnt, None::<fn()>);
    let _ = session.thaw();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Longer than any step of a test takes.
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn what_comes_during_a_sync_is_frozen_without_another_and_is_no_attempt_in_vain() {
        let run = |mut came: Vec<Tried<()>>| {
            let synced_in_vain = matches!(came.first(), Some(Tried::Synced));
            let mut syncs = Vec::new();
            let mut last = Vec::new();
            let result = until_it_is(|may_sync, is_last| {
                syncs.push(may_sync);
                last.push(is_last);
                Ok(came.remove(0))
            });
            // A sync in vain is none of them.
            let in_vain = syncs.len() - usize::from(synced_in_vain);
            assert_eq!(last.last() == Some(&true), in_vain == ATTEMPTS, "{last:?}");
            (result.is_ok(), syncs)
        };
        let (synced, in_vain) = (|| Tried::Synced, || Tried::InVain);
        assert_eq!(run(vec![Tried::Done(())]), (true, vec![true]));
        let once = run(vec![synced(), Tried::Done(())]);
        assert_eq!(once, (true, vec![true, false]));
        let long = run(vec![synced(), in_vain(), in_vain(), Tried::Done(())]);
        assert_eq!(long, (true, vec![true, false, false, false]));
        let in_vain = vec![in_vain(), in_vain(), in_vain()];
        assert_eq!(run(in_vain), (false, vec![true, false, false]));
    }

    #[test]
    fn what_is_looked_up_when_all_is_thawed_is_waited_for_no_longer_than_the_host_waits() {
        let quick = done_by(Instant::now() + LONG, 7, |it| *it + 1);
        assert_eq!(quick, Some((7, 8)));
        let (_release, hang) = channel::<()>();
        let begun = Instant::now();
        let step = move |_: &mut ()| hang.recv().is_ok();
        assert!(done_by(begun + Duration::from_millis(50), (), step).is_none());
        assert!(begun.elapsed() < LONG / 2);
    }

    #[test]
    fn dirty_pages_are_those_to_be_written_and_those_being_written() {
        let text = b"nr_free_pages 9\nnr_dirty 300\nnr_writeback 7\nnr_writeback_temp 50\n";
        assert_eq!(dirty_pages(text), Some(307));
        assert_eq!(dirty_pages(b"nr_dirty 300\nnr_dirty_threshold 1\n"), None);
    }

    #[test]
    fn a_sync_comes_first_above_64_kib_and_where_nobody_tells() {
        // With 4 KiB a page: on a slow disk what is more makes the freeze long.
        for (dirty, is_much) in [(0, false), (9, false), (10, true), (300, true)] {
            let text = format!("nr_dirty {dirty}\nnr_writeback 7\n");
            assert_eq!(is_much_dirty(text.as_bytes()), is_much, "{dirty}");
        }
        assert!(is_much_dirty(b""));
    }
}
