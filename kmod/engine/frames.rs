// SPDX-License-Identifier: GPL-2.0

//! What the daemon writes and reads: v1 messages and v2 frames as bytes.
//!
//! Knows layouts only: whether a frame is in turn is the machine's business. Bytes become one of
//! [`First`] or [`Frame`] here, once, and are not looked at again.

use super::uapi;
use super::uapi::feature;
use super::uapi::frame;
use super::uapi::op;
use super::uapi::FrameHdr;
use super::uapi::VssMsg;
use zerocopy::FromBytes;
use zerocopy::IntoBytes;

/// Why a write was refused. A refused write changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Wrong length, version, kind, or a reserved field that is not zero (`EINVAL`).
    Malformed,
    /// Well formed, but not now: an answer before the registration, a second registration
    /// (`EPROTO`).
    OutOfTurn,
    /// Names no request that waits for this daemon: wrong id, or too late (`ESTALE`).
    Stale,
    /// The id is right but the operation is another one (`EBADMSG`).
    WrongOperation,
}

impl Refusal {
    /// In words, for the log.
    pub fn as_str(self) -> &'static str {
        match self {
            Refusal::Malformed => "malformed",
            Refusal::OutOfTurn => "out of turn",
            Refusal::Stale => "no such request is open",
            Refusal::WrongOperation => "answers another operation",
        }
    }
}

/// The first write after open, which settles the ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum First {
    /// v1, with or without a reply.
    V1 {
        /// REGISTER1 is answered with a `u32`, REGISTER is not.
        reply: bool,
    },
    /// v2.
    V2,
}

/// A v2 frame after the registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// The answer to a request.
    Answer { id: u64, status: u32, operation: u8 },
    /// A freeze that ended early.
    Thawed { id: u64, reason: u32 },
}

/// Parses the first write after open: `size` bytes, of which `bytes` are here.
pub(super) fn first(bytes: &[u8], size: usize) -> Result<First, Refusal> {
    if let Ok(msg) = message_v1(bytes, size) {
        return match msg.hdr.operation {
            op::REGISTER => Ok(First::V1 { reply: false }),
            op::REGISTER1 => Ok(First::V1 { reply: true }),
            _ => Err(Refusal::OutOfTurn),
        };
    }
    let header = header(bytes, size)?;
    match header.kind {
        frame::REGISTER => {
            let (register, _) = uapi::Register::read_from_prefix(bytes).map_err(malformed)?;
            if header.id == 0 && register.max_version >= uapi::ABI_V2 {
                Ok(First::V2)
            } else {
                Err(Refusal::Malformed)
            }
        }
        _ => later(bytes, size).and(Err(Refusal::OutOfTurn)),
    }
}

/// Parses a v1 answer and returns its status.
pub(super) fn answer_v1(bytes: &[u8], size: usize) -> Result<u32, Refusal> {
    message_v1(bytes, size).map(|msg| msg.status_v1())
}

fn message_v1(bytes: &[u8], size: usize) -> Result<VssMsg, Refusal> {
    match VssMsg::read_from_bytes(bytes) {
        Ok(msg) if size == bytes.len() => Ok(msg),
        _ => Err(Refusal::Malformed),
    }
}

/// Parses a v2 frame after the registration. What a newer daemon may have put behind the known part
/// of it is passed over.
pub(super) fn later(bytes: &[u8], size: usize) -> Result<Frame, Refusal> {
    let header = header(bytes, size)?;
    match header.kind {
        frame::REGISTER => first(bytes, size).and(Err(Refusal::OutOfTurn)),
        frame::ANSWER => {
            let (answer, _) = uapi::Answer::read_from_prefix(bytes).map_err(malformed)?;
            Ok(Frame::Answer {
                id: header.id,
                status: answer.status,
                operation: u8::try_from(answer.operation).map_err(malformed)?,
            })
        }
        frame::THAWED => {
            let (notice, _) = uapi::Thawed::read_from_prefix(bytes).map_err(malformed)?;
            if notice.reserved != 0 {
                return Err(Refusal::Malformed);
            }
            // Whatever the reason, the freeze is over.
            Ok(Frame::Thawed {
                id: header.id,
                reason: notice.reason,
            })
        }
        _ => Err(Refusal::Malformed),
    }
}

