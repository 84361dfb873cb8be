// SPDX-License-Identifier: GPL-2.0-only

//! A backup is good when it restores. Here the host copies the disks between the answer to FREEZE and
//! the THAW, as a real one does, and the copies are judged from outside:
//!
//! - nothing was written to a disk of the backup from the answer on until THAW was sent (the host's
//!   write log);
//! - the copy needs no replay of a journal, and the file system's own checker finds it clean;
//! - every record that a writer had synced before the answer is in it, and none that was begun after.
//!
//! Writers keep notes of their records on a disk that is not part of the backup, so the host's clock
//! orders notes, writes and answers. `restore/checkers-*` give the same judges copies that are bad.
//! `volumes/*` is the same on what administrators make of disks, with their tools.

mod judge;
mod rig;
mod volume;

use super::disks::{case, Attached};
use super::{load, rounds_or, start, stop, wait_for_daemon, Case, When};
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Machine, Module, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::storage::{log, Change, Entry, Image};
use hyperv_sim::Exit;
use judge::{judge, judge_records};
use lab_agent::record;
use rig::{Copy, Part, Rig, Volume};
use std::time::{Duration, Instant};
use volume::{Format, Stack};

pub(super) use rig::{written_within, Expected, NOTES};

pub const CASES: &[Case] = &[
    long(
        "restore/ext4",
        "a copy of a busy ext4, made between FREEZE and THAW, restores without replay, repair or loss",
        |guest| ours_and_peer(guest, Format::Ext4),
    ),
    long(
        "restore/xfs",
        "so does one of xfs",
        |guest| ours_and_peer(guest, Format::Xfs),
    ).long(),
    long(
        "restore/btrfs",
        "so does one of btrfs",
        |guest| ours_and_peer(guest, Format::Btrfs),
    ).long(),
    long(
        "restore/checkers-ext4",
        "its judges refuse a copy without a freeze, one that lacks a write, and a torn one",
        |guest| bad_copies(guest, Format::Ext4),
    ).long(),
    long(
        "restore/checkers-xfs",
        "so do those of xfs",
        |guest| bad_copies(guest, Format::Xfs),
    ).long(),
    long(
        "restore/checkers-btrfs",
        "so do those of btrfs",
        |guest| bad_copies(guest, Format::Btrfs),
    ).long(),
    Case {
        machine: Machine::SCSI_ROOT,
        ..case(
            "restore/root",
            "a guest boots from the copy of a busy root, without replay, repair or loss",
            root,
        )
    }.long(),
    long(
        "restore/lost-thaw",
        "the host never says THAW: until the deadline nothing is written, and a copy from then restores",
        lost_thaw,
    ).long(),
    volumes(
        "volumes/lvm",
        "copies of ext4, xfs and btrfs on logical volumes over two disks each restore, beside the originals",
        |guest| on(guest, Stack::Lvm),
    ),
    volumes(
        "volumes/md",
        "so do those of mirrors, and the copies of both disks of a mirror are alike",
        |guest| on(guest, Stack::Md),
    ),
    volumes(
        "volumes/luks",
        "so do those of encrypted disks",
        |guest| on(guest, Stack::Luks),
    ),
    volumes(
        "volumes/under-fio",
        "six file systems on slow disks and volumes, under fio: every copy of every backup restores",
        under_fio,
    ),
];

/// A case with the tools for volumes, and rounds.
const fn volumes(name: &'static str, about: &'static str, run: fn(&Guest) -> Result<()>) -> Case {
    Case {
        machine: Machine::VOLUMES,
        per_round: Duration::from_secs(600),
        when: When::Named,
        ..case(name, about, run)
    }
}

/// A case that puts several disks on and takes them off again, for which the guest scans its bus each
/// time: it may take longer than most.
const fn long(name: &'static str, about: &'static str, run: fn(&Guest) -> Result<()>) -> Case {
    Case {
        per_round: Duration::from_secs(15),
        ..case(name, about, run)
    }
}

