// SPDX-License-Identifier: GPL-2.0-only

//! A few threads that live as long as the process and work on one thing at a time.
//!
//! They are started before a first freeze, because a thread needs memory that may not be had while
//! file systems are frozen, and takes longer to start than a clean file system to freeze; their stacks
//! are small, because all memory is locked. They go ahead of others. It knows nothing of what it runs.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use crate::process;

/// Enough for an ioctl and a formatted log line.
const STACK_BYTES: usize = 64 * 1024;

type Step = Arc<dyn Fn(usize) + Send + Sync>;

#[derive(Default)]
struct State {
    step: Option<Step>,
    next: usize,
    end: usize,
    running: usize,
    /// How many threads there are.
    threads: usize,
    /// How many of them have what they need.
    begun: usize,
    /// The caller has nothing left to do and waits for the end.
    waiting: bool,
    /// Nobody waits for the end any more: the step is dropped by who comes to it.
    left: bool,
    /// The threads end as soon as they can.
    closed: bool,
}

impl State {
    /// Whether all steps have ended.
    fn is_over(&self) -> bool {
        self.running == 0 && self.next == self.end
    }
}

/// Some threads and what they work on.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Something is there to be done, or the threads are to end.
    work: Condvar,
    /// The last running step has ended, or a thread is ready for its first.
    idle: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Steps run outside the lock, so a panic in one leaves the state whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that there are at least so many threads.
    fn grow(self: &Arc<Self>, threads: usize) -> io::Result<()> {
        loop {
            let mut state = self.lock();
            if state.threads >= threads {
                return Ok(());
            }
            state.threads += 1;
            // A thread begins with the lock.
            drop(state);
            let shared = Arc::clone(self);
            let builder = Builder::new()
                .name("freezer".into())
                .stack_size(STACK_BYTES);
            if let Err(error) = builder.spawn(move || shared.work()) {
                self.lock().threads -= 1;
                return Err(error);
            }
        }
    }

    /// Runs one step, if one is left. Returns the lock and whether it did.
    fn run_one<'a>(&'a self, mut state: MutexGuard<'a, State>) -> (MutexGuard<'a, State>, bool) {
        let is_left = state.next < state.end;
        let Some(step) = state.step.clone().filter(|_| is_left) else {
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
        if state.left && state.is_over() {
            state.step = None;
        }
        if state.waiting && state.is_over() {
            // Who is woken finds the lock free.
            drop(state);
            self.idle.notify_all();
            state = self.lock();
        }
        (state, true)
    }

    fn work(&self) {
        // Whoever has it work waits, and may be one that goes first.
        let _ = process::go_ahead();
        let mut state = self.lock();
        state.begun += 1;
        self.idle.notify_all();
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

    /// Has the threads begin, for a caller who will wait for their end.
    fn begin(&self, count: usize, step: Step) {
        let mut state = self.lock();
        state.step = Some(step);
        state.left = false;
        state.next = 0;
        state.end = count;
        state.waiting = true;
        let threads = count.min(state.threads);
        // Who is woken finds the lock free.
        drop(state);
        for _ in 0..threads {
            self.work.notify_one();
        }
    }

    /// Waits for so long until all is over.
    fn wait<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        time: Duration,
    ) -> MutexGuard<'a, State> {
        state.waiting = true;
        let waited = self
            .idle
            .wait_timeout_while(state, time, |it| !it.is_over());
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.waiting = false;
        state
    }

    /// Starts as many threads more as hang, for what waits because of that.
    fn help<'a>(self: &'a Arc<Self>, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let waiting = state.end - state.next;
        let wanted = state.threads + state.running.max(1).min(waiting);
        drop(state);
        // Without memory for a thread it takes longer.
        let _ = self.grow(wanted);
        self.lock()
    }

    fn close(&self, mut state: MutexGuard<'_, State>) {
        state.closed = true;
        drop(state);
        self.work.notify_all();
    }
}

