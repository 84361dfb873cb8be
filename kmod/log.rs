// SPDX-License-Identifier: GPL-2.0

//! Warnings with a limit, which the kernel crate does not have: what a host or a daemon can cause
//! at will must not fill the log.

use crate::bindings;

/// Whether one more warning may be written now.
pub(crate) fn may_warn() -> bool {
    // SAFETY: The function takes nothing and may be called from any context.
    unsafe { bindings::hv_vss_may_warn() }
}

/// `pr_warn!` with a limit over all warnings of the module.
macro_rules! warn_limited {
    ($($arg:tt)*) => {
        if $crate::log::may_warn() {
            ::kernel::pr_warn!($($arg)*);
        }
    };
}
pub(crate) use warn_limited;
