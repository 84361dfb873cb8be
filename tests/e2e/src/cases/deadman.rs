// SPDX-License-Identifier: GPL-2.0-only

//! Nothing stays frozen, whoever dies and whenever, and the host is never told that a broken backup
//! is good.
//!
//! Moments are random: `e2e run --rounds N --seed S` sets how many and which.

use super::{case, load, observe, rounds, seed, start, stop, wait_for_daemon, Case};
use anyhow::{bail, ensure, Context, Result};
use e2e::check::{answered, equal, status_name};
use e2e::guest::{Daemon, Guest, Machine, Module, STEP};
use hyperv_sim::ic::status;
use lab_agent::Writer;
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[
    Case {
        name: "deadman/daemon-killed",
        about: "kill -9 of the daemon at random moments of a backup, our module",
        machine: Machine::ONE_CPU,
        per_round: Duration::from_secs(6),
        on_request: false,
        run: |guest| killed(guest, Module::Ours, Victim::Daemon),
    },
    Case {
        name: "deadman/daemon-killed-stock-module",
        about: "the same with the stock hv_utils",
        machine: Machine::ONE_CPU,
        per_round: Duration::from_secs(6),
        on_request: false,
        run: |guest| killed(guest, Module::Stock, Victim::Daemon),
    },
    Case {
        name: "deadman/guard-killed",
        about: "kill -9 of the guard at random moments of a backup",
        machine: Machine::ONE_CPU,
        per_round: Duration::from_secs(6),
        on_request: false,
        run: |guest| killed(guest, Module::Ours, Victim::Guard),
    },
    Case {
        name: "deadman/daemon-stopped",
        about: "SIGSTOP of the daemon at random moments: thawed at the deadline",
        machine: Machine::ONE_CPU,
        per_round: Duration::from_secs(12),
        on_request: false,
        run: stopped,
    },
    case(
        "deadman/both-killed",
        "daemon and guard killed at once: the stop step thaws, and so does the next start",
        both_killed,
    ),
    case(
        "deadman/host-never-thaws",
        "thawed at the deadline, and the host's late THAW is failed",
        host_never_thaws,
    ),
    case(
        "deadman/terminated-while-frozen",
        "SIGTERM while frozen thaws first; the host's THAW is failed",
        terminated_while_frozen,
    ),
    case(
        "deadman/hung-device",
        "a disk that hangs fails the backup in time and holds up nobody else",
        hung_device,
    ),
];

/// The files of the writers: on two file systems and the root.
const FILES: [&str; 3] = ["/writer", "/mnt/a/w", "/mnt/b/w"];

/// How long after a death a writer may still stand. The promise is one second; the rest is for the
/// emulation that the tests run in, where a single look at the writers can take that long.
const RELEASED: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Daemon,
    Guard,
}

fn make_writers(guest: &Guest) -> Result<()> {
    guest.sh(
        "mkdir -p /mnt/a /mnt/b && mkfs.ext4 -q -F /dev/ram1 && mkfs.ext4 -q -F /dev/ram2
              mount /dev/ram1 /mnt/a && mount /dev/ram2 /mnt/b",
    )?;
    for file in FILES {
        guest.writer_start(file)?;
    }
    Ok(())
}

/// The guard of the one daemon that runs.
fn guard_pid(guest: &Guest) -> Result<i32> {
    let mut pid = None;
    guest.wait_until("the daemon has a guard", STEP, || {
        pid = guest.try_sh("pidof hv_vss_guard")?.out.trim().parse().ok();
        Ok(pid.is_some())
    })?;
    pid.context("no guard")
}

/// Every writer must have gone on within [`RELEASED`] of `death`; returns how long it took.
fn released(guest: &Guest, what: &str, death: Instant, limit: Duration) -> Result<Duration> {
    let start = guest.writers()?;
    loop {
        let now = guest.writers()?;
        let took = death.elapsed();
        let stands = |(then, now): &(&Writer, &Writer)| then.count == now.count;
        let Some((_, stuck)) = start.iter().zip(&now).find(stands) else {
            return Ok(took);
        };
        if took > limit {
            bail!(
                "{what}: {} is still frozen {took:?} later; it should be for {limit:?} at most",
                stuck.path
            );
        }
    }
}

