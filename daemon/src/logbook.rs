// SPDX-License-Identifier: GPL-2.0-only

//! The daemon's log: words for an operator, never written while something is frozen.
//!
//! A log line that goes to a frozen disk (or to a journal that is on one) would block the daemon
//! behind its own freeze. So for as long as there is a [`Held`] the lines are kept in memory, with the
//! time each was said at, and they are written out when it is dropped, after the thaw. It does not
//! know what the lines mean.
//!
//! Whoever takes the lines may stop to do so: a system log that is stopped, a pipe or a terminal that nobody reads. So
//! for whoever freezes or thaws, a thread of its own writes them ([`Logbook::write_behind`]), and nobody else waits for that.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use nix::sys::stat::fstat;
use nix::syslog::{self, Facility, LogFlags, Severity};

use crate::process;
use crate::sys;

/// How long a line may take to be written before nobody waits for it.
const PATIENCE: Duration = Duration::from_millis(100);
const STACK_BYTES: usize = 128 * 1024;
/// Of the lines that are held beyond this, those of the normal course are counted, not kept.
const MAX_HELD: usize = 4096;
/// Room for so many is set aside before anything is frozen.
const FIRST_HELD: usize = 256;

/// How grave a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Something failed: the backup, or the daemon.
    Error,
    /// Worth an operator's attention, but the backup goes on.
    Warning,
    /// The normal course of events.
    Info,
}

/// Where the lines go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sink {
    /// Standard error, one line each.
    Stderr,
    /// Standard error, when that is the journal: each line begins with its priority (sd-daemon(3)).
    Journal,
    /// The system log, facility `daemon`.
    Syslog,
    /// Memory only, read back with [`Logbook::held`]: for tests.
    Memory,
}

struct Inner {
    sink: Sink,
    /// Name and start of the backup under way; lines said meanwhile carry its clock.
    backup: Option<(u64, Instant)>,
    held: VecDeque<(Level, String)>,
    holding: bool,
    /// What is held may not be written out.
    sealed: bool,
    dropped: usize,
    /// Whether another thread writes.
    is_behind: bool,
    /// Of the lines that are held so many, the first ones, are to be written by it.
    due: usize,
    /// Since when it is at a line.
    writing: Option<Instant>,
}

struct Shared {
    inner: Mutex<Inner>,
    /// There is something to be written.
    is_due: Condvar,
    /// A line is written.
    is_written: Condvar,
}

/// A handle to the one log of the process; clones share it.
#[derive(Clone)]
pub struct Logbook(Arc<Shared>);

impl Logbook {
    /// A log that writes to `sink`.
    pub fn new(sink: Sink) -> Self {
        if sink == Sink::Syslog {
            let flags = LogFlags::LOG_PID | LogFlags::LOG_NDELAY;
            // Without a system log there is nowhere to complain to; lines are then lost, as with
            // every daemon.
            let _ = syslog::openlog(Some(c"hv_vss_daemon"), flags, Facility::LOG_DAEMON);
        }
        let inner = Inner {
            sink,
            backup: None,
            held: VecDeque::new(),
            holding: sink == Sink::Memory,
            sealed: false,
            dropped: 0,
            is_behind: false,
            due: 0,
            writing: None,
        };
        Logbook(Arc::new(Shared {
            inner: Mutex::new(inner),
            is_due: Condvar::new(),
            is_written: Condvar::new(),
        }))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A thread that panicked while it held the lock left whole lines behind.
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on another thread writes, in the same order, for as long as the process lives.
    pub fn write_behind(&self) -> io::Result<()> {
        if self.inner().is_behind {
            return Ok(());
        }
        let log = self.clone();
        let body = move || {
            // Nobody waits for it.
            let _ = process::go_along();
            // Should it hang on a disk when the process dies, all else is closed. A system log has a
            // descriptor of its own, which nobody tells.
            let _kept = match log.inner().sink {
                Sink::Stderr | Sink::Journal => sys::keep_only(libc::STDERR_FILENO).ok(),
                Sink::Syslog | Sink::Memory => None,
            };
            log.write_what_is_due();
        };
        let builder = Builder::new().name("log".into()).stack_size(STACK_BYTES);
        builder.spawn(body)?;
        self.inner().is_behind = true;
        Ok(())
    }

    fn write_what_is_due(&self) {
        let mut inner = self.inner();
        loop {
            let Some((level, line)) = inner.take_due() else {
                let waited = self.0.is_due.wait(inner);
                inner = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            inner.writing = Some(Instant::now());
            let sink = inner.sink;
            drop(inner);
            write(sink, level, &line);
            inner = self.inner();
            inner.writing = None;
            self.0.is_written.notify_all();
        }
    }

    /// Waits until all is written, but no longer than `limit`: to be called before the process ends.
    pub fn drain(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let mut inner = self.inner();
        while inner.due > 0 || inner.writing.is_some() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            inner = self.wait(inner, left);
        }
    }

    /// Waits for a line to be written.
    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>, limit: Duration) -> MutexGuard<'a, Inner> {
        let waited = self.0.is_written.wait_timeout(inner, limit);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// From here on each line is stamped with the seconds since `start`, as part of backup `number`, 0 for a rehearsal,
    /// and kept in memory, until what is returned is dropped.
    pub fn hold(&self, number: u64, start: Instant) -> Held {
        self.inner().backup = Some((number, start));
        self.keep();
        Held(self.clone())
    }

