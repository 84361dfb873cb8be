// SPDX-License-Identifier: GPL-2.0-only

//! The guard's rescue: everything is thawed, the last wave first, and what hangs holds up nothing else.
//!
//! The crew's threads and the memory for a rescue are there before anything is frozen, since when it
//! comes to a rescue there may be none. It knows descriptors and waves, not who is in trouble or why.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::freeze::RETRY;
use crate::sys;

/// How often [`Rescue::advance`] is to be called, and how long a thread pauses that has nothing to do.
pub const TICK: Duration = Duration::from_millis(10);
/// How long one wave may hold up the thaw of the next.
const WAVE_LIMIT: Duration = Duration::from_millis(150);
/// How long a close may take before the next is done beside it.
const CLOSE_LIMIT: Duration = Duration::from_millis(100);
/// Threads that wait to thaw; more are started when all of them hang.
const THREADS: usize = 8;
const STACK_BYTES: usize = 32 * 1024;

/// One descriptor in the guard's hands.
pub struct Member {
    fd: OwnedFd,
    wave: u32,
    forgotten: AtomicBool,
    /// The daemon asks whether it is still frozen by somebody else, by a freeze of its own.
    claimed: AtomicBool,
}

impl Member {
    /// One of the wave `wave`, open as `fd`.
    pub fn new(fd: OwnedFd, wave: u32) -> Arc<Self> {
        Arc::new(Member {
            fd,
            wave,
            forgotten: AtomicBool::new(false),
            claimed: AtomicBool::new(false),
        })
    }

    /// From here on it is not thawed, since somebody else has frozen it.
    pub fn forget(&self) {
        self.forgotten.store(true, Ordering::SeqCst);
        self.claimed.store(false, Ordering::SeqCst);
    }

    /// It may yet be the daemon's. As long as that lives it thaws what it has frozen for that by itself, and nobody
    /// else could tell whose it is.
    pub fn claim(&self) {
        self.claimed.store(true, Ordering::SeqCst);
    }

    /// It is the daemon's: it is thawed with all others.
    pub fn own(&self) {
        self.claimed.store(false, Ordering::SeqCst);
        self.forgotten.store(false, Ordering::SeqCst);
    }

    /// The daemon is dead: what it has claimed is thawed.
    pub fn inherit(&self) {
        if self.claimed.load(Ordering::SeqCst) {
            self.own();
        }
    }

    fn is_forgotten(&self) -> bool {
        self.forgotten.load(Ordering::SeqCst)
    }
}

/// Closes these. Where a mount has been taken away meanwhile that is its end, which may hang: that holds up no other,
/// and this returns when only such are left.
pub fn let_go(members: Vec<Arc<Member>>) {
    close_each(members, CLOSE_LIMIT);
}

fn close_each<T: Send + 'static>(all: Vec<T>, hang: Duration) {
    let mut left = all.len();
    let waiting = Arc::new(Mutex::new(all));
    let next = |it: &Mutex<Vec<T>>| it.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let (tell, told) = channel();
    while let Some(first) = next(&waiting) {
        let (theirs, tell) = (Arc::clone(&waiting), tell.clone());
        let close = move || {
            let mut one = Some(first);
            while one.take().is_some() {
                // Who asked may have gone on without it.
                let _ = tell.send(());
                one = next(&theirs);
            }
        };
        // Without memory for a thread that one is closed here, at the risk that it hangs.
        if thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn(close)
            .is_err()
        {
            left -= 1;
        }
        while left > 0 && told.recv_timeout(hang).is_ok() {
            left -= 1;
        }
    }
}

/// The threads that thaw. They live as long as the guard and wait for a rescue.
#[derive(Default)]
pub struct Crew {
    state: Mutex<CrewState>,
    /// A rescue begins, or somebody is free again.
    changed: Condvar,
}

#[derive(Default)]
struct CrewState {
    /// The rescue that is under way.
    rescue: Option<Arc<Shared>>,
    /// How many wait for one.
    free: usize,
}

