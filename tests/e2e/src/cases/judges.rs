// SPDX-License-Identifier: GPL-2.0-only

//! The stock kernel's own drivers as judges of the simulated host: what they bind to works, and they have
//! nothing to complain of. And what else a host does to a guest while it backs it up.

use super::deadman::{released, RELEASED};
use super::{case, load, stop, stuck_writers, wait_for_daemon, Case};
use anyhow::{ensure, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Module, STEP};
use hyperv_sim::ic::status;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub const CASES: &[Case] = &[
    case(
        "judges/hv-utils",
        "hv_utils on all four of its components: the heartbeat beats, the clock is set, shutdown is open",
        hv_utils,
    ),
    case(
        "judges/uio",
        "uio_hv_generic takes a device, opens its channel and lets go of it",
        uio,
    ),
    case(
        "judges/time-set-while-frozen",
        "the host sets the guest's clock while all is frozen: deadline and history go by another one",
        |guest| time_set_while_frozen(guest, Module::Ours),
    ),
    case(
        "judges/time-set-while-frozen-stock-module",
        "the same with the stock module and the guard",
        |guest| time_set_while_frozen(guest, Module::Stock),
    ),
];

const HOUR: Duration = Duration::from_secs(3600);

/// Has the host set the guest's clock, and waits until the guest has.
fn set_clock(guest: &Guest, time: SystemTime) -> Result<()> {
    let sync = guest.host().timesync();
    sync.wait_open(STEP)?;
    answered("time sync", &sync.set(time, STEP)?, status::OK)?;
    let wanted = time.duration_since(UNIX_EPOCH)?;
    guest.wait_until("the guest's clock is set", STEP * 2, || {
        let now: u64 = guest.sh("date +%s")?.trim().parse()?;
        // It has gone on since.
        let off = now.abs_diff(wanted.as_secs());
        Ok(off < guest.host().patience(STEP * 4).as_secs())
    })
}

fn hv_utils(guest: &Guest) -> Result<()> {
    load(guest, Module::Stock, &[])?;
    let host = guest.host();
    host.heartbeat().wait_open(STEP)?;
    let (answer, _) = host.heartbeat().beat(41, STEP)?;
    equal("the heartbeat's answer to 41", answer, 42)?;
    host.shutdown().wait_open(STEP)?;
    set_clock(guest, SystemTime::now() + 24 * HOUR)?;
    set_clock(guest, SystemTime::now())
}

fn uio(guest: &Guest) -> Result<()> {
    let device = guest.vss();
    let (class, instance) = (device.class(), device.instance());
    guest.sh(&format!(
        "modprobe uio_hv_generic && echo {class} >/sys/bus/vmbus/drivers/uio_hv_generic/new_id"
    ))?;
    let driver = format!("basename $(readlink /sys/bus/vmbus/devices/{instance}/driver)");
    equal("its driver", guest.sh(&driver)?.trim(), "uio_hv_generic")?;
    // Who opens it opens the channel.
    let reader = guest.spawn(&["sh", "-c", "exec 3</dev/uio0; exec sleep 1000"])?;
    device.wait_open(STEP)?;
    guest.signal(&reader, 9)?;
    guest.wait(&reader, STEP)?;
    device.wait_closed(STEP)?;
    guest.sh("rmmod uio_hv_generic uio").map(drop)
}

/// All backups that are remembered.
fn history(guest: &Guest) -> Result<Vec<serde_json::Value>> {
    let said = guest.try_sh("/payload/hv_vss_daemon history --json")?;
    Ok(serde_json::from_str(&said.out)?)
}

/// How long each file system was frozen for in any backup of that history.
fn frozen_for(history: &[serde_json::Value]) -> Vec<Duration> {
    let all = history
        .iter()
        .filter_map(|it| it["file_systems"].as_array());
    let time = |it: &serde_json::Value| {
        let until = it["until_us"].as_u64()?;
        Some(Duration::from_micros(until - it["since_us"].as_u64()?))
    };
    all.flatten().filter_map(time).collect()
}

fn time_set_while_frozen(guest: &Guest, module: Module) -> Result<()> {
    let vss = guest.vss();
    guest.sh(
        "mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a
         # A long history takes long to read.
         rm -rf /var/lib/hv_vss",
    )?;
    guest.writer_start("/mnt/a/w")?;
    load(guest, module, &[])?;
    // With ours it has the other devices, with the stock module all.
    guest.sh("modprobe hv_utils")?;
    let daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    for time in [SystemTime::now() + HOUR, SystemTime::now() - HOUR] {
        let before = history(guest)?.len();
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        set_clock(guest, time)?;
        guest.wait_until("the writer stands still", STEP, || {
            Ok(guest.writers()?.iter().all(|it| it.in_write_us > 300_000))
        })?;
        answered("THAW", &vss.thaw(STEP)?, status::OK)?;
        equal("who is stuck", stuck_writers(guest)?, Vec::new())?;
        guest.wait_until("the backup is remembered", STEP, || {
            Ok(history(guest)?.len() > before)
        })?;
        let times = frozen_for(&history(guest)?);
        ensure!(!times.is_empty(), "the history names no file system");
        for time in times {
            ensure!(time < HOUR / 2, "the history says: frozen for {time:?}");
        }
    }
    stop(guest, module, &daemon)?;

    // The deadline comes when it should, though the clock says that it is an hour before.
    const DEADLINE: Duration = Duration::from_secs(2);
    load(guest, module, &[])?;
    let daemon = guest.start_daemon_with("deadline = 2")?;
    wait_for_daemon(guest)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    let frozen = guest.clock()?;
    let sync = guest.host().timesync();
    sync.set(SystemTime::now() - 2 * HOUR, STEP)?;
    released(guest, "the deadline", frozen, DEADLINE + RELEASED)?;
    answered("THAW after it", &vss.thaw(STEP)?, status::FAIL)?;
    set_clock(guest, SystemTime::now())?;
    stop(guest, module, &daemon)
}
