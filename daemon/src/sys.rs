// SPDX-License-Identifier: GPL-2.0-only

//! The system calls that no library wraps, each behind a safe function.
//!
//! This is the only file of the daemon that holds `unsafe`. It knows descriptors and numbers, and
//! nothing of what they are used for. Constants come from the kernel's `linux/fs.h`,
//! `linux/loop.h`, `linux/btrfs.h`, `linux/dm-ioctl.h`, `linux/stat.h` and `linux/nsfs.h`.

use std::cell::Cell;
use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::mounts::DevId;
use hv_vss_uapi::{IocFreeze, IocThaw};
use nix::errno::Errno;
use nix::fcntl::{openat2, OFlag, OpenHow, ResolveFlag, AT_FDCWD};
use nix::sched::{unshare, CloneFlags};
use nix::sys::signal::SigSet;
use nix::sys::socket::{recvmsg, sendmsg, ControlMessage, MsgFlags};
use nix::unistd::{pipe2, Pid};

/// The raw ioctl wrappers that nix generates; all of them are unsafe functions.
mod ioctl {
    use nix::sys::ioctl::ioctl_num_type;

    const FREEZE: ioctl_num_type = hv_vss_uapi::IOC_FREEZE as ioctl_num_type;
    const THAW: ioctl_num_type = hv_vss_uapi::IOC_THAW as ioctl_num_type;

    nix::ioctl_readwrite!(fifreeze, b'X', 119, libc::c_int);
    nix::ioctl_readwrite!(fithaw, b'X', 120, libc::c_int);
    nix::ioctl_write_ptr_bad!(hold, FREEZE, super::IocFreeze);
    nix::ioctl_write_ptr_bad!(let_go, THAW, super::IocThaw);
    nix::ioctl_read_bad!(loop_get_status64, 0x4C05, super::LoopInfo64);
    nix::ioctl_read_bad!(blksszget, nix::request_code_none!(0x12, 104), libc::c_int);
    nix::ioctl_none!(btrfs_sync, 0x94, 8);
    nix::ioctl_read!(btrfs_fs_info, 0x94, 31, super::BtrfsFsInfo);
    nix::ioctl_readwrite!(btrfs_scrub_progress, 0x94, 29, super::BtrfsScrub);
    nix::ioctl_readwrite!(dm_table_status, 0xfd, 12, super::DmIoctl);
    nix::ioctl_read!(ns_get_mntns_id, 0xb7, 5, u64);
    nix::ioctl_read!(ns_mnt_get_next, 0xb7, 11, super::MntNsInfo);
    nix::ioctl_read!(ns_mnt_get_prev, 0xb7, 12, super::MntNsInfo);
}

/// `struct btrfs_ioctl_fs_info_args` of `linux/btrfs.h`, which is 1024 bytes long, as is the next one.
#[repr(C)]
struct BtrfsFsInfo {
    max_id: u64,
    num_devices: u64,
    fsid: [u8; 16],
    rest: [u64; 124],
}

/// `struct btrfs_ioctl_scrub_args`.
#[repr(C)]
struct BtrfsScrub {
    devid: u64,
    rest: [u64; 127],
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

// As long as the kernel's headers have them, or their first version.
const _: () = assert!(size_of::<LoopInfo64>() == 232);
const _: () = assert!(size_of::<BtrfsFsInfo>() == 1024 && size_of::<BtrfsScrub>() == 1024);
const _: () = assert!(size_of::<MntNsInfo>() == 16 && size_of::<MntIdReq>() == 32);

/// Adds what an open folder lists from where it was read last on, as the kernel writes it: one
/// `struct linux_dirent64` of getdents(2) after the other. Nothing is opened or looked up for it.
pub fn list_folder(folder: BorrowedFd<'_>, into: &mut Vec<u8>) -> io::Result<()> {
    // Enough for a hundred names at a time.
    let mut chunk = [0_u8; 4096];
    // The kernel stops where the next one does not fit.
    let largest = size_of::<libc::dirent64>();
    loop {
        // SAFETY: the kernel writes at most so many bytes as it is told `chunk` has, and no other
        // reference to them is used meanwhile.
        let read = unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                folder.as_raw_fd(),
                chunk.as_mut_ptr(),
                chunk.len(),
            )
        };
        let read = usize::try_from(read).map_err(|_| Errno::last())?;
        match chunk.get(..read) {
            Some([]) | None => return Ok(()),
            Some(entries) => into.extend_from_slice(entries),
        }
        if read + largest <= chunk.len() {
            return Ok(());
        }
    }
}

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

/// Freezes the file system that `freeze.fd` is open on, for as long as the device of hv_vss that `device`
/// has open is not closed. Errors are in `uapi/hv_vss.h`.
pub fn hold(device: BorrowedFd<'_>, freeze: &IocFreeze) -> io::Result<()> {
    // SAFETY: the device is open for as long as the borrow lives, and the kernel reads one structure of
    // the size that is part of the number. What `freeze.fd` is, it looks at for itself.
    unsafe { ioctl::hold(device.as_raw_fd(), freeze) }?;
    Ok(())
}

