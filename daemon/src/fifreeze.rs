// SPDX-License-Identifier: GPL-2.0-only

//! Freezes by the ioctl that every kernel has, FIFREEZE.
//!
//! Anybody can thaw what is frozen so, and nobody does when this process ends. So the guard has a copy
//! of each descriptor and a deadline, a record lists what is frozen for when both are gone, a lock
//! keeps others of our kind away, and it is looked after what is frozen while it is.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder};
use std::time::Duration;

use crate::door::{Door, DoorError};
use crate::freeze::{Target, RETRY};
use crate::freezers;
use crate::guard::{Guard, GuardError};
use crate::logbook::{words, Logbook};
use crate::record::{Entry, Lock, Record, RecordError, RunDir};
use crate::sys;

/// How often it is looked after what is frozen.
const WATCH: Duration = Duration::from_millis(50);
const STACK_BYTES: usize = 64 * 1024;

/// The door, for one freeze.
pub struct Fifreeze {
    guard: Arc<Guard>,
    run: RunDir,
    deadline: Duration,
    /// Whether a host waits, as against a rehearsal.
    for_host: bool,
    log: Logbook,
    kept: Arc<Mutex<Option<Kept>>>,
    line: Arc<Line>,
}

/// Whether the guard is to hear of this freeze: from [`Door::arm`] to the last thaw, and no longer, since by its numbers
/// it would take what comes later for the next one's. Nothing is written under this lock: `/run` may hang.
type Line = Mutex<bool>;

/// What is kept from others as long as something is frozen: from [`Door::arm`] to the last thaw.
struct Kept {
    lock: Lock,
    /// What is to be frozen, by its number, and what of it is on record.
    all: Vec<Entry>,
    listed: BTreeSet<usize>,
    /// The record of somebody who has died, where not all that it lists could be thawed.
    earlier: Option<Record>,
}

impl Kept {
    /// Puts on record what is listed, beside what is left of an earlier one. The rest is as there.
    fn write(&self, run: &RunDir, record: Record) -> Result<(), RecordError> {
        let listed = self.listed.iter().filter_map(|it| self.all.get(*it));
        let record = Record {
            frozen: listed.cloned().collect(),
            earlier: self.earlier.clone().map(Box::new),
            ..record
        };
        run.write(&record, &self.lock)
    }

    /// What this freeze has held is not frozen by an earlier one any more. Whether there was any.
    fn forget(&mut self, targets: &[Target]) -> bool {
        let Some(earlier) = &mut self.earlier else {
            return false;
        };
        let held = targets.iter().filter(|it| it.has_been_ours());
        let is_less = earlier.leave_out(&held.map(entry_of).collect::<Vec<_>>());
        self.earlier.take_if(|it| it.frozen.is_empty());
        is_less
    }

    /// Nothing is frozen any more but what was before.
    fn end(self, run: &RunDir) -> Result<(), RecordError> {
        match &self.earlier {
            Some(earlier) => run.write(earlier, &self.lock),
            None => run.remove(),
        }
    }
}

fn entry_of(target: &Target) -> Entry {
    Entry {
        dev: target.dev,
        devices: target.devices.clone(),
        name: target.name.clone(),
    }
}

impl Fifreeze {
    /// Guarded by `guard`, with lock and record in `run`.
    pub fn new(
        guard: Arc<Guard>,
        run: RunDir,
        deadline: Duration,
        for_host: bool,
        log: Logbook,
    ) -> Self {
        Fifreeze {
            guard,
            run,
            deadline,
            for_host,
            log,
            kept: Arc::default(),
            line: Arc::default(),
        }
    }

    /// Whose record it is.
    fn record(&self) -> Record {
        Record {
            pid: std::process::id(),
            guard: self.guard.process(),
            for_host: self.for_host,
            ..Record::default()
        }
    }

    /// Changes what is on record, where `change` does: whoever thaws after the death of both goes by that.
    fn list(&self, change: impl FnOnce(&mut Kept) -> bool) {
        if let Some(kept) = &mut *lock(&self.kept) {
            if !change(kept) {
                return;
            }
            if let Err(error) = kept.write(&self.run, self.record()) {
                self.log.warning(words(&error));
            }
        }
    }

    /// Says something to the guard. Whether it is not to be said again.
    fn tell(&self, word: impl FnOnce(&Guard) -> Result<(), GuardError>) -> bool {
        let is_open = lock(&self.line);
        // A guard that is gone thaws nothing, and is noticed by whoever watches it.
        !*is_open || word(&self.guard).map_or_else(|error| !error.is_busy(), |()| true)
    }

