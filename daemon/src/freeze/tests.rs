// SPDX-License-Identifier: GPL-2.0-only

//! Sessions before a door that records what is done and fails as it is told. Descriptors stand for
//! file systems.

use super::*;
use crate::door::Syncer;
use crate::logbook::Sink;
use crate::writes::{Look, Writes};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::stat::fstat;
use nix::unistd::{pipe, pipe2};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicIsize, AtomicU64, AtomicUsize};
use std::sync::mpsc::Receiver;
use std::sync::Weak;

const SHORT: Duration = Duration::from_millis(60);

/// What is done to which.
type Call = (&'static str, usize);

/// Nothing is to be done while the kernel freezes.
const NOTHING: Option<fn()> = None;

#[derive(Default)]
struct Double {
    this: Weak<Double>,
    calls: Mutex<Vec<Call>>,
    /// By the number that each has for the kernel, whatever the descriptor.
    numbers: BTreeMap<u64, usize>,
    /// What fails, how, and how often.
    failures: Mutex<BTreeMap<Call, (Errno, usize)>>,
    /// How long a first call takes.
    slow: Mutex<BTreeMap<Call, Duration>>,
    /// What a first call waits for.
    held: Mutex<BTreeMap<Call, Receiver<()>>>,
    left: Mutex<Vec<usize>>,
    /// What was said of whose each is.
    said: Mutex<Vec<Call>>,
    /// How many more words it does not hear: that one is left, or that no freeze follows.
    deaf: AtomicIsize,
    /// After how many calls it heard that no freeze is under way any more.
    over_after: Mutex<Vec<usize>>,
    /// How often it was disarmed.
    disarmed: AtomicUsize,
    /// As [`Door::watched_every`].
    watched_every: Option<Duration>,
    /// As [`Limits::lag`], if it is not short.
    lag: Option<Duration>,
    /// As [`Limits::give_up`], the same way.
    give_up: Option<Duration>,
    /// Whether what is busy is frozen by half only.
    is_half_frozen: bool,
    /// Whether the freeze of one can be called off, and whose was and has not come back.
    can_call_off: bool,
    called_off: Mutex<BTreeSet<usize>>,
    /// What is written to the disks of which, where that shows.
    written: BTreeMap<usize, Arc<AtomicU64>>,
}

/// A look at a disk that is at work and counts.
fn counted(done: u64) -> Look {
    Look {
        done: Some(done),
        is_counted: true,
        in_hand: vec![(DevId::default(), done)],
    }
}

/// What stands for a file system.
fn stand_in() -> OwnedFd {
    pipe().unwrap().0
}

fn inode_of(fd: impl AsFd) -> u64 {
    fstat(fd).unwrap().st_ino
}

impl Double {
    fn hears(&self) -> bool {
        self.deaf.fetch_sub(1, Ordering::SeqCst) <= 0
    }

    fn call(&self, what: &'static str, fd: BorrowedFd<'_>) -> io::Result<()> {
        let number = self.numbers[&inode_of(fd)];
        lock(&self.calls).push((what, number));
        let slow = lock(&self.slow).remove(&(what, number));
        let until = Instant::now() + slow.unwrap_or_default();
        while Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
            if what == "freeze" && lock(&self.called_off).contains(&number) {
                return Err(Errno::ESTALE.into());
            }
        }
        let held = lock(&self.held).remove(&(what, number));
        if let Some(held) = held {
            // Or for the end of whoever holds it.
            let _ = held.recv();
        }
        match lock(&self.failures).get_mut(&(what, number)) {
            Some((errno, times)) if *times > 0 => {
                *times -= 1;
                Err((*errno).into())
            }
            _ => Ok(()),
        }
    }
}

impl Door for Double {
    fn arm(&self, targets: &[Target]) -> Result<(), DoorError> {
        assert!(!targets.is_empty());
        Ok(())
    }
    fn syncer(&self) -> Syncer {
        let this = self.this.upgrade().unwrap();
        Arc::new(move |fd| this.call("sync", fd))
    }
    fn freeze(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.call("freeze", fd)
    }
    fn thaw(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.call("thaw", fd)
    }
    fn can_call_off(&self) -> bool {
        self.can_call_off
    }
    fn is_half_frozen(&self, _target: &Target) -> Option<String> {
        self.is_half_frozen.then(|| "is half frozen".into())
    }
    fn goes_on(&self) -> bool {
        // As the module's door, which can do both.
        self.can_call_off
    }
    fn says_what_it_has_thawed(&self) -> bool {
        self.can_call_off
    }
    fn call_off(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        lock(&self.called_off).insert(self.numbers[&inode_of(fd)]);
        Ok(())
    }
    fn is_stuck(&self, fd: BorrowedFd<'_>) -> bool {
        lock(&self.called_off).contains(&self.numbers[&inode_of(fd)])
    }
    fn leave(&self, index: usize) -> bool {
        lock(&self.said).push(("leave", index));
        let is_heard = self.hears();
        if is_heard {
            lock(&self.left).push(index);
        }
        is_heard
    }
    fn claim(&self, index: usize) {
        lock(&self.said).push(("claim", index));
        lock(&self.left).retain(|it| *it != index);
    }
    fn own(&self, index: usize) {
        lock(&self.said).push(("own", index));
    }
    fn freezes_are_over(&self) -> bool {
        let is_heard = self.hears();
        if is_heard {
            lock(&self.over_after).push(lock(&self.calls).len());
        }
        is_heard
    }
    fn settle(&self, _targets: &[Target]) {}
    fn let_go(&self) {}
    fn disarm(&self, _targets: &[Target]) {
        self.disarmed.fetch_add(1, Ordering::SeqCst);
    }
    fn watched_every(&self) -> Option<Duration> {
        self.watched_every
    }
}

/// A door behind which what takes long does not hang yet.
fn waits() -> Double {
    Double {
        give_up: Some(THAW_TIME * 20),
        ..Double::default()
    }
}

/// A door where others can thaw.
fn watched(double: Double) -> Double {
    Double {
        watched_every: Some(Duration::ZERO),
        ..double
    }
}

struct Setup {
    double: Arc<Double>,
    session: Session,
    means: Means,
    learnt: Learnt,
}

