// SPDX-License-Identifier: GPL-2.0-only

//! What is remembered of backups: when, of what kind, how it went, and the time of each file system and
//! hook. One JSON object a line, in a file that survives restarts and stays small.
//!
//! It is on a disk, so it is written and read only while nothing is frozen. It knows no host.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use serde::{Deserialize, Serialize};

use crate::backup::Verdict;
use crate::calls::Called;
use crate::freeze::{How, Stay};
use crate::hooks::Verb;

/// Bytes that the file may have before the older half is forgotten: hundreds of backups.
const MOST_BYTES: u64 = 1 << 20;

/// Why it cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} the history {path}")]
pub struct HistoryError {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// One backup. Times are microseconds from its beginning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When FREEZE came, as RFC 3339 has it.
    pub at: String,
    /// The number of that FREEZE; 0 with a kernel that has none.
    pub request: u64,
    /// The kind of backup in the host's own number, if it said.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub backup_type: Option<u32>,
    /// How many disks the host said that it would take a snapshot of.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub disks: Option<usize>,
    /// Where those are: `controller:port:target:unit`.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub listed: Vec<String>,
    /// Whether the module held what was frozen, as against FIFREEZE.
    pub held: bool,
    /// How it went.
    pub result: Verdict,
    /// Why it was not good.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub why: Option<String>,
    /// When FREEZE was answered.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub answered_us: Option<u64>,
    /// When all was over but the hooks.
    pub ended_us: u64,
    /// In the order of the plan.
    pub file_systems: Vec<FileSystem>,
    /// In the order of their calls.
    pub hooks: Vec<HookCall>,
}

/// What became of one file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSystem {
    /// For people.
    pub name: String,
    /// Whether it was frozen.
    pub how: How,
    /// When it was about to be frozen.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub since_us: Option<u64>,
    /// How long that took.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub took_us: Option<u64>,
    /// When it was thawed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub until_us: Option<u64>,
}

/// One call of a hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookCall {
    /// Its name.
    pub name: String,
    /// What it was called with.
    pub verb: Verb,
    /// When.
    pub since_us: u64,
    /// How long it took.
    pub took_us: u64,
    /// What was wrong with it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fault: Option<String>,
}

/// A backup under way, as far as it is to be remembered.
#[derive(Debug)]
pub struct Draft {
    start: Instant,
    entry: Entry,
}

impl Draft {
    /// One that begins now, of disks with these addresses, if the host has said which.
    pub fn new(
        request: u64,
        backup_type: Option<u32>,
        listed: Option<Vec<String>>,
        held: bool,
    ) -> Self {
        Draft {
            start: Instant::now(),
            entry: Entry {
                at: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
                request,
                backup_type,
                disks: listed.as_ref().map(Vec::len),
                listed: listed.unwrap_or_default(),
                held,
                result: Verdict::Failed,
                why: None,
                answered_us: None,
                ended_us: 0,
                file_systems: Vec::new(),
                hooks: Vec::new(),
            },
        }
    }

    fn us(&self, at: Instant) -> u64 {
        let passed = at.saturating_duration_since(self.start);
        u64::try_from(passed.as_micros()).unwrap_or(u64::MAX)
    }

    /// The host has its answer to FREEZE.
    pub fn answered(&mut self) {
        self.entry.answered_us = Some(self.us(Instant::now()));
    }

    /// What became of the file systems.
    pub fn thawed(&mut self, stays: Vec<Stay>) {
        let file_system = |stay: Stay| FileSystem {
            name: stay.name,
            how: stay.how,
            since_us: stay.since.map(|at| self.us(at)),
            took_us: stay.took.map(|it| it.as_micros() as u64),
            until_us: stay.until.map(|at| self.us(at)),
        };
        self.entry.file_systems = stays.into_iter().map(file_system).collect();
    }

    /// All is over but the hooks.
    pub fn ended(&mut self, result: Verdict, why: Option<String>) {
        self.entry.ended_us = self.us(Instant::now());
        self.entry.result = result;
        self.entry.why = why;
    }

    /// All is over.
    pub fn finish(mut self, called: Vec<Called>) -> Entry {
        let call = |it: Called| HookCall {
            since_us: self.us(it.since),
            name: it.name,
            verb: it.verb,
            took_us: it.took.as_micros() as u64,
            fault: it.fault,
        };
        self.entry.hooks = called.into_iter().map(call).collect();
        self.entry
    }
}

/// The file.
#[derive(Clone, Debug)]
pub struct History(PathBuf);

impl History {
    /// That in this folder, which is made when it is first needed.
    pub fn new(folder: &Path) -> Self {
        History(folder.join("history.jsonl"))
    }

