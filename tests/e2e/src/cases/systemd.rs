// SPDX-License-Identifier: GPL-2.0-only

//! The daemon as a service: stock Debian with systemd, journald and rsyslog, all on the ext4 root
//! that is frozen, the daemon's own program and systemd's among it; that on the disk of the host's of
//! which it makes the backup.
//!
//! What the guest has of ours is what `make install` puts in place, enabled before it boots. Each case goes
//! through both ways to hold a freeze: our module, and guard and record on the stock one.

use super::disks::Attached;
use super::restore::stood_still;
use super::{all_frozen, Case, When};
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal, status_name};
use e2e::guest::{Guest, Machine, Module, STEP};
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
        "systemd/stop-amid-hooks",
        "systemctl stop while a hook is let go that takes longer than the stop may: each is called once, to its end, and \
         nothing is owed; with the daemon killed amid that it comes to its end all the same, and is called again",
        stop_amid_hooks,
    ).long(),
    case(
        "systemd/daemon-killed",
        "kill -9 of the daemon while frozen, without a stop step: the module thaws, or the guard, which outlives it; the \
         service comes back",
        daemon_killed,
    ).long(),
    case(
        "systemd/both-killed",
        "kill -9 of the daemon and its guard while frozen: the module thaws, or the unit's stop step from a frozen root",
        both_killed,
    ).long(),
    case(
        "systemd/watchdog",
        "a stopped daemon is noticed by the watchdog while frozen: all thawed, restarted",
        watchdog,
    ).long(),
    case(
        "systemd/not-configured",
        "with a configuration that is not valid the unit fails once, and serves again when somebody has mended that",
        not_configured,
    ).long(),
];

