// SPDX-License-Identifier: GPL-2.0-only

//! The protocol, one rule a test: what the host and the daemon may rely on.

mod support;

use hv_vss_engine::{Config, Refusal, Version, PACKET_MAX, QUEUE};
use hv_vss_uapi::{self as uapi, op, status};
use support::*;
use zerocopy::IntoBytes;

const SECOND: u64 = 1_000_000;

/// A world with mainline's times and no grace, which most rules do not need.
fn world(store: &mut Vec<u8>) -> World<'_> {
    world_with(
        store,
        Config {
            grace_ms: 0,
            ..Config::default()
        },
    )
}

fn world_with(store: &mut Vec<u8>, config: Config) -> World<'_> {
    store.resize(QUEUE * PACKET_MAX, 0);
    World::new(config, store)
}

/// Counts and first two versions of a negotiation's answer.
fn negotiated(packet: &[u8]) -> (u16, u16, Vec<(u16, u16)>) {
    let word = |at: usize| u16::from_le_bytes([packet[at], packet[at + 1]]);
    let versions = (36..packet.len().min(44) - 3)
        .step_by(4)
        .map(|at| (word(at), word(at + 2)))
        .collect();
    (word(28), word(30), versions)
}

#[test]
fn negotiation_picks_framework_3_and_vss_5() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    let offer = negotiation(&[(1, 0), (3, 0)], &[(4, 0), (5, 0), (6, 0), (7, 0)]);
    w.send(offer.clone());
    let (_, packet) = w.answers.pop().unwrap();
    assert_eq!(packet.len(), offer.len());
    assert_eq!(negotiated(&packet), (1, 1, vec![(3, 0), (5, 0)]));
    assert_eq!((status_of(&packet), packet[25]), (0, 5));
    let (fw, vss) = w.engine.versions().unwrap();
    assert_eq!(
        (fw, vss),
        (
            Version { major: 3, minor: 0 },
            Version { major: 5, minor: 0 }
        )
    );
}

#[test]
fn negotiation_without_a_common_version_gets_zero_versions() {
    type Offer<'a> = (&'a [(u16, u16)], &'a [(u16, u16)]);
    let cases: [Offer<'_>; 5] = [
        (&[(1, 0), (3, 0)], &[(3, 0)]),
        (&[(1, 0), (3, 0)], &[(4, 0)]),
        (&[(1, 0)], &[(5, 0)]),
        (&[], &[]),
        (&[(3, 0)], &[]),
    ];
    for (frameworks, messages) in cases {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        w.send(negotiation(frameworks, messages));
        let (_, packet) = w.answers.pop().unwrap();
        let (fw, vss, _) = negotiated(&packet);
        assert_eq!((fw, vss), (0, 0), "{frameworks:?} {messages:?}");
        assert_eq!(w.engine.versions(), None);
    }
}

#[test]
fn negotiation_with_lying_counts_gets_zero_versions() {
    for (frameworks, messages) in [
        (1u16, 3u16),
        (2, 1),
        (100, 100),
        (101, 1),
        (u16::MAX, u16::MAX),
    ] {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        let mut packet = negotiation(&[(3, 0)], &[(5, 0)]);
        packet[28..30].copy_from_slice(&frameworks.to_le_bytes());
        packet[30..32].copy_from_slice(&messages.to_le_bytes());
        w.send(packet);
        let (_, packet) = w.answers.pop().unwrap();
        let (fw, vss, _) = negotiated(&packet);
        assert_eq!((fw, vss), (0, 0), "{frameworks} {messages}");
    }
}

#[test]
fn negotiation_takes_a_hundred_versions_of_a_kind_and_no_more() {
    for (count, agreed) in [(100, 1), (101, 0)] {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        let mut many = vec![(1, 0); count - 1];
        many.push((3, 0));
        w.send(negotiation(&many, &[(5, 0)]));
        let (_, packet) = w.answers.pop().unwrap();
        let (fw, vss, _) = negotiated(&packet);
        assert_eq!((fw, vss), (agreed, agreed), "{count}");
    }
}

#[test]
fn negotiation_never_waits_for_a_daemon_or_a_request() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    w.ask(op::FREEZE);
    w.read().unwrap();
    w.send(negotiation(&[(3, 0)], &[(5, 0)]));
    assert_eq!(w.answers.len(), 1);
}

