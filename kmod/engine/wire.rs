// SPDX-License-Identifier: GPL-2.0

//! What the host sends: integration component (IC) messages in VMBus packets.
//!
//! Knows layouts and version negotiation, no state. Bytes are read from a private copy of the
//! packet and answers are made in place, because an answer is the request's own bytes with a
//! status. All integers on this wire are little-endian.

use super::uapi;
use super::uapi::op;
use super::uapi::status;
use zerocopy::little_endian::U16;
use zerocopy::little_endian::U32;
use zerocopy::FromBytes;
// The macro FromBytes is named by its path: where cargo turns on zerocopy's own derives, the trait
// above brings a macro of that name along.
use zerocopy_derive::Immutable;
use zerocopy_derive::IntoBytes;
use zerocopy_derive::KnownLayout;

/// Framework versions this module speaks, best first (`UTIL_FW_VERSION`). Hosts that know only 1.0
/// (`UTIL_WS2K8_FW_VERSION`) have no VSS 5.0 either.
pub const FRAMEWORK_VERSIONS: [Version; 1] = [Version { major: 3, minor: 0 }];

/// VSS versions this module speaks, best first (`VSS_VERSION`). FREEZE and THAW exist from 5.0 on.
pub const VSS_VERSIONS: [Version; 1] = [Version { major: 5, minor: 0 }];

/// Most versions of one kind that a negotiation may list (`IC_VERSION_NEGOTIATION_MAX_VER_COUNT`).
const MAX_VERSIONS: u16 = 100;
/// `ICMSGTYPE_NEGOTIATE`.
const TYPE_NEGOTIATE: u16 = 0;
/// `ICMSGTYPE_VSS`.
const TYPE_VSS: u16 = 5;
/// `ICMSGHDRFLAG_TRANSACTION | ICMSGHDRFLAG_RESPONSE`.
const FLAGS_RESPONSE: u8 = 1 | 4;
/// `icmsgsize` of a negotiate answer: two counts, a reserved word, one version of each kind.
const NEGOTIATE_ANSWER_SIZE: u16 = 0x10;

/// A version of the framework or of the VSS messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Version {
    /// Major number.
    pub major: u16,
    /// Minor number.
    pub minor: u16,
}

/// `struct ic_version`.
#[derive(Clone, Copy, zerocopy_derive::FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct WireVersion {
    major: U16,
    minor: U16,
}

/// `struct vmbuspipe_hdr` and `struct icmsg_hdr`.
#[derive(zerocopy_derive::FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    pipe_flags: U32,
    pipe_size: U32,
    framework: WireVersion,
    kind: U16,
    message: WireVersion,
    size: U16,
    status: U32,
    transaction: u8,
    flags: u8,
    reserved: [u8; 2],
}

/// The fixed part of `struct icmsg_negotiate`; the versions follow.
#[derive(zerocopy_derive::FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Negotiate {
    framework_count: U16,
    message_count: U16,
    reserved: U32,
}

/// Offset of the message behind pipe and IC header.
pub(super) const BODY: usize = size_of::<Header>();
/// Offset of the four bytes behind the VSS header: `vss_cf.flags`, `dm_info.flags`.
const FLAGS: usize = BODY + size_of::<uapi::VssHdr>();

const _: () = assert!(BODY == 28);
const _: () = assert!(size_of::<Negotiate>() == 8);
const _: () = assert!(size_of::<WireVersion>() == 4);

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A version negotiation.
    Negotiate,
    /// A VSS message with this operation.
    Vss(u8),
    /// Too short for its headers, or a message of another integration component: no answer.
    Malformed,
}

/// Classifies a packet. Whatever is not [`Kind::Malformed`] has a whole header.
pub(super) fn kind(packet: &[u8]) -> Kind {
    let Ok((header, body)) = Header::ref_from_prefix(packet) else {
        return Kind::Malformed;
    };
    match header.kind.get() {
        TYPE_NEGOTIATE if body.len() >= size_of::<Negotiate>() => Kind::Negotiate,
        TYPE_VSS if body.len() >= size_of::<uapi::VssHdr>() => {
            body.first().map_or(Kind::Malformed, |op| Kind::Vss(*op))
        }
        _ => Kind::Malformed,
    }
}

