// SPDX-License-Identifier: GPL-2.0-only

//! What is remembered of backups: when, of what kind, how it went, and the time of each file system and
//! hook. One JSON object a line, in a file that survives restarts and stays small.
//!
//! It is on a disk, so it is written and read only while nothing is frozen. What is known of a backup under
//! way is kept in memory until then ([`Unfinished`]), for the next daemon should this one die. It knows no
//! host.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::statfs::statfs;
use nix::unistd::{access, AccessFlags};
use serde::{Deserialize, Serialize};

use crate::apart::Questions;
use crate::backup::Verdict;
use crate::cache::Missing;
use crate::calls::Called;
use crate::freeze::{How, Stay};
use crate::hooks::Verb;
use crate::job::Account;
use crate::record::RunDir;

/// Bytes that the file may have before the older half is forgotten: hundreds of backups.
const MOST_BYTES: u64 = 1 << 20;

/// How long reading it may take: its disk may hang.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why it cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {path}, of the history")]
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
    /// In the order of the plan, and what that has left out.
    pub file_systems: Vec<FileSystem>,
    /// What there is to say against it, good as it may be.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub warnings: Vec<String>,
    /// In the order of their calls.
    pub hooks: Vec<HookCall>,
}

impl Entry {
    /// The same without what may be long: what went as it should, and the most of all else.
    pub fn in_short(&self) -> Self {
        const MOST: usize = 16;
        let left_out = self.left_out().take(MOST).cloned();
        let warnings = self.warnings.iter().take(MOST).cloned();
        Entry {
            file_systems: left_out.collect(),
            warnings: warnings.collect(),
            hooks: Vec::new(),
            ..self.clone()
        }
    }

    /// What was not frozen, nor synced.
    pub fn left_out(&self) -> impl Iterator<Item = &FileSystem> {
        let all = self.file_systems.iter();
        all.filter(|it| it.how == How::LeftOut)
    }

    /// Whether both are of the same backup.
    pub fn is_of_the_same(&self, other: &Entry) -> bool {
        let marks = |it: &Entry| (it.at.clone(), it.request, it.ended_us);
        marks(self) == marks(other)
    }
}

