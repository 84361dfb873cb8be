// SPDX-License-Identifier: GPL-2.0-only

//! A host and a daemon around the engine, and the promises that are checked after every event.
//!
//! The promises are stated here once more and without a look into the engine, from what host and
//! daemon see:
//!
//! - a request is answered once, by its own bytes with status, flags and body flags set;
//! - its status is the one that the daemon gave for it, or "failed" when the daemon gave none;
//! - a THAW is answered with success only if the last successful FREEZE was still in force;
//! - with the clock alone, every request comes to its end.
#![allow(dead_code)] // each test file uses its part

pub mod events;

use hv_vss_engine::{Config, Effects, Engine, Note, Refusal, Shape, Subject, Token, QUEUE};
use hv_vss_uapi::{self as uapi, op, status};
use std::collections::BTreeMap;
use zerocopy::{FromBytes, IntoBytes};

/// A VSS packet as the host builds it: pipe header, IC header, VSS header, then `body`.
pub fn vss_packet(operation: u8, body: &[u8]) -> Vec<u8> {
    ic_packet(5, &[&[operation, 0, 0, 0, 0, 0, 0, 0], body].concat())
}

/// A packet of IC message type `kind`, padded to the 8 bytes that VMBus counts in.
pub fn ic_packet(kind: u16, message: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend(1u32.to_le_bytes());
    packet.extend((20 + message.len() as u32).to_le_bytes());
    for field in [3u16, 0, kind, 5, 0, message.len() as u16] {
        packet.extend(field.to_le_bytes());
    }
    packet.extend(0u32.to_le_bytes());
    packet.extend([7, 3, 0, 0]); // transaction id, transaction|request, reserved
    packet.extend(message);
    packet.resize(packet.len().next_multiple_of(8), 0);
    packet
}

/// A negotiation that offers these versions.
pub fn negotiation(frameworks: &[(u16, u16)], messages: &[(u16, u16)]) -> Vec<u8> {
    let mut message = Vec::new();
    message.extend((frameworks.len() as u16).to_le_bytes());
    message.extend((messages.len() as u16).to_le_bytes());
    message.extend([0; 4]);
    for (major, minor) in frameworks.iter().chain(messages) {
        message.extend(major.to_le_bytes());
        message.extend(minor.to_le_bytes());
    }
    ic_packet(0, &message)
}

/// The short requests of a real host: 24 bytes behind the VSS header.
pub fn request(operation: u8) -> Vec<u8> {
    if operation == op::FREEZE {
        freeze(2)
    } else {
        vss_packet(operation, &[0xaa; 16])
    }
}

/// A FREEZE at its full length that counts `luns` disks.
pub fn freeze(luns: u32) -> Vec<u8> {
    let mut body = vec![0u8; size_of::<uapi::FreezeInfo>()];
    body[0] = 3;
    body[8..12].copy_from_slice(&luns.to_le_bytes());
    body[12] = 1;
    vss_packet(op::FREEZE, &body)
}

/// Status and flags of a packet.
pub fn status_of(packet: &[u8]) -> u32 {
    u32::from_le_bytes(packet[20..24].try_into().unwrap())
}

/// The four bytes behind the VSS header.
pub fn body_flags(packet: &[u8]) -> u32 {
    u32::from_le_bytes(packet[36..40].try_into().unwrap())
}

pub fn frame(kind: u32, size: usize, id: u64) -> uapi::FrameHdr {
    uapi::FrameHdr {
        version: uapi::ABI_V2,
        size: size as u32,
        kind,
        reserved: 0,
        id,
    }
}

pub fn register() -> Vec<u8> {
    uapi::Register {
        frame: frame(uapi::frame::REGISTER, 32, 0),
        max_version: 2,
        features: 0,
    }
    .as_bytes()
    .to_vec()
}

pub fn answer(id: u64, operation: u8, status: u32) -> Vec<u8> {
    uapi::Answer {
        frame: frame(uapi::frame::ANSWER, 32, id),
        status,
        operation: operation.into(),
    }
    .as_bytes()
    .to_vec()
}

pub fn thawed(id: u64, reason: u32) -> Vec<u8> {
    uapi::Thawed {
        frame: frame(uapi::frame::THAWED, 32, id),
        reason,
        reserved: 0,
    }
    .as_bytes()
    .to_vec()
}

