// SPDX-License-Identifier: GPL-2.0-only

//! The daemon's log: words for an operator, never written while something is frozen.
//!
//! A log line that goes to a frozen disk (or to a journal that is on one) would block the daemon
//! behind its own freeze. So [`Logbook::hold`] makes it keep its lines in memory, with the time
//! each was said at, and [`Logbook::release`] writes them out after the thaw. It does not know what
//! the lines mean.

use std::io::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::syslog::{self, Facility, LogFlags, Severity};

/// Held lines beyond this are counted, not kept: the memory for them is set aside beforehand.
const MAX_HELD: usize = 4096;

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
            dropped: 0,
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A thread that panicked while it held the lock left whole lines behind.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on each line is stamped with the seconds since `start`, as part of backup `number`.
    pub fn begin_backup(&self, number: u64, start: Instant) {
        self.inner().backup = Some((number, start));
    }

    /// Ends the stamping that [`Logbook::begin_backup`] began.
    pub fn end_backup(&self) {
        self.inner().backup = None;
    }

    /// Keeps all further lines in memory, which is reserved here, before anything is frozen.
    pub fn hold(&self) {
        let mut inner = self.inner();
        inner.holding = true;
        inner.held.reserve(256);
    }

    /// Writes out what was held and stops holding. To be called only when nothing is frozen.
    pub fn release(&self) {
        let (sink, lines, dropped) = {
            let mut inner = self.inner();
            if inner.sink == Sink::Memory {
                return;
            }
            inner.holding = false;
            let lines = std::mem::take(&mut inner.held);
            (inner.sink, lines, std::mem::take(&mut inner.dropped))
        };
        for (level, line) in &lines {
            write(sink, *level, line);
        }
        if dropped > 0 {
            let line = format!("{dropped} further lines were not kept while frozen");
            write(sink, Level::Warning, &line);
        }
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

    fn say(&self, level: Level, text: &str) {
        let mut inner = self.inner();
        let line = match inner.backup {
            Some((number, start)) => {
                let at = start.elapsed().as_secs_f64();
                format!("backup {number} +{at:.6}s: {text}")
            }
            None => text.to_owned(),
        };
        if !inner.holding {
            let sink = inner.sink;
            drop(inner);
            write(sink, level, &line);
        } else if inner.held.len() < MAX_HELD {
            inner.held.push((level, line));
        } else {
            inner.dropped += 1;
        }
    }
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
        Sink::Syslog => {
            let severity = match level {
                Level::Error => Severity::LOG_ERR,
                Level::Warning => Severity::LOG_WARNING,
                Level::Info => Severity::LOG_INFO,
            };
            let _ = syslog::syslog(severity, line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_backup_carry_its_clock_and_are_held() {
        let log = Logbook::new(Sink::Memory);
        log.begin_backup(7, Instant::now());
        log.warning("/data cannot be frozen");
        log.end_backup();
        log.info("idle");
        let held = log.held();
        assert_eq!(held.len(), 2);
        assert_eq!(held[0].0, Level::Warning);
        assert!(held[0].1.starts_with("backup 7 +0."), "{}", held[0].1);
        assert!(held[0].1.ends_with("s: /data cannot be frozen"));
        assert_eq!(held[1].1, "idle");
    }

    #[test]
    fn a_flood_is_counted_not_kept() {
        let log = Logbook::new(Sink::Memory);
        for _ in 0..MAX_HELD + 3 {
            log.info("again");
        }
        assert_eq!(log.held().len(), MAX_HELD);
        assert_eq!(log.inner().dropped, 3);
    }
}