/// What became of one file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSystem {
    /// For people.
    pub name: String,
    /// Whether it was frozen.
    pub how: How,
    /// Why it was left out.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
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
                warnings: Vec::new(),
                hooks: Vec::new(),
            },
        }
    }

    /// How long ago it began.
    pub fn age(&self) -> Duration {
        self.start.elapsed()
    }

    fn us(&self, at: Instant) -> u64 {
        let passed = at.saturating_duration_since(self.start);
        u64::try_from(passed.as_micros()).unwrap_or(u64::MAX)
    }

    /// The host has its answer to FREEZE. Returns when, in microseconds from the beginning.
    pub fn answered(&mut self) -> u64 {
        let us = self.us(Instant::now());
        self.entry.answered_us = Some(us);
        us
    }

    /// What is known of it so far.
    pub fn so_far(&self) -> &Entry {
        &self.entry
    }

    /// What became of the file systems.
    pub fn thawed(&mut self, account: Account) {
        let stayed = |stay: Stay| FileSystem {
            name: stay.name,
            how: stay.how,
            reason: stay.reason,
            since_us: stay.since.map(|at| self.us(at)),
            took_us: stay.took.map(|it| it.as_micros() as u64),
            until_us: stay.until.map(|at| self.us(at)),
        };
        let missing = |it: Missing| FileSystem {
            name: it.name,
            how: How::LeftOut,
            reason: Some(it.reason),
            since_us: None,
            took_us: None,
            until_us: None,
        };
        let stays = account.stays.into_iter().map(stayed);
        let missing = account.missing.into_iter().map(missing);
        self.entry.file_systems = stays.chain(missing).collect();
        self.entry.warnings.extend(account.warnings);
    }

    /// Something else to say against it.
    pub fn warn(&mut self, text: String) {
        self.entry.warnings.push(text);
    }

    /// All is over but the hooks.
    pub fn ended(&mut self, result: Verdict, why: Option<String>) {
        self.entry.ended_us = self.us(Instant::now());
        self.entry.result = result;
        self.entry.why = why;
    }

    /// All is over.
    pub fn finish(mut self, called: Vec<Called>) -> Entry {
        // Where FREEZE failed, why it did says as much of the calls before it.
        let counts = |it: &&Called| it.verb != Verb::Freeze || self.entry.result != Verdict::Failed;
        let faults = called.iter().filter(counts).filter_map(|it| {
            let fault = it.fault.as_ref()?;
            Some(format!("hook {}, {}: {fault}", it.name, it.verb.as_str()))
        });
        let faults: Vec<String> = faults.collect();
        self.entry.warnings.extend(faults);
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

    fn bytes(&self) -> io::Result<Vec<u8>> {
        match std::fs::read(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            other => other,
        }
    }

    /// All that is remembered, the oldest first. A line that is not understood is passed over: a later
    /// version may have written it, or the machine died meanwhile.
    pub fn read(&self) -> Result<Vec<Entry>, HistoryError> {
        self.bytes().map(entries_in).map_err(self.failed("read"))
    }

    /// The same [apart](Questions), for a thread that has the descriptors of all: what does not answer in time
    /// cannot be read.
    pub fn read_in_time(&self) -> Result<Vec<Entry>, HistoryError> {
        self.read_within(PATIENCE)
    }

    fn read_within(&self, limit: Duration) -> Result<Vec<Entry>, HistoryError> {
        static ASKED: Questions<PathBuf> = Questions::new();
        let its = self.clone();
        let bytes = ASKED.ask(self.0.clone(), &[], limit, move |_| its.bytes());
        let bytes = bytes.and_then(|it| it);
        bytes.map(entries_in).map_err(self.failed("read"))
    }

    /// Whether one more could be remembered now, as far as that shows without a try; apart, as before.
    pub fn has_room_in_time(&self) -> Result<(), HistoryError> {
        static ASKED: Questions<PathBuf> = Questions::new();
        let path = self.0.clone();
        let answer = ASKED.ask(self.0.clone(), &[], PATIENCE, move |_| {
            may_be_written(&path)
        });
        answer.and_then(|it| it).map_err(self.failed("write"))
    }

    /// Remembers one more, and forgets the older half when it has become too much. One that is remembered is so also
    /// where that cannot be, and returns why.
    pub fn add(&self, entry: &Entry) -> Result<Option<HistoryError>, HistoryError> {
        let size = self.append(entry).map_err(self.failed("write"))?;
        let shortened = match size > MOST_BYTES {
            true => self.forget_older_half(),
            false => Ok(()),
        };
        Ok(shortened.map_err(self.failed("shorten")).err())
    }

    /// Returns how large the file is then.
    fn append(&self, entry: &Entry) -> io::Result<u64> {
        let folder = self.0.parent().unwrap_or(Path::new("/"));
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o755).create(folder)?;
        let mut line = serde_json::to_string(entry)?;
        line.push('\n');
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true).mode(0o600);
        let mut file = options.open(&self.0)?;
        // The last one may have been cut off, by a full disk or by the death of the machine.
        if let Some(end) = file.metadata()?.len().checked_sub(1) {
            let mut last = [0];
            file.read_exact_at(&mut last, end)?;
            if last != *b"\n" {
                line.insert(0, '\n');
            }
        }
        file.write_all(line.as_bytes())?;
        // Whoever looks for it after the machine has died finds it, and the next freeze has less to write.
        file.sync_all()?;
        Ok(file.metadata()?.len())
    }

    /// The file is there as it was or as it is to be, whenever the machine dies. The last line stays, however long
    /// it is.
    fn forget_older_half(&self) -> io::Result<()> {
        let bytes = self.bytes()?;
        let half = bytes.len() / 2;
        let mut lines = bytes.split_inclusive(|&byte| byte == b'\n').peekable();
        let mut from = 0;
        while let Some(line) = lines.next() {
            if from > half || lines.peek().is_none() {
                break;
            }
            from += line.len();
        }
        let new = self.0.with_extension("new");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&new)?;
        file.write_all(bytes.get(from..).unwrap_or_default())?;
        file.sync_all()?;
        std::fs::rename(&new, &self.0)
    }
}

