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

use super::disks::{case, Attached};
use super::{rounds_or, start, stop, Case};
use anyhow::{ensure, Context, Result};
use e2e::check::answered;
use e2e::guest::{Daemon, Guest, Module, Process, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::storage::{log, Change, Entry, Image};
use lab_agent::{record, Note, NOTE_LEN, RECORD_LEN};
use std::time::Duration;

pub const CASES: &[Case] = &[
    case(
        "restore/ext4",
        "a copy of a busy ext4, made between FREEZE and THAW, restores without replay, repair or loss",
        |guest| ours_and_peer(guest, Format::Ext4),
    ),
    case(
        "restore/xfs",
        "so does one of xfs",
        |guest| ours_and_peer(guest, Format::Xfs),
    ),
    case(
        "restore/btrfs",
        "so does one of btrfs",
        |guest| ours_and_peer(guest, Format::Btrfs),
    ),
    case(
        "restore/checkers-ext4",
        "its judges refuse a copy without a freeze, one that lacks a write, and a torn one",
        |guest| bad_copies(guest, Format::Ext4),
    ),
    case(
        "restore/checkers-xfs",
        "so do those of xfs",
        |guest| bad_copies(guest, Format::Xfs),
    ),
    case(
        "restore/checkers-btrfs",
        "so do those of btrfs",
        |guest| bad_copies(guest, Format::Btrfs),
    ),
    Case {
        per_round: Duration::from_secs(60),
        ..case(
            "restore/backup-after-backup",
            "six file systems on slow disks, one backup after the other: every copy restores",
            one_after_the_other,
        )
    },
];

/// What a file system is made as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Ext4,
    Xfs,
    Btrfs,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Format::Ext4 => "ext4",
            Format::Xfs => "xfs",
            Format::Btrfs => "btrfs",
        }
    }

    /// MiB of its disk.
    fn size(self) -> u64 {
        match self {
            Format::Ext4 => 64,
            // The least that mkfs.xfs takes is 300.
            Format::Xfs => 320,
            Format::Btrfs => 160,
        }
    }

    fn make(self) -> &'static str {
        match self {
            Format::Ext4 => "mkfs.ext4 -q -F",
            Format::Xfs => "mkfs.xfs -q -f",
            Format::Btrfs => "mkfs.btrfs -q -f",
        }
    }

    /// Options with which a mount reads what is there, and replays nothing.
    fn read_only(self) -> &'static str {
        match self {
            Format::Ext4 => "ro,noload",
            Format::Xfs => "ro,norecovery,nouuid",
            Format::Btrfs => "ro,rescue=nologreplay",
        }
    }

    /// Prints what of the journal on `$n` had to be replayed; nothing if it is empty.
    fn journal(self) -> &'static str {
        match self {
            Format::Ext4 => "dumpe2fs -h $n 2>&1 | grep -o needs_recovery",
            // A frozen xfs has covered its log: what is left there are superblocks only.
            Format::Xfs => "xfs_logprint -t $n 2>&1 | grep -E '^(INO|BUF|EFI)|bad|unexpected'",
            Format::Btrfs => {
                "btrfs inspect-internal dump-super $n 2>&1 | grep -E '^log_root\\s' | grep -v '\\s0$'"
            }
        }
    }

    /// Checks what is on `$n` and changes nothing.
    fn check(self) -> &'static str {
        match self {
            Format::Ext4 => "e2fsck -f -n $n",
            Format::Xfs => "xfs_repair -n $n",
            Format::Btrfs => "btrfs check --readonly $n",
        }
    }
}

/// A file system on a disk of its own, with a writer of records.
struct Volume {
    format: Format,
    attached: Attached,
    path: String,
    slot: u64,
}

impl Volume {
    fn records(&self) -> String {
        format!("{}/records", self.path)
    }
}

/// File systems under load.
struct Rig {
    volumes: Vec<Volume>,
    /// The disk with the writers' notes. No file system is on it, and no backup has it.
    notes: Attached,
    load: Vec<Process>,
}