/// A THAW that gets lost. A host that copies a disk at any moment from the answer on has what the log has
/// until then: with nothing written before the deadline that is one and the same copy all the time.
fn lost_thaw(guest: &Guest) -> Result<()> {
    const KINDS: [(Format, Stack); 3] = [
        (Format::Ext4, Stack::Disk),
        (Format::Xfs, Stack::Disk),
        (Format::Btrfs, Stack::Disk),
    ];
    const DEADLINE: Duration = Duration::from_secs(20);
    for module in [Module::Ours, Module::Stock] {
        load(guest, module, &[])?;
        let process = guest.start_daemon_with(&format!("deadline = {}", DEADLINE.as_secs()))?;
        wait_for_daemon(guest)?;
        let mut rig = Rig::new(guest, &KINDS, Duration::ZERO)?;
        let host = guest.host();
        let luns: Vec<_> = rig.disks().map(Attached::in_backup).collect();
        let bases = rig.start_logs()?;
        rig.wait_for_progress(guest, 3)?;
        let freeze = guest.vss().freeze(&luns, STEP)?;
        answered("FREEZE", &freeze, status::OK)?;
        rig.wait_for_progress(guest, 3)?;
        answered("THAW", &guest.vss().thaw(STEP)?, status::FAIL)?;
        let notes = rig.notes.disk.log();
        let mut copies = Vec::new();
        for ((volume, attached), base) in rig.volumes.iter().zip(rig.disks()).zip(bases) {
            let mut log = attached.disk.log();
            let is_after = |entry: &Entry| host.time_of(entry.ended) > freeze.at;
            let first = log.iter().find(|it| it.is_write() && is_after(it));
            let first = first.context("nothing was written after the deadline")?;
            let still = host.time_of(first.arrived).saturating_sub(freeze.at);
            println!(
                "     {module:?}, {}: FREEZE took {:.1?}, the first write came {still:.1?} after it",
                volume.format.name(),
                freeze.latency
            );
            // The deadline counts from the first freeze on.
            ensure!(
                still + freeze.latency >= DEADLINE,
                "it was written {still:?} after the answer, which took {:?}",
                freeze.latency
            );
            log.retain(|entry| !is_after(entry));
            copies.push(Copy {
                format: volume.format,
                stack: volume.stack,
                parts: vec![Part {
                    image: log::replay(&base, &log),
                    base,
                    log,
                }],
                written: 0,
                expected: Expected::at(&notes, volume.slot, |moment| {
                    host.time_of(moment) < freeze.at
                }),
            });
        }
        rig.stop_logs();
        rig.stop(guest)?;
        stop(guest, module, &process)?;
        let all: Vec<_> = copies.iter().collect();
        for (copy, verdict) in all.iter().zip(judge(guest, &all)?) {
            ensure!(
                verdict.objections().is_empty() && copy.expected.least > 0,
                "{module:?}, {:?}, {:?}: {verdict:#?}",
                copy.format,
                copy.expected
            );
        }
        rig.detach(guest)?;
    }
    Ok(())
}

/// A backup of one busy file system with ours and with the peer.
fn ours_and_peer(guest: &Guest, format: Format) -> Result<()> {
    let mut told = Vec::new();
    for (module, daemon) in [
        (Module::Ours, Daemon::Ours),
        (Module::Stock, Daemon::Debian),
    ] {
        let process = start(guest, module, daemon)?;
        let mut rig = Rig::new(guest, &[(format, Stack::Disk)], Duration::ZERO)?;
        let backup = rig.back_up(guest)?;
        rig.stop(guest)?;
        stop(guest, module, &process)?;
        let copies: Vec<_> = backup.copies.iter().collect();
        let verdicts = judge(guest, &copies)?;
        let copy = backup.copies.first().context("no copy")?;
        let verdict = verdicts.first().context("no verdict")?;
        println!("     {module:?}: {:?}, {verdict:?}", copy.expected);
        ensure!(
            copy.expected.least > 0 && !copy.only_part()?.log.is_empty(),
            "there should have been records and writes: {:?}",
            copy.expected
        );
        if daemon == Daemon::Ours {
            ensure!(
                verdict.objections().is_empty(),
                "the copy is bad: {verdict:#?}"
            );
        }
        told.push(verdict.describe());
        rig.detach(guest)?;
    }
    if let [ours, peer] = told.as_slice() {
        let what = format!(
            "a busy {} is copied between the answer and THAW",
            format.name()
        );
        guest.compare(&what, ours, peer);
    }
    Ok(())
}

