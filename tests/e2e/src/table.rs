// SPDX-License-Identifier: GPL-2.0-only

//! The matrix as a table in Markdown: a row for each fault and for stages in a row at which all went alike.
//! Knows nothing of what is in a cell.

/// What stands where a stack has no such stage or fault; it breaks no row apart.
pub const NONE: &str = "-";

/// What stands where nobody knows.
pub const NOT_RUN: &str = "not run";

/// A fault at a stage.
pub struct Place<'a> {
    /// The fault, in words.
    pub fault: &'a str,
    /// The stage, likewise.
    pub stage: &'a str,
    /// What was seen there, of each stack: [`NONE`] or [`NOT_RUN`] where nothing was.
    pub seen: Vec<&'a str>,
}

/// What stands where another stack does what the first one does.
const SAME: &str = "the same";

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

/// The table of these, which stand in the order of the faults and of the stages of each.
pub fn matrix(places: &[Place<'_>], stacks: &[&str]) -> String {
    let mut text = format!("| fault | at these stages | {} |\n", stacks.join(" | "));
    text.push_str(&format!("| --- | ---{} |\n", " | ---".repeat(stacks.len())));
    for of_fault in places.chunk_by(|a, b| a.fault == b.fault) {
        let mut rows: Vec<Row<'_>> = Vec::new();
        let mut fault = "";
        for place in of_fault {
            fault = place.fault;
            let taken = rows
                .last_mut()
                .is_some_and(|row| row.take(place.stage, &place.seen));
            if !taken {
                rows.push(Row {
                    first: place.stage,
                    last: place.stage,
                    seen: place.seen.clone(),
                });
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
                true if ![NONE, NOT_RUN].contains(&ours) => SAME,
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

    #[test]
    fn neighbours_that_went_alike_are_one_row_and_what_is_not_known_is_said() {
        let place = |fault, stage, ours, peer| Place {
            fault,
            stage,
            seen: vec![ours, peer],
        };
        let places = [
            place("dead", "1", "a", "a"),
            place("dead", "2", "a", NONE),
            place("dead", "3", "a", "a"),
            place("dead", "4", "b", "c"),
            place("late", "3", NOT_RUN, NOT_RUN),
            place("late", "4", "b", NOT_RUN),
        ];
        let expected = "\
| fault | at these stages | ours | peer |
| --- | --- | --- | --- |
| dead | 1 ... 3 | a | the same |
|  | 4 | b | c |
| late | 3 | not run | not run |
|  | 4 | b | not run |
";
        assert_eq!(matrix(&places, &["ours", "peer"]), expected);
    }
}
