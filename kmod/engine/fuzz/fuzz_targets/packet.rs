// SPDX-License-Identifier: GPL-2.0-only

//! Any bytes as packets of the host, with a daemon that serves what gets through.

#![no_main]

#[path = "../../tests/support/mod.rs"]
mod support;

use hv_vss_engine::{Config, PACKET_MAX, QUEUE};
use libfuzzer_sys::fuzz_target;
use support::World;

std::thread_local! {
    static STORE: std::cell::RefCell<Vec<u8>> = std::cell::RefCell::new(vec![0; QUEUE * PACKET_MAX]);
}

fuzz_target!(|packets: Vec<&[u8]>| {
    STORE.with_borrow_mut(|store| {
        let mut world = World::new(Config::default(), store);
        world.daemon_v2();
        for packet in packets {
            world.send(packet.to_vec());
            if let Some(seen) = world.read() {
                world.answer(seen, 0).expect("an answer in turn");
            }
        }
        world.drain();
    });
});
