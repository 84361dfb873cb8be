// SPDX-License-Identifier: GPL-2.0-only

//! What `status`, `history` and `check` print: tables for people, and the exit status that goes with each
//! outcome. It looks at nothing by itself.

use serde::{Deserialize as _, Serialize};
use serde_json::Value;

use crate::backup::{name_of_type, Verdict};
use crate::check::{Finding, Grade};
use crate::freeze::How;
use crate::history::Entry;

/// With which status a program ends that was asked something. They are in hv_vss_daemon(8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// All is well.
    Well = 0,
    /// No daemon serves: there is none, it waits for the device, or it refuses each FREEZE.
    NoDaemon = 3,
    /// The last backup was not good, or the rehearsal that was asked for.
    NotGood = 4,
    /// A backup is under way, or a rehearsal.
    UnderWay = 5,
    /// No backup can be taken, or it would fail.
    Problem = 6,
    /// A backup can be taken; there are warnings.
    Warning = 7,
}

/// What `status` tells.
#[derive(Debug, Serialize)]
pub struct Status<'a> {
    /// What the daemon replies; `None` when there is none.
    pub daemon: Option<&'a Value>,
    /// The last backup.
    pub last: Option<&'a Entry>,
    /// Whether the history has that one.
    pub is_remembered: bool,
}

/// The last backup as the daemon tells of it, if it has seen one.
pub fn last_of(daemon: &Value) -> Option<Entry> {
    Entry::deserialize(daemon.get("last_backup")?).ok()
}

impl<'a> Status<'a> {
    /// By what the daemon replies, the history, and the last backup of which the daemon tells: the history
    /// has more of that, but does not have it when it could not be written.
    pub fn new(daemon: Option<&'a Value>, history: &'a [Entry], told: Option<&'a Entry>) -> Self {
        let has = |told: &&Entry| history.iter().any(|it| it.is_of_the_same(told));
        let newer = told.filter(|it| !has(it));
        Status {
            daemon,
            last: newer.or(history.last()),
            is_remembered: newer.is_none(),
        }
    }

    /// The exit status.
    pub fn outcome(&self) -> Outcome {
        let last_is_good = self.last.is_none_or(|it| it.result == Verdict::Good);
        match self.daemon.map(|it| &it["phase"]) {
            None => Outcome::NoDaemon,
            // Also behind a freeze that was called off and has not ended, which may be never.
            Some(_) if self.refuses().is_some() => Outcome::NoDaemon,
            Some(phase) if phase != "idle" => Outcome::UnderWay,
            Some(_) if self.waits() => Outcome::NoDaemon,
            Some(_) if !last_is_good => Outcome::NotGood,
            Some(_) => Outcome::Well,
        }
    }

    /// Whether the daemon has no device.
    fn waits(&self) -> bool {
        self.daemon.is_some_and(|it| it["door"].is_null())
    }

    /// Why a FREEZE would be refused, if it would.
    fn refuses(&self) -> Option<&str> {
        self.daemon?["refuses"].as_str()
    }

    /// For people.
    pub fn table(&self) -> String {
        let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
        let mut rows = Vec::new();
        match self.daemon {
            None => rows.push(["daemon".into(), "none serves".into()]),
            Some(daemon) => {
                let freezes = match daemon["door"].as_str() {
                    Some("held") => "serves; the module holds what is frozen",
                    Some(_) => "serves; freezes through FIFREEZE, with a guard",
                    None => "runs and waits for the device",
                };
                rows.push(["daemon".into(), freezes.into()]);
                rows.push(["phase".into(), text(&daemon["phase"])]);
                if daemon["doing"].is_string() {
                    rows.push(["doing".into(), text(&daemon["doing"])]);
                }
                if let Some(why) = self.refuses() {
                    rows.push(["refuses".into(), format!("each FREEZE: {why}")]);
                }
                for (field, what) in [
                    ("frozen", "frozen"),
                    ("given_up", "given up"),
                    ("owed", "owed"),
                ] {
                    let all = daemon[field].as_array().into_iter().flatten();
                    rows.extend(all.map(|it| [what.into(), text(it)]));
                }
            }
        }
        let last = self.last.map(|it| {
            let why = it.why.as_ref().map(|it| format!(": {it}"));
            let result = word_for(it.result);
            format!("{}, {result}{}", it.at, why.unwrap_or_default())
        });
        let last = last.unwrap_or_else(|| "none is remembered".into());
        rows.push(["last backup".into(), last]);
        if !self.is_remembered {
            let text = "does not have this backup, or not yet: see the log";
            rows.push(["history".into(), text.into()]);
        }
        let disks = self.last.into_iter().flat_map(|it| &it.listed);
        rows.extend(disks.map(|it| ["of the disk".into(), it.clone()]));
        let left_out = self.last.into_iter().flat_map(Entry::left_out);
        rows.extend(left_out.map(|it| {
            let reason = it.reason.as_ref().map(|it| format!(": {it}"));
            let text = format!("{}{}", it.name, reason.unwrap_or_default());
            ["left out".into(), text]
        }));
        let warnings = self.last.into_iter().flat_map(|it| &it.warnings);
        rows.extend(warnings.map(|it| ["warning".into(), it.clone()]));
        align(&rows)
    }
}

