// SPDX-License-Identifier: GPL-2.0-only

//! Parts that come and go: daemons, modules, the device, the guest.

use super::{case, make_file_systems, rounds, Case};
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal, refused};
use e2e::guest::{Blocking, Daemon, Guest, Machine, Module, STEP};
use hyperv_sim::ic::vss::{Op, SHORT_BODY, VERSIONS};
use hyperv_sim::ic::{status, FRAMEWORKS};
use hyperv_sim::Exit;
use std::time::Duration;

pub const CASES: &[Case] = &[
    case(
        "lifecycle/no-daemon",
        "without a daemon a request fails, at once or after the grace time",
        no_daemon,
    ),
    case(
        "lifecycle/daemon-comes-late",
        "a request that arrives before the daemon waits for it",
        daemon_comes_late,
    ),
    case(
        "lifecycle/daemon-killed-while-frozen",
        "the host's THAW is failed, also by a new daemon; the next backup is good",
        daemon_killed_while_frozen,
    ),
    case(
        "lifecycle/daemon-restarted",
        "a daemon that is stopped and started again serves the next backup",
        daemon_restarted,
    ),
    case(
        "lifecycle/reload",
        "the module is unloaded and loaded five times, a backup each time",
        reload,
    ),
    case(
        "lifecycle/unload-with-open-device",
        "the module cannot be unloaded under a daemon, and can be after it",
        unload_with_open_device,
    ),
    cycles(
        "lifecycle/unbind-rebind",
        "the device is taken and given back again and again, with a daemon attached",
        |guest| cycle(guest, unbind_rebind),
    ),
    cycles(
        "lifecycle/unload-load",
        "the module is unloaded and loaded again and again, under a daemon that stays",
        |guest| cycle(guest, unload_load),
    ),
    cycles(
        "lifecycle/rescind-offer",
        "the host takes VSS back and offers it again and again, with a daemon attached",
        |guest| cycle(guest, rescind_offer),
    ),
    case(
        "lifecycle/hand-over",
        "driver_override moves VSS from hv_utils to us; heartbeat and shutdown stay",
        hand_over,
    ),
    case(
        "lifecycle/rescind-while-read",
        "a blocked read and a poll end when the host takes VSS back",
        rescind_while_read,
    ),
    case(
        "lifecycle/shutdown",
        "the guest powers off when the host asks, with all of ours running",
        shutdown,
    ),
];

/// A case that is repeated: `e2e run --rounds N` sets how often.
const fn cycles(name: &'static str, about: &'static str, run: fn(&Guest) -> Result<()>) -> Case {
    Case {
        name,
        about,
        machine: Machine::ONE_CPU,
        per_round: Duration::from_secs(6),
        on_request: false,
        run,
    }
}

/// The directory of our VSS device in the guest's sysfs.
fn sysfs(guest: &Guest) -> String {
    format!("/sys/bus/vmbus/devices/{}", guest.vss().instance())
}

/// One backup: both requests are answered 0.
fn backup(guest: &Guest) -> Result<()> {
    answered("FREEZE", &guest.vss().freeze(&[], STEP)?, status::OK)?;
    answered("THAW", &guest.vss().thaw(STEP)?, status::OK)
}

fn no_daemon(guest: &Guest) -> Result<()> {
    let vss = guest.vss();
    for grace_ms in [0, 800] {
        guest.load(Module::Ours, &[&format!("grace_ms={grace_ms}")])?;
        vss.wait_open(STEP)?;
        vss.negotiate(&FRAMEWORKS, &VERSIONS, STEP)?;
        for operation in [Op::FREEZE, Op::THAW, Op::HOT_BACKUP] {
            let reply = vss.op(operation, &SHORT_BODY, STEP)?;
            answered(
                &format!("{operation} without a daemon"),
                &reply,
                status::FAIL,
            )?;
            ensure!(
                reply.latency >= Duration::from_millis(grace_ms),
                "{operation} should be failed after {grace_ms} ms, it was after {:?}",
                reply.latency
            );
        }
        answered("GET_DM_INFO", &vss.get_dm_info(STEP)?, status::OK)?;
        guest.unload(Module::Ours)?;
        vss.wait_closed(STEP)?;
    }
    Ok(())
}

