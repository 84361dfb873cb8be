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
pub(crate) trait TimerCallback: Sync + Sized + 'static {
    /// The timer has expired. Runs in softirq context: must not sleep.
    fn run(&self);
}

/// An object that contains a [`Timer`]; implemented by [`impl_has_timer`].
///
/// # Safety
///
/// - The two functions must be each other's inverse, and lead to a pinned [`Timer<Self>`] inside
///   `Self`.
/// - Dropping a `Self` must begin with [`Timer::shut_down`], before any field is dropped.
pub(crate) unsafe trait HasTimer: TimerCallback {
    /// Where the timer of an object is.
    ///
    /// # Safety
    ///
    /// `object` must point to a `Self`.
    unsafe fn raw_get_timer(object: *const Self) -> *const Timer<Self>;

    /// Which object a timer is in.
    ///
    /// # Safety
    ///
    /// `timer` must point to the [`Timer`] inside a `Self`.
    unsafe fn timer_container_of(timer: *mut Timer<Self>) -> *mut Self;
}

/// Implements [`HasTimer`] for a pinned type with a pinned field: `impl_has_timer!(Type.field)`.
/// Takes the type's `PinnedDrop` for it.
macro_rules! impl_has_timer {
    ($type:ident . $field:ident) => {
        // SAFETY: `raw_get_timer` only compiles if the field, and not what it may lead to, is a
        // timer for this type. The `PinnedDrop` below shows that dropping the object begins with
        // shutting it down.
        unsafe impl $crate::timer::HasTimer for $type {
            unsafe fn raw_get_timer(object: *const Self) -> *const $crate::timer::Timer<Self> {
                // SAFETY: The caller promises that there is an object.
                unsafe { ::core::ptr::addr_of!((*object).$field) }
            }

            unsafe fn timer_container_of(timer: *mut $crate::timer::Timer<Self>) -> *mut Self {
                // SAFETY: The caller promises that there is an object around the timer.
                unsafe { ::kernel::container_of!(timer, Self, $field) }
            }
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
        // SAFETY: A reference points to an object.
        let timer = unsafe { T::raw_get_timer(object) };
        // `Opaque` is transparent, and the first field.
        timer.cast_mut().cast()
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

    /// # Safety
    ///
    /// `timer` must be the one inside a `T` that is alive and whole until this returns.
    unsafe extern "C" fn callback(timer: *mut kernel::bindings::timer_list) {
        // SAFETY: Guaranteed by the caller: only timers inside a `T` are armed, see `inside`, and dropping it begins
        // with waiting for us.
        let object = unsafe { &*T::timer_container_of(timer.cast()) };
        object.run();
    }
}
