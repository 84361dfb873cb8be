// SPDX-License-Identifier: GPL-2.0-only

//! The machine: what it is made of, and the handle to it while it runs.
//!
//! Nothing here runs the guest; that is the threads' part.

use crate::boot::{self, BootError};
use crate::console::{Console, ConsoleWriter};
use crate::cpu::{self, CpuError};
use crate::devices::{Ports, COM1_IRQ, COM2_IRQ};
use crate::host::{Host, HostConfig};
use crate::kvm;
use crate::synic::{SynIc, SINT};
use crate::threads::{Cpus, Ending, Machine};
use kvm_bindings::{
    kvm_irq_routing_entry, kvm_irq_routing_hv_sint, kvm_irq_routing_irqchip, KvmIrqRouting,
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQ_ROUTING_HV_SINT,
    KVM_IRQ_ROUTING_IRQCHIP, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::{EventFd, EFD_CLOEXEC, EFD_NONBLOCK};

/// What to boot, and on what.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// A bzImage.
    pub kernel: PathBuf,
    /// Archives that are concatenated, in this order, into the initial RAM file system.
    pub initrd: Vec<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Virtual CPUs, from 1 to [`VmConfig::MAX_CPUS`].
    pub cpus: u8,
    /// Memory in MiB, at most [`VmConfig::MAX_MEMORY_MIB`].
    pub memory_mib: u32,
    /// Where the text of the first serial port goes, besides [`Vm::console`].
    pub console_log: Option<PathBuf>,
    /// Copies the first serial port to the standard output.
    pub console_to_stdout: bool,
    /// The machine has firmware that enforces Secure Boot, and its owner has enrolled the keys of these certificates (DER);
    /// without, it has none.
    pub secure_boot: Option<Vec<PathBuf>>,
    /// What the host offers on the VMBus.
    pub host: HostConfig,
}