/// The controller and the first unit for copies; the last unit is for the notes.
const COPIES: (u8, u8) = (1, 32);
const NOTES: (u8, u8) = (1, 63);

impl Rig {
    /// Makes a file system of each format, mounts it and lets writers loose on it.
    fn new(guest: &Guest, formats: &[Format], delay: Duration) -> Result<Rig> {
        let notes = Attached::new(guest, NOTES.0, NOTES.1, 1, Image::default())?;
        let mut attached = Vec::new();
        for (format, lun) in formats.iter().zip(0..) {
            let disk = Attached::new(guest, lun % 2, lun / 2, format.size(), Image::default())?;
            attached.push(disk);
        }
        guest.sh("modprobe hv_storvsc; modprobe xfs; modprobe btrfs; mkdir -p /mnt/copy")?;
        let node = notes.node(guest)?;
        let mut rig = Rig {
            volumes: Vec::new(),
            notes,
            load: Vec::new(),
        };
        for ((format, attached), slot) in formats.iter().zip(attached).zip(0..) {
            let disk = attached.node(guest)?;
            let path = format!("/mnt/{}-{slot}", format.name());
            let make = format.make();
            guest.sh(&format!(
                "mkdir -p {path}/ && {make} {disk} && mount {disk} {path} && mkdir {path}/churn && sync"
            ))?;
            attached.disk.set_delay(delay);
            rig.volumes.push(Volume {
                format: *format,
                attached,
                path,
                slot,
            });
        }
        for volume in &rig.volumes {
            let path = &volume.path;
            guest.recorder_start(&volume.records(), &node, volume.slot, 10_000)?;
            guest.writer_start_every(&format!("{path}/w"), 5_000)?;
            let churn = format!(
                "cd {path}/churn
                 while :; do
                     n=$((n % 40 + 1)); echo $n > $n; echo $n >> all; mv $n at-$n
                     [ $n -lt 40 ] || rm at-* all
                 done"
            );
            rig.load.push(guest.spawn(&["sh", "-c", &churn])?);
        }
        rig.wait_for_progress(guest, 10)?;
        Ok(rig)
    }

    /// Waits until every writer has done so many more writes.
    fn wait_for_progress(&self, guest: &Guest, writes: u64) -> Result<()> {
        let start = guest.writers()?;
        guest.wait_until("every writer goes on", STEP, || {
            let now = guest.writers()?;
            let mut both = start.iter().zip(&now);
            Ok(both.all(|(then, now)| now.count >= then.count + writes))
        })
    }

    /// Ends the load and unmounts all.
    fn stop(&mut self, guest: &Guest) -> Result<()> {
        for process in self.load.drain(..) {
            guest.signal(&process, 9)?;
            guest.wait(&process, STEP)?;
        }
        guest.writers_stop()?;
        for volume in &self.volumes {
            guest.sh(&format!("umount {}", volume.path))?;
        }
        // Or the kernel takes a copy for the device that it knows.
        guest.sh("btrfs device scan --forget >/dev/null")?;
        Ok(())
    }

    /// Starts the write logs of all disks.
    fn start_logs(&self) -> Result<Vec<Image>> {
        self.notes.disk.start_log()?;
        let logs = self.volumes.iter().map(|it| it.attached.disk.start_log());
        logs.collect::<Result<_, _>>().context("cannot copy a disk")
    }

    fn stop_logs(&self) {
        self.notes.disk.stop_log();
        self.volumes
            .iter()
            .for_each(|it| it.attached.disk.stop_log());
    }

