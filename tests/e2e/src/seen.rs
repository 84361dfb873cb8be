// SPDX-License-Identifier: GPL-2.0-only

//! What the runs have seen of ours and of the peer so far: a file of this repository, into which each run is
//! merged and from which both tables of the README are made. No run is of all cases; what it was not of is
//! kept as an earlier one saw it.

use crate::runner::Verdict;
use anyhow::{Context, Result};
use e2e::guest::Comparison;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// By fault, stage and stack.
type Cells = BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>>;

/// All that was seen.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// By case.
    comparisons: BTreeMap<String, Rows>,
    cells: Cells,
}

/// What a case has compared.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Rows {
    /// Whether it has failed since: then the rows are no longer true, and yet are to be missed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    failed: bool,
    rows: Vec<Comparison>,
}

/// What stands in the row of a case that has failed.
const FAILED: &str = "not known, the case failed";

impl Seen {
    /// What the file has.
    pub fn read(path: &Path) -> Result<Seen> {
        let text = std::fs::read_to_string(path);
        let text = text.with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("cannot understand {}", path.display()))
    }

    /// Writes the file.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Takes in what a run has seen.
    pub fn merge(&mut self, verdicts: &[Verdict]) {
        for verdict in verdicts.iter().filter(|it| it.was_run()) {
            if !verdict.has_passed() {
                if let Some(rows) = self.comparisons.get_mut(&verdict.name) {
                    rows.failed = true;
                }
            } else if verdict.comparisons.is_empty() {
                self.comparisons.remove(&verdict.name);
            } else {
                let rows = Rows {
                    failed: false,
                    rows: verdict.comparisons.clone(),
                };
                self.comparisons.insert(verdict.name.clone(), rows);
            }
            for cell in &verdict.cells {
                let fault = self.cells.entry(cell.fault.clone()).or_default();
                let stage = fault.entry(cell.stage.clone()).or_default();
                stage.insert(cell.stack.clone(), cell.seen.clone());
            }
        }
    }

    /// What was seen of a fault at a stage with a stack.
    pub fn cell(&self, fault: &str, stage: &str, stack: &str) -> Option<&str> {
        let seen = self.cells.get(fault)?.get(stage)?.get(stack)?;
        Some(seen)
    }

    /// What ours and the peer did as a table in Markdown, in the order of these cases. Of cases that there
    /// are no longer it has nothing.
    pub fn comparison<'a>(&self, cases: impl Iterator<Item = &'a str>) -> String {
        let mut text = String::from(
            "| situation | ours | stock hv_utils, Debian's daemon |\n| --- | --- | --- |\n",
        );
        for rows in cases.filter_map(|name| self.comparisons.get(name)) {
            for row in &rows.rows {
                let (ours, peer) = match rows.failed {
                    true => (FAILED, FAILED),
                    false => (row.ours.as_str(), row.peer.as_str()),
                };
                text.push_str(&format!("| {} | {ours} | {peer} |\n", row.what));
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use e2e::guest::Cell;

    fn row(what: &str, ours: &str) -> Comparison {
        Comparison {
            what: what.into(),
            ours: ours.into(),
            peer: "hangs".into(),
        }
    }

    fn verdict(name: &str, ours: &str, cells: &[[&str; 4]]) -> Verdict {
        let cell = |[fault, stage, stack, seen]: &[&str; 4]| Cell {
            fault: fault.to_string(),
            stage: stage.to_string(),
            stack: stack.to_string(),
            seen: seen.to_string(),
            on_ms: Some(1),
        };
        let mut verdict = Verdict::passed(name);
        verdict.comparisons = vec![row(name, ours)];
        verdict.cells = cells.iter().map(cell).collect();
        verdict
    }

    #[test]
    fn a_run_replaces_what_it_was_of_and_nothing_else() {
        let mut seen = Seen::default();
        let cells = [
            ["dead", "1", "ours", "F ok"],
            ["dead", "1", "peer", "F ok"],
            ["dead", "2", "ours", "F ok"],
        ];
        seen.merge(&[
            verdict("a/long", "good", &[]),
            verdict("b/short", "good", &cells),
        ]);
        let short = verdict("b/short", "better", &[["dead", "1", "peer", "frozen"]]);
        seen.merge(&[short, Verdict::missing("a/long")]);
        let order = ["b/short", "a/long", "c/never"];
        let expected = "\
| situation | ours | stock hv_utils, Debian's daemon |
| --- | --- | --- |
| b/short | better | hangs |
| a/long | good | hangs |
";
        assert_eq!(seen.comparison(order.into_iter()), expected);
        assert_eq!(seen.cell("dead", "1", "ours"), Some("F ok"));
        assert_eq!(seen.cell("dead", "1", "peer"), Some("frozen"));
        assert_eq!(seen.cell("dead", "2", "ours"), Some("F ok"));
        assert_eq!(seen.cell("dead", "2", "peer"), None);
    }

    #[test]
    fn a_case_that_fails_keeps_its_row_and_says_so() {
        let mut seen = Seen::default();
        seen.merge(&[verdict("a/b", "good", &[])]);
        seen.merge(&[Verdict::failed("a/b")]);
        let text = seen.comparison(["a/b"].into_iter());
        assert!(
            text.ends_with(&format!("| a/b | {FAILED} | {FAILED} |\n")),
            "{text}"
        );
        seen.merge(&[verdict("a/b", "good", &[])]);
        assert!(seen.comparison(["a/b"].into_iter()).contains("| good |"));
        let text = serde_json::to_string(&seen).unwrap();
        assert_eq!(serde_json::from_str::<Seen>(&text).unwrap(), seen);
    }
}