    fn failed(&self, doing: &'static str) -> impl FnOnce(io::Error) -> HistoryError + '_ {
        move |source| HistoryError {
            doing,
            path: self.0.clone(),
            source,
        }
    }

    fn text(&self) -> io::Result<String> {
        match std::fs::read_to_string(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            other => other,
        }
    }

    /// All that is remembered, the oldest first. What is not understood is passed over: a later version
    /// may have written it.
    pub fn read(&self) -> Result<Vec<Entry>, HistoryError> {
        let text = self.text().map_err(self.failed("read"))?;
        let entries = text.lines().map(serde_json::from_str);
        Ok(entries.filter_map(Result::ok).collect())
    }

    /// Remembers one more, and forgets the older half when it has become too much.
    pub fn add(&self, entry: &Entry) -> Result<(), HistoryError> {
        self.append(entry)
            .and_then(|size| match size > MOST_BYTES {
                true => self.forget_older_half(),
                false => Ok(()),
            })
            .map_err(self.failed("write"))
    }

    /// Returns how large the file is then.
    fn append(&self, entry: &Entry) -> io::Result<u64> {
        let folder = self.0.parent().unwrap_or(Path::new("/"));
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o755).create(folder)?;
        let mut line = serde_json::to_string(entry)?;
        line.push('\n');
        let mut options = OpenOptions::new();
        let mut file = options
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&self.0)?;
        file.write_all(line.as_bytes())?;
        Ok(file.metadata()?.len())
    }

    /// The file is there as it was or as it is to be, whenever the machine dies.
    fn forget_older_half(&self) -> io::Result<()> {
        let text = self.text()?;
        let bytes = text.as_bytes();
        let half = bytes.len() / 2;
        let newline = bytes.iter().skip(half).position(|&byte| byte == b'\n');
        let from = newline.map_or(0, |at| half + at + 1);
        let new = self.0.with_extension("new");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&new)?;
        file.write_all(bytes.get(from..).unwrap_or_default())?;
        file.sync_all()?;
        std::fs::rename(&new, &self.0)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::time::Duration;

    /// A backup of one file system with one hook.
    pub(crate) fn example() -> Entry {
        let mut draft = Draft::new(7, Some(2), Some(vec!["host:0:0:1".into()]), true);
        let at = |ms| draft.start + Duration::from_millis(ms);
        let called = |verb, since, fault: Option<&str>| Called {
            name: "10-a".into(),
            verb,
            since,
            took: Duration::from_millis(30),
            fault: fault.map(str::to_owned),
        };
        let hooks = vec![
            called(Verb::Freeze, at(10), None),
            called(Verb::Thaw, at(300), Some("it failed")),
        ];
        let stay = Stay {
            name: "/srv (ext4, 8:1)".into(),
            how: How::Frozen,
            since: Some(at(100)),
            took: Some(Duration::from_millis(2)),
            until: Some(at(200)),
        };
        draft.answered();
        draft.thawed(vec![stay]);
        draft.ended(Verdict::Broken, Some("the deadline passed".into()));
        draft.finish(hooks)
    }

    #[test]
    fn times_count_from_the_beginning() {
        let entry = example();
        let [file_system] = &entry.file_systems[..] else {
            panic!("{entry:?}");
        };
        assert_eq!(file_system.since_us, Some(100_000));
        assert_eq!(file_system.took_us, Some(2_000));
        assert_eq!(file_system.until_us, Some(200_000));
        assert_eq!(entry.hooks[1].since_us, 300_000);
        let text = serde_json::to_string(&entry).unwrap();
        assert!(text.contains(r#""result":"broken""#), "{text}");
        assert!(text.contains(r#""how":"frozen""#), "{text}");
        assert!(text.contains(r#""verb":"thaw""#), "{text}");
    }

    #[test]
    fn the_last_ones_are_remembered_and_what_is_not_understood_does_no_harm() {
        let dir = std::env::temp_dir().join(format!("hv-vss-history-{}", std::process::id()));
        let history = History::new(&dir);
        assert_eq!(history.read().unwrap(), []);
        let entry = |request| Entry {
            request,
            why: Some("x".repeat(10_000)),
            ..example()
        };
        for request in 0..150 {
            history.add(&entry(request)).unwrap();
            let size = std::fs::metadata(&history.0).unwrap().len();
            assert!(size <= MOST_BYTES, "{size} bytes");
            let last = history.read().unwrap().pop().unwrap();
            assert_eq!(last.request, request);
        }
        let all: Vec<u64> = history
            .read()
            .unwrap()
            .iter()
            .map(|it| it.request)
            .collect();
        // The older ones have gone, and none in between.
        assert!(all[0] > 0 && all.len() > 40, "{all:?}");
        assert_eq!(all, (all[0]..150).collect::<Vec<_>>());
        std::fs::write(&history.0, "{\"of\": \"a later version\"}\n").unwrap();
        history.add(&entry(7)).unwrap();
        let all = history.read().unwrap();
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].request, 7);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