#[test]
fn freeze_thaw_and_hot_backup_go_to_the_daemon() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    for operation in [op::HOT_BACKUP, op::FREEZE, op::THAW] {
        let request = w.ask(operation);
        let code = if operation == op::THAW {
            0x1234
        } else {
            status::OK
        };
        assert_eq!(w.answered(request), None);
        let seen = w.serve(operation, code);
        assert_eq!(w.answered(request), Some(code));
        let limit = if operation == op::FREEZE {
            900_000
        } else {
            30_000
        };
        assert_eq!(seen.time_left_ms, limit);
    }
}

#[test]
fn hot_backup_says_no_auto_recovery_only_on_success() {
    for abi in [1, 2] {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        if abi == 1 {
            w.daemon_v1();
        } else {
            w.daemon_v2();
        }
        for (code, flags) in [(status::OK, 5), (status::FAIL, 0xaaaa_aaaa)] {
            w.ask(op::HOT_BACKUP);
            w.serve(op::HOT_BACKUP, code);
            let (_, packet) = w.answers.pop().unwrap();
            assert_eq!((status_of(&packet), body_flags(&packet)), (code, flags));
        }
    }
}

#[test]
fn everything_else_is_answered_in_here() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    let others = (0..=u8::MAX).filter(|o| ![op::HOT_BACKUP, op::FREEZE, op::THAW].contains(o));
    for operation in others {
        let request = w.ask(operation);
        assert_eq!(
            w.answered(request),
            Some(status::OK),
            "operation {operation}"
        );
    }
    w.ask(op::GET_DM_INFO);
    assert_eq!(body_flags(&w.answers.last().unwrap().1), 0);
}

#[test]
fn short_messages_are_answered_and_headless_ones_dropped() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    let whole = request(op::GET_DM_INFO);
    for len in 0..=whole.len() {
        let before = w.answers.len();
        w.send(whole[..len].to_vec());
        let answered = w.answers.len() - before;
        assert_eq!(answered, usize::from(len >= 36), "{len} bytes");
    }
    assert_eq!(w.engine.stats().bad_packets, 36);
}

#[test]
fn messages_of_other_components_are_dropped() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    for kind in [1, 2, 3, 4, 6, 7, u16::MAX] {
        w.send(ic_packet(kind, &[0; 24]));
    }
    assert!(w.answers.is_empty());
    assert_eq!(w.engine.stats().bad_packets, 7);
}

#[test]
fn over_long_requests_are_answered_whatever_their_length() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    for len in [8192, 13_312, 28_000] {
        let request = w.send(vss_packet(op::AUTO_RECOVER, &vec![0x55; len]));
        assert_eq!(w.answered(request), Some(status::OK));
    }
    // One that the daemon would have to serve fits up to the greatest IC message of 13,312 bytes
    // (its header's 20 and the VSS header's 8 included).
    let request = w.send(vss_packet(op::HOT_BACKUP, &vec![0x55; 13_312 - 28]));
    w.serve(op::HOT_BACKUP, status::OK);
    assert_eq!(w.answered(request), Some(status::OK));
    let request = w.send(vss_packet(op::HOT_BACKUP, &vec![0x55; 13_312 - 19]));
    assert_eq!(w.answered(request), Some(status::FAIL));
    assert_eq!(w.engine.queued(), 0);
}

#[test]
fn freeze_hands_on_the_lun_list_if_it_is_sound() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    for (luns, payload) in [(0, 6252), (260, 6252), (261, 0), (u32::MAX, 0)] {
        w.send(freeze(luns));
        let seen = w.serve(op::FREEZE, status::OK);
        assert_eq!(seen.payload, payload, "{luns} disks");
    }
    w.send(vss_packet(op::FREEZE, &[0; 24]));
    assert_eq!(w.serve(op::FREEZE, status::OK).payload, 0);

    w.send(freeze(1));
    let bytes = w.read_bytes().unwrap();
    assert_eq!(bytes.len(), uapi::MAX_FRAME);
    assert_eq!(bytes[48..52], 3u32.to_le_bytes());
    assert_eq!(bytes[56..60], 1u32.to_le_bytes());
}

