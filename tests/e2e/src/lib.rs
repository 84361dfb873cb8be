// SPDX-License-Identifier: GPL-2.0-only

//! What every test and measurement with a guest needs: [`guest::Guest`], a running guest with verbs
//! to work it, and [`check`], checks that say what was seen. The cases are in the binary.
//!
//! It knows the simulated host's API and the agent's contract; how the images were made is the
//! lab's business.

pub mod agent;
pub mod check;
mod cpio;
pub mod guest;
pub mod known;