/// What fails: always, or so many times.
type Failure = (&'static str, usize, Errno, usize);
const ALWAYS: usize = usize::MAX;

/// File systems 0, 1, ... in the given waves, each with its usual time in milliseconds.
fn setup_with(waves: &[(usize, Option<u64>)], failures: &[Failure], strict: bool) -> Setup {
    setup_on(waves, &[], failures, strict)
}

/// The same, where each stands on what is named for it; on what others do, nobody knows.
fn setup_on(
    waves: &[(usize, Option<u64>)],
    stand_on: &[Option<&[&str]>],
    failures: &[Failure],
    strict: bool,
) -> Setup {
    setup_before(
        watched(Double::default()),
        waves,
        stand_on,
        failures,
        strict,
    )
}

/// The same before a door that is like this one.
fn setup_before(
    mut double: Double,
    waves: &[(usize, Option<u64>)],
    stand_on: &[Option<&[&str]>],
    failures: &[Failure],
    strict: bool,
) -> Setup {
    let mut targets = Vec::new();
    let mut learnt = Learnt::default();
    for (number, (wave, usual)) in waves.iter().enumerate() {
        let fd = stand_in();
        double.numbers.insert(inode_of(&fd), number);
        let dev: DevId = format!("8:{number}").parse().unwrap();
        if let Some(ms) = usual {
            learnt.usual.insert(dev, Duration::from_millis(*ms));
        }
        let stands_on = stand_on.get(number).copied().flatten();
        let stands_on = stands_on.map(|it| it.iter().map(|dev| dev.parse().unwrap()).collect());
        let mut target = Target::new(dev, format!("/fs{number}"), *wave, fd);
        target = target.with_devices(vec![dev]);
        if let Some(written) = double.written.get(&number).cloned() {
            let look = move || counted(written.load(Ordering::SeqCst));
            target = target.written_back(Box::new(look));
        }
        targets.push(target.standing_on(stands_on));
    }
    for (what, number, errno, times) in failures {
        lock(&double.failures).insert((what, *number), (*errno, *times));
    }
    let double = Arc::new_cyclic(|this| Double {
        this: this.clone(),
        ..double
    });
    let means = Means {
        door: double.clone(),
        log: Logbook::new(Sink::Memory),
        limits: Limits {
            strict,
            parallel: 1,
            give_up: double.give_up.unwrap_or(SHORT),
            patience: SHORT,
            lag: double.lag.unwrap_or(SHORT),
        },
        abort: Arc::default(),
        progress: Arc::default(),
        pool: Arc::default(),
        aside: Arc::default(),
        apart: Arc::default(),
    };
    let session = Session::new(targets, means.clone(), &learnt).unwrap();
    Setup {
        double,
        session,
        means,
        learnt,
    }
}

/// The same without usual times.
fn setup(waves: &[usize], failures: &[Failure], strict: bool) -> Setup {
    let waves: Vec<_> = waves.iter().map(|wave| (*wave, None)).collect();
    setup_with(&waves, failures, strict)
}

impl Setup {
    fn freeze(&mut self) -> Result<Summary, FreezeError> {
        self.session.freeze(&mut self.learnt, NOTHING)
    }

    fn calls(&self) -> Vec<Call> {
        lock(&self.double.calls).clone()
    }

    fn slow(&self, what: &'static str, number: usize, time: Duration) {
        lock(&self.double.slow).insert((what, number), time);
    }
}

#[test]
fn waves_are_frozen_in_order_and_thawed_in_reverse() {
    let mut s = setup(&[1, 0, 2], &[], false);
    s.session.sync(1, &mut s.learnt);
    let summary = s.freeze().unwrap();
    assert_eq!(summary.ours, 3);
    s.session.thaw().unwrap();
    let sync = [("sync", 1), ("sync", 0), ("sync", 2)];
    let freeze = [("freeze", 1), ("freeze", 0), ("freeze", 2)];
    let thaw = [("thaw", 2), ("thaw", 0), ("thaw", 1)];
    assert_eq!(s.calls(), [sync, freeze, thaw].concat());
}

#[test]
fn a_failure_thaws_what_was_frozen_and_nothing_else() {
    let mut s = setup(&[0, 1, 2], &[("freeze", 1, Errno::EPROTO, ALWAYS)], false);
    let error = s.freeze().unwrap_err();
    assert!(matches!(error, FreezeError::Failed { .. }), "{error}");
    assert_eq!(s.calls(), [("freeze", 0), ("freeze", 1), ("thaw", 0)]);
}

#[test]
fn what_is_out_of_order_is_left_out_unless_strict() {
    let failures = [("freeze", 1, Errno::EIO, ALWAYS)];
    let mut s = setup(&[0, 1, 2], &failures, false);
    let summary = s.freeze().unwrap();
    assert_eq!((summary.ours, summary.left_out), (2, 1));
    let said = s.means.log.held();
    assert!(said
        .iter()
        .any(|(_, line)| line.contains("/fs1 is out of order")));
    s.session.thaw().unwrap();
    // For the history, which has no log.
    let account = s.session.account();
    let reasons = account.iter().map(|it| it.reason.is_some());
    assert_eq!(reasons.collect::<Vec<_>>(), [false, true, false]);
    let reason = account[1].reason.as_deref().unwrap_or_default();
    assert!(reason.starts_with("is out of order: "), "{reason}");

    let mut s = setup(&[0, 1, 2], &failures, true);
    let error = s.freeze().unwrap_err();
    assert!(error.to_string().contains("/fs1"), "{error}");
    assert_eq!(s.calls(), [("freeze", 0), ("freeze", 1), ("thaw", 0)]);
}

#[test]
fn a_disk_that_fails_in_whatever_way_costs_nobody_else_the_backup() {
    for errno in [
        Errno::ETIMEDOUT,
        Errno::ETIME,
        Errno::ENOLINK,
        Errno::ENODATA,
        Errno::EILSEQ,
        Errno::EBADE,
        Errno::ENOSPC,
        Errno::EINVAL,
        Errno::EBADMSG,
        Errno::ENODEV,
        Errno::EPERM,
        Errno::EACCES,
        Errno::EINTR,
        Errno::ENOMEM,
    ] {
        // Before either door.
        for watched_every in [None, Some(Duration::ZERO)] {
            let double = Double {
                watched_every,
                ..Double::default()
            };
            let failures = [("freeze", 0, errno, ALWAYS)];
            let waves = [(0, None), (1, None)];
            let mut s = setup_before(double, &waves, &[], &failures, false);
            let summary = s.freeze().unwrap();
            assert_eq!((summary.ours, summary.left_out), (1, 1), "{errno}");
            let mut s = setup(&[0, 1], &failures, true);
            let error = s.freeze().unwrap_err();
            assert!(matches!(error, FreezeError::Strict { .. }), "{error}");
        }
    }
}

#[test]
fn a_failure_whose_number_has_no_name_is_of_that_file_system_and_one_without_a_number_is_ours() {
    // ENOTSUPP, which the kernel keeps to itself as a rule.
    const NAMELESS: i32 = 524;
    assert_eq!(Errno::from_raw(NAMELESS), Errno::UnknownErrno);
    for (error, is_ours) in [
        (io::Error::from_raw_os_error(NAMELESS), false),
        (io::Error::other("no answer"), true),
    ] {
        let mut s = setup(&[0, 1], &[], false);
        let work = &s.session.work;
        work.meet(0, &work.targets[0], error);
        assert_eq!(work.gave_up(), is_ours);
        let frozen = s.freeze().map(|it| (it.ours, it.left_out));
        assert_eq!(frozen.ok(), (!is_ours).then_some((1, 1)));
    }
}

#[test]
fn what_is_our_own_fault_is_nobody_elses() {
    for errno in [Errno::EBADF, Errno::EPROTO, Errno::ESTALE] {
        let mut s = setup(&[0, 1], &[("freeze", 1, errno, ALWAYS)], false);
        let error = s.freeze().unwrap_err();
        assert!(matches!(error, FreezeError::Failed { .. }), "{error}");
        assert_eq!(s.calls().last(), Some(&("thaw", 0)));
    }
    // The module has no room for any, which is not the same as a disk that has none; or we may freeze none.
    for errno in [
        Errno::ENOSPC,
        Errno::EPERM,
        Errno::EACCES,
        Errno::EINTR,
        Errno::ENOMEM,
    ] {
        let failures = [0, 1].map(|number| ("freeze", number, errno, ALWAYS));
        let mut s = setup(&[0, 1], &failures, false);
        let error = s.freeze().unwrap_err();
        assert!(matches!(error, FreezeError::Failed { .. }), "{error}");
    }
}

#[test]
fn what_has_begun_something_long_meanwhile_is_left_out_of_the_next_attempt() {
    for strict in [false, true] {
        let failures = [("freeze", 1, Errno::EBUSY, 1)];
        let mut s = setup(&[0], &failures, strict);
        let asked = Arc::new(AtomicU64::new(0));
        let begins = Arc::clone(&asked);
        // From the second attempt on.
        let busy = move |_: BorrowedFd<'_>| {
            let before = begins.fetch_add(1, Ordering::SeqCst);
            (before > 0).then(|| "busy: at something long".to_owned())
        };
        let fds = [stand_in(), stand_in()];
        let mut double = Double::default();
        for (number, fd) in fds.iter().enumerate() {
            double.numbers.insert(inode_of(fd), number);
        }
        for (what, number, errno, times) in failures {
            lock(&double.failures).insert((what, number), (errno, times));
        }
        let double = Arc::new(double);
        let [first, second] = fds;
        let target = |number, fd| {
            Target::new(
                DevId {
                    major: 8,
                    minor: number,
                },
                format!("/fs{number}"),
                number as usize,
                fd,
            )
        };
        let targets = vec![target(0, first).asked(Box::new(busy)), target(1, second)];
        let door = double.clone();
        s.means = Means { door, ..s.means };
        s.session = Session::new(targets, s.means.clone(), &s.learnt).unwrap();
        let result = s.freeze();
        assert_eq!(asked.load(Ordering::SeqCst), 2);
        let calls = lock(&double.calls).clone();
        assert_eq!(calls.iter().filter(|it| **it == ("freeze", 0)).count(), 1);
        match strict {
            false => {
                let summary = result.unwrap();
                assert_eq!((summary.ours, summary.left_out), (1, 1));
            }
            true => {
                let error = result.unwrap_err().to_string();
                assert!(error.contains("/fs0 is busy"), "{error}");
            }
        }
    }
}

#[test]
fn what_is_busy_is_waited_for_while_nothing_is_frozen() {
    let mut s = setup(&[0, 1], &[("freeze", 1, Errno::EBUSY, 2)], false);
    let summary = s.freeze().unwrap();
    assert_eq!((summary.ours, summary.foreign), (2, 0));
    // Between two of its attempts the other one is never frozen.
    let expected = [
        ("freeze", 0),
        ("freeze", 1),
        ("thaw", 0),
        ("freeze", 1),
        ("freeze", 1),
        ("thaw", 1),
        ("freeze", 0),
        ("freeze", 1),
    ];
    assert_eq!(s.calls(), expected);
    // Until its own freeze has succeeded it is nobody's.
    let expected = ["leave", "claim", "leave", "claim", "own"].map(|word| (word, 1));
    assert_eq!(*lock(&s.double.said), expected);
}

#[test]
fn of_two_that_are_busy_the_first_does_not_stand_still_for_the_second() {
    let busy = |number, times| ("freeze", number, Errno::EBUSY, times);
    let mut s = setup(&[0, 0], &[busy(0, 1), busy(1, 2)], false);
    let obstacles = [Obstacle::Busy(0), Obstacle::Busy(1)];
    s.session.overcome(&obstacles, &mut s.learnt);
    let expected = [
        ("freeze", 0),
        ("freeze", 0),
        ("thaw", 0),
        ("freeze", 1),
        ("freeze", 1),
        ("freeze", 1),
    ];
    assert_eq!(s.calls(), expected);
}

/// The disk of number 0 does not answer.
fn without_the_first(s: &mut Setup) -> usize {
    let mut asked = 0;
    let ask = |disks: &BTreeSet<DevId>, _: Duration, _: &dyn Fn() -> bool| {
        asked = disks.len();
        BTreeSet::from(["8:0".parse().unwrap()])
    };
    s.session.ask_disks(&mut s.learnt, ask);
    asked
}

