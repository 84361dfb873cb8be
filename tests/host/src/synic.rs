// SPDX-License-Identifier: GPL-2.0-only

//! The host's end of the guest's synthetic interrupt controllers: message slots and event flags.
//!
//! One SynIC belongs to each virtual processor. The guest puts two pages into its own memory, tells
//! where through SynIC MSRs, and KVM passes that on; after that the host writes there and
//! raises the interrupt. What the messages mean is not known here.
//!
//! Layouts: Hyper-V Top Level Functional Specification, chapter 11 (`struct hv_message`,
//! `union hv_synic_event_flags` in `include/hyperv/hvgdk_mini.h`).

use std::sync::atomic::{AtomicU32, AtomicU8, Ordering};
use std::sync::Mutex;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, VolatileMemory,
    VolatileMemoryError,
};
use vmm_sys_util::eventfd::EventFd;

/// The interrupt source that VMBus uses (`VMBUS_MESSAGE_SINT`).
pub(crate) const SINT: u64 = 2;

/// Bit 0 of SCONTROL, SIMP and SIEFP: enabled.
const ENABLED: u64 = 1;
const PAGE_MASK: u64 = !0xfff;
const SLOT_SIZE: u64 = 256;
const SLOT_HEADER: usize = 16;
const FLAG_PENDING: u8 = 1;
/// Event flags of one interrupt source.
const EVENT_FLAGS: u32 = 2048;

/// Why the guest could not be reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SynicError {
    #[error("the guest has no virtual processor {0}")]
    NoProcessor(u32),
    #[error("event flag {0} does not exist")]
    NoFlag(u32),
    #[error("a message of {0} bytes does not fit a slot")]
    TooLong(usize),
    #[error("cannot access the SynIC page at {page:#x}")]
    Memory {
        page: u64,
        #[source]
        source: GuestMemoryError,
    },
    #[error("cannot access the SynIC page at {page:#x} atomically")]
    Atomic {
        page: u64,
        #[source]
        source: VolatileMemoryError,
    },
    #[error("cannot raise the interrupt of virtual processor {vp}")]
    Interrupt {
        vp: u32,
        #[source]
        source: std::io::Error,
    },
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Posted {
    Yes,
    /// The slot is taken; the guest will say when it is free.
    Busy,
    /// The guest has its SynIC off: nobody would ever read the message.
    Off,
}

/// The registers of one SynIC, as KVM reports them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Registers {
    pub control: u64,
    pub message_page: u64,
    pub event_page: u64,
}

struct Processor {
    registers: Mutex<Registers>,
    interrupt: EventFd,
}

pub(crate) struct SynIc {
    memory: GuestMemoryMmap,
    processors: Vec<Processor>,
}

impl SynIc {
    /// SynICs of as many processors as there are interrupts, in the order of their VP index.
    pub(crate) fn new(memory: GuestMemoryMmap, interrupts: Vec<EventFd>) -> Self {
        let processors = interrupts.into_iter().map(|interrupt| Processor {
            registers: Mutex::default(),
            interrupt,
        });
        SynIc {
            memory,
            processors: processors.collect(),
        }
    }

    fn processor(&self, vp: u32) -> Result<&Processor, SynicError> {
        self.processors
            .get(vp as usize)
            .ok_or(SynicError::NoProcessor(vp))
    }

    /// Takes over new register values. Pages that become enabled are zeroed: with
    /// `KVM_CAP_HYPERV_SYNIC2` that is left to the VMM.
    pub(crate) fn set_registers(&self, vp: u32, new: Registers) -> Result<(), SynicError> {
        let processor = self.processor(vp)?;
        let mut registers = crate::bus::lock(&processor.registers);
        for (old, new) in [
            (registers.message_page, new.message_page),
            (registers.event_page, new.event_page),
        ] {
            if new & ENABLED != 0 && old != new {
                let page = new & PAGE_MASK;
                self.memory
                    .write_slice(&[0; 4096], GuestAddress(page))
                    .map_err(|source| SynicError::Memory { page, source })?;
            }
        }
        *registers = new;
        Ok(())
    }

    /// Puts a message of this type from this port into the guest's slot and raises the interrupt.
    pub(crate) fn post(
        &self,
        vp: u32,
        message_type: u32,
        port: u64,
        payload: &[u8],
    ) -> Result<Posted, SynicError> {
        let processor = self.processor(vp)?;
        let registers = *crate::bus::lock(&processor.registers);
        if registers.control & registers.message_page & ENABLED == 0 {
            return Ok(Posted::Off);
        }
        let mut slot = [0; SLOT_SIZE as usize];
        let size = u8::try_from(payload.len()).map_err(|_| SynicError::TooLong(payload.len()))?;
        let (header, body) = slot.split_at_mut(SLOT_HEADER);
        body.get_mut(..payload.len())
            .ok_or(SynicError::TooLong(payload.len()))?
            .copy_from_slice(payload);
        // Type (written last), size, flags, two reserved bytes, port.
        let (fixed, sender) = header.split_at_mut(8);
        fixed.copy_from_slice(&[0, 0, 0, 0, size, 0, 0, 0]);
        sender.copy_from_slice(&port.to_le_bytes());

        let page = registers.message_page & PAGE_MASK;
        let memory = |source| SynicError::Memory { page, source };
        let atomic = |source| SynicError::Atomic { page, source };
        let address = GuestAddress(page + SINT * SLOT_SIZE);
        let guest_slot = self
            .memory
            .get_slice(address, SLOT_SIZE as usize)
            .map_err(memory)?;
        let slot_type = guest_slot.get_atomic_ref::<AtomicU32>(0).map_err(atomic)?;
        if slot_type.load(Ordering::SeqCst) != 0 {
            // Ask for an end-of-message, then look again: the guest frees the slot before it
            // looks at the flag.
            let flags = guest_slot.get_atomic_ref::<AtomicU8>(5).map_err(atomic)?;
            flags.fetch_or(FLAG_PENDING, Ordering::SeqCst);
            if slot_type.load(Ordering::SeqCst) != 0 {
                return Ok(Posted::Busy);
            }
        }
        guest_slot.copy_from(&slot);
        slot_type.store(message_type, Ordering::SeqCst);
        self.raise(vp, processor)?;
        Ok(Posted::Yes)
    }