/// Thaws what [`hold`] has frozen with this id on the file system that `fd` is open on. Fails with `EINVAL` when it is
/// not held (any more), and with `ESTALE` when it is with another.
pub fn let_go(device: BorrowedFd<'_>, id: u64, fd: BorrowedFd<'_>) -> io::Result<()> {
    let thaw = IocThaw {
        id,
        fd: fd.as_raw_fd(),
        flags: 0,
    };
    // SAFETY: as for `hold`: an open device and one structure to read.
    unsafe { ioctl::let_go(device.as_raw_fd(), &thaw) }?;
    Ok(())
}

/// Thaws all that [`hold`] has frozen with this id, as far as it can be.
pub fn let_all_go(device: BorrowedFd<'_>, id: u64) -> io::Result<()> {
    let thaw = IocThaw {
        id,
        fd: -1,
        flags: 0,
    };
    // SAFETY: as for `let_go`.
    unsafe { ioctl::let_go(device.as_raw_fd(), &thaw) }?;
    Ok(())
}

/// How large a logical block of the device that `fd` is open on is, in bytes (`BLKSSZGET`). Waits for no disk.
pub fn logical_block(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: an open descriptor, and one number for the kernel to write that outlives the call.
    unsafe { ioctl::blksszget(fd.as_raw_fd(), &mut bytes) }?;
    usize::try_from(bytes).map_err(io::Error::other)
}

fn btrfs_fs_info(fd: BorrowedFd<'_>) -> io::Result<BtrfsFsInfo> {
    let mut info = BtrfsFsInfo {
        max_id: 0,
        num_devices: 0,
        fsid: [0; 16],
        rest: [0; 124],
    };
    // SAFETY: an open descriptor and one structure of the size that the number tells the kernel.
    unsafe { ioctl::btrfs_fs_info(fd.as_raw_fd(), &mut info) }?;
    Ok(info)
}

/// The UUID of the btrfs that `fd` is open on. Any other file system does not know the question.
pub fn btrfs_uuid(fd: BorrowedFd<'_>) -> io::Result<[u8; 16]> {
    Ok(btrfs_fs_info(fd)?.fsid)
}

/// Writes back the btrfs that `fd` is open on. Fails with `EROFS` when an error has ended all writing.
pub fn btrfs_sync(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: an open descriptor, and no argument.
    unsafe { ioctl::btrfs_sync(fd.as_raw_fd()) }?;
    Ok(())
}