impl Crew {
    /// Starts the threads.
    pub fn start() -> io::Result<Arc<Self>> {
        let crew = Arc::new(Crew::default());
        let no_file_system = Arc::new(File::open("/proc/self/stat")?);
        for _ in 0..THREADS {
            let (one, no_file_system) = (Arc::clone(&crew), Arc::clone(&no_file_system));
            let builder = thread::Builder::new().stack_size(STACK_BYTES);
            builder.spawn(move || {
                // It cannot be thawed; this is for the pages of the thread's stack.
                let _ = sys::thaw(no_file_system.as_fd());
                one.wait_and_work();
            })?;
        }
        let incomplete = |state: &mut CrewState| state.free < THREADS;
        let all = crew.changed.wait_while(crew.lock(), incomplete);
        drop(all.unwrap_or_else(PoisonError::into_inner));
        Ok(crew)
    }

    fn lock(&self) -> MutexGuard<'_, CrewState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_and_work(&self) {
        loop {
            let mut state = self.lock();
            state.free += 1;
            self.changed.notify_all();
            let rescue = loop {
                if let Some(rescue) = &state.rescue {
                    break Arc::clone(rescue);
                }
                let woken = self.changed.wait(state);
                state = woken.unwrap_or_else(PoisonError::into_inner);
            };
            state.free -= 1;
            drop(state);
            rescue.work();
        }
    }

    /// Sets all who are free to work; returns how many.
    fn begin(&self, rescue: &Arc<Shared>) -> usize {
        let mut state = self.lock();
        state.rescue = Some(Arc::clone(rescue));
        self.changed.notify_all();
        state.free
    }

    fn end(&self, rescue: &Shared) {
        // First, so that nobody who comes back from it finds it here.
        self.lock().rescue = None;
        rescue.lock().closed = true;
    }
}

/// Thaws everything, the last wave first, without ever waiting for what hangs. Made before there is
/// anything to thaw, so that no memory is wanted then.
pub struct Rescue {
    crew: Arc<Crew>,
    shared: Arc<Shared>,
    /// The waves not yet begun, first to last.
    waves: Vec<Vec<Arc<Member>>>,
    wave_began: Instant,
    threads: usize,
    most_threads: usize,
}

struct Shared {
    queue: Mutex<Queue>,
    settled: Arc<AtomicBool>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Arc<Member>>,
    /// Threads that are inside the kernel with one.
    busy: usize,
    closed: bool,
}

impl Rescue {
    /// Gets ready for the rescue of these. As long as `settled` is not set, what is not frozen may become
    /// so any moment.
    pub fn new(members: &[Arc<Member>], settled: &Arc<AtomicBool>, crew: &Arc<Crew>) -> Self {
        let mut waves: Vec<Vec<Arc<Member>>> = Vec::new();
        for member in members {
            let wave = member.wave as usize;
            if waves.len() <= wave {
                waves.resize(wave + 1, Vec::new());
            }
            if let Some(wave) = waves.get_mut(wave) {
                wave.push(Arc::clone(member));
            }
        }
        Rescue {
            crew: Arc::clone(crew),
            shared: Arc::new(Shared {
                queue: Mutex::new(Queue {
                    waiting: VecDeque::with_capacity(members.len()),
                    ..Queue::default()
                }),
                settled: Arc::clone(settled),
            }),
            waves,
            wave_began: Instant::now(),
            threads: 0,
            most_threads: members.len(),
        }
    }

    /// Sets the crew to work.
    pub fn begin(&mut self) {
        self.wave_began = Instant::now();
        self.threads = self.crew.begin(&self.shared);
    }

    /// Lets the crew go.
    pub fn end(&self) {
        self.crew.end(&self.shared);
    }

