// SPDX-License-Identifier: GPL-2.0

//! Being told that the machine is about to sleep, while user space still runs, and that it is awake.
//!
//! A bus tells its devices when all processes stand still, which is too late for a request to one of
//! them. Knows nothing of VSS.
//!
//! C header: [`include/linux/suspend.h`](srctree/include/linux/suspend.h)

use kernel::bindings;
use kernel::error::to_result;
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::types::Opaque;

/// Whoever wants to be told. Both run in process context and may sleep.
pub(crate) trait Sleeper: Send + Sync + 'static {
    /// The machine is about to be suspended or to hibernate, and waits for this to return.
    fn before_sleep(&self);

    /// It is awake again and user space runs, also when the attempt was given up.
    fn after_sleep(&self);
}

/// The registration of a [`Sleeper`]; dropping it waits for a call that is running.
///
/// # Invariants
///
/// `inner` is registered and calls [`Self::call`].
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<S: Sleeper> {
    #[pin]
    inner: Opaque<bindings::notifier_block>,
    sleeper: Arc<S>,
}

// SAFETY: `unregister_pm_notifier` may be called on another thread than `register_pm_notifier`.
unsafe impl<S: Sleeper> Send for Registration<S> {}
// SAFETY: There are no methods that take `&self`.
unsafe impl<S: Sleeper> Sync for Registration<S> {}

impl<S: Sleeper> Registration<S> {
    /// From then on `sleeper` is told.
    pub(crate) fn new(sleeper: Arc<S>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            // Comes first: it may be called as soon as it is registered.
            sleeper,
            inner <- Opaque::try_ffi_init(move |slot: *mut bindings::notifier_block| {
                let mut block: bindings::notifier_block = pin_init::zeroed();
                block.notifier_call = Some(Self::call);
                // SAFETY: The initializer can write to the provided `slot`.
                unsafe { slot.write(block) };
                // SAFETY: `slot` was just written, is pinned, and is unregistered in `drop`.
                to_result(unsafe { bindings::register_pm_notifier(slot) })
            }),
        })
    }

    extern "C" fn call(
        block: *mut bindings::notifier_block,
        action: c_ulong,
        _data: *mut c_void,
    ) -> c_int {
        let block = block.cast::<Opaque<bindings::notifier_block>>();
        // SAFETY: The block is the field `inner` of a `Registration<S>`, since only that is given this
        // function; it is not dropped before its unregistration, which waits for us.
        let registration = unsafe { &*kernel::container_of!(block, Registration<S>, inner) };
        // CAST: the actions are small numbers.
        match action as u32 {
            bindings::PM_HIBERNATION_PREPARE | bindings::PM_SUSPEND_PREPARE => {
                registration.sleeper.before_sleep();
            }
            bindings::PM_POST_HIBERNATION | bindings::PM_POST_SUSPEND => {
                registration.sleeper.after_sleep();
            }
            _ => {}
        }
        // CAST: 0, which lets the machine go on.
        bindings::NOTIFY_DONE as c_int
    }
}

#[pinned_drop]
impl<S: Sleeper> PinnedDrop for Registration<S> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: It is registered by the type invariants.
        unsafe { bindings::unregister_pm_notifier(self.inner.get()) };
    }
}
