// SPDX-License-Identifier: GPL-2.0-only

//! Where something was seen: of which tree of this repository, and on which kernel.
//!
//! The tree is told by whoever puts the payload together (`tests/lab/run.sh`), in a file there: the guests and
//! what runs them know nothing of git. A tree without git, such as one from an archive, is not known.

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::Path;

/// A commit: its date, as `2026-11-29T18:15:14Z`, a space, and what `git describe --always --dirty` calls it. So
/// what is older is less. It ends in `-dirty` when the tree had changes of its own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Commit(String);

impl Commit {
    /// The one that a file in the payload names, if there is any. An error when it names none.
    pub fn read(path: &Path) -> Result<Option<Commit>> {
        match std::fs::read_to_string(path) {
            Ok(text) => Commit::parse(text.trim()).map(Some),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    fn parse(text: &str) -> Result<Commit> {
        let is_right = text.split_once(' ').is_some_and(|(date, name)| {
            date.len() == "2026-11-29T18:15:14Z".len() && !name.is_empty() && !name.contains(' ')
        });
        ensure!(is_right, "{text:?} is no date and commit");
        Ok(Commit(text.to_owned()))
    }

    /// Its name and its day.
    fn words(&self) -> String {
        let (date, name) = self.0.split_once(' ').unwrap_or(("", &self.0));
        format!("`{name}` ({})", date.split('T').next().unwrap_or(date))
    }

    /// For a test.
    #[cfg(test)]
    pub fn of(text: &str) -> Commit {
        Commit::parse(text).unwrap()
    }
}

/// Where something was seen, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<Commit>,
    /// The kernel's release, as `uname -r` has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
}

/// What of a table was seen where, in one line: how much of it on the `newest` tree that any run was of, how
/// much on earlier ones and on which kernels. `things` is what is counted.
pub fn line(things: &str, origins: &[&Origin], newest: Option<&Commit>) -> String {
    let all = origins.len();
    let commits: Vec<&Commit> = origins.iter().filter_map(|it| it.commit.as_ref()).collect();
    let Some(newest) = newest.filter(|_| !commits.is_empty()) else {
        return format!(
            "Of none of these {all} {things} it is known at which commit it was seen.\n"
        );
    };
    let earlier: Vec<&&Commit> = commits.iter().filter(|it| **it != newest).collect();
    let mut text = format!(
        "Of these {all} {things} {} were seen at commit {}, the last one that was run",
        commits.len() - earlier.len(),
        newest.words()
    );
    if let Some(oldest) = earlier.iter().min() {
        let (count, oldest) = (earlier.len(), oldest.words());
        text.push_str(&format!(
            ", {count} at earlier ones, the oldest of which is {oldest}"
        ));
    }
    if all > commits.len() {
        text.push_str(&format!(", and of {} it is not known", all - commits.len()));
    }
    let releases: BTreeSet<&str> = origins
        .iter()
        .filter_map(|it| it.release.as_deref())
        .collect();
    let releases: Vec<&str> = releases.into_iter().collect();
    if !releases.is_empty() {
        text.push_str(&format!("; on {}", releases.join(", ")));
    }
    text.push_str(".\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "2026-01-02T03:04:05Z v0.1-3-gabc";
    const NEW: &str = "2026-11-29T18:15:14Z 1949e1c-dirty";

    #[test]
    fn what_was_seen_on_earlier_trees_is_counted_apart() {
        let at = |commit: &str| Origin {
            commit: Some(Commit::of(commit)),
            release: Some("7.3.4".into()),
        };
        let (old, new, unknown) = (at(OLD), at(NEW), Origin::default());
        let newest = Commit::of(NEW);
        let all = [&old, &new, &new, &unknown];
        assert_eq!(
            line("rows", &all, Some(&newest)),
            "Of these 4 rows 2 were seen at commit `1949e1c-dirty` (2026-11-29), the last one that was run, \
             1 at earlier ones, the oldest of which is `v0.1-3-gabc` (2026-01-02), and of 1 it is not known; \
             on 7.3.4.\n"
        );
        // Another table is of a newer tree than this one.
        assert!(
            line("rows", &all[..1], Some(&newest)).starts_with("Of these 1 rows 0 were seen at")
        );
        let none = "Of none of these 1 rows it is known at which commit it was seen.\n";
        for newest in [None, Some(&newest)] {
            assert_eq!(line("rows", &all[3..], newest), none);
        }
    }

    #[test]
    fn what_is_no_commit_is_refused_and_without_a_file_none_is_known() {
        let path = std::env::temp_dir().join(format!("e2e-commit-{}", std::process::id()));
        assert_eq!(Commit::read(&path).unwrap(), None);
        std::fs::write(&path, format!("{NEW}\n")).unwrap();
        assert_eq!(Commit::read(&path).unwrap(), Some(Commit::of(NEW)));
        for text in ["", "1949e1c", "2026-11-29T18:15:14Z "] {
            std::fs::write(&path, text).unwrap();
            assert!(Commit::read(&path).is_err(), "{text:?}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(Commit::of(OLD) < Commit::of(NEW));
    }
}