/// Whether any device of the btrfs that `fd` is open on is being scrubbed. Takes `CAP_SYS_ADMIN`.
pub fn is_scrubbed(fd: BorrowedFd<'_>) -> io::Result<bool> {
    for devid in 1..=btrfs_fs_info(fd)?.max_id {
        let mut scrub = BtrfsScrub {
            devid,
            rest: [0; 127],
        };
        // SAFETY: likewise.
        match unsafe { ioctl::btrfs_scrub_progress(fd.as_raw_fd(), &mut scrub) } {
            Ok(_) => return Ok(true),
            // None of it, and no such device.
            Err(Errno::ENOTCONN | Errno::ENODEV) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(false)
}

/// `struct dm_ioctl`, behind which the kernel puts its answer.
#[repr(C)]
struct DmIoctl {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    names: [u8; 264],
}

/// Enough for the targets of a volume of some hundred pieces, in bytes.
const DM_ROOM: usize = 32 << 10;

#[repr(C)]
struct DmStatus {
    head: DmIoctl,
    room: [u8; DM_ROOM],
}

/// A target of the device mapper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Such as `raid`.
    pub kind: String,
    /// In the kernel's words.
    pub status: String,
}

/// Asks the device mapper, of which `control` is the node, what the targets of a device are at; nothing is written for it.
/// Takes `CAP_SYS_ADMIN`. Fails with `ENXIO` if it has no such device.
pub fn mapper_status(control: BorrowedFd<'_>, dev: DevId) -> io::Result<Vec<Mapped>> {
    mapper_says(control, dev, 0)
}

/// As [`mapper_status`], of each target its part of the table in place of its status.
pub fn mapper_table(control: BorrowedFd<'_>, dev: DevId) -> io::Result<Vec<Mapped>> {
    const TABLE: u32 = 1 << 4;
    mapper_says(control, dev, TABLE)
}

fn mapper_says(control: BorrowedFd<'_>, dev: DevId, flags: u32) -> io::Result<Vec<Mapped>> {
    const NO_FLUSH: u32 = 1 << 11;
    const BUFFER_FULL: u32 = 1 << 8;
    const HEAD: usize = size_of::<DmIoctl>();
    const { assert!(HEAD == 312, "as the kernel has it") };
    let mut status = DmStatus {
        head: DmIoctl {
            version: [4, 0, 0],
            data_size: size_of::<DmStatus>() as u32,
            data_start: HEAD as u32,
            target_count: 0,
            open_count: 0,
            flags: NO_FLUSH | flags,
            event_nr: 0,
            padding: 0,
            dev: libc::makedev(dev.major, dev.minor),
            names: [0; 264],
        },
        room: [0; DM_ROOM],
    };
    let both = &raw mut status;
    // SAFETY: an open descriptor, and a structure that outlives the call and begins with what the kernel reads; it
    // writes no more than `data_size`, which is all of it, and any bytes will do there.
    unsafe { ioctl::dm_table_status(control.as_raw_fd(), both.cast()) }?;
    let DmStatus { head, room } = &status;
    let at = usize::try_from(head.data_start).ok();
    let told = at.and_then(|at| room.get(at.checked_sub(HEAD)?..));
    let all = told.filter(|_| head.flags & BUFFER_FULL == 0);
    let all = all.and_then(|it| targets_in(it, head.target_count));
    all.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// So many targets: of each a `struct dm_target_spec` and its status.
fn targets_in(told: &[u8], count: u32) -> Option<Vec<Mapped>> {
    let text = |bytes: &[u8]| {
        Some(
            CStr::from_bytes_until_nul(bytes)
                .ok()?
                .to_string_lossy()
                .into(),
        )
    };
    let mut at = 0;
    let target = |_| {
        let target = told.get(at..)?;
        let next = target.get(20..24)?.try_into().ok()?;
        at = usize::try_from(u32::from_ne_bytes(next)).ok()?;
        Some(Mapped {
            kind: text(target.get(24..40)?)?,
            status: text(target.get(40..)?)?,
        })
    };
    (0..count).map(target).collect()
}

/// What is behind a loop device, with numbers in the kernel's own encoding (`huge_encode_dev`), which
/// is also the one of `stat(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopBacking {
    /// `st_dev` of the file.
    pub dev: u64,
    /// `st_rdev` of it: 0 unless it is the node of a block device.
    pub rdev: u64,
}

/// Asks the loop device that `fd` has open what is behind it. Fails with `ENXIO` when nothing is.
pub fn loop_backing(fd: BorrowedFd<'_>) -> io::Result<LoopBacking> {
    let mut info = MaybeUninit::<LoopInfo64>::zeroed();
    // SAFETY: the descriptor is open, and the kernel writes at most the 232 bytes that `info` has.
    unsafe { ioctl::loop_get_status64(fd.as_raw_fd(), info.as_mut_ptr()) }?;
    // SAFETY: every field is an integer or an array of integers, for which all bit patterns are
    // valid, and the memory was zeroed before the kernel filled it.
    let info = unsafe { info.assume_init() };
    Ok(LoopBacking {
        dev: info.lo_device,
        rdev: info.lo_rdevice,
    })
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
    let stx = statx(fd, libc::STATX_TYPE | libc::STATX_MNT_ID)?;
    Ok(Identity {
        mount_id: (stx.stx_mask & libc::STATX_MNT_ID != 0).then_some(stx.stx_mnt_id),
        major: stx.stx_dev_major,
        minor: stx.stx_dev_minor,
        mode: stx.stx_mode.into(),
    })
}

/// Opens what is at `path` as a path only (`O_PATH`) if the kernel has the way there in memory, and else fails with
/// `EAGAIN`: no file system is asked for anything.
pub fn open_in_memory(path: &Path) -> io::Result<OwnedFd> {
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC);
    let how = how.resolve(ResolveFlag::from_bits_retain(libc::RESOLVE_CACHED));
    Ok(openat2(AT_FDCWD, path, how)?)
}

