// SPDX-License-Identifier: GPL-2.0-only

//! VMBus as the host sees it.

pub mod protocol;
