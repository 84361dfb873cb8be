// SPDX-License-Identifier: GPL-2.0-only

//! Every stage of one backup times every fault: what the host is told, when the writers go on, and
//! whether the next backup is good.
//!
//! A cell asserts nothing of what it is set up to be; it says what was seen, for the table. What must
//! hold in each is judged here for what is ours: no backup is called good in whose window something was
//! written, nothing is answered twice, nothing stays frozen without a way out, the next backup is good.

mod dialogue;
mod fault;
mod stage;

use super::deadman::{make_hung, remove_hung, GROUP, RELEASED, UNHANG};
use super::{case, frozen_us, load, observe, stuck_writers_of, suspend, wait_for_daemon, Case};
use crate::table::{Place, NONE, NOT_RUN};
use anyhow::{bail, ensure, Context, Result};
use dialogue::Dialogue;
use e2e::check::equal;
use e2e::guest::{Cell, Daemon, Guest, Machine, Module, Process, STEP};
use fault::{Fault, DEADLINE};
use hyperv_sim::ic::status;
use hyperv_sim::storage::Image;
use hyperv_sim::{Exit, VmError};
use lab_agent::Stall;
use stage::{end_hooks, Hold, Stage};
use std::time::Duration;

/// A case in which `run` has one fault meet each stage.
const fn one(
    name: &'static str,
    about: &'static str,
    machine: Machine,
    run: fn(&Guest) -> Result<()>,
) -> Case {
    Case {
        machine,
        // For each of 8 rounds: all stages are gone through once, each in a machine of its own if it ends that.
        per_round: Duration::from_secs(100),
        ..case(name, about, run)
    }
    .long()
}

/// Three cases for each fault: with what is ours, with our daemon on the stock module, with the peer.
macro_rules! cases {
    ($($name:literal, $about:literal, $machine:expr, $fault:expr;)*) => {
        &[
            Case {
                per_round: Duration::from_secs(10),
                ..case(
                    "matrix/few",
                    "three faults at four stages: what the host is told is true, nothing stays frozen",
                    few,
                )
            },
            $(one(concat!("matrix/", $name), $about, $machine, |guest| {
                row(guest, $fault, Stack::Ours)
            }),)*
            one(
                "matrix/guard-killed",
                "kill -9 of the guard at each stage, our daemon on the stock module",
                Machine::TWO_CPUS,
                |guest| row(guest, Fault::GuardKilled, Stack::OursOnStock),
            ),
            one(
                "matrix/both-killed",
                "kill -9 of daemon and guard at each stage, our daemon on the stock module",
                Machine::TWO_CPUS,
                |guest| row(guest, Fault::BothKilled, Stack::OursOnStock),
            ),
            $(one(
                concat!("matrix/", $name, "-stock-module"),
                concat!($about, ", our daemon on the stock module"),
                $machine,
                |guest| row(guest, $fault, Stack::OursOnStock),
            ),)*
            $(one(
                concat!("matrix/", $name, "-peer"),
                concat!($about, ", the peer"),
                $machine,
                |guest| row(guest, $fault, Stack::Peer),
            ),)*
        ]
    };
}

pub const CASES: &[Case] = cases!(
    "daemon-killed", "kill -9 of the daemon at each stage", Machine::TWO_CPUS, Fault::DaemonKilled;
    "terminated", "SIGTERM to the daemon at each stage", Machine::TWO_CPUS, Fault::Terminated;
    "stopped", "SIGSTOP of the daemon at each stage", Machine::TWO_CPUS, Fault::Stopped;
    "out-of-memory", "the OOM killer takes the daemon at each stage", Machine::TWO_CPUS, Fault::OutOfMemory;
    "unbound", "the device is unbound at each stage", Machine::TWO_CPUS, Fault::Unbound;
    "rescinded", "the host takes the device back at each stage", Machine::TWO_CPUS, Fault::Rescinded;
    "hibernated", "the machine hibernates at each stage", suspend::MACHINE, Fault::Hibernated;
    "disk-hung", "a disk hangs from each stage on", Machine::TWO_CPUS, Fault::DiskHung;
    "disk-gone", "a disk is gone at each stage", Machine::TWO_CPUS, Fault::DiskGone;
    "disk-added", "a disk is added at each stage", Machine::SCSI, Fault::DiskAdded;
    "thaw-lost", "the host never says THAW", Machine::TWO_CPUS, Fault::ThawLost;
    "thaw-late", "the host says THAW after the deadline", Machine::TWO_CPUS, Fault::ThawLate;
    "thaw-twice", "a THAW more at each stage", Machine::TWO_CPUS, Fault::ThawTwice;
    "freeze-twice", "a FREEZE more at each stage", Machine::TWO_CPUS, Fault::FreezeTwice;
    "shut-down", "the host shuts the guest down at each stage", Machine::TWO_CPUS, Fault::ShutDown;
    "panic", "the guest panics at each stage", Machine::TWO_CPUS, Fault::Panic;
);

