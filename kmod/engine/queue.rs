// SPDX-License-Identifier: GPL-2.0

//! The host's open requests, in the order of their arrival, and their packets.
//!
//! Knows nothing of the daemon or the freeze: when a request ends, and how, is the machine's
//! business.

use super::notes::Subject;
use core::ops::DerefMut;

/// Requests that may be open at a time. A real host has one; the rest is for hosts that do not wait.
pub const QUEUE: usize = 4;

/// Longest packet in bytes that is kept for an answer: an IC message of 13,312 bytes with its pipe
/// header, rounded up to the 8 bytes that VMBus counts in. Longer ones are answered at once.
pub const PACKET_MAX: usize = 13_320;

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    /// Behind another one, or behind a THAW that has to come first.
    Queued,
    /// At the head, but there is no daemon.
    Held,
    /// At the head; the daemon may read it.
    Offered,
    /// At the head; the daemon has read it.
    Read,
}

/// A request of the host. Times are microseconds of the caller's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) id: u64,
    pub(super) operation: u8,
    pub(super) stage: Stage,
    /// A read of the daemon has been shown it. Whether that read succeeds is not known before it is
    /// [`Stage::Read`]: until then the daemon may have it or not.
    pub(super) shown: bool,
    pub(super) arrived: u64,
    /// When its time is over, wherever it is then.
    pub(super) deadline: u64,
    /// The VMBus request id.
    request_id: u64,
    /// Where its packet lies: `len` bytes in this slot of the store.
    slot: usize,
    len: usize,
}

impl Request {
    /// For the notes.
    pub(super) fn subject(&self) -> Subject {
        Subject {
            id: self.id,
            transaction: self.request_id,
            operation: self.operation,
        }
    }

    pub(super) fn is_read(&self) -> bool {
        self.stage == Stage::Read
    }
}

/// The queue. `B` is the store for packets: [`QUEUE`] times [`PACKET_MAX`] bytes, or less for a
/// shorter queue.
///
/// # Invariants
///
/// Open requests stand at the front of `requests`, ids ascending, each with a slot of its own.
pub(super) struct Queue<B> {
    store: B,
    requests: [Option<Request>; QUEUE],
}

impl<B: DerefMut<Target = [u8]>> Queue<B> {
    pub(super) fn new(store: B) -> Self {
        Queue {
            store,
            requests: [None; QUEUE],
        }
    }

    /// Puts a request at the end, with a copy of its packet; `None` when there is no room for it.
    pub(super) fn push(
        &mut self,
        subject: Subject,
        arrived: u64,
        deadline: u64,
        packet: &[u8],
    ) -> Option<()> {
        let place = self.requests.iter().position(|r| r.is_none())?;
        let slot = (0..QUEUE).find(|slot| self.iter().all(|r| r.slot != *slot))?;
        let request = Request {
            id: subject.id,
            operation: subject.operation,
            stage: Stage::Queued,
            shown: false,
            arrived,
            deadline,
            request_id: subject.transaction,
            slot,
            len: packet.len(),
        };
        self.packet(&request)?.copy_from_slice(packet);
        *self.requests.get_mut(place)? = Some(request);
        Some(())
    }

    /// Takes a request out. Its packet stays in place until the next [`Queue::push`].
    pub(super) fn remove(&mut self, at: usize) -> Option<Request> {
        let rest = self.requests.get_mut(at..)?;
        let request = rest.first_mut()?.take();
        rest.rotate_left(1);
        request
    }

    /// The packet of a request.
    pub(super) fn packet(&mut self, request: &Request) -> Option<&mut [u8]> {
        let mut slots = self.store.chunks_exact_mut(PACKET_MAX);
        slots.nth(request.slot)?.get_mut(..request.len)
    }

    pub(super) fn head(&self) -> Option<&Request> {
        self.iter().next()
    }

    pub(super) fn head_mut(&mut self) -> Option<&mut Request> {
        self.requests.first_mut()?.as_mut()
    }

    /// The place of the first request that is so.
    pub(super) fn position(&self, is_so: impl Fn(&Request) -> bool) -> Option<usize> {
        self.iter().position(is_so)
    }

    /// All open requests, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Request> {
        self.requests.iter().flatten()
    }

    /// The place for packets.
    #[cfg(not(hv_vss_kernel))]
    pub(super) fn into_store(self) -> B {
        self.store
    }

    /// The same requests, with their packets in another store.
    #[cfg(not(hv_vss_kernel))]
    pub(super) fn copy(&self, store: B) -> Self {
        let mut copy = Queue::new(store);
        copy.requests = self.requests;
        for request in self.iter() {
            let from = self.store.chunks_exact(PACKET_MAX).nth(request.slot);
            let from = from.and_then(|slot| slot.get(..request.len));
            if let (Some(to), Some(from)) = (copy.packet(request), from) {
                to.copy_from_slice(from);
            }
        }
        copy
    }

    /// Checks the invariants.
    #[cfg(not(hv_vss_kernel))]
    pub(super) fn check(&self) -> Result<(), &'static str> {
        let open = self.iter().count();
        if self.requests.iter().take(open).any(|r| r.is_none()) {
            return Err("a gap in the queue");
        }
        let mut last_id = 0;
        let mut slots = [false; QUEUE];
        for request in self.iter() {
            if request.id <= last_id {
                return Err("ids do not ascend");
            }
            last_id = request.id;
            if request.len > PACKET_MAX {
                return Err("a packet longer than its slot");
            }
            match slots.get_mut(request.slot) {
                Some(used) if !*used => *used = true,
                _ => return Err("a slot used twice"),
            }
        }
        Ok(())
    }
}
