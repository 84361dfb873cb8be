// SPDX-License-Identifier: GPL-2.0

//! Abstractions for the VMBus, the bus of devices that a Hyper-V host offers to its guest.
//!
//! Drivers implement [`Driver`] and get a [`Device`]; to talk to the host they open its
//! [`Channel`]. Nothing in here knows what is said on a channel.
//!
//! C header: [`include/linux/hyperv.h`](srctree/include/linux/hyperv.h)

use crate::bindings;
use crate::compat::error;
use core::marker::PhantomData;
use core::mem::offset_of;
use core::ptr::addr_of_mut;
use core::ptr::NonNull;
use kernel::bindings::ENOBUFS;
use kernel::device;
use kernel::device_id::RawDeviceId;
use kernel::driver;
use kernel::error::from_result;
use kernel::error::to_result;
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::Arc;
use kernel::types::Opaque;
use kernel::ThisModule;

/// Asserts that bindgen, which reads the headers with another compiler, lays a structure out as the
/// kernel's has: its size, and where the fields are that are used in here.
macro_rules! assert_layout {
    ($type:ident, $size:ident, $($($field:ident).+ at $offset:ident),*) => {
        const _: () = assert!(size_of::<bindings::$type>() == bindings::$size as usize);
        $(const _: () = assert!(
            offset_of!(bindings::$type, $($field).+) == bindings::$offset as usize
        );)*
    };
}

assert_layout!(
    hv_driver,
    HV_VSS_SIZE_DRIVER,
    name at HV_VSS_DRIVER_NAME,
    id_table at HV_VSS_DRIVER_ID_TABLE,
    driver at HV_VSS_DRIVER_DRIVER,
    probe at HV_VSS_DRIVER_PROBE,
    remove at HV_VSS_DRIVER_REMOVE,
    suspend at HV_VSS_DRIVER_SUSPEND,
    resume at HV_VSS_DRIVER_RESUME
);
assert_layout!(
    hv_device,
    HV_VSS_SIZE_DEVICE,
    dev_type at HV_VSS_DEVICE_DEV_TYPE,
    device at HV_VSS_DEVICE_DEVICE,
    channel at HV_VSS_DEVICE_CHANNEL
);
assert_layout!(
    hv_vmbus_device_id,
    HV_VSS_SIZE_DEVICE_ID,
    guid at HV_VSS_DEVICE_ID_GUID
);

/// An adapter for the registration of VMBus drivers.
pub(crate) struct Adapter<T: Driver>(T);

// SAFETY:
// - `bindings::hv_driver` is a C type declared as `repr(C)`.
// - `T::Data` is the type of the driver's device private data.
// - `struct hv_driver` embeds a `struct device_driver`.
// - `DEVICE_DRIVER_OFFSET` is the correct byte offset to the embedded `struct device_driver`.
unsafe impl<T: Driver> driver::DriverLayout for Adapter<T> {
    type DriverType = bindings::hv_driver;
    type DriverData<'bound> = T::Data<'bound>;
    const DEVICE_DRIVER_OFFSET: usize = offset_of!(Self::DriverType, driver);
}

// SAFETY: A call to `unregister` for a given instance of `DriverType` is guaranteed to be valid if
// a preceding call to `register` has been successful.
unsafe impl<T: Driver> driver::RegistrationOps for Adapter<T> {
    unsafe fn register(
        hdrv: &Opaque<Self::DriverType>,
        name: &'static CStr,
        module: &'static ThisModule,
    ) -> Result {
        let raw = hdrv.get();
        // SAFETY: It's safe to set the fields of `struct hv_driver` on initialization.
        unsafe {
            (*raw).name = name.as_char_ptr();
            (*raw).id_table = T::ID_TABLE.as_ptr();
            (*raw).probe = Some(Self::probe_callback);
            (*raw).remove = Some(Self::remove_callback);
            (*raw).suspend = Some(Self::suspend_callback);
            (*raw).resume = Some(Self::resume_callback);
        }

        // SAFETY: `hdrv` is guaranteed to be a valid `DriverType`.
        to_result(unsafe {
            bindings::__vmbus_driver_register(raw, module.as_ptr(), name.as_char_ptr())
        })
    }

    unsafe fn unregister(hdrv: &Opaque<Self::DriverType>) {
        // SAFETY: `hdrv` is guaranteed to be a valid `DriverType` that is registered.
        unsafe { bindings::vmbus_driver_unregister(hdrv.get()) }
    }
}

