// SPDX-License-Identifier: GPL-2.0-only

//! A guest in memory, which does with rings, pages and hypercalls what Linux does, drives the bus.

use super::*;
use crate::channel::Tx;
use crate::ic::device::{self, Dialogue, IcDevice, ReplyState};
use crate::ic::{message_type, status, Envelope, Version};
use crate::profile::{Carriage, Profile};
use crate::vmbus::protocol::{message, GpadlHeader, Guid, InitiateContact, MessageHeader};
use crate::vmbus::protocol::{OpenChannel, PAGE_SIZE};
use crate::vmbus::ring::{Field, RingMem};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};
use zerocopy::little_endian::{U16, U64};
use zerocopy::{Immutable, IntoBytes};

const PLACE: Place = Place {
    name: "vss",
    relid: 1,
    class: crate::ic::vss::CLASS,
    instance: Guid([9; 16]),
    pipe: false,
};
const CONNECTION_ID: u64 = 0x1_0001;
const SIMP: u64 = 0x1000;
const SIEFP: u64 = 0x2000;
const HYPERCALL_PAGE: u64 = 0x3000;
/// Page numbers of both rings.
const PAGES: [u64; 8] = [8, 9, 10, 11, 12, 13, 14, 15];

/// A guest that lives in this thread: it does with memory and hypercalls what Linux does.
struct Guest {
    bus: Bus,
    dialogue: Arc<Mutex<Dialogue>>,
    memory: GuestMemoryMmap,
    interrupt: EventFd,
}

impl Guest {
    fn new() -> Self {
        Guest::of(&Profile::CURRENT)
    }

