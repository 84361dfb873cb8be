// SPDX-License-Identifier: GPL-2.0-only

//! Nothing stays frozen, whoever dies and whenever, and the host is never told that a broken backup
//! is good.
//!
//! Moments are random: `e2e run --rounds N --seed S` sets how many and which. How long a writer
//! stood still is measured in the guest, by the writers themselves: the way from there to here takes
//! longer under emulation than what is to be measured.

use super::{
    all_frozen, case, frozen_us, good, good_backup, load, observe, rounds, rounds_or, seed, start,
    stop, stuck_writers, wait_for_daemon, wait_out, Case,
};
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal, status_name};
use e2e::guest::{Daemon, Guest, Module, Process, STEP};
use hyperv_sim::ic::status;
use lab_agent::{Frozen, Writer};
use std::time::Duration;

/// A case of so many rounds, each of which may take so many seconds.
pub(super) const fn rounds_of(
    seconds: u64,
    name: &'static str,
    about: &'static str,
    run: fn(&Guest) -> Result<()>,
) -> Case {
    Case {
        per_round: Duration::from_secs(seconds),
        ..case(name, about, run)
    }
}

pub const CASES: &[Case] = &[
    rounds_of(
        8,
        "deadman/daemon-killed",
        "kill -9 of all that is ours at random moments of a backup, our module",
        |guest| deaths(guest, Module::Ours, Death::All).map(drop),
    )
    .asking_our_module(),
    rounds_of(
        8,
        "deadman/daemon-killed-stock-module",
        "kill -9 of the daemon with the stock hv_utils: its guard thaws",
        |guest| deaths(guest, Module::Stock, Death::Daemon).map(drop),
    ),
    rounds_of(
        8,
        "deadman/daemon-aborted",
        "the daemon aborts (SIGABRT) at random moments of a backup",
        |guest| deaths(guest, guest.module(), Death::Abort).map(drop),
    ),
    rounds_of(
        8,
        "deadman/daemon-out-of-memory",
        "the OOM killer takes the daemon at random moments",
        |guest| out_of_memory(guest, Module::Ours),
    )
    .long()
    .asking_our_module(),
    rounds_of(
        8,
        "deadman/daemon-out-of-memory-stock-module",
        "the same with the stock hv_utils: it cannot take the guard",
        |guest| out_of_memory(guest, Module::Stock),
    )
    .long(),
    rounds_of(
        8,
        "deadman/guard-killed",
        "kill -9 of the guard at random moments of a backup, stock hv_utils",
        |guest| deaths(guest, Module::Stock, Death::Guard).map(drop),
    ),
    rounds_of(
        10,
        "deadman/both-killed",
        "daemon and guard killed at once, stock hv_utils: the stop step or the next start thaws",
        |guest| deaths(guest, Module::Stock, Death::Both).map(drop),
    ),
    rounds_of(
        10,
        "deadman/killed-in-a-hung-freeze",
        "kill -9 of all that is ours while a disk hangs: all but that one is thawed at once",
        killed_while_a_disk_hangs,
    )
    .asking_our_module(),
    rounds_of(
        12,
        "deadman/daemon-stopped",
        "SIGSTOP of the daemon at random moments, our module: thawed at the deadline",
        |guest| stopped(guest, Module::Ours),
    )
    .long()
    .asking_our_module(),
    rounds_of(
        12,
        "deadman/daemon-stopped-stock-module",
        "the same with the stock hv_utils: its guard thaws",
        |guest| stopped(guest, Module::Stock),
    )
    .long(),
    case(
        "deadman/killed-while-checked",
        "kill -9 of the daemon while frozen and called to check, with a security agent that logs to a frozen disk and \
         judges the open of its program: all is thawed at once",
        killed_while_checked,
    )
    .asking_our_module(),
    case(
        "deadman/both-killed-behind-an-agent",
        "the same with a security agent that logs to a frozen disk and judges the open of another: all is \
         thawed all the same",
        killed_behind_an_agent,
    ),
    case(
        "deadman/both-killed-and-a-btrfs-unmounted",
        "the same with a btrfs that was unmounted while frozen: its writer goes on after the next start",
        both_killed_and_a_btrfs_unmounted,
    ),
    case(
        "deadman/both-killed-then-a-rehearsal",
        "the same, and then a rehearsal: what they had frozen is thawed, not forgotten",
        both_killed_then_a_rehearsal,
    ),
    case(
        "deadman/rehearsal-killed-beside-a-daemon",
        "a rehearsal and its guard killed once a daemon serves, which is killed as well: what they had frozen is \
         thawed, not forgotten",
        rehearsal_killed_beside_a_daemon,
    ),
    case(
        "deadman/host-never-thaws",
        "thawed at the deadline, and the host's late THAW is failed",
        host_never_thaws,
    )
    .comparing(),
    case(
        "deadman/terminated-while-frozen",
        "SIGTERM while frozen thaws first; the host's THAW is failed",
        terminated_while_frozen,
    )
    .comparing()
    .long(),
];

/// The files of the writers: on two file systems and the root.
const FILES: [&str; 3] = ["/writer", "/mnt/a/w", "/mnt/b/w"];

/// How long after a death, or after a deadline, a file system may still be frozen.
pub(super) const RELEASED: Duration = Duration::from_secs(1);

