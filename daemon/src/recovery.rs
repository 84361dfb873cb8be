// SPDX-License-Identifier: GPL-2.0-only

//! What undoes after a death: thaws whatever is on record as frozen, and finds out what has broken.
//!
//! It depends on nothing that can be wrong: on no configuration, only on the directory that has lock
//! and record. What hangs in the kernel holds up nothing else. It knows no host.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Sender};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::logbook::{words, Logbook};
use crate::machine::{LookError, Machine};
use crate::open::open_file_system;
use crate::plan::{plan, FileSystem, Plan};
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
    /// Some could not be thawed; which ones has been said.
    #[error("{0} file systems could not be thawed")]
    NotThawed(usize),
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
    /// A daemon that serves, before it freezes or at rest: as one that starts, and the host begins anew.
    Next,
}

/// Thaws whatever the record in `run` lists. Does not return before all of it is thawed, however long
/// that takes the kernel; what hangs holds up nothing else. When a host waits that does not begin anew, word is left
/// for the next start that its THAW must fail.
pub fn thaw(run: &RunDir, log: &Logbook, by: By) -> Result<Recovered, RecoveryError> {
    let Some(record) = run.read()?.map(Record::as_one) else {
        return Ok(Recovered::Nothing);
    };
    match run.lock() {
        Ok(_lock) => {
            thaw_record(&record, log)?;
            let word = match by {
                By::Operator => Some("thawed by hand"),
                By::Start | By::Later => Some("the daemon that had frozen died"),
                By::Next => None,
            };
            if let Some(word) = word.filter(|_| record.for_host) {
                run.leave_word(word)?;
            }
            run.remove()?;
            Ok(Recovered::CutShort)
        }
        // The owner keeps its record; it finds out that it was thawed.
        Err(RecordError::Locked { .. }) => {
            let owner_is_dead = process::is_dead(record.pid);
            let allowed = match by {
                By::Operator => true,
                By::Start | By::Next => owner_is_dead,
                By::Later => false,
            };
            if allowed {
                match thaw_record(&record, log) {
                    // Such a thaw waits behind the freeze that a dead owner is still inside of, and may come
                    // before its end, when there is nothing to thaw yet. Once the owner is out it is done again.
                    Err(RecoveryError::NotThawed(_)) if owner_is_dead => {}
                    thawed => thawed?,
                }
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

/// What somebody has left frozen who has died while this process served.
#[derive(Default)]
pub struct Leavings {
    /// What could not be thawed. It is not tried again each time: it may have a thread of its own by now that hangs
    /// in its thaw.
    in_vain: Option<Record>,
}

impl Leavings {
    /// Thaws it, before this process freezes or as soon as it is known. Where that cannot be it stays as it is, and counts as frozen by others.
    pub fn thaw(&mut self, run: &RunDir, log: &Logbook) {
        // What is wrong with one that cannot be read has been said at the start.
        let record = run.read().ok().flatten();
        if record.is_none() || record == self.in_vain {
            return;
        }
        match thaw(run, log, By::Next) {
            Ok(Recovered::CutShort) => {
                log.warning("another process died while it had frozen; all is thawed");
            }
            // Of one that lives it is said when nothing can be frozen beside it.
            Ok(Recovered::Nothing | Recovered::InUse) => {}
            Err(error) => {
                log.error(words(&error));
                self.in_vain = record;
            }
        }
    }
}

/// Whether a freeze is on record whose owner has ended, though it may still be inside the kernel.
pub fn owner_has_ended(run: &RunDir) -> bool {
    let record = run.read().ok().flatten();
    record.is_some_and(|it| process::is_dead(it.pid))
}

/// Whether a freeze or hooks are on record whose owner has ended and may still be inside the kernel. Of a freeze
/// that the module held there is no record, of its hooks there is. One that is gone has nothing open, whatever it
/// has left.
pub fn owner_lingers(run: &RunDir) -> bool {
    let frozen = run.read().ok().flatten().map(|it| it.pid);
    let hooks = run.read_hooks().ok().flatten().map(|it| it.pid);
    frozen.into_iter().chain(hooks).any(process::lingers)
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
    for unseen in &machine.unseen {
        log.warning(unseen.to_string());
    }
    let everything = plan(&machine.mounts, &machine.topology, &|_| None);
    let ways = Arc::new(machine.ways);
    let mut opens = Vec::new();
    for entry in record.frozen.iter().rev() {
        let name = &entry.name;
        let Some(found) = find(&everything, entry) else {
            log.warning(format!("{name} is not mounted any more"));
            continue;
        };
        let (ways, found) = (Arc::clone(&ways), found.clone());
        let open = move || open_file_system(&ways, &found).map_err(io::Error::other);
        opens.push((name.clone(), open));
    }
    // Its namespaces must not stay for longer than those need them that hang.
    drop(ways);
    match thaw_each(opens, |fd| sys::thaw(fd.as_fd()), LIMIT, log) {
        0 => Ok(()),
        count => Err(RecoveryError::NotThawed(count)),
    }
}

/// What is recorded, as it is known by now. One that is mounted nowhere has the number of a device, whatever it
/// had; another superblock on the same device is not frozen, and asking it costs nothing.
/// Of several that have a device of a seed in common it is the one that has the most.
fn find<'a>(plan: &'a Plan, Entry { dev, devices, .. }: &Entry) -> Option<&'a FileSystem> {
    let common = |it: &&FileSystem| it.devices.iter().filter(|it| devices.contains(it)).count();
    let all = plan.file_systems();
    let on_some = all.filter(|it| common(it) > 0);
    // Where several have as many, the one with its number.
    let found = on_some.max_by_key(|it| (common(it), it.dev == *dev));
    found.or_else(|| plan.file_systems().find(|it| it.dev == *dev))
}

/// Opens and thaws one after the other, as far as nothing hangs; says how many are not thawed. What hangs is
/// left behind after [`PATIENCE`], and in the end after `limit`.
fn thaw_each<T: 'static>(
    opens: Vec<(String, impl FnOnce() -> io::Result<T> + Send + 'static)>,
    thaw: fn(&T) -> io::Result<()>,
    limit: Duration,
    log: &Logbook,
) -> usize {
    let (tell, told) = channel();
    let mut under_way: Vec<(String, Arc<AtomicBool>)> = Vec::new();
    let mut failed = 0;
    let mut over = |(name, result): Thawed, under_way: &mut Vec<(String, _)>| {
        under_way.retain(|(it, _)| *it != name);
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
    for (name, open) in opens {
        let is_open = Arc::new(AtomicBool::new(false));
        under_way.push((name.clone(), Arc::clone(&is_open)));
        if let Err(error) = start_thaw(name.clone(), open, thaw, is_open, tell.clone()) {
            over((name, Err(error)), &mut under_way);
        } else if let Ok(thawed) = told.recv_timeout(PATIENCE) {
            over(thawed, &mut under_way);
        }
    }
    let until = Instant::now() + limit;
    while !under_way.is_empty() {
        match told.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(thawed) => over(thawed, &mut under_way),
            Err(_) => break,
        }
    }
    for (name, is_open) in &under_way {
        log.error(match is_open.load(Ordering::Relaxed) {
            true => format!("{name} hangs in the kernel and is thawed when that ends"),
            // A program that has to allow the open and writes to this very file system waits for the thaw
            // that waits for it, and cannot even be killed. The kernel's own thaw of all opens nothing.
            false => format!(
                "{name} cannot be opened: whoever has to allow that (a security agent) or serves it does not \
                 answer. It is thawed when they do; if they wait for this very file system, only \
                 \"echo j >/proc/sysrq-trigger\" thaws it, and all others"
            ),
        });
    }
    failed + under_way.len()
}

/// Opens and thaws on a thread of its own, either of which may hang: the open behind a security agent that
/// waits for something frozen, the thaw behind a freeze.
fn start_thaw<T: 'static>(
    name: String,
    open: impl FnOnce() -> io::Result<T> + Send + 'static,
    thaw: fn(&T) -> io::Result<()>,
    is_open: Arc<AtomicBool>,
    tell: Sender<Thawed>,
) -> io::Result<()> {
    let work = move || {
        let (opened, result) = match open() {
            Ok(opened) => {
                is_open.store(true, Ordering::Relaxed);
                let result = thaw(&opened);
                (Some(opened), result)
            }
            Err(error) => (None, Err(error)),
        };
        // Nobody listens any more when it took too long.
        let _ = tell.send((name, result));
        // Last, for where that is the end of a mount it may hang.
        drop(opened);
    };
    thread::Builder::new().spawn(work).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logbook::Sink;
    use crate::mounts::DevId;
    use crate::topology::{Topology, Unmounted};
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Child, Command};

    type Open = Box<dyn FnOnce() -> io::Result<()> + Send>;

    #[test]
    fn what_is_mounted_nowhere_any_more_is_found_by_its_devices() {
        let device = |major, minor| DevId { major, minor };
        let (root, disk, second) = (device(254, 1), device(8, 16), device(8, 32));
        let third = device(8, 48);
        let anonymous = device(0, 40);
        let on = |devices: &[DevId]| Unmounted {
            devices: devices.to_vec(),
            listed: None,
            unreachable: None,
            name: "a btrfs".into(),
            fs_type: "btrfs".into(),
        };
        let topology = Topology {
            unmounted: vec![on(&[root]), on(&[disk, second]), on(&[disk, third])],
            ..Topology::default()
        };
        let plan = plan(&[], &topology, &|_| None);
        let found = |dev, devices: &[DevId]| {
            let entry = Entry {
                dev,
                devices: devices.to_vec(),
                name: String::new(),
            };
            find(&plan, &entry).map(|it| it.devices.clone())
        };
        let both = Some(vec![disk, second]);
        assert_eq!(found(anonymous, &[disk, second]), both);
        assert_eq!(found(anonymous, &[disk, third]), Some(vec![disk, third]));
        assert_eq!(found(anonymous, &[second]), both);
        assert_eq!(found(disk, &[]), both);
        assert_eq!(found(anonymous, &[]), None, "of an older daemon");
    }

    #[test]
    fn an_open_that_waits_for_another_that_is_frozen_holds_up_no_thaw() {
        let log = Logbook::new(Sink::Memory);
        let (tell, told) = channel();
        let first = move || {
            let waited = told.recv_timeout(Duration::from_secs(60));
            waited.map_err(io::Error::other)
        };
        let second = move || tell.send(()).map_err(io::Error::other);
        let opens: Vec<(String, Open)> = vec![
            ("/b".into(), Box::new(first)),
            ("/a".into(), Box::new(second)),
        ];
        let began = Instant::now();
        assert_eq!(
            thaw_each(opens, |()| Ok(()), Duration::from_secs(60), &log),
            0
        );
        assert!(began.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn an_open_that_never_ends_is_left_behind_and_all_else_is_thawed() {
        let log = Logbook::new(Sink::Memory);
        let (never, told) = channel::<()>();
        let (tell, thawed) = channel();
        let hangs = move || told.recv().map_err(io::Error::other);
        let mut opens: Vec<(String, Open)> = vec![("/hangs".into(), Box::new(hangs))];
        for name in ["/b", "/a"] {
            let tell = tell.clone();
            let open = move || tell.send(name).map_err(io::Error::other);
            opens.push((name.into(), Box::new(open)));
        }
        assert_eq!(thaw_each(opens, |()| Ok(()), Duration::ZERO, &log), 1);
        drop((never, tell));
        assert_eq!(thawed.iter().collect::<Vec<_>>(), ["/b", "/a"]);
    }

    /// Its end waits for the end of what it holds.
    struct Stuck(std::sync::mpsc::Receiver<()>);

    impl Drop for Stuck {
        fn drop(&mut self) {
            let _ = self.0.recv();
        }
    }

    #[test]
    fn what_hangs_while_it_is_closed_is_thawed() {
        let log = Logbook::new(Sink::Memory);
        let (ends, told) = channel::<()>();
        let opens = vec![("/a".to_owned(), || Ok(Stuck(told)))];
        let thawed = thaw_each(opens, |_| Ok(()), Duration::from_secs(5), &log);
        drop(ends);
        assert_eq!(thawed, 0);
    }

    #[test]
    fn who_has_left_hooks_alone_lingers_as_long_as_it_is_there() {
        let dir = std::env::temp_dir().join(format!("hv-vss-owner-{}", std::process::id()));
        let run = RunDir::new(&dir);
        // It makes the folder.
        drop(run.lock().unwrap());
        assert!(!owner_lingers(&run));
        let left_by = |pid| {
            let record = crate::calls::HookRecord {
                pid,
                ..Default::default()
            };
            run.write_hooks(&record).unwrap();
            owner_lingers(&run)
        };
        assert!(!left_by(std::process::id()));
        let mut child = Command::new("true").spawn().unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while !left_by(child.id()) {
            assert!(Instant::now() < until, "it does not end");
            thread::sleep(Duration::from_millis(5));
        }
        child.wait().unwrap();
        assert!(!left_by(child.id()), "of one that is gone nothing is there");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn what_was_left_while_this_process_served_is_undone_before_it_freezes_and_tried_once() {
        let dir = std::env::temp_dir().join(format!("hv-vss-leavings-{}", std::process::id()));
        let run = RunDir::new(&dir);
        let log = Logbook::new(Sink::Memory);
        let leave = |for_host| {
            let record = Record {
                pid: u32::MAX,
                for_host,
                ..Record::default()
            };
            run.write(&record, &run.lock().unwrap()).unwrap();
            record
        };
        let mut leavings = Leavings::default();
        // Without a record there is nothing to say.
        leavings.thaw(&run, &log);
        assert!(log.held().is_empty());
        leave(true);
        leavings.thaw(&run, &log);
        assert_eq!(run.read().unwrap(), None);
        assert_eq!(run.word_left().unwrap(), None, "the host begins anew");
        // Whoever has the lock thaws by itself.
        let record = leave(false);
        let lock = run.lock().unwrap();
        leavings.thaw(&run, &log);
        assert_eq!(run.read().unwrap(), Some(record.clone()));
        drop(lock);
        leavings.in_vain = Some(record.clone());
        leavings.thaw(&run, &log);
        assert_eq!(run.read().unwrap(), Some(record));
        leave(true);
        leavings.thaw(&run, &log);
        assert_eq!(run.read().unwrap(), None, "it is another");
        std::fs::remove_dir_all(dir).unwrap();
    }

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
}
