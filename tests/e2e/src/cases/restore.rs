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

use super::disks::{case, load_driver, Attached};
use super::{load, rounds_or, start, stop, wait_for_daemon, Case};
use anyhow::{bail, ensure, Context, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Machine, Module, Process, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::storage::{log, Change, Entry, Image};
use hyperv_sim::Exit;
use lab_agent::{record, Note, NOTE_LEN, RECORD_LEN};
use std::time::{Duration, Instant};

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
    Case {
        per_round: Duration::from_secs(600),
        ..case(
            "restore/backup-after-backup",
            "six file systems on slow disks, some on volumes: every copy of every backup restores",
            one_after_the_other,
        )
    }
    .long(),
];

/// A case that puts several disks on and takes them off again, for which the guest scans its bus each
/// time: it may take longer than most.
const fn long(name: &'static str, about: &'static str, run: fn(&Guest) -> Result<()>) -> Case {
    Case {
        per_round: Duration::from_secs(15),
        ..case(name, about, run)
    }
}

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
            // What a frozen xfs leaves in its log are superblocks, which cover it.
            Format::Xfs => {
                "xfs_logprint -t $n 2>&1 | grep -E '^[A-Z]+:|Buffer:|BUF DATA|ERROR|failed' |
                     grep -vE '^(TRANS|BUF):|SUPER Block Buffer:' | head -n 3"
            }
            Format::Btrfs => {
                "btrfs inspect-internal dump-super $n 2>&1 | grep -E '^log_root\\s' | grep -v '\\s0$'"
            }
        }
    }

    /// Checks what is on `$n`.
    fn check(self) -> &'static str {
        match self {
            Format::Ext4 => "e2fsck -f -n $n",
            // The sums in its superblock are set right by the next mount, so that comes first.
            Format::Xfs => {
                "mount -t xfs -o nouuid $n /mnt/copy && umount /mnt/copy && xfs_repair -n $n"
            }
            Format::Btrfs => "btrfs check --readonly $n",
        }
    }
}

/// What a file system stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stack {
    /// A disk.
    Disk,
    /// Two disks end to end, as LVM puts a volume together (device-mapper's linear).
    Linear,
    /// A disk with everything on it encrypted, as LUKS does it (dm-crypt).
    Crypt,
}

impl Stack {
    fn disks(self) -> usize {
        match self {
            Stack::Disk | Stack::Crypt => 1,
            Stack::Linear => 2,
        }
    }

    /// Puts it together from disks of `mib` MiB each; the node of the whole.
    fn assemble(self, guest: &Guest, name: &str, nodes: &[String], mib: u64) -> Result<String> {
        let len = mib << 11;
        let table = match (self, nodes) {
            (Stack::Disk, [node]) => return Ok(node.clone()),
            (Stack::Linear, [first, second]) => {
                format!("0 {len} linear {first} 0\\n{len} {len} linear {second} 0")
            }
            (Stack::Crypt, [node]) => {
                let key = "5a".repeat(32);
                format!("0 {len} crypt aes-xts-plain64 {key} 0 {node} 0")
            }
            _ => bail!("{self:?} of {nodes:?}"),
        };
        guest.sh(&format!(
            "modprobe dm-mod; modprobe dm-crypt
             printf '{table}\\n' | dmsetup create {name} --noudevsync
             dmsetup mknodes {name}"
        ))?;
        Ok(format!("/dev/mapper/{name}"))
    }

    fn take_apart(self, guest: &Guest, name: &str) -> Result<()> {
        if self != Stack::Disk {
            guest.sh(&format!("dmsetup remove {name} --noudevsync"))?;
        }
        Ok(())
    }
}