/// The number of the mount that `fd` was opened through, as [`identify`] has it, from the kernel alone: statx(2) asks
/// the file system, which on a cluster may wait for the others. Fails where a file system has no handles for its files.
pub fn mount_id(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut no_room = libc::file_handle {
        handle_bytes: 0,
        handle_type: 0,
        f_handle: [],
    };
    let mut id: libc::c_int = -1;
    // SAFETY: the descriptor is open, the path is an empty C string as AT_EMPTY_PATH wants it, and the kernel writes
    // to `id` and to a handle of as many bytes as it is told there are: none.
    let made = unsafe {
        libc::name_to_handle_at(
            fd.as_raw_fd(),
            c"".as_ptr(),
            &mut no_room,
            &mut id,
            libc::AT_EMPTY_PATH,
        )
    };
    match Errno::result(made) {
        // The number is there although the handle does not fit.
        Ok(_) | Err(Errno::EOVERFLOW) => u64::try_from(id).map_err(|_| Errno::EOVERFLOW.into()),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether it is this process, or the machine, that lacks what it takes to open anything.
pub fn is_our_own(error: &io::Error) -> bool {
    let lacks = [libc::EMFILE, libc::ENFILE, libc::ENOMEM];
    error.raw_os_error().is_some_and(|it| lacks.contains(&it))
}

/// The number of the mount that `fd` was opened through, of the kind that is never used again.
/// Fails with [`io::ErrorKind::Unsupported`] before Linux 6.8.
pub fn unique_mount_id(fd: BorrowedFd<'_>) -> io::Result<u64> {
    const STATX_MNT_ID_UNIQUE: u32 = 0x4000;
    let stx = statx(fd, STATX_MNT_ID_UNIQUE)?;
    match stx.stx_mask & STATX_MNT_ID_UNIQUE {
        0 => Err(io::ErrorKind::Unsupported.into()),
        _ => Ok(stx.stx_mnt_id),
    }
}

fn statx(fd: BorrowedFd<'_>, mask: u32) -> io::Result<libc::statx> {
    let mut stx = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the descriptor is open, the path is an empty C string as AT_EMPTY_PATH wants it, and
    // the kernel writes one `struct statx` into memory of that size.
    let ret = unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            // What is asked for never changes, and no server has to say it.
            libc::AT_EMPTY_PATH | libc::AT_NO_AUTOMOUNT | libc::AT_STATX_DONT_SYNC,
            mask,
            stx.as_mut_ptr(),
        )
    };
    Errno::result(ret)?;
    // SAFETY: `struct statx` holds only integers, and the memory was zeroed before the kernel
    // filled it.
    Ok(unsafe { stx.assume_init() })
}

/// `struct mnt_ns_info` of `linux/nsfs.h`, first version: what the kernel says of a mount namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MntNsInfo {
    size: u32,
    /// How many mounts there are in it.
    pub nr_mounts: u32,
    /// Its number, never used again.
    pub mnt_ns_id: u64,
}

/// The number of the mount namespace that `fd` has open. Fails with `ENOTTY` before Linux 6.11.
pub fn namespace_id(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut id = 0;
    // SAFETY: the descriptor is open, and the kernel writes one `u64` to `id`.
    unsafe { ioctl::ns_get_mntns_id(fd.as_raw_fd(), &mut id) }?;
    Ok(id)
}

/// Opens the mount namespace that comes after (or before) the one that `fd` has open, in the
/// kernel's list of all, and says what it is; `None` at the end of the list.
///
/// Fails with `ENOTTY` on kernels before 6.12 and with `EPERM` without privilege.
pub fn neighbour_namespace(
    fd: BorrowedFd<'_>,
    after: bool,
) -> io::Result<Option<(OwnedFd, MntNsInfo)>> {
    let mut info = MntNsInfo::default();
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
        Ok(new) => Ok(Some((unsafe { OwnedFd::from_raw_fd(new) }, info))),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// `struct mnt_id_req` of `linux/mount.h`, second version.
#[repr(C)]
struct MntIdReq {
    size: u32,
    mnt_ns_fd: u32,
    mnt_id: u64,
    param: u64,
    mnt_ns_id: u64,
}

/// The numbers of both calls are the same on every architecture but alpha.
const SYS_STATMOUNT: libc::c_long = 457;
const SYS_LISTMOUNT: libc::c_long = 458;

/// The number of the mount that was added last to the namespace with number `mnt_ns_id`, among those
/// that are still there. Numbers only grow, and none is used twice; 0 stands for none at all, as in a
/// namespace whose root has been unmounted.
///
/// Fails with `ENOSYS` before Linux 6.8, with `EINVAL` before 6.12.
pub fn newest_mount(mnt_ns_id: u64) -> io::Result<u64> {
    const LISTMOUNT_REVERSE: libc::c_uint = 1;
    let mut newest = [0];
    list_mounts(mnt_ns_id, 0, &mut newest, LISTMOUNT_REVERSE)?;
    Ok(newest[0])
}

/// The numbers of those mounts in the namespace with number `mnt_ns_id` that were added after the one with
/// number `after`, oldest first; 0 stands for none at all, as in [`newest_mount`]. Fails as that does, and with
/// [`io::ErrorKind::TimedOut`] when it takes longer than `until`: of each the kernel goes down all that it is attached to.
pub fn mounts_after(mnt_ns_id: u64, mut after: u64, until: Instant) -> io::Result<Vec<u64>> {
    let mut found = Vec::new();
    let mut chunk = [0; 64];
    loop {
        let listed = list_mounts(mnt_ns_id, after, &mut chunk, 0)?;
        let listed = chunk.get(..listed).unwrap_or_default();
        let Some(last) = listed.last() else {
            return Ok(found);
        };
        if Instant::now() >= until {
            return Err(io::ErrorKind::TimedOut.into());
        }
        found.extend_from_slice(listed);
        after = *last;
    }
}

/// Lists mounts into `into`, from the one after `after` on, and says how many.
fn list_mounts(
    mnt_ns_id: u64,
    after: u64,
    into: &mut [u64],
    flags: libc::c_uint,
) -> io::Result<usize> {
    const LSMT_ROOT: u64 = u64::MAX;
    let request = MntIdReq {
        size: size_of::<MntIdReq>() as u32,
        mnt_ns_fd: 0,
        mnt_id: LSMT_ROOT,
        param: after,
        mnt_ns_id,
    };
    // SAFETY: the kernel reads the request, whose size is in it, and writes at most so many `u64` as it is
    // told that `into` has; no other reference to them is used meanwhile.
    let ret = unsafe {
        libc::syscall(
            SYS_LISTMOUNT,
            &request,
            into.as_mut_ptr(),
            into.len(),
            flags,
        )
    };
    match Errno::result(ret) {
        // Without a root there is nothing to begin with: nothing is mounted, or the namespace is gone.
        Err(Errno::ENOENT) => Ok(0),
        listed => Ok(usize::try_from(listed?).unwrap_or(0)),
    }
}

/// The superblock behind a mount, as [`superblock_of`] found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Its device number.
    pub dev: DevId,
    /// Whether it is read-only, whatever the mount is.
    pub read_only: bool,
}

