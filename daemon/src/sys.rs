// SPDX-License-Identifier: GPL-2.0-only

//! The system calls that no library wraps, each behind a safe function.
//!
//! This is the only file of the daemon that holds `unsafe`. It knows descriptors and numbers, and
//! nothing of what they are used for. Constants come from the kernel's `linux/fs.h`,
//! `linux/loop.h`, `linux/stat.h` and `linux/nsfs.h`.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::mounts::DevId;
use nix::errno::Errno;
use nix::sys::socket::{recvmsg, ControlMessageOwned, MsgFlags};

/// The raw ioctl wrappers that nix generates; all of them are unsafe functions.
mod ioctl {
    nix::ioctl_readwrite!(fifreeze, b'X', 119, libc::c_int);
    nix::ioctl_readwrite!(fithaw, b'X', 120, libc::c_int);
    nix::ioctl_read_bad!(loop_get_status64, 0x4C05, super::LoopInfo64);
    nix::ioctl_read!(ns_mnt_get_next, 0xb7, 11, super::MntNsInfo);
    nix::ioctl_read!(ns_mnt_get_prev, 0xb7, 12, super::MntNsInfo);
}

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
struct LoopInfo64 {
    lo_device: u64,
    lo_inode: u64,
    lo_rdevice: u64,
    lo_offset: u64,
    lo_sizelimit: u64,
    lo_number: u32,
    lo_encrypt_type: u32,
    lo_encrypt_key_size: u32,
    lo_flags: u32,
    lo_file_name: [u8; 64],
    lo_crypt_name: [u8; 64],
    lo_encrypt_key: [u8; 32],
    lo_init: [u64; 2],
}

const _: () = assert!(size_of::<LoopInfo64>() == 232);

/// Freezes the file system that `fd` is on (`FIFREEZE`): flushes it and lets writers wait.
///
/// Fails with `EBUSY` when it is frozen already and with `EOPNOTSUPP` when it cannot freeze.
pub fn freeze(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut unused: libc::c_int = 0;
    // SAFETY: the descriptor is open for as long as the borrow lives, and `unused` outlives the
    // call; the kernel does not look at the argument of FIFREEZE (fs/ioctl.c).
    unsafe { ioctl::fifreeze(fd.as_raw_fd(), &mut unused) }?;
    Ok(())
}

/// Thaws the file system that `fd` is on (`FITHAW`). Fails with `EINVAL` when it is not frozen.
pub fn thaw(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut unused: libc::c_int = 0;
    // SAFETY: as for `freeze`: an open descriptor, and an argument that is not looked at.
    unsafe { ioctl::fithaw(fd.as_raw_fd(), &mut unused) }?;
    Ok(())
}

/// The `st_dev` of the file behind the loop device that `fd` has open, in the kernel's own
/// encoding (`huge_encode_dev`), which is also the one of `stat(2)`.
pub fn loop_backing_dev(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut info = MaybeUninit::<LoopInfo64>::zeroed();
    // SAFETY: the descriptor is open, and the kernel writes at most the 232 bytes that `info` has.
    unsafe { ioctl::loop_get_status64(fd.as_raw_fd(), info.as_mut_ptr()) }?;
    // SAFETY: every field is an integer or an array of integers, for which all bit patterns are
    // valid, and the memory was zeroed before the kernel filled it.
    let info = unsafe { info.assume_init() };
    Ok(info.lo_device)
}

/// What [`identify`] says of an open descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Id of the mount it was opened through, as in the first column of `mountinfo`.
    /// `None` on kernels before 5.8, which do not say.
    pub mount_id: Option<u64>,
    /// Major number of `st_dev`.
    pub major: u32,
    /// Minor number of `st_dev`.
    pub minor: u32,
    /// Type and permission bits (`st_mode`).
    pub mode: u32,
}

impl Identity {
    /// The device number of the file system, or of the subvolume for those that have such.
    pub fn dev(&self) -> DevId {
        DevId {
            major: self.major,
            minor: self.minor,
        }
    }
}

