// SPDX-License-Identifier: GPL-2.0-only

//! Visits every state that any order of events can reach, tries every event in each, and checks the
//! promises of `support` on the way: no depth limit, the walk ends when nothing new turns up.
//!
//! It begins with a machine that finds nothing and with one that finds something undone.
//!
//! A state is what tells two engines apart from outside: the queue with operations and stages, the
//! daemon and its ABI, the freeze, suspend, and a reply that waits. Ids, times and packets are left
//! out; the random tests vary those.

mod support;

use hv_vss_engine::{Config, Left, PACKET_MAX, QUEUE};
use std::collections::HashSet;
use support::events::{Event, ALL};
use support::World;

/// A way to a state: how it begins, and what happens then.
#[derive(Clone, Debug)]
struct Path(Left, Vec<Event>);

impl Path {
    fn replay<'a>(&self, config: Config, store: &'a mut [u8]) -> World<'a> {
        let mut world = World::after(config, store, self.0);
        for event in &self.1 {
            world.happen(*event);
        }
        world
    }
}

/// Says which way has led to a promise that was broken.
struct Way<'a>(&'a Path, Event);

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
    let mut paths = Vec::new();
    let mut depth = 0;
    for kind in 0..6 {
        let left = Left {
            untold: kind % 3 == 1,
            unseen: kind % 3 == 2,
            owes_thaw: kind / 3 == 1,
        };
        let path = Path(left, Vec::new());
        seen.insert(path.replay(config, &mut store).state());
        paths.push(path);
    }
    while let Some(next) = (!paths.is_empty()).then(|| std::mem::take(&mut paths)) {
        for path in next {
            depth = depth.max(path.1.len());
            path.replay(config, &mut store).drain();
            for event in ALL {
                let mut world = path.replay(config, &mut store);
                let way = Way(&path, event);
                world.happen(event);
                drop(way);
                if seen.insert(world.state()) {
                    paths.push(Path(path.0, [&path.1[..], &[event]].concat()));
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
