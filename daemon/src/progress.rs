// SPDX-License-Identifier: GPL-2.0-only

//! What a freeze is at, for whoever looks on while it cannot say so itself: a look-up, a sync or a
//! freeze may hang. It knows names and times.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A stage of a freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// What is mounted is looked up and opened.
    Looking,
    /// Hooks are called; nothing is frozen yet.
    Hooks,
    /// What is dirty is written back; nothing is frozen yet.
    Syncing,
    /// The disks are asked whether they answer; nothing is frozen yet.
    Asking,
    /// From here on something may be frozen.
    Freezing,
}

#[derive(Debug)]
struct Inner {
    stage: Stage,
    since: Instant,
    /// How many have been done in this stage.
    done: usize,
    under_way: Vec<(String, Instant)>,
}

/// The progress of one freeze, from its beginning.
#[derive(Debug)]
pub struct Progress(Mutex<Inner>);

impl Default for Progress {
    fn default() -> Self {
        Progress(Mutex::new(Inner {
            stage: Stage::Looking,
            since: Instant::now(),
            done: 0,
            under_way: Vec::new(),
        }))
    }
}

impl Progress {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        // It is whole after each line below.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new stage begins, with so many at a time at most.
    pub fn enter(&self, stage: Stage, most: usize) {
        let mut inner = self.inner();
        (inner.stage, inner.since, inner.done) = (stage, Instant::now(), 0);
        inner.under_way.reserve(most);
    }

    /// Work on one begins.
    pub fn begin(&self, name: &str, now: Instant) {
        self.inner().under_way.push((name.to_owned(), now));
    }

    /// Work on one has ended.
    pub fn end(&self, name: &str) {
        let mut inner = self.inner();
        inner.under_way.retain(|(it, _)| it != name);
        inner.done += 1;
    }

    /// Which stage it is in.
    pub fn stage(&self) -> Stage {
        self.inner().stage
    }

    /// Whether what is mounted has been looked up for longer than `limit`.
    pub fn looks_for(&self, now: Instant, limit: Duration) -> bool {
        let inner = self.inner();
        inner.stage == Stage::Looking && now.saturating_duration_since(inner.since) >= limit
    }

    /// What has been frozen for longer than `limit` now and is not done.
    pub fn stuck(&self, now: Instant, limit: Duration) -> Option<String> {
        let inner = self.inner();
        let old = |since: Instant| now.saturating_duration_since(since) >= limit;
        let names = inner.under_way.iter().filter(|(_, since)| old(*since));
        let names: Vec<&str> = names.map(|(name, _)| name.as_str()).collect();
        (inner.stage == Stage::Freezing && !names.is_empty()).then(|| names.join(", "))
    }

    /// What a freeze is inside of now.
    pub fn under_way(&self) -> Option<String> {
        self.stuck(Instant::now(), Duration::ZERO)
    }

    /// In words, such as "writing back for 12 s, 3 done, still at /srv (ext4)".
    pub fn words(&self, now: Instant) -> String {
        let inner = self.inner();
        let doing = match inner.stage {
            Stage::Looking => "looking up what is mounted",
            Stage::Hooks => "calling hooks",
            Stage::Syncing => "writing back",
            Stage::Asking => "asking the disks",
            Stage::Freezing => "freezing",
        };
        let seconds = now.saturating_duration_since(inner.since).as_secs();
        let mut text = format!("{doing} for {seconds} s");
        if !matches!(inner.stage, Stage::Looking | Stage::Asking) {
            text.push_str(&format!(", {} done", inner.done));
        }
        if !inner.under_way.is_empty() {
            let names = inner.under_way.iter().map(|(name, _)| name.as_str());
            text.push_str(", still at ");
            text.push_str(&names.collect::<Vec<_>>().join(", "));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hangs_is_named_and_only_a_freeze_is_stuck() {
        let progress = Progress::default();
        let then = Instant::now();
        let now = then + Duration::from_secs(12);
        assert!(progress.looks_for(now, Duration::from_secs(11)));
        assert!(!progress.looks_for(now, Duration::from_secs(13)));
        assert!(progress
            .words(now)
            .starts_with("looking up what is mounted for 1"));
        let limit = Duration::from_secs(10);
        for (stage, doing) in [
            (Stage::Syncing, "writing back"),
            (Stage::Freezing, "freezing"),
        ] {
            progress.enter(stage, 2);
            assert!(!progress.looks_for(now, Duration::ZERO));
            progress.begin("/a", then);
            progress.begin("/b", now);
            progress.begin("/c", then);
            progress.end("/c");
            let words = progress.words(now);
            assert!(words.starts_with(doing), "{words}");
            assert!(words.ends_with("1 done, still at /a, /b"), "{words}");
            let expected = (stage == Stage::Freezing).then(|| "/a".to_owned());
            assert_eq!(progress.stuck(now, limit), expected);
            progress.end("/a");
            progress.end("/b");
            assert_eq!(progress.stuck(now, limit), None);
        }
    }
}
