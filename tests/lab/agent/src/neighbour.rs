// SPDX-License-Identifier: GPL-2.0-only

//! Threads that freeze and thaw a file system without end and without asking anybody: what
//! `stress-ng --file-ioctl` does among other things, and a backup agent of another kind now and then.

use crate::error::Error;
use crate::{lock, open_any, sys, STACK};
use lab_agent::Neighbour;
use nix::errno::Errno;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::{self, Builder, JoinHandle};
use std::time::Duration;

/// Between a thaw and the next freeze: others come to something, too, on an emulated processor.
const PAUSE: Duration = Duration::from_millis(5);

/// Those that run, in the order of their start.
#[derive(Default)]
pub struct Neighbours {
    all: Mutex<Vec<(Arc<AtomicBool>, JoinHandle<Neighbour>)>>,
}

impl Neighbours {
    /// Starts one on the file system that holds `path`.
    pub fn start(&self, path: &str) -> Result<(), Error> {
        let file = open_any(path)?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = Builder::new().stack_size(STACK);
        let thread = thread.spawn(move || run(&file, &told))?;
        lock(&self.all).push((stop, thread));
        Ok(())
    }

    /// Ends them all, and says what they have done.
    pub fn stop(&self) -> Result<Vec<Neighbour>, Error> {
        let all = std::mem::take(&mut *lock(&self.all));
        all.iter().for_each(|(stop, _)| stop.store(true, SeqCst));
        let ended = all.into_iter().map(|(_, thread)| thread.join());
        let ended = ended.collect::<Result<_, _>>();
        ended.map_err(|_| Error::Call("a thread panicked".into()))
    }
}

fn run(file: &File, stop: &AtomicBool) -> Neighbour {
    let mut done = Neighbour::default();
    let mut count = |result: Result<(), Errno>, ok: fn(&mut Neighbour) -> &mut u64| match result {
        Ok(()) => *ok(&mut done) += 1,
        Err(errno) => *done.refused.entry(format!("{errno:?}")).or_default() += 1,
    };
    while !stop.load(SeqCst) {
        count(sys::freeze(file), |it| &mut it.freezes);
        count(sys::thaw(file), |it| &mut it.thaws);
        thread::sleep(PAUSE);
    }
    done
}
