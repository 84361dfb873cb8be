// SPDX-License-Identifier: GPL-2.0

//! What can be seen of the module: tracepoints, the log, the texts in debugfs.
//!
//! What a host or a daemon can cause at will must not fill the log: the kernel crate has no
//! rate-limited macros, so the limit is asked for in C, as are the tracepoints. Traces are called
//! under locks, in any context. A line for the log, which a slow console may keep for long, waits
//! in a [`Log`] until the lock is released.

use crate::bindings as c;
use crate::compat::error;
use crate::engine;
use crate::engine::hold::Stage;
use crate::engine::Engine;
use crate::engine::Note;
use crate::engine::Refusal;
use crate::engine::Subject;
use crate::hold::Line;
use crate::Parameters;
use core::ops::DerefMut;
use kernel::bindings::EBADMSG;
use kernel::bindings::EPROTO;
use kernel::bindings::ESTALE;
use kernel::fmt;
use kernel::prelude::*;

/// `pr_warn!`, with one limit over all warnings of the module.
macro_rules! warn_limited {
    ($($arg:tt)*) => {
        // SAFETY: The function takes nothing and may be called from any context.
        if unsafe { c::hv_vss_may_warn() } {
            pr_warn!($($arg)*);
        }
    };
}

/// Calls a tracepoint of `trace.h`.
macro_rules! trace {
    ($function:ident($($arg:expr),*)) => {
        // SAFETY: The function takes integers only and may be called from any context.
        unsafe { c::$function($($arg),*) }
    };
}

/// The errno of a refused write; `hv_vss.h` documents them.
pub(crate) fn errno(refusal: Refusal) -> Error {
    match refusal {
        Refusal::Malformed => EINVAL,
        Refusal::OutOfTurn => error(EPROTO),
        Refusal::Stale => error(ESTALE),
        Refusal::WrongOperation => error(EBADMSG),
    }
}

fn request(subject: Subject, stage: u32) {
    trace!(hv_vss_trace_request(
        subject.id,
        subject.transaction,
        subject.operation,
        stage
    ));
}

fn answer(subject: Subject, status: u32, latency_us: u64) {
    trace!(hv_vss_trace_answer(
        subject.id,
        subject.transaction,
        subject.operation,
        status,
        latency_us
    ));
}

/// Traces one note.
pub(crate) fn trace(note: Note) {
    match note {
        Note::Negotiated { framework, message } => trace!(hv_vss_trace_negotiated(
            framework.major,
            framework.minor,
            message.major,
            message.minor
        )),
        Note::NotNegotiated => trace!(hv_vss_trace_negotiated(0, 0, 0, 0)),
        // CAST: a packet is no longer than its ring.
        Note::BadPacket { len } => trace!(hv_vss_trace_bad_packet(len as u64)),
        Note::Received(subject) => request(subject, c::HV_VSS_STAGE_RECEIVED),
        Note::Held(subject) => request(subject, c::HV_VSS_STAGE_HELD),
        Note::Offered(subject) => request(subject, c::HV_VSS_STAGE_OFFERED),
        Note::Read(subject) => request(subject, c::HV_VSS_STAGE_READ),
        Note::TimedOut(subject) => request(subject, c::HV_VSS_STAGE_TIMED_OUT),
        Note::Direct { subject, status } => answer(subject, status, 0),
        Note::Answered {
            subject,
            status,
            latency_us,
        } => answer(subject, status, latency_us),
        // That it is failed its answer says.
        Note::NotSent | Note::Unvouched(_) | Note::Refused { .. } => {}
        Note::Registered { abi } => trace!(hv_vss_trace_daemon(abi)),
        Note::Released => trace!(hv_vss_trace_daemon(0)),
        Note::Broken { id, reason } => trace!(hv_vss_trace_broken(id, reason)),
        Note::BadFrame { refusal } => {
            trace!(hv_vss_trace_bad_frame(errno(refusal).to_errno()));
        }
    }
}

/// Says in the log what an operator should know of.
fn print(note: Note) {
    match note {
        Note::NotNegotiated => {
            warn_limited!("the host offers no version that this module speaks\n");
        }
        Note::BadPacket { len } => {
            warn_limited!("dropped a packet of {len} bytes that is no VSS message\n");
        }
        Note::TimedOut(Subject { id, operation, .. }) => {
            warn_limited!("request {id} (operation {operation}): time is over\n");
        }
        Note::Refused { subject, why } => {
            let (operation, why) = (subject.operation, why.as_str());
            warn_limited!("failed a request (operation {operation}) at once: {why}\n");
        }
        Note::NotSent => warn_limited!("an answer could not be sent to the host\n"),
        Note::Broken { id, reason } => {
            warn_limited!(
                "freeze {id} did not last (reason {reason}): its backup will be failed\n"
            );
        }
        Note::Unvouched(Subject { id, .. }) => {
            warn_limited!(
                "request {id}: THAW fails, its freeze would be from before the module was loaded\n"
            );
        }
        Note::BadFrame { refusal } => {
            warn_limited!("refused a write of the daemon: {}\n", refusal.as_str());
        }
        Note::Negotiated { .. }
        | Note::Received(_)
        | Note::Held(_)
        | Note::Offered(_)
        | Note::Read(_)
        | Note::Direct { .. }
        | Note::Answered { .. }
        | Note::Registered { .. }
        | Note::Released => {}
    }
}

/// Notes of one event at the most that are kept for the log: more than the limit lets through.
const KEPT: usize = 10;

/// What there is to say in the log once the lock is released.
pub(crate) struct Log {
    notes: [Option<Note>; KEPT],
    kept: usize,
    ring: Option<Error>,
}

