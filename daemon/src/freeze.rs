// SPDX-License-Identifier: GPL-2.0-only

//! Freezes the planned file systems and thaws exactly those that it froze.
//!
//! A [`Session`] owns the descriptors that were opened before the first freeze, and the threads
//! that work on them. The thaw goes through the same descriptors, so renames and unmounts in
//! between lose nothing. Dropping a session thaws what is still frozen. It decides no order (that
//! is [`crate::plan`]) and knows no host.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::logbook::Logbook;
use crate::mounts::DevId;
use crate::pool::Pool;

/// How often one that waits for its turn looks whether all is off.
const ABORT_TICK: Duration = Duration::from_millis(20);

/// What is done to file systems: the kernel, or a double in unit tests.
pub trait FsOps: Send + Sync {
    /// Writes all dirty data back without freezing.
    fn sync(&self, fd: BorrowedFd<'_>) -> io::Result<()>;
    /// Freezes: `EBUSY` when frozen already, `EOPNOTSUPP` when it cannot.
    fn freeze(&self, fd: BorrowedFd<'_>) -> io::Result<()>;
    /// Thaws: `EINVAL` when not frozen.
    fn thaw(&self, fd: BorrowedFd<'_>) -> io::Result<()>;
}

/// The real thing.
#[derive(Clone, Copy, Debug)]
pub struct Kernel;

impl FsOps for Kernel {
    fn sync(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(nix::unistd::syncfs(fd)?)
    }

    fn freeze(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        crate::sys::freeze(fd)
    }

    fn thaw(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        crate::sys::thaw(fd)
    }
}

/// Why a freeze did not come about. By the time it is returned, everything is thawed again.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// One file system failed to freeze.
    #[error("{name} cannot be frozen")]
    Failed {
        /// Which.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// One has no means to freeze, and the configuration is strict.
    #[error("{name} has no means to freeze, and the configuration is strict")]
    Unfreezable {
        /// Which.
        name: String,
    },
    /// It was called off.
    #[error("the freeze was called off")]
    Aborted,
}

/// Why a thaw was not the clean end of a backup. Nothing that could be thawed is left frozen.
#[derive(Debug, thiserror::Error)]
pub enum ThawError {
    /// Somebody else had thawed some of them before.
    #[error("thawed by somebody else while the backup was running: {}", .names.join(", "))]
    Early {
        /// Which.
        names: Vec<String>,
    },
    /// The kernel refuses.
    #[error("{name} cannot be thawed")]
    Failed {
        /// Which.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// Frozen by this session.
    Ours {
        /// When the call began.
        since: Instant,
        /// How long it took.
        took: Duration,
    },
    /// Somebody else had frozen it before: it counts, and stays theirs.
    Foreign,
    /// It cannot freeze; synced instead.
    Synced,
    /// It was ours.
    Thawed {
        /// How long the freeze took.
        took: Duration,
    },
}

/// One file system to freeze.
pub struct Target {
    /// Its superblock.
    pub dev: DevId,
    /// For people.
    pub name: String,
    /// Its wave in the plan, from 0.
    pub wave: usize,
    /// How long its freeze took the last time.
    pub usual: Option<Duration>,
    fd: OwnedFd,
    state: Mutex<State>,
}

impl Target {
    /// A file system that is open as `fd`.
    pub fn new(dev: DevId, name: String, wave: usize, fd: OwnedFd) -> Self {
        Target {
            dev,
            name,
            wave,
            usual: None,
            fd,
            state: Mutex::new(State::Open),
        }
    }

    /// Whether this session froze it and has not thawed it yet.
    pub fn is_ours(&self) -> bool {
        matches!(*self.state(), State::Ours { .. })
    }

    /// How long its freeze took, if this session froze it.
    pub fn took(&self) -> Option<Duration> {
        match *self.state() {
            State::Ours { took, .. } | State::Thawed { took } => Some(took),
            State::Open | State::Foreign | State::Synced => None,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // It holds a plain value, whole at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Target {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// How many file systems ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Frozen by this session.
    pub ours: usize,
    /// Frozen by somebody else before.
    pub foreign: usize,
    /// Synced, because they cannot freeze.
    pub synced: usize,
}

/// How a session goes about its work.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Whether a file system that cannot freeze fails the whole.
    pub strict: bool,
    /// How many are worked on at a time.
    pub parallel: usize,
    /// How many are written back at a time, before the freeze.
    pub write_back: usize,
}

/// What the workers share.
struct Work {
    targets: Vec<Target>,
    ops: Arc<dyn FsOps>,
    log: Logbook,
    strict: bool,
    abort: Arc<AtomicBool>,
    on_foreign: Box<dyn Fn(usize) + Send + Sync>,
    failure: Mutex<Option<FreezeError>>,
    early: Mutex<Vec<String>>,
    thaw_failure: Mutex<Option<ThawError>>,
}

/// The freeze of one backup, from open descriptors to thaw.
pub struct Session {
    work: Arc<Work>,
    waves: Vec<Vec<usize>>,
    pool: Pool,
    write_back: usize,
}

impl Session {
    /// Prepares a session on `targets`. Setting `abort` at any time makes it stop and thaw;
    /// `on_foreign` hears at once of each target that somebody else turns out to have frozen.
    pub fn new(
        targets: Vec<Target>,
        ops: Arc<dyn FsOps>,
        log: Logbook,
        limits: Limits,
        abort: Arc<AtomicBool>,
        on_foreign: Box<dyn Fn(usize) + Send + Sync>,
    ) -> io::Result<Self> {
        let mut waves: Vec<Vec<usize>> = Vec::new();
        for (i, target) in targets.iter().enumerate() {
            if waves.len() <= target.wave {
                waves.resize(target.wave + 1, Vec::new());
            }
            if let Some(wave) = waves.get_mut(target.wave) {
                wave.push(i);
            }
        }
        let widest = waves.iter().map(Vec::len).max().unwrap_or(0);
        Ok(Session {
            pool: Pool::new(widest.min(limits.parallel).saturating_sub(1))?,
            write_back: limits.write_back,
            waves,
            work: Arc::new(Work {
                targets,
                ops,
                log,
                strict: limits.strict,
                abort,
                on_foreign,
                failure: Mutex::new(None),
                early: Mutex::new(Vec::new()),
                thaw_failure: Mutex::new(None),
            }),
        })
    }

    /// The file systems, in the order in which they were given.
    pub fn targets(&self) -> &[Target] {
        &self.work.targets
    }

    /// Writes back what is dirty while everybody can still write, so that the freeze itself has
    /// little left to flush. Waves keep their order: what a loop device writes lands in the file
    /// system below it.
    ///
    /// Few at a time: a journal is written behind the data of its file system, so a writer that
    /// needs the journal waits until the device has taken that, which is the longer the more share
    /// the processor or the disk.
    pub fn sync(&self) {
        for wave in &self.waves {
            self.each(wave, self.write_back, Work::sync_one);
        }
    }

    /// Freezes wave after wave. On any failure everything is thawed before it returns.
    pub fn freeze(&self) -> Result<Summary, FreezeError> {
        for wave in &self.waves {
            self.freeze_wave(wave);
            if self.work.gave_up() {
                break;
            }
        }
        if self.work.gave_up() {
            // What went wrong with the thaw is logged; the freeze's own failure is the news.
            let _ = self.thaw();
            let failure = lock(&self.work.failure).take();
            return Err(failure.unwrap_or(FreezeError::Aborted));
        }
        let mut summary = Summary::default();
        for target in &self.work.targets {
            match *target.state() {
                State::Ours { .. } => summary.ours += 1,
                State::Foreign => summary.foreign += 1,
                State::Synced => summary.synced += 1,
                State::Open | State::Thawed { .. } => {}
            }
        }
        Ok(summary)
    }

    /// Freezes one wave. What is usually quick begins later than what is slow, so that all end at about
    /// the same time and nobody stands still only because others take longer.
    fn freeze_wave(&self, wave: &[usize]) {
        let usual = |i: &usize| self.work.targets.get(*i).and_then(|t| t.usual);
        let longest = wave.iter().filter_map(usual).max().unwrap_or_default();
        let mut members: Vec<(usize, Duration)> = wave
            .iter()
            // It may take half as long again. What is not known may take long and begins at once.
            .map(|i| (*i, usual(i).map_or(Duration::MAX, |t| t + t / 2)))
            .collect();
        members.sort_by_key(|(_, lead)| std::cmp::Reverse(*lead));
        let work = Arc::clone(&self.work);
        let begin = Instant::now();
        let ended = (Mutex::new(0), Condvar::new());
        let run_one = move |n: usize| {
            let Some((index, lead)) = members.get(n).copied() else {
                return;
            };
            work.wait_turn(begin + longest.saturating_sub(lead), n, &ended);
            if let Some(target) = work.targets.get(index) {
                work.freeze_one(index, target);
            }
            let mut count = lock(&ended.0);
            *count += 1;
            // Nobody waits for the last one.
            if *count < members.len() {
                ended.1.notify_all();
            }
        };
        self.pool.run(wave.len(), usize::MAX, Arc::new(run_one));
    }

    /// Thaws what this session froze, the last wave first. Everything is tried, whatever fails.
    pub fn thaw(&self) -> Result<(), ThawError> {
        for wave in self.waves.iter().rev() {
            self.each(wave, usize::MAX, Work::thaw_one);
        }
        if let Some(failure) = lock(&self.work.thaw_failure).take() {
            return Err(failure);
        }
        let names = std::mem::take(&mut *lock(&self.work.early));
        if names.is_empty() {
            Ok(())
        } else {
            Err(ThawError::Early { names })
        }
    }

    fn each(&self, wave: &[usize], most: usize, step: fn(&Work, usize, &Target)) {
        let work = Arc::clone(&self.work);
        let members = wave.to_vec();
        let run_one = move |n: usize| {
            let Some(&index) = members.get(n) else { return };
            if let Some(target) = work.targets.get(index) {
                step(&work, index, target);
            }
        };
        self.pool.run(wave.len(), most, Arc::new(run_one));
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Nobody is left to hear of a failure; it is in the log.
        let _ = self.thaw();
    }
}

impl Work {
    fn gave_up(&self) -> bool {
        self.abort.load(Ordering::SeqCst) || lock(&self.failure).is_some()
    }

    fn fail(&self, error: FreezeError) {
        // The first failure is the cause; later ones are its company.
        lock(&self.failure).get_or_insert(error);
    }

    fn sync_one(&self, _: usize, target: &Target) {
        if self.abort.load(Ordering::SeqCst) {
            return;
        }
        let start = Instant::now();
        match self.ops.sync(target.as_fd()) {
            Ok(()) => self
                .log
                .info(format!("{} synced in {}", target.name, ms(start.elapsed()))),
            // The freeze will meet the same error, if it matters.
            Err(e) => self
                .log
                .warning(format!("{} cannot be synced: {e}", target.name)),
        }
    }

    /// Waits until `at`, or until as many have ended as began before: the slow ones were quick this
    /// time, or it is all off.
    fn wait_turn(&self, at: Instant, before: usize, (ended, changed): &(Mutex<usize>, Condvar)) {
        let mut ended = lock(ended);
        loop {
            let left = at.saturating_duration_since(Instant::now());
            if left.is_zero() || *ended >= before || self.gave_up() {
                return;
            }
            let waited = changed.wait_timeout(ended, left.min(ABORT_TICK));
            ended = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn freeze_one(&self, index: usize, target: &Target) {
        if self.gave_up() {
            return;
        }
        let name = &target.name;
        let start = Instant::now();
        let result = self.ops.freeze(target.as_fd());
        let took = start.elapsed();
        match result.map_err(|e| (e.raw_os_error().map(Errno::from_raw), e)) {
            Ok(()) => {
                *target.state() = State::Ours { since: start, took };
                self.log.info(format!("{name} frozen, took {}", ms(took)));
                if self.abort.load(Ordering::SeqCst) {
                    // It hung while the rest was called off; others wait for it now.
                    self.thaw_one(index, target);
                }
            }
            Err((Some(Errno::EBUSY), _)) => {
                (self.on_foreign)(index);
                *target.state() = State::Foreign;
                self.log.warning(format!(
                    "{name} was frozen by somebody else before; it counts and stays theirs"
                ));
            }
            Err((Some(Errno::EOPNOTSUPP | Errno::ENOTTY), _)) => self.unfreezable(target),
            Err((_, source)) => {
                self.log.error(format!("{name} cannot be frozen: {source}"));
                self.fail(FreezeError::Failed {
                    name: name.clone(),
                    source,
                });
            }
        }
    }

    fn unfreezable(&self, target: &Target) {
        let name = &target.name;
        if self.strict {
            self.fail(FreezeError::Unfreezable { name: name.clone() });
            return;
        }
        match self.ops.sync(target.as_fd()) {
            Ok(()) => {
                *target.state() = State::Synced;
                self.log.warning(format!(
                    "{name} has no means to freeze: synced instead, writes to it go on"
                ));
            }
            Err(source) => self.fail(FreezeError::Failed {
                name: name.clone(),
                source,
            }),
        }
    }

    fn thaw_one(&self, _: usize, target: &Target) {
        let State::Ours { since, took } = *target.state() else {
            return;
        };
        let name = &target.name;
        let result = self.ops.thaw(target.as_fd());
        let stood = since.elapsed().as_secs_f64();
        match result.map_err(|e| (e.raw_os_error().map(Errno::from_raw), e)) {
            Ok(()) => {
                *target.state() = State::Thawed { took };
                self.log
                    .info(format!("{name} thawed, was frozen for {stood:.6} s"));
            }
            Err((Some(Errno::EINVAL), _)) if self.abort.load(Ordering::SeqCst) => {
                *target.state() = State::Thawed { took };
                self.log.info(format!(
                    "{name} is thawed already, was frozen for at most {stood:.6} s"
                ));
            }
            Err((Some(Errno::EINVAL), _)) => {
                *target.state() = State::Thawed { took };
                self.log
                    .error(format!("{name} had been thawed by somebody else before"));
                lock(&self.early).push(name.clone());
            }
            Err((_, source)) => {
                // It stays ours, so that it is tried again when the session is dropped.
                self.log.error(format!("{name} cannot be thawed: {source}"));
                lock(&self.thaw_failure).get_or_insert(ThawError::Failed {
                    name: name.clone(),
                    source,
                });
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // All that is kept in these is whole after each single assignment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ms(time: Duration) -> String {
    format!("{:.3} ms", time.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logbook::Sink;
    use std::collections::BTreeMap;
    use std::os::fd::AsRawFd;

    /// Records calls, and fails those it was told to fail. Descriptors stand for file systems.
    #[derive(Default)]
    struct Double {
        calls: Mutex<Vec<(&'static str, usize)>>,
        numbers: BTreeMap<i32, usize>,
        failures: BTreeMap<(&'static str, usize), Errno>,
    }

    impl Double {
        fn call(&self, what: &'static str, fd: BorrowedFd<'_>) -> io::Result<()> {
            let number = self.numbers[&fd.as_raw_fd()];
            lock(&self.calls).push((what, number));
            match self.failures.get(&(what, number)) {
                Some(errno) => Err((*errno).into()),
                None => Ok(()),
            }
        }
    }

    impl FsOps for Double {
        fn sync(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
            self.call("sync", fd)
        }
        fn freeze(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
            self.call("freeze", fd)
        }
        fn thaw(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
            self.call("thaw", fd)
        }
    }

    struct Setup {
        double: Arc<Double>,
        session: Session,
        abort: Arc<AtomicBool>,
        foreign: Arc<Mutex<Vec<usize>>>,
    }

    /// File systems 0, 1, ... in the given waves, worked on by one thread at a time.
    fn setup(waves: &[usize], failures: &[(&'static str, usize, Errno)], strict: bool) -> Setup {
        let mut double = Double::default();
        let mut targets = Vec::new();
        for (number, wave) in waves.iter().enumerate() {
            let fd: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
            double.numbers.insert(fd.as_raw_fd(), number);
            let dev = DevId::default();
            targets.push(Target::new(dev, format!("/fs{number}"), *wave, fd));
        }
        for (what, number, errno) in failures {
            double.failures.insert((what, *number), *errno);
        }
        let double = Arc::new(double);
        let abort = Arc::new(AtomicBool::new(false));
        let foreign = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&foreign);
        let session = Session::new(
            targets,
            double.clone(),
            Logbook::new(Sink::Memory),
            Limits {
                strict,
                parallel: 1,
                write_back: 1,
            },
            Arc::clone(&abort),
            Box::new(move |index| lock(&heard).push(index)),
        );
        Setup {
            double,
            session: session.unwrap(),
            abort,
            foreign,
        }
    }

    fn calls(setup: &Setup) -> Vec<(&'static str, usize)> {
        lock(&setup.double.calls).clone()
    }

    #[test]
    fn waves_are_frozen_in_order_and_thawed_in_reverse() {
        let s = setup(&[1, 0, 2], &[], false);
        s.session.sync();
        let summary = s.session.freeze().unwrap();
        assert_eq!(summary.ours, 3);
        s.session.thaw().unwrap();
        let sync = [("sync", 1), ("sync", 0), ("sync", 2)];
        let freeze = [("freeze", 1), ("freeze", 0), ("freeze", 2)];
        let thaw = [("thaw", 2), ("thaw", 0), ("thaw", 1)];
        assert_eq!(calls(&s), [sync, freeze, thaw].concat());
    }

    #[test]
    fn how_long_a_freeze_took_is_known_when_it_is_over() {
        let s = setup(&[0, 0], &[("freeze", 1, Errno::EBUSY)], false);
        s.session.freeze().unwrap();
        s.session.thaw().unwrap();
        let known = s.session.targets().iter().map(|t| t.took().is_some());
        assert_eq!(known.collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn a_failure_thaws_what_was_frozen_and_nothing_else() {
        let s = setup(&[0, 1, 2], &[("freeze", 1, Errno::EIO)], false);
        let error = s.session.freeze().unwrap_err();
        assert!(matches!(error, FreezeError::Failed { .. }), "{error}");
        assert_eq!(calls(&s), [("freeze", 0), ("freeze", 1), ("thaw", 0)]);
    }

    #[test]
    fn what_somebody_else_froze_counts_and_stays_theirs() {
        let s = setup(&[0, 0], &[("freeze", 1, Errno::EBUSY)], false);
        let summary = s.session.freeze().unwrap();
        assert_eq!((summary.ours, summary.foreign), (1, 1));
        assert_eq!(*lock(&s.foreign), [1]);
        s.session.thaw().unwrap();
        assert!(!calls(&s).contains(&("thaw", 1)));
    }

    #[test]
    fn what_cannot_freeze_is_synced_unless_strict() {
        let failures = [("freeze", 1, Errno::EOPNOTSUPP)];
        let s = setup(&[0, 0], &failures, false);
        let summary = s.session.freeze().unwrap();
        assert_eq!((summary.ours, summary.synced), (1, 1));
        assert!(calls(&s).contains(&("sync", 1)));

        let s = setup(&[0, 0], &failures, true);
        let error = s.session.freeze().unwrap_err();
        assert!(matches!(error, FreezeError::Unfreezable { .. }), "{error}");
        assert!(calls(&s).contains(&("thaw", 0)));
    }

    #[test]
    fn an_early_thaw_by_somebody_else_is_named() {
        let s = setup(&[0, 0], &[("thaw", 0, Errno::EINVAL)], false);
        s.session.freeze().unwrap();
        let error = s.session.thaw().unwrap_err();
        assert!(error.to_string().ends_with(": /fs0"), "{error}");
        assert!(calls(&s).contains(&("thaw", 1)));
    }

    /// Makes the session remember how long each freeze took.
    fn with_usual(mut setup: Setup, usual: &[Option<u64>]) -> Setup {
        let work = Arc::get_mut(&mut setup.session.work).unwrap();
        for (target, ms) in work.targets.iter_mut().zip(usual) {
            target.usual = ms.map(Duration::from_millis);
        }
        setup
    }

    #[test]
    fn what_is_usually_quick_begins_after_what_is_slow_or_new() {
        let s = with_usual(
            setup(&[0; 4], &[], false),
            &[Some(5), Some(600), None, Some(40)],
        );
        s.session.freeze().unwrap();
        let order = [("freeze", 2), ("freeze", 1), ("freeze", 3), ("freeze", 0)];
        assert_eq!(calls(&s), order);
    }

    #[test]
    fn nobody_waits_for_a_slow_one_that_has_ended() {
        // An hour is how long the test would take.
        let s = with_usual(setup(&[0; 2], &[], false), &[Some(1), Some(3_600_000)]);
        s.session.freeze().unwrap();
        assert_eq!(calls(&s), [("freeze", 1), ("freeze", 0)]);
    }

    #[test]
    fn dropping_a_session_thaws() {
        let s = setup(&[0, 1], &[], false);
        s.session.freeze().unwrap();
        let double = Arc::clone(&s.double);
        drop(s);
        assert_eq!(lock(&double.calls)[2..], [("thaw", 1), ("thaw", 0)]);
    }

    #[test]
    fn a_freeze_that_is_called_off_freezes_nothing() {
        let s = setup(&[0, 1], &[], false);
        s.abort.store(true, Ordering::SeqCst);
        assert!(matches!(s.session.freeze(), Err(FreezeError::Aborted)));
        assert_eq!(calls(&s), []);
    }
}