    /// One backup of all disks.
    fn back_up(&self, guest: &Guest) -> Result<Backup> {
        let host = guest.host();
        let luns: Vec<_> = self
            .volumes
            .iter()
            .map(|it| it.attached.in_backup())
            .collect();
        let bases = self.start_logs()?;
        self.wait_for_progress(guest, 3)?;

        let freeze = guest.vss().freeze(&luns, STEP)?;
        let images: Result<Vec<_>, _> = self
            .volumes
            .iter()
            .map(|it| it.attached.disk.snapshot())
            .collect();
        answered("FREEZE", &freeze, status::OK)?;
        // A real host takes its time, too.
        std::thread::sleep(Duration::from_millis(300));
        let thawing = host.now();
        answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;

        self.wait_for_progress(guest, 1)?;
        let notes = self.notes.disk.log();
        let copies = self.volumes.iter().zip(bases).zip(images?);
        let copies = copies.map(|((volume, base), image)| {
            let log = volume.attached.disk.log();
            Copy {
                format: volume.format,
                base,
                image,
                // A moment later than the answer came only makes the host see more.
                expected: Expected::at(&notes, volume.slot, |moment| {
                    host.time_of(moment) < freeze.at
                }),
                written: written_within(&log, |entry| {
                    let (arrived, ended) = (host.time_of(entry.arrived), host.time_of(entry.ended));
                    ended > freeze.at && arrived < thawing
                }),
                log: log
                    .into_iter()
                    .filter(|entry| host.time_of(entry.ended) <= freeze.at)
                    .collect(),
            }
        });
        let backup = Backup {
            copies: copies.collect(),
        };
        self.stop_logs();
        Ok(backup)
    }
}

/// How many of these entries changed the disk while `within` says so.
fn written_within(log: &[Entry], within: impl Fn(&Entry) -> bool) -> usize {
    log.iter()
        .filter(|entry| entry.is_write() && within(entry))
        .count()
}

/// What a backup brought.
struct Backup {
    copies: Vec<Copy>,
}

/// The copy of a disk, and what is known of it.
struct Copy {
    format: Format,
    /// The disk when the log was started.
    base: Image,
    /// What was written from then on to the answer.
    log: Vec<Entry>,
    /// The copy itself.
    image: Image,
    /// How often the disk was written to between the answer and THAW.
    written: usize,
    expected: Expected,
}

/// Which records a copy must have and may have: these and all before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Expected {
    least: u64,
    most: u64,
}

impl Expected {
    /// What the notes of one writer say about a moment; `is_before` whether something was before it.
    fn at(notes: &[Entry], slot: u64, is_before: impl Fn(std::time::Instant) -> bool) -> Expected {
        let mut expected = Expected { least: 0, most: 0 };
        for entry in notes {
            let Change::Write { offset, data, .. } = &entry.change else {
                continue;
            };
            let Some(note) = Note::parse(data).filter(|_| *offset == slot * NOTE_LEN as u64) else {
                continue;
            };
            // Synced, and then noted; noted, and then begun.
            if is_before(entry.arrived) {
                expected.least = note.synced;
            }
            if is_before(entry.ended) {
                expected.most = note.begun;
            }
        }
        expected
    }
}

/// What the judges have against a copy: nothing each, if it is good.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Verdict {
    /// Of the write log.
    log: Option<String>,
    /// Of the journal.
    journal: Option<String>,
    /// Of the file system's checker.
    check: Option<String>,
    /// Of the records.
    records: Option<String>,
}

impl Verdict {
    /// Who objects, by name, and why.
    fn objections(&self) -> Vec<(&'static str, &str)> {
        [
            ("log", &self.log),
            ("journal", &self.journal),
            ("checker", &self.check),
            ("records", &self.records),
        ]
        .into_iter()
        .filter_map(|(judge, why)| Some((judge, why.as_deref()?)))
        .collect()
    }

    /// In words, for the comparison.
    fn describe(&self) -> String {
        let judges: Vec<_> = self.objections().iter().map(|it| it.0).collect();
        match judges.as_slice() {
            [] => "restores: nothing written after the answer, no replay, clean, no record lost"
                .into(),
            judges => format!("does not restore: {}", judges.join(", ")),
        }
    }
}

