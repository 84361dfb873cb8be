// SPDX-License-Identifier: GPL-2.0-only

//! The clock of deadlines.

use std::time::Duration;

use nix::time::{clock_gettime, ClockId};

/// Since the machine was booted; it goes on while the machine is suspended, as the host's clock does.
pub fn boot_time() -> Duration {
    // The clock exists on every kernel since 2.6.39, and the call has no other way to fail.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}