/// The same for where it is told from a freeze that is over after `freeze` whatever the machine: less than that.
pub(super) fn held_up(guest: &Guest, freeze: Duration) -> Duration {
    Duration::from_micros(frozen_us(guest)).min(freeze)
}

/// How many rounds are not left to chance: death comes while all is frozen.
const WHILE_FROZEN: u32 = 2;

/// How many rounds do in the default run for what another case has, too.
pub(super) const FEW: u32 = 4;

/// Who dies how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Death {
    /// The daemon, by SIGKILL.
    Daemon,
    /// The daemon, by SIGABRT.
    Abort,
    /// The daemon, by the OOM killer.
    Memory,
    /// The guard, by SIGKILL.
    Guard,
    /// Both, by SIGKILL.
    Both,
    /// Whatever there is of ours, by SIGKILL.
    All,
}

impl Death {
    fn rounds(self) -> u32 {
        match self {
            Death::All => rounds(),
            _ => rounds_or(FEW),
        }
    }
}

/// When somebody was killed, on the guest's clock: not before the first, not after the second.
pub(super) type Moment = (u64, u64);

pub(super) fn make_writers(guest: &Guest) -> Result<()> {
    guest.sh(
        "mkdir -p /mnt/a /mnt/b && mkfs.ext4 -q -F /dev/ram1 && mkfs.ext4 -q -F /dev/ram2
              mount /dev/ram1 /mnt/a && mount /dev/ram2 /mnt/b",
    )?;
    for file in FILES {
        guest.writer_start(file)?;
    }
    Ok(())
}

/// All processes of a daemon: itself and whatever it has started that runs the same program. Its hooks are none: one
/// that is stopped ends by itself when the daemon is dead, since nobody could let its group go on.
pub(super) fn all_of_ours(guest: &Guest, daemon: &Process) -> Result<Vec<i32>> {
    let program = guest.sh(&format!("readlink /proc/{}/exe", daemon.pid))?;
    let mut pids = vec![daemon.pid];
    for pid in children(guest, daemon.pid)? {
        let its = guest.try_sh(&format!("readlink /proc/{pid}/exe"))?.out;
        pids.extend((its == program).then_some(pid));
    }
    Ok(pids)
}

/// What a process has started and has not reaped yet.
pub(super) fn children(guest: &Guest, pid: i32) -> Result<Vec<i32>> {
    // Each is of the thread that has started it, and threads end meanwhile.
    let line = format!("cat /proc/{pid}/task/[0-9]*/children 2>/dev/null; true");
    let listed = guest.sh(&line)?;
    let pids = listed.split_whitespace().map(str::parse);
    Ok(pids.collect::<Result<_, _>>()?)
}

/// The guard of a daemon on the stock module: its only child.
pub(super) fn guard_of(guest: &Guest, daemon: &Process) -> Result<i32> {
    let mut pid = None;
    guest.wait_until("the daemon has a guard", STEP, || {
        pid = match children(guest, daemon.pid)?[..] {
            [only] => Some(only),
            _ => None,
        };
        Ok(pid.is_some())
    })?;
    pid.context("no guard")
}

/// Sees to it that no writer stands still any more when `limit` has passed since `from_us` of the
/// guest's clock, and that each goes on: more of its writes end well. Later on a machine that is busy
/// elsewhere, as with every limit. Returns how long after `from_us` the last of those went on that stood
/// still then, zero when none did.
pub(super) fn released(
    guest: &Guest,
    what: &str,
    from_us: u64,
    limit: Duration,
) -> Result<Duration> {
    released_by(guest, what, from_us, guest.host().patience(limit))
}

/// The same after the deadline in the daemon's configuration: only what comes on top of that grows with the machine.
pub(super) fn released_at(
    guest: &Guest,
    what: &str,
    from_us: u64,
    deadline: Duration,
) -> Result<Duration> {
    released_by(
        guest,
        what,
        from_us,
        deadline + guest.host().patience(RELEASED),
    )
}

fn released_by(guest: &Guest, what: &str, from_us: u64, limit: Duration) -> Result<Duration> {
    let frozen_us = frozen_us(guest);
    let mark = from_us + limit.as_micros() as u64;
    let mut seen = guest.stalls(from_us)?;
    while seen.now_us <= mark {
        std::thread::sleep(Duration::from_micros(mark + 1 - seen.now_us));
        seen = guest.stalls(from_us)?;
    }
    let mut last = from_us;
    for stall in &seen.stalls {
        let ended = stall.ended_us.unwrap_or(seen.now_us);
        ensure!(
            stall.began_us + frozen_us > mark || ended <= mark,
            "{what}: {limit:?} later {} is still frozen (for {} ms now, thawed: {})",
            stall.path,
            (ended - stall.began_us) / 1000,
            stall.ended_us.is_some()
        );
        if stall.began_us < from_us + frozen_us {
            last = last.max(ended);
        }
    }
    // Whose writes fail at once stands nowhere, and does not go on either.
    equal(what, stuck_writers(guest)?, Vec::new())?;
    Ok(Duration::from_micros(last - from_us))
}

