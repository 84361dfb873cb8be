// SPDX-License-Identifier: GPL-2.0-only

//! A host and a daemon around the engine, and the promises that are checked after every event.
//!
//! The promises are stated here once more and without a look into the engine, from what host and
//! daemon see:
//!
//! - a request is answered once, by its own bytes with status, flags and body flags set;
//! - its status is the one that the daemon gave for it, or "failed" when the daemon gave none, or when
//!   it is a THAW and the host counts on a freeze that did not last, or may count on one that was before
//!   the module was loaded;
//! - a freeze has to last until the host has sent its THAW. What is thawed after that breaks it no more, as long
//!   as its daemon is there to answer for it;
//! - that happens within its time, and, as long as nobody serves requests, within the grace time, or, where a daemon
//!   is there, within [`WAKE_MS`] if that is longer;
//! - what is frozen has a way out: a freeze in force ends with the host's THAW, one that is being made
//!   with its time; all else is thawed by the module, or by a THAW that the daemon can read;
//! - a daemon for which the module has thawed something reads that, once, and no earlier than a THAW that the host
//!   had sent before;
//! - a machine that prepares to sleep is told that all is thawed only when it is, or when nobody has
//!   come in the grace time, or in [`REOPEN_MS`], who could thaw it, and then at once.
#![allow(dead_code)] // each test file uses its part

pub mod events;

use hv_vss_engine::{Config, Effects, Engine, Left, Note, Refusal, Token};
use hv_vss_uapi::{self as uapi, op, status, thawed};
use std::collections::{BTreeMap, BTreeSet};
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
    /// What the host has heard, and what it could not hear.
    pub sent: Vec<(Vec<u8>, u64, bool)>,
    pub notes: Vec<Note>,
    pub let_go: Vec<u32>,
    pub ring_full: bool,
    /// How many packets it wanted to send.
    pub sends: usize,
    /// Whether the module holds anything.
    holds: bool,
}

impl Effects for Recorder {
    fn send(&mut self, packet: &[u8], request_id: u64) -> bool {
        self.sends += 1;
        self.sent
            .push((packet.to_vec(), request_id, !self.ring_full));
        !self.ring_full
    }
    fn let_go(&mut self, reason: u32) -> bool {
        let held = std::mem::take(&mut self.holds);
        if held {
            self.let_go.push(reason);
        }
        held
    }
    fn note(&mut self, note: Note) {
        self.notes.push(note);
    }
}

/// What the host still waits for.
#[derive(Clone)]
struct Waiting {
    packet: Vec<u8>,
    operation: u8,
    arrived: u64,
    /// How long it waits for somebody who serves requests: nobody has since it arrived.
    wait_ms: Option<u32>,
    /// The id that the engine gave it, if it is one for the daemon.
    id: Option<u64>,
    /// A read has been shown it, which may or may not have gone well.
    shown: bool,
    read: bool,
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

/// What the host believes of its freeze, and what it would be wrong to tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Backup {
    /// It has no freeze, or knows that it has ended.
    None,
    /// Nobody here knows: the module was loaded since its last FREEZE.
    Unseen,
    /// It was told that its FREEZE succeeded, and that is still so.
    Good,
    /// That is not so any more, for the daemon has thawed one. The rest stands still until the THAW.
    Torn,
    /// That is not so any more, or it waits in vain to be told how its FREEZE ended.
    Spoilt,
    /// It was told so by a THAW that failed.
    Told,
}

/// What the host believes whose last device has left this.
fn believed(left: Left) -> Backup {
    match left {
        Left {
            broken: true,
            told: false,
            ..
        } => Backup::Spoilt,
        Left { broken: true, .. } => Backup::Told,
        Left { unseen: true, .. } => Backup::Unseen,
        Left { .. } => Backup::None,
    }
}

/// How long a daemon that was to thaw is waited for before the machine sleeps, however short the grace time.
const REOPEN_MS: u32 = 2_000;

