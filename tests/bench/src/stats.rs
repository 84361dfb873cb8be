// SPDX-License-Identifier: GPL-2.0-only

//! Rounds in, figures out. Knows no guest.

use crate::measure::Sample;
use crate::stack::Stack;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// One turn of one stack.
#[derive(Debug, Serialize)]
pub struct Turn {
    /// Under which load.
    pub load: &'static str,
    /// Counted from 1; each stack has one turn in each round.
    pub round: u32,
    /// Whose turn.
    pub stack: Stack,
    /// What it gave.
    #[serde(flatten)]
    pub sample: Sample,
}

/// One line of `summary.json`. Figures are in seconds.
#[derive(Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The load.
    pub load: &'static str,
    /// What was measured.
    pub metric: &'static str,
    /// Median of our turns.
    pub ours: f64,
    /// Median of those of our daemon with its guard, on the stock module, where it had turns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guarded: Option<f64>,
    /// Median of the peer's.
    pub peer: f64,
    /// `ours / peer`.
    pub ratio: f64,
    /// In which range 95 % of the ratios are that come of drawing as many rounds out of these
    /// (bootstrap; what a round gave both stays together). None of so few that none has that meaning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<[f64; 2]>,
    /// In the rows of `stall`: the longest of all rounds, ours and the peer's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worst: Option<[f64; 2]>,
    /// In the rows of `stall`: ours, divided by the least that any stack could do in that guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_ratio: Option<f64>,
}

/// How often rounds are drawn.
const DRAWS: usize = 2000;

/// Of fewer no two of them are the ends of a range in which the median is 95 times of a hundred.
const FEWEST: usize = 6;

