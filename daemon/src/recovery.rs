// SPDX-License-Identifier: GPL-2.0-only

//! What undoes after a death: thaws whatever is on record as frozen, and finds out what has broken.
//!
//! It depends on nothing that can be wrong: on no configuration, only on the directory that has lock
//! and record. What hangs in the kernel holds up nothing else. It knows no host.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc::{channel, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::config::{Config, ConfigError};
use crate::logbook::{words, Logbook};
use crate::machine::{LookError, Machine};
use crate::open::{open_file_system, OpenError};
use crate::plan::{plan, Plan};
use crate::process;
use crate::record::{Entry, Record, RecordError, RunDir};
use crate::sys;

/// How often a dead process is looked after that is still inside the kernel.
pub const PAUSE: Duration = Duration::from_millis(250);

/// Why not all is thawed.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// The machine could not be looked at.
    #[error(transparent)]
    Look(#[from] LookError),
    /// Record or lock cannot be used.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A frozen file system cannot be reached.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Some could not be thawed; which ones has been said.
    #[error("{0} file systems could not be thawed")]
    NotThawed(usize),
}

/// Where a record may be: in the directory that was asked for, or in all that a daemon may have used.
pub fn places(asked_for: Option<PathBuf>, config: Result<&Config, &ConfigError>) -> Vec<RunDir> {
    let mut paths: Vec<PathBuf> = asked_for.into_iter().collect();
    if paths.is_empty() {
        paths.extend(config.ok().map(|it| it.run_dir.clone()));
        // Set by systemd, from RuntimeDirectory=.
        paths.extend(std::env::var_os("RUNTIME_DIRECTORY").map(PathBuf::from));
        paths.push(Config::default().run_dir);
        let all = paths.clone();
        let mut number = 0;
        paths.retain(|path| {
            number += 1;
            !all.iter().take(number - 1).any(|it| it == path)
        });
    }
    paths.into_iter().map(RunDir::new).collect()
}

/// What came of the record of an earlier freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovered {
    /// There was none: no freeze was cut short.
    Nothing,
    /// One was cut short; nothing of it is frozen any more.
    CutShort,
    /// Whoever froze is still alive, and the record is theirs.
    InUse,
}

/// Who thaws what a record lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// An operator, or the stop step of the service: whoever else is at it.
    Operator,
    /// A daemon that starts: unless the owner lives, for that one thaws by itself.
    Start,
    /// The same daemon later, while a dead owner is still inside the kernel: only when that is over.
    Later,
}

/// Thaws whatever the record in `run` lists. Does not return before all of it is thawed, however long
/// that takes the kernel; what hangs holds up nothing else. When a host waits, word is left for the
/// next start that its THAW must fail.
pub fn thaw(run: &RunDir, log: &Logbook, by: By) -> Result<Recovered, RecoveryError> {
    let Some(record) = run.read()? else {
        return Ok(Recovered::Nothing);
    };
    match run.lock() {
        Ok(_lock) => {
            thaw_record(&record, log)?;
            if record.for_host {
                run.leave_word(match by {
                    By::Operator => "thawed by hand",
                    By::Start | By::Later => "the daemon that had frozen died",
                })?;
            }
            run.remove()?;
            Ok(Recovered::CutShort)
        }
        // The owner keeps its record; it finds out that it was thawed.
        Err(RecordError::Locked { .. }) => {
            let allowed = match by {
                By::Operator => true,
                By::Start => process::is_dead(record.pid),
                By::Later => false,
            };
            if allowed {
                thaw_record(&record, log)?;
            }
            // By then, what is on record is thawed, now or by the first of several calls.
            free_lock(&record, log);
            Ok(Recovered::InUse)
        }
        Err(error) => Err(error.into()),
    }
}

/// A guard that is stopped has a copy of the lock, and would never let go of it. With its daemon dead and
/// all thawed it has nothing left to do.
fn free_lock(record: &Record, log: &Logbook) {
    let stopped = record.guard.filter(|it| process::is_stopped(*it));
    let Some((pid, _)) = stopped.filter(|_| process::is_dead(record.pid)) else {
        return;
    };
    let text = format!("process {pid}, the guard of a dead daemon, is stopped: killed");
    log.warning(text);
    let pid = Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX));
    // It fails when it has just ended.
    let _ = kill(pid, Signal::SIGKILL);
}

