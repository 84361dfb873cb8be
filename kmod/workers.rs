// SPDX-License-Identifier: GPL-2.0

//! The module's workqueues, and that the module stays as long as they have work.
//!
//! Knows nothing of what is done in them.
//!
//! C header: [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use crate::bindings;
use core::ptr::NonNull;
use kernel::bindings as raw;
use kernel::prelude::*;
use kernel::workqueue::Queue;

/// The queues. Thaws have one of their own, that no hanging freeze can keep busy.
pub(crate) struct Queues {
    freezes: OwnedQueue,
    thaws: OwnedQueue,
}

impl Queues {
    /// Makes them. Sleeps.
    ///
    /// # Errors
    ///
    /// `ENOMEM` without memory.
    pub(crate) fn new() -> Result<Self> {
        Ok(Queues {
            // A freeze waits for whatever its file system waits for, also for work of queues that
            // make no such promise; with this flag the kernel does not warn of that.
            freezes: OwnedQueue::new(c"hv_vss_freeze", raw::wq_flags___WQ_LEGACY)?,
            thaws: OwnedQueue::new(c"hv_vss_thaw", 0)?,
        })
    }

    pub(crate) fn freezes(&self) -> &Queue {
        self.freezes.get()
    }

    pub(crate) fn thaws(&self) -> &Queue {
        self.thaws.get()
    }
}

/// A workqueue that is destroyed on drop, which waits for what runs in it. Its work progresses even
/// if there is no memory for another worker, is not bound to a CPU, and goes before what other
/// threads do: writers wait for it.
///
/// # Invariants
///
/// It is a valid workqueue, which nobody else destroys.
struct OwnedQueue(NonNull<raw::workqueue_struct>);

// SAFETY: Workqueues may be used from any thread.
unsafe impl Send for OwnedQueue {}
// SAFETY: Likewise.
unsafe impl Sync for OwnedQueue {}

impl OwnedQueue {
    /// A queue of that name, with these flags besides.
    fn new(name: &'static CStr, flags: raw::wq_flags) -> Result<Self> {
        let flags = flags
            | raw::wq_flags_WQ_UNBOUND
            | raw::wq_flags_WQ_MEM_RECLAIM
            | raw::wq_flags_WQ_HIGHPRI;
        // SAFETY: The format takes a string, and both live for ever.
        let queue = unsafe {
            raw::alloc_workqueue_noprof(
                c"%s".as_char_ptr(),
                flags,
                // CAST: 2048.
                raw::wq_consts_WQ_MAX_ACTIVE as c_int,
                name.as_char_ptr(),
            )
        };
        // INVARIANT: It is one if it is not null.
        NonNull::new(queue).map(OwnedQueue).ok_or(ENOMEM)
    }

    fn get(&self) -> &Queue {
        // SAFETY: By the type invariant it is valid for as long as `self` is.
        unsafe { Queue::from_raw(self.0.as_ptr()) }
    }
}

impl Drop for OwnedQueue {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it is valid and ours; what `get` has lent has ended.
        unsafe { raw::destroy_workqueue(self.0.as_ptr()) };
    }
}

/// Keeps the module from being unloaded. A work has one until all that is left of it is to return; for that
/// much the end of its [queue](Queues) waits.
///
/// # Invariants
///
/// A reference to the module is owned.
pub(crate) struct ModuleReference(());

impl ModuleReference {
    /// Takes one. Any context.
    ///
    /// # Errors
    ///
    /// `ENODEV` when the module is going.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: The module is there as long as its code runs.
        if !unsafe { bindings::hv_vss_module_try_get() } {
            return Err(ENODEV);
        }
        // INVARIANT: It has been taken.
        Ok(ModuleReference(()))
    }
}

impl Clone for ModuleReference {
    /// Takes another one. Any context.
    fn clone(&self) -> Self {
        // SAFETY: By the type invariant there is a reference, so the module is not going.
        unsafe { bindings::hv_vss_module_get() };
        // INVARIANT: It has been taken.
        ModuleReference(())
    }
}

impl Drop for ModuleReference {
    fn drop(&mut self) {
        // SAFETY: By the type invariant there is a reference, which ends here.
        unsafe { bindings::hv_vss_module_put() };
    }
}
