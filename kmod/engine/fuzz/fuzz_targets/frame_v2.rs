// SPDX-License-Identifier: GPL-2.0-only

//! Any bytes as writes of a v2 daemon, before and after its registration, with requests in between
//! and a module that holds for it. As in the module, the engine sees no more of a write than its first
//! 64 bytes.

#![no_main]

#[path = "../../tests/support/mod.rs"]
mod support;

use hv_vss_engine::{Config, PACKET_MAX, QUEUE};
use hv_vss_uapi::op;
use libfuzzer_sys::fuzz_target;
use support::World;

std::thread_local! {
    static STORE: std::cell::RefCell<Vec<u8>> = std::cell::RefCell::new(vec![0; QUEUE * PACKET_MAX]);
}

fuzz_target!(|input: (Vec<&[u8]>, Vec<&[u8]>)| {
    STORE.with_borrow_mut(|store| {
        let config = Config {
            max_held: 16,
            ..Config::default()
        };
        let mut world = World::new(config, store);
        // What random bytes say of a request is known to nobody.
        world.strict = false;
        world.open();
        for bytes in input.0 {
            let _ = world.write_of(&bytes[..bytes.len().min(64)], bytes.len());
        }
        if world.engine.abi() == 0 {
            world.register_v2().expect("a registration");
        }
        world.read();
        for (at, bytes) in input.1.into_iter().enumerate() {
            let operations = [op::FREEZE, op::HOT_BACKUP, op::THAW];
            world.ask(operations[at % 3]);
            if let Some(seen) = world.read() {
                let _ = world.hold(seen.id);
            }
            let _ = world.write_of(&bytes[..bytes.len().min(64)], bytes.len());
        }
        world.drain();
    });
});
