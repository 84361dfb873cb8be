// SPDX-License-Identifier: GPL-2.0-only

//! The stages of one backup, and how each is reached and held: the shipped daemon stops at exactly one
//! of its system calls, in a tracer's hands, behind a hook that does not end, or behind a disk that
//! hangs. Knows nothing of what happens then.

use super::dialogue::{Dialogue, Message};
use super::{Stack, FILE_SYSTEMS};
use crate::cases::deadman::{hang_writes, HANG, UNHANG};
use anyhow::{ensure, Context, Result};
use e2e::guest::{Guest, Process, DEVICE, STEP};
use hyperv_sim::ic::status;

/// How far a backup has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Idle,
    HotBackup,
    FreezeSent,
    FreezeRead,
    Hooks,
    Opening,
    Syncing,
    NoneFrozen,
    SomeFrozen,
    FreezeHangs,
    AllFrozen,
    Frozen,
    ThawSent,
    ThawRead,
    NoneThawed,
    SomeThawed,
    AllThawed,
    Thawed,
}

/// What holds the daemon there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Nothing: it waits for the host.
    Host,
    /// A tracer holds a thread at one of its system calls.
    Call(Call),
    /// A hook does not end its call with this argument.
    Hook(&'static str),
    /// The disk of one file system hangs.
    Disk,
}

/// One system call of one thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Call {
    thread: Thread,
    name: &'static str,
    /// Only such as are about one of these.
    paths: &'static [&'static str],
    /// Which of them, from 1.
    when: usize,
    /// Whether it is held after the call, not before it.
    after: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thread {
    /// The one that talks to the device; the only one of the peer.
    Main,
    /// The one in which file systems are frozen.
    Freezer,
    /// Whichever makes it first, such as one that has nothing else open: all that the daemon has are traced.
    Any,
}

const DEVICE_ONLY: &[&str] = &[DEVICE];

impl Stage {
    pub const ALL: [Stage; 18] = [
        Stage::Idle,
        Stage::HotBackup,
        Stage::FreezeSent,
        Stage::FreezeRead,
        Stage::Hooks,
        Stage::Opening,
        Stage::Syncing,
        Stage::NoneFrozen,
        Stage::SomeFrozen,
        Stage::FreezeHangs,
        Stage::AllFrozen,
        Stage::Frozen,
        Stage::ThawSent,
        Stage::ThawRead,
        Stage::NoneThawed,
        Stage::SomeThawed,
        Stage::AllThawed,
        Stage::Thawed,
    ];

