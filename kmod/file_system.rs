// SPDX-License-Identifier: GPL-2.0

//! A file system, as far as freezing goes.
//!
//! The freeze is the VFS's exclusive one (`FREEZE_EXCL`): only who is named as its owner can undo
//! it, and it nests with those of others. Knows nothing of who wants it, and for how long.
//!
//! C headers: [`include/linux/fs/super.h`](srctree/include/linux/fs/super.h),
//! [`include/linux/mount.h`](srctree/include/linux/mount.h)

use crate::bindings;
use crate::compat::error;
use core::ptr;
use core::ptr::NonNull;
use kernel::bindings as raw;
use kernel::error::to_result;
use kernel::prelude::*;

/// A file system that is kept mounted: an unmount gets `EBUSY`, a lazy one is completed when this
/// is dropped, which may sleep.
///
/// # Invariants
///
/// `mount` is a valid mount, and a reference to it is owned.
pub(crate) struct FileSystem {
    mount: NonNull<raw::vfsmount>,
}

// SAFETY: A reference to a mount may be used and dropped by any thread.
unsafe impl Send for FileSystem {}

impl FileSystem {
    /// The file system of the caller's open descriptor `fd`, which may be a path only (`O_PATH`): that is had without
    /// a word to the file system, which may hang.
    ///
    /// # Errors
    ///
    /// `EBADF` when it is not open.
    pub(crate) fn of(fd: i32) -> Result<Self> {
        let fd = u32::try_from(fd).map_err(|_| EBADF)?;
        // The mount, not the file: a descriptor can be sent through itself, and would never be
        // closed.
        //
        // SAFETY: Any number will do.
        let mount = unsafe { bindings::hv_vss_mount_of(fd) };
        // INVARIANT: A reference was taken.
        Ok(FileSystem {
            mount: NonNull::new(mount).ok_or(EBADF)?,
        })
    }

    /// Whether the caller may freeze it, and whether it can be frozen, as FIFREEZE has it.
    ///
    /// # Errors
    ///
    /// `EPERM` or `EOPNOTSUPP`.
    pub(crate) fn may_freeze(&self) -> Result {
        // SAFETY: By the type invariant the superblock is alive, and so is its user namespace.
        let user_namespace = unsafe { (*self.superblock()).s_user_ns };
        // SAFETY: As above.
        if !unsafe { bindings::hv_vss_ns_capable(user_namespace, raw::CAP_SYS_ADMIN as c_int) } {
            return Err(EPERM);
        }
        let operations = self.operations();
        if operations.freeze_fs.is_none() && operations.freeze_super.is_none() {
            return Err(error(raw::EOPNOTSUPP));
        }
        Ok(())
    }

    /// Freezes it for `owner`. Process context; waits for writers and for the disk.
    ///
    /// # Errors
    ///
    /// What the file system says, such as `EIO`.
    pub(crate) fn freeze<T>(&self, owner: &T) -> Result {
        let owner = ptr::from_ref(owner).cast();
        // SAFETY: By the type invariant the superblock is alive and active. The owner is not null.
        to_result(unsafe { bindings::hv_vss_freeze_super(self.superblock(), owner) })
    }

    /// Undoes a freeze for `owner`. Process context; may wait for the disk. What it says is true if nobody else
    /// freezes or thaws it for this owner meanwhile.
    ///
    /// # Errors
    ///
    /// `EINVAL` when it is not frozen for this owner, else what the file system says; it is still
    /// frozen then. An `EINVAL` or `EBUSY` of its own (jfs, when it cannot read its log; gfs2, while it
    /// is being frozen by another node) is an `EIO`.
    pub(crate) fn thaw<T>(&self, owner: &T) -> Result {
        let owner = ptr::from_ref(owner).cast();
        // SAFETY: As for `freeze`; two words are read, each at once.
        let is_frozen = || unsafe { bindings::hv_vss_is_frozen_for(self.superblock(), owner) };
        let was_frozen = is_frozen();
        // SAFETY: As for `freeze`.
        let result = to_result(unsafe { bindings::hv_vss_thaw_super(self.superblock(), owner) });
        match result {
            Err(error) if error == EINVAL && is_frozen() => Err(EIO),
            // Others have it frozen as well: so a kernel before 7.3 says that ours has ended.
            Err(error) if error == EINVAL && was_frozen => Ok(()),
            Err(error) if error == EBUSY => Err(EIO),
            other => other,
        }
    }

    fn superblock(&self) -> *mut raw::super_block {
        // SAFETY: By the type invariant the mount is valid; its superblock does not change.
        unsafe { (*self.mount.as_ptr()).mnt_sb }
    }

    fn operations(&self) -> &raw::super_operations {
        // SAFETY: By the type invariant the superblock is alive; its operations are never null, and
        // constant.
        unsafe { &*(*self.superblock()).s_op }
    }

    /// Which one it is.
    pub(crate) fn identity(&self) -> Identity {
        let superblock = self.superblock();
        let mut kind = [0; KIND];
        // SAFETY: By the type invariant the superblock is alive, and with it its type, whose name
        // is a string.
        let (device, name) = unsafe {
            let name = CStr::from_char_ptr((*(*superblock).s_type).name);
            ((*superblock).s_dev, name)
        };
        for (to, from) in kind.iter_mut().zip(name.to_bytes()) {
            *to = *from;
        }
        Identity {
            superblock: superblock.addr(),
            device: (
                device >> raw::MINORBITS,
                device & ((1 << raw::MINORBITS) - 1),
            ),
            kind,
        }
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        // SAFETY: By the type invariant there is a reference, which ends here.
        unsafe { raw::mntput(self.mount.as_ptr()) };
    }
}

/// Bytes of a file system type's name that are kept.
const KIND: usize = 16;

/// Which file system it is, for comparing and for printing.
#[derive(Clone, Copy)]
pub(crate) struct Identity {
    superblock: usize,
    /// The numbers of its device.
    pub(crate) device: (u32, u32),
    /// The name of its type, filled up with zeros.
    kind: [u8; KIND],
}

impl Identity {
    /// The name of its type.
    pub(crate) fn kind(&self) -> &str {
        let end = self.kind.iter().position(|b| *b == 0).unwrap_or(KIND);
        let name = self.kind.get(..end).unwrap_or_default();
        core::str::from_utf8(name).unwrap_or("?")
    }
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        self.superblock == other.superblock
    }
}

/// While there is one, RCU's grace periods are expedited, as the kernel itself does around suspend.
///
/// `freeze_super` waits for three of them, one for each kind of writer that it shuts out: nearly
/// all of the time that a file system takes that has nothing to write. A caller that waits has one,
/// not the worker, so that a freeze that hangs does not go on with it when its caller is gone.
pub(crate) struct Expedited(());

impl Expedited {
    /// They are expedited.
    pub(crate) fn new() -> Self {
        // SAFETY: There are no requirements; they nest.
        unsafe { bindings::hv_vss_rcu_expedite() };
        Expedited(())
    }
}

impl Drop for Expedited {
    fn drop(&mut self) {
        // SAFETY: `new` has been called.
        unsafe { bindings::hv_vss_rcu_unexpedite() };
    }
}
