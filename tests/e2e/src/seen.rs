// SPDX-License-Identifier: GPL-2.0-only

//! What the runs have seen so far, of ours, of the peer, and on which kernel: a file of this repository, into
//! which each run is merged and from which the tables of tests/RESULTS.md are made. No run is of all cases; what it
//! was not of is kept as an earlier one saw it, with where that was: a line below each table counts them.

use crate::cases::Case;
use crate::origin::{self, Commit, Origin};
use crate::runner::Verdict;
use crate::table::NOT_RUN;
use anyhow::{Context, Result};
use e2e::guest::{Comparison, Kernel};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::Path;

/// By fault, stage and stack.
type Cells = BTreeMap<String, BTreeMap<String, BTreeMap<String, Cell>>>;

/// A cell of the matrix.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Cell {
    seen: String,
    /// The case that it is of. Not known of what was seen before this was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    case: Option<String>,
    #[serde(flatten)]
    origin: Origin,
}

/// All that was seen.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// By case.
    comparisons: BTreeMap<String, Rows>,
    cells: Cells,
    /// By what `KERNEL` calls it.
    #[serde(default)]
    kernels: BTreeMap<String, OnKernel>,
}

/// How the cases went on a kernel.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct OnKernel {
    kernel: Kernel,
    cases: BTreeMap<String, Went>,
}

/// How a case went when it was run last.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Went {
    passed: bool,
    /// Whether there was nothing to be seen on this kernel.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    skipped: bool,
    #[serde(flatten)]
    origin: Origin,
}

/// What a case has compared.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Rows {
    /// Whether it has failed since: then the rows are no longer true, and yet are to be missed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    failed: bool,
    /// Where it was run last.
    #[serde(flatten)]
    origin: Origin,
    rows: Vec<Comparison>,
}

/// What stands in the row of a case that has failed.
const FAILED: &str = "not known, the case failed";

/// How what stands in a cell ends when its case has failed.
const CASE_FAILED: &str = "; its case failed";

impl Rows {
    fn tree(&self) -> Result<Tree> {
        let empty = Rows {
            rows: Vec::new(),
            origin: self.origin.clone(),
            ..*self
        };
        // Its rows are the last that it has.
        let begin = serde_json::to_string(&empty)?;
        let begin = begin.strip_suffix("]}").context("no rows in its end")?;
        let rows: Result<Vec<_>> = self.rows.iter().map(Tree::line).collect();
        Ok(Tree::Parts(begin.to_owned(), rows?, "]}"))
    }
}

impl Cell {
    /// Its case has failed. Where nothing was seen there is nothing to doubt.
    fn fail(&mut self, origin: Origin) {
        self.origin = origin;
        if self.seen != NOT_RUN && !self.seen.ends_with(CASE_FAILED) {
            self.seen.push_str(CASE_FAILED);
        }
    }
}

impl OnKernel {
    /// The row of the kernel that goes by this name. A case that has not been run on it is of those that have
    /// not passed, unless it asks for a module that the kernel does not take.
    fn row(&self, name: &str, cases: &[Case]) -> String {
        let ours = self.kernel.takes_our_module;
        let cases: Vec<_> = cases
            .iter()
            .filter(|it| ours || !it.asks_our_module)
            .collect();
        let (mut sum, mut passed_of) = (0, Vec::new());
        let (mut failed, mut skipped) = (Vec::new(), Vec::new());
        for of_area in cases.chunk_by(|a, b| area(a) == area(b)) {
            let went = |it: &&Case| self.cases.get(it.name);
            let passed = |it: &&Case| went(it).is_some_and(|it| it.passed);
            let passed = of_area.iter().filter(|it| passed(it)).count();
            for it in of_area {
                match went(it) {
                    Some(it) if it.passed => {}
                    Some(went) if went.skipped => skipped.push(format!("`{}`", it.name)),
                    Some(_) => failed.push(format!("`{}`", it.name)),
                    None => {}
                }
            }
            sum += passed;
            let (area, all) = (area(of_area[0]), of_area.len());
            match passed {
                0 => {}
                _ if passed == all => passed_of.push(format!("all {all} of `{area}`")),
                _ => passed_of.push(format!("{passed} of {all} of `{area}`")),
            }
        }
        let module = match ours {
            true => "ours, and its own `hv_utils`",
            false => "its own `hv_utils`",
        };
        for list in [&mut failed, &mut skipped] {
            if list.is_empty() {
                list.push("none".into());
            }
        }
        format!(
            "| {} (`{name}`) | {module} | {sum}: {} | {} | {} |\n",
            self.kernel.release,
            passed_of.join(", "),
            failed.join(", "),
            skipped.join(", ")
        )
    }
}

