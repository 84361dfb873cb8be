// SPDX-License-Identifier: GPL-2.0-only

//! A ring's memory in the guest: pages that lie anywhere, in the order of their GPADL.

use crate::vmbus::protocol::PAGE_SIZE;
use crate::vmbus::ring::{Field, RingMem};
use std::sync::atomic::{AtomicU32, Ordering};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, VolatileMemory,
    VolatileMemoryError,
};

/// Why the memory of a ring cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestRingError {
    #[error("a ring of {0} pages")]
    Size(usize),
    #[error("page {0:#x} of a ring is not in the guest's memory")]
    NoPage(u64),
    #[error("offset {0:#x} is outside of the ring")]
    Outside(usize),
    #[error("cannot access guest memory")]
    Memory(#[from] GuestMemoryError),
    #[error("cannot access guest memory atomically")]
    Atomic(#[from] VolatileMemoryError),
}

/// The pages of one ring: header first, then data.
#[derive(Clone, Debug)]
pub(crate) struct GuestRing {
    memory: GuestMemoryMmap,
    header: GuestAddress,
    data: Vec<GuestAddress>,
    data_len: u32,
}

impl GuestRing {
    /// The ring on these pages (numbers, not addresses), each of which must lie in `memory`.
    pub(crate) fn new(memory: &GuestMemoryMmap, pages: &[u64]) -> Result<Self, GuestRingError> {
        let mut addresses = Vec::with_capacity(pages.len());
        for page in pages {
            let address = page
                .checked_mul(PAGE_SIZE as u64)
                .map(GuestAddress)
                .filter(|address| memory.check_range(*address, PAGE_SIZE))
                .ok_or(GuestRingError::NoPage(*page))?;
            addresses.push(address);
        }
        let size = || GuestRingError::Size(pages.len());
        let (header, data) = addresses.split_first().ok_or_else(size)?;
        if data.is_empty() {
            return Err(size());
        }
        let data_len = u32::try_from(data.len() * PAGE_SIZE).map_err(|_| size())?;
        Ok(GuestRing {
            memory: memory.clone(),
            header: *header,
            data: data.to_vec(),
            data_len,
        })
    }

    /// Calls `f` for each piece of the range `offset..offset + len` that lies on one page: its
    /// address and its place in the range.
    fn pieces(
        &self,
        offset: u32,
        len: usize,
        mut f: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), GuestRingError>,
    ) -> Result<(), GuestRingError> {
        let mut done = 0;
        while done < len {
            let at = offset as usize + done;
            let page = self
                .data
                .get(at / PAGE_SIZE)
                .ok_or(GuestRingError::Outside(at))?;
            let in_page = at % PAGE_SIZE;
            let piece = (PAGE_SIZE - in_page).min(len - done);
            f(GuestAddress(page.0 + in_page as u64), done..done + piece)?;
            done += piece;
        }
        Ok(())
    }
}

impl RingMem for GuestRing {
    type Error = GuestRingError;

    fn data_len(&self) -> u32 {
        self.data_len
    }

    fn load(&self, field: Field) -> Result<u32, GuestRingError> {
        let word = GuestAddress(self.header.0 + field as u64);
        let slice = self.memory.get_slice(word, 4)?;
        Ok(slice
            .get_atomic_ref::<AtomicU32>(0)?
            .load(Ordering::Acquire))
    }

    fn store(&self, field: Field, value: u32) -> Result<(), GuestRingError> {
        let word = GuestAddress(self.header.0 + field as u64);
        let slice = self.memory.get_slice(word, 4)?;
        slice
            .get_atomic_ref::<AtomicU32>(0)?
            .store(value, Ordering::Release);
        Ok(())
    }

    fn read(&self, offset: u32, into: &mut [u8]) -> Result<(), GuestRingError> {
        self.pieces(offset, into.len(), |address, range| {
            let piece = into.get_mut(range).unwrap_or_default();
            Ok(self.memory.read_slice(piece, address)?)
        })
    }

    fn write(&self, offset: u32, from: &[u8]) -> Result<(), GuestRingError> {
        self.pieces(offset, from.len(), |address, range| {
            let piece = from.get(range).unwrap_or_default();
            Ok(self.memory.write_slice(piece, address)?)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmbus::ring::{Reader, Writer};

    #[test]
    fn a_ring_on_scattered_pages_carries_packets_across_them() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let ring = GuestRing::new(&memory, &[9, 2, 15, 4]).unwrap();
        assert_eq!(ring.data_len(), 12288);
        let mut writer = Writer::new(ring.clone()).unwrap();
        let mut reader = Reader::new(ring).unwrap();
        for round in 0..50u8 {
            let bytes = vec![round; 6288];
            writer.send(6, 0, round.into(), &bytes).unwrap();
            let (packet, _) = reader.receive().unwrap().expect("a packet");
            assert_eq!(packet.payload, bytes);
        }
        // The header page holds both indices.
        let mut index = [0; 8];
        memory.read_slice(&mut index, GuestAddress(0x9000)).unwrap();
        assert_eq!(index[..4], index[4..]);
        assert_ne!(index[..4], [0; 4]);
    }

    #[test]
    fn pages_that_do_not_exist_are_refused() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x3000)]).unwrap();
        assert!(GuestRing::new(&memory, &[0, 1]).is_ok());
        for pages in [&[][..], &[1], &[0, 3], &[0, u64::MAX], &[1 << 52, 0]] {
            assert!(GuestRing::new(&memory, pages).is_err(), "{pages:?}");
        }
    }
}