fn daemon_comes_late(guest: &Guest) -> Result<()> {
    guest.load(Module::Ours, &["grace_ms=20000"])?;
    let vss = guest.vss();
    vss.wait_open(STEP)?;
    vss.negotiate(&FRAMEWORKS, &VERSIONS, STEP)?;
    for daemon in [Daemon::Ours, Daemon::Debian] {
        let tx = vss.send(Op::HOT_BACKUP, &SHORT_BODY)?;
        // The guest has answered GET_DM_INFO, which was sent later: the first request waits.
        answered("GET_DM_INFO", &vss.get_dm_info(STEP)?, status::OK)?;
        ensure!(
            vss.try_reply(tx).is_none(),
            "HOT_BACKUP should wait for a daemon, it was answered"
        );
        let process = guest.start_daemon(daemon)?;
        answered("HOT_BACKUP", &vss.wait(tx, STEP)?, status::OK)?;
        guest.signal(&process, 9)?;
        guest.wait(&process, STEP)?;
    }
    Ok(())
}

fn daemon_killed_while_frozen(guest: &Guest) -> Result<()> {
    make_file_systems(guest)?;
    guest.load(Module::Ours, &["grace_ms=500"])?;
    let vss = guest.vss();
    vss.wait_open(STEP)?;
    vss.negotiate(&FRAMEWORKS, &VERSIONS, STEP)?;
    let first = guest.start_daemon(Daemon::Ours)?;
    guest.wait_until(
        "HOT_BACKUP is answered 0: the daemon is there",
        STEP,
        || Ok(vss.hot_backup(STEP)?.status() == status::OK),
    )?;
    for path in ["/writer", "/mnt/ext4/w", "/mnt/xfs/w", "/mnt/btrfs/w"] {
        guest.writer_start(path)?;
    }
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.wait_until("every writer stands still", STEP, || {
        Ok(guest.writers()?.iter().all(|it| it.in_write_us > 300_000))
    })?;
    guest.signal(&first, 9)?;
    guest.wait(&first, STEP)?;
    answered("THAW with the daemon dead", &vss.thaw(STEP)?, status::FAIL)?;

    // A new daemon thaws nothing of which the host could be told that it was frozen until now.
    guest.start_daemon(Daemon::Ours)?;
    guest.wait_until(
        "HOT_BACKUP is answered 0: the new daemon is there",
        STEP,
        || Ok(vss.hot_backup(STEP)?.status() == status::OK),
    )?;
    answered("THAW with a new daemon", &vss.thaw(STEP)?, status::FAIL)?;
    guest.wait_until("every writer goes on", STEP, || {
        Ok(guest.writers()?.iter().all(|it| it.in_write_us < 100_000))
    })?;
    backup(guest)
}

fn daemon_restarted(guest: &Guest) -> Result<()> {
    guest.load(Module::Ours, &[])?;
    let vss = guest.vss();
    vss.wait_open(STEP)?;
    vss.negotiate(&FRAMEWORKS, &VERSIONS, STEP)?;
    for signal in [15, 9, 15] {
        let daemon = guest.start_daemon(Daemon::Ours)?;
        backup(guest)?;
        guest.signal(&daemon, signal)?;
        guest.wait(&daemon, STEP)?;
    }
    Ok(())
}

fn reload(guest: &Guest) -> Result<()> {
    let vss = guest.vss();
    for _ in 0..5 {
        guest.load(Module::Ours, &[])?;
        vss.wait_open(STEP)?;
        vss.negotiate(&FRAMEWORKS, &VERSIONS, STEP)?;
        let daemon = guest.start_daemon(Daemon::Ours)?;
        backup(guest)?;
        guest.signal(&daemon, 15)?;
        guest.wait(&daemon, STEP)?;
        guest.unload(Module::Ours)?;
        vss.wait_closed(STEP)?;
    }
    Ok(())
}