    /// Sets an event flag and raises the interrupt, unless the flag is still set from before. False
    /// when the guest has its SynIC off.
    pub(crate) fn signal(&self, vp: u32, flag: u32) -> Result<bool, SynicError> {
        if flag >= EVENT_FLAGS {
            return Err(SynicError::NoFlag(flag));
        }
        let processor = self.processor(vp)?;
        let registers = *crate::bus::lock(&processor.registers);
        if registers.control & registers.event_page & ENABLED == 0 {
            return Ok(false);
        }
        let page = registers.event_page & PAGE_MASK;
        let address = GuestAddress(page + SINT * SLOT_SIZE + u64::from(flag / 32) * 4);
        let word = self
            .memory
            .get_slice(address, 4)
            .map_err(|source| SynicError::Memory { page, source })?;
        let word = word
            .get_atomic_ref::<AtomicU32>(0)
            .map_err(|source| SynicError::Atomic { page, source })?;
        let bit = 1 << (flag % 32);
        if word.fetch_or(bit, Ordering::SeqCst) & bit == 0 {
            self.raise(vp, processor)?;
        }
        Ok(true)
    }

    fn raise(&self, vp: u32, processor: &Processor) -> Result<(), SynicError> {
        processor
            .interrupt
            .write(1)
            .map_err(|source| SynicError::Interrupt { vp, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    const MESSAGES: u64 = 0x1000;
    const EVENTS: u64 = 0x2000;

    fn synic() -> (SynIc, EventFd) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        memory
            .write_slice(&[0xff; 0x4000], GuestAddress(0))
            .unwrap();
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let copy = interrupt.try_clone().unwrap();
        (SynIc::new(memory, vec![interrupt]), copy)
    }

    fn on() -> Registers {
        Registers {
            control: 1,
            message_page: MESSAGES | 1,
            event_page: EVENTS | 1,
        }
    }

    #[test]
    fn nothing_is_written_while_the_guest_has_its_synic_off() {
        let (synic, interrupt) = synic();
        assert_eq!(synic.post(0, 1, 1, b"x").unwrap(), Posted::Off);
        assert!(!synic.signal(0, 5).unwrap());
        let off = Registers { control: 0, ..on() };
        synic.set_registers(0, off).unwrap();
        assert_eq!(synic.post(0, 1, 1, b"x").unwrap(), Posted::Off);
        assert!(interrupt.read().is_err());
    }

    #[test]
    fn a_message_lands_in_slot_2_and_a_second_waits_for_it() {
        let (synic, interrupt) = synic();
        synic.set_registers(0, on()).unwrap();
        assert_eq!(synic.post(0, 1, 7, b"hello").unwrap(), Posted::Yes);
        assert_eq!(interrupt.read().unwrap(), 1);
        let mut slot = [0; 24];
        let at = GuestAddress(MESSAGES + 512);
        synic.memory.read_slice(&mut slot, at).unwrap();
        assert_eq!(slot[..16], [1, 0, 0, 0, 5, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&slot[16..21], b"hello");
        assert_eq!(synic.post(0, 1, 7, b"again").unwrap(), Posted::Busy);
        synic.memory.read_slice(&mut slot, at).unwrap();
        assert_eq!(slot[5], FLAG_PENDING);
        synic.memory.write_slice(&[0; 4], at).unwrap();
        assert_eq!(synic.post(0, 1, 7, b"again").unwrap(), Posted::Yes);
        synic.memory.read_slice(&mut slot, at).unwrap();
        assert_eq!(slot[5], 0);
    }

    #[test]
    fn an_event_flag_that_is_still_set_raises_no_second_interrupt() {
        let (synic, interrupt) = synic();
        synic.set_registers(0, on()).unwrap();
        assert!(synic.signal(0, 35).unwrap());
        assert!(synic.signal(0, 35).unwrap());
        assert_eq!(interrupt.read().unwrap(), 1);
        let mut words = [0; 8];
        let at = GuestAddress(EVENTS + 512);
        synic.memory.read_slice(&mut words, at).unwrap();
        assert_eq!(words, [0, 0, 0, 0, 8, 0, 0, 0]);
    }

    #[test]
    fn pages_outside_of_memory_and_wrong_numbers_are_errors() {
        let (synic, _interrupt) = synic();
        let nowhere = Registers {
            message_page: 0xffff_ffff_ffff_f001,
            ..on()
        };
        assert!(synic.set_registers(0, nowhere).is_err());
        assert!(synic.set_registers(1, on()).is_err());
        synic.set_registers(0, on()).unwrap();
        assert!(synic.signal(0, EVENT_FLAGS).is_err());
        assert!(synic.post(0, 1, 1, &[0; 241]).is_err());
        assert!(synic.post(0, 1, 1, &[0; 240]).is_ok());
    }
}
