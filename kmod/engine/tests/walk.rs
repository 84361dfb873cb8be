// SPDX-License-Identifier: GPL-2.0-only

//! Visits every state that any order of events can reach, tries every event in each, and checks the
//! promises of `support` on the way: no depth limit, the walk ends when nothing new turns up.
//!
//! It begins with a machine that finds nothing and with one that finds something undone. What the host is sent in an event
//! it hears or not.
//!
//! A state is what tells two engines apart from outside: the queue with operations and stages, the
//! daemon and its ABI, the freeze, suspend, and a reply that waits. Ids, times and packets are left
//! out; the random tests vary those.

mod support;

use hv_vss_engine::{Config, Left, PACKET_MAX, QUEUE};
use hv_vss_uapi::op;
use std::collections::HashSet;
use support::events::{Event, Host, Stray, ALL};
use support::World;

/// A way to a state: how it begins, and what happens then.
#[derive(Clone, Debug)]
struct Path(Left, Vec<(Event, Host)>);

impl Path {
    fn replay<'a>(&self, config: Config, store: &'a mut [u8]) -> World<'a> {
        let mut world = World::after(config, store, self.0);
        for (event, host) in &self.1 {
            world.happen(*event, *host);
        }
        world
    }
}

/// Says which way has led to a promise that was broken.
struct Way<'a>(&'a Path, Event, Host);

impl Drop for Way<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("after {:?}: {:?}, the host {:?}", self.0, self.1, self.2);
        }
    }
}

/// Returns the events that have changed no state.
fn walk(config: Config) -> Vec<Event> {
    let mut stores = [(); 2].map(|()| vec![0u8; QUEUE * PACKET_MAX]);
    let [store, store_after] = &mut stores;
    let mut seen = HashSet::new();
    let mut paths = Vec::new();
    let mut depth = 0;
    let mut idle = ALL.to_vec();
    for kind in 0..8 {
        let left = Left {
            broken: kind % 4 > 1,
            told: kind % 4 == 3,
            unseen: kind % 4 == 1,
            owes_thaw: kind / 4 == 1,
        };
        let path = Path(left, Vec::new());
        seen.insert(path.replay(config, store).state());
        paths.push(path);
    }
    while let Some(next) = (!paths.is_empty()).then(|| std::mem::take(&mut paths)) {
        for path in next {
            depth = depth.max(path.1.len());
            // Each event happens to a copy: to go all the way once more for it took four times as long.
            let here = path.replay(config, store);
            let before = here.state();
            World::copy(&here, store_after).drain();
            for event in ALL {
                for host in [Host::Hears, Host::IsDeaf] {
                    let mut world = World::copy(&here, store_after);
                    let way = Way(&path, event, host);
                    world.happen(event, host);
                    drop(way);
                    let after = world.state();
                    if after != before {
                        idle.retain(|it| *it != event);
                    }
                    if seen.insert(after) {
                        paths.push(Path(path.0, [&path.1[..], &[(event, host)]].concat()));
                    }
                    if world.out.sends == 0 {
                        // There was nothing to hear.
                        break;
                    }
                }
            }
        }
    }
    println!("{} states, the farthest {depth} events away", seen.len());
    idle
}

/// What changes nothing in any state. All else that stops doing so the walk has lost.
const IDLE: [Event; 11] = [
    Event::Ask(op::GET_DM_INFO),
    Event::Negotiate,
    Event::Junk,
    Event::Stray(Stray::OldId),
    Event::Stray(Stray::NextId),
    Event::Stray(Stray::OtherOperation),
    Event::Stray(Stray::V1),
    Event::Stray(Stray::Thawed),
    Event::Stray(Stray::Empty),
    Event::Stray(Stray::Hold),
    Event::Tick,
];

/// Nor does this where the module cannot hold.
const OF_HOLDING: [Event; 7] = [
    Event::Hold,
    Event::Rehearse,
    Event::ThawHeld,
    Event::Lose,
    Event::ThawOne,
    Event::HoldFails,
    Event::ThawRehearsed,
];

#[test]
fn every_state_keeps_the_promises() {
    let idle = walk(Config {
        max_held: 16,
        ..Config::default()
    });
    assert_eq!(idle, IDLE);
}

#[test]
fn every_state_keeps_the_promises_without_grace() {
    let idle = walk(Config {
        grace_ms: 0,
        ..Config::default()
    });
    assert_eq!(idle, [&IDLE[..], &OF_HOLDING].concat());
}
