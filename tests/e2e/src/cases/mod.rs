// SPDX-License-Identifier: GPL-2.0-only

//! The cases, one file for each area, in the order in which they run.
//!
//! A case is a function of a fresh or tidied guest: nothing of ours and no `hv_utils` is loaded,
//! only the root (ext4 on `/dev/ram0`) is mounted, `/dev/ram1` and up are free.

mod abi;
mod broken;
mod commands;
mod control;
mod databases;
mod deadman;
mod dialogue;
mod disks;
mod foreign;
mod freeze;
mod hangs;
mod hooks;
mod hostile;
mod judges;
mod lifecycle;
mod lis;
mod many;
mod matrix;
mod order;
mod owned;
mod packages;
mod pairing;
mod peer;
mod prepared;
mod restore;
mod scope;
mod sleep;
mod slow;
mod suspend;
mod systemd;
mod tp_qemu;

use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Machine, Module, Process, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::ic::vss::Lun;
use hyperv_sim::{Reply, Tx};
use lab_agent::Writer;
use std::sync::OnceLock;
use std::time::Duration;

pub use matrix::{matrix_of, Stack};
pub use pairing::make_file_systems;

/// In which runs a case is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// In each.
    Always,
    /// In those of all cases (`--all`, `make test-all`): it is long, and a shorter one of its kind is in
    /// each.
    All,
    /// In none: it wants what is made for it alone.
    Named,
}

/// One case.
#[derive(Clone)]
pub struct Case {
    /// `area/what`.
    pub name: &'static str,
    /// One line for people: what is right when it passes.
    pub about: &'static str,
    /// The guest that it wants.
    pub machine: Machine,
    /// What each round of a case that has rounds may take.
    pub per_round: Duration,
    /// In which runs it is, besides those that name it in full.
    pub when: When,
    /// Whether it asks for what our module alone tells: it is left out on a kernel that does not take that.
    pub asks_our_module: bool,
    /// Whether it compares ours with the peer, so that the comparison lacks something until it was run.
    pub compares: bool,
    /// The case itself.
    pub run: fn(&Guest) -> Result<()>,
}

impl Case {
    /// The same, in runs of all cases only.
    const fn long(self) -> Case {
        Case {
            when: When::All,
            ..self
        }
    }

    /// The same, with a question that our module alone answers.
    const fn asking_our_module(self) -> Case {
        Case {
            asks_our_module: true,
            ..self
        }
    }

    /// The same, with a row of the comparison.
    const fn comparing(self) -> Case {
        Case {
            compares: true,
            ..self
        }
    }
}

/// A case for a guest with one virtual CPU.
const fn case(name: &'static str, about: &'static str, run: fn(&Guest) -> Result<()>) -> Case {
    Case {
        name,
        about,
        machine: Machine::TWO_CPUS,
        per_round: Duration::ZERO,
        when: When::Always,
        asks_our_module: false,
        compares: false,
        run,
    }
}

/// All cases.
pub fn all() -> Vec<Case> {
    [
        pairing::CASES,
        lifecycle::CASES,
        suspend::CASES,
        sleep::CASES,
        abi::CASES,
        dialogue::CASES,
        owned::CASES,
        hostile::CASES,
        freeze::CASES,
        prepared::CASES,
        scope::CASES,
        order::CASES,
        commands::CASES,
        control::CASES,
        hooks::CASES,
        deadman::CASES,
        hangs::CASES,
        broken::CASES,
        foreign::CASES,
        peer::CASES,
        judges::CASES,
        lis::CASES,
        many::CASES,
        tp_qemu::CASES,
        systemd::CASES,
        packages::CASES,
        disks::CASES,
        slow::CASES,
        restore::CASES,
        databases::CASES,
        matrix::CASES,
    ]
    .concat()
}

/// How many rounds there are if nobody says otherwise: enough to hit every stage of a backup.
pub const DEFAULT_ROUNDS: u32 = 8;

/// The seed if nobody says otherwise.
pub const DEFAULT_SEED: u64 = 1;

static SCHEDULE: OnceLock<(Option<u32>, u64)> = OnceLock::new();

