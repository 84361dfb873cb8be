// SPDX-License-Identifier: GPL-2.0

//! The VSS protocol as a state machine without I/O.
//!
//! Events go in as method calls on [`Engine`]: a packet from the host, bytes written to the device,
//! a read, the clock, open, release, what the module holds, sleep. What is to be done comes out
//! through [`Effects`] (packets for the host, what to let go, notes for log and trace), through return
//! values (a frame for the reader, an errno for the writer) and through [`Engine::deadline`] (when to
//! call [`Engine::timer`]). What the module holds is a machine of its own, in [`hold`].
//!
//! There is no clock, no lock, no allocation and no `unsafe` in here, so every method may be called
//! from softirq and under a spinlock. The same files are compiled by Kbuild into the module and by
//! cargo for tests and fuzzing. This room knows nothing of the kernel crate, of VMBus rings or of
//! file descriptors.
//!
//! Sources of the numbers: `include/linux/hyperv.h`, `include/uapi/linux/hyperv.h`,
//! `drivers/hv/hv_snapshot.c` and `drivers/hv/channel_mgmt.c` of Linux 7.3.
#![cfg_attr(not(hv_vss_kernel), no_std)]
#![forbid(unsafe_code)]

#[cfg(hv_vss_kernel)]
use crate::uapi;
#[cfg(not(hv_vss_kernel))]
use hv_vss_uapi as uapi;

mod frames;
mod freeze;
pub mod hold;
mod machine;
mod notes;
mod queue;
mod wire;

pub use frames::Refusal;
pub use machine::Config;
pub use machine::Effects;
pub use machine::Engine;
pub use machine::Left;
#[cfg(not(hv_vss_kernel))]
pub use machine::Shape;
pub use machine::Token;
pub use notes::BadFrames;
pub use notes::NotNow;
pub use notes::Note;
pub use notes::OpStats;
pub use notes::Stats;
pub use notes::Subject;
pub use notes::OPS;
pub use queue::PACKET_MAX;
pub use queue::QUEUE;
pub use wire::Version;
pub use wire::FRAMEWORK_VERSIONS;
pub use wire::VSS_VERSIONS;
