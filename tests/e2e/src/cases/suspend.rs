// SPDX-License-Identifier: GPL-2.0-only

//! Hibernation: the guest leaves the bus, comes back, leaves it again to restore its image, and comes
//! back for good (`test_resume`), while the host does its side of it.
//!
//! The bus takes part in nothing else: `vmbus_pm` and `vmbus_bus_pm` have callbacks for hibernation
//! only. `test_resume` goes further than any level of `pm_test`, which the stock kernel does not have;
//! where it is there (debug kernels), the levels that reach the bus are gone through as well.

use super::abi::{answer_v2, read_request, register};
use super::{all_frozen, backup, limit, load, start, stuck_writers, wait_for_daemon, Case};
use anyhow::{ensure, Result};
use e2e::check::{answered, equal, refused, status_name};
use e2e::guest::{Blocking, Daemon, Guest, Machine, Module, STEP};
use hv_vss_uapi::{op, MAX_FRAME};
use hyperv_sim::ic::status;
use hyperv_sim::ic::vss::{Op, SHORT_BODY};
use hyperv_sim::EventKind;
use std::time::Duration;
use zerocopy::IntoBytes;

pub const CASES: &[Case] = &[
    case(
        "suspend/hibernate",
        "either daemon is still registered after hibernation, and the next backup is good",
        hibernate_idle,
    ),
    case(
        "suspend/frozen",
        "thawed before the guest hibernates, the host's THAW is failed, the next backup is good",
        frozen,
    )
    .comparing()
    .long(),
    case(
        "suspend/request-open",
        "what is open when the machine sleeps is failed; late answers hit nothing",
        request_open,
    )
    .long(),
    case(
        "suspend/daemon-stopped",
        "hibernation does not wait for a daemon that is stopped while it holds a freeze",
        daemon_stopped,
    )
    .long(),
    case(
        "suspend/host-keeps-vss",
        "a host that does not give VSS back: readers see an error, a rebind brings it back",
        host_keeps_vss,
    )
    .long(),
];

/// The memory of a debug kernel is there three times: itself, its image, and the RAM disk to which that
/// is written.
pub(super) const MACHINE: Machine = Machine {
    memory_mib: 3072,
    disk_mib: 1024,
    ..Machine::TWO_CPUS
};

pub(super) const fn case(
    name: &'static str,
    about: &'static str,
    run: fn(&Guest) -> Result<()>,
) -> Case {
    Case {
        // An image of some hundred MiB is made, written and read, with a debug kernel at a crawl.
        per_round: Duration::from_secs(20),
        machine: MACHINE,
        ..super::case(name, about, run)
    }
}

/// Hibernates to a ram disk and restores from there.
pub(super) fn hibernate(guest: &Guest) -> Result<()> {
    guest.sh("mkswap /dev/ram7 > /dev/null && swapon /dev/ram7
         echo test_resume > /sys/power/disk
         echo disk > /sys/power/state
         status=$?
         swapoff /dev/ram7
         exit $status")?;
    Ok(())
}

/// The levels of `pm_test` in which the bus takes part, where the kernel has them. Its callbacks come
/// after the level `devices`.
const LEVELS: [&str; 3] = ["platform", "processors", "core"];

fn levels(guest: &Guest) -> Result<&'static [&'static str]> {
    let there = guest.try_sh("test -e /sys/power/pm_test")?.status == Some(0);
    Ok(if there { &LEVELS } else { &[] })
}

/// Hibernates as far as `level`, and wakes up from there.
fn hibernate_to(guest: &Guest, level: &str) -> Result<()> {
    guest.sh(&format!(
        "echo {level} > /sys/power/pm_test
         echo shutdown > /sys/power/disk
         echo disk > /sys/power/state
         echo none > /sys/power/pm_test"
    ))?;
    Ok(())
}

/// How often the guest has left the bus.
pub(super) fn unloads(guest: &Guest) -> usize {
    let events = guest.host().events();
    let unloads = events
        .iter()
        .filter(|event| event.kind == EventKind::Unloaded);
    unloads.count()
}

