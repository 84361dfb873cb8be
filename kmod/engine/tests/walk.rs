// SPDX-License-Identifier: GPL-2.0-only

//! Visits every state that any order of events can reach, tries every event in each, and checks the
//! promises of `support` on the way: no depth limit, the walk ends when nothing new turns up.
//!
//! A state is what tells two engines apart from outside: the queue with operations and stages, the
//! daemon and its ABI, the freeze, suspend, and a reply that waits. Ids, times and packets are left
//! out; the random tests vary those.

mod support;

use hv_vss_engine::{Config, PACKET_MAX, QUEUE};
use std::collections::HashSet;
use support::events::{Event, ALL};
use support::World;

/// Replays `path` from the start.
fn replay<'a>(config: Config, store: &'a mut [u8], path: &[Event]) -> World<'a> {
    let mut world = World::new(config, store);
    for event in path {
        world.happen(*event);
    }
    world
}

/// Says which way has led to a promise that was broken.
struct Way<'a>(&'a [Event], Event);

impl Drop for Way<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("after {:?}: {:?}", self.0, self.1);
        }
    }
}

/// Returns how many states there are, and the longest way to one.
fn walk(config: Config) -> (usize, usize) {
    let mut store = vec![0u8; QUEUE * PACKET_MAX];
    let mut seen = HashSet::new();
    let mut paths: Vec<Vec<Event>> = vec![Vec::new()];
    let mut depth = 0;
    seen.insert(replay(config, &mut store, &[]).state());
    while let Some(next) = (!paths.is_empty()).then(|| std::mem::take(&mut paths)) {
        for path in next {
            depth = depth.max(path.len());
            replay(config, &mut store, &path).drain();
            for event in ALL {
                let mut world = replay(config, &mut store, &path);
                let way = Way(&path, event);
                world.happen(event);
                drop(way);
                if seen.insert(world.state()) {
                    paths.push([&path[..], &[event]].concat());
                }
            }
        }
    }
    (seen.len(), depth)
}

#[test]
fn every_state_keeps_the_promises() {
    let (states, depth) = walk(Config {
        max_held: 16,
        ..Config::default()
    });
    println!("{states} states, the farthest {depth} events away");
    assert!(states > 1000, "the walk has stopped early: {states} states");
}

#[test]
fn every_state_keeps_the_promises_without_grace() {
    let config = Config {
        grace_ms: 0,
        ..Config::default()
    };
    let (states, depth) = walk(config);
    println!("{states} states, the farthest {depth} events away");
    assert!(states > 1000, "the walk has stopped early: {states} states");
}
