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

use super::deadman::RELEASED;
use super::dialogue::{Abi, Scripted};
use super::disks::{case, Attached};
use super::{load, rounds_or, start, stop, wait_for_daemon, Case, When};
use anyhow::{ensure, Context, Result};
use e2e::agent::CallError;
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Machine, Module, Process, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::storage::{log, Change, Entry, Image};
use hyperv_sim::Exit;
use judge::{judge, judge_by_checker, judge_records_at, Verdict, RESTORES, RESTORES_UNWRITTEN};
use lab_agent::record;
use rig::{Backup, Copy, Part, Rig, Volume, COPIES};
use std::time::{Duration, Instant};
use volume::{Format, Stack};

pub(super) use rig::{stood_still, Expected, NOTES};

pub const CASES: &[Case] = &[
    long(
        "restore/ext4",
        "a copy of a busy ext4, made between FREEZE and THAW, restores without replay, repair or loss",
        |guest| ours_and_peer(guest, Format::Ext4),
    )
    .comparing(),
    long(
        "restore/xfs",
        "so does one of xfs",
        |guest| ours_and_peer(guest, Format::Xfs),
    )
    .comparing().long(),
    long(
        "restore/btrfs",
        "so does one of btrfs",
        |guest| ours_and_peer(guest, Format::Btrfs),
    )
    .comparing().long(),
    long(
        "restore/btrfs-discards",
        "what btrfs discards while it is frozen is free in the copy, too",
        btrfs_discards,
    ).long(),
    long(
        "restore/checkers-ext4",
        "each of its judges refuses what it is there for: a copy without a freeze, one that lacks a write, a torn and a damaged one",
        |guest| bad_copies(guest, Format::Ext4),
    ),
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
            |guest| root(guest).map(drop),
        )
    },
    Case {
        machine: Machine::SCSI_ROOT,
        ..case(
            "restore/checkers-root",
            "the copy of a root that nobody has frozen, though a daemon says so, is refused",
            unfrozen_root,
        )
    }
    .long(),
    Case {
        machine: Machine::SCSI_ROOT,
        ..case(
            "restore/root-and-peer",
            "the same, and the copy that the peer makes of its root",
            root_and_peer,
        )
    }
    .comparing()
    .long(),
    long(
        "restore/lost-thaw",
        "the host never says THAW: until the deadline nothing is written, and a copy from then restores",
        lost_thaw,
    )
    .comparing().long(),
    volumes(
        "volumes/lvm",
        "copies of ext4, xfs and btrfs on logical volumes over two disks each restore, beside the originals",
        |guest| on(guest, Stack::Lvm),
    )
    .comparing(),
    volumes(
        "volumes/md",
        "so do those of mirrors, and the copies of both disks of a mirror are alike",
        |guest| on(guest, Stack::Md),
    )
    .comparing(),
    volumes(
        "volumes/luks",
        "so do those of encrypted disks",
        |guest| on(guest, Stack::Luks),
    )
    .comparing(),
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
/// until then: with nothing written before the deadline that is one and the same copy all the time. The peer
/// has no deadline, and is watched for a while longer.
fn lost_thaw(guest: &Guest) -> Result<()> {
    const KINDS: [(Format, Stack); 3] = [
        (Format::Ext4, Stack::Disk),
        (Format::Xfs, Stack::Disk),
        (Format::Btrfs, Stack::Disk),
    ];
    const DEADLINE: Duration = Duration::from_secs(20);
    const LONGER: Duration = Duration::from_secs(24);
    let mut of_ours = Vec::new();
    let mut of_peer = String::new();
    for (module, daemon) in [
        (Module::Ours, Daemon::Ours),
        (Module::Stock, Daemon::Ours),
        (Module::Stock, Daemon::Debian),
    ] {
        load(guest, module, &[])?;
        let process = match daemon {
            Daemon::Ours => {
                guest.start_daemon_with(&format!("deadline = {}", DEADLINE.as_secs()))?
            }
            Daemon::Debian => guest.start_daemon(daemon)?,
        };
        wait_for_daemon(guest)?;
        let mut rig = Rig::new(guest, &KINDS, Duration::ZERO)?;
        let host = guest.host();
        let luns: Vec<_> = rig.disks().map(Attached::in_backup).collect();
        let bases = rig.start_logs()?;
        rig.wait_for_progress(guest, 3)?;
        let freeze = guest.vss().freeze(&luns, STEP)?;
        answered("FREEZE", &freeze, status::OK)?;
        match daemon {
            Daemon::Ours => {
                rig.wait_for_progress(guest, 3)?;
                answered("THAW", &guest.vss().thaw(STEP)?, status::FAIL)?;
            }
            Daemon::Debian => guest.wait_until("nothing is written for long", STEP * 2, || {
                Ok(host.now() > freeze.at + LONGER)
            })?,
        }
        let notes = rig.notes.disk.log();
        let mut stood = Vec::new();
        let mut copies = Vec::new();
        for ((volume, attached), base) in rig.volumes.iter().zip(rig.disks()).zip(bases) {
            let mut log = attached.disk.log();
            let is_before = |at: Instant| host.time_of(at) <= freeze.at;
            let is_after = |entry: &Entry| !entry.ended.is_some_and(is_before);
            let found = until_written(volume.format, &log, is_after);
            let still = found.map(|it| host.time_of(it.1.arrived).saturating_sub(freeze.at));
            let until = found.map_or(log.as_slice(), |it| it.0);
            // The copy of a host that takes its time has what was discarded meanwhile.
            let image = log::replay(&base, until);
            let discarded = until.iter().filter(|it| it.is_write() && is_after(it));
            let discarded = discarded.count();
            println!(
                "     {module:?}, {daemon:?}, {}: FREEZE took {:.1?}, the first write came {still:.1?} after it",
                volume.format.name(),
                freeze.latency
            );
            stood.push(still);
            if daemon == Daemon::Ours {
                let still = still.context("nothing was written after the deadline")?;
                // The deadline counts from the first freeze on, which came before the answer.
                let ends =
                    DEADLINE.saturating_sub(freeze.latency)..DEADLINE + host.patience(RELEASED);
                ensure!(
                    ends.contains(&still),
                    "it was written {still:?} after the answer, which took {:?}",
                    freeze.latency
                );
            }
            log.retain(|entry| !is_after(entry));
            copies.push(Copy {
                format: volume.format,
                stack: volume.stack,
                parts: vec![Part { base, log, image }],
                // By how it is made.
                written: Vec::new(),
                discarded,
                expected: Expected::at(&notes, volume.slot, |moment| {
                    host.time_of(moment) < freeze.at
                }),
            });
        }
        rig.stop_logs();
        if daemon == Daemon::Debian {
            // So that its file systems can be unmounted.
            guest.vss().thaw(STEP)?;
        }
        rig.stop(guest)?;
        stop(guest, module, &process)?;
        copies.iter().try_for_each(Copy::was_busy)?;
        let all: Vec<_> = copies.iter().collect();
        let verdicts = judge(guest, &all)?;
        match daemon {
            Daemon::Ours => {
                of_ours.extend(stood);
                for (copy, verdict) in all.iter().zip(verdicts) {
                    ensure!(
                        verdict.objections().is_empty(),
                        "{module:?}, {:?}, {:?}: {verdict:#?}",
                        copy.format,
                        copy.expected
                    );
                }
            }
            Daemon::Debian => {
                let bad = verdicts.iter().find(|it| !it.objections().is_empty());
                let verdict = bad.or(verdicts.first()).context("no verdict")?;
                let verdict = verdict.describe(RESTORES_UNWRITTEN);
                of_peer = format!("{}; a copy from then {verdict}", gone_on(&stood, LONGER));
            }
        }
        rig.detach(guest)?;
    }
    let deadline = DEADLINE.as_secs();
    guest.compare(
        &format!("the host never says THAW (deadline set to {deadline} s), and copies the disks meanwhile"),
        &format!(
            "{}; a copy from before {RESTORES_UNWRITTEN}",
            gone_on(&of_ours, DEADLINE)
        ),
        &of_peer,
    );
    Ok(())
}