#[test]
fn requests_are_served_in_order_and_a_full_queue_fails_the_rest() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    let order = [op::HOT_BACKUP, op::THAW, op::HOT_BACKUP, op::FREEZE];
    let requests = order.map(|operation| w.ask(operation));
    let fifth = w.ask(op::HOT_BACKUP);
    assert_eq!(w.answered(fifth), Some(status::FAIL));
    for (operation, request) in order.into_iter().zip(requests) {
        assert_eq!(w.answered(request), None);
        let code = w.fresh_status();
        w.serve(operation, code);
        assert_eq!(w.answered(request), Some(code));
    }
    assert_eq!(w.engine.stats().overruns, 1);
}

#[test]
fn a_request_that_the_daemon_leaves_fails_when_its_time_is_over() {
    for (operation, seconds) in [(op::FREEZE, 900), (op::THAW, 30), (op::HOT_BACKUP, 30)] {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        w.daemon_v2();
        let request = w.ask(operation);
        let seen = w.read().unwrap();
        w.pass(seconds * SECOND - 1);
        assert_eq!(w.answered(request), None);
        w.pass(1);
        assert_eq!(w.answered(request), Some(status::FAIL));
        assert_eq!(w.answer(seen, status::OK), Err(Refusal::Stale));
    }
}

#[test]
fn a_late_answer_does_not_hit_the_next_request() {
    for abi in [1, 2] {
        let mut store = Vec::new();
        let mut w = world_with(&mut store, Config::default());
        if abi == 1 {
            w.daemon_v1();
        } else {
            w.daemon_v2();
        }
        w.ask(op::HOT_BACKUP);
        let late = w.read().unwrap();
        w.pass(31 * SECOND);
        let next = w.ask(op::HOT_BACKUP);
        assert_eq!(w.answer(late, status::OK), Err(Refusal::Stale));
        assert_eq!(w.answered(next), None);
        w.serve(op::HOT_BACKUP, 0x77);
        assert_eq!(w.answered(next), Some(0x77));
    }
}

#[test]
fn without_a_daemon_and_without_grace_requests_fail_at_once() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    for opened in [false, true] {
        for operation in [op::FREEZE, op::THAW, op::HOT_BACKUP] {
            let request = w.ask(operation);
            assert_eq!(w.answered(request), Some(status::FAIL), "opened: {opened}");
        }
        w.open();
    }
}

#[test]
fn within_the_grace_time_a_daemon_can_come_back() {
    let mut store = Vec::new();
    let mut w = world_with(&mut store, Config::default());
    let request = w.ask(op::FREEZE);
    w.pass(4 * SECOND);
    assert_eq!(w.answered(request), None);
    w.daemon_v2();
    let seen = w.read().unwrap();
    assert_eq!(seen.time_left_ms, 896_000, "counted from the arrival");
    w.answer(seen, status::OK).unwrap();
    assert_eq!(w.answered(request), Some(status::OK));
}

#[test]
fn after_the_grace_time_requests_fail() {
    let mut store = Vec::new();
    let mut w = world_with(&mut store, Config::default());
    let first = w.ask(op::FREEZE);
    w.pass(SECOND);
    let second = w.ask(op::HOT_BACKUP);
    w.pass(4 * SECOND - 1);
    assert_eq!(w.answered(first), None);
    w.pass(1);
    assert_eq!(w.answered(first), Some(status::FAIL));
    assert_eq!(w.answered(second), None, "it came later");
    w.pass(SECOND);
    assert_eq!(w.answered(second), Some(status::FAIL));
}

#[test]
fn a_daemon_that_goes_fails_what_it_has_read_and_nothing_else() {
    let mut store = Vec::new();
    let mut w = world_with(&mut store, Config::default());
    w.daemon_v2();
    let read = w.ask(op::HOT_BACKUP);
    let queued = w.ask(op::FREEZE);
    w.read().unwrap();
    w.release();
    assert_eq!(w.answered(read), Some(status::FAIL));
    assert_eq!(w.answered(queued), None);
    w.daemon_v2();
    w.serve(op::FREEZE, status::OK);
    assert_eq!(w.answered(queued), Some(status::OK));
}

