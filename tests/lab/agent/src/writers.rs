// SPDX-License-Identifier: GPL-2.0-only

//! Threads that write without end, and how long each write takes them: most rewrite a small file,
//! those with records append to one and sync it, or have a database commit rows, and keep notes of how
//! far they are.
//!
//! A write into a frozen file system does not return until the thaw: the age of the write in
//! progress is how a test sees that a writer stands still. Each writer also notes when its long
//! writes began and ended, which a test can ask for afterwards.

use crate::error::Error;
use crate::process::command;
use crate::{clock_us, lock, start_thread};
use lab_agent::{record, Note, Share, Stall, Stalls, Writer, NOTE_LEN, STALL_US};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of each write.
const BLOCK: usize = 512;

/// A block where a device can fetch it directly.
#[repr(align(4096))]
struct Aligned([u8; NOTE_LEN]);

/// Where a writer of records says how far it is: see [`Note`].
pub struct Notes {
    device: File,
    slot: u64,
}

impl Notes {
    /// In this block of a device. What is noted is with the device when the write returns, and waits for
    /// nothing else.
    pub fn open(device: &str, slot: u64) -> Result<Notes, Error> {
        let device = OpenOptions::new()
            .write(true)
            .custom_flags(nix::libc::O_DIRECT)
            .open(device)?;
        Ok(Notes { device, slot })
    }

    fn keep(&self, note: Note) -> io::Result<()> {
        let block = Aligned(note.block());
        self.device
            .write_all_at(&block.0, self.slot * NOTE_LEN as u64)
    }
}

/// How many long writes of each writer are kept; the oldest goes first.
const KEPT: usize = 64;
/// How many writes are remembered by when they began and ended.
const TIMES: usize = 1 << 16;

/// What a writer and its readers share. Times are those of the agent's clock.
struct State {
    path: String,
    count: AtomicU64,
    errors: AtomicU64,
    longest_us: AtomicU64,
    /// When the first writes began and ended that have ended.
    times: Mutex<Vec<(u64, u64)>>,
    /// When the write in progress began, 0 between two writes.
    began_us: AtomicU64,
    /// The long writes that have ended: when each began and ended.
    long: Mutex<VecDeque<(u64, u64)>>,
    rests: AtomicBool,
    stop: AtomicBool,
    stopped: AtomicBool,
}

impl State {
    fn new(path: &str) -> Arc<State> {
        Arc::new(State {
            path: path.to_owned(),
            count: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            longest_us: AtomicU64::new(0),
            times: Mutex::new(Vec::new()),
            began_us: AtomicU64::new(0),
            long: Mutex::new(VecDeque::with_capacity(KEPT)),
            rests: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
        })
    }

