// SPDX-License-Identifier: GPL-2.0-only

//! The test's end of the agent's line.
//!
//! Knows the contract of the lab-agent crate and nothing of what is asked over it.

use hyperv_sim::{Exit, Vm, VmError};
use lab_agent::{Call, Command, Ended, Outcome, Return};
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often a wait looks whether the guest still lives.
const LOOK: Duration = Duration::from_millis(200);

/// How long the agent may take to say what sleeps in its guest's kernel.
const STUCK: Duration = Duration::from_secs(10);

/// What is said of one that does not answer that either.
const SILENT: &str = "nor does it answer anything else";

/// Prints a line for each task that nothing can interrupt: its name and the innermost functions.
const SLEEPERS: &str = "for task in /proc/[0-9]*/task/*; do
    grep -qs '(disk sleep)' $task/status || continue
    echo \"$(cat $task/comm):\" $(sed -n '1,5s/.* \\([a-z_0-9]*\\)+.*/\\1/p' $task/stack)
done | sort | uniq -c | head -n 20";

/// What can become of a call other than being done.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The system call in the guest failed with this errno.
    #[error("{command}: {name}")]
    Errno {
        /// What was asked.
        command: String,
        /// Such as `EBUSY`.
        name: String,
    },
    /// The agent could not try it.
    #[error("{command}: {text}")]
    Failed {
        /// What was asked.
        command: String,
        /// Why.
        text: String,
    },
    /// The agent did not answer.
    #[error("{command}: no answer from the guest's agent within {after:?}; {stuck}")]
    Timeout {
        /// What was asked.
        command: String,
        /// How long was waited.
        after: Duration,
        /// What sleeps in the guest's kernel then.
        stuck: String,
    },
    /// The guest has ended.
    #[error("{command}: the guest has ended ({exit:?})")]
    Gone {
        /// What was asked.
        command: String,
        /// How it ended.
        exit: Exit,
    },
    /// The guest has not ended, and its agent can be asked nothing any more.
    #[error("{command}: the line to the guest's agent is closed")]
    Closed {
        /// What was asked.
        command: String,
    },
    /// The agent's answer has another shape than the contract says.
    #[error("{command}: the agent's answer makes no sense: {text}")]
    Shape {
        /// What was asked.
        command: String,
        /// The answer and what is wrong with it.
        text: String,
    },
    /// The line to the agent is broken.
    #[error("the line to the guest's agent: {0}")]
    Line(#[from] std::io::Error),
    /// There is no line to the agent.
    #[error(transparent)]
    NoLine(#[from] VmError),
}

impl CallError {
    /// The errno by name, if it is one.
    pub fn errno(&self) -> Option<&str> {
        match self {
            CallError::Errno { name, .. } => Some(name),
            _ => None,
        }
    }

    /// How the guest ended, if that is why nobody answers.
    pub fn exit(&self) -> Option<&Exit> {
        match self {
            CallError::Gone { exit, .. } => Some(exit),
            _ => None,
        }
    }
}

/// A call whose answer has yet to be fetched with [`Agent::finish`].
#[derive(Debug)]
pub struct Pending {
    id: u64,
    command: String,
}

#[derive(Default)]
struct Answers {
    by_id: BTreeMap<u64, Outcome>,
    /// What was sent and has no answer yet.
    sent: BTreeMap<u64, String>,
    /// Lines that have come.
    heard: u64,
    /// What that was when a last question went without an answer.
    silent_at: Option<u64>,
    closed: bool,
}

impl Answers {
    /// The call of which the guest's serial port has lost the beginning, which it does over a sleep, when this is what
    /// its agent says of the rest. It has not been begun then.
    fn cut_off(&self, what: &str) -> Option<String> {
        // The shortest that cannot be the end of another call by chance.
        const LEAST: usize = 8;
        let is_it = |call: &&String| {
            let call = call.trim_end();
            what.starts_with("not a call")
                && (LEAST..call.len()).any(|len| {
                    let rest = call.get(call.len() - len..);
                    rest.is_some_and(|rest| what.ends_with(&format!("): {rest}")))
                })
        };
        let mut all = self.sent.values().filter(is_it);
        all.next().filter(|_| all.next().is_none()).cloned()
    }
}

#[derive(Default)]
struct Shared {
    answers: Mutex<Answers>,
    changed: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The agent in one guest.
pub struct Agent {
    vm: Arc<Vm>,
    line: Mutex<(UnixStream, u64)>,
    shared: Arc<Shared>,
}

impl Agent {
    /// Waits for the agent's greeting.
    pub fn connect(vm: Arc<Vm>, timeout: Duration) -> Result<Agent, CallError> {
        let line = vm.agent_port()?;
        let input = BufReader::new(line.try_clone()?);
        let mut again = line.try_clone()?;
        let shared = Arc::new(Shared::default());
        let agent = Agent {
            vm,
            line: Mutex::new((line, 0)),
            shared: shared.clone(),
        };
        std::thread::spawn(move || {
            for text in input.lines().map_while(Result::ok) {
                lock(&shared.answers).heard += 1;
                // Whoever waits for an answer will say that it did not come; this says why.
                match serde_json::from_str::<Return>(&text) {
                    Ok(Return {
                        id: 0,
                        outcome: Outcome::Failed(what),
                    }) => {
                        eprintln!("the guest's agent: {what}");
                        if let Some(call) = lock(&shared.answers).cut_off(&what) {
                            eprintln!("it is sent again");
                            // Whoever waits for its answer sees a line that is closed.
                            let _ = again.write_all(call.as_bytes());
                        }
                    }
                    Ok(back) => {
                        let mut answers = lock(&shared.answers);
                        answers.sent.remove(&back.id);
                        answers.by_id.insert(back.id, back.outcome);
                        drop(answers);
                        shared.changed.notify_all();
                    }
                    Err(error) => eprintln!("not an answer of the agent ({error}): {text}"),
                }
            }
            lock(&shared.answers).closed = true;
            shared.changed.notify_all();
        });
        let greeting = Pending {
            id: 0,
            command: "boot".into(),
        };
        agent.finish::<serde_json::Value>(greeting, timeout)?;
        Ok(agent)
    }

    /// Waits for the greeting of the agent that comes with the guest's next kernel.
    pub fn wait_next(&self, timeout: Duration) -> Result<(), CallError> {
        let greeting = Pending {
            id: 0,
            command: "boot of the next kernel".into(),
        };
        self.finish::<serde_json::Value>(greeting, timeout)?;
        Ok(())
    }

    /// Asks for `command` and does not wait for it.
    pub fn start(&self, command: Command) -> Result<Pending, CallError> {
        let described = describe(&command);
        let mut line = lock(&self.line);
        line.1 += 1;
        let call = Call {
            id: line.1,
            command,
        };
        let mut text = serde_json::to_string(&call).map_err(std::io::Error::from)?;
        text.push('\n');
        lock(&self.shared.answers)
            .sent
            .insert(call.id, text.clone());
        line.0.write_all(text.as_bytes())?;
        Ok(Pending {
            id: call.id,
            command: described,
        })
    }

    /// Waits for what became of a call.
    pub fn finish<T: DeserializeOwned>(
        &self,
        pending: Pending,
        timeout: Duration,
    ) -> Result<T, CallError> {
        let mut result = self.await_answer(pending, timeout);
        if let Err(CallError::Timeout { stuck, .. }) = &mut result {
            *stuck = match self.is_silent() {
                true => SILENT.to_string(),
                false => self.sleepers(),
            };
        }
        result
    }

    /// Whether it did not answer when it was asked what hangs, nor has since: then nobody need wait for it
    /// any more.
    pub fn is_silent(&self) -> bool {
        let answers = lock(&self.shared.answers);
        answers.silent_at == Some(answers.heard)
    }

    /// Whether it answers within this time, where nobody asks what hangs if it does not.
    pub fn answers(&self, timeout: Duration) -> bool {
        let asked = self.start(Command::Clock);
        let answer = asked.and_then(|pending| self.await_answer::<u64>(pending, timeout));
        !matches!(answer, Err(CallError::Timeout { .. }))
    }

    /// What sleeps in the guest's kernel, in one line.
    fn sleepers(&self) -> String {
        let timeout_ms = self.vm.host().patience(STUCK).as_millis() as u64;
        let asked = self.start(Command::Run {
            argv: vec!["sh".into(), "-c".into(), SLEEPERS.into()],
            timeout_ms,
        });
        match asked.and_then(|pending| self.await_answer::<Ended>(pending, STUCK * 2)) {
            Ok(ended) => {
                let lines: Vec<&str> = ended.out.lines().map(str::trim).collect();
                format!("asleep in the guest's kernel: [{}]", lines.join("; "))
            }
            Err(_) => {
                let mut answers = lock(&self.shared.answers);
                answers.silent_at = Some(answers.heard);
                SILENT.to_string()
            }
        }
    }

    fn await_answer<T: DeserializeOwned>(
        &self,
        pending: Pending,
        timeout: Duration,
    ) -> Result<T, CallError> {
        let Pending { id, command } = pending;
        let timeout = self.vm.host().patience(timeout);
        let until = Instant::now() + timeout;
        let mut answers = lock(&self.shared.answers);
        let outcome = loop {
            if let Some(outcome) = answers.by_id.remove(&id) {
                break outcome;
            }
            if let Some(exit) = self.vm.exit() {
                return Err(CallError::Gone { command, exit });
            }
            if answers.closed {
                // It may be about to end.
                return Err(match self.vm.wait_exit(LOOK) {
                    Ok(exit) => CallError::Gone { command, exit },
                    Err(_) => CallError::Closed { command },
                });
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let after = timeout;
                let stuck = String::new();
                return Err(CallError::Timeout {
                    command,
                    after,
                    stuck,
                });
            }
            (answers, _) = self
                .shared
                .changed
                .wait_timeout(answers, left.min(LOOK))
                .unwrap_or_else(PoisonError::into_inner);
        };
        value_of(command, outcome)
    }

    /// Asks for these in one call, and returns what became of each, in their order. They are done one after the
    /// other, whatever becomes of those before.
    pub fn call_each(
        &self,
        commands: Vec<Command>,
        timeout: Duration,
    ) -> Result<Outcomes, CallError> {
        let described: Vec<String> = commands.iter().map(describe).collect();
        let outcomes: Vec<Outcome> = self.call(Command::Each { all: commands }, timeout)?;
        Ok(Outcomes(described.into_iter().zip(outcomes).collect()))
    }

    /// Asks for `command` and waits for it.
    pub fn call<T: DeserializeOwned>(
        &self,
        command: Command,
        timeout: Duration,
    ) -> Result<T, CallError> {
        let pending = self.start(command)?;
        self.finish(pending, timeout)
    }
}

/// What became of calls that were made as one: each is [taken](Outcomes::take) in its turn.
pub struct Outcomes(VecDeque<(String, Outcome)>);

impl Outcomes {
    /// The value of the next one, or why it has none.
    pub fn take<T: DeserializeOwned>(&mut self) -> Result<T, CallError> {
        let (command, outcome) = self.0.pop_front().ok_or_else(|| CallError::Shape {
            command: "several calls".into(),
            text: "fewer answers than there were calls".into(),
        })?;
        value_of(command, outcome)
    }
}

/// The value that came of `command`, or why there is none.
fn value_of<T: DeserializeOwned>(command: String, outcome: Outcome) -> Result<T, CallError> {
    match outcome {
        Outcome::Done(value) => {
            let shown = value.to_string();
            serde_json::from_value(value).map_err(|error| CallError::Shape {
                command,
                text: format!("{error} in {shown}"),
            })
        }
        Outcome::Errno(name) => Err(CallError::Errno { command, name }),
        Outcome::Failed(text) => Err(CallError::Failed { command, text }),
    }
}

/// The command as an error message names it: short.
fn describe(command: &Command) -> String {
    match command {
        Command::Run { argv, .. } => match argv.as_slice() {
            [shell, flag, script] if shell == "sh" && flag == "-c" => script.clone(),
            _ => argv.join(" "),
        },
        Command::Spawn { argv, .. } => argv.join(" "),
        Command::Read { path } | Command::ReadOn { path, .. } => format!("reading {path}"),
        Command::Write { path, text } => format!("writing {text:?} to {path}"),
        Command::Freeze { path } => format!("FIFREEZE of {path}"),
        Command::Thaw { path } => format!("FITHAW of {path}"),
        Command::DevOpen { path, .. } => format!("open of {path}"),
        Command::DevRead { len, .. } => format!("read of {len} bytes from the device"),
        Command::DevWrite { hex, .. } => {
            let len = lab_agent::from_hex(hex).map_or(0, |it| it.len());
            format!("write of {len} bytes to the device")
        }
        Command::DevIoctl { request, put, .. } => match put {
            Some(put) => format!("ioctl {request:#x} of the device with {:?}", put.what),
            None => format!("ioctl {request:#x} of the device"),
        },
        Command::Each { all } => all.iter().map(describe).collect::<Vec<_>>().join(", "),
        Command::In { pid, does } => format!("{} (in {pid})", describe(does)),
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_has_lost_its_beginning_is_sent_again() {
        let calls = [
            r#"{"id":7,"command":{"Read":{"path":"/proc/uptime"}}}"#,
            r#"{"id":8,"command":"Clock"}"#,
        ];
        let sent = (7..).zip(calls.map(|it| format!("{it}\n"))).collect();
        let answers = Answers {
            sent,
            ..Answers::default()
        };
        let said = |rest: &str| format!("not a call (expected value at line 1 column 1): {rest}");
        for (call, from) in [(0, 3), (0, 20), (1, 1)] {
            let rest = &calls[call][from..];
            let found = answers.cut_off(&said(rest));
            assert_eq!(found.as_deref().map(str::trim_end), Some(calls[call]));
        }
        for other in [
            "",
            "}",
            r#"{"id":9,"command":"Clock"}"#,
            "nonsense that is long",
        ] {
            assert_eq!(answers.cut_off(&said(other)), None, "{other}");
        }
        assert_eq!(
            answers.cut_off("something else: command\":\"Clock\"}"),
            None
        );
    }
}
