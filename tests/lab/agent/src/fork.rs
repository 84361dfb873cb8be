// SPDX-License-Identifier: GPL-2.0-only

//! Other agents: processes of the same program that do as they are told over a pipe. What they hold
//! ends with them when they are killed.

use crate::error::Error;
use crate::{lock, start_thread};
use lab_agent::{Call, Command, Outcome, Return};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, Stdio};
use std::sync::mpsc::{channel, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// One of them: the line to it, and who waits for what.
struct Fork {
    line: Mutex<(ChildStdin, u64)>,
    /// `None` once it has ended.
    waiting: Mutex<Option<BTreeMap<u64, Sender<Outcome>>>>,
}

impl Fork {
    fn has_ended(&self) -> bool {
        lock(&self.waiting).is_none()
    }
}

/// All of them, by pid.
#[derive(Default)]
pub struct Forks {
    by_pid: Mutex<BTreeMap<i32, Arc<Fork>>>,
}

impl Forks {
    /// Starts one and returns its pid.
    pub fn start(&self) -> Result<i32, Error> {
        let mut child = std::process::Command::new(std::env::current_exe()?)
            .arg("-")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let pid = child.id() as i32;
        let pipes = (child.stdin.take(), child.stdout.take());
        let (Some(stdin), Some(stdout)) = pipes else {
            return Err(Error::Call("no pipes".into()));
        };
        let fork = Arc::new(Fork {
            line: Mutex::new((stdin, 0)),
            waiting: Mutex::new(Some(BTreeMap::new())),
        });
        lock(&self.by_pid).insert(pid, fork.clone());
        start_thread(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let back = serde_json::from_str::<Return>(&line).ok();
                let waiting = &mut *lock(&fork.waiting);
                if let (Some(back), Some(waiting)) = (back, waiting) {
                    // Nobody waits for the greeting.
                    if let Some(tell) = waiting.remove(&back.id) {
                        let _ = tell.send(back.outcome);
                    }
                }
            }
            let _ = child.wait();
            // Whoever still waits sees the end of the channel.
            *lock(&fork.waiting) = None;
        })?;
        Ok(pid)
    }

    /// Has one do something, and waits for what becomes of it.
    pub fn perform(&self, pid: i32, command: Command) -> Result<Value, Error> {
        let gone = || Error::Call(format!("the agent {pid} has ended"));
        let fork = lock(&self.by_pid).get(&pid).cloned().ok_or_else(gone)?;
        let (tell, told) = channel();
        {
            let mut line = lock(&fork.line);
            line.1 += 1;
            let id = line.1;
            lock(&fork.waiting)
                .as_mut()
                .ok_or_else(gone)?
                .insert(id, tell);
            let mut text =
                serde_json::to_string(&Call { id, command }).map_err(std::io::Error::from)?;
            text.push('\n');
            line.0.write_all(text.as_bytes())?;
        }
        match told.recv().map_err(|_| gone())? {
            Outcome::Done(value) => Ok(value),
            outcome => Err(Error::Told(outcome)),
        }
    }

    /// Kills them all, and waits until they are gone: whatever they held has ended then.
    pub fn end(&self) -> Result<(), Error> {
        for (pid, fork) in std::mem::take(&mut *lock(&self.by_pid)) {
            if !fork.has_ended() {
                // It is not waited for yet, so that the number is still its own.
                kill(Pid::from_raw(pid), Signal::SIGKILL)?;
            }
            while !fork.has_ended() {
                thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }
}