/// Copies that are bad, each in its own way, and one that is good.
fn bad_copies(guest: &Guest, format: Format) -> Result<()> {
    let process = start(guest, Module::Ours, Daemon::Ours)?;
    let mut rig = Rig::new(guest, &[(format, Stack::Disk)], Duration::ZERO)?;
    let backup = rig.back_up(guest)?;
    let unfrozen = without_freeze(guest, &rig)?;
    rig.stop(guest)?;
    stop(guest, Module::Ours, &process)?;
    let good = backup.copies.into_iter().next().context("no copy")?;

    guest.expect_in_log(&["EXT4-fs", "JBD2", "XFS", "BTRFS"]);
    // The log makes the same disk as the copy, so a log with a fault makes that disk with the fault.
    let part = good.only_part()?;
    let again = good.with(log::replay(&part.base, &part.log))?;
    let lacking = good.with(without_record(part, good.expected.least)?)?;
    let torn = good.with(torn(part)?)?;
    let copies = [&good, &again, &unfrozen, &lacking, &torn];
    let verdicts = judge(guest, &copies)?;
    let names = [
        "the copy",
        "its log replayed",
        "no freeze",
        "a write dropped",
        "torn",
    ];
    for ((name, verdict), must_be_good) in names
        .iter()
        .zip(&verdicts)
        .zip([true, true, false, false, false])
    {
        let judges: Vec<_> = verdict.objections().iter().map(|it| it.0).collect();
        println!("     {name}: {judges:?}");
        ensure!(
            judges.is_empty() == must_be_good,
            "{name}: that is wrong: {verdict:#?}"
        );
    }
    let log = unfrozen.written;
    ensure!(
        log > 0,
        "the log should have the writes of a guest that is not frozen"
    );
    Ok(())
}

/// A copy of a busy disk that nobody has frozen, judged as if the guest had just answered FREEZE.
fn without_freeze(guest: &Guest, rig: &Rig) -> Result<Copy> {
    let base = rig.start_logs()?.into_iter().next().context("no base")?;
    rig.wait_for_progress(guest, 20)?;
    let answer = Instant::now();
    let volume = rig.volumes.first().context("no volume")?;
    let disk = &volume.disks.first().context("no disk")?.disk;
    let image = disk.snapshot()?;
    rig.wait_for_progress(guest, 3)?;
    let log = disk.log();
    let copy = Copy {
        format: volume.format,
        stack: volume.stack,
        written: written_within(&log, 0, |entry| entry.ended > answer),
        expected: Expected::at(&rig.notes.disk.log(), volume.slot, |moment| moment < answer),
        parts: vec![Part { base, log, image }],
    };
    rig.stop_logs();
    Ok(copy)
}

/// The disk as it would be if the writes with this record had got lost.
fn without_record(part: &Part, number: u64) -> Result<Image> {
    let record = record(number);
    let has = |entry: &&Entry| match &entry.change {
        Change::Write { data, .. } => data.windows(record.len()).any(|it| it == record.as_bytes()),
        Change::Discard { .. } | Change::Flush => false,
    };
    ensure!(
        part.log.iter().any(|it| has(&it)),
        "no write has {record:?}"
    );
    Ok(log::replay(
        &part.base,
        part.log.iter().filter(|it| !has(it)),
    ))
}

/// The disk as a copy would be that was made, from front to back, while the guest wrote what is in the
/// log.
fn torn(part: &Part) -> Result<Image> {
    let offset = |entry: &Entry| match &entry.change {
        Change::Write { offset, .. } | Change::Discard { offset, .. } => Some(*offset),
        Change::Flush => None,
    };
    let mut places: Vec<u64> = part.log.iter().filter_map(offset).collect();
    places.sort_unstable();
    places.dedup();
    ensure!(places.len() > 1, "too little was written");
    // When so much of the log had been written as the copy had come along the places.
    let is_in_it = |(at, entry): &(usize, &Entry)| {
        let place = offset(entry).and_then(|it| places.binary_search(&it).ok());
        place.is_some_and(|place| at * places.len() < place * part.log.len())
    };
    let kept = part.log.iter().enumerate().filter(is_in_it);
    Ok(log::replay(&part.base, kept.map(|it| it.1)))
}

