// SPDX-License-Identifier: GPL-2.0-only

//! VMBus as the host sees it: layouts, the control plane as a state machine, and rings.
//!
//! Nothing here performs I/O or knows of KVM: messages come in as bytes and leave as effects, rings
//! work on any [`ring::RingMem`].

pub mod control;
pub mod protocol;
pub mod ring;