/// Who stood still at `at_us` of the guest's clock for a freeze, and did so for longer than a death may leave frozen.
fn left_frozen(guest: &Guest, at_us: u64) -> Result<Vec<String>> {
    let limit = guest.host().patience(RELEASED).as_micros() as u64;
    let seen = guest.stalls(at_us)?;
    // No other write takes a third of that.
    let held_up_us = frozen_us(guest) / 3;
    let left = seen.stalls.into_iter().filter(|it| {
        let ended = it.ended_us.unwrap_or(seen.now_us);
        it.began_us + held_up_us < at_us && ended > at_us + limit
    });
    Ok(left.map(|it| it.path).collect())
}

/// Thaws the file system at `path` if it is frozen for anybody, and says whether it was.
pub(super) fn was_left_frozen(guest: &Guest, path: &str) -> Result<bool> {
    Ok(guest.ask_frozen(path)? != Frozen::No)
}

/// Makes and mounts an ext4 on `/mnt/hung` whose disk [hangs](HANG) when told to. It has no barriers,
/// so that a sync of what is clean has nothing to wait for: what a freeze writes in any case is its
/// superblock.
pub(super) fn make_hung(guest: &Guest) -> Result<()> {
    make_hung_disk(guest, "/dev/ram4", 64)?;
    guest
        .sh("mkfs.ext4 -q -F /dev/mapper/hung &&
             mount -o barrier=0 /dev/mapper/hung /mnt/hung && sync")
        .map(drop)
}

/// Makes that disk, of the first so many MiB of another, and the place for it.
pub(super) fn make_hung_disk(guest: &Guest, of: &str, mib: u64) -> Result<()> {
    let blocks = mib << 11;
    guest
        .sh(&format!(
            "modprobe dm-mod; mkdir -p /mnt/hung
             dmsetup create hung --noudevsync --table '0 {blocks} linear {of} 0' &&
             {{ [ -e /dev/mapper/hung ] || dmsetup mknodes; }}"
        ))
        .map(drop)
}

/// Unmounts it, and takes the disk away.
pub(super) fn remove_hung(guest: &Guest) -> Result<()> {
    guest
        .sh("umount /mnt/hung && dmsetup remove hung")
        .map(drop)
}

/// Leaves 4 MiB to be written back below `path`. A file that is overwritten ext4 would begin to write at once.
pub(super) fn make_dirty(guest: &Guest, path: &str) -> Result<()> {
    let file = format!("{path}/dirty");
    guest
        .sh(&format!(
            "rm -f {file}; dd if=/dev/zero of={file} bs=1M count=4 2>/dev/null"
        ))
        .map(drop)
}

/// Its disk is dead from now on until [`UNHANG`]: whatever is written to it or read from it waits.
pub(super) const HANG: &str = "dmsetup suspend --noflush --nolockfs hung";
/// Also the end of [`hang_writes`].
pub(super) const UNHANG: &str = "dmsetup suspend --noflush --nolockfs hung && dmsetup resume hung";

/// What is written to that disk waits, and what is read from it is there: so it hangs in a freeze, although it answers
/// whoever asks it before. A kernel that was built without a delay has our module, which asks nobody.
pub(super) fn hang_writes(disk: &str) -> String {
    // An hour. What waits is let go when it is suspended, and then it is as it was.
    format!(
        "dmsetup suspend --noflush --nolockfs {disk} &&
         if modprobe dm-delay 2>/dev/null; then
             table=$(dmsetup table {disk}) && node=${{table##*linear }} &&
             dmsetup load {disk} --table \"${{table%%linear *}}delay $node 0 $node 3600000\" &&
             dmsetup resume {disk} && dmsetup load {disk} --table \"$table\"
         fi"
    )
}

/// What the host was told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Told {
    /// The answer to THAW and the guest's clock before it was sent; `None` when FREEZE had failed,
    /// for then the host asks for none.
    thaw: Option<(u32, u64)>,
}

impl Told {
    pub(super) fn is_good(&self) -> bool {
        matches!(self.thaw, Some((status::OK, _)))
    }

    /// Whether FREEZE had succeeded.
    pub(super) fn was_frozen(&self) -> bool {
        self.thaw.is_some()
    }

    /// Whether a backup that the guest had called frozen broke before its THAW was sent.
    fn broke_while_frozen(&self, moment: Moment) -> bool {
        let sent = self.thaw.filter(|(thaw, _)| *thaw != status::OK);
        sent.is_some_and(|(_, sent)| moment.1 < sent)
    }
}

/// One backup while something happens to the guest. Between FREEZE and THAW there is `meanwhile`. A backup that is
/// called good must have been frozen for all of it.
pub(super) fn backup_in_trouble(guest: &Guest, meanwhile: impl FnOnce()) -> Result<Told> {
    let vss = guest.vss();
    let freeze = vss.freeze(&[], STEP)?.status();
    if freeze != status::OK {
        return Ok(Told { thaw: None });
    }
    let first = guest.writers()?;
    // The host takes its snapshot.
    meanwhile();
    let last = guest.writers()?;
    let sent = guest.clock()?;
    let thaw = vss.thaw(STEP)?.status();
    if thaw == status::OK {
        for (first, last) in first.iter().zip(&last) {
            // One write may have returned just before the freeze and been counted after the first look.
            ensure!(
                last.count <= first.count + 1,
                "the host was told that the backup is good, but {} was written {} times while frozen",
                last.path,
                last.count - first.count
            );
        }
    }
    Ok(Told {
        thaw: Some((thaw, sent)),
    })
}

/// One backup, and what `strike` does meanwhile: while all is frozen, and THAW comes after it, or else the host's thread
/// does not wait for it and takes its time, `hold`.
fn backup_and<T: Send>(
    guest: &Guest,
    frozen: bool,
    hold: Duration,
    strike: impl FnOnce() -> Result<T> + Send,
) -> Result<(Told, T)> {
    if !frozen {
        return std::thread::scope(|scope| {
            let strike = scope.spawn(strike);
            let told = backup_in_trouble(guest, || std::thread::sleep(hold));
            let struck = strike.join();
            let struck = struck.map_err(|_| anyhow::anyhow!("who strikes panicked"))?;
            Ok((told?, struck?))
        });
    }
    let mut struck = None;
    let told = backup_in_trouble(guest, || {
        let still = guest.wait_until("all stand still", STEP, || {
            let still = |it: &Writer| it.in_write_us > 100_000;
            Ok(guest.writers()?.iter().all(still))
        });
        struck = Some(still.and_then(|()| strike()));
    })?;
    let struck = struck.context("FREEZE failed with nothing in its way")??;
    ensure!(
        told.was_frozen() && !told.is_good(),
        "all was frozen by then, and the host was told that the backup is good"
    );
    Ok((told, struck))
}

/// How the backups went and how long the writers stood still after the deaths.
#[derive(Default)]
pub(super) struct Tally {
    good: u32,
    thaw_failed: u32,
    freeze_failed: u32,
    /// Of the rounds in which a writer stood still at the death.
    released: Vec<Duration>,
}

impl Tally {
    fn add(&mut self, told: &Told, released: Duration) {
        match told {
            told if told.is_good() => self.good += 1,
            Told { thaw: Some(_), .. } => self.thaw_failed += 1,
            Told { thaw: None, .. } => self.freeze_failed += 1,
        }
        if !released.is_zero() {
            self.released.push(released);
        }
    }

    /// Of a round whose FREEZE had to fail.
    pub(super) fn freeze_failed(&mut self, released: Duration) {
        self.add(&Told { thaw: None }, released);
    }

    pub(super) fn print(mut self, after: &str) {
        self.released.sort();
        let last = self.released.len().saturating_sub(1);
        let at = |percent: usize| {
            let released = self.released.get(last * percent / 100);
            released.copied().unwrap_or_default().as_millis()
        };
        println!(
            "     {} rounds, seed {}: good {}, THAW failed {}, FREEZE failed {}, wrong answers 0; \
             frozen 1 s after {after}: 0; of {} writers stood still, until {} ms after it \
             (median; 99 %: {} ms; longest: {} ms)",
            self.good + self.thaw_failed + self.freeze_failed,
            seed(),
            self.good,
            self.thaw_failed,
            self.freeze_failed,
            self.released.len(),
            at(50),
            at(99),
            at(100)
        );
    }
}

/// Where the daemon and its guard live when the OOM killer is to take them.
pub(super) const GROUP: &str = "/sys/fs/cgroup/vss";

fn start_daemon(guest: &Guest, death: Death) -> Result<Process> {
    let enter = match death {
        Death::Memory => {
            guest.write(&format!("{GROUP}/memory.max"), "max")?;
            format!("echo $$ >{GROUP}/cgroup.procs")
        }
        // With a dump of core as large as it likes, which would go to the frozen root.
        Death::Abort => "ulimit -c unlimited && cd /".to_owned(),
        _ => return guest.start_daemon(Daemon::Ours),
    };
    let [program, foreground] = Daemon::Ours.argv();
    guest.spawn(&[
        "sh",
        "-c",
        &format!("{enter} && exec {program} {foreground}"),
    ])
}

/// Who is to die.
fn victims(guest: &Guest, daemon: &Process, death: Death) -> Result<Vec<i32>> {
    Ok(match death {
        Death::Daemon | Death::Abort | Death::Memory => vec![daemon.pid],
        Death::Guard => vec![guard_of(guest, daemon)?],
        // The guard goes first: once its parent is dead the kernel lets it go on (an orphaned group).
        Death::Both => vec![guard_of(guest, daemon)?, daemon.pid],
        Death::All => all_of_ours(guest, daemon)?,
    })
}

/// Kills them as `death` says.
pub(super) fn strike(guest: &Guest, victims: &[i32], death: Death) -> Result<Moment> {
    let signal = match death {
        Death::Daemon | Death::Guard => 9,
        Death::Abort => 6,
        Death::Both | Death::All => {
            // Stopped first, so that none sees another die, whoever runs in between.
            let at = guest.signal_all(victims, 19)?;
            return Ok((at, guest.signal_all(victims, 9)?));
        }
        Death::Memory => {
            let before = guest.clock()?;
            // There is nothing to reclaim, since all of it is locked: whoever can be killed is.
            guest.write(&format!("{GROUP}/memory.max"), "0")?;
            return Ok((before, guest.clock()?));
        }
    };
    let at = guest.signal_all(victims, signal)?;
    Ok((at, at))
}

/// Lets them die in every round, and returns the daemon that is left.
fn deaths(guest: &Guest, module: Module, death: Death) -> Result<Process> {
    make_writers(guest)?;
    load(guest, module, super::short_grace(module))?;
    let mut daemon = start_daemon(guest, death)?;
    wait_for_daemon(guest)?;
    // As long as a daemon's first backup takes, the host holds it at most; so the moments of death
    // range over the freeze, the time frozen and the thaw.
    let span = good_backup(guest)?;
    let mut random = fastrand::Rng::with_seed(seed());
    let mut tally = Tally::default();
    for round in 1..=death.rounds() {
        let (mut delay, mut hold) = (span.mul_f64(random.f64() * 2.0), span.mul_f64(random.f64()));
        let frozen = round <= WHILE_FROZEN;
        if frozen {
            (delay, hold) = (Duration::ZERO, Duration::ZERO);
        }
        let victims = victims(guest, &daemon, death)?;
        let what = match frozen {
            true => format!("round {round}, {death:?} struck while all was frozen"),
            false => format!("round {round}, {death:?} struck {delay:?} after FREEZE was sent"),
        };
        // The one who kills also looks after the writers, while the host waits for its answers.
        // Nobody can thaw when both are dead, so then that comes later.
        let killer = || -> Result<(Moment, Result<Duration>)> {
            std::thread::sleep(delay);
            let moment = strike(guest, &victims, death)?;
            let took = match death {
                Death::Both => Ok(Duration::ZERO),
                _ => released(guest, &what, moment.1, RELEASED),
            };
            Ok((moment, took))
        };
        let struck = backup_and(guest, frozen, hold, killer);
        let (told, (moment, took)) = struck.with_context(|| what.clone())?;
        let mut took = match took {
            // On a slow machine it was replaced before the daemon had read FREEZE, and the new one minds that: then
            // nothing was frozen at the death, and all of it goes on since THAW.
            Err(error) if death == Death::Guard && !frozen && told.is_good() => {
                let left = left_frozen(guest, moment.1)?;
                if !left.is_empty() {
                    return Err(error.context(format!("{what}, {left:?} stood still before")));
                }
                released(guest, &what, guest.clock()?, RELEASED)?;
                Duration::ZERO
            }
            took => took.with_context(|| what.clone())?,
        };
        if death != Death::Guard {
            let ended = guest.wait(&daemon, STEP)?;
            let signal = if death == Death::Abort { 6 } else { 9 };
            equal(
                "the signal that ended the daemon",
                ended.signal,
                Some(signal),
            )?;
            if death == Death::Both && round % 2 == 1 {
                // What the unit has as its stop step.
                guest.sh("/payload/hv_vss_daemon thaw")?;
                took = released(guest, &what, guest.clock()?, RELEASED)?;
            }
            daemon = start_daemon(guest, death)?;
        }
        wait_for_daemon(guest)?;
        if death == Death::Both && round % 2 == 0 {
            took = released(guest, &what, guest.clock()?, RELEASED)?;
        }
        if told.broke_while_frozen(moment) {
            // However late the host asks and whoever answers.
            let late = guest.vss().thaw(STEP)?;
            answered("THAW of the broken backup, later", &late, status::FAIL)
                .with_context(|| what.clone())?;
        }
        tally.add(&told, took);
    }
    tally.print(match death {
        Death::Both => "the stop step or the next start",
        _ => "the death",
    });
    equal("the backup at the end", observe(guest)?, good(&FILES))?;
    Ok(daemon)
}

fn killed_behind_an_agent(guest: &Guest) -> Result<()> {
    make_writers(guest)?;
    let vss = guest.vss();
    load(guest, Module::Stock, &[])?;
    let daemon = start_daemon(guest, Death::Both)?;
    wait_for_daemon(guest)?;
    guest.watch_opens("/mnt/b", Some("/mnt/a/opens"))?;
    let victims = victims(guest, &daemon, Death::Both)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.wait_until("all stand still", STEP, || all_frozen(guest))?;
    strike(guest, &victims, Death::Both)?;
    guest.wait(&daemon, STEP)?;
    // The open of the one hangs behind the freeze of the other.
    let thaw = guest.spawn(&["/payload/hv_vss_daemon", "thaw"])?;
    let what = "the stop step behind an agent";
    released(guest, what, guest.clock()?, RELEASED * 3)?;
    equal(what, guest.wait(&thaw, STEP)?.status, Some(0))?;
    let opens = guest.read("/mnt/a/opens")?;
    ensure!(
        opens.contains(&format!("opened by {}", thaw.pid)),
        "the agent should have judged the open of the thaw, it saw: {opens}"
    );
    let daemon = start_daemon(guest, Death::Both)?;
    wait_for_daemon(guest)?;
    answered("THAW, later", &vss.thaw(STEP)?, status::FAIL)?;
    good_backup(guest)?;
    guest.release_opens()?;
    stop(guest, Module::Stock, &daemon)
}

/// What the daemon has open a child that it has just started has as well, unless it has been seen to; and here that
/// does not come to be another program before the daemon is dead.
fn killed_while_checked(guest: &Guest) -> Result<()> {
    const PROGRAM: &str = "/mnt/b/hv_vss_daemon";
    make_writers(guest)?;
    guest.writers_stop()?;
    guest.writer_start("/mnt/a/w")?;
    // Another that stays, so that the agent's file is on one that is frozen and the program's is not.
    guest.sh("umount /mnt/b && mount -t tmpfs none /mnt/b && cp /payload/hv_vss_daemon /mnt/b/")?;
    load(guest, Module::Ours, &[])?;
    let daemon = guest.spawn(&[PROGRAM, "run", "-n"])?;
    wait_for_daemon(guest)?;
    good_backup(guest)?;
    guest.watch_opens("/mnt/b", Some("/mnt/a/opens"))?;
    let vss = guest.vss();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    let frozen_us = frozen_us(guest);
    guest.wait_until("all stand still", STEP, || {
        Ok(guest.writers()?.iter().all(|it| it.in_write_us > frozen_us))
    })?;
    let (socket, method) = ("/run/hv_vss/control", "org.hv-vss.Daemon.Check");
    let caller = guest.spawn(&["/payload/lab-agent", "ask", socket, method])?;
    guest.wait_until("it is called", STEP, || {
        Ok(all_of_ours(guest, &daemon)?.len() > 1)
    })?;
    let (killed, _) = strike(guest, &[daemon.pid], Death::Daemon)?;
    released(guest, "kill -9", killed, RELEASED)?;
    guest.wait(&daemon, STEP)?;
    guest.release_opens()?;
    // With the daemon its line has ended.
    guest.wait(&caller, STEP)?;
    let daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    answered("THAW, later", &vss.thaw(STEP)?, status::FAIL)?;
    good_backup(guest)?;
    stop(guest, Module::Ours, &daemon)?;
    guest.sh("umount /mnt/b").map(drop)
}

fn out_of_memory(guest: &Guest, module: Module) -> Result<()> {
    guest.sh(&format!(
        "mount -t cgroup2 none /sys/fs/cgroup
         echo +memory >/sys/fs/cgroup/cgroup.subtree_control && mkdir {GROUP}"
    ))?;
    let daemon = deaths(guest, module, Death::Memory)?;
    let events = guest.read(&format!("{GROUP}/memory.events"))?;
    let kills = events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "));
    equal(
        "how many the OOM killer has taken",
        kills.and_then(|it| it.parse().ok()),
        Some(Death::Memory.rounds()),
    )?;
    let mut ours = vec![("daemon", daemon.pid)];
    if module == Module::Stock {
        let guard = guard_of(guest, &daemon)?;
        let score = guest.read(&format!("/proc/{guard}/oom_score_adj"))?;
        equal("oom_score_adj of the guard", score.trim(), "-1000")?;
        ours.push(("guard", guard));
    }
    for (who, pid) in ours {
        let locked = guest.sh(&format!("sed -n 's/^VmLck:[\t ]*//p' /proc/{pid}/status"))?;
        ensure!(
            locked.trim().ends_with(" kB") && !locked.starts_with("0 "),
            "the {who} should have its memory locked, VmLck is {locked}"
        );
    }
    guest.signal(&daemon, 15)?;
    guest.wait(&daemon, STEP)?;
    guest.wait_until("the group is empty", STEP, || {
        Ok(guest.try_sh(&format!("rmdir {GROUP}"))?.status == Some(0))
    })?;
    guest.sh("umount /sys/fs/cgroup").map(drop)
}

fn killed_while_a_disk_hangs(guest: &Guest) -> Result<()> {
    make_writers(guest)?;
    make_hung(guest)?;
    load(guest, Module::Ours, &["grace_ms=300"])?;
    let mut daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    let span = good_backup(guest)?;
    let vss = guest.vss();
    let mut random = fastrand::Rng::with_seed(seed());
    let (mut stood, mut longest) = (0, Duration::ZERO);
    let rounds = rounds_or(FEW);
    for round in 1..=rounds {
        let delay = match round {
            // In the freeze that hangs, while those beside it are held or let go to wait for it.
            ..=WHILE_FROZEN => None,
            _ => Some(span.mul_f64(random.f64() * 2.0)),
        };
        let what = format!("round {round}, killed {delay:?} after FREEZE was sent");
        let one = || -> Result<Duration> {
            guest.sh(&format!("sync && {HANG}"))?;
            let tx = vss.send_freeze(&[])?;
            match delay {
                Some(delay) => std::thread::sleep(delay),
                None => guest.wait_until("one freeze hangs", STEP, || {
                    let held = guest.held()?;
                    Ok(held.iter().any(|(_, state)| state == "freezing"))
                })?,
            }
            let victims = all_of_ours(guest, &daemon)?;
            let (at, _) = strike(guest, &victims, Death::All)?;
            let took = released(guest, "kill -9", at, RELEASED)?;
            // It can never have been frozen, for the host.
            answered("FREEZE", &vss.wait(tx, STEP)?, status::FAIL)?;
            answered("THAW", &vss.thaw(STEP)?, status::FAIL)?;
            guest.sh(UNHANG)?;
            guest.wait(&daemon, STEP)?;
            guest.wait_until("nothing is held any more", STEP, || {
                Ok(guest.held()?.is_empty())
            })?;
            guest.not_frozen("when the disk was back", &["/mnt/hung"])?;
            Ok(took)
        };
        let took = one().with_context(|| what.clone())?;
        stood += u32::from(!took.is_zero());
        longest = longest.max(took);
        daemon = guest.start_daemon(Daemon::Ours)?;
        wait_for_daemon(guest)?;
        good_backup(guest).with_context(|| format!("{what}: the next backup"))?;
    }
    println!(
        "     {} rounds, seed {}: writers stood still in {stood}, until {} ms after the death at most",
        rounds,
        seed(),
        longest.as_millis()
    );
    Ok(())
}

fn stopped(guest: &Guest, module: Module) -> Result<()> {
    // Long enough for a look at all writers in a good backup.
    const DEADLINE: Duration = Duration::from_secs(2);
    make_writers(guest)?;
    let silence: &[&str] = match module {
        // It gives up on a daemon that is silent for longer than this.
        Module::Ours => &["freeze_timeout_ms=4000", "timeout_ms=2500"],
        Module::Stock => &[],
    };
    load(guest, module, silence)?;
    let (daemon, deadline) = guest.start_daemon_within("deadline", DEADLINE)?;
    wait_for_daemon(guest)?;
    let span = good_backup(guest)?;
    let mut random = fastrand::Rng::with_seed(seed());
    let mut tally = Tally::default();
    for round in 1..=rounds_or(FEW) {
        let (mut delay, mut hold) = (span.mul_f64(random.f64() * 2.0), span.mul_f64(random.f64()));
        let frozen = round <= WHILE_FROZEN;
        if frozen {
            (delay, hold) = (Duration::ZERO, Duration::ZERO);
        }
        let what = match frozen {
            true => format!("round {round}, stopped while all was frozen"),
            false => format!("round {round}, stopped {delay:?} after FREEZE was sent"),
        };
        let stopper = || -> Result<(u64, Duration)> {
            std::thread::sleep(delay);
            let at = guest.signal_all(&[daemon.pid], 19)?;
            let took = released_at(guest, &what, at, deadline)?;
            if module == Module::Stock {
                // It waits for the daemon for minutes, and so would the host.
                guest.signal(&daemon, 18)?;
            }
            Ok((at, took))
        };
        let struck = backup_and(guest, frozen, hold, stopper);
        let (told, (at, took)) = struck.with_context(|| what.clone())?;
        ensure!(
            !frozen || !took.is_zero(),
            "{what}: nobody stood still until the deadline"
        );
        // The deadline counts from the first freeze.
        let limit = deadline + guest.host().patience(RELEASED);
        let seen = guest.stalls(at)?;
        for stall in seen.stalls {
            let ended = stall.ended_us.unwrap_or(seen.now_us);
            let stood = Duration::from_micros(ended - stall.began_us);
            ensure!(
                stood <= limit,
                "{what}: {} stood still for {stood:?}, it should be for {limit:?} at most",
                stall.path
            );
        }
        guest.signal(&daemon, 18)?;
        wait_for_daemon(guest)?;
        // What it had to say is too old by now; the next backup is good again.
        good_backup(guest).with_context(|| format!("{what}: the next backup"))?;
        tally.add(&told, took);
    }
    tally.print("the deadline");
    Ok(())
}

/// From then on nobody knows it by the number that it had.
fn both_killed_and_a_btrfs_unmounted(guest: &Guest) -> Result<()> {
    guest.sh(
        "modprobe btrfs; mkdir -p /mnt/a && mkfs.btrfs -q -f /dev/ram3 && mount -t btrfs /dev/ram3 /mnt/a",
    )?;
    guest.writer_start("/mnt/a/w")?;
    let daemon = start(guest, Module::Stock, Daemon::Ours)?;
    let guard = guard_of(guest, &daemon)?;
    let vss = guest.vss();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.sh("umount -l /mnt/a")?;
    guest.signal_all(&[daemon.pid, guard], 9)?;
    guest.wait(&daemon, STEP)?;
    let next = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    released(guest, "the next start", guest.clock()?, RELEASED)?;
    answered("THAW", &vss.thaw(STEP)?, status::FAIL)?;
    good_backup(guest)?;
    stop(guest, Module::Stock, &next)
}

fn both_killed_then_a_rehearsal(guest: &Guest) -> Result<()> {
    make_writers(guest)?;
    let daemon = start(guest, Module::Stock, Daemon::Ours)?;
    let guard = guard_of(guest, &daemon)?;
    let vss = guest.vss();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.signal_all(&[daemon.pid, guard], 9)?;
    guest.wait(&daemon, STEP)?;
    guest.sh("/payload/hv_vss_daemon freeze --for 100ms")?;
    released(guest, "a rehearsal", guest.clock()?, RELEASED)?;
    let next = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    answered("THAW", &vss.thaw(STEP)?, status::FAIL)?;
    good_backup(guest)?;
    stop(guest, Module::Stock, &next)
}

fn rehearsal_killed_beside_a_daemon(guest: &Guest) -> Result<()> {
    make_writers(guest)?;
    let rehearsal = begin_a_rehearsal(guest)?;
    let daemon = start(guest, Module::Stock, Daemon::Ours)?;
    kill_a_rehearsal(guest, &rehearsal)?;
    let vss = guest.vss();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    // Its guard thaws what is the daemon's.
    strike(guest, &[daemon.pid], Death::Daemon)?;
    guest.wait(&daemon, STEP)?;
    let next = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    released(guest, "the next start", guest.clock()?, RELEASED)?;
    answered("THAW", &vss.thaw(STEP)?, status::FAIL)?;
    good_backup(guest)?;
    stop(guest, Module::Stock, &next)?;
    // One that goes on to serve thaws it before it freezes.
    for &module in guest.modules() {
        let rehearsal = begin_a_rehearsal(guest)?;
        let daemon = start(guest, module, Daemon::Ours)?;
        kill_a_rehearsal(guest, &rehearsal)?;
        good_backup(guest)?;
        released(guest, "the next backup", guest.clock()?, RELEASED)?;
        stop(guest, module, &daemon)?;
    }
    Ok(())
}

/// A rehearsal without a daemon, by which all is frozen.
fn begin_a_rehearsal(guest: &Guest) -> Result<Process> {
    let rehearsal = guest.spawn(&["/payload/hv_vss_daemon", "freeze", "--for", "50s"])?;
    // Until then they may stand still because all is written back.
    guest.wait_until("the freeze is on record", STEP, || {
        Ok(guest.try_sh("test -e /run/hv_vss/frozen.json")?.status == Some(0))
    })?;
    guest.wait_until("all stand still", STEP, || all_frozen(guest))?;
    Ok(rehearsal)
}

/// Leaves all frozen by one that is dead, as its guard is, to the daemon that serves.
fn kill_a_rehearsal(guest: &Guest, rehearsal: &Process) -> Result<()> {
    let victims = victims(guest, rehearsal, Death::Both)?;
    strike(guest, &victims, Death::Both)?;
    guest.wait(rehearsal, STEP)?;
    guest.wait_until("it is undone", STEP, || {
        let out = guest.try_sh("/payload/hv_vss_daemon status --json")?.out;
        let status: serde_json::Value = serde_json::from_str(&out)?;
        Ok(status["daemon"]["refuses"].is_null())
    })
}

fn host_never_thaws(guest: &Guest) -> Result<()> {
    make_writers(guest)?;
    load(guest, guest.module(), &[])?;
    let (daemon, deadline) = guest.start_daemon_within("deadline", Duration::from_secs(2))?;
    wait_for_daemon(guest)?;
    let vss = guest.vss();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    let frozen = guest.clock()?;
    released_at(guest, "the deadline", frozen, deadline)?;
    // The deadline counts from the first freeze on; a writer may have come to it a little later.
    let stalls = guest.stalls(frozen)?.stalls;
    let lengths = stalls
        .iter()
        .filter_map(|it| Some(it.ended_us? - it.began_us));
    let longest = Duration::from_micros(lengths.max().unwrap_or_default());
    ensure!(
        longest > deadline / 2 && longest < deadline + guest.host().patience(RELEASED),
        "a writer stood still for {longest:?} at most, with a deadline of {deadline:?}"
    );
    let late = vss.thaw(STEP)?.status();
    equal("THAW after the deadline", late, status::FAIL)?;
    good_backup(guest)?;
    stop(guest, guest.module(), &daemon)?;

    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    answered("FREEZE with the peer", &vss.freeze(&[], STEP)?, status::OK)?;
    wait_out(guest, deadline * 2)?;
    // How long all have been standing still by now.
    let still = guest.writers()?.iter().map(|it| it.in_write_us).min();
    let still = Duration::from_micros(still.unwrap_or_default());
    answered("THAW with the peer", &vss.thaw(STEP)?, status::OK)?;
    stop(guest, Module::Stock, &daemon)?;
    guest.compare(
        &format!(
            "the host never thaws (deadline set to {} s)",
            deadline.as_secs()
        ),
        &format!(
            "thawed after {:.0} s, a late THAW {}",
            longest.as_secs_f64(),
            status_name(late)
        ),
        &if still > deadline * 3 / 2 {
            format!("still frozen after {:.0} s", still.as_secs_f64())
        } else {
            "thawed".to_owned()
        },
    );
    Ok(())
}

fn terminated_while_frozen(guest: &Guest) -> Result<()> {
    make_writers(guest)?;
    let module = guest.module();
    load(guest, module, super::short_grace(module))?;
    let vss = guest.vss();
    let daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    let at = guest.signal_all(&[daemon.pid], 15)?;
    released(guest, "SIGTERM while frozen", at, RELEASED)?;
    let ended = guest.wait(&daemon, STEP)?;
    equal("its exit status", ended.status, Some(0))?;
    let ours = vss.thaw(STEP)?.status();
    equal("THAW after it", ours, status::FAIL)?;
    guest.unload(module)?;
    vss.wait_closed(STEP)?;

    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    answered("FREEZE with the peer", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.signal(&daemon, 15)?;
    guest.wait(&daemon, STEP)?;
    let thaw = vss.thaw(STEP)?.status();
    let mut left = 0;
    for path in ["/mnt/a", "/mnt/b", "/"] {
        left += u32::from(was_left_frozen(guest, path)?);
    }
    guest.compare(
        "the daemon is stopped (SIGTERM) while frozen",
        &format!("thawed, THAW {}", status_name(ours)),
        &format!(
            "{left} of 3 file systems left frozen, THAW {}",
            status_name(thaw)
        ),
    );
    Ok(())
}
