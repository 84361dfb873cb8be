// SPDX-License-Identifier: GPL-2.0-only

//! Everything that can happen to the engine, as data, for tests that try it in any order.

use super::{vss_packet, World};
use hv_vss_engine::Refusal;
use hv_vss_uapi::{op, status};

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
    OverLong,
    Open,
    Release,
    /// v1, with a reply or without.
    RegisterV1(bool),
    RegisterV2,
    Read,
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
    Suspend,
    Resume,
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
}

/// Each event once.
pub const ALL: [Event; 27] = [
    Event::Ask(op::FREEZE),
    Event::Ask(op::THAW),
    Event::Ask(op::HOT_BACKUP),
    Event::Ask(op::GET_DM_INFO),
    Event::Negotiate,
    Event::Junk,
    Event::OverLong,
    Event::Open,
    Event::Release,
    Event::RegisterV1(true),
    Event::RegisterV1(false),
    Event::RegisterV2,
    Event::Read,
    Event::Peek,
    Event::Answer(Verdict::Ok),
    Event::Answer(Verdict::Fail),
    Event::Stray(Stray::OldId),
    Event::Stray(Stray::NextId),
    Event::Stray(Stray::OtherOperation),
    Event::Stray(Stray::V1),
    Event::Stray(Stray::Thawed),
    Event::Stray(Stray::Empty),
    Event::Thawed,
    Event::Tick,
    Event::Expire,
    Event::Suspend,
    Event::Resume,
];

impl World<'_> {
    /// Lets `event` happen; the promises are checked on the way.
    pub fn happen(&mut self, event: Event) {
        match event {
            Event::Ask(operation) => {
                self.ask(operation);
            }
            Event::Negotiate => {
                let before = self.answers.len();
                self.send(super::negotiation(&[(3, 0)], &[(5, 0)]));
                assert_eq!(
                    self.answers.len(),
                    before + 1,
                    "negotiation waits for nobody"
                );
            }
            Event::Junk => {
                self.send(vec![0xff; 24]);
            }
            Event::OverLong => {
                let request = self.send(vss_packet(op::FREEZE, &[0; 14_000]));
                assert_eq!(self.answered(request), Some(status::FAIL));
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
            Event::Read if self.open => {
                self.read_bytes();
            }
            Event::Peek if self.open => {
                let mut buffer = [0; hv_vss_uapi::MAX_FRAME];
                self.engine.peek(self.now, &mut buffer);
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
            // Both may come twice: to user space, and to the bus.
            Event::Suspend => self.suspend(),
            Event::Resume => self.resume(),
            Event::Release
            | Event::RegisterV1(_)
            | Event::RegisterV2
            | Event::Read
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
        };
        let refused: Result<(), Refusal> = self.write(&bytes);
        assert!(refused.is_err(), "{stray:?} was taken");
    }
}
