// SPDX-License-Identifier: GPL-2.0-only

//! What needs a disk and can wait: one thing after the other, on a thread of its own.
//!
//! A disk may hang, or be frozen by somebody else for as long as they like. Then what is to be done here
//! waits, and neither the event loop nor the next backup does. While a backup is under way nothing is
//! begun: a thread that hangs behind a freeze of ours would keep what this process has open, and with it
//! the freeze, should the process die. It does not know what is done.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use crate::process;

/// What may wait. It is more only when a disk hangs.
const MOST: usize = 16;
/// How long a backup waits for what is under way: as good as always that is a write of one line.
const PATIENCE: Duration = Duration::from_millis(500);
const STACK_BYTES: usize = 128 * 1024;

type Step = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Inner {
    steps: VecDeque<Step>,
    /// One is under way.
    busy: bool,
    /// None is begun.
    resting: bool,
}

#[derive(Default)]
struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Shared {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        // It is whole after each line below.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut inner = self.inner();
        loop {
            let next = match inner.resting {
                true => None,
                false => inner.steps.pop_front(),
            };
            let Some(step) = next else {
                let woken = self.changed.wait(inner);
                inner = woken.unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            inner.busy = true;
            drop(inner);
            step();
            inner = self.inner();
            inner.busy = false;
            self.changed.notify_all();
        }
    }
}

/// The thread; clones share it. It lives as long as the process.
#[derive(Clone)]
pub struct Later(Arc<Shared>);

impl Later {
    /// Starts it.
    pub fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let builder = Builder::new().name("later".into()).stack_size(STACK_BYTES);
        builder.spawn(move || {
            // Whoever starts it goes before all others, and this need not.
            let _ = process::go_along();
            theirs.run();
        })?;
        Ok(Later(shared))
    }

    /// Has `step` done after all that was added before; false when too much waits already.
    pub fn add(&self, step: impl FnOnce() + Send + 'static) -> bool {
        let mut inner = self.0.inner();
        let is_room = inner.steps.len() < MOST;
        if is_room {
            inner.steps.push_back(Box::new(step));
            self.0.changed.notify_all();
        }
        is_room
    }

    /// From here on nothing is begun until [`Later::go_on`]. Waits a moment for what is under way.
    pub fn rest(&self) {
        let mut inner = self.0.inner();
        inner.resting = true;
        // What hangs is not waited for.
        let _ = self
            .0
            .changed
            .wait_timeout_while(inner, PATIENCE, |it| it.busy);
    }

    /// Goes on with what has come meanwhile.
    pub fn go_on(&self) {
        self.0.inner().resting = false;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::time::Instant;

    /// Longer than any step of a test takes.
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn what_hangs_holds_up_what_comes_after_it_and_nobody_else() {
        let later = Later::start().unwrap();
        let (tell, told) = channel();
        let (release, hang) = channel::<()>();
        let begun = tell.clone();
        assert!(later.add(move || {
            begun.send(0).unwrap();
            let _ = hang.recv();
        }));
        assert_eq!(told.recv_timeout(LONG), Ok(0));
        let taken = (1..).take_while(|number| {
            let (tell, number) = (tell.clone(), *number);
            later.add(move || tell.send(number).unwrap())
        });
        assert_eq!(taken.count(), MOST);
        let start = Instant::now();
        later.rest();
        assert!(start.elapsed() >= PATIENCE, "it waits a moment");
        assert!(start.elapsed() < LONG, "it does not wait for what hangs");
        later.go_on();
        drop(release);
        for number in 1..=MOST {
            assert_eq!(told.recv_timeout(LONG), Ok(number));
        }
    }

    #[test]
    fn nothing_is_begun_at_rest() {
        let later = Later::start().unwrap();
        let (tell, told) = channel();
        later.rest();
        assert!(later.add(move || tell.send(()).unwrap()));
        assert!(told.recv_timeout(PATIENCE).is_err(), "it was begun");
        later.go_on();
        assert_eq!(told.recv_timeout(LONG), Ok(()));
    }
}
