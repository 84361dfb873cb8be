// SPDX-License-Identifier: GPL-2.0-only

//! Files of the kernel: its log, and text in proc and sysfs.

use crate::error::Error;
use lab_agent::{Log, Record};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;

/// The most that is read of one file: the serial line is slow.
pub const MAX_TEXT: u64 = 256 * 1024;

/// The text of a file; what is not UTF-8 is replaced.
pub fn read_file(path: &str) -> Result<String, Error> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_TEXT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Writes `text` to an existing file in one write.
pub fn write_file(path: &str, text: &str) -> Result<(), Error> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}

/// The kernel's log from record `since` on, without records above `max_level`.
pub fn log(since: u64, max_level: u8) -> Result<Log, Error> {
    let mut kmsg = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open("/dev/kmsg")?;
    let mut log = Log {
        next: since,
        ..Log::default()
    };
    // Larger than any record (PRINTK_MESSAGE_MAX is 2048); one read returns one record.
    let mut buffer = [0; 8192];
    loop {
        let len = match kmsg.read(&mut buffer) {
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
                log.records.push(record);
            }
        }
    }
    Ok(log)
}

/// Parses `priority,sequence,microseconds,flags;text\n` (`Documentation/ABI/testing/dev-kmsg`).
fn parse(line: &str) -> Option<(u64, Record)> {
    let (head, rest) = line.split_once(';')?;
    let mut fields = head.split(',');
    let priority: u32 = fields.next()?.parse().ok()?;
    let sequence = fields.next()?.parse().ok()?;
    let at_us = fields.next()?.parse().ok()?;
    let record = Record {
        level: (priority & 7) as u8,
        at_us,
        text: rest.lines().next()?.to_owned(),
    };
    Some((sequence, record))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_the_log_is_taken_apart() {
        let (sequence, record) =
            parse("4,339,5140900,-;NET: a warning; really\n DEVICE=+x\n").expect("well formed");
        assert_eq!(sequence, 339);
        assert_eq!(record.level, 4);
        assert_eq!(record.at_us, 5_140_900);
        assert_eq!(record.text, "NET: a warning; really");
        assert!(parse("nonsense").is_none());
    }
}