/// The header of a v2 frame, when it describes exactly the `size` bytes that were written.
fn header(bytes: &[u8], size: usize) -> Result<FrameHdr, Refusal> {
    let (header, _) = FrameHdr::read_from_prefix(bytes).map_err(malformed)?;
    let whole = usize::try_from(header.size).is_ok_and(|said| said == size);
    if whole && header.version == uapi::ABI_V2 && header.reserved == 0 {
        Ok(header)
    } else {
        Err(Refusal::Malformed)
    }
}

fn malformed<E>(_: E) -> Refusal {
    Refusal::Malformed
}

/// A frame header for `size` bytes of `kind`.
fn header_for(kind: u32, size: usize, id: u64) -> FrameHdr {
    FrameHdr {
        version: uapi::ABI_V2,
        // CAST: no frame is longer than `MAX_FRAME`.
        size: size as u32,
        kind,
        reserved: 0,
        id,
    }
}

/// Puts the reply to a v1 registration into `out` and returns its length.
pub(super) fn put_registered_v1(out: &mut [u8]) -> Option<usize> {
    put(out, &[&u32::from(op::REGISTER1).to_ne_bytes()])
}

/// Puts the reply to a v2 registration into `out` and returns its length.
pub(super) fn put_registered(out: &mut [u8], max_held: u32) -> Option<usize> {
    let reply = uapi::Registered {
        frame: header_for(frame::REGISTERED, size_of::<uapi::Registered>(), 0),
        abi_version: uapi::ABI_V2,
        // CAST: 6,300.
        max_frame: uapi::MAX_FRAME as u32,
        features: match max_held {
            0 => 0,
            _ => feature::HOLD | feature::PATHS,
        },
        max_held,
    };
    put(out, &[reply.as_bytes()])
}

/// Puts a notice that what was held for FREEZE `id` is thawed into `out` and returns its length.
pub(super) fn put_thawed(out: &mut [u8], id: u64, reason: u32) -> Option<usize> {
    let notice = uapi::Thawed {
        frame: header_for(frame::THAWED, size_of::<uapi::Thawed>(), id),
        reason,
        reserved: 0,
    };
    put(out, &[notice.as_bytes()])
}

/// Puts a v1 request into `out` and returns its length.
pub(super) fn put_request_v1(out: &mut [u8], operation: u8) -> Option<usize> {
    put(out, &[VssMsg::new(operation).as_bytes()])
}

/// Puts a v2 request into `out` and returns its length.
pub(super) fn put_request(
    out: &mut [u8],
    id: u64,
    operation: u8,
    time_left_ms: u32,
    payload: &[u8],
) -> Option<usize> {
    let size = size_of::<uapi::Request>().checked_add(payload.len())?;
    let request = uapi::Request {
        frame: header_for(frame::REQUEST, size, id),
        time_left_ms,
        // CAST: a payload is empty or a `FreezeInfo`.
        payload_size: payload.len() as u32,
        msg: VssMsg::new(operation),
        // CAST: 48.
        fixed_size: size_of::<uapi::Request>() as u32,
    };
    put(out, &[request.as_bytes(), payload])
}

/// Copies `parts` one after the other; `None` when they do not fit.
fn put(out: &mut [u8], parts: &[&[u8]]) -> Option<usize> {
    let mut end = 0usize;
    for part in parts {
        let next = end.checked_add(part.len())?;
        out.get_mut(end..next)?.copy_from_slice(part);
        end = next;
    }
    Some(end)
}