/// What stands before the slash in its name.
fn area(case: &Case) -> &str {
    case.name.split('/').next().unwrap_or(case.name)
}

impl Seen {
    /// What the file has.
    pub fn read(path: &Path) -> Result<Seen> {
        let text = std::fs::read_to_string(path);
        let text = text.with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("cannot understand {}", path.display()))
    }

    /// Writes the file.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = self.text()?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// All of it in JSON, with a line for each row that a case has compared, each cell, and how each case went: so it
    /// is to be seen what a run has changed.
    fn text(&self) -> Result<String> {
        let on_kernel = |it: &OnKernel| {
            let parts = [
                ("kernel", Tree::line(&it.kernel)?),
                ("cases", Tree::named(&it.cases, Tree::line)?),
            ];
            Ok(Tree::of(parts))
        };
        let stages = |it: &BTreeMap<_, _>| Tree::named(it, |it| Tree::named(it, Tree::line));
        let all = Tree::of([
            ("comparisons", Tree::named(&self.comparisons, Rows::tree)?),
            ("cells", Tree::named(&self.cells, stages)?),
            ("kernels", Tree::named(&self.kernels, on_kernel)?),
        ]);
        let mut text = String::new();
        all.put(&mut text, 0);
        text.push('\n');
        Ok(text)
    }

    /// Takes in what a run has seen.
    pub fn merge(&mut self, verdicts: &[Verdict]) {
        for verdict in verdicts.iter().filter(|it| it.was_run()) {
            if verdict.was_skipped() {
                continue;
            }
            if !verdict.has_passed() {
                if let Some(rows) = self.comparisons.get_mut(&verdict.name) {
                    rows.failed = true;
                    rows.origin = verdict.origin();
                }
            } else if verdict.comparisons.is_empty() {
                self.comparisons.remove(&verdict.name);
            } else {
                let rows = Rows {
                    failed: false,
                    origin: verdict.origin(),
                    rows: verdict.comparisons.clone(),
                };
                self.comparisons.insert(verdict.name.clone(), rows);
            }
            for cell in &verdict.cells {
                let fault = self.cells.entry(cell.fault.clone()).or_default();
                let stage = fault.entry(cell.stage.clone()).or_default();
                let kept = Cell {
                    seen: cell.seen.clone(),
                    case: Some(verdict.name.clone()),
                    origin: verdict.origin(),
                };
                stage.insert(cell.stack.clone(), kept);
            }
            if !verdict.has_passed() {
                let is_of = |it: &&mut Cell| it.case.as_deref() == Some(&verdict.name);
                let stages = self.cells.values_mut().flat_map(BTreeMap::values_mut);
                let cells = stages.flat_map(BTreeMap::values_mut);
                cells.filter(is_of).for_each(|it| it.fail(verdict.origin()));
            }
        }
    }

    /// Takes in how the cases of a run went on the kernel that goes by this name. Of another release under the
    /// same name nothing is kept.
    pub fn merge_kernel(&mut self, name: &str, verdicts: &[Verdict]) {
        let Some(kernel) = verdicts.iter().find_map(|it| it.kernel.as_ref()) else {
            return;
        };
        let begin = || OnKernel {
            kernel: kernel.clone(),
            cases: BTreeMap::new(),
        };
        let on = self.kernels.entry(name.into()).or_insert_with(begin);
        if on.kernel != *kernel {
            *on = begin();
        }
        for verdict in verdicts.iter().filter(|it| it.was_run()) {
            let went = Went {
                passed: verdict.has_passed(),
                skipped: verdict.was_skipped(),
                origin: verdict.origin(),
            };
            on.cases.insert(verdict.name.clone(), went);
        }
    }

    /// How these cases went on each kernel as a table in Markdown, the newest kernel first.
    pub fn kernels(&self, cases: &[Case]) -> String {
        let mut text =
            String::from("| kernel | module | passed | failed | nothing to be seen |\n| --- | --- | --- | --- | --- |\n");
        let mut all: Vec<_> = self.kernels.iter().collect();
        all.sort_by_key(|(name, on)| (Reverse(numbers(&on.kernel.release)), *name));
        for (name, on) in all {
            text.push_str(&on.row(name, cases));
        }
        text
    }

    /// What was seen of a fault at a stage with a stack.
    pub fn cell(&self, fault: &str, stage: &str, stack: &str) -> Option<&str> {
        let cell = self.cells.get(fault)?.get(stage)?.get(stack)?;
        Some(&cell.seen)
    }

    /// The last commit that anything was seen at.
    fn newest(&self) -> Option<&Commit> {
        let rows = self.comparisons.values().map(|it| &it.origin);
        let cells = self.all_cells().map(|it| &it.origin);
        let went = self.kernels.values().flat_map(|it| it.cases.values());
        let all = rows.chain(cells).chain(went.map(|it| &it.origin));
        all.filter_map(|it| it.commit.as_ref()).max()
    }

    fn all_cells(&self) -> impl Iterator<Item = &Cell> {
        let stages = self.cells.values().flat_map(BTreeMap::values);
        stages.flat_map(BTreeMap::values)
    }

    /// Where what the comparison of these cases says was seen, in one line.
    pub fn origin_of_comparison(&self, cases: &[Case]) -> String {
        let kept = cases.iter().filter_map(|it| self.comparisons.get(it.name));
        let each: Vec<&Origin> = kept
            .flat_map(|it| it.rows.iter().map(|_| &it.origin))
            .collect();
        origin::line("rows", &each, self.newest())
    }

    /// The same of the matrix, of which these are what it shows.
    pub fn origin_of_cells<'a>(
        &self,
        shown: impl Iterator<Item = (&'a str, &'a str, &'a str)>,
    ) -> String {
        let each: Vec<&Origin> = shown
            .filter_map(|(fault, stage, stack)| {
                let cell = self.cells.get(fault)?.get(stage)?.get(stack)?;
                Some(&cell.origin)
            })
            .collect();
        origin::line("cells", &each, self.newest())
    }

    /// The same of how these cases went on each kernel.
    pub fn origin_of_kernels(&self, cases: &[Case]) -> String {
        let mut each: Vec<&Origin> = Vec::new();
        for on in self.kernels.values() {
            let went = cases.iter().filter_map(|it| on.cases.get(it.name));
            each.extend(went.map(|it| &it.origin));
        }
        origin::line("results", &each, self.newest())
    }

    /// What ours and the peer did as a table in Markdown, in the order of these cases. One that compares and was
    /// not run has a row that says so. Of cases that there are no longer it has nothing.
    pub fn comparison(&self, cases: &[Case]) -> String {
        let mut text = String::from(
            "| situation | ours | stock hv_utils, Debian's daemon |\n| --- | --- | --- |\n",
        );
        for case in cases {
            let Some(rows) = self.comparisons.get(case.name) else {
                if case.compares {
                    text.push_str(&format!("| `{}` | {NOT_RUN} | {NOT_RUN} |\n", case.name));
                }
                continue;
            };
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

/// A value of JSON by the lines that it takes.
enum Tree {
    /// One.
    Line(String),
    /// How it begins, each of its parts on lines of its own, and how it ends.
    Parts(String, Vec<Tree>, &'static str),
    /// What stands behind a name.
    Named(String, Box<Tree>),
}

impl Tree {
    fn line(value: &impl Serialize) -> Result<Tree> {
        Ok(Tree::Line(serde_json::to_string(value)?))
    }

    fn named<T>(of: &BTreeMap<String, T>, each: impl Fn(&T) -> Result<Tree>) -> Result<Tree> {
        let mut parts = Vec::new();
        for (name, value) in of {
            parts.push((name.as_str(), each(value)?));
        }
        Ok(Tree::of(parts))
    }

    fn of<'a>(parts: impl IntoIterator<Item = (&'a str, Tree)>) -> Tree {
        let named =
            |(name, tree): (&str, _)| Tree::Named(Value::from(name).to_string(), Box::new(tree));
        Tree::Parts("{".into(), parts.into_iter().map(named).collect(), "}")
    }

    /// Adds it to a line that is indented by so much.
    fn put(&self, text: &mut String, indent: usize) {
        match self {
            Tree::Line(line) => text.push_str(line),
            Tree::Named(name, tree) => {
                text.push_str(&format!("{name}: "));
                tree.put(text, indent);
            }
            Tree::Parts(begin, parts, end) => {
                text.push_str(begin);
                for (number, part) in parts.iter().enumerate() {
                    let comma = if number == 0 { "" } else { "," };
                    text.push_str(&format!("{comma}\n{:1$}", "", indent + 1));
                    part.put(text, indent + 1);
                }
                text.push_str(&format!("\n{:indent$}{end}", ""));
            }
        }
    }
}

/// The numbers at the start of a release, the first of which counts most.
fn numbers(release: &str) -> Vec<u32> {
    let version = release.split(['-', '+']).next().unwrap_or_default();
    version.split('.').map_while(|it| it.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;
    use e2e::guest;

    fn on(release: &str, takes_our_module: bool, mut verdict: Verdict) -> Verdict {
        verdict.kernel = Some(Kernel {
            release: release.into(),
            takes_our_module,
        });
        verdict
    }

    #[test]
    fn a_kernel_has_the_cases_that_were_run_on_it() {
        let all = cases::all();
        let all: Vec<_> = all
            .into_iter()
            .filter(|it| it.name.starts_with("order/") && !it.asks_our_module)
            .collect();
        let mut seen = Seen::default();
        // Its guest did not come up, and the run is of a known kernel all the same.
        let lost = Verdict::failed("order/nbd");
        seen.merge_kernel(
            "6.1",
            &[
                on("6.1.0-50", false, Verdict::passed("order/parallel")),
                lost,
            ],
        );
        seen.merge_kernel(
            "6.12",
            &[on(
                "6.12.117+deb13",
                false,
                Verdict::failed("order/parallel"),
            )],
        );
        seen.merge_kernel(
            "6.12",
            &[
                on("6.12.117+deb13", false, Verdict::passed("order/parallel")),
                Verdict::missing("order/nbd"),
            ],
        );
        let text = seen.kernels(&all);
        let of = all.len();
        let expected = format!(
            "\
| kernel | module | passed | failed | nothing to be seen |
| --- | --- | --- | --- | --- |
| 6.12.117+deb13 (`6.12`) | its own `hv_utils` | 1: 1 of {of} of `order` | none | none |
| 6.1.0-50 (`6.1`) | its own `hv_utils` | 1: 1 of {of} of `order` | `order/nbd` | none |
"
        );
        assert_eq!(text, expected);
        // A newer one by the same name begins with nothing.
        let newer = |it: &Case| on("6.12.120+deb13", false, Verdict::passed(it.name));
        seen.merge_kernel("6.12", &[newer(&all[0])]);
        assert!(seen
            .kernels(&all)
            .contains("| 6.12.120+deb13 (`6.12`) | its own `hv_utils` | 1: "));
        let rest: Vec<_> = all.iter().map(newer).collect();
        seen.merge_kernel("6.12", &rest);
        assert!(seen
            .kernels(&all)
            .contains(&format!("| {of}: all {of} of `order` | none |")));
    }

    #[test]
    fn a_case_for_our_module_counts_only_where_it_can_be_loaded() {
        let all: Vec<_> = cases::all()
            .into_iter()
            .filter(|it| it.name.starts_with("deadman/"))
            .collect();
        let asking = all.iter().filter(|it| it.asks_our_module).count();
        assert!(asking > 0);
        for (takes_it, of) in [(true, all.len()), (false, all.len() - asking)] {
            let mut seen = Seen::default();
            let verdict = Verdict::passed("deadman/host-never-thaws");
            seen.merge_kernel("a", &[on("7.3.4", takes_it, verdict)]);
            assert!(seen
                .kernels(&all)
                .contains(&format!("1: 1 of {of} of `deadman`")));
        }
    }

    /// One that compares.
    fn case(name: &'static str) -> Case {
        let some = cases::all().swap_remove(0);
        Case {
            name,
            compares: true,
            ..some
        }
    }

    fn row(what: &str, ours: &str) -> Comparison {
        Comparison {
            what: what.into(),
            ours: ours.into(),
            peer: "hangs".into(),
        }
    }

    fn verdict(name: &str, ours: &str, cells: &[[&str; 4]]) -> Verdict {
        let cell = |[fault, stage, stack, seen]: &[&str; 4]| guest::Cell {
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
        let order = ["b/short", "a/long", "c/never"].map(case);
        let expected = "\
| situation | ours | stock hv_utils, Debian's daemon |
| --- | --- | --- |
| b/short | better | hangs |
| a/long | good | hangs |
| `c/never` | not run | not run |
";
        assert_eq!(seen.comparison(&order), expected);
        assert_eq!(seen.cell("dead", "1", "ours"), Some("F ok"));
        assert_eq!(seen.cell("dead", "1", "peer"), Some("frozen"));
        assert_eq!(seen.cell("dead", "2", "ours"), Some("F ok"));
        assert_eq!(seen.cell("dead", "2", "peer"), None);
    }

    #[test]
    fn each_row_cell_and_result_has_a_line() {
        let cells = [
            ["dead", "1", "ours", "F ok"],
            ["dead", "1", "peer", "hangs"],
        ];
        let verdicts = [on("7.3.4", true, verdict("a/b", "good \"so\"", &cells))];
        let mut seen = Seen::default();
        seen.merge(&verdicts);
        seen.merge_kernel("default", &verdicts);
        let text = seen.text().unwrap();
        assert_eq!(serde_json::from_str::<Seen>(&text).unwrap(), seen);
        let with = |word: &str| text.lines().filter(|it| it.contains(word)).count();
        assert_eq!(
            ["\"a/b\": {", "good", "F ok", "hangs"].map(with),
            [2, 1, 1, 2]
        );
        // One for the row, two for the cells, one for the result; the others begin, end, or are the kernel's.
        assert_eq!(text.lines().count(), 23, "{text}");
    }

    #[test]
    fn a_case_that_ends_early_leaves_no_cell_of_an_earlier_run() {
        let cell = |stage, seen| ["dead", stage, "ours", seen];
        let row = |cells: &[[&str; 4]]| verdict("a/b", "", cells);
        let begun = [cell("1", NOT_RUN), cell("2", NOT_RUN), cell("3", NOT_RUN)];
        let whole = [cell("1", "F ok"), cell("2", "F ok"), cell("3", "F ok")];
        let mut seen = Seen::default();
        seen.merge(&[row(&[begun, whole].concat())]);
        let cells = |seen: &Seen| {
            ["1", "2", "3"].map(|it| seen.cell("dead", it, "ours").map(str::to_owned))
        };
        assert_eq!(cells(&seen), ["F ok"; 3].map(|it| Some(it.to_owned())));
        // It noted all of them when it began, and has come as far as the first.
        let mut early = Verdict::failed("a/b");
        early.cells = row(&[&begun[..], &[cell("1", "frozen")]].concat()).cells;
        seen.merge(&[early]);
        let left = ["frozen; its case failed", NOT_RUN, NOT_RUN].map(|it| Some(it.to_owned()));
        assert_eq!(cells(&seen), left);
    }

    #[test]
    fn what_an_earlier_tree_has_left_is_told_from_what_the_last_one_has() {
        let (old, new) = ("2026-01-02T03:04:05Z abc", "2026-11-29T18:15:14Z def");
        let cells = [["dead", "1", "ours", "F ok"], ["dead", "2", "ours", "F ok"]];
        let at = |commit: &str, name, cells: &[[&str; 4]]| {
            let mut verdict = on("7.3.4", true, verdict(name, "good", cells));
            verdict.commit = Some(Commit::of(commit));
            verdict
        };
        let mut seen = Seen::default();
        let mut merge = |verdict| {
            let verdicts = [verdict];
            seen.merge(&verdicts);
            seen.merge_kernel("default", &verdicts);
        };
        merge(verdict("a/unknown", "good", &[]));
        merge(at(old, "a/old", &cells));
        merge(at(old, "a/new", &[]));
        merge(at(new, "a/new", &cells[1..]));
        let order = ["a/unknown", "a/old", "a/new", "a/never"].map(case);
        let newest = "1 were seen at commit `def` (2026-11-29), the last one that was run, \
                      1 at earlier ones, the oldest of which is `abc` (2026-01-02)";
        let unknown = ", and of 1 it is not known";
        let expected = format!("Of these 3 rows {newest}{unknown}; on 7.3.4.\n");
        assert_eq!(seen.origin_of_comparison(&order), expected);
        let shown = [
            ("dead", "1", "ours"),
            ("dead", "2", "ours"),
            ("dead", "3", "ours"),
        ];
        let expected = format!("Of these 2 cells {newest}; on 7.3.4.\n");
        assert_eq!(seen.origin_of_cells(shown.into_iter()), expected);
        let expected = format!("Of these 2 results {newest}; on 7.3.4.\n");
        assert_eq!(seen.origin_of_kernels(&order), expected);
        // One that fails is of the tree that it has failed on.
        let mut failed = Verdict::failed("a/old");
        failed.commit = Some(Commit::of(new));
        seen.merge(&[failed]);
        assert!(seen
            .origin_of_comparison(&order)
            .contains(" 2 were seen at commit `def`"));
        let text = serde_json::to_string(&seen).unwrap();
        assert_eq!(serde_json::from_str::<Seen>(&text).unwrap(), seen);
    }

    #[test]
    fn a_case_that_fails_keeps_its_row_and_says_so() {
        let mut seen = Seen::default();
        seen.merge(&[verdict("a/b", "good", &[])]);
        seen.merge(&[Verdict::failed("a/b")]);
        let text = seen.comparison(&[case("a/b")]);
        assert!(
            text.ends_with(&format!("| a/b | {FAILED} | {FAILED} |\n")),
            "{text}"
        );
        seen.merge(&[verdict("a/b", "good", &[])]);
        assert!(seen.comparison(&[case("a/b")]).contains("| good |"));
        let text = serde_json::to_string(&seen).unwrap();
        assert_eq!(serde_json::from_str::<Seen>(&text).unwrap(), seen);
    }

    #[test]
    fn a_case_that_fails_keeps_its_cells_and_they_say_so() {
        let cells = |seen: &Seen| {
            ["1", "2"].map(|it| seen.cell("dead", it, "ours").unwrap_or_default().to_owned())
        };
        let whole = [["dead", "1", "ours", "F ok"], ["dead", "2", "ours", "F ok"]];
        let other = [["late", "1", "ours", "F ok"]];
        let mut seen = Seen::default();
        seen.merge(&[verdict("a/b", "", &whole), verdict("c/d", "", &other)]);
        // Its guest did not come up, and twice so: it has no cells to say it with.
        for _ in 0..2 {
            seen.merge(&[Verdict::failed("a/b")]);
            assert_eq!(cells(&seen), ["F ok; its case failed"; 2]);
        }
        // One stage of it was wrong: of the others it is not known how much that says.
        let mut wrong = Verdict::failed("a/b");
        wrong.cells = verdict("a/b", "", &whole).cells;
        wrong.cells[0].seen = "F ok; wrong: written".into();
        seen.merge(&[wrong]);
        let said = [
            "F ok; wrong: written; its case failed",
            "F ok; its case failed",
        ];
        assert_eq!(cells(&seen), said);
        assert_eq!(seen.cell("late", "1", "ours"), Some("F ok"));
        let text = serde_json::to_string(&seen).unwrap();
        assert_eq!(serde_json::from_str::<Seen>(&text).unwrap(), seen);
        seen.merge(&[verdict("a/b", "", &whole)]);
        assert_eq!(cells(&seen), ["F ok"; 2]);
    }
}