#[test]
fn what_is_on_a_disk_that_does_not_answer_is_left_out_where_no_freeze_can_be_called_off() {
    for (can_call_off, strict) in [(false, false), (false, true), (true, false)] {
        let double = Double {
            can_call_off,
            ..watched(Double::default())
        };
        // 1 stands on 0, of 3 nobody knows.
        let on: &[&str] = &["8:0"];
        let stand_on = [Some(&[][..]), Some(on), Some(&[]), None];
        let waves = [1, 0, 1, 0].map(|wave| (wave, None));
        let mut s = setup_before(double, &waves, &stand_on, &[], strict);
        let asked = without_the_first(&mut s);
        assert_eq!(asked, if can_call_off { 0 } else { 4 });
        let result = s.freeze();
        if strict {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("/fs0 hangs: 8:0 does not answer"), "{error}");
            assert_eq!(s.calls(), []);
            continue;
        }
        let summary = result.unwrap();
        let expected = if can_call_off { (4, 0) } else { (1, 3) };
        assert_eq!((summary.ours, summary.left_out), expected);
        if !can_call_off {
            assert_eq!(s.calls(), [("freeze", 2)]);
            // Whoever minds what is frozen must not thaw them.
            assert_eq!(*lock(&s.double.left), [0, 1, 3]);
        }
    }
}

#[test]
fn what_cannot_freeze_is_not_synced_on_a_disk_that_does_not_answer() {
    let cannot = |number| ("freeze", number, Errno::EOPNOTSUPP, ALWAYS);
    let mut s = setup(&[0, 0], &[cannot(0), cannot(1)], false);
    s.learnt.unfreezable = BTreeSet::from([0, 1].map(|it| DevId {
        major: 8,
        minor: it,
    }));
    without_the_first(&mut s);
    let summary = s.freeze().unwrap();
    assert_eq!((summary.synced, summary.left_out), (1, 1));
    assert!(!s.calls().contains(&("sync", 0)), "{:?}", s.calls());
}

#[test]
fn what_was_busy_and_hangs_once_it_is_free_is_called_off() {
    const LIMIT: Duration = Duration::from_millis(300);
    let double = Double {
        give_up: Some(LIMIT),
        can_call_off: true,
        ..Double::default()
    };
    let busy = ("freeze", 1, Errno::EBUSY, ALWAYS);
    let waves = [(0, None), (0, None)];
    let stand_on: [Option<&[&str]>; 2] = [Some(&[]); 2];
    let mut s = setup_before(double, &waves, &stand_on, &[busy], false);
    let double = Arc::clone(&s.double);
    let kernel = thread::spawn(move || {
        while !lock(&double.calls).contains(&("freeze", 1)) {
            thread::yield_now();
        }
        lock(&double.slow).insert(("freeze", 1), LIMIT * 40);
        lock(&double.failures).clear();
    });
    let begun = Instant::now();
    let summary = s.freeze().unwrap();
    kernel.join().unwrap();
    assert_eq!((summary.ours, summary.left_out), (1, 1));
    assert!(begun.elapsed() < LIMIT * 20, "{:?}", begun.elapsed());
}

#[test]
fn what_is_not_frozen_when_it_is_called_off_is_left_alone_though_another_hangs() {
    const HANG: Duration = Duration::from_secs(3);
    // 0 is frozen and goes on again, since 1 takes so long, or its turn does not come; that of 2 does not.
    for (waves, taken_back) in [([0, 0, 1], true), ([1, 0, 2], false)] {
        let mut s = setup(&waves, &[], false);
        s.slow("freeze", 1, HANG);
        let (abort, double) = (Arc::clone(&s.means.abort), Arc::clone(&s.double));
        let awaited = if taken_back {
            ("thaw", 0)
        } else {
            ("freeze", 1)
        };
        let call_off = thread::spawn(move || {
            while !lock(&double.calls).contains(&awaited) {
                thread::yield_now();
            }
            abort.store(true, Ordering::SeqCst);
            let begun = Instant::now();
            while lock(&double.left).len() < 2 && begun.elapsed() < HANG / 2 {
                thread::yield_now();
            }
            let left = lock(&double.left).clone();
            left
        });
        assert!(matches!(s.freeze(), Err(FreezeError::Aborted)));
        assert_eq!(call_off.join().unwrap(), [0, 2]);
    }
}

#[test]
fn what_is_left_alone_and_was_not_heard_is_said_again() {
    const HANG: Duration = Duration::from_secs(3);
    let mut s = setup(&[0, 1, 1], &[], false);
    s.slow("freeze", 0, HANG);
    s.double.deaf.store(1, Ordering::SeqCst);
    let (abort, double) = (Arc::clone(&s.means.abort), Arc::clone(&s.double));
    let call_off = thread::spawn(move || {
        while lock(&double.calls).is_empty() {
            thread::yield_now();
        }
        abort.store(true, Ordering::SeqCst);
        let begun = Instant::now();
        while lock(&double.left).len() < 2 && begun.elapsed() < HANG / 2 {
            thread::yield_now();
        }
        let mut left = lock(&double.left).clone();
        left.sort_unstable();
        left
    });
    assert!(matches!(s.freeze(), Err(FreezeError::Aborted)));
    assert_eq!(call_off.join().unwrap(), [1, 2]);

    // Nor does that take an end of it all.
    let mut s = setup(&[0, 1], &[("freeze", 0, Errno::EBUSY, ALWAYS)], false);
    s.slow("freeze", 1, SHORT * 3);
    s.double.deaf.store(1, Ordering::SeqCst);
    assert_eq!(s.freeze().unwrap().foreign, 1);
    assert_eq!(*lock(&s.double.left), [0]);
    // What stands still meanwhile is not looked at: the end of the freeze is.
    let mut s = setup(&[0, 1], &[("freeze", 1, Errno::EBUSY, ALWAYS)], false);
    s.double.deaf.store(1, Ordering::SeqCst);
    assert_eq!(s.freeze().unwrap().foreign, 1);
    assert_eq!(*lock(&s.double.left), [1]);
}

#[test]
fn what_others_have_frozen_by_half_does_not_count() {
    for (is_half_frozen, is_strict, expected) in [
        (false, true, Some((1, 1, 0))),
        (true, false, Some((1, 0, 1))),
        (true, true, None),
    ] {
        let double = Double {
            is_half_frozen,
            watched_every: Some(SHORT),
            ..Double::default()
        };
        let busy = ("freeze", 1, Errno::EBUSY, ALWAYS);
        let waves = [(0, None), (0, None)];
        let stand_on: [Option<&[&str]>; 2] = [Some(&[]); 2];
        let mut s = setup_before(double, &waves, &stand_on, &[busy], is_strict);
        let said = s.freeze().ok();
        let said = said.map(|it| (it.ours, it.foreign, it.left_out));
        assert_eq!(said, expected);
    }
}

#[test]
fn what_stands_on_what_others_keep_frozen_is_left_out_where_its_freeze_could_not_be_called_off() {
    for (can_call_off, strict, times, expected) in [
        (false, false, ALWAYS, Some((0, 1, 1))),
        (false, true, ALWAYS, None),
        // They thaw it in time.
        (false, false, 1, Some((2, 0, 0))),
        (true, false, ALWAYS, Some((1, 1, 0))),
    ] {
        let double = Double {
            can_call_off,
            watched_every: Some(SHORT),
            ..Double::default()
        };
        let busy = ("freeze", 1, Errno::EBUSY, times);
        let waves = [(0, None), (1, None)];
        let stand_on: [Option<&[&str]>; 2] = [Some(&["8:1"]), Some(&[])];
        let mut s = setup_before(double, &waves, &stand_on, &[busy], strict);
        let said = s.freeze().ok();
        let said = said.map(|it| (it.ours, it.foreign, it.left_out));
        assert_eq!(said, expected);
        let hangs = s.calls().contains(&("freeze", 0));
        assert_eq!(hangs, can_call_off || times == 1);
    }
}

#[test]
fn that_no_freeze_is_under_way_is_said_before_a_thaw_that_may_hang_and_once() {
    // All was frozen, and then it was called off; or one has failed.
    for failure in [None, Some(("freeze", 2, Errno::EPROTO, ALWAYS))] {
        let failures: Vec<Failure> = failure.into_iter().collect();
        let mut s = setup(&[0, 0, 1], &failures, false);
        let frozen = s.freeze();
        assert_eq!(frozen.is_ok(), failure.is_none());
        if frozen.is_ok() {
            s.means.abort.store(true, Ordering::SeqCst);
            s.session.thaw().unwrap();
        }
        assert_eq!(*lock(&s.double.over_after), [3]);
        let calls = s.calls();
        let begun = calls.iter().position(|(what, _)| *what == "thaw");
        assert_eq!(begun, Some(3), "{calls:?}");
    }
    let mut s = setup(&[0, 0, 1], &[], false);
    s.freeze().unwrap();
    s.session.settle();
    s.session.thaw().unwrap();
    assert_eq!(*lock(&s.double.over_after), [3]);
}

#[test]
fn what_others_hold_is_not_asked_for_when_all_is_called_off() {
    let mut s = setup(&[0, 0], &[("freeze", 1, Errno::EBUSY, ALWAYS)], false);
    s.freeze().unwrap();
    let asked = || s.calls().iter().filter(|it| **it == ("freeze", 1)).count();
    let before = asked();
    s.means.abort.store(true, Ordering::SeqCst);
    s.session.thaw().unwrap();
    // Whoever minds all is thawing by now, and what is claimed with it.
    assert_eq!(*lock(&s.double.left), [1]);
    assert_eq!(asked(), before);
}