impl<T: Driver> Adapter<T> {
    extern "C" fn probe_callback(
        hdev: *mut bindings::hv_device,
        _id: *const bindings::hv_vmbus_device_id,
    ) -> c_int {
        // SAFETY: The VMBus only ever calls the probe callback with a valid pointer to a
        // `struct hv_device`.
        //
        // INVARIANT: `hdev` is valid for the duration of `probe_callback()`.
        let hdev = unsafe { &*hdev.cast::<Device<device::CoreInternal<'_>>>() };

        from_result(|| {
            let data = T::probe(hdev);

            hdev.as_ref().set_drvdata(data)?;
            Ok(0)
        })
    }

    extern "C" fn remove_callback(hdev: *mut bindings::hv_device) {
        // SAFETY: The VMBus calls `remove` with a valid device, once after a successful probe, and
        // the driver core holds the device's lock.
        unsafe { Self::with_data(hdev, T::unbind) }
    }

    extern "C" fn suspend_callback(hdev: *mut bindings::hv_device) -> c_int {
        // SAFETY: The VMBus suspends only devices that it has, whose driver was this one a moment
        // ago, and the caller in the driver core keeps the device until this returns. In the phase
        // `noirq` neither of them holds its lock (see `Locked`).
        let locked = unsafe { Locked::new(hdev) };
        if !locked.is_bound() {
            return 0;
        }
        // SAFETY: The device is bound, and to this driver, since nothing is probed in this phase: its
        // probe has succeeded, and it stays so as long as it is locked.
        unsafe {
            Self::with_data(hdev, |dev, data| {
                from_result(|| T::suspend(dev, data).map(|()| 0))
            })
        }
    }

    extern "C" fn resume_callback(hdev: *mut bindings::hv_device) -> c_int {
        // SAFETY: As for `suspend_callback`.
        let locked = unsafe { Locked::new(hdev) };
        if !locked.is_bound() {
            return 0;
        }
        // SAFETY: As for `suspend_callback`.
        unsafe {
            Self::with_data(hdev, |dev, data| {
                from_result(|| T::resume(dev, data).map(|()| 0))
            })
        }
    }

    /// Calls `f` with the device and its private data.
    ///
    /// # Safety
    ///
    /// `hdev` must be a valid `struct hv_device`, which is locked, on which
    /// [`Self::probe_callback`] has succeeded and whose private data has not been dropped.
    unsafe fn with_data<R>(
        hdev: *mut bindings::hv_device,
        f: impl for<'a> FnOnce(&'a Device<device::Core<'_>>, Pin<&'a T::Data<'a>>) -> R,
    ) -> R {
        // SAFETY: Guaranteed by the caller.
        //
        // INVARIANT: `hdev` is valid for the duration of this function.
        let hdev = unsafe { &*hdev.cast::<Device<device::CoreInternal<'_>>>() };

        // SAFETY: The probe has succeeded, hence it's guaranteed that `Device::set_drvdata()` has
        // been called and stored a `Pin<KBox<T::Data<'_>>>`.
        let data = unsafe { hdev.as_ref().drvdata_borrow::<T::Data<'_>>() };

        f(hdev, data)
    }
}

/// A device whose lock is held.
///
/// The driver core locks a device when it probes or removes it, and for a system sleep in all
/// phases but the one that the VMBus uses, `noirq`. User space stands still then and nothing is
/// probed, but the host can still rescind a device, whose driver is then unbound by a worker of the
/// bus.
///
/// # Invariants
///
/// The pointer is valid, and the lock was taken through it.
struct Locked(NonNull<kernel::bindings::device>);

impl Locked {
    /// Waits for the lock.
    ///
    /// # Safety
    ///
    /// `hdev` must be a valid `struct hv_device` until this is dropped, whose lock the caller does
    /// not hold.
    unsafe fn new(hdev: *mut bindings::hv_device) -> Self {
        // SAFETY: Guaranteed by the caller.
        let dev = unsafe { &raw mut (*hdev).device };
        // SAFETY: Likewise.
        unsafe { bindings::hv_vss_device_lock(dev) };
        // SAFETY: A field of a valid structure has an address.
        //
        // INVARIANT: The lock has been taken.
        Locked(unsafe { NonNull::new_unchecked(dev) })
    }

    fn is_bound(&self) -> bool {
        // SAFETY: By the type invariant the device is valid and locked.
        unsafe { kernel::bindings::device_is_bound(self.0.as_ptr()) }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the device is valid and locked.
        unsafe { bindings::hv_vss_device_unlock(self.0.as_ptr()) };
    }
}

/// Abstraction for `struct hv_vmbus_device_id`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct DeviceId(bindings::hv_vmbus_device_id);

impl DeviceId {
    /// Creates a [`DeviceId`] from the class GUID in its wire form: the first three fields of the
    /// printed GUID are little-endian.
    pub(crate) const fn new(guid: [u8; 16]) -> Self {
        let mut id: bindings::hv_vmbus_device_id = pin_init::zeroed();
        id.guid.b = guid;
        Self(id)
    }
}

// SAFETY: `DeviceId` is a `#[repr(transparent)]` wrapper of `hv_vmbus_device_id` and does not add
// additional invariants, so it's safe to transmute to `RawType`.
unsafe impl RawDeviceId for DeviceId {
    type RawType = bindings::hv_vmbus_device_id;
}

/// IdTable type for VMBus drivers. It has no information for each id: a device that is given to the
/// driver through `new_id` or `driver_override` would come without, so a driver asks for
/// [`Device::class`].
pub(crate) type IdTable = &'static dyn kernel::device_id::IdTable<DeviceId, ()>;

/// The VMBus driver trait. All callbacks run in process context and may sleep.
pub(crate) trait Driver {
    /// The type of the driver's bus device private data.
    type Data<'bound>: Send + 'bound;

    /// The table of device ids supported by the driver.
    const ID_TABLE: IdTable;

    /// Called when a device matches the driver. One that was given to the driver through `new_id`
    /// or `driver_override` may be of any class, see [`Device::class`].
    fn probe<'bound>(
        dev: &'bound Device<device::Core<'_>>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound;

    /// Called when the device is unbound from the driver, also because the host has rescinded it.
    fn unbind<'bound>(dev: &'bound Device<device::Core<'_>>, this: Pin<&'bound Self::Data<'bound>>);

    /// Called before the machine sleeps. The channel must be closed on return.
    fn suspend<'bound>(
        dev: &'bound Device<device::Core<'_>>,
        this: Pin<&'bound Self::Data<'bound>>,
    ) -> Result;

    /// Called after the machine has slept.
    fn resume<'bound>(
        dev: &'bound Device<device::Core<'_>>,
        this: Pin<&'bound Self::Data<'bound>>,
    ) -> Result;
}

/// The VMBus device representation.
///
/// # Invariants
///
/// A [`Device`] instance represents a valid `struct hv_device` created by the C portion of the
/// kernel.
#[repr(transparent)]
pub(crate) struct Device<Ctx: device::DeviceContext = device::Normal>(
    Opaque<bindings::hv_device>,
    PhantomData<Ctx>,
);

impl<Ctx: device::DeviceContext> Device<Ctx> {
    fn as_raw(&self) -> *mut bindings::hv_device {
        self.0.get()
    }