#[test]
fn a_request_that_the_daemon_leaves_unread_waits_for_the_next_one() {
    let mut store = Vec::new();
    let mut w = world_with(&mut store, Config::default());
    w.daemon_v2();
    let request = w.ask(op::FREEZE);
    w.pass(10 * SECOND);
    w.release();
    w.pass(5 * SECOND - 1);
    assert_eq!(w.answered(request), None, "the grace begins with the close");
    w.daemon_v2();
    w.serve(op::FREEZE, status::OK);
    assert_eq!(w.answered(request), Some(status::OK));

    let request = w.ask(op::HOT_BACKUP);
    w.pass(27 * SECOND);
    w.release();
    w.pass(3 * SECOND);
    let answered = w.answered(request);
    assert_eq!(answered, Some(status::FAIL), "within its own time, too");
}

#[test]
fn the_thaw_of_a_freeze_whose_daemon_died_fails() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    w.ask(op::FREEZE);
    w.serve(op::FREEZE, status::OK);
    w.release();
    let alone = w.ask(op::THAW);
    assert_eq!(w.answered(alone), Some(status::FAIL));

    // A daemon that comes back may thaw, but cannot make the backup good, however often asked.
    w.daemon_v2();
    for _ in 0..2 {
        let thaw = w.ask(op::THAW);
        w.serve(op::THAW, status::OK);
        assert_eq!(w.answered(thaw), Some(status::FAIL));
    }

    // The next backup stands for itself.
    for operation in [op::FREEZE, op::THAW] {
        let request = w.ask(operation);
        w.serve(operation, status::OK);
        assert_eq!(w.answered(request), Some(status::OK));
    }
}

#[test]
fn an_early_thaw_fails_the_hosts_thaw() {
    for reason in (0..=8).chain([u32::MAX]) {
        for thaw_is_open in [false, true] {
            let mut store = Vec::new();
            let mut w = world(&mut store);
            w.daemon_v2();
            w.ask(op::FREEZE);
            let freeze = w.serve(op::FREEZE, status::OK);
            let mut thaw = None;
            if thaw_is_open {
                thaw = Some(w.ask(op::THAW));
                w.read().unwrap();
            }
            w.tell_thawed(freeze.id, reason).unwrap();
            assert_eq!(
                w.tell_thawed(freeze.id, reason),
                Err(Refusal::Stale),
                "once"
            );
            let thaw = thaw.unwrap_or_else(|| {
                let thaw = w.ask(op::THAW);
                w.read().unwrap();
                thaw
            });
            let seen = w.in_hand.unwrap();
            w.answer(seen, status::OK).unwrap();
            assert_eq!(w.answered(thaw), Some(status::FAIL));
        }
    }
}

#[test]
fn an_early_thaw_notice_must_name_the_freeze_in_force() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    assert_eq!(w.tell_thawed(1, 1), Err(Refusal::Stale));
    w.ask(op::FREEZE);
    let open = w.read().unwrap();
    assert_eq!(
        w.tell_thawed(open.id, 1),
        Err(Refusal::Stale),
        "not answered yet"
    );
    w.answer(open, status::OK).unwrap();
    for id in [0, open.id + 1, u64::MAX] {
        assert_eq!(w.tell_thawed(id, 1), Err(Refusal::Stale));
    }
    w.ask(op::THAW);
    w.serve(op::THAW, status::OK);
    assert_eq!(
        w.tell_thawed(open.id, 1),
        Err(Refusal::Stale),
        "the host has thawed"
    );
}

#[test]
fn thaw_without_freeze_and_freeze_twice_are_the_daemons_business() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    for operation in [op::THAW, op::FREEZE, op::FREEZE, op::THAW] {
        let request = w.ask(operation);
        w.serve(operation, status::OK);
        assert_eq!(w.answered(request), Some(status::OK));
    }
}

#[test]
fn a_second_freeze_that_fails_breaks_the_first() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    for code in [status::OK, status::FAIL] {
        w.ask(op::FREEZE);
        w.serve(op::FREEZE, code);
    }
    let thaw = w.ask(op::THAW);
    w.serve(op::THAW, status::OK);
    assert_eq!(w.answered(thaw), Some(status::FAIL));
}