/// Waits for an owner that has ended but is still inside the kernel, and thaws then: what it freezes
/// there nobody else would thaw.
pub fn outlast(run: &RunDir, log: &Logbook) -> Result<Recovered, RecoveryError> {
    loop {
        thread::sleep(PAUSE);
        match thaw(run, log, By::Later)? {
            Recovered::InUse => {}
            over => return Ok(over),
        }
    }
}

/// Whether a freeze is on record whose owner has ended, though it may still be inside the kernel.
pub fn owner_has_ended(run: &RunDir) -> bool {
    matches!(run.read(), Ok(Some(record)) if process::is_dead(record.pid))
}

/// The recovery of a daemon that starts. It may go on for longer than the start.
#[derive(Debug)]
pub struct Recovery {
    /// Why the THAW that the host has yet to ask for must fail, if it must.
    pub broken: Option<String>,
    /// Undoes what a dead process freezes even now.
    thread: Option<JoinHandle<()>>,
}

impl Recovery {
    /// Cleans up after whoever froze last and could not thaw.
    pub fn start(run: &RunDir, log: &Logbook) -> Self {
        let mut recovery = Recovery {
            broken: None,
            thread: None,
        };
        let broken = match thaw(run, log, By::Start) {
            Ok(Recovered::Nothing) => None,
            Ok(Recovered::CutShort) => {
                log.warning("an earlier daemon died while it had frozen; all is thawed");
                None
            }
            Ok(Recovered::InUse) => {
                log.warning("the freeze of another process is still being undone");
                recovery.wait(run.clone(), log.clone());
                Some("the freeze of another process was in force")
            }
            // Serving goes on: the next freeze may well work.
            Err(error) => {
                log.error(words(&error));
                Some("what an earlier daemon had frozen could not be thawed")
            }
        };
        let left = run.word_left().unwrap_or_else(|error| {
            log.error(words(&error));
            None
        });
        recovery.broken = left.or(broken.map(str::to_owned));
        if let Some(broken) = &recovery.broken {
            log.warning(format!(
                "the last freeze did not last until its THAW: {broken}"
            ));
        }
        recovery
    }

    /// Has a thread [`outlast`] a dead owner.
    fn wait(&mut self, run: RunDir, log: Logbook) {
        let theirs = log.clone();
        let wait = move || match outlast(&run, &theirs) {
            Ok(_) => theirs.info("the freeze of another process is undone"),
            Err(error) => theirs.error(words(&error)),
        };
        match thread::Builder::new().name("recovery".into()).spawn(wait) {
            Ok(thread) => self.thread = Some(thread),
            Err(error) => log.error(format!("cannot wait for it: {error}")),
        }
    }

    /// Whether nothing is left to be undone. Until then there is no freeze of ours.
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

/// How long one that hangs may hold up the next.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long those that hang may take in the end.
const LIMIT: Duration = Duration::from_secs(10);

/// What came of one thaw: its name and what the kernel said.
type Thawed = (String, io::Result<()>);

fn thaw_record(record: &Record, log: &Logbook) -> Result<(), RecoveryError> {
    if record.frozen.is_empty() {
        return Ok(());
    }
    let machine = Machine::look()?;
    let everything = plan(&machine.mounts, &machine.topology, &|_| None);
    let (tell, told) = channel();
    let mut under_way = Vec::new();
    let mut failed = 0;
    let mut over = |(name, result): Thawed, under_way: &mut Vec<String>| {
        under_way.retain(|it| *it != name);
        match result {
            Ok(()) => log.info(format!("{name} thawed")),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                log.info(format!("{name} is not frozen"));
            }
            Err(e) => {
                log.error(format!("{name} cannot be thawed: {e}"));
                failed += 1;
            }
        }
    };
    for entry in record.frozen.iter().rev() {
        let name = entry.name.clone();
        match open_entry(&machine, &everything, entry) {
            Ok(Some(fd)) => {
                under_way.push(name.clone());
                if let Err(error) = start_thaw(name.clone(), fd, tell.clone()) {
                    over((name, Err(error)), &mut under_way);
                } else if let Ok(thawed) = told.recv_timeout(PATIENCE) {
                    over(thawed, &mut under_way);
                }
            }
            Ok(None) => log.warning(format!("{name} is not mounted any more")),
            Err(error) => over((name, Err(io::Error::other(error))), &mut under_way),
        }
    }
    let until = Instant::now() + LIMIT;
    while !under_way.is_empty() {
        match told.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(thawed) => over(thawed, &mut under_way),
            Err(_) => break,
        }
    }
    for name in &under_way {
        log.error(format!(
            "{name} hangs in the kernel and is thawed when that ends"
        ));
    }
    match failed + under_way.len() {
        0 => Ok(()),
        count => Err(RecoveryError::NotThawed(count)),
    }
}