/// Whose module and daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stack {
    Ours,
    OursOnStock,
    Peer,
}

impl Stack {
    /// Ours first.
    pub const ALL: [Stack; 3] = [Stack::Ours, Stack::OursOnStock, Stack::Peer];

    fn module(self) -> Module {
        match self {
            Stack::Ours => Module::Ours,
            Stack::OursOnStock | Stack::Peer => Module::Stock,
        }
    }

    /// As the table has it.
    pub fn words(self) -> &'static str {
        match self {
            Stack::Ours => "ours",
            Stack::OursOnStock => "our daemon, stock hv_utils",
            Stack::Peer => "stock hv_utils, Debian's daemon",
        }
    }
}

/// The file systems that are frozen, by their mount points.
const FILE_SYSTEMS: &[&str] = &["/mnt/a", "/mnt/hung", "/"];

/// A writer on each: how often is enough to see that it does not stand still.
const FILES: [&str; 3] = ["/writer", "/mnt/a/w", "/mnt/hung/w"];
const EVERY_US: u64 = 10_000;

/// How long the host waits for an answer.
const HOST: Duration = Duration::from_secs(12);

fn start_writers(guest: &Guest, files: impl IntoIterator<Item = &'static str>) -> Result<()> {
    for file in files {
        guest.writer_start_every(file, EVERY_US)?;
    }
    Ok(())
}

/// What the cells of one row go through, one after the other.
pub struct Lab<'a> {
    guest: &'a Guest,
    stack: Stack,
    fault: Fault,
    daemon: Process,
}

impl<'a> Lab<'a> {
    /// Two file systems beside the root, a writer on each, module and daemon.
    fn set_up(guest: &'a Guest, stack: Stack, fault: Fault) -> Result<Self> {
        // What an earlier case has made of answers is none of these.
        drop(guest.vss().take_strays());
        fault::prepare(guest, fault, stack.module())?;
        guest.sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a")?;
        make_hung(guest)?;
        start_writers(guest, FILES)?;
        Lab::load(guest, stack, fault)?;
        if fault == Fault::ShutDown {
            // Whichever has VSS, this serves the host's wish to shut down.
            guest.load(Module::Stock, &[])?;
            guest.host().shutdown().wait_open(STEP)?;
        }
        let daemon = Lab::spawn(guest, stack, fault)?;
        let lab = Lab {
            guest,
            stack,
            fault,
            daemon,
        };
        lab.first_backup()?;
        Ok(lab)
    }

    /// Loads the module, ours with limits short enough to be waited for; a daemon that is held for a look is not
    /// given up.
    fn load(guest: &Guest, stack: Stack, fault: Fault) -> Result<()> {
        let limit = |name: &str, seconds| {
            let limit = guest.host().patience(Duration::from_secs(seconds));
            format!("{name}_ms={}", limit.as_millis())
        };
        let limits = match stack {
            // It is held for as long as the guest takes to find the disk.
            Stack::Ours if fault == Fault::DiskAdded => vec![limit("grace", 1)],
            Stack::Ours => vec![
                limit("grace", 1),
                limit("freeze_timeout", 10),
                limit("timeout", 6),
            ],
            Stack::OursOnStock | Stack::Peer => Vec::new(),
        };
        let limits: Vec<&str> = limits.iter().map(String::as_str).collect();
        load(guest, stack.module(), &limits)
    }

