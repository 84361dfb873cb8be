// SPDX-License-Identifier: GPL-2.0-only

//! The host's part in one backup, and what it was told. Judges one thing: whether a backup that was
//! called good was one.

use super::fault::DEADLINE;
use crate::cases::frozen_us;
use anyhow::Result;
use e2e::guest::{Guest, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::ic::vss::{Op, SHORT_BODY};
use hyperv_sim::{HostError, Tx};
use lab_agent::Writer;
use std::time::Duration;

/// What the host says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    HotBackup,
    Freeze,
    Thaw,
}

impl Message {
    fn letter(self) -> &'static str {
        match self {
            Message::HotBackup => "H",
            Message::Freeze => "F",
            Message::Thaw => "T",
        }
    }
}

/// A request, and what came of it.
struct Asked {
    message: Message,
    /// As long as there may be an answer.
    tx: Option<Tx>,
    told: Option<u32>,
    /// The host had to wait longer than it waits.
    late: bool,
    /// For a THAW that ends a window: what was written in it.
    written: Vec<String>,
}

/// One backup, from the host's side.
pub struct Dialogue<'a> {
    guest: &'a Guest,
    asked: Vec<Asked>,
    /// FREEZE was good, and THAW is to come: what the writers had done by then.
    window: Option<Vec<Writer>>,
    /// On the guest's clock.
    thaw_sent: Option<u64>,
}

impl<'a> Dialogue<'a> {
    pub fn new(guest: &'a Guest) -> Self {
        Dialogue {
            guest,
            asked: Vec::new(),
            window: None,
            thaw_sent: None,
        }
    }

    /// Says this and does not wait for the answer. Says whether it could be said.
    pub fn ask(&mut self, message: Message) -> Result<bool> {
        let vss = self.guest.vss();
        let mut written = Vec::new();
        if let (Message::Thaw, Some(first)) = (message, &self.window) {
            written = written_since(first, &self.guest.writers()?);
            self.thaw_sent = Some(self.guest.clock()?);
        }
        let sent = match message {
            Message::HotBackup => vss.send(Op::HOT_BACKUP, &SHORT_BODY),
            Message::Freeze => vss.send_freeze(&[]),
            Message::Thaw => vss.send(Op::THAW, &SHORT_BODY),
        };
        let tx = match sent {
            Ok(tx) => tx,
            Err(HostError::NotOpen { .. } | HostError::GuestGone { .. }) => {
                self.thaw_sent = None;
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        };
        if message == Message::Thaw {
            self.window = None;
        }
        self.asked.push(Asked {
            message,
            tx: Some(tx),
            told: None,
            late: false,
            written,
        });
        Ok(true)
    }

    /// Waits for what is open, each at most so long. What comes later is heard by the next call.
    pub fn listen(&mut self, limit: Duration) -> Result<()> {
        for at in 0..self.asked.len() {
            let Some(asked) = self.asked.get_mut(at) else {
                break;
            };
            let Some(tx) = asked.tx.take() else { continue };
            match self.guest.vss().wait(tx, limit) {
                Ok(reply) => asked.told = Some(reply.status()),
                Err(HostError::Timeout { .. }) => {
                    asked.tx = Some(tx);
                    asked.late = true;
                    continue;
                }
                Err(
                    HostError::NotOpen { .. }
                    | HostError::GuestGone { .. }
                    | HostError::UnknownTransaction { .. },
                ) => {}
                Err(error) => return Err(error.into()),
            }
            let good = asked.told == Some(status::OK);
            // A THAW that is under way will end it.
            let ends = |it: &Asked| it.message == Message::Thaw;
            let frozen = self
                .asked
                .get(at)
                .is_some_and(|it| it.message == Message::Freeze);
            let over = self.asked.iter().skip(at + 1).any(ends);
            if good && frozen && !over && self.window.is_none() {
                self.window = Some(self.guest.writers()?);
            }
        }
        Ok(())
    }

    /// The host takes its time, long enough to tell who stands still from who was only slow.
    pub fn take_snapshot(&self) -> Result<()> {
        let guest = self.guest;
        // And never as long as the deadline, which goes by no machine.
        let while_copied = (2 * frozen_us(guest)).min(DEADLINE.as_micros() as u64 / 2);
        let over = guest.clock()? + while_copied;
        guest.wait_until("the snapshot is taken", STEP, || Ok(guest.clock()? > over))
    }

    /// Whether FREEZE was good, and no THAW has been said since.
    pub fn is_frozen(&self) -> bool {
        self.window.is_some()
    }

    /// How much has been said.
    pub fn len(&self) -> usize {
        self.asked.len()
    }

    /// Whether anybody has been asked to freeze.
    pub fn has_begun(&self) -> bool {
        self.asked.iter().any(|it| it.message == Message::Freeze)
    }

    /// What the host was told last.
    pub fn last(&self) -> Option<u32> {
        self.asked.last().and_then(|it| it.told)
    }

    /// Whether all that was asked was answered, and well.
    pub fn is_all_good(&self) -> bool {
        self.asked.iter().all(|it| it.told == Some(status::OK))
    }

    /// When THAW was sent, on the guest's clock.
    pub fn thaw_sent(&self) -> Option<u64> {
        self.thaw_sent
    }

    /// What was wrong: a backup that was called good although something was written in its window, unless it was to
    /// what `is_left_out`, as the daemon has said; a packet that answers nothing, such as a second answer.
    pub fn wrong(&self, is_left_out: impl Fn(&str) -> bool) -> Vec<String> {
        let good = self.asked.iter().filter(|it| it.told == Some(status::OK));
        let written = good.flat_map(|it| &it.written);
        let mut wrong: Vec<String> = written
            .filter(|it| !is_left_out(it))
            .map(|it| format!("called good, but written in the window: {it}"))
            .collect();
        let strays = self.guest.vss().take_strays();
        let strays = strays
            .iter()
            .map(|it| format!("answers nothing: {it:02x?}"));
        wrong.extend(strays);
        wrong
    }

    /// What the host was told, in words.
    pub fn words(&self) -> String {
        let word = |it: &Asked| {
            let told = match it.told {
                Some(status::OK) => "ok".to_owned(),
                Some(status::FAIL) => "fail".to_owned(),
                Some(other) => format!("{other:#x}"),
                None => "none".to_owned(),
            };
            let late = match it.told.is_some() && it.late {
                true => "late ",
                false => "",
            };
            format!("{} {late}{told}", it.message.letter())
        };
        let words: Vec<String> = self.asked.iter().map(word).collect();
        words.join(", ")
    }

    /// Goes on as a host does that hears these answers: a good FREEZE has its THAW.
    pub fn finish(&mut self, limit: Duration, says_thaw: bool) -> Result<()> {
        self.listen(limit)?;
        if !self.has_begun() && self.ask(Message::Freeze)? {
            self.listen(limit)?;
        }
        while says_thaw && self.is_frozen() {
            self.take_snapshot()?;
            if !self.ask(Message::Thaw)? {
                break;
            }
            self.listen(limit)?;
        }
        Ok(())
    }
}

/// What was written since: one write may have returned just before the freeze and been counted after the
/// first look.
fn written_since(first: &[Writer], last: &[Writer]) -> Vec<String> {
    let pairs = first.iter().zip(last);
    let moved = pairs.filter(|(first, last)| last.count > first.count + 1);
    moved
        .map(|(first, last)| format!("{} ({} times)", last.path, last.count - first.count))
        .collect()
}
