// SPDX-License-Identifier: GPL-2.0-only

//! The machine: memory, virtual CPUs and their threads, and how it all ends.
//!
//! Each virtual CPU has a thread that runs the guest and serves its exits at once. One more thread,
//! the reaper, waits until one of them says that the guest is over (or somebody kills it), stops the
//! others, and only then announces the end: after that nothing touches the guest any more.

use crate::boot::{self, BootError};
use crate::bus::{chain, lock};
use crate::console::{Console, ConsoleWriter};
use crate::cpu::{self, CpuError};
use crate::devices::{PortEffect, Ports, COM1_IRQ, COM2_IRQ};
use crate::host::{Host, HostConfig};
use crate::kvm::{self, HypervExit};
use crate::synic::{SynIc, SINT};
use kvm_bindings::{
    kvm_irq_routing_entry, kvm_irq_routing_hv_sint, kvm_irq_routing_irqchip, KvmIrqRouting,
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQ_ROUTING_HV_SINT,
    KVM_IRQ_ROUTING_IRQCHIP, KVM_MAX_CPUID_ENTRIES, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::{EventFd, EFD_CLOEXEC, EFD_NONBLOCK};
use vmm_sys_util::signal::{register_signal_handler, Killable, SIGRTMIN};

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

fn kvm_error(what: &'static str) -> impl FnOnce(errno::Error) -> VmError {
    move |source| VmError::Kvm { what, source }
}

fn system_error(what: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::System { what, source }
}

/// How long a guest that has reported a crash may go on, to print and to unload.
const CRASH_GRACE: Duration = Duration::from_secs(10);

/// The first GSI of the SynICs: after those of the IOAPIC.
const SYNIC_GSI: u32 = 64;
const IOAPIC_PINS: u32 = 24;
const PIC_PINS: u32 = 8;

/// Where KVM may put three pages for old Intel processors: below the BIOS's place.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// The end of the guest, as it comes about.
#[derive(Default)]
struct Ending {
    state: Mutex<EndingState>,
    changed: Condvar,
}

#[derive(Default)]
struct EndingState {
    /// Why the machine is to stop; the first reason counts.
    stop: Option<Exit>,
    crash: Option<(Instant, [u64; 5])>,
    /// Set when all virtual CPUs have stopped.
    ended: Option<Exit>,
}

impl Ending {
    fn stop(&self, why: Exit) {
        lock(&self.state).stop.get_or_insert(why);
        self.changed.notify_all();
    }

    fn crashed(&self, parameters: [u64; 5]) {
        let crash = (Instant::now(), parameters);
        lock(&self.state).crash.get_or_insert(crash);
        self.changed.notify_all();
    }

    fn is_stopping(&self) -> bool {
        lock(&self.state).stop.is_some()
    }

    /// Waits for the reason to stop.
    fn wait_stop(&self) -> Exit {
        let mut state = lock(&self.state);
        loop {
            match (&state.stop, &state.crash) {
                // A crash explains whatever came after it.
                (Some(Exit::Killed), Some(_)) => return Exit::Killed,
                (Some(_), Some((_, parameters))) => {
                    let parameters = *parameters;
                    return Exit::Crash { parameters };
                }
                (Some(exit), None) => return exit.clone(),
                (None, Some((at, parameters))) => {
                    let left = CRASH_GRACE.saturating_sub(at.elapsed());
                    if left.is_zero() {
                        let parameters = *parameters;
                        state.stop = Some(Exit::Crash { parameters });
                        continue;
                    }
                    state = self
                        .changed
                        .wait_timeout(state, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
                (None, None) => {
                    state = self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn wait_ended(&self, timeout: Duration) -> Option<Exit> {
        let state = lock(&self.state);
        let (state, _) = self
            .changed
            .wait_timeout_while(state, timeout, |state| state.ended.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        state.ended.clone()
    }
}

/// Stops the machine when the thread that holds it panics.
struct StopOnPanic(Arc<Ending>);

impl Drop for StopOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let why = "a thread of the simulated host panicked".to_string();
            self.0.stop(Exit::Failed(why));
        }
    }
}

/// A running machine. Dropping it ends the guest and waits for its threads.
pub struct Vm {
    host: Host,
    console: Arc<Console>,
    agent: UnixStream,
    ending: Arc<Ending>,
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
        let console = console(&config)?;
        let memory = memory(config.memory_mib)?;
        let entry = boot::load(
            &memory,
            &config.kernel,
            &config.initrd,
            &config.cmdline,
            config.cpus,
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
        let host = Host::new(&config.host, memory.clone(), synic, console.clone());
        let ports = Arc::new(Ports::new(ConsoleWriter(console.clone()), com1, com2));
        let (ours, agent) = UnixStream::pair().map_err(system_error("create a socket pair"))?;
        let machine = Machine {
            host: host.clone(),
            ports,
            ending: Arc::default(),
            _vm: Arc::new(vm),
            _memory: memory,
        };
        let ending = machine.ending.clone();
        let reaper = machine.spawn(vcpus, acknowledgements, ours, console.clone())?;
        Ok(Vm {
            host,
            console,
            agent,
            ending,
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

fn event() -> Result<EventFd, VmError> {
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

/// What the threads share.
#[derive(Clone)]
struct Machine {
    host: Host,
    ports: Arc<Ports>,
    ending: Arc<Ending>,
    /// Kept for as long as a thread may run the guest.
    _vm: Arc<VmFd>,
    _memory: GuestMemoryMmap,
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Its arrival is all that matters: it makes KVM_RUN return.
}

impl Machine {
    /// Starts all threads; the one that is returned ends them.
    fn spawn(
        self,
        vcpus: Vec<VcpuFd>,
        acknowledgements: Vec<EventFd>,
        agent: UnixStream,
        console: Arc<Console>,
    ) -> Result<JoinHandle<()>, VmError> {
        register_signal_handler(SIGRTMIN(), on_kick)
            .map_err(kvm_error("catch the signal that stops virtual CPUs"))?;
        let socket = || {
            agent
                .try_clone()
                .map_err(system_error("duplicate the agent's socket"))
        };
        let (agent_in, agent_out) = (socket()?, socket()?);
        let stop = event()?;
        let acks = Acknowledgements::new(acknowledgements, &stop)?;

        let mut helpers = Vec::new();
        let machine = self.clone();
        helpers.push(spawn("acknowledgements", move || acks.run(&machine))?);
        let ports = self.ports.clone();
        helpers.push(spawn("agent-in", move || {
            // Ends with the stream; there is nobody to tell but the agent's own reader.
            let _ = ports.pump_in(agent_in);
        })?);
        let ports = self.ports.clone();
        helpers.push(spawn("agent-out", move || {
            let _ = ports.pump_out(agent_out);
        })?);
        let mut threads = Vec::new();
        for (index, vcpu) in (0u32..).zip(vcpus) {
            let machine = self.clone();
            let name = format!("vcpu-{index}");
            threads.push(spawn(&name, move || machine.run_vcpu(index, vcpu))?);
        }
        spawn("reaper", move || {
            let exit = self.ending.wait_stop();
            // From here on every virtual CPU that leaves the guest stays out of it.
            self.ending.stop(exit.clone());
            self.ports.close();
            for thread in threads {
                // A signal that comes just before KVM_RUN is lost, so it is repeated.
                while !thread.is_finished() {
                    let _ = thread.kill(SIGRTMIN());
                    std::thread::sleep(Duration::from_millis(1));
                }
                let _ = thread.join();
            }
            let _ = stop.write(1);
            let _ = agent.shutdown(Shutdown::Read);
            for helper in helpers {
                let _ = helper.join();
            }
            let _ = agent.shutdown(Shutdown::Both);
            // A log that cannot be written has lost its end; the text is still in memory.
            let _ = console.flush();
            self.host.guest_ended(exit.clone());
            lock(&self.ending.state).ended = Some(exit);
            self.ending.changed.notify_all();
        })
    }

    /// Runs the guest on one virtual CPU until the machine stops.
    fn run_vcpu(&self, index: u32, mut vcpu: VcpuFd) {
        let _guard = StopOnPanic(self.ending.clone());
        while !self.ending.is_stopping() {
            if let Some(exit) = self.step(index, &mut vcpu) {
                self.ending.stop(exit);
            }
        }
    }

    /// Runs the guest to its next exit and serves that.
    fn step(&self, index: u32, vcpu: &mut VcpuFd) -> Option<Exit> {
        let failed = |what: String| Some(Exit::Failed(format!("virtual CPU {index}: {what}")));
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => match self.ports.write(port, data) {
                PortEffect::None => None,
                PortEffect::PowerOff => Some(Exit::PowerOff),
                PortEffect::Reset => Some(Exit::Reset),
            },
            Ok(VcpuExit::IoIn(port, data)) => {
                self.ports.read(port, data);
                None
            }
            Ok(VcpuExit::Hyperv) => match kvm::hyperv_exit(vcpu) {
                Some(HypervExit::Hypercall { input, params }) => {
                    let result = self.host.hypercall(input, params);
                    kvm::set_hypercall_result(vcpu, result);
                    None
                }
                Some(HypervExit::Synic(registers)) => {
                    self.host.synic_changed(index, registers);
                    None
                }
                Some(HypervExit::Other(kind)) => failed(format!("Hyper-V exit of type {kind}")),
                None => failed("a Hyper-V exit that is none".to_string()),
            },
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => {
                self.ending.crashed(cpu::crash_parameters(vcpu));
                self.host.guest_crashed();
                None
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => Some(Exit::Reset),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Some(Exit::PowerOff),
            // Nothing is behind any memory address that is not memory.
            Ok(VcpuExit::MmioRead(_, data)) => {
                data.fill(0xff);
                None
            }
            Ok(VcpuExit::MmioWrite(..) | VcpuExit::Intr) => None,
            Ok(VcpuExit::Shutdown) => failed("triple fault".to_string()),
            Ok(VcpuExit::InternalError) => {
                let at = vcpu.get_regs().map(|regs| regs.rip).unwrap_or_default();
                failed(format!("KVM cannot go on (internal error at {at:#x})"))
            }
            Ok(other) => {
                let what = format!("unexpected exit {other:?}");
                failed(what)
            }
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => None,
            Err(error) => failed(format!("KVM_RUN failed: {}", chain(&error))),
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, VmError> {
    Builder::new()
        .name(name.to_string())
        .spawn(body)
        .map_err(system_error("start a thread"))
}

/// Waits for the ends of SynIC interrupts: a message slot may have become free.
struct Acknowledgements {
    epoll: Epoll,
    events: Vec<EventFd>,
    /// Kept open for as long as epoll refers to it.
    _stop: EventFd,
}

impl Acknowledgements {
    const STOP: u64 = u64::MAX;

    fn new(events: Vec<EventFd>, stop: &EventFd) -> Result<Self, VmError> {
        let watch = "watch the SynIC's events";
        let epoll = Epoll::new().map_err(system_error(watch))?;
        let stop = stop.try_clone().map_err(system_error(watch))?;
        let all = (0..).zip(&events).chain([(Self::STOP, &stop)]);
        for (id, event) in all {
            let interest = EpollEvent::new(EventSet::IN, id);
            epoll
                .ctl(ControlOperation::Add, event.as_raw_fd(), interest)
                .map_err(system_error(watch))?;
        }
        Ok(Acknowledgements {
            epoll,
            events,
            _stop: stop,
        })
    }

    fn run(&self, machine: &Machine) {
        let _guard = StopOnPanic(machine.ending.clone());
        let mut ready = [EpollEvent::default(); 8];
        loop {
            let count = match self.epoll.wait(-1, &mut ready) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    let what = format!("cannot wait for the SynIC's events: {error}");
                    machine.ending.stop(Exit::Failed(what));
                    return;
                }
            };
            for event in ready.iter().take(count) {
                if event.data() == Self::STOP {
                    return;
                }
                if let Some(event) = self.events.get(event.data() as usize) {
                    // Only its arrival matters, not how often.
                    let _ = event.read();
                }
            }
            machine.host.slot_acknowledged();
        }
    }
}