/// What is known of the backup under way, in the run directory, which is in memory: so it can be written
/// while disks are frozen. It is there from the answer to FREEZE at the latest until the history has the entry, and
/// whoever finds it at a start has to see to that.
///
/// A FREEZE waits for nothing of it: what is to be said first is kept until there is time, and the file stays open and
/// blank, with memory for that, from one backup to the next.
#[derive(Debug)]
pub struct Unfinished {
    path: PathBuf,
    /// Shared with whoever empties it.
    page: Arc<Mutex<Page>>,
}

/// The file, and what is in it.
#[derive(Debug, Default)]
struct Page {
    file: Option<File>,
    /// Bytes that are in it and count.
    length: u64,
    /// Counts what was put there.
    edition: u64,
    /// What is to be put there when there is time.
    first: Option<Entry>,
}

/// What is in it when it is blank, so that it has a page of memory all the time.
const BLANK: &[u8] = b"\n";

impl Page {
    fn is_blank(&self) -> bool {
        let file = self.file.as_ref().filter(|_| self.length == 0);
        // Nobody would find what is written to one that somebody has removed.
        file.and_then(|it| it.metadata().ok())
            .is_some_and(|it| it.nlink() > 0)
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Some(file) = &self.file {
            file.write_all_at(bytes, self.length)?;
            self.length += bytes.len() as u64;
        }
        Ok(())
    }

    fn blank(&mut self) -> io::Result<()> {
        self.length = 0;
        match &self.file {
            Some(file) => {
                file.set_len(0)?;
                file.write_all_at(BLANK, 0)
            }
            None => Ok(()),
        }
    }
}

/// Whether root could write to this file, which may not be there yet, nor the folders on the way to it.
fn may_be_written(path: &Path) -> io::Result<()> {
    /// More than a backup takes that has much to say.
    const LEAST_BYTES: u64 = 64 << 10;
    let there = path.ancestors().find(|it| it.exists());
    let there = there.unwrap_or(Path::new("/"));
    match (there == path, there.is_dir()) {
        (true, true) => return Err(io::ErrorKind::IsADirectory.into()),
        (false, false) => return Err(io::ErrorKind::NotADirectory.into()),
        _ => {}
    }
    access(there, AccessFlags::W_OK)?;
    let found = statfs(there)?;
    let block = u64::try_from(found.block_size()).unwrap_or(1);
    let left = found.blocks_available().saturating_mul(block);
    // One that counts no blocks knows of no end.
    match found.blocks() != 0 && left < LEAST_BYTES {
        true => Err(io::ErrorKind::StorageFull.into()),
        false => Ok(()),
    }
}

impl Unfinished {
    /// That in this run directory.
    pub fn new(run: &RunDir) -> Self {
        Unfinished {
            path: run.path().join("backup.json"),
            page: Arc::default(),
        }
    }