/// Attaches copies as further disks and lets the judges look at them.
fn judge(guest: &Guest, copies: &[&Copy]) -> Result<Vec<Verdict>> {
    let mut attached = Vec::new();
    for (copy, lun) in copies.iter().zip(COPIES.1..) {
        let size = copy.format.size();
        attached.push(Attached::new(
            guest,
            COPIES.0,
            lun,
            size,
            copy.image.clone(),
        )?);
    }
    let mut verdicts = Vec::new();
    for (copy, attached) in copies.iter().zip(&attached) {
        let format = copy.format;
        let node = attached.node(guest)?;
        let run = |script: &str| guest.try_sh(&format!("n={node}; {script}"));
        let journal = run(format.journal())?.out;
        let check = run(format.check())?;
        let options = format.read_only();
        let name = format.name();
        let mounted = run(&format!("mount -t {name} -o {options} $n /mnt/copy"))?;
        let records = if mounted.status == Some(0) {
            let text = guest.read("/mnt/copy/records").unwrap_or_default();
            run("umount /mnt/copy")?;
            judge_records(&text, copy.expected)
        } else {
            Some(format!("it cannot be mounted: {}", mounted.err))
        };
        verdicts.push(Verdict {
            log: (copy.written > 0).then(|| format!("{} writes after the answer", copy.written)),
            journal: Some(journal.trim().to_owned()).filter(|it| !it.is_empty()),
            check: (check.status != Some(0)).then(|| format!("{}{}", check.out, check.err)),
            records,
        });
    }
    guest.sh("btrfs device scan --forget >/dev/null; true")?;
    for attached in attached {
        attached.detach(guest)?;
    }
    Ok(verdicts)
}

/// What is wrong with the records in a copy.
fn judge_records(text: &str, expected: Expected) -> Option<String> {
    let mut count = 0;
    for chunk in text.as_bytes().chunks(RECORD_LEN) {
        if chunk != record(count + 1).as_bytes() {
            let seen = String::from_utf8_lossy(chunk);
            return Some(format!(
                "after record {count} there is {seen:?}, of {expected:?}"
            ));
        }
        count += 1;
    }
    let Expected { least, most } = expected;
    match count {
        count if count < least => Some(format!("{least} were synced, {count} are there")),
        count if count > most => Some(format!("{most} were begun, {count} are there")),
        _ => None,
    }
}

