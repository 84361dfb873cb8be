// SPDX-License-Identifier: GPL-2.0-only

//! Threads that have nothing open but what they are handed, each with a table of descriptors of its own.
//!
//! A call that hangs in the kernel cannot be ended, and as long as its thread is there, so is all that this
//! thread has open, also when the process has died: the device of the module, the guard's line. What may hang
//! on a disk is done here, and whoever had it done waits for as long as they like. A thread that has come
//! back is used again. It knows nothing of what it runs.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::Builder;
use std::time::{Duration, Instant};

use nix::sys::socket::{socketpair, AddressFamily, SockFlag, SockType};
use nix::unistd::{gettid, Pid};

use crate::process;
use crate::sys;

/// Enough for a look-up.
const STACK_BYTES: usize = 128 * 1024;
/// How long one question of many may hold up those after it.
const MOMENT: Duration = Duration::from_millis(5);

type Step = Box<dyn FnOnce(Vec<OwnedFd>) + Send>;

/// The threads. They end with this, each when what it is at has ended.
#[derive(Default)]
pub struct Apart(Mutex<Vec<Helper>>);

/// Those for all questions: each thread keeps what its stack and its heap have taken.
static ALL: Apart = Apart::new();

struct Helper {
    /// In which its line is open: no other thread can hand it anything.
    table: sys::Table,
    /// Over which it is handed descriptors.
    line: OwnedFd,
    steps: Sender<Step>,
    /// What it is at, or was.
    last: Weak<()>,
    thread: Pid,
    /// Whether it goes first, as whoever had it do that did.
    goes_first: bool,
}

impl Apart {
    const fn new() -> Self {
        Apart(Mutex::new(Vec::new()))
    }

    /// Has `step` done with copies of these descriptors, by a thread that has no others, and then `tell`, with what came of
    /// it: by then the thread is free for the next step, or whoever hears of it and goes first would find it busy, and
    /// have another one started. As long as it is at `step`, so is what is returned. Neither may own a descriptor: it
    /// would close another one.
    pub fn hand_over<T>(
        &self,
        fds: &[BorrowedFd<'_>],
        step: impl FnOnce(Vec<OwnedFd>) -> T + Send + 'static,
        tell: impl FnOnce(T) + Send + 'static,
    ) -> io::Result<Weak<()>> {
        // Whoever goes first is not to wait for one that does not, and starts a thread.
        let mut helper = self.take_free().map_or_else(Helper::start, Ok)?;
        helper.go_as_whoever_asks();
        // One that does not take it ends.
        sys::send(helper.line.as_fd(), fds)?;
        let life = Arc::new(());
        helper.last = Arc::downgrade(&life);
        let alive = helper.last.clone();
        let step = move |fds| {
            let came = step(fds);
            drop(life);
            tell(came);
        };
        let sent = helper.steps.send(Box::new(step));
        sent.map_err(|_| io::Error::other("the thread has ended"))?;
        self.helpers().push(helper);
        Ok(alive)
    }

    fn helpers(&self) -> MutexGuard<'_, Vec<Helper>> {
        // It is whole after each change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_free(&self) -> Option<Helper> {
        let table = sys::Table::own();
        let is_free = |it: &Helper| it.table == table && it.last.strong_count() == 0;
        let mut helpers = self.helpers();
        let free = helpers.iter().position(is_free)?;
        Some(helpers.swap_remove(free))
    }
}

impl Helper {
    fn start() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (line, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let (steps, orders) = channel();
        let (begin, begun) = channel();
        let number = theirs.as_raw_fd();
        let body = move || {
            // Whoever hands over waits, as a rule.
            let _ = process::go_ahead();
            let kept = sys::keep_only(number);
            // Whoever waits for it is there.
            let _ = begin.send(kept.as_ref().map(|_| gettid()).map_err(io::Error::kind));
            if let Ok(line) = kept {
                work(&line, orders);
            }
        };
        let builder = Builder::new().name("apart".into()).stack_size(STACK_BYTES);
        builder.spawn(body)?;
        // Until then `theirs` must not be closed.
        let thread = begun.recv().map_err(io::Error::other)??;
        Ok(Helper {
            table: sys::Table::own(),
            line,
            steps,
            last: Weak::new(),
            thread,
            goes_first: false,
        })
    }

