// SPDX-License-Identifier: GPL-2.0-only

//! Long random sequences of events, random limits, random bytes: the promises of `support` hold.

mod support;

use hv_vss_engine::{Config, Left, PACKET_MAX, QUEUE};
use hv_vss_uapi::op;
use proptest::prelude::*;
use support::events::{Event, Host, ALL};
use support::World;

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        // What a backup is made of comes more often than the rest, so that sequences get far.
        2 => prop::sample::select(&ALL[..]),
        1 => prop::sample::select(vec![
            Event::Ask(op::FREEZE),
            Event::Ask(op::THAW),
            Event::Open,
            Event::RegisterV2,
            Event::Read,
            Event::Read,
            Event::Answer(support::events::Verdict::Ok),
        ]),
    ]
}

/// An event, which now and then the host does not hear of.
fn happening() -> impl Strategy<Value = (Event, Host)> {
    let host = prop_oneof![7 => Just(Host::Hears), 1 => Just(Host::IsDeaf)];
    (event(), host)
}

fn config() -> impl Strategy<Value = Config> {
    let ms = || prop_oneof![Just(0), 1..10u32, any::<u32>()];
    (ms(), ms(), ms(), 0..2u32).prop_map(|(freeze_ms, other_ms, grace_ms, max_held)| Config {
        freeze_ms,
        other_ms,
        grace_ms,
        max_held,
    })
}

/// What the device before this one has left.
fn left() -> impl Strategy<Value = Left> {
    (0..4u8, any::<bool>()).prop_map(|(kind, owes_thaw)| Left {
        broken: kind > 1,
        told: kind == 3,
        unseen: kind == 1,
        owes_thaw,
    })
}

/// What a hostile host or daemon may send: a good message with some bytes changed, or noise.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let base = prop_oneof![
        Just(support::request(op::FREEZE)),
        Just(support::request(op::HOT_BACKUP)),
        Just(support::request(op::GET_DM_INFO)),
        Just(support::negotiation(&[(1, 0), (3, 0)], &[(5, 0)])),
        Just(support::register()),
        Just(support::answer(1, op::FREEZE, 0)),
        Just(support::thawed(1, 1)),
        Just(vec![0u8; 12]),
        prop::collection::vec(any::<u8>(), 0..100),
    ];
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (base, changes, any::<prop::sample::Index>(), any::<bool>()).prop_map(
        |(mut bytes, changes, cut, whole)| {
            for (at, value) in changes {
                if !bytes.is_empty() {
                    let at = at.index(bytes.len());
                    bytes[at] = value;
                }
            }
            if !whole {
                bytes.truncate(cut.index(bytes.len() + 1));
            }
            bytes
        },
    )
}

#[derive(Clone, Debug)]
enum Step {
    Event(Event, Host),
    Packet(Vec<u8>),
    Write(Vec<u8>),
    Pass(u32),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => happening().prop_map(|(event, host)| Step::Event(event, host)),
        1 => bytes().prop_map(Step::Packet),
        1 => bytes().prop_map(Step::Write),
        1 => any::<u32>().prop_map(Step::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_keeps_the_promises(
        config in config(),
        left in left(),
        events in prop::collection::vec(happening(), 0..200),
    ) {
        let mut store = vec![0u8; QUEUE * PACKET_MAX];
        let mut world = World::after(config, &mut store, left);
        for (event, host) in events {
            world.happen(event, host);
        }
        world.drain();
    }

    /// Bytes of any kind between the events: nothing panics, the invariants hold, and everything
    /// ends in time. (What a daemon means by random bytes nobody knows, so the answers are not
    /// compared here.)
    #[test]
    fn any_bytes_are_survived(
        config in config(),
        steps in prop::collection::vec(step(), 0..100),
    ) {
        let mut store = vec![0u8; QUEUE * PACKET_MAX];
        let mut world = World::new(config, &mut store);
        world.strict = false;
        for step in steps {
            match step {
                Step::Event(event, host) => world.happen(event, host),
                Step::Packet(bytes) => { world.send(bytes); }
                Step::Write(bytes) => { let _ = world.write(&bytes); }
                Step::Pass(us) => world.pass(us.into()),
            }
        }
        world.drain();
    }

    /// A queue with less room works the same, only shorter.
    #[test]
    fn a_small_store_is_enough(
        slots in 0..=QUEUE,
        events in prop::collection::vec(happening(), 0..100),
    ) {
        let mut store = vec![0u8; slots * PACKET_MAX + 100];
        let mut world = World::new(Config::default(), &mut store);
        for (event, host) in events {
            world.happen(event, host);
            prop_assert!(world.engine.queued() <= slots);
        }
        world.drain();
    }
}