impl VmConfig {
    /// Memory is one piece below the PCI hole.
    pub const MAX_MEMORY_MIB: u32 = 3072;
    /// More were never tried.
    pub const MAX_CPUS: u8 = 8;

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
            secure_boot: None,
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
    /// KVM is not there or refused.
    #[error("KVM: cannot {what}")]
    Kvm {
        /// What it was asked.
        what: &'static str,
        /// Why.
        #[source]
        source: errno::Error,
    },
    /// A value in the configuration is out of range.
    #[error("{what} must be from {least} to {most}, not {value}")]
    Config {
        /// Which value.
        what: &'static str,
        /// The value.
        value: u32,
        /// The smallest that is possible.
        least: u32,
        /// The largest that is possible.
        most: u32,
    },
    /// Memory for the guest could not be had.
    #[error("cannot get {mib} MiB of memory for the guest")]
    Memory {
        /// How much.
        mib: u32,
        /// Why.
        #[source]
        source: vm_memory::mmap::FromRangesError,
    },
    /// The kernel or its files could not be put into memory.
    #[error("cannot boot")]
    Boot(#[from] BootError),
    /// A virtual CPU could not be set up.
    #[error("cannot set up virtual CPU {index}")]
    Cpu {
        /// Which.
        index: u8,
        /// Why.
        #[source]
        source: CpuError,
    },
    /// The interrupt routes could not be listed.
    #[error("cannot build the interrupt routes")]
    Routing(#[source] vmm_sys_util::fam::Error),
    /// The console log could not be created.
    #[error("cannot create the console log {}", path.display())]
    ConsoleLog {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The operating system refused a thread, an event descriptor or a socket.
    #[error("cannot {what}")]
    System {
        /// What was wanted.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest had not ended in time.
    #[error("the guest was still running after {after:?}; its console ends:\n{console}")]
    Timeout {
        /// How long was waited.
        after: Duration,
        /// The last lines of its console.
        console: String,
    },
}

pub(crate) fn kvm_error(what: &'static str) -> impl FnOnce(errno::Error) -> VmError {
    move |source| VmError::Kvm { what, source }
}

pub(crate) fn system_error(what: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::System { what, source }
}

/// The first GSI of the SynICs: after those of the IOAPIC.
const SYNIC_GSI: u32 = 64;
const IOAPIC_PINS: u32 = 24;
const PIC_PINS: u32 = 8;

/// Where KVM may put three pages for old Intel processors: below the BIOS's place.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// A running machine. Dropping it ends the guest and waits for its threads.
pub struct Vm {
    host: Host,
    console: Arc<Console>,
    agent: UnixStream,
    ending: Arc<Ending>,
    cpus: Arc<Cpus>,
    ports: Arc<Ports>,
    reaper: Option<JoinHandle<()>>,
}

impl Vm {
    /// Builds the machine and starts its virtual CPUs.
    pub fn start(config: VmConfig) -> Result<Vm, VmError> {
        check(
            "memory_mib",
            config.memory_mib,
            64,
            VmConfig::MAX_MEMORY_MIB,
        )?;
        check("cpus", config.cpus.into(), 1, VmConfig::MAX_CPUS.into())?;
        check(
            "scsi_controllers",
            config.host.scsi_controllers.into(),
            0,
            HostConfig::MAX_SCSI_CONTROLLERS.into(),
        )?;
        let console = console(&config)?;
        let memory = memory(config.memory_mib)?;
        let entry = boot::load(
            &memory,
            &config.kernel,
            &config.initrd,
            &config.cmdline,
            config.cpus,
            config.secure_boot.as_deref(),
        )?;

        let kvm = Kvm::new().map_err(kvm_error("open /dev/kvm"))?;
        let vm = kvm.create_vm().map_err(kvm_error("create a VM"))?;
        kvm::set_memory(&vm, &memory).map_err(kvm_error("set the guest's memory"))?;
        vm.set_tss_address(TSS_ADDRESS)
            .map_err(kvm_error("set the TSS address"))?;
        vm.create_irq_chip()
            .map_err(kvm_error("create the interrupt controllers"))?;
        let vcpus = create_vcpus(&kvm, &vm, config.cpus, &entry)?;
        // Only now: routes to a SynIC that is not there yet are taken, but never acknowledged.
        set_routes(&vm, config.cpus)?;
        let (interrupts, acknowledgements) = synic_interrupts(&vm, config.cpus)?;
        let com1 = line(&vm, COM1_IRQ)?;
        let com2 = line(&vm, COM2_IRQ)?;

        let synic = Arc::new(SynIc::new(memory.clone(), interrupts));
        let vm = Arc::new(vm);
        let host = Host::new(
            &config.host,
            vm.clone(),
            memory.clone(),
            synic,
            console.clone(),
        );
        let ports = Arc::new(Ports::new(ConsoleWriter(console.clone()), com1, com2));
        let (ours, agent) = UnixStream::pair().map_err(system_error("create a socket pair"))?;
        let machine = Machine {
            host: host.clone(),
            ports: ports.clone(),
            ending: Arc::default(),
            cpus: Arc::default(),
            _vm: vm,
            _memory: memory,
        };
        let ending = machine.ending.clone();
        let cpus = machine.cpus.clone();
        let reaper = machine.spawn(vcpus, acknowledgements, ours, console.clone())?;
        Ok(Vm {
            host,
            console,
            agent,
            ending,
            cpus,
            ports,
            reaper: Some(reaper),
        })
    }

    /// The other end of the guest's second serial port (ttyS1): bytes written here are read there
    /// and the other way round. It ends when the guest does. Each call gives another handle to the
    /// same stream.
    pub fn agent_port(&self) -> Result<UnixStream, VmError> {
        self.agent
            .try_clone()
            .map_err(system_error("duplicate the agent's socket"))
    }

    /// The host's side of the guest's VMBus.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Waits for the guest's end.
    pub fn wait_exit(&self, timeout: Duration) -> Result<Exit, VmError> {
        let timeout = self.host.patience(timeout);
        self.ending
            .wait_ended(timeout)
            .ok_or_else(|| VmError::Timeout {
                after: timeout,
                console: self.console_tail(),
            })
    }

    /// How the guest ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        self.ending.wait_ended(Duration::ZERO)
    }

    /// Ends the guest at once, and returns when its CPUs have stopped. Without effect on one that
    /// has ended.
    pub fn kill(&self) {
        self.ending.stop(Exit::Killed);
        self.ending.wait_ended(Duration::MAX);
    }

    /// How often the guest had to be told again that its second serial port waits for it: each time an
    /// interrupt was lost, or the guest was slow.
    pub fn raised_again(&self) -> u64 {
        self.ports.raised_again()
    }

    /// Stops all its virtual CPUs, as a host does that pauses a machine: its clocks go on, the host's side of
    /// its devices does so as well. Says whether it could.
    pub fn pause(&self) -> bool {
        self.cpus.pause()
    }

    /// Lets them go on.
    pub fn resume(&self) {
        self.cpus.resume();
    }

    /// Where its virtual CPUs are, and how its second serial port is, in words: for a guest that does not
    /// answer.
    pub fn look_inside(&self) -> String {
        self.words(self.cpus.ask(false))
    }

    /// The same, and each virtual CPU takes an NMI when it goes back to the guest. One with
    /// `unknown_nmi_panic` on its command line ends with its call trace on the console.
    pub fn interrupt(&self) -> String {
        self.words(self.cpus.ask(true))
    }

    fn words(&self, cpus: BTreeMap<u32, String>) -> String {
        let mut text = String::new();
        for (index, state) in cpus {
            text.push_str(&format!("virtual CPU {index}: {state}\n"));
        }
        text.push_str(&format!("the agent's port: {}\n", self.ports.agent_state()));
        text
    }

    /// All text of the first serial port (its first parts are dropped beyond some MiB).
    pub fn console(&self) -> String {
        self.console.text()
    }

    /// The last lines of that text, enough for an error message.
    pub fn console_tail(&self) -> String {
        self.console.tail()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.ending.stop(Exit::Killed);
        if let Some(reaper) = self.reaper.take() {
            // A reaper that panicked has nothing more to say.
            let _ = reaper.join();
        }
    }
}

fn check(what: &'static str, value: u32, least: u32, most: u32) -> Result<(), VmError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(VmError::Config {
        what,
        value,
        least,
        most,
    })
}

fn console(config: &VmConfig) -> Result<Arc<Console>, VmError> {
    let log = config.console_log.as_deref();
    let console =
        Console::new(log, config.console_to_stdout).map_err(|source| VmError::ConsoleLog {
            path: config.console_log.clone().unwrap_or_default(),
            source,
        })?;
    Ok(Arc::new(console))
}

fn memory(mib: u32) -> Result<GuestMemoryMmap, VmError> {
    let bytes = (mib as usize) << 20;
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)])
        .map_err(|source| VmError::Memory { mib, source })
}

