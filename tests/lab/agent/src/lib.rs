// SPDX-License-Identifier: GPL-2.0-only

//! What a test may ask of the agent in its guest, and what it is told.
//!
//! One JSON object a line in both directions over a serial line: a [`Call`] out, the [`Return`] with
//! the same `id` back. Each call runs on a thread of its own, so a call that blocks (a read of the
//! device, a long command) does not hold up the next, and returns may overtake each other.
//!
//! This file is the whole contract and is compiled into both ends. It knows nothing of VMBus, of
//! VSS or of what is tested.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One line from the test to the agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Call {
    /// Chosen by the test, repeated in the [`Return`].
    pub id: u64,
    /// What to do.
    #[serde(flatten)]
    pub command: Command,
}

/// One line from the agent to the test.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Return {
    /// That of the [`Call`]; 0 for the greeting at the start.
    pub id: u64,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What came of a call.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was done; the shape of the value is named at each [`Command`].
    Done(serde_json::Value),
    /// The system call behind it failed with this errno, by name: `EBUSY`.
    Errno(String),
    /// It could not be tried; the text says why.
    Failed(String),
}

/// What the agent can do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Command {
    /// Runs a program to its end: [`Ended`]. After `timeout_ms` it and its children are killed.
    Run {
        /// Program and arguments; the program is looked up in `PATH`.
        argv: Vec<String>,
        /// Limit in milliseconds.
        timeout_ms: u64,
    },
    /// Starts a program and returns its pid. Its output goes to `log`, which is made or emptied.
    Spawn {
        /// Program and arguments.
        argv: Vec<String>,
        /// A file, best on a tmpfs.
        log: String,
        /// A device from [`Command::DevOpen`] that it has a copy of, as its standard input.
        device: Option<u64>,
    },
    /// Sends a signal to each of these processes, one right after the other, and returns the
    /// agent's clock just before the first, in microseconds.
    Signal {
        /// Whom.
        pids: Vec<i32>,
        /// The signal's number.
        signal: i32,
    },
    /// The agent's clock, in microseconds: that of [`Command::Signal`] and of [`Stalls`]. It is the kernel's
    /// monotonic one, by which its traces can go, too.
    Clock,
    /// Waits until a spawned program has ended: [`Ended`] without output, or `EAGAIN` when it had
    /// not within `timeout_ms`.
    Wait {
        /// As returned by [`Command::Spawn`].
        pid: i32,
        /// Limit in milliseconds.
        timeout_ms: u64,
    },
    /// The pids of the spawned programs that still run.
    Spawned,
    /// The spawned programs that have crashed since the last call, in words: a signal of a crash has ended them which
    /// was not sent by [`Command::Signal`].
    Crashed,
    /// The text of a file, at most 256 KiB of it.
    Read {
        /// Which.
        path: String,
    },
    /// The text of a file from some byte on, as a [`Piece`]: of one that only grows.
    ReadOn {
        /// Which.
        path: String,
        /// That byte.
        from: u64,
    },
    /// Writes text to a file in one write, without creating it: for sysfs and the like.
    Write {
        /// Which.
        path: String,
        /// What.
        text: String,
    },
    /// The kernel's log from a sequence number on: [`Log`].
    Kmsg {
        /// The first record of interest.
        since: u64,
        /// Only records at most this unimportant: 4 is warnings and worse, 7 is all.
        max_level: u8,
    },
    /// Freezes the file system that holds `path`, as an administrator would (FIFREEZE).
    Freeze {
        /// Any path on it.
        path: String,
    },
    /// Thaws the file system that holds `path` (FITHAW); `EINVAL` when it was not frozen.
    Thaw {
        /// Any path on it.
        path: String,
    },
    /// Whether the file system that holds `path` is frozen: [`Frozen`]. It is thawed by that if an
    /// administrator can (FITHAW). What a module of the kernel has frozen for itself is refused to him as is
    /// what was never frozen; so somebody asks to write there besides, for whom a frozen file system has no
    /// answer. Nothing is written.
    AskFrozen {
        /// Any path on it.
        path: String,
        /// How long it may be without an answer, in milliseconds.
        timeout_ms: u64,
    },
    /// From now on each open on the mount at `path` waits for a verdict, as with a security agent:
    /// until a line is written to `log`, or without one until [`Command::ReleaseOpens`]. There is
    /// one such watch at a time.
    WatchOpens {
        /// Where it is mounted.
        path: String,
        /// A file of the agent, on whatever file system.
        log: Option<String>,
    },
    /// Ends the watch and lets everybody pass.
    ReleaseOpens,
    /// Freezes a file system and thaws it at once; returns how long both took, in microseconds.
    FreezeAndThaw {
        /// Any path on it.
        path: String,
    },
    /// Starts a thread that rewrites the first 512 bytes of a file again and again, once in
    /// `every_us`, each at another moment than the others.
    WriterStart {
        /// The file, which is made.
        path: String,
        /// In microseconds.
        every_us: u64,
        /// Whether each write is followed by an fsync, which counts as a part of it.
        fsync: bool,
    },
    /// Starts a writer that appends numbered records to a file, each with an fsync of its own, and
    /// says how far it is on a block device that somebody else reads: see [`Note`]. It is one of the
    /// writers; its writes are the records.
    RecorderStart {
        /// The file, which is made. Each record is its number and a line end, [`RECORD_LEN`] bytes.
        path: String,
        /// The block device.
        notes: String,
        /// Which of the device's blocks is this writer's.
        slot: u64,
        /// From one record to the next, in microseconds.
        every_us: u64,
    },
    /// Starts a session with a database that commits one numbered row after the other, and says how far
    /// it is as [`Command::RecorderStart`] does. It is one of the writers; its writes are the rows.
    CommitterStart {
        /// The client, which does what is written to it and writes its results, a line each.
        argv: Vec<String>,
        /// What commits a row and then prints its number, in one line; `{}` stands for the number.
        statement: String,
        /// The block device.
        notes: String,
        /// Which of the device's blocks is this session's.
        slot: u64,
        /// From one row to the next, in microseconds.
        every_us: u64,
    },
    /// How the writers fare: a list of [`Writer`]s in the order of their start.
    Writers,
    /// The long writes of all writers that had not ended at `since_us` of the agent's clock:
    /// [`Stalls`].
    Stalls {
        /// From when on.
        since_us: u64,
    },
    /// How the writes of each writer fared within a span of the agent's clock: a list of [`Share`]s in the
    /// order of their start.
    WritesWithin {
        /// From when on.
        from_us: u64,
        /// Until when.
        to_us: u64,
    },
    /// Lets all writers rest between two writes, or go on.
    WritersRest {
        /// Whether they are to rest.
        rest: bool,
    },
    /// Forgets how long the writes of every writer took, so that the next one is the first that counts.
    WritersReset,
    /// Ends all writers and forgets them. Fails when one is still inside a write after
    /// `timeout_ms`; that one stays.
    WritersStop {
        /// Limit in milliseconds.
        timeout_ms: u64,
    },
    /// Opens a device for reading and writing and returns a handle.
    DevOpen {
        /// Which.
        path: String,
        /// Whether to pass `O_NONBLOCK`.
        nonblock: bool,
    },
    /// One read of at most `len` bytes; returns them in hexadecimal.
    DevRead {
        /// From [`Command::DevOpen`].
        handle: u64,
        /// Size of the buffer.
        len: usize,
        /// Whether this one must not wait (`RWF_NOWAIT`), however the device was opened.
        nowait: bool,
    },
    /// One write; returns how many bytes were taken.
    DevWrite {
        /// From [`Command::DevOpen`].
        handle: u64,
        /// The bytes in hexadecimal.
        hex: String,
    },
    /// One poll for reading, writing and hang-up; returns the names of what was reported, such as
    /// `["POLLIN"]`, an empty list when the time was over.
    DevPoll {
        /// From [`Command::DevOpen`].
        handle: u64,
        /// Limit in milliseconds; 0 returns at once.
        timeout_ms: u16,
        /// Which of `POLLIN`, `POLLOUT` to ask for.
        events: Vec<String>,
    },
    /// Writes at random to the device, from several threads at once, until all of `writes` are done:
    /// [`Storm`]. Each write is bytes from nowhere or one of the `templates` with something changed;
    /// now and then a thread reads or polls instead. Best on a device opened with `nonblock`.
    DevStorm {
        /// From [`Command::DevOpen`].
        handle: u64,
        /// How many threads.
        threads: u32,
        /// How many writes in all.
        writes: u64,
        /// What the first thread starts from; the next one from one more, and so on.
        seed: u64,
        /// Good messages, in hexadecimal.
        templates: Vec<String>,
    },
    /// One ioctl with an argument in memory. Returns nothing.
    DevIoctl {
        /// From [`Command::DevOpen`].
        handle: u64,
        /// Its number.
        request: u32,
        /// The argument in hexadecimal.
        hex: String,
        /// A descriptor that goes into the argument.
        put: Option<Put>,
        /// Whether the call is made without CAP_SYS_ADMIN.
        unprivileged: bool,
    },
    /// Closes the device. A read that is blocked on it keeps it open until it returns.
    DevClose {
        /// From [`Command::DevOpen`].
        handle: u64,
    },
    /// Closes all devices that are open.
    DevCloseAll,
    /// Starts a thread that freezes and thaws the file system that holds `path` (FIFREEZE, FITHAW)
    /// again and again, and thaws it last.
    NeighbourStart {
        /// Any path on it.
        path: String,
    },
    /// Ends all such threads: a list of [`Neighbour`]s in the order of their start.
    NeighboursStop,
    /// Loads another kernel, which [`Command::Kexec`] starts.
    KexecLoad {
        /// The file with it.
        kernel: String,
        /// The file with its initramfs.
        initrd: String,
        /// Its command line.
        cmdline: String,
    },
    /// Starts the kernel that is loaded in place of this one, at once: programs and file systems are left as
    /// they are. There is no return; the agent that comes with it greets.
    Kexec,
    /// Starts another agent, a process that can be killed, and returns its pid.
    Fork,
    /// Kills all such agents and waits until they are gone.
    ForksEnd,
    /// Does these one after the other, whatever becomes of each: a list of [`Outcome`]s, in their order. The
    /// way to the agent and back takes longer than most of what it does.
    Each {
        /// What.
        all: Vec<Command>,
    },
    /// Has that agent do something.
    In {
        /// From [`Command::Fork`].
        pid: i32,
        /// What.
        does: Box<Command>,
    },
}