/// How long one that is there and has let a request run out is waited for, however short the grace time.
pub const WAKE_MS: u32 = 1_000;

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
    backup: Backup,
    /// The daemon may have frozen something by itself, also beside what it has in the module.
    by_daemon: bool,
    /// What it has in the module: the id that it gave for it.
    by_module: Option<u64>,
    /// The ids for which the module holds something.
    held_for: BTreeSet<u64>,
    /// All that was held for the FREEZE in hand the daemon has had thawed, and nothing is held since.
    emptied: bool,
    /// What it has to be told of that: the id, and why it has ended.
    untold: Option<(u64, u32)>,
    /// The last THAW that the host had sent before that, and the first one, if all was well with its freeze.
    sent_before: Option<u64>,
    behind: Option<u64>,
    /// It is just saying itself that all is thawed.
    says_so: bool,
    /// It works on a FREEZE that has been failed.
    late: bool,
    /// Nobody serves requests.
    quiet: bool,
    /// When the last daemon has gone.
    left: u64,
    sleeping: bool,
    pub channel: bool,
    /// Off when the daemon writes bytes that this harness does not understand.
    pub strict: bool,
}

impl<'a> World<'a> {
    pub fn new(config: Config, store: &'a mut [u8]) -> Self {
        World::after(config, store, Left::default())
    }

    /// The device has come back after one that has left this.
    pub fn after(config: Config, store: &'a mut [u8], left: Left) -> Self {
        let mut world = World {
            engine: Engine::new(config, store, left),
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
            backup: believed(left),
            by_daemon: left.owes_thaw,
            by_module: None,
            held_for: BTreeSet::new(),
            emptied: false,
            untold: None,
            sent_before: None,
            behind: None,
            says_so: false,
            late: false,
            quiet: true,
            left: 0,
            sleeping: false,
            channel: true,
            strict: true,
        };
        world.tick(world.now);
        world
    }

    /// All of it once more, with the engine's packets in `store`, but for what was sent and noted until now.
    pub fn copy(&self, store: &'a mut [u8]) -> Self {
        World {
            engine: self.engine.copy(store),
            out: Recorder {
                holds: self.out.holds,
                ..Recorder::default()
            },
            answers: Vec::new(),
            waiting: self.waiting.clone(),
            held_for: self.held_for.clone(),
            ..*self
        }
    }

    /// The state of everything, without ids, times and packets.
    pub fn state(&self) -> impl std::hash::Hash + Eq {
        (
            self.engine.shape(),
            self.in_hand
                .map(|seen| (seen.operation, self.is_open(seen))),
            self.backup,
            [
                self.frozen.is_some(),
                self.by_daemon,
                self.hears_of_it(),
                self.late,
                self.by_module.is_some(),
                self.held_for.contains(&0),
                self.held_for.iter().any(|id| *id != 0),
                self.emptied,
                self.channel,
            ],
        )
    }

    // --- The host ---