    /// The class GUID of the device in its wire form.
    pub(crate) fn class(&self) -> [u8; 16] {
        // SAFETY: By the type invariant `self.as_raw()` is a valid pointer to a
        // `struct hv_device`; `dev_type` does not change.
        unsafe { (*self.as_raw()).dev_type.b }
    }
}

// SAFETY: `vmbus::Device` is a transparent wrapper of `struct hv_device`.
// The offset is guaranteed to point to a valid device field inside `vmbus::Device`.
unsafe impl<Ctx: device::DeviceContext> device::AsBusDevice<Ctx> for Device<Ctx> {
    const OFFSET: usize = offset_of!(bindings::hv_device, device);
}

// SAFETY: `Device` is a transparent wrapper of a type that doesn't depend on `Device`'s generic
// argument.
kernel::impl_device_context_deref!(unsafe { Device });
kernel::impl_device_context_into_aref!(Device);

// SAFETY: Instances of `Device` are always reference-counted.
unsafe impl kernel::sync::aref::AlwaysRefCounted for Device {
    fn inc_ref(&self) {
        // SAFETY: The existence of a shared reference guarantees that the refcount is non-zero.
        unsafe { kernel::bindings::get_device(addr_of_mut!((*self.as_raw()).device)) };
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        // CAST: `Self` a transparent wrapper of `bindings::hv_device`.
        let hdev: *mut bindings::hv_device = obj.cast().as_ptr();

        // SAFETY: By the type invariant of `Self`, `hdev` is a pointer to a valid
        // `struct hv_device`.
        let dev = unsafe { addr_of_mut!((*hdev).device) };

        // SAFETY: The safety requirements guarantee that the refcount is non-zero.
        unsafe { kernel::bindings::put_device(dev) }
    }
}

impl<Ctx: device::DeviceContext> AsRef<device::Device<Ctx>> for Device<Ctx> {
    fn as_ref(&self) -> &device::Device<Ctx> {
        // SAFETY: By the type invariant of `Self`, `self.as_raw()` is a pointer to a valid
        // `struct hv_device`.
        let dev = unsafe { addr_of_mut!((*self.as_raw()).device) };

        // SAFETY: `dev` points to a valid `struct device`.
        unsafe { device::Device::from_raw(dev) }
    }
}

// SAFETY: A `Device` is always reference-counted and can be released from any thread.
unsafe impl Send for Device {}

// SAFETY: `Device` can be shared among threads because all methods of `Device`
// (i.e. `Device<Normal>) are thread safe.
unsafe impl Sync for Device {}

// SAFETY: Same as `Device<Normal>` -- the underlying `struct hv_device` is the same; `Bound` is a
// zero-sized type-state marker that does not affect thread safety.
unsafe impl Sync for Device<device::Bound> {}

/// Whoever is told that the host has sent something.
pub(crate) trait Listener: Send + Sync + 'static {
    /// There may be packets in the ring. Runs in a tasklet (softirq context, must not sleep), and
    /// may do so before [`Channel::open`] has returned. Called again as long as packets are left
    /// in the ring, so it may return early.
    fn on_packets(&self);
}

