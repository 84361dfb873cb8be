// SPDX-License-Identifier: GPL-2.0-only

//! Memory that the guest lends with a packet, for as long as its channel is open: a list of pages,
//! in which a device reads or writes while nobody looks.
//!
//! The list is `struct vmdata_gpa_direct` after its descriptor (`include/linux/hyperv.h`). Once the
//! channel is closed the guest may use the pages for anything, so from then on they are out of reach.

use crate::bus::lock;
use crate::vmbus::protocol::{GpaDirect, GpaRange, PAGE_SIZE};
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::little_endian::U64;
use zerocopy::FromBytes;

/// The most that one packet may lend.
const MAX_BYTES: usize = 8 << 20;

/// Whether what was lent on one opening of a channel may still be touched.
#[derive(Clone, Debug)]
pub(crate) struct Lease(Arc<Mutex<bool>>);

impl Lease {
    pub(crate) fn new() -> Self {
        Lease(Arc::new(Mutex::new(true)))
    }

    /// Ends it. When this returns nobody touches the memory, and nobody will.
    pub(crate) fn end(&self) {
        *lock(&self.0) = false;
    }
}

/// Why lent memory cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum LentError {
    #[error("the list of pages contradicts itself")]
    List,
    #[error("it is not in the guest's memory")]
    Memory,
    #[error("the channel was closed")]
    Closed,
}

/// The pages that came with one packet.
#[derive(Debug)]
pub(crate) struct Lent {
    memory: GuestMemoryMmap,
    lease: Lease,
    pieces: Vec<(GuestAddress, usize)>,
}

impl Lent {
    /// The pages in `list`, which is empty when the packet lends none.
    pub(crate) fn parse(
        memory: GuestMemoryMmap,
        lease: Lease,
        list: &[u8],
    ) -> Result<Self, LentError> {
        let mut pieces = Vec::new();
        let mut total = 0usize;
        if !list.is_empty() {
            let (lent, mut rest) = GpaDirect::ref_from_prefix(list).map_err(|_| LentError::List)?;
            for _ in 0..lent.range_count.get() {
                let (range, pages) =
                    GpaRange::ref_from_prefix(rest).map_err(|_| LentError::List)?;
                let mut left = range.byte_count.get() as usize;
                let mut offset = range.byte_offset.get() as usize;
                total = total.saturating_add(left);
                if offset >= PAGE_SIZE || total > MAX_BYTES {
                    return Err(LentError::List);
                }
                let count = (offset + left).div_ceil(PAGE_SIZE);
                let (pages, after) = <[U64]>::ref_from_prefix_with_elems(pages, count)
                    .map_err(|_| LentError::List)?;
                for page in pages {
                    let address = page.get().checked_mul(PAGE_SIZE as u64);
                    let address = address.ok_or(LentError::Memory)?;
                    let piece = (PAGE_SIZE - offset).min(left);
                    pieces.push((GuestAddress(address + offset as u64), piece));
                    left -= piece;
                    offset = 0;
                }
                rest = after;
            }
        }
        Ok(Lent {
            memory,
            lease,
            pieces,
        })
    }

    /// The same without what is behind its first `len` bytes; nothing if it has not as many.
    pub(crate) fn first(mut self, len: usize) -> Option<Self> {
        let mut left = len;
        for piece in &mut self.pieces {
            piece.1 = piece.1.min(left);
            left -= piece.1;
        }
        (left == 0).then_some(self)
    }

    /// Bytes that were lent.
    pub(crate) fn len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.1).sum()
    }

    /// All that is in it.
    pub(crate) fn read(&self) -> Result<Vec<u8>, LentError> {
        let open = lock(&self.lease.0);
        if !*open {
            return Err(LentError::Closed);
        }
        let mut bytes = vec![0; self.len()];
        let mut rest = bytes.as_mut_slice();
        for (address, len) in &self.pieces {
            let (part, after) = rest.split_at_mut(*len);
            self.memory
                .read_slice(part, *address)
                .map_err(|_| LentError::Memory)?;
            rest = after;
        }
        Ok(bytes)
    }

    /// Writes from the start on, as much as there is room for; how much that was.
    pub(crate) fn write(&self, mut bytes: &[u8]) -> Result<usize, LentError> {
        let open = lock(&self.lease.0);
        if !*open {
            return Err(LentError::Closed);
        }
        let mut written = 0;
        for (address, len) in &self.pieces {
            let (part, after) = bytes.split_at((*len).min(bytes.len()));
            self.memory
                .write_slice(part, *address)
                .map_err(|_| LentError::Memory)?;
            written += part.len();
            bytes = after;
        }
        Ok(written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap()
    }

    fn list(ranges: u32, len: u32, offset: u32, pages: &[u64]) -> Vec<u8> {
        let mut list = Vec::new();
        for word in [0, ranges, len, offset] {
            list.extend(word.to_le_bytes());
        }
        pages
            .iter()
            .for_each(|page| list.extend(page.to_le_bytes()));
        list
    }

    #[test]
    fn scattered_pages_are_one_piece_of_memory() {
        let memory = memory();
        let lent = Lent::parse(
            memory.clone(),
            Lease::new(),
            &list(1, 6000, 3000, &[5, 2, 9]),
        );
        let lent = lent.unwrap();
        assert_eq!(lent.len(), 6000);
        let bytes: Vec<u8> = (0..6000u32).map(|it| (it % 251) as u8).collect();
        assert_eq!(lent.write(&bytes), Ok(6000));
        assert_eq!(lent.read(), Ok(bytes.clone()));
        let mut seen = [0; 1096];
        memory
            .read_slice(&mut seen, GuestAddress(5 * 4096 + 3000))
            .unwrap();
        assert_eq!(seen, bytes[..1096]);
        memory
            .read_slice(&mut seen[..808], GuestAddress(9 * 4096))
            .unwrap();
        assert_eq!(seen[..808], bytes[5192..]);
        // What is too much is not written, what is missing is left as it is.
        assert_eq!(lent.write(&[1; 7000]), Ok(6000));
        assert_eq!(lent.write(&[2; 10]), Ok(10));
    }

    #[test]
    fn a_list_that_contradicts_itself_is_refused() {
        for bad in [
            list(1, 6000, 3000, &[5]),
            list(2, 100, 0, &[5]),
            list(1, 100, 4096, &[5, 6]),
            list(1, u32::MAX, 0, &[5]),
            vec![0; 7],
        ] {
            assert!(
                Lent::parse(memory(), Lease::new(), &bad).is_err(),
                "{bad:?}"
            );
        }
        let none = Lent::parse(memory(), Lease::new(), &[]).unwrap();
        assert_eq!((none.len(), none.read()), (0, Ok(Vec::new())));
        let outside = Lent::parse(memory(), Lease::new(), &list(1, 100, 0, &[16])).unwrap();
        assert_eq!(outside.read(), Err(LentError::Memory));
        assert!(Lent::parse(memory(), Lease::new(), &list(1, 100, 0, &[u64::MAX])).is_err());
    }

    #[test]
    fn what_was_lent_is_out_of_reach_once_the_channel_is_closed() {
        let lease = Lease::new();
        let lent = Lent::parse(memory(), lease.clone(), &list(1, 100, 0, &[5])).unwrap();
        assert!(lent.read().is_ok());
        lease.end();
        assert_eq!(lent.read(), Err(LentError::Closed));
        assert_eq!(lent.write(&[1]), Err(LentError::Closed));
    }
}
