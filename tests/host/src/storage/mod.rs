// SPDX-License-Identifier: GPL-2.0-only

//! Synthetic SCSI: controllers on the VMBus, disks on them.
//!
//! | module | holds | does not know |
//! | --- | --- | --- |
//! | `controller` | the device on the bus: initialisation, which disk a command is for | commands |
//! | [`vstor`] | the storage protocol's messages | how they travel |
//! | [`scsi`] | a disk as a function of commands | memory, store, transport |
//! | [`disk`] | a disk with its thread, and all that can be wrong with one | VMBus |
//! | [`image`], [`log`] | what is on a disk; what was written, when, in which order | commands |
//! | `lent` | memory that the guest lends with a packet | what it is for |
//!
//! ```no_run
//! use hyperv_sim::storage::{Disk, Image};
//! use hyperv_sim::{Guid, Vm, VmConfig};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut config = VmConfig::new("vmlinuz");
//! config.host.scsi_controllers = 1;
//! let vm = Vm::start(config)?;
//! let disk = Disk::in_memory(Guid([1; 16]), 64 << 20, Image::default())?;
//! let controller = vm.host().scsi(0).ok_or("no controller")?;
//! controller.attach(0, &disk);
//! // ... the guest loads hv_storvsc, makes a file system and writes ...
//! let before = disk.start_log()?;
//! // ... and writes on ...
//! let halfway = hyperv_sim::storage::log::replay(&before, disk.log().iter().take(10));
//! let copy = Disk::in_memory(Guid([2; 16]), disk.len(), halfway)?;
//! controller.attach(1, &copy);
//! # Ok(())
//! # }
//! ```

pub(crate) mod controller;
pub mod disk;
pub mod image;
mod lent;
pub mod log;
pub mod scsi;
pub mod vstor;

pub use controller::Controller;
pub use disk::{Disk, Fault, Kind};
pub use image::Image;
pub use log::{Change, Entry};
