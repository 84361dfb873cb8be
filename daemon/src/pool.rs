// SPDX-License-Identifier: GPL-2.0-only

//! A few threads that live as long as one backup.
//!
//! They are started before the first freeze, because a thread needs memory that may not be had
//! while file systems are frozen; their stacks are small, because all memory is locked. The caller
//! of [`Pool::run`] works too, so a pool of no threads is a plain loop. It knows nothing of what it
//! runs.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

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
    closed: bool,
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
        let mut state = self.lock();
        state.running -= 1;
        if state.waiting && state.running == 0 && state.next == state.end {
            self.idle.notify_all();
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

/// Threads that wait for steps to run.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts `threads` threads, beside which the caller of [`Pool::run`] works as well.
    pub fn new(threads: usize) -> io::Result<Self> {
        let mut pool = Pool {
            shared: Arc::default(),
            threads: Vec::with_capacity(threads),
        };
        for _ in 0..threads {
            let shared = Arc::clone(&pool.shared);
            let builder = Builder::new()
                .name("freezer".into())
                .stack_size(STACK_BYTES);
            pool.threads.push(builder.spawn(move || shared.work())?);
        }
        Ok(pool)
    }

    /// Runs `step` once for each number below `count`, at most `most` at a time, and waits for all of
    /// them. They are begun in order.
    pub fn run(&self, count: usize, most: usize, step: Step) {
        let mut state = self.shared.lock();
        state.step = Some(step);
        state.next = 0;
        state.end = count;
        state.most = most.max(1);
        for _ in 1..count.min(most).min(self.threads.len() + 1) {
            self.shared.work.notify_one();
        }
        loop {
            let (held, ran) = self.shared.run_one(state);
            state = held;
            if !ran {
                break;
            }
        }
        while state.running > 0 || state.next < state.end {
            state.waiting = true;
            state = self
                .shared
                .idle
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting = false;
        state.step = None;
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
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

    #[test]
    fn each_number_is_run_once_whatever_the_number_of_threads() {
        for threads in [0, 1, 5] {
            let pool = Pool::new(threads).unwrap();
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
        let pool = Pool::new(3).unwrap();
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
        let pool = Pool::new(7).unwrap();
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
}
