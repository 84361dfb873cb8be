// SPDX-License-Identifier: GPL-2.0-only

//! File systems under load, and a backup of their disks.

use super::super::deadman::was_left_frozen;
use super::super::disks::{load_driver, Attached};
use super::volume::{Format, Stack};
use anyhow::{bail, ensure, Context, Result};
use e2e::check::{equal, status_name};
use e2e::guest::{Guest, Process, STEP};
use hv_vss_uapi::op;
use hyperv_sim::ic::status;
use hyperv_sim::storage::{log, Change, Disk, Entry, Image};
use hyperv_sim::Reply;
use lab_agent::{Note, NOTE_LEN};
use std::time::{Duration, Instant};

/// A file system on disks of its own, with a writer of records.
pub(super) struct Volume {
    pub(super) format: Format,
    pub(super) stack: Stack,
    pub(super) disks: Vec<Attached>,
    pub(super) path: String,
    pub(super) slot: u64,
}

impl Volume {
    pub(super) fn records(&self) -> String {
        format!("{}/records", self.path)
    }
}

/// File systems under load.
pub(super) struct Rig {
    pub(super) volumes: Vec<Volume>,
    /// The disk with the writers' notes. No file system is on it, and no backup has it.
    pub(super) notes: Attached,
    pub(super) load: Vec<Process>,
}

/// The controller and the first unit for copies; the last unit is for the notes.
pub(super) const COPIES: (u8, u8) = (1, 32);
pub(in crate::cases) const NOTES: (u8, u8) = (1, 63);

