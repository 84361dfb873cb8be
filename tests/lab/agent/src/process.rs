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

/// Sends a signal to all of these and returns when it began to. All are tried, whatever fails.
pub fn signal(pids: &[i32], signal: i32) -> Result<u64, Error> {
    let signal = Signal::try_from(signal)?;
    let began = clock_us();
    // Nothing in between, so that as a rule none of them runs before all have their signal.
    let sent = pids.iter().map(|pid| kill(Pid::from_raw(*pid), signal));
    sent.fold(Ok(()), Result::and)?;
    Ok(began)
}

/// One spawned program: its end, once it has come.
#[derive(Default)]
struct Process {
    end: Mutex<Option<ExitStatus>>,
    changed: Condvar,
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
        let process = Arc::new(Process::default());
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

    /// The pids of those that have not ended.
    pub fn running(&self) -> Vec<i32> {
        let by_pid = lock(&self.by_pid);
        let running = by_pid.iter().filter(|(_, it)| lock(&it.end).is_none());
        running.map(|(pid, _)| *pid).collect()
    }
}
