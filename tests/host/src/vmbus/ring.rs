// SPDX-License-Identifier: GPL-2.0-only

//! The two halves of a VMBus ring, over any memory.
//!
//! The other side is the guest and may write anything anywhere at any time. So each half keeps its
//! own index privately, checks what it reads of the other's, and copies a packet before it looks
//! at it. A ring that makes no sense is an error for its channel, nothing more.
//!
//! Layout and signalling are those of `struct hv_ring_buffer` and `drivers/hv/ring_buffer.c`: one
//! page of header, then data; every packet is followed by eight bytes that hold its start; the reader
//! is signalled when the ring was empty and its interrupt mask is clear; a writer that found
//! no room says how much it waits for and is signalled when that is free.

use super::protocol::PacketDescriptor;
use std::sync::atomic::{fence, Ordering};
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, IntoBytes};

/// A field of the ring's header: its offset in bytes (`struct hv_ring_buffer`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// Where the writer writes next.
    WriteIndex = 0,
    /// Where the reader reads next.
    ReadIndex = 4,
    /// Nonzero while the reader wants no signals.
    InterruptMask = 8,
    /// How much room a waiting writer needs.
    PendingSendSize = 12,
    /// Bit 0: the pending send size is honoured.
    FeatureBits = 64,
}

/// The memory of one ring.
pub trait RingMem {
    /// Why an access failed.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Bytes in the data part: a multiple of 8.
    fn data_len(&self) -> u32;
    /// Reads a header field, with acquire ordering.
    fn load(&self, field: Field) -> Result<u32, Self::Error>;
    /// Writes a header field, with release ordering.
    fn store(&self, field: Field, value: u32) -> Result<(), Self::Error>;
    /// Copies data out; the range lies within the data part.
    fn read(&self, offset: u32, into: &mut [u8]) -> Result<(), Self::Error>;
    /// Copies data in; the range lies within the data part.
    fn write(&self, offset: u32, from: &[u8]) -> Result<(), Self::Error>;
}

/// What is wrong with a ring.
#[derive(Debug, thiserror::Error)]
pub enum RingError<E: std::error::Error + 'static> {
    /// The other side's index lies outside of the ring or off an 8-byte boundary.
    #[error("the guest's {field:?} {value} does not lie in a ring of {len} bytes")]
    BadIndex {
        /// Which index.
        field: Field,
        /// Its value.
        value: u32,
        /// Data bytes of the ring.
        len: u32,
    },
    /// A packet whose descriptor contradicts itself or what is in the ring.
    #[error("the guest's packet ({len8} x 8 bytes, data at {offset8} x 8) does not lie in the {available} bytes that it wrote")]
    BadPacket {
        /// Claimed length.
        len8: u16,
        /// Claimed start of the data.
        offset8: u16,
        /// Bytes that are there.
        available: u32,
    },
    /// The packet cannot fit, however empty the ring is.
    #[error("a packet of {packet} bytes can never fit a ring of {ring} bytes")]
    TooLarge {
        /// Bytes that it takes.
        packet: usize,
        /// Data bytes of the ring.
        ring: usize,
    },
    /// The memory could not be accessed.
    #[error("cannot access the ring")]
    Memory(#[source] E),
}

/// A packet that came out of a ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// One of [`super::protocol::packet_type`].
    pub packet_type: u16,
    /// Flags of the descriptor.
    pub flags: u16,
    /// Transaction id.
    pub transaction: u64,
    /// What is between the descriptor and the data: the list of pages of a packet that lends some.
    pub extra: Vec<u8>,
    /// The data, padded to a multiple of 8 bytes.
    pub payload: Vec<u8>,
}

/// Bytes that follow every packet: where it started, in the upper half of a u64.
const TRAILER: u32 = 8;
const DESCRIPTOR: u32 = size_of::<PacketDescriptor>() as u32;

fn index<M: RingMem>(mem: &M, field: Field) -> Result<u32, RingError<M::Error>> {
    let value = mem.load(field).map_err(RingError::Memory)?;
    let len = mem.data_len();
    if value >= len || value % 8 != 0 {
        return Err(RingError::BadIndex { field, value, len });
    }
    Ok(value)
}

