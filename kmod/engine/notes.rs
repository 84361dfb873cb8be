// SPDX-License-Identifier: GPL-2.0

//! What can be seen of the machine from outside: notes for log and trace, and counters.
//!
//! Knows no protocol rules; it only names what happened and adds up.

use super::frames::Refusal;
use super::uapi::op;
use super::wire::Version;

/// The request that a note is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    /// The id that a v2 daemon sees; 0 when the daemon has no part in it.
    pub id: u64,
    /// The host's own number for it, from the descriptor of its packet; 0 when it is no host's.
    pub transaction: u64,
    /// Its operation.
    pub operation: u8,
}

/// Something that happened, for the log and the tracepoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// The host and this module agreed on versions.
    Negotiated {
        /// Framework version.
        framework: Version,
        /// VSS version.
        message: Version,
    },
    /// The host offered nothing that this module speaks, or a malformed list.
    NotNegotiated,
    /// A packet of this many bytes was dropped: too short, or not for VSS.
    BadPacket {
        /// Length of the packet.
        len: usize,
    },
    /// A request for the daemon arrived; without a transaction it is a THAW that nobody asked for.
    Received(Subject),
    /// A request was answered at once in here, or refused because there was no room for it.
    Direct {
        /// Which, without an id.
        subject: Subject,
        /// What the host was told.
        status: u32,
    },
    /// A request was refused at once, for that.
    Refused {
        /// Which, without an id.
        subject: Subject,
        /// Why.
        why: NotNow,
    },
    /// There is no daemon: the request waits for one.
    Held(Subject),
    /// The request can be read by the daemon.
    Offered(Subject),
    /// The daemon has read the request.
    Read(Subject),
    /// The time of the request is over.
    TimedOut(Subject),
    /// The request is closed: the host was told `status` (nobody was, for a THAW that was owed).
    Answered {
        /// Which.
        subject: Subject,
        /// What the host was told.
        status: u32,
        /// From its arrival to the answer.
        latency_us: u64,
    },
    /// A packet could not be sent: no room in the ring, or no channel.
    NotSent,
    /// A daemon registered with this ABI version.
    Registered {
        /// 1 or 2.
        abi: u32,
    },
    /// The registered daemon closed the device.
    Released,
    /// The freeze did not last until the host's THAW, which will be failed.
    Broken {
        /// Id of the FREEZE.
        id: u64,
        /// One of [`super::uapi::thawed`], or what the daemon gave as such.
        reason: u32,
    },
    /// A THAW that the daemon has done is failed, since no FREEZE has ended since the module was loaded.
    Unvouched(Subject),
    /// A write of the daemon was refused.
    BadFrame {
        /// Why.
        refusal: Refusal,
    },
}

/// Why a request of the host is refused at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotNow {
    /// The machine is about to sleep.
    Sleeps,
    /// The daemon has yet to give up the FREEZE before it.
    CallsOff,
    /// It is too long to be kept, or too many are open.
    Full,
}

impl NotNow {
    /// In words.
    pub fn as_str(self) -> &'static str {
        match self {
            NotNow::Sleeps => "the machine is about to sleep",
            NotNow::CallsOff => "the daemon has yet to give up the FREEZE before it",
            NotNow::Full => "it finds no room: it is too long, or too many are open",
        }
    }
}

/// Operations that have counters of their own; all others share the last entry.
pub const OPS: [&str; 5] = ["hot_backup", "get_dm_info", "freeze", "thaw", "other"];

/// Counters of one kind of operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpStats {
    /// Requests that came from the host.
    pub requests: u64,
    /// Requests answered with a status other than success.
    pub failures: u64,
    /// Requests whose time ran out.
    pub timeouts: u64,
    /// Latency of the last answer.
    pub last_us: u64,
    /// Longest latency of an answer.
    pub max_us: u64,
}

/// Counters of refused writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BadFrames {
    /// See [`Refusal::Malformed`].
    pub malformed: u64,
    /// See [`Refusal::OutOfTurn`].
    pub out_of_turn: u64,
    /// See [`Refusal::Stale`].
    pub stale: u64,
    /// See [`Refusal::WrongOperation`].
    pub wrong_operation: u64,
}

impl BadFrames {
    /// Counts one more.
    pub(super) fn count(&mut self, refusal: Refusal) {
        bump(match refusal {
            Refusal::Malformed => &mut self.malformed,
            Refusal::OutOfTurn => &mut self.out_of_turn,
            Refusal::Stale => &mut self.stale,
            Refusal::WrongOperation => &mut self.wrong_operation,
        });
    }
}

/// All counters since the module took the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// One entry for each of [`OPS`].
    pub ops: [OpStats; OPS.len()],
    /// Negotiations answered.
    pub negotiations: u64,
    /// Packets dropped because they were malformed or not for VSS.
    pub bad_packets: u64,
    /// Writes refused, for each reason.
    pub bad_frames: BadFrames,
    /// Requests failed because too many were open.
    pub overruns: u64,
    /// Answers that could not be sent.
    pub unsent: u64,
    /// Registrations accepted.
    pub registrations: u64,
    /// Freezes that did not last until the host's THAW.
    pub broken: u64,
}

impl Stats {
    /// The counters of `operation`.
    pub(super) fn op(&mut self, operation: u8) -> &mut OpStats {
        let [hot_backup, get_dm_info, freeze, thaw, other] = &mut self.ops;
        match operation {
            op::HOT_BACKUP => hot_backup,
            op::GET_DM_INFO => get_dm_info,
            op::FREEZE => freeze,
            op::THAW => thaw,
            _ => other,
        }
    }
}

/// Counts one more, for ever.
pub(super) fn bump(counter: &mut u64) {
    *counter = counter.wrapping_add(1);
}