fn hibernate_idle(guest: &Guest) -> Result<()> {
    let vss = guest.vss();
    for daemon in [Daemon::Ours, Daemon::Debian] {
        let process = start(guest, Module::Ours, daemon)?;
        backup(guest)?;
        let (openings, left) = (vss.openings(), unloads(guest));
        hibernate(guest)?;
        // Once for the image, and once more to restore it.
        equal("how often the guest left the bus", unloads(guest), left + 2)?;
        vss.wait_openings(openings + 2, STEP)?;
        vss.agree(STEP)?;
        answered("HOT_BACKUP", &vss.hot_backup(STEP)?, status::OK)?;
        backup(guest)?;
        super::stop(guest, Module::Ours, &process)?;
    }
    let process = start(guest, Module::Ours, Daemon::Ours)?;
    for level in levels(guest)? {
        let (openings, left) = (vss.openings(), unloads(guest));
        hibernate_to(guest, level)?;
        equal("how often the guest left the bus", unloads(guest), left + 1)?;
        vss.wait_openings(openings + 1, STEP)?;
        vss.agree(STEP)?;
        backup(guest)?;
        println!("     as far as pm_test's {level}");
    }
    super::stop(guest, Module::Ours, &process)
}

/// What a hibernation did to a backup that had something frozen.
struct Slept {
    /// What the host was told for THAW afterwards.
    thaw: u32,
    /// The writers that had not gone on before that.
    stuck: Vec<String>,
    /// Whether the kernel warned.
    warned: bool,
}

/// Hibernates with file systems frozen by `daemon`.
fn sleep_frozen(guest: &Guest, module: Module, daemon: Daemon) -> Result<Slept> {
    let process = start(guest, module, daemon)?;
    let vss = guest.vss();
    for path in ["/writer", "/mnt/ext4/w", "/mnt/xfs/w", "/mnt/btrfs/w"] {
        guest.writer_start(path)?;
    }
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.wait_until("every writer stands still", STEP, || all_frozen(guest))?;
    hibernate(guest)?;
    let stuck = stuck_writers(guest)?;
    vss.agree(STEP)?;
    let thaw = vss.thaw(STEP)?.status();
    guest.writers_stop()?;
    wait_for_daemon(guest)?;
    backup(guest)?;
    super::stop(guest, module, &process)?;
    Ok(Slept {
        thaw,
        stuck,
        warned: warned_of_frozen_sleep(guest)?,
    })
}

/// Of what the kernel warns when a file system was frozen by user space before the sleep and still is
/// after it: lockdep does not like that a task which sleeps with locks held, as one that waits for a
/// thaw does, is put away; and `filesystems_thaw` takes back the freeze of the kernel from every file
/// system and is surprised to find another one instead (`may_unfreeze`). Each once in a boot, and for a
/// plain `fsfreeze`, too.
pub(super) const SLEPT_FROZEN: [&str; 2] = ["__set_task_frozen", "thaw_super_locked"];

/// Whether it has warned of that.
fn warned_of_frozen_sleep(guest: &Guest) -> Result<bool> {
    let log = guest.log(4)?;
    let mut warnings = log.iter().filter(|it| it.text.contains("WARNING:"));
    Ok(warnings.any(|it| SLEPT_FROZEN.iter().any(|text| it.text.contains(text))))
}

fn frozen(guest: &Guest) -> Result<()> {
    super::make_file_systems(guest)?;
    let ours = sleep_frozen(guest, Module::Ours, Daemon::Ours)?;
    equal("THAW of what was not frozen", ours.thaw, status::FAIL)?;
    ensure!(ours.stuck.is_empty(), "stuck after it: {:?}", ours.stuck);
    ensure!(!ours.warned, "the kernel should not warn");
    guest.expect_in_log(&SLEPT_FROZEN)?;
    let peer = sleep_frozen(guest, Module::Stock, Daemon::Debian)?;
    let words = |slept: &Slept| {
        let thawed = if slept.stuck.is_empty() {
            "thawed"
        } else {
            "stays frozen"
        };
        let warned = if slept.warned {
            ", the kernel warns"
        } else {
            ""
        };
        format!("{thawed}{warned}; THAW {}", status_name(slept.thaw))
    };
    guest.compare(
        "the guest hibernates while frozen",
        &words(&ours),
        &words(&peer),
    );
    Ok(())
}