#[test]
fn what_somebody_else_keeps_frozen_counts_and_stays_theirs() {
    let mut s = setup(&[0, 0], &[("freeze", 1, Errno::EBUSY, ALWAYS)], false);
    let summary = s.freeze().unwrap();
    assert_eq!((summary.ours, summary.foreign), (1, 1));
    assert_eq!(*lock(&s.double.left), [1]);
    s.session.thaw().unwrap();
    assert!(!s.calls().contains(&("thaw", 1)));
    assert_eq!(*lock(&s.double.left), [1]);
}

#[test]
fn what_somebody_else_has_let_go_meanwhile_is_named_and_thawed() {
    for looked_after in [false, true] {
        let mut s = setup(&[0, 0], &[("freeze", 1, Errno::EBUSY, ALWAYS)], false);
        s.freeze().unwrap();
        // Ours is as it was, theirs is not.
        lock(&s.double.failures).clear();
        let ours = ("freeze", 0);
        lock(&s.double.failures).insert(ours, (Errno::EBUSY, ALWAYS));
        if looked_after {
            // A freeze that nobody has claimed would stay if this process died.
            assert!(s.session.look_after().is_empty());
            assert_eq!(*lock(&s.double.left), [1]);
        }
        let error = s.session.thaw().unwrap_err();
        assert!(lock(&s.double.left).is_empty());
        assert!(error.to_string().ends_with(": /fs1"), "{error}");
        assert!(s.calls().ends_with(&[("thaw", 0)]) || s.calls().contains(&("thaw", 0)));
        assert_eq!(s.calls().iter().filter(|it| **it == ("thaw", 1)).count(), 1);
    }
}

#[test]
fn what_was_thawed_and_is_looked_after_is_named_and_thawed_again() {
    let mut s = setup(&[0, 0], &[], false);
    s.freeze().unwrap();
    lock(&s.double.failures).insert(("freeze", 0), (Errno::EBUSY, ALWAYS));
    assert_eq!(s.session.look_after(), ["/fs1"]);
    let error = s.session.thaw().unwrap_err();
    assert!(error.to_string().ends_with(": /fs1"), "{error}");
    assert!(s.calls().contains(&("thaw", 1)));
}

#[test]
fn what_cannot_freeze_is_synced_with_nothing_frozen_and_known_the_next_time() {
    let failures = [("freeze", 1, Errno::EOPNOTSUPP, ALWAYS)];
    let mut s = setup(&[0, 1], &failures, false);
    let summary = s.freeze().unwrap();
    assert_eq!((summary.ours, summary.synced), (1, 1));
    let expected = [
        ("freeze", 0),
        ("freeze", 1),
        ("thaw", 0),
        ("sync", 1),
        ("freeze", 0),
    ];
    assert_eq!(s.calls(), expected);

    let mut next = setup(&[0, 1], &failures, false);
    next.learnt = s.learnt;
    next.session.sync(1, &mut next.learnt);
    next.freeze().unwrap();
    let expected = [("sync", 0), ("sync", 1), ("freeze", 1), ("freeze", 0)];
    assert_eq!(next.calls(), expected);

    let mut strict = setup(&[0, 1], &failures, true);
    let error = strict.freeze().unwrap_err();
    assert!(error.to_string().contains("no means to freeze"), "{error}");
    assert_eq!(strict.calls().last(), Some(&("thaw", 0)));
}

#[test]
fn what_is_taken_for_unfreezable_and_is_not_is_frozen() {
    for strict in [false, true] {
        let mut s = setup(&[0, 1], &[], strict);
        s.learnt.unfreezable.insert("8:1".parse().unwrap());
        s.session.sync(1, &mut s.learnt);
        assert_eq!(s.calls().contains(&("sync", 1)), strict);
        let summary = s.freeze().unwrap();
        assert_eq!((summary.ours, summary.synced), (2, 0));
        assert!(s.learnt.unfreezable.is_empty());
    }
}

#[test]
fn a_sync_that_fails_or_hangs_costs_nobody_else_the_backup() {
    let unfreezable = ("freeze", 1, Errno::EOPNOTSUPP, ALWAYS);
    let mut s = setup(
        &[0, 0],
        &[unfreezable, ("sync", 1, Errno::EIO, ALWAYS)],
        false,
    );
    let summary = s.freeze().unwrap();
    assert_eq!((summary.ours, summary.left_out), (1, 1));

    let mut s = setup(&[0, 0], &[unfreezable], false);
    s.slow("sync", 1, SHORT * 20);
    let summary = s.freeze().unwrap();
    assert_eq!((summary.ours, summary.left_out), (1, 1));
    // As long as it hangs it is not asked to sync again.
    let mut next = setup(&[0, 0], &[unfreezable], false);
    next.learnt = std::mem::take(&mut s.learnt);
    drop(s);
    let summary = next.freeze().unwrap();
    assert_eq!((summary.ours, summary.left_out), (1, 1));
    assert!(!next.calls().contains(&("sync", 1)));
}

#[test]
fn what_is_not_written_back_is_named_though_its_freeze_succeeds() {
    let failures = [("sync", 1, Errno::EIO, 1)];
    let mut s = setup(&[0, 0], &failures, false);
    s.session.sync(1, &mut s.learnt);
    let summary = s.freeze().unwrap();
    assert_eq!((summary.ours, summary.left_out), (2, 0));
    let said: Vec<&String> = s.learnt.unwritten().collect();
    assert_eq!(said.len(), 1);
    let begin = "/fs1 has not been written back as a whole: ";
    assert!(said[0].starts_with(begin), "{said:?}");
    s.learnt.begin();
    assert_eq!(s.learnt.unwritten().count(), 0);

    let mut s = setup(&[0, 0], &failures, true);
    s.session.sync(1, &mut s.learnt);
    let error = s.freeze().unwrap_err();
    assert!(error.to_string().starts_with(begin), "{error}");
    assert!(!s.calls().iter().any(|(what, _)| *what == "freeze"));
}

#[test]
fn a_sync_that_hangs_ends_when_it_is_called_off_and_is_not_begun_again_before_it_returns() {
    let mut s = setup(&[0, 0], &[], false);
    s.slow("sync", 0, SHORT * 10);
    let abort = Arc::clone(&s.means.abort);
    let double = Arc::clone(&s.double);
    let call_off = thread::spawn(move || {
        while lock(&double.calls).is_empty() {
            thread::yield_now();
        }
        abort.store(true, Ordering::SeqCst);
    });
    let begun = Instant::now();
    s.session.sync(1, &mut s.learnt);
    assert!(matches!(s.freeze(), Err(FreezeError::Aborted)));
    assert!(begun.elapsed() < SHORT * 8, "{:?}", begun.elapsed());
    call_off.join().unwrap();
    assert_eq!(s.calls(), [("sync", 0)]);
    // The next one is of the other only, or waits.
    let mut other = setup(&[0, 0], &[], false);
    other.learnt = std::mem::take(&mut s.learnt);
    assert!(other.learnt.hangs("8:0".parse().unwrap()));
    other.session.sync(1, &mut other.learnt);
    assert!(begun.elapsed() >= SHORT * 10, "{:?}", begun.elapsed());
    assert_eq!(other.calls(), [("sync", 0), ("sync", 1)]);
}

#[test]
fn a_sync_of_what_hangs_is_waited_for_by_nobody_and_costs_nobody_else_the_backup() {
    const LIMIT: Duration = Duration::from_millis(300);
    // 1 stands on 0, which hangs; the others have nothing to do with either.
    let waves = [1, 0, 1, 1].map(|wave| (wave, None));
    let stand_on: [Option<&[&str]>; 4] = [Some(&[]), Some(&["8:0"]), Some(&[]), Some(&[])];
    let with = |strict| {
        let double = Double {
            give_up: Some(LIMIT),
            written: (0..4).map(|number| (number, Arc::default())).collect(),
            ..Double::default()
        };
        setup_before(double, &waves, &stand_on, &[], strict)
    };
    let mut s = with(false);
    s.slow("sync", 0, LIMIT * 12);
    let begun = Instant::now();
    s.session.sync(1, &mut s.learnt);
    let summary = s.freeze().unwrap();
    assert!(begun.elapsed() >= LIMIT);
    assert!(begun.elapsed() < LIMIT * 6, "{:?}", begun.elapsed());
    assert_eq!((summary.ours, summary.left_out), (2, 2));
    for number in [0, 1] {
        assert!(!s.calls().contains(&("freeze", number)));
    }
    assert!(s.calls().contains(&("sync", 2)) && s.calls().contains(&("sync", 3)));
    assert_eq!(*lock(&s.double.left), [0, 1]);
    let said = s.means.log.held();
    let says = |text: &str| said.iter().any(|(_, line)| line.contains(text));
    assert!(
        says("/fs0 hangs") && says("/fs1 may stand on /fs0"),
        "{said:?}"
    );
    s.session.thaw().unwrap();
    // What is known to hang is not waited for again.
    let mut strict = with(true);
    strict.learnt = std::mem::take(&mut s.learnt);
    let begun = Instant::now();
    strict.session.sync(1, &mut strict.learnt);
    let error = strict.freeze().unwrap_err();
    assert!(begun.elapsed() < LIMIT, "{:?}", begun.elapsed());
    assert!(error.to_string().contains("/fs0 hangs"), "{error}");
    assert!(!strict.calls().contains(&("sync", 0)));
    // Nor is it left out when it is back.
    let until = Instant::now() + Duration::from_secs(60);
    while strict.learnt.hangs("8:0".parse().unwrap()) {
        assert!(Instant::now() < until, "it hangs still");
        thread::yield_now();
    }
    let mut back = with(true);
    back.learnt = std::mem::take(&mut strict.learnt);
    back.session.sync(1, &mut back.learnt);
    assert_eq!(back.freeze().unwrap().ours, 4);
    assert!(back.calls().contains(&("sync", 0)));
}