/// Opens what a record lists; `None` when it is not mounted any more.
fn open_entry(
    machine: &Machine,
    everything: &Plan,
    entry: &Entry,
) -> Result<Option<OwnedFd>, OpenError> {
    let file_system = everything.file_systems().find(|f| f.dev == entry.dev);
    file_system
        .map(|it| open_file_system(&machine.ways, it))
        .transpose()
}

/// Thaws on a thread of its own, which may hang: behind a freeze that does, for one.
fn start_thaw(name: String, fd: OwnedFd, tell: Sender<Thawed>) -> io::Result<()> {
    let thaw = move || {
        // Nobody listens any more when it took too long.
        let _ = tell.send((name, sys::thaw(fd.as_fd())));
    };
    thread::Builder::new().spawn(thaw).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logbook::Sink;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Child, Command};

    #[test]
    fn a_guard_that_is_stopped_does_not_outlive_its_daemon_and_one_that_is_not_does() {
        let dir = std::env::temp_dir().join(format!("hv-vss-recovery-{}", std::process::id()));
        let run = RunDir::new(&dir);
        let log = Logbook::new(Sink::Memory);
        let lock = run.lock().unwrap();
        let mut guard = Command::new("sleep").arg("1000").spawn().unwrap();
        let start = process::start_of(guard.id()).unwrap();
        let thaw_with = |guard: &mut Child, pid, start| {
            let record = Record {
                pid,
                guard: Some((guard.id(), start)),
                ..Record::default()
            };
            run.write(&record, &lock).unwrap();
            assert_eq!(thaw(&run, &log, By::Operator).unwrap(), Recovered::InUse);
            guard.try_wait().unwrap()
        };
        let dead = u32::MAX;
        assert_eq!(
            thaw_with(&mut guard, dead, start),
            None,
            "it is not stopped"
        );
        let pid = Pid::from_raw(guard.id().try_into().unwrap());
        kill(pid, Signal::SIGSTOP).unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while !process::is_stopped((guard.id(), start)) {
            assert!(Instant::now() < until, "it does not stop");
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(
            thaw_with(&mut guard, std::process::id(), start),
            None,
            "it is minded"
        );
        assert_eq!(
            thaw_with(&mut guard, dead, start + 1),
            None,
            "it is another"
        );
        let _ = thaw_with(&mut guard, dead, start);
        assert_eq!(guard.wait().unwrap().signal(), Some(libc::SIGKILL));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_record_is_looked_for_where_a_daemon_may_have_left_it_whatever_the_configuration() {
        let default = || RunDir::new(Config::default().run_dir);
        let paths = |places: Vec<RunDir>| -> Vec<PathBuf> {
            places.iter().map(|it| it.path().to_owned()).collect()
        };
        let broken = Config::load(Some("/dev/null/no.toml".as_ref())).unwrap_err();
        let from_unit = std::env::var_os("RUNTIME_DIRECTORY");
        assert_eq!(from_unit, None, "the tests run outside of a unit");
        assert_eq!(paths(places(None, Err(&broken))), paths(vec![default()]));
        let config = Config {
            run_dir: "/run/other".into(),
            ..Config::default()
        };
        let both = vec![RunDir::new("/run/other"), default()];
        assert_eq!(paths(places(None, Ok(&config))), paths(both));
        let same = places(None, Ok(&Config::default()));
        assert_eq!(paths(same), paths(vec![default()]));
        let asked_for = places(Some("/run/asked".into()), Ok(&config));
        assert_eq!(paths(asked_for), paths(vec![RunDir::new("/run/asked")]));
    }
}