/// [`Comparison::interval`], of what each round gave both and of the figure that is made of some rounds.
fn interval<T>(ours: &[T], peer: &[T], figure: impl Fn(&[&T]) -> f64) -> Option<[f64; 2]> {
    let rounds: Vec<(&T, &T)> = ours.iter().zip(peer).collect();
    if rounds.len() < FEWEST {
        return None;
    }
    // The same figures give the same interval.
    let mut rng = fastrand::Rng::with_seed(1);
    let mut ratio = || {
        let drawn = rounds.iter().filter_map(|_| rng.choice(&rounds).copied());
        let (ours, peer): (Vec<&T>, Vec<&T>) = drawn.unzip();
        figure(&ours) / figure(&peer)
    };
    let mut ratios: Vec<f64> = (0..DRAWS).map(|_| ratio()).collect();
    ratios.sort_by(f64::total_cmp);
    let at = |share: usize| {
        ratios
            .get(DRAWS * share / 1000)
            .copied()
            .unwrap_or_default()
    };
    Some([at(25), at(974)])
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

/// What 99 of a hundred are no larger than; 0 of none.
pub fn p99(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (sorted.len() * 99).div_ceil(100).saturating_sub(1);
    sorted.get(index).copied().unwrap_or_default()
}

/// The largest; 0 of none.
fn longest(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

/// The order in which people read metrics.
const METRICS: [&str; 14] = [
    "stall",
    "fsync-p99",
    "sync-p99",
    "sync-longest",
    "freeze-p99",
    "freeze-longest",
    "hold-p99",
    "hold-longest",
    "thaw-p99",
    "thaw-longest",
    "freeze",
    "thaw",
    "roundtrip",
    "cpu",
];

/// All values of one metric.
pub fn values(turns: &[Turn], load: &str, stack: Stack, metric: &str) -> Vec<f64> {
    turns
        .iter()
        .filter(|it| it.load == load && it.stack == stack)
        .filter_map(|it| it.sample.seconds.get(metric).copied())
        .collect()
}

/// How long one phase took each time.
pub fn lengths(turns: &[Turn], load: &str, stack: Stack, phase: &str) -> Vec<f64> {
    turns
        .iter()
        .filter(|it| it.load == load && it.stack == stack)
        .filter_map(|it| it.sample.phases.get(phase).copied())
        .collect()
}

/// What the writes of each turn took of one phase, or of all of it.
fn fsyncs(turns: &[Turn], load: &str, stack: Stack, phase: &str) -> Vec<Vec<f64>> {
    turns
        .iter()
        .filter(|it| it.load == load && it.stack == stack)
        .filter_map(|it| it.sample.fsyncs.get(phase).cloned())
        .collect()
}

/// Ours, the peer's, and the interval of their ratio.
type Figures = (f64, f64, Option<[f64; 2]>);

/// The figures of one row. What is of the writes in a phase is made of all rounds together, the longest of them is the
/// longest of all, else they are medians.
fn figures(turns: &[Turn], load: &str, metric: &str) -> Option<Figures> {
    fn of<T>(ours: &[T], peer: &[T], figure: impl Fn(&[&T]) -> f64) -> Option<Figures> {
        if ours.is_empty() || peer.is_empty() {
            return None;
        }
        let all = |values: &[T]| figure(&values.iter().collect::<Vec<_>>());
        Some((all(ours), all(peer), interval(ours, peer, &figure)))
    }
    match crate::phases::pooled(metric) {
        Some(phase) => of(
            &fsyncs(turns, load, Stack::Ours, phase),
            &fsyncs(turns, load, Stack::Peer, phase),
            |rounds| {
                p99(&rounds
                    .iter()
                    .copied()
                    .flatten()
                    .copied()
                    .collect::<Vec<_>>())
            },
        ),
        None => of(
            &values(turns, load, Stack::Ours, metric),
            &values(turns, load, Stack::Peer, metric),
            |rounds| {
                let rounds: Vec<f64> = rounds.iter().copied().copied().collect();
                match crate::phases::is_longest(metric) {
                    true => longest(&rounds),
                    false => median(&rounds),
                }
            },
        ),
    }
}

/// Medians of everything that was measured, loads in the order of their turns. `limits` are the least that
/// was possible in each round.
pub fn compare(turns: &[Turn], limits: &BTreeMap<&str, Vec<f64>>) -> Vec<Comparison> {
    let mut seen = BTreeSet::new();
    let loads = turns.iter().map(|it| it.load).filter(|it| seen.insert(*it));
    let mut rows = Vec::new();
    for load in loads {
        for metric in METRICS {
            let Some((ours, peer, interval)) = figures(turns, load, metric) else {
                continue;
            };
            // Only loads without a phase have turns of theirs.
            let guarded = values(turns, load, Stack::Guarded, metric);
            let is_stall = metric == "stall";
            let limit = limits.get(load).filter(|_| is_stall);
            let worst = |stack| longest(&values(turns, load, stack, metric));
            rows.push(Comparison {
                load,
                metric,
                ours,
                guarded: (!guarded.is_empty()).then(|| median(&guarded)),
                peer,
                ratio: ours / peer,
                interval,
                worst: is_stall.then(|| [Stack::Ours, Stack::Peer].map(worst)),
                limit_ratio: limit.map(|it| ours / median(it)),
            });
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn an_interval_is_as_wide_as_the_rounds_differ() {
        let peer = [2.0; 9];
        let middle = |rounds: &[&f64]| median(&rounds.iter().map(|it| **it).collect::<Vec<_>>());
        assert_eq!(interval(&[1.0; 9], &peer, middle), Some([0.5, 0.5]));
        assert_eq!(interval(&[1.0; 5], &peer, middle), None);
        let ours = [1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0];
        assert_eq!(interval(&ours, &peer, middle), Some([0.5, 1.5]));
    }

    #[test]
    fn the_longest_is_that_of_all_rounds_and_a_stall_says_its_worst() {
        let with = |round, stack, seconds: f64| Turn {
            sample: Sample {
                seconds: BTreeMap::from([("hold-longest", seconds), ("stall", seconds)]),
                ..Sample::default()
            },
            ..turn(round, stack, 0.0)
        };
        let rounds = [(1, 1.0, 2.0), (2, 9.0, 3.0), (3, 2.0, 7.0)];
        let turns: Vec<Turn> = rounds
            .into_iter()
            .flat_map(|(round, ours, peer)| {
                [
                    with(round, Stack::Ours, ours),
                    with(round, Stack::Peer, peer),
                ]
            })
            .collect();
        let rows = compare(&turns, &BTreeMap::new());
        let row = |metric| rows.iter().find(|it| it.metric == metric).expect("a row");
        let longest = row("hold-longest");
        assert_eq!(
            (longest.ours, longest.peer, longest.worst),
            (9.0, 7.0, None)
        );
        let stall = row("stall");
        assert_eq!((stall.ours, stall.peer), (2.0, 3.0));
        assert_eq!(stall.worst, Some([9.0, 7.0]));
    }

    #[test]
    fn the_99th_of_a_hundred() {
        let values = |to: u32| (1..=to).rev().map(f64::from).collect::<Vec<_>>();
        assert_eq!((p99(&values(100)), p99(&values(1000))), (99.0, 990.0));
        assert_eq!((p99(&[7.0, 3.0]), p99(&[])), (7.0, 0.0));
    }

    #[test]
    fn of_the_writes_in_a_phase_all_rounds_count_together() {
        let with = |round, stack, fsyncs: &[f64]| Turn {
            sample: Sample {
                fsyncs: BTreeMap::from([("hold", fsyncs.to_vec()), ("turn", fsyncs.to_vec())]),
                ..Sample::default()
            },
            ..turn(round, stack, 0.0)
        };
        // One of 101 writes took long: a round alone would say that it is the hundredth part.
        let quick = [1.0; 100];
        let turns = [
            with(1, Stack::Ours, &quick),
            with(1, Stack::Peer, &[2.0]),
            with(2, Stack::Ours, &[9.0]),
            with(2, Stack::Peer, &[4.0]),
        ];
        for metric in ["hold-p99", "fsync-p99"] {
            let (ours, peer, _) = figures(&turns, "some", metric).expect("both had turns");
            assert_eq!((ours, peer), (1.0, 4.0), "{metric}");
        }
        assert_eq!(figures(&turns, "some", "thaw-p99"), None);
    }

    #[test]
    fn what_is_measured_in_a_phase_is_compared() {
        for phase in crate::phases::ALL {
            assert!(METRICS.contains(&phase.p99), "{phase:?}");
            assert!(METRICS.contains(&phase.longest), "{phase:?}");
        }
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
            guarded: None,
            peer: 4.0,
            ratio: 0.5,
            interval: None,
            worst: Some([3.0, 6.0]),
            limit_ratio: Some(4.0),
        };
        let limits = BTreeMap::from([("some", vec![0.5])]);
        assert_eq!(compare(&turns, &limits), [expected]);
        // One side alone is no comparison.
        assert_eq!(compare(&turns[..1], &limits), []);
    }
}