    /// Whoever goes first waits for it, and so would all that wait for what is frozen. What nobody waits for may take
    /// long, and takes its turns.
    fn go_as_whoever_asks(&mut self) {
        let is_to = process::goes_first();
        if is_to != self.goes_first {
            process::have_go_first(self.thread, is_to);
            self.goes_first = is_to;
        }
    }
}

fn work(line: &OwnedFd, orders: Receiver<Step>) {
    while let Ok(step) = orders.recv() {
        // They were sent before the word.
        let Ok((_, fds)) = sys::receive(line.as_fd(), &mut [0]) else {
            // Before anybody hears that this step is lost, and takes the thread for free.
            drop(orders);
            return;
        };
        step(fds);
    }
}

/// Questions that may hang, each about one thing, a device or a path. What has not answered is not asked again
/// before it has, or not more often than it may.
pub struct Questions<About: 'static> {
    /// How many about one thing may wait for an answer.
    most: usize,
    /// How many do.
    open: Mutex<BTreeMap<About, usize>>,
}

/// A question that is under way until this is dropped, be it that nobody comes to ask it.
struct UnderWay<About: Clone + Ord + Send + 'static> {
    of: &'static Questions<About>,
    about: About,
}

impl<About: Clone + Ord + Send> Drop for UnderWay<About> {
    fn drop(&mut self) {
        self.of.end(&self.about);
    }
}

impl<About: Clone + Ord + Send> Questions<About> {
    /// Nothing is asked yet.
    #[expect(clippy::new_without_default, reason = "it is for statics")]
    pub const fn new() -> Self {
        Self::up_to(1)
    }

    /// The same for what can be cured while a question about it hangs, such as a path that has led to a dead disk:
    /// so many may hang before nothing more is asked.
    pub const fn up_to(most: usize) -> Self {
        Questions {
            most,
            open: Mutex::new(BTreeMap::new()),
        }
    }

    fn open(&self) -> MutexGuard<'_, BTreeMap<About, usize>> {
        // It is whole after each change.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more about this, if it may be asked.
    fn begin(&'static self, about: &About) -> Option<UnderWay<About>> {
        let mut open = self.open();
        let under_way = open.entry(about.clone()).or_default();
        let may_be = *under_way < self.most;
        *under_way += usize::from(may_be);
        may_be.then(|| UnderWay {
            of: self,
            about: about.clone(),
        })
    }

    /// One is not under way any more.
    fn end(&self, about: &About) {
        let mut open = self.open();
        if let Some(under_way) = open.get_mut(about) {
            *under_way -= 1;
            if *under_way == 0 {
                open.remove(about);
            }
        }
    }

    /// The answer, by who has nothing but copies of these descriptors. It is [`io::ErrorKind::TimedOut`] when that takes
    /// longer than `limit`, and at once as long as as many do as may. As with [`Apart::hand_over`] the question owns no
    /// descriptor, and an answer that owns one is not for whoever asked: they are in different tables.
    pub fn ask<T: Send + 'static>(
        &'static self,
        about: About,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
        question: impl FnOnce(Vec<OwnedFd>) -> T + Send + 'static,
    ) -> io::Result<T> {
        // Beside the word that it is there: a channel for each kind of answer would be a lot of code.
        let place = Arc::new(Mutex::new(None));
        let theirs = Arc::clone(&place);
        let answers = move |fds| {
            let answer = question(fds);
            *theirs.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        };
        let told = self.put(about, fds, answers)?;
        told.recv_timeout(limit).map_err(|_| silent())?;
        let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
        place.take().ok_or_else(silent)
    }

    /// The same for whoever has more than one to wait for: where it is told that the question has ended, if it has.
    pub fn put(
        &'static self,
        about: About,
        fds: &[BorrowedFd<'_>],
        question: impl FnOnce(Vec<OwnedFd>) + Send + 'static,
    ) -> io::Result<Receiver<()>> {
        let under_way = self.begin(&about).ok_or_else(silent)?;
        let (tell, told) = channel();
        let step = move |fds| {
            question(fds);
            drop(under_way);
        };
        // Nobody listens any more when it took too long.
        let tell = move |()| {
            let _ = tell.send(());
        };
        ALL.hand_over(fds, step, tell)?;
        Ok(told)
    }
}