/// The exit status of `history`.
pub fn outcome_of(history: &[Entry]) -> Outcome {
    match history.last().map(|it| it.result) {
        None | Some(Verdict::Good) => Outcome::Well,
        Some(Verdict::Broken | Verdict::Failed) => Outcome::NotGood,
    }
}

/// What `history` prints for people: the oldest first, numbered from the newest.
pub fn history(all: &[Entry]) -> String {
    let mut rows = vec![[
        "no".into(),
        "when".into(),
        "type".into(),
        "result".into(),
        "answered".into(),
        "frozen for".into(),
        "frozen".into(),
        "left out".into(),
        "warnings".into(),
        "hooks".into(),
        "why".into(),
    ]];
    for (number, entry) in (1..=all.len()).rev().zip(all) {
        let kind = entry.backup_type.map_or("-".into(), name_of_type);
        let frozen = entry.file_systems.iter();
        let frozen = frozen.filter(|it| it.how == How::Frozen);
        let since = frozen.clone().filter_map(|it| it.since_us).min();
        let until = frozen.clone().filter_map(|it| it.until_us).max();
        let stood = since
            .zip(until)
            .map(|(since, until)| until.saturating_sub(since));
        rows.push([
            number.to_string(),
            entry.at.clone(),
            kind.into(),
            word_for(entry.result).into(),
            seconds(entry.answered_us),
            seconds(stood),
            frozen.count().to_string(),
            entry.left_out().count().to_string(),
            entry.warnings.len().to_string(),
            entry.hooks.len().to_string(),
            entry.why.clone().unwrap_or_default(),
        ]);
    }
    align(&rows)
}

/// What `freeze --for` prints for people of one that the daemon has done: what became of each file system, what
/// there is to say against it, and how it went.
pub fn rehearsal(entry: &Entry) -> String {
    let file_systems = entry.file_systems.iter().map(|it| {
        let stood = it.since_us.zip(it.until_us);
        let stood = stood.map(|(since, until)| until.saturating_sub(since));
        let text = match (&it.reason, it.how) {
            (Some(reason), _) => format!("left out: {reason}"),
            (None, How::Frozen) => format!("frozen for {}", seconds(stood)),
            (None, How::Foreign) => "frozen by somebody else".into(),
            (None, How::Synced) => "synced, without means to freeze".into(),
            (None, How::LeftOut) => "left out".into(),
        };
        [it.name.clone(), text]
    });
    let hooks = entry.hooks.iter().map(|it| {
        let fault = it.fault.as_ref().map(|it| format!(": {it}"));
        let took = seconds(Some(it.took_us));
        let text = format!(
            "{} in {took}{}",
            it.verb.as_str(),
            fault.unwrap_or_default()
        );
        [format!("hook {}", it.name), text]
    });
    let warnings = entry.warnings.iter();
    let warnings = warnings.map(|it| ["warning".into(), it.clone()]);
    let why = entry.why.as_ref().map(|it| format!(": {it}"));
    let result = word_for(entry.result);
    let result = [
        "result".into(),
        format!("{result}{}", why.unwrap_or_default()),
    ];
    let rows = file_systems.chain(hooks).chain(warnings);
    align(&rows.chain([result]).collect::<Vec<_>>())
}

/// What `check` prints for people.
pub fn check(all: &[Finding]) -> String {
    let row = |it: &Finding| {
        let grade = match it.grade {
            Grade::Ok => "ok",
            Grade::Warning => "warning",
            Grade::Problem => "PROBLEM",
        };
        [grade.to_owned(), it.what.to_owned(), it.text.clone()]
    };
    align(&all.iter().map(row).collect::<Vec<_>>())
}

/// The exit status of `check`.
pub fn outcome_of_check(all: &[Finding]) -> Outcome {
    match all.iter().map(|it| it.grade).max() {
        None | Some(Grade::Ok) => Outcome::Well,
        Some(Grade::Warning) => Outcome::Warning,
        Some(Grade::Problem) => Outcome::Problem,
    }
}

fn word_for(result: Verdict) -> &'static str {
    match result {
        Verdict::Good => "good",
        Verdict::Broken => "broken",
        Verdict::Failed => "failed",
    }
}

fn seconds(us: Option<u64>) -> String {
    us.map_or_else(|| "-".into(), |us| format!("{:.3} s", us as f64 / 1e6))
}

