// SPDX-License-Identifier: GPL-2.0-only

//! The control plane, message by message.

use super::*;

const RELID: u32 = 5;

fn server() -> Server {
    let offer = Offer {
        relid: RELID,
        class: crate::ic::vss::CLASS,
        instance: Guid::new(1, 2, 3, [4; 8]),
        connection_id: 0x1_0005,
        pipe: false,
    };
    Server::new(VmbusVersion::ALL.to_vec(), [(offer, true)])
}

fn bytes(kind: u32, rest: impl IntoBytes + zerocopy::Immutable) -> Vec<u8> {
    let mut bytes = MessageHeader::new(kind).as_bytes().to_vec();
    bytes.extend_from_slice(rest.as_bytes());
    bytes
}

fn u32s<const N: usize>(values: [u32; N]) -> [U32; N] {
    values.map(U32::new)
}

fn contact(version: VmbusVersion) -> Vec<u8> {
    let contact = InitiateContact {
        version: U32::new(version.0),
        target_vp: U32::new(0),
        interrupt: U64::new(2),
        monitor_page1: U64::new(0),
        monitor_page2: U64::new(0),
    };
    bytes(message::INITIATE_CONTACT, contact)
}

fn gpadl(id: u32, total: u16, first: &[u64]) -> Vec<u8> {
    let header = GpadlHeader {
        relid: U32::new(RELID),
        gpadl: U32::new(id),
        range_bytes: U16::new(8 + total * 8),
        range_count: U16::new(1),
        byte_count: U32::new(u32::from(total) * 4096),
        byte_offset: U32::new(0),
    };
    let mut bytes = bytes(message::GPADL_HEADER, header);
    first
        .iter()
        .for_each(|page| bytes.extend_from_slice(&page.to_le_bytes()));
    bytes
}

fn open(gpadl: u32, downstream_page: u32) -> Vec<u8> {
    let open = OpenChannel {
        relid: U32::new(RELID),
        open_id: U32::new(77),
        gpadl: U32::new(gpadl),
        target_vp: U32::new(1),
        downstream_page: U32::new(downstream_page),
        user_data: [0; 120],
    };
    bytes(message::OPENCHANNEL, open)
}

/// The types of the messages that are posted, with the value that decides their meaning.
fn posted(effects: &[Effect]) -> Vec<(u32, u32)> {
    let word = |message: &[u8], at: usize| {
        let bytes = message.get(at..at + 4).unwrap_or(&[0; 4]);
        u32::from_le_bytes(bytes.try_into().unwrap())
    };
    let posts = effects.iter().filter_map(|effect| match effect {
        Effect::Post { message, .. } => Some(message),
        _ => None,
    });
    posts
        .map(|m| match word(m, 0) {
            message::VERSION_RESPONSE => (word(m, 0), m[8].into()),
            kind @ (message::OPENCHANNEL_RESULT | message::GPADL_CREATED) => (kind, word(m, 16)),
            kind => (kind, word(m, 8)),
        })
        .collect()
}

fn connected() -> Server {
    let mut server = server();
    server.message(CONNECTION_V5, &contact(VmbusVersion::V6_0));
    server.message(CONNECTION_V5, &bytes(message::REQUESTOFFERS, [0u8; 0]));
    server
}

fn opened() -> Server {
    let mut server = connected();
    server.message(4, &gpadl(1, 8, &[10, 11, 12, 13, 14, 15, 16, 17]));
    server.message(4, &open(1, 4));
    server.open_result(RELID, true);
    server
}

#[test]
fn versions_are_refused_until_one_is_known() {
    let mut server = Server::new(vec![VmbusVersion::V5_3], []);
    let refused = server.message(4, &contact(VmbusVersion::V6_0));
    assert_eq!(posted(&refused), [(message::VERSION_RESPONSE, 0)]);
    let accepted = server.message(4, &contact(VmbusVersion::V5_3));
    assert_eq!(posted(&accepted), [(message::VERSION_RESPONSE, 1)]);
    assert!(accepted.contains(&Effect::Connected(VmbusVersion::V5_3)));
    assert!(server.has_connection(4) && server.has_connection(1));
    let old = Server::new(vec![VmbusVersion::V4_0], []);
    assert!(old.has_connection(1) && !old.has_connection(4) && !old.has_connection(9));
}

#[test]
fn nothing_is_done_for_a_guest_that_has_not_connected() {
    let mut server = server();
    let effects = server.message(4, &bytes(message::REQUESTOFFERS, [0u8; 0]));
    assert!(matches!(effects.as_slice(), [Effect::Violation(_)]));
    assert!(server.offer(RELID).is_empty());
    assert!(server.rescind(RELID).is_empty());
}

