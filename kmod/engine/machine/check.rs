// SPDX-License-Identifier: GPL-2.0

//! For tests: the state as a value, and the invariants as a function. Not part of the module.

use super::super::QUEUE;
use super::daemon::Daemon;
use super::op;
use super::Engine;
use super::Freeze;
use super::Request;
use super::Stage;
use core::ops::DerefMut;

/// See [`Engine::shape`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    requests: [Option<(u8, Stage, bool)>; QUEUE],
    daemon: Daemon,
    reply_waits: bool,
    /// Whether it is for a FREEZE, and whether behind a THAW.
    notice_waits: Option<(bool, bool, bool)>,
    quiet: bool,
    /// Whether it is for a FREEZE.
    holds: Option<bool>,
    emptied: bool,
    freeze: &'static str,
    held: bool,
    told: bool,
    unseen: bool,
    owed_thaw: Option<bool>,
    deserted: bool,
    calling_off: bool,
    sleeping: bool,
}

impl<B: DerefMut<Target = [u8]>> Engine<B> {
    /// The state without ids, times and packets, for tests that visit each state once.
    pub fn shape(&self) -> Shape {
        let mut requests = [None; QUEUE];
        for (place, request) in requests.iter_mut().zip(self.queue.iter()) {
            *place = Some((request.operation, request.stage, request.shown));
        }
        Shape {
            requests,
            daemon: self.daemon,
            reply_waits: self.reply_waits,
            notice_waits: self
                .notice
                .map(|it| (it.id != 0, it.behind.is_some(), it.is_open())),
            quiet: self.quiet_since.is_some(),
            holds: self.hold.map(|id| id != 0),
            emptied: self.emptied.is_some_and(|id| self.is_making(id)),
            freeze: self.freeze.as_str(),
            held: self.freeze.held().is_some(),
            told: self.freeze == (Freeze::Broken { told: true }),
            unseen: self.freeze == Freeze::Unseen,
            owed_thaw: self.owed_thaw.map(|owed| owed.is_read()),
            deserted: self.owed_thaw.is_some_and(|owed| owed.deserted),
            calling_off: self.calling_off,
            sleeping: self.sleeping,
        }
    }

    /// The place for packets, for another machine.
    pub fn into_store(self) -> B {
        self.queue.into_store()
    }

    /// The same machine once more, with its packets in `store`.
    pub fn copy(&self, store: B) -> Self {
        Engine {
            queue: self.queue.copy(store),
            ..*self
        }
    }

    /// The THAW that the daemon is given without the host asking for one: its id, and whether it has
    /// been read.
    pub fn owed_thaw(&self) -> Option<(u64, bool)> {
        self.owed_thaw.map(|owed| (owed.id, owed.is_read()))
    }

    /// Checks the invariants of the type; tests call it after each event.
    ///
    /// # Errors
    ///
    /// Names the one that does not hold.
    pub fn check(&self) -> Result<(), &'static str> {
        self.queue.check()?;
        for (at, request) in self.queue.iter().enumerate() {
            let Request { stage, shown, .. } = *request;
            if at > 0 && (stage != Stage::Queued || shown) {
                return Err("not the head, and shown");
            }
            if shown && !self.registered() {
                return Err("shown to nobody");
            }
            if request.is_read() && !shown {
                return Err("read, and not shown");
            }
            if at == 0 && (stage == Stage::Held) == self.registered() {
                return Err("stage and daemon disagree");
            }
        }
        let must = |holds: bool, or: &'static str| if holds { Ok(()) } else { Err(or) };
        let registered = self.registered();
        let head_is_read = self.queue.head().is_some_and(Request::is_read);
        let owed_is_read = self.owed_thaw.is_some_and(|owed| owed.is_read());
        let thaw_to_come = self.owed_thaw.is_some() || self.is_doing(op::THAW);
        let held = self.freeze.held().is_some();
        let holds = self.hold.is_some();
        must(!(head_is_read && owed_is_read), "two things in hand")?;
        must(registered || !owed_is_read, "a THAW in nobody's hands")?;
        let deserted = self.owed_thaw.is_some_and(|owed| owed.deserted);
        must(!(registered && deserted), "a THAW whose daemon is there")?;
        must(registered || !held, "a freeze without a daemon")?;
        must(self.owed_thaw.is_none() || !held, "a freeze and its THAW")?;
        must(
            !held || !self.sleeping || self.thaw_is_sent(),
            "a freeze in the sleep",
        )?;
        must(
            self.daemon == Daemon::V2 || !holds,
            "a hold without a daemon",
        )?;
        let ended = self.notice.is_some_and(|notice| notice.id != 0);
        must(!(holds && ended), "a hold that has ended")?;
        let message = self.reply_waits || self.notice.is_some();
        must(registered || !message, "a message for nobody")?;
        must(
            registered || self.quiet_since.is_some(),
            "nobody, and not quiet",
        )?;
        must(
            thaw_to_come || !self.calling_off,
            "a FREEZE called off by nothing",
        )
    }
}