/// Sets rounds, if somebody has asked for so many, and seed, once.
pub fn set_schedule(rounds: Option<u32>, seed: u64) {
    // Only the first call counts; there is one.
    let _ = SCHEDULE.set((rounds, seed));
}

/// How often cases that kill at random moments do so.
pub fn rounds() -> u32 {
    rounds_or(DEFAULT_ROUNDS)
}

/// The same for a case that makes do with `few` if nobody asks.
fn rounds_or(few: u32) -> u32 {
    SCHEDULE.get().and_then(|it| it.0).unwrap_or(few)
}

/// The seed of those moments.
fn seed() -> u64 {
    SCHEDULE.get().map_or(DEFAULT_SEED, |it| it.1)
}

/// Loads `module`, ours with `parameters`, and agrees on 5.0.
fn load(guest: &Guest, module: Module, parameters: &[&str]) -> Result<()> {
    guest.load(module, parameters)?;
    guest.vss().wait_open(STEP)?;
    guest.vss().agree(STEP)?;
    Ok(())
}

/// What `module` is loaded with where daemons die: ours does not wait for the next one for long. The stock
/// one waits for none.
fn short_grace(module: Module) -> &'static [&'static str] {
    match module {
        Module::Ours => &["grace_ms=300"],
        Module::Stock => &[],
    }
}

/// What a module is loaded with whose limits leave the case time to come in between, on whichever machine.
fn limit(name: &str, limit: Duration) -> String {
    format!("{name}_ms={}", limit.as_millis())
}

/// Waits until a daemon has registered: from then on HOT_BACKUP is answered 0.
fn wait_for_daemon(guest: &Guest) -> Result<()> {
    guest.wait_until("HOT_BACKUP is answered 0: a daemon is there", STEP, || {
        Ok(guest.vss().hot_backup(STEP)?.status() == status::OK)
    })
}

/// Loads `module`, starts `daemon` and waits until it has registered.
fn start(guest: &Guest, module: Module, daemon: Daemon) -> Result<Process> {
    load(guest, module, &[])?;
    let process = guest.start_daemon(daemon)?;
    wait_for_daemon(guest)?;
    Ok(process)
}

/// Whether the module holds what the daemon that serves freezes.
fn module_holds(guest: &Guest) -> Result<bool> {
    // How the last backup went is told by its exit code.
    let said = guest.try_sh("/payload/hv_vss_daemon status --json")?;
    let said: serde_json::Value = serde_json::from_str(&said.out)?;
    Ok(said["daemon"]["door"] == "held")
}

/// Ends a daemon and unloads the module.
fn stop(guest: &Guest, module: Module, daemon: &Process) -> Result<()> {
    guest.signal(daemon, 9)?;
    guest.wait(daemon, STEP)?;
    guest.unload(module)?;
    guest.vss().wait_closed(STEP)?;
    Ok(())
}

/// Waits until so much time has passed in the guest.
fn wait_out(guest: &Guest, time: Duration) -> Result<()> {
    let end = guest.clock()? + time.as_micros() as u64;
    guest.wait_until("the time is over", time + STEP, || Ok(guest.clock()? > end))
}

/// The answer to a request, if it comes before so much time has passed in the guest.
fn reply_within(guest: &Guest, tx: Tx, limit: Duration) -> Result<Option<Reply>> {
    let end = guest.clock()? + limit.as_micros() as u64;
    let mut reply = None;
    guest.wait_until("it is answered, or the time is over", limit + STEP, || {
        reply = guest.vss().try_reply(tx);
        Ok(reply.is_some() || guest.clock()? > end)
    })?;
    Ok(reply)
}

/// A good backup: both requests are answered 0, every writer that runs stands still in between and goes on after
/// it. Where none runs, one does on the root for that time. Returns how long the host waited for the two answers.
fn good_backup(guest: &Guest) -> Result<Duration> {
    let vss = guest.vss();
    let has_none = guest.writers()?.is_empty();
    if has_none {
        guest.writer_start("/writer")?;
    }
    let freeze = vss.freeze(&[], STEP)?;
    answered("FREEZE", &freeze, status::OK)?;
    let (_, moving) = who_stands_still(guest)?;
    let thaw = vss.thaw(STEP)?;
    equal("who goes on while frozen", moving, Vec::new())?;
    answered("THAW", &thaw, status::OK)?;
    equal("who is stuck after THAW", stuck_writers(guest)?, Vec::new())?;
    if has_none {
        guest.writers_stop()?;
    }
    Ok(freeze.latency + thaw.latency)
}

