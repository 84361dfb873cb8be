// SPDX-License-Identifier: GPL-2.0-only

//! The matrix as a table in Markdown: a row for each fault and for stages in a row at which all went alike.
//! Knows nothing of what is in a cell.

use e2e::guest::Cell;

/// What stands where a stack has no such stage or fault; it breaks no row apart.
pub const NONE: &str = "-";

/// What stands where another stack does what the first one does.
const SAME: &str = "the same";

/// Each once, in the order in which they come.
fn once<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen: Vec<&str> = Vec::new();
    for text in texts {
        if !seen.contains(&text) {
            seen.push(text);
        }
    }
    seen
}

/// Stages in a row, and what was seen with each stack.
struct Row<'a> {
    first: &'a str,
    last: &'a str,
    seen: Vec<&'a str>,
}

impl<'a> Row<'a> {
    /// Takes a stage in, if all went as it did at those before.
    fn take(&mut self, stage: &'a str, seen: &[&'a str]) -> bool {
        let alike =
            |(mine, other): (&&str, &&str)| mine == other || [*mine, *other].contains(&NONE);
        // What ours did is never a guess.
        let first = self.seen.first() == seen.first();
        if !first || !self.seen.iter().zip(seen).all(alike) {
            return false;
        }
        self.last = stage;
        for (mine, other) in self.seen.iter_mut().zip(seen) {
            if *mine == NONE {
                *mine = other;
            }
        }
        true
    }
}

/// The table of those faults that were run with all of these stacks, or that the others do not have.
pub fn matrix(cells: &[&Cell], stacks: &[&str]) -> String {
    let stages = once(cells.iter().map(|it| it.stage.as_str()));
    let mut text = format!("| fault | at these stages | {} |\n", stacks.join(" | "));
    text.push_str(&format!("| --- | ---{} |\n", " | ---".repeat(stacks.len())));
    'faults: for fault in once(cells.iter().map(|it| it.fault.as_str())) {
        let mut rows: Vec<Row<'_>> = Vec::new();
        for stage in &stages {
            let here = |it: &&&Cell| it.fault == fault && it.stage == *stage;
            if !cells.iter().any(|it| here(&it)) {
                continue;
            }
            let seen = stacks.iter().map(|stack| {
                let mut here = cells.iter().filter(here);
                here.find(|it| it.stack == *stack)
                    .map(|it| it.seen.as_str())
            });
            let Some(seen) = seen.collect::<Option<Vec<&str>>>() else {
                continue 'faults;
            };
            let taken = rows.last_mut().is_some_and(|row| row.take(stage, &seen));
            if !taken {
                let (first, last) = (*stage, *stage);
                rows.push(Row { first, last, seen });
            }
        }
        for (number, row) in rows.iter().enumerate() {
            let name = if number == 0 { fault } else { "" };
            let at = match row.first == row.last {
                true => row.first.to_owned(),
                false => format!("{} ... {}", row.first, row.last),
            };
            let ours = row.seen.first().copied().unwrap_or(NONE);
            let mut others = row.seen.iter().skip(1).map(|it| match *it == ours {
                true if ours != NONE => SAME,
                _ => it,
            });
            let mut line = vec![name, &at, ours];
            line.extend(others.by_ref());
            text.push_str(&format!("| {} |\n", line.join(" | ")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(fault: &str, stage: &str, stack: &str, seen: &str) -> Cell {
        Cell {
            fault: fault.into(),
            stage: stage.into(),
            stack: stack.into(),
            seen: seen.into(),
            on_ms: None,
        }
    }

    #[test]
    fn neighbours_that_went_alike_are_one_row() {
        let cells = [
            cell("dead", "1", "ours", "a"),
            cell("dead", "2", "ours", "a"),
            cell("dead", "3", "ours", "a"),
            cell("dead", "4", "ours", "b"),
            // Of the peer nothing is known there.
            cell("late", "4", "ours", "b"),
            cell("dead", "1", "peer", "a"),
            cell("dead", "2", "peer", NONE),
            cell("dead", "3", "peer", "a"),
            cell("dead", "4", "peer", "c"),
        ];
        let cells: Vec<&Cell> = cells.iter().collect();
        let expected = "\
| fault | at these stages | ours | peer |
| --- | --- | --- | --- |
| dead | 1 ... 3 | a | the same |
|  | 4 | b | c |
";
        assert_eq!(matrix(&cells, &["ours", "peer"]), expected);
    }
}
