// SPDX-License-Identifier: GPL-2.0-only

//! The test's hands in the guest: `lab-agent TTY` reads calls from that serial line and does them,
//! `lab-agent -` from its standard input. What else it can be is a program of its own each time:
//! [`ask`], [`nbd`], [`fuse`], [`unmounted`], [`stack`].
//!
//! It must go on working while every file system is frozen, its own included: its memory is locked
//! and it opens no file that it was not told to. It decides nothing and checks nothing; what is
//! right or wrong is the test's business.

mod ask;
mod device;
mod error;
mod fork;
mod frozen;
mod fuse;
mod kernel;
mod nbd;
mod neighbour;
mod opens;
mod process;
mod stack;
mod storm;
mod sys;
mod unmounted;
mod writers;

use crate::error::Error;
use crate::storm::Plan;
use crate::writers::Notes;
use lab_agent::{Call, Command, Outcome, Return};
use nix::errno::Errno;
use nix::sys::mman::{mlockall, MlockAllFlags};
use nix::sys::reboot::{reboot, RebootMode};
use nix::sys::termios;
use nix::sys::time::TimeSpec;
use nix::time::{clock_gettime, ClockId};
use serde_json::{json, Value};
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{ExitCode, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Stack of every thread: all of it is locked, so it is small.
const STACK: usize = 128 * 1024;

/// All that the agent holds for the test.
#[derive(Default)]
struct Agent {
    processes: process::Processes,
    writers: writers::Writers,
    devices: device::Devices,
    opens: opens::Opens,
    neighbours: neighbour::Neighbours,
    forks: fork::Forks,
    log: kernel::KernelLog,
}

impl Agent {
    /// What becomes of `command`.
    fn outcome(&self, command: Command) -> Outcome {
        match self.perform(command) {
            Ok(value) => Outcome::Done(value),
            Err(error) => error.outcome(),
        }
    }

    fn perform(&self, command: Command) -> Result<Value, Error> {
        Ok(match command {
            Command::Run { argv, timeout_ms } => json!(process::run(&argv, timeout_ms)?),
            Command::Spawn { argv, log, device } => {
                let stdin = match device {
                    Some(handle) => self.devices.copy(handle)?,
                    None => Stdio::null(),
                };
                json!(self.processes.spawn(&argv, &log, stdin)?)
            }
            Command::Signal { pids, signal } => json!(self.processes.signal(&pids, signal)?),
            Command::Clock => json!(clock_us()),
            Command::Wait { pid, timeout_ms } => json!(self.processes.wait(pid, timeout_ms)?),
            Command::Spawned => json!(self.processes.running()),
            Command::Crashed => json!(self.processes.crashed()),
            Command::Read { path } => json!(kernel::read_file(&path)?),
            Command::ReadOn { path, from } => json!(kernel::read_on(&path, from)?),
            Command::Write { path, text } => json!(kernel::write_file(&path, &text)?),
            Command::Kmsg { since, max_level } => json!(self.log.records(since, max_level)?),
            Command::Freeze { path } => json!(sys::freeze(&open_any(&path)?)?),
            Command::Thaw { path } => json!(sys::thaw(&open_any(&path)?)?),
            Command::AskFrozen { path, timeout_ms } => {
                json!(frozen::ask(&path, Duration::from_millis(timeout_ms))?)
            }
            Command::WatchOpens { path, log } => json!(self.opens.watch(&path, log.as_deref())?),
            Command::ReleaseOpens => json!(self.opens.release()),
            Command::FreezeAndThaw { path } => {
                let file = open_any(&path)?;
                let begin = clock_us();
                sys::freeze(&file)?;
                sys::thaw(&file)?;
                json!(clock_us() - begin)
            }
            Command::WriterStart {
                path,
                every_us,
                fsync,
            } => json!(self.writers.start(&path, every_us, fsync)?),
            Command::RecorderStart {
                path,
                notes,
                slot,
                every_us,
            } => {
                let notes = Notes::open(&notes, slot)?;
                json!(self.writers.start_recorder(&path, notes, every_us)?)
            }
            Command::CommitterStart {
                argv,
                statement,
                notes,
                slot,
                every_us,
            } => {
                let notes = Notes::open(&notes, slot)?;
                json!(self
                    .writers
                    .start_committer(&argv, &statement, notes, every_us)?)
            }
            Command::Writers => json!(self.writers.list()),
            Command::Stalls { since_us } => json!(self.writers.stalls(since_us)),
            Command::WritesWithin { from_us, to_us } => {
                json!(self.writers.within(from_us, to_us))
            }
            Command::WritersRest { rest } => json!(self.writers.rest(rest)),
            Command::WritersReset => json!(self.writers.reset()),
            Command::WritersStop { timeout_ms } => json!(self.writers.stop(timeout_ms)?),
            Command::DevOpen { path, nonblock } => json!(self.devices.open(&path, nonblock)?),
            Command::DevRead {
                handle,
                len,
                nowait,
            } => json!(self.devices.read(handle, len, nowait)?),
            Command::DevWrite { handle, hex } => json!(self.devices.write(handle, &hex)?),
            Command::DevPoll {
                handle,
                timeout_ms,
                events,
            } => json!(self.devices.poll(handle, timeout_ms, &events)?),
            Command::DevStorm {
                handle,
                threads,
                writes,
                seed,
                templates,
            } => {
                let storm = Plan::new(threads, writes, seed, &templates)?;
                json!(self.devices.storm(handle, &storm)?)
            }
            Command::DevIoctl {
                handle,
                request,
                hex,
                put,
                unprivileged,
            } => {
                if unprivileged {
                    // Each call has a thread of its own, which ends with it.
                    sys::drop_privilege()?;
                }
                json!(self.devices.ioctl(handle, request, &hex, put.as_ref())?)
            }
            Command::DevClose { handle } => json!(self.devices.close(handle)?),
            Command::DevCloseAll => json!(self.devices.close_all()),
            Command::NeighbourStart { path } => json!(self.neighbours.start(&path)?),
            Command::NeighboursStop => json!(self.neighbours.stop()?),
            Command::KexecLoad {
                kernel,
                initrd,
                cmdline,
            } => {
                let cmdline = CString::new(cmdline).map_err(|_| Errno::EINVAL)?;
                json!(sys::load_kernel(
                    &open_any(&kernel)?,
                    &open_any(&initrd)?,
                    &cmdline
                )?)
            }
            Command::Kexec => {
                let never = reboot(RebootMode::RB_KEXEC)?;
                match never {}
            }
            Command::Each { all } => {
                let done = all.into_iter().map(|it| self.outcome(it));
                json!(done.collect::<Vec<Outcome>>())
            }
            Command::Fork => json!(self.forks.start()?),
            Command::ForksEnd => json!(self.forks.end()?),
            Command::In { pid, does } => self.forks.perform(pid, *does)?,
        })
    }
}

/// Another descriptor of a standard stream, without its buffer.
fn duplicate(stream: &impl AsFd) -> Result<File, Error> {
    Ok(stream.as_fd().try_clone_to_owned()?.into())
}

/// Opens whatever is at `path` without waiting, as the open of a FIFO would.
fn open_any(path: &str) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(nix::libc::O_NONBLOCK);
    Ok(options.open(path)?)
}

