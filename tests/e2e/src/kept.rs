// SPDX-License-Identifier: GPL-2.0-only

//! Verdicts that outlive the machine which runs the cases.
//!
//! That may be an emulated one, and be frozen for good by its emulator. What was found out until then is
//! on a disk of it (`tests/lab/outer/init` says where), and the next attempt goes on behind it. A case that
//! has failed is so never tried again.

use crate::runner::Verdict;
use anyhow::{ensure, Context, Result};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

/// Where, in the environment: a file, a colon, and from which byte on.
const PLACE: &str = "LAB_KEPT";

/// The most that verdicts may take up. There are two of these: they are written in turn, so that one is whole
/// whenever the other is not.
const SLOT: usize = 8 << 20;

/// A place for verdicts.
pub struct Kept {
    file: File,
    from: u64,
}

impl Kept {
    /// The one that the environment names, if it does.
    pub fn named() -> Result<Option<Kept>> {
        match std::env::var(PLACE) {
            Ok(place) => Kept::at(&place).map(Some),
            Err(_) => Ok(None),
        }
    }

    fn at(place: &str) -> Result<Kept> {
        let parts = place.rsplit_once(':');
        let parts = parts.and_then(|(path, from)| Some((path, from.parse().ok()?)));
        let (path, from) = parts.with_context(|| format!("{PLACE}={place} is no place"))?;
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.with_context(|| format!("cannot open {path}"))?;
        Ok(Kept { file, from })
    }

    fn slot(&self, number: usize) -> u64 {
        self.from + (number % 2 * SLOT) as u64
    }

    /// The verdicts that were written last.
    pub fn read(&self) -> Vec<Verdict> {
        let slots = (0..2).filter_map(|number| {
            let mut bytes = vec![0; SLOT];
            self.file
                .read_exact_at(&mut bytes, self.slot(number))
                .ok()?;
            let text = bytes.split(|byte| *byte == 0).next()?;
            serde_json::from_slice(text).ok()
        });
        slots.max_by_key(Vec::len).unwrap_or_default()
    }

    /// Writes all verdicts so far, one more than the last time.
    pub fn write(&self, verdicts: &[Verdict]) -> Result<()> {
        let mut bytes = serde_json::to_vec(verdicts)?;
        // It ends before what was longer.
        bytes.push(0);
        ensure!(bytes.len() <= SLOT, "the verdicts are too long to be kept");
        self.file.write_all_at(&bytes, self.slot(verdicts.len()))?;
        Ok(self.file.sync_data()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_last_is_read_whatever_became_of_the_next() {
        let path = std::env::temp_dir().join(format!("e2e-kept-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        file.set_len(512 + 2 * SLOT as u64).unwrap();
        let kept = Kept::at(&format!("{}:512", path.display())).unwrap();
        let names = || -> Vec<String> { kept.read().into_iter().map(|it| it.name).collect() };
        assert!(names().is_empty());
        let all = ["a/b", "a/c", "b/d"].map(Verdict::passed);
        for count in 1..=all.len() {
            kept.write(&all[..count]).unwrap();
            assert_eq!(names().len(), count);
        }
        // The third was cut off in the middle.
        file.write_all_at(&[b'x'; 8], kept.slot(3) + 20).unwrap();
        assert_eq!(names(), ["a/b", "a/c"]);
        assert!(Kept::at("nowhere").is_err());
        std::fs::remove_file(&path).unwrap();
    }
}
