// SPDX-License-Identifier: GPL-2.0-only

//! What is left for people and programs: a table, a plot, and the figures as JSON.

use crate::load::LOADS;
use crate::measure::Idle;
use crate::phases::WHOLE;
use crate::stack::Stack;
use crate::stats::{compare, lengths, median, values, Comparison, Turn};
use anyhow::{Context, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

/// What the words in the table mean.
pub const WORDS: &str = "\
stall: the longest write of a small writer, on the file system where it was longest; worst:
that of all rounds, ours / peer.
guarded: our daemon on the stock hv_utils. ratio: ours / peer, and the range of 95 % of it
(paired bootstrap; none of fewer than 6 rounds). limit: our stall / the longest freeze and thaw of any of these file
systems when it is clean and alone. fsync-p99: of a hundred writes with their fsync 99 took
no longer, from before FREEZE until all went on, of all file systems and rounds together.
sync-, freeze-, hold- and thaw-: what the writes took of that phase, -p99 of all rounds
together, -longest of the longest of all. sync: from FREEZE to the first freeze; freeze: until
the last one has ended; hold: until the first thaw begins; thaw: until the last one has ended.";

/// All that was measured so far.
#[derive(Debug, Default)]
pub struct Results {
    /// The turns, in the order in which they were taken.
    pub turns: Vec<Turn>,
    /// For each load and round the least that any stack could do, in seconds.
    pub limits: BTreeMap<&'static str, Vec<f64>>,
    /// What the daemons cost while they wait.
    pub idle: BTreeMap<Stack, Idle>,
    /// What the daemons wrote; ours says how long each step took.
    pub logs: String,
}

impl Results {
    /// Writes `summary.json`, `rounds.json`, `limits.json`, `idle.json`, `table.txt`, `bench.svg` and `daemons.log`.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let rows = compare(&self.turns, &self.limits);
        if !rows.is_empty() {
            write_json(folder, "summary.json", &rows)?;
            write_json(folder, "rounds.json", &self.turns)?;
            write_json(folder, "limits.json", &self.limits)?;
            let path = folder.join("bench.svg");
            crate::plot::draw(&path, &self.turns, &rows)
                .with_context(|| format!("cannot draw {}", path.display()))?;
        }
        if !self.idle.is_empty() {
            write_json(folder, "idle.json", &self.idle)?;
        }
        write_text(folder, "daemons.log", &self.logs)?;
        write_text(folder, "table.txt", &self.table())
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let rows = compare(&self.turns, &self.limits);
        let mut text = String::new();
        if !rows.is_empty() {
            let _ = writeln!(text, "Medians. {WORDS}\n");
            let _ = writeln!(
                text,
                "{:12} {:14} {:>10} {:>10} {:>10} {:>6}   {:13} {:>6} {:>6}   worst",
                "load", "metric", "ours", "guarded", "peer", "ratio", "95 %", "limit", "rounds"
            );
            for row in &rows {
                self.line(&mut text, row);
            }
            text.push('\n');
            for load in LOADS {
                for &stack in load.stacks {
                    self.phases(&mut text, load.name, stack);
                }
            }
            for load in LOADS {
                if rows.iter().any(|row| row.load == load.name) {
                    let _ = writeln!(text, "{:12} {}", load.name, load.about);
                }
            }
        }
        for (stack, idle) in &self.idle {
            let _ = writeln!(
                text,
                "idle {stack}: {} processes, {:.1} MiB resident together ({:.1} MiB with shared \
                 pages counted once), {} wake-ups in 60 s",
                idle.processes,
                idle.resident_kib as f64 / 1024.0,
                idle.proportional_kib as f64 / 1024.0,
                idle.wake_ups
            );
        }
        text
    }

    /// How long the phases and the whole took, where writes are told apart by them.
    fn phases(&self, text: &mut String, load: &str, stack: Stack) {
        let names = crate::phases::ALL.map(|it| it.name).into_iter();
        let phases = names.chain([WHOLE.0]).filter_map(|name| {
            let lengths = lengths(&self.turns, load, stack, name);
            let median = ms(median(&lengths));
            (!lengths.is_empty()).then(|| format!("{name} {median}"))
        });
        let phases: Vec<String> = phases.collect();
        if !phases.is_empty() {
            let _ = writeln!(text, "phases of {load}, {stack}: {}", phases.join(", "));
        }
    }

    fn line(&self, text: &mut String, row: &Comparison) {
        let of = |stack| values(&self.turns, row.load, stack, row.metric).len();
        let interval = row
            .interval
            .map(|[low, high]| format!("{low:.3}-{high:.3}"));
        let worst = row
            .worst
            .map(|[ours, peer]| format!("{} / {}", ms(ours), ms(peer)));
        let _ = writeln!(
            text,
            "{:12} {:14} {:>10} {:>10} {:>10} {:>6.3}   {:13} {:>6} {:>6}   {}",
            row.load,
            row.metric,
            ms(row.ours),
            row.guarded.map_or_else(String::new, ms),
            ms(row.peer),
            row.ratio,
            interval.unwrap_or_default(),
            row.limit_ratio
                .map_or_else(String::new, |it| format!("{it:.2}")),
            of(Stack::Ours).min(of(Stack::Peer)),
            worst.unwrap_or_default()
        );
    }
}

/// Seconds as people read them here.
pub fn ms(seconds: f64) -> String {
    format!("{:.1} ms", seconds * 1000.0)
}

fn write_json(folder: &Path, name: &str, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    write_text(folder, name, &text)
}

fn write_text(folder: &Path, name: &str, text: &str) -> Result<()> {
    let path = folder.join(name);
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}