#[test]
fn a_freeze_that_hangs_is_called_off_alone_and_costs_nobody_else_the_backup() {
    const LIMIT: Duration = Duration::from_millis(500);
    let stand_on: [Option<&[&str]>; 3] = [Some(&[]); 3];
    let with = |strict, called_off: BTreeSet<usize>| {
        let double = Double {
            give_up: Some(LIMIT),
            can_call_off: true,
            called_off: Mutex::new(called_off),
            ..Double::default()
        };
        let s = setup_before(
            double,
            &[(0, None), (0, None), (1, None)],
            &stand_on,
            &[],
            strict,
        );
        s.means.pool.grow(3).unwrap();
        s
    };
    for strict in [false, true] {
        let mut s = with(strict, BTreeSet::new());
        s.slow("freeze", 0, LIMIT * 20);
        let begun = Instant::now();
        let result = s.freeze();
        assert!(begun.elapsed() >= LIMIT && begun.elapsed() < LIMIT * 8);
        let of_other: Vec<_> = s.calls().into_iter().filter(|(_, n)| *n == 1).collect();
        assert_eq!(of_other[..2], [("freeze", 1), ("thaw", 1)]);
        if strict {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("/fs0 takes longer"), "{error}");
        } else {
            let summary = result.unwrap();
            assert_eq!((summary.ours, summary.left_out), (2, 1));
        }
        assert!(s.learnt.called_off.contains_key(&"8:0".parse().unwrap()));
        // As long as it has not come back it is left alone, also by the next process.
        for learnt in [std::mem::take(&mut s.learnt), Learnt::default()] {
            let mut next = with(false, BTreeSet::from([0]));
            next.learnt = learnt;
            // Its disk was taken away: nobody is told of it any more.
            let gone = "9:9".parse().unwrap();
            next.learnt.called_off.insert(gone, "/gone".into());
            next.session.sync(1, &mut next.learnt);
            let summary = next.freeze().unwrap();
            assert_eq!((summary.ours, summary.left_out), (2, 1));
            assert!(!next.learnt.called_off.contains_key(&gone));
            assert!(next.calls().iter().all(|(_, number)| *number != 0));
            let mut back = with(true, BTreeSet::new());
            back.learnt = next.learnt;
            assert_eq!(back.freeze().unwrap().ours, 3);
        }
    }
}

#[test]
fn a_freeze_that_hangs_is_not_joined_by_what_holds_it_nor_called_off_below_what_is_frozen() {
    const LIMIT: Duration = Duration::from_millis(300);
    let on: &[&str] = &["8:1"];
    for (slow, ours) in [(0, 1), (1, 3)] {
        // An image, what holds it, and one that has nothing to do with them.
        let double = Double {
            give_up: Some(LIMIT),
            can_call_off: true,
            ..Double::default()
        };
        let waves = [(0, None), (1, None), (1, None)];
        let stand_on = [Some(on), Some(&[][..]), Some(&[])];
        let mut s = setup_before(double, &waves, &stand_on, &[], false);
        s.slow("freeze", slow, LIMIT * 4);
        let summary = s.freeze().unwrap();
        assert_eq!((summary.ours, summary.left_out), (ours, 3 - ours));
        let holder = s.calls().contains(&("freeze", 1));
        assert_eq!(
            (holder, lock(&s.double.called_off).len()),
            match slow {
                0 => (false, 1),
                _ => (true, 0),
            }
        );
    }
}

#[test]
fn what_nobody_knows_the_ground_of_costs_nobody_else_the_backup_and_nobody_costs_it_its_own() {
    const LIMIT: Duration = Duration::from_millis(300);
    // A program serves the first, from whatever; the last is the root.
    let waves = [(0, None), (1, None), (2, None)];
    let stand_on = [None, Some(&[][..]), Some(&[])];
    let with = |can_call_off, called_off: &[usize]| {
        let double = Double {
            give_up: Some(LIMIT),
            can_call_off,
            called_off: Mutex::new(called_off.iter().copied().collect()),
            ..Double::default()
        };
        setup_before(double, &waves, &stand_on, &[], false)
    };
    // It hangs, or another does while it is frozen.
    for slow in [0, 1] {
        let mut s = with(true, &[]);
        s.slow("freeze", slow, LIMIT * 20);
        let summary = s.freeze().unwrap();
        assert_eq!((summary.ours, summary.left_out), (2, 1), "{slow} hangs");
        assert_eq!(*lock(&s.double.called_off), BTreeSet::from([slow]));
        s.session.thaw().unwrap();
    }
    // Another is known to hang: where it could not be called off should it be on that, it is not tried.
    for (can_call_off, ours) in [(true, 2), (false, 1)] {
        let mut s = with(can_call_off, &[1]);
        let dev = "8:1".parse().unwrap();
        s.learnt.called_off.insert(dev, "/fs1".into());
        let summary = s.freeze().unwrap();
        assert_eq!((summary.ours, summary.left_out), (ours, 3 - ours));
    }
}

#[test]
fn those_on_the_disk_of_one_that_hangs_hang_all_at_the_same_time() {
    const LIMIT: Duration = Duration::from_millis(300);
    let double = Double {
        give_up: Some(LIMIT),
        ..Double::default()
    };
    let mut s = setup_before(double, &[(0, None); 5], &[], &[], false);
    let targets = (0..5).map(|number| {
        let fd = stand_in();
        let dev: DevId = format!("8:{number}").parse().unwrap();
        let disk = DevId::default();
        let target = Target::new(dev, format!("/fs{number}"), 0, fd);
        target
            .with_disks(vec![disk])
            .written_back(Box::new(|| counted(0)))
    });
    let targets: Vec<Target> = targets.collect();
    let numbers = targets.iter().enumerate();
    let numbers = numbers.map(|(number, it)| (inode_of(it), number)).collect();
    let slow = (0..5).map(|number| (("sync", number), LIMIT * 10));
    let double = Arc::new_cyclic(|this: &Weak<Double>| Double {
        this: this.clone(),
        numbers,
        slow: Mutex::new(slow.collect()),
        ..Double::default()
    });
    s.means.door = double.clone();
    let session = Session::new(targets, s.means.clone(), &s.learnt).unwrap();
    let begun = Instant::now();
    session.sync(4, &mut s.learnt);
    assert!(begun.elapsed() < LIMIT * 4, "{:?}", begun.elapsed());
    assert_eq!(lock(&double.calls).len(), 5);
}

#[test]
fn a_sync_that_hangs_with_nothing_in_hand_is_given_up_on_as_well() {
    const LIMIT: Duration = Duration::from_millis(100);
    let double = Double {
        give_up: Some(LIMIT),
        ..Double::default()
    };
    let mut s = setup_before(double, &[(0, None), (0, None)], &[], &[], false);
    s.slow("sync", 0, LIMIT * 30);
    let idle = || Look {
        in_hand: Vec::new(),
        ..counted(1)
    };
    let again = |number: usize| {
        let target = &s.session.targets()[number];
        let fd = target.fd.try_clone().unwrap();
        Target::new(target.dev, target.name.clone(), 0, fd).written_back(Box::new(idle))
    };
    let session = Session::new(vec![again(0), again(1)], s.means.clone(), &s.learnt).unwrap();
    let begun = Instant::now();
    session.sync(1, &mut s.learnt);
    let took = begun.elapsed();
    assert!(took >= LIMIT * 3 && took < LIMIT * 20, "{took:?}");
    let summary = session.freeze(&mut s.learnt, NOTHING).unwrap();
    assert_eq!((summary.ours, summary.left_out), (1, 1));
}

#[test]
fn a_sync_of_what_is_slow_is_waited_for() {
    // The one gets on with it, of the other nobody can tell.
    let written: Arc<AtomicU64> = Arc::default();
    let double = Double {
        written: BTreeMap::from([(0, Arc::clone(&written))]),
        ..Double::default()
    };
    let mut s = setup_before(double, &[(0, None), (0, None)], &[], &[], true);
    for number in 0..2 {
        s.slow("sync", number, SHORT * 5);
    }
    let over = Arc::new(AtomicBool::new(false));
    let done = Arc::clone(&over);
    let disk = thread::spawn(move || {
        while !done.load(Ordering::SeqCst) {
            written.fetch_add(1, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(1));
        }
    });
    let begun = Instant::now();
    s.session.sync(1, &mut s.learnt);
    over.store(true, Ordering::SeqCst);
    disk.join().unwrap();
    assert!(begun.elapsed() >= SHORT * 10, "{:?}", begun.elapsed());
    assert_eq!(s.freeze().unwrap().ours, 2);
}

#[test]
fn those_that_are_frozen_do_not_wait_for_a_slow_one() {
    let mut s = setup(&[0, 0, 0], &[], false);
    s.means.pool.grow(3).unwrap();
    s.slow("freeze", 1, SHORT * 10);
    let summary = s.freeze().unwrap();
    assert_eq!(summary.ours, 3);
    let calls = s.calls();
    // Once frozen it is kept, and the others join it.
    assert_eq!(calls.iter().filter(|it| **it == ("freeze", 1)).count(), 1);
    for quick in [0, 2] {
        let of_it: Vec<_> = calls.iter().filter(|(_, n)| *n == quick).collect();
        let expected = [&("freeze", quick), &("thaw", quick), &("freeze", quick)];
        assert_eq!(of_it, expected);
    }
}

