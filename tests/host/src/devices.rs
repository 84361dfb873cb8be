// SPDX-License-Identifier: GPL-2.0-only

//! The machine's I/O ports: two serial ports, power management, the reset line, the clock, an empty PCI bus.
//!
//! Every port access is an exit from the guest, and under nested emulation an expensive one, so data
//! for the guest is refilled from within the exit that emptied the port: the guest's interrupt
//! handler then finds more in the same round, and no other thread has to run in between.

use crate::acpi::{PM1_CONTROL, PM1_EVENT, SLEEP_TYPE_S5};
use crate::bus::lock;
use crate::console::ConsoleWriter;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// Interrupts of the two serial ports.
pub(crate) const COM1_IRQ: u32 = 4;
pub(crate) const COM2_IRQ: u32 = 3;

const COM1: u16 = 0x3f8;
const COM2: u16 = 0x2f8;
const COM_PORTS: u16 = 8;
/// The keyboard controller: its reset command is how Linux reboots.
const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

/// Why there is an NMI (port B of the PC): for none of these errors of memory or bus.
const NMI_REASON: u16 = 0x61;
const NMI_ERRORS: u8 = 0xc0;

/// Bytes that may wait between the agent's stream and the serial port, in either direction.
const AGENT_BUFFER: usize = 1 << 20;
/// How many bytes from the guest are collected before the stream gets them, unless a line ends.
const AGENT_BATCH: usize = 4096;
/// How long the agent's port may wait for the guest before that is told again.
const UNHEARD: Duration = Duration::from_secs(1);
/// How long an unfinished line from the guest waits for its rest.
const AGENT_PATIENCE: Duration = Duration::from_millis(20);

/// What a port access means for the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PortEffect {
    None,
    PowerOff,
    Reset,
}

/// An interrupt line of the in-kernel interrupt controller.
pub(crate) struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// PM1 status, enable and control: 16 bits each.
#[derive(Default)]
struct PowerManagement {
    status: AtomicU16,
    enable: AtomicU16,
    control: AtomicU16,
}

impl PowerManagement {
    const SLEEP_ENABLE: u16 = 1 << 13;
    const SCI_ENABLED: u16 = 1;

    /// The register at a port and which of its bytes that is.
    fn register(&self, port: u16) -> Option<(&AtomicU16, u16)> {
        Some(match port {
            port if port == PM1_EVENT || port == PM1_EVENT + 1 => (&self.status, port & 1),
            port if port == PM1_EVENT + 2 || port == PM1_EVENT + 3 => (&self.enable, port & 1),
            port if port == PM1_CONTROL || port == PM1_CONTROL + 1 => (&self.control, port & 1),
            _ => return None,
        })
    }

    /// Reads one byte; `None` when the port is none of these.
    fn read(&self, port: u16) -> Option<u8> {
        let (register, byte) = self.register(port)?;
        let mut value = register.load(Ordering::SeqCst);
        if std::ptr::eq(register, &self.control) {
            value |= Self::SCI_ENABLED;
        }
        Some((value >> (byte * 8)) as u8)
    }

    fn write(&self, port: u16, value: u8) -> PortEffect {
        let Some((register, byte)) = self.register(port) else {
            return PortEffect::None;
        };
        if std::ptr::eq(register, &self.status) {
            // Writing ones clears events, of which there are none.
            return PortEffect::None;
        }
        let shift = byte * 8;
        let old = register.load(Ordering::SeqCst);
        let new = old & !(0xff << shift) | u16::from(value) << shift;
        // The sleep bit reads as zero.
        register.store(new & !Self::SLEEP_ENABLE, Ordering::SeqCst);
        let sleep_type = (new >> 10 & 7) as u8;
        if std::ptr::eq(register, &self.control)
            && new & Self::SLEEP_ENABLE != 0
            && sleep_type == SLEEP_TYPE_S5
        {
            return PortEffect::PowerOff;
        }
        PortEffect::None
    }
}