/// In words, how long volumes stood still each, `None` if for all the time that they were `watched`.
fn gone_on(stood: &[Option<Duration>], watched: Duration) -> String {
    let ended: Vec<u64> = stood
        .iter()
        .flatten()
        .map(|it| it.as_secs_f64().round() as u64)
        .collect();
    let (Some(first), Some(last)) = (ended.iter().min(), ended.iter().max()) else {
        return format!("all still frozen after {} s", watched.as_secs());
    };
    let who = match ended.len() == stood.len() {
        true => "all go on".to_owned(),
        false => format!("{} of {} go on", ended.len(), stood.len()),
    };
    match first == last {
        true => format!("{who} after {first} s"),
        false => format!("{who} after {first} to {last} s"),
    }
}

/// The log up to the first write after a moment, and that write. What a file system of this format discards at
/// will is none.
fn until_written(
    format: Format,
    log: &[Entry],
    is_after: impl Fn(&Entry) -> bool,
) -> Option<(&[Entry], &Entry)> {
    let is_one = |it: &Entry| it.is_write() && is_after(it) && !format.discards_at_will(it);
    let at = log.iter().position(is_one)?;
    Some((log.get(..at)?, log.get(at)?))
}

/// A backup of one busy file system with ours and with the peer.
fn ours_and_peer(guest: &Guest, format: Format) -> Result<()> {
    let mut told = Vec::new();
    for (module, daemon) in OURS_AND_PEER {
        let process = start(guest, module, daemon)?;
        let mut rig = Rig::new(guest, &[(format, Stack::Disk)], Duration::ZERO)?;
        let backup = rig.back_up(guest)?;
        rig.stop(guest)?;
        stop(guest, module, &process)?;
        let copies: Vec<_> = backup.copies.iter().collect();
        let verdicts = judge(guest, &copies)?;
        println!("     {module:?}: {verdicts:?}");
        told.push(describe(&backup, verdicts.first()));
        backup.was_busy()?;
        if daemon == Daemon::Ours {
            backup.answered()?;
            let verdict = verdicts.first().context("no verdict")?;
            ensure!(
                verdict.objections().is_empty(),
                "the copy is bad: {verdict:#?}"
            );
        }
        rig.detach(guest)?;
    }
    compare(guest, &format!("a busy {}", format.name()), &told);
    Ok(())
}