#[test]
fn offers_are_delivered_on_request() {
    let mut server = server();
    server.message(4, &contact(VmbusVersion::V6_0));
    let effects = server.message(4, &bytes(message::REQUESTOFFERS, [0u8; 0]));
    let kinds: Vec<u32> = posted(&effects).iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, [message::OFFERCHANNEL, message::ALLOFFERS_DELIVERED]);
}

#[test]
fn a_channel_opens_on_a_gpadl_that_fits_one_message() {
    let mut server = connected();
    let created = server.message(4, &gpadl(1, 8, &[10, 11, 12, 13, 14, 15, 16, 17]));
    assert_eq!(posted(&created), [(message::GPADL_CREATED, 0)]);
    let effects = server.message(4, &open(1, 4));
    let opening = Opening {
        pages: (10..18).collect(),
        downstream_page: 4,
        target_vp: 1,
    };
    assert_eq!(effects, [Effect::Opened(RELID, opening)]);
    let result = server.open_result(RELID, true);
    assert_eq!(posted(&result), [(message::OPENCHANNEL_RESULT, 0)]);
}

#[test]
fn a_gpadl_of_many_pages_is_put_together_from_its_bodies() {
    let mut server = connected();
    let pages: Vec<u64> = (100..164).collect();
    assert!(server.message(4, &gpadl(3, 64, &pages[..26])).is_empty());
    let body = |pages: &[u64]| {
        let header = GpadlBody {
            number: U32::new(0),
            gpadl: U32::new(3),
        };
        let mut bytes = bytes(message::GPADL_BODY, header);
        for page in pages {
            bytes.extend_from_slice(&page.to_le_bytes());
        }
        bytes
    };
    assert!(server.message(4, &body(&pages[26..54])).is_empty());
    let created = server.message(4, &body(&pages[54..]));
    assert_eq!(posted(&created), [(message::GPADL_CREATED, 0)]);
    let effects = server.message(4, &open(3, 32));
    assert!(matches!(
        effects.as_slice(),
        [Effect::Opened(RELID, opening)] if opening.pages == pages
    ));
    let extra = server.message(4, &body(&pages[..1]));
    assert!(matches!(extra.as_slice(), [Effect::Violation(_)]));
}

#[test]
fn rings_that_do_not_fit_their_gpadl_are_refused() {
    for downstream_page in [0, 1, 7, 8, u32::MAX] {
        let mut server = connected();
        server.message(4, &gpadl(1, 8, &[0; 8]));
        let effects = server.message(4, &open(1, downstream_page));
        assert_eq!(
            posted(&effects),
            [(message::OPENCHANNEL_RESULT, UNSUCCESSFUL)]
        );
    }
    let mut server = connected();
    let effects = server.message(4, &open(1, 4));
    assert_eq!(
        posted(&effects),
        [(message::OPENCHANNEL_RESULT, UNSUCCESSFUL)]
    );
}

#[test]
fn close_teardown_and_open_again_is_a_reload_of_the_driver() {
    let mut server = opened();
    let closed = server.message(4, &bytes(message::CLOSECHANNEL, u32s([RELID])));
    assert_eq!(closed, [Effect::Closed(RELID)]);
    let torn = server.message(4, &bytes(message::GPADL_TEARDOWN, u32s([RELID, 1])));
    assert_eq!(posted(&torn), [(message::GPADL_TORNDOWN, 1)]);
    server.message(4, &gpadl(2, 8, &[1; 8]));
    let effects = server.message(4, &open(2, 4));
    assert!(matches!(effects.as_slice(), [Effect::Opened(RELID, _)]));
}

#[test]
fn a_gpadl_with_the_rings_of_an_open_channel_is_not_torn_down() {
    let teardown = |id| bytes(message::GPADL_TEARDOWN, u32s([RELID, id]));
    let is_wrong = |effects: &[Effect]| effects.iter().any(|it| matches!(it, Effect::Violation(_)));
    let mut server = opened();
    // Another is the guest's to do with as it likes.
    server.message(4, &gpadl(2, 8, &[1; 8]));
    assert!(!is_wrong(&server.message(4, &teardown(2))));
    let torn = server.message(4, &teardown(1));
    assert!(is_wrong(&torn), "{torn:?}");
    assert_eq!(posted(&torn), [(message::GPADL_TORNDOWN, 1)]);
    // Nor one with which it is just being opened.
    let mut server = connected();
    server.message(4, &gpadl(1, 8, &[1; 8]));
    server.message(4, &open(1, 4));
    assert!(is_wrong(&server.message(4, &teardown(1))));
}

