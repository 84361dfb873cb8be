// SPDX-License-Identifier: GPL-2.0-only

//! Parts that come and go: daemons, modules, the device, the guest.

use super::abi::{answer_v2, read_request, register};
use super::dialogue::{Abi, Scripted};
use super::disks::{load_driver, Attached};
use super::restore::stood_still;
use super::{
    all_frozen, backup, both_requests, case, good, load, make_file_systems, observe, reply_within,
    rounds_or, start, stop, suspend, wait_for_daemon, Case, Growth, ModuleState, When, LEAKS,
};
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal, refused, status_name};
use e2e::guest::{Blocking, Daemon, Device, Guest, Machine, Module, STEP};
use hv_vss_uapi::{op, MAX_FRAME};
use hyperv_sim::ic::status;
use hyperv_sim::ic::vss::{Lun, Op, CLASS, SHORT_BODY};
use hyperv_sim::storage::Image;
use hyperv_sim::{EventKind, Exit, HostError, OnOpen, Tx};
use std::time::Duration;
use zerocopy::IntoBytes;

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
    )
    .comparing(),
    case(
        "lifecycle/daemon-killed-while-frozen",
        "the host's THAW is failed, also by a new daemon; the next backup is good",
        daemon_killed_while_frozen,
    ),
    case(
        "lifecycle/killed-and-reloaded",
        "also when the module is unloaded and loaded in between, and remembers nothing",
        killed_and_reloaded,
    ),
    case(
        "lifecycle/module-loaded-anew",
        "until it has seen a FREEZE the module fails each THAW, also of a daemon that remembers nothing either",
        module_loaded_anew,
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
        |guest| cycle(guest, Module::Ours, unbind_rebind),
    ),
    cycles(
        "lifecycle/unload-load",
        "the module is unloaded and loaded again and again, under a daemon that stays",
        |guest| cycle(guest, Module::Ours, unload_load),
    ).long(),
    cycles(
        "lifecycle/rescind-offer",
        "the host takes VSS back and offers it again and again, with a daemon attached",
        |guest| cycle(guest, Module::Ours, rescind_offer),
    ),
    cycles(
        "lifecycle/backups",
        "backups one after the other: neither our module nor the daemon holds more afterwards",
        |guest| backups(guest, Module::Ours),
    ),
    cycles(
        "lifecycle/backups-stock-module",
        "neither do the daemon and its guard on the stock module",
        |guest| backups(guest, Module::Stock),
    ),
    Case {
        // 24 ends, each with a module or a device that comes back.
        per_round: Duration::from_secs(20),
        ..case(
        "lifecycle/ends",
        "the device goes in each state of a request, in each way: a read and a poll end at once, \
         the next daemon serves",
        ends,
    )
    }.long(),
    case(
        "lifecycle/daemon-comes-back",
        "the device goes under our daemon while it freezes, holds and thaws: nothing stays frozen",
        daemon_comes_back,
    ).long(),
    Case {
        machine: Machine::SCSI,
        ..case(
            "lifecycle/kexec-while-frozen",
            "another kernel is started while all is frozen: UNLOAD, nothing was written, the next backup is good",
            kexec_while_frozen,
        )
    }
    .long(),
    case(
        "lifecycle/dying-daemon",
        "a daemon that is killed with a request in its hands fails it at once, an unread one waits",
        dying_daemon,
    ),
    case(
        "lifecycle/other-class",
        "devices of another class are refused, whichever way they are handed over",
        other_class,
    ),
    case(
        "lifecycle/second-device",
        "a second VSS device is refused while the first is bound, and served when it is not",
        second_device,
    ),
    case(
        "lifecycle/open-refused",
        "a host that refuses to open the channel, or never says so and takes it back",
        open_refused,
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
        machine: Machine::TWO_CPUS.on_one_cpu(LEAKS),
        per_round: Duration::from_secs(6),
        when: When::Always,
        asks_our_module: false,
        compares: false,
        run,
    }
}

/// The directory of our VSS device in the guest's sysfs.
fn sysfs(guest: &Guest) -> String {
    format!("/sys/bus/vmbus/devices/{}", guest.vss().instance())
}