impl Rig {
    /// Makes a file system of each format, mounts it and lets writers loose on it.
    pub(super) fn new(guest: &Guest, kinds: &[(Format, Stack)], delay: Duration) -> Result<Rig> {
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
            let node = stack.make(guest, &name, &nodes?)?;
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
    pub(super) fn start_load(&mut self, guest: &Guest) -> Result<()> {
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

    /// Lets fio loose on all volumes as well: writes at random places, synced now and then.
    pub(super) fn start_fio(&mut self, guest: &Guest) -> Result<()> {
        let mut command =
            "fio --rw=randwrite --bs=4k --size=6m --create_on_open=1 --fallocate=none --disk_util=0 --fsync=16 \
            --ioengine=psync --thread --rate_iops=40 --time_based --runtime=1000h"
                .to_owned();
        let files: Vec<String> = self
            .volumes
            .iter()
            .map(|it| format!("{}/fio", it.path))
            .collect();
        for file in &files {
            command += &format!(" --name={file} --filename={file}");
        }
        let words: Vec<_> = command.split_whitespace().collect();
        self.load.push(guest.spawn(&words)?);
        let look = files.iter().map(|it| format!("test -s {it}"));
        let look = look.collect::<Vec<_>>().join(" && ");
        // It is large: to load it and to measure its clock takes minutes where all is emulated.
        guest
            .wait_until("fio writes everywhere", STEP * 20, || {
                Ok(guest.try_sh(&look)?.status == Some(0))
            })
            .context("fio")
    }

    /// Waits until every writer has done so many more writes.
    pub(super) fn wait_for_progress(&self, guest: &Guest, writes: u64) -> Result<()> {
        let start = guest.writers()?;
        guest.wait_until("every writer goes on", STEP * 4, || {
            let now = guest.writers()?;
            let mut both = start.iter().zip(&now);
            Ok(both.all(|(then, now)| now.count >= then.count + writes))
        })
    }

    /// Lets the load rest, for what would take for ever beside it, or go on.
    pub(super) fn rest(&self, guest: &Guest, rest: bool) -> Result<()> {
        for process in &self.load {
            guest.signal(process, if rest { 19 } else { 18 })?;
        }
        Ok(guest.writers_rest(rest)?)
    }

    /// Ends the load, unmounts all and takes the volumes apart.
    pub(super) fn stop(&mut self, guest: &Guest) -> Result<()> {
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
            let name = volume.path.trim_start_matches("/mnt/");
            volume.stack.close(guest, name)?;
        }
        // Or the kernel takes a copy for the device that it knows.
        guest.sh("btrfs device scan --forget >/dev/null")?;
        Ok(())
    }

    /// Takes all disks away.
    pub(super) fn detach(self, guest: &Guest) -> Result<()> {
        let disks = self.volumes.into_iter().flat_map(|it| it.disks);
        Attached::detach_all(guest, disks.chain([self.notes]))
    }

    /// Starts the write logs of all disks.
    pub(super) fn start_logs(&self) -> Result<Vec<Image>> {
        self.notes.disk.start_log()?;
        let logs = self.disks().map(|it| it.disk.start_log());
        logs.collect::<Result<_, _>>().context("cannot copy a disk")
    }

    pub(super) fn stop_logs(&self) {
        self.notes.disk.stop_log();
        self.disks().for_each(|it| it.disk.stop_log());
    }

    /// All disks with file systems.
    pub(super) fn disks(&self) -> impl Iterator<Item = &Attached> {
        self.volumes.iter().flat_map(|it| &it.disks)
    }

    /// One backup of all disks.
    pub(super) fn back_up(&self, guest: &Guest) -> Result<Backup> {
        self.back_up_after(guest, |_| Ok(()))
    }

    /// One backup of all disks, which are copied when `wait` has returned; it is told when the answer came.
    pub(super) fn back_up_after(
        &self,
        guest: &Guest,
        wait: impl FnOnce(Duration) -> Result<()>,
    ) -> Result<Backup> {
        self.back_up_served(guest, |_| Ok(()), wait)
    }

    /// The same, where `serve` sees to it that the guest answers an operation that the host has sent. Nothing is
    /// copied where FREEZE fails.
    pub(super) fn back_up_served(
        &self,
        guest: &Guest,
        serve: impl Fn(u8) -> Result<()>,
        wait: impl FnOnce(Duration) -> Result<()>,
    ) -> Result<Backup> {
        let host = guest.host();
        let luns: Vec<_> = self.disks().map(Attached::in_backup).collect();
        let bases = self.start_logs()?;
        self.wait_for_progress(guest, 3)?;

        let asked = guest.vss().send_freeze(&luns)?;
        serve(op::FREEZE)?;
        let freeze = guest.vss().wait(asked, STEP)?;
        if freeze.status() != status::OK {
            self.stop_logs();
            return Ok(Backup {
                freeze: freeze.status(),
                thaw: None,
                left_frozen: Vec::new(),
                copies: Vec::new(),
            });
        }
        wait(freeze.at)?;
        let images: Result<Vec<_>, _> = self.disks().map(|it| it.disk.snapshot()).collect();
        // A real host takes its time, too.
        std::thread::sleep(Duration::from_millis(300));
        let thawing = host.now();
        let asked = guest.vss().send_thaw()?;
        serve(op::THAW)?;
        let thaw = guest.vss().wait(asked, STEP)?.status();
        let mut left_frozen = Vec::new();
        if thaw == status::OK {
            self.wait_for_progress(guest, 1)?;
        } else {
            // What comes next wants none to be: who asks thaws it.
            for volume in &self.volumes {
                if was_left_frozen(guest, &volume.path)? {
                    left_frozen.push(volume.path.clone());
                }
            }
        }
        let notes = self.notes.disk.log();
        let mut parts = bases.into_iter().zip(images?);
        let mut copies = Vec::new();
        for volume in &self.volumes {
            let mut copy = Copy {
                format: volume.format,
                stack: volume.stack,
                parts: Vec::new(),
                written: Vec::new(),
                discarded: 0,
                expected: Expected::at(&notes, volume.slot, |moment| {
                    host.time_of(moment) < freeze.at
                }),
            };
            for (attached, (base, image)) in volume.disks.iter().zip(parts.by_ref()) {
                let mut log = attached.disk.log();
                let metadata = volume.stack.metadata(&image);
                let in_window = |entry: &Entry| {
                    entry.is_within(|moment| host.time_of(moment), freeze.at, thawing)
                };
                let at_will = |entry: &Entry| volume.format.discards_at_will(entry);
                copy.written.extend(written_within(&log, metadata, |entry| {
                    in_window(entry) && !at_will(entry)
                }));
                // The copy of a host that takes its time has them all.
                let discards = log.iter().filter(|it| in_window(it) && at_will(it));
                copy.discarded += discards.clone().count();
                let image = log::replay(&image, discards);
                let is_before = |moment| host.time_of(moment) <= freeze.at;
                log.retain(|entry| entry.ended.is_some_and(is_before));
                copy.parts.push(Part { base, log, image });
            }
            copies.push(copy);
        }
        self.stop_logs();
        Ok(Backup {
            freeze: freeze.status(),
            thaw: Some(thaw),
            left_frozen,
            copies,
        })
    }
}

/// Which of these entries changed the disk behind its first `metadata` bytes while `within` says so, in words.
pub(super) fn written_within(
    log: &[Entry],
    metadata: u64,
    within: impl Fn(&Entry) -> bool,
) -> Vec<String> {
    let words = |entry: &Entry| match &entry.change {
        Change::Write { offset, data, .. } if *offset >= metadata => {
            Some(format!("{} bytes written at {offset}", data.len()))
        }
        Change::Discard { offset, len } if *offset >= metadata => {
            Some(format!("{len} bytes discarded at {offset}"))
        }
        Change::Write { .. } | Change::Discard { .. } | Change::Flush => None,
    };
    let log = log.iter().filter(|entry| within(entry));
    log.filter_map(words).collect()
}

/// Nothing was written to this disk between the answer to FREEZE and `thawing`, on the host's clock; something
/// was before it, or its log would tell nothing.
pub(in crate::cases) fn stood_still(
    guest: &Guest,
    disk: &Disk,
    freeze: &Reply,
    thawing: Duration,
) -> Result<()> {
    let clock = |moment| guest.host().time_of(moment);
    let log = disk.log();
    let within = |from, to| written_within(&log, 0, |entry| entry.is_within(clock, from, to));
    ensure!(
        !within(Duration::ZERO, freeze.at).is_empty(),
        "there should be writes before the answer"
    );
    equal(
        "writes since the answer",
        within(freeze.at, thawing),
        Vec::new(),
    )
}

/// What a backup brought.
pub(super) struct Backup {
    /// What the host was told for FREEZE.
    pub(super) freeze: u32,
    /// The same for THAW; `None` when FREEZE had failed.
    pub(super) thaw: Option<u32>,
    /// What was still frozen when THAW had failed.
    pub(super) left_frozen: Vec<String>,
    /// A copy of each volume, if FREEZE was answered 0.
    pub(super) copies: Vec<Copy>,
}

impl Backup {
    /// The same, if both were answered 0. A THAW that has failed is the worse for what it leaves frozen.
    pub(super) fn answered(self) -> Result<Self> {
        equal("FREEZE", status_name(self.freeze), status_name(status::OK))?;
        let none: &[String] = &[];
        equal("what THAW left frozen", &*self.left_frozen, none)?;
        let thaw = self.thaw.map(status_name);
        equal("THAW", thaw, Some(status_name(status::OK)))?;
        Ok(self)
    }