/// Threads that wait for steps to run. One caller at a time has them run some.
#[derive(Default)]
pub struct Pool {
    shared: Mutex<Arc<Shared>>,
}

impl Pool {
    /// Sees to it that there are at least so many threads, and waits until they have what they need: the first that a
    /// thread does is to ask for memory.
    pub fn grow(&self, threads: usize) -> io::Result<()> {
        let shared = self.shared();
        let grown = shared.grow(threads);
        let are_coming = |state: &mut State| state.begun < state.threads;
        let ready = shared.idle.wait_while(shared.lock(), are_coming);
        drop(ready.unwrap_or_else(PoisonError::into_inner));
        grown
    }

    fn shared(&self) -> Arc<Shared> {
        let shared = self.shared.lock();
        Arc::clone(&shared.unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs `step` once for each number below `count`, begun in order. The caller looks on: `look` is called
    /// now and then, at first when it begins, and says when to call it again. The pool must have a thread.
    pub fn run_watched(&self, count: usize, step: Step, mut look: impl FnMut() -> Option<Instant>) {
        let shared = self.shared();
        shared.begin(count, step);
        let mut state = shared.lock();
        while !state.is_over() {
            // Not under the lock: it may take a while.
            drop(state);
            let again = look();
            state = shared.lock();
            if state.is_over() {
                break;
            }
            let idle = &shared.idle;
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

    /// Runs the steps stage by stage: each ends before one of these numbers, the last at the last of them. One
    /// begins when the one before it has ended, or has had so much `time`; then there are more threads,
    /// should those that are there hang. The last one is waited for until its `limit` is over: what has not
    /// ended then is left alone with its threads, and others take their place. Whether all has ended.
    pub fn run_in_stages(
        &self,
        ends: &[usize],
        time: Duration,
        limit: Duration,
        step: Step,
    ) -> bool {
        let Some(last) = ends.last() else { return true };
        self.leave_what_hangs();
        let shared = self.shared();
        shared.begin(0, step);
        let mut state = shared.lock();
        for end in ends {
            let begun = *end - state.end;
            state.end = *end;
            drop(state);
            for _ in 0..begun {
                shared.work.notify_one();
            }
            state = shared.lock();
            if state.running >= state.threads {
                state = shared.help(state);
            }
            let until = Instant::now() + limit;
            loop {
                state = shared.wait(state, time);
                if state.is_over() || (end == last && Instant::now() >= until) {
                    break;
                }
                state = shared.help(state);
                if end != last {
                    break;
                }
            }
        }
        let is_over = state.is_over();
        drop(state);
        self.leave_what_hangs();
        is_over
    }

    /// Leaves what has not ended alone with its threads; others take their place.
    pub fn leave_what_hangs(&self) {
        let shared = self.shared();
        let mut state = shared.lock();
        if state.is_over() {
            // It may have ended just now, and what it holds is not to stay.
            state.step = None;
            return;
        }
        state.left = true;
        shared.close(state);
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner) = Arc::default();
        // Without memory for it, it is started when it is needed.
        let _ = self.grow(1);
    }

    /// Has a thread run `step`, unless what was begun so before is not over, and waits for its end, but not for
    /// longer than that. Whether it is over. The pool must have a thread.
    pub fn run_within(&self, time: Duration, step: impl Fn() + Send + Sync + 'static) -> bool {
        let shared = self.shared();
        if !shared.lock().is_over() {
            return false;
        }
        shared.begin(1, Arc::new(move |_| step()));
        let mut state = shared.wait(shared.lock(), time);
        state.left = !state.is_over();
        if !state.left {
            state.step = None;
        }
        !state.left
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let shared = self.shared();
        // They may hang, and end by themselves.
        shared.close(shared.lock());
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

    /// Longer than any step of a test takes.
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn whoever_has_it_grow_has_threads_that_have_begun() {
        for _ in 0..20 {
            let pool = pool(8);
            let shared = pool.shared();
            assert_eq!(shared.lock().begun, 8);
        }
    }

    #[test]
    fn each_number_is_run_once_whatever_the_number_of_threads() {
        for threads in [1, 5] {
            let pool = pool(threads);
            for count in [0, 1, 4, 100] {
                let hits: Arc<Vec<AtomicUsize>> =
                    Arc::new((0..count).map(|_| AtomicUsize::new(0)).collect());
                let seen = Arc::clone(&hits);
                let step = Arc::new(move |i: usize| {
                    seen[i].fetch_add(1, Ordering::SeqCst);
                });
                pool.run_watched(count, step.clone(), || None);
                assert!(hits.iter().all(|h| h.load(Ordering::SeqCst) == 1));
                assert!(pool.run_in_stages(&[count], LONG, LONG, step));
                assert!(hits.iter().all(|h| h.load(Ordering::SeqCst) == 2));
            }
        }
    }

    #[test]
    fn steps_run_at_the_same_time() {
        let all_four = Arc::new(Barrier::new(4));
        let step = move |_| {
            all_four.wait();
        };
        pool(4).run_watched(4, Arc::new(step), || None);
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
        assert!(pool.run_in_stages(&[2, 3, 5], Duration::from_millis(20), LONG, step));
        let seen = seen.lock().unwrap().clone();
        assert_eq!(seen[2], 2, "{seen:?}");
        assert_eq!(seen.len(), 5);
        let quick = Arc::new(Mutex::new(Vec::new()));
        let order = Arc::clone(&quick);
        let step = Arc::new(move |i| {
            std::thread::yield_now();
            order.lock().unwrap().push(i);
        });
        assert!(pool.run_in_stages(&[2, 3, 5], LONG, LONG, step));
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
        assert!(pool.run_in_stages(&[2, 4], Duration::from_millis(20), LONG, step));
        // And in one stage.
        let step = Arc::new(move |i| {
            if i != 3 {
                gate.wait();
            }
        });
        assert!(pool.run_in_stages(&[4], Duration::from_millis(20), LONG, step));
    }

    #[test]
    fn what_never_ends_is_left_alone_and_others_take_its_place() {
        let pool = pool(1);
        let gate = Arc::new(Barrier::new(2));
        let (theirs, seen) = (Arc::clone(&gate), Arc::new(AtomicUsize::new(0)));
        let others = Arc::clone(&seen);
        let held = Arc::new(());
        let kept = Arc::clone(&held);
        let step = Arc::new(move |i| {
            let _kept = &kept;
            if i == 0 {
                theirs.wait();
            } else {
                others.fetch_add(1, Ordering::SeqCst);
            }
        });
        let time = Duration::from_millis(20);
        assert!(!pool.run_in_stages(&[1, 2], time, time * 10, step));
        assert_eq!(seen.load(Ordering::SeqCst), 1);
        // The pool is as it was before.
        assert!(pool.run_within(LONG, || ()));
        let step = Arc::new(|_| ());
        assert!(pool.run_in_stages(&[2, 3], LONG, LONG, step.clone()));
        pool.run_watched(3, step, || None);
        // And whoever comes back at last lets go of all that it holds.
        gate.wait();
        while Arc::strong_count(&held) > 1 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_hangs_since_before_is_not_waited_for_with_what_is_done_in_stages() {
        let pool = pool(1);
        let gate = Arc::new(Barrier::new(2));
        let theirs = Arc::clone(&gate);
        let hang = move || {
            theirs.wait();
        };
        assert!(!pool.run_within(Duration::from_millis(20), hang));
        let begun = Instant::now();
        assert!(pool.run_in_stages(&[1], LONG, LONG, Arc::new(|_| ())));
        assert!(begun.elapsed() < LONG);
        gate.wait();
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
        assert!(!pool.run_within(LONG, || unreachable!()));
        gate.wait();
        while !pool.run_within(LONG, || ()) {
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
