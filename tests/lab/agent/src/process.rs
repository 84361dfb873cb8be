// SPDX-License-Identifier: GPL-2.0-only

//! Programs: run to their end, or started and watched.

use crate::error::Error;
use crate::kernel::MAX_TEXT;
use crate::{clock_us, lock, start_thread};
use lab_agent::Ended;
use nix::errno::Errno;
use nix::sys::signal::{kill, killpg, Signal};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a killed program may take to be gone before the agent stops waiting for it: one that
/// waits for a frozen file system cannot be killed.
const KILL_GRACE: Duration = Duration::from_secs(1);

/// What starts a program, in a process group of its own.
pub fn command(argv: &[String]) -> Result<Command, Error> {
    let (program, arguments) = argv
        .split_first()
        .ok_or_else(|| Error::Call("no program named".into()))?;
    let mut command = Command::new(program);
    // A group of its own, so that a signal for it reaches its children and not the agent.
    command
        .args(arguments)
        .stdin(Stdio::null())
        .process_group(0);
    Ok(command)
}

enum Part {
    Out(String),
    Err(String),
    End(ExitStatus),
}

fn collect(
    mut pipe: impl Read + Send + 'static,
    part: fn(String) -> Part,
    parts: Sender<Part>,
) -> Result<(), Error> {
    start_thread(move || {
        let mut bytes = Vec::new();
        // What was read before an error is still worth reporting.
        let _ = pipe.by_ref().take(MAX_TEXT).read_to_end(&mut bytes);
        let _ = parts.send(part(String::from_utf8_lossy(&bytes).into_owned()));
        // The rest is read and dropped, so that the program does not stop at a full pipe.
        let _ = std::io::copy(&mut pipe, &mut std::io::sink());
    })
}

fn gather(parts: &Receiver<Part>, missing: &mut u32, ended: &mut Ended, until: Instant) {
    while *missing > 0 {
        match parts.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Part::Out(text)) => ended.out = text,
            Ok(Part::Err(text)) => ended.err = text,
            Ok(Part::End(status)) => {
                ended.status = status.code();
                ended.signal = status.signal();
            }
            Err(_) => return,
        }
        *missing -= 1;
    }
}

/// Runs a program to its end, and kills it and its children after `timeout_ms`.
pub fn run(argv: &[String], timeout_ms: u64) -> Result<Ended, Error> {
    let until = Instant::now() + Duration::from_millis(timeout_ms);
    let mut child = command(argv)?
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let group = Pid::from_raw(child.id() as i32);
    let (parts, results) = channel();
    let mut missing = 1;
    if let Some(pipe) = child.stdout.take() {
        collect(pipe, Part::Out, parts.clone())?;
        missing += 1;
    }
    if let Some(pipe) = child.stderr.take() {
        collect(pipe, Part::Err, parts.clone())?;
        missing += 1;
    }
    start_thread(move || {
        if let Ok(status) = child.wait() {
            let _ = parts.send(Part::End(status));
        }
    })?;

    let mut ended = Ended::default();
    gather(&results, &mut missing, &mut ended, until);
    if missing > 0 {
        ended.timed_out = true;
        // ESRCH: it went just now.
        let _ = killpg(group, Signal::SIGKILL);
        gather(
            &results,
            &mut missing,
            &mut ended,
            Instant::now() + KILL_GRACE,
        );
    }
    Ok(ended)
}

/// What ends a program that has crashed.
const CRASHES: [Signal; 4] = [
    Signal::SIGABRT,
    Signal::SIGBUS,
    Signal::SIGILL,
    Signal::SIGSEGV,
];

/// One spawned program: its end, once it has come.
#[derive(Default)]
struct Process {
    argv: Vec<String>,
    end: Mutex<Option<ExitStatus>>,
    changed: Condvar,
    /// Those of them that were sent to it.
    sent: Mutex<Vec<Signal>>,
    /// Whether its end was told as a crash.
    is_told: AtomicBool,
}

impl Process {
    /// The signal of a crash that has ended it and that nobody has sent.
    fn crash(&self) -> Option<Signal> {
        let end = (*lock(&self.end))?.signal()?;
        let signal = CRASHES.into_iter().find(|it| *it as i32 == end)?;
        (!lock(&self.sent).contains(&signal)).then_some(signal)
    }
}

