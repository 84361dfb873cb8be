// SPDX-License-Identifier: GPL-2.0-only

//! The text of the guest's first serial port: kept in memory, written to a file, shown to people.

use crate::bus::lock;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, LineWriter, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Bytes of text that are kept in memory, and those that an error message shows.
const KEEP: usize = 4 << 20;
const TAIL: usize = 4096;

struct State {
    text: VecDeque<u8>,
    log: Option<LineWriter<File>>,
    stdout: bool,
}

/// Where the console's text ends up.
pub(crate) struct Console {
    state: Mutex<State>,
}

impl Console {
    /// A console that also writes to a file, which is created, and to the standard output.
    pub(crate) fn new(log: Option<&Path>, stdout: bool) -> io::Result<Self> {
        let log = log.map(File::create).transpose()?.map(LineWriter::new);
        let text = VecDeque::new();
        Ok(Console {
            state: Mutex::new(State { text, log, stdout }),
        })
    }

    /// All text that is kept.
    pub(crate) fn text(&self) -> String {
        self.last(KEEP)
    }

    /// The last lines of it.
    pub(crate) fn tail(&self) -> String {
        self.last(TAIL)
    }

    fn last(&self, bytes: usize) -> String {
        let state = lock(&self.state);
        let skip = state.text.len().saturating_sub(bytes);
        let bytes: Vec<u8> = state.text.iter().skip(skip).copied().collect();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// Brings what is buffered to the file.
    pub(crate) fn flush(&self) -> io::Result<()> {
        match &mut lock(&self.state).log {
            Some(log) => log.flush(),
            None => Ok(()),
        }
    }
}

/// The serial port's way in.
#[derive(Clone)]
pub(crate) struct ConsoleWriter(pub Arc<Console>);

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = lock(&self.0.state);
        state.text.extend(bytes);
        let excess = state.text.len().saturating_sub(KEEP);
        state.text.drain(..excess);
        if state.stdout {
            // The standard output is line buffered; nobody may be reading it.
            let _ = io::stdout().write_all(bytes);
        }
        if let Some(log) = &mut state.log {
            log.write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // The serial port flushes after every byte; lines are what matters.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_last_part_of_the_text() {
        let console = Arc::new(Console::new(None, false).unwrap());
        let mut writer = ConsoleWriter(console.clone());
        for line in 0..1000 {
            write!(writer, "line {line}\r\n").unwrap();
        }
        assert!(console.text().starts_with("line 0\nline 1\n"));
        assert!(console.tail().ends_with("line 998\nline 999\n"));
        assert!(console.tail().len() <= TAIL);
    }
}