    /// In words, for the table.
    pub fn words(self) -> &'static str {
        match self {
            Stage::Idle => "nothing is asked",
            Stage::HotBackup => "HOT_BACKUP is read",
            Stage::FreezeSent => "FREEZE can be read",
            Stage::FreezeRead => "FREEZE is read",
            Stage::Hooks => "a hook is called",
            Stage::Opening => "mount points are opened",
            Stage::Syncing => "before the first sync",
            Stage::NoneFrozen => "before the first freeze",
            Stage::SomeFrozen => "before the second freeze",
            Stage::FreezeHangs => "a freeze hangs",
            Stage::AllFrozen => "all frozen, not answered",
            Stage::Frozen => "FREEZE is answered",
            Stage::ThawSent => "THAW can be read",
            Stage::ThawRead => "THAW is read",
            Stage::NoneThawed => "before the first thaw",
            Stage::SomeThawed => "before the second thaw",
            Stage::AllThawed => "all thawed, not answered",
            Stage::Thawed => "THAW is answered, a hook is let go",
        }
    }

    /// Whether the backup of `stack` has such a stage at which it can be held. The peer calls no hooks and
    /// does not sync first; our daemon on the stock module watches what is frozen with the very calls with
    /// which it thaws, so that one cannot be told from the other.
    pub fn is_of(self, stack: Stack) -> bool {
        match stack {
            Stack::Ours => true,
            Stack::OursOnStock => !matches!(self, Stage::NoneThawed | Stage::SomeThawed),
            Stack::Peer => !matches!(self, Stage::Hooks | Stage::Syncing | Stage::Thawed),
        }
    }

    /// What the host has asked last.
    fn message(self) -> Option<Message> {
        match self {
            Stage::Idle => None,
            Stage::HotBackup => Some(Message::HotBackup),
            Stage::FreezeSent
            | Stage::FreezeRead
            | Stage::Hooks
            | Stage::Opening
            | Stage::Syncing
            | Stage::NoneFrozen
            | Stage::SomeFrozen
            | Stage::FreezeHangs
            | Stage::AllFrozen
            | Stage::Frozen => Some(Message::Freeze),
            Stage::ThawSent
            | Stage::ThawRead
            | Stage::NoneThawed
            | Stage::SomeThawed
            | Stage::AllThawed
            | Stage::Thawed => Some(Message::Thaw),
        }
    }

    /// Whether the host has said THAW.
    pub fn is_thaw(self) -> bool {
        self.message() == Some(Message::Thaw)
    }

    fn way(self, stack: Stack) -> Way {
        let call = |thread, name, paths, when, after| {
            Way::Call(Call {
                thread: if stack == Stack::Peer {
                    Thread::Main
                } else {
                    thread
                },
                name,
                paths,
                when,
                after,
            })
        };
        let device = |name, after| call(Thread::Main, name, DEVICE_ONLY, 1, after);
        // Where our module freezes, the ioctl is the device's, else that of each file system.
        let ioctl = |thread, when, after| {
            let paths = match stack {
                Stack::Ours => DEVICE_ONLY,
                Stack::OursOnStock | Stack::Peer => FILE_SYSTEMS,
            };
            call(thread, "ioctl", paths, when, after)
        };
        match self {
            Stage::Idle | Stage::Frozen => Way::Host,
            Stage::FreezeSent | Stage::ThawSent => device("read", false),
            Stage::HotBackup | Stage::FreezeRead | Stage::ThawRead => device("read", true),
            Stage::Hooks => Way::Hook("freeze"),
            Stage::Opening => call(Thread::Any, "openat", &["/mnt/a"], 1, false),
            Stage::Syncing => call(Thread::Any, "syncfs", FILE_SYSTEMS, 1, false),
            Stage::NoneFrozen => ioctl(Thread::Freezer, 1, false),
            Stage::SomeFrozen => ioctl(Thread::Any, 1, true),
            Stage::FreezeHangs => Way::Disk,
            Stage::AllFrozen | Stage::AllThawed => device("write", false),
            Stage::NoneThawed => ioctl(Thread::Any, 1, false),
            // The root is thawed first, alone; who freezes or thaws the next is whoever comes first.
            Stage::SomeThawed => ioctl(Thread::Any, 1, true),
            Stage::Thawed => Way::Hook("thaw"),
        }
    }

    /// Whether a disk hangs in it.
    pub fn has_hung_disk(self) -> bool {
        self == Stage::FreezeHangs
    }

    /// Brings a backup there and holds it.
    pub fn reach(
        self,
        guest: &Guest,
        stack: Stack,
        daemon: &Process,
        dialogue: &mut Dialogue<'_>,
    ) -> Result<Hold> {
        let way = self.way(stack);
        let message = self.message();
        if let Way::Hook(argument) = way {
            guest.sh(&format!(
                "mkdir -p {FOLDER} && rm -f {CALLS} && touch {}
                 cat >{FOLDER}/hold <<'END'
#!/bin/sh
echo $1 >>{CALLS}
while [ -e /run/hold-$1 ]; do sleep 0.1; done
END
                 chmod 755 {FOLDER}/hold",
                gate(argument)
            ))?;
        }
        if self == Stage::Syncing {
            // Else there is nothing that is worth a sync.
            guest.sh("dd if=/dev/zero of=/mnt/a/dirty bs=64k count=16 2>/dev/null")?;
        }
        if message == Some(Message::Thaw) {
            dialogue.ask(Message::Freeze)?;
            dialogue.listen(STEP)?;
            ensure!(
                dialogue.last() == Some(status::OK),
                "the FREEZE before it should be answered 0"
            );
            dialogue.take_snapshot()?;
        }
        let hold = match way {
            Way::Host => Hold::Host,
            Way::Hook(argument) => Hold::Hook(argument),
            Way::Disk => {
                // Who cannot call its freeze off asks a disk first, and freezes nothing on a dead one.
                let hang = match stack {
                    Stack::OursOnStock => hang_writes("hung"),
                    Stack::Ours | Stack::Peer => HANG.to_owned(),
                };
                guest.sh(&format!("sync && {hang}"))?;
                Hold::Disk
            }
            Way::Call(call) => Hold::Call(call.attach(guest, daemon)?),
        };
        if let Some(message) = message {
            dialogue.ask(message)?;
        }
        match (way, &hold) {
            (Way::Call(call), Hold::Call(tracer)) => call.wait(guest, daemon, tracer)?,
            (Way::Hook(argument), _) => guest.wait_until("the hook is called", STEP, || {
                let calls = guest.try_sh(&format!("cat {CALLS}"))?;
                Ok(calls.out.lines().any(|line| line == argument))
            })?,
            (Way::Disk, _) => guest.wait_until("one hangs in its freeze", STEP, || {
                is_freezing(guest, stack, daemon)
            })?,
            _ if self == Stage::Frozen => {
                dialogue.listen(STEP)?;
                dialogue.take_snapshot()?;
            }
            _ => {}
        }
        if self == Stage::Thawed {
            dialogue.listen(STEP)?;
        }
        if self == Stage::AllFrozen {
            // So that it shows who stands still already.
            dialogue.take_snapshot()?;
        }
        Ok(hold)
    }
}

