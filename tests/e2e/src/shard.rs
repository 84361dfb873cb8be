// SPDX-License-Identifier: GPL-2.0-only

//! Divides the cases among runs that go side by side, and adds up what came of them.
//!
//! Which run takes which case follows from the list of cases alone, so that the runs need not know of
//! each other. Knows nothing of guests.

use crate::cases::Case;
use crate::runner::Verdict;
use anyhow::{ensure, Context, Result};
use std::path::PathBuf;
use std::str::FromStr;

/// Cases of one kind of guest up to which another boot costs more than is won by dividing them.
const FEW: usize = 4;

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
    /// Its part of `cases`, which stand together by the guest that they want.
    pub fn of(self, cases: Vec<Case>) -> Vec<Case> {
        let mut load = vec![0; self.of];
        let mut mine = Vec::new();
        for kind in cases.chunk_by(|a, b| a.machine == b.machine) {
            let pieces = if kind.len() <= FEW { 1 } else { self.of };
            let mut emptiest: Vec<usize> = (0..self.of).collect();
            emptiest.sort_by_key(|shard| load[*shard]);
            for (at, case) in kind.iter().enumerate() {
                let shard = emptiest[at % pieces];
                load[shard] += 1;
                if shard == self.number {
                    mine.push(case.clone());
                }
            }
        }
        mine
    }
}

/// The verdicts that runs side by side have written, in the order of the list of cases.
pub fn collect(files: &[PathBuf], order: &[Case]) -> Result<Vec<Verdict>> {
    let mut verdicts: Vec<Verdict> = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read {}: that run did not end", file.display()))?;
        let more: Vec<Verdict> = serde_json::from_str(&text)
            .with_context(|| format!("{} is no list of verdicts", file.display()))?;
        verdicts.extend(more);
    }
    let place = |verdict: &Verdict| order.iter().position(|case| case.name == verdict.name);
    verdicts.sort_by_key(place);
    ensure!(
        verdicts.windows(2).all(|pair| pair[0].name != pair[1].name),
        "a case was run twice"
    );
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
    fn what_is_no_shard_is_refused() {
        for text in ["", "1", "0/2", "3/2", "a/b", "1/0"] {
            assert!(text.parse::<Shard>().is_err(), "{text:?}");
        }
        assert!("2/2".parse::<Shard>().is_ok());
    }
}
