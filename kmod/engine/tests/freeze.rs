// SPDX-License-Identifier: GPL-2.0-only

//! What the host is told of its freeze, and that whatever is frozen is thawed: one rule a test.

mod support;

use hv_vss_engine::{Config, Left, Note, Refusal, PACKET_MAX, QUEUE};
use hv_vss_uapi::{self as uapi, op, status, thawed};
use support::*;
use zerocopy::{FromBytes, IntoBytes};

const SECOND: u64 = 1_000_000;

/// The module's own times, and a module that can hold.
const CONFIG: Config = Config {
    freeze_ms: 900_000,
    other_ms: 30_000,
    grace_ms: 5_000,
    max_held: 16,
};

fn world(store: &mut Vec<u8>) -> World<'_> {
    world_with(store, CONFIG)
}

fn world_with(store: &mut Vec<u8>, config: Config) -> World<'_> {
    store.resize(QUEUE * PACKET_MAX, 0);
    World::new(config, store)
}

/// A FREEZE that succeeds, and the id that the daemon knows it by.
fn frozen(w: &mut World<'_>) -> u64 {
    let freeze = w.ask(op::FREEZE);
    let seen = w.serve(op::FREEZE, status::OK);
    assert_eq!(w.answered(freeze), Some(status::OK));
    seen.id
}

/// A FREEZE for which the daemon has the module hold something; it is read and not answered.
fn holding(w: &mut World<'_>) -> (u64, Seen) {
    let freeze = w.ask(op::FREEZE);
    let seen = w.read().unwrap();
    w.hold(seen.id).unwrap();
    (freeze, seen)
}

/// The next backup is a good one.
fn good_backup(w: &mut World<'_>) {
    for operation in [op::HOT_BACKUP, op::FREEZE, op::THAW] {
        let request = w.ask(operation);
        w.serve(operation, status::OK);
        assert_eq!(w.answered(request), Some(status::OK));
    }
}

/// The notice that the daemon reads next.
fn notice(w: &mut World<'_>) -> (u64, u32) {
    let bytes = w.read_bytes().expect("something to read");
    let notice = uapi::Thawed::read_from_bytes(&bytes).expect("a notice");
    (notice.frame.id, notice.reason)
}

// --- The next device ---

#[test]
fn a_freeze_that_broke_with_the_device_is_told_by_the_next_one() {
    type Way = (&'static str, fn(&mut World<'_>));
    let ways: [Way; 4] = [
        ("frozen", |w| {
            frozen(w);
        }),
        // Of what is answered when the channel closes nobody knows whether the host has read it.
        ("being frozen", |w| {
            w.ask(op::FREEZE);
            w.read().unwrap();
        }),
        ("being thawed", |w| {
            frozen(w);
            w.ask(op::THAW);
            w.read().unwrap();
        }),
        ("thawed by the host, and not read", |w| {
            frozen(w);
            w.ask(op::THAW);
        }),
    ];
    for (name, way) in ways {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        w.daemon(1);
        way(&mut w);
        w.close(thawed::GONE);
        let left = w.engine.left();
        assert!(left.broken && !left.told, "{name}");
        // A FREEZE that fails is no word of the one before.
        let mut store = vec![0; QUEUE * PACKET_MAX];
        let mut w = World::after(CONFIG, &mut store, left);
        w.daemon(1);
        w.serve(op::THAW, status::OK);
        w.ask(op::FREEZE);
        w.serve(op::FREEZE, status::FAIL);
        let thaw = w.ask(op::THAW);
        w.serve(op::THAW, status::OK);
        assert_eq!(w.answered(thaw), Some(status::FAIL), "{name}");
        good_backup(&mut w);
        assert_eq!(w.engine.left(), Left::default());
    }
}

#[test]
fn what_the_host_was_told_on_one_device_it_is_told_on_the_next() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon(1);
    frozen(&mut w);
    w.release();
    w.daemon(1);
    let thaw = w.ask(op::THAW);
    w.serve(op::THAW, status::OK);
    assert_eq!(w.answered(thaw), Some(status::FAIL));
    let mut left = w.engine.left();
    // However often the device goes.
    for devices in 1..4 {
        let mut store = vec![0; QUEUE * PACKET_MAX];
        let mut w = World::after(CONFIG, &mut store, left);
        w.daemon(1);
        let thaw = w.ask(op::THAW);
        w.serve(op::THAW, status::OK);
        assert_eq!(w.answered(thaw), Some(status::FAIL), "device {devices}");
        w.close(thawed::GONE);
        left = w.engine.left();
        assert!(left.broken && left.told);
    }
    let mut store = vec![0; QUEUE * PACKET_MAX];
    let mut w = World::after(CONFIG, &mut store, left);
    w.daemon(1);
    w.ask(op::FREEZE);
    w.serve(op::FREEZE, status::FAIL);
    // It knows that it has none.
    let thaw = w.ask(op::THAW);
    w.serve(op::THAW, status::OK);
    assert_eq!(w.answered(thaw), Some(status::OK));
}

#[test]
fn what_is_frozen_when_the_device_goes_is_thawed_with_the_next_one() {
    type Way = (&'static str, fn(&mut World<'_>));
    let ways: [Way; 4] = [
        ("frozen", |w| {
            frozen(w);
        }),
        ("frozen, and the daemon killed", |w| {
            frozen(w);
            w.release();
        }),
        ("being frozen", |w| {
            w.ask(op::FREEZE);
            w.read().unwrap();
        }),
        ("being thawed", |w| {
            frozen(w);
            w.ask(op::THAW);
            w.read().unwrap();
        }),
    ];
    for (name, way) in ways {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        w.daemon(1);
        way(&mut w);
        w.close(thawed::GONE);
        let mut left = w.engine.left();
        // Neither does a device get around it that has no daemon in its time.
        for devices in 2..4 {
            let mut store = vec![0; QUEUE * PACKET_MAX];
            let mut w = World::after(CONFIG, &mut store, left);
            assert_eq!(w.engine.stage_name(), "held");
            assert!(w.engine.owed_thaw().is_some(), "{name}, device {devices}");
            w.close(thawed::GONE);
            left = w.engine.left();
        }
        let mut store = vec![0; QUEUE * PACKET_MAX];
        let mut w = World::after(CONFIG, &mut store, left);
        w.daemon(1);
        // This FREEZE waits until that is done.
        let freeze = w.ask(op::FREEZE);
        w.serve(op::THAW, status::OK);
        w.serve(op::FREEZE, status::OK);
        assert_eq!(w.answered(freeze), Some(status::OK), "{name}");
    }
}