/// What is mounted as the mount with number `mnt_id` (from [`unique_mount_id`]) in the namespace with
/// number `mnt_ns_id`.
///
/// Fails with `ENOENT` when that mount is gone, with `ENOSYS` before Linux 6.8.
pub fn superblock_of(mnt_ns_id: u64, mnt_id: u64) -> io::Result<Superblock> {
    const STATMOUNT_SB_BASIC: u64 = 1;
    const SB_RDONLY: u32 = 1;
    /// The fixed part of `struct statmount`, as far as it is used.
    #[repr(C, align(8))]
    #[derive(Default)]
    struct Statmount {
        size: u32,
        mnt_opts: u32,
        mask: u64,
        sb_dev_major: u32,
        sb_dev_minor: u32,
        sb_magic: u64,
        sb_flags: u32,
    }
    let request = MntIdReq {
        size: size_of::<MntIdReq>() as u32,
        mnt_ns_fd: 0,
        mnt_id,
        param: STATMOUNT_SB_BASIC,
        mnt_ns_id,
    };
    let mut found = Statmount::default();
    // SAFETY: the kernel reads the request, whose size is in it, and writes at most so many bytes
    // as it is told that there are (a `struct statmount` is cut off where the buffer ends).
    let ret = unsafe {
        libc::syscall(
            SYS_STATMOUNT,
            &request,
            &mut found,
            size_of::<Statmount>(),
            0,
        )
    };
    Errno::result(ret)?;
    if found.mask & STATMOUNT_SB_BASIC == 0 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(Superblock {
        dev: DevId {
            major: found.sb_dev_major,
            minor: found.sb_dev_minor,
        },
        read_only: found.sb_flags & SB_RDONLY != 0,
    })
}

/// Mounts what is on the block device `source` once more, attached nowhere, and returns the root of
/// that mount; it is gone when the last descriptor on it is closed. While a superblock of that type is
/// alive on the device it is the one that is mounted. What would change it, be it from writable to
/// read-only or back, most types refuse with `EBUSY`; btrfs takes a writable one for `read_only` as well,
/// as it is, but makes a read-only one writable for the other.
pub fn mount_detached(fs_type: &CStr, source: &CStr, read_only: bool) -> io::Result<OwnedFd> {
    const FSOPEN_CLOEXEC: libc::c_uint = 1;
    const FSCONFIG_SET_FLAG: libc::c_uint = 0;
    const FSCONFIG_SET_STRING: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    const FSMOUNT_CLOEXEC: libc::c_uint = 1;
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: the type is a C string that outlives the call.
    let ret = unsafe { libc::syscall(libc::SYS_fsopen, fs_type.as_ptr(), FSOPEN_CLOEXEC) };
    let context = new_descriptor(ret)?;
    let configure =
        |command: libc::c_uint, key: *const libc::c_char, value: *const libc::c_char| {
            let fd = context.as_raw_fd();
            // SAFETY: key and value are C strings that outlive the call, or null where the command takes
            // none.
            let ret = unsafe { libc::syscall(libc::SYS_fsconfig, fd, command, key, value, 0) };
            Errno::result(ret).map(drop)
        };
    configure(FSCONFIG_SET_STRING, c"source".as_ptr(), source.as_ptr())?;
    if read_only {
        configure(FSCONFIG_SET_FLAG, c"ro".as_ptr(), null)?;
    }
    configure(FSCONFIG_CMD_CREATE, null, null)?;
    // SAFETY: the call takes a descriptor, which is open, and integers.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            FSMOUNT_CLOEXEC,
            0 as libc::c_uint,
        )
    };
    new_descriptor(ret)
}