/// The stacks that are compared, ours first.
const OURS_AND_PEER: [(Module, Daemon); 2] = [
    (Module::Ours, Daemon::Ours),
    (Module::Stock, Daemon::Debian),
];

/// A backup and the verdict on one of its copies in words, for the comparison.
fn describe(backup: &Backup, verdict: Option<&Verdict>) -> String {
    backup.describe(&verdict.map_or_else(String::new, |it| it.describe(RESTORES)))
}

/// Notes what came of a backup of this with each of [`OURS_AND_PEER`].
fn compare(guest: &Guest, what: &str, told: &[String]) {
    if let [ours, peer] = told {
        let what = format!("{what} is copied between the answer and THAW");
        guest.compare(&what, ours, peer);
    }
}

/// A backup of a btrfs with much to discard, which waits until it does.
fn btrfs_discards(guest: &Guest) -> Result<()> {
    load(guest, Module::Ours, &[])?;
    // btrfs leaves what became free alone for ten seconds at least.
    let process = guest.start_daemon_with("deadline = 120")?;
    wait_for_daemon(guest)?;
    let mut rig = Rig::new(guest, &[(Format::Btrfs, Stack::Disk)], Duration::ZERO)?;
    let volume = rig.volumes.first().context("no volume")?;
    guest.sh(&format!(
        "cd {}; dd if=/dev/urandom of=much bs=1M count=64 status=none; sync; rm much; sync",
        volume.path
    ))?;
    let backup = rig.back_up_after(guest, |answer| {
        let disks: Vec<_> = rig.disks().collect();
        guest.wait_until("something is discarded", STEP * 4, || {
            let is_one = |entry: &Entry| {
                guest.host().time_of(entry.arrived) > answer
                    && matches!(entry.change, Change::Discard { .. })
            };
            Ok(disks.iter().any(|it| it.disk.log().iter().any(is_one)))
        })
    })?;
    let backup = backup.answered()?;
    backup.was_busy()?;
    rig.stop(guest)?;
    stop(guest, Module::Ours, &process)?;
    let copy = backup.copies.first().context("no copy")?;
    let verdicts = judge(guest, &[copy])?;
    let verdict = verdicts.first().context("no verdict")?;
    println!("     {} discards in the window", copy.discarded);
    ensure!(copy.discarded > 0, "nothing was discarded in the window");
    ensure!(
        verdict.objections().is_empty(),
        "{:?}: {verdict:#?}",
        copy.expected
    );
    rig.detach(guest)
}