/// What came of [`Command::AskFrozen`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Frozen {
    /// It lets nobody wait who writes.
    No,
    /// It was, and FITHAW has thawed it.
    ForAnybody,
    /// There is nothing to thaw for FITHAW, and yet whoever writes has to wait.
    ForItsOwner,
}

/// A descriptor in the argument of an ioctl.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Put {
    /// Where, in bytes from the start; it takes four.
    pub at: usize,
    /// Which.
    pub what: Descriptor,
}

/// A descriptor, for the time of one call.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Descriptor {
    /// Of the file or folder with this path, open for reading.
    Path(String),
    /// The same with `O_PATH`.
    PathOnly(String),
}

/// What one thread of [`Command::NeighbourStart`] has done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// How often it has frozen.
    pub freezes: u64,
    /// How often it has thawed what it had frozen.
    pub thaws: u64,
    /// What it was refused, by errno.
    pub refused: BTreeMap<String, u64>,
}

/// What came of a [`Command::DevStorm`]. An errno is counted by its name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Storm {
    /// Writes that were taken.
    pub taken: u64,
    /// Writes that were refused, by errno, or `in part`.
    pub refused: BTreeMap<String, u64>,
    /// Reads that returned something.
    pub read: u64,
}

/// How a program ended.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Ended {
    /// Its exit status, or `None` when a signal ended it.
    pub status: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Whether the agent killed it because its time was over.
    pub timed_out: bool,
    /// Its standard output, at most 256 KiB of it.
    pub out: String,
    /// Its standard error, likewise.
    pub err: String,
}