fn no_daemon(guest: &Guest) -> Result<()> {
    let vss = guest.vss();
    // Each well after what the other one has.
    for grace_ms in [0, 1200] {
        guest.load(Module::Ours, &[&format!("grace_ms={grace_ms}")])?;
        vss.wait_open(STEP)?;
        vss.agree(STEP)?;
        for operation in [Op::FREEZE, Op::THAW, Op::HOT_BACKUP] {
            let reply = vss.op(operation, &SHORT_BODY, STEP)?;
            answered(
                &format!("{operation} without a daemon"),
                &reply,
                status::FAIL,
            )?;
            let grace = Duration::from_millis(grace_ms);
            let late = grace + guest.host().patience(Duration::from_millis(600));
            ensure!(
                (grace..late).contains(&reply.latency),
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
    vss.agree(STEP)?;
    let mut ours = status::FAIL;
    for daemon in [Daemon::Ours, Daemon::Debian] {
        let tx = vss.send(Op::HOT_BACKUP, &SHORT_BODY)?;
        // The guest has answered GET_DM_INFO, which was sent later: the first request waits.
        answered("GET_DM_INFO", &vss.get_dm_info(STEP)?, status::OK)?;
        ensure!(
            vss.try_reply(tx).is_none(),
            "HOT_BACKUP should wait for a daemon, it was answered"
        );
        let process = guest.start_daemon(daemon)?;
        let reply = vss.wait(tx, STEP)?;
        answered("HOT_BACKUP", &reply, status::OK)?;
        ours = reply.status();
        guest.signal(&process, 9)?;
        guest.wait(&process, STEP)?;
    }
    guest.unload(Module::Ours)?;
    vss.wait_closed(STEP)?;
    load(guest, Module::Stock, &[])?;
    let tx = vss.send(Op::HOT_BACKUP, &SHORT_BODY)?;
    let early = reply_within(guest, tx, Duration::from_secs(1))?;
    let daemon = guest.start_daemon(Daemon::Debian)?;
    let waited = early.is_none();
    let peer = early.map_or_else(|| vss.wait(tx, STEP), Ok)?.status();
    wait_for_daemon(guest)?;
    stop(guest, Module::Stock, &daemon)?;
    let words = |waited: bool, answer: u32| {
        let when = match waited {
            true => "once it is there",
            false => "before it is there",
        };
        format!("HOT_BACKUP {} {when}", status_name(answer))
    };
    guest.compare(
        "the host asks before the daemon is there, as at boot (grace_ms set to 20 s for ours)",
        &words(true, ours),
        &words(waited, peer),
    );
    Ok(())
}

/// A machine of its own, since nothing is left of the kernel that it was started with. The host may be copying
/// until the next one has come up.
fn kexec_while_frozen(first: &Guest) -> Result<()> {
    const MIB: usize = 1 << 20;
    let guest = &first.start_from(Image::default())?;
    let (vss, module) = (guest.vss(), guest.module());
    load_driver(guest)?;
    let (kernel, initrd) = guest.boot_files()?;
    for (lun, path, bytes) in [(1, "/run/kernel", kernel), (2, "/run/initrd", initrd)] {
        let mut content = Image::default();
        content.write(0, &bytes);
        let mib = bytes.len().div_ceil(MIB) as u64;
        let brought = Attached::new(guest, 0, lun, mib, content)?;
        let (node, len) = (brought.node(guest)?, bytes.len());
        guest.sh(&format!("head -c {len} {node} >{path}"))?;
        brought.detach(guest)?;
    }
    guest.kexec_load("/run/kernel", "/run/initrd")?;

    let disk = Attached::new(guest, 0, 0, 64, Image::default())?;
    let node = disk.node(guest)?;
    guest.sh(&format!(
        "mkdir -p /mnt/a && mkfs.ext4 -q -F {node} && mount {node} /mnt/a"
    ))?;
    guest.writer_start("/mnt/a/w")?;
    let _daemon = start(guest, module, Daemon::Ours)?;
    disk.disk.start_log()?;
    let freeze = vss.freeze(&[], STEP)?;
    answered("FREEZE", &freeze, status::OK)?;
    guest.kexec()?;
    equal("UNLOAD, in all", suspend::unloads(guest), 1)?;

    load_driver(guest)?;
    let node = disk.node(guest)?;
    stood_still(guest, &disk.disk, &freeze, guest.host().now())?;
    disk.disk.stop_log();
    guest.sh(&format!("e2fsck -f -n {node}"))?;
    guest.sh(&format!("mkdir -p /mnt/a && mount {node} /mnt/a"))?;
    guest.writer_start("/mnt/a/w")?;
    let daemon = start(guest, module, Daemon::Ours)?;
    equal("the next backup", observe(guest)?, good(&["/mnt/a/w"]))?;
    stop(guest, module, &daemon)?;
    guest.close()
}

fn daemon_killed_while_frozen(guest: &Guest) -> Result<()> {
    make_file_systems(guest)?;
    guest.load(Module::Ours, &["grace_ms=500"])?;
    let vss = guest.vss();
    vss.wait_open(STEP)?;
    vss.agree(STEP)?;
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
    guest.wait_until("every writer stands still", STEP, || all_frozen(guest))?;
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
    equal("who is stuck", super::stuck_writers(guest)?, Vec::new())?;
    backup(guest)
}

fn daemon_restarted(guest: &Guest) -> Result<()> {
    guest.load(Module::Ours, &[])?;
    let vss = guest.vss();
    vss.wait_open(STEP)?;
    vss.agree(STEP)?;
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
        vss.agree(STEP)?;
        let daemon = guest.start_daemon(Daemon::Ours)?;
        backup(guest)?;
        guest.signal(&daemon, 15)?;
        guest.wait(&daemon, STEP)?;
        guest.unload(Module::Ours)?;
        vss.wait_closed(STEP)?;
    }
    Ok(())
}

fn killed_and_reloaded(guest: &Guest) -> Result<()> {
    let daemon = super::start(guest, Module::Ours, Daemon::Ours)?;
    let vss = guest.vss();
    guest.writer_start("/writer")?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.wait_until("the writer stands still", STEP, || all_frozen(guest))?;
    guest.signal(&daemon, 9)?;
    guest.wait(&daemon, STEP)?;
    guest.unload(Module::Ours)?;
    super::start(guest, Module::Ours, Daemon::Ours)?;
    let thaw = vss.thaw(STEP)?;
    answered("the THAW of a freeze that broke", &thaw, status::FAIL)?;
    backup(guest)
}

fn module_loaded_anew(guest: &Guest) -> Result<()> {
    for abi in Abi::BOTH {
        for next_freeze in [status::OK, status::FAIL] {
            let one = || -> Result<()> {
                super::load(guest, Module::Ours, &[])?;
                let daemon = Scripted::start(guest, abi)?;
                daemon.freeze(guest, status::OK)?;
                daemon.device.close()?;
                guest.unload(Module::Ours)?;
                guest.vss().wait_closed(STEP)?;
                super::load(guest, Module::Ours, &[])?;
                let daemon = Scripted::start(guest, abi)?;
                // A host that asks twice is told so twice, and another device in between knows no more.
                for _ in 0..2 {
                    daemon.thaw(guest, status::FAIL)?;
                }
                daemon.device.close()?;
                unbind_rebind(guest)?;
                guest.vss().agree(STEP)?;
                let daemon = Scripted::start(guest, abi)?;
                daemon.thaw(guest, status::FAIL)?;
                // What comes after a FREEZE that failed is of that one.
                daemon.freeze(guest, next_freeze)?;
                daemon.thaw(guest, status::OK)?;
                daemon.good_backup(guest)?;
                daemon.device.close()?;
                guest.unload(Module::Ours)?;
                guest.vss().wait_closed(STEP)?;
                Ok(())
            };
            one().with_context(|| format!("{abi:?}, the next FREEZE {next_freeze:#x}"))?;
        }
    }
    Ok(())
}

fn unload_with_open_device(guest: &Guest) -> Result<()> {
    guest.load(Module::Ours, &[])?;
    guest.vss().wait_open(STEP)?;
    let device = guest.open_device(Blocking::Yes)?;
    let refusal = guest.try_sh("rmmod hv_vss")?;
    ensure!(
        refusal.status == Some(1) && guest.vss().is_open(),
        "rmmod should be refused while the device is open"
    );
    device.close()?;
    guest.unload(Module::Ours)?;
    guest.vss().wait_closed(STEP)?;
    Ok(())
}

/// Has `once` take our driver from the device and give it back, [`rounds`] times, with a daemon that
/// must come back by itself each time; then a backup must be good, and nothing may have leaked.
fn cycle(guest: &Guest, module: Module, once: fn(&Guest) -> Result<()>) -> Result<()> {
    // A daemon looks for the device every two seconds at least.
    let parameters: &[&str] = match module {
        Module::Ours => &["grace_ms=20000"],
        Module::Stock => &[],
    };
    guest.load(module, parameters)?;
    let vss = guest.vss();
    let attached = |round: u32| {
        vss.wait_open(STEP)?;
        vss.agree(STEP)?;
        let what = format!("HOT_BACKUP after cycle {round}");
        answered(&what, &vss.hot_backup(STEP)?, status::OK)
    };
    guest.start_daemon(Daemon::Ours)?;
    vss.wait_open(STEP)?;
    vss.agree(STEP)?;
    wait_for_daemon(guest)?;
    backup(guest)?;
    // Enough to tell a page that is lost in each from noise.
    let grown = Growth::default().over(guest, rounds_or(24), |round| {
        once(guest)?;
        attached(round)
    })?;
    backup(guest)?;
    println!("     {grown}");
    Ok(())
}

/// File systems of each kind, and so many backups between two looks.
fn backups(guest: &Guest, module: Module) -> Result<()> {
    make_file_systems(guest)?;
    cycle(guest, module, |guest| {
        (0..4).try_for_each(|_| both_requests(guest))
    })
}

pub(super) fn unbind_rebind(guest: &Guest) -> Result<()> {
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
    guest.unload(Module::Ours)?;
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

/// How far things have come when the device goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The channel is open, and that is all.
    Idle,
    /// Versions are agreed on.
    Negotiated,
    /// A daemon has registered.
    Registered,
    /// A request waits for a daemon.
    Held,
    /// The daemon could read FREEZE.
    Offered,
    /// It has.
    Read,
    /// It has answered.
    Frozen,
    /// It has read THAW.
    Thawing,
}

/// How the device goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The host takes it back.
    Rescind,
    /// The administrator unbinds it.
    Unbind,
    /// The administrator reserves it for another driver and unbinds it.
    Override,
    /// The module is unloaded, for which the descriptor has to be closed first.
    Unload,
}

impl End {
    const ALL: [End; 4] = [End::Rescind, End::Unbind, End::Override, End::Unload];

    /// Takes the device away; all but [`End::Unload`] with descriptors open.
    fn take(self, guest: &Guest) -> Result<()> {
        let vss = guest.vss();
        let device = vss.instance().to_string();
        match self {
            End::Rescind => {
                vss.rescind();
                vss.wait_released(STEP)?;
            }
            End::Unbind => guest.write("/sys/bus/vmbus/drivers/hv_vss/unbind", &device)?,
            End::Override => {
                guest.write(&format!("{}/driver_override", sysfs(guest)), "none")?;
                guest.write("/sys/bus/vmbus/drivers/hv_vss/unbind", &device)?;
                let bind = guest.write("/sys/bus/vmbus/drivers/hv_vss/bind", &device);
                refused("a bind of what is another's", bind, "ENODEV")?;
            }
            End::Unload => guest.unload(Module::Ours)?,
        }
        Ok(vss.wait_closed(STEP)?)
    }

    /// Gives it back and waits until the module has opened it.
    fn give_back(self, guest: &Guest) -> Result<()> {
        let vss = guest.vss();
        let device = vss.instance().to_string();
        match self {
            End::Rescind => vss.offer(),
            End::Unbind => guest.write("/sys/bus/vmbus/drivers/hv_vss/bind", &device)?,
            End::Override => {
                guest.write(&format!("{}/driver_override", sysfs(guest)), "\n")?;
                guest.write("/sys/bus/vmbus/drivers_probe", &device)?;
            }
            End::Unload => guest.load(Module::Ours, &["grace_ms=20000"])?,
        }
        Ok(vss.wait_open(STEP)?)
    }
}

/// Brings a new device to `stage`, with the agent as the daemon; returns what the host still waits
/// for.
fn reach(guest: &Guest, device: Device<'_>, stage: Stage) -> Result<Option<Tx>> {
    let vss = guest.vss();
    if stage == Stage::Idle {
        return Ok(None);
    }
    vss.agree(STEP)?;
    match stage {
        Stage::Idle | Stage::Negotiated => return Ok(None),
        Stage::Held => {
            let tx = vss.send_freeze(&[])?;
            // The guest has answered this, which was sent later, so it has that, too.
            answered("GET_DM_INFO", &vss.get_dm_info(STEP)?, status::OK)?;
            return Ok(Some(tx));
        }
        Stage::Registered | Stage::Offered | Stage::Read | Stage::Frozen | Stage::Thawing => {}
    }
    register(device)?;
    if stage == Stage::Registered {
        return Ok(None);
    }
    let freeze = vss.send_freeze(&[])?;
    ensure!(
        !device.poll(&["POLLIN"], STEP)?.is_empty(),
        "FREEZE should become readable"
    );
    if stage == Stage::Offered {
        return Ok(Some(freeze));
    }
    let (request, _) = read_request(device)?;
    if stage == Stage::Read {
        return Ok(Some(freeze));
    }
    let answer = answer_v2(request.frame.id, op::FREEZE, status::OK);
    device.write(answer.as_bytes())?;
    answered("FREEZE", &vss.wait(freeze, STEP)?, status::OK)?;
    if stage == Stage::Frozen {
        return Ok(None);
    }
    let thaw = vss.send(Op::THAW, &SHORT_BODY)?;
    read_request(device)?;
    Ok(Some(thaw))
}

fn ends(guest: &Guest) -> Result<()> {
    let stages = [
        Stage::Idle,
        Stage::Negotiated,
        Stage::Registered,
        Stage::Held,
        Stage::Offered,
        Stage::Read,
        Stage::Frozen,
        Stage::Thawing,
    ];
    guest.load(Module::Ours, &["grace_ms=20000"])?;
    guest.vss().wait_open(STEP)?;
    let mut each_stage = stages.into_iter().cycle();
    let grown = Growth::default().over(guest, stages.len() as u32, |_| {
        let stage = each_stage.next().context("there are stages")?;
        for end in End::ALL {
            let one = || one_end(guest, stage, end);
            one().with_context(|| format!("{end:?} in the stage {stage:?}"))?;
        }
        Ok(())
    })?;
    println!("     {grown}");
    Ok(())
}

fn one_end(guest: &Guest, stage: Stage, end: End) -> Result<()> {
    let vss = guest.vss();
    let device = guest.open_device(Blocking::Yes)?;
    let waited_for = reach(guest, device, stage)?;
    if end == End::Unload {
        let refusal = guest.try_sh("rmmod hv_vss")?;
        ensure!(refusal.status == Some(1), "rmmod should be refused");
        device.close()?;
        // Without a daemon the request has its grace time; it must not outlive the module.
        end.take(guest)?;
    } else {
        let poll = device.start_poll(&[], STEP)?;
        // While there is something to read, a read would not wait.
        let read = match stage {
            Stage::Offered => None,
            _ => Some(device.start_read(MAX_FRAME)?),
        };
        // A call that comes too late to wait would end in the same way.
        let reading = if read.is_some() {
            "wait_readable|read_iter"
        } else {
            ""
        };
        let look = format!(
            "stacks=$(cat /proc/$(pidof lab-agent)/task/*/stack)
             echo \"$stacks\" | grep -q do_sys_poll && echo \"$stacks\" | grep -qE '{reading}'"
        );
        guest.wait_until("threads of the agent wait for the device", STEP, || {
            Ok(guest.try_sh(&look)?.status == Some(0))
        })?;
        // Nobody closes the descriptor, and nobody waits for that.
        end.take(guest)?;
        if let Some(read) = read {
            let read = device.finish_read(read, STEP);
            refused("the read that waited", read, "ENODEV")?;
        }
        let mut reported = device.finish_poll(poll, STEP)?;
        reported.sort();
        equal(
            "the poll",
            reported,
            vec!["POLLERR".into(), "POLLHUP".into()],
        )?;
        refused("another read", device.read(MAX_FRAME), "ENODEV")?;
        let answer = answer_v2(1, op::FREEZE, status::OK);
        refused("a late answer", device.write(answer.as_bytes()), "ENODEV")?;
    }
    match waited_for.map(|tx| vss.wait(tx, STEP)) {
        None => {}
        // What was taken back cannot be answered.
        Some(Err(HostError::NotOpen { .. })) if end == End::Rescind => {}
        Some(reply) => answered("what was open", &reply?, status::FAIL)?,
    }

    end.give_back(guest)?;
    vss.agree(STEP)?;
    // It is another device: the dead descriptor is not in its way.
    let next = guest.open_device(Blocking::Yes)?;
    register(next)?;
    let serve = |operation, code| {
        let tx = vss.send(operation, &SHORT_BODY)?;
        let (request, _) = read_request(next)?;
        let answer = answer_v2(request.frame.id, code, status::OK);
        next.write(answer.as_bytes())?;
        anyhow::Ok(vss.wait(tx, STEP)?)
    };
    // What the daemon before may have frozen by itself, this one is to thaw, unless the module is another as well.
    let may_be_frozen = matches!(stage, Stage::Read | Stage::Frozen | Stage::Thawing);
    let owes = may_be_frozen && end != End::Unload;
    let offered = next.poll(&["POLLIN"], Duration::ZERO)?;
    equal("whether a THAW is owed", !offered.is_empty(), owes)?;
    if owes {
        let (request, _) = read_request(next)?;
        equal("what is owed", request.msg.hdr.operation, op::THAW)?;
        let answer = answer_v2(request.frame.id, op::THAW, status::OK);
        next.write(answer.as_bytes())?;
    }
    if stage == Stage::Frozen {
        // The daemon of now, and with it a module that is new, knows nothing of a freeze that was to last until then.
        let thaw = serve(Op::THAW, op::THAW)?;
        answered("the THAW of a freeze that broke", &thaw, status::FAIL)?;
    }
    for (operation, code) in [(Op::FREEZE, op::FREEZE), (Op::THAW, op::THAW)] {
        answered("the next backup", &serve(operation, code)?, status::OK)?;
    }
    next.close()?;
    if end != End::Unload {
        device.close()?;
    }
    Ok(())
}

fn daemon_comes_back(guest: &Guest) -> Result<()> {
    make_file_systems(guest)?;
    guest.load(Module::Ours, &["grace_ms=20000"])?;
    guest.start_daemon(Daemon::Ours)?;
    let vss = guest.vss();
    for path in ["/writer", "/mnt/ext4/w", "/mnt/xfs/w", "/mnt/btrfs/w"] {
        guest.writer_start(path)?;
    }
    for stage in [Stage::Read, Stage::Frozen, Stage::Thawing] {
        for end in [End::Rescind, End::Unbind, End::Override] {
            let one = || -> Result<()> {
                vss.wait_open(STEP)?;
                vss.agree(STEP)?;
                answered("HOT_BACKUP", &vss.hot_backup(STEP)?, status::OK)?;
                if stage == Stage::Read {
                    // Something to write back first, so that there is time to see it.
                    guest.sh("dd if=/dev/zero of=/mnt/xfs/dirty bs=1M count=64 2>/dev/null")?;
                }
                let freeze = vss.send_freeze(&[])?;
                match stage {
                    Stage::Read => guest.wait_until("the daemon has read FREEZE", STEP, || {
                        let state = ModuleState::of(guest)?;
                        Ok(state.words("request")?.first() == Some(&"read"))
                    })?,
                    _ => answered("FREEZE", &vss.wait(freeze, STEP)?, status::OK)?,
                }
                if stage == Stage::Thawing {
                    vss.send(Op::THAW, &SHORT_BODY)?;
                }
                end.take(guest)?;
                let start = guest.writers()?;
                guest.wait_until("every writer goes on", STEP, || {
                    let now = guest.writers()?;
                    let mut pairs = start.iter().zip(&now);
                    Ok(pairs.all(|(then, now)| now.count > then.count))
                })?;
                end.give_back(guest)?;
                vss.agree(STEP)?;
                backup(guest)
            };
            one().with_context(|| format!("{end:?} in the stage {stage:?}"))?;
        }
    }
    Ok(())
}

fn dying_daemon(guest: &Guest) -> Result<()> {
    let grace = guest.host().patience(Duration::from_millis(2500));
    super::load(guest, Module::Ours, &[&super::limit("grace", grace)])?;
    let vss = guest.vss();
    let disks = [Lun::scsi(CLASS, 0, 0, 0)];
    for abi in Abi::BOTH {
        for is_read in [false, true] {
            let pid = guest.fork()?;
            let daemon = Scripted::start_in(guest, Some(pid), abi)?;
            let tx = vss.send_freeze(&disks)?;
            if is_read {
                daemon.take(op::FREEZE)?;
            } else {
                daemon.is_offered()?;
            }
            guest.signal_pid(pid, 9)?;
            let killed = guest.host().now();
            let reply = vss.wait(tx, STEP)?;
            answered("FREEZE of the dead", &reply, status::FAIL)?;
            // What it had in hand fails with it; what it had not waits for another one.
            let after = reply.at.saturating_sub(killed);
            ensure!(
                (after < grace.mul_f64(0.8)) == is_read,
                "{abi:?}, FREEZE was read: {is_read}; it was failed {after:?} after the death"
            );
            if is_read {
                // It may have frozen something, so the next one is told to thaw.
                let next = Scripted::start(guest, abi)?;
                next.serve(op::THAW, status::OK)?;
                next.device.close()?;
            }
        }
    }
    guest.start_daemon(Daemon::Ours)?;
    super::wait_for_daemon(guest)?;
    backup(guest)
}

fn other_class(guest: &Guest) -> Result<()> {
    super::load(guest, Module::Ours, &[])?;
    let heartbeat = guest.host().heartbeat();
    let device = heartbeat.instance().to_string();
    let drivers = "/sys/bus/vmbus/drivers";
    let folder = format!("/sys/bus/vmbus/devices/{device}");
    let unbound = |what: &str| -> Result<()> {
        let seen = guest.try_sh(&format!("test -e {folder}/driver"))?;
        ensure!(
            seen.status == Some(1),
            "{what}: the heartbeat should have no driver"
        );
        ensure!(
            !heartbeat.is_open(),
            "{what}: the heartbeat should be closed"
        );
        Ok(())
    };
    // By class, for any device; by name, for this one.
    let class = heartbeat.class().to_string();
    guest.write(&format!("{drivers}/hv_vss/new_id"), &class)?;
    unbound("after new_id")?;
    let bind = guest.write(&format!("{drivers}/hv_vss/bind"), &device);
    refused("a bind after new_id", bind, "ENODEV")?;
    guest.write(&format!("{drivers}/hv_vss/remove_id"), &class)?;
    guest.write(&format!("{folder}/driver_override"), "hv_vss")?;
    let bind = guest.write(&format!("{drivers}/hv_vss/bind"), &device);
    refused("a bind after driver_override", bind, "ENODEV")?;
    unbound("after driver_override")?;
    guest.write(&format!("{folder}/driver_override"), "\n")?;
    // Its own driver has it as if nothing had been.
    guest.load(Module::Stock, &[])?;
    heartbeat.wait_open(STEP)?;
    equal("the heartbeat's answer", heartbeat.beat(7, STEP)?.0, 8)?;
    guest.start_daemon(Daemon::Ours)?;
    super::wait_for_daemon(guest)?;
    backup(guest)
}

fn second_device(guest: &Guest) -> Result<()> {
    super::load(guest, Module::Ours, &["grace_ms=20000"])?;
    let (first, second) = (guest.vss(), guest.host().second_vss());
    guest.start_daemon(Daemon::Ours)?;
    super::wait_for_daemon(guest)?;
    second.offer();
    let device = second.instance().to_string();
    guest.wait_until("the guest has the second device", STEP, || {
        let look = format!("test -e /sys/bus/vmbus/devices/{device}");
        Ok(guest.try_sh(&look)?.status == Some(0))
    })?;
    let bind = guest.write("/sys/bus/vmbus/drivers/hv_vss/bind", &device);
    refused("a bind of the second device", bind, "EBUSY")?;
    ensure!(!second.is_open(), "the second device should be closed");
    for word in ["duplicate", "already present"] {
        let log = guest.log(4)?;
        let found = log.iter().find(|record| record.text.contains(word));
        ensure!(found.is_none(), "nothing should get in the way: {found:?}");
    }
    backup(guest)?;

    // The daemon moves on with the node.
    first.rescind();
    first.wait_released(STEP)?;
    guest.write("/sys/bus/vmbus/drivers/hv_vss/bind", &device)?;
    second.wait_open(STEP)?;
    second.agree(STEP)?;
    answered("FREEZE", &second.freeze(&[], STEP)?, status::OK)?;
    answered("THAW", &second.thaw(STEP)?, status::OK)?;
    second.rescind();
    second.wait_released(STEP)?;
    first.offer();
    first.wait_open(STEP)?;
    first.agree(STEP)?;
    backup(guest)
}

fn open_refused(guest: &Guest) -> Result<()> {
    let vss = guest.vss();
    let device = vss.instance().to_string();
    let count = |wanted: &EventKind| {
        let events = vss.events();
        events.iter().filter(|event| event.kind == *wanted).count()
    };
    let nothing_left = |what: &str| -> Result<()> {
        let left =
            guest.try_sh("test -e /dev/vmbus/hv_vss || test -e /sys/kernel/debug/hv_vss/state")?;
        ensure!(left.status == Some(1), "{what}: no node should be left");
        let rings = guest.host().gpadls();
        ensure!(rings == 0, "{what}: {rings} rings are left");
        Ok(())
    };
    for _ in 0..3 {
        // The answer is no: the probe fails, the module stays.
        vss.on_open(OnOpen::Refuse);
        guest.load(Module::Ours, &[])?;
        equal("refusals", vss.is_open(), false)?;
        nothing_left("after a refusal")?;
        let bind = guest.write("/sys/bus/vmbus/drivers/hv_vss/bind", &device);
        refused("a bind while the host refuses", bind, "EAGAIN")?;

        // There is no answer, and the host takes the channel back while the probe waits.
        vss.on_open(OnOpen::Ignore);
        let asked = count(&EventKind::OpenIgnored);
        let bind = format!("echo {device} > /sys/bus/vmbus/drivers/hv_vss/bind");
        let binder = guest.spawn(&["sh", "-c", &bind])?;
        guest.wait_until("the guest asks to open the channel", STEP, || {
            Ok(count(&EventKind::OpenIgnored) > asked)
        })?;
        // By then the device node is there, and somebody may have it open.
        let early = guest.open_device(Blocking::Yes)?;
        let read = early.start_read(MAX_FRAME)?;
        vss.rescind();
        guest.wait(&binder, STEP)?;
        refused(
            "the read of the early",
            early.finish_read(read, STEP),
            "ENODEV",
        )?;
        vss.wait_released(STEP)?;
        early.close()?;
        nothing_left("after a rescind in the middle")?;

        vss.on_open(OnOpen::Open);
        vss.offer();
        vss.wait_open(STEP)?;
        vss.agree(STEP)?;
        let daemon = guest.start_daemon(Daemon::Ours)?;
        super::wait_for_daemon(guest)?;
        backup(guest)?;
        super::stop(guest, Module::Ours, &daemon)?;
    }
    Ok(())
}

/// Gives our module, which is loaded, the device that `hv_utils` has, and waits until it is open.
pub(super) fn take_over(guest: &Guest) -> Result<()> {
    let (sysfs, device) = (sysfs(guest), guest.vss().instance().to_string());
    guest.write(&format!("{sysfs}/driver_override"), "hv_vss")?;
    guest.write("/sys/bus/vmbus/drivers/hv_utils/unbind", &device)?;
    guest.vss().wait_closed(STEP)?;
    guest.write("/sys/bus/vmbus/drivers_probe", &device)?;
    Ok(guest.vss().wait_open(STEP)?)
}

/// Takes back that the device is for our module only.
pub(super) fn end_override(guest: &Guest) -> Result<()> {
    guest.write(&format!("{}/driver_override", sysfs(guest)), "\n")?;
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
    take_over(guest)?;
    let device = host.vss().instance().to_string();
    equal("the driver of VSS after", driver(guest)?.trim(), "hv_vss")?;

    // A backup goes through ours, the others never noticed.
    host.vss().agree(STEP)?;
    guest.start_daemon(Daemon::Ours)?;
    backup(guest)?;
    // As many at once as no single run of our callback takes: what hv_utils had set for the channel
    // must not hold.
    let many: Vec<_> = (0..64)
        .map(|_| host.vss().send(Op::GET_DM_INFO, &SHORT_BODY))
        .collect::<Result<_, _>>()?;
    for tx in many {
        answered("one of many", &host.vss().wait(tx, STEP)?, status::OK)?;
    }
    let (sequence, _) = host.heartbeat().beat(7, STEP)?;
    equal("the heartbeat's answer to 7", sequence, 8)?;
    ensure!(host.shutdown().is_open(), "shutdown should still be open");

    // And back: without the override the device is anybody's again.
    end_override(guest)?;
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
    host.vss().agree(STEP)?;
    guest.start_daemon(Daemon::Ours)?;
    backup(guest)?;
    guest.ends()?;
    host.shutdown().power_off(STEP)?;
    let exit = guest.vm().wait_exit(STEP * 2)?;
    equal("how the guest ended", exit, Exit::PowerOff)
}