/// A copy of the root is another machine's root.
fn root(guest: &Guest) -> Result<()> {
    let process = start(guest, Module::Ours, Daemon::Ours)?;
    guest.sh("mkdir /var/lab")?;
    let mut rig = Rig {
        volumes: vec![Volume {
            format: Format::Ext4,
            stack: Stack::Disk,
            disks: vec![Attached::root(guest)?],
            path: "/var/lab".into(),
            slot: 0,
        }],
        notes: Attached::new(guest, NOTES.0, NOTES.1, 1, Image::default())?,
        load: Vec::new(),
    };
    rig.start_load(guest)?;
    let backup = rig.back_up(guest)?;
    let copy = backup.copies.into_iter().next().context("no copy")?;
    equal("writes between the answer and THAW", copy.written, 0)?;
    ensure!(copy.expected.least > 0, "there should be records");
    guest.signal(&process, 9)?;
    guest.ends()?;
    // It does not answer that.
    let _ = guest.spawn(&["poweroff", "-nf"]);
    let exit = guest.vm().wait_exit(STEP)?;
    equal("how the guest ended", exit, Exit::PowerOff)?;

    let restored = guest.start_from(copy.only_part()?.image.clone())?;
    let mounts = restored.read("/proc/mounts")?;
    let root = mounts.lines().find(|it| it.split(' ').nth(1) == Some("/"));
    ensure!(
        root.is_some_and(|it| it.starts_with("/dev/sda / ext4 rw")),
        "the root should be on the disk: {mounts}"
    );
    let log = restored.sh("dmesg")?;
    let repairs = ["recovery", "orphan", "EXT4-fs error", "EXT4-fs warning"];
    let repaired: Vec<_> = log
        .lines()
        .filter(|line| line.contains("EXT4-fs") && repairs.iter().any(|it| line.contains(it)))
        .collect();
    ensure!(repaired.is_empty(), "the root was repaired: {repaired:#?}");
    let records = judge_records(&restored.read("/var/lab/records")?, copy.expected);
    equal("what is wrong with the records", records, None)?;
    restored.sh("echo 'and goes on' > /var/lab/after && sync")?;
    restored.check_log()?;
    restored.vm().kill();
    Ok(())
}

/// Backups of each file system on volumes of a kind.
fn on(guest: &Guest, stack: Stack) -> Result<()> {
    let kinds = [Format::Ext4, Format::Xfs, Format::Btrfs].map(|it| (it, stack));
    one_after_the_other(guest, &kinds, Duration::ZERO, false)
}

/// Backups without a pause, of disks that are slow and busy.
fn under_fio(guest: &Guest) -> Result<()> {
    const KINDS: [(Format, Stack); 6] = [
        (Format::Ext4, Stack::Disk),
        (Format::Xfs, Stack::Lvm),
        (Format::Btrfs, Stack::Disk),
        (Format::Ext4, Stack::Md),
        (Format::Xfs, Stack::Luks),
        (Format::Btrfs, Stack::Lvm),
    ];
    one_after_the_other(guest, &KINDS, Duration::from_millis(5), true)
}

fn one_after_the_other(
    guest: &Guest,
    kinds: &[(Format, Stack)],
    delay: Duration,
    fio: bool,
) -> Result<()> {
    let process = start(guest, Module::Ours, Daemon::Ours)?;
    let mut rig = Rig::new(guest, kinds, delay)?;
    if fio {
        rig.start_fio(guest)?;
    }
    let (mut copies, mut records) = (0, 0);
    for round in 0..rounds_or(2) {
        let backup = rig.back_up(guest)?;
        let all: Vec<_> = backup.copies.iter().collect();
        rig.rest(guest, true)?;
        let verdicts = judge(guest, &all)?;
        rig.rest(guest, false)?;
        for (copy, verdict) in all.iter().zip(verdicts) {
            ensure!(
                verdict.objections().is_empty() && copy.expected.least > 0,
                "backup {round}, {:?} on {:?}, {:?}: {verdict:#?}",
                copy.format,
                copy.stack,
                copy.expected
            );
            copies += 1;
            records += copy.expected.least;
        }
        println!("     backup {round}: {copies} copies are good, {records} records had to be there and are");
    }
    rig.stop(guest)?;
    stop(guest, Module::Ours, &process)
}
