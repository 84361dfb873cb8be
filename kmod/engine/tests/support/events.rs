// SPDX-License-Identifier: GPL-2.0-only

//! Everything that can happen to the engine, as data, for tests that try it in any order.

use super::{vss_packet, World};
use hv_vss_engine::Refusal;
use hv_vss_uapi::{op, status, thawed};

/// Something that happens. What does not apply in a state (a release of a closed device) is passed
/// over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The host asks for an operation.
    Ask(u8),
    /// The host negotiates.
    Negotiate,
    /// The host sends what is no VSS message.
    Junk,
    /// The host sends a request longer than is kept.
    OverLong(u8),
    Open,
    Release,
    /// v1, with a reply or without.
    RegisterV1(bool),
    RegisterV2,
    Read,
    /// The daemon reads, and before it has what it is given something happens.
    SlowRead(Gap),
    /// A read that fails after the engine has shown the frame.
    Peek,
    /// The daemon answers what it has read last.
    Answer(Verdict),
    /// The daemon answers something else: another id, another operation, out of the blue.
    Stray(Stray),
    /// The daemon says that its freeze has ended.
    Thawed,
    /// Time passes, not enough for anything.
    Tick,
    /// Time passes until the next limit.
    Expire,
    /// The daemon begins to read.
    Alive,
    /// The daemon has the module freeze something for the FREEZE in hand.
    Hold,
    /// ... which fails: nothing is frozen.
    HoldFails,
    /// ... for nobody.
    Rehearse,
    /// The daemon has the module thaw that.
    ThawHeld,
    /// ... one of it, and keeps the rest.
    ThawOne,
    /// ... all that is held for nobody, as it does after a rehearsal.
    ThawRehearsed,
    /// The module thaws that by itself.
    Lose,
    /// The machine prepares to sleep.
    PrepareSleep,
    /// The channel closes for the sleep, and is opened again before the machine is awake.
    Close,
    Reopen,
    Resume,
    /// The device goes, and another one comes.
    NextDevice,
}

/// Whether the host hears what it is sent meanwhile. When it takes its device back it does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    Hears,
    IsDeaf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Ok,
    /// A failure with a status that no other answer has.
    Fail,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stray {
    OldId,
    NextId,
    OtherOperation,
    V1,
    Thawed,
    Empty,
    /// A hold for a request that is not in hand.
    Hold,
}

/// What happens in the middle of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gap {
    /// The host asks for a THAW.
    Thaw,
    Expire,
    Lose,
    PrepareSleep,
    Close,
    /// Another thread of the daemon answers what it has in hand.
    Answer,
    /// ... has something frozen for it.
    Hold,
    /// ... has the module thaw all that.
    ThawHeld,
    /// ... all that is held for nobody.
    ThawRehearsed,
}

impl Gap {
    fn event(self) -> Event {
        match self {
            Gap::Thaw => Event::Ask(op::THAW),
            Gap::Expire => Event::Expire,
            Gap::Lose => Event::Lose,
            Gap::PrepareSleep => Event::PrepareSleep,
            Gap::Close => Event::Close,
            Gap::Answer => Event::Answer(Verdict::Ok),
            Gap::Hold => Event::Hold,
            Gap::ThawHeld => Event::ThawHeld,
            Gap::ThawRehearsed => Event::ThawRehearsed,
        }
    }
}

/// Each event once.
pub const ALL: [Event; 49] = [
    Event::Ask(op::FREEZE),
    Event::Ask(op::THAW),
    Event::Ask(op::HOT_BACKUP),
    Event::Ask(op::GET_DM_INFO),
    Event::Negotiate,
    Event::Junk,
    Event::OverLong(op::FREEZE),
    Event::OverLong(op::THAW),
    Event::Open,
    Event::Release,
    Event::RegisterV1(true),
    Event::RegisterV1(false),
    Event::RegisterV2,
    Event::Read,
    Event::SlowRead(Gap::Thaw),
    Event::Peek,
    Event::Answer(Verdict::Ok),
    Event::Answer(Verdict::Fail),
    Event::Stray(Stray::OldId),
    Event::Stray(Stray::NextId),
    Event::Stray(Stray::OtherOperation),
    Event::Stray(Stray::V1),
    Event::Stray(Stray::Thawed),
    Event::Stray(Stray::Empty),
    Event::Stray(Stray::Hold),
    Event::Thawed,
    Event::Tick,
    Event::Expire,
    Event::Alive,
    Event::Hold,
    Event::Rehearse,
    Event::ThawHeld,
    Event::Lose,
    Event::PrepareSleep,
    Event::Close,
    Event::Reopen,
    Event::Resume,
    Event::SlowRead(Gap::Expire),
    Event::SlowRead(Gap::Lose),
    Event::SlowRead(Gap::PrepareSleep),
    Event::SlowRead(Gap::Close),
    Event::ThawOne,
    Event::HoldFails,
    Event::SlowRead(Gap::Answer),
    Event::SlowRead(Gap::Hold),
    Event::SlowRead(Gap::ThawHeld),
    Event::NextDevice,
    Event::ThawRehearsed,
    Event::SlowRead(Gap::ThawRehearsed),
];

