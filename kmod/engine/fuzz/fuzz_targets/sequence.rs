// SPDX-License-Identifier: GPL-2.0-only

//! Any sequence of events against the promises of `tests/support`: one byte an event.

#![no_main]

#[path = "../../tests/support/mod.rs"]
mod support;

use hv_vss_engine::{Config, Left, PACKET_MAX, QUEUE};
use libfuzzer_sys::fuzz_target;
use support::events::{Host, ALL};
use support::World;

std::thread_local! {
    static STORE: std::cell::RefCell<Vec<u8>> = std::cell::RefCell::new(vec![0; QUEUE * PACKET_MAX]);
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, events)) = bytes.split_first() else {
        return;
    };
    let config = Config {
        grace_ms: u32::from(kind % 2) * 5000,
        max_held: u32::from(kind / 2 % 2) * 16,
        ..Config::default()
    };
    let left = Left {
        broken: kind / 4 % 2 > 0,
        told: kind / 4 % 2 > 0 && kind / 16 % 2 > 0,
        unseen: kind / 4 % 2 == 0 && kind / 16 % 2 > 0,
        owes_thaw: kind / 8 % 2 > 0,
    };
    STORE.with_borrow_mut(|store| {
        let mut world = World::after(config, store, left);
        for byte in events {
            let host = match byte & 0x80 {
                0 => Host::Hears,
                _ => Host::IsDeaf,
            };
            world.happen(ALL[usize::from(byte & 0x7f) % ALL.len()], host);
        }
        world.drain();
    });
});
