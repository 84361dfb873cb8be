// SPDX-License-Identifier: GPL-2.0-only

//! The threads of a running machine, and how they end.
//!
//! Each virtual CPU has a thread that runs the guest and serves its exits at once. One more thread,
//! the reaper, waits until one of them says that the guest is over (or somebody kills it), stops the
//! others, and only then announces the end: after that nothing touches the guest any more.

use crate::bus::{chain, lock};
use crate::console::Console;
use crate::cpu;
use crate::devices::{PortEffect, Ports};
use crate::host::Host;
use crate::kvm::{self, HypervExit};
use crate::vm::{event, kvm_error, system_error, Exit, VmError};
use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{register_signal_handler, Killable, SIGRTMIN};

/// How long a guest that has reported a crash may go on, to print and to unload.
const CRASH_GRACE: Duration = Duration::from_secs(10);

/// The end of the guest, as it comes about.
#[derive(Default)]
pub(crate) struct Ending {
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
    pub(crate) fn stop(&self, why: Exit) {
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

    pub(crate) fn wait_ended(&self, timeout: Duration) -> Option<Exit> {
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

/// The virtual CPUs' threads, and what they say of themselves when they are asked.
#[derive(Default)]
pub(crate) struct Cpus {
    /// Empty once the machine stops.
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// How often they were asked.
    asked: AtomicU64,
    /// Whether each is to take an NMI besides.
    nmi: AtomicBool,
    said: Mutex<BTreeMap<u32, String>>,
    /// Whether each is to stay out of the guest once it has left it.
    paused: AtomicBool,
}

/// How often one that is paused looks whether it still is.
const PAUSED: Duration = Duration::from_millis(5);

/// How long a virtual CPU may take to leave the guest and say how it is.
const SAY: Duration = Duration::from_secs(2);

impl Cpus {
    /// Has each virtual CPU leave the guest for a moment and say how it is there, by number; with `nmi`
    /// each takes one when it goes back.
    pub(crate) fn ask(&self, nmi: bool) -> BTreeMap<u32, String> {
        let threads = lock(&self.threads);
        lock(&self.said).clear();
        self.nmi.store(nmi, SeqCst);
        self.asked.fetch_add(1, SeqCst);
        let until = Instant::now() + SAY;
        while lock(&self.said).len() < threads.len() && Instant::now() < until {
            // A signal that comes just before KVM_RUN is lost, so it is repeated.
            for thread in threads.iter().filter(|it| !it.is_finished()) {
                let _ = thread.kill(SIGRTMIN());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        lock(&self.said).clone()
    }

    /// Has each virtual CPU leave the guest, and go back only after [`Cpus::resume`]. Says whether all have.
    pub(crate) fn pause(&self) -> bool {
        self.paused.store(true, SeqCst);
        let all = lock(&self.threads).len();
        // Who answers looks next whether it is paused.
        self.ask(false).len() == all
    }

    /// Lets them go back.
    pub(crate) fn resume(&self) {
        self.paused.store(false, SeqCst);
    }

    /// Called by each virtual CPU's thread between two runs of the guest.
    fn answer(&self, index: u32, vcpu: &VcpuFd, answered: &mut u64, exits: u64) {
        let asked = self.asked.load(SeqCst);
        if *answered == asked {
            return;
        }
        *answered = asked;
        let text = format!("{}, {exits} exits", cpu::describe(vcpu));
        if self.nmi.load(SeqCst) {
            // A guest that cannot take it says no more than it did before.
            let _ = vcpu.nmi();
        }
        lock(&self.said).insert(index, text);
    }
}

/// What the threads share.
#[derive(Clone)]
pub(crate) struct Machine {
    pub host: Host,
    pub ports: Arc<Ports>,
    pub ending: Arc<Ending>,
    pub cpus: Arc<Cpus>,
    /// Both are kept for as long as a thread may run the guest.
    pub _vm: Arc<VmFd>,
    pub _memory: GuestMemoryMmap,
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Its arrival is all that matters: it makes KVM_RUN return.
}

impl Machine {
    /// Starts all threads; the one that is returned ends them.
    pub(crate) fn spawn(
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
        let cpus = self.cpus.clone();
        let mut threads = lock(&cpus.threads);
        for (index, vcpu) in (0u32..).zip(vcpus) {
            let machine = self.clone();
            let name = format!("vcpu-{index}");
            threads.push(spawn(&name, move || machine.run_vcpu(index, vcpu))?);
        }
        drop(threads);
        spawn("reaper", move || {
            let exit = self.ending.wait_stop();
            // From here on every virtual CPU that leaves the guest stays out of it.
            self.ending.stop(exit.clone());
            self.ports.close();
            for thread in std::mem::take(&mut *lock(&self.cpus.threads)) {
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
        let (mut answered, mut exits) = (0, 0);
        while !self.ending.is_stopping() {
            self.cpus.answer(index, &vcpu, &mut answered, exits);
            if self.cpus.paused.load(SeqCst) {
                std::thread::sleep(PAUSED);
                continue;
            }
            exits += 1;
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