/// Adds within a ring; both are less than `len` or equal to it.
fn wrap(offset: u32, add: u32, len: u32) -> u32 {
    ((u64::from(offset) + u64::from(add)) % u64::from(len.max(1))) as u32
}

/// How far `to` is ahead of `from`.
fn distance(from: u32, to: u32, len: u32) -> u32 {
    if to >= from {
        to - from
    } else {
        len - from + to
    }
}

/// The host's reading half of the ring that the guest writes.
#[derive(Debug)]
pub struct Reader<M> {
    mem: M,
    read: u32,
}

impl<M: RingMem> Reader<M> {
    /// Takes over a ring at the place where the guest initialised it.
    pub fn new(mem: M) -> Result<Self, RingError<M::Error>> {
        let read = index(&mem, Field::ReadIndex)?;
        Ok(Reader { mem, read })
    }

    /// Takes the next packet out, if there is one. The flag says whether the guest waits for this
    /// room and is to be signalled.
    pub fn receive(&mut self) -> Result<Option<(Packet, bool)>, RingError<M::Error>> {
        let len = self.mem.data_len();
        let write = index(&self.mem, Field::WriteIndex)?;
        let available = distance(self.read, write, len);
        if available == 0 {
            return Ok(None);
        }
        let bad = |d: &PacketDescriptor| RingError::BadPacket {
            len8: d.len8.get(),
            offset8: d.offset8.get(),
            available,
        };
        let mut bytes = [0; DESCRIPTOR as usize];
        self.copy_out(self.read, &mut bytes)?;
        let descriptor =
            PacketDescriptor::read_from_bytes(&bytes).map_err(|_| RingError::BadPacket {
                len8: 0,
                offset8: 0,
                available,
            })?;
        let size = u32::from(descriptor.len8.get()) * 8;
        let offset = u32::from(descriptor.offset8.get()) * 8;
        if offset < DESCRIPTOR || offset > size || size + TRAILER > available {
            return Err(bad(&descriptor));
        }
        let mut extra = vec![0; (offset - DESCRIPTOR) as usize];
        self.copy_out(wrap(self.read, DESCRIPTOR, len), &mut extra)?;
        let mut payload = vec![0; (size - offset) as usize];
        self.copy_out(wrap(self.read, offset, len), &mut payload)?;
        self.read = wrap(self.read, size + TRAILER, len);
        self.mem
            .store(Field::ReadIndex, self.read)
            .map_err(RingError::Memory)?;
        let packet = Packet {
            packet_type: descriptor.packet_type.get(),
            flags: descriptor.flags.get(),
            transaction: descriptor.transaction.get(),
            extra,
            payload,
        };
        let signal = self.guest_waits_for_room(size + TRAILER)?;
        Ok(Some((packet, signal)))
    }

    /// The ring's memory.
    pub fn mem(&self) -> &M {
        &self.mem
    }

    /// Whether the `taken` bytes that were just read out gave a waiting guest the room it needs.
    fn guest_waits_for_room(&self, taken: u32) -> Result<bool, RingError<M::Error>> {
        // The new read index must be visible before the guest's wish is looked at, or both sides
        // could miss each other (hv_pkt_iter_close).
        fence(Ordering::SeqCst);
        let load = |field| self.mem.load(field).map_err(RingError::Memory);
        let wanted = load(Field::PendingSendSize)?;
        if wanted == 0 || load(Field::FeatureBits)? & 1 == 0 {
            return Ok(false);
        }
        let len = self.mem.data_len();
        let write = index(&self.mem, Field::WriteIndex)?;
        let free = len - distance(self.read, write, len);
        Ok(free > wanted && free.saturating_sub(taken) <= wanted)
    }

    fn copy_out(&self, offset: u32, into: &mut [u8]) -> Result<(), RingError<M::Error>> {
        let to_end = (self.mem.data_len() - offset) as usize;
        let (first, second) = into.split_at_mut(to_end.min(into.len()));
        self.mem.read(offset, first).map_err(RingError::Memory)?;
        if !second.is_empty() {
            self.mem.read(0, second).map_err(RingError::Memory)?;
        }
        Ok(())
    }
}