    fn keep(&self) {
        let mut inner = self.inner();
        inner.holding = true;
        inner.held.reserve(FIRST_HELD);
    }

    /// Writes out what is held, and then does `step`, which may take long and says what it does as it
    /// goes. To be called only while nothing is frozen.
    pub fn aloud<T>(&self, step: impl FnOnce() -> T) -> T {
        self.release();
        let result = step();
        self.keep();
        result
    }

    /// Writes out what is held so far, unless it is sealed.
    pub fn flush(&self) {
        self.inner().write_out();
        self.0.is_due.notify_one();
    }

    /// From here on no line is begun until what [`Logbook::hold`] returned is dropped. Whoever is at one has
    /// ended when this returns, or hangs in it and holds nobody up: file systems can be frozen now.
    pub fn seal(&self) {
        let mut inner = self.inner();
        inner.sealed = true;
        while let Some(since) = inner.writing {
            let left = PATIENCE.saturating_sub(since.elapsed());
            if left.is_zero() {
                return;
            }
            inner = self.wait(inner, left);
        }
    }

    /// Writes out what was held and stops holding, once nothing is frozen.
    fn release(&self) {
        let mut inner = self.inner();
        inner.sealed = false;
        inner.holding = inner.sink == Sink::Memory;
        inner.write_out();
        drop(inner);
        self.0.is_due.notify_one();
    }

    /// The lines in memory, oldest first.
    pub fn held(&self) -> Vec<(Level, String)> {
        self.inner().held.iter().cloned().collect()
    }

    /// Says that something failed.
    pub fn error(&self, text: impl AsRef<str>) {
        self.say(Level::Error, text.as_ref());
    }

    /// Says something worth attention.
    pub fn warning(&self, text: impl AsRef<str>) {
        self.say(Level::Warning, text.as_ref());
    }

    /// Says what is going on.
    pub fn info(&self, text: impl AsRef<str>) {
        self.say(Level::Info, text.as_ref());
    }

    /// Says something as grave as that.
    pub fn say(&self, level: Level, text: &str) {
        let mut inner = self.inner();
        let line = match inner.backup {
            Some((number, start)) => {
                let at = start.elapsed().as_secs_f64();
                match number {
                    0 => format!("rehearsal +{at:.6}s: {text}"),
                    _ => format!("backup {number} +{at:.6}s: {text}"),
                }
            }
            None => text.to_owned(),
        };
        if inner.holding {
            inner.keep(level, line);
        } else if inner.is_behind {
            inner.keep(level, line);
            inner.due = inner.held.len();
            self.0.is_due.notify_one();
        } else {
            // Under the lock, so that nobody is still at it when it is held or sealed.
            write(inner.sink, level, &line);
        }
    }
}

impl Inner {
    fn write_out(&mut self) {
        if self.sealed || self.sink == Sink::Memory {
            return;
        }
        if self.is_behind {
            self.due = self.held.len();
            return;
        }
        for (level, line) in std::mem::take(&mut self.held) {
            write(self.sink, level, &line);
        }
        if self.dropped > 0 {
            let dropped = std::mem::take(&mut self.dropped);
            write(self.sink, Level::Warning, &not_kept(dropped));
        }
    }

    /// The next line that may be written.
    fn take_due(&mut self) -> Option<(Level, String)> {
        if self.sealed {
            return None;
        }
        if self.held.is_empty() && self.dropped > 0 {
            let line = not_kept(std::mem::take(&mut self.dropped));
            return Some((Level::Warning, line));
        }
        self.due = self.due.checked_sub(1)?;
        self.held.pop_front()
    }

    /// Keeps a line, and a grave one whatever there is already.
    fn keep(&mut self, level: Level, line: String) {
        if self.held.len() >= MAX_HELD {
            self.dropped += 1;
            let least = self
                .held
                .iter()
                .position(|(level, _)| *level == Level::Info);
            match least.filter(|_| level != Level::Info) {
                Some(least) => {
                    self.held.remove(least);
                    self.due -= usize::from(least < self.due);
                }
                None if level == Level::Info => return,
                // Nothing is dropped for it: all there is is as grave.
                None => self.dropped -= 1,
            }
        }
        self.held.push_back((level, line));
    }
}

fn not_kept(lines: usize) -> String {
    format!("{lines} further lines were not kept while they could not be written")
}

/// The log, held. It is written out when this is dropped: nothing may be frozen by then.
#[must_use]
pub struct Held(Logbook);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.inner().backup = None;
        self.0.release();
    }
}

/// Whether standard error is the journal of systemd, which then says so (systemd.exec(5)).
pub fn stderr_is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    fstat(std::io::stderr()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// An error with its causes, in one line.
pub fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(&format!(": {next}"));
        cause = next.source();
    }
    text
}