fn unload_with_open_device(guest: &Guest) -> Result<()> {
    guest.load(Module::Ours, &[])?;
    guest.vss().wait_open(STEP)?;
    let device = guest.open_device(Blocking::Yes)?;
    let refusal = guest.try_sh("rmmod hv_vss")?;
    ensure!(
        refusal.status != Some(0) && guest.vss().is_open(),
        "rmmod should be refused while the device is open"
    );
    device.close()?;
    guest.unload(Module::Ours)?;
    guest.vss().wait_closed(STEP)?;
    Ok(())
}

/// Has `once` take our driver from the device and give it back, [`rounds`] times, with a daemon that
/// must come back by itself each time; then a backup must be good, and nothing may have leaked.
fn cycle(guest: &Guest, once: fn(&Guest) -> Result<()>) -> Result<()> {
    // A daemon looks for the device every two seconds at least.
    guest.load(Module::Ours, &["grace_ms=20000"])?;
    let vss = guest.vss();
    let attached = |round: u32| {
        vss.wait_open(STEP)?;
        vss.negotiate(&FRAMEWORKS, &VERSIONS, STEP)?;
        let what = format!("HOT_BACKUP after cycle {round}");
        answered(&what, &vss.hot_backup(STEP)?, status::OK)
    };
    guest.start_daemon(Daemon::Ours)?;
    attached(0)?;
    backup(guest)?;
    let mut before = None;
    for round in 1..=rounds() {
        once(guest)?;
        attached(round)?;
        // What the first cycle took, such as pages for the log, is not taken again.
        before.get_or_insert(memory_in_use(guest)?);
    }
    backup(guest)?;
    let after = memory_in_use(guest)?;
    let before = before.unwrap_or(after);
    println!(
        "     {} cycles, memory in use {before} -> {after} KiB",
        rounds()
    );
    // One ring is 28 KiB.
    let limit = 8 * 1024 + 14 * u64::from(rounds());
    ensure!(
        after <= before + limit,
        "memory in use should not grow by more than {limit} KiB, it was {before} KiB and is {after} KiB"
    );
    Ok(())
}

/// What the guest has in use that is no cache, in KiB.
fn memory_in_use(guest: &Guest) -> Result<u64> {
    let text = guest.read("/proc/meminfo")?;
    let value = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        value.with_context(|| format!("no {name} in /proc/meminfo"))
    };
    let free =
        value("MemFree:")? + value("Buffers:")? + value("Cached:")? + value("SReclaimable:")?;
    Ok(value("MemTotal:")?.saturating_sub(free))
}

fn unbind_rebind(guest: &Guest) -> Result<()> {
    let device = guest.vss().instance().to_string();
    // The daemon has the device open; that does not hold the unbind up.
    guest.write("/sys/bus/vmbus/drivers/hv_vss/unbind", &device)?;
    guest.vss().wait_closed(STEP)?;
    guest.write("/sys/bus/vmbus/drivers/hv_vss/bind", &device)?;
    Ok(())
}

fn unload_load(guest: &Guest) -> Result<()> {
    // An open device holds the module, so the device has to go first; then the daemon lets go.
    let device = guest.vss().instance().to_string();
    guest.write("/sys/bus/vmbus/drivers/hv_vss/unbind", &device)?;
    guest.vss().wait_closed(STEP)?;
    guest.wait_until("the module can be unloaded", STEP, || {
        Ok(guest.unload(Module::Ours).is_ok())
    })?;
    guest.load(Module::Ours, &["grace_ms=20000"])?;
    Ok(())
}

fn rescind_offer(guest: &Guest) -> Result<()> {
    let vss = guest.vss();
    vss.rescind();
    vss.wait_released(STEP)?;
    vss.offer();
    Ok(())
}