impl Log {
    /// Nothing.
    pub(crate) fn new() -> Self {
        Log {
            notes: [None; KEPT],
            kept: 0,
            ring: None,
        }
    }

    /// Keeps a note; what is too much is in the trace only.
    pub(crate) fn keep(&mut self, note: Note) {
        if let Some(place) = self.notes.get_mut(self.kept) {
            *place = Some(note);
            self.kept += 1;
        }
    }

    /// The ring to the host can no longer be read.
    pub(crate) fn ring_failed(&mut self, error: Error) {
        self.ring = Some(error);
    }

    /// Says it. Not under a lock.
    pub(crate) fn print(self) {
        self.notes.into_iter().flatten().for_each(print);
        if let Some(error) = self.ring {
            pr_err!("the channel's ring is broken ({error:?}): of no use until it is bound anew\n");
        }
    }
}

/// Traces a freeze of the module's own, for request `id`.
pub(crate) fn froze(id: u64, device: (u32, u32), result: Result, us: i64) {
    trace!(hv_vss_trace_freeze(
        id,
        device.0,
        device.1,
        code(result),
        us
    ));
}

/// Traces a thaw of the module's own, and says so when it has failed for the first time.
pub(crate) fn thawed(id: u64, device: (u32, u32), result: Result, us: i64, first: bool) {
    trace!(hv_vss_trace_thaw(id, device.0, device.1, code(result), us));
    match result {
        Err(error) if first => {
            let (major, minor) = device;
            warn_limited!("file system {major}:{minor} could not be thawed: {error:?}\n");
        }
        _ => {}
    }
}

fn code(result: Result) -> c_int {
    result.err().map_or(0, Error::to_errno)
}

/// What the `state` file in debugfs says.
pub(crate) struct Snapshot {
    stats: engine::Stats,
    versions: Option<(engine::Version, engine::Version)>,
    abi: u32,
    freeze: &'static str,
    next_freeze: &'static str,
    stage: &'static str,
    request: Option<(u64, u8)>,
    queued: usize,
}

impl Snapshot {
    /// Copies it. Under the lock.
    pub(crate) fn of<B: DerefMut<Target = [u8]>>(engine: &Engine<B>) -> Self {
        Snapshot {
            stats: *engine.stats(),
            versions: engine.versions(),
            abi: engine.abi(),
            freeze: engine.freeze_state(),
            next_freeze: engine.next_freeze(),
            stage: engine.stage_name(),
            request: engine.open_request(),
            queued: engine.queued(),
        }
    }

    /// Writes it: a name and its values on each line.
    pub(crate) fn write(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stats = &self.stats;
        let (framework, vss) = self.versions.unwrap_or_default();
        writeln!(out, "framework {}.{}", framework.major, framework.minor)?;
        writeln!(out, "vss {}.{}", vss.major, vss.minor)?;
        writeln!(out, "daemon_abi {}", self.abi)?;
        writeln!(out, "freeze_state {}", self.freeze)?;
        writeln!(out, "next_freeze {}", self.next_freeze)?;
        let (id, operation) = self.request.unwrap_or_default();
        writeln!(out, "request {} {id} {operation}", self.stage)?;
        writeln!(out, "open_requests {}", self.queued)?;
        writeln!(out, "negotiations {}", stats.negotiations)?;
        writeln!(out, "registrations {}", stats.registrations)?;
        writeln!(out, "bad_packets {}", stats.bad_packets)?;
        let engine::BadFrames {
            malformed,
            out_of_turn,
            stale,
            wrong_operation,
        } = stats.bad_frames;
        writeln!(out, "malformed_frames {malformed}")?;
        writeln!(out, "frames_out_of_turn {out_of_turn}")?;
        writeln!(out, "stale_frames {stale}")?;
        writeln!(out, "frames_for_another_operation {wrong_operation}")?;
        writeln!(out, "overruns {}", stats.overruns)?;
        writeln!(out, "unsent {}", stats.unsent)?;
        writeln!(out, "broken_freezes {}", stats.broken)?;
        writeln!(out, "# operation requests failures timeouts last_us max_us")?;
        for (name, op) in engine::OPS.iter().zip(stats.ops) {
            writeln!(
                out,
                "{name} {} {} {} {} {}",
                op.requests, op.failures, op.timeouts, op.last_us, op.max_us
            )?;
        }
        Ok(())
    }
}

/// The head of the `held` file in debugfs.
pub(crate) fn held_head(out: &mut fmt::Formatter<'_>) -> fmt::Result {
    writeln!(out, "# device type state for_ms request error")
}

/// A line of it: one file system that is frozen, or on the way to or from there.
pub(crate) fn held(line: &Line, out: &mut fmt::Formatter<'_>) -> fmt::Result {
    let (major, minor) = line.identity.device;
    let (kind, stage) = (line.identity.kind(), line.stage.as_str());
    let for_ms = line.since.elapsed().as_millis();
    let error = match line.stage {
        Stage::Thawing(Some(error)) => error.to_errno(),
        _ => 0,
    };
    writeln!(
        out,
        "{major}:{minor} {kind} {stage} {for_ms} {} {error}",
        line.id
    )
}

/// The text of the `parameters` file in debugfs.
pub(crate) fn parameters(parameters: &Parameters, out: &mut fmt::Formatter<'_>) -> fmt::Result {
    let Parameters {
        freeze_timeout_ms,
        timeout_ms,
        grace_ms,
        hold_ms,
    } = *parameters;
    writeln!(out, "freeze_timeout_ms {freeze_timeout_ms}")?;
    writeln!(out, "timeout_ms {timeout_ms}")?;
    writeln!(out, "grace_ms {grace_ms}")?;
    writeln!(out, "hold_ms {hold_ms}")
}