/// Columns as wide as what is in them, but for the last.
fn align<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|it| it.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::tests::example;
    use serde_json::json;

    #[test]
    fn each_outcome_has_its_exit_status() {
        let good = Entry {
            result: Verdict::Good,
            ..example()
        };
        let idle = json!({ "phase": "idle", "door": "held" });
        let frozen = json!({ "phase": "frozen", "door": "held" });
        let waits = json!({ "phase": "idle", "door": null });
        let refuses = json!({ "phase": "idle", "door": "held", "refuses": "why" });
        let hangs = json!({ "phase": "ending", "door": "held", "refuses": "why" });
        let ends = json!({ "phase": "ending", "door": "held", "refuses": null });
        let gone = json!({ "phase": "frozen", "door": null });
        for (daemon, last, outcome) in [
            (None, Some(good.clone()), Outcome::NoDaemon),
            (Some(&idle), None, Outcome::Well),
            (Some(&idle), Some(good.clone()), Outcome::Well),
            (Some(&idle), Some(example()), Outcome::NotGood),
            (Some(&frozen), Some(good.clone()), Outcome::UnderWay),
            (Some(&waits), Some(good.clone()), Outcome::NoDaemon),
            (Some(&refuses), Some(good.clone()), Outcome::NoDaemon),
            (Some(&hangs), Some(good.clone()), Outcome::NoDaemon),
            (Some(&ends), Some(good.clone()), Outcome::UnderWay),
            (Some(&gone), Some(good.clone()), Outcome::UnderWay),
        ] {
            let status = Status::new(daemon, last.as_slice(), None);
            assert_eq!(status.outcome(), outcome, "{status:?}");
        }
        assert_eq!(outcome_of(&[]), Outcome::Well);
        assert_eq!(outcome_of(&[good.clone(), example()]), Outcome::NotGood);
        assert_eq!(outcome_of(&[example(), good]), Outcome::Well);
    }

    #[test]
    fn what_hangs_and_what_is_owed_is_named_and_changes_no_exit_status() {
        let given_up = ["/hung (ext4, 8:2): its thaw has not come back"];
        let owed = ["hook 10-a is not let go yet: it is away"];
        let daemon = json!({ "phase": "idle", "door": "held", "given_up": given_up, "owed": owed });
        let status = Status::new(Some(&daemon), &[], None);
        assert_eq!(status.outcome(), Outcome::Well);
        let table = status.table();
        let mut lines = table.lines();
        let is_named = |it: &str| it.starts_with("given up ") && it.ends_with(given_up[0]);
        assert!(lines.any(is_named), "{table}");
        let is_owed = |it: &str| it.starts_with("owed ") && it.ends_with(owed[0]);
        assert!(lines.any(is_owed), "{table}");
    }

    #[test]
    fn a_backup_that_the_history_lacks_counts_all_the_same() {
        let good = Entry {
            at: "2026-01-01T00:00:00Z".into(),
            result: Verdict::Good,
            ..example()
        };
        let broken = Entry {
            at: "2026-01-02T00:00:00Z".into(),
            ..example()
        };
        let reply = |last: Option<&Entry>| {
            let last = last.map(Entry::in_short);
            json!({ "phase": "idle", "door": "held", "last_backup": last })
        };
        for (remembered, told, outcome, is_remembered) in [
            (Some(good.clone()), Some(&broken), Outcome::NotGood, false),
            (None, Some(&broken), Outcome::NotGood, false),
            (Some(broken.clone()), Some(&broken), Outcome::NotGood, true),
            (Some(broken.clone()), Some(&good), Outcome::Well, false),
            // It has seen none since it was started.
            (Some(broken.clone()), None, Outcome::NotGood, true),
            (None, None, Outcome::Well, true),
        ] {
            let daemon = reply(told);
            let told = last_of(&daemon);
            let status = Status::new(Some(&daemon), remembered.as_slice(), told.as_ref());
            assert_eq!(status.outcome(), outcome, "{status:?}");
            assert_eq!(status.is_remembered, is_remembered, "{status:?}");
            let says = status.table().contains("does not have this backup");
            assert_eq!(says, !is_remembered);
        }
        // What was left out is named from either.
        let daemon = reply(Some(&broken));
        let told = last_of(&daemon);
        for history in [&[][..], &[broken.clone()][..]] {
            let table = Status::new(Some(&daemon), history, told.as_ref()).table();
            for row in [
                "/bad (xfs, 8:2): out of order",
                "/new was mounted",
                "hook 10-a, thaw: it failed",
            ] {
                assert!(table.contains(row), "{table}");
            }
        }
        // Of what the history has, no time is lost.
        let short = broken.in_short();
        let all = [broken.clone(), good.clone()];
        let status = Status::new(None, &all, Some(&short));
        assert_eq!(status.last, Some(&good), "it came while that was asked for");
        let status = Status::new(None, &all[..1], Some(&short));
        assert_eq!(status.last, Some(&broken));
    }

    #[test]
    fn a_table_has_its_columns_under_each_other() {
        let table = history(&[example(), example()]);
        let lines: Vec<&str> = table.lines().collect();
        let place = |line: &str, word: &str| line.find(word).unwrap();
        assert_eq!(place(lines[0], "result"), place(lines[1], "broken"));
        assert_eq!(place(lines[0], "frozen for"), place(lines[1], "0.100 s"));
        assert_eq!(
            lines[1]
                .get(place(lines[0], "left out")..)
                .unwrap()
                .chars()
                .next(),
            Some('1')
        );
        assert_eq!(
            place(lines[0], "why"),
            place(lines[2], "the deadline passed")
        );
        assert!(
            lines[1].starts_with('2') && lines[2].starts_with('1'),
            "{table}"
        );
    }
}