fn create_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    count: u8,
    entry: &boot::Entry,
) -> Result<Vec<VcpuFd>, VmError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm_error("list its CPUID leaves"))?;
    let hyperv = kvm::supported_hyperv_cpuid(kvm).map_err(kvm_error(
        "list its Hyper-V CPUID leaves (is it built with them?)",
    ))?;
    let mut vcpus = Vec::new();
    for index in 0..count {
        let vcpu = vm
            .create_vcpu(index.into())
            .map_err(kvm_error("create a virtual CPU"))?;
        cpu::cpuid(&supported, &hyperv, index, count)
            .and_then(|cpuid| cpu::set_up(&vcpu, index, &cpuid, entry))
            .map_err(|source| VmError::Cpu { index, source })?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// The routes of PIC and IOAPIC as KVM has them by default, and one to each SynIC.
fn set_routes(vm: &VmFd, cpus: u8) -> Result<(), VmError> {
    let chip = |gsi, irqchip, pin| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entry
    };
    let mut routes = Vec::new();
    for gsi in 0..IOAPIC_PINS {
        if gsi < PIC_PINS {
            routes.push(chip(gsi, KVM_IRQCHIP_PIC_MASTER, gsi));
        } else if gsi < 2 * PIC_PINS {
            routes.push(chip(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - PIC_PINS));
        }
        routes.push(chip(gsi, KVM_IRQCHIP_IOAPIC, gsi));
    }
    for vp in 0..u32::from(cpus) {
        let mut entry = kvm_irq_routing_entry {
            gsi: SYNIC_GSI + vp,
            type_: KVM_IRQ_ROUTING_HV_SINT,
            ..Default::default()
        };
        entry.u.hv_sint = kvm_irq_routing_hv_sint {
            vcpu: vp,
            sint: SINT as u32,
        };
        routes.push(entry);
    }
    let routes = KvmIrqRouting::from_entries(&routes).map_err(VmError::Routing)?;
    vm.set_gsi_routing(&routes)
        .map_err(kvm_error("set the interrupt routes"))
}

pub(crate) fn event() -> Result<EventFd, VmError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(system_error("create an event descriptor"))
}

/// For each processor the event that raises its SynIC interrupt and the one that says that it ended.
fn synic_interrupts(vm: &VmFd, cpus: u8) -> Result<(Vec<EventFd>, Vec<EventFd>), VmError> {
    let (mut interrupts, mut acknowledgements) = (Vec::new(), Vec::new());
    for vp in 0..u32::from(cpus) {
        let (raise, acknowledged) = (event()?, event()?);
        vm.register_irqfd_with_resample(&raise, &acknowledged, SYNIC_GSI + vp)
            .map_err(kvm_error("connect a SynIC interrupt"))?;
        interrupts.push(raise);
        acknowledgements.push(acknowledged);
    }
    Ok((interrupts, acknowledgements))
}

fn line(vm: &VmFd, irq: u32) -> Result<EventFd, VmError> {
    let line = event()?;
    vm.register_irqfd(&line, irq)
        .map_err(kvm_error("connect an interrupt"))?;
    Ok(line)
}