/// Bytes of the longest packet that can be sent: its descriptor counts itself and them in units of
/// 8 bytes, with 16 bits.
const MAX_SEND: usize = u16::MAX as usize * 8 - size_of::<bindings::vmpacket_descriptor>();

/// The open channel of a device. Dropping it closes it, which sleeps and waits for a callback that
/// is running; none runs after that.
///
/// # Invariants
///
/// `raw` is the channel of `_device`, on which `vmbus_open` has succeeded and `vmbus_close` has not
/// been called; its callback context points into `_listener`.
pub(crate) struct Channel<L: Listener> {
    raw: NonNull<bindings::vmbus_channel>,
    /// What its longest packet was for who had it before.
    longest_before: u32,
    // The channel lives as long as its device, and the listener longer than any callback.
    _device: ARef<Device>,
    _listener: Arc<L>,
}

// SAFETY: The channel functions may be called from any thread.
unsafe impl<L: Listener> Send for Channel<L> {}
// SAFETY: `send` takes the ring's own lock, `receive` needs an exclusive reference, and what
// `longest_packet` reads was written before the channel was opened.
unsafe impl<L: Listener> Sync for Channel<L> {}

impl<L: Listener> Channel<L> {
    /// Opens the channel of `dev`, in one of its driver's callbacks, with rings that hold `ring`
    /// bytes of packets each; whatever fits them is received whole. Sleeps until the host has
    /// answered.
    ///
    /// # Errors
    ///
    /// `EBUSY` when the channel is open already, `ENODEV` when the host rescinds it meanwhile, and
    /// what `vmbus_open` returns.
    ///
    /// # Safety
    ///
    /// What is returned must be dropped, not forgotten, before the driver is unbound from `dev`. Nobody else may
    /// open or close the channel until then, nor while this or the drop runs.
    pub(crate) unsafe fn open(
        dev: &Device<device::Core<'_>>,
        ring: u32,
        listener: Arc<L>,
    ) -> Result<Self> {
        // SAFETY: By the type invariant this is a valid `struct hv_device`, whose channel is set
        // before it is registered.
        let raw = NonNull::new(unsafe { (*dev.as_raw()).channel }).ok_or(ENODEV)?;
        // SAFETY: `raw` is valid as long as its device is there. That nobody opens or closes the channel
        // meanwhile is guaranteed by the caller.
        if !unsafe { bindings::hv_vss_channel_is_closed(raw.as_ptr()) } {
            return Err(EBUSY);
        }
        let context = Arc::as_ptr(&listener).cast_mut().cast();

        // SAFETY: The function only computes.
        let ring = unsafe { bindings::hv_vss_ring_size(ring) };

        // SAFETY: `raw` is valid, and the channel is closed.
        let longest_before = unsafe { bindings::hv_vss_prepare_channel(raw.as_ptr(), ring) };

        // SAFETY: As above. `context` points to a listener that `Self`, which the caller drops, keeps alive
        // until `vmbus_close` has returned, or this function until the same has happened on error.
        let opened = to_result(unsafe {
            bindings::vmbus_open(
                raw.as_ptr(),
                ring,
                ring,
                core::ptr::null_mut(),
                0,
                Some(Self::callback),
                context,
            )
        });
        if let Err(error) = opened {
            // A failed `vmbus_open` leaves the callback in place.
            //
            // SAFETY: On a channel that is not open this does nothing but remove the callback and
            // wait for it.
            unsafe { bindings::vmbus_close(raw.as_ptr()) };
            // SAFETY: `raw` is valid, and the channel is closed.
            unsafe { bindings::hv_vss_put_back_channel(raw.as_ptr(), longest_before) };
            return Err(error);
        }

        // INVARIANT: The channel is open, and its context points into `listener`.
        Ok(Channel {
            raw,
            longest_before,
            _device: dev.into(),
            _listener: listener,
        })
    }