/// Asks the kernel which file system and mount `fd` really is on (`statx`).
pub fn identify(fd: BorrowedFd<'_>) -> io::Result<Identity> {
    let mut stx = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the descriptor is open, the path is an empty C string as AT_EMPTY_PATH wants it, and
    // the kernel writes one `struct statx` into memory of that size.
    let ret = unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_NO_AUTOMOUNT,
            libc::STATX_TYPE | libc::STATX_MNT_ID,
            stx.as_mut_ptr(),
        )
    };
    Errno::result(ret)?;
    // SAFETY: `struct statx` holds only integers, and the memory was zeroed before the kernel
    // filled it.
    let stx = unsafe { stx.assume_init() };
    Ok(Identity {
        mount_id: (stx.stx_mask & libc::STATX_MNT_ID != 0).then_some(stx.stx_mnt_id),
        major: stx.stx_dev_major,
        minor: stx.stx_dev_minor,
        mode: stx.stx_mode.into(),
    })
}

/// `struct mnt_ns_info` of `linux/nsfs.h`, first version.
#[repr(C)]
struct MntNsInfo {
    size: u32,
    nr_mounts: u32,
    mnt_ns_id: u64,
}

/// Opens the mount namespace that comes after (or before) the one that `fd` has open, in the
/// kernel's list of all; `None` at the end of the list.
///
/// Fails with `ENOTTY` on kernels before 6.12 and with `EPERM` without privilege.
pub fn neighbour_namespace(fd: BorrowedFd<'_>, after: bool) -> io::Result<Option<OwnedFd>> {
    let mut info = MntNsInfo {
        size: 0,
        nr_mounts: 0,
        mnt_ns_id: 0,
    };
    // SAFETY: the descriptor is open, and the kernel writes at most the 16 bytes that `info` has.
    let result = unsafe {
        if after {
            ioctl::ns_mnt_get_next(fd.as_raw_fd(), &mut info)
        } else {
            ioctl::ns_mnt_get_prev(fd.as_raw_fd(), &mut info)
        }
    };
    match result {
        // SAFETY: on success the kernel returns a new descriptor that nobody else has.
        Ok(new) => Ok(Some(unsafe { OwnedFd::from_raw_fd(new) })),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Most descriptors that the kernel lets one message carry (`SCM_MAX_FD` of `net/scm.h`).
pub const MAX_DESCRIPTORS: usize = 253;

/// Receives one packet with the descriptors that came with it. A length of 0 is the end: the other
/// side is closed.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let mut iov = [io::IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just made these descriptors for this process; nothing else
            // knows their numbers yet.
            descriptors.extend(
                raw.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    Ok((message.bytes, descriptors))
}

/// Gives memory that the allocator keeps for later back to the kernel.
pub fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim has no preconditions; it only looks at the allocator's own lists.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Lets go of the program text that is resident, of this program and its libraries. What is
/// executed again comes back, a few pages at a time; what only the start needed stays away.
///
/// To be called before memory is locked: the kernel refuses it for locked text.
pub fn drop_resident_text() -> io::Result<()> {
    for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
        let mut columns = line.split(' ');
        let (Some(range), Some("r-xp")) = (columns.next(), columns.next()) else {
            continue;
        };
        // Only what has a file behind it: the vdso has not.
        if !line.contains('/') {
            continue;
        }
        let ends = range.split_once('-');
        let number = |text| usize::from_str_radix(text, 16).ok();
        let (Some(start), Some(end)) = (
            ends.and_then(|(start, _)| number(start)),
            ends.and_then(|(_, end)| number(end)),
        ) else {
            continue;
        };
        // SAFETY: the range is a private mapping of a file that is readable and executable and
        // not writable, as the kernel itself has just said. Relocations do not touch such
        // segments (they would be writable then), so each page equals the file's, and the next
        // access reads the same bytes from there.
        let ret = unsafe {
            libc::madvise(
                start as *mut libc::c_void,
                end.saturating_sub(start),
                libc::MADV_DONTNEED,
            )
        };
        Errno::result(ret)?;
    }
    Ok(())
}