    /// The guest of such a host.
    fn of(profile: &Profile) -> Self {
        let ranges = [(GuestAddress(0), 32 * PAGE_SIZE)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let raise = interrupt.try_clone().unwrap();
        let synic = Arc::new(SynIc::new(memory.clone(), vec![raise]));
        let versions = VmbusVersion::ALL.to_vec();
        let dialogue = Dialogue::new(Arc::default(), profile, profile.vss);
        let dialogue = Arc::new(Mutex::new(dialogue));
        let device = Box::new(IcDevice::new(PLACE, dialogue.clone()));
        let mut bus = Bus::new(memory.clone(), synic, versions, vec![(device, true)]);
        let registers = Registers {
            control: 1,
            message_page: SIMP | 1,
            event_page: SIEFP | 1,
        };
        bus.synic_changed(0, registers);
        Guest {
            bus,
            dialogue,
            memory,
            interrupt,
        }
    }

    fn post(&mut self, kind: u32, body: impl IntoBytes + Immutable, extra: &[u8]) -> u64 {
        let mut payload = MessageHeader::new(kind).as_bytes().to_vec();
        payload.extend_from_slice(body.as_bytes());
        payload.extend_from_slice(extra);
        let mut input = Vec::new();
        for word in [4, 0, 1, payload.len() as u32] {
            input.extend_from_slice(&u32::to_le_bytes(word));
        }
        input.extend_from_slice(&payload);
        let at = GuestAddress(HYPERCALL_PAGE);
        self.memory.write_slice(&input, at).unwrap();
        self.bus
            .hypercall(hypercall::POST_MESSAGE, [HYPERCALL_PAGE, 0])
    }

    /// Takes the message in the slot, as the guest's tasklet does; its type and payload.
    fn take_message(&mut self) -> Option<(u32, Vec<u8>)> {
        let slot = GuestAddress(SIMP + 512);
        let mut bytes = [0; 256];
        self.memory.read_slice(&mut bytes, slot).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        if word(0) == 0 {
            return None;
        }
        let size = usize::from(bytes[4]);
        self.memory.write_slice(&[0; 4], slot).unwrap();
        if bytes[5] & 1 != 0 {
            self.bus.slot_acknowledged();
        }
        Some((word(16), bytes[16..16 + size].to_vec()))
    }

    fn messages(&mut self) -> Vec<u32> {
        std::iter::from_fn(|| self.take_message().map(|(kind, _)| kind)).collect()
    }

    fn connect(&mut self) {
        let contact = InitiateContact {
            version: U32::new(VmbusVersion::V6_0.0),
            target_vp: U32::new(0),
            interrupt: U64::new(2),
            monitor_page1: U64::new(0),
            monitor_page2: U64::new(0),
        };
        assert_eq!(self.post(message::INITIATE_CONTACT, contact, &[]), 0);
        assert_eq!(self.messages(), [message::VERSION_RESPONSE]);
        self.post(message::REQUESTOFFERS, [0u8; 0], &[]);
        assert_eq!(
            self.messages(),
            [message::OFFERCHANNEL, message::ALLOFFERS_DELIVERED]
        );
    }

    fn open(&mut self) -> (Reader<GuestRing>, Writer<GuestRing>) {
        for page in PAGES {
            let at = GuestAddress(page * PAGE_SIZE as u64);
            self.memory.write_slice(&[0; PAGE_SIZE], at).unwrap();
        }
        let header = GpadlHeader {
            relid: U32::new(1),
            gpadl: U32::new(77),
            range_bytes: U16::new(8 + 64),
            range_count: U16::new(1),
            byte_count: U32::new((PAGES.len() * PAGE_SIZE) as u32),
            byte_offset: U32::new(0),
        };
        self.post(message::GPADL_HEADER, header, PAGES.as_bytes());
        let open = OpenChannel {
            relid: U32::new(1),
            open_id: U32::new(1),
            gpadl: U32::new(77),
            target_vp: U32::new(0),
            downstream_page: U32::new(4),
            user_data: [0; 120],
        };
        self.post(message::OPENCHANNEL, open, &[]);
        let opened = [message::GPADL_CREATED, message::OPENCHANNEL_RESULT];
        assert_eq!(self.messages(), opened);
        let (from_guest, to_guest) = PAGES.split_at(4);
        let to_host = GuestRing::new(&self.memory, from_guest).unwrap();
        let from_host = GuestRing::new(&self.memory, to_guest).unwrap();
        for ring in [&to_host, &from_host] {
            ring.store(Field::FeatureBits, 1).unwrap();
        }
        (
            Reader::new(from_host).unwrap(),
            Writer::new(to_host).unwrap(),
        )
    }

    fn signal(&mut self) -> u64 {
        let code = hypercall::SIGNAL_EVENT | hypercall::FAST;
        self.bus.hypercall(code, [CONNECTION_ID, 0])
    }

    /// The event flags that are set, cleared.
    fn take_events(&mut self) -> u32 {
        let at = GuestAddress(SIEFP + 512);
        let mut word = [0; 4];
        self.memory.read_slice(&mut word, at).unwrap();
        self.memory.write_slice(&[0; 4], at).unwrap();
        u32::from_le_bytes(word)
    }

    fn send(&mut self, payload: &[u8]) -> Result<Tx, SendError> {
        device::send(&mut self.bus, 1, &self.dialogue, |dialogue| {
            let descriptor = dialogue.descriptor();
            dialogue.raw("test", descriptor, |_, _| payload.to_vec())
        })
    }

    fn request(&mut self, body: &[u8]) -> Tx {
        let sent = device::send(&mut self.bus, 1, &self.dialogue, |dialogue| {
            dialogue.request("test", |dialogue, tx| {
                let envelope = Envelope {
                    framework: Version::new(3, 0),
                    message_type: message_type::VSS,
                    message: Version::new(5, 0),
                    transaction: dialogue.message_id(tx),
                };
                envelope.request(body)
            })
        });
        sent.unwrap_or_else(|_| panic!("the channel is open and the packet fits"))
    }

    fn take_reply(&self, tx: Tx) -> ReplyState {
        lock(&self.dialogue).take_reply(tx)
    }

    fn violations(&self) -> usize {
        self.bus.violations().count()
    }
}

/// Makes the answer of a request: of versions that are offered it chooses the first.
fn answer(packet: &mut [u8]) {
    packet[25] = 5;
    if packet[12..14] == message_type::NEGOTIATE.to_le_bytes() {
        let messages = 36 + 4 * usize::from(packet[28]);
        packet.copy_within(messages..messages + 4, 40);
        (packet[18], packet[28], packet[30]) = (16, 1, 1);
    }
}

#[test]
fn a_request_reaches_the_guest_and_its_answer_comes_back() {
    let mut guest = Guest::new();
    guest.connect();
    let (mut reader, mut writer) = guest.open();
    let tx = guest.request(&[5; 6260]);
    assert_eq!(guest.take_events(), 1 << 1);
    let (packet, _) = reader.receive().unwrap().expect("the request");
    assert_eq!(packet.payload.len(), 6288);
    assert_eq!(packet.transaction, tx.0);

    let mut answer = packet.payload;
    answer[20..24].copy_from_slice(&status::FAIL.to_le_bytes());
    answer[25] = 5;
    writer.send(6, 0, packet.transaction, &answer).unwrap();
    assert_eq!(guest.signal(), hypercall::SUCCESS);
    let ReplyState::Here(reply) = guest.take_reply(tx) else {
        panic!("the answer is here");
    };
    assert_eq!(reply.bytes, answer);
    assert!(matches!(guest.take_reply(tx), ReplyState::Unknown));
    let kinds: Vec<_> = guest.bus.log().map(|e| e.kind.clone()).collect();
    assert!(matches!(
        kinds.as_slice(),
        [
            EventKind::Connected { .. },
            EventKind::Offered,
            EventKind::Opened { ring: 12288 },
            EventKind::Sent { bytes: 6288, .. },
            EventKind::Reply {
                status: status::FAIL,
                ..
            }
        ]
    ));
}

#[test]
fn requests_overlap_and_those_without_room_follow_in_order() {
    let mut guest = Guest::new();
    guest.connect();
    let (mut reader, mut writer) = guest.open();
    let first = guest.request(&[1; 6260]);
    let second = guest.request(&[2; 6260]);
    let third = guest.request(&[3; 32]);
    assert!(guest.bus.channel(1).unwrap().has_unsent());
    let mut seen = Vec::new();
    for _ in 0..3 {
        let (mut packet, room) = reader.receive().unwrap().expect("a request");
        seen.push(Tx(packet.transaction));
        packet.payload[25] = 5;
        writer
            .send(6, 0, packet.transaction, &packet.payload)
            .unwrap();
        if room {
            guest.signal();
        }
    }
    guest.signal();
    assert_eq!(seen, [first, second, third]);
    assert_eq!(guest.violations(), 0);
    assert!(!guest.bus.channel(1).unwrap().has_unsent());
    for tx in seen {
        assert!(matches!(guest.take_reply(tx), ReplyState::Here(_)));
    }
}

#[test]
fn a_packet_that_answers_nothing_is_kept_as_a_stray() {
    let mut guest = Guest::new();
    guest.connect();
    let (_reader, mut writer) = guest.open();
    writer.send(6, 0, 4711, b"nonsense").unwrap();
    guest.signal();
    let strays = lock(&guest.dialogue).take_strays();
    assert_eq!(strays, [b"nonsense".to_vec()]);
    assert_eq!(guest.violations(), 1);
    // What comes late for something that was given up is one, too, but nobody's fault.
    let tx = guest.request(&[1; 32]);
    lock(&guest.dialogue).forget();
    writer.send(6, 0, tx.0, b"nonsense").unwrap();
    guest.signal();
    assert_eq!(lock(&guest.dialogue).take_strays().len(), 1);
    assert_eq!(guest.violations(), 1);
    // But once.
    writer.send(6, 0, tx.0, b"nonsense").unwrap();
    guest.signal();
    assert_eq!(guest.violations(), 2);
}

#[test]
fn only_what_was_given_up_is_forgiven_whatever_the_host() {
    for profile in [Profile::CURRENT, Profile::OPENVMM] {
        let mut guest = Guest::of(&profile);
        guest.connect();
        let (mut reader, mut writer) = guest.open();
        let (answered, first) = (guest.request(&[1; 32]), guest.request(&[9; 32]));
        let of = |tx: Tx| match profile.carriage {
            Carriage::Packets => tx.0,
            Carriage::Pipe => 0,
        };
        // The offer of versions that comes first on a pipe waits as well.
        let offer = lock(&guest.dialogue).first_offer;
        while let Some((mut packet, _)) = reader.receive().unwrap() {
            answer(&mut packet.payload);
            if packet.payload[28] != 9 {
                writer
                    .send(6, 0, packet.transaction, &packet.payload)
                    .unwrap();
                guest.signal();
            }
        }
        for tx in offer.into_iter().chain([answered]) {
            assert!(matches!(guest.take_reply(tx), ReplyState::Here(_)));
        }
        lock(&guest.dialogue).forget();
        // One had no answer.
        for violations in [0, 1, 2] {
            writer.send(6, 0, of(first), b"nonsense").unwrap();
            guest.signal();
            assert_eq!(guest.violations(), violations, "{}", profile.name);
        }
        // What nobody can answer any more is not forgiven on the next opening.
        guest.request(&[1; 32]);
        lock(&guest.dialogue).forget();
        guest.bus.rescind(1);
        guest.bus.offer(1);
        guest.messages();
        guest.post(message::RELID_RELEASED, U32::new(1), &[]);
        assert_eq!(guest.messages(), [message::OFFERCHANNEL]);
        let (_reader, mut writer) = guest.open();
        writer.send(6, 0, of(first), b"nonsense").unwrap();
        guest.signal();
        assert_eq!(guest.violations(), 3, "{}", profile.name);
    }
}

#[test]
fn what_is_asked_and_not_answered_is_known() {
    let mut guest = Guest::new();
    guest.connect();
    let (mut reader, mut writer) = guest.open();
    let unanswered = |guest: &Guest| lock(&guest.dialogue).unanswered();
    // No answer is held against the guest.
    assert!(guest.send(b"nonsense").is_ok());
    assert!(unanswered(&guest).is_empty());
    reader.receive().unwrap();
    guest.request(&[1; 6260]);
    guest.request(&[2; 6260]);
    assert!(guest.bus.channel(1).unwrap().has_unsent());
    assert_eq!(unanswered(&guest), ["test"]);
    let (mut packet, _) = reader.receive().unwrap().expect("a request");
    answer(&mut packet.payload);
    writer
        .send(6, 0, packet.transaction, &packet.payload)
        .unwrap();
    guest.signal();
    // The next one has had room since.
    assert_eq!(unanswered(&guest), ["test"]);
    lock(&guest.dialogue).forget();
    assert!(unanswered(&guest).is_empty());
    guest.request(&[1; 32]);
    assert_eq!(unanswered(&guest), ["test"]);
    guest.bus.rescind(1);
    assert!(unanswered(&guest).is_empty());
}

#[test]
fn an_answer_that_repeats_its_request_wrongly_is_held_against_the_guest() {
    let mut guest = Guest::new();
    guest.connect();
    let (mut reader, mut writer) = guest.open();
    let tx = guest.request(&[1; 32]);
    let (mut packet, _) = reader.receive().unwrap().expect("a request");
    // The flags of a request, as if it were sent back untouched.
    writer.send(6, 0, tx.0, &packet.payload).unwrap();
    guest.signal();
    assert_eq!(guest.violations(), 1);
    assert!(matches!(guest.take_reply(tx), ReplyState::Here(_)));
    // And now once more: it has been answered.
    packet.payload[25] = 5;
    writer.send(6, 0, tx.0, &packet.payload).unwrap();
    guest.signal();
    assert_eq!(guest.violations(), 2);
}

#[test]
fn a_host_of_pipes_speaks_first_and_without_transactions() {
    let mut guest = Guest::of(&Profile::OPENVMM);
    guest.connect();
    let (mut reader, mut writer) = guest.open();
    let offer = lock(&guest.dialogue)
        .first_offer
        .expect("an offer of versions");
    let (first, second) = (guest.request(&[1; 32]), guest.request(&[2; 32]));
    for tx in [offer, first, second] {
        let (mut packet, _) = reader.receive().unwrap().expect("a message");
        assert_eq!((packet.transaction, packet.flags), (0, 0));
        assert_eq!(packet.payload[24], 0, "the message's own id");
        answer(&mut packet.payload);
        writer.send(6, 0, 0, &packet.payload).unwrap();
        guest.signal();
        assert!(matches!(guest.take_reply(tx), ReplyState::Here(_)));
    }
    assert_eq!(guest.violations(), 0);
    writer.send(6, 0, 0, b"nonsense").unwrap();
    guest.signal();
    assert_eq!(guest.violations(), 1);
    // An answer with a number of the guest's own is one to none.
    let third = guest.request(&[3; 32]);
    let (mut packet, _) = reader.receive().unwrap().expect("a message");
    packet.payload[25] = 5;
    writer.send(6, 0, 7, &packet.payload).unwrap();
    guest.signal();
    assert!(matches!(guest.take_reply(third), ReplyState::Here(_)));
    assert_eq!(guest.violations(), 2);
}

#[test]
fn a_request_on_a_channel_that_was_closed_will_not_be_answered() {
    let mut guest = Guest::new();
    guest.connect();
    let _rings = guest.open();
    let tx = guest.request(&[1; 32]);
    guest.bus.rescind(1);
    assert_eq!(guest.messages(), [message::RESCIND_CHANNELOFFER]);
    let channel = guest.bus.channel(1).unwrap();
    assert!(channel.revoked && !channel.is_open());
    assert!(matches!(guest.take_reply(tx), ReplyState::Closed));
    assert!(matches!(guest.send(&[]), Err(SendError::NotOpen)));
    guest.bus.offer(1);
    guest.post(message::RELID_RELEASED, [U32::new(1)], &[]);
    assert_eq!(guest.messages(), [message::OFFERCHANNEL]);
    let _rings = guest.open();
    assert_eq!(guest.bus.channel(1).unwrap().openings, 2);
}

#[test]
fn a_ring_with_a_wild_index_closes_its_channel_only() {
    let mut guest = Guest::new();
    guest.connect();
    let _rings = guest.open();
    let from_guest = GuestRing::new(&guest.memory, &PAGES[..4]).unwrap();
    from_guest.store(Field::WriteIndex, 12289).unwrap();
    assert_eq!(guest.signal(), hypercall::SUCCESS);
    assert_eq!(guest.violations(), 1);
    assert!(!guest.bus.channel(1).unwrap().is_open());
}

#[test]
fn rings_outside_of_memory_are_refused() {
    let mut guest = Guest::new();
    guest.connect();
    let header = GpadlHeader {
        relid: U32::new(1),
        gpadl: U32::new(77),
        range_bytes: U16::new(8 + 32),
        range_count: U16::new(1),
        byte_count: U32::new(4 * 4096),
        byte_offset: U32::new(0),
    };
    let pages = [1u64, 2, u64::MAX, 0xffff_ffff];
    guest.post(message::GPADL_HEADER, header, pages.as_bytes());
    let open = OpenChannel {
        relid: U32::new(1),
        open_id: U32::new(1),
        gpadl: U32::new(77),
        target_vp: U32::new(0),
        downstream_page: U32::new(2),
        user_data: [0; 120],
    };
    guest.post(message::OPENCHANNEL, open, &[]);
    guest.take_message();
    let (kind, result) = guest.take_message().expect("a result");
    assert_eq!(kind, message::OPENCHANNEL_RESULT);
    assert_ne!(result[16..20], [0; 4]);
    assert!(!guest.bus.channel(1).unwrap().is_open());
}

#[test]
fn a_broken_rule_is_kept_whatever_else_happens_and_one_that_is_not_is_missed() {
    let mut guest = Guest::new();
    let broken = |what: &str| EventKind::Violation(what.to_owned());
    guest.bus.note("vss", broken("the first"));
    for _ in 0..KEEP {
        guest.bus.note("vss", EventKind::Offered);
    }
    assert_eq!(guest.bus.log().count(), KEEP);
    assert_eq!(guest.violations(), 1);
    for _ in 0..KEEP {
        guest.bus.note("vss", broken("another"));
    }
    let first = guest.bus.violations().next().map(|it| &it.kind);
    assert_eq!(first, Some(&broken(MORE)));
    assert_eq!(guest.violations(), KEEP);
}

#[test]
fn hypercalls_that_make_no_sense_are_answered_with_an_error() {
    let mut guest = Guest::new();
    let cases = [
        (0x5c, [u64::MAX, 0], hypercall::INVALID_INPUT),
        (0x5c, [32 * 4096 - 8, 0], hypercall::INVALID_INPUT),
        (0x5c | hypercall::FAST, [0, 0], hypercall::INVALID_INPUT),
        // A page of zeros: connection 0.
        (0x5c, [0x4000, 0], hypercall::INVALID_CONNECTION_ID),
        (0x5d, [u64::MAX, 0], hypercall::INVALID_INPUT),
        (
            0x5d | hypercall::FAST,
            [0x1_0009, 0],
            hypercall::INVALID_CONNECTION_ID,
        ),
        (0x1, [0, 0], hypercall::INVALID_CODE),
    ];
    for (input, params, expected) in cases {
        assert_eq!(guest.bus.hypercall(input, params), expected, "{input:#x}");
    }
    assert_eq!(guest.signal(), hypercall::SUCCESS);
    let mut size = [0; 16];
    size[0] = 4;
    size[8] = 1;
    size[12..].copy_from_slice(&241u32.to_le_bytes());
    let at = GuestAddress(HYPERCALL_PAGE);
    guest.memory.write_slice(&size, at).unwrap();
    let result = guest.bus.hypercall(0x5c, [HYPERCALL_PAGE, 0]);
    assert_eq!(result, hypercall::INVALID_PARAMETER);
    assert!(guest.interrupt.read().is_err(), "nobody was interrupted");
}

#[test]
fn a_guest_that_writes_anything_anywhere_is_survived() {
    let mut state = 0x853c_49e6_748f_ea9bu64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut guest = Guest::new();
    for _ in 0..300 {
        guest.connect();
        let _rings = guest.open();
        for _ in 0..100 {
            let page = PAGES[(random() % 8) as usize] * 4096;
            let value = (random() as u32) >> (random() % 32);
            let at = GuestAddress(page + random() % 128 * 4);
            guest.memory.write_slice(&value.to_le_bytes(), at).unwrap();
            let _ = guest.send(&[0; 100]);
            guest.signal();
            guest.messages();
        }
    }
}
