// SPDX-License-Identifier: GPL-2.0-only

//! A simulated Hyper-V host, small enough to sit inside a test.
//!
//! [`Vm::start`] boots a stock Linux kernel on KVM's Hyper-V interface and stands on the other side
//! of the guest's VMBus: [`Vm::host`] gives handles to the integration components that it offers
//! (VSS, heartbeat, shutdown, time synchronisation), with which a test negotiates, sends requests, sends nonsense, or takes
//! the device away, to dynamic memory, with which it takes the guest's memory and gives it back, and to SCSI
//! controllers, on which a test puts disks that it can slow down, break, copy and ask what was written to them.
//!
//! It knows the wire (VMBus, the messages of its devices) and nothing of the driver or
//! the daemon in the guest: anyone who writes a VMBus driver can use it.
//!
//! ```no_run
//! use hyperv_sim::{Vm, VmConfig};
//! use std::time::Duration;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let minute = Duration::from_secs(60);
//! let mut config = VmConfig::new("vmlinuz");
//! config.initrd.push("guest.cpio".into());
//! let vm = Vm::start(config)?;
//! let vss = vm.host().vss();
//! vss.wait_open(minute)?;
//! vss.agree(minute)?;
//! let frozen = vss.freeze(&[], minute)?;
//! println!("the guest says {:#x} after {:?}", frozen.status(), frozen.latency);
//! vss.thaw(minute)?;
//! vm.host().shutdown().power_off(minute)?;
//! vm.wait_exit(minute)?;
//! # Ok(())
//! # }
//! ```
//!
//! # Rooms
//!
//! | module | holds | does not know |
//! | --- | --- | --- |
//! | [`vm`], `threads` | the machine: its parts, its threads, how it ends | VMBus |
//! | [`boot`], `acpi`, [`cpu`], `devices`, `console` | what a stock kernel needs to start | VMBus |
//! | `kvm` | the only unsafe code: raw ioctls and the exit union | all else |
//! | `synic` | message slots and event flags in guest memory | VMBus |
//! | [`vmbus`] | layouts, control messages as a state machine without I/O, rings | memory, KVM |
//! | `bus`, `guest_ring` | the two tied together under one lock | what packets mean |
//! | `device` | what the bus and a device on it are to each other | any device |
//! | [`host`], [`channel`], [`event`] | the handles that a test holds, and the log | KVM |
//! | [`profile`] | the kinds of hosts that there are | how they are played |
//! | [`ic`] | the integration components: their messages, what was asked and answered | rings |
//! | [`balloon`] | dynamic memory: its messages, what the host has of the guest's | rings |
//! | [`storage`] | SCSI controllers and disks: protocol, commands, content, write log | rings |

#![deny(unsafe_code)]

mod acpi;
pub mod balloon;
pub mod boot;
mod bus;
pub mod channel;
mod console;
pub mod cpu;
mod device;
mod devices;
pub mod event;
mod firmware;
mod guest_ring;
pub mod host;
pub mod ic;
#[expect(unsafe_code, reason = "KVM needs it; see there")]
mod kvm;
pub mod probe;
pub mod profile;
pub mod storage;
mod synic;
mod threads;
pub mod vm;
pub mod vmbus;

pub use balloon::Balloon;
pub use bus::{OnOpen, Side};
pub use channel::{Channel, IcChannel, Negotiated, Reply, Tx};
pub use event::{Event, EventKind};
pub use host::{Host, HostConfig, HostError};
pub use profile::{Carriage, Profile};
pub use vm::{Exit, Vm, VmConfig, VmError};
pub use vmbus::protocol::{Guid, VmbusVersion};
pub use vmbus::ring::{Descriptor, Field};