#[test]
fn what_the_module_held_when_the_device_went_is_thawed() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    let (_, seen) = holding(&mut w);
    w.answer(seen, status::OK).unwrap();
    w.close(thawed::GONE);
    let left = Left {
        broken: true,
        ..Left::default()
    };
    assert_eq!(w.engine.left(), left);
}

/// What a module finds that has just been loaded.
const LOADED: Left = Left {
    broken: false,
    told: false,
    unseen: true,
    owes_thaw: false,
};

/// How often it was noted, since the last request came, that the module knows of no freeze.
fn unvouched(w: &World<'_>) -> usize {
    let is_it = |note: &&Note| matches!(note, Note::Unvouched(_));
    w.out.notes.iter().filter(is_it).count()
}

#[test]
fn no_thaw_is_good_before_the_first_freeze_of_the_module() {
    for abi in [1, 2] {
        let mut left = LOADED;
        // Nor is it when the device was bound anew, nor the second time.
        for _ in 0..2 {
            let mut store = vec![0; QUEUE * PACKET_MAX];
            let mut w = World::after(CONFIG, &mut store, left);
            w.daemon(abi);
            for _ in 0..2 {
                let thaw = w.ask(op::THAW);
                w.serve(op::THAW, status::OK);
                assert_eq!(w.answered(thaw), Some(status::FAIL));
                assert_eq!(unvouched(&w), 1, "it says why, once");
            }
            // That it has failed is its daemon's own word.
            w.ask(op::THAW);
            w.serve(op::THAW, status::FAIL);
            assert_eq!(unvouched(&w), 0);
            w.close(thawed::GONE);
            left = w.engine.left();
            assert_eq!(left, LOADED);
        }
    }
}

#[test]
fn the_first_freeze_of_the_module_ends_the_doubt() {
    for code in [status::OK, status::FAIL] {
        let mut store = vec![0; QUEUE * PACKET_MAX];
        let mut w = World::after(CONFIG, &mut store, LOADED);
        w.daemon(1);
        let freeze = w.ask(op::FREEZE);
        w.serve(op::FREEZE, code);
        assert_eq!(w.answered(freeze), Some(code));
        // Whatever it was told, the host thaws what is of this FREEZE.
        let thaw = w.ask(op::THAW);
        w.serve(op::THAW, status::OK);
        assert_eq!(w.answered(thaw), Some(status::OK));
        assert_eq!(unvouched(&w), 0);
        assert_eq!(w.engine.left(), Left::default());
    }
}

// --- Sleep ---

#[test]
fn a_freeze_on_the_way_to_sleep_fails_at_once() {
    for abi in [0, 1, 2] {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        if abi > 0 {
            w.daemon(abi);
        }
        // Nothing is frozen.
        w.prepare_sleep();
        assert!(w.engine.thawed_for_sleep());
        let freeze = w.ask(op::FREEZE);
        assert_eq!(w.answered(freeze), Some(status::FAIL));
        assert!(!w.engine.readable());
        if abi > 0 {
            let check = w.ask(op::HOT_BACKUP);
            w.serve(op::HOT_BACKUP, status::OK);
            assert_eq!(w.answered(check), Some(status::OK), "that can be served");
            w.resume();
            good_backup(&mut w);
        }
    }
}

#[test]
fn a_channel_that_is_opened_again_does_not_end_the_sleep() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    w.prepare_sleep();
    w.close(thawed::SLEEP);
    // The image is written; user space stands still.
    w.channel = true;
    let freeze = w.ask(op::FREEZE);
    assert_eq!(w.answered(freeze), Some(status::FAIL));
}

#[test]
fn what_the_daemon_froze_is_thawed_before_the_sleep() {
    for abi in [1, 2] {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        w.daemon(abi);
        frozen(&mut w);
        w.prepare_sleep();
        assert!(!w.engine.thawed_for_sleep());
        w.read().unwrap();
        assert!(!w.engine.thawed_for_sleep(), "it is only being done");
        let thaw = w.in_hand.unwrap();
        assert_eq!(thaw.operation, op::THAW);
        w.answer(thaw, status::OK).unwrap();
        assert!(w.engine.thawed_for_sleep());
        w.close(thawed::SLEEP);
        w.resume();
        assert!(!w.engine.readable(), "once is enough");
        let thaw = w.ask(op::THAW);
        w.serve(op::THAW, status::OK);
        assert_eq!(w.answered(thaw), Some(status::FAIL), "it did not last");
        good_backup(&mut w);
    }
}

#[test]
fn a_daemon_that_could_hold_nothing_has_frozen_by_itself() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon(2);
    let freeze = w.ask(op::FREEZE);
    let seen = w.read().unwrap();
    // What the module began then failed.
    w.engine.may_hold(seen.id).unwrap();
    w.engine.holds(seen.id);
    w.answer(seen, status::OK).unwrap();
    assert_eq!(w.answered(freeze), Some(status::OK));
    w.prepare_sleep();
    assert!(!w.engine.thawed_for_sleep());
    w.serve(op::THAW, status::OK);
    assert!(w.engine.thawed_for_sleep());
}

#[test]
fn the_hosts_thaw_before_the_sleep_does_for_it() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    frozen(&mut w);
    let thaw = w.ask(op::THAW);
    let seen = w.read().unwrap();
    w.prepare_sleep();
    assert!(!w.engine.thawed_for_sleep(), "it is only being done");
    w.answer(seen, status::OK).unwrap();
    assert!(w.engine.thawed_for_sleep());
    assert!(!w.engine.readable(), "once is enough");
    // All stood still until the host had sent it.
    assert_eq!(w.answered(thaw), Some(status::OK));
}

