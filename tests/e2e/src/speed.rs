// SPDX-License-Identifier: GPL-2.0-only

//! How busy this machine is elsewhere, by how long a fixed piece of work takes.
//!
//! Limits are made for a machine that has nothing else to do. Where it has, everything takes longer
//! and nothing is wrong. Knows nothing of guests and cases.

use std::hint::black_box;
use std::time::{Duration, Instant};

/// What [`work`] takes at most in the lab's outer guest, under emulation, on a processor of its own.
/// Without emulation it is a small part of that.
const USUAL: Duration = Duration::from_millis(60);

/// How often the work is done; the median counts, so that one moment does not.
const TIMES: usize = 5;

/// How many times slower this machine is now than one that is quiet; 1 if it is not.
pub fn slowness() -> f64 {
    (measure().as_secs_f64() / USUAL.as_secs_f64()).max(1.0)
}

/// What [`work`] takes now.
pub fn measure() -> Duration {
    let mut times = [Duration::ZERO; TIMES];
    for time in &mut times {
        let start = Instant::now();
        work();
        *time = start.elapsed();
    }
    times.sort();
    times[TIMES / 2]
}

/// Some arithmetic of which no step can begin before the one before has ended.
fn work() {
    let mut state = black_box(1_u64);
    for _ in 0..1_000_000 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
    }
    black_box(state);
}