/// Copies that are bad, each in its own way, and one that is good.
fn bad_copies(guest: &Guest, format: Format) -> Result<()> {
    let process = start(guest, Module::Ours, Daemon::Ours)?;
    let mut rig = Rig::new(guest, &[(format, Stack::Disk)], Duration::ZERO)?;
    let backup = rig.back_up(guest)?.answered()?;
    stop(guest, Module::Ours, &process)?;
    let unfrozen = by_a_liar(guest, &rig)?.copies;
    let unfrozen = unfrozen.into_iter().next().context("no copy")?;
    rig.stop(guest)?;
    let good = backup.copies.into_iter().next().context("no copy")?;

    guest.expect_in_log(&OF_BAD_COPIES)?;
    // The log makes the same disk as the copy, so a log with a fault makes that disk with the fault.
    let part = good.only_part()?;
    let again = good.with(log::replay(&part.base, &part.log))?;
    let lacking = good.with(without_record(part, good.expected.least)?)?;
    let torn = good.with(torn(part)?)?;
    let damaged = good.with(format.damaged(&part.image)?)?;
    let copies = [&good, &again, &unfrozen, &lacking, &torn, &damaged];
    let verdicts = judge(guest, &copies)?;
    let expected = [
        ("the copy", Refused::By(&[])),
        ("its log replayed", Refused::By(&[])),
        ("no freeze", Refused::By(&["log", "journal"])),
        ("a write dropped", Refused::By(&["records"])),
        // Where it is torn is a matter of luck, and who sees that, too.
        ("torn", Refused::BySome),
        ("damaged", Refused::By(&["checker"])),
    ];
    for ((name, refused), verdict) in expected.into_iter().zip(&verdicts) {
        refused.check(name, verdict)?;
    }
    Ok(())
}

/// What the kernel says of copies that are bad.
const OF_BAD_COPIES: [&str; 4] = ["EXT4-fs", "JBD2", "XFS", "BTRFS"];

/// Who has to object to a copy. Each judge is there for something: a copy that is bad is refused by some judge
/// even if the one that it was made for is blind.
enum Refused {
    /// These, whoever else does; nobody at all if they are none.
    By(&'static [&'static str]),
    /// Whoever.
    BySome,
}

impl Refused {
    fn check(self, name: &str, verdict: &Verdict) -> Result<()> {
        let judges: Vec<_> = verdict.objections().iter().map(|it| it.0).collect();
        println!("     {name}: {judges:?}");
        let (is_right, by) = match self {
            Refused::By([]) => (judges.is_empty(), "nobody".into()),
            Refused::By(by) => (by.iter().all(|it| judges.contains(it)), by.join(" and ")),
            Refused::BySome => (!judges.is_empty(), "somebody".into()),
        };
        ensure!(
            is_right,
            "{name}: that is wrong, {by} should object: {verdict:#?}"
        );
        Ok(())
    }
}

/// Copies of volumes that are bad each in its own way: that the judges look at the copy, and not at what it is
/// a copy of, is seen by that.
fn bad_volumes(guest: &Guest, backup: &Backup, unfrozen: &[Copy]) -> Result<()> {
    guest.expect_in_log(&OF_BAD_COPIES)?;
    for unfrozen in unfrozen {
        let name = format!("{:?} on {:?}, no freeze", unfrozen.format, unfrozen.stack);
        let verdict = judge(guest, &[unfrozen])?;
        let verdict = verdict.first().context("no verdict")?;
        Refused::By(&["log", "journal"]).check(&name, verdict)?;
    }
    for copy in &backup.copies {
        // As they were a moment before the backup: all of its disks, and of a mirror one of them.
        let mut older = copy.clone();
        for part in &mut older.parts {
            part.image.clone_from(&part.base);
        }
        let mut bad = vec![(older, "older", Refused::By(&["records"]))];
        if let Stack::Md = copy.stack {
            let mut mixed = copy.clone();
            if let Some(part) = mixed.parts.last_mut() {
                part.image.clone_from(&part.base);
            }
            bad.push((mixed, "one disk is older", Refused::By(&["mirror"])));
        }
        for (copy, what, refused) in bad {
            let name = format!("{:?} on {:?}, {what}", copy.format, copy.stack);
            let verdict = judge(guest, &[&copy])?;
            refused.check(&name, verdict.first().context("no verdict")?)?;
        }
    }
    Ok(())
}