/// A backup of one busy file system with ours and with the peer.
fn ours_and_peer(guest: &Guest, format: Format) -> Result<()> {
    let mut told = Vec::new();
    for (module, daemon) in [
        (Module::Ours, Daemon::Ours),
        (Module::Stock, Daemon::Debian),
    ] {
        let process = start(guest, module, daemon)?;
        let mut rig = Rig::new(guest, &[format], Duration::ZERO)?;
        let backup = rig.back_up(guest)?;
        rig.stop(guest)?;
        stop(guest, module, &process)?;
        let copies: Vec<_> = backup.copies.iter().collect();
        let verdicts = judge(guest, &copies)?;
        let copy = backup.copies.first().context("no copy")?;
        let verdict = verdicts.first().context("no verdict")?;
        println!("     {module:?}: {:?}, {verdict:?}", copy.expected);
        ensure!(
            copy.expected.least > 0 && !copy.log.is_empty(),
            "there should have been records and writes: {:?}, {} writes",
            copy.expected,
            copy.log.len()
        );
        if daemon == Daemon::Ours {
            ensure!(
                verdict.objections().is_empty(),
                "the copy is bad: {verdict:#?}"
            );
        }
        told.push(verdict.describe());
        for volume in rig.volumes {
            volume.attached.detach(guest)?;
        }
        rig.notes.detach(guest)?;
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
    let mut rig = Rig::new(guest, &[format], Duration::ZERO)?;
    let backup = rig.back_up(guest)?;
    let unfrozen = without_freeze(guest, &rig)?;
    rig.stop(guest)?;
    stop(guest, Module::Ours, &process)?;
    let good = backup.copies.into_iter().next().context("no copy")?;

    // The log makes the same disk as the copy, so a log with a fault makes that disk with the fault.
    let again = with_image(&good, log::replay(&good.base, &good.log));
    let lacking = with_image(&good, without_last_record(&good)?);
    let torn = with_image(&good, torn(&good)?);
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
    let bases = rig.start_logs()?;
    rig.wait_for_progress(guest, 20)?;
    let answer = std::time::Instant::now();
    let volume = rig.volumes.first().context("no volume")?;
    let image = volume.attached.disk.snapshot()?;
    rig.wait_for_progress(guest, 3)?;
    let log = volume.attached.disk.log();
    let copy = Copy {
        format: volume.format,
        base: bases.into_iter().next().context("no base")?,
        image,
        written: written_within(&log, |entry| entry.ended > answer),
        expected: Expected::at(&rig.notes.disk.log(), volume.slot, |moment| moment < answer),
        log,
    };
    rig.stop_logs();
    Ok(copy)
}

/// The same copy with another content.
fn with_image(copy: &Copy, image: Image) -> Copy {
    Copy {
        image,
        base: copy.base.clone(),
        log: copy.log.clone(),
        ..*copy
    }
}

/// The disk as it would be if the last write with the last record that must be there had got lost.
fn without_last_record(copy: &Copy) -> Result<Image> {
    let record = record(copy.expected.least);
    let has = |entry: &Entry| match &entry.change {
        Change::Write { data, .. } => data.windows(record.len()).any(|it| it == record.as_bytes()),
        Change::Discard { .. } | Change::Flush => false,
    };
    let all: Vec<usize> = (0..)
        .zip(&copy.log)
        .filter(|it| has(it.1))
        .map(|it| it.0)
        .collect();
    ensure!(!all.is_empty(), "no write has the record {record:?}");
    // Every write that has it: a file system may have moved it about.
    let kept = (0..).zip(&copy.log).filter(|it| !all.contains(&it.0));
    Ok(log::replay(&copy.base, kept.map(|it| it.1)))
}

/// The disk as it would be if half of what was written had been copied before it was written.
fn torn(copy: &Copy) -> Result<Image> {
    let offset = |entry: &Entry| match &entry.change {
        Change::Write { offset, .. } | Change::Discard { offset, .. } => Some(*offset),
        Change::Flush => None,
    };
    let mut offsets: Vec<u64> = copy.log.iter().filter_map(offset).collect();
    offsets.sort_unstable();
    offsets.dedup();
    let middle = offsets
        .get(offsets.len() / 2)
        .context("nothing was written")?;
    let kept = copy
        .log
        .iter()
        .filter(|entry| offset(entry).is_none_or(|it| it < *middle));
    Ok(log::replay(&copy.base, kept))
}

/// Backups without a pause, of disks that are slow.
fn one_after_the_other(guest: &Guest) -> Result<()> {
    const FORMATS: [Format; 6] = [
        Format::Ext4,
        Format::Xfs,
        Format::Btrfs,
        Format::Ext4,
        Format::Xfs,
        Format::Btrfs,
    ];
    let process = start(guest, Module::Ours, Daemon::Ours)?;
    let mut rig = Rig::new(guest, &FORMATS, Duration::from_millis(5))?;
    let (mut copies, mut records) = (0, 0);
    for round in 0..rounds_or(2) {
        let backup = rig.back_up(guest)?;
        let all: Vec<_> = backup.copies.iter().collect();
        for (copy, verdict) in all.iter().zip(judge(guest, &all)?) {
            ensure!(
                verdict.objections().is_empty() && copy.expected.least > 0,
                "backup {round}, {:?}, {:?}: {verdict:#?}",
                copy.format,
                copy.expected
            );
            copies += 1;
            records += copy.expected.least;
        }
    }
    println!("     {copies} copies are good, {records} records had to be there and are");
    rig.stop(guest)?;
    stop(guest, Module::Ours, &process)
}