#[test]
fn a_freeze_that_is_being_made_is_called_off_before_the_sleep() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    let freeze = w.ask(op::FREEZE);
    let seen = w.read().unwrap();
    w.prepare_sleep();
    assert_eq!(w.answered(freeze), Some(status::FAIL));
    assert!(!w.engine.thawed_for_sleep());
    assert_eq!(w.answer(seen, status::OK), Err(Refusal::Stale));
    w.serve(op::THAW, status::OK);
    assert!(w.engine.thawed_for_sleep());
}

#[test]
fn a_freeze_that_ran_out_holds_up_the_sleep_until_it_is_thawed() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    w.ask(op::FREEZE);
    w.read().unwrap();
    w.pass(900 * SECOND);
    w.prepare_sleep();
    assert!(!w.engine.thawed_for_sleep(), "the daemon still works on it");
    w.serve(op::THAW, status::OK);
    assert!(w.engine.thawed_for_sleep());
}

#[test]
fn a_daemon_that_did_not_thaw_in_time_does_so_after_the_sleep() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v1();
    frozen(&mut w);
    w.prepare_sleep();
    w.close(thawed::SLEEP);
    w.now += 3600 * SECOND;
    w.resume();
    w.serve(op::THAW, status::OK);
}

#[test]
fn the_sleep_waits_for_a_daemon_that_opens_anew_to_thaw() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon(1);
    w.ask(op::FREEZE);
    let seen = w.read().unwrap();
    w.prepare_sleep();
    // As mainline's does after that: it closes, then it thaws, then it opens the device again.
    assert_eq!(w.answer(seen, status::OK), Err(Refusal::Stale));
    w.release();
    w.pass(4 * SECOND);
    assert!(!w.engine.thawed_for_sleep());
    w.daemon(1);
    w.pass(2 * SECOND);
    assert!(!w.engine.thawed_for_sleep(), "it is there, and has not yet");
    w.serve(op::THAW, status::OK);
    assert!(w.engine.thawed_for_sleep());
}

#[test]
fn a_daemon_that_goes_holds_up_the_sleep_for_the_grace_time() {
    // One that opens anew needs some time for it, though no request waits for it.
    for (grace_ms, wait_ms) in [(0, 2_000), (5_000, 5_000)] {
        for before in [false, true] {
            let mut store = Vec::new();
            let mut w = world_with(&mut store, Config { grace_ms, ..CONFIG });
            w.daemon_v2();
            frozen(&mut w);
            if before {
                w.release();
                w.prepare_sleep();
            } else {
                w.prepare_sleep();
                w.release();
            }
            w.pass(wait_ms * 1000 - 1);
            assert!(!w.engine.thawed_for_sleep());
            assert!(w.expire(), "the end of it is not missed");
            assert!(w.engine.thawed_for_sleep());
            assert_eq!(w.engine.deadline(), None);
        }
    }
}

#[test]
fn a_daemon_that_went_long_ago_holds_up_no_sleep() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v1();
    frozen(&mut w);
    w.release();
    w.pass(10 * SECOND);
    w.prepare_sleep();
    assert!(w.engine.thawed_for_sleep());
    // One that comes while there still is time is given it.
    w.daemon_v1();
    assert!(!w.engine.thawed_for_sleep());
    w.serve(op::THAW, status::OK);
    assert!(w.engine.thawed_for_sleep());
}

#[test]
fn what_the_module_holds_is_thawed_without_asking_the_daemon() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    let (_, seen) = holding(&mut w);
    w.answer(seen, status::OK).unwrap();
    w.prepare_sleep();
    assert!(w.engine.thawed_for_sleep());
    assert_eq!(notice(&mut w), (seen.id, thawed::SLEEP));
    assert!(!w.engine.readable());
}

// --- THAW behind FREEZE ---

#[test]
fn a_thaw_behind_an_open_freeze_calls_it_off() {
    for abi in [1, 2] {
        for read in [false, true] {
            let mut store = Vec::new();
            let mut w = world(&mut store);
            w.daemon(abi);
            let freeze = w.ask(op::FREEZE);
            let making = if read { w.read() } else { None };
            let thaw = w.ask(op::THAW);
            assert_eq!(w.answered(freeze), Some(status::FAIL), "at once");
            assert_eq!(w.answered(thaw), None);
            if abi == 1 {
                // Reads no further before it has answered.
                if let Some(making) = making {
                    assert_eq!(w.answer(making, status::OK), Err(Refusal::Stale));
                }
            }
            let calling_off = w.read().unwrap();
            assert_eq!(calling_off.operation, op::THAW, "at once, too");
            if let (2, Some(making)) = (abi, making) {
                assert_eq!(w.answer(making, status::OK), Err(Refusal::Stale));
            }
            w.answer(calling_off, status::OK).unwrap();
            // The host knows that it has no freeze; this says that all goes on.
            assert_eq!(w.answered(thaw), Some(status::OK));
            assert!(!w.engine.readable(), "one THAW is enough");
            good_backup(&mut w);
        }
    }
}

#[test]
fn a_thaw_that_calls_off_a_second_freeze_fails_if_it_broke_the_first() {
    for (read, thaw_says) in [(false, status::OK), (true, status::FAIL)] {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        w.daemon_v2();
        frozen(&mut w);
        let second = w.ask(op::FREEZE);
        if read {
            w.read().unwrap();
        }
        let thaw = w.ask(op::THAW);
        assert_eq!(w.answered(second), Some(status::FAIL));
        w.serve(op::THAW, status::OK);
        assert_eq!(w.answered(thaw), Some(thaw_says), "read: {read}");
    }
}

#[test]
fn a_thaw_that_cannot_be_queued_calls_off_a_freeze_all_the_same() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    let freeze = w.ask(op::FREEZE);
    w.read().unwrap();
    let thaw = w.send(vss_packet(op::THAW, &[0; 14_000]));
    assert_eq!(w.answered(freeze), Some(status::FAIL));
    assert_eq!(w.answered(thaw), Some(status::FAIL));
    w.serve(op::THAW, status::OK);
    good_backup(&mut w);
}