    fn page(&self) -> MutexGuard<'_, Page> {
        // It is whole after each change.
        self.page.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, doing: &'static str) -> impl FnOnce(io::Error) -> HistoryError {
        let path = self.path.clone();
        move |source| HistoryError {
            doing,
            path,
            source,
        }
    }

    /// A backup begins; should this be all that is ever known, the daemon has died before FREEZE was
    /// answered. It is written with [`Unfinished::note`].
    pub fn begin(&mut self, entry: &Entry) {
        self.page().first = Some(Entry {
            result: Verdict::Failed,
            why: Some("the daemon died during it".into()),
            ..entry.clone()
        });
    }

    /// There is time to write what is known so far, unless it is written.
    pub fn note(&mut self) -> Result<(), HistoryError> {
        self.note_with(&[])
    }

    /// FREEZE was answered, so many microseconds after the beginning. While all is frozen this takes no
    /// further memory and looks up no path, unless somebody has removed the file or the history does not have the last
    /// backup yet.
    pub fn answered(&mut self, us: u64) -> Result<(), HistoryError> {
        self.note_with(us.to_string().as_bytes())
    }

    fn note_with(&mut self, more: &[u8]) -> Result<(), HistoryError> {
        let mut page = self.page();
        let mut bytes = Vec::new();
        if let Some(entry) = page.first.take() {
            if page.is_blank() {
                page.edition += 1;
                bytes = line_of(&entry).map_err(self.failed("write"))?;
            } else {
                drop(page);
                self.put(&entry)?;
                page = self.page();
            }
        }
        bytes.extend_from_slice(more);
        page.append(&bytes).map_err(self.failed("write"))
    }

    /// How it went is known. What was there before is there until this is, whole.
    pub fn put(&mut self, entry: &Entry) -> Result<(), HistoryError> {
        let new = self.path.with_extension("new");
        let write = || {
            let line = line_of(entry)?;
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600);
            let mut file = options.open(&new)?;
            file.write_all(&line)?;
            std::fs::rename(&new, &self.path)?;
            Ok((file, line.len() as u64))
        };
        let (file, length) = write().map_err(self.failed("write"))?;
        let mut page = self.page();
        *page = Page {
            file: Some(file),
            length,
            edition: page.edition + 1,
            first: None,
        };
        Ok(())
    }

    /// What an earlier daemon has left, if anything.
    pub fn left(&mut self) -> Result<Option<Entry>, HistoryError> {
        let read = || {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).mode(0o600);
            let mut file = options.open(&self.path)?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok((file, bytes))
        };
        let (file, bytes) = read().map_err(self.failed("read"))?;
        let mut page = self.page();
        *page = Page {
            file: Some(file),
            length: bytes.len() as u64,
            edition: page.edition + 1,
            first: None,
        };
        if bytes.is_empty() || bytes == BLANK {
            let blank = page.blank();
            return blank.map(|()| None).map_err(self.failed("write"));
        }
        let text = String::from_utf8_lossy(&bytes);
        let (line, answered) = text.split_once('\n').unwrap_or((&text, ""));
        let entry = serde_json::from_str(line).map_err(io::Error::from);
        let mut entry: Entry = entry.map_err(self.failed("read"))?;
        if let Ok(us) = answered.parse() {
            // What it had frozen is thawed by its death, and its THAW fails.
            entry.result = Verdict::Broken;
            entry.answered_us = Some(us);
            entry.ended_us = us;
        }
        Ok(Some(entry))
    }

    /// Why the THAW of what an earlier daemon has left must fail: it had frozen all, and died.
    pub fn broken(&mut self) -> Option<String> {
        // Who cannot read it hears so from whoever puts it into the history.
        let entry = self.left().ok().flatten()?;
        (entry.result == Verdict::Broken).then_some(entry.why?)
    }

    /// What empties it once the history has the entry, unless another backup has begun by then.
    pub fn eraser(&self) -> impl FnOnce() -> Result<(), HistoryError> + Send + 'static {
        let (page, failed) = (Arc::clone(&self.page), self.failed("empty"));
        let edition = self.page().edition;
        move || {
            let mut page = page.lock().unwrap_or_else(PoisonError::into_inner);
            match page.edition == edition {
                true => page.blank().map_err(failed),
                false => Ok(()),
            }
        }
    }
}

fn entries_in(bytes: Vec<u8>) -> Vec<Entry> {
    let lines = bytes.split(|&byte| byte == b'\n');
    let entries = lines.map(serde_json::from_slice);
    entries.filter_map(Result::ok).collect()
}

