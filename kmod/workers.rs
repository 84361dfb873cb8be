// SPDX-License-Identifier: GPL-2.0

//! The module's workqueues, and that the module stays as long as they have work.
//!
//! They are the module's, not a device's: a device can go while a freeze hangs. Knows nothing of
//! what is done in them.
//!
//! C header: [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use crate::bindings;
use crate::compat::this_module;
use core::ptr::NonNull;
use kernel::bindings as raw;
use kernel::prelude::*;
use kernel::sync::global_lock;
use kernel::sync::Arc;
use kernel::workqueue::Queue;

global_lock! {
    // SAFETY: Initialised in `Workers::new`, which comes before all else.
    unsafe(uninit) static QUEUES: Mutex<Option<Arc<Queues>>> = None;
}

/// The queues. Thaws have one of their own, that no hanging freeze can keep busy.
pub(crate) struct Queues {
    freezes: OwnedQueue,
    thaws: OwnedQueue,
}

impl Queues {
    /// The module's, as long as there are [`Workers`].
    pub(crate) fn get() -> Result<Arc<Self>> {
        QUEUES.lock().clone().ok_or(ENODEV)
    }

    pub(crate) fn freezes(&self) -> &Queue {
        self.freezes.get()
    }

    pub(crate) fn thaws(&self) -> &Queue {
        self.thaws.get()
    }
}

/// There are workqueues as long as this lives.
pub(crate) struct Workers(());

impl Workers {
    /// Makes the workqueues.
    ///
    /// # Safety
    ///
    /// May be called once, before anything else of this file. What it returns must be dropped last.
    pub(crate) unsafe fn new() -> Result<Self> {
        // SAFETY: Guaranteed by the caller.
        unsafe { QUEUES.init() };
        let queues = Queues {
            // A freeze waits for whatever its file system waits for, also for work of queues that
            // make no such promise; with this flag the kernel does not warn of that.
            freezes: OwnedQueue::new(c"hv_vss_freeze", raw::wq_flags___WQ_LEGACY)?,
            thaws: OwnedQueue::new(c"hv_vss_thaw", 0)?,
        };
        *QUEUES.lock() = Some(Arc::new(queues, GFP_KERNEL)?);
        Ok(Workers(()))
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // The last reference: no device is bound, no descriptor is open, and a work gives back its
        // own before its `ModuleReference`. Waits for works to return that have done so.
        let queues = QUEUES.lock().take();
        drop(queues);
    }
}

/// A workqueue that is destroyed on drop, which waits for what runs in it. Its work progresses even
/// if there is no memory for another worker, is not bound to a CPU, and goes before what other
/// threads do: writers wait for it.
///
/// # Invariants
///
/// It is a valid workqueue.
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
        // SAFETY: The name is a format without arguments.
        let queue = unsafe {
            raw::alloc_workqueue_noprof(
                name.as_char_ptr(),
                flags,
                // CAST: 2048.
                raw::wq_consts_WQ_MAX_ACTIVE as c_int,
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
        // SAFETY: By the type invariant it is valid; it is not used any more.
        unsafe { raw::destroy_workqueue(self.0.as_ptr()) };
    }
}

/// Keeps the module from being unloaded. A work has one from when it is queued until all that is
/// left of it is to return; for that much the end of [`Workers`] waits.
pub(crate) struct ModuleReference(());

impl ModuleReference {
    /// Takes one. Any context.
    pub(crate) fn new() -> Self {
        // SAFETY: This is the module that runs.
        unsafe { bindings::hv_vss_module_get(this_module()) };
        ModuleReference(())
    }
}

impl Drop for ModuleReference {
    fn drop(&mut self) {
        // SAFETY: `new` has taken it.
        unsafe { bindings::hv_vss_module_put(this_module()) };
    }
}