/// One more mount of what this descriptor is the root of, attached nowhere; it is gone when the descriptor of
/// it is closed.
pub fn clone_mount(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const OPEN_TREE_CLONE: libc::c_int = 1;
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC | libc::AT_EMPTY_PATH;
    // SAFETY: the call takes a descriptor, which is open, a C string and integers.
    let ret = unsafe { libc::syscall(libc::SYS_open_tree, fd.as_raw_fd(), c"".as_ptr(), flags) };
    new_descriptor(ret)
}

/// Asks for the quota format of what is mounted from this block device, which the kernel looks up first.
fn quota_format(node: &CStr) -> nix::Result<()> {
    const Q_GETFMT: libc::c_int = 0x80_0004;
    let mut format = 0_u32;
    // SAFETY: the node is a C string, and the answer is one `__u32`, as `quota_getfmt` writes it; both outlive
    // the call.
    let ret = unsafe {
        let answer = (&raw mut format).cast::<libc::c_char>();
        libc::quotactl(Q_GETFMT << 8, node.as_ptr(), 0, answer)
    };
    Errno::result(ret).map(drop)
}

/// Whether the kernel tells by [`has_superblock`]: one without quotas does not.
pub fn tells_superblocks() -> bool {
    quota_format(c"/") == Err(Errno::ENOTBLK)
}

/// Whether a superblock is on this block device, mounted or not, if the kernel tells. It waits where that is
/// just being unmounted.
pub fn has_superblock(node: &CStr) -> bool {
    match quota_format(node) {
        // It has none of those, or not such, or they are off.
        Ok(()) | Err(Errno::ENOSYS | Errno::EINVAL | Errno::ESRCH) => true,
        Err(_) => false,
    }
}

/// The descriptor that a raw system call has returned.
fn new_descriptor(ret: libc::c_long) -> io::Result<OwnedFd> {
    let raw = Errno::result(ret)?;
    let raw = RawFd::try_from(raw).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it for this process; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Most descriptors that the kernel lets one message carry (`SCM_MAX_FD` of `net/scm.h`).
pub const MAX_DESCRIPTORS: usize = 253;

/// Receives one packet with the descriptors that came with it, all of them: `EMFILE` when some were
/// lost on the way. A length of 0 is the end: the other side is closed.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let mut iov = [io::IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
    let (bytes, flags) = (message.bytes, message.flags);
    // Also of those that came although others were lost, which nix does not go through.
    let descriptors = descriptors_in(&space);
    match flags.contains(MsgFlags::MSG_CTRUNC) {
        false => Ok((bytes, descriptors)),
        true => Err(Errno::EMFILE.into()),
    }
}

/// Those that the kernel has put there, with one header before all; where none came, it is zeros as before.
fn descriptors_in(space: &[u8]) -> Vec<OwnedFd> {
    if space.len() < size_of::<libc::cmsghdr>() {
        return Vec::new();
    }
    // SAFETY: there is a header, which is integers only and need not be aligned.
    let header: libc::cmsghdr = unsafe { std::ptr::read_unaligned(space.as_ptr().cast()) };
    if (header.cmsg_level, header.cmsg_type) != (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
        return Vec::new();
    }
    // SAFETY: it only computes.
    let begin = unsafe { libc::CMSG_LEN(0) } as usize;
    let raw = space.get(begin..header.cmsg_len).unwrap_or_default();
    let raw = raw.chunks_exact(size_of::<RawFd>());
    let raw = raw.filter_map(|it| Some(RawFd::from_ne_bytes(it.try_into().ok()?)));
    // SAFETY: the kernel has just made these descriptors for this process; nothing else knows their numbers yet.
    raw.map(|it| unsafe { OwnedFd::from_raw_fd(it) }).collect()
}

/// Sends copies of these descriptors to whoever [receives](receive) them, with one byte.
pub fn send(socket: BorrowedFd<'_>, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_with(socket, &[0], descriptors)
}

/// The same with these bytes, at least one.
pub fn send_with(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let raw: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let bytes = [io::IoSlice::new(bytes)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_raw_fd(), &bytes, &rights, flags, None)?;
    Ok(())
}

/// Sets how the processor is shared with others (`nice`, -20 to 19) for the calling thread and what
/// it starts from now on. Fails with `EACCES` when that takes privilege that is lacking.
pub fn set_nice(nice: i32) -> io::Result<()> {
    // SAFETY: the call takes integers only; 0 stands for the calling thread.
    let ret = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
    Errno::result(ret)?;
    Ok(())
}

/// Stands for the calling thread in what follows.
pub const THIS_THREAD: Pid = Pid::from_raw(0);