    fn spawn(guest: &Guest, stack: Stack, fault: Fault) -> Result<Process> {
        let deadline = match fault {
            Fault::Stopped | Fault::ThawLost | Fault::ThawLate => DEADLINE,
            _ => Duration::from_secs(60),
        };
        let give_up = match fault {
            Fault::DiskAdded => 60,
            _ => 4,
        };
        // One thread that freezes is one whose calls can be counted.
        let config = format!(
            "parallel = 1\ngive_up = {give_up}\ndeadline = {}",
            deadline.as_secs()
        );
        const CONFIG: &str = "/run/matrix.toml";
        guest.sh(&format!("cat >{CONFIG} <<'END'\n{config}\nEND"))?;
        let [program, foreground] = match stack {
            Stack::Peer => Daemon::Debian.argv(),
            _ => Daemon::Ours.argv(),
        };
        let options = match stack {
            Stack::Peer => String::new(),
            _ => format!("-c {CONFIG}"),
        };
        let enter = match fault {
            Fault::OutOfMemory => {
                guest.write(&format!("{GROUP}/memory.max"), "max")?;
                format!("echo $$ >{GROUP}/cgroup.procs && ")
            }
            _ => String::new(),
        };
        let line = format!("{enter}exec {program} {foreground} {options}");
        guest.spawn(&["sh", "-c", &line])
    }

    /// The directory of the driver in sysfs.
    fn driver(&self) -> &'static str {
        match self.stack.module() {
            Module::Ours => "/sys/bus/vmbus/drivers/hv_vss",
            Module::Stock => "/sys/bus/vmbus/drivers/hv_utils",
        }
    }

    fn start_daemon(&mut self) -> Result<()> {
        self.daemon = Lab::spawn(self.guest, self.stack, self.fault)?;
        wait_for_daemon(self.guest)
    }

    /// Starts it again if it has ended.
    fn restart_if_dead(&mut self) -> Result<()> {
        match self.guest.wait(&self.daemon, Duration::ZERO) {
            Ok(_) => self.start_daemon(),
            Err(error) if error.errno() == Some("EAGAIN") => wait_for_daemon(self.guest),
            Err(error) => Err(error.into()),
        }
    }

    /// The device is there again.
    fn come_back(&mut self) -> Result<()> {
        let vss = self.guest.vss();
        vss.wait_open(STEP)?;
        vss.agree(STEP)?;
        self.restart_if_dead()
    }

    /// After it the daemon has all its threads, and a plan.
    fn first_backup(&self) -> Result<()> {
        wait_for_daemon(self.guest)?;
        super::backup(self.guest).context("the backup before the first fault")
    }

    /// Leaves a guest as it was found, but for what any case leaves.
    fn end(&self) -> Result<()> {
        end_hooks(self.guest)?;
        self.guest.signal(&self.daemon, 9)?;
        self.guest.wait(&self.daemon, STEP)?;
        self.fault.clean_up(self.guest)
    }

    /// Everything new, so that the next cell begins as the first one did.
    fn begin_again(&mut self) -> Result<()> {
        let guest = self.guest;
        // Where a cell was left in the middle, the daemon is held still.
        guest.sh("if pidof strace; then kill -9 $(pidof strace); fi")?;
        guest.sh(UNHANG)?;
        // ESRCH: it is dead.
        let _ = guest.signal(&self.daemon, 18);
        let _ = guest.signal(&self.daemon, 9);
        guest.wait(&self.daemon, STEP)?;
        for path in FILE_SYSTEMS {
            while guest.thaw(path).is_ok() {}
        }
        end_hooks(guest)?;
        guest.unload(self.stack.module())?;
        guest.vss().wait_closed(STEP)?;
        if self.fault == Fault::DiskGone {
            self.new_disk()?;
        }
        Lab::load(guest, self.stack, self.fault)?;
        self.start_daemon()?;
        self.first_backup()
    }

    /// A disk in place of the one that is gone.
    fn new_disk(&self) -> Result<()> {
        let guest = self.guest;
        guest.writers_stop()?;
        remove_hung(guest)?;
        make_hung(guest)?;
        start_writers(guest, FILES)
    }
}

/// What was seen of one cell.
struct Seen {
    /// What the host was told.
    told: String,
    /// All of it.
    words: String,
    /// How long after the fault the last writer went on that stood still, if one did.
    on: Option<Duration>,
    /// Against the rules.
    wrong: Vec<String>,
}

