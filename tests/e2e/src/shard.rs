// SPDX-License-Identifier: GPL-2.0-only

//! Divides the cases among runs that go side by side, and adds up what came of them.
//!
//! Which run takes which case follows from the list of cases alone, so that the runs need not know of
//! each other. Knows nothing of guests.

use crate::cases::Case;
use crate::runner::Verdict;
use anyhow::{bail, Context, Result};
use std::io::ErrorKind;
use std::path::PathBuf;
use std::str::FromStr;

/// Cases of one kind of guest up to which another boot costs more than is won by dividing them.
const FEW: usize = 4;

/// What a boot takes, in seconds.
const BOOT: u32 = 12;

/// What a case takes that is not named here.
const USUAL: u32 = 6;

/// Cases that take much longer, in seconds as a run under emulation has printed them. One that is wrong here
/// costs some balance and nothing else.
const LONG: [(&str, u32); 76] = [
    ("abi/debugfs", 9),
    ("broken/btrfs-balance", 13),
    ("broken/btrfs-read-only-after-a-backup", 15),
    ("broken/btrfs-read-only-since-an-error", 15),
    ("broken/disk-gone", 17),
    ("broken/full-pool", 13),
    ("broken/mapper-merge", 20),
    ("broken/md-repair", 20),
    ("broken/mirror-that-waits", 11),
    ("broken/raid-journal", 20),
    ("broken/read-only-since-an-error", 14),
    ("broken/vfat-read-only-since-an-error", 13),
    ("commands/one-at-a-time", 12),
    ("control/check", 19),
    ("control/log-not-read", 21),
    ("control/rehearsal", 29),
    ("control/reload-that-hangs", 29),
    ("control/thaw-of-a-dead-disk", 14),
    ("control/thaw-under-a-stopped-daemon", 23),
    ("deadman/both-killed", 16),
    ("deadman/both-killed-in-a-hung-freeze", 38),
    ("deadman/daemon-aborted", 15),
    ("deadman/daemon-killed", 21),
    ("deadman/daemon-killed-in-a-hung-freeze", 19),
    ("deadman/daemon-killed-stock-module", 13),
    ("deadman/dead-before-freeze", 16),
    ("deadman/dead-while-frozen", 19),
    ("deadman/dead-while-frozen-stock-module", 20),
    ("deadman/guard-killed-while-it-hangs", 25),
    ("deadman/host-never-thaws", 13),
    ("deadman/hung-freeze-stock-module", 20),
    ("deadman/image-on-dead-fuse-stock-module", 17),
    ("deadman/killed-in-a-hung-freeze", 25),
    ("deadman/rehearsal-killed-beside-a-daemon", 20),
    ("deadman/rehearsal-let-go-beside-a-hang", 27),
    ("deadman/rehearsal-stopped-beside-a-hang", 15),
    ("foreign/exported-image", 10),
    ("foreign/guard-stopped-and-daemon-killed", 13),
    ("foreign/half-frozen", 11),
    ("foreign/kept-frozen-and-daemon-killed", 22),
    ("foreign/quit-key", 17),
    ("foreign/released-in-the-window", 13),
    ("freeze/never-touched", 14),
    ("freeze/nothing-but-descriptors", 34),
    ("hooks/backup", 18),
    ("hooks/failing", 10),
    ("hooks/hung-start", 10),
    ("hooks/in-vain", 12),
    ("hooks/rehearsal-killed", 19),
    ("hostile/flood", 15),
    ("judges/balloon", 15),
    ("lifecycle/backups", 37),
    ("lifecycle/backups-stock-module", 41),
    ("lifecycle/rescind-offer", 17),
    ("lifecycle/unbind-rebind", 27),
    ("matrix/few", 35),
    ("owned/deadline-after-thaw", 12),
    ("owned/hibernated", 18),
    ("owned/our-daemon", 13),
    ("owned/xfs-repair", 10),
    ("pairing/ours-ours", 14),
    ("restore/checkers-ext4", 16),
    ("restore/ext4", 20),
    ("restore/root", 20),
    ("scope/listed-disks-only", 23),
    ("scope/raw-writer", 14),
    ("scope/raw-writer-beside-swap", 15),
    ("scope/raw-writer-on-layers", 16),
    ("scope/which-disks", 20),
    ("sleep/daemon-opens-anew", 17),
    ("sleep/daemon-opens-late", 23),
    ("sleep/freeze-that-ran-out", 17),
    ("sleep/snapshot-device", 12),
    ("sleep/thaw-that-hangs", 21),
    ("slow/cannot-freeze", 14),
    ("suspend/hibernate", 19),
];

/// How long a case takes, about.
fn seconds(case: &Case) -> u32 {
    let named = LONG.iter().find(|(name, _)| *name == case.name);
    named.map_or(USUAL, |(_, seconds)| *seconds)
}

/// One of several runs: `1/2`.
#[derive(Clone, Copy, Debug)]
pub struct Shard {
    /// Counted from 0.
    number: usize,
    of: usize,
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('/').and_then(|(number, of)| {
            let of: usize = of.parse().ok()?;
            let number: usize = number.parse().ok()?;
            (1..=of).contains(&number).then(|| (number - 1, of))
        });
        let (number, of) = numbers.ok_or("this should be like 1/2")?;
        Ok(Shard { number, of })
    }
}

