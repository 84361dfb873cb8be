// SPDX-License-Identifier: GPL-2.0-only

//! The daemon as a service: stock Debian with systemd, journald and rsyslog, all on the ext4 root
//! that is frozen, the daemon's own program and systemd's among it; that on the disk of the host's of
//! which it makes the backup.
//!
//! What the guest has of ours is what `make install` puts in place, enabled before it boots.

use super::disks::Attached;
use super::restore::stood_still;
use super::{Case, When};
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal, status_name};
use e2e::guest::{Guest, Machine, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::Reply;
use std::time::Duration;

pub const CASES: &[Case] = &[
    case(
        "systemd/backup",
        "started at boot; a good backup with journald, syslog and the daemon's program frozen, a watchdog \
         shorter than the freeze, and the log lines after it",
        backup,
    ).long(),
    case(
        "systemd/hook-out-of-memory",
        "the OOM killer takes what a hook has left running while all is frozen: the daemon goes on, and the backup is \
         good",
        hook_out_of_memory,
    ).long(),
    case(
        "systemd/stop",
        "systemctl stop and restart while frozen: all thawed, the host's THAW is failed",
        stop,
    ).long(),
    case(
        "systemd/daemon-killed",
        "kill -9 of the daemon while frozen: the guard outlives it and thaws, the service comes back",
        daemon_killed,
    ).long(),
    case(
        "systemd/both-killed",
        "kill -9 of daemon and guard while frozen: the unit's stop step thaws from a frozen root",
        both_killed,
    ).long(),
    case(
        "systemd/watchdog",
        "a stopped daemon is noticed by the watchdog while frozen: all thawed, restarted",
        watchdog,
    ).long(),
];

const fn case(name: &'static str, about: &'static str, run: fn(&Guest) -> Result<()>) -> Case {
    Case {
        name,
        about,
        machine: Machine::SYSTEMD,
        per_round: Duration::ZERO,
        when: When::Always,
        asks_our_module: false,
        compares: false,
        run,
    }
}

const UNIT: &str = "hv_vss.service";

/// The writer on the frozen root.
const WRITER: &str = "/var/tmp/writer";

/// What systemd says of the unit.
fn property(guest: &Guest, name: &str) -> Result<String> {
    let line = format!("systemctl show --property={name} --value {UNIT}");
    Ok(guest.sh(&line)?.trim().to_owned())
}

/// The daemon that runs, after its guard, if it has one.
fn all_of_it(guest: &Guest, daemon: i32) -> Result<String> {
    let mut all = super::deadman::children(guest, daemon)?;
    all.push(daemon);
    let all: Vec<String> = all.iter().map(i32::to_string).collect();
    Ok(all.join(" "))
}

/// Waits until the unit is active with another daemon than `old`, which has then registered, and
/// returns that daemon's process id.
fn wait_active(guest: &Guest, old: i32) -> Result<i32> {
    let look = format!("systemctl show --property=ActiveState,MainPID {UNIT}");
    let mut pid = 0;
    guest.wait_until("the unit is active", STEP, || {
        let text = guest.sh(&look)?;
        let found = text.lines().find_map(|it| it.strip_prefix("MainPID="));
        pid = found.map_or(Ok(0), str::parse)?;
        Ok(text.contains("ActiveState=active") && pid != 0 && pid != old)
    })?;
    Ok(pid)
}

/// The service as it is after boot, and as the device brings it when the last case took that away;
/// with a drop-in, and with somebody who writes to the root, to journal and to syslog. Returns the
/// daemon's process id.
fn begin(guest: &Guest, drop_in: &str) -> Result<i32> {
    if !drop_in.is_empty() {
        guest.sh(&format!(
            "mkdir -p /run/systemd/system/{UNIT}.d
             printf '[Service]\n{drop_in}\n' > /run/systemd/system/{UNIT}.d/test.conf
             systemctl daemon-reload"
        ))?;
    }
    guest.sh("modprobe hv_vss")?;
    let mut pid = wait_active(guest, 0)?;
    if !drop_in.is_empty() {
        guest.sh(&format!("systemctl restart {UNIT}"))?;
        pid = wait_active(guest, pid)?;
    }
    guest.vss().wait_open(STEP)?;
    guest.vss().agree(STEP)?;
    guest.writer_start(WRITER)?;
    guest.spawn(&["sh", "-c", "while :; do logger flood; sleep 0.2; done"])?;
    Ok(pid)
}

/// Back to a guest that the next case may have.
fn end(guest: &Guest) -> Result<()> {
    guest.writers_stop()?;
    guest
        .sh(&format!(
            "rm -rf /run/systemd/system/{UNIT}.d; systemctl daemon-reload
         systemctl stop {UNIT}"
        ))
        .map(drop)
}

/// FREEZE of a backup of the root's disk, and the look that the root stands: its writer has been inside one
/// write for 300 ms.
fn freeze(guest: &Guest) -> Result<Reply> {
    let disks = [Attached::root(guest)?.in_backup()];
    let freeze = guest.vss().freeze(&disks, STEP)?;
    answered("FREEZE", &freeze, status::OK)?;
    guest.wait_until("the root stands still", STEP, || {
        Ok(guest.writers()?.iter().all(|it| it.in_write_us > 300_000))
    })?;
    Ok(freeze)
}

/// Waits until the writer goes on.
fn thawed(guest: &Guest, who: &str) -> Result<()> {
    let then = guest.writers()?;
    guest.wait_until(&format!("{who}: the root is thawed"), STEP, || {
        let now = guest.writers()?;
        Ok(then.iter().zip(&now).all(|(t, n)| n.count > t.count + 10))
    })
}

/// The host's THAW, which must fail, and a backup that is good again.
fn recovered(guest: &Guest, who: &str) -> Result<()> {
    let vss = guest.vss();
    let thaw = vss.thaw(STEP)?.status();
    ensure!(
        thaw == status::FAIL,
        "{who}: THAW should fail, the host was told {}",
        status_name(thaw)
    );
    freeze(guest)?;
    answered("THAW of the next backup", &vss.thaw(STEP)?, status::OK)?;
    thawed(guest, "the next backup")
}

fn backup(guest: &Guest) -> Result<()> {
    let verified = guest.try_sh(&format!("systemd-analyze verify --man=no {UNIT} 2>&1"))?;
    equal(
        "systemd-analyze verify",
        (verified.status, verified.out.as_str()),
        (Some(0), ""),
    )?;
    equal(
        "enabled",
        guest.sh(&format!("systemctl is-enabled {UNIT}"))?.trim(),
        "enabled",
    )?;
    let pid = begin(guest, "WatchdogSec=3")?;
    let (host, disk) = (guest.host(), Attached::root(guest)?.disk);
    disk.start_log().context("cannot start the log")?;
    let frozen = freeze(guest)?;
    // The host takes its time, more than the watchdog allows for silence.
    std::thread::sleep(Duration::from_secs(7));
    let still = guest.writers()?.iter().all(|it| it.in_write_us > 6_000_000);
    ensure!(still, "the root was not frozen all the time");
    let thawing = host.now();
    answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;
    thawed(guest, "THAW")?;
    // Journal, syslog and whoever else has the disk: as the host saw it.
    stood_still(guest, &disk, &frozen, thawing)?;
    disk.stop_log();
    equal("the daemon", wait_active(guest, 0)?, pid)?;
    equal("restarts", property(guest, "NRestarts")?.as_str(), "0")?;
    guest.wait_until("the status tells how it went", STEP, || {
        Ok(property(guest, "StatusText")?.ends_with("backup 1 was good"))
    })?;
    for (place, look) in [
        ("the journal", "journalctl --quiet --boot --unit hv_vss"),
        ("syslog", "cat /var/log/syslog"),
    ] {
        guest.wait_until(&format!("{place} tells of the backup"), STEP, || {
            let text = guest.sh(look)?;
            Ok(text.contains("FREEZE answered: 1 frozen") && text.contains("the backup is good"))
        })?;
    }
    end(guest)
}

fn hook_out_of_memory(guest: &Guest) -> Result<()> {
    guest.sh(
        "mkdir -p /etc/hv_vss/hooks.d && cat >/etc/hv_vss/hooks.d/10-a <<'END'
#!/bin/sh
[ $1 = freeze ] || exit 0
sleep 4711 &
echo $! >/run/session
echo 1000 >/proc/$!/oom_score_adj
END
         chmod 755 /etc/hv_vss/hooks.d/10-a",
    )?;
    let pid = begin(guest, "")?;
    freeze(guest)?;
    guest.sh("echo f >/proc/sysrq-trigger")?;
    guest.wait_until("the OOM killer has taken it", STEP, || {
        let line = "! grep -q '^State:.[^ZX]' /proc/$(cat /run/session)/status 2>/dev/null";
        Ok(guest.try_sh(line)?.status == Some(0))
    })?;
    // By then whoever hears of it has done what it does.
    std::thread::sleep(guest.host().patience(Duration::from_secs(2)));
    answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;
    thawed(guest, "THAW")?;
    equal("the daemon", wait_active(guest, 0)?, pid)?;
    equal("restarts", property(guest, "NRestarts")?.as_str(), "0")?;
    guest.sh("rm -rf /etc/hv_vss /run/session")?;
    end(guest)
}

fn stop(guest: &Guest) -> Result<()> {
    let pid = begin(guest, "")?;
    freeze(guest)?;
    guest.sh(&format!("systemctl restart {UNIT}"))?;
    thawed(guest, "restart")?;
    wait_active(guest, pid)?;
    recovered(guest, "restart")?;
    // What went wrong stands out by its priority, and nothing else does.
    let errors = format!("journalctl --quiet --boot --priority err --unit {UNIT}");
    let text = guest.sh(&errors)?;
    ensure!(
        text.contains("the daemon was stopped: thawing before the host said so")
            && text.contains("THAW from the host fails")
            && !text.contains("acknowledged"),
        "these are the errors in the journal:\n{text}"
    );
    freeze(guest)?;
    guest.sh(&format!("systemctl stop {UNIT}"))?;
    equal("after stop", property(guest, "Result")?.as_str(), "success")?;
    thawed(guest, "stop")?;
    guest.sh(&format!("systemctl start {UNIT}"))?;
    recovered(guest, "stop")?;
    end(guest)
}

fn daemon_killed(guest: &Guest) -> Result<()> {
    // Without the stop step only the module can thaw, or the guard.
    let pid = begin(guest, "ExecStopPost=")?;
    freeze(guest)?;
    guest.sh(&format!("kill -KILL {pid}"))?;
    thawed(guest, "kill -9 of the daemon")?;
    wait_active(guest, pid)?;
    recovered(guest, "kill -9 of the daemon")?;
    end(guest)
}

fn both_killed(guest: &Guest) -> Result<()> {
    // No next start comes to help.
    let pid = begin(guest, "Restart=no")?;
    let all = all_of_it(guest, pid)?;
    freeze(guest)?;
    // Stopped first, so that neither sees the other die.
    guest.sh(&format!("kill -STOP {all}; kill -KILL {all}"))?;
    thawed(guest, "kill -9 of both")?;
    guest.sh(&format!("systemctl start {UNIT}"))?;
    recovered(guest, "kill -9 of both")?;
    end(guest)
}

fn watchdog(guest: &Guest) -> Result<()> {
    let pid = begin(guest, "WatchdogSec=2")?;
    freeze(guest)?;
    guest.sh(&format!("kill -STOP {pid}"))?;
    thawed(guest, "a stopped daemon")?;
    wait_active(guest, pid)?;
    let text = guest.sh("journalctl --quiet --boot --unit hv_vss")?;
    ensure!(
        text.contains("Watchdog timeout"),
        "the journal does not tell of the watchdog:\n{text}"
    );
    recovered(guest, "a stopped daemon")?;
    end(guest)
}
