// SPDX-License-Identifier: GPL-2.0-only

//! Ioctls, a read with flags, signals, attributes, capabilities of a thread, what a change of users keeps, and the
//! load of a kernel: the agent's only unsafe code.

use nix::errno::Errno;
use nix::libc;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::AsRawFd;

/// Bytes of the longest argument that the number of an ioctl can name (`_IOC_SIZEBITS`).
const LONGEST: usize = 1 << 14;

/// `_LINUX_CAPABILITY_VERSION_3` and `CAP_SYS_ADMIN` of `<linux/capability.h>`.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
const CAP_SYS_ADMIN: u32 = 21;

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

/// Asks for a change to the file at `path` that changes nothing: it takes away an attribute that it does not
/// have. As with any change the kernel first waits for the file system to be thawed (`mnt_want_write`), and
/// unlike with most that is so for a file of any type.
pub fn ask_to_write(path: &CStr) -> Result<(), Errno> {
    let none = c"trusted.lab.none";
    // SAFETY: both are strings that end with a zero and live until the call returns, and it only reads
    // them.
    let result = unsafe { libc::lremovexattr(path.as_ptr(), none.as_ptr()) };
    Errno::result(result).map(drop)
}

/// Loads a kernel with its initramfs, to be started in place of this one.
pub fn load_kernel(kernel: &File, initrd: &File, cmdline: &CStr) -> Result<(), Errno> {
    let len = cmdline.to_bytes_with_nul().len();
    // SAFETY: the descriptors are open for as long as the files are borrowed, and the kernel reads `len` bytes
    // of the string, which has so many.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initrd.as_raw_fd(),
            len,
            cmdline.as_ptr(),
            0 as libc::c_ulong,
        )
    };
    Errno::result(result).map(drop)
}

/// Lets what is started from here on be interrupted as from a terminal: a shell starts what is to run in the
/// background with both signals ignored, and that is passed on.
pub fn heed_signals() -> Result<(), Errno> {
    use nix::sys::signal::{signal, SigHandler::SigDfl, Signal};
    for it in [Signal::SIGINT, Signal::SIGQUIT] {
        // SAFETY: no handler is set, so none can do what a handler may not.
        unsafe { signal(it, SigDfl) }?;
    }
    Ok(())
}

/// Lets this thread's capabilities be as they are when it becomes another user.
pub fn keep_capabilities() -> Result<(), Errno> {
    // SECBIT_NO_SETUID_FIXUP of <linux/securebits.h>.
    const NO_SETUID_FIXUP: nix::libc::c_ulong = 1 << 2;
    // SAFETY: prctl takes integers here and touches no memory.
    let ret = unsafe { nix::libc::prctl(nix::libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP) };
    Errno::result(ret).map(drop)
}

/// Any ioctl with a pointer to this argument, of which nothing comes back.
pub fn ioctl(file: &File, request: u32, argument: &[u8]) -> Result<(), Errno> {
    let mut buffer = [0u8; LONGEST];
    let start = buffer.get_mut(..argument.len()).ok_or(Errno::E2BIG)?;
    start.copy_from_slice(argument);
    // SAFETY: the descriptor is open for as long as `file` is borrowed. Whatever the number, a driver
    // reads or writes no more behind the pointer than the number can name, and so much is there.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request.into(), buffer.as_mut_ptr()) };
    Errno::result(result).map(drop)
}

/// A read that does not wait (`RWF_NOWAIT`), from where the file stands.
pub fn read_now(file: &File, buffer: &mut [u8]) -> Result<usize, Errno> {
    let place = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: the descriptor is open for as long as `file` is borrowed. The kernel reads the one `iovec`
    // and writes no more than its length to where it points, which is the borrowed buffer.
    let got = unsafe { libc::preadv2(file.as_raw_fd(), &place, 1, -1, libc::RWF_NOWAIT) };
    // What is not negative fits.
    Errno::result(got).map(|got| got as usize)
}

/// Takes CAP_SYS_ADMIN from the calling thread, and from no other.
pub fn drop_privilege() -> Result<(), Errno> {
    // Version and thread, then effective, permitted and inheritable bits 0 to 31, then 32 to 63.
    let mut header = [CAPABILITY_VERSION, 0];
    let mut sets = [0u32; 6];
    // SAFETY: with this version the kernel reads two words of the header and writes six of the sets.
    let got = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) };
    Errno::result(got)?;
    for low in sets.iter_mut().take(3) {
        *low &= !(1 << CAP_SYS_ADMIN);
    }
    // SAFETY: as above; it reads the sets.
    let set = unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_ptr()) };
    Errno::result(set).map(drop)
}