    /// Does what is due. True when everything is thawed that was frozen.
    pub fn advance(&mut self) -> bool {
        let (idle, waiting, busy) = {
            let queue = self.shared.lock();
            let idle = queue.waiting.is_empty() && queue.busy == 0;
            (idle, queue.waiting.len(), queue.busy)
        };
        if idle || self.wave_began.elapsed() > WAVE_LIMIT {
            match self.waves.pop() {
                Some(wave) => {
                    self.shared.lock().waiting.extend(wave);
                    self.wave_began = Instant::now();
                }
                None if idle => return true,
                None => {}
            }
        }
        if waiting > 0 && busy >= self.threads && self.threads < self.most_threads {
            self.start_thread();
        }
        false
    }

    fn start_thread(&mut self) {
        self.threads += 1;
        let shared = Arc::clone(&self.shared);
        let builder = thread::Builder::new().stack_size(STACK_BYTES);
        if builder.spawn(move || shared.work()).is_err() {
            // No memory for a thread: then here, at the risk that it hangs.
            self.shared.attempt_one();
        }
    }
}

impl Drop for Rescue {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        while !self.lock().closed {
            if !self.attempt_one() {
                thread::sleep(TICK);
            }
        }
    }

    /// Tries to thaw one. False when there is nothing to do at the moment.
    fn attempt_one(&self) -> bool {
        let member = {
            let mut queue = self.lock();
            let Some(member) = queue.waiting.pop_front() else {
                return false;
            };
            queue.busy += 1;
            member
        };
        // Read before the attempt: what is not frozen now could otherwise become so in between.
        let settled = self.settled.load(Ordering::SeqCst);
        let over = member.is_forgotten()
            || match sys::thaw(member.fd.as_fd()).map_err(|e| e.raw_os_error()) {
                Ok(()) => true,
                // Not frozen: not any more, or not yet.
                Err(Some(libc::EINVAL)) => settled,
                // It cannot freeze either, and nobody without privilege has frozen anything.
                Err(Some(libc::ENOTTY | libc::EOPNOTSUPP | libc::EPERM)) => true,
                // The file system itself refuses, and the kernel logs that each time. Others do not wait for it:
                // there are as many threads as are needed.
                Err(_) => {
                    thread::sleep(RETRY);
                    false
                }
            };
        let mut queue = self.lock();
        queue.busy -= 1;
        if !over {
            queue.waiting.push_back(member);
        }
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its end waits for the end of what it holds, if it holds anything, and then says so.
    struct Closed(
        Option<std::sync::mpsc::Receiver<()>>,
        std::sync::mpsc::Sender<u32>,
        u32,
    );

    impl Drop for Closed {
        fn drop(&mut self) {
            if let Some(until) = &self.0 {
                let _ = until.recv();
            }
            let _ = self.1.send(self.2);
        }
    }

    #[test]
    fn what_may_yet_be_frozen_by_others_is_thawed_after_the_daemons_death_alone() {
        let member = Member::new(File::open("/dev/null").unwrap().into(), 0);
        assert!(!member.is_forgotten());
        member.forget();
        member.claim();
        assert!(member.is_forgotten());
        member.inherit();
        assert!(!member.is_forgotten());
        // It has been asked, and is theirs.
        member.claim();
        member.forget();
        member.inherit();
        assert!(member.is_forgotten());
        // It has been asked once more, and is nobody's.
        member.claim();
        assert!(member.is_forgotten());
        member.own();
        assert!(!member.is_forgotten());
    }

    #[test]
    fn what_hangs_while_it_is_closed_holds_up_no_other() {
        let (tell, told) = channel();
        let (ends, until) = channel::<()>();
        let (second_ends, second) = channel::<()>();
        let stuck = [Some(until), None, Some(second), None].into_iter();
        let all = stuck
            .zip(0..)
            .map(|(until, n)| Closed(until, tell.clone(), n));
        close_each(all.collect(), Duration::from_millis(20));
        let mut closed: Vec<u32> = told.try_iter().collect();
        closed.sort_unstable();
        assert_eq!(closed, [1, 3]);
        drop((ends, second_ends, tell));
        assert_eq!(told.iter().count(), 2);
    }
}
