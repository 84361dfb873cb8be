// SPDX-License-Identifier: GPL-2.0-only

//! The judges of a copy: the host's write log, the journal, the file system's checker, and the records.

use super::super::disks::Attached;
use super::rig::{Copy, Expected, COPIES};
use super::volume::{Format, Stack};
use anyhow::{ensure, Result};
use e2e::guest::Guest;
use lab_agent::{record, Ended, RECORD_LEN};

/// What the judges have against a copy: nothing each, if it is good.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// Of the write log.
    pub(super) log: Option<String>,
    /// Of the disks of a mirror, which must be alike.
    pub(super) mirror: Option<String>,
    /// Of the journal.
    pub(super) journal: Option<String>,
    /// Of the file system's checker.
    pub(super) check: Option<String>,
    /// Of the records.
    pub(super) records: Option<String>,
}

impl Verdict {
    /// Who objects, by name, and why.
    pub(super) fn objections(&self) -> Vec<(&'static str, &str)> {
        [
            ("log", &self.log),
            ("mirror", &self.mirror),
            ("journal", &self.journal),
            ("checker", &self.check),
            ("records", &self.records),
        ]
        .into_iter()
        .filter_map(|(judge, why)| Some((judge, why.as_deref()?)))
        .collect()
    }

    /// In words, for the comparison; `good` is said of a copy that nobody objects to.
    pub(super) fn describe(&self, good: &str) -> String {
        let judges: Vec<_> = self.objections().iter().map(|it| it.0).collect();
        match judges.as_slice() {
            [] => good.into(),
            judges => format!("does not restore: {}", judges.join(", ")),
        }
    }
}

/// What is said of a copy that nobody objects to.
pub(super) const RESTORES: &str =
    "restores: nothing written after the answer, no replay, clean, no record lost";

/// The same of one that is made of what came before the first write: the log can hold nothing against it.
pub(super) const RESTORES_UNWRITTEN: &str = "restores: no replay, clean, no record lost";

/// Attaches copies as further disks and lets the judges look at them.
pub(super) fn judge(guest: &Guest, copies: &[&Copy]) -> Result<Vec<Verdict>> {
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
    for ((copy, disks), number) in copies.iter().zip(&all).zip(0..) {
        let format = copy.format;
        // Each has a name of its own: those that were judged are there until all are taken away.
        let name = format!("copy-{number}");
        let nodes: Result<Vec<_>> = disks.iter().map(|it| it.node(guest)).collect();
        let node = copy.stack.open_copy(guest, &name, &nodes?)?;
        let run = |script: &str| run(guest, &node, script);
        let journal = run(&format.journal())?.out;
        let (kind, options) = (format.name(), format.read_only());
        let mounted = run(&format!("mount -t {kind} -o {options} $n /mnt/copy"))?;
        let records = if mounted.status == Some(0) {
            let records = judge_records_at(guest, "/mnt/copy/records", copy.expected)?;
            run("umount /mnt/copy")?;
            records
        } else {
            Some(format!("it cannot be mounted: {}", mounted.err))
        };
        let check = judge_by_checker(guest, format, &node)?;
        copy.stack.close(guest, &name)?;
        verdicts.push(Verdict {
            log: copy.written.first().map(|first| {
                let count = copy.written.len();
                format!("{count} writes after the answer, the first one: {first}")
            }),
            mirror: judge_mirror(copy),
            journal: Some(journal.trim().to_owned()).filter(|it| !it.is_empty()),
            check,
            records,
        });
    }
    guest.sh("btrfs device scan --forget >/dev/null; true")?;
    Attached::detach_all(guest, all.into_iter().flatten())?;
    Ok(verdicts)
}

/// Runs this with `$n` for the node. That it took too long says nothing of a copy.
fn run(guest: &Guest, node: &str, script: &str) -> Result<Ended> {
    let ended = guest.try_sh(&format!("n={node}; {script}"))?;
    ensure!(!ended.timed_out, "it did not end in time: {script}");
    Ok(ended)
}

/// What the checker has against the file system on a node.
pub(super) fn judge_by_checker(
    guest: &Guest,
    format: Format,
    node: &str,
) -> Result<Option<String>> {
    let check = run(guest, node, format.check())?;
    Ok((check.status != Some(0)).then(|| format!("{}{}", check.out, check.err)))
}

/// Where the copies of the disks of a mirror differ.
fn judge_mirror(copy: &Copy) -> Option<String> {
    const CHUNK: usize = 64 << 10;
    let (Stack::Md, [first, second]) = (copy.stack, copy.parts.as_slice()) else {
        return None;
    };
    let (mut one, mut other) = ([0; CHUNK], [0; CHUNK]);
    let (from, end) = (copy.stack.metadata(&first.image), copy.format.size() << 20);
    // Or there would be nothing to compare.
    if from == 0 || from >= end {
        return Some(format!("md's superblock has its data at byte {from}"));
    }
    let mut places = (from..end).step_by(CHUNK);
    let place = places.find(|place| {
        first.image.read(*place, &mut one);
        second.image.read(*place, &mut other);
        one != other
    })?;
    Some(format!("from byte {place} on the disks differ"))
}

/// What is wrong with the records in this file of a copy. That the guest does not answer says nothing of it.
pub(super) fn judge_records_at(
    guest: &Guest,
    path: &str,
    expected: Expected,
) -> Result<Option<String>> {
    match guest.read(path) {
        Ok(text) => Ok(judge_records(&text, expected)),
        Err(error) if error.errno().is_some() => Ok(Some(error.to_string())),
        Err(error) => Err(error.into()),
    }
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

#[cfg(test)]
mod tests {
    use super::super::rig::Part;
    use super::*;
    use hyperv_sim::storage::Image;

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
    fn the_disks_of_a_mirror_are_compared_behind_what_md_writes_for_itself() {
        let disk = |changed: Option<u64>| {
            let mut image = Image::default();
            // The data begins at 1 MiB.
            image.write(4096 + 128, &2048_u64.to_le_bytes());
            image.write(3 << 20, b"data");
            if let Some(at) = changed {
                image.write(at, b"x");
            }
            let base = Image::default();
            Part {
                base,
                log: Vec::new(),
                image,
            }
        };
        let copy = |stack, changed| Copy {
            format: Format::Ext4,
            stack,
            parts: vec![disk(None), disk(changed)],
            written: Vec::new(),
            discarded: 0,
            expected: Expected { least: 0, most: 0 },
        };
        assert_eq!(judge_mirror(&copy(Stack::Md, None)), None);
        assert_eq!(judge_mirror(&copy(Stack::Md, Some(8192))), None);
        assert!(judge_mirror(&copy(Stack::Md, Some(1 << 20))).is_some());
        let last = (Format::Ext4.size() << 20) - 1;
        assert!(judge_mirror(&copy(Stack::Md, Some(last))).is_some());
        assert_eq!(judge_mirror(&copy(Stack::Lvm, Some(last))), None);
        let mut blank = copy(Stack::Md, None);
        blank
            .parts
            .iter_mut()
            .for_each(|it| it.image = Image::default());
        assert!(judge_mirror(&blank).is_some());
    }
}