/// Bytes of a record of [`Command::RecorderStart`], the line end included.
pub const RECORD_LEN: usize = 9;

/// A record: what the file has at its place.
pub fn record(number: u64) -> String {
    format!("{number:08}\n")
}

/// Bytes of a block of notes.
pub const NOTE_LEN: usize = 512;

/// How far a writer of records is, as it says in its block of the notes: it writes there before it
/// begins with a record, and again when the fsync of that has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note {
    /// The last record that it has begun with.
    pub begun: u64,
    /// The last record whose fsync has returned.
    pub synced: u64,
}

impl Note {
    /// The note in a block, if it is one.
    pub fn parse(block: &[u8]) -> Option<Note> {
        let number = |at: usize| {
            let bytes = block.get(at..at + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        Some(Note {
            begun: number(0)?,
            synced: number(8)?,
        })
    }

    /// A block with the note.
    pub fn block(self) -> [u8; NOTE_LEN] {
        let mut block = [0; NOTE_LEN];
        block[..8].copy_from_slice(&self.begun.to_le_bytes());
        block[8..16].copy_from_slice(&self.synced.to_le_bytes());
        block
    }
}

/// How one writer fares. Times are in microseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Writer {
    /// The file it writes.
    pub path: String,
    /// Writes that have ended well.
    pub count: u64,
    /// Writes that have failed.
    pub errors: u64,
    /// The longest write so far, the one in progress included.
    pub longest_us: u64,
    /// For how long the write in progress has been going on; 0 between two writes.
    pub in_write_us: u64,
}

/// What of a writer's writes fell into a span of time. Of a write that began before it or ended after it
/// the part counts that is within. A write that has not ended yet does not count.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// The file it writes.
    pub path: String,
    /// How long each such part is, in microseconds.
    pub parts_us: Vec<u64>,
}

/// Which writes took long, by the agent's clock. The writers themselves note when one began and
/// ended, so that a look that comes late sees no less.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Stalls {
    /// When this was put together.
    pub now_us: u64,
    /// The writes that took at least [`STALL_US`], those in progress included, oldest first for
    /// each writer.
    pub stalls: Vec<Stall>,
}

