// SPDX-License-Identifier: GPL-2.0-only

//! `lab-agent stack COUNT FOLDER`: what anybody may do, a folder bound to itself over and over in namespaces of his own.
//! Each mount is attached to the one before.

use crate::error::Error;
use nix::mount::{mount, MsFlags};
use nix::sched::{unshare, CloneFlags};
use nix::unistd::pause;

/// Makes so many, says so, and stays until somebody ends it.
pub fn stay(count: usize, folder: &str) -> Result<(), Error> {
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
    for _ in 0..count {
        let none = None::<&str>;
        mount(Some(folder), folder, none, MsFlags::MS_BIND, none)?;
    }
    println!("{count} are mounted");
    loop {
        pause();
    }
}
