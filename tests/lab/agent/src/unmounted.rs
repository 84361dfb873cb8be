// SPDX-License-Identifier: GPL-2.0-only

//! `lab-agent unmounted`: a process in a mount namespace of its own in which nothing is mounted. Such a
//! namespace has no root by which `listmount(2)` could begin.

use crate::error::Error;
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sched::{unshare, CloneFlags};
use nix::unistd::pause;

/// `UNSHARE_EMPTY_MNTNS` (`linux/sched.h`), since Linux 7.1.
const EMPTY: CloneFlags = CloneFlags::from_bits_retain(0x0010_0000);

/// Goes there, says so, and stays until somebody ends it.
pub fn stay() -> Result<(), Error> {
    if unshare(EMPTY).is_err() {
        // Below the root there is only what the kernel began with, and that is not listed.
        unshare(CloneFlags::CLONE_NEWNS)?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
        umount2("/", MntFlags::MNT_DETACH)?;
    }
    println!("nothing is mounted");
    loop {
        pause();
    }
}