    extern "C" fn callback(context: *mut c_void) {
        // SAFETY: `open` set the context to a listener that is alive until `vmbus_close` returns,
        // which waits for this callback.
        let listener = unsafe { &*context.cast::<L>() };
        listener.on_packets();
    }

    /// Bytes that a buffer must have so that every packet fits.
    pub(crate) fn longest_packet(&self) -> usize {
        // SAFETY: By the type invariant the channel is open.
        let longest = unsafe { bindings::hv_vss_longest_packet(self.raw.as_ptr()) };
        // CAST: `u32` to `usize`, on 64-bit machines.
        longest as usize
    }

    /// Takes one packet from the ring into `buffer`. Returns it and its request id, or `None` when
    /// the ring is empty. Any context.
    ///
    /// # Errors
    ///
    /// `ENOBUFS` when `buffer` is shorter than [`Self::longest_packet`], and the packet longer than
    /// it. After an error the packet is still in the ring.
    pub(crate) fn receive<'a>(
        &mut self,
        buffer: &'a mut [u8],
    ) -> Result<Option<(&'a mut [u8], u64)>> {
        let (mut len, mut request_id) = (0u32, 0u64);
        let room = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
        // SAFETY: By the type invariant the channel is open; the exclusive reference makes us its
        // only reader. `buffer` is valid for `room` bytes.
        to_result(unsafe {
            bindings::vmbus_recvpacket(
                self.raw.as_ptr(),
                buffer.as_mut_ptr().cast(),
                room,
                &mut len,
                &mut request_id,
            )
        })?;
        // A packet without data is one all the same; hosts number theirs from 1.
        if len == 0 && request_id == 0 {
            return Ok(None);
        }
        let len = usize::try_from(len).map_err(|_| EINVAL)?;
        let packet = buffer.get_mut(..len).ok_or(error(ENOBUFS))?;
        Ok(Some((packet, request_id)))
    }

    /// The listener is not called again for what is left in the ring. To be called by it.
    pub(crate) fn mute(&mut self) {
        // SAFETY: By the type invariant the channel is open. The mode is a word that the bus looks
        // at after each callback.
        unsafe { bindings::hv_vss_mute_channel(self.raw.as_ptr()) };
    }

    /// Sends `packet` to the host, in-band, as the answer to `request_id`. Any context.
    ///
    /// # Errors
    ///
    /// `EAGAIN` when the ring is full, `ENODEV` when the host has rescinded the channel, `EINVAL`
    /// when the packet is too long for its descriptor.
    pub(crate) fn send(&self, packet: &[u8], request_id: u64) -> Result {
        if packet.len() > MAX_SEND {
            return Err(EINVAL);
        }
        // CAST: at most `MAX_SEND`.
        let len = packet.len() as u32;
        // SAFETY: By the type invariant the channel is open. The packet is copied into the ring;
        // the pointer is not const only for the sake of C.
        to_result(unsafe {
            bindings::vmbus_sendpacket(
                self.raw.as_ptr(),
                packet.as_ptr().cast_mut().cast(),
                len,
                request_id,
                bindings::vmbus_packet_type_VM_PKT_DATA_INBAND,
                0,
            )
        })
    }
}

impl<L: Listener> Drop for Channel<L> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the channel is open.
        unsafe { bindings::vmbus_close(self.raw.as_ptr()) };
        // SAFETY: It is closed, and there as long as its device.
        unsafe { bindings::hv_vss_put_back_channel(self.raw.as_ptr(), self.longest_before) };
    }
}