/// The spawned programs, by pid.
#[derive(Default)]
pub struct Processes {
    by_pid: Mutex<BTreeMap<i32, Arc<Process>>>,
}

impl Processes {
    /// Starts a program with its output in `log`.
    pub fn spawn(&self, argv: &[String], log: &str, stdin: Stdio) -> Result<i32, Error> {
        let out = File::create(log)?;
        let err = out.try_clone()?;
        let mut child = command(argv)?
            .stdin(stdin)
            .stdout(out)
            .stderr(err)
            .spawn()?;
        let pid = child.id() as i32;
        let process = Arc::new(Process {
            argv: argv.to_vec(),
            ..Process::default()
        });
        lock(&self.by_pid).insert(pid, process.clone());
        start_thread(move || {
            if let Ok(status) = child.wait() {
                *lock(&process.end) = Some(status);
                process.changed.notify_all();
            }
        })?;
        Ok(pid)
    }

    /// Waits for the end of a spawned program.
    pub fn wait(&self, pid: i32, timeout_ms: u64) -> Result<Ended, Error> {
        let process = lock(&self.by_pid).get(&pid).cloned();
        let process = process.ok_or_else(|| Error::Call(format!("{pid} was not spawned")))?;
        let (end, _) = process
            .changed
            .wait_timeout_while(
                lock(&process.end),
                Duration::from_millis(timeout_ms),
                |end| end.is_none(),
            )
            .unwrap_or_else(PoisonError::into_inner);
        let status = end.ok_or(Errno::EAGAIN)?;
        Ok(Ended {
            status: status.code(),
            signal: status.signal(),
            ..Ended::default()
        })
    }

    /// Sends a signal to all of these, spawned or not, and returns when it began to. All are tried, whatever fails.
    pub fn signal(&self, pids: &[i32], signal: i32) -> Result<u64, Error> {
        let signal = Signal::try_from(signal)?;
        if CRASHES.contains(&signal) {
            let by_pid = lock(&self.by_pid);
            for process in pids.iter().filter_map(|pid| by_pid.get(pid)) {
                lock(&process.sent).push(signal);
            }
        }
        let began = clock_us();
        // Nothing in between, so that as a rule none of them runs before all have their signal.
        let sent = pids.iter().map(|pid| kill(Pid::from_raw(*pid), signal));
        sent.fold(Ok(()), Result::and)?;
        Ok(began)
    }

    /// Those that have crashed and were not told of before: what was started, and the signal.
    pub fn crashed(&self) -> Vec<String> {
        let by_pid = lock(&self.by_pid);
        let crash = |it: &Arc<Process>| {
            let signal = it.crash()?;
            (!it.is_told.swap(true, SeqCst)).then(|| format!("{}: {signal}", it.argv.join(" ")))
        };
        by_pid.values().filter_map(crash).collect()
    }

    /// The pids of those that have not ended.
    pub fn running(&self) -> Vec<i32> {
        let by_pid = lock(&self.by_pid);
        let running = by_pid.iter().filter(|(_, it)| lock(&it.end).is_none());
        running.map(|(pid, _)| *pid).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_that_nobody_has_sent_is_told_once() {
        let processes = Processes::default();
        let log = std::env::temp_dir().join(format!("lab-agent-crash-{}", std::process::id()));
        let start = |script: &str| {
            let argv = ["sh", "-c", script].map(str::to_owned);
            processes
                .spawn(&argv, log.to_str().unwrap(), Stdio::null())
                .unwrap()
        };
        let ends_by = |pid, signal| {
            let ended = processes.wait(pid, 10_000).unwrap();
            assert_eq!(ended.signal, Some(signal));
        };
        let crash = "kill -ABRT $$; exit 0";
        ends_by(start(crash), 6);
        ends_by(start("kill -KILL $$; exit 0"), 9);
        let aborted = start("exec sleep 1000");
        processes.signal(&[aborted], 6).unwrap();
        ends_by(aborted, 6);
        let killed = start("exec sleep 1000");
        processes.signal(&[killed], 9).unwrap();
        ends_by(killed, 9);
        let told = [format!("sh -c {crash}: SIGABRT")];
        assert_eq!(processes.crashed(), told);
        assert!(processes.crashed().is_empty());
        std::fs::remove_file(log).unwrap();
    }
}