/// A file system on disks of its own, with a writer of records.
struct Volume {
    format: Format,
    stack: Stack,
    disks: Vec<Attached>,
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
pub(super) const NOTES: (u8, u8) = (1, 63);

impl Rig {
    /// Makes a file system of each format, mounts it and lets writers loose on it.
    fn new(guest: &Guest, kinds: &[(Format, Stack)], delay: Duration) -> Result<Rig> {
        let notes = Attached::new(guest, NOTES.0, NOTES.1, 1, Image::default())?;
        let mut number = 0..;
        let mut all = Vec::new();
        for (format, stack) in kinds {
            let mut disks = Vec::new();
            for number in number.by_ref().take(stack.disks()) {
                // On either controller in turn.
                let (controller, lun, mib) = (number % 2, number / 2, format.size());
                let disk = Attached::new(guest, controller, lun, mib, Image::default())?;
                disks.push(disk);
            }
            all.push(disks);
        }
        load_driver(guest)?;
        guest.sh("modprobe xfs; modprobe btrfs; mkdir -p /mnt/copy")?;
        let mut rig = Rig {
            volumes: Vec::new(),
            notes,
            load: Vec::new(),
        };
        for ((&(format, stack), disks), slot) in kinds.iter().zip(all).zip(0..) {
            let name = format!("{}-{slot}", format.name());
            let nodes: Result<Vec<_>> = disks.iter().map(|it| it.node(guest)).collect();
            let node = stack.assemble(guest, &name, &nodes?, format.size())?;
            let (path, make) = (format!("/mnt/{name}"), format.make());
            guest.sh(&format!(
                "mkdir -p {path}/ && {make} {node} && mount {node} {path} && sync"
            ))?;
            disks.iter().for_each(|it| it.disk.set_delay(delay));
            rig.volumes.push(Volume {
                format,
                stack,
                disks,
                path,
                slot,
            });
        }
        rig.start_load(guest)?;
        Ok(rig)
    }

    /// Lets writers loose on all volumes.
    fn start_load(&mut self, guest: &Guest) -> Result<()> {
        let notes = self.notes.node(guest)?;
        for volume in &self.volumes {
            let path = &volume.path;
            guest.recorder_start(&volume.records(), &notes, volume.slot, 10_000)?;
            guest.writer_start_every(&format!("{path}/w"), 5_000)?;
            let churn = format!(
                "mkdir {path}/churn && cd {path}/churn
                 while :; do
                     n=$((n % 40 + 1)); echo $n > $n; echo $n >> all; mv $n at-$n
                     [ $n -lt 40 ] || rm at-* all
                     sleep 0.05
                 done"
            );
            self.load.push(guest.spawn(&["sh", "-c", &churn])?);
        }
        self.wait_for_progress(guest, 10)
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
            // What a killed shell had started may be there for a moment.
            guest.wait_until("it can be unmounted", STEP, || {
                let ended = guest.try_sh(&format!("umount {}", volume.path))?;
                Ok(ended.status == Some(0))
            })?;
        }
        // Or the kernel takes a copy for the device that it knows.
        guest.sh("btrfs device scan --forget >/dev/null")?;
        Ok(())
    }

    /// Starts the write logs of all disks.
    fn start_logs(&self) -> Result<Vec<Image>> {
        self.notes.disk.start_log()?;
        let logs = self.disks().map(|it| it.disk.start_log());
        logs.collect::<Result<_, _>>().context("cannot copy a disk")
    }

    fn stop_logs(&self) {
        self.notes.disk.stop_log();
        self.disks().for_each(|it| it.disk.stop_log());
    }

    /// All disks with file systems.
    fn disks(&self) -> impl Iterator<Item = &Attached> {
        self.volumes.iter().flat_map(|it| &it.disks)
    }