/// Whether a freeze is under way and has been for a while: by our module's word, or by where the thread
/// is that has asked for it.
fn is_freezing(guest: &Guest, stack: Stack, daemon: &Process) -> Result<bool> {
    if stack == Stack::Ours {
        let held = guest.held()?;
        let frozen = held.iter().any(|(_, state)| state == "frozen");
        return Ok(!frozen && held.iter().any(|(_, state)| state == "freezing"));
    }
    Ok(crate::cases::hangs::in_freeze(guest, daemon)? == 1)
}

const FOLDER: &str = "/etc/hv_vss/hooks.d";
/// What the hook has been called with.
const CALLS: &str = "/run/hook-calls";

/// As long as this is there the hook does not end.
fn gate(argument: &str) -> String {
    format!("/run/hold-{argument}")
}

/// Where the tracer writes.
const TRACE: &str = "/run/held-call";

impl Call {
    /// The thread that makes it, or the process of which it will be one.
    fn tid(&self, guest: &Guest, daemon: &Process) -> Result<i32> {
        let pid = daemon.pid;
        let name = match self.thread {
            Thread::Main | Thread::Any => return Ok(pid),
            Thread::Freezer => "freezer",
        };
        let line = format!("grep -l -x {name} /proc/{pid}/task/*/comm");
        let found = guest.sh(&line)?;
        let tids = found
            .lines()
            .filter_map(|it| it.split('/').nth(4)?.parse().ok());
        // The first that was made: there is a second freezer, for what is frozen aside.
        tids.min().with_context(|| format!("no thread {name}"))
    }

    /// Has a tracer wait for it.
    fn attach(&self, guest: &Guest, daemon: &Process) -> Result<Process> {
        let tid = self.tid(guest, daemon)?.to_string();
        let side = if self.after { "exit" } else { "enter" };
        // Longer than anybody waits.
        let inject = format!("inject={}:delay_{side}=900s:when={}", self.name, self.when);
        let trace = format!("trace={}", self.name);
        let mut argv = vec!["strace", "-e", "signal=none", "-o", TRACE];
        for path in self.paths {
            argv.extend(["-P", path]);
        }
        argv.extend(["-e", &trace, "-e", &inject, "-p", &tid]);
        if self.thread == Thread::Any {
            argv.push("-f");
        }
        guest.sh(&format!("rm -f {TRACE}"))?;
        let tracer = guest.spawn(&argv)?;
        guest.wait_until("strace has attached", STEP, || {
            Ok(guest.output(&tracer)?.contains("attached"))
        })?;
        Ok(tracer)
    }

    /// Waits until the thread is held at it.
    fn wait(&self, guest: &Guest, daemon: &Process, tracer: &Process) -> Result<()> {
        let known = self.tid(guest, daemon)?;
        let mut seen = String::new();
        let held = guest.wait_until("the daemon is held", STEP, || {
            seen = guest.read(TRACE)?;
            let lines: Vec<&str> = seen.lines().collect();
            // The line is begun before the call is made, and ended when it has returned.
            let (there, tid) = match self.thread {
                // Several may be: each line begins with whose it is, and none returns.
                Thread::Any => {
                    let first = lines.first().and_then(|it| it.split(' ').next());
                    let tid = first.and_then(|it| it.parse().ok());
                    let there = tid.is_some() && (!self.after || seen.contains("(DELAYED)"));
                    (there, tid.unwrap_or(known))
                }
                _ => {
                    let there = lines.len() == self.when
                        && match self.after {
                            true => seen.contains("(DELAYED)"),
                            false => !seen.ends_with('\n'),
                        };
                    (there, known)
                }
            };
            if !there {
                return Ok(false);
            }
            let state = guest.read(&format!("/proc/{}/task/{tid}/stat", daemon.pid))?;
            Ok(state.contains(") t "))
        });
        held.with_context(|| {
            let said = guest.output(tracer).unwrap_or_default();
            format!("held at {self:?}; the tracer saw: {seen}, and said: {said}")
        })
    }
}

/// What holds the daemon.
#[derive(Debug)]
pub enum Hold {
    Host,
    Call(Process),
    Hook(&'static str),
    Disk,
}

impl Hold {
    /// Lets the daemon go on, if it lives.
    pub fn release(&self, guest: &Guest) -> Result<()> {
        match self {
            Hold::Host => Ok(()),
            Hold::Call(tracer) => {
                // It may have ended with the one that it traces.
                match guest.signal(tracer, 2) {
                    Err(error) if error.errno() != Some("ESRCH") => return Err(error.into()),
                    _ => {}
                }
                guest.wait(tracer, STEP)?;
                Ok(())
            }
            Hold::Hook(argument) => guest.sh(&format!("rm -f {}", gate(argument))).map(drop),
            Hold::Disk => guest.sh(UNHANG).map(drop),
        }
    }
}

/// No hook is there any more.
pub fn end_hooks(guest: &Guest) -> Result<()> {
    guest
        .sh(&format!(
            "rm -rf {FOLDER} {} {}",
            gate("freeze"),
            gate("thaw")
        ))
        .map(drop)
}