/// Writes down what the engine asks for.
#[derive(Default)]
pub struct Recorder {
    pub sent: Vec<(Vec<u8>, u64)>,
    pub notes: Vec<Note>,
    pub ring_full: bool,
}

impl Effects for Recorder {
    fn send(&mut self, packet: &[u8], request_id: u64) -> bool {
        self.sent.push((packet.to_vec(), request_id));
        !self.ring_full
    }
    fn note(&mut self, note: Note) {
        self.notes.push(note);
    }
}

/// What the host still waits for.
struct Waiting {
    packet: Vec<u8>,
    operation: u8,
    /// The id that the engine gave it, if it is one for the daemon.
    id: Option<u64>,
    /// What the daemon has said of it, once it has.
    verdict: Option<u32>,
}

/// A request as the daemon has read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// In v1 the daemon does not see it.
    pub id: u64,
    pub operation: u8,
    pub time_left_ms: u32,
    pub payload: usize,
}

/// Host, engine and daemon. Times are microseconds.
pub struct World<'a> {
    pub engine: Engine<&'a mut [u8]>,
    pub config: Config,
    pub now: u64,
    pub out: Recorder,
    pub answers: Vec<(u64, Vec<u8>)>,
    waiting: BTreeMap<u64, Waiting>,
    next_request: u64,
    next_status: u32,
    /// 0, or the ABI that the daemon registered with.
    abi: u32,
    open: bool,
    /// What the daemon read last and has not answered.
    pub in_hand: Option<Seen>,
    /// The id of the last successful FREEZE that the daemon knows of.
    pub frozen: Option<u64>,
    /// The last successful FREEZE is still in force, as far as anyone can know.
    in_force: bool,
    /// Since the last successful FREEZE something has ended it.
    spoilt: bool,
    suspended: bool,
    /// Off when the daemon writes bytes that this harness does not understand.
    pub strict: bool,
}

impl<'a> World<'a> {
    pub fn new(config: Config, store: &'a mut [u8]) -> Self {
        World {
            engine: Engine::new(config, store),
            config,
            now: 1_000_000,
            out: Recorder::default(),
            answers: Vec::new(),
            waiting: BTreeMap::new(),
            next_request: 1,
            next_status: 0x8123_0000,
            abi: 0,
            open: false,
            in_hand: None,
            frozen: None,
            in_force: false,
            spoilt: false,
            suspended: false,
            strict: true,
        }
    }

    /// The state of everything, without ids, times and packets.
    pub fn state(&self) -> (Shape, Option<u8>, [bool; 4]) {
        (
            self.engine.shape(),
            self.in_hand.map(|seen| seen.operation),
            [
                self.frozen.is_some(),
                self.in_force,
                self.spoilt,
                self.suspended,
            ],
        )
    }

    /// The host sends `packet`; returns its request id.
    pub fn send(&mut self, packet: Vec<u8>) -> u64 {
        let request_id = self.next_request;
        self.next_request += 1;
        let mut copy = packet.clone();
        if hv_vss_expects_answer(&packet) {
            let waiting = Waiting {
                operation: packet[28],
                packet,
                id: None,
                verdict: None,
            };
            self.waiting.insert(request_id, waiting);
        }
        self.out.notes.clear();
        self.engine
            .packet(self.now, &mut copy, request_id, &mut self.out);
        if let Some(Note::Received(Subject { id, .. })) = self.out.notes.first() {
            self.waiting.get_mut(&request_id).unwrap().id = Some(*id);
        }
        self.settle();
        request_id
    }

    /// The host asks for `operation`.
    pub fn ask(&mut self, operation: u8) -> u64 {
        self.send(request(operation))
    }

    /// The status of the answer to `request_id`, if there was one.
    pub fn answered(&self, request_id: u64) -> Option<u32> {
        let mut found = self.answers.iter().filter(|(id, _)| *id == request_id);
        found.next().map(|(_, packet)| status_of(packet))
    }

    pub fn open(&mut self) -> bool {
        let opened = self.engine.open();
        assert_eq!(opened, !self.open, "one opener at a time");
        self.open = true;
        self.settle();
        opened
    }

    pub fn release(&mut self) {
        assert!(self.open, "only what is open can be released");
        if self.abi != 0 && self.in_force {
            self.spoilt = true;
        }
        (self.open, self.abi, self.in_hand, self.frozen) = (false, 0, None, None);
        self.engine.release(self.now, &mut self.out);
        self.settle();
    }