/// How long a write takes at least to be kept as a [`Stall`]: longer than nearly all that wait for
/// nothing but the processor.
pub const STALL_US: u64 = 20_000;

/// One long write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stall {
    /// The writer's file.
    pub path: String,
    /// When it began.
    pub began_us: u64,
    /// When it ended, if it has.
    pub ended_us: Option<u64>,
}

/// A piece of a file that grows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// The byte behind it.
    pub next: u64,
    /// Its text.
    pub text: String,
}

/// A piece of the kernel's log.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Log {
    /// The sequence number that the next record will have.
    pub next: u64,
    /// How many records were overwritten before they could be read.
    pub lost: u64,
    /// The records, oldest first.
    pub records: Vec<Record>,
    /// Whether there are more from `next` on: a reply has at most [`MOST_LOGGED`], since each byte on the line
    /// takes its time.
    pub more: bool,
}

/// Bytes of text in one [`Log`], or those of its last record more.
pub const MOST_LOGGED: usize = 32 << 10;

/// One record of the kernel's log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// 0 (emergency) to 7 (debug).
    pub level: u8,
    /// When, in microseconds since boot.
    pub at_us: u64,
    /// The text.
    pub text: String,
}

/// Zeros in a row from which on [`to_hex`] says how many there are: each byte on the line costs the guest
/// an exit to its monitor, and frames are mostly zeros.
const RUN: usize = 8;

/// Bytes as two hexadecimal digits each, and long runs of zeros as their number in parentheses.
pub fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    // Writing to a String cannot fail.
    for group in bytes.chunk_by(|a, b| (*a == 0) == (*b == 0)) {
        if group.len() >= RUN && group.first() == Some(&0) {
            let _ = write!(text, "({})", group.len());
        } else {
            group.iter().for_each(|byte| {
                let _ = write!(text, "{byte:02x}");
            });
        }
    }
    text
}

/// The bytes behind [`to_hex`], or `None` when the text is not such.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        if let Some(run) = rest.strip_prefix('(') {
            let (count, after) = run.split_once(')')?;
            bytes.resize(bytes.len() + count.parse::<usize>().ok()?, 0);
            rest = after;
        } else {
            let (byte, after) = rest.split_at_checked(2)?;
            bytes.push(u8::from_str_radix(byte, 16).ok()?);
            rest = after;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_survive_the_line_and_zeros_are_cheap() {
        let long = [&[7][..], &[0; 6000], &[1, 0, 0, 2], &[0; 8]].concat();
        assert_eq!(to_hex(&long), "07(6000)01000002(8)");
        for bytes in [&[][..], &[0], &[0; 7], &[0xff; 20], &long] {
            assert_eq!(from_hex(&to_hex(bytes)).as_deref(), Some(bytes));
        }
        for bad in ["0", "0g", "(", "(8", "(x)", "00)", "\u{e4}"] {
            assert_eq!(from_hex(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_call_is_one_flat_object() {
        let call = Call {
            id: 7,
            command: Command::Thaw { path: "/".into() },
        };
        let line = serde_json::to_string(&call).expect("plain data");
        assert_eq!(line, r#"{"id":7,"command":"thaw","path":"/"}"#);
    }

    #[test]
    fn a_call_for_another_agent_comes_out_as_it_went_in() {
        let does = Command::DevIoctl {
            handle: 1,
            request: 0x4020_b956,
            hex: "00".into(),
            put: Some(Put {
                at: 8,
                what: Descriptor::Path("/mnt".into()),
            }),
            unprivileged: false,
        };
        let call = Call {
            id: 7,
            command: Command::In {
                pid: 12,
                does: Box::new(does),
            },
        };
        let line = serde_json::to_string(&call).expect("plain data");
        let back: Call = serde_json::from_str(&line).expect("as it was written");
        assert_eq!(format!("{back:?}"), format!("{call:?}"));
    }

    #[test]
    fn a_return_says_how_it_went() {
        let line = r#"{"id":7,"errno":"EBUSY"}"#;
        let back: Return = serde_json::from_str(line).expect("as the agent writes it");
        assert!(matches!(back.outcome, Outcome::Errno(name) if name == "EBUSY"));
    }

    #[test]
    fn a_note_goes_there_and_back() {
        let note = Note {
            begun: 300,
            synced: 299,
        };
        assert_eq!(Note::parse(&note.block()), Some(note));
        assert_eq!(Note::parse(&[0; 15]), None);
        assert_eq!(record(7).len(), RECORD_LEN);
    }

    #[test]
    fn hexadecimal_goes_there_and_back() {
        let bytes = [0, 0x5f, 0xff];
        assert_eq!(to_hex(&bytes), "005fff");
        assert_eq!(from_hex("005fff").as_deref(), Some(&bytes[..]));
        assert_eq!(from_hex("005ff"), None);
        assert_eq!(from_hex("zz"), None);
    }
}
