// SPDX-License-Identifier: GPL-2.0-only

//! The write log of a disk: what was changed, flushed, in which order and when, with the data, so
//! that the disk as it was at any moment can be put together again.

use super::image::Image;
use std::sync::Arc;
use std::time::Instant;

/// Something that changed the disk, or made a change last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes were written.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Arc<[u8]>,
        /// Whether they were on the medium when it ended.
        fua: bool,
    },
    /// Bytes became zeros.
    Discard {
        /// From where on.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// All that had been written was brought to the medium.
    Flush,
}

/// One of them, and when.
#[derive(Clone, Debug)]
pub struct Entry {
    /// When the host took the guest's command.
    pub arrived: Instant,
    /// When it had been carried out, and the guest was told so; `None` of a write that still waits for its turn.
    pub ended: Option<Instant>,
    /// What it was.
    pub change: Change,
}

impl Entry {
    /// Whether it changed what is on the disk, as a flush does not.
    pub fn is_write(&self) -> bool {
        self.change != Change::Flush
    }

    /// Whether it was under way at some moment after `start` and before `end`, which are moments as `clock` has
    /// them.
    pub fn is_within<T: PartialOrd>(&self, clock: impl Fn(Instant) -> T, start: T, end: T) -> bool {
        let has_ended = self.ended.is_some_and(|ended| clock(ended) <= start);
        !has_ended && clock(self.arrived) < end
    }
}

/// What `base` becomes when these changes are made to it, in their order.
pub fn replay<'a>(base: &Image, entries: impl IntoIterator<Item = &'a Entry>) -> Image {
    let mut image = base.clone();
    for entry in entries {
        match &entry.change {
            Change::Write { offset, data, .. } => image.write(*offset, data),
            Change::Discard { offset, len } => image.discard(*offset, *len),
            Change::Flush => {}
        }
    }
    image
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn entry(change: Change) -> Entry {
        let now = Instant::now();
        Entry {
            arrived: now,
            ended: Some(now),
            change,
        }
    }

    #[test]
    fn every_prefix_of_the_log_is_a_disk() {
        let write = |offset, byte: u8| Change::Write {
            offset,
            data: [byte; 4].into(),
            fua: false,
        };
        let log = [
            entry(write(0, 1)),
            entry(Change::Flush),
            entry(write(2, 2)),
            entry(Change::Discard { offset: 1, len: 2 }),
        ];
        let mut base = Image::default();
        base.write(0, &[9; 6]);
        let expected = [
            [9, 9, 9, 9, 9, 9],
            [1, 1, 1, 1, 9, 9],
            [1, 1, 1, 1, 9, 9],
            [1, 1, 2, 2, 2, 2],
            [1, 0, 0, 2, 2, 2],
        ];
        for (len, expected) in expected.iter().enumerate() {
            let mut seen = [0; 6];
            replay(&base, &log[..len]).read(0, &mut seen);
            assert_eq!(seen, *expected, "the first {len}");
        }
    }

    #[test]
    fn what_straddles_a_moment_is_within_it() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let straddles = Entry {
            arrived: at(10),
            ended: Some(at(30)),
            change: Change::Flush,
        };
        let is_within = |it: &Entry, from, to| it.is_within(|at| at, at(from), at(to));
        assert!(is_within(&straddles, 20, 25));
        assert!(is_within(&straddles, 0, 11));
        assert!(!is_within(&straddles, 30, 40));
        assert!(!is_within(&straddles, 0, 10));
        assert!(!straddles.is_write());
        let waits = Entry {
            ended: None,
            ..straddles
        };
        assert!(is_within(&waits, 30, 40));
        assert!(!is_within(&waits, 0, 10));
    }
}