/// How long each may take that is asked after a [`Patience`] is used up: whatever does not hang answers long before.
const LEAST: Duration = Duration::from_millis(50);

/// How long all that hangs may hold up one look.
pub struct Patience {
    left: Cell<Duration>,
    /// Whether something has not answered.
    was_tried: Cell<bool>,
}

impl Patience {
    /// So long.
    pub fn new(limit: Duration) -> Self {
        Patience {
            left: Cell::new(limit),
            was_tried: Cell::new(false),
        }
    }

    /// What is left of it.
    pub fn left(&self) -> Duration {
        self.left.get()
    }

    /// Whether an answer was not given.
    pub fn was_tried(&self) -> bool {
        self.was_tried.get()
    }

    /// As [`Questions::ask`]. `None` when it hangs.
    pub fn ask<About: Clone + Ord + Send, T: Send + 'static>(
        &self,
        questions: &'static Questions<About>,
        about: About,
        fds: &[BorrowedFd<'_>],
        question: impl FnOnce(Vec<OwnedFd>) -> T + Send + 'static,
    ) -> Option<T> {
        let (left, began) = (self.left(), Instant::now());
        let answer = questions.ask(about, fds, left.max(LEAST), question);
        if answer.is_err() {
            self.was_tried.set(true);
            self.left.set(left.saturating_sub(began.elapsed()));
        }
        answer.ok()
    }
}

/// Questions about several things, to be asked with copies of the same descriptors.
pub struct Lot<'a, About> {
    /// About each of these, in this order.
    pub abouts: Vec<About>,
    /// What whoever asks them has open.
    pub fds: Vec<BorrowedFd<'a>>,
}

/// The answers to all questions of some lots, by number, as far as they have come and nobody has taken them.
type Answers<T> = Arc<Mutex<Vec<Option<io::Result<T>>>>>;

/// A lot on its way: whoever is free takes the next question.
struct Queue<About> {
    abouts: Vec<About>,
    next: AtomicUsize,
}

