// SPDX-License-Identifier: GPL-2.0-only

//! `lab-agent stack COUNT FOLDER`: what anybody may do, a folder bound to itself over and over in namespaces of his own.
//! Each mount is attached to the one before.

use crate::error::Error;
use nix::mount::{mount, MsFlags};
use nix::sched::{unshare, CloneFlags};
use nix::unistd::pause;
use std::fs::File;
use std::os::fd::AsRawFd;

/// Makes so many, says so, and stays until somebody ends it.
pub fn stay(count: usize, folder: &str) -> Result<(), Error> {
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
    // By its name the kernel would go up through all of them.
    let lowest = File::open(folder)?;
    let folder = format!("/proc/self/fd/{}", lowest.as_raw_fd());
    for _ in 0..count {
        let none = None::<&str>;
        mount(Some(&*folder), &*folder, none, MsFlags::MS_BIND, none)?;
    }
    println!("{count} are mounted");
    loop {
        pause();
    }
}