fn hand_over(guest: &Guest) -> Result<()> {
    let host = guest.host();
    guest.load(Module::Stock, &[])?;
    for channel in [&*host.vss(), &*host.heartbeat(), &*host.shutdown()] {
        channel.wait_open(STEP)?;
    }
    let driver = |guest: &Guest| guest.sh(&format!("basename $(readlink {}/driver)", sysfs(guest)));
    equal(
        "the driver of VSS before",
        driver(guest)?.trim(),
        "hv_utils",
    )?;

    // Ours does not take away what another driver has.
    guest.load(Module::Ours, &["grace_ms=20000"])?;
    equal("the driver of VSS still", driver(guest)?.trim(), "hv_utils")?;
    let (sysfs, device) = (sysfs(guest), host.vss().instance().to_string());
    guest.write(&format!("{sysfs}/driver_override"), "hv_vss")?;
    guest.write("/sys/bus/vmbus/drivers/hv_utils/unbind", &device)?;
    host.vss().wait_closed(STEP)?;
    guest.write("/sys/bus/vmbus/drivers_probe", &device)?;
    host.vss().wait_open(STEP)?;
    equal("the driver of VSS after", driver(guest)?.trim(), "hv_vss")?;

    // A backup goes through ours, the others never noticed.
    host.vss().negotiate(&FRAMEWORKS, &VERSIONS, STEP)?;
    guest.start_daemon(Daemon::Ours)?;
    backup(guest)?;
    let (sequence, _) = host.heartbeat().beat(7, STEP)?;
    equal("the heartbeat's answer to 7", sequence, 8)?;
    ensure!(host.shutdown().is_open(), "shutdown should still be open");

    // And back: without the override the device is anybody's again.
    guest.write(&format!("{sysfs}/driver_override"), "\n")?;
    guest.write("/sys/bus/vmbus/drivers/hv_vss/unbind", &device)?;
    host.vss().wait_closed(STEP)?;
    guest.write("/sys/bus/vmbus/drivers/hv_utils/bind", &device)?;
    host.vss().wait_open(STEP)?;
    equal(
        "the driver of VSS at the end",
        driver(guest)?.trim(),
        "hv_utils",
    )
}

fn rescind_while_read(guest: &Guest) -> Result<()> {
    guest.load(Module::Ours, &[])?;
    let vss = guest.vss();
    vss.wait_open(STEP)?;
    let device = guest.open_device(Blocking::Yes)?;
    let read = device.start_read(64)?;
    guest.wait_until("a thread of the agent waits in a read", STEP, || {
        let stacks = guest.try_sh("cat /proc/$(pidof lab-agent)/task/*/stack")?;
        Ok(stacks.out.contains("hv_vss"))
    })?;
    // The descriptor is still open when the guest lets the channel go.
    vss.rescind();
    vss.wait_released(STEP)?;
    refused(
        "the read that waited",
        device.finish_read(read, STEP),
        "ENODEV",
    )?;
    refused("a write afterwards", device.write(&[0; 12]), "ENODEV")?;
    let reported = device.poll(&["POLLIN"], STEP)?;
    ensure!(
        reported.contains(&"POLLHUP".to_string()),
        "poll should report POLLHUP, it reported {reported:?}"
    );
    // A new device is another one: it can be opened beside the dead descriptor.
    vss.offer();
    vss.wait_open(STEP)?;
    let fresh = guest.open_device(Blocking::No)?;
    refused("a read of the new device", fresh.read(64), "EAGAIN")?;
    fresh.close()?;
    device.close()?;
    Ok(())
}

fn shutdown(guest: &Guest) -> Result<()> {
    make_file_systems(guest)?;
    guest.load(Module::Ours, &[])?;
    guest.load(Module::Stock, &[])?;
    let host = guest.host();
    host.vss().wait_open(STEP)?;
    host.shutdown().wait_open(STEP)?;
    host.vss().negotiate(&FRAMEWORKS, &VERSIONS, STEP)?;
    guest.start_daemon(Daemon::Ours)?;
    backup(guest)?;
    host.shutdown().power_off(STEP)?;
    let exit = guest.vm().wait_exit(STEP * 2)?;
    equal("how the guest ended", exit, Exit::PowerOff)
}