#[test]
fn answers_must_name_the_request_and_its_operation() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    let request = w.ask(op::FREEZE);
    assert_eq!(
        w.write(&answer(1, op::FREEZE, 0)),
        Err(Refusal::Stale),
        "not read yet"
    );
    let seen = w.read().unwrap();
    for id in [0, seen.id - 1, seen.id + 1, u64::MAX] {
        assert_eq!(w.write(&answer(id, op::FREEZE, 0)), Err(Refusal::Stale));
    }
    assert_eq!(
        w.write(&answer(seen.id, op::THAW, 0)),
        Err(Refusal::WrongOperation)
    );
    w.answer(seen, status::OK).unwrap();
    assert_eq!(
        w.write(&answer(seen.id, op::FREEZE, 0)),
        Err(Refusal::Stale),
        "once"
    );
    assert_eq!(w.answered(request), Some(status::OK));
}

#[test]
fn first_write_settles_the_abi() {
    let good = register();
    let mut bad = vec![
        Vec::new(),
        vec![0; 11],
        vec![0; 13],
        vec![0; 32],
        vec![0xff; 64],
    ];
    for (at, value) in [(0, 1), (0, 3), (4, 31), (8, 9), (12, 1), (16, 1), (24, 1)] {
        let mut frame = good.clone();
        frame[at] = value;
        bad.push(frame);
    }
    bad.push(good[..31].to_vec());
    bad.push([&good[..], &[0]].concat());

    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.open();
    for bytes in &bad {
        assert_eq!(w.write(bytes), Err(Refusal::Malformed), "{bytes:?}");
    }
    for operation in [op::FREEZE, op::THAW, 0, 127, 130, 255] {
        assert_eq!(w.register_v1(operation), Err(Refusal::OutOfTurn));
    }
    assert_eq!(w.write(&answer(1, op::FREEZE, 0)), Err(Refusal::OutOfTurn));
    assert_eq!(w.write(&thawed(1, 1)), Err(Refusal::OutOfTurn));
    assert!(!w.engine.readable());
    w.register_v2().unwrap();
    assert_eq!(w.write(&register()), Err(Refusal::OutOfTurn));
    assert_eq!(w.register_v1(op::REGISTER1), Err(Refusal::Malformed));
    assert_eq!(w.engine.abi(), 2);
}

#[test]
fn longer_frames_of_a_newer_daemon_are_taken() {
    // Longer by more than the engine is shown of it.
    let grown = |frame: Vec<u8>| {
        let mut frame = [frame, vec![0xee; 100]].concat();
        let size = frame.len() as u32;
        frame[4..8].copy_from_slice(&size.to_ne_bytes());
        frame
    };
    let mut store = Vec::new();
    let mut w = world(&mut store);
    let write = |w: &mut World<'_>, frame: Vec<u8>| {
        let frame = grown(frame);
        for wrong in [frame.len() - 1, frame.len() + 1] {
            assert_eq!(w.write_of(&frame[..64], wrong), Err(Refusal::Malformed));
        }
        w.write_of(&frame[..64], frame.len())
    };
    w.strict = false; // the harness does not see what these bytes say
    w.open();
    let mut hello = register();
    hello[28..32].fill(0xff); // features that nobody knows
    write(&mut w, hello).unwrap();
    w.read_bytes().unwrap();
    let freeze = w.ask(op::FREEZE);
    let seen = w.read().unwrap();
    write(&mut w, answer(seen.id, op::FREEZE, status::OK)).unwrap();
    assert_eq!(w.answered(freeze), Some(status::OK));
    write(&mut w, thawed(seen.id, 1)).unwrap();
    assert_eq!(w.engine.freeze_state(), "broken");

    // What a kind means that is not known here nobody knows.
    let unknown = uapi::Answer {
        frame: frame(6, 32, 0),
        ..Default::default()
    };
    assert_eq!(w.write(unknown.as_bytes()), Err(Refusal::Malformed));
}

#[test]
fn the_replies_to_the_registrations() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.open();
    w.register_v1(op::REGISTER).unwrap();
    assert_eq!(w.read_bytes(), None, "the older registration has no reply");
    w.release();

    w.open();
    w.register_v1(op::REGISTER1).unwrap();
    assert_eq!(w.read_bytes(), Some(vec![129, 0, 0, 0]));
    assert_eq!(w.read_bytes(), None);
    w.release();

    w.open();
    w.register_v2().unwrap();
    let expected = uapi::Registered {
        frame: frame(uapi::frame::REGISTERED, 40, 0),
        abi_version: 2,
        max_frame: 6300,
        features: 0,
        max_held: 0,
    };
    assert_eq!(w.read_bytes(), Some(expected.as_bytes().to_vec()));
    assert_eq!(w.read_bytes(), None);
}

