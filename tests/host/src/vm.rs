// SPDX-License-Identifier: GPL-2.0-only

//! The machine.

use crate::host::{Host, HostConfig};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// What to boot, and on what.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// A bzImage.
    pub kernel: PathBuf,
    /// Archives that are concatenated, in this order, into the initial RAM file system.
    pub initrd: Vec<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Virtual CPUs, at least one.
    pub cpus: u8,
    /// Memory in MiB, at most [`VmConfig::MAX_MEMORY_MIB`].
    pub memory_mib: u32,
    /// Where the text of the first serial port goes, besides [`Vm::console`].
    pub console_log: Option<PathBuf>,
    /// Copies the first serial port to the standard output.
    pub console_to_stdout: bool,
    /// What the host offers on the VMBus.
    pub host: HostConfig,
}

impl VmConfig {
    /// Memory is one piece below the PCI hole.
    pub const MAX_MEMORY_MIB: u32 = 3072;

    /// One CPU, 512 MiB, a quiet console on ttyS0, all integration components.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        VmConfig {
            kernel: kernel.into(),
            initrd: Vec::new(),
            cmdline: "console=ttyS0 panic=-1 quiet loglevel=4".to_string(),
            cpus: 1,
            memory_mib: 512,
            console_log: None,
            console_to_stdout: false,
            host: HostConfig::default(),
        }
    }
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Exit {
    /// It powered off through ACPI.
    PowerOff,
    /// It reset itself, without having reported a crash.
    Reset,
    /// It panicked and said so through the Hyper-V crash registers, whose values these are.
    Crash {
        /// `HV_X64_MSR_CRASH_P0` to `P4`.
        parameters: [u64; 5],
    },
    /// [`Vm::kill`], or the drop of the [`Vm`], ended it.
    Killed,
    /// KVM or this program could not go on; the text says what happened.
    Failed(String),
}

/// Why a machine could not be built, or what went wrong with it.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The guest had not ended in time.
    #[error("the guest was still running after {after:?}; its console ends:\n{console}")]
    Timeout {
        /// How long was waited.
        after: Duration,
        /// The last lines of its console.
        console: String,
    },
}

/// A running machine. Dropping it ends the guest and waits for its threads.
pub struct Vm {
    host: Host,
}

impl Vm {
    /// Builds the machine and starts its virtual CPUs.
    pub fn start(config: VmConfig) -> Result<Vm, VmError> {
        Ok(Vm {
            host: Host::new(config.host),
        })
    }

    /// The other end of the guest's second serial port (ttyS1): bytes written here are read there
    /// and the other way round. Each call gives another handle to the same stream.
    pub fn agent_port(&self) -> Result<UnixStream, VmError> {
        Err(VmError::Timeout {
            after: Duration::ZERO,
            console: String::new(),
        })
    }

    /// The host's side of the guest's VMBus.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Waits for the guest's end.
    pub fn wait_exit(&self, timeout: Duration) -> Result<Exit, VmError> {
        Err(VmError::Timeout {
            after: timeout,
            console: String::new(),
        })
    }

    /// How the guest ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        None
    }

    /// Ends the guest at once, and returns when its CPUs have stopped. Without effect on one that
    /// has ended.
    pub fn kill(&self) {}

    /// All text of the first serial port (its first parts are dropped beyond some MiB).
    pub fn console(&self) -> String {
        String::new()
    }

    /// The last lines of that text, enough for an error message.
    pub fn console_tail(&self) -> String {
        String::new()
    }
}