fn write(sink: Sink, level: Level, line: &str) {
    // A log that cannot be written must not stop a backup, so errors end here.
    match sink {
        Sink::Memory => {}
        Sink::Stderr => {
            let word = match level {
                Level::Error => "error: ",
                Level::Warning => "warning: ",
                Level::Info => "",
            };
            // In one piece: it goes out unbuffered.
            let text = format!("hv_vss_daemon: {word}{line}\n");
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
        Sink::Journal => {
            let priority = severity_of(level) as u8;
            let text = format!("<{priority}>{line}\n");
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
        Sink::Syslog => {
            let _ = syslog::syslog(severity_of(level), line);
        }
    }
}

fn severity_of(level: Level) -> Severity {
    match level {
        Level::Error => Severity::LOG_ERR,
        Level::Warning => Severity::LOG_WARNING,
        Level::Info => Severity::LOG_INFO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_backup_carry_its_clock_and_are_held() {
        let log = Logbook::new(Sink::Memory);
        let held = log.hold(7, Instant::now());
        log.warning("/data cannot be frozen");
        drop(held);
        log.info("idle");
        let held = log.held();
        assert_eq!(held.len(), 2);
        assert_eq!(held[0].0, Level::Warning);
        assert!(held[0].1.starts_with("backup 7 +0."), "{}", held[0].1);
        assert!(held[0].1.ends_with("s: /data cannot be frozen"));
        assert_eq!(held[1].1, "idle");
    }

    #[test]
    fn a_flood_is_counted_not_kept_and_no_error_drowns_in_it() {
        let log = Logbook::new(Sink::Memory);
        log.info("first");
        for _ in 0..MAX_HELD + 2 {
            log.info("again");
        }
        log.error("it hangs");
        let held = log.held();
        assert_eq!(held.len(), MAX_HELD);
        assert_eq!(log.inner().dropped, 4);
        assert_eq!(held[0].1, "again");
        assert_eq!(held[MAX_HELD - 1], (Level::Error, "it hangs".into()));
    }

    /// Runs the test of this name once more, in a process of its own, which logs into a pipe.
    fn with_a_pipe(name: &str) -> std::process::Child {
        let this = std::env::current_exe().unwrap();
        std::process::Command::new(this)
            .args(["--exact", &format!("logbook::tests::{name}"), "--nocapture"])
            .env(CHILD, "1")
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    }

    const CHILD: &str = "HV_VSS_TEST_LOGS";
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_pipe_that_nobody_reads_holds_up_nobody() {
        if std::env::var_os(CHILD).is_some() {
            let log = Logbook::new(Sink::Stderr);
            log.write_behind().unwrap();
            // More than a pipe takes, and more than is kept.
            for number in 0..3 {
                let held = log.hold(number, Instant::now());
                for _ in 0..MAX_HELD {
                    log.info("the normal course of events");
                }
                log.flush();
                log.seal();
                log.error("something fails");
                drop(held);
            }
            log.drain(Duration::from_millis(50));
            assert_eq!(log.held().last().unwrap().0, Level::Error);
            assert!(log.held().len() <= MAX_HELD + 1);
            std::process::exit(7);
        }
        let mut child = with_a_pipe("a_pipe_that_nobody_reads_holds_up_nobody");
        let until = Instant::now() + LONG;
        let ended = loop {
            match child.try_wait().unwrap() {
                None if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
                ended => break ended,
            }
        };
        let _ = child.kill();
        assert_eq!(ended.expect("it hangs").code(), Some(7));
    }

    #[test]
    fn what_another_thread_writes_is_all_and_in_its_order() {
        if std::env::var_os(CHILD).is_some() {
            let log = Logbook::new(Sink::Stderr);
            log.write_behind().unwrap();
            log.info("line 0");
            let held = log.hold(1, Instant::now());
            log.info("line 1");
            log.aloud(|| log.info("line 2"));
            log.seal();
            log.info("line 3");
            log.flush();
            std::thread::sleep(Duration::from_millis(20));
            // What may have been before it is sealed is not known.
            assert!(log.held().iter().any(|(_, line)| line.ends_with("line 3")));
            drop(held);
            log.info("line 4");
            log.drain(LONG);
            std::process::exit(7);
        }
        let child = with_a_pipe("what_another_thread_writes_is_all_and_in_its_order");
        let ended = child.wait_with_output().unwrap();
        let text = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(7), "{text}");
        let ends = text.lines().filter_map(|it| it.split_once("line "));
        let ends: Vec<&str> = ends.map(|(_, number)| number).collect();
        assert_eq!(ends, ["0", "1", "2", "3", "4"], "{text}");
    }

    #[test]
    fn nothing_grave_is_dropped_for_something_grave() {
        let log = Logbook::new(Sink::Memory);
        for _ in 0..MAX_HELD + 5 {
            log.error("again");
        }
        log.info("again");
        assert_eq!(log.held().len(), MAX_HELD + 5);
        assert_eq!(log.inner().dropped, 1);
    }
}