    /// One backup of all disks.
    fn back_up(&self, guest: &Guest) -> Result<Backup> {
        let host = guest.host();
        let luns: Vec<_> = self.disks().map(Attached::in_backup).collect();
        let bases = self.start_logs()?;
        self.wait_for_progress(guest, 3)?;

        let freeze = guest.vss().freeze(&luns, STEP)?;
        let images: Result<Vec<_>, _> = self.disks().map(|it| it.disk.snapshot()).collect();
        answered("FREEZE", &freeze, status::OK)?;
        // A real host takes its time, too.
        std::thread::sleep(Duration::from_millis(300));
        let thawing = host.now();
        answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;

        self.wait_for_progress(guest, 1)?;
        let notes = self.notes.disk.log();
        let mut parts = bases.into_iter().zip(images?);
        let mut copies = Vec::new();
        for volume in &self.volumes {
            let mut copy = Copy {
                format: volume.format,
                stack: volume.stack,
                parts: Vec::new(),
                written: 0,
                expected: Expected::at(&notes, volume.slot, |moment| {
                    host.time_of(moment) < freeze.at
                }),
            };
            for (attached, (base, image)) in volume.disks.iter().zip(parts.by_ref()) {
                let mut log = attached.disk.log();
                copy.written += written_within(&log, |entry| {
                    let (arrived, ended) = (host.time_of(entry.arrived), host.time_of(entry.ended));
                    ended > freeze.at && arrived < thawing
                });
                log.retain(|entry| host.time_of(entry.ended) <= freeze.at);
                copy.parts.push(Part { base, log, image });
            }
            copies.push(copy);
        }
        let backup = Backup { copies };
        self.stop_logs();
        Ok(backup)
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
        for attached in rig.volumes.into_iter().flat_map(|it| it.disks) {
            attached.detach(guest)?;
        }
        rig.notes.detach(guest)?;
    }
    Ok(())
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

/// The copy of a volume, and what is known of it.
#[derive(Clone)]
struct Copy {
    format: Format,
    stack: Stack,
    /// Disk by disk.
    parts: Vec<Part>,
    /// How often the disks were written to between the answer and THAW.
    written: usize,
    expected: Expected,
}

/// The copy of a disk.
#[derive(Clone)]
struct Part {
    /// The disk when the log was started.
    base: Image,
    /// What was written from then on to the answer.
    log: Vec<Entry>,
    /// The copy itself.
    image: Image,
}

impl Copy {
    /// The copy of its only disk.
    fn only_part(&self) -> Result<&Part> {
        match self.parts.as_slice() {
            [part] => Ok(part),
            parts => bail!("{} disks", parts.len()),
        }
    }

    /// The same with another content of its only disk.
    fn with(&self, image: Image) -> Result<Copy> {
        let part = Part {
            image,
            ..self.only_part()?.clone()
        };
        Ok(Copy {
            parts: vec![part],
            ..self.clone()
        })
    }
}

/// Which records a copy must have and may have: these and all before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Expected {
    pub(super) least: u64,
    pub(super) most: u64,
}

