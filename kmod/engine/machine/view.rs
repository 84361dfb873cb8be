// SPDX-License-Identifier: GPL-2.0

//! What can be seen of the machine from outside. Changes nothing.

use super::op;
use super::Engine;
use super::NotNow;
use super::Stage;
use super::Stats;
use super::Version;
use core::ops::DerefMut;

impl<B: DerefMut<Target = [u8]>> Engine<B> {
    /// Versions agreed with the host: framework, VSS.
    pub fn versions(&self) -> Option<(Version, Version)> {
        self.versions
    }

    /// All counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Number of open requests.
    pub fn queued(&self) -> usize {
        self.queue.iter().count()
    }

    /// The freeze in one word.
    pub fn freeze_state(&self) -> &'static str {
        self.freeze.as_str()
    }

    /// What becomes of a FREEZE that comes now, in one word.
    pub fn next_freeze(&self) -> &'static str {
        match self.refuses_freezes() {
            None => "taken",
            Some(NotNow::Sleeps) => "sleep",
            Some(NotNow::CallsOff) => "called-off",
            Some(NotNow::Full) => "full",
        }
    }

    /// Id and operation of what is being served: the head of the queue, or a THAW that is owed where it is
    /// that one's turn.
    pub fn open_request(&self) -> Option<(u64, u8)> {
        let owed = self.owed_thaw.filter(|_| self.owed_is_next());
        owed.map(|owed| (owed.id, op::THAW))
            .or(self.queue.head().map(|head| (head.id, head.operation)))
    }

    /// What the daemon is doing with it, in one word.
    pub fn stage_name(&self) -> &'static str {
        let stage = match self.owed_thaw {
            Some(owed) if owed.is_read() => Some(Stage::Read),
            Some(_) if !self.registered() => Some(Stage::Held),
            Some(_) if self.owed_is_next() => Some(Stage::Offered),
            _ => self.queue.head().map(|head| head.stage),
        };
        match stage {
            None => "idle",
            Some(Stage::Queued) => "queued",
            Some(Stage::Held) => "held",
            Some(Stage::Offered) => "offered",
            Some(Stage::Read) => "read",
        }
    }

    /// Whether the daemon has to do a THAW that is owed before the head of the queue.
    fn owed_is_next(&self) -> bool {
        let shown = |stage| matches!(stage, Stage::Offered | Stage::Read);
        self.owed_thaw.is_some() && !self.queue.head().is_some_and(|head| shown(head.stage))
    }
}