#[test]
fn no_freeze_on_top_of_one_that_the_daemon_still_works_on() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    w.ask(op::FREEZE);
    let late = w.read().unwrap();
    w.pass(900 * SECOND);
    let second = w.ask(op::FREEZE);
    assert_eq!(w.answered(second), Some(status::FAIL), "at once");
    assert_eq!(w.answer(late, status::OK), Err(Refusal::Stale));
    let third = w.ask(op::FREEZE);
    assert_eq!(w.answered(third), Some(status::FAIL), "it may be frozen");
    w.serve(op::THAW, status::OK);
    good_backup(&mut w);
}

// --- The time ---

#[test]
fn the_time_counts_from_the_arrival() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    // 4.9 s of grace, then a daemon that reads and does not answer.
    let request = w.ask(op::HOT_BACKUP);
    w.pass(4_900_000);
    w.daemon_v2();
    assert_eq!(w.read().unwrap().time_left_ms, 25_100);
    w.pass(25_100_000 - 1);
    assert_eq!(w.answered(request), None);
    w.pass(1);
    assert_eq!(w.answered(request), Some(status::FAIL));
}

#[test]
fn the_time_counts_while_others_are_served() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    w.ask(op::FREEZE);
    let making = w.read().unwrap();
    w.pass(10 * SECOND);
    let first = w.ask(op::HOT_BACKUP);
    w.pass(10 * SECOND);
    let second = w.ask(op::HOT_BACKUP);
    w.pass(20 * SECOND);
    assert_eq!(w.answered(first), Some(status::FAIL), "in the queue");
    w.answer(making, status::OK).unwrap();
    assert_eq!(w.read().unwrap().time_left_ms, 10_000);
    w.pass(10 * SECOND);
    assert_eq!(w.answered(second), Some(status::FAIL));
}

// --- What could not be sent ---

#[test]
fn a_success_that_the_host_did_not_hear_is_none() {
    for abi in [1, 2] {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        w.daemon(abi);
        w.ask(op::FREEZE);
        w.out.ring_full = true;
        w.serve(op::FREEZE, status::OK);
        w.out.ring_full = false;
        assert_eq!(w.engine.freeze_state(), "broken");
        assert_eq!(w.engine.stats().broken, 1);
        w.serve(op::THAW, status::OK);
        let thaw = w.ask(op::THAW);
        w.serve(op::THAW, status::OK);
        assert_eq!(w.answered(thaw), Some(status::FAIL));
        good_backup(&mut w);
    }
}

#[test]
fn a_hold_of_which_the_host_did_not_hear_is_let_go() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    let (_, seen) = holding(&mut w);
    w.out.ring_full = true;
    w.answer(seen, status::OK).unwrap();
    w.out.ring_full = false;
    assert_eq!(notice(&mut w), (seen.id, thawed::CALLED_OFF));
    assert!(!w.engine.readable(), "the module has thawed");
}

#[test]
fn a_failure_that_the_host_did_not_hear_makes_no_thaw_good() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    w.ask(op::FREEZE);
    w.out.ring_full = true;
    w.serve(op::FREEZE, status::FAIL);
    w.out.ring_full = false;
    let thaw = w.ask(op::THAW);
    w.serve(op::THAW, status::OK);
    assert_eq!(w.answered(thaw), Some(status::FAIL));
}

// --- Told once ---

#[test]
fn a_freeze_that_broke_is_told_once() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    let id = frozen(&mut w);
    w.tell_thawed(id, thawed::DEADLINE).unwrap();
    let told = w.ask(op::THAW);
    w.serve(op::THAW, status::OK);
    assert_eq!(w.answered(told), Some(status::FAIL));

    // The next FREEZE fails, and the THAW only cleans up after it.
    let freeze = w.ask(op::FREEZE);
    w.serve(op::FREEZE, status::FAIL);
    assert_eq!(w.answered(freeze), Some(status::FAIL));
    let thaw = w.ask(op::THAW);
    w.serve(op::THAW, status::OK);
    assert_eq!(w.answered(thaw), Some(status::OK));
}

#[test]
fn a_freeze_that_broke_is_told_by_a_thaw_and_by_nothing_less() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    let id = frozen(&mut w);
    w.tell_thawed(id, thawed::DEADLINE).unwrap();
    // Neither by a FREEZE that fails nor by a THAW that is not heard.
    for heard in [false, true] {
        w.ask(op::FREEZE);
        w.serve(op::FREEZE, status::FAIL);
        w.out.ring_full = !heard;
        let thaw = w.ask(op::THAW);
        w.serve(op::THAW, status::OK);
        w.out.ring_full = false;
        assert_eq!(w.answered(thaw), heard.then_some(status::FAIL));
    }
    let again = w.ask(op::THAW);
    w.serve(op::THAW, status::OK);
    assert_eq!(w.answered(again), Some(status::FAIL), "as often as asked");
}

#[test]
fn a_thaw_that_failed_is_not_good_when_it_is_asked_again() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    frozen(&mut w);
    for (code, told) in [(0x1234, 0x1234), (status::OK, status::FAIL)] {
        let thaw = w.ask(op::THAW);
        w.serve(op::THAW, code);
        assert_eq!(w.answered(thaw), Some(told));
    }
    good_backup(&mut w);
}

// --- THAWs that nobody read ---

#[test]
fn a_thaw_that_ran_out_is_still_done() {
    for abi in [1, 2] {
        for read in [false, true] {
            let mut store = Vec::new();
            let mut w = world(&mut store);
            w.daemon(abi);
            frozen(&mut w);
            let thaw = w.ask(op::THAW);
            let seen = if read { w.read() } else { None };
            w.pass(30 * SECOND);
            assert_eq!(w.answered(thaw), Some(status::FAIL));
            if let Some(seen) = seen {
                assert_eq!(w.answer(seen, status::OK), Err(Refusal::Stale));
            }
            w.pass(3600 * SECOND);
            w.serve(op::THAW, status::OK);
            assert!(!w.engine.readable());
            good_backup(&mut w);
        }
    }
}