#[test]
fn a_thaw_that_hangs_does_not_hold_up_those_that_come_after() {
    let waves = [0, 1, 1, 2].map(|wave| (wave, None));
    let mut s = setup_before(waits(), &waves, &[], &[], false);
    assert!(s.session.freeze(&mut s.learnt, NOTHING).is_ok());
    s.slow("thaw", 3, THAW_TIME * 4);
    s.session.thaw().unwrap();
    let until: Vec<Instant> = s
        .session
        .account()
        .iter()
        .map(|it| it.until.unwrap())
        .collect();
    assert!(until[0] < until[3] && until[1] < until[3], "{until:?}");
    let calls = s.calls();
    let first = calls.iter().find(|call| call.0 == "thaw");
    assert_eq!(first, Some(&("thaw", 3)), "{calls:?}");
}

#[test]
fn a_thaw_that_does_not_come_back_ends_the_backup_in_time_and_is_no_loss_where_it_was_frozen_until_then(
) {
    const HANG: Duration = Duration::from_secs(60);
    // Who else can thaw, whether there are counters of what is written, and whether these count all, whether it is
    // strict, and whether it is good.
    for (watched, known, is_counted, strict, good) in [
        (false, false, false, false, true),
        (false, false, false, true, false),
        (true, false, false, false, false),
        (true, true, false, false, false),
        (true, true, true, false, true),
        (true, true, true, true, false),
    ] {
        for alone in [true, false] {
            let double = Double {
                watched_every: watched.then_some(Duration::ZERO),
                ..Double::default()
            };
            let waves = [(1, None), (0, None), (0, None)];
            let waves = if alone { &waves[..1] } else { &waves };
            let mut s = setup_before(double, waves, &[Some(&[][..]); 3], &[], false);
            s.means.limits.strict = strict;
            let path = std::env::temp_dir().join(format!("hv_vss-hung-{}", std::process::id()));
            std::fs::write(&path, "0 0 0 0 0 0 8 0").unwrap();
            let stat = std::fs::File::open(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            let mut stat = known.then_some(stat);
            let numbered = |number: usize| {
                let dev: DevId = format!("8:{number}").parse().unwrap();
                let fd = s.session.targets()[number].fd.try_clone().unwrap();
                let target = Target::new(dev, format!("/fs{number}"), waves[number].0, fd);
                match stat.take() {
                    Some(stat) => {
                        let target = target.with_writes(Writes::from(vec![stat]));
                        target.written_back(Box::new(move || Look {
                            is_counted,
                            ..counted(0)
                        }))
                    }
                    None => target,
                }
            };
            let targets: Vec<Target> = (0..waves.len()).map(numbered).collect();
            let session = Session::new(targets, s.means.clone(), &s.learnt).unwrap();
            session.freeze(&mut s.learnt, NOTHING).unwrap();
            s.slow("thaw", 0, HANG);
            let begun = Instant::now();
            let thawed = session.thaw();
            assert_eq!(session.in_thaw(), ["/fs0"]);
            match thawed {
                Ok(()) => assert!(good, "{watched} {known} {is_counted} {strict}"),
                Err(error) => {
                    assert!(!good, "{watched} {known} {is_counted} {strict}");
                    assert_eq!(error.to_string(), "the thaw has not come back: /fs0");
                }
            }
            session.learn(&mut s.learnt);
            // Nobody else is left frozen, nor does anybody wait for it when all ends.
            drop(session);
            assert!(begun.elapsed() < HANG / 2, "{:?}", begun.elapsed());
            let thaws = s.calls();
            let thaws = thaws.iter().filter(|(what, _)| *what == "thaw");
            assert_eq!(thaws.count(), waves.len());
            // As long as it has not come back, the next backup is without it.
            lock(&s.double.calls).clear();
            let summary = s.session.freeze(&mut s.learnt, NOTHING);
            let summary = summary.unwrap();
            assert_eq!((summary.ours, summary.left_out), (waves.len() - 1, 1));
            assert!(s.calls().iter().all(|(_, number)| *number != 0));
            s.session.thaw().unwrap();
        }
    }
}

#[test]
fn what_hangs_is_named_for_as_long_as_it_does_by_whoever_keeps_nothing_of_it_open() {
    let waves = [(0, None), (0, None)];
    let mut s = setup_before(Double::default(), &waves, &[Some(&[][..]); 2], &[], false);
    let (ends, hang) = channel();
    lock(&s.double.held).insert(("thaw", 0), hang);
    s.freeze().unwrap();
    assert!(s.learnt.given_up().is_empty());
    s.session.thaw().unwrap();
    s.session.learn(&mut s.learnt);
    let given_up = s.learnt.given_up();
    let names: Vec<String> = given_up.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["/fs0: its thaw has not come back"]);
    let Setup { session, .. } = s;
    drop(session);
    assert!(given_up[0].lasts());
    drop(ends);
    let since = Instant::now();
    while given_up[0].lasts() {
        assert!(since.elapsed() < Duration::from_secs(60));
        thread::sleep(ABORT_TICK);
    }
}

#[test]
fn a_thaw_that_does_not_come_back_amid_a_freeze_fails_that_one_and_no_other() {
    const HANG: Duration = Duration::from_secs(60);
    let mut s = setup(&[0, 1], &[("freeze", 1, Errno::EBUSY, 1)], false);
    s.slow("thaw", 0, HANG);
    let begun = Instant::now();
    let error = s.freeze().unwrap_err().to_string();
    assert_eq!(error, "/fs0 hangs: its thaw has not come back");
    let again = |number: usize| {
        let fd = s.session.targets()[number].fd.try_clone().unwrap();
        Target::new(s.session.targets()[number].dev, "/fs".into(), number, fd)
    };
    let next = Session::new(vec![again(0), again(1)], s.means.clone(), &s.learnt).unwrap();
    let next = next.freeze(&mut s.learnt, NOTHING).unwrap();
    assert_eq!((next.ours, next.left_out), (1, 1));
    assert!(begun.elapsed() < HANG / 2, "{:?}", begun.elapsed());
}

#[test]
fn what_comes_back_in_a_moment_is_not_taken_for_stuck() {
    // An earlier process has ended with it in the kernel's hands.
    let double = Double {
        called_off: Mutex::new(BTreeSet::from([0])),
        ..Double::default()
    };
    let mut s = setup_before(double, &[(0, None), (0, None)], &[], &[], true);
    let double = Arc::clone(&s.double);
    let back = thread::spawn(move || {
        thread::sleep(SHORT);
        lock(&double.called_off).clear();
    });
    assert_eq!(s.freeze().unwrap().ours, 2);
    back.join().unwrap();
}

#[test]
fn a_thaw_that_hangs_does_not_hold_up_those_that_are_taken_back_after_it() {
    // What is busy has the others taken back, and so has what is slow.
    for (failures, slow) in [
        (&[("freeze", 0, Errno::EBUSY, 1)][..], None),
        (&[], Some(0)),
    ] {
        // With one thread they are one after the other.
        let waves = [(1, None), (0, None), (0, None)];
        let stand_on = [Some(&[][..]), Some(&[]), Some(&[])];
        // A machine that is busy elsewhere is not slow.
        let double = Double {
            lag: Some(THAW_TIME),
            ..waits()
        };
        let mut s = setup_before(double, &waves, &stand_on, failures, false);
        if let Some(number) = slow {
            s.slow("freeze", number, SHORT * 40);
        }
        let hang = THAW_TIME * 3;
        s.slow("thaw", 1, hang);
        let (progress, done) = (
            Arc::clone(&s.means.progress),
            Arc::new(AtomicBool::new(false)),
        );
        let over = Arc::clone(&done);
        let look = thread::spawn(move || {
            let mut seen = false;
            while !over.load(Ordering::SeqCst) {
                seen |= progress
                    .stuck(Instant::now(), THAW_TIME)
                    .is_some_and(|it| it.contains("/fs1"));
                thread::sleep(Duration::from_millis(5));
            }
            seen
        });
        let double = Arc::clone(&s.double);
        let watch = thread::spawn(move || {
            let when = |call: Call| loop {
                if lock(&double.calls).contains(&call) {
                    return Instant::now();
                }
                thread::yield_now();
            };
            let hung = when(("thaw", 1));
            when(("thaw", 2)) - hung
        });
        let begun = Instant::now();
        s.freeze().unwrap();
        assert!(begun.elapsed() >= hang);
        done.store(true, Ordering::SeqCst);
        let waited = watch.join().unwrap();
        assert!(waited < hang - THAW_TIME / 2, "{waited:?}");
        assert!(look.join().unwrap(), "what hangs is not shown");
    }
}