/// A clean backup, and how long it took the host.
fn good_backup(guest: &Guest) -> Result<Duration> {
    let vss = guest.vss();
    let start = Instant::now();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    Ok(start.elapsed())
}

/// One backup while something happens to the guest: what the host was told, `None` for a THAW that
/// it did not ask for. Between the two the host takes its time, `hold`. A backup that is called
/// good must have been frozen for all of it.
fn backup_in_trouble(guest: &Guest, hold: Duration) -> Result<(u32, Option<u32>)> {
    let vss = guest.vss();
    let freeze = vss.freeze(&[], STEP)?.status();
    if freeze != status::OK {
        return Ok((freeze, None));
    }
    let first = guest.writers()?;
    // The host takes its snapshot.
    std::thread::sleep(hold);
    let last = guest.writers()?;
    let thaw = vss.thaw(STEP)?.status();
    if thaw == status::OK {
        for (first, last) in first.iter().zip(&last) {
            ensure!(
                first.count == last.count,
                "the host was told that the backup is good, but {} was written while frozen",
                last.path
            );
        }
    }
    Ok((freeze, Some(thaw)))
}

fn killed(guest: &Guest, module: Module, victim: Victim) -> Result<()> {
    make_writers(guest)?;
    let parameters: &[&str] = match module {
        Module::Ours => &["grace_ms=300"],
        Module::Stock => &[],
    };
    load(guest, module, parameters)?;
    let mut daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    // As long as a daemon's first backup takes, the host holds it at most; so the moments of death
    // range over the freeze, the time frozen and the thaw.
    let span = good_backup(guest)?;
    let mut random = fastrand::Rng::with_seed(seed());
    let mut longest = Duration::ZERO;
    let mut told = [0, 0, 0];
    for round in 1..=rounds() {
        let (delay, hold) = (span.mul_f64(random.f64() * 2.0), span.mul_f64(random.f64()));
        let pid = match victim {
            Victim::Daemon => daemon.pid,
            Victim::Guard => guard_pid(guest)?,
        };
        let what = format!("round {round}, killed {delay:?} after FREEZE was sent");
        // The one who kills also looks after the writers, while the host waits for its answers.
        let (outcome, took) = std::thread::scope(|scope| {
            let killer = scope.spawn(|| {
                std::thread::sleep(delay);
                guest.signal_pid(pid, 9)?;
                released(guest, &what, Instant::now(), RELEASED)
            });
            let outcome = backup_in_trouble(guest, hold);
            (outcome, killer.join())
        });
        let took = took.map_err(|_| anyhow::anyhow!("the killer panicked"))?;
        longest = longest.max(took.with_context(|| what.clone())?);
        let outcome = outcome.with_context(|| what.clone())?;
        match outcome {
            (status::OK, Some(status::OK)) => told[0] += 1,
            (status::OK, _) => told[1] += 1,
            _ => told[2] += 1,
        }
        if victim == Victim::Daemon {
            guest.wait(&daemon, STEP)?;
            daemon = guest.start_daemon(Daemon::Ours)?;
        }
        wait_for_daemon(guest)?;
    }
    println!(
        "     {} rounds, seed {}: good {}, THAW failed {}, FREEZE failed {}; writers free again after {longest:?} at most",
        rounds(), seed(), told[0], told[1], told[2]
    );
    if victim == Victim::Guard {
        guard_pid(guest)?;
    }
    let seen = observe(guest)?;
    equal("FREEZE at the end", seen.freeze, status::OK)?;
    equal("THAW at the end", seen.thaw, Some(status::OK))?;
    equal(
        "writers that stood still at the end",
        seen.still.len(),
        FILES.len(),
    )
}

