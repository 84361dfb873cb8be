// SPDX-License-Identifier: GPL-2.0

//! A kernel timer that lives inside the object it serves.
//!
//! The kernel crate has high-resolution timers whose handles cancel when they drop, and delayed
//! work that cannot be re-armed; what is needed here is `mod_timer`: one deadline that moves, from
//! any context. Knows nothing of VSS.
//!
//! C header: [`include/linux/timer.h`](srctree/include/linux/timer.h)

use crate::bindings;
use kernel::prelude::*;
use kernel::types::Opaque;

/// An object that contains a [`Timer`].
///
/// # Safety
///
/// `OFFSET` must be the offset in bytes of a [`Timer<Self>`] inside `Self`, and that field must be
/// the first to be dropped, so that the callback never sees fields that are gone.
pub(crate) unsafe trait HasTimer: Sync + Sized {
    /// Where the timer is.
    const OFFSET: usize;

    /// The timer has expired. Runs in softirq context: must not sleep.
    fn expired(&self);
}

/// A timer for a `T`. Dropping it waits for a callback that is running, so the last reference to
/// the object must go away in process context.
#[pin_data(PinnedDrop)]
pub(crate) struct Timer<T: HasTimer> {
    #[pin]
    inner: Opaque<kernel::bindings::timer_list>,
    _object: core::marker::PhantomData<fn(&T)>,
}

// SAFETY: A `timer_list` may be used and torn down from any thread.
unsafe impl<T: HasTimer> Send for Timer<T> {}
// SAFETY: The timer core has its own lock; all methods may be called in parallel.
unsafe impl<T: HasTimer> Sync for Timer<T> {}

impl<T: HasTimer> Timer<T> {
    /// A timer that is not running.
    ///
    /// # Safety
    ///
    /// It must be placed at [`HasTimer::OFFSET`] of a `T`.
    pub(crate) unsafe fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            inner <- Opaque::ffi_init(|slot| {
                // SAFETY: `slot` is valid for writes and, as part of a pinned object, stays where
                // it is until `drop` has shut the timer down.
                unsafe { bindings::hv_vss_timer_setup(slot, Some(Self::callback)) }
            }),
            _object: core::marker::PhantomData,
        })
    }

    /// (Re)starts the timer: it expires not before `us` microseconds from now. Does nothing after
    /// [`Timer::shut_down`].
    pub(crate) fn arm(&self, us: u64) {
        // SAFETY: `inner` was set up by `new`.
        unsafe { bindings::hv_vss_timer_arm(self.inner.get(), us) }
    }

    /// Stops the timer; a callback that is running goes on.
    pub(crate) fn stop(&self) {
        // SAFETY: `inner` was set up by `new`.
        unsafe { kernel::bindings::timer_delete(self.inner.get()) };
    }

    /// Stops the timer for good and waits for a callback that is running. May spin: process
    /// context, without a lock that the callback takes.
    pub(crate) fn shut_down(&self) {
        // SAFETY: `inner` was set up by `new`.
        unsafe { kernel::bindings::timer_shutdown_sync(self.inner.get()) };
    }

    extern "C" fn callback(timer: *mut kernel::bindings::timer_list) {
        // SAFETY: Only `new` installs this callback. By its contract `timer` is the first field of
        // a `Timer<T>` at `OFFSET` inside a `T` (`Opaque` is transparent, and `Timer` has no other
        // field with a size), so the result points to that `T`. It is alive and whole: dropping it
        // begins with this timer, which waits for us.
        let object = unsafe { &*timer.byte_sub(T::OFFSET).cast::<T>() };
        object.expired();
    }
}

#[pinned_drop]
impl<T: HasTimer> PinnedDrop for Timer<T> {
    fn drop(self: Pin<&mut Self>) {
        self.shut_down();
    }
}
