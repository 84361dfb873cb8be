// SPDX-License-Identifier: GPL-2.0

//! A kernel timer that lives inside the object it serves.
//!
//! The kernel crate has high-resolution timers whose handles cancel when they drop, and delayed
//! work that cannot be re-armed; what is needed here is `mod_timer`: one deadline that moves, from
//! any context. Knows nothing of VSS.
//!
//! C header: [`include/linux/timer.h`](srctree/include/linux/timer.h)

use crate::bindings;
use core::marker::PhantomData;
use kernel::prelude::*;
use kernel::types::Opaque;

/// Whoever is told that a time is over.
pub(crate) trait Expire: Sync + Sized {
    /// The timer has expired. Runs in softirq context: must not sleep.
    fn expired(&self);
}

/// An object that contains a [`Timer`]; implemented by [`impl_has_timer`].
///
/// # Safety
///
/// - `OFFSET` must be the offset in bytes of a pinned [`Timer<Self>`] inside `Self`.
/// - Dropping a `Self` must begin with [`Timer::shut_down`], before any field is dropped.
pub(crate) unsafe trait HasTimer: Expire {
    /// Where the timer is.
    const OFFSET: usize;
}

/// Implements [`HasTimer`] for a pinned type with a pinned field: `impl_has_timer!(Type.field)`.
/// Takes the type's `PinnedDrop` for it.
macro_rules! impl_has_timer {
    ($type:ident . $field:ident) => {
        const _: fn(&$type) -> &$crate::timer::Timer<$type> = |object| &object.$field;

        // SAFETY: The line above shows that the field is a timer for this type, the `PinnedDrop`
        // below that dropping the object begins with shutting the timer down.
        unsafe impl $crate::timer::HasTimer for $type {
            const OFFSET: usize = ::core::mem::offset_of!($type, $field);
        }

        #[pinned_drop]
        impl PinnedDrop for $type {
            fn drop(self: Pin<&mut Self>) {
                $crate::timer::Timer::shut_down(&*self);
            }
        }
    };
}
pub(crate) use impl_has_timer;

/// A timer for the `T` that it is a field of.
///
/// # Invariants
///
/// `inner` is set up as a timer that calls [`Timer::callback`].
#[pin_data]
#[repr(C)]
pub(crate) struct Timer<T: HasTimer> {
    #[pin]
    inner: Opaque<kernel::bindings::timer_list>,
    _object: PhantomData<fn(&T)>,
}

// SAFETY: A `timer_list` may be used and torn down from any thread.
unsafe impl<T: HasTimer> Send for Timer<T> {}
// SAFETY: The timer core has its own lock; all functions may be called in parallel.
unsafe impl<T: HasTimer> Sync for Timer<T> {}

impl<T: HasTimer> Timer<T> {
    /// A timer that is not running.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            inner <- Opaque::ffi_init(|slot| {
                // SAFETY: `slot` is valid for writes. It is pinned, and what is armed is shut down
                // before it is dropped, see `HasTimer`.
                unsafe { bindings::hv_vss_timer_setup(slot, Some(Self::callback)) }
            }),
            _object: PhantomData,
        })
    }

    /// The C timer inside `object`. Only such a timer is ever armed, so the callback can rely on
    /// there being a `T` around it.
    fn inside(object: &T) -> *mut kernel::bindings::timer_list {
        // By the safety requirements of `HasTimer` this stays inside `object`, and points to a
        // `Timer<T>`, whose first field this is (`Opaque` is transparent).
        core::ptr::from_ref(object)
            .wrapping_byte_add(T::OFFSET)
            .cast_mut()
            .cast()
    }

    /// (Re)starts the timer of `object`: it expires not before `us` microseconds from now. Does
    /// nothing after [`Timer::shut_down`]. Any context.
    pub(crate) fn arm(object: &T, us: u64) {
        // SAFETY: By the type invariant the timer is set up.
        unsafe { bindings::hv_vss_timer_arm(Self::inside(object), us) }
    }

    /// Stops the timer of `object`; a callback that is running goes on. Any context.
    pub(crate) fn stop(object: &T) {
        // SAFETY: By the type invariant the timer is set up.
        unsafe { kernel::bindings::timer_delete(Self::inside(object)) };
    }

    /// Stops the timer of `object` for good and waits for a callback that is running: process
    /// context, without a lock that the callback takes.
    pub(crate) fn shut_down(object: &T) {
        // SAFETY: By the type invariant the timer is set up.
        unsafe { kernel::bindings::timer_shutdown_sync(Self::inside(object)) };
    }

    extern "C" fn callback(timer: *mut kernel::bindings::timer_list) {
        // SAFETY: Only timers at `OFFSET` inside a `T` are armed, so this points to that `T`. It is
        // alive and whole: dropping it begins with waiting for us.
        let object = unsafe { &*timer.byte_sub(T::OFFSET).cast::<T>() };
        object.expired();
    }
}