/// What the descriptor of a packet says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// One of [`super::protocol::packet_type`].
    pub packet_type: u16,
    /// Flags.
    pub flags: u16,
    /// Where the data is said to start, in eights of bytes; where it does when `None`.
    pub offset8: Option<u16>,
    /// How long the packet is said to be, in eights of bytes; as long as it is when `None`.
    pub len8: Option<u16>,
}

impl Descriptor {
    /// One that says the truth.
    pub const fn new(packet_type: u16, flags: u16) -> Self {
        Descriptor {
            packet_type,
            flags,
            offset8: None,
            len8: None,
        }
    }
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is in the ring; the guest is to be signalled or not.
    Yes {
        /// Whether it is to be signalled.
        signal: bool,
    },
    /// There is no room; the guest will signal when there is.
    Full,
}

/// The host's writing half of the ring that the guest reads.
#[derive(Debug)]
pub struct Writer<M> {
    mem: M,
    write: u32,
    /// Whether the pending send size is set.
    waiting: bool,
}

impl<M: RingMem> Writer<M> {
    /// Takes over a ring at the place where the guest initialised it.
    pub fn new(mem: M) -> Result<Self, RingError<M::Error>> {
        let write = index(&mem, Field::WriteIndex)?;
        Ok(Writer {
            mem,
            write,
            waiting: false,
        })
    }

    /// Data bytes of the ring.
    pub fn data_len(&self) -> usize {
        self.mem.data_len() as usize
    }

    /// Puts a packet into the ring, padded to a multiple of 8 bytes.
    pub fn send(
        &mut self,
        packet_type: u16,
        flags: u16,
        transaction: u64,
        payload: &[u8],
    ) -> Result<Sent, RingError<M::Error>> {
        self.send_as(Descriptor::new(packet_type, flags), transaction, payload)
    }

    /// As [`Writer::send`] with this descriptor. One that lies makes the guest look for the next
    /// packet in the wrong place; [`Writer::resync`] makes up for it.
    pub fn send_as(
        &mut self,
        says: Descriptor,
        transaction: u64,
        payload: &[u8],
    ) -> Result<Sent, RingError<M::Error>> {
        let len = self.mem.data_len();
        let padded = payload.len().next_multiple_of(8);
        let size = DESCRIPTOR as usize + padded;
        let too_large = || RingError::TooLarge {
            packet: size + TRAILER as usize,
            ring: len as usize,
        };
        let len8 = u16::try_from(size / 8).map_err(|_| too_large())?;
        // Equal indices mean an empty ring, so one packet never fills it entirely.
        let needed = u32::try_from(size).map_err(|_| too_large())? + TRAILER;
        if needed >= len {
            return Err(too_large());
        }
        if self.free()? <= needed {
            self.mem
                .store(Field::PendingSendSize, needed)
                .map_err(RingError::Memory)?;
            self.waiting = true;
            // The wish must be visible before the read index is looked at again: the guest does the
            // two in the opposite order.
            fence(Ordering::SeqCst);
            if self.free()? <= needed {
                return Ok(Sent::Full);
            }
        }
        let descriptor = PacketDescriptor {
            packet_type: U16::new(says.packet_type),
            offset8: U16::new(says.offset8.unwrap_or((DESCRIPTOR / 8) as u16)),
            len8: U16::new(says.len8.unwrap_or(len8)),
            flags: U16::new(says.flags),
            transaction: U64::new(transaction),
        };
        let mut bytes = Vec::with_capacity(needed as usize);
        bytes.extend_from_slice(descriptor.as_bytes());
        bytes.extend_from_slice(payload);
        bytes.resize(size, 0);
        bytes.extend_from_slice(&(u64::from(self.write) << 32).to_le_bytes());
        self.copy_in(&bytes)?;
        let old_write = self.write;
        self.write = wrap(self.write, needed, len);
        self.mem
            .store(Field::WriteIndex, self.write)
            .map_err(RingError::Memory)?;
        if self.waiting {
            self.waiting = false;
            self.mem
                .store(Field::PendingSendSize, 0)
                .map_err(RingError::Memory)?;
        }
        // The write index must be visible before the mask is looked at (hv_signal_on_write).
        fence(Ordering::SeqCst);
        let masked = self
            .mem
            .load(Field::InterruptMask)
            .map_err(RingError::Memory)?
            != 0;
        let was_empty = index(&self.mem, Field::ReadIndex)? == old_write;
        Ok(Sent::Yes {
            signal: !masked && was_empty,
        })
    }