#[test]
fn a_thaw_for_which_there_is_no_daemon_waits_for_one() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v1();
    frozen(&mut w);
    w.release();
    let thaw = w.ask(op::THAW);
    w.pass(5 * SECOND);
    assert_eq!(w.answered(thaw), Some(status::FAIL));
    w.daemon_v1();
    w.serve(op::THAW, status::OK);
    good_backup(&mut w);
}

#[test]
fn what_a_daemon_leaves_frozen_the_next_one_thaws() {
    for making in [false, true] {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        w.daemon_v1();
        if making {
            w.ask(op::FREEZE);
            w.read().unwrap();
        } else {
            frozen(&mut w);
        }
        w.release();
        w.daemon_v2();
        // This FREEZE waits until that is done.
        let freeze = w.ask(op::FREEZE);
        w.serve(op::THAW, status::OK);
        w.serve(op::FREEZE, status::OK);
        assert_eq!(w.answered(freeze), Some(status::OK));
    }
}

#[test]
fn a_thaw_that_is_owed_comes_again_until_it_is_answered() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    frozen(&mut w);
    w.ask(op::THAW);
    w.pass(30 * SECOND);
    assert_eq!(w.engine.stage_name(), "offered");
    let first = w.read().unwrap();
    assert_eq!((first.operation, first.time_left_ms), (op::THAW, 30_000));
    assert_eq!(w.engine.stage_name(), "read");
    assert_eq!(w.engine.open_request(), Some((first.id, op::THAW)));
    assert!(!w.engine.readable(), "it is in the daemon's hands");
    w.pass(30 * SECOND);
    assert_eq!(w.answer(first, status::OK), Err(Refusal::Stale));
    // Neither does the next daemon get around it.
    w.read().unwrap();
    w.release();
    assert_eq!(w.engine.stage_name(), "held");
    w.daemon_v1();
    w.serve(op::THAW, status::FAIL);
    assert_eq!(w.engine.stage_name(), "idle");
    assert!(!w.engine.readable(), "it has tried");
}

#[test]
fn the_hosts_thaw_does_for_one_that_is_owed() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    frozen(&mut w);
    w.ask(op::THAW);
    w.pass(30 * SECOND);
    let thaw = w.ask(op::THAW);
    w.serve(op::THAW, status::OK);
    assert_eq!(w.answered(thaw), Some(status::FAIL));
    assert!(!w.engine.readable());
}

#[test]
fn a_thaw_that_is_owed_and_shown_is_not_lost_to_the_hosts() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    frozen(&mut w);
    w.ask(op::THAW);
    w.pass(30 * SECOND);
    // The host asks while the daemon's read is on its way.
    let (bytes, token) = w.peek().unwrap();
    let thaw = w.ask(op::THAW);
    w.take(&bytes, token);
    assert!(!w.engine.readable(), "one at a time");
    let shown = w.in_hand.unwrap();
    w.answer(shown, status::OK).unwrap();
    assert_eq!(w.answered(thaw), None);
    w.serve(op::THAW, status::OK);
    assert_eq!(w.answered(thaw), Some(status::FAIL));
}

#[test]
fn a_check_that_is_shown_is_not_lost_to_a_thaw_that_is_owed() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    let check = w.ask(op::HOT_BACKUP);
    let (bytes, token) = w.peek().unwrap();
    w.send(vss_packet(op::THAW, &[0; 14_000]));
    w.take(&bytes, token);
    let seen = w.in_hand.unwrap();
    w.answer(seen, status::OK).unwrap();
    assert_eq!(w.answered(check), Some(status::OK));
    w.serve(op::THAW, status::OK);
}

// --- A read in the middle of which the request ends ---

#[test]
fn a_freeze_that_ends_while_it_is_being_read_is_thawed() {
    type End = (&'static str, fn(&mut World<'_>));
    let ends: [End; 3] = [
        ("out of time", |w| w.pass(900 * SECOND)),
        ("called off", |w| {
            w.send(vss_packet(op::THAW, &[0; 14_000]));
        }),
        ("sleep", |w| w.prepare_sleep()),
    ];
    for abi in [1, 2] {
        for (name, end) in ends {
            let mut store = Vec::new();
            let mut w = world(&mut store);
            w.daemon(abi);
            let freeze = w.ask(op::FREEZE);
            let (bytes, token) = w.peek().unwrap();
            end(&mut w);
            assert_eq!(w.answered(freeze), Some(status::FAIL), "{name}");
            assert!(!w.engine.thawed_for_sleep(), "{name}");
            w.take(&bytes, token);
            let making = w.in_hand.unwrap();
            assert_eq!(w.answer(making, status::OK), Err(Refusal::Stale));
            w.serve(op::THAW, status::OK);
            assert!(!w.engine.readable(), "{name}: once is enough");
            w.resume();
            w.ask(op::THAW);
            w.serve(op::THAW, status::OK);
            good_backup(&mut w);
        }
    }
}

#[test]
fn a_freeze_that_a_read_has_failed_to_give_costs_one_thaw() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    w.ask(op::FREEZE);
    w.peek().unwrap();
    w.prepare_sleep();
    assert!(!w.engine.thawed_for_sleep());
    w.serve(op::THAW, status::OK);
    assert!(w.engine.thawed_for_sleep());
}

#[test]
fn what_a_daemon_was_shown_and_has_not_read_is_the_next_ones() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    let freeze = w.ask(op::FREEZE);
    w.peek().unwrap();
    w.release();
    w.daemon_v2();
    w.serve(op::FREEZE, status::OK);
    assert_eq!(w.answered(freeze), Some(status::OK));
}

// --- A daemon that does not read ---

#[test]
fn a_daemon_that_let_one_run_out_costs_no_further_30_seconds() {
    for (grace_ms, wait_ms) in [(0, WAKE_MS), (5_000, 5_000)] {
        for operation in [op::HOT_BACKUP, op::FREEZE, op::THAW] {
            let mut store = Vec::new();
            let mut w = world_with(&mut store, Config { grace_ms, ..CONFIG });
            w.daemon_v2();
            let first = w.ask(op::HOT_BACKUP);
            w.pass(30 * SECOND);
            assert_eq!(w.answered(first), Some(status::FAIL));
            w.pass(60 * SECOND);
            let next = w.ask(operation);
            w.pass(u64::from(wait_ms) * 1000);
            assert_eq!(w.answered(next), Some(status::FAIL));
        }
    }
}

