// SPDX-License-Identifier: GPL-2.0

//! What differs between the kernels that the module is built for, in one place.
//!
//! The module is written for the Rust interfaces of Linux 7.3. For 7.2, where `Kbuild` sets
//! `before_7_3`, this file has what stands in for those that came later.

use kernel::module_param::ModuleParamAccess;
use kernel::prelude::*;

#[cfg(before_7_3)]
pub(crate) use self::spinlock_irq::new_spinlock_irq;
#[cfg(before_7_3)]
pub(crate) use self::spinlock_irq::SpinLockIrq;
#[cfg(not(before_7_3))]
pub(crate) use kernel::new_spinlock_irq;
#[cfg(not(before_7_3))]
pub(crate) use kernel::sync::lock::spinlock::SpinLockIrq;

/// The raw `THIS_MODULE`.
pub(crate) const fn this_module() -> *mut kernel::bindings::module {
    #[cfg(before_7_3)]
    return crate::THIS_MODULE.as_ptr();
    #[cfg(not(before_7_3))]
    kernel::module::this_module::<crate::LocalModule>().as_ptr()
}

/// The value of a module parameter.
pub(crate) fn value<T: Copy>(parameter: &ModuleParamAccess<T>) -> T {
    #[cfg(before_7_3)]
    return *parameter.value();
    #[cfg(not(before_7_3))]
    parameter.value()
}

/// The error with this number. Linux 7.2 has names for a few only.
pub(crate) fn error(errno: u32) -> Error {
    // CAST: all of them are small.
    Error::from_errno(-(errno as c_int))
}

/// Makes a table of device ids without further information, and its alias for modpost:
/// `device_table!("bus", DeviceId, TABLE, [id, ..])`.
macro_rules! device_table {
    ($bus:literal, $id:ty, $table:ident, [$($entry:expr),* $(,)?]) => {
        #[cfg(before_7_3)]
        const $table: ::kernel::device_id::IdArray<
            $id,
            (),
            { <[$id]>::len(&[$($entry),*]) },
        > = ::kernel::device_id::IdArray::new_without_index([$(($entry, ())),*]);
        #[cfg(before_7_3)]
        ::kernel::module_device_table!($bus, MODULE_TABLE, $table);

        #[cfg(not(before_7_3))]
        ::kernel::module_device_table!($bus, $id, $table, @none, [$($entry),*]);
    };
}
pub(crate) use device_table;

/// `SpinLockIrq` as Linux 7.3 has it, but for `lock_with`.
#[cfg(before_7_3)]
mod spinlock_irq {
    use crate::bindings;
    use kernel::prelude::*;
    use kernel::sync::lock::Backend;
    use kernel::sync::lock::Lock;

    /// A spinlock with interrupts off while it is held.
    pub(crate) type SpinLockIrq<T> = Lock<T, SpinLockIrqBackend>;

    /// A `spinlock_t` that is only taken with interrupts off; the state of its guard is how they
    /// were before.
    pub(crate) struct SpinLockIrqBackend;

    // SAFETY: The underlying kernel `spinlock_t` object ensures mutual exclusion. `relock` uses the
    // default implementation that always calls the same locking method.
    unsafe impl Backend for SpinLockIrqBackend {
        type State = kernel::bindings::spinlock_t;
        type GuardState = c_ulong;

        unsafe fn init(
            ptr: *mut Self::State,
            name: *const c_char,
            key: *mut kernel::bindings::lock_class_key,
        ) {
            // SAFETY: The safety requirements ensure that `ptr` is valid for writes, and `name` and
            // `key` are valid for read indefinitely.
            unsafe { kernel::bindings::__spin_lock_init(ptr, name, key) }
        }

        unsafe fn lock(ptr: *mut Self::State) -> Self::GuardState {
            // SAFETY: The safety requirements of this function ensure that `ptr` points to valid
            // memory, and that it has been initialised before.
            unsafe { bindings::hv_vss_spin_lock_irqsave(ptr) }
        }

        unsafe fn unlock(ptr: *mut Self::State, flags: &Self::GuardState) {
            // SAFETY: The safety requirements of this function ensure that `ptr` is valid and that
            // the caller is the owner of the spinlock, which got `flags` when it took it.
            unsafe { bindings::hv_vss_spin_unlock_irqrestore(ptr, *flags) }
        }

        unsafe fn try_lock(ptr: *mut Self::State) -> Option<Self::GuardState> {
            let mut flags = 0;
            // SAFETY: The `ptr` pointer is guaranteed to be valid and initialized before use.
            unsafe { bindings::hv_vss_spin_trylock_irqsave(ptr, &mut flags) }.then_some(flags)
        }

        unsafe fn assert_is_held(ptr: *mut Self::State) {
            // SAFETY: The `ptr` pointer is guaranteed to be valid and initialized before use.
            unsafe { kernel::bindings::spin_assert_is_held(ptr) }
        }
    }

    /// Creates a [`SpinLockIrq`] initialiser with the given name and a newly-created lock class.
    macro_rules! new_spinlock_irq {
        ($inner:expr, $name:literal) => {
            $crate::compat::SpinLockIrq::new(
                $inner,
                ::kernel::optional_name!($name),
                ::kernel::static_lock_class!(),
            )
        };
    }
    pub(crate) use new_spinlock_irq;
}