impl<About: Clone + Ord + Send + Sync> Questions<About> {
    /// Asks many at the price of one: a thread asks one after the other, and only when nothing has come for a moment
    /// another one goes on with the rest, so that all that hang are waited for together. `heard` gets what came of
    /// each, with its number, counted from 0 through all lots: as of [`Questions::ask`], `limit` counting from when the
    /// last was asked. What `question` is given are a number and the descriptors of its lot.
    pub fn ask_all<T: Send + 'static>(
        &'static self,
        lots: Vec<Lot<'_, About>>,
        limit: Duration,
        question: impl Fn(usize, &[OwnedFd]) -> T + Send + Sync + 'static,
        mut heard: impl FnMut(usize, io::Result<T>),
    ) {
        let question = Arc::new(question);
        // As of a single one the answers are beside the words that they are there.
        let count = lots.iter().map(|it| it.abouts.len()).sum();
        let answers: Answers<T> = Arc::new(Mutex::new((0..count).map(|_| None).collect()));
        let (tell, told) = channel();
        let mut open = BTreeSet::new();
        let mut hear = |open: &mut BTreeSet<usize>, number, error: Option<io::Error>| {
            open.remove(&number);
            let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
            let answer = answers.get_mut(number).and_then(Option::take);
            drop(answers);
            let error = || Err(error.unwrap_or_else(silent));
            heard(number, answer.unwrap_or_else(error));
        };
        let mut first = 0;
        // For a lot of none nobody is woken: a host may wait.
        for Lot { abouts, fds } in lots.into_iter().filter(|it| !it.abouts.is_empty()) {
            let last = first + abouts.len();
            open.extend(first..last);
            let next = AtomicUsize::new(0);
            let queue = Arc::new(Queue { abouts, next });
            let (end, ended) = channel();
            loop {
                let (queue_too, question) = (Arc::clone(&queue), Arc::clone(&question));
                let (tell, answers) = (tell.clone(), Arc::clone(&answers));
                let step = move |fds: Vec<OwnedFd>| {
                    self.work_off(
                        &queue_too,
                        |number| question(first + number, &fds),
                        &|it, answer| {
                            let mut answers =
                                answers.lock().unwrap_or_else(PoisonError::into_inner);
                            if let Some(place) = answers.get_mut(first + it) {
                                *place = Some(answer);
                            }
                            drop(answers);
                            // Nobody listens any more when it took too long.
                            let _ = tell.send(first + it);
                        },
                    );
                };
                let end = end.clone();
                let end = move |()| {
                    let _ = end.send(());
                };
                if let Err(error) = ALL.hand_over(&fds, step, end) {
                    // Whoever is at one already goes on with the rest, if it comes back.
                    let rest = queue.next.swap(queue.abouts.len(), Ordering::SeqCst);
                    for number in rest..queue.abouts.len() {
                        let error = io::Error::new(error.kind(), error.to_string());
                        hear(&mut open, first + number, Some(error));
                    }
                    break;
                }
                let is_stuck = loop {
                    let before = open.len();
                    let waited = ended.recv_timeout(MOMENT);
                    told.try_iter().for_each(|it| hear(&mut open, it, None));
                    match waited {
                        Err(RecvTimeoutError::Timeout) if open.len() == before => break true,
                        Err(RecvTimeoutError::Timeout) => {}
                        Ok(()) | Err(RecvTimeoutError::Disconnected) => break false,
                    }
                };
                if !is_stuck || queue.next.load(Ordering::SeqCst) >= queue.abouts.len() {
                    break;
                }
            }
            first = last;
        }
        let until = Instant::now() + limit;
        while !open.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            match told.recv_timeout(left) {
                Ok(it) => hear(&mut open, it, None),
                Err(_) => break,
            }
        }
        for number in std::mem::take(&mut open) {
            heard(number, Err(silent()));
        }
    }

    /// Asks the same about each of these, with a copy of what is open of it; those that hang are waited for together.
    /// The answers are in their order, as of [`Questions::ask_all`].
    pub fn ask_each<T: Send + 'static>(
        &'static self,
        each: &[(About, BorrowedFd<'_>)],
        limit: Duration,
        question: impl Fn(BorrowedFd<'_>) -> T + Send + Sync + 'static,
    ) -> Vec<io::Result<T>> {
        let lot = |(about, fd): &(About, _)| Lot {
            abouts: vec![about.clone()],
            fds: vec![*fd],
        };
        let ask = move |_, fds: &[OwnedFd]| fds.first().map(|it| question(it.as_fd()));
        let mut answers = BTreeMap::new();
        let lots = each.iter().map(lot).collect();
        self.ask_all(lots, limit, ask, |number, heard| {
            answers.insert(number, heard.and_then(|it| it.ok_or_else(silent)));
        });
        answers.into_values().collect()
    }

    /// Asks what is left of these, as long as anything is.
    fn work_off<T>(
        &'static self,
        queue: &Queue<About>,
        question: impl Fn(usize) -> T,
        tell: &dyn Fn(usize, io::Result<T>),
    ) {
        loop {
            let number = queue.next.fetch_add(1, Ordering::SeqCst);
            let Some(about) = queue.abouts.get(number) else {
                return;
            };
            let answer = self.begin(about).map(|_under_way| question(number));
            tell(number, answer.ok_or_else(silent));
        }
    }
}

fn silent() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it does not answer")
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{SigSet, Signal};
    use std::time::Instant;

    /// Longer than any step of a test takes.
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_thread_has_open_what_it_was_handed_and_is_used_again_when_it_has_come_back() {
        let apart = Apart::default();
        let (tell, told) = channel();
        let (let_go, hang) = channel::<()>();
        let (ours, theirs) = nix::unistd::pipe().unwrap();
        let count = || std::fs::read_dir("/proc/thread-self/fd").map(Iterator::count);
        let thread = || nix::unistd::gettid();
        let first = tell.clone();
        let hangs = move |fds: Vec<OwnedFd>| {
            // A signal that came here would be lost.
            let blocked = SigSet::thread_get_mask().unwrap();
            assert!(blocked.contains(Signal::SIGTERM));
            first.send((fds.len(), count().unwrap(), thread())).unwrap();
            let _ = hang.recv();
        };
        let both = [ours.as_fd(), theirs.as_fd()];
        let hung = apart.hand_over(&both, hangs, drop).unwrap();
        let (handed, open, hanging) = told.recv_timeout(LONG).unwrap();
        // With its line, and the one by which they are counted.
        assert_eq!((handed, open), (2, 4));
        let mut last = None;
        for _ in 0..2 {
            let tell = tell.clone();
            let looks = move |fds: Vec<OwnedFd>| {
                tell.send((fds.len(), count().unwrap(), thread())).unwrap();
            };
            let (end, ended) = channel();
            // Whoever is told of the end comes first, as one does that goes first.
            let (goes_on, may_go_on) = channel::<()>();
            let then = move |()| {
                end.send(()).unwrap();
                let _ = may_go_on.recv();
            };
            let alive = apart.hand_over(&[ours.as_fd()], looks, then).unwrap();
            ended.recv_timeout(LONG).unwrap();
            assert_eq!(alive.strong_count(), 0);
            drop(goes_on);
            let (handed, open, thread) = told.recv_timeout(LONG).unwrap();
            assert_eq!((handed, open), (1, 3));
            assert_ne!(thread, hanging);
            assert!(last.replace(thread).is_none_or(|last| last == thread));
        }
        assert_eq!(hung.strong_count(), 1);
        drop(let_go);
    }

    #[test]
    fn what_does_not_answer_is_not_asked_again_and_holds_up_nothing_else() {
        static ASKED: Questions<&str> = Questions::new();
        let (release, hang) = channel::<()>();
        let (_ours, theirs) = nix::unistd::pipe().unwrap();
        let kind = |it: io::Result<()>| it.unwrap_err().kind();
        let moment = Duration::from_millis(50);
        let hung = ASKED.ask("dead", &[theirs.as_fd()], moment, move |_| {
            let _ = hang.recv();
        });
        assert_eq!(kind(hung), io::ErrorKind::TimedOut);
        let again = || ASKED.ask("dead", &[], LONG, |_| ());
        assert_eq!(kind(again()), io::ErrorKind::TimedOut);
        // With the one by which they are counted, and its line.
        let open = |_| std::fs::read_dir("/proc/thread-self/fd").map(Iterator::count);
        assert_eq!(ASKED.ask("other", &[], LONG, open).unwrap().unwrap(), 2);
        drop(release);
        let since = Instant::now();
        while again().is_err() {
            assert!(since.elapsed() < LONG);
            std::thread::yield_now();
        }
    }

    #[test]
    fn many_are_asked_by_one_thread_and_those_that_hang_are_waited_for_together() {
        static ASKED: Questions<usize> = Questions::new();
        static HANG: Mutex<()> = Mutex::new(());
        // Enough for the others, however busy the machine is.
        const LIMIT: Duration = Duration::from_secs(2);
        let (ours, theirs) = nix::unistd::pipe().unwrap();
        let ask = |from: usize, limit: Duration, hangs: fn(usize) -> bool| {
            let lots = [
                (from, vec![ours.as_fd()]),
                (from + 30, vec![ours.as_fd(), theirs.as_fd()]),
            ];
            let lots = lots.map(|(first, fds)| Lot {
                abouts: (first..first + 30).collect(),
                fds,
            });
            let question = move |number: usize, fds: &[OwnedFd]| {
                if hangs(number) {
                    drop(HANG.lock());
                }
                (fds.len(), nix::unistd::gettid())
            };
            let (mut threads, mut silent) = (BTreeSet::new(), Vec::new());
            ASKED.ask_all(lots.into(), limit, question, |number, heard| match heard {
                Ok((fds, thread)) => {
                    assert_eq!(fds, 1 + number / 30);
                    threads.insert(thread.as_raw());
                }
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
                    silent.push(number);
                }
            });
            (threads.len(), silent)
        };
        let every_tenth = |number: usize| number % 10 == 5;
        let hung: Vec<usize> = (0..60).filter(|it| every_tenth(*it)).collect();
        let hold = HANG.lock().unwrap();
        let begin = Instant::now();
        assert_eq!(ask(0, LIMIT, every_tenth).1, hung);
        // One after the other they would be waited for six times as long.
        assert!(begin.elapsed() < LIMIT * 3, "{:?}", begin.elapsed());
        let mut again = ask(0, LONG, every_tenth).1;
        again.sort_unstable();
        assert_eq!(again, hung, "not asked again");
        drop(hold);
        // Unless it is kept waiting, one does a lot, and may just be at its end when the next one comes.
        let fewest = (0..10).map(|_| ask(100, LONG, |_| false).0).min();
        assert!(fewest.is_some_and(|it| it <= 2), "{fewest:?}");
    }

    #[test]
    fn each_is_asked_with_what_is_open_of_it() {
        static ASKED: Questions<usize> = Questions::new();
        static HANG: Mutex<()> = Mutex::new(());
        let (ours, theirs) = nix::unistd::pipe().unwrap();
        let number = |fd: BorrowedFd<'_>| sys::identify(fd).map(|it| it.mode).unwrap_or_default();
        let file = std::fs::File::open("/proc/self/stat").unwrap();
        let each = [(0, ours.as_fd()), (1, file.as_fd()), (2, theirs.as_fd())];
        let expected = each.map(|(_, fd)| number(fd));
        let regular = expected[1];
        let hold = HANG.lock().unwrap();
        let question = move |fd: BorrowedFd<'_>| {
            let its = number(fd);
            if its == regular {
                drop(HANG.lock());
            }
            its
        };
        let said = ASKED.ask_each(&each, Duration::from_millis(200), question);
        let said: Vec<Option<_>> = said.into_iter().map(Result::ok).collect();
        assert_eq!(said, [Some(expected[0]), None, Some(expected[2])]);
        drop(hold);
    }

    #[test]
    fn what_can_be_cured_is_asked_again_as_often_as_it_may_hang() {
        static ASKED: Questions<&str> = Questions::up_to(2);
        let kind = |it: io::Result<()>| it.map_err(|error| error.kind());
        let moment = Duration::from_millis(50);
        let mut lines = Vec::new();
        let mut hang = || {
            let (release, hang) = channel::<()>();
            lines.push(release);
            kind(ASKED.ask("dead", &[], moment, move |_| {
                let _ = hang.recv();
            }))
        };
        let silent = Err(io::ErrorKind::TimedOut);
        let again = || kind(ASKED.ask("dead", &[], LONG, |_| ()));
        assert_eq!(hang(), silent);
        assert_eq!(again(), Ok(()), "it is cured");
        assert_eq!(hang(), silent);
        assert_eq!(again(), silent, "nobody waits for that");
        lines.pop();
        let since = Instant::now();
        while again().is_err() {
            assert!(since.elapsed() < LONG);
            std::thread::yield_now();
        }
    }

    /// The limit is that of a whole process.
    #[test]
    fn what_nobody_came_to_ask_may_be_asked_again() {
        use nix::sys::resource::{getrlimit, setrlimit, Resource};
        const CHILD: &str = "HV_VSS_TEST_APART";
        static ASKED: Questions<u32> = Questions::new();
        if std::env::var_os(CHILD).is_none() {
            let this = std::env::current_exe().unwrap();
            let name = "apart::tests::what_nobody_came_to_ask_may_be_asked_again";
            let mut child = std::process::Command::new(this);
            let child = child.args(["--exact", name, "--nocapture"]).env(CHILD, "1");
            let ended = child.output().unwrap();
            let text = String::from_utf8_lossy(&ended.stderr);
            assert!(ended.status.success(), "{text}");
            return;
        }
        let (ours, _theirs) = nix::unistd::pipe().unwrap();
        let ask = |count| {
            let fds = vec![ours.as_fd(); count];
            ASKED.ask(7, &fds, LONG, |fds| fds.len())
        };
        assert_eq!(ask(5).unwrap(), 5);
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        // There is no room for all of them.
        setrlimit(Resource::RLIMIT_NOFILE, 3, hard).unwrap();
        let lost = ask(5);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        assert!(lost.is_err());
        // That thread has ended, which is seen when it is wanted.
        let again = ask(5).or_else(|_| ask(5));
        assert_eq!(again.unwrap(), 5);
    }
}