#[test]
fn no_v1_answer_is_taken_for_a_registration() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v1();
    // These statuses begin with the byte of REGISTER and REGISTER1.
    for code in [0x8000_0080u32, 0x8000_0081, 128, 129] {
        let request = w.ask(op::HOT_BACKUP);
        w.serve(op::HOT_BACKUP, code);
        assert_eq!(w.answered(request), Some(code));
        // Late or unasked they are refused, and no reply to a registration appears.
        let stray = uapi::VssMsg::answer_v1(code);
        assert_eq!(w.write(stray.as_bytes()), Err(Refusal::Stale));
        assert!(!w.engine.readable());
    }
}

#[test]
fn v1_writes_of_another_length_are_malformed() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v1();
    w.ask(op::FREEZE);
    let seen = w.read().unwrap();
    for len in (0..64).filter(|len| *len != 12) {
        assert_eq!(
            w.write(&vec![0; len]),
            Err(Refusal::Malformed),
            "{len} bytes"
        );
    }
    w.answer(seen, status::OK).unwrap();
}

#[test]
fn a_read_that_fails_loses_nothing() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    let request = w.ask(op::FREEZE);
    assert_eq!(w.engine.peek(w.now, &mut [0; 100]), None, "too short");
    let mut buffer = [0; uapi::MAX_FRAME];
    let shown = w.engine.peek(w.now, &mut buffer).unwrap();
    assert_eq!(
        w.engine.peek(w.now + 5, &mut buffer).unwrap(),
        shown,
        "shown, not taken"
    );
    w.serve(op::FREEZE, status::OK);
    assert_eq!(w.answered(request), Some(status::OK));
}

#[test]
fn a_read_that_ends_after_the_request_takes_nothing_else() {
    let mut store = Vec::new();
    let mut w = world_with(&mut store, Config::default());
    w.daemon_v2();
    w.ask(op::HOT_BACKUP);
    let mut buffer = [0; uapi::MAX_FRAME];
    let (_, token) = w.engine.peek(w.now, &mut buffer).unwrap();
    w.pass(31 * SECOND);
    w.ask(op::HOT_BACKUP);
    w.engine.taken(w.now, token, &mut w.out);
    assert!(
        w.engine.readable(),
        "the second request is still to be read"
    );
}

#[test]
fn one_opener_at_a_time() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    assert!(w.open());
    assert!(!w.open());
    w.release();
    assert!(w.open());
}

#[test]
fn a_full_ring_is_counted_and_wedges_nothing() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    w.out.ring_full = true;
    w.ask(op::GET_DM_INFO);
    w.ask(op::HOT_BACKUP);
    w.serve(op::HOT_BACKUP, status::OK);
    w.out.ring_full = false;
    assert_eq!(w.engine.stats().unsent, 2);
    let request = w.ask(op::HOT_BACKUP);
    w.serve(op::HOT_BACKUP, status::OK);
    assert_eq!(w.answered(request), Some(status::OK));
}

#[test]
fn a_channel_that_closes_fails_what_is_open() {
    for reason in [uapi::thawed::SLEEP, uapi::thawed::GONE] {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        w.daemon_v2();
        let open = [op::HOT_BACKUP, op::THAW, op::FREEZE].map(|operation| w.ask(operation));
        w.read().unwrap();
        w.close(reason);
        for request in open {
            assert_eq!(w.answered(request), Some(status::FAIL));
        }
        assert_eq!(w.engine.versions(), None);
    }
}

#[test]
fn counters_add_up() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    w.ask(op::FREEZE);
    w.pass(7);
    w.serve(op::FREEZE, status::OK);
    w.ask(op::FREEZE);
    w.read().unwrap();
    w.expire();
    let stats = w.engine.stats();
    let [_, _, freeze, ..] = stats.ops;
    assert_eq!(
        (freeze.requests, freeze.failures, freeze.timeouts),
        (2, 1, 1)
    );
    assert_eq!(
        (freeze.last_us, freeze.max_us),
        (900 * SECOND, 900 * SECOND)
    );
    assert_eq!((stats.registrations, stats.broken), (1, 1));
}
