// SPDX-License-Identifier: GPL-2.0-only

//! The daemon's log: words for an operator, never written while something is frozen.
//!
//! A log line that goes to a frozen disk (or to a journal that is on one) would block the daemon
//! behind its own freeze. So for as long as there is a [`Held`] the lines are kept in memory, with the
//! time each was said at, and they are written out when it is dropped, after the thaw. It does not
//! know what the lines mean.

use std::io::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::sys::stat::fstat;
use nix::syslog::{self, Facility, LogFlags, Severity};

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
    held: Vec<(Level, String)>,
    holding: bool,
    /// What is held may not be written out.
    sealed: bool,
    dropped: usize,
}

/// A handle to the one log of the process; clones share it.
#[derive(Clone)]
pub struct Logbook(Arc<Mutex<Inner>>);

impl Logbook {
    /// A log that writes to `sink`.
    pub fn new(sink: Sink) -> Self {
        if sink == Sink::Syslog {
            let flags = LogFlags::LOG_PID | LogFlags::LOG_NDELAY;
            // Without a system log there is nowhere to complain to; lines are then lost, as with
            // every daemon.
            let _ = syslog::openlog(Some(c"hv_vss_daemon"), flags, Facility::LOG_DAEMON);
        }
        Logbook(Arc::new(Mutex::new(Inner {
            sink,
            backup: None,
            held: Vec::new(),
            holding: sink == Sink::Memory,
            sealed: false,
            dropped: 0,
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A thread that panicked while it held the lock left whole lines behind.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on each line is stamped with the seconds since `start`, as part of backup `number`,
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
    }

    /// From here on nothing is written until what [`Logbook::hold`] returned is dropped. Whoever is at
    /// it has ended when this returns: file systems can be frozen now.
    pub fn seal(&self) {
        self.inner().sealed = true;
    }

    /// Writes out what was held and stops holding, once nothing is frozen.
    fn release(&self) {
        let mut inner = self.inner();
        inner.sealed = false;
        inner.holding = inner.sink == Sink::Memory;
        inner.write_out();
    }

    /// The lines in memory, oldest first.
    pub fn held(&self) -> Vec<(Level, String)> {
        self.inner().held.clone()
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
                format!("backup {number} +{at:.6}s: {text}")
            }
            None => text.to_owned(),
        };
        if inner.holding {
            inner.keep(level, line);
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
        for (level, line) in std::mem::take(&mut self.held) {
            write(self.sink, level, &line);
        }
        if self.dropped > 0 {
            let dropped = std::mem::take(&mut self.dropped);
            let line = format!("{dropped} further lines were not kept while frozen");
            write(self.sink, Level::Warning, &line);
        }
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
                Some(least) => drop(self.held.remove(least)),
                None if level == Level::Info => return,
                // Nothing is dropped for it: all there is is as grave.
                None => self.dropped -= 1,
            }
        }
        self.held.push((level, line));
    }
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
