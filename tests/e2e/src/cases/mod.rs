// SPDX-License-Identifier: GPL-2.0-only

//! The cases, one file for each area, in the order in which they run.
//!
//! A case is a function of a fresh or tidied guest: nothing of ours and no `hv_utils` is loaded,
//! only the root (ext4 on `/dev/ram0`) is mounted, `/dev/ram1` and up are free.

mod abi;
mod lifecycle;
mod pairing;
mod peer;

use anyhow::Result;
use e2e::guest::{Guest, Machine};

pub use pairing::make_file_systems;

/// One case.
#[derive(Clone)]
pub struct Case {
    /// `area/what`.
    pub name: &'static str,
    /// One line for people: what is right when it passes.
    pub about: &'static str,
    /// The guest that it wants.
    pub machine: Machine,
    /// The case itself.
    pub run: fn(&Guest) -> Result<()>,
}

/// A case for a guest with one virtual CPU.
const fn case(name: &'static str, about: &'static str, run: fn(&Guest) -> Result<()>) -> Case {
    Case {
        name,
        about,
        machine: Machine::ONE_CPU,
        run,
    }
}

/// All cases.
pub fn all() -> Vec<Case> {
    [pairing::CASES, lifecycle::CASES, abi::CASES, peer::CASES].concat()
}