    pub fn register_v1(&mut self, operation: u8) -> Result<(), Refusal> {
        self.write(uapi::VssMsg::new(operation).as_bytes())
    }

    pub fn register_v2(&mut self) -> Result<(), Refusal> {
        self.write(&register())
    }

    /// Opens, registers with v2 and reads the reply.
    pub fn daemon_v2(&mut self) {
        assert!(self.open());
        self.register_v2().unwrap();
        assert_eq!(self.read_bytes().map(|b| b.len()), Some(40));
    }

    /// Opens, registers with v1 and reads the reply.
    pub fn daemon_v1(&mut self) {
        assert!(self.open());
        self.register_v1(op::REGISTER1).unwrap();
        assert_eq!(self.read_bytes(), Some(129u32.to_ne_bytes().to_vec()));
    }

    /// A write as it comes; a refused one must leave no trace in the state.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let before = (self.engine.shape(), self.engine.deadline());
        let result = self.engine.write(self.now, bytes, &mut self.out);
        if result.is_err() {
            let after = (self.engine.shape(), self.engine.deadline());
            assert!(before == after, "a refused write changed something");
        }
        self.settle();
        result
    }

    /// What a read with a large buffer returns.
    pub fn read_bytes(&mut self) -> Option<Vec<u8>> {
        let mut buffer = vec![0u8; uapi::MAX_FRAME];
        let shown = self.engine.peek(self.now, &mut buffer);
        assert_eq!(shown.is_some(), self.engine.readable());
        let (len, token) = shown?;
        buffer.truncate(len);
        self.engine.taken(token, &mut self.out);
        self.settle();
        if let Token::Request(id) = token {
            self.in_hand = Some(self.parse(&buffer, id));
        }
        Some(buffer)
    }

    /// Reads a request.
    pub fn read(&mut self) -> Option<Seen> {
        self.in_hand = None;
        self.read_bytes()?;
        self.in_hand
    }

    fn parse(&self, bytes: &[u8], id: u64) -> Seen {
        if self.abi == 1 {
            let msg = uapi::VssMsg::read_from_bytes(bytes).unwrap();
            return Seen {
                id,
                operation: msg.hdr.operation,
                time_left_ms: 0,
                payload: 0,
            };
        }
        let (request, payload) = uapi::Request::read_from_prefix(bytes).unwrap();
        assert_eq!(request.frame.size as usize, bytes.len());
        assert_eq!(request.frame.id, id);
        assert_eq!(request.payload_size as usize, payload.len());
        Seen {
            id,
            operation: request.msg.hdr.operation,
            time_left_ms: request.time_left_ms,
            payload: payload.len(),
        }
    }

    /// The daemon answers `seen` with `code`.
    pub fn answer(&mut self, seen: Seen, code: u32) -> Result<(), Refusal> {
        // Set first, because the answer leaves within the write. A THAW made by suspend is nobody's.
        let mut asked = self.waiting.values_mut();
        let verdict = asked
            .find(|w| w.id == Some(seen.id))
            .map(|w| &mut w.verdict);
        if let Some(verdict) = verdict {
            *verdict = Some(code);
        }
        let bytes = if self.abi == 1 {
            uapi::VssMsg::answer_v1(code).as_bytes().to_vec()
        } else {
            answer(seen.id, seen.operation, code)
        };
        let result = self.write(&bytes);
        match result {
            Ok(()) => {
                if seen.operation == op::FREEZE && code == status::OK {
                    self.frozen = Some(seen.id);
                }
                self.in_hand = None;
            }
            Err(_) => {
                let mut asked = self.waiting.values_mut();
                if let Some(waiting) = asked.find(|w| w.id == Some(seen.id)) {
                    waiting.verdict = None;
                }
            }
        }
        result
    }

    /// Reads the next request, which must be `operation`, and answers it.
    pub fn serve(&mut self, operation: u8, code: u32) -> Seen {
        let seen = self.read().expect("a request is there");
        assert_eq!(seen.operation, operation);
        self.answer(seen, code).expect("the answer is in time");
        seen
    }

    /// A status that no other answer has.
    pub fn fresh_status(&mut self) -> u32 {
        self.next_status += 1;
        self.next_status
    }

    /// The daemon says that freeze `id` has ended.
    pub fn tell_thawed(&mut self, id: u64, reason: u32) -> Result<(), Refusal> {
        let result = self.write(&thawed(id, reason));
        if result.is_ok() {
            self.spoilt = true;
        }
        result
    }

    /// Time passes and the timer runs, as it would.
    pub fn pass(&mut self, us: u64) {
        self.now += us;
        self.engine.timer(self.now, &mut self.out);
        self.settle();
    }

    /// Time passes until the engine wanted to be called; false when no time is running.
    pub fn expire(&mut self) -> bool {
        let Some(deadline) = self.engine.deadline() else {
            return false;
        };
        self.pass(deadline.saturating_sub(self.now));
        true
    }

    pub fn suspend(&mut self) {
        self.suspended = true;
        self.in_hand = None;
        if self.in_force {
            self.spoilt = true;
        }
        self.engine.suspend(self.now, &mut self.out);
        self.settle();
        assert!(
            self.waiting.is_empty(),
            "a request is left open in the sleep"
        );
    }

    pub fn resume(&mut self) {
        self.suspended = false;
        self.engine.resume(self.now);
        self.settle();
    }

    /// Lets the clock end everything, and checks that it does so in time.
    pub fn drain(&mut self) {
        if self.suspended {
            self.resume();
        }
        let longest = u64::from(self.config.freeze_ms.max(self.config.other_ms));
        let limit = self.now + (longest + u64::from(self.config.grace_ms)) * 1000 * QUEUE as u64;
        while self.expire() {
            assert!(self.now <= limit, "a request outlives its time");
        }
        assert!(self.waiting.is_empty(), "a request was never answered");
        assert_eq!(self.engine.queued(), 0);
    }

    /// Checks what was sent, and the engine's own invariants.
    fn settle(&mut self) {
        self.engine.check().expect("an invariant");
        self.abi = self.engine.abi();
        for (packet, request_id) in std::mem::take(&mut self.out.sent) {
            if packet[12] == 0 {
                self.answers.push((request_id, packet));
                continue; // a negotiation; its own tests look at it
            }
            let waiting = self
                .waiting
                .remove(&request_id)
                .expect("an answer to a request that waits, and only one");
            self.check_answer(&waiting, &packet);
            self.answers.push((request_id, packet));
        }
    }

    fn check_answer(&mut self, request: &Waiting, packet: &[u8]) {
        if !self.strict {
            return;
        }
        let code = status_of(packet);
        assert_eq!(packet[25], 5, "flags: transaction, response");

        let mut expected = request.packet.clone();
        expected[20..24].copy_from_slice(&code.to_le_bytes());
        expected[25] = 5;
        let flags = match request.operation {
            op::HOT_BACKUP if code == status::OK => Some(uapi::HBU_NO_AUTO_RECOVERY),
            op::GET_DM_INFO => Some(0),
            _ => None,
        };
        if let (Some(flags), Some(place)) = (flags, expected.get_mut(36..40)) {
            place.copy_from_slice(&flags.to_le_bytes());
        }
        assert!(expected == packet, "the answer is the request's own bytes");

        match request.operation {
            op::FREEZE | op::THAW | op::HOT_BACKUP => {
                let verdict = request.verdict.unwrap_or(status::FAIL);
                let spoilt_thaw = request.operation == op::THAW && self.spoilt;
                if spoilt_thaw {
                    assert_ne!(code, status::OK, "a broken backup reported as good");
                }
                assert!(
                    code == verdict || (spoilt_thaw && code == status::FAIL),
                    "status {code:#x}, the daemon said {verdict:#x}"
                );
            }
            _ => assert_eq!(code, status::OK),
        }
        match request.operation {
            op::FREEZE if code == status::OK => (self.in_force, self.spoilt) = (true, false),
            // The daemon rolled it back, and with it what was frozen before. A FREEZE that never
            // reached the daemon does not count.
            op::FREEZE if self.in_force && self.engine.freeze_state() == "broken" => {
                self.spoilt = true;
            }
            op::THAW if code == status::OK => self.in_force = false,
            _ => {}
        }
    }
}

/// Whether a packet of these tests is a VSS message that has to be answered.
fn hv_vss_expects_answer(packet: &[u8]) -> bool {
    packet.len() >= 36 && packet[12..14] == [5, 0]
}