fn line_of(entry: &Entry) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(entry)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

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
            reason: None,
            since: Some(at(100)),
            took: Some(Duration::from_millis(2)),
            until: Some(at(200)),
        };
        draft.answered();
        draft.thawed(Account {
            stays: vec![stay],
            missing: vec![Missing {
                name: "/bad (xfs, 8:2)".into(),
                reason: "out of order".into(),
            }],
            warnings: vec!["/new was mounted".into()],
        });
        draft.ended(Verdict::Broken, Some("the deadline passed".into()));
        draft.finish(hooks)
    }

    #[test]
    fn where_nothing_can_be_written_that_is_told_without_a_try() {
        let dir = std::env::temp_dir().join(format!("hv-vss-may-{}", std::process::id()));
        let kind = |path: &Path| may_be_written(path).map_err(|it| it.kind());
        // The folders on the way are made when they are needed.
        let path = dir.join("a/b/history.jsonl");
        assert_eq!(kind(&path), Ok(()));
        assert!(!dir.exists());
        std::fs::create_dir_all(&path).unwrap();
        assert_eq!(kind(&path), Err(io::ErrorKind::IsADirectory));
        std::fs::remove_dir(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        assert_eq!(kind(&path), Ok(()));
        assert_eq!(kind(&path.join("below")), Err(io::ErrorKind::NotADirectory));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_file_that_does_not_answer_is_no_history_and_is_waited_for_no_longer() {
        let dir = std::env::temp_dir().join(format!("hv-vss-silent-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let history = History::new(&dir);
        nix::unistd::mkfifo(&history.0, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let limit = Duration::from_millis(50);
        let error = history.read_within(limit).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::TimedOut);
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn the_last_backup_stays_however_long_it_is() {
        let dir = std::env::temp_dir().join(format!("hv-vss-long-{}", std::process::id()));
        let history = History::new(&dir);
        let long = |why: &str, bytes| Entry {
            why: Some(why.repeat(bytes)),
            ..example()
        };
        let most = MOST_BYTES as usize;
        let entries = [long("a", most / 4), long("b", most / 4), long("c", most)];
        for entry in &entries {
            history.add(entry).unwrap();
        }
        assert_eq!(history.read().unwrap(), entries[2..]);
        // By then it is one of the older half.
        let next = long("d", most);
        history.add(&next).unwrap();
        assert_eq!(history.read().unwrap(), [next]);
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn one_is_remembered_although_the_older_ones_cannot_be_forgotten() {
        let dir = std::env::temp_dir().join(format!("hv-vss-shorten-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("history.new")).unwrap();
        let history = History::new(&dir);
        let entry = Entry {
            why: Some("a".repeat(MOST_BYTES as usize)),
            ..example()
        };
        let why = history.add(&entry).unwrap().unwrap().to_string();
        assert!(why.starts_with("cannot shorten"), "{why}");
        assert_eq!(history.read().unwrap(), [entry]);
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn times_count_from_the_beginning() {
        let entry = example();
        let [file_system, missing] = &entry.file_systems[..] else {
            panic!("{entry:?}");
        };
        assert_eq!(file_system.since_us, Some(100_000));
        assert_eq!(file_system.took_us, Some(2_000));
        assert_eq!(file_system.until_us, Some(200_000));
        assert_eq!(entry.hooks[1].since_us, 300_000);
        assert_eq!((missing.how, missing.since_us), (How::LeftOut, None));
        assert_eq!(missing.reason.as_deref(), Some("out of order"));
        assert_eq!(entry.left_out().collect::<Vec<_>>(), [missing]);
        let text = serde_json::to_string(&entry).unwrap();
        assert!(text.contains(r#""result":"broken""#), "{text}");
        assert!(text.contains(r#""how":"frozen""#), "{text}");
        assert!(text.contains(r#""verb":"thaw""#), "{text}");
    }

    #[test]
    fn what_went_wrong_with_a_hook_is_a_warning_unless_it_is_why_the_backup_failed() {
        for (result, warnings) in [
            (Verdict::Failed, &["hook b, thaw: y"][..]),
            (Verdict::Good, &["hook a, freeze: x", "hook b, thaw: y"]),
        ] {
            let mut draft = Draft::new(7, None, None, true);
            draft.ended(result, None);
            let call = |name: &str, verb, fault: Option<&str>| Called {
                name: name.into(),
                verb,
                since: Instant::now(),
                took: Duration::ZERO,
                fault: fault.map(str::to_owned),
            };
            let entry = draft.finish(vec![
                call("a", Verb::Freeze, Some("x")),
                call("b", Verb::Freeze, None),
                call("b", Verb::Thaw, Some("y")),
            ]);
            assert_eq!(entry.warnings, warnings);
        }
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
        // Cut off, and with what is no text.
        let spoilt = b"{\"of\": \"a later version\"}\n{\"at\": \"\xff";
        std::fs::write(&history.0, spoilt).unwrap();
        history.add(&entry(7)).unwrap();
        let all = history.read().unwrap();
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].request, 7);
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_is_known_of_a_backup_that_death_ended_follows_from_how_far_it_had_come() {
        let dir = std::env::temp_dir().join(format!("hv-vss-unfinished-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let mut unfinished = Unfinished::new(&RunDir::new(&dir));
        // As the next daemon sees it.
        let left = || Unfinished::new(&RunDir::new(&dir)).left().unwrap();
        let broken = || Unfinished::new(&RunDir::new(&dir)).broken();
        assert_eq!((left(), broken()), (None, None));
        let mut draft = Draft::new(7, None, None, true);
        unfinished.begin(draft.so_far());
        assert_eq!(left(), None);
        unfinished.note().unwrap();
        unfinished.note().unwrap();
        let seen = left().unwrap();
        assert_eq!((seen.request, seen.result), (7, Verdict::Failed));
        assert_eq!(seen.why.as_deref(), Some("the daemon died during it"));
        assert_eq!((seen.answered_us, broken()), (None, None));
        let us = draft.answered();
        unfinished.answered(us).unwrap();
        let seen = left().unwrap();
        assert_eq!(seen.result, Verdict::Broken);
        assert_eq!(seen.answered_us, Some(us));
        assert_eq!(broken().as_deref(), Some("the daemon died during it"));
        // Only the history has not heard of it.
        draft.ended(Verdict::Good, None);
        unfinished.put(draft.so_far()).unwrap();
        let seen = left().unwrap();
        assert_eq!((seen.result, seen.why), (Verdict::Good, None));
        assert_eq!(broken(), None);
        // The next one begins before the history has this.
        let erase = unfinished.eraser();
        unfinished.begin(Draft::new(8, None, None, true).so_far());
        assert_eq!(left().unwrap().request, 7);
        unfinished.note().unwrap();
        erase().unwrap();
        assert_eq!(left().unwrap().request, 8);
        unfinished.eraser()().unwrap();
        assert_eq!(left(), None);
        unfinished.eraser()().unwrap();
        // The next one finds the file as it is, and is written to that and to no other.
        let file = || std::fs::metadata(dir.join("backup.json")).unwrap();
        let before = file().ino();
        let mut draft = Draft::new(9, None, None, true);
        // Which needs no more room.
        assert_eq!(file().len(), 1);
        unfinished.begin(draft.so_far());
        unfinished.answered(draft.answered()).unwrap();
        let seen = left().unwrap();
        assert_eq!((seen.request, seen.result), (9, Verdict::Broken));
        assert_eq!(file().ino(), before);
        unfinished.eraser()().unwrap();
        // Unless somebody has removed it.
        std::fs::remove_file(dir.join("backup.json")).unwrap();
        unfinished.begin(draft.so_far());
        unfinished.note().unwrap();
        assert_eq!(left().unwrap().request, 9);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