/// The same for those who do not ask how long it took.
fn backup(guest: &Guest) -> Result<()> {
    good_backup(guest).map(drop)
}

/// Both requests, answered 0. Who stands still in between is not looked at: for whom it is about what many of
/// them leave behind.
fn both_requests(guest: &Guest) -> Result<()> {
    answered("FREEZE", &guest.vss().freeze(&[], STEP)?, status::OK)?;
    answered("THAW", &guest.vss().thaw(STEP)?, status::OK)
}

/// How the daemon closes a backup in its log, whichever way that went.
const CLOSING: [&str; 4] = [
    "the backup is good",
    "the backup is not good",
    "for the host the backup has failed",
    "nothing is left frozen",
];

/// How many backups are over, as this log has it.
fn closed(log: &str) -> usize {
    let closes = |line: &&str| CLOSING.iter().any(|words| line.contains(words));
    log.lines().filter(closes).count()
}

/// The daemon's log once the first backup that it made is over. The host has its answer before: the
/// lines of a backup are written when nothing is frozen any more.
fn logged(guest: &Guest, daemon: &Process) -> Result<String> {
    logged_all(guest, daemon, 1)
}

/// The same once so many backups are over.
fn logged_all(guest: &Guest, daemon: &Process, backups: usize) -> Result<String> {
    let mut log = String::new();
    let over = guest.wait_until("the daemon has logged how it went", STEP, || {
        log = guest.output(daemon)?;
        Ok(closed(&log) >= backups)
    });
    over.with_context(|| format!("of {backups} backups, so many are over:\n{log}"))?;
    Ok(log)
}

/// What our module says of itself: the lines of its file in debugfs, by their first word.
struct ModuleState(String);

impl ModuleState {
    fn of(guest: &Guest) -> Result<Self> {
        Ok(ModuleState(guest.read("/sys/kernel/debug/hv_vss/state")?))
    }

    /// The words that follow `name`.
    fn words(&self, name: &str) -> Result<Vec<&str>> {
        let mut lines = self.0.lines().map(|line| line.split(' '));
        let found = lines.find_map(|mut words| (words.next() == Some(name)).then_some(words));
        let found = found.with_context(|| format!("no {name} in debugfs:\n{}", self.0))?;
        Ok(found.collect())
    }

    /// The numbers that follow `name`.
    fn numbers(&self, name: &str) -> Result<Vec<u64>> {
        let words = self.words(name)?;
        let numbers: Result<_, _> = words.iter().map(|word| word.parse()).collect();
        numbers.with_context(|| format!("{name} should have numbers, it has {words:?}"))
    }

    /// The one number that follows `name`.
    fn number(&self, name: &str) -> Result<u64> {
        let numbers = self.numbers(name)?;
        numbers.first().copied().context("no number")
    }
}

/// What a guest holds that a leak would make grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Footprint {
    /// What the kernel holds for itself, in KiB: its slabs without what is empty in them, and its mapped
    /// memory, without the stacks of threads and what waits to be unmapped. Not counted where the kernel
    /// looks for leaks by itself: KASAN keeps tens of MiB of what was freed before it lets go of any.
    kernel: u64,
    /// Memory of the daemon's own, and of its guard's, in KiB.
    anon: u64,
    /// Descriptors that they have open.
    descriptors: u64,
    /// Their threads.
    threads: u64,
    /// Pieces of memory shared with the host: the rings of open channels.
    gpadls: usize,
}

