// SPDX-License-Identifier: GPL-2.0-only

//! A few threads that live as long as the process and work on one thing at a time.
//!
//! They are started before a first freeze, because a thread needs memory that may not be had while
//! file systems are frozen, and takes longer to start than a clean file system to freeze; their stacks
//! are small, because all memory is locked. It knows nothing of what it runs.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Enough for an ioctl and a formatted log line.
const STACK_BYTES: usize = 64 * 1024;

type Step = Arc<dyn Fn(usize) + Send + Sync>;

#[derive(Default)]
struct State {
    step: Option<Step>,
    next: usize,
    end: usize,
    running: usize,
    most: usize,
    /// The caller has nothing left to do and waits for the end.
    waiting: bool,
    /// Nobody waits for the end any more: the step is dropped by who comes to it.
    left: bool,
    closed: bool,
}

impl State {
    /// Whether all steps have ended.
    fn is_over(&self) -> bool {
        self.running == 0 && self.next == self.end
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Something is there to be done, or the pool closes.
    work: Condvar,
    /// The last running step has ended.
    idle: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Steps run outside the lock, so a panic in one leaves the state whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one step, if one is left. Returns the lock and whether it did.
    fn run_one<'a>(&'a self, mut state: MutexGuard<'a, State>) -> (MutexGuard<'a, State>, bool) {
        // Whoever is kept out here is not missed: each that runs takes another one when it is done.
        let free = state.next < state.end && state.running < state.most;
        let Some(step) = state.step.clone().filter(|_| free) else {
            return (state, false);
        };
        let index = state.next;
        state.next += 1;
        state.running += 1;
        drop(state);
        step(index);
        // Before it counts as over: what it holds is to be closed by whoever had it run.
        drop(step);
        let mut state = self.lock();
        state.running -= 1;
        if state.waiting && state.is_over() {
            self.idle.notify_all();
        }
        if state.left && state.is_over() {
            state.step = None;
        }
        (state, true)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            let (held, ran) = self.run_one(state);
            state = held;
            if state.closed {
                return;
            }
            if !ran {
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

/// Threads that wait for steps to run. One caller at a time has them run some.
#[derive(Default)]
pub struct Pool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Pool {
    /// Sees to it that there are at least so many threads.
    pub fn grow(&self, threads: usize) -> io::Result<()> {
        let mut there = self.threads();
        while there.len() < threads {
            let shared = Arc::clone(&self.shared);
            let builder = Builder::new()
                .name("freezer".into())
                .stack_size(STACK_BYTES);
            there.push(builder.spawn(move || shared.work())?);
        }
        Ok(())
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `step` once for each number below `count`, at most `most` at a time, and waits for all of
    /// them. They are begun in order, and the caller works as well.
    pub fn run(&self, count: usize, most: usize, step: Step) {
        let state = self.begin(count, most.max(1), step, 1);
        self.work_along(state);
    }

    /// The same, but the caller looks on: `look` is called now and then, at first when it begins, and
    /// says when to call it again. The pool must have a thread.
    pub fn run_watched(&self, count: usize, step: Step, look: impl FnMut() -> Option<Instant>) {
        let state = self.begin(count, usize::MAX, step, 0);
        self.finish(state, look);
    }

    /// The same, stage by stage: each ends before one of these numbers, the last at the last of them. One
    /// begins when the one before it has ended, or has had so much `time`; then there are more threads,
    /// should those that are there hang. The caller takes the very last step, if nobody waits for another.
    pub fn run_in_stages(&self, ends: &[usize], time: Duration, step: Step) {
        let Some(last) = ends.last() else { return };
        let mut state = self.begin(0, usize::MAX, step, 0);
        for end in ends {
            if end == last && state.next + 1 == *end {
                state.end = *end;
                return self.work_along(state);
            }
            for _ in state.end..*end {
                self.shared.work.notify_one();
            }
            state.end = *end;
            if self.threads().is_empty() {
                state = self.help(state);
            }
            loop {
                state.waiting = true;
                let idle = &self.shared.idle;
                let waited = idle.wait_timeout_while(state, time, |state| !state.is_over());
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                state.waiting = false;
                if !state.is_over() {
                    state = self.help(state);
                }
                if end != last || state.is_over() {
                    break;
                }
            }
        }
        state.step = None;
    }

    /// Starts as many threads more as hang, for what waits because of that.
    fn help<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let waiting = state.end - state.next;
        let more = state.running.max(1).min(waiting);
        // A thread begins with the lock.
        drop(state);
        let there = self.threads().len();
        // Without memory for a thread it takes longer.
        let _ = self.grow(there + more);
        self.shared.lock()
    }

    /// Has a thread run `step`, unless what was begun so before is not over, and waits for its end, but not for
    /// longer than that. Whether it is over. The pool must have a thread.
    pub fn run_within(&self, time: Duration, step: impl Fn() + Send + Sync + 'static) -> bool {
        let state = self.shared.lock();
        if !state.is_over() {
            return false;
        }
        drop(state);
        let mut state = self.begin(1, 1, Arc::new(move |_| step()), 0);
        state.waiting = true;
        let idle = &self.shared.idle;
        let waited = idle.wait_timeout_while(state, time, |state| !state.is_over());
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.waiting = false;
        state.left = !state.is_over();
        if !state.left {
            state.step = None;
        }
        !state.left
    }

    /// Has the caller do what is left, and waits for the rest.
    fn work_along<'a>(&'a self, mut state: MutexGuard<'a, State>) {
        loop {
            let (held, ran) = self.shared.run_one(state);
            state = held;
            if !ran {
                break;
            }
        }
        self.finish(state, || None);
    }

    /// Has the threads begin, but for so many of the steps.
    fn begin(&self, count: usize, most: usize, step: Step, own: usize) -> MutexGuard<'_, State> {
        let threads = self.threads().len();
        let mut state = self.shared.lock();
        state.step = Some(step);
        state.left = false;
        state.next = 0;
        state.end = count;
        state.most = most;
        for _ in own..count.min(most).min(threads + own) {
            self.shared.work.notify_one();
        }
        state
    }

    fn finish<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        mut look: impl FnMut() -> Option<Instant>,
    ) {
        state.waiting = true;
        while !state.is_over() {
            // Not under the lock: it may take a while.
            drop(state);
            let again = look();
            state = self.shared.lock();
            if state.is_over() {
                break;
            }
            let idle = &self.shared.idle;
            state = match again {
                None => idle.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(at) => {
                    let left = at.saturating_duration_since(Instant::now());
                    let waited = idle.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        state.waiting = false;
        state.step = None;
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_all();
        for thread in self.threads().drain(..) {
            // A panic in a step has already been printed.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::Barrier;

    fn pool(threads: usize) -> Pool {
        let pool = Pool::default();
        pool.grow(threads).unwrap();
        pool
    }

    #[test]
    fn each_number_is_run_once_whatever_the_number_of_threads() {
        for threads in [0, 1, 5] {
            let pool = pool(threads);
            for count in [0, 1, 4, 100] {
                let hits: Arc<Vec<AtomicUsize>> =
                    Arc::new((0..count).map(|_| AtomicUsize::new(0)).collect());
                let seen = Arc::clone(&hits);
                pool.run(
                    count,
                    usize::MAX,
                    Arc::new(move |i| {
                        seen[i].fetch_add(1, Ordering::SeqCst);
                    }),
                );
                assert!(hits.iter().all(|h| h.load(Ordering::SeqCst) == 1));
            }
        }
    }

    #[test]
    fn steps_run_at_the_same_time() {
        let pool = pool(3);
        let all_four = Arc::new(Barrier::new(4));
        pool.run(
            4,
            4,
            Arc::new(move |_| {
                all_four.wait();
            }),
        );
    }

    #[test]
    fn no_more_steps_run_at_the_same_time_than_allowed() {
        let pool = pool(7);
        let (now, peak) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (running, highest) = (Arc::clone(&now), Arc::clone(&peak));
        pool.run(
            200,
            3,
            Arc::new(move |_| {
                let running = &running;
                highest.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                std::thread::yield_now();
                running.fetch_sub(1, Ordering::SeqCst);
            }),
        );
        assert_eq!(now.load(Ordering::SeqCst), 0);
        assert!((1..=3).contains(&peak.load(Ordering::SeqCst)));
    }

    #[test]
    fn a_stage_waits_for_the_one_before_but_not_for_long() {
        let pool = pool(2);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let gate = Arc::new(Barrier::new(2));
        let step = {
            let (seen, gate) = (Arc::clone(&seen), Arc::clone(&gate));
            Arc::new(move |i| {
                seen.lock().unwrap().push(i);
                // The second of the first stage hangs until the last of all is there.
                if i == 1 || i == 4 {
                    gate.wait();
                }
            })
        };
        pool.run_in_stages(&[2, 3, 5], Duration::from_millis(20), step);
        let seen = seen.lock().unwrap().clone();
        assert_eq!(seen[2], 2, "{seen:?}");
        assert_eq!(seen.len(), 5);
        let quick = Arc::new(Mutex::new(Vec::new()));
        let order = Arc::clone(&quick);
        let step = Arc::new(move |i| {
            std::thread::yield_now();
            order.lock().unwrap().push(i);
        });
        pool.run_in_stages(&[2, 3, 5], Duration::from_secs(60), step);
        let quick = quick.lock().unwrap().clone();
        assert_eq!(quick[2], 2, "{quick:?}");
        assert_eq!(quick.len(), 5);
    }

    #[test]
    fn those_that_hang_use_up_no_threads() {
        let pool = pool(1);
        let gate = Arc::new(Barrier::new(3));
        let step = {
            let gate = Arc::clone(&gate);
            Arc::new(move |i| {
                // Two hang until the last is there.
                if i != 2 {
                    gate.wait();
                }
            })
        };
        pool.run_in_stages(&[2, 4], Duration::from_millis(20), step);
        // And in one stage.
        let step = Arc::new(move |i| {
            if i != 3 {
                gate.wait();
            }
        });
        pool.run_in_stages(&[4], Duration::from_millis(20), step);
    }

    #[test]
    fn what_hangs_is_waited_for_no_longer_than_that_and_nothing_is_begun_beside_it() {
        let pool = pool(1);
        let gate = Arc::new(Barrier::new(2));
        let theirs = Arc::clone(&gate);
        let hang = move || {
            theirs.wait();
        };
        assert!(!pool.run_within(Duration::from_millis(20), hang));
        assert!(!pool.run_within(Duration::from_secs(60), || unreachable!()));
        gate.wait();
        while !pool.run_within(Duration::from_secs(60), || ()) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn who_looks_on_is_asked_again_when_it_said_and_never_works() {
        let pool = pool(2);
        let (caller, looks) = (std::thread::current().id(), AtomicUsize::new(0));
        let three_looks = Arc::new(Barrier::new(2));
        let step = {
            let three_looks = Arc::clone(&three_looks);
            Arc::new(move |i| {
                assert_ne!(std::thread::current().id(), caller);
                if i == 0 {
                    three_looks.wait();
                }
            })
        };
        pool.run_watched(5, step, || {
            if looks.fetch_add(1, Ordering::SeqCst) == 2 {
                three_looks.wait();
            }
            Some(Instant::now())
        });
        assert!(looks.load(Ordering::SeqCst) >= 3);
    }
}