    /// The host sends `packet`; returns its request id.
    pub fn send(&mut self, packet: Vec<u8>) -> u64 {
        let request_id = self.next_request;
        self.next_request += 1;
        let mut copy = packet.clone();
        let vss = is_vss(&packet);
        let operation = if vss { packet[28] } else { u8::MAX };
        if vss {
            let least_ms = if self.abi != 0 { WAKE_MS } else { 0 };
            let waiting = Waiting {
                operation,
                packet,
                arrived: self.now,
                wait_ms: self.quiet.then_some(self.config.grace_ms.max(least_ms)),
                id: None,
                shown: false,
                read: false,
                verdict: None,
            };
            self.waiting.insert(request_id, waiting);
        }
        self.out.notes.clear();
        self.engine
            .packet(self.now, &mut copy, request_id, &mut self.out);
        let mut leaves_a_word = false;
        for note in &self.out.notes {
            match note {
                Note::Received(subject) if subject.transaction == request_id => {
                    self.waiting.get_mut(&request_id).unwrap().id = Some(subject.id);
                    leaves_a_word = true;
                }
                Note::Refused { subject, .. } if subject.transaction == request_id => {
                    leaves_a_word = true;
                }
                _ => {}
            }
        }
        if matches!(operation, op::FREEZE | op::THAW | op::HOT_BACKUP) {
            assert!(leaves_a_word, "failed without a word");
        }
        self.settle();
        if self.strict && operation == op::THAW {
            let open = self.waiting.values().filter(|w| w.operation == op::FREEZE);
            assert_eq!(open.count(), 0, "a FREEZE is open behind which a THAW came");
        }
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

    // --- The daemon ---

    pub fn open(&mut self) -> bool {
        let opened = self.engine.open();
        assert_eq!(opened, !self.open, "one opener at a time");
        self.open = true;
        self.settle();
        opened
    }

    pub fn release(&mut self) {
        assert!(self.open, "only what is open can be released");
        if self.abi != 0 {
            self.spoil();
            // Those that wait do so for the next daemon from now on.
            self.sign_of_life();
            (self.quiet, self.left) = (true, self.now);
        }
        (self.open, self.in_hand, self.frozen, self.late) = (false, None, None, false);
        for waiting in self.waiting.values_mut() {
            waiting.shown = waiting.read;
        }
        self.engine.release(self.now, &mut self.out);
        self.settle();
        assert_eq!(self.by_module, None, "held for nobody");
        self.untold = None;
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

    /// A daemon that speaks this version.
    pub fn daemon(&mut self, abi: u32) {
        match abi {
            1 => self.daemon_v1(),
            _ => self.daemon_v2(),
        }
    }

    /// A write as it comes; a refused one must leave no trace in the state.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        self.write_of(bytes, bytes.len())
    }

    /// A write of `size` bytes of which the engine sees only the first ones.
    pub fn write_of(&mut self, bytes: &[u8], size: usize) -> Result<(), Refusal> {
        let before = (self.engine.shape(), self.engine.deadline());
        let result = self.engine.write(self.now, bytes, size, &mut self.out);
        match result {
            Ok(()) => self.sign_of_life(),
            Err(_) => {
                let after = (self.engine.shape(), self.engine.deadline());
                assert!(before == after, "a refused write changed something");
            }
        }
        self.settle();
        result
    }

    /// What a read with a large buffer returns.
    pub fn read_bytes(&mut self) -> Option<Vec<u8>> {
        let (bytes, token) = self.peek()?;
        self.take(&bytes, token);
        Some(bytes)
    }

    /// The first half of a read: what there is.
    pub fn peek(&mut self) -> Option<(Vec<u8>, Token)> {
        let mut buffer = vec![0u8; uapi::MAX_FRAME];
        let shown = self.engine.peek(self.now, &mut buffer);
        assert_eq!(shown.is_some(), self.engine.readable());
        let (len, token) = shown?;
        buffer.truncate(len);
        if let Token::Request(id) = token {
            let asked = self.waiting.values_mut().find(|w| w.id == Some(id));
            asked.expect("only what is open can be shown").shown = true;
        }
        Some((buffer, token))
    }

    /// The second half of a read: the daemon has it.
    pub fn take(&mut self, bytes: &[u8], token: Token) {
        self.engine.taken(self.now, token, &mut self.out);
        self.sign_of_life();
        match token {
            Token::Reply => {}
            Token::Notice(_) => self.read_notice(bytes),
            Token::Thaw(id) => self.in_hand = Some(self.parse(bytes, id)),
            Token::Request(id) if self.waiting.values().all(|w| w.id != Some(id)) => {
                // It has ended in the meantime, so its answer will be refused.
                let seen = self.parse(bytes, id);
                self.in_hand = Some(seen);
                self.by_daemon |= seen.operation == op::FREEZE;
            }
            Token::Request(id) => {
                let seen = self.parse(bytes, id);
                self.in_hand = Some(seen);
                if self.strict && seen.operation == op::FREEZE {
                    assert!(!self.late, "one FREEZE on top of another");
                    assert!(!self.sleeping, "a FREEZE while the machine goes to sleep");
                    self.by_daemon = true;
                }
                let asked = self.waiting.values_mut().find(|w| w.id == Some(id));
                asked.expect("only what is open can be read").read = true;
                if self.strict && seen.operation == op::THAW {
                    let came_first = self.sent_before.is_some_and(|last| id <= last);
                    assert!(
                        self.untold.is_none() || came_first,
                        "a THAW before a notice that came first"
                    );
                }
            }
        }
        self.settle();
    }

    /// Reads until there is a request.
    pub fn read(&mut self) -> Option<Seen> {
        self.in_hand = None;
        while self.in_hand.is_none() {
            self.read_bytes()?;
        }
        self.in_hand
    }

    /// Checks the notice of a hold that has ended.
    fn read_notice(&mut self, bytes: &[u8]) {
        let notice = uapi::Thawed::read_from_bytes(bytes).unwrap();
        assert_eq!(notice.frame.kind, uapi::frame::THAWED);
        assert_eq!(notice.frame.size as usize, bytes.len());
        let untold = self.untold.expect("a notice is due, and once");
        // One for a FREEZE may have taken the place of one for nobody that was just being read.
        if notice.frame.id != 0 || untold.0 == 0 {
            assert_eq!((notice.frame.id, notice.reason), untold);
            let is_unread = |w: &Waiting| w.id.is_some() && w.id == self.behind && !w.read;
            assert!(
                !self.waiting.values().any(is_unread),
                "a notice before a THAW that came first"
            );
            // It thaws what else it has frozen for that.
            self.by_daemon &= notice.frame.id == 0;
            self.untold = None;
        }
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

    /// Whether the host, or the engine itself, still waits for the answer to `seen`.
    pub fn is_open(&self, seen: Seen) -> bool {
        self.engine.owed_thaw() == Some((seen.id, true))
            || self.waiting.values().any(|w| w.id == Some(seen.id))
    }

    /// The daemon answers `seen` with `code`.
    pub fn answer(&mut self, seen: Seen, code: u32) -> Result<(), Refusal> {
        let open = self.is_open(seen);
        let gave_up = seen.operation == op::FREEZE && code != status::OK;
        if open && (seen.operation == op::THAW || gave_up) {
            (self.by_daemon, self.says_so) = (false, true);
            self.late &= gave_up;
        }
        // Set first, because the answer leaves within the write. An owed THAW is nobody's.
        let mut asked = self.waiting.values_mut();
        if let Some(asked) = asked.find(|w| w.id == Some(seen.id)) {
            asked.verdict = Some(code);
        }
        let bytes = if self.abi == 1 {
            uapi::VssMsg::answer_v1(code).as_bytes().to_vec()
        } else {
            answer(seen.id, seen.operation, code)
        };
        if self.in_hand == Some(seen) {
            self.in_hand = None;
        }
        let result = self.write(&bytes);
        self.says_so = false;
        assert_eq!(result.is_ok(), open, "an answer counts if it is waited for");
        if open && seen.operation == op::FREEZE && code == status::OK {
            self.frozen = Some(seen.id);
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
        let by_daemon = self.by_daemon;
        (self.by_daemon, self.says_so) = (false, true);
        let result = self.write(&thawed(id, reason));
        self.says_so = false;
        match result {
            Ok(()) => self.spoil(),
            Err(_) => self.by_daemon = by_daemon,
        }
        result
    }

    /// The daemon wants to have something frozen by the module.
    pub fn hold(&mut self, id: u64) -> Result<(), Refusal> {
        let result = self.engine.may_hold(id);
        if result.is_ok() {
            self.engine.holds(id);
            self.sign_of_life();
            self.by_module = Some(id);
            self.held_for.insert(id);
            (self.out.holds, self.emptied) = (true, false);
            let own_freeze = |seen: Seen| seen.id == id && seen.operation == op::FREEZE;
            assert!(
                id == 0 || self.in_hand.is_some_and(own_freeze),
                "held for another request"
            );
            assert!(!self.sleeping, "held while the machine goes to sleep");
        }
        self.settle();
        result
    }

    /// As [`World::hold`], but the file system cannot be frozen, as one on a bad disk.
    pub fn hold_fails(&mut self, id: u64) -> Result<(), Refusal> {
        let result = self.engine.may_hold(id);
        if result.is_ok() {
            self.engine.holds(id);
            self.sign_of_life();
            // What was held for nobody before may be part of that.
            self.by_module = self.by_module.map(|_| id);
            self.emptied = false;
        }
        self.settle();
        result
    }

    /// The daemon has the module thaw all that it holds, on whatever behalf; which may be nothing.
    pub fn thaw_held(&mut self) -> Result<(), Refusal> {
        for id in self.held_for.clone() {
            self.thaw_all_for(id)?;
        }
        self.thaw_all_for(0)
    }

    /// The daemon has the module thaw all that it holds for this id.
    pub fn thaw_all_for(&mut self, id: u64) -> Result<(), Refusal> {
        let result = self.engine.may_thaw();
        if result.is_ok() && self.held_for.remove(&id) {
            let is_all = self.held_for.is_empty();
            self.engine.thaws(id, is_all);
            self.sign_of_life();
            let in_hand = self.in_hand.filter(|seen| self.is_open(*seen));
            let thawing = in_hand.is_some_and(|seen| seen.operation == op::THAW);
            if is_all && !thawing {
                // It is its own doing, so it thaws what else it froze, too.
                self.by_daemon = false;
                self.cut_short();
            } else {
                self.tear();
            }
            if is_all {
                (self.by_module, self.out.holds) = (None, false);
                let is_its = |seen: Seen| seen.id == id && seen.operation == op::FREEZE;
                self.emptied |= in_hand.is_some_and(is_its);
            }
        }
        self.settle();
        result
    }

    /// The daemon has the module thaw one of those that it holds, and others are left.
    pub fn thaw_one(&mut self) -> Result<(), Refusal> {
        let id = self.held_for.last().copied().unwrap_or_default();
        self.engine.may_thaw()?;
        self.engine.thaws(id, false);
        self.sign_of_life();
        self.tear();
        self.settle();
        Ok(())
    }

    /// Something that stood still for the host does not any more, unless it has sent its THAW.
    fn tear(&mut self) {
        if self.backup == Backup::Good && self.open_thaws().next().is_none() {
            self.backup = Backup::Torn;
        }
    }

    /// The module thaws by itself what the daemon has in it.
    pub fn lose(&mut self, reason: u32) {
        self.out.holds = false;
        self.held_for.clear();
        if let Some(id) = self.by_module.take() {
            self.has_to_tell(id, reason);
            self.cut_short();
        }
        self.engine.lost(self.now, reason, &mut self.out);
        self.settle();
    }

    /// Whether the module holds anything for the daemon.
    pub fn holds(&self) -> bool {
        self.by_module.is_some()
    }

    pub fn alive(&mut self) {
        self.engine.alive();
        if self.abi != 0 {
            self.sign_of_life();
        }
        self.settle();
    }

    fn sign_of_life(&mut self) {
        self.quiet = false;
        for waiting in self.waiting.values_mut() {
            waiting.wait_ms = None;
        }
    }

    // --- The clock and the machine ---

    /// Time passes and the timer runs, as it would.
    pub fn pass(&mut self, us: u64) {
        let end = self.now + us;
        while let Some(next) = self.engine.deadline().filter(|next| *next < end) {
            assert!(next > self.now, "what is over has been left");
            self.tick(next);
        }
        self.tick(end);
    }

    fn tick(&mut self, now: u64) {
        self.now = now;
        let first = self.waiting.values().find_map(|w| w.id);
        self.engine.timer(self.now, &mut self.out);
        self.settle();
        let over = |id| self.waiting.values().all(|w| w.id != Some(id));
        if self.abi != 0 && first.is_some_and(over) {
            self.quiet = true;
        }
    }

    /// Time passes until the engine wanted to be called; false when no time is running.
    pub fn expire(&mut self) -> bool {
        let Some(deadline) = self.engine.deadline() else {
            return false;
        };
        self.pass(deadline.saturating_sub(self.now));
        true
    }

    /// The machine prepares to sleep.
    pub fn prepare_sleep(&mut self) {
        self.sleeping = true;
        self.cut_short();
        self.engine.prepare_sleep(self.now, &mut self.out);
        self.settle();
        assert_eq!(self.by_module, None, "held in the sleep");
        let freezes = self.waiting.values().filter(|w| w.operation == op::FREEZE);
        assert_eq!(freezes.count(), 0, "a FREEZE is left open in the sleep");
    }

    /// The channel closes.
    pub fn close(&mut self, reason: u32) {
        self.spoil();
        self.engine.close(self.now, reason, &mut self.out);
        // What it has just sent the host may not read any more.
        self.channel = false;
        self.settle();
        assert_eq!(self.by_module, None, "held without a channel");
        assert!(
            self.waiting.is_empty(),
            "a request is left open without a channel"
        );
        if self.strict {
            // The device may not come back, and the next one has to know.
            let left = self.engine.left();
            assert!(
                left.owes_thaw || !self.by_daemon || self.hears_of_it(),
                "frozen, and forgotten"
            );
            assert_eq!(believed(left), self.backup);
        }
    }

    /// The device goes, and another one comes with what this one has left. Whoever has this one open hears of nothing
    /// that happens to that.
    pub fn next_device(&mut self) {
        self.close(thawed::GONE);
        // Its daemon reads an error instead of the notice.
        self.by_daemon &= !self.hears_of_it();
        let left = self.engine.left();
        let config = self.config;
        let nobody = Engine::new(config, &mut [][..], Left::default());
        let store = std::mem::replace(&mut self.engine, nobody).into_store();
        let next = World {
            backup: self.backup,
            by_daemon: self.by_daemon,
            sleeping: self.sleeping,
            next_request: self.next_request,
            next_status: self.next_status,
            answers: std::mem::take(&mut self.answers),
            strict: self.strict,
            ..World::after(config, store, left)
        };
        *self = next;
        if self.sleeping {
            // It comes too late to hear of it.
            self.engine.prepare_sleep(self.now, &mut self.out);
        }
        self.settle();
    }

    pub fn resume(&mut self) {
        self.sleeping = false;
        self.channel = true;
        self.engine.resume();
        self.settle();
    }

    /// Lets the clock end everything, and checks that it does so in time.
    pub fn drain(&mut self) {
        if self.sleeping {
            self.resume();
        }
        let Config {
            freeze_ms,
            other_ms,
            grace_ms,
            ..
        } = self.config;
        let longest = u64::from(freeze_ms.max(other_ms).max(grace_ms).max(REOPEN_MS));
        let limit = self.now + longest * 1000;
        while self.expire() {
            assert!(self.now <= limit, "a request outlives its time");
        }
        assert!(self.waiting.is_empty(), "a request was never answered");
        assert_eq!(self.engine.queued(), 0);
    }

    // --- The promises ---

    /// Something has ended the freeze that the host counts on.
    fn spoil(&mut self) {
        if self.is_in_force() {
            self.backup = Backup::Spoilt;
        }
    }

    /// Whether something stands still for the host until its THAW.
    fn is_in_force(&self) -> bool {
        matches!(self.backup, Backup::Good | Backup::Torn)
    }

    /// Something is thawed, which the host may have asked for.
    fn cut_short(&mut self) {
        if self.open_thaws().next().is_none() {
            self.spoil();
        }
    }

    /// The THAWs that the host waits for, by the ids that the daemon sees.
    fn open_thaws(&self) -> impl DoubleEndedIterator<Item = u64> + '_ {
        let thaws = self.waiting.values().filter(|w| w.operation == op::THAW);
        thaws.filter_map(|w| w.id)
    }

    /// The daemon has to be told that what it held for that is thawed.
    fn has_to_tell(&mut self, id: u64, reason: u32) {
        self.untold = Some((id, reason));
        let is_good = self.backup == Backup::Good;
        let sent_before = self.open_thaws().next_back();
        let behind = self.open_thaws().next().filter(|_| is_good);
        (self.sent_before, self.behind) = (sent_before, behind);
    }

    /// The daemon will read that what it held for a FREEZE is thawed, and thaws what else it has frozen for that.
    fn hears_of_it(&self) -> bool {
        self.untold.is_some_and(|(id, _)| id != 0)
    }

    /// Checks what was sent, and the engine's own invariants.
    fn settle(&mut self) {
        self.engine.check().expect("an invariant");
        self.abi = self.engine.abi();
        for (packet, request_id, heard) in std::mem::take(&mut self.out.sent) {
            if packet[12] == 0 {
                self.answers.push((request_id, packet));
                continue; // a negotiation; its own tests look at it
            }
            let waiting = self
                .waiting
                .remove(&request_id)
                .expect("an answer to a request that waits, and only one");
            self.check_answer(&waiting, &packet, heard && self.channel);
            if heard {
                self.answers.push((request_id, packet));
            }
        }
        let reason = self.out.let_go.first().copied();
        self.out.let_go.clear();
        if let (Some(reason), Some(id)) = (reason, self.by_module) {
            self.by_module = None;
            self.held_for.clear();
            if !self.says_so {
                self.has_to_tell(id, reason);
            }
        }
        let in_hand = self.in_hand.filter(|seen| seen.operation == op::FREEZE);
        self.emptied &= in_hand.is_some_and(|seen| self.is_open(seen));
        self.late |= self.open && in_hand.is_some_and(|seen| !self.is_open(seen));
        if self.strict {
            self.check_ways_out();
        }
    }

    fn check_answer(&mut self, request: &Waiting, packet: &[u8], heard: bool) {
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

        let time_ms = match request.operation {
            op::FREEZE => self.config.freeze_ms,
            _ => self.config.other_ms,
        };
        let limit_ms = request.wait_ms.map_or(time_ms, |ms| time_ms.min(ms));
        let late = self.now - request.arrived > u64::from(limit_ms) * 1000;
        assert!(!late, "an answer after its time");

        let verdict = request.verdict.unwrap_or(status::FAIL);
        match request.operation {
            op::FREEZE => {
                assert_eq!(code, verdict, "what the host is told of its FREEZE");
                self.after_freeze(request, code, heard);
            }
            op::THAW => {
                let is_good = matches!(self.backup, Backup::None | Backup::Good);
                let expected = match verdict {
                    status::OK if !is_good => status::FAIL,
                    verdict => verdict,
                };
                assert_eq!(code, expected, "what the host is told of its THAW");
                self.backup = match self.backup {
                    Backup::None | Backup::Unseen => self.backup,
                    Backup::Good if code == status::OK => Backup::None,
                    Backup::Good | Backup::Torn | Backup::Spoilt if heard => Backup::Told,
                    Backup::Good | Backup::Torn | Backup::Spoilt => Backup::Spoilt,
                    Backup::Told => Backup::Told,
                };
            }
            op::HOT_BACKUP => assert_eq!(code, verdict),
            _ => assert_eq!(code, status::OK),
        }
    }

    fn after_freeze(&mut self, request: &Waiting, code: u32, heard: bool) {
        if code == status::OK && heard {
            self.backup = match self.emptied {
                true => Backup::Torn,
                false => Backup::Good,
            };
            return;
        }
        // The daemon gives it up, and with it what was frozen before.
        if request.shown {
            self.spoil();
        }
        if !heard {
            self.backup = Backup::Spoilt;
        } else if matches!(self.backup, Backup::Unseen | Backup::Told) {
            self.backup = Backup::None;
        }
    }

    /// Nothing stays frozen that nobody would thaw.
    fn check_ways_out(&self) {
        let in_hand = self.in_hand.filter(|seen| self.is_open(*seen));
        let making = in_hand.is_some_and(|seen| seen.operation == op::FREEZE);
        let thawing = in_hand.is_some_and(|seen| seen.operation == op::THAW);
        let in_force = self.is_in_force();
        let owed = self.engine.owed_thaw().is_some();
        if making || thawing {
            assert!(self.engine.deadline().is_some(), "no clock runs");
        }
        assert!(
            !self.by_daemon || in_force || making || thawing || owed || self.hears_of_it(),
            "frozen, and nobody is told to thaw"
        );
        let rehearsal = self.by_module == Some(0);
        assert!(
            self.by_module.is_none() || in_force || making || rehearsal,
            "held for nothing"
        );
        let wait_ms = self.config.grace_ms.max(REOPEN_MS);
        let wait_is_over = self.now >= self.left + u64::from(wait_ms) * 1000;
        let deserted = self.abi == 0 && wait_is_over;
        if self.engine.thawed_for_sleep() {
            assert!(self.sleeping);
            assert!(
                !self.by_daemon || deserted || self.hears_of_it(),
                "sleeps while frozen"
            );
            assert_eq!(self.by_module, None, "sleeps while something is held");
        } else {
            assert!(!self.sleeping || !deserted, "waits for nobody");
        }
    }
}

/// Whether a packet of these tests is a VSS message that has to be answered.
fn is_vss(packet: &[u8]) -> bool {
    packet.len() >= 36 && packet[12..14] == [5, 0]
}
