// SPDX-License-Identifier: GPL-2.0-only

//! FIFREEZE, FITHAW and what a change of users keeps: the agent's only unsafe code.

use nix::errno::Errno;
use std::fs::File;
use std::os::fd::AsRawFd;

mod raw {
    // The numbers of FIFREEZE and FITHAW in <linux/fs.h>.
    nix::ioctl_readwrite!(fifreeze, b'X', 119, nix::libc::c_int);
    nix::ioctl_readwrite!(fithaw, b'X', 120, nix::libc::c_int);
}

/// Freezes the file system that `file` is on.
pub fn freeze(file: &File) -> Result<(), Errno> {
    let mut unused = 0;
    // SAFETY: the descriptor is open for as long as `file` is borrowed; the kernel ignores the
    // argument (`ioctl_fsfreeze` takes none), and it points to a live integer besides.
    unsafe { raw::fifreeze(file.as_raw_fd(), &mut unused) }.map(drop)
}

/// Thaws the file system that `file` is on.
pub fn thaw(file: &File) -> Result<(), Errno> {
    let mut unused = 0;
    // SAFETY: as in `freeze`; `ioctl_fsthaw` takes no argument either.
    unsafe { raw::fithaw(file.as_raw_fd(), &mut unused) }.map(drop)
}

/// Lets this thread's capabilities be as they are when it becomes another user.
pub fn keep_capabilities() -> Result<(), Errno> {
    // SECBIT_NO_SETUID_FIXUP of <linux/securebits.h>.
    const NO_SETUID_FIXUP: nix::libc::c_ulong = 1 << 2;
    // SAFETY: prctl takes integers here and touches no memory.
    let ret = unsafe { nix::libc::prctl(nix::libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP) };
    Errno::result(ret).map(drop)
}