/// The backup of the same disks by a daemon that tells the host that it has frozen and thawed them, and does nothing: the
/// way to the judges is that of any other.
fn by_a_liar(guest: &Guest, rig: &Rig) -> Result<Backup> {
    load(guest, Module::Ours, &[])?;
    let liar = Scripted::start(guest, Abi::V2)?;
    let serve = |operation| liar.serve(operation, status::OK).map(drop);
    let backup = rig.back_up_served(guest, serve, |_| Ok(()))?.answered()?;
    liar.device.close()?;
    Ok(backup)
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

/// A copy of the root is another machine's root; in words.
fn root(guest: &Guest) -> Result<String> {
    let ours = restored_root(guest, "restored-ours", by(Module::Ours, Daemon::Ours))?;
    equal("the copy with ours", ours.as_str(), RESTORES)?;
    Ok(ours)
}

/// The same of the peer's, on a machine of its own: that of ours is over then.
fn root_and_peer(guest: &Guest) -> Result<()> {
    let ours = root(guest)?;
    let next = guest.start_named("peer", Image::default())?;
    let peer = restored_root(&next, "restored-peer", by(Module::Stock, Daemon::Debian))?;
    next.close()?;
    let what = "a busy root, from which a guest then boots,";
    compare(guest, what, &[ours, peer]);
    Ok(())
}

/// The judges of a root object to the copy of one that nobody has frozen, by the way that all copies go.
fn unfrozen_root(guest: &Guest) -> Result<()> {
    let verdict = restored_root(guest, "restored-unfrozen", |guest, rig| {
        // The root was made a moment ago: without its programs no guest would come up that tells of the rest.
        guest.sh("sync")?;
        by_a_liar(guest, rig)
    })?;
    ensure!(
        verdict.contains("log") && verdict.contains("journal"),
        "log and journal should object: {verdict}"
    );
    Ok(())
}

/// A backup by a daemon on a module.
fn by(module: Module, daemon: Daemon) -> impl FnOnce(&Guest, &Rig) -> Result<Backup> {
    move |guest, rig| {
        let process = start(guest, module, daemon)?;
        let backup = rig.back_up(guest)?;
        guest.signal(&process, 9)?;
        Ok(backup)
    }
}

/// Has the root backed up and ends the guest, boots another from the copy, whose console is named like this, and
/// judges it by that, in words.
fn restored_root(
    guest: &Guest,
    name: &str,
    back_up: impl FnOnce(&Guest, &Rig) -> Result<Backup>,
) -> Result<String> {
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
    let backup = back_up(guest, &rig)?;
    guest.ends()?;
    // It does not answer that.
    let _ = guest.spawn(&["poweroff", "-nf"]);
    let exit = guest.vm().wait_exit(STEP)?;
    equal("how the guest ended", exit, Exit::PowerOff)?;
    let Some(copy) = backup.copies.first() else {
        return Ok(describe(&backup, None));
    };
    backup.was_busy()?;

    let image = &copy.only_part()?.image;
    let restored = match guest.start_named(name, image.clone()) {
        Ok(restored) => restored,
        Err(error) if has_given_up(&error) => {
            println!("     {name}: {error:#}");
            return Ok("no guest boots from it".to_owned());
        }
        Err(error) => return Err(error.context("a guest that was to boot from the copy")),
    };
    let log = restored.sh("dmesg")?;
    let repairs = ["recovery", "orphan", "EXT4-fs error", "EXT4-fs warning"];
    let is_repair =
        |line: &&str| line.contains("EXT4-fs") && repairs.iter().any(|it| line.contains(it));
    let repaired: Vec<_> = log.lines().filter(is_repair).collect();
    let check = match judge_by_use(&restored)? {
        // The one that was booted from has been written to since.
        None => judge_apart(&restored, image)?,
        complaint => complaint,
    };
    let written = copy.written.first();
    let verdict = Verdict {
        log: written.map(|it| format!("{} writes, the first one: {it}", copy.written.len())),
        mirror: None,
        journal: (!repaired.is_empty()).then(|| repaired.join("\n")),
        check,
        records: judge_records_at(&restored, "/var/lab/records", copy.expected)?,
    };
    println!("     {name}: {:?}, {verdict:?}", copy.expected);
    // What it has said is in the verdict.
    restored.set_judged();
    restored.vm().kill();
    Ok(describe(&backup, Some(&verdict)))
}

/// Whether that is why a guest did not come up: it found nothing to boot from, and ended itself. Whatever else
/// keeps it from that says nothing of its disk.
fn has_given_up(error: &anyhow::Error) -> bool {
    let call = error.downcast_ref::<CallError>();
    call.and_then(CallError::exit) == Some(&Exit::PowerOff)
}

/// What is wrong with the root of a guest, as it is used.
fn judge_by_use(guest: &Guest) -> Result<Option<String>> {
    let mounts = guest.read("/proc/mounts")?;
    if !mounts
        .lines()
        .any(|line| line.starts_with("/dev/sda / ext4 rw"))
    {
        return Ok(Some(format!(
            "the root should be on the disk, and take writes: {mounts}"
        )));
    }
    let written = guest.try_sh("echo 'and goes on' >/var/lab/after && sync")?;
    ensure!(!written.timed_out, "a sync did not end in time");
    if written.status != Some(0) {
        return Ok(Some(format!("the root takes no writes: {}", written.err)));
    }
    match guest.check_log() {
        Err(error) if error.is::<CallError>() => Err(error),
        said => Ok(said.err().map(|error| error.to_string())),
    }
}

/// What the checker has against a root, which is looked at beside the one that the guest runs from.
fn judge_apart(guest: &Guest, root: &Image) -> Result<Option<String>> {
    let size = u64::from(guest.machine().disk_mib);
    let disk = Attached::new(guest, COPIES.0, COPIES.1, size, root.clone())?;
    judge_by_checker(guest, Format::Ext4, &disk.node(guest)?)
}

/// Backups of each file system on volumes of a kind, the last one with the peer.
fn on(guest: &Guest, stack: Stack) -> Result<()> {
    let kinds = [Format::Ext4, Format::Xfs, Format::Btrfs].map(|it| (it, stack));
    let (process, mut rig, backup) = one_after_the_other(guest, &kinds, Duration::ZERO, false)?;
    stop(guest, Module::Ours, &process)?;
    let process = start(guest, Module::Stock, Daemon::Debian)?;
    guest.expect_in_log(&OF_BAD_COPIES)?;
    let (of_peer, verdicts) = judged(guest, &rig)?;
    of_peer.was_busy()?;
    stop(guest, Module::Stock, &process)?;
    let mut verdicts = verdicts.iter();
    for (format, stack) in kinds {
        // All copies of ours were good, or this would not be reached.
        let told = [RESTORES.to_owned(), describe(&of_peer, verdicts.next())];
        println!("     the peer, {format:?} on {stack:?}: {}", told[1]);
        let what = format!("a busy {} on {}", format.name(), stack.words());
        compare(guest, &what, &told);
    }
    let unfrozen = by_a_liar(guest, &rig)?;
    rig.stop(guest)?;
    bad_volumes(guest, &backup, &unfrozen.copies)
}

/// One backup of all, and the verdicts on its copies, while the load rests.
fn judged(guest: &Guest, rig: &Rig) -> Result<(Backup, Vec<Verdict>)> {
    let backup = rig.back_up(guest)?;
    let all: Vec<_> = backup.copies.iter().collect();
    rig.rest(guest, true)?;
    let verdicts = judge(guest, &all)?;
    rig.rest(guest, false)?;
    Ok((backup, verdicts))
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
    let (process, mut rig, _) = one_after_the_other(guest, &KINDS, Duration::from_millis(5), true)?;
    rig.stop(guest)?;
    stop(guest, Module::Ours, &process)
}

/// Backups of which all copies are good; the last of them, with what is still running.
fn one_after_the_other(
    guest: &Guest,
    kinds: &[(Format, Stack)],
    delay: Duration,
    fio: bool,
) -> Result<(Process, Rig, Backup)> {
    let process = start(guest, Module::Ours, Daemon::Ours)?;
    let mut rig = Rig::new(guest, kinds, delay)?;
    if fio {
        rig.start_fio(guest)?;
    }
    let (mut copies, mut records, mut discards) = (0, 0, 0);
    let mut last = None;
    for round in 0..rounds_or(2) {
        let (backup, verdicts) = judged(guest, &rig)?;
        let backup = backup.answered()?;
        backup
            .was_busy()
            .with_context(|| format!("backup {round}"))?;
        for (copy, verdict) in backup.copies.iter().zip(verdicts) {
            ensure!(
                verdict.objections().is_empty(),
                "backup {round}, {:?} on {:?}, {:?}: {verdict:#?}",
                copy.format,
                copy.stack,
                copy.expected
            );
            copies += 1;
            discards += copy.discarded;
            records += copy.expected.least;
        }
        println!(
            "     backup {round}: {copies} copies are good, {records} records had to be there and are, \
             btrfs discarded {discards} times meanwhile"
        );
        last = Some(backup);
    }
    Ok((process, rig, last.context("no backup")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use e2e::guest::Standstill;

    #[test]
    fn only_a_guest_that_has_ended_itself_says_something_of_its_disk() {
        let gone = |exit| {
            let command = "boot".to_owned();
            anyhow::Error::new(CallError::Gone { command, exit }).context("it did not come up")
        };
        assert!(has_given_up(&gone(Exit::PowerOff)));
        for exit in [Exit::Killed, Exit::Failed("KVM".to_owned())] {
            assert!(!has_given_up(&gone(exit)));
        }
        let late = CallError::Timeout {
            command: "boot".to_owned(),
            after: STEP,
            stuck: String::new(),
        };
        let still = Standstill {
            kernel_answers: false,
            seen: String::new(),
        };
        assert!(!has_given_up(&anyhow::Error::new(late).context(still)));
        let said = anyhow::anyhow!("the kernel complained").context("while it booted");
        assert!(!has_given_up(&said));
    }

    #[test]
    fn how_long_all_stood_still_is_told_from_the_first_to_the_last() {
        let words = |stood: &[Option<u64>]| {
            let stood: Vec<_> = stood
                .iter()
                .map(|it| it.map(Duration::from_millis))
                .collect();
            gone_on(&stood, Duration::from_secs(24))
        };
        assert_eq!(words(&[None, None]), "all still frozen after 24 s");
        let same = [Some(19_700), Some(20_100)];
        assert_eq!(words(&same), "all go on after 20 s");
        let later = [Some(20_700), Some(3_000)];
        assert_eq!(words(&later), "all go on after 3 to 21 s");
        let some = [None, Some(20_700), Some(3_000)];
        assert_eq!(words(&some), "2 of 3 go on after 3 to 21 s");
    }

    #[test]
    fn what_btrfs_discards_while_it_is_frozen_is_no_write_and_is_in_the_copy() {
        let start = Instant::now();
        let entry = |ms, change| Entry {
            arrived: start + Duration::from_millis(ms),
            ended: Some(start + Duration::from_millis(ms + 1)),
            change,
        };
        let write = |offset| Change::Write {
            offset,
            data: [1; 4].into(),
            fua: false,
        };
        let log = [
            entry(10, write(0)),
            entry(20, Change::Flush),
            entry(40, Change::Discard { offset: 0, len: 2 }),
            entry(60, Change::Flush),
            entry(80, write(4)),
        ];
        let until = |format| {
            let is_after = |it: &Entry| it.ended > Some(start + Duration::from_millis(30));
            let (until, first) = until_written(format, &log, is_after)?;
            let mut seen = [9; 8];
            log::replay(&Image::default(), until).read(0, &mut seen);
            Some((seen, first.change.clone()))
        };
        let discarded = [0, 0, 1, 1, 0, 0, 0, 0];
        assert_eq!(until(Format::Btrfs), Some((discarded, write(4))));
        let before = [1, 1, 1, 1, 0, 0, 0, 0];
        let discard = Change::Discard { offset: 0, len: 2 };
        assert_eq!(until(Format::Ext4), Some((before, discard)));
    }
}