/// Prints the numbers, one a line, each after its name.
const FOOTPRINT: &str = r#"for file in /sys/kernel/slab/*/shrink; do echo 1 >$file; done 2>/dev/null
    awk '$1 ~ /^(SUnreclaim|Percpu):/ { print "kernel", $2 }' /proc/meminfo
    awk '!/ (kernel_clone|dup_task_struct|unpurged)/ { bytes += $2 } END { print "kernel", int(bytes / 1024) }' \
        /proc/vmallocinfo
    for pid in $(pidof hv_vss_daemon hv_vss_guard); do
        awk '/^RssAnon:/ { print "anon", $2 } /^Threads:/ { print "threads", $2 }' /proc/$pid/status
        ls /proc/$pid/fd | awk 'END { print "descriptors", NR }'
    done"#;

impl Footprint {
    /// By so many descriptors, and so many threads, one is off that does not leak: in 160 rounds no more were seen
    /// than in 24.
    const FEW: u64 = 20;

    fn of(guest: &Guest) -> Result<Self> {
        Footprint::read(&guest.sh(FOOTPRINT)?, guest)
    }

    fn read(text: &str, guest: &Guest) -> Result<Self> {
        let sum = |name: &str| -> Result<u64> {
            let lines = text.lines().filter_map(|line| line.split_once(' '));
            let numbers = lines.filter(|(it, _)| *it == name);
            let numbers: Result<Vec<u64>, _> = numbers.map(|it| it.1.parse()).collect();
            let numbers = numbers.with_context(|| format!("no numbers: {text}"))?;
            Ok(numbers.iter().sum())
        };
        Ok(Footprint {
            kernel: match guest.looks_for_leaks() {
                true => 0,
                false => sum("kernel")?,
            },
            anon: sum("anon")?,
            descriptors: sum("descriptors")?,
            threads: sum("threads")?,
            gpadls: guest.host().gpadls(),
        })
    }

    /// Whether so many rounds later nothing more is shared than there was, and nothing is open or runs that comes
    /// with each round. A few come and go with what the host asked for last: threads that sync or close, each
    /// with its socket, the notes of a backup, a plan. They become no more than [`Footprint::FEW`], however many
    /// rounds there are.
    fn has_no_more_than(&self, first: &Footprint, rounds: usize) -> bool {
        let few = Footprint::FEW.min(5 + rounds as u64 / 4);
        self.descriptors <= first.descriptors + few
            && self.threads <= first.threads + few
            && self.gpadls == first.gpadls
    }
}

/// Why what is to show that nothing leaks has one CPU.
const LEAKS: &str = "what each CPU keeps for itself hides a page that is lost in each round";

/// What a guest held after each round of the same.
#[derive(Default)]
struct Growth(Vec<Footprint>);

impl Growth {
    /// By so many KiB a round the kernel and the daemon may each grow in a long series on one CPU: less than
    /// one page. What is seen where neither leaks is about one.
    const EACH: f64 = 3.0;

    /// What each further CPU keeps for itself adds so much noise.
    const CPU: f64 = 6.0;

    /// A series is long from so many rounds on; in a shorter one noise counts for more.
    const LONG: usize = 24;
    const NOISE: f64 = 50.0;

    /// So many times as long as planned it is watched at most.
    const PATIENCE: u32 = 3;

    /// Goes so many rounds, and tells what has grown. What has grown by more than it may is watched for longer:
    /// what is taken once, such as the first pages of a thread's stack and heap, comes to its end, and a leak
    /// does not.
    fn over(
        &mut self,
        guest: &Guest,
        rounds: u32,
        mut once: impl FnMut(u32) -> Result<()>,
    ) -> Result<String> {
        let mut planned = rounds;
        let mut round = 0;
        loop {
            while round < planned {
                once(round)?;
                self.look(guest)?;
                round += 1;
            }
            match self.check(guest.machine().cpus) {
                Err(_) if planned < rounds * Growth::PATIENCE => planned += rounds.div_ceil(2),
                told => return told,
            }
        }
    }

    /// How many rounds it has been.
    fn rounds(&self) -> u32 {
        self.0.len() as u32
    }