#[test]
fn those_that_wait_behind_one_that_ran_out_cost_no_further_30_seconds() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    w.ask(op::HOT_BACKUP);
    w.pass(29 * SECOND);
    let next = w.ask(op::HOT_BACKUP);
    w.pass(6 * SECOND);
    assert_eq!(w.answered(next), Some(status::FAIL));
}

#[test]
fn a_daemon_that_is_heard_of_again_has_its_full_time() {
    type Sign = fn(&mut World<'_>);
    let signs: [(&str, Sign); 3] = [
        ("begins to read", |w| w.alive()),
        ("holds", |w| w.hold(0).unwrap()),
        ("registers anew", |w| {
            w.release();
            w.daemon_v2();
        }),
    ];
    for (name, sign) in signs {
        let mut store = Vec::new();
        let mut w = world_with(
            &mut store,
            Config {
                grace_ms: 0,
                ..CONFIG
            },
        );
        w.daemon_v2();
        w.ask(op::HOT_BACKUP);
        w.pass(30 * SECOND);
        sign(&mut w);
        let request = w.ask(op::HOT_BACKUP);
        w.pass(30 * SECOND - 1);
        assert_eq!(w.answered(request), None, "a daemon that {name}");
    }
    // Within the grace time a read is enough, and without one it can come as well: such a daemon reads when its poll
    // says that there is something.
    for (grace_ms, read_after) in [(5_000, 4 * SECOND), (0, SECOND - 1)] {
        let mut store = Vec::new();
        let mut w = world_with(&mut store, Config { grace_ms, ..CONFIG });
        w.daemon_v2();
        w.ask(op::HOT_BACKUP);
        w.pass(30 * SECOND);
        let request = w.ask(op::HOT_BACKUP);
        w.pass(read_after);
        let seen = w.read().unwrap();
        w.pass(20 * SECOND);
        w.answer(seen, status::OK).unwrap();
        assert_eq!(w.answered(request), Some(status::OK));
    }
}

// --- What the module holds ---

#[test]
fn the_module_holds_for_a_v2_daemon_and_an_open_freeze() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    assert_eq!(w.hold(0), Err(Refusal::OutOfTurn), "nobody is there");
    w.daemon_v1();
    assert_eq!(w.hold(0), Err(Refusal::OutOfTurn), "v1");
    w.release();
    w.open();
    assert_eq!(w.hold(0), Err(Refusal::OutOfTurn), "not registered");
    w.register_v2().unwrap();
    w.read_bytes().unwrap();
    w.ask(op::FREEZE);
    assert_eq!(w.hold(1), Err(Refusal::Stale), "not read");
    let seen = w.read().unwrap();
    assert_eq!(w.hold(0), Err(Refusal::Stale), "the host is served");
    assert_eq!(w.hold(seen.id + 1), Err(Refusal::Stale));
    w.hold(seen.id).unwrap();
    w.hold(seen.id).unwrap();
    w.answer(seen, status::OK).unwrap();
    assert_eq!(w.hold(seen.id), Err(Refusal::Stale), "answered");
    assert_eq!(w.hold(0), Err(Refusal::Stale), "frozen");
    w.ask(op::THAW);
    w.serve(op::THAW, status::OK);
    w.hold(0).unwrap();
    w.prepare_sleep();
    assert_eq!(notice(&mut w), (0, thawed::SLEEP));
    assert_eq!(w.hold(0), Err(Refusal::Stale), "the machine sleeps");
}

#[test]
fn a_module_that_cannot_hold_does_not_offer_it() {
    let all = uapi::feature::HOLD | uapi::feature::PATHS;
    for (max_held, features) in [(0, 0), (16, all)] {
        let mut store = Vec::new();
        let mut w = world_with(&mut store, Config { max_held, ..CONFIG });
        w.open();
        w.register_v2().unwrap();
        let expected = uapi::Registered {
            frame: frame(uapi::frame::REGISTERED, 40, 0),
            abi_version: 2,
            max_frame: 6300,
            features,
            max_held,
        };
        assert_eq!(w.read_bytes(), Some(expected.as_bytes().to_vec()));
        assert_eq!(w.hold(0).is_ok(), max_held > 0);
    }
}

#[test]
fn a_freeze_ends_when_the_module_thaws_by_itself() {
    for answered in [false, true] {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        w.daemon_v2();
        let (freeze, seen) = holding(&mut w);
        if answered {
            w.answer(seen, status::OK).unwrap();
        }
        w.lose(thawed::DEADLINE);
        assert_eq!(notice(&mut w), (seen.id, thawed::DEADLINE));
        let code = if answered { status::OK } else { status::FAIL };
        assert_eq!(w.answered(freeze), Some(code));
        w.lose(thawed::DEADLINE);
        let thaw = w.ask(op::THAW);
        w.serve(op::THAW, status::OK);
        let code = if answered { status::FAIL } else { status::OK };
        assert_eq!(w.answered(thaw), Some(code));
        assert!(!w.engine.readable(), "told once");
        good_backup(&mut w);
    }
}

// --- What ends while the host's THAW is open ---

/// Something is let go, and why.
type LetsGo = (&'static str, Option<u32>, fn(&mut World<'_>));
const LETS_GO: [LetsGo; 3] = [
    ("the deadline", Some(thawed::DEADLINE), |w| {
        w.lose(thawed::DEADLINE);
    }),
    ("sleep", Some(thawed::SLEEP), |w| w.prepare_sleep()),
    ("the daemon", None, |w| w.thaw_held().unwrap()),
];