impl Expected {
    /// What the notes of one writer say about a moment; `is_before` whether something was before it.
    pub(super) fn at(notes: &[Entry], slot: u64, is_before: impl Fn(Instant) -> bool) -> Expected {
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
    let mut lun = COPIES.1..;
    let mut all = Vec::new();
    for copy in copies {
        let mut disks = Vec::new();
        for (part, lun) in copy.parts.iter().zip(lun.by_ref()) {
            let (size, content) = (copy.format.size(), part.image.clone());
            disks.push(Attached::new(guest, COPIES.0, lun, size, content)?);
        }
        all.push(disks);
    }
    let mut verdicts = Vec::new();
    for (copy, disks) in copies.iter().zip(&all) {
        let format = copy.format;
        let nodes: Result<Vec<_>> = disks.iter().map(|it| it.node(guest)).collect();
        let node = copy.stack.assemble(guest, "copy", &nodes?, format.size())?;
        let run = |script: &str| guest.try_sh(&format!("n={node}; {script}"));
        let journal = run(format.journal())?.out;
        let (name, options) = (format.name(), format.read_only());
        let mounted = run(&format!("mount -t {name} -o {options} $n /mnt/copy"))?;
        let records = if mounted.status == Some(0) {
            let text = guest.read("/mnt/copy/records");
            run("umount /mnt/copy")?;
            match text {
                Ok(text) => judge_records(&text, copy.expected),
                Err(error) => Some(error.to_string()),
            }
        } else {
            Some(format!("it cannot be mounted: {}", mounted.err))
        };
        let check = run(format.check())?;
        copy.stack.take_apart(guest, "copy")?;
        verdicts.push(Verdict {
            log: (copy.written > 0).then(|| format!("{} writes after the answer", copy.written)),
            journal: Some(journal.trim().to_owned()).filter(|it| !it.is_empty()),
            check: (check.status != Some(0)).then(|| format!("{}{}", check.out, check.err)),
            records,
        });
    }
    guest.sh("btrfs device scan --forget >/dev/null; true")?;
    for attached in all.into_iter().flatten() {
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
        for attached in rig.volumes.into_iter().flat_map(|it| it.disks) {
            attached.detach(guest)?;
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
        written: written_within(&log, |entry| entry.ended > answer),
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
    restored.vm().kill();
    Ok(())
}

/// Backups without a pause, of disks that are slow.
fn one_after_the_other(guest: &Guest) -> Result<()> {
    const KINDS: [(Format, Stack); 6] = [
        (Format::Ext4, Stack::Disk),
        (Format::Xfs, Stack::Disk),
        (Format::Btrfs, Stack::Disk),
        (Format::Ext4, Stack::Linear),
        (Format::Xfs, Stack::Crypt),
        (Format::Btrfs, Stack::Linear),
    ];
    let process = start(guest, Module::Ours, Daemon::Ours)?;
    let mut rig = Rig::new(guest, &KINDS, Duration::from_millis(5))?;
    let (mut copies, mut records) = (0, 0);
    for round in 0..rounds_or(2) {
        let backup = rig.back_up(guest)?;
        let all: Vec<_> = backup.copies.iter().collect();
        for (copy, verdict) in all.iter().zip(judge(guest, &all)?) {
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
    }
    println!("     {copies} copies are good, {records} records had to be there and are");
    rig.stop(guest)?;
    stop(guest, Module::Ours, &process)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_judged_by_what_must_and_what_may_be_there() {
        let text = |numbers: &[u64]| -> String { numbers.iter().map(|it| record(*it)).collect() };
        let expected = Expected { least: 3, most: 4 };
        for good in [&[1, 2, 3][..], &[1, 2, 3, 4]] {
            assert_eq!(judge_records(&text(good), expected), None);
        }
        for bad in [&[][..], &[1, 2], &[1, 2, 3, 4, 5], &[1, 3, 4], &[2, 3, 4]] {
            assert!(judge_records(&text(bad), expected).is_some(), "{bad:?}");
        }
        let whole = text(&[1, 2, 3]);
        assert!(judge_records(&whole[..whole.len() - 1], expected).is_some());
        assert!(judge_records(&whole.replace('3', "\0"), expected).is_some());
    }

    #[test]
    fn notes_are_ordered_by_when_they_came_and_when_they_were_there() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let note = |slot: u64, arrived, ended, begun, synced| Entry {
            arrived: at(arrived),
            ended: at(ended),
            change: Change::Write {
                offset: slot * NOTE_LEN as u64,
                data: Note { begun, synced }.block().into(),
                fua: false,
            },
        };
        let notes = [
            note(1, 10, 11, 7, 6),
            note(0, 12, 13, 50, 50),
            note(1, 20, 30, 7, 7),
            note(1, 40, 50, 8, 7),
        ];
        let expected = |ms| Expected::at(&notes, 1, |moment| moment < at(ms));
        assert_eq!(expected(5), Expected { least: 0, most: 0 });
        assert_eq!(expected(15), Expected { least: 6, most: 7 });
        assert_eq!(expected(25), Expected { least: 7, most: 7 });
        // Begun is what was noted before; what is being noted has not begun.
        assert_eq!(expected(45), Expected { least: 7, most: 7 });
        assert_eq!(expected(60), Expected { least: 7, most: 8 });
    }
}
