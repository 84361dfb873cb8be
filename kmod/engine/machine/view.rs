// SPDX-License-Identifier: GPL-2.0

//! What can be seen of the machine from outside. Changes nothing.

use super::Engine;
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

    /// Id and operation of the request that is being served.
    pub fn open_request(&self) -> Option<(u64, u8)> {
        self.queue.head().map(|head| (head.id, head.operation))
    }

    /// Number of open requests.
    pub fn queued(&self) -> usize {
        self.queue.iter().count()
    }

    /// The freeze in one word.
    pub fn freeze_state(&self) -> &'static str {
        self.freeze.as_str()
    }

    /// What the daemon is doing with the head, in one word.
    pub fn stage_name(&self) -> &'static str {
        match self.queue.head().map(|head| head.stage) {
            None => "idle",
            Some(Stage::Queued) => "queued",
            Some(Stage::Held) => "held",
            Some(Stage::Offered) => "offered",
            Some(Stage::Read) => "read",
        }
    }

    /// The THAW that the daemon is given without the host asking for one: its id, and whether it has
    /// been read.
    pub fn owed_thaw(&self) -> Option<(u64, bool)> {
        self.owed_thaw.map(|owed| (owed.id, owed.is_read()))
    }
}