    /// Whether the guest has read all that was sent.
    pub fn is_read(&self) -> Result<bool, RingError<M::Error>> {
        Ok(index(&self.mem, Field::ReadIndex)? == self.write)
    }

    /// Drops what the guest has not read: the next packet goes to where it reads next. The flag says
    /// whether it had read all.
    pub fn resync(&mut self) -> Result<bool, RingError<M::Error>> {
        let read = index(&self.mem, Field::ReadIndex)?;
        let write = self.mem.load(Field::WriteIndex);
        let done = self.is_read()? && write.map_err(RingError::Memory)? == read;
        self.write = read;
        self.waiting = false;
        for (field, value) in [(Field::PendingSendSize, 0), (Field::WriteIndex, read)] {
            self.mem.store(field, value).map_err(RingError::Memory)?;
        }
        Ok(done)
    }

    /// The ring's memory.
    pub fn mem(&self) -> &M {
        &self.mem
    }

    fn free(&self) -> Result<u32, RingError<M::Error>> {
        let read = index(&self.mem, Field::ReadIndex)?;
        let len = self.mem.data_len();
        Ok(len - distance(read, self.write, len))
    }

    fn copy_in(&self, bytes: &[u8]) -> Result<(), RingError<M::Error>> {
        let to_end = (self.mem.data_len() - self.write) as usize;
        let (first, second) = bytes.split_at(to_end.min(bytes.len()));
        self.mem
            .write(self.write, first)
            .map_err(RingError::Memory)?;
        if !second.is_empty() {
            self.mem.write(0, second).map_err(RingError::Memory)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::packet_type::DATA_INBAND;
    use super::*;
    use std::cell::{Cell, RefCell};
    use std::collections::HashMap;
    use std::rc::Rc;

    /// A ring in ordinary memory; clones share it, so one side can play the guest.
    #[derive(Clone, Debug)]
    struct TestRing {
        fields: Rc<RefCell<HashMap<u32, u32>>>,
        data: Rc<RefCell<Vec<u8>>>,
        /// When set, a wish for room makes the guest read everything at once.
        drains_on_wish: Rc<Cell<bool>>,
    }

    #[derive(Debug, thiserror::Error)]
    #[error("out of the buffer")]
    struct OutOfBuffer;

    impl TestRing {
        fn new(len: usize) -> Self {
            let features = (Field::FeatureBits as u32, 1);
            TestRing {
                fields: Rc::new(RefCell::new(HashMap::from([features]))),
                data: Rc::new(RefCell::new(vec![0; len])),
                drains_on_wish: Rc::default(),
            }
        }

        fn get(&self, field: Field) -> u32 {
            self.load(field).unwrap()
        }

        fn set(&self, field: Field, value: u32) {
            self.fields.borrow_mut().insert(field as u32, value);
        }
    }

    impl RingMem for TestRing {
        type Error = OutOfBuffer;

        fn data_len(&self) -> u32 {
            self.data.borrow().len() as u32
        }

        fn load(&self, field: Field) -> Result<u32, OutOfBuffer> {
            Ok(*self.fields.borrow().get(&(field as u32)).unwrap_or(&0))
        }

        fn store(&self, field: Field, value: u32) -> Result<(), OutOfBuffer> {
            self.set(field, value);
            if field == Field::PendingSendSize && value != 0 && self.drains_on_wish.get() {
                self.set(Field::ReadIndex, self.get(Field::WriteIndex));
            }
            Ok(())
        }

        fn read(&self, offset: u32, into: &mut [u8]) -> Result<(), OutOfBuffer> {
            let data = self.data.borrow();
            let range = offset as usize..offset as usize + into.len();
            into.copy_from_slice(data.get(range).ok_or(OutOfBuffer)?);
            Ok(())
        }

        fn write(&self, offset: u32, from: &[u8]) -> Result<(), OutOfBuffer> {
            let mut data = self.data.borrow_mut();
            let range = offset as usize..offset as usize + from.len();
            data.get_mut(range)
                .ok_or(OutOfBuffer)?
                .copy_from_slice(from);
            Ok(())
        }
    }

    fn payload(len: usize, seed: u8) -> Vec<u8> {
        (0..len).map(|i| (i as u8).wrapping_mul(seed)).collect()
    }

    #[test]
    fn packets_of_all_sizes_come_out_as_they_went_in_across_the_wrap() {
        let ring = TestRing::new(12288);
        let mut writer = Writer::new(ring.clone()).unwrap();
        let mut reader = Reader::new(ring).unwrap();
        for round in 0..2000u64 {
            let bytes = payload((round as usize * 37) % 6400, 7);
            let sent = writer.send(DATA_INBAND, 1, round, &bytes).unwrap();
            assert_eq!(sent, Sent::Yes { signal: true });
            let (packet, signal) = reader.receive().unwrap().expect("one packet");
            assert!(!signal);
            assert_eq!((packet.transaction, packet.flags), (round, 1));
            assert_eq!(packet.payload.len(), bytes.len().next_multiple_of(8));
            assert_eq!(packet.payload[..bytes.len()], bytes);
            assert!(packet.payload[bytes.len()..].iter().all(|b| *b == 0));
            assert_eq!(reader.receive().unwrap(), None);
        }
    }

    #[test]
    fn a_packet_is_laid_out_as_in_hyperv_h() {
        let ring = TestRing::new(4096);
        let mut writer = Writer::new(ring.clone()).unwrap();
        writer.send(DATA_INBAND, 0, 9, &[1; 8]).unwrap();
        writer.send(DATA_INBAND, 1, 10, &[2; 3]).unwrap();
        let data = ring.data.borrow();
        assert_eq!(data[..16], [6, 0, 2, 0, 3, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(data[16..24], [1; 8]);
        assert_eq!(data[24..32], [0; 8]);
        assert_eq!(data[32..40], [6, 0, 2, 0, 3, 0, 1, 0]);
        assert_eq!(data[48..56], [2, 2, 2, 0, 0, 0, 0, 0]);
        assert_eq!(data[56..64], [0, 0, 0, 0, 32, 0, 0, 0]);
        assert_eq!(ring.get(Field::WriteIndex), 64);
    }

    #[test]
    fn only_the_first_packet_into_an_empty_ring_signals_and_only_unmasked() {
        let ring = TestRing::new(4096);
        let mut writer = Writer::new(ring.clone()).unwrap();
        let mut reader = Reader::new(ring.clone()).unwrap();
        let signals = [true, false];
        for signal in signals {
            let sent = writer.send(DATA_INBAND, 0, 0, &[]).unwrap();
            assert_eq!(sent, Sent::Yes { signal });
        }
        while reader.receive().unwrap().is_some() {}
        ring.set(Field::InterruptMask, 1);
        let sent = writer.send(DATA_INBAND, 0, 0, &[]).unwrap();
        assert_eq!(sent, Sent::Yes { signal: false });
    }

    #[test]
    fn a_descriptor_says_what_it_is_told_to_and_the_ring_recovers() {
        let ring = TestRing::new(4096);
        let mut writer = Writer::new(ring.clone()).unwrap();
        let mut reader = Reader::new(ring.clone()).unwrap();
        let lie = Descriptor {
            offset8: Some(77),
            len8: Some(0xffff),
            ..Descriptor::new(DATA_INBAND, 1)
        };
        writer.send_as(lie, 9, &[1; 8]).unwrap();
        assert_eq!(
            ring.data.borrow()[..8],
            [6, 0, 77, 0, 0xff, 0xff, 1, 0],
            "the lie"
        );
        assert!(reader.receive().is_err());
        // The guest has gone on somewhere else.
        ring.set(Field::ReadIndex, 2048);
        assert!(!writer.resync().unwrap());
        assert!(writer.resync().unwrap());
        assert_eq!(ring.get(Field::WriteIndex), 2048);
        let mut reader = Reader::new(ring.clone()).unwrap();
        writer.send(DATA_INBAND, 0, 10, &[2; 8]).unwrap();
        let (packet, _) = reader.receive().unwrap().expect("a packet");
        assert_eq!(packet.payload, [2; 8]);
    }

    #[test]
    fn a_second_freeze_waits_for_room_and_says_so() {
        let ring = TestRing::new(12288);
        let mut writer = Writer::new(ring.clone()).unwrap();
        let mut reader = Reader::new(ring.clone()).unwrap();
        let freeze = payload(28 + 6260, 3);
        assert!(matches!(
            writer.send(DATA_INBAND, 0, 1, &freeze).unwrap(),
            Sent::Yes { .. }
        ));
        let full = writer.send(DATA_INBAND, 0, 2, &freeze).unwrap();
        assert_eq!(full, Sent::Full);
        assert_eq!(ring.get(Field::PendingSendSize), 6312);
        let (_, signal) = reader.receive().unwrap().expect("the first");
        assert!(signal, "the reader gave the writer its room");
        let sent = writer.send(DATA_INBAND, 0, 2, &freeze).unwrap();
        assert_eq!(sent, Sent::Yes { signal: true });
        assert_eq!(ring.get(Field::PendingSendSize), 0);
    }

    #[test]
    fn room_that_appears_while_the_wish_is_written_is_used() {
        let ring = TestRing::new(64);
        let mut writer = Writer::new(ring.clone()).unwrap();
        writer.send(DATA_INBAND, 0, 1, &[0; 8]).unwrap();
        ring.drains_on_wish.set(true);
        let sent = writer.send(DATA_INBAND, 0, 2, &[0; 8]).unwrap();
        assert_eq!(sent, Sent::Yes { signal: true });
        assert_eq!(ring.get(Field::PendingSendSize), 0);
    }

    #[test]
    fn a_ring_is_never_filled_to_the_last_byte() {
        let ring = TestRing::new(64);
        let mut writer = Writer::new(ring).unwrap();
        assert!(matches!(
            writer.send(DATA_INBAND, 0, 1, &[0; 40]),
            Err(RingError::TooLarge {
                packet: 64,
                ring: 64
            })
        ));
        assert!(matches!(
            writer.send(DATA_INBAND, 0, 1, &[0; 32]),
            Ok(Sent::Yes { .. })
        ));
    }

    #[test]
    fn an_index_outside_the_ring_or_off_its_grid_is_an_error() {
        for value in [64, 4, 63, u32::MAX] {
            let ring = TestRing::new(64);
            let mut reader = Reader::new(ring.clone()).unwrap();
            let mut writer = Writer::new(ring.clone()).unwrap();
            ring.set(Field::WriteIndex, value);
            ring.set(Field::ReadIndex, value);
            assert!(matches!(reader.receive(), Err(RingError::BadIndex { .. })));
            let sent = writer.send(DATA_INBAND, 0, 0, &[]);
            assert!(matches!(sent, Err(RingError::BadIndex { .. })));
            assert!(Reader::new(ring.clone()).is_err());
            assert!(Writer::new(ring).is_err());
        }
    }

    #[test]
    fn a_packet_that_lies_about_itself_is_an_error() {
        // Descriptor fields (offset8, len8), and how many bytes the guest claims to have written.
        for (offset8, len8, written) in [
            (2, 2, 16),
            (1, 2, 24),
            (0, 0, 24),
            (3, 2, 24),
            (2, 0xffff, 56),
            (2, 7, 56),
        ] {
            let ring = TestRing::new(64);
            let mut reader = Reader::new(ring.clone()).unwrap();
            let descriptor = PacketDescriptor {
                packet_type: U16::new(DATA_INBAND),
                offset8: U16::new(offset8),
                len8: U16::new(len8),
                flags: U16::new(0),
                transaction: U64::new(1),
            };
            ring.write(0, descriptor.as_bytes()).unwrap();
            ring.set(Field::WriteIndex, written);
            let read = reader.receive();
            assert!(
                matches!(read, Err(RingError::BadPacket { .. })),
                "{offset8} {len8} {written}: {read:?}"
            );
        }
    }

    #[test]
    fn random_bytes_never_panic_the_reader() {
        let mut state = 0x2545_f491_4f6c_dd1du64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..20_000 {
            let ring = TestRing::new(256);
            for byte in ring.data.borrow_mut().iter_mut() {
                *byte = (random() % 9) as u8;
            }
            let mut reader = Reader::new(ring.clone()).unwrap();
            ring.set(Field::WriteIndex, (random() % 34 * 8) as u32);
            ring.set(Field::PendingSendSize, random() as u32);
            while let Ok(Some(_)) = reader.receive() {}
        }
    }
}