/// One stage, one fault.
fn cell(lab: &mut Lab<'_>, stage: Stage) -> Result<Seen> {
    let (guest, fault) = (lab.guest, lab.fault);
    let mut dialogue = Dialogue::new(guest);
    let hold = stage
        .reach(guest, lab.stack, &lab.daemon, &mut dialogue)
        .context("the stage is not reached")?;
    let struck = guest.clock()?;
    let said_before = guest.output(&lab.daemon)?.len();
    let under_way = fault.begin(lab, &mut dialogue, &hold)?;
    if fault == Fault::ThawLate {
        dialogue.finish(HOST, false)?;
        wait_for_deadline(guest)?;
    }
    dialogue.finish(HOST, fault.host_says_thaw())?;
    if fault == Fault::ThawLost {
        wait_for_deadline(guest)?;
    }
    // Before anybody comes to help, but for what nobody else can end.
    let (mut standing, ended) = match fault {
        Fault::BothKilled => {
            let ended = fault.end(lab, &hold, under_way);
            (Standing::after(guest, fault, stage, struck)?, ended)
        }
        _ => {
            let standing = Standing::after(guest, fault, stage, struck)?;
            (standing, fault.end(lab, &hold, under_way))
        }
    };
    if ended.is_ok() && fault.host_says_thaw() {
        // Of the device that was away.
        let asked = dialogue.len();
        dialogue.finish(HOST, true)?;
        if dialogue.len() > asked && standing.stalls.is_empty() {
            standing = Standing::after(guest, fault, stage, struck)?;
        }
    }
    if matches!(hold, Hold::Hook(_)) {
        end_hooks(guest)?;
    }
    let (on, after) = standing.words(&dialogue, fault);
    let said = guest.output(&lab.daemon)?;
    let said = said.get(said_before..).unwrap_or(&said);
    let left_out = |it: &str| it.contains(": /mnt/hung (") && it.ends_with("it is left out");
    let is_left_out = said.lines().any(left_out);
    let mut wrong = dialogue.wrong(|path| fault.blocks(path) && is_left_out);
    if fault.is_one_disk() && !dialogue.is_all_good() {
        wrong.push(format!("one disk fails no backup: {}", dialogue.words()));
    }
    if let Some(path) = &standing.stuck {
        wrong.push(format!("the writer of {path} had not gone on"));
    }
    if standing.by_itself(&dialogue)
        && on.is_some_and(|on| on > guest.host().patience(fault.way_out()))
    {
        wrong.push(format!("writers went on {on:?} after it"));
    }

    let next = match ended.and_then(|()| observe(guest)) {
        Ok(next) => {
            let good = is_good(fault, &next);
            if !good {
                wrong.push(format!("the next backup: {}", super::describe(&next)));
            }
            if good {
                "next good"
            } else {
                "next not good"
            }
        }
        Err(error) => {
            wrong.push(format!("the next backup: {error:#}"));
            "no next backup"
        }
    };
    let told = dialogue.words();
    Ok(Seen {
        words: format!("{told}; {after}; {next}"),
        told,
        on,
        wrong,
    })
}

/// By then whatever is frozen now has to be thawed.
fn wait_for_deadline(guest: &Guest) -> Result<()> {
    let over = guest.clock()? + (DEADLINE + RELEASED).as_micros() as u64;
    guest.wait_until("the deadline is over", STEP, || Ok(guest.clock()? > over))
}

/// One stage, and the end of the machine: what the host hears of it. Each wants a machine of its own, whose
/// boot is the next backup's.
fn end_at(first: &Guest, fault: Fault, stack: Stack, stage: Stage) -> Result<Seen> {
    let guest = &first.start_from(Image::default())?;
    let lab = Lab::set_up(guest, stack, fault)?;
    let mut dialogue = Dialogue::new(guest);
    let hold = stage
        .reach(guest, lab.stack, &lab.daemon, &mut dialogue)
        .context("the stage is not reached")?;
    guest.ends()?;
    fault.begin(&lab, &mut dialogue, &hold)?;
    let exit = match guest.vm().wait_exit(STEP * 2) {
        // Every way to end writes back what is dirty, and waits for the disk that hangs.
        Err(VmError::Timeout { .. }) if stage == Stage::FreezeHangs => None,
        exit => Some(exit?),
    };
    dialogue.listen(STEP)?;
    if fault == Fault::Panic {
        // What it says of that is its last word.
        let ours = "Kernel panic - not syncing: sysrq triggered crash";
        ensure!(guest.vm().console().contains(ours), "another panic");
        guest.set_judged();
    } else {
        guest.close()?;
    }
    let unloaded = match suspend::unloads(guest) {
        0 => "without UNLOAD",
        _ => "with UNLOAD",
    };
    let how = match exit {
        None => "waits for the disk".to_owned(),
        Some(Exit::PowerOff) => "off".to_owned(),
        Some(Exit::Crash { .. }) => format!("crash reported, {unloaded}"),
        Some(other) => bail!("the guest should not end so: {other:?}"),
    };
    let told = dialogue.words();
    Ok(Seen {
        words: match told.as_str() {
            "" => how,
            told => format!("{told}; {how}"),
        },
        told,
        on: None,
        wrong: dialogue.wrong(|_| false),
    })
}