/// Has a thread run before all that share the processor by turns (`SCHED_FIFO`), and among those that
/// do so, too, by this priority, 1 to 99. What it starts does not. Fails with `EPERM` when that takes privilege that is
/// lacking, or the machine has no such time to give (`CONFIG_RT_GROUP_SCHED`).
pub fn run_before_others(thread: Pid, priority: libc::c_int) -> io::Result<()> {
    set_scheduler(
        thread,
        libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK,
        priority,
    )
}

/// Has it share the processor by turns again, as its `nice` says.
pub fn run_by_turns(thread: Pid) -> io::Result<()> {
    const NONE: libc::c_int = 0;
    set_scheduler(thread, libc::SCHED_OTHER, NONE)
}

fn set_scheduler(thread: Pid, policy: libc::c_int, sched_priority: libc::c_int) -> io::Result<()> {
    let param = libc::sched_param { sched_priority };
    // SAFETY: the call reads one structure, which lives until it returns.
    let ret = unsafe { libc::sched_setscheduler(thread.as_raw(), policy, &raw const param) };
    Errno::result(ret)?;
    Ok(())
}

/// Gives the calling thread a table of descriptors of its own, with none in it but that with this number,
/// which is returned. What the others have open ends with them then, even if this thread hangs in the kernel
/// for good. It must not have anything else that closes a descriptor when it is dropped.
pub fn keep_only(number: RawFd) -> io::Result<OwnedFd> {
    const NO_FLAGS: libc::c_uint = 0;
    let kept = libc::c_uint::try_from(number).map_err(|_| Errno::EBADF)?;
    // A handler writes to a descriptor that is not there then: the signal would be lost. It goes to a thread
    // that takes it.
    SigSet::all().thread_block()?;
    unshare(CloneFlags::CLONE_FILES)?;
    TABLE.set(TABLES.fetch_add(1, Ordering::Relaxed) + 1);
    let below = kept.checked_sub(1).map(|last| (0, last));
    for (first, last) in below.into_iter().chain([(kept + 1, libc::c_uint::MAX)]) {
        // SAFETY: the call takes integers only. What it closes are this thread's own copies.
        let ret = unsafe { libc::syscall(libc::SYS_close_range, first, last, NO_FLAGS) };
        Errno::result(ret)?;
    }
    // SAFETY: the call takes integers only.
    Errno::result(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
    // SAFETY: it is open, and the only one in this thread's own table.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A table of descriptors: that which all threads of a process have in common, or one's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// One that has gone to the background has left its threads behind.
    process: u32,
    /// 0 is the common one.
    number: u64,
}

impl Table {
    /// The calling thread's.
    pub fn own() -> Self {
        Table {
            process: std::process::id(),
            number: TABLE.get(),
        }
    }

    /// The calling thread has it in common with who has started it.
    pub fn adopt(self) {
        TABLE.set(self.number);
    }
}

static TABLES: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static TABLE: Cell<u64> = const { Cell::new(0) };
}

/// Closes what is behind this descriptor although somebody may still have it: from now on it leads to a pipe at
/// its end.
pub fn replace_by_nothing(fd: BorrowedFd<'_>) -> io::Result<()> {
    let (nothing, _) = pipe2(OFlag::O_CLOEXEC)?;
    // SAFETY: the call takes integers only. The number stays open and belongs to whom it did.
    let ret = unsafe { libc::dup3(nothing.as_raw_fd(), fd.as_raw_fd(), libc::O_CLOEXEC) };
    Errno::result(ret)?;
    Ok(())
}

/// A descriptor that is readable when that process has ended. Fails with `ENOSYS` before Linux 5.3.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    const NO_FLAGS: libc::c_uint = 0;
    // SAFETY: the call takes integers only.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, NO_FLAGS) };
    new_descriptor(ret)
}

/// Makes all threads allocate from one heap. By default each sets 64 MiB of addresses aside, all of
/// which count as locked, and gives back none of what it has touched (`mallopt(3)`). That is given back when
/// nobody waits, by [`give_back_memory`]. To be called before there are threads.
pub fn use_one_heap() {
    /// Bytes at the end of the heap that are given back amid the work.
    #[cfg(target_env = "gnu")]
    const NOT_BY_ITSELF: libc::c_int = 4 << 20;
    /// Bytes from which on a buffer, as for a mount table, is mapped by itself, and goes with its last use: what is
    /// free amid a heap that is locked cannot be given back.
    #[cfg(target_env = "gnu")]
    const LARGE: libc::c_int = 16 << 10;
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes integers only, and no other thread allocates meanwhile.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, NOT_BY_ITSELF);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}

/// Sees to it that the heap has something free, so that it need not grow while file systems are frozen: the kernel may have
/// to write to one of them before it has a page to give.
pub fn set_memory_aside() {
    /// Bytes; smaller than what is mapped by itself.
    const BLOCK: usize = 8 << 10;
    /// Of such blocks: what is looked at and noted meanwhile takes a few.
    const BLOCKS: usize = 8;
    let blocks: [Vec<u8>; BLOCKS] = std::array::from_fn(|_| Vec::with_capacity(BLOCK));
    // Else nobody would ask for what nobody uses.
    drop(std::hint::black_box(blocks));
}