fn request_open(guest: &Guest) -> Result<()> {
    load(guest, Module::Ours, &[])?;
    let vss = guest.vss();
    let device = guest.open_device(Blocking::Yes)?;
    register(device)?;
    let tx = vss.send_freeze(&[])?;
    let (request, _) = read_request(device)?;
    let late = answer_v2(request.frame.id, op::FREEZE, status::OK);
    // The daemon might be freezing, so it is given time; it does nothing with it.
    hibernate(guest)?;
    answered("FREEZE", &vss.wait(tx, STEP)?, status::FAIL)?;
    refused("the late answer", device.write(late.as_bytes()), "ESTALE")?;
    vss.agree(STEP)?;
    // As long as it may be freezing there is no other FREEZE; then it thaws what no host asks for.
    let reply = vss.freeze(&[], STEP)?;
    answered("a FREEZE before its thaw", &reply, status::FAIL)?;
    let (thaw, _) = read_request(device)?;
    equal("the operation", thaw.msg.hdr.operation, op::THAW)?;
    refused("the late answer", device.write(late.as_bytes()), "ESTALE")?;
    device.write(answer_v2(thaw.frame.id, op::THAW, status::OK).as_bytes())?;
    let freeze = vss.send_freeze(&[])?;
    let (request, _) = read_request(device)?;
    equal("the operation", request.msg.hdr.operation, op::FREEZE)?;
    device.write(answer_v2(request.frame.id, op::FREEZE, status::OK).as_bytes())?;
    answered("the next FREEZE", &vss.wait(freeze, STEP)?, status::OK)?;
    let tx = vss.send(Op::THAW, &SHORT_BODY)?;
    let (request, _) = read_request(device)?;
    device.write(answer_v2(request.frame.id, op::THAW, status::OK).as_bytes())?;
    answered("its THAW", &vss.wait(tx, STEP)?, status::OK)
}

fn daemon_stopped(guest: &Guest) -> Result<()> {
    let timeout = guest.host().patience(Duration::from_secs(1));
    load(guest, Module::Ours, &[&limit("timeout", timeout)])?;
    let daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    let vss = guest.vss();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.signal(&daemon, 19)?;
    hibernate(guest)?;
    vss.agree(STEP)?;
    let reply = vss.hot_backup(STEP)?;
    answered("HOT_BACKUP while it is stopped", &reply, status::FAIL)?;
    guest.signal(&daemon, 18)?;
    wait_for_daemon(guest)?;
    backup(guest)
}

fn host_keeps_vss(guest: &Guest) -> Result<()> {
    load(guest, Module::Ours, &[])?;
    let vss = guest.vss();
    let device = guest.open_device(Blocking::Yes)?;
    register(device)?;
    let read = device.start_read(MAX_FRAME)?;
    let poll = device.start_poll(&[], STEP * 2)?;
    // It is gone when the guest comes back, which nobody tells it.
    vss.withhold();
    hibernate(guest)?;
    refused(
        "the read that waited",
        device.finish_read(read, STEP),
        "ENODEV",
    )?;
    let reported = device.finish_poll(poll, STEP)?;
    ensure!(
        reported.contains(&"POLLHUP".to_string()),
        "poll should report POLLHUP, it reported {reported:?}"
    );
    device.close()?;
    vss.offer();
    let name = vss.instance().to_string();
    guest.write("/sys/bus/vmbus/drivers/hv_vss/unbind", &name)?;
    guest.write("/sys/bus/vmbus/drivers/hv_vss/bind", &name)?;
    vss.wait_open(STEP)?;
    vss.agree(STEP)?;
    guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    backup(guest)
}