    /// What is between two writes.
    fn sleep(&self, time: Duration) {
        thread::sleep(time);
        while self.rests.load(SeqCst) && !self.stop.load(SeqCst) {
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Does one write, and notes when it began and how it ended.
    fn write(&self, write: impl FnOnce() -> io::Result<()>) {
        let began = clock_us();
        self.began_us.store(began, SeqCst);
        let result = write();
        self.ended(began, clock_us());
        match result {
            Ok(()) => self.count.fetch_add(1, SeqCst),
            Err(_) => self.errors.fetch_add(1, SeqCst),
        };
    }

    /// Notes a write that has ended.
    fn ended(&self, began: u64, ended: u64) {
        self.longest_us.fetch_max(ended - began, SeqCst);
        let mut times = lock(&self.times);
        if times.len() < TIMES {
            times.push((began, ended));
        }
        drop(times);
        if ended - began >= STALL_US {
            let mut long = lock(&self.long);
            if long.len() == KEPT {
                long.pop_front();
            }
            long.push_back((began, ended));
        }
        // Last, so that a long write is always seen as one of the two.
        self.began_us.store(0, SeqCst);
    }

    /// What of the writes fell between `from` and `to`.
    fn share(&self, from: u64, to: u64) -> Share {
        Share {
            path: self.path.clone(),
            parts_us: parts(&lock(&self.times), from, to),
        }
    }

    /// The long writes that had not ended at `since`.
    fn stalls(&self, since: u64, into: &mut Vec<Stall>) {
        // In progress first: what ends in between is then among those that have ended.
        let began = self.began_us.load(SeqCst);
        let long = lock(&self.long);
        let ended = long.iter().map(|&(began, ended)| (began, Some(ended)));
        let in_progress = began != 0
            && clock_us().saturating_sub(began) >= STALL_US
            && long.iter().all(|it| it.0 != began);
        let all = ended.chain(in_progress.then_some((began, None)));
        let late = all.filter(|(_, ended)| ended.is_none_or(|at| at > since));
        into.extend(late.map(|(began_us, ended_us)| Stall {
            path: self.path.clone(),
            began_us,
            ended_us,
        }));
    }
}

/// How much of each of these writes lies between `from` and `to`, of those that have a part there.
fn parts(writes: &[(u64, u64)], from: u64, to: u64) -> Vec<u64> {
    let within = writes
        .iter()
        .filter(|(began, ended)| *ended > from && *began < to);
    within
        .map(|(began, ended)| ended.min(&to).saturating_sub(*began.max(&from)))
        .collect()
}

/// A database's client program, which answers a line with a line.
struct Client {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Client {
    fn start(argv: &[String]) -> Result<Client, Error> {
        let mut child = command(argv)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::Call("a client without pipes".into()));
        };
        let output = BufReader::new(output);
        Ok(Client {
            child,
            input,
            output,
        })
    }

    /// Has it do `line` and waits until it answers `expected`.
    fn ask(&mut self, line: &str, expected: &str) -> io::Result<()> {
        writeln!(self.input, "{line}")?;
        let mut answer = String::new();
        self.output.read_line(&mut answer)?;
        if answer.trim_end() == expected {
            Ok(())
        } else {
            Err(io::Error::other(answer))
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It fails when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The writers, in the order of their start.
#[derive(Default)]
pub struct Writers {
    all: Mutex<Vec<Arc<State>>>,
}

impl Writers {
    /// Makes the file and starts its writer.
    pub fn start(&self, path: &str, every_us: u64, fsync: bool) -> Result<(), Error> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        let state = State::new(path);
        let mut all = lock(&self.all);
        // The golden ratio spreads any number of them evenly.
        let phase = (all.len() as f64 * 0.618_034).fract() * every_us as f64;
        let phase = phase as u64;
        all.push(state.clone());
        drop(all);
        start_thread(move || {
            let mut block = [0; BLOCK];
            while !state.stop.load(SeqCst) {
                block = block.map(|byte: u8| byte.wrapping_add(1));
                state.write(|| {
                    file.write_all_at(&block, 0)?;
                    if fsync {
                        file.sync_data()?;
                    }
                    Ok(())
                });
                let gone = (clock_us() + phase).checked_rem(every_us).unwrap_or(0);
                state.sleep(Duration::from_micros(every_us - gone));
            }
            state.stopped.store(true, SeqCst);
        })
    }

    /// Makes the file and starts a writer of records, which keeps notes.
    pub fn start_recorder(&self, path: &str, notes: Notes, every_us: u64) -> Result<(), Error> {
        let mut file = File::create(path)?;
        self.start_numbered(path, notes, every_us, move |number| {
            file.write_all(record(number).as_bytes())?;
            file.sync_all()
        })
    }

    /// Starts a session that commits rows through the client `argv`, and keeps notes.
    pub fn start_committer(
        &self,
        argv: &[String],
        statement: &str,
        notes: Notes,
        every_us: u64,
    ) -> Result<(), Error> {
        let mut client = Client::start(argv)?;
        let (name, statement) = (statement.to_owned(), statement.to_owned());
        self.start_numbered(&name, notes, every_us, move |number| {
            let number = number.to_string();
            client.ask(&statement.replace("{}", &number), &number)
        })
    }

    /// Starts a writer called `name` that does `sync` for one number after the other.
    fn start_numbered(
        &self,
        name: &str,
        notes: Notes,
        every_us: u64,
        mut sync: impl FnMut(u64) -> io::Result<()> + Send + 'static,
    ) -> Result<(), Error> {
        let state = State::new(name);
        lock(&self.all).push(state.clone());
        start_thread(move || {
            let mut note = Note {
                begun: 0,
                synced: 0,
            };
            // After an error nothing is known of what is on the disk: it says so and ends.
            while !state.stop.load(SeqCst) && state.errors.load(SeqCst) == 0 {
                note.begun += 1;
                state.write(|| {
                    notes.keep(note)?;
                    sync(note.begun)?;
                    note.synced = note.begun;
                    notes.keep(note)
                });
                state.sleep(Duration::from_micros(every_us));
            }
            // Whatever it holds ends before anybody hears that it has.
            drop(sync);
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
                    began => clock_us().saturating_sub(began),
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

    /// The long writes of all of them that had not ended at `since`.
    pub fn stalls(&self, since: u64) -> Stalls {
        let mut stalls = Vec::new();
        let all = lock(&self.all);
        all.iter().for_each(|it| it.stalls(since, &mut stalls));
        Stalls {
            now_us: clock_us(),
            stalls,
        }
    }

    /// What of the writes of each fell between `from` and `to`.
    pub fn within(&self, from: u64, to: u64) -> Vec<Share> {
        let all = lock(&self.all);
        all.iter().map(|state| state.share(from, to)).collect()
    }

    /// Lets all of them rest between two writes, or go on.
    pub fn rest(&self, rest: bool) {
        for state in lock(&self.all).iter() {
            state.rests.store(rest, SeqCst);
        }
    }

    /// Forgets how long the writes of each took.
    pub fn reset(&self) {
        for state in lock(&self.all).iter() {
            state.longest_us.store(0, SeqCst);
            lock(&state.times).clear();
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_write_the_part_counts_that_is_within() {
        let writes = [(10, 20), (25, 26), (30, 90), (95, 99)];
        assert_eq!(parts(&writes, 0, u64::MAX), [10, 1, 60, 4]);
        // One that begins before, one that lies within, one that ends later.
        assert_eq!(parts(&writes, 15, 50), [5, 1, 20]);
        // One that is under way all the time, as in a file system that is frozen.
        assert_eq!(parts(&writes, 40, 60), [20]);
        assert_eq!(parts(&writes, 20, 25), [0; 0]);
    }
}