fn stopped(guest: &Guest) -> Result<()> {
    const DEADLINE: Duration = Duration::from_secs(2);
    make_writers(guest)?;
    // The module gives up on a daemon that is silent for longer than this.
    load(
        guest,
        Module::Ours,
        &["freeze_timeout_ms=8000", "timeout_ms=4000"],
    )?;
    let daemon = guest.start_daemon_with("deadline = 2")?;
    wait_for_daemon(guest)?;
    let span = good_backup(guest)?;
    let mut random = fastrand::Rng::with_seed(seed());
    for round in 1..=rounds().div_ceil(4) {
        let (delay, hold) = (span.mul_f64(random.f64() * 2.0), span.mul_f64(random.f64()));
        let what = format!("round {round}, stopped {delay:?} after FREEZE was sent");
        let (outcome, thawed) = std::thread::scope(|scope| {
            let stopper = scope.spawn(|| {
                std::thread::sleep(delay);
                guest.signal(&daemon, 19)?;
                released(guest, &what, Instant::now(), DEADLINE + RELEASED)
            });
            let outcome = backup_in_trouble(guest, hold);
            (outcome, stopper.join())
        });
        thawed.map_err(|_| anyhow::anyhow!("the stopper panicked"))??;
        outcome.with_context(|| what.clone())?;
        guest.signal(&daemon, 18)?;
        wait_for_daemon(guest)?;
        // What it had to say is too old by now; the next backup is good again.
        guest.wait_until("the next backup is good", STEP, || {
            Ok(good_backup(guest).is_ok())
        })?;
    }
    Ok(())
}

fn both_killed(guest: &Guest) -> Result<()> {
    make_writers(guest)?;
    load(guest, Module::Ours, &["grace_ms=300"])?;
    let vss = guest.vss();
    for remedy in ["the stop step", "the next start"] {
        let daemon = guest.start_daemon(Daemon::Ours)?;
        wait_for_daemon(guest)?;
        let guard = guard_pid(guest)?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        guest.wait_until("every writer stands still", STEP, || {
            Ok(guest.writers()?.iter().all(|it| it.in_write_us > 300_000))
        })?;
        // Stopped first, so that neither sees the other die.
        guest.sh(&format!(
            "kill -STOP {guard} {pid}; kill -KILL {guard} {pid}",
            pid = daemon.pid
        ))?;
        guest.wait(&daemon, STEP)?;
        ensure!(
            guest.writers()?.iter().all(|it| it.in_write_us > 300_000),
            "with both dead nobody should have thawed"
        );
        answered("THAW with both dead", &vss.thaw(STEP)?, status::FAIL)?;
        if remedy == "the stop step" {
            guest.sh("/payload/hv_vss_daemon thaw")?;
            released(guest, remedy, Instant::now(), RELEASED)?;
            continue;
        }
        guest.start_daemon(Daemon::Ours)?;
        wait_for_daemon(guest)?;
        released(guest, remedy, Instant::now(), RELEASED)?;
        answered("THAW with the next daemon", &vss.thaw(STEP)?, status::FAIL)?;
        good_backup(guest)?;
    }
    Ok(())
}

fn host_never_thaws(guest: &Guest) -> Result<()> {
    make_writers(guest)?;
    load(guest, Module::Ours, &[])?;
    let daemon = guest.start_daemon_with("deadline = 2")?;
    wait_for_daemon(guest)?;
    let vss = guest.vss();
    let sent = Instant::now();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    let frozen = Instant::now();
    let limit = Duration::from_secs(2) + RELEASED;
    released(guest, "a deadline of 2 s", frozen, limit)?;
    ensure!(
        sent.elapsed() > Duration::from_millis(1900),
        "thawed {:?} after FREEZE was sent, which is before the deadline of 2 s",
        sent.elapsed()
    );
    answered("THAW after the deadline", &vss.thaw(STEP)?, status::FAIL)?;
    good_backup(guest)?;
    stop(guest, Module::Ours, &daemon)?;

    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    answered("FREEZE with the peer", &vss.freeze(&[], STEP)?, status::OK)?;
    let end = Instant::now() + Duration::from_secs(4);
    guest.wait_until("4 s have passed", STEP, || Ok(Instant::now() > end))?;
    let stuck = guest.writers()?.iter().all(|it| it.in_write_us > 3_000_000);
    answered("THAW with the peer", &vss.thaw(STEP)?, status::OK)?;
    stop(guest, Module::Stock, &daemon)?;
    guest.compare(
        "the host never thaws (deadline set to 2 s)",
        "thawed after 2 s, a late THAW fails",
        if stuck {
            "still frozen after 4 s; it has no deadline"
        } else {
            "thawed"
        },
    );
    Ok(())
}

