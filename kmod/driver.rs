// SPDX-License-Identifier: GPL-2.0

//! The driver of the VSS device: what a bound device has, and in which order that comes and goes.
//!
//! Knows nothing of requests: it makes the [`Service`] and tells it what the bus says.

use crate::chardev;
use crate::compat;
use crate::hold::Hold;
use crate::pm_notifier;
use crate::report;
use crate::service::Service;
use crate::vmbus;
use kernel::debugfs;
use kernel::device::Core;
use kernel::fmt;
use kernel::prelude::*;
use kernel::sync::atomic::Acquire;
use kernel::sync::atomic::AtomicFlag;
use kernel::sync::atomic::Release;
use kernel::sync::global_lock;
use kernel::sync::Arc;

/// Class of the VSS device, 35fa2e29-ea23-4236-96ae-3a6ebacba440 (`HV_VSS_GUID`), as on the wire.
const VSS_CLASS: [u8; 16] = [
    0x29, 0x2e, 0xfa, 0x35, 0x23, 0xea, 0x36, 0x42, 0x96, 0xae, 0x3a, 0x6e, 0xba, 0xcb, 0xa4, 0x40,
];

pub(crate) struct Driver;

compat::device_table!(
    "vmbus",
    vmbus::DeviceId,
    ID_TABLE,
    [vmbus::DeviceId::new(VSS_CLASS)]
);

/// What a bound device has. Fields are dropped in this order: first nothing more happens, then what
/// can be seen of it goes.
#[pin_data]
pub(crate) struct Data {
    running: Running,
    #[pin]
    _sleep: pm_notifier::Registration<Service>,
    #[pin]
    _state: debugfs::File<Arc<Service>>,
    #[pin]
    _parameters: debugfs::File<Arc<Service>>,
    #[pin]
    _node: chardev::Registration<Service>,
    _only: Only,
}

global_lock! {
    // SAFETY: Locked only in `Folder`, after it is initialised there, and in `probe`: the driver is registered only as
    // long as there is a `Folder`.
    unsafe(uninit) static FOLDER: Mutex<Option<debugfs::Dir>> = None;
}

/// The module's folder in debugfs. What is held is seen there also when the device has gone, and hangs.
pub(crate) struct Folder(debugfs::Dir);

impl Folder {
    /// Makes it.
    ///
    /// # Safety
    ///
    /// May be called once, and before the driver is registered, which must not be when it is dropped.
    pub(crate) unsafe fn new() -> Self {
        let folder = debugfs::Dir::new(c"hv_vss");
        // SAFETY: Guaranteed by the caller.
        unsafe { FOLDER.init() };
        *FOLDER.lock() = Some(folder.clone());
        Folder(folder)
    }

    /// The file in it that shows what is held.
    pub(crate) fn held(&self, hold: Arc<Hold>) -> impl PinInit<debugfs::File<Arc<Hold>>> + '_ {
        self.0.read_callback_file(c"held", hold, &show_held)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let folder = FOLDER.lock().take();
        drop(folder);
    }
}

/// The text of the `held` file.
fn show_held(hold: &Arc<Hold>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
    report::held_head(out)?;
    let mut last = 0;
    while let Some(line) = hold.line_after(last) {
        last = line.number;
        report::held(&line, out)?;
    }
    Ok(())
}

/// Whether a device is bound.
static BOUND: AtomicFlag = AtomicFlag::new(false);

/// The right to be the bound device. A guest has one VSS device, and its node one name: another
/// that the host may offer is refused before it gets in the way.
struct Only(());

impl Only {
    fn claim() -> Result<Self> {
        if BOUND.xchg(true, Acquire) {
            return Err(EBUSY);
        }
        Ok(Only(()))
    }
}

impl Drop for Only {
    fn drop(&mut self) {
        BOUND.store(false, Release);
    }
}

/// Stops the service when it is dropped.
///
/// # Invariants
///
/// The service is that of a bound device, and nobody else opens that one's channel. It is started, suspended and
/// stopped only in callbacks of the driver, while the device is locked, the drop of this among them, which comes
/// before the device is unbound.
struct Running(Arc<Service>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl vmbus::Driver for Driver {
    type Data<'bound> = Data;
    const ID_TABLE: vmbus::IdTable = &ID_TABLE;

    fn probe<'bound>(
        dev: &'bound vmbus::Device<Core<'_>>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        pin_init::pin_init_scope(move || {
            // `new_id` and `driver_override` can give us any device.
            if dev.class() != VSS_CLASS {
                return Err(ENODEV);
            }
            let only = Only::claim()?;
            let service = Service::new()?;
            let folder = FOLDER.lock().clone().ok_or(ENODEV)?;
            Ok(try_pin_init!(Data {
                // Comes first: what is made first goes last when the rest fails.
                _only: only,
                // INVARIANT: This is a field of what the driver core drops when it unbinds the device, or of
                // what is dropped here when the rest fails; and it is used in this file's callbacks only.
                running: Running(service.clone()),
                _sleep <- pm_notifier::Registration::new(service.clone()),
                _state <- folder.read_callback_file(c"state", service.clone(), &Service::show_state),
                _parameters <- folder.read_callback_file(
                    c"parameters",
                    service.clone(),
                    &Service::show_parameters,
                ),
                _node <- chardev::Registration::new(c"vmbus/hv_vss", 0o600, service),
                _: {
                    // SAFETY: By the invariant of `Running`.
                    unsafe { running.0.start(dev) }?
                },
            }))
        })
    }

    fn unbind<'bound>(_dev: &'bound vmbus::Device<Core<'_>>, this: Pin<&'bound Data>) {
        this.running.0.stop();
    }

    fn suspend<'bound>(_dev: &'bound vmbus::Device<Core<'_>>, this: Pin<&'bound Data>) -> Result {
        this.running.0.suspend();
        Ok(())
    }

    fn resume<'bound>(dev: &'bound vmbus::Device<Core<'_>>, this: Pin<&'bound Data>) -> Result {
        // SAFETY: By the invariant of `Running`; it is the device that this is the data of.
        unsafe { this.running.0.resume(dev) }
    }
}