/// The clock chip (MC146818): the time of day of this machine, UTC, which nobody can set and which raises no
/// interrupt. Without it a guest begins in 1999, and what its journal has of the boot may be gone, as too old,
/// once the host's time synchronization tells the guest what time it is.
#[derive(Default)]
struct Clock {
    register: AtomicU8,
}

impl Clock {
    const INDEX: u16 = 0x70;
    const DATA: u16 = 0x71;
    /// Bit 7 of the index masks NMIs.
    const INDEX_BITS: u8 = 0x7f;

    /// Reads one byte at `now`; `None` when the port is none of these.
    fn read(&self, port: u16, now: SystemTime) -> Option<u8> {
        // 2026-11-30T01:00:13Z
        let digits = |at: usize| {
            let text = humantime::format_rfc3339_seconds(now).to_string();
            let pair = text.as_bytes().get(at..at + 2);
            pair.map_or(0, |it| (it[0] & 0xf) << 4 | it[1] & 0xf)
        };
        match port {
            // Its index cannot be read.
            Self::INDEX => Some(0),
            Self::DATA => Some(match self.register.load(Ordering::SeqCst) {
                0 => digits(17),
                2 => digits(14),
                4 => digits(11),
                7 => digits(8),
                8 => digits(5),
                9 => digits(2),
                // 32768 Hz, and no update is under way.
                0xa => 0x26,
                // 24 hours, BCD.
                0xb => 0x02,
                // The time is valid.
                0xd => 0x80,
                _ => 0,
            }),
            _ => None,
        }
    }

    fn write(&self, port: u16, value: u8) {
        if port == Self::INDEX {
            self.register
                .store(value & Self::INDEX_BITS, Ordering::SeqCst);
        }
    }
}

/// PCI configuration, mechanism 1, of a bus with nothing but its bridge: a guest that finds no PCI at
/// all says so with an error on its console.
#[derive(Default)]
struct PciBus {
    address: AtomicU32,
}

impl PciBus {
    const ADDRESS: u16 = 0xcf8;
    const DATA: u16 = 0xcfc;
    const ENABLED: u32 = 1 << 31;
    /// Vendor and device of Hyper-V's own bridge (Intel 82443BX).
    const BRIDGE: u32 = 0x7192_8086;
    /// Class "host bridge", revision 3.
    const BRIDGE_CLASS: u32 = 0x0600_0003;

    /// Reads at one of the eight ports; `None` when the port is none of these.
    fn read(&self, port: u16, data: &mut [u8]) -> Option<()> {
        let offset = port.checked_sub(Self::ADDRESS).filter(|o| *o < 8)?;
        let address = self.address.load(Ordering::SeqCst);
        let value = if port < Self::DATA {
            address
        } else {
            match address & !3 {
                a if a == Self::ENABLED => Self::BRIDGE,
                a if a == Self::ENABLED | 8 => Self::BRIDGE_CLASS,
                // The rest of the bridge is zero; nobody else is there.
                a if a & !0xff == Self::ENABLED => 0,
                _ => u32::MAX,
            }
        };
        let bytes = value.to_le_bytes();
        let from = bytes.iter().skip(usize::from(offset % 4));
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        Some(())
    }

    /// Takes a whole address; there is nothing that data could change.
    fn write(&self, port: u16, data: &[u8]) {
        if let (Self::ADDRESS, Ok(bytes)) = (port, data.try_into()) {
            self.address
                .store(u32::from_le_bytes(bytes), Ordering::SeqCst);
        }
    }
}

/// Bytes on their way from the guest to the agent's stream.
#[derive(Default)]
struct Outgoing {
    state: Mutex<OutgoingState>,
    changed: Condvar,
}

#[derive(Default)]
struct OutgoingState {
    bytes: VecDeque<u8>,
    /// Nobody takes bytes any more.
    closed: bool,
}

/// The serial port's way out to the agent.
pub(crate) struct AgentWriter(Arc<Outgoing>);

