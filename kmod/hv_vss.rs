// SPDX-License-Identifier: GPL-2.0

//! `hv_vss.ko`: takes a Hyper-V host's requests to freeze and thaw the guest from the VMBus and
//! hands them to a daemon that has `/dev/vmbus/hv_vss` open.
//!
//! This file is the module: its parts, its parameters, what lives as long as it does. A request
//! comes in through [`vmbus`], is decided upon in the [`engine`], which [`service`] puts behind a
//! lock, and is read from [`chardev`]; what the daemon has frozen is in [`hold`]. Layouts are in
//! [`uapi`].

mod bindings;
mod chardev;
mod compat;
mod driver;
#[path = "engine/lib.rs"]
pub mod engine;
mod file_system;
mod hold;
mod pm_notifier;
mod report;
mod service;
mod timer;
#[path = "../uapi/hv_vss.rs"]
pub mod uapi;
mod vmbus;
mod wait;
mod workers;

use kernel::prelude::*;
use kernel::sync::Arc;

module! {
    type: HvVssModule,
    name: "hv_vss",
    authors: ["The hv_vss authors"],
    description: "Hyper-V volume shadow copy requests for a user-space daemon",
    license: "GPL v2",
    params: {
        freeze_timeout_ms: u32 {
            default: 900_000,
            description: "Time the daemon has for FREEZE, in milliseconds",
        },
        timeout_ms: u32 {
            default: 30_000,
            description: "Time the daemon has for other requests, in milliseconds",
        },
        grace_ms: u32 {
            default: 5_000,
            description: "How long a request waits for a daemon, in milliseconds; 0 fails it at once",
        },
        hold_ms: u32 {
            default: 3_600_000,
            description: "How long anything is held frozen at the most, in milliseconds",
        },
    },
}

/// The values of the parameters, which do not change once the module is loaded.
#[derive(Clone, Copy)]
pub(crate) struct Parameters {
    pub(crate) freeze_timeout_ms: u32,
    pub(crate) timeout_ms: u32,
    pub(crate) grace_ms: u32,
    pub(crate) hold_ms: u32,
}

impl Parameters {
    pub(crate) fn get() -> Self {
        Parameters {
            freeze_timeout_ms: compat::value(&module_parameters::freeze_timeout_ms),
            timeout_ms: compat::value(&module_parameters::timeout_ms),
            grace_ms: compat::value(&module_parameters::grace_ms),
            hold_ms: compat::value(&module_parameters::hold_ms),
        }
    }
}

/// Fields are dropped in this order: the driver, the watch over its thaws and what shows them need what is held.
#[pin_data]
struct HvVssModule {
    #[pin]
    _driver: kernel::driver::Registration<vmbus::Adapter<driver::Driver>>,
    #[pin]
    _sleep: pm_notifier::Registration<service::SleepWatch>,
    #[pin]
    _thaws: pm_notifier::Registration<service::ThawWatch>,
    #[pin]
    _held: kernel::debugfs::File<Arc<hold::Hold>>,
    _folder: driver::Folder,
    _holding: hold::Holding,
}

impl kernel::InPlaceModule for HvVssModule {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            // SAFETY: A module is initialised once.
            _holding: unsafe { hold::Holding::new() }?,
            // SAFETY: Likewise; the driver is registered last, and dropped first.
            _folder: unsafe { driver::Folder::new() },
            _held <- _folder.held(hold::Hold::get()?),
            _thaws <- pm_notifier::Registration::new(service::ThawWatch::new()?),
            _sleep <- pm_notifier::Registration::new(Arc::new(service::SleepWatch, GFP_KERNEL)?),
            _driver <- kernel::driver::Registration::new(
                <Self as kernel::ModuleMetadata>::NAME,
                module,
            ),
        })
    }
}