/// Turns a VSS request into its answer: same bytes, same length, status and flags set.
///
/// A successful HOT_BACKUP says "no auto-recovery", a GET_DM_INFO "no flags"; other bodies stay as
/// the host sent them.
pub(super) fn answer(packet: &mut [u8], operation: u8, code: u32) {
    if let Ok((header, _)) = Header::mut_from_prefix(packet) {
        header.status.set(code);
        header.flags = FLAGS_RESPONSE;
    }
    let flags = match operation {
        op::HOT_BACKUP if code == status::OK => uapi::HBU_NO_AUTO_RECOVERY,
        op::GET_DM_INFO => 0,
        _ => return,
    };
    if let Some(place) = packet.get_mut(FLAGS..).and_then(|b| b.first_chunk_mut()) {
        *place = flags.to_le_bytes();
    }
}

/// Turns a negotiation into its answer and returns what was agreed: framework and VSS version.
///
/// A host with which nothing is common, or whose counts do not fit its packet, is answered with
/// zero versions of each kind, as mainline does, and `None` is returned.
pub(super) fn negotiate(packet: &mut [u8]) -> Option<(Version, Version)> {
    let (header, body) = Header::mut_from_prefix(packet).ok()?;
    header.size.set(NEGOTIATE_ANSWER_SIZE);
    header.status.set(status::OK);
    header.flags = FLAGS_RESPONSE;
    let (counts, versions) = Negotiate::mut_from_prefix(body).ok()?;
    let agreed = agree(counts, versions);
    let one = u16::from(agreed.is_some());
    counts.framework_count.set(one);
    counts.message_count.set(one);
    let (framework, message) = agreed?;
    // There is room for two: `agree` found one version of each kind in there.
    if let Ok((list, _)) = <[WireVersion; 2]>::mut_from_prefix(versions) {
        *list = [framework.into(), message.into()];
    }
    Some((framework, message))
}

/// Picks the best common version of each kind.
fn agree(counts: &Negotiate, versions: &[u8]) -> Option<(Version, Version)> {
    let (frameworks, messages) = (counts.framework_count.get(), counts.message_count.get());
    if frameworks > MAX_VERSIONS || messages > MAX_VERSIONS {
        return None;
    }
    let (frameworks, rest) =
        <[WireVersion]>::ref_from_prefix_with_elems(versions, frameworks.into()).ok()?;
    let (messages, _) = <[WireVersion]>::ref_from_prefix_with_elems(rest, messages.into()).ok()?;
    Some((
        best(&FRAMEWORK_VERSIONS, frameworks)?,
        best(&VSS_VERSIONS, messages)?,
    ))
}

/// The first of `ours` that is among `theirs`.
fn best(ours: &[Version], theirs: &[WireVersion]) -> Option<Version> {
    ours.iter()
        .find(|v| theirs.iter().any(|t| Version::from(*t) == **v))
        .copied()
}

/// What follows the VSS header of a FREEZE (little-endian, as VMBus machines are), or `None` when the
/// message is too short to have one or counts more disks than it can hold. The list only helps the
/// daemon to choose, so a bad one does not fail the backup.
pub(super) fn freeze_info(packet: &[u8]) -> Option<&[u8; size_of::<uapi::FreezeInfo>()]> {
    let bytes = packet.get(FLAGS..)?.first_chunk()?;
    let count = bytes.get(8..)?.first_chunk()?;
    let fits = usize::try_from(u32::from_le_bytes(*count)).is_ok_and(|n| n <= uapi::MAX_LUNS);
    fits.then_some(bytes)
}

impl From<WireVersion> for Version {
    fn from(v: WireVersion) -> Self {
        Version {
            major: v.major.get(),
            minor: v.minor.get(),
        }
    }
}

impl From<Version> for WireVersion {
    fn from(v: Version) -> Self {
        WireVersion {
            major: v.major.into(),
            minor: v.minor.into(),
        }
    }
}