    /// A round is over.
    fn look(&mut self, guest: &Guest) -> Result<()> {
        let mut now = Footprint::of(guest)?;
        if let Some(first) = self.0.first().copied() {
            // What a backup was made with may be closed behind it.
            let settled =
                guest.wait_until("nothing more is open or runs than at first", STEP, || {
                    now = Footprint::of(guest)?;
                    Ok(now.has_no_more_than(&first, self.0.len()))
                });
            let list = "for pid in $(pidof hv_vss_daemon hv_vss_guard); do
                            ls -l /proc/$pid/fd; cat /proc/$pid/task/*/comm; done";
            settled.with_context(|| {
                let open = guest.sh(list).unwrap_or_default();
                format!("at first {first:?}, now {now:?}: {open}")
            })?;
        }
        self.0.push(now);
        Ok(())
    }

    /// By how many KiB one of the two grows with each round: the median of what any two rounds say
    /// (Theil and Sen), which tells what comes and goes from what only comes. What the first of them take, such as pages
    /// for the log, and in a long series what the allocator keeps for each thread, is not taken again.
    fn per_round(&self, of: fn(&Footprint) -> u64) -> Result<f64> {
        let rounds = self.0.len();
        let settling = rounds.div_ceil(if rounds < Growth::LONG { 4 } else { 2 });
        let settled = self.0.iter().skip(settling);
        let settled: Vec<f64> = settled.map(|it| of(it) as f64).collect();
        let pairs = (0..settled.len()).flat_map(|at| (0..at).map(move |before| (before, at)));
        let slope = |(before, at): (usize, usize)| {
            let (then, now) = (settled.get(before)?, settled.get(at)?);
            Some((now - then) / (at - before) as f64)
        };
        let mut slopes: Vec<f64> = pairs.filter_map(slope).collect();
        slopes.sort_by(f64::total_cmp);
        let median = slopes.get(slopes.len() / 2).copied();
        median.context("too few rounds to tell a leak from noise")
    }

    /// The guest must not have grown; says what was seen.
    fn check(&self, cpus: u8) -> Result<String> {
        let kernel = self.per_round(|it| it.kernel)?;
        let daemon = self.per_round(|it| it.anon)?;
        let rounds = self.0.len();
        let open = self.0.last().map_or(0, |it| it.descriptors);
        let seen = format!(
            "{rounds} rounds, kernel {kernel:+.1} KiB each, daemon {daemon:+.1} KiB each, {open} descriptors"
        );
        let noise = match rounds >= Growth::LONG {
            true => 0.0,
            false => Growth::NOISE / rounds as f64,
        };
        let limit = Growth::EACH + Growth::CPU * f64::from(cpus - 1) + noise;
        ensure!(
            kernel <= limit && daemon <= limit,
            "the guest should not grow: {seen}; all: {:?}",
            self.0
        );
        Ok(seen)
    }
}

/// What a backup did to the writers that were running.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    /// What the host was told for FREEZE.
    freeze: u32,
    /// The writers that stood still after that, by file.
    still: Vec<String>,
    /// The writers that went on.
    moving: Vec<String>,
    /// What the host was told for THAW; `None` when FREEZE had failed.
    thaw: Option<u32>,
    /// The writers that had not gone on 5 s after that.
    stuck: Vec<String>,
}

/// One backup, with a look at every writer in between, as [`stands_still`] judges it.
fn observe(guest: &Guest) -> Result<Seen> {
    observe_backup_of(guest, &[])
}

/// The same, where the host backs up these disks.
fn observe_backup_of(guest: &Guest, disks: &[Lun]) -> Result<Seen> {
    let vss = guest.vss();
    let freeze = vss.freeze(disks, STEP)?.status();
    let (still, moving) = who_stands_still(guest)?;
    let thaw = match freeze {
        status::OK => Some(vss.thaw(STEP)?.status()),
        _ => None,
    };
    Ok(Seen {
        freeze,
        still,
        moving,
        thaw,
        stuck: stuck_writers(guest)?,
    })
}

/// The files of the writers that stand still, and of those that go on.
fn who_stands_still(guest: &Guest) -> Result<(Vec<String>, Vec<String>)> {
    let start = guest.writers()?;
    let (mut still, mut moving) = (Vec::new(), Vec::new());
    let mut last = Vec::new();
    let seen = guest.wait_until("every writer stands still or goes on", STEP, || {
        still.clear();
        moving.clear();
        last = guest.writers()?;
        for (then, now) in start.iter().zip(&last) {
            match stands_still(frozen_us(guest), then, now) {
                Some(true) => still.push(now.path.clone()),
                Some(false) => moving.push(now.path.clone()),
                None => {}
            }
        }
        Ok(still.len() + moving.len() == start.len())
    });
    seen.with_context(|| format!("after the answer {start:?}, now {last:?}"))?;
    Ok((still, moving))
}

/// So long no write takes that no freeze holds up, on a machine that is not busy elsewhere.
const UNFROZEN: Duration = Duration::from_millis(250);

/// A write that is older than this many microseconds is held up by a freeze: no other has been seen to take a
/// third of it. What a death leaves frozen was frozen before it, or at
/// once after it by a call that was under way, so it is far older when [`deadman::RELEASED`] is over.
fn frozen_us(guest: &Guest) -> u64 {
    guest.host().patience(UNFROZEN).as_micros() as u64
}

/// Whether a freeze holds up this writer now.
fn is_frozen(guest: &Guest, writer: &Writer) -> bool {
    writer.in_write_us > frozen_us(guest)
}

/// Whether one holds up each.
fn all_frozen(guest: &Guest) -> Result<bool> {
    Ok(guest.writers()?.iter().all(|it| is_frozen(guest, it)))
}

/// Whether a writer has stood still since the look `then`: it has been inside one write for longer than that, and no other write
/// has ended but the one that was under way. It has gone on when ten more have ended, wherever it is now. Of one
/// that has done neither nothing is known yet.
fn stands_still(frozen_us: u64, then: &Writer, now: &Writer) -> Option<bool> {
    let ended = now.count.saturating_sub(then.count);
    match () {
        () if ended > 10 => Some(false),
        () if ended <= 1 && now.in_write_us > frozen_us => Some(true),
        () => None,
    }
}

/// The writers that do not go on within 5 s, by file: none of whose writes ends well.
pub fn stuck_writers(guest: &Guest) -> Result<Vec<String>> {
    stuck_writers_of(guest, |_| true)
}

/// The same of those whose file is meant.
fn stuck_writers_of(guest: &Guest, is_meant: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let start = guest.writers()?;
    let end = guest.clock()? + guest.host().patience(Duration::from_secs(5)).as_micros() as u64;
    loop {
        let pairs = guest.writers()?;
        let pairs = start.iter().zip(&pairs);
        let stuck: Vec<String> = pairs
            .filter(|(then, now)| now.count == then.count && is_meant(&now.path))
            .map(|(_, now)| now.path.clone())
            .collect();
        if stuck.is_empty() || guest.clock()? > end {
            return Ok(stuck);
        }
    }
}

/// Whether a writer has stood still for a freeze of a second: the slower the machine, the later it comes to the
/// write that is held up, but no other takes half of that.
fn stood_for_a_second(guest: &Guest, writer: &Writer) -> bool {
    let second = Duration::from_secs(1);
    let late = guest.host().patience(second / 10).min(second / 2);
    Duration::from_micros(writer.longest_us) > second - late
}

/// A good backup: both answered 0, all of these stood still, all went on.
fn good(still: &[&str]) -> Seen {
    Seen {
        freeze: status::OK,
        still: still.iter().map(|it| it.to_string()).collect(),
        moving: Vec::new(),
        thaw: Some(status::OK),
        stuck: Vec::new(),
    }
}

/// The two in words, for the comparison.
fn describe(seen: &Seen) -> String {
    let told = e2e::check::status_name(seen.freeze);
    let mut text = format!("FREEZE {told}");
    for (paths, what) in [(&seen.still, "frozen"), (&seen.moving, "not frozen")] {
        if !paths.is_empty() {
            text.push_str(&format!(", {what}: {}", paths.join(" ")));
        }
    }
    if let Some(thaw) = seen.thaw {
        text.push_str(&format!("; THAW {}", e2e::check::status_name(thaw)));
    }
    if !seen.stuck.is_empty() {
        text.push_str(&format!(", still stuck: {}", seen.stuck.join(" ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_is_over_with_its_last_line() {
        let begun = "info: FREEZE from the host\ninfo: /mnt/a (ext4, 1:1) frozen, took 2 ms\n";
        assert_eq!(closed(begun), 0);
        let good = "info: THAW answered: all that was frozen is thawed, the backup is good\n";
        let failed = "error: FREEZE fails, nothing is left frozen: /mnt/a: EIO\n";
        assert_eq!(closed(&[begun, good, begun].concat()), 1);
        assert_eq!(closed(&[begun, good, begun, failed].concat()), 2);
    }

    #[test]
    fn who_has_written_after_the_answer_has_not_stood_still() {
        let writer = |count, in_write_us| Writer {
            path: "/w".into(),
            count,
            errors: 0,
            longest_us: in_write_us,
            in_write_us,
        };
        let seen = |count, in_write_us| {
            stands_still(300_000, &writer(100, 50), &writer(count, in_write_us))
        };
        assert_eq!(seen(100, 300_001), Some(true));
        // The write that was under way had hardly been counted.
        assert_eq!(seen(101, 300_001), Some(true));
        assert_eq!(seen(101, 200), None);
        // Frozen after the answer, not before it.
        assert_eq!(seen(102, 9_000_000), None);
        assert_eq!(seen(111, 9_000_000), Some(false));
        assert_eq!(seen(111, 0), Some(false));
    }

    #[test]
    fn what_is_known_is_known_of_a_case() {
        let names = all().into_iter().map(|case| case.name);
        let names: Vec<&str> = names.collect();
        let none: [&str; 0] = [];
        assert_eq!(e2e::known::of_none(names.iter().copied()), none);
    }

    #[test]
    fn a_leak_is_told_from_noise() {
        let growth = |kernel: &[u64]| {
            let footprint = |kernel: &u64| Footprint {
                kernel: *kernel,
                ..Footprint::default()
            };
            Growth(kernel.iter().map(footprint).collect())
        };
        // The first rounds do not count, and what comes and goes is no growth.
        let noise = growth(&[10, 8000, 9200, 9150, 9200, 9140, 9150, 9160]);
        assert!(noise.check(1).is_ok());
        // 20 KiB more each time in the same noise.
        let leak = growth(&[10, 8000, 9240, 9210, 9280, 9240, 9270, 9300]);
        assert!(leak.check(1).is_err());
        assert!(growth(&[1, 2]).check(1).is_err(), "nothing to tell from");
        // In a long series one page more each time is a leak, in noise as it was seen.
        let series = |page: u64| -> Vec<u64> {
            let noise = [12, 0, 4, 20, 8, 16];
            let round = |at: u64| 20_700 + noise[at as usize % noise.len()] + at + page * at;
            (0..24).map(round).collect()
        };
        assert!(growth(&series(0)).check(1).is_ok());
        assert!(growth(&series(4)).check(1).is_err());
        let mut daemon = growth(&[0; 24]);
        for (round, it) in (0..).zip(&mut daemon.0) {
            it.anon = 500 + 4 * round;
        }
        assert!(daemon.check(1).is_err());
    }

    #[test]
    fn a_descriptor_or_a_thread_more_in_each_round_is_one_too_many_and_so_is_a_ring() {
        let first = Footprint {
            descriptors: 20,
            threads: 5,
            gpadls: 1,
            ..Footprint::default()
        };
        let with = |descriptors, threads| Footprint {
            descriptors: first.descriptors + descriptors,
            threads: first.threads + threads,
            ..first
        };
        // The shortest series has eight rounds.
        assert!(!with(7, 0).has_no_more_than(&first, 7));
        assert!(!with(0, 7).has_no_more_than(&first, 7));
        assert!((0..24).all(|round| with(3, 2).has_no_more_than(&first, round)));
        // One in every second round is one too many in a long series.
        assert!((40..160).any(|round| !with(round as u64 / 2, 0).has_no_more_than(&first, round)));
        assert!((40..160).any(|round| !with(0, round as u64 / 2).has_no_more_than(&first, round)));
        for gpadls in [0, 2] {
            let other = Footprint { gpadls, ..first };
            assert!(!other.has_no_more_than(&first, 24));
        }
    }
}