const fn case(name: &'static str, about: &'static str, run: fn(&Guest) -> Result<()>) -> Case {
    Case {
        name,
        about,
        machine: Machine::SYSTEMD,
        // systemd is slow in an emulated machine, and each goes through it twice.
        per_round: Duration::from_secs(15),
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

/// Keeps our module from being loaded, whoever asks: by name, by the soft dependency of `hv_utils`, by the
/// hand-over.
const BAR: &str =
    "mkdir -p /run/modprobe.d && echo 'install hv_vss /bin/false' >/run/modprobe.d/test.conf";

/// The service as it is after boot, and as the device of `module` brings it when the last case took that away;
/// with a drop-in, and with somebody who writes to the root, to journal and to syslog. Returns the
/// daemon's process id.
fn begin(guest: &Guest, module: Module, drop_in: &str) -> Result<i32> {
    if !drop_in.is_empty() {
        guest.sh(&format!(
            "mkdir -p /run/systemd/system/{UNIT}.d
             printf '[Service]\n{drop_in}\n' > /run/systemd/system/{UNIT}.d/test.conf
             systemctl daemon-reload"
        ))?;
    }
    match module {
        Module::Ours => guest.sh("modprobe hv_vss")?,
        Module::Stock => guest.sh(&format!("{BAR} && modprobe hv_utils"))?,
    };
    let mut pid = wait_active(guest, 0)?;
    if !drop_in.is_empty() {
        guest.sh(&format!("systemctl restart {UNIT}"))?;
        pid = wait_active(guest, pid)?;
    }
    guest.vss().wait_open(STEP)?;
    guest.vss().agree(STEP)?;
    let door = match module {
        Module::Ours => "held",
        Module::Stock => "fifreeze",
    };
    let mut said = serde_json::Value::Null;
    guest.wait_until("it has registered", STEP, || {
        said = serde_json::from_str(&guest.sh("hv_vss status --json")?)?;
        Ok(!said["daemon"]["door"].is_null())
    })?;
    equal(
        "how freezes are held",
        &said["daemon"]["door"],
        &door.into(),
    )?;
    guest.writer_start(WRITER)?;
    guest.spawn(&["sh", "-c", "while :; do logger flood; sleep 0.2; done"])?;
    Ok(pid)
}

/// Back to a guest that the next case may have, or the other module.
fn end(guest: &Guest, module: Module) -> Result<()> {
    guest.writers_stop()?;
    if module == Module::Stock {
        guest.sh("rm /run/modprobe.d/test.conf")?;
    }
    // Since the boot hv_utils has been there as well: one that is loaded takes no device that comes free.
    guest.sh(&format!(
        "rm -rf /run/systemd/system/{UNIT}.d; systemctl daemon-reload
         systemctl stop {UNIT}; modprobe -r hv_vss && modprobe -r hv_utils"
    ))?;
    Ok(guest.vss().wait_closed(STEP)?)
}

/// FREEZE of a backup of the root's disk, and the look that the root stands: its writer has been inside one
/// write for 300 ms.
fn freeze(guest: &Guest) -> Result<Reply> {
    let disks = [Attached::root(guest)?.in_backup()];
    let freeze = guest.vss().freeze(&disks, STEP)?;
    answered("FREEZE", &freeze, status::OK)?;
    guest.wait_until("the root stands still", STEP, || all_frozen(guest))?;
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
    for &module in guest.modules() {
        backup_by(guest, module)?;
    }
    Ok(())
}

fn backup_by(guest: &Guest, module: Module) -> Result<()> {
    let begun = guest.sh("date '+%F %T'")?;
    let pid = begin(guest, module, "WatchdogSec=3")?;
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
    let journal = format!(
        "journalctl --quiet --boot --unit hv_vss --since '{}'",
        begun.trim()
    );
    // syslog has that of each module in turn.
    let syslog = format!("grep -F 'hv_vss_daemon[{pid}]' /var/log/syslog");
    for (place, look) in [("the journal", journal), ("syslog", syslog)] {
        guest.wait_until(&format!("{place} tells of the backup"), STEP, || {
            let text = guest.try_sh(&look)?.out;
            Ok(text.contains("FREEZE answered: 1 frozen") && text.contains("the backup is good"))
        })?;
    }
    end(guest, module)
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
    let begun = guest.sh("date '+%F %T'")?;
    let pid = begin(guest, guest.module(), "")?;
    freeze(guest)?;
    guest.sh("echo f >/proc/sysrq-trigger")?;
    guest.wait_until("the OOM killer has taken it", STEP, || {
        let line = "! grep -q '^State:.[^ZX]' /proc/$(cat /run/session)/status 2>/dev/null";
        Ok(guest.try_sh(line)?.status == Some(0))
    })?;
    answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;
    thawed(guest, "THAW")?;
    // systemd says so when it does what it does about that, which it may come to only now that the root takes
    // the journal's lines.
    let said = format!(
        "journalctl --quiet --boot --unit {UNIT} --since '{}' | grep -F 'killed by the OOM killer'",
        begun.trim()
    );
    guest.wait_until("systemd has heard of it", STEP, || {
        Ok(guest.try_sh(&said)?.status == Some(0))
    })?;
    for (name, expected) in [
        ("MainPID", pid.to_string().as_str()),
        ("ActiveState", "active"),
        ("Result", "success"),
        ("NRestarts", "0"),
    ] {
        equal(name, property(guest, name)?.as_str(), expected)?;
    }
    guest.sh("rm -rf /etc/hv_vss /run/session")?;
    end(guest, guest.module())
}

fn stop(guest: &Guest) -> Result<()> {
    for &module in guest.modules() {
        let pid = begin(guest, module, "")?;
        freeze(guest)?;
        guest.sh(&format!("systemctl restart {UNIT}"))?;
        thawed(guest, "restart")?;
        let pid = wait_active(guest, pid)?;
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
        wait_active(guest, pid)?;
        recovered(guest, "stop")?;
        end(guest, module)?;
    }
    Ok(())
}

fn stop_amid_hooks(guest: &Guest) -> Result<()> {
    let module = guest.module();
    guest.sh(
        "mkdir -p /etc/hv_vss/hooks.d && cd /etc/hv_vss/hooks.d && cat >10-a <<'END' && cat >20-b <<'END'
#!/bin/sh
echo ${0##*/} $1 >>/run/notes
END
#!/bin/sh
echo ${0##*/} $1 >>/run/notes
[ $1 = freeze ] || { sleep 12; echo ${0##*/} is through >>/run/notes; }
END
         chmod 755 10-a 20-b",
    )?;
    begin(guest, module, "TimeoutStopSec=4")?;
    for is_killed in [false, true] {
        let pid = wait_active(guest, 0)?;
        freeze(guest)?;
        let stop = guest.spawn(&["systemctl", "stop", UNIT])?;
        if is_killed {
            let line = "grep -q '20-b thaw' /run/notes";
            guest.wait_until("it is let go", STEP, || {
                Ok(guest.try_sh(line)?.status == Some(0))
            })?;
            guest.sh(&format!("kill -KILL {pid}"))?;
        }
        equal(
            "systemctl stop",
            guest.wait(&stop, STEP * 2)?.status,
            Some(0),
        )?;
        // How that call ended nobody knows then.
        let (thaws, result) = match is_killed {
            true => (2, "signal"),
            false => (1, "success"),
        };
        let thaw = "20-b thaw\n20-b is through\n".repeat(thaws);
        equal(
            "what the hooks have noted",
            guest.sh("cat /run/notes; rm /run/notes")?.as_str(),
            format!("10-a freeze\n20-b freeze\n{thaw}10-a thaw\n").as_str(),
        )?;
        guest.sh("test ! -e /run/hv_vss/hooks.json")?;
        equal("how it ended", property(guest, "Result")?.as_str(), result)?;
        thawed(guest, "stop")?;
        guest.sh(&format!("systemctl start {UNIT}"))?;
        wait_active(guest, pid)?;
        recovered(guest, "stop")?;
        guest.wait_until("all hooks are let go", STEP, || {
            Ok(guest.try_sh("test ! -e /run/hv_vss/hooks.json")?.status == Some(0))
        })?;
        guest.sh("rm /run/notes")?;
    }
    guest.sh("rm -rf /etc/hv_vss")?;
    end(guest, module)
}

fn daemon_killed(guest: &Guest) -> Result<()> {
    for &module in guest.modules() {
        // Without the stop step only the module can thaw, or the guard; without a next start, too, which would do
        // the guard's work.
        let drop_in = match module {
            Module::Ours => "ExecStopPost=",
            Module::Stock => "ExecStopPost=\nRestart=no",
        };
        let pid = begin(guest, module, drop_in)?;
        let all = all_of_it(guest, pid)?;
        freeze(guest)?;
        match module {
            Module::Ours => guest.sh(&format!("kill -KILL {pid}"))?,
            Module::Stock => {
                // A guard that takes its time is left alone: it would be sent on, or killed, with the rest of the unit.
                let (guard, _) = all.split_once(' ').context("no guard")?;
                guest.sh(&format!("kill -STOP {guard}; kill -KILL {pid}"))?;
                guest.wait_until("the unit has failed", STEP, || {
                    Ok(property(guest, "ActiveState")? == "failed")
                })?;
                let state = guest
                    .try_sh(&format!("cut -d ' ' -f 3 /proc/{guard}/stat"))?
                    .out;
                equal("the guard", state.trim(), "T")?;
                guest.sh(&format!("kill -CONT {guard}"))?
            }
        };
        thawed(guest, "kill -9 of the daemon")?;
        if module == Module::Stock {
            guest.sh(&format!("systemctl start {UNIT}"))?;
        }
        wait_active(guest, pid)?;
        recovered(guest, "kill -9 of the daemon")?;
        end(guest, module)?;
    }
    Ok(())
}

fn both_killed(guest: &Guest) -> Result<()> {
    for &module in guest.modules() {
        // No next start comes to help.
        let pid = begin(guest, module, "Restart=no")?;
        let all = all_of_it(guest, pid)?;
        let guards = all.split_whitespace().count() - 1;
        equal("guards", guards, usize::from(module == Module::Stock))?;
        freeze(guest)?;
        // Stopped first, so that neither sees the other die.
        guest.sh(&format!("kill -STOP {all}; kill -KILL {all}"))?;
        thawed(guest, "kill -9 of both")?;
        guest.sh(&format!("systemctl start {UNIT}"))?;
        recovered(guest, "kill -9 of both")?;
        end(guest, module)?;
    }
    Ok(())
}

fn watchdog(guest: &Guest) -> Result<()> {
    const BITES: &str = "journalctl --quiet --boot --unit hv_vss | grep -c 'Watchdog timeout'";
    for (number, &module) in guest.modules().iter().enumerate() {
        let pid = begin(guest, module, "WatchdogSec=2")?;
        freeze(guest)?;
        guest.sh(&format!("kill -STOP {pid}"))?;
        thawed(guest, "a stopped daemon")?;
        wait_active(guest, pid)?;
        let bites = guest.try_sh(BITES)?.out;
        equal(
            "how often the journal tells of the watchdog",
            bites.trim(),
            (number + 1).to_string().as_str(),
        )?;
        recovered(guest, "a stopped daemon")?;
        end(guest, module)?;
    }
    Ok(())
}

fn not_configured(guest: &Guest) -> Result<()> {
    const BAD: &str = "/etc/hv_vss/daemon.toml.d/test.toml";
    let module = guest.module();
    let pid = begin(guest, module, "")?;
    guest.sh(&format!(
        "mkdir -p $(dirname {BAD}) && echo 'deadline = x' >{BAD}"
    ))?;
    // As when it dies while a bad file lies there, which no reload was told of.
    guest.sh(&format!("kill -KILL {pid}"))?;
    guest.wait_until("the unit has failed", STEP, || {
        Ok(property(guest, "ActiveState")? == "failed")
    })?;
    // Three times what the unit waits before it starts again.
    super::wait_out(guest, Duration::from_secs(3))?;
    equal(
        "the state",
        property(guest, "ActiveState")?.as_str(),
        "failed",
    )?;
    equal(
        "starts after the death",
        property(guest, "NRestarts")?.as_str(),
        "1",
    )?;
    equal(
        "how it ended",
        property(guest, "ExecMainStatus")?.as_str(),
        "78",
    )?;
    let complaints =
        format!("journalctl --quiet --boot --unit {UNIT} | grep -c 'line 1, column 12'");
    equal("complaints", guest.try_sh(&complaints)?.out.trim(), "1")?;
    guest.sh(&format!("rm {BAD} && systemctl restart {UNIT}"))?;
    wait_active(guest, pid)?;
    freeze(guest)?;
    answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;
    thawed(guest, "the next backup")?;
    end(guest, module)
}
