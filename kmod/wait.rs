// SPDX-License-Identifier: GPL-2.0

//! A wait queue whose waiters can be killed, or not even that, and by nothing else be disturbed.
//!
//! The kernel crate's `CondVar` waits uninterruptibly and without a limit, or until any signal comes:
//! the one makes a process that nobody can kill, the other ends waits that cannot be begun anew. Knows
//! nothing of what is waited for.
//!
//! C header: [`include/linux/wait.h`](srctree/include/linux/wait.h)

use crate::bindings;
use core::ptr;
use kernel::bindings as raw;
use kernel::prelude::*;
use kernel::sync::LockClassKey;
use kernel::task::TASK_NORMAL;
use kernel::types::Opaque;

/// Creates a [`WaitQueue`] initialiser with the given name and a newly-created lock class.
macro_rules! new_wait_queue {
    ($name:literal) => {
        $crate::wait::WaitQueue::new(
            ::kernel::optional_name!($name),
            ::kernel::static_lock_class!(),
        )
    };
}
pub(crate) use new_wait_queue;

/// How a wait ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waited {
    /// What was waited for has come.
    Done,
    /// It has not come in time.
    TimedOut,
    /// The waiting process is being killed.
    Killed,
}

/// A `wait_queue_head`.
#[pin_data]
pub(crate) struct WaitQueue {
    #[pin]
    inner: Opaque<raw::wait_queue_head>,
}

// SAFETY: A `wait_queue_head` may be used from any thread.
unsafe impl Send for WaitQueue {}
// SAFETY: It has its own lock; all functions may be called in parallel.
unsafe impl Sync for WaitQueue {}

impl WaitQueue {
    /// A queue that nobody waits in; see [`new_wait_queue`].
    pub(crate) fn new(name: &'static CStr, key: Pin<&'static LockClassKey>) -> impl PinInit<Self> {
        pin_init!(Self {
            inner <- Opaque::ffi_init(|slot| {
                // SAFETY: `slot` is valid for writes and pinned; `name` and `key` live for ever.
                unsafe { raw::__init_waitqueue_head(slot, name.as_char_ptr(), key.as_ptr()) }
            }),
        })
    }

    /// Lets all who wait look again. Any context.
    pub(crate) fn wake_all(&self) {
        // SAFETY: The queue is set up; 0 wakes all, and they take no key.
        unsafe { raw::__wake_up(self.inner.get(), TASK_NORMAL, 0, ptr::null_mut()) };
    }

    /// Waits until `condition` holds, which is asked at first and after each [`Self::wake_all`].
    /// Process context; `condition` must not sleep.
    pub(crate) fn wait<F: FnMut() -> bool>(
        &self,
        timeout_ms: Option<u32>,
        mut condition: F,
    ) -> Waited {
        // SAFETY: The queue is set up. `condition` is alive until the call returns, and is what
        // `ask::<F>` takes; only this thread calls it, and one call at a time.
        let left = unsafe {
            bindings::hv_vss_wait_killable(
                self.inner.get(),
                Some(Self::ask::<F>),
                ptr::from_mut(&mut condition).cast(),
                timeout_ms.unwrap_or(0),
                timeout_ms.is_none(),
            )
        };
        match left {
            ..0 => Waited::Killed,
            0 => Waited::TimedOut,
            1.. => Waited::Done,
        }
    }

    /// As [`Self::wait`], and only time ends it: no signal, not even one that kills. Does not count as hanging.
    /// Says whether `condition` holds.
    pub(crate) fn wait_undisturbed<F: FnMut() -> bool>(
        &self,
        timeout_ms: u32,
        mut condition: F,
    ) -> bool {
        // SAFETY: As for `wait`.
        let left = unsafe {
            bindings::hv_vss_wait_idle(
                self.inner.get(),
                Some(Self::ask::<F>),
                ptr::from_mut(&mut condition).cast(),
                timeout_ms,
            )
        };
        left > 0
    }

    /// # Safety
    ///
    /// `condition` must point to an `F` that nobody else uses.
    unsafe extern "C" fn ask<F: FnMut() -> bool>(condition: *mut c_void) -> bool {
        // SAFETY: Guaranteed by the caller.
        let condition = unsafe { &mut *condition.cast::<F>() };
        condition()
    }
}