impl World<'_> {
    /// Lets `event` happen; the promises are checked on the way.
    pub fn happen(&mut self, event: Event, host: Host) {
        self.out.ring_full = host == Host::IsDeaf;
        self.happens(event);
        self.out.ring_full = false;
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::Ask(operation) if self.channel => {
                self.send(vss_packet(operation, &[0xaa; 16]));
            }
            Event::Negotiate if self.channel => {
                let before = self.answers.len();
                self.send(super::negotiation(&[(3, 0)], &[(5, 0)]));
                assert_eq!(
                    self.answers.len(),
                    before + 1,
                    "negotiation waits for nobody"
                );
            }
            Event::Junk if self.channel => {
                self.send(vec![0xff; 24]);
            }
            Event::OverLong(operation) if self.channel => {
                let request = self.send(vss_packet(operation, &[0; 14_000]));
                let heard = (!self.out.ring_full).then_some(status::FAIL);
                assert_eq!(self.answered(request), heard);
            }
            Event::Open => {
                self.open();
            }
            Event::Release if self.open => self.release(),
            Event::RegisterV1(reply) if self.open => {
                let operation = if reply { op::REGISTER1 } else { op::REGISTER };
                // From a v1 daemon these bytes are an answer, with a status of 128 or 129.
                if self.abi == 1 {
                    if let Some(seen) = self.in_hand {
                        let _ = self.answer(seen, operation.into());
                        return;
                    }
                }
                let fresh = self.abi == 0;
                assert_eq!(self.register_v1(operation).is_ok(), fresh);
            }
            Event::RegisterV2 if self.open => {
                let fresh = self.abi == 0;
                assert_eq!(self.register_v2().is_ok(), fresh);
            }
            // A v1 daemon reads and answers in turn.
            Event::Read if self.open && (self.abi == 2 || self.in_hand.is_none()) => {
                self.read_bytes();
            }
            Event::SlowRead(gap) if self.open => {
                if self.abi == 2 || self.in_hand.is_none() {
                    if let Some((bytes, token)) = self.peek() {
                        self.happens(gap.event());
                        self.take(&bytes, token);
                    }
                }
            }
            Event::Peek if self.open => {
                self.peek();
            }
            Event::Answer(verdict) if self.open => {
                let code = match verdict {
                    Verdict::Ok => status::OK,
                    Verdict::Fail => self.fresh_status(),
                };
                if let Some(seen) = self.in_hand {
                    let _ = self.answer(seen, code);
                }
            }
            Event::Stray(stray) if self.open => self.stray(stray),
            Event::Thawed if self.open => {
                if let Some(id) = self.frozen {
                    let _ = self.tell_thawed(id, 1);
                }
            }
            Event::Tick => self.pass(1),
            Event::Expire => {
                self.expire();
            }
            Event::Alive if self.open => self.alive(),
            Event::Hold if self.open => {
                if let Some(seen) = self.in_hand {
                    let freezes = seen.operation == op::FREEZE && self.is_open(seen);
                    let allowed = self.config.max_held > 0 && self.abi == 2 && freezes;
                    assert_eq!(self.hold(seen.id).is_ok(), allowed);
                }
            }
            Event::HoldFails if self.open => {
                if let Some(seen) = self.in_hand {
                    let _ = self.hold_fails(seen.id);
                }
            }
            Event::Rehearse if self.open => {
                if self.hold(0).is_ok() {
                    assert!(self.abi == 2 && self.config.max_held > 0);
                }
            }
            Event::ThawHeld if self.open => {
                assert_eq!(self.thaw_held().is_ok(), self.abi == 2);
            }
            Event::ThawRehearsed if self.open => {
                assert_eq!(self.thaw_all_for(0).is_ok(), self.abi == 2);
            }
            // The module does so only with what it holds.
            Event::ThawOne if self.by_module.is_some() => {
                assert_eq!(self.thaw_one(), Ok(()));
            }
            // The module says so only of what it holds.
            Event::Lose if self.by_module.is_some() => self.lose(thawed::DEADLINE),
            Event::PrepareSleep => self.prepare_sleep(),
            Event::Close if self.channel => self.close(thawed::SLEEP),
            Event::Reopen => self.channel = true,
            Event::Resume => self.resume(),
            Event::NextDevice => self.next_device(),
            Event::Ask(_)
            | Event::Negotiate
            | Event::Junk
            | Event::OverLong(_)
            | Event::Alive
            | Event::Hold
            | Event::HoldFails
            | Event::Rehearse
            | Event::ThawHeld
            | Event::ThawOne
            | Event::ThawRehearsed
            | Event::Lose
            | Event::Close
            | Event::Release
            | Event::RegisterV1(_)
            | Event::RegisterV2
            | Event::Read
            | Event::SlowRead(_)
            | Event::Peek
            | Event::Answer(_)
            | Event::Stray(_)
            | Event::Thawed => {}
        }
    }

    fn stray(&mut self, stray: Stray) {
        let (id, operation) = self
            .in_hand
            .map_or((0, op::FREEZE), |s| (s.id, s.operation));
        let bytes = match stray {
            Stray::OldId => super::answer(id.wrapping_sub(1), operation, 0),
            Stray::NextId => super::answer(id.wrapping_add(1), operation, 0),
            Stray::OtherOperation => super::answer(id, operation ^ 3, 0),
            // In v1 this is an answer like any other as long as a request is in hand.
            Stray::V1 if self.abi == 1 && self.in_hand.is_some() => return,
            Stray::V1 => vec![0; 12],
            Stray::Thawed => super::thawed(u64::MAX, 1),
            Stray::Empty => Vec::new(),
            Stray::Hold => {
                assert!(self.hold(id.wrapping_add(1)).is_err());
                return;
            }
        };
        let refused: Result<(), Refusal> = self.write(&bytes);
        assert!(refused.is_err(), "{stray:?} was taken");
    }
}