    fn over(&self) -> Over {
        Over {
            guard: Arc::clone(&self.guard),
            run: self.run.clone(),
            log: self.log.clone(),
            kept: Arc::clone(&self.kept),
            line: Arc::clone(&self.line),
        }
    }
}

/// What ends with the last thaw.
struct Over {
    guard: Arc<Guard>,
    run: RunDir,
    log: Logbook,
    kept: Arc<Mutex<Option<Kept>>>,
    line: Arc<Line>,
}

impl Over {
    fn let_go(self) {
        let mut place = lock(&self.kept);
        let Some(kept) = place.take() else { return };
        let mut is_open = lock(&self.line);
        *is_open = false;
        // A guard that is gone is noticed, and replaced, by whoever watches it.
        let _ = self.guard.done();
        drop(is_open);
        if let Err(error) = kept.end(&self.run) {
            self.log.warning(words(&error));
        }
    }
}

fn lock<T>(kept: &Mutex<T>) -> MutexGuard<'_, T> {
    // Both are whole at any time.
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tries to thaw these until all are, by whomever.
fn go_on(mut left: Vec<OwnedFd>, pause: Duration, thaw: impl Fn(BorrowedFd<'_>) -> io::Result<()>) {
    while !left.is_empty() {
        thread::sleep(pause);
        left.retain(|fd| {
            let said = thaw(fd.as_fd()).map_err(|e| e.raw_os_error());
            !matches!(said, Ok(()) | Err(Some(libc::EINVAL)))
        });
    }
}

impl Door for Fifreeze {
    fn arm(&self, targets: &[Target]) -> Result<(), DoorError> {
        let mut place = lock(&self.kept);
        let run_lock = self.run.lock()?;
        // Nobody can go by one that cannot be read.
        let earlier = self.run.read().ok().flatten().map(Record::as_one);
        let kept = Kept {
            lock: run_lock,
            all: targets.iter().map(entry_of).collect(),
            listed: (0..targets.len()).collect(),
            earlier,
        };
        kept.write(&self.run, self.record())?;
        let deadline = self.deadline;
        // Whoever has something to say to the guard meanwhile says it when that knows what of. What was to be said
        // before was of a freeze of which nothing has begun.
        let mut is_open = lock(&self.line);
        let armed = self.guard.arm(targets, deadline, &kept.lock, self.for_host);
        *is_open = true;
        drop(is_open);
        *place = Some(kept);
        drop(place);
        if armed.is_err() {
            self.over().let_go();
        }
        Ok(armed?)
    }

    fn freeze(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        sys::freeze(fd)
    }

    fn thaw(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        sys::thaw(fd)
    }

    fn is_half_frozen(&self, target: &Target) -> Option<String> {
        freezers::under_way(target.dev, &target.devices)
    }

    fn leave(&self, index: usize) -> bool {
        // First whoever would thaw it: what has been claimed is theirs for as short as can be.
        let is_heard = self.tell(|guard| guard.forget(index));
        self.list(|kept| kept.listed.remove(&index));
        is_heard
    }

    fn claim(&self, index: usize) {
        self.list(|kept| kept.listed.insert(index));
        // Where it is not heard nobody thaws it should this process die in the next moment.
        self.tell(|guard| guard.claim(index));
    }

    fn own(&self, index: usize) {
        // As above, and should the deadline pass only this process thaws it.
        self.tell(|guard| guard.own(index));
    }

    fn freezes_are_over(&self) -> bool {
        self.tell(Guard::frozen)
    }

    fn thaw_begins(&self) {
        // Where it is not heard the deadline is the first one, as for a THAW that comes later.
        self.tell(|guard| guard.thawing(self.deadline));
    }

    /// Takes from the record what is not frozen or not ours.
    fn settle(&self, targets: &[Target]) {
        self.list(|kept| {
            let ours = targets.iter().enumerate().filter(|(_, it)| it.is_ours());
            let ours: BTreeSet<usize> = ours.map(|(index, _)| index).collect();
            let before = std::mem::replace(&mut kept.listed, ours);
            kept.forget(targets) || before != kept.listed
        });
    }

    fn let_go(&self) {
        // Where it is not heard nobody but the session thaws, behind what holds it up.
        self.tell(Guard::release);
    }

    fn disarm(&self, targets: &[Target]) {
        match &mut *lock(&self.kept) {
            Some(kept) => kept.forget(targets),
            None => return,
        };
        let over = self.over();
        let left: Vec<&Target> = targets.iter().filter(|it| it.is_ours()).collect();
        if left.is_empty() {
            return over.let_go();
        }
        // That stays in the guard's hands and in the record, and nothing else may be frozen beside it: the
        // lock is kept until it is thawed.
        let copies = left.iter().map(|it| it.as_fd().try_clone_to_owned());
        let copies: io::Result<Vec<OwnedFd>> = copies.collect();
        let thaw = move |left| {
            go_on(left, RETRY, sys::thaw);
            over.log
                .warning("what could not be thawed is thawed at last");
            over.let_go();
        };
        let builder = Builder::new().name("left".into()).stack_size(STACK_BYTES);
        let begun = copies.and_then(|left| builder.spawn(move || thaw(left)));
        if let Err(error) = begun {
            self.log
                .error(format!("what is left is not tried again: {error}"));
        }
    }

    fn watched_every(&self) -> Option<Duration> {
        Some(WATCH)
    }
}

/// The same ioctls with nobody to mind what is frozen: for what cannot freeze anyway.
pub struct Unguarded;

impl Door for Unguarded {
    fn arm(&self, _targets: &[Target]) -> Result<(), DoorError> {
        Ok(())
    }

    fn freeze(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        sys::freeze(fd)
    }

    fn thaw(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        sys::thaw(fd)
    }

    fn leave(&self, _index: usize) -> bool {
        true
    }

    fn claim(&self, _index: usize) {}

    fn own(&self, _index: usize) {}

    fn freezes_are_over(&self) -> bool {
        true
    }

    fn settle(&self, _targets: &[Target]) {}

    fn let_go(&self) {}

    fn disarm(&self, _targets: &[Target]) {}

    fn watched_every(&self) -> Option<Duration> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::played::{self, Played};
    use crate::logbook::Sink;
    use nix::sys::stat::Mode;
    use std::cell::RefCell;
    use std::os::fd::AsRawFd as _;
    use std::time::Instant;

    /// A door whose guard the test plays, with lock and record in a folder of its own.
    fn door(name: &str) -> (Fifreeze, Played, RunDir) {
        let name = format!("hv-vss-{name}-{}", std::process::id());
        let run = RunDir::new(std::env::temp_dir().join(name));
        let (guard, played) = played::guard();
        let log = Logbook::new(Sink::Memory);
        let door = Fifreeze::new(guard, run.clone(), Duration::from_secs(60), true, log);
        (door, played, run)
    }

    fn target(dev: &str) -> Target {
        let fd = nix::unistd::pipe().unwrap().0;
        Target::new(dev.parse().unwrap(), dev.into(), 0, fd)
    }

    fn left_by_a_dead_process(run: &RunDir, devs: &[&str]) {
        let lock = run.lock().unwrap();
        let frozen = devs.iter().map(|it| entry_of(&target(it))).collect();
        let record = Record {
            pid: 7,
            frozen,
            ..Record::default()
        };
        run.write(&record, &lock).unwrap();
    }

    /// What is on record as ours, and as left by somebody else.
    fn on_record(run: &RunDir) -> Option<(Vec<String>, Vec<String>)> {
        let record = run.read().unwrap()?;
        let devs = |it: &Record| it.frozen.iter().map(|it| it.dev.to_string()).collect();
        let earlier = record.earlier.as_deref();
        Some((devs(&record), earlier.map(devs).unwrap_or_default()))
    }

    fn lists(devs: &[&str]) -> Vec<String> {
        devs.iter().map(|it| (*it).to_owned()).collect()
    }

    #[test]
    fn what_a_dead_process_has_left_frozen_stays_on_record() {
        let (door, _played, run) = door("left");
        left_by_a_dead_process(&run, &["8:1", "8:2"]);
        let targets = [target("8:2"), target("8:3").held()];
        door.arm(&targets).unwrap();
        let left = || lists(&["8:1", "8:2"]);
        let all = lists(&["8:2", "8:3"]);
        assert_eq!(on_record(&run), Some((all, left())));
        door.settle(&targets);
        assert_eq!(on_record(&run), Some((lists(&["8:3"]), left())));
        // What it tried to freeze and could not.
        door.disarm(&[target("8:2")]);
        assert_eq!(on_record(&run), Some((left(), Vec::new())));
        std::fs::remove_dir_all(run.path()).unwrap();
    }

    #[test]
    fn what_we_have_frozen_ourselves_nobody_else_has_left_frozen() {
        for settles in [true, false] {
            let (door, _played, run) = door(&format!("held-{settles}"));
            left_by_a_dead_process(&run, &["8:1", "8:2"]);
            let targets = [target("8:2").held(), target("8:3").held()];
            door.arm(&targets).unwrap();
            if settles {
                door.settle(&targets);
                let ours = lists(&["8:2", "8:3"]);
                assert_eq!(on_record(&run), Some((ours, lists(&["8:1"]))));
            }
            // By then all is thawed.
            lock(&door.kept).as_mut().map(|it| it.forget(&targets));
            door.over().let_go();
            assert_eq!(on_record(&run), Some((lists(&["8:1"]), Vec::new())));
            // Nothing is left of it when the last one has been ours.
            let last = [target("8:1").held()];
            door.arm(&last).unwrap();
            lock(&door.kept).as_mut().map(|it| it.forget(&last));
            door.over().let_go();
            assert_eq!(on_record(&run), None);
            std::fs::remove_dir_all(run.path()).unwrap();
        }
    }

    #[test]
    fn what_comes_late_is_not_said_to_the_guard_of_the_next_freeze() {
        let (door, played, run) = door("late");
        let targets = [target("8:1"), target("8:2")];
        // Nor what comes early, as of a freeze that there is not.
        door.let_go();
        door.arm(&targets).unwrap();
        // Nor is it on record for whoever thaws when both are dead, until it is to be frozen after all.
        assert!(door.leave(1));
        assert_eq!(on_record(&run), Some((lists(&["8:1"]), Vec::new())));
        door.claim(1);
        assert_eq!(on_record(&run), Some((lists(&["8:1", "8:2"]), Vec::new())));
        door.own(1);
        door.freezes_are_over();
        door.thaw_begins();
        door.let_go();
        let heard = [
            ("start", 0),
            ("forget", 1),
            ("claim", 1),
            ("own", 1),
            ("frozen", 0),
            ("thawing", 0),
            ("release", 0),
        ];
        assert_eq!(played.heard(), heard);
        door.disarm(&targets);
        assert!(door.leave(1));
        door.claim(1);
        door.own(1);
        door.freezes_are_over();
        door.settle(&targets);
        door.let_go();
        door.disarm(&targets);
        assert_eq!(played.heard(), [("done", 0)]);
        std::fs::remove_dir_all(run.path()).unwrap();
    }

    #[test]
    fn what_the_guard_has_no_time_to_hear_is_to_be_said_again() {
        let (door, played, run) = door("busy");
        door.arm(&[target("8:1")]).unwrap();
        let unheard = (0..100_000).find(|number| !door.leave(*number)).unwrap();
        assert!(!door.freezes_are_over());
        assert_eq!(door.guard.is_unfit(), None);
        // One that does not even hear that it is over is of no use to the next freeze.
        door.over().let_go();
        assert_eq!(door.guard.is_unfit(), Some("hangs"));
        assert_eq!(played.heard().len(), 1 + unheard);
        door.arm(&[target("8:1")]).unwrap();
        assert!(door.leave(unheard));
        drop(played);
        // It thaws nothing any more.
        assert!(door.leave(unheard));
        std::fs::remove_dir_all(run.path()).unwrap();
    }

    #[test]
    fn the_guard_hears_what_it_is_to_do_while_the_record_cannot_be_written() {
        let (door, played, run) = door("record");
        door.arm(&[target("8:1"), target("8:2")]).unwrap();
        // Nobody reads from there yet.
        let new = run.path().join("frozen.new");
        nix::unistd::mkfifo(&new, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        let door = Arc::new(door);
        let theirs = Arc::clone(&door);
        let leaves = thread::spawn(move || theirs.leave(1));
        while door.kept.try_lock().is_ok() {
            thread::yield_now();
        }
        let theirs = Arc::clone(&door);
        let says = thread::spawn(move || theirs.let_go());
        let until = Instant::now() + Duration::from_secs(10);
        let mut heard = Vec::new();
        while heard.len() < 3 && Instant::now() < until {
            heard.extend(played.heard());
            thread::yield_now();
        }
        drop(std::fs::File::open(&new).unwrap());
        says.join().unwrap();
        leaves.join().unwrap();
        assert_eq!(heard, [("start", 0), ("forget", 1), ("release", 0)]);
        std::fs::remove_dir_all(run.path()).unwrap();
    }

    #[test]
    fn what_cannot_be_thawed_is_tried_again_until_it_is() {
        let fds: Vec<OwnedFd> = (0..2).map(|_| nix::unistd::pipe().unwrap().0).collect();
        let stubborn = fds[0].as_raw_fd();
        let calls = RefCell::new(Vec::new());
        go_on(fds, Duration::ZERO, |fd| {
            let is_stubborn = fd.as_raw_fd() == stubborn;
            calls.borrow_mut().push(is_stubborn);
            let times = calls.borrow().iter().filter(|it| **it).count();
            match (is_stubborn, times) {
                (true, 1 | 2) => Err(nix::Error::EIO.into()),
                // By somebody else meanwhile.
                (true, _) => Err(nix::Error::EINVAL.into()),
                (false, _) => Ok(()),
            }
        });
        assert_eq!(calls.into_inner(), [true, false, true, true]);
    }
}
