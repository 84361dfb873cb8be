// SPDX-License-Identifier: GPL-2.0

//! What the engine notes goes to the trace and, if an operator should know of it, to the log.
//!
//! What a host or a daemon can cause at will must not fill the log: the kernel crate has no
//! rate-limited macros, so the limit is asked for in C, as are the tracepoints. Called under the
//! lock, in any context.

use crate::bindings as c;
use crate::compat::error;
use crate::engine::Note;
use crate::engine::Refusal;
use crate::engine::Subject;
use kernel::bindings::EBADMSG;
use kernel::bindings::EPROTO;
use kernel::bindings::ESTALE;
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

/// Reports one note.
pub(crate) fn note(note: Note) {
    match note {
        Note::Negotiated { framework, message } => trace!(hv_vss_trace_negotiated(
            framework.major,
            framework.minor,
            message.major,
            message.minor
        )),
        Note::NotNegotiated => {
            trace!(hv_vss_trace_negotiated(0, 0, 0, 0));
            warn_limited!("the host offers no version that this module speaks\n");
        }
        Note::BadPacket { len } => {
            // CAST: a packet is no longer than its ring.
            trace!(hv_vss_trace_bad_packet(len as u64));
            warn_limited!("dropped a packet of {len} bytes that is no VSS message\n");
        }
        Note::Received(subject) => request(subject, c::HV_VSS_STAGE_RECEIVED),
        Note::Held(subject) => request(subject, c::HV_VSS_STAGE_HELD),
        Note::Offered(subject) => request(subject, c::HV_VSS_STAGE_OFFERED),
        Note::Read(subject) => request(subject, c::HV_VSS_STAGE_READ),
        Note::TimedOut(subject) => {
            request(subject, c::HV_VSS_STAGE_TIMED_OUT);
            let Subject { id, operation, .. } = subject;
            warn_limited!("request {id} (operation {operation}): time is over\n");
        }
        Note::Direct { subject, status } => answer(subject, status, 0),
        Note::Answered {
            subject,
            status,
            latency_us,
        } => answer(subject, status, latency_us),
        Note::NotSent => warn_limited!("an answer could not be sent to the host\n"),
        Note::Registered { abi } => trace!(hv_vss_trace_daemon(abi)),
        Note::Released => trace!(hv_vss_trace_daemon(0)),
        Note::Broken { id, reason } => {
            trace!(hv_vss_trace_broken(id, reason));
            warn_limited!(
                "freeze {id} did not last (reason {reason}): its backup will be failed\n"
            );
        }
        Note::BadFrame { refusal } => {
            trace!(hv_vss_trace_bad_frame(errno(refusal).to_errno()));
            warn_limited!("refused a write of the daemon: {}\n", refusal.as_str());
        }
    }
}
