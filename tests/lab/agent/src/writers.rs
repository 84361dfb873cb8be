// SPDX-License-Identifier: GPL-2.0-only

//! Threads that rewrite a small file without end, and how long each write takes them.
//!
//! A write into a frozen file system does not return until the thaw: the age of the write in
//! progress is how a test sees that a writer stands still.

use crate::error::Error;
use crate::{lock, start_thread};
use lab_agent::Writer;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of each write.
const BLOCK: usize = 512;

/// What a writer and its readers share. Times are microseconds since `epoch`, never 0 for a write.
struct State {
    path: String,
    epoch: Instant,
    count: AtomicU64,
    errors: AtomicU64,
    longest_us: AtomicU64,
    /// When the write in progress began, 0 between two writes.
    began_us: AtomicU64,
    stop: AtomicBool,
    stopped: AtomicBool,
}

impl State {
    fn now_us(&self) -> u64 {
        self.epoch.elapsed().as_micros() as u64 + 1
    }
}

/// The writers, in the order of their start.
#[derive(Default)]
pub struct Writers {
    all: Mutex<Vec<Arc<State>>>,
}

impl Writers {
    /// Makes the file and starts its writer.
    pub fn start(&self, path: &str, pause_us: u64) -> Result<(), Error> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        let state = Arc::new(State {
            path: path.to_owned(),
            epoch: Instant::now(),
            count: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            longest_us: AtomicU64::new(0),
            began_us: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
        });
        lock(&self.all).push(state.clone());
        start_thread(move || {
            let mut block = [0; BLOCK];
            while !state.stop.load(SeqCst) {
                block = block.map(|byte: u8| byte.wrapping_add(1));
                let began = state.now_us();
                state.began_us.store(began, SeqCst);
                let result = file.write_all_at(&block, 0);
                let took = state.now_us() - began;
                state.began_us.store(0, SeqCst);
                state.longest_us.fetch_max(took, SeqCst);
                match result {
                    Ok(()) => state.count.fetch_add(1, SeqCst),
                    Err(_) => state.errors.fetch_add(1, SeqCst),
                };
                thread::sleep(Duration::from_micros(pause_us));
            }
            state.stopped.store(true, SeqCst);
        })
    }

    /// How each of them fares.
    pub fn list(&self) -> Vec<Writer> {
        let all = lock(&self.all);
        all.iter()
            .map(|state| {
                // Began first: a write that ends in between is then seen as none in progress or as
                // one that is older than it is by this instant, never as a huge one.
                let began = state.began_us.load(SeqCst);
                let in_write_us = match began {
                    0 => 0,
                    began => state.now_us().saturating_sub(began),
                };
                Writer {
                    path: state.path.clone(),
                    count: state.count.load(SeqCst),
                    errors: state.errors.load(SeqCst),
                    longest_us: state.longest_us.load(SeqCst).max(in_write_us),
                    in_write_us,
                }
            })
            .collect()
    }

    /// Forgets the longest write of each.
    pub fn reset(&self) {
        let all = lock(&self.all);
        all.iter().for_each(|it| it.longest_us.store(0, SeqCst));
    }

    /// Ends all writers.
    pub fn stop(&self, timeout_ms: u64) -> Result<(), Error> {
        let until = Instant::now() + Duration::from_millis(timeout_ms);
        let mut all = lock(&self.all);
        all.iter().for_each(|state| state.stop.store(true, SeqCst));
        while !all.iter().all(|state| state.stopped.load(SeqCst)) && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
        all.retain(|state| !state.stopped.load(SeqCst));
        match all.first() {
            None => Ok(()),
            Some(state) => Err(Error::Call(format!(
                "the writer of {} is still inside a write",
                state.path
            ))),
        }
    }
}