impl Write for AgentWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = lock(&self.0.state);
        // A guest that is faster than its reader waits, as it would on a real line.
        while state.bytes.len() >= AGENT_BUFFER && !state.closed {
            state = self
                .0
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        state.bytes.extend(bytes);
        if bytes.contains(&b'\n') || state.bytes.len() >= AGENT_BATCH {
            self.0.changed.notify_all();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes that an empty port has room for (vm-superio's `FIFO_SIZE`).
const FIFO_SIZE: usize = 64;

struct AgentPort {
    serial: Serial<Line, NoEvents, AgentWriter>,
    /// Bytes for the guest that the port has no room for.
    incoming: VecDeque<u8>,
    /// How often the guest has turned to the port.
    accesses: u64,
    /// The same when the port was last seen to wait for it.
    waited_at: Option<u64>,
    /// How often it was told again.
    raised_again: u64,
}

impl AgentPort {
    fn is_empty(&self) -> bool {
        self.serial.fifo_capacity() >= FIFO_SIZE
    }

    /// Whether it waits for the guest to take its interrupt: there is a byte for the guest, or room for
    /// one of it, and it wants to know.
    fn waits(&self) -> bool {
        const RECEIVED: u8 = 1 << 0;
        const ROOM: u8 = 1 << 1;
        const ROOM_PENDING: u8 = 1 << 1;
        let port = self.serial.state();
        let has_room = port.interrupt_identification & ROOM_PENDING != 0;
        port.interrupt_enable & RECEIVED != 0 && !self.is_empty()
            || port.interrupt_enable & ROOM != 0 && has_room
    }

    /// Raises the interrupt again when the guest has not turned to the port since the last look, though
    /// that waits for it.
    ///
    /// An interrupt that is lost on its way is not raised again by itself: one is pending as far as the
    /// port knows, and nothing is put into it before its byte was read. The line would be dead for good,
    /// and a guest whose line is dead cannot be told from one that is dead itself.
    fn look(&mut self) {
        let waits = self.waits();
        if waits && self.waited_at == Some(self.accesses) {
            self.raised_again += 1;
            // One that cannot be raised is tried again at the next look.
            let _ = self.serial.interrupt_evt().trigger();
        }
        self.waited_at = waits.then_some(self.accesses);
    }

    /// Puts the next byte into the port when it is empty.
    ///
    /// One at a time, although the port has room for 64: vm-superio takes its interrupt back with
    /// the first byte that is read, whatever is left. A guest that reads a bounded number of bytes
    /// in one interrupt (Linux: 256) would leave the rest for ever.
    fn refill(&mut self) {
        if !self.is_empty() {
            return;
        }
        let Some(byte) = self.incoming.front() else {
            return;
        };
        // An error is an interrupt that could not be raised; what is in the port stays there, and
        // the guest reads it at its next chance.
        let _ = self.serial.enqueue_raw_bytes(&[*byte]);
        if !self.is_empty() {
            self.incoming.pop_front();
        }
    }
}

/// All ports of the machine; shared by the virtual CPUs.
pub(crate) struct Ports {
    console: Mutex<Serial<Line, NoEvents, ConsoleWriter>>,
    agent: Mutex<AgentPort>,
    /// Notified when bytes for the guest have left the queue.
    agent_room: Condvar,
    agent_out: Arc<Outgoing>,
    power: PowerManagement,
    clock: Clock,
    pci: PciBus,
}

impl Ports {
    /// Ports whose interrupts go to these lines.
    pub(crate) fn new(console: ConsoleWriter, com1: EventFd, com2: EventFd) -> Self {
        let agent_out = Arc::new(Outgoing::default());
        let agent = AgentPort {
            serial: Serial::new(Line(com2), AgentWriter(agent_out.clone())),
            incoming: VecDeque::new(),
            accesses: 0,
            waited_at: None,
            raised_again: 0,
        };
        Ports {
            console: Mutex::new(Serial::new(Line(com1), console)),
            agent: Mutex::new(agent),
            agent_room: Condvar::new(),
            agent_out,
            power: PowerManagement::default(),
            clock: Clock::default(),
            pci: PciBus::default(),
        }
    }

    /// The guest reads `data.len()` bytes from a port.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        if let Some(offset) = within(port, COM1) {
            let mut serial = lock(&self.console);
            data.iter_mut().for_each(|byte| *byte = serial.read(offset));
        } else if let Some(offset) = within(port, COM2) {
            let mut agent = lock(&self.agent);
            agent.accesses += 1;
            for byte in data {
                *byte = agent.serial.read(offset);
                if offset == 0 && !agent.incoming.is_empty() {
                    agent.refill();
                    self.agent_room.notify_all();
                }
            }
        } else if self.pci.read(port, data).is_none() {
            for (byte, port) in data.iter_mut().zip(ports_from(port)) {
                *byte = match port {
                    KEYBOARD_DATA | KEYBOARD => 0,
                    NMI_REASON => !NMI_ERRORS,
                    port => {
                        let clock = || self.clock.read(port, SystemTime::now());
                        self.power.read(port).or_else(clock).unwrap_or(0xff)
                    }
                };
            }
        }
    }

    /// The guest writes to a port.
    pub(crate) fn write(&self, port: u16, data: &[u8]) -> PortEffect {
        // What a serial port cannot deliver is lost, as on a line that nobody listens to.
        if let Some(offset) = within(port, COM1) {
            let mut serial = lock(&self.console);
            for byte in data {
                let _ = serial.write(offset, *byte);
            }
        } else if let Some(offset) = within(port, COM2) {
            let mut agent = lock(&self.agent);
            agent.accesses += 1;
            for byte in data {
                let _ = agent.serial.write(offset, *byte);
            }
            // Leaving loopback mode makes room that no read announces.
            agent.refill();
        } else if port == KEYBOARD && data.contains(&KEYBOARD_RESET) {
            return PortEffect::Reset;
        } else {
            self.pci.write(port, data);
            for (byte, port) in data.iter().zip(ports_from(port)) {
                self.clock.write(port, *byte);
                match self.power.write(port, *byte) {
                    PortEffect::None => {}
                    effect => return effect,
                }
            }
        }
        PortEffect::None
    }

    /// How often the guest had to be told again that the agent's port waits for it.
    pub(crate) fn raised_again(&self) -> u64 {
        lock(&self.agent).raised_again
    }

    /// How the agent's port is, in words.
    pub(crate) fn agent_state(&self) -> String {
        let agent = lock(&self.agent);
        let port = agent.serial.state();
        format!(
            "{} bytes in it and {} behind it, {} accesses; IIR {:#x}, IER {:#x}, LSR {:#x}; its interrupt \
             was raised again {} times",
            port.in_buffer.len(),
            agent.incoming.len(),
            agent.accesses,
            port.interrupt_identification,
            port.interrupt_enable,
            port.line_status,
            agent.raised_again
        )
    }

    /// Carries bytes from the stream to the guest until the stream ends.
    pub(crate) fn pump_in(&self, mut stream: UnixStream) -> io::Result<()> {
        let mut chunk = [0; 4096];
        stream.set_read_timeout(Some(UNHEARD))?;
        loop {
            let len = match stream.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    lock(&self.agent).look();
                    continue;
                }
                Err(error) => return Err(error),
            };
            let mut agent = lock(&self.agent);
            while agent.incoming.len() >= AGENT_BUFFER {
                if lock(&self.agent_out.state).closed {
                    return Ok(());
                }
                agent = self
                    .agent_room
                    .wait_timeout(agent, UNHEARD)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
                agent.look();
            }
            agent.incoming.extend(chunk.get(..len).unwrap_or_default());
            agent.refill();
        }
    }

    /// Carries bytes from the guest to the stream until [`Ports::close`].
    pub(crate) fn pump_out(&self, mut stream: UnixStream) -> io::Result<()> {
        loop {
            let mut state = lock(&self.agent_out.state);
            while state.bytes.is_empty() && !state.closed {
                state = self.wait_for_output(state);
            }
            // Part of a line: its rest is on the way.
            if !state.bytes.contains(&b'\n') && !state.closed {
                state = self.wait_for_output(state);
            }
            let bytes: Vec<u8> = state.bytes.drain(..).collect();
            let closed = state.closed;
            drop(state);
            self.agent_out.changed.notify_all();
            stream.write_all(&bytes)?;
            if closed {
                return Ok(());
            }
        }
    }

    fn wait_for_output<'a>(
        &self,
        state: std::sync::MutexGuard<'a, OutgoingState>,
    ) -> std::sync::MutexGuard<'a, OutgoingState> {
        self.agent_out
            .changed
            .wait_timeout(state, AGENT_PATIENCE)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    /// Ends the pumps' waiting, and any virtual CPU's for the agent's reader.
    pub(crate) fn close(&self) {
        lock(&self.agent_out.state).closed = true;
        self.agent_out.changed.notify_all();
        self.agent_room.notify_all();
    }
}