    /// Something could have been lost from each of its copies.
    pub(super) fn was_busy(&self) -> Result<()> {
        self.copies.iter().try_for_each(Copy::was_busy)
    }

    /// In words, for the comparison: what the host was told, if that was not 0, and `verdict` on a copy.
    pub(super) fn describe(&self, verdict: &str) -> String {
        match self.thaw {
            None => format!("FREEZE {}", status_name(self.freeze)),
            Some(status::OK) => verdict.to_owned(),
            Some(thaw) => {
                let mut words = format!("{verdict}; THAW {}", status_name(thaw));
                if !self.left_frozen.is_empty() {
                    words += &format!(", still frozen: {}", self.left_frozen.join(" "));
                }
                words
            }
        }
    }
}

/// The copy of a volume, and what is known of it.
#[derive(Clone)]
pub(super) struct Copy {
    pub(super) format: Format,
    pub(super) stack: Stack,
    /// Disk by disk.
    pub(super) parts: Vec<Part>,
    /// What was written to the disks between the answer and THAW.
    pub(super) written: Vec<String>,
    /// How often free space was discarded meanwhile by a file system of which that is known.
    pub(super) discarded: usize,
    pub(super) expected: Expected,
}

/// The copy of a disk.
#[derive(Clone)]
pub(super) struct Part {
    /// The disk when the log was started.
    pub(super) base: Image,
    /// What was written from then on to the answer.
    pub(super) log: Vec<Entry>,
    /// The copy itself.
    pub(super) image: Image,
}

impl Copy {
    /// Something could have been lost from it: there were records, and writes. What is said of another one says
    /// nothing, of whichever stack.
    pub(super) fn was_busy(&self) -> Result<()> {
        let writes: usize = self.parts.iter().map(|it| it.log.len()).sum();
        ensure!(
            self.expected.least > 0 && writes > 0,
            "there should have been records and writes on {:?} on {:?}: {:?}, {writes} writes",
            self.format,
            self.stack,
            self.expected
        );
        Ok(())
    }