#[test]
fn a_look_that_hangs_holds_up_no_thaw_and_is_not_taken_for_one() {
    let waves = [0, 0, 1].map(|wave| (wave, None));
    let mut s = setup_before(watched(waits()), &waves, &[], &[], false);
    s.freeze().unwrap();
    // All are still frozen, and one look takes long to find out.
    for number in 0..3 {
        lock(&s.double.failures).insert(("freeze", number), (Errno::EBUSY, ALWAYS));
    }
    let hang = STUCK_TIME * 4;
    s.slow("freeze", 1, hang);
    let begun = Instant::now();
    for _ in 0..2 {
        assert!(s.session.look_after().is_empty());
    }
    assert!(begun.elapsed() < hang / 2, "{:?}", begun.elapsed());
    // Of that one nobody knows.
    match s.session.thaw() {
        Err(ThawError::Hung { names }) => assert_eq!(names, ["/fs1"]),
        other => panic!("{other:?}"),
    }
    let until: Vec<Instant> = s
        .session
        .account()
        .iter()
        .map(|it| it.until.unwrap())
        .collect();
    // The kernel has the thaw of the one, too, before anybody hears that all is thawed.
    assert!(until.iter().all(|it| *it - begun < hang), "{until:?}");
    assert!(s.calls().contains(&("thaw", 1)));
    // What one of them has frozen again is thawed, and what others had thawed is told.
    let waves = [(0, None), (0, None)];
    let not_frozen = ("thaw", 0, Errno::EINVAL, 1);
    let mut s = setup_before(watched(waits()), &waves, &[], &[not_frozen], false);
    s.freeze().unwrap();
    s.slow("freeze", 0, hang);
    assert!(s.session.look_after().is_empty());
    assert!(s.session.thaw().is_err());
    let until = Instant::now() + Duration::from_secs(60);
    let of_the_first = |calls: Vec<Call>| calls.into_iter().filter(|(_, n)| *n == 0).count();
    while of_the_first(s.calls()) < 4 {
        assert!(Instant::now() < until, "{:?}", s.calls());
        thread::yield_now();
    }
    assert_eq!(s.calls().iter().rfind(|(_, n)| *n == 0), Some(&("thaw", 0)));
}

#[test]
fn a_thaw_that_hangs_is_left_when_the_host_waits_no_longer_however_long_one_may_take() {
    const LIMIT: Duration = Duration::from_secs(20);
    let double = Double {
        give_up: Some(LIMIT),
        ..Double::default()
    };
    let mut s = setup_before(double, &[(0, None), (1, None)], &[], &[], false);
    s.freeze().unwrap();
    s.slow("thaw", 0, LIMIT);
    let begun = Instant::now();
    s.session.thaw_by(Some(begun + THAW_TIME * 4)).unwrap();
    assert!(begun.elapsed() < LIMIT, "{:?}", begun.elapsed());
    assert_eq!(s.session.in_thaw(), ["/fs0"]);
}

#[test]
fn what_a_look_has_frozen_anew_when_its_thaw_came_had_been_thawed_by_others() {
    for was_frozen in [true, false] {
        let waves = [(0, None), (0, None)];
        let mut s = setup_before(watched(waits()), &waves, &[], &[], false);
        s.freeze().unwrap();
        lock(&s.double.failures).insert(("freeze", 1), (Errno::EBUSY, ALWAYS));
        let (let_go, held) = channel();
        lock(&s.double.held).insert(("freeze", 0), held);
        assert!(s.session.look_after().is_empty());
        let double = Arc::clone(&s.double);
        let kernel = thread::spawn(move || {
            let is_thawed = || lock(&double.calls).contains(&("thaw", 0));
            while !is_thawed() {
                thread::yield_now();
            }
            if !was_frozen {
                // That was the freeze of the look, and nothing is left to thaw.
                let failure = (Errno::EINVAL, ALWAYS);
                lock(&double.failures).insert(("thaw", 0), failure);
            }
            drop(let_go);
        });
        match s.session.thaw() {
            Ok(()) if was_frozen => {}
            Err(ThawError::Early { names }) if !was_frozen => assert_eq!(names, ["/fs0"]),
            other => panic!("{was_frozen}: {other:?}"),
        }
        kernel.join().unwrap();
        assert_eq!(s.calls().iter().filter(|it| **it == ("thaw", 0)).count(), 2);
    }
}

#[test]
fn what_others_hold_and_cannot_be_asked_is_lost_unless_its_disk_says_otherwise() {
    for strict in [false, true] {
        let waves = [(0, None), (0, None)];
        let busy = ("freeze", 0, Errno::EBUSY, ALWAYS);
        let mut s = setup_before(watched(Double::default()), &waves, &[], &[busy], strict);
        assert_eq!(s.freeze().unwrap().foreign, 1);
        // Nobody counts what is written there.
        s.slow("freeze", 0, SHORT * 20);
        let names = match s.session.thaw() {
            Err(ThawError::Hung { names }) => names,
            other => panic!("{other:?}"),
        };
        assert_eq!(names, ["/fs0"]);
    }
}

#[test]
fn that_no_freeze_follows_is_said_until_it_is_heard() {
    let mut s = setup(&[0], &[], false);
    s.freeze().unwrap();
    lock(&s.double.failures).insert(("freeze", 0), (Errno::EBUSY, ALWAYS));
    s.double.deaf.store(1, Ordering::SeqCst);
    s.session.settle();
    assert!(lock(&s.double.over_after).is_empty());
    for _ in 0..2 {
        assert!(s.session.look_after().is_empty());
    }
    s.session.thaw().unwrap();
    assert_eq!(lock(&s.double.over_after).len(), 1);
}

#[test]
fn whoever_minds_what_is_frozen_does_so_while_one_is_inside_a_freeze_that_only_asks() {
    for was_thawed in [false, true] {
        let busy = ("freeze", 0, Errno::EBUSY, ALWAYS);
        let mut s = setup(&[0, 0], &[busy], false);
        assert_eq!(s.freeze().unwrap().foreign, 1);
        if was_thawed {
            lock(&s.double.failures).clear();
        }
        let (let_go, held) = channel();
        lock(&s.double.held).insert(("freeze", 0), held);
        assert!(matches!(s.session.thaw(), Err(ThawError::Hung { .. })));
        let double = Arc::clone(&s.double);
        s.session.disarm();
        drop(s.session);
        thread::sleep(SHORT);
        let disarmed = || double.disarmed.load(Ordering::SeqCst);
        assert_eq!(disarmed(), 0);
        drop(let_go);
        let until = Instant::now() + Duration::from_secs(60);
        while disarmed() == 0 {
            assert!(Instant::now() < until, "it is never disarmed");
            thread::yield_now();
        }
        // By then it is nobody's.
        let calls = lock(&double.calls);
        assert_eq!(calls.contains(&("thaw", 0)), was_thawed, "{calls:?}");
    }
}

#[test]
fn what_hangs_keeps_nothing_else_open() {
    let waves = [(0, None), (0, None)];
    let mut s = setup_before(Double::default(), &waves, &[], &[], false);
    s.freeze().unwrap();
    // The other ends of what stands for them.
    let copies = s.session.work.targets.iter();
    let copies: Vec<OwnedFd> = copies.map(|it| it.fd.try_clone().unwrap()).collect();
    let inodes: Vec<u64> = copies.iter().map(inode_of).collect();
    drop(copies);
    let hangs = Arc::clone(&s.session.work);
    s.slow("thaw", 1, SHORT * 40);
    s.session.thaw().unwrap();
    assert_eq!(s.session.in_thaw(), ["/fs1"]);
    s.session.disarm();
    drop(s.session);
    let now: Vec<u64> = hangs.targets.iter().map(inode_of).collect();
    assert_ne!(now[0], inodes[0]);
    assert_eq!(now[1], inodes[1]);
}

#[test]
fn a_thaw_that_hangs_and_then_fails_is_tried_again_by_the_door_or_else_although_its_session_has_ended(
) {
    for goes_on in [false, true] {
        let double = Double {
            can_call_off: goes_on,
            ..Double::default()
        };
        let fails = ("thaw", 0, Errno::EIO, 1);
        let mut s = setup_before(double, &[(0, None)], &[], &[fails], false);
        s.freeze().unwrap();
        s.slow("thaw", 0, SHORT * 20);
        s.session.thaw().unwrap();
        s.session.disarm();
        let work = Arc::clone(&s.session.work);
        drop(s.session);
        let until = Instant::now() + Duration::from_secs(60);
        while Arc::strong_count(&work) > 1 {
            assert!(Instant::now() < until, "somebody is still at it");
            thread::yield_now();
        }
        let calls = lock(&s.double.calls);
        let thaws = calls.iter().filter(|it| it.0 == "thaw");
        assert_eq!(thaws.count(), if goes_on { 1 } else { 2 });
    }
}

#[test]
fn what_stands_on_a_slow_one_is_not_thawed_while_that_freezes() {
    // 0 stands on 4, nobody knows what 1 stands on, 2 stands on nothing, 3 on 0, and so on 4.
    let on: &[&str] = &["8:4"];
    let stand_on = [Some(on), None, Some(&[]), Some(&["8:0", "8:4"]), Some(&[])];
    let waves = [1, 0, 1, 0, 2].map(|wave| (wave, None));
    let double = Double {
        can_call_off: true,
        ..waits()
    };
    let mut s = setup_before(double, &waves, &stand_on, &[], false);
    s.slow("freeze", 4, SHORT * 10);
    s.freeze().unwrap();
    let calls = s.calls();
    let of = |number| -> Vec<&str> {
        let mine = calls.iter().filter(|(_, n)| *n == number);
        mine.map(|(what, _)| *what).collect()
    };
    for kept in [0, 1, 3] {
        let first = of(kept)[0];
        assert_eq!(first, "freeze");
        let thaw = calls.iter().position(|it| *it == ("thaw", kept));
        let slow_thaw = calls.iter().position(|it| *it == ("thaw", 4));
        assert!(thaw.is_none() || thaw > slow_thaw, "{calls:?}");
    }
    assert_eq!(of(2), ["freeze", "thaw", "freeze"]);
    let summary = s.session.summary();
    assert_eq!(summary.ours, 5);
    // And in order in the end.
    let last = |number| calls.iter().rposition(|it| *it == ("freeze", number));
    assert!(last(3) < last(0) && last(0) < last(4), "{calls:?}");
}