/// The agent's clock in microseconds: of all threads and writers, never 0. It counts from the boot, and does
/// not fail.
fn clock_us() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap_or(TimeSpec::new(0, 0));
    Duration::from(now).as_micros() as u64 + 1
}

/// Takes a lock; a thread that panicked while it held it has left nothing half done in here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a thread with a small stack.
fn start_thread(work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    thread::Builder::new().stack_size(STACK).spawn(work)?;
    Ok(())
}

fn send(line: &Mutex<File>, back: &Return) {
    // Plain data always serialises. A line that cannot be written has no other end to tell.
    if let Ok(mut text) = serde_json::to_string(back) {
        text.push('\n');
        let _ = lock(line).write_all(text.as_bytes());
    }
}

/// The serial line as one that carries bytes as they are.
fn open_tty(tty: &str) -> Result<File, Error> {
    let line = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_NOCTTY)
        .open(tty)?;
    let mut mode = termios::tcgetattr(&line)?;
    termios::cfmakeraw(&mut mode);
    termios::tcsetattr(&line, termios::SetArg::TCSANOW, &mode)?;
    Ok(line)
}

/// Does what is asked for, one thread a call, until the input ends.
fn serve(input: File, output: File) -> Result<(), Error> {
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)?;

    let output = Arc::new(Mutex::new(output));
    let agent = Arc::new(Agent::default());
    let greeting = json!({ "agent": env!("CARGO_PKG_VERSION") });
    send(
        &output,
        &Return {
            id: 0,
            outcome: Outcome::Done(greeting),
        },
    );

    for line in BufReader::new(input).lines() {
        let line = line?;
        let call: Call = match serde_json::from_str(&line) {
            Ok(call) => call,
            Err(error) => {
                let outcome = Outcome::Failed(format!("not a call ({error}): {line}"));
                send(&output, &Return { id: 0, outcome });
                continue;
            }
        };
        let (agent, output) = (agent.clone(), output.clone());
        start_thread(move || {
            let back = Return {
                id: call.id,
                outcome: agent.outcome(call.command),
            };
            send(&output, &back);
        })?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let Err(error) = sys::heed_signals() {
        eprintln!("lab-agent: signals: {error}");
    }
    let result = match arguments[..] {
        ["-"] => duplicate(&std::io::stdin())
            .and_then(|input| serve(input, duplicate(&std::io::stdout())?)),
        ["unmounted"] => unmounted::stay(),
        ["stack", count, folder] => match count.parse() {
            Ok(count) => stack::stay(count, folder),
            Err(_) => Err(Error::Call("that is no number".into())),
        },
        ["ask", socket, method] => ask::ask(socket, method),
        [tty] => open_tty(tty).and_then(|line| serve(line.try_clone()?, line)),
        ["nbd", port, file] => match port.parse() {
            Ok(port) => nbd::serve(port, file),
            Err(_) => Err(Error::Call("that is no port".into())),
        },
        ["fuse", folder, uid, device] => match uid.parse() {
            Ok(uid) => fuse::serve(folder, uid, device),
            Err(_) => Err(Error::Call("that is no user".into())),
        },
        ["fuse-file", folder, file] => fuse::serve_file(folder, file),
        _ => {
            eprintln!(
                "usage: lab-agent TTY | lab-agent - | lab-agent ask SOCKET METHOD | lab-agent nbd PORT FILE | \
                 lab-agent fuse FOLDER UID DEVICE | lab-agent fuse-file FOLDER FILE | lab-agent unmounted | \
                 lab-agent stack COUNT FOLDER"
            );
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-agent: {}: {error}", arguments.join(" "));
            ExitCode::FAILURE
        }
    }
}