#[test]
fn what_is_let_go_after_the_host_has_sent_its_thaw_breaks_nothing() {
    for (name, reason, lets_go) in LETS_GO {
        for read in [false, true] {
            let mut store = Vec::new();
            let mut w = world(&mut store);
            w.daemon_v2();
            let (_, frozen) = holding(&mut w);
            w.answer(frozen, status::OK).unwrap();
            let thaw = w.ask(op::THAW);
            let mut seen = if read { w.read() } else { None };
            lets_go(&mut w);
            // What came first is read first: so the daemon knows as much.
            if !read {
                seen = w.read();
                assert_eq!(seen.unwrap().operation, op::THAW, "{name}");
            }
            if let Some(reason) = reason {
                assert_eq!(notice(&mut w), (frozen.id, reason));
            }
            assert!(!w.engine.readable());
            w.answer(seen.unwrap(), status::OK).unwrap();
            assert_eq!(w.answered(thaw), Some(status::OK), "{name}, read: {read}");
            assert_eq!(w.engine.stats().broken, 0);
            w.resume();
            good_backup(&mut w);
        }
    }
}

#[test]
fn what_is_let_go_before_the_host_has_sent_its_thaw_is_told_before_it() {
    for (name, reason, lets_go) in LETS_GO {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        w.daemon_v2();
        let (_, frozen) = holding(&mut w);
        w.answer(frozen, status::OK).unwrap();
        lets_go(&mut w);
        let thaw = w.ask(op::THAW);
        if let Some(reason) = reason {
            assert_eq!(notice(&mut w), (frozen.id, reason));
        }
        w.serve(op::THAW, status::OK);
        assert_eq!(w.answered(thaw), Some(status::FAIL), "{name}");
    }
}

#[test]
fn a_daemon_that_goes_without_a_notice_owes_no_thaw_once_it_has_answered_one() {
    for answers in [false, true] {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        w.daemon_v2();
        let (_, frozen) = holding(&mut w);
        w.answer(frozen, status::OK).unwrap();
        w.ask(op::THAW);
        let seen = w.read().unwrap();
        w.lose(thawed::DEADLINE);
        if answers {
            w.answer(seen, status::OK).unwrap();
        }
        w.release();
        assert_eq!(w.engine.left().owes_thaw, !answers);
    }
}

#[test]
fn a_notice_that_waits_for_a_thaw_does_not_outlast_it() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    let (_, frozen) = holding(&mut w);
    w.answer(frozen, status::OK).unwrap();
    // It does not get to the THAW.
    w.ask(op::HOT_BACKUP);
    w.read().unwrap();
    let thaw = w.ask(op::THAW);
    w.lose(thawed::DEADLINE);
    assert!(!w.engine.readable());
    w.pass(30 * SECOND);
    assert_eq!(w.answered(thaw), Some(status::FAIL));
    assert_eq!(notice(&mut w), (frozen.id, thawed::DEADLINE));
}

#[test]
fn no_thaw_is_good_that_the_daemon_of_its_freeze_does_not_answer() {
    type End = (&'static str, fn(&mut World<'_>));
    let ends: [End; 2] = [
        ("the daemon", |w| {
            w.release();
            w.daemon_v2();
        }),
        ("the device", |w| w.close(thawed::GONE)),
    ];
    for (name, end) in ends {
        for read in [false, true] {
            let mut store = Vec::new();
            let mut w = world(&mut store);
            w.daemon_v2();
            let (_, frozen) = holding(&mut w);
            w.answer(frozen, status::OK).unwrap();
            let thaw = w.ask(op::THAW);
            if read {
                w.read().unwrap();
            }
            w.lose(thawed::DEADLINE);
            end(&mut w);
            if w.answered(thaw).is_none() {
                w.serve(op::THAW, status::OK);
            }
            assert_eq!(w.answered(thaw), Some(status::FAIL), "{name}, read: {read}");
        }
    }
}

#[test]
fn a_daemon_that_says_that_its_freeze_did_not_last_is_believed_after_the_thaw_too() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    let id = frozen(&mut w);
    let thaw = w.ask(op::THAW);
    let seen = w.read().unwrap();
    // It may have found that only now.
    w.tell_thawed(id, thawed::FOREIGN).unwrap();
    w.answer(seen, status::OK).unwrap();
    assert_eq!(w.answered(thaw), Some(status::FAIL));
}

#[test]
fn what_a_daemon_has_frozen_by_itself_holds_up_the_sleep_until_the_hosts_thaw_is_done() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v1();
    frozen(&mut w);
    let thaw = w.ask(op::THAW);
    w.prepare_sleep();
    assert!(!w.engine.thawed_for_sleep(), "it can be read");
    let seen = w.read().unwrap();
    assert!(!w.engine.thawed_for_sleep(), "it is being done");
    w.answer(seen, status::OK).unwrap();
    assert!(w.engine.thawed_for_sleep());
    assert!(!w.engine.readable(), "once is enough");
    assert_eq!(w.answered(thaw), Some(status::OK));
}

#[test]
fn the_module_lets_go_when_the_host_has_no_use_for_it_any_more() {
    type End = (&'static str, Option<u32>, fn(&mut World<'_>, Seen));
    let ends: [End; 7] = [
        ("failed", None, |w, seen| {
            w.answer(seen, status::FAIL).unwrap();
        }),
        ("answered and thawed", None, |w, seen| {
            w.answer(seen, status::OK).unwrap();
            w.ask(op::THAW);
            w.serve(op::THAW, status::OK);
        }),
        ("told as thawed", None, |w, seen| {
            w.answer(seen, status::OK).unwrap();
            w.tell_thawed(seen.id, thawed::FOREIGN).unwrap();
        }),
        ("out of time", Some(thawed::CALLED_OFF), |w, _| {
            w.pass(900 * SECOND);
        }),
        ("called off", Some(thawed::CALLED_OFF), |w, _| {
            w.ask(op::THAW);
        }),
        (
            "with a THAW out of time",
            Some(thawed::CALLED_OFF),
            |w, seen| {
                w.answer(seen, status::OK).unwrap();
                w.ask(op::THAW);
                w.pass(30 * SECOND);
            },
        ),
        ("without a channel", Some(thawed::GONE), |w, seen| {
            w.answer(seen, status::OK).unwrap();
            w.close(thawed::GONE);
        }),
    ];
    for (name, told, end) in ends {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        w.daemon_v2();
        let (_, seen) = holding(&mut w);
        end(&mut w, seen);
        assert!(!w.holds(), "still held: {name}");
        match told {
            Some(reason) => assert_eq!(notice(&mut w), (seen.id, reason), "{name}"),
            None => assert!(!w.engine.readable(), "nothing to tell: {name}"),
        }
    }
}