/// A port and those above it, as a wide access covers them.
fn ports_from(port: u16) -> impl Iterator<Item = u16> {
    (0..).map(move |offset| port.wrapping_add(offset))
}

fn within(port: u16, base: u16) -> Option<u8> {
    let offset = port.checked_sub(base)?;
    (offset < COM_PORTS).then_some(offset as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::Console;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn ports() -> Ports {
        let console = Arc::new(Console::new(None, false).unwrap());
        let line = || EventFd::new(EFD_NONBLOCK).unwrap();
        Ports::new(ConsoleWriter(console), line(), line())
    }

    #[test]
    fn sleep_type_5_is_power_off_and_the_registers_read_back() {
        let ports = ports();
        let mut word = [0; 2];
        assert_eq!(ports.write(PM1_EVENT + 2, &[0x20, 0x01]), PortEffect::None);
        ports.read(PM1_EVENT + 2, &mut word);
        assert_eq!(word, [0x20, 0x01]);
        ports.read(PM1_CONTROL, &mut word);
        assert_eq!(word, [1, 0]);
        assert_eq!(ports.write(PM1_CONTROL, &[1, 0x14]), PortEffect::None);
        assert_eq!(ports.write(PM1_CONTROL, &[1, 0x34]), PortEffect::PowerOff);
        assert_eq!(ports.write(PM1_CONTROL, &[1, 0x24]), PortEffect::None);
    }

    #[test]
    fn the_keyboard_controller_resets_and_unknown_ports_are_empty() {
        let ports = ports();
        assert_eq!(ports.write(KEYBOARD, &[0xfe]), PortEffect::Reset);
        assert_eq!(ports.write(KEYBOARD, &[0xd1]), PortEffect::None);
        let mut bytes = [1; 4];
        ports.read(0x300, &mut bytes);
        assert_eq!(bytes, [0xff; 4]);
        ports.read(KEYBOARD, &mut bytes[..1]);
        assert_eq!(bytes[0], 0);
        ports.read(0xffff, &mut bytes);
        ports.read(NMI_REASON, &mut bytes[..1]);
        assert_eq!(bytes[0], 0x3f);
    }

    #[test]
    fn the_clock_tells_the_time_of_day_in_bcd() {
        let clock = Clock::default();
        // 2026-11-30T01:02:59Z
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_796_000_579);
        let read = |register: u8| {
            clock.write(0x70, 0x80 | register);
            clock.read(0x71, now)
        };
        let time = [9, 8, 7, 4, 2, 0].map(read);
        assert_eq!(time, [0x26, 0x11, 0x30, 0x01, 0x02, 0x59].map(Some));
        // Valid, no update, 24 hours in BCD.
        assert_eq!([0xd, 0xa, 0xb].map(read), [0x80, 0x26, 0x02].map(Some));
        assert_eq!(clock.read(0x72, now), None);
    }

    #[test]
    fn the_pci_bus_has_a_bridge_and_nothing_else() {
        let ports = ports();
        let config = |address: u32, offset: u16, len: usize| {
            ports.write(0xcf8, &address.to_le_bytes());
            let mut data = [0; 4];
            ports.read(0xcfc + offset, &mut data[..len]);
            u32::from_le_bytes(data)
        };
        assert_eq!(config(0x8000_0000, 0, 4), 0x7192_8086);
        // The class, as Linux reads it.
        assert_eq!(config(0x8000_0008, 2, 2), 0x0600);
        assert_eq!(config(0x8000_0010, 0, 4), 0);
        assert_eq!(config(0x8000_0800, 0, 4), u32::MAX);
        assert_eq!(config(0x0000_0000, 0, 2), 0xffff);
        let mut address = [0; 4];
        ports.write(0xcf8, &0x8000_0000u32.to_le_bytes());
        ports.write(0xcfb, &[1]);
        ports.read(0xcf8, &mut address);
        assert_eq!(u32::from_le_bytes(address), 0x8000_0000);
    }

    /// Reads as the guest's interrupt handler does: status, then data while there is some.
    fn drain(ports: &Ports) -> Vec<u8> {
        let mut got = Vec::new();
        loop {
            let (mut status, mut byte) = ([0], [0]);
            ports.read(COM2 + 5, &mut status);
            if status[0] & 1 == 0 {
                return got;
            }
            ports.read(COM2, &mut byte);
            got.push(byte[0]);
        }
    }

    #[test]
    fn an_interrupt_that_is_lost_is_raised_again() {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let console = Arc::new(Console::new(None, false).unwrap());
        let other = EventFd::new(EFD_NONBLOCK).unwrap();
        let ports = Ports::new(ConsoleWriter(console), other, line.try_clone().unwrap());
        let ports = Arc::new(ports);
        // As a guest does that wants to hear of bytes.
        ports.write(COM2 + 1, &[1]);
        let raised = || {
            let until = std::time::Instant::now() + 10 * UNHEARD;
            while std::time::Instant::now() < until {
                if line.read().is_ok() {
                    return true;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            false
        };
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let ports_in = ports.clone();
        let reader = std::thread::spawn(move || ports_in.pump_in(ours));
        theirs.write_all(b"call\n").unwrap();
        assert!(raised(), "for the first byte");
        // That one is lost: nobody reads.
        assert!(raised(), "again");
        assert_eq!(drain(&ports), b"call\n");
        assert_eq!(ports.raised_again(), 1);
        // The same where it has room for what the guest wants to say.
        ports.write(COM2 + 1, &[3]);
        assert!(raised(), "for room");
        assert!(raised(), "for room, again");
        let mut byte = [0];
        ports.read(COM2 + 2, &mut byte);
        assert_eq!(byte[0] & 3, 2);
        ports.close();
        theirs.shutdown(std::net::Shutdown::Both).unwrap();
        reader.join().unwrap().unwrap();
    }

    #[test]
    fn lines_of_any_length_reach_guest_and_agent() {
        let ports = Arc::new(ports());
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (pump_in, pump_out) = (ours.try_clone().unwrap(), ours);
        let ports_in = ports.clone();
        let reader = std::thread::spawn(move || ports_in.pump_in(pump_in));
        let ports_out = ports.clone();
        let writer = std::thread::spawn(move || ports_out.pump_out(pump_out));

        let sent: Vec<u8> = (0..300_000u32).map(|i| i as u8).collect();
        theirs.write_all(&sent).unwrap();
        let mut got = Vec::new();
        while got.len() < sent.len() {
            got.extend(drain(&ports));
        }
        assert!(got == sent);

        let answer = [b"x".repeat(100_000), b"\n".to_vec()].concat();
        for byte in &answer {
            ports.write(COM2, &[*byte]);
        }
        let mut got = vec![0; answer.len()];
        theirs.read_exact(&mut got).unwrap();
        assert!(got == answer);

        // Half a line comes too, a little later.
        ports.write(COM2, b"half");
        let mut got = [0; 4];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"half");

        ports.close();
        theirs.shutdown(std::net::Shutdown::Both).unwrap();
        reader.join().unwrap().unwrap();
        writer.join().unwrap().unwrap();
    }
}