fn terminated_while_frozen(guest: &Guest) -> Result<()> {
    make_writers(guest)?;
    load(guest, Module::Ours, &["grace_ms=300"])?;
    let vss = guest.vss();
    let daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.signal(&daemon, 15)?;
    let ended = guest.wait(&daemon, STEP)?;
    equal("its exit status", ended.status, Some(0))?;
    released(guest, "SIGTERM while frozen", Instant::now(), RELEASED)?;
    answered("THAW after it", &vss.thaw(STEP)?, status::FAIL)?;
    guest.unload(Module::Ours)?;
    vss.wait_closed(STEP)?;

    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    answered("FREEZE with the peer", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.signal(&daemon, 15)?;
    guest.wait(&daemon, STEP)?;
    let thaw = vss.thaw(STEP)?.status();
    let mut left = 0;
    for path in ["/mnt/a", "/mnt/b", "/"] {
        left += u32::from(guest.thaw(path).is_ok());
    }
    guest.compare(
        "the daemon is stopped (SIGTERM) while frozen",
        "thawed, THAW 0x80004005 (failed)",
        &format!(
            "{left} of 3 file systems left frozen, THAW {}",
            status_name(thaw)
        ),
    );
    Ok(())
}

fn hung_device(guest: &Guest) -> Result<()> {
    guest.sh("modprobe dm-mod; mkdir -p /mnt/a /mnt/hung
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a
              dmsetup create hung --noudevsync --table '0 131072 linear /dev/ram2 0'
              [ -e /dev/mapper/hung ] || dmsetup mknodes
              mkfs.ext4 -q -F /dev/mapper/hung && mount /dev/mapper/hung /mnt/hung")?;
    guest.writer_start("/mnt/a/w")?;
    let hang = "dd if=/dev/zero of=/mnt/hung/dirty bs=1M count=4 2>/dev/null
                dmsetup suspend --noflush --nolockfs hung";
    let vss = guest.vss();

    load(guest, Module::Ours, &["freeze_timeout_ms=6000"])?;
    let daemon = guest.start_daemon_with("deadline = 3")?;
    wait_for_daemon(guest)?;
    guest.sh(hang)?;
    let tx = vss.send_freeze(&[])?;
    // The backup fails by itself while the disk still hangs, and the other file system is free.
    answered(
        "FREEZE with a hung disk",
        &vss.wait(tx, STEP)?,
        status::FAIL,
    )?;
    released(guest, "the failed FREEZE", Instant::now(), RELEASED)?;
    guest.sh("dmsetup resume hung")?;
    guest.wait_until("the next backup is good", STEP, || {
        Ok(good_backup(guest).is_ok())
    })?;
    stop(guest, Module::Ours, &daemon)?;

    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    guest.sh(hang)?;
    let tx = vss.send_freeze(&[])?;
    let end = Instant::now() + Duration::from_secs(5);
    guest.wait_until("5 s have passed", STEP, || Ok(Instant::now() > end))?;
    let stuck = guest.writers()?.iter().any(|it| it.in_write_us > 3_000_000);
    guest.sh("dmsetup resume hung")?;
    answered(
        "FREEZE with the peer after the disk came back",
        &vss.wait(tx, STEP)?,
        status::OK,
    )?;
    answered("THAW with the peer", &vss.thaw(STEP)?, status::OK)?;
    stop(guest, Module::Stock, &daemon)?;
    guest.compare(
        "one disk hangs (module's limit for FREEZE set to 6 s for ours)",
        "FREEZE 0x80004005 (failed), nobody else is held up",
        if stuck {
            "the other file system is frozen for as long as the disk hangs"
        } else {
            "the other file system is not held up"
        },
    );
    Ok(())
}