#[test]
fn what_the_daemon_has_thawed_before_the_hosts_thaw_makes_that_fail() {
    type Thaws = fn(&mut World<'_>);
    let thaws: [Thaws; 2] = [|w| w.thaw_held().unwrap(), |w| w.thaw_one().unwrap()];
    for thaws in thaws {
        for (after_thaw, code) in [(false, status::FAIL), (true, status::OK)] {
            let mut store = Vec::new();
            let mut w = world(&mut store);
            w.daemon_v2();
            let (_, seen) = holding(&mut w);
            w.answer(seen, status::OK).unwrap();
            if !after_thaw {
                thaws(&mut w);
            }
            let thaw = w.ask(op::THAW);
            let seen = w.read().unwrap();
            if after_thaw {
                thaws(&mut w);
            }
            w.answer(seen, status::OK).unwrap();
            assert_eq!(w.answered(thaw), Some(code));
            assert_eq!(w.engine.stats().broken, u64::from(!after_thaw));
            good_backup(&mut w);
        }
    }
}

#[test]
fn what_is_held_beside_one_that_is_thawed_alone_still_ends_the_freeze() {
    for answered in [false, true] {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        w.daemon_v2();
        let (_, seen) = holding(&mut w);
        // It holds more, and freezes another one in the place of this, say.
        w.thaw_one().unwrap();
        if answered {
            w.answer(seen, status::OK).unwrap();
        }
        w.lose(thawed::DEADLINE);
        assert_eq!(notice(&mut w), (seen.id, thawed::DEADLINE));
        let thaw = w.ask(op::THAW);
        w.serve(op::THAW, status::OK);
        let code = if answered { status::FAIL } else { status::OK };
        assert_eq!(w.answered(thaw), Some(code));
        good_backup(&mut w);
    }
}

#[test]
fn a_freeze_for_which_nothing_is_held_any_more_when_it_is_answered_is_not_whole() {
    for again in [false, true] {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        w.daemon_v2();
        let (freeze, seen) = holding(&mut w);
        w.thaw_held().unwrap();
        if again {
            // It has begun anew.
            w.hold(seen.id).unwrap();
        }
        w.answer(seen, status::OK).unwrap();
        assert_eq!(w.answered(freeze), Some(status::OK));
        let thaw = w.ask(op::THAW);
        w.serve(op::THAW, status::OK);
        let code = if again { status::OK } else { status::FAIL };
        assert_eq!(w.answered(thaw), Some(code));
        good_backup(&mut w);
    }
}

#[test]
fn what_is_thawed_after_a_rehearsal_leaves_a_freeze_whole_that_is_being_made() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    w.hold(0).unwrap();
    let freeze = w.ask(op::FREEZE);
    let seen = w.read().unwrap();
    w.hold(seen.id).unwrap();
    w.thaw_all_for(0).unwrap();
    w.answer(seen, status::OK).unwrap();
    assert_eq!(w.answered(freeze), Some(status::OK));
    let thaw = w.ask(op::THAW);
    w.serve(op::THAW, status::OK);
    assert_eq!(w.answered(thaw), Some(status::OK));
}

#[test]
fn a_freeze_is_whole_after_a_thaw_of_what_was_not_held() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    let (_, seen) = holding(&mut w);
    w.answer(seen, status::OK).unwrap();
    // It was another file system, or it had been thawed by then.
    w.engine.may_thaw().unwrap();
    let thaw = w.ask(op::THAW);
    w.serve(op::THAW, status::OK);
    assert_eq!(w.answered(thaw), Some(status::OK));
}

#[test]
fn what_the_module_does_not_begin_takes_over_no_hold() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    w.hold(0).unwrap();
    let freeze = w.ask(op::FREEZE);
    let seen = w.read().unwrap();
    // It has no room for that, or holds it already.
    w.engine.may_hold(seen.id).unwrap();
    w.lose(thawed::DEADLINE);
    assert_eq!(notice(&mut w), (0, thawed::DEADLINE));
    w.answer(seen, status::OK).unwrap();
    assert_eq!(w.answered(freeze), Some(status::OK));
}

#[test]
fn what_was_held_for_nobody_counts_for_the_freeze_that_was_good_with_it() {
    for thaws_itself in [false, true] {
        let mut store = Vec::new();
        let mut w = world(&mut store);
        w.daemon_v2();
        w.hold(0).unwrap();
        let freeze = w.ask(op::FREEZE);
        let seen = w.read().unwrap();
        // The module says that it is held already.
        w.engine.may_hold(seen.id).unwrap();
        w.answer(seen, status::OK).unwrap();
        assert_eq!(w.answered(freeze), Some(status::OK));
        if thaws_itself {
            w.thaw_held().unwrap();
        } else {
            w.lose(thawed::DEADLINE);
            // Whatever else it has frozen it is to thaw, too.
            assert_eq!(notice(&mut w), (0, thawed::DEADLINE));
            w.serve(op::THAW, status::OK);
        }
        let thaw = w.ask(op::THAW);
        w.serve(op::THAW, status::OK);
        assert_eq!(w.answered(thaw), Some(status::FAIL), "{thaws_itself}");
    }
}

#[test]
fn a_daemon_is_not_told_of_what_it_has_thawed() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    assert_eq!(w.thaw_held(), Err(Refusal::OutOfTurn));
    w.daemon_v2();
    w.hold(0).unwrap();
    w.thaw_held().unwrap();
    w.prepare_sleep();
    assert!(!w.engine.readable());
}

#[test]
fn a_rehearsal_is_nothing_to_the_host() {
    let mut store = Vec::new();
    let mut w = world(&mut store);
    w.daemon_v2();
    w.hold(0).unwrap();
    let freeze = w.ask(op::FREEZE);
    let seen = w.read().unwrap();
    w.lose(thawed::DEADLINE);
    w.hold(seen.id).unwrap();
    w.answer(seen, status::OK).unwrap();
    assert_eq!(w.answered(freeze), Some(status::OK));
    assert_eq!(notice(&mut w), (0, thawed::DEADLINE));
}