impl Shard {
    /// Its part of `cases`, which stand together by the guest that they want, in their order: the longest
    /// are dealt first, each to whom has least to do.
    pub fn of(self, cases: Vec<Case>) -> Vec<Case> {
        let mut load = vec![0; self.of];
        let kinds: Vec<&[Case]> = cases.chunk_by(|a, b| a.machine == b.machine).collect();
        // Few are not divided; those that are level what these have left.
        let mut fewest: Vec<usize> = (0..kinds.len()).collect();
        fewest.sort_by_key(|kind| kinds[*kind].len());
        let mut mine = vec![Vec::new(); kinds.len()];
        for number in fewest {
            let kind = kinds[number];
            let pieces = if kind.len() <= FEW { 1 } else { self.of };
            let mut takers: Vec<usize> = (0..self.of).collect();
            takers.sort_by_key(|shard| load[*shard]);
            takers.truncate(pieces);
            for taker in &takers {
                load[*taker] += BOOT;
            }
            let mut longest: Vec<usize> = (0..kind.len()).collect();
            longest.sort_by_key(|at| std::cmp::Reverse(seconds(&kind[*at])));
            let mut kept = Vec::new();
            for at in longest {
                let Some(taker) = takers.iter().copied().min_by_key(|shard| load[*shard]) else {
                    continue;
                };
                load[taker] += seconds(&kind[at]);
                if taker == self.number {
                    kept.push(at);
                }
            }
            kept.sort_unstable();
            mine[number].extend(kept.into_iter().map(|at| kind[at].clone()));
        }
        mine.concat()
    }
}

/// The verdicts that runs side by side have written, in the order of `expected`: the cases that they were to
/// run, each of which is in one of them. One that is in none has failed, whatever became of its run.
pub fn collect(files: &[PathBuf], expected: &[Case]) -> Result<Vec<Verdict>> {
    let mut verdicts: Vec<Verdict> = Vec::new();
    for file in files {
        match std::fs::read_to_string(file) {
            Ok(text) => {
                let more: Vec<Verdict> = serde_json::from_str(&text)
                    .with_context(|| format!("{} is no list of verdicts", file.display()))?;
                verdicts.extend(more);
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                println!(
                    "a part of the run has not ended: there is no {}",
                    file.display()
                );
            }
            Err(error) => bail!("cannot read {}: {error}", file.display()),
        }
    }
    let place = |verdict: &Verdict| expected.iter().position(|case| case.name == verdict.name);
    if let Some(stray) = verdicts.iter().find(|it| place(it).is_none()) {
        bail!("nobody asked for {}", stray.name);
    }
    for case in expected {
        match verdicts.iter().filter(|it| it.name == case.name).count() {
            0 => verdicts.push(Verdict::missing(case.name)),
            1 => {}
            _ => bail!("{} was run twice", case.name),
        }
    }
    verdicts.sort_by_key(place);
    Ok(verdicts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_case_is_in_one_shard() {
        let mut cases = crate::cases::all();
        cases.sort_by_key(|case| case.machine);
        for of in 1..=3 {
            let mut seen = BTreeSet::new();
            for number in 0..of {
                for case in (Shard { number, of }).of(cases.clone()) {
                    assert!(seen.insert(case.name), "{} twice", case.name);
                }
            }
            assert_eq!(seen.len(), cases.len());
        }
    }

    #[test]
    fn the_shards_take_about_as_long() {
        let mut cases = crate::cases::all();
        cases.retain(|case| case.when == crate::cases::When::Always);
        cases.sort_by_key(|case| case.machine);
        for (name, _) in LONG {
            assert!(cases.iter().any(|case| case.name == name), "{name} is gone");
        }
        for of in 2..=4 {
            let load = |number| -> u32 {
                let mine = (Shard { number, of }).of(cases.clone());
                let kinds = mine.chunk_by(|a, b| a.machine == b.machine).count() as u32;
                mine.iter().map(seconds).sum::<u32>() + kinds * BOOT
            };
            let loads: Vec<u32> = (0..of).map(load).collect();
            let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
            // As even as it gets where a case takes so much itself.
            assert!(most - least <= BOOT + USUAL, "{loads:?}");
        }
    }

    #[test]
    fn a_part_that_is_missing_fails_its_cases() {
        let folder = std::env::temp_dir().join(format!("e2e-sum-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let cases: Vec<Case> = crate::cases::all().into_iter().take(12).collect();
        let files: Vec<PathBuf> = (0..2)
            .map(|number| {
                let file = folder.join(format!("{number}.json"));
                let part = (Shard { number, of: 2 }).of(cases.clone());
                let verdicts: Vec<Verdict> =
                    part.iter().map(|it| Verdict::passed(it.name)).collect();
                crate::runner::write_json(&file, &verdicts).unwrap();
                file
            })
            .collect();
        let whole = collect(&files, &cases).unwrap();
        let names: Vec<&str> = whole.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(names, cases.iter().map(|it| it.name).collect::<Vec<_>>());
        assert!(crate::runner::close(&whole));
        // A file that was never written, and one that nobody has named.
        std::fs::remove_file(&files[1]).unwrap();
        for files in [&files[..], &files[..1]] {
            let half = collect(files, &cases).unwrap();
            assert_eq!(half.len(), cases.len());
            assert!(!crate::runner::close(&half));
        }
        let twice = collect(&[files[0].clone(), files[0].clone()], &cases);
        assert!(twice.is_err_and(|it| it.to_string().contains("twice")));
        let stray = collect(&files[..1], &cases[..1]);
        assert!(stray.is_err_and(|it| it.to_string().contains("nobody")));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_is_no_shard_is_refused() {
        for text in ["", "1", "0/2", "3/2", "a/b", "1/0"] {
            assert!(text.parse::<Shard>().is_err(), "{text:?}");
        }
        assert!("2/2".parse::<Shard>().is_ok());
    }
}
