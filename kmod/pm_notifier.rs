// SPDX-License-Identifier: GPL-2.0

//! PM notifiers: being told that the machine is about to sleep, while user space still runs, and
//! that it is awake. Without `CONFIG_PM_SLEEP` that never happens.
//!
//! A bus tells its devices when all processes stand still, which is too late for a request to one
//! of them. Knows nothing of VSS.
//!
//! C header: [`include/linux/suspend.h`](srctree/include/linux/suspend.h)

use crate::bindings as c;
use kernel::bindings;
use kernel::error::to_result;
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::types::Opaque;

/// When somebody is told, of all who are: the priority of a notifier.
#[derive(Clone, Copy)]
pub(crate) enum Turn {
    /// Before all that have no priority, as nearly all in the kernel.
    First = 1,
    /// With them.
    Between = 0,
    /// After them.
    Last = -1,
}

/// What is begun or over. There is one of each at a time, and one may lie in the other.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sleep {
    /// A suspension, to memory or to idle.
    Suspension,
    /// A hibernation.
    Hibernation,
}

/// Whoever wants to be told. Both run in process context and may sleep.
pub(crate) trait Callbacks: Send + Sync + 'static {
    /// When it is told, whichever came first.
    const TURN: Turn;

    /// The machine is about to be suspended or to hibernate, and waits for this to return.
    fn prepare(&self, sleep: Sleep);

    /// It is about to become the one of an image, and waits for this to return. Nobody is told how that ends: whoever
    /// opens `/dev/snapshot` to restore one, and cannot for want of memory, is told nothing more of by the kernel
    /// (`snapshot_open`).
    fn restore(&self);

    /// It is awake again and user space runs, also when the attempt was given up. Comes after each
    /// [`Callbacks::prepare`].
    fn post(&self, sleep: Sleep);
}

/// The registration of a [`Callbacks`]; dropping it waits for a call that is running.
///
/// # Invariants
///
/// `inner` is registered and calls [`Self::call`].
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<T: Callbacks> {
    #[pin]
    inner: Opaque<bindings::notifier_block>,
    callbacks: Arc<T>,
}

// SAFETY: `unregister_pm_notifier` may be called on another thread than `register_pm_notifier`.
unsafe impl<T: Callbacks> Send for Registration<T> {}
// SAFETY: There are no methods that take `&self`.
unsafe impl<T: Callbacks> Sync for Registration<T> {}

impl<T: Callbacks> Registration<T> {
    /// From then on `callbacks` are called.
    pub(crate) fn new(callbacks: Arc<T>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            // Comes first: it may be called as soon as it is registered.
            callbacks,
            inner <- Opaque::try_ffi_init(move |slot: *mut bindings::notifier_block| {
                let mut block: bindings::notifier_block = pin_init::zeroed();
                block.notifier_call = Some(Self::call);
                // CAST: a discriminant that fits.
                block.priority = T::TURN as c_int;
                // SAFETY: The initializer can write to the provided `slot`.
                unsafe { slot.write(block) };
                // SAFETY: `slot` was just written, is pinned, and is unregistered in `drop`.
                to_result(unsafe { c::hv_vss_register_pm_notifier(slot) })
            }),
        })
    }

    extern "C" fn call(
        block: *mut bindings::notifier_block,
        action: c_ulong,
        _data: *mut c_void,
    ) -> c_int {
        let block = block.cast::<Opaque<bindings::notifier_block>>();
        // SAFETY: The block is the field `inner` of a `Registration<T>`, since only that is given
        // this function; it is not dropped before its unregistration, which waits for us.
        let registration = unsafe { &*kernel::container_of!(block, Registration<T>, inner) };
        // CAST: the actions are small numbers.
        let callbacks = &registration.callbacks;
        match action as u32 {
            bindings::PM_SUSPEND_PREPARE => callbacks.prepare(Sleep::Suspension),
            bindings::PM_POST_SUSPEND => callbacks.post(Sleep::Suspension),
            bindings::PM_HIBERNATION_PREPARE => callbacks.prepare(Sleep::Hibernation),
            bindings::PM_POST_HIBERNATION => callbacks.post(Sleep::Hibernation),
            bindings::PM_RESTORE_PREPARE => callbacks.restore(),
            _ => {}
        }
        // CAST: 0, which lets the machine go on.
        bindings::NOTIFY_DONE as c_int
    }
}

#[pinned_drop]
impl<T: Callbacks> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: It is registered by the type invariants.
        unsafe { c::hv_vss_unregister_pm_notifier(self.inner.get()) };
    }
}