    /// The copy of its only disk.
    pub(super) fn only_part(&self) -> Result<&Part> {
        match self.parts.as_slice() {
            [part] => Ok(part),
            parts => bail!("{} disks", parts.len()),
        }
    }

    /// The same with another content of its only disk.
    pub(super) fn with(&self, image: Image) -> Result<Copy> {
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
pub(in crate::cases) struct Expected {
    pub(in crate::cases) least: u64,
    pub(in crate::cases) most: u64,
}

impl Expected {
    /// What the notes of one writer say about a moment; `is_before` whether something was before it.
    pub(in crate::cases) fn at(
        notes: &[Entry],
        slot: u64,
        is_before: impl Fn(Instant) -> bool,
    ) -> Expected {
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
            if entry.ended.is_some_and(&is_before) {
                expected.most = note.begun;
            }
        }
        expected
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_was_told_is_in_the_words_if_it_was_not_0() {
        let words = |freeze, thaw, left_frozen: &[&str]| {
            let backup = Backup {
                freeze,
                thaw,
                left_frozen: left_frozen.iter().map(|it| it.to_string()).collect(),
                copies: Vec::new(),
            };
            let words = backup.describe("restores");
            (words, backup.answered().map(drop))
        };
        let (said, good) = words(0, Some(0), &[]);
        assert!(said == "restores" && good.is_ok());
        let (failed, bad) = words(status::FAIL, None, &[]);
        assert!(failed.starts_with("FREEZE 0x80004005") && bad.is_err());
        let (failed, bad) = words(0, Some(status::FAIL), &[]);
        assert!(failed.starts_with("restores; THAW 0x80004005") && !failed.contains("frozen"));
        assert!(bad.unwrap_err().to_string().starts_with("THAW: "));
        let (failed, bad) = words(0, Some(status::FAIL), &["/mnt/a", "/mnt/b"]);
        assert!(failed.ends_with(", still frozen: /mnt/a /mnt/b"));
        assert!(bad.unwrap_err().to_string().contains("/mnt/b"));
    }

    #[test]
    fn notes_are_ordered_by_when_they_came_and_when_they_were_there() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let note = |slot: u64, arrived, ended, begun, synced| Entry {
            arrived: at(arrived),
            ended: Some(at(ended)),
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
