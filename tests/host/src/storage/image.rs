// SPDX-License-Identifier: GPL-2.0-only

//! What is on a disk: bytes in memory or in a file, of which only those take room that were written.
//!
//! Knows offsets and bytes, no commands. A copy of an [`Image`] costs next to nothing: the two share
//! what neither has written since, as a disk and its checkpoint do.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vmm_sys_util::seek_hole::SeekHole;
use vmm_sys_util::write_zeroes::PunchHole;

/// Bytes that are copied at once when one of them is written.
const PIECE: usize = 16 * 1024;

/// The content of a disk, in memory.
#[derive(Clone, Debug, Default)]
pub struct Image {
    pieces: BTreeMap<u64, Arc<Vec<u8>>>,
}

impl Image {
    /// Fills `into` with what is at `offset`: zeros where nothing was written.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        for_pieces(offset, into.len(), |piece, within, range| {
            let part = into.get_mut(range).unwrap_or_default();
            let there = self.pieces.get(&piece);
            match there.and_then(|bytes| bytes.get(within..within + part.len())) {
                Some(bytes) => part.copy_from_slice(bytes),
                None => part.fill(0),
            }
        });
    }

    /// Writes bytes.
    pub fn write(&mut self, offset: u64, from: &[u8]) {
        for_pieces(offset, from.len(), |piece, within, range| {
            let part = from.get(range).unwrap_or_default();
            let bytes = self
                .pieces
                .entry(piece)
                .or_insert_with(|| Arc::new(vec![0; PIECE]));
            let bytes = Arc::make_mut(bytes);
            if let Some(bytes) = bytes.get_mut(within..within + part.len()) {
                bytes.copy_from_slice(part);
            }
        });
    }

    /// Makes `len` bytes zeros and gives back the room of whole pieces.
    pub fn discard(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let piece = PIECE as u64;
        let whole = offset.div_ceil(piece)..end / piece;
        if whole.is_empty() {
            return self.write(offset, &vec![0; len as usize]);
        }
        let gone: Vec<u64> = self.pieces.range(whole.clone()).map(|it| *it.0).collect();
        for number in gone {
            self.pieces.remove(&number);
        }
        let head = (whole.start * piece - offset) as usize;
        let tail = (end - whole.end * piece) as usize;
        // A piece that is not there is zeros already.
        if head > 0 && self.pieces.contains_key(&(offset / piece)) {
            self.write(offset, &vec![0; head]);
        }
        if tail > 0 && self.pieces.contains_key(&whole.end) {
            self.write(whole.end * piece, &vec![0; tail]);
        }
    }

    /// Bytes of memory that the content takes, shared or not.
    pub fn allocated(&self) -> u64 {
        (self.pieces.len() * PIECE) as u64
    }
}

/// Calls `f` for each part of `offset..offset + len` that lies in one piece: the piece's number, the
/// place in it, and the place in the range.
fn for_pieces(offset: u64, len: usize, mut f: impl FnMut(u64, usize, std::ops::Range<usize>)) {
    let mut done = 0;
    while done < len {
        let at = offset + done as u64;
        let within = (at % PIECE as u64) as usize;
        let part = (PIECE - within).min(len - done);
        f(at / PIECE as u64, within, done..done + part);
        done += part;
    }
}

/// Where a disk has its content.
#[derive(Debug)]
pub enum Store {
    /// In memory.
    Memory(Image),
    /// In a file as long as the disk, best a sparse one.
    File(File),
}

impl Store {
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        match self {
            Store::Memory(image) => {
                image.read(offset, into);
                Ok(())
            }
            Store::File(file) => file.read_exact_at(into, offset),
        }
    }

    pub(crate) fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        match self {
            Store::Memory(image) => {
                image.write(offset, from);
                Ok(())
            }
            Store::File(file) => file.write_all_at(from, offset),
        }
    }

    pub(crate) fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        match self {
            Store::Memory(image) => {
                image.discard(offset, len);
                Ok(())
            }
            Store::File(_) if len == 0 => Ok(()),
            Store::File(file) => file.punch_hole(offset, len),
        }
    }

    /// Brings what was written to the medium.
    pub(crate) fn flush(&self) -> io::Result<()> {
        match self {
            Store::Memory(_) => Ok(()),
            Store::File(file) => file.sync_data(),
        }
    }

    /// The content as it is now.
    pub(crate) fn snapshot(&mut self) -> io::Result<Image> {
        let file = match self {
            Store::Memory(image) => return Ok(image.clone()),
            Store::File(file) => file,
        };
        let mut image = Image::default();
        let mut at = 0;
        while let Some(start) = file.seek_data(at)? {
            let end = file.seek_hole(start)?.unwrap_or(start);
            let mut part = vec![0; PIECE];
            at = start;
            while at < end {
                let len = part.len().min((end - at) as usize);
                let part = part.get_mut(..len).unwrap_or_default();
                file.read_exact_at(part, at)?;
                image.write(at, part);
                at += len as u64;
            }
        }
        Ok(image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    const LEN: u64 = 200_000;

    fn file() -> Store {
        let path = std::env::temp_dir().join(format!("hyperv-sim-image-{}", std::process::id()));
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(true);
        let file = options.open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file.set_len(LEN).unwrap();
        Store::File(file)
    }

    #[test]
    fn memory_and_file_hold_what_a_plain_vector_holds() {
        let mut state = 88_172_645_463_325_252u64;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let mut plain = vec![0u8; LEN as usize];
        let mut stores = [Store::Memory(Image::default()), file()];
        for round in 0..2000u64 {
            let offset = random(LEN);
            let len = random(LEN - offset + 1).min(random(80_000));
            let range = offset as usize..(offset + len) as usize;
            let fill = if round % 3 == 0 { 0 } else { round as u8 | 1 };
            plain[range.clone()].fill(fill);
            for store in &mut stores {
                match fill {
                    0 => store.discard(offset, len).unwrap(),
                    _ => store.write(offset, &vec![fill; len as usize]).unwrap(),
                }
            }
        }
        for store in &mut stores {
            let mut seen = vec![1; LEN as usize];
            store.read(0, &mut seen).unwrap();
            assert!(seen == plain);
            store.snapshot().unwrap().read(0, &mut seen);
            assert!(seen == plain);
            store.discard(0, LEN).unwrap();
            let image = store.snapshot().unwrap();
            // The last piece is not whole.
            assert!(image.allocated() <= PIECE as u64);
        }
    }

    #[test]
    fn a_copy_keeps_what_it_was_while_the_other_is_written() {
        let mut image = Image::default();
        image.write(10, b"before");
        let copy = image.clone();
        image.write(10, b"behind");
        let mut seen = [0; 6];
        copy.read(10, &mut seen);
        assert_eq!(&seen, b"before");
        image.read(10, &mut seen);
        assert_eq!(&seen, b"behind");
    }
}