#[test]
fn a_rescinded_channel_comes_back_when_the_guest_has_released_it() {
    let mut server = opened();
    let effects = server.rescind(RELID);
    assert_eq!(effects.first(), Some(&Effect::Closed(RELID)));
    assert_eq!(posted(&effects), [(message::RESCIND_CHANNELOFFER, RELID)]);
    assert!(server.rescind(RELID).is_empty());
    assert!(server.offer(RELID).is_empty(), "not before the release");
    let close = server.message(4, &bytes(message::CLOSECHANNEL, u32s([RELID])));
    assert!(close.is_empty());
    let released = server.message(4, &bytes(message::RELID_RELEASED, u32s([RELID])));
    assert_eq!(released.first(), Some(&Effect::Released(RELID)));
    assert_eq!(posted(&released)[0].0, message::OFFERCHANNEL);
    let again = server.message(4, &gpadl(1, 8, &[1; 8]));
    assert_eq!(posted(&again), [(message::GPADL_CREATED, 0)]);
}

#[test]
fn a_guest_that_is_about_to_open_a_revoked_channel_meets_no_failure() {
    let mut server = connected();
    server.rescind(RELID);
    let created = server.message(4, &gpadl(1, 8, &[1; 8]));
    assert_eq!(posted(&created), [(message::GPADL_CREATED, 0)]);
    let result = server.message(4, &open(1, 4));
    assert_eq!(posted(&result), [(message::OPENCHANNEL_RESULT, 0)]);
    assert!(!result.iter().any(|e| matches!(e, Effect::Opened(..))));
}

#[test]
fn unload_closes_everything_and_a_new_contact_starts_over() {
    let mut server = opened();
    let effects = server.message(4, &bytes(message::UNLOAD, [0u8; 0]));
    assert_eq!(effects[..2], [Effect::Closed(RELID), Effect::Unloaded]);
    assert_eq!(posted(&effects), [(message::UNLOAD_RESPONSE, 0)]);
    assert_eq!(server.version(), None);
    server.message(4, &contact(VmbusVersion::V5_3));
    let offers = server.message(4, &bytes(message::REQUESTOFFERS, [0u8; 0]));
    assert_eq!(posted(&offers)[0].0, message::OFFERCHANNEL);
}

#[test]
fn a_channel_that_is_withheld_stays_until_the_guest_has_left() {
    let mut server = opened();
    server.withhold(RELID);
    assert_eq!(server.gpadls(), 1);
    let left = server.message(4, &bytes(message::UNLOAD, [0u8; 0]));
    assert_eq!(left.first(), Some(&Effect::Closed(RELID)));
    assert_eq!(server.gpadls(), 0);
    server.message(4, &contact(VmbusVersion::V6_0));
    let offers = server.message(4, &bytes(message::REQUESTOFFERS, [0u8; 0]));
    assert_eq!(posted(&offers)[0].0, message::ALLOFFERS_DELIVERED);
    assert_eq!(posted(&server.offer(RELID))[0].0, message::OFFERCHANNEL);
}

#[test]
fn a_contact_without_an_unload_starts_over_too() {
    let mut server = opened();
    let effects = server.message(4, &contact(VmbusVersion::V6_0));
    assert_eq!(effects[..2], [Effect::Closed(RELID), Effect::Unloaded]);
    assert_eq!(posted(&effects), [(message::VERSION_RESPONSE, 1)]);
}

#[test]
fn modifychannel_is_answered_from_5_3_on() {
    for (version, answers) in [(VmbusVersion::V5_3, 1), (VmbusVersion::V5_2, 0)] {
        let mut server = server();
        server.message(4, &contact(version));
        let effects = server.message(4, &bytes(message::MODIFYCHANNEL, u32s([RELID, 3])));
        assert_eq!(effects.first(), Some(&Effect::Retargeted(RELID, 3)));
        assert_eq!(posted(&effects).len(), answers);
    }
}

#[test]
fn any_message_in_any_state_is_survived() {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below) as u32
    };
    let mut server = opened();
    for _ in 0..200_000 {
        let effects = match random(8) {
            0 => server.offer(RELID),
            1 => server.rescind(RELID),
            2 => server.open_result(RELID, random(2) == 0),
            3 => server.message(4, &contact(VmbusVersion::V6_0)),
            4 => server.message(4, &gpadl(random(4), 8, &[1; 8])),
            5 => server.message(4, &open(random(4), random(9))),
            _ => {
                let words = u32s([random(7), random(4), random(3), random(70_000)]);
                server.message(4, &bytes(random(26), words))
            }
        };
        assert!(effects.len() < 10);
        assert!(server.gpadls.len() <= MAX_GPADLS);
    }
}