/// Gives memory that the allocator keeps for later back to the kernel, but for a little with which the next backup
/// begins: to have that zeroed and mapped anew, page by page, takes longer than the rest of its preparation.
pub fn give_back_memory() {
    /// Bytes at the end of the heap.
    #[cfg(target_env = "gnu")]
    const KEPT: usize = 64 << 10;
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim has no preconditions; it only looks at the allocator's own lists.
    unsafe {
        libc::malloc_trim(KEPT);
    }
}

/// Lets go of what is resident of this program and its libraries and can be read from their files again:
/// text and constants. What is used again comes back, a few pages at a time; what only the start needed
/// stays away.
///
/// To be called before memory is locked: the kernel refuses it for what is.
pub fn drop_resident_text() -> io::Result<()> {
    let mut mapping = None;
    for line in std::fs::read_to_string("/proc/self/smaps")?.lines() {
        let mut columns = line.split_ascii_whitespace();
        match (columns.next(), columns.next()) {
            // As they are relocated, some constants differ from the file: those have pages of their own.
            (Some("Anonymous:"), Some("0")) => {}
            (Some(range), Some(permissions)) if range.contains('-') => {
                // Only what has a file behind it: the vdso has not.
                let is_of_a_file = matches!(permissions, "r-xp" | "r--p") && line.contains('/');
                mapping = range.split_once('-').filter(|_| is_of_a_file);
                continue;
            }
            _ => continue,
        }
        let number = |text| usize::from_str_radix(text, 16).ok();
        let range = mapping.and_then(|(start, end)| Some((number(start)?, number(end)?)));
        let Some((start, end)) = range else {
            continue;
        };
        // SAFETY: the range is a private mapping of a file that is not writable and has no page that was
        // written to, as the kernel itself has just said. So each page equals the file's, and the next
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

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::resource::{getrlimit, setrlimit, Resource};
    use nix::sys::socket::{socketpair, AddressFamily, SockFlag, SockType};
    use std::os::fd::AsFd as _;
    use std::process::Command;

    /// The limit is that of a whole process.
    #[test]
    fn of_descriptors_that_do_not_all_fit_none_stays() {
        const CHILD: &str = "HV_VSS_TEST_LIMIT";
        if std::env::var_os(CHILD).is_none() {
            let this = std::env::current_exe().unwrap();
            let name = "sys::tests::of_descriptors_that_do_not_all_fit_none_stays";
            let mut child = Command::new(this);
            let child = child.args(["--exact", name, "--nocapture"]).env(CHILD, "1");
            let ended = child.output().unwrap();
            let text = String::from_utf8_lossy(&ended.stderr);
            assert!(ended.status.success(), "{text}");
            return;
        }
        let flags = SockFlag::SOCK_CLOEXEC;
        let family = AddressFamily::Unix;
        let (ours, theirs) = socketpair(family, SockType::SeqPacket, None, flags).unwrap();
        let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = count();
        send(theirs.as_fd(), &[ours.as_fd(); 5]).unwrap();
        let next = ours.try_clone().unwrap().as_raw_fd();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let limit = u64::try_from(next).unwrap() + 2;
        setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
        let received = receive(ours.as_fd(), &mut [0]);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        let error = received.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMFILE), "{error}");
        assert_eq!(count(), before);
        send(theirs.as_fd(), &[ours.as_fd(); 5]).unwrap();
        let (bytes, all) = receive(ours.as_fd(), &mut [7]).unwrap();
        assert_eq!((bytes, all.len(), count()), (1, 5, before + 5));
        send(theirs.as_fd(), &[]).unwrap();
        assert!(receive(ours.as_fd(), &mut [0]).unwrap().1.is_empty());
    }

    #[test]
    fn what_the_device_mapper_tells_is_read_target_by_target() {
        let spec = |next: u32, kind: &str, status: &str, len: usize| {
            let mut bytes = [&[0; 20], next.to_ne_bytes().as_slice()].concat();
            bytes.extend(kind.bytes());
            bytes.resize(40, 0);
            bytes.extend(status.bytes());
            bytes.resize(len, 0);
            bytes
        };
        let told = [spec(48, "linear", "", 48), spec(112, "mirror", "2 a b", 64)].concat();
        let mapped = |kind: &str, status: &str| Mapped {
            kind: kind.into(),
            status: status.into(),
        };
        let all = vec![mapped("linear", ""), mapped("mirror", "2 a b")];
        assert_eq!(targets_in(&told, 2), Some(all));
        assert_eq!(targets_in(&told, 0), Some(Vec::new()));
        assert_eq!(targets_in(&told, 3), None);
        assert_eq!(targets_in(told.get(..60).unwrap_or_default(), 2), None);
    }
}
