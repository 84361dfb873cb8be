// SPDX-License-Identifier: GPL-2.0-only

//! The stock kernel's own drivers as judges of the simulated host: what they bind to works, and they have
//! nothing to complain of. And what else a host does to a guest while it backs it up.

use super::deadman::released_at;
use super::{
    all_frozen, case, good, load, observe, start, stop, stuck_writers, wait_for_daemon, Case,
};
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Machine, Module, Process, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::ic::Version;
use hyperv_sim::{Balloon, IcChannel, Negotiated};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub const CASES: &[Case] = &[
    case(
        "judges/hv-utils",
        "hv_utils on all four of its components: the newest versions are agreed on, the heartbeat beats, the clock follows",
        hv_utils,
    ),
    case(
        "judges/uio",
        "uio_hv_generic takes a device, opens its channel, hears of a message and lets go of it",
        uio,
    ),
    case(
        "judges/crash",
        "a program that ends by SIGABRT which nobody has sent is held against the case, and so are the words of a panic",
        crash,
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
    Case {
        machine: Machine::BALLOON,
        ..case(
            "judges/balloon",
            "hv_balloon reports the guest's memory, gives the host of it and has it back; a backup in between is good",
            balloon,
        )
    },
    Case {
        machine: Machine::BALLOON,
        ..case(
            "judges/balloon-while-frozen",
            "the host takes memory while all is frozen, and gives it back while all is frozen: THAW is good",
            balloon_while_frozen,
        )
    },
];

/// What every case is judged by, seen to fail.
fn crash(guest: &Guest) -> Result<()> {
    let is_held_against = |what: &str| -> Result<()> {
        let held = guest.check_log().err().map(|it| it.to_string());
        let held = held.with_context(|| format!("nobody complains: {what}"))?;
        ensure!(held.contains(what), "it should say {what}: {held}");
        Ok(guest.mark_log()?)
    };
    let program = guest.spawn(&["sh", "-c", "kill -ABRT $$"])?;
    equal("its end", guest.wait(&program, STEP)?.signal, Some(6))?;
    is_held_against("SIGABRT")?;
    let program = guest.spawn(&["sleep", "1000"])?;
    guest.signal(&program, 6)?;
    equal("its end", guest.wait(&program, STEP)?.signal, Some(6))?;
    guest.check_log()?;
    // As a thread of the daemon or of its guard says it.
    guest.sh("echo 'hv_vss_daemon: panicked at daemon/src/lib.rs:1:1:' >/dev/kmsg")?;
    is_held_against("panicked at")
}

const HOUR: Duration = Duration::from_secs(3600);

/// What the stock driver knows of framework, heartbeat, shutdown and time sync (`fw_versions`, `hb_versions`,
/// `sd_versions` and `ts_versions` in drivers/hv/hv_util.c).
const KNOWN_FRAMEWORKS: [Version; 2] = [Version::new(1, 0), Version::new(3, 0)];
const KNOWN_HEARTBEAT: [Version; 2] = [Version::new(1, 0), Version::new(3, 0)];
const KNOWN_SHUTDOWN: [Version; 4] = [
    Version::new(1, 0),
    Version::new(3, 0),
    Version::new(3, 1),
    Version::new(3, 2),
];
const KNOWN_TIMESYNC: [Version; 3] = [Version::new(1, 0), Version::new(3, 0), Version::new(4, 0)];

/// All that the stock driver serves beside VSS: on each channel the guest takes the newest version that both
/// sides know; the heartbeat beats, and the clock is set as the host's is.
pub(super) fn components(guest: &Guest) -> Result<()> {
    let host = guest.host();
    let profile = *host.profile();
    let (heartbeat, shutdown, sync) = (host.heartbeat(), host.shutdown(), host.timesync());
    let channels: [(&IcChannel, &[Version], &[Version]); 3] = [
        (&heartbeat, profile.heartbeat, &KNOWN_HEARTBEAT),
        (&shutdown, profile.shutdown, &KNOWN_SHUTDOWN),
        (&sync, profile.timesync, &KNOWN_TIMESYNC),
    ];
    for (channel, offered, known) in channels {
        let newest = |offered: &[Version], known: &[Version]| {
            let both = offered.iter().filter(|it| known.contains(it));
            both.max().copied().context("none that both know")
        };
        let expected = Negotiated {
            framework: newest(profile.frameworks, &KNOWN_FRAMEWORKS)?,
            message: newest(offered, known)?,
        };
        channel.wait_open(STEP)?;
        equal(channel.name(), channel.agree(STEP)?, expected)?;
    }
    let (answer, _) = heartbeat.beat(41, STEP)?;
    equal("the heartbeat's answer to 41", answer, 42)?;
    for time in [SystemTime::now() + 24 * HOUR, SystemTime::now()] {
        set_clock(guest, time)?;
    }
    Ok(())
}

/// Has the host set the guest's clock, and compares the two: a message that tells the guest's reference time
/// wrongly sets the clock, too, but by as much off.
fn set_clock(guest: &Guest, time: SystemTime) -> Result<()> {
    // It is read in whole seconds.
    const OFF: f64 = 1.5;
    let sync = guest.host().timesync();
    sync.wait_open(STEP)?;
    let asked = Instant::now();
    answered("time sync", &sync.set(time, STEP)?, status::OK)?;
    let told = Instant::now();
    let time = time.duration_since(UNIX_EPOCH)?.as_secs_f64();
    let mut seen = String::new();
    let set = guest.wait_until("the guest's clock is the host's", STEP, || {
        let least = told.elapsed().as_secs_f64();
        let clock: f64 = guest.sh("date +%s")?.trim().parse()?;
        let most = asked.elapsed().as_secs_f64();
        let on = clock + 0.5 - time;
        // The host read its own at some time while it asked, and the guest some time while it was asked.
        seen = format!("{on:.1} s after what was set {least:.1} to {most:.1} s ago");
        Ok((least - OFF..most + OFF).contains(&on))
    });
    set.with_context(|| seen.clone())?;
    println!("     its clock is {seen}");
    Ok(())
}

fn hv_utils(guest: &Guest) -> Result<()> {
    load(guest, Module::Stock, &[])?;
    components(guest)
}

fn uio(guest: &Guest) -> Result<()> {
    let device = guest.vss();
    let (class, instance) = (device.class(), device.instance());
    guest.sh(&format!(
        "modprobe uio_hv_generic && echo {class} >/sys/bus/vmbus/drivers/uio_hv_generic/new_id"
    ))?;
    let driver = format!("basename $(readlink /sys/bus/vmbus/devices/{instance}/driver)");
    equal("its driver", guest.sh(&driver)?.trim(), "uio_hv_generic")?;
    // Who opens it opens the channel, and who writes a 1 wants to hear of what comes.
    let line = r"exec 3<>/dev/uio0 && printf '\001\000\000\000' >&3 && echo on && exec sleep 1000";
    let reader = guest.spawn(&["sh", "-c", line])?;
    device.wait_open(STEP)?;
    guest.wait_until("it wants interrupts", STEP, || {
        Ok(guest.output(&reader)?.contains("on"))
    })?;
    let heard = || -> Result<u64> { Ok(guest.read("/sys/class/uio/uio0/event")?.trim().parse()?) };
    let before = heard()?;
    device.send_freeze(&[])?;
    guest.wait_until("it hears of a message", STEP, || Ok(heard()? > before))?;
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
        guest.wait_until("the writer stands still", STEP, || all_frozen(guest))?;
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
    load(guest, module, &[])?;
    let (daemon, deadline) = guest.start_daemon_within("deadline", Duration::from_secs(2))?;
    wait_for_daemon(guest)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    let frozen = guest.clock()?;
    let sync = guest.host().timesync();
    sync.set(SystemTime::now() - 2 * HOUR, STEP)?;
    released_at(guest, "the deadline", frozen, deadline)?;
    answered("THAW after it", &vss.thaw(STEP)?, status::FAIL)?;
    set_clock(guest, SystemTime::now())?;
    stop(guest, module, &daemon)
}

/// Pages that the host takes: 64 MiB, which the guest gives in pieces of 2 MiB, and so many single ones
/// that neither their list nor that of what comes back fits in one message.
const PAGES: u32 = (64 << 20) / 4096 + 511;
/// The same in KiB, as all numbers of /proc/meminfo.
const TAKEN: u64 = PAGES as u64 * 4;
/// By so much those may be off that change by themselves.
const NOISE: u64 = 16 << 10;

/// What /proc/meminfo says, in KiB.
#[derive(Debug)]
struct Memory {
    total: u64,
    /// With what each CPU keeps for itself, which is most of what comes back page by page.
    free: u64,
    available: u64,
    committed: u64,
}

impl Memory {
    fn of(guest: &Guest) -> Result<Memory> {
        let text = guest.read("/proc/meminfo")?;
        let number = |name: &str| -> Result<u64> {
            let line = text.lines().find(|line| line.starts_with(name));
            let value = line.and_then(|line| line.split_whitespace().nth(1));
            let value = value.with_context(|| format!("no {name} in /proc/meminfo"))?;
            Ok(value.parse()?)
        };
        let mut kept = 0;
        for line in guest.read("/proc/zoneinfo")?.lines() {
            if let Some(pages) = line.trim_start().strip_prefix("count:") {
                kept += pages.trim().parse::<u64>()? * 4;
            }
        }
        Ok(Memory {
            total: number("MemTotal:")?,
            free: number("MemFree:")? + kept,
            available: number("MemAvailable:")?,
            committed: number("Committed_AS:")?,
        })
    }
}

/// The guest's next report must be of the memory that /proc/meminfo tells of.
fn reports_its_memory(guest: &Guest, balloon: &Balloon) -> Result<()> {
    let before = Memory::of(guest)?;
    let status = balloon.wait_status(STEP)?;
    let memory = Memory::of(guest)?;
    let text = format!("{status:?} between {before:?} and {memory:?}");
    let (available, committed) = (status.available_pages * 4, status.committed_pages * 4);
    let low = before.available.min(memory.available);
    let high = before.available.max(memory.available);
    ensure!(
        (low - NOISE..high + NOISE).contains(&available),
        "available: {text}"
    );
    // It adds what is taken, and what it wants to keep (compute_balloon_floor()): of a guest of this size
    // 104 MiB and an eighth.
    let keeps = (104 << 10) + memory.total / 8;
    let expected = memory.committed + balloon.taken_pages() * 4 + keeps;
    ensure!(
        committed.abs_diff(expected) < NOISE,
        "committed, not {expected} KiB: {text}"
    );
    Ok(())
}

/// A writer on a file system of its own, our module and daemon, and the driver of dynamic memory.
fn with_balloon(guest: &Guest) -> Result<(Balloon, Process)> {
    // What is made later, of a disk that is memory, would take some of it.
    guest.sh(
        "mkdir -p /mnt/a && mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 /dev/ram1 &&
         mount /dev/ram1 /mnt/a",
    )?;
    guest.writer_start("/mnt/a/w")?;
    let daemon = start(guest, Module::Ours, Daemon::Ours)?;
    let balloon = guest.host().balloon();
    // Without the parameter it says nothing for its first 45 s. Once loaded, it stays.
    guest.sh(&format!(
        "if [ -e /sys/module/hv_balloon ]; then
             echo {} >/sys/bus/vmbus/drivers/hv_balloon/bind
         else
             modprobe hv_balloon pressure_report_delay=0
         fi",
        balloon.instance()
    ))?;
    let can = balloon.wait_ready(STEP)?;
    ensure!(can.balloon, "it should give memory: {can:?}");
    Ok((balloon, daemon))
}

/// Ends what that has started.
fn without_balloon(guest: &Guest, balloon: &Balloon, daemon: &Process) -> Result<()> {
    guest.sh(&format!(
        "echo {} >/sys/bus/vmbus/drivers/hv_balloon/unbind",
        balloon.instance()
    ))?;
    balloon.wait_closed(STEP)?;
    stop(guest, Module::Ours, daemon)
}

fn balloon(guest: &Guest) -> Result<()> {
    let (balloon, daemon) = with_balloon(guest)?;
    reports_its_memory(guest, &balloon)?;

    // What is written to a RAM disk takes memory, and the backup will write what is dirty.
    guest.sh("sync")?;
    let before = Memory::of(guest)?;
    equal("pages", balloon.take(PAGES, STEP)?, PAGES.into())?;
    let without = Memory::of(guest)?;
    let text = format!("{before:?}, then {without:?}");
    ensure!(without.total == before.total - TAKEN, "the total: {text}");
    let gone = before.free.saturating_sub(without.free);
    ensure!(
        gone.abs_diff(TAKEN) < NOISE,
        "{gone} KiB less are free: {text}"
    );
    reports_its_memory(guest, &balloon)?;
    equal(
        "a backup without them",
        observe(guest)?,
        good(&["/mnt/a/w"]),
    )?;

    equal("pages back", balloon.give_back(STEP)?, PAGES.into())?;
    equal("pages of the host's", balloon.taken_pages(), 0)?;
    let after = Memory::of(guest)?;
    let text = format!("{before:?}, then {after:?}");
    ensure!(after.total == before.total, "the total: {text}");
    // The writer takes memory as well, the more the faster the machine is.
    ensure!(after.free + TAKEN / 2 > before.free, "what is free: {text}");
    reports_its_memory(guest, &balloon)?;
    without_balloon(guest, &balloon, &daemon)
}

fn balloon_while_frozen(guest: &Guest) -> Result<()> {
    let (balloon, daemon) = with_balloon(guest)?;
    let vss = guest.vss();
    for take in [true, false] {
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        let moved = match take {
            true => balloon.take(PAGES, STEP)?,
            false => balloon.give_back(STEP)?,
        };
        equal("pages", moved, PAGES.into())?;
        balloon.wait_status(STEP)?;
        guest.wait_until("the writer stands still", STEP, || all_frozen(guest))?;
        answered("THAW", &vss.thaw(STEP)?, status::OK)?;
        equal("who is stuck", stuck_writers(guest)?, Vec::new())?;
    }
    without_balloon(guest, &balloon, &daemon)
}
