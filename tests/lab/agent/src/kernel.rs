// SPDX-License-Identifier: GPL-2.0-only

//! Files of the kernel: its log, and text in proc and sysfs.

use crate::error::Error;
use crate::lock;
use lab_agent::{Log, Piece, Record, MOST_LOGGED};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Mutex;

/// The most that is read of one file: the serial line is slow.
pub const MAX_TEXT: u64 = 256 * 1024;

/// The text of a file; what is not UTF-8 is replaced.
pub fn read_file(path: &str) -> Result<String, Error> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_TEXT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The text of a file from that byte on, as far as it has come: what is not UTF-8 is replaced, but for a
/// character at the end whose rest is on its way.
pub fn read_on(path: &str, from: u64) -> Result<Piece, Error> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(MAX_TEXT).read_to_end(&mut bytes)?;
    let cut = match bytes.utf8_chunks().last() {
        Some(last) if cut_off(last.invalid()) => last.invalid().len(),
        _ => 0,
    };
    bytes.truncate(bytes.len() - cut);
    Ok(Piece {
        next: from + bytes.len() as u64,
        text: String::from_utf8_lossy(&bytes).into_owned(),
    })
}

/// Whether these bytes, which are no character, begin one.
fn cut_off(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

/// Writes `text` to an existing file in one write.
pub fn write_file(path: &str, text: &str) -> Result<(), Error> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}

/// The kernel's log. It can be read from its oldest record on or from where a reader has come, and each record is
/// a call of its own: one that goes on where the last one has ended is spared all that was logged before.
#[derive(Default)]
pub struct KernelLog {
    /// A reader, and the number of the record that it comes to next.
    reader: Mutex<Option<(File, u64)>>,
}

impl KernelLog {
    /// The records from `since` on, without those above `max_level`: as much as fits into a reply.
    pub fn records(&self, since: u64, max_level: u8) -> Result<Log, Error> {
        let mut reader = lock(&self.reader);
        // After an error nobody knows where it is.
        let mut kmsg = match reader.take().filter(|(_, next)| *next <= since) {
            Some((kmsg, _)) => kmsg,
            None => OpenOptions::new()
                .read(true)
                .custom_flags(nix::libc::O_NONBLOCK)
                .open("/dev/kmsg")?,
        };
        let log = take(|record| kmsg.read(record), since, max_level)?;
        *reader = Some((kmsg, log.next));
        Ok(log)
    }
}

/// As much of the log as fits into a reply, from whoever gives one record at each call.
fn take(
    mut read: impl FnMut(&mut [u8]) -> io::Result<usize>,
    since: u64,
    max_level: u8,
) -> Result<Log, Error> {
    let mut log = Log {
        next: since,
        ..Log::default()
    };
    // Larger than any record (PRINTK_MESSAGE_MAX is 2048); one read returns one record.
    let mut buffer = [0; 8192];
    let mut logged = 0;
    loop {
        let len = match read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            // EPIPE: the record was overwritten; the next read gives the oldest that is left, whose
            // number says how many are missing.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => continue,
            Err(error) => return Err(error.into()),
        };
        let text = String::from_utf8_lossy(buffer.get(..len).unwrap_or(&[])).into_owned();
        let Some((sequence, record)) = parse(&text) else {
            continue;
        };
        if sequence >= since {
            log.lost += sequence - log.next;
            log.next = sequence + 1;
            if record.level <= max_level {
                logged += record.text.len();
                log.records.push(record);
            }
            if logged >= MOST_LOGGED {
                log.more = true;
                break;
            }
        }
    }
    Ok(log)
}

/// The level of what merely informs.
const INFORMATION: u8 = 6;

/// Parses `priority,sequence,microseconds,flags;text\n` (`Documentation/ABI/testing/dev-kmsg`).
fn parse(line: &str) -> Option<(u64, Record)> {
    let (head, rest) = line.split_once(';')?;
    let mut fields = head.split(',');
    let priority: u32 = fields.next()?.parse().ok()?;
    let sequence = fields.next()?.parse().ok()?;
    let at_us = fields.next()?.parse().ok()?;
    // The kernel's own facility is 0. What programs write there is no warning of it, whatever they call it.
    let level = match priority >> 3 {
        0 => (priority & 7) as u8,
        _ => INFORMATION,
    };
    let record = Record {
        level,
        at_us,
        text: rest.lines().next()?.to_owned(),
    };
    Some((sequence, record))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_grows_is_read_piece_by_piece() {
        let path = std::env::temp_dir().join(format!("lab-agent-{}", std::process::id()));
        let path = path.to_str().unwrap();
        let mut file = File::create(path).unwrap();
        // "ü" comes in two halves, and 0xff is nothing at all.
        let mut next = 0;
        let pieces: [(&[u8], &str); 4] = [
            (b"one \xff\n", "one \u{fffd}\n"),
            (b"f\xc3", "f"),
            (b"\xbcnf", "\u{fc}nf"),
            (b"", ""),
        ];
        for (bytes, text) in pieces {
            file.write_all(bytes).unwrap();
            let piece = read_on(path, next).unwrap();
            assert_eq!(piece.text, text);
            next = piece.next;
        }
        assert_eq!(next, 11);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_long_log_is_read_piece_by_piece() {
        const RECORDS: u64 = 50;
        let text = "x".repeat(2000);
        // Each time from the oldest one that is left.
        let piece = |since| {
            let mut sequence = 10;
            let read = |buffer: &mut [u8]| {
                if sequence == RECORDS {
                    return Err(ErrorKind::WouldBlock.into());
                }
                let level = if sequence % 2 == 0 { 4 } else { 6 };
                let record = format!("{level},{sequence},1,-;{text}\n");
                sequence += 1;
                let mut buffer = buffer;
                buffer.write_all(record.as_bytes())?;
                Ok(record.len())
            };
            take(read, since, 4).unwrap()
        };
        let (mut next, mut records, mut pieces) = (0, 0, 0);
        loop {
            let log = piece(next);
            let size: usize = log.records.iter().map(|it| it.text.len()).sum();
            assert!(size < MOST_LOGGED + text.len());
            assert_eq!(log.lost, if next == 0 { 10 } else { 0 });
            (next, records, pieces) = (log.next, records + log.records.len(), pieces + 1);
            if !log.more {
                break;
            }
        }
        assert_eq!((next, records, pieces), (RECORDS, 20, 2));
    }

    #[test]
    fn a_record_of_the_log_is_taken_apart() {
        let (sequence, record) =
            parse("4,339,5140900,-;NET: a warning; really\n DEVICE=+x\n").expect("well formed");
        assert_eq!(sequence, 339);
        assert_eq!(record.level, 4);
        assert_eq!(record.at_us, 5_140_900);
        assert_eq!(record.text, "NET: a warning; really");
        assert!(parse("nonsense").is_none());
        // A program's: facility 3, level 4.
        let (_, record) = parse("28,340,5140901,-;systemd[1]: a module is missing\n").unwrap();
        assert_eq!(record.level, INFORMATION);
    }
}