/// Whether a backup was good, and all stood still for it that can.
fn is_good(fault: Fault, seen: &super::Seen) -> bool {
    let is_there = |path: &&str| !(fault == Fault::DiskGone && fault.blocks(path));
    let mut expected: Vec<&str> = FILES.into_iter().filter(is_there).collect();
    let still = seen.still.iter().map(String::as_str);
    let mut still: Vec<&str> = still.filter(is_there).collect();
    expected.sort_unstable();
    still.sort_unstable();
    seen.freeze == status::OK
        && seen.thaw == Some(status::OK)
        && seen.stuck.iter().all(|it| !is_there(&it.as_str()))
        && still == expected
}

/// Who stood still after the fault.
struct Standing {
    /// When that was.
    struck: u64,
    /// Long writes that had not ended when it happened.
    stalls: Vec<Stall>,
    /// A file whose writer had not gone on at the end of it.
    stuck: Option<String>,
}

impl Standing {
    /// Looks once whatever could thaw has had its time.
    fn after(guest: &Guest, fault: Fault, stage: Stage, struck: u64) -> Result<Standing> {
        let by_disk = |path: &str| {
            let hung = stage.has_hung_disk() && path.starts_with("/mnt/hung/");
            fault.blocks(path) || hung
        };
        let end = guest.clock()? + guest.host().patience(RELEASED).as_micros() as u64;
        loop {
            let seen = guest.stalls(struck)?;
            let mut stalls = seen.stalls;
            stalls.retain(|stall| !by_disk(&stall.path));
            if seen.now_us <= end && stalls.iter().any(|it| it.ended_us.is_none()) {
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
            let long = frozen_us(guest);
            stalls.retain(|it| it.ended_us.unwrap_or(seen.now_us) > it.began_us + long);
            let stuck = stalls.iter().find(|it| it.ended_us.is_none());
            let mut stuck = stuck.map(|it| it.path.clone());
            if stuck.is_none() {
                // Whose writes fail at once stands nowhere, and does not go on either.
                let others = stuck_writers_of(guest, |path| !by_disk(path))?;
                stuck = others.into_iter().next();
            }
            return Ok(Standing {
                struck,
                stalls,
                stuck,
            });
        }
    }

    fn last(&self) -> Option<u64> {
        self.stalls.iter().filter_map(|it| it.ended_us).max()
    }

    /// Whether it was not the host's THAW that let the last one go on.
    fn by_itself(&self, dialogue: &Dialogue<'_>) -> bool {
        // One that was sent before the fault is what this is about.
        let sent = dialogue.thaw_sent().filter(|sent| *sent > self.struck);
        self.last()
            .is_some_and(|last| sent.is_none_or(|sent| last < sent))
    }

    /// How long after the fault the last writer went on, and that in words.
    fn words(&self, dialogue: &Dialogue<'_>, fault: Fault) -> (Option<Duration>, String) {
        let ended = self
            .stalls
            .iter()
            .filter_map(|it| Some((it.ended_us?, it.began_us)));
        let Some((last, began)) = ended.max() else {
            let words = match self.stuck {
                Some(_) => "frozen",
                None => "nobody stands still",
            };
            return (None, words.to_owned());
        };
        // One that came later, because of what was held up until then, counts from its own beginning.
        let on = Duration::from_micros(last.saturating_sub(self.struck.max(began)));
        // Else it was a deadline that came after it.
        let sent = dialogue.thaw_sent().unwrap_or_default();
        let is_soon = last < sent + RELEASED.as_micros() as u64;
        let words = match () {
            () if self.stuck.is_some() => "frozen".to_owned(),
            () if fault == Fault::BothKilled => "on with the next start".to_owned(),
            () if !self.by_itself(dialogue) && is_soon => "on with THAW".to_owned(),
            () if on < Duration::from_secs(1) => "on at once".to_owned(),
            () => format!("on after {:.0} s", on.as_secs_f64()),
        };
        (Some(on), words)
    }
}

/// A few cells, for each run: three faults at four stages each, with what is ours. What the host is told there is
/// known: a FREEZE or a THAW that fails without need breaks no rule.
fn few(guest: &Guest) -> Result<()> {
    const STAGES: [Stage; 4] = [
        Stage::FreezeRead,
        Stage::AllFrozen,
        Stage::Frozen,
        Stage::ThawRead,
    ];
    const FAULTS: [(Fault, [&str; 4]); 3] = [
        (
            Fault::DaemonKilled,
            ["F fail", "F fail", "F ok, T fail", "F ok, T fail"],
        ),
        (
            Fault::Unbound,
            ["F fail", "F fail", "F ok, T fail", "F ok, T fail"],
        ),
        (
            Fault::FreezeTwice,
            [
                "F ok, F ok, T ok",
                "F ok, F ok, T ok",
                "F ok, F ok, T ok",
                "F ok, T ok, F ok, T ok",
            ],
        ),
    ];
    let mut lab = Lab::set_up(guest, Stack::Ours, Fault::DaemonKilled)?;
    for (fault, told) in FAULTS {
        lab.fault = fault;
        for (stage, told) in STAGES.into_iter().zip(told) {
            let seen = cell(&mut lab, stage)?;
            let at = format!("{}, {}", fault.words(), stage.words());
            println!("     {at}: {}", seen.words);
            ensure!(seen.wrong.is_empty(), "{at}: {}", seen.wrong.join("; "));
            equal(&at, seen.told.as_str(), told)?;
        }
    }
    lab.end()
}

/// All stages of one fault.
fn row(guest: &Guest, fault: Fault, stack: Stack) -> Result<()> {
    let stages: Vec<Stage> = Stage::ALL
        .into_iter()
        .filter(|stage| fault.is_of(*stage) && stage.is_of(stack))
        .collect();
    // What an earlier run has seen is no longer so, also where this one does not come to.
    for stage in &stages {
        note(guest, fault, *stage, stack, NOT_RUN, None);
    }
    let mut lab = match fault.ends_machine() {
        true => None,
        false => Some(Lab::set_up(guest, stack, fault)?),
    };
    let mut wrong = Vec::new();
    for stage in stages {
        let seen = match &mut lab {
            Some(lab) => cell(lab, stage).and_then(|seen| {
                guest.check_log()?;
                Ok(seen)
            }),
            None => end_at(guest, fault, stack, stage),
        };
        if let Ok(seen) = &seen {
            println!("     {}: {} ({:?})", stage.words(), seen.words, seen.on);
            note(guest, fault, stage, stack, &in_table(stack, seen), seen.on);
        }
        let counts = fails(stack, &seen);
        let problems = match seen {
            Ok(seen) => seen.wrong,
            Err(error) => vec![format!("{error:#}")],
        };
        if !problems.is_empty() {
            let problem = problems.join("; ");
            println!("     {}: wrong: {problem}", stage.words());
            if let Some(lab) = &lab {
                let log = guest.output(&lab.daemon).unwrap_or_default();
                let lines: Vec<&str> = log.lines().rev().take(20).collect();
                for line in lines.iter().rev() {
                    println!("       {line}");
                }
            }
            if counts {
                wrong.push(format!("{}, {}: {problem}", fault.words(), stage.words()));
            }
        }
        let Some(lab) = &mut lab else { continue };
        // A thaw that took long has made the daemon begin another thread, which takes the next as well.
        let has_more = stack == Stack::Ours && stage == Stage::NoneThawed;
        if !problems.is_empty() || fault == Fault::DiskGone || has_more {
            lab.begin_again().with_context(|| {
                format!("the guest cannot be used further; {}", wrong.join("; "))
            })?;
        }
    }
    if let Some(lab) = lab {
        lab.end()?;
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// Whether a cell fails its case. What was seen wrong of the peer is shown, not judged; one of which nothing
/// was seen is no cell, whosever it is.
fn fails(stack: Stack, seen: &Result<Seen>) -> bool {
    match seen {
        Ok(seen) => stack != Stack::Peer && !seen.wrong.is_empty(),
        Err(_) => true,
    }
}

/// What the table has of a cell: where it fails its case, also what was wrong.
fn in_table(stack: Stack, seen: &Seen) -> String {
    match stack {
        Stack::Ours | Stack::OursOnStock if !seen.wrong.is_empty() => {
            // A cell is one line, and ends at a bar.
            let wrong = seen.wrong.join(", ").replace(['\n', '|'], " ");
            format!("{}; wrong: {wrong}", seen.words)
        }
        _ => seen.words.clone(),
    }
}

/// The whole matrix, as `seen` knows it by the words of fault, stage and stack.
pub fn matrix_of<'a>(seen: impl Fn(&str, &str, &str) -> Option<&'a str>) -> Vec<Place<'a>> {
    let mut places = Vec::new();
    for fault in Fault::ALL {
        for stage in Stage::ALL.into_iter().filter(|stage| fault.is_of(*stage)) {
            let of = |stack: Stack| {
                let is_there = fault.only_of().is_none_or(|only| only == stack);
                match is_there && stage.is_of(stack) {
                    true => seen(fault.words(), stage.words(), stack.words()).unwrap_or(NOT_RUN),
                    false => NONE,
                }
            };
            places.push(Place {
                fault: fault.words(),
                stage: stage.words(),
                seen: Stack::ALL.map(of).to_vec(),
            });
        }
    }
    places
}

/// For the table.
fn note(guest: &Guest, fault: Fault, stage: Stage, stack: Stack, seen: &str, on: Option<Duration>) {
    guest.note_cell(Cell {
        fault: fault.words().to_owned(),
        stage: stage.words().to_owned(),
        stack: stack.words().to_owned(),
        seen: seen.to_owned(),
        on_ms: on.map(|it| it.as_millis() as u64),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_seen_wrong_of_the_peer_is_let_pass() {
        let seen = |wrong: &[&str]| {
            Ok(Seen {
                told: String::new(),
                words: String::new(),
                on: None,
                wrong: wrong.iter().map(|it| it.to_string()).collect(),
            })
        };
        for stack in Stack::ALL {
            assert!(fails(
                stack,
                &Err(anyhow::anyhow!("the stage is not reached"))
            ));
            assert!(!fails(stack, &seen(&[])));
            assert_eq!(fails(stack, &seen(&["frozen"])), stack != Stack::Peer);
        }
    }

    #[test]
    fn what_was_wrong_stands_in_the_table() {
        let seen = |wrong: &[&str]| Seen {
            told: "F ok, T ok".into(),
            words: "F ok, T ok; on with THAW; next good".into(),
            on: None,
            wrong: wrong.iter().map(|it| it.to_string()).collect(),
        };
        for stack in Stack::ALL {
            assert_eq!(in_table(stack, &seen(&[])), seen(&[]).words);
        }
        let bad = seen(&["written in the window: /a", "said:\nno | more"]);
        for stack in [Stack::Ours, Stack::OursOnStock] {
            assert_eq!(
                in_table(stack, &bad),
                "F ok, T ok; on with THAW; next good; \
                 wrong: written in the window: /a, said: no   more"
            );
        }
        assert_eq!(in_table(Stack::Peer, &bad), bad.words);
    }

    #[test]
    fn no_cell_of_the_matrix_is_left_out() {
        let is = |place: &Place<'_>, fault: Fault, stage: Stage| {
            place.fault == fault.words() && place.stage == stage.words()
        };
        let of_ours = |_: &str, _: &str, stack: &str| (stack == "ours").then_some("F ok");
        let places = matrix_of(of_ours);
        let at = |fault, stage| places.iter().find(|it| is(it, fault, stage));
        let cell = at(Fault::Panic, Stage::Frozen).map(|it| it.seen.clone());
        assert_eq!(cell, Some(vec!["F ok", NOT_RUN, NOT_RUN]));
        let cell = at(Fault::GuardKilled, Stage::Frozen).map(|it| it.seen.clone());
        assert_eq!(cell, Some(vec![NONE, NOT_RUN, NONE]));
        assert!(at(Fault::ThawLost, Stage::ThawSent).is_none());
    }
}