#[test]
fn what_has_nothing_to_do_with_the_others_is_frozen_as_late_as_can_be() {
    // 1 stands on 2, 3 is the root; nobody knows what 4 stands on.
    let on: &[&str] = &["8:2"];
    let nothing: Option<&[&str]> = Some(&[]);
    let stand_on = [nothing, Some(on), nothing, nothing, None];
    let waves = [1, 1, 2, 3, 0].map(|wave| (wave, None));
    let mut s = setup_on(&waves, &stand_on, &[], false);
    s.freeze().unwrap();
    // It was asked first whether others have frozen what 1 stands on.
    let calls = s.calls().split_off(2);
    let frozen: Vec<usize> = calls.iter().map(|(_, n)| *n).collect();
    assert_eq!(frozen[..2], [4, 1]);
    assert_eq!(
        BTreeSet::from([frozen[2], frozen[3]]),
        BTreeSet::from([0, 2])
    );
    assert_eq!(frozen[4..], [3]);
}

#[test]
fn what_comes_before_a_slow_one_is_frozen_before_it_all_the_same() {
    let waves = [(0, None), (1, None)];
    let mut s = setup_on(&waves, &[Some(&[]), Some(&[])], &[], false);
    s.slow("freeze", 1, SHORT * 10);
    s.freeze().unwrap();
    let expected = [
        ("freeze", 0),
        ("freeze", 1),
        ("thaw", 0),
        ("thaw", 1),
        ("freeze", 0),
        ("freeze", 1),
    ];
    assert_eq!(s.calls(), expected);
}

#[test]
fn an_early_thaw_by_somebody_else_is_named() {
    let mut s = setup(&[0, 0], &[("thaw", 0, Errno::EINVAL, ALWAYS)], false);
    s.freeze().unwrap();
    let error = s.session.thaw().unwrap_err();
    assert!(error.to_string().ends_with(": /fs0"), "{error}");
    assert!(s.calls().contains(&("thaw", 1)));
}

#[test]
fn of_what_the_module_has_thawed_its_notice_says_whether_that_was_early() {
    let double = Double {
        can_call_off: true,
        ..Double::default()
    };
    let not_held = ("thaw", 0, Errno::EINVAL, ALWAYS);
    let mut s = setup_before(double, &[(0, None), (0, None)], &[], &[not_held], false);
    s.freeze().unwrap();
    s.session.thaw().unwrap();
    assert!(s.calls().contains(&("thaw", 1)));
}

#[test]
fn what_is_usually_quick_begins_after_what_is_slow_or_new() {
    let usual = [Some(5), Some(600), None, Some(40)];
    let mut s = setup_with(&usual.map(|it| (0, it)), &[], false);
    s.freeze().unwrap();
    let order = [("freeze", 2), ("freeze", 1), ("freeze", 3), ("freeze", 0)];
    assert_eq!(s.calls(), order);
}

#[test]
fn nobody_waits_for_a_slow_one_that_has_ended() {
    // An hour is how long the test would take.
    let mut s = setup_with(&[(0, Some(1)), (0, Some(3_600_000))], &[], false);
    s.freeze().unwrap();
    assert_eq!(s.calls(), [("freeze", 1), ("freeze", 0)]);
}

#[test]
fn dropping_a_session_thaws() {
    let mut s = setup(&[0, 1], &[], false);
    s.freeze().unwrap();
    let double = Arc::clone(&s.double);
    drop(s);
    assert_eq!(lock(&double.calls)[2..], [("thaw", 1), ("thaw", 0)]);
}

/// A descriptor that takes a minute to be closed, unless the other end is: what is written there is waited for,
/// and nobody reads it.
fn slow_to_close() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let theirs = listener.accept().unwrap().0;
    ours.set_nonblocking(true).unwrap();
    while ours.write(&[0; 65536]).is_ok() {}
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 60,
    };
    setsockopt(&ours, sockopt::Linger, &linger).unwrap();
    (ours.into(), theirs)
}

#[test]
fn what_hangs_when_it_is_closed_last_keeps_no_other_one_open_and_nobody_waits_for_it() {
    let s = setup(&[0], &[], false);
    let (slow, its_other_end) = slow_to_close();
    let quick: Vec<_> = (0..3).map(|_| pipe2(OFlag::O_CLOEXEC).unwrap()).collect();
    let (quick, other_ends): (Vec<OwnedFd>, Vec<OwnedFd>) = quick.into_iter().unzip();
    let fds = [slow].into_iter().chain(quick);
    let targets = fds.map(|fd| Target::new(DevId::default(), "/fs".into(), 0, fd));
    let session = Session::new(targets.collect(), s.means.clone(), &s.learnt).unwrap();
    let begun = Instant::now();
    drop(session);
    let is_open = || {
        other_ends
            .iter()
            .any(|it| nix::unistd::write(it, b"x").is_ok())
    };
    while is_open() {
        let waited = begun.elapsed();
        assert!(waited < SHORT * 200, "one that hangs keeps another open");
        thread::sleep(Duration::from_millis(1));
    }
    assert!(begun.elapsed() < SHORT * 200, "{:?}", begun.elapsed());
    drop(its_other_end);
}

#[test]
fn a_freeze_that_is_called_off_freezes_nothing() {
    let mut s = setup(&[0, 1], &[], false);
    s.means.abort.store(true, Ordering::SeqCst);
    assert!(matches!(s.freeze(), Err(FreezeError::Aborted)));
    assert_eq!(s.calls(), []);
}

#[test]
fn what_was_written_while_it_was_frozen_had_been_thawed_for_a_while() {
    // The last is a disk that has gone meanwhile.
    for (number, (then, writes_go_on)) in [
        ("0 0 0 0 0 0 8 0", false),
        ("0 0 0 0 0 0 9 0", true),
        ("", false),
    ]
    .into_iter()
    .enumerate()
    {
        let path =
            std::env::temp_dir().join(format!("hv_vss-stat-{}-{number}", std::process::id()));
        std::fs::write(&path, "0 0 0 0 0 0 8 0").unwrap();
        let stat = std::fs::File::open(&path).unwrap();
        let fd = stand_in();
        let mut double = Double::default();
        double.numbers.insert(inode_of(&fd), 0);
        let target = Target::new("8:0".parse().unwrap(), "/fs0".into(), 0, fd)
            .with_writes(Writes::from(vec![stat]));
        let means = Means {
            door: Arc::new(double),
            ..setup(&[0], &[], false).means
        };
        let mut learnt = Learnt::default();
        let session = Session::new(vec![target], means, &learnt).unwrap();
        session.freeze(&mut learnt, NOTHING).unwrap();
        std::fs::write(&path, then).unwrap();
        let thaw = session.thaw();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(thaw.is_err(), writes_go_on, "{thaw:?}");
    }
}

#[test]
fn what_is_on_one_disk_is_in_one_lane() {
    let disks: [&[&str]; 6] = [&["8:0"], &["8:16"], &["8:0"], &[], &["8:32", "8:16"], &[]];
    let targets = disks.iter().map(|disks| {
        let fd = stand_in();
        let disks = disks.iter().map(|it| it.parse().unwrap()).collect();
        Target::new(DevId::default(), "/fs".into(), 0, fd).with_disks(disks)
    });
    let (means, learnt) = (setup(&[0], &[], false).means, Learnt::default());
    let session = Session::new(targets.collect(), means, &learnt).unwrap();
    let lanes = session.lanes(&[0, 1, 2, 3, 4, 5]);
    assert_eq!(lanes, [vec![0, 2], vec![3], vec![1, 4], vec![5]]);
}

#[test]
fn what_is_frozen_is_not_given_up_on_and_what_is_given_up_on_is_not_taken_for_frozen() {
    let s = setup(&[0, 0], &[], false);
    let [first, second] = s.session.targets() else {
        panic!("two");
    };
    let since = Instant::now();
    let ours = || State::Ours { since, took: SHORT };
    for target in [first, second] {
        *target.state() = State::Freezing { since };
    }
    assert!(first.give_up() && !first.give_up());
    assert!(!first.end_freezing(ours()) && !first.is_ours());
    assert!(second.end_freezing(ours()) && !second.give_up() && second.is_ours());
    *second.state() = State::Open;
}

#[test]
fn what_stands_on_one_that_cannot_be_opened_is_not_tried() {
    // 0 stands on it, nobody knows of 1, and the others have nothing to do with it.
    let waves = [0, 0, 1, 1].map(|wave| (wave, None));
    let stand_on: [Option<&[&str]>; 4] = [Some(&["9:9"]), None, Some(&[]), None];
    let mut s = setup_before(Double::default(), &waves, &stand_on, &[], false);
    s.learnt.set_stuck(vec![Stuck {
        dev: "9:9".parse().unwrap(),
        name: "/stuck".into(),
        wave: 1,
    }]);
    let summary = s.freeze().unwrap();
    assert_eq!((summary.ours, summary.left_out), (2, 2));
    let said = s.means.log.held();
    for name in ["/fs0", "/fs1"] {
        let words = format!("{name} may stand on /stuck, which hangs");
        assert!(
            said.iter().any(|(_, line)| line.contains(&words)),
            "{said:?}"
        );
    }
    s.session.thaw().unwrap();
}
