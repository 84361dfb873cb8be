// SPDX-License-Identifier: GPL-2.0-only

//! Rounds in, figures out. Knows no guest.

use crate::measure::Sample;
use crate::stack::Stack;
use serde::Serialize;
use std::collections::BTreeSet;

/// One turn of one stack.
#[derive(Debug, Serialize)]
pub struct Turn {
    /// Under which load.
    pub load: &'static str,
    /// Counted from 1; both stacks have one turn in each round.
    pub round: u32,
    /// Whose turn.
    pub stack: Stack,
    /// What it gave.
    #[serde(flatten)]
    pub sample: Sample,
}

/// One line of `summary.json`.
#[derive(Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The load.
    pub load: &'static str,
    /// What was measured.
    pub metric: &'static str,
    /// Median of our turns, in seconds.
    pub ours: f64,
    /// Median of the peer's, in seconds.
    pub peer: f64,
    /// `ours / peer`.
    pub ratio: f64,
}

/// The middle value, or the mean of the middle two; 0 of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |index: usize| sorted.get(index).copied().unwrap_or_default();
    match sorted.len() {
        0 => 0.0,
        len if len % 2 == 1 => at(len / 2),
        len => (at(len / 2 - 1) + at(len / 2)) / 2.0,
    }
}

/// The order in which people read metrics.
const METRICS: [&str; 5] = ["stall", "freeze", "thaw", "roundtrip", "cpu"];

/// All values of one metric.
pub fn values(turns: &[Turn], load: &str, stack: Stack, metric: &str) -> Vec<f64> {
    turns
        .iter()
        .filter(|it| it.load == load && it.stack == stack)
        .filter_map(|it| it.sample.seconds.get(metric).copied())
        .collect()
}

/// Medians of everything that was measured, loads in the order of their turns.
pub fn compare(turns: &[Turn]) -> Vec<Comparison> {
    let mut seen = BTreeSet::new();
    let loads = turns.iter().map(|it| it.load).filter(|it| seen.insert(*it));
    let mut rows = Vec::new();
    for load in loads {
        for metric in METRICS {
            let ours = values(turns, load, Stack::Ours, metric);
            let peer = values(turns, load, Stack::Peer, metric);
            if ours.is_empty() || peer.is_empty() {
                continue;
            }
            let (ours, peer) = (median(&ours), median(&peer));
            rows.push(Comparison {
                load,
                metric,
                ours,
                peer,
                ratio: ours / peer,
            });
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn turn(round: u32, stack: Stack, stall: f64) -> Turn {
        Turn {
            load: "some",
            round,
            stack,
            sample: Sample {
                seconds: BTreeMap::from([("stall", stall)]),
                ..Sample::default()
            },
        }
    }

    #[test]
    fn the_median_is_the_middle_value_or_between_the_middle_two() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 100.0]), 3.0);
    }

    #[test]
    fn a_ratio_is_that_of_the_medians() {
        let turns = [
            turn(1, Stack::Ours, 1.0),
            turn(1, Stack::Peer, 2.0),
            turn(2, Stack::Ours, 3.0),
            turn(2, Stack::Peer, 6.0),
        ];
        let expected = Comparison {
            load: "some",
            metric: "stall",
            ours: 2.0,
            peer: 4.0,
            ratio: 0.5,
        };
        assert_eq!(compare(&turns), [expected]);
        // One side alone is no comparison.
        assert_eq!(compare(&turns[..1]), []);
    }
}
