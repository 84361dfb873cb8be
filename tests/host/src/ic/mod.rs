// SPDX-License-Identifier: GPL-2.0-only

//! What all integration components have in common: the header, status codes and negotiation.
//!
//! Layouts only, but for the device; nothing here knows how a packet travels. Constants are those of
//! `include/linux/hyperv.h` and of openvmm's `hyperv_ic_protocol`. All integers are little-endian.

pub(crate) mod device;
pub mod heartbeat;
mod judge;
pub mod kvp;
pub mod shutdown;
pub mod timesync;
pub mod vss;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A version of the framework or of a component's messages.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Version {
    major: U16,
    minor: U16,
}

impl Version {
    /// Version `major.minor`.
    pub const fn new(major: u16, minor: u16) -> Self {
        Version {
            major: U16::new(major),
            minor: U16::new(minor),
        }
    }

    /// The number before the dot.
    pub const fn major(self) -> u16 {
        self.major.get()
    }

    /// The number after the dot.
    pub const fn minor(self) -> u16 {
        self.minor.get()
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl std::fmt::Debug for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Version {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// The framework versions that hosts in the wild offer.
pub const FRAMEWORKS: [Version; 2] = [Version::new(1, 0), Version::new(3, 0)];

/// Message types, in [`IcHeader::message_type`] (`ICMSGTYPE_*`).
pub mod message_type {
    /// Version negotiation, for any component.
    pub const NEGOTIATE: u16 = 0;
    /// Heartbeat.
    pub const HEARTBEAT: u16 = 1;
    /// Key-value pairs.
    pub const KVP: u16 = 2;
    /// Shutdown.
    pub const SHUTDOWN: u16 = 3;
    /// Time synchronisation.
    pub const TIMESYNC: u16 = 4;
    /// Volume shadow copy service.
    pub const VSS: u16 = 5;
}

/// Flags, in [`IcHeader::flags`] (`ICMSGHDRFLAG_*`).
pub mod flags {
    /// The message belongs to a transaction.
    pub const TRANSACTION: u8 = 1;
    /// A request.
    pub const REQUEST: u8 = 2;
    /// A response.
    pub const RESPONSE: u8 = 4;
}

/// Status codes, in [`IcHeader::status`] (`HV_S_OK`, `HV_E_FAIL`, ...).
pub mod status {
    /// Success.
    pub const OK: u32 = 0;
    /// The operation failed.
    pub const FAIL: u32 = 0x8000_4005;
    /// The operation is not supported.
    pub const NOT_SUPPORTED: u32 = 0x8007_0032;
}

/// `struct vmbuspipe_hdr` and `struct icmsg_hdr` together: the 28 bytes that start every message.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct IcHeader {
    /// Pipe flags; 1 for data.
    pub pipe_flags: U32,
    /// Bytes that follow the two pipe fields.
    pub pipe_size: U32,
    /// Framework version.
    pub framework: Version,
    /// One of [`message_type`].
    pub message_type: U16,
    /// Version of the component's messages.
    pub message: Version,
    /// Bytes that follow this header.
    pub message_size: U16,
    /// One of [`status`].
    pub status: U32,
    /// Chosen by the host, repeated by the guest.
    pub transaction: u8,
    /// Bits of [`flags`].
    pub flags: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

const _: () = assert!(size_of::<IcHeader>() == 28);

/// `struct icmsg_negotiate` without the version pairs that follow it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct NegotiateHeader {
    /// How many framework versions follow.
    pub framework_count: U16,
    /// How many message versions follow those.
    pub message_count: U16,
    /// Zero.
    pub reserved: U32,
}

const _: () = assert!(size_of::<NegotiateHeader>() == 8);

/// The largest message in bytes, headers included, that any host sends (openvmm:
/// `MAX_MESSAGE_SIZE`).
pub const MAX_MESSAGE: usize = 13_312;

/// What a component's messages carry in their header besides their size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// Framework version in force.
    pub framework: Version,
    /// One of [`message_type`].
    pub message_type: u16,
    /// Message version in force.
    pub message: Version,
    /// Transaction id.
    pub transaction: u8,
}

impl Envelope {
    /// A whole request: header and `body`.
    ///
    /// Sizes that do not fit their fields are cut to the field's largest value, so that a test can
    /// still send a body of any length.
    pub fn request(&self, body: &[u8]) -> Vec<u8> {
        let ic_size = size_of::<IcHeader>() - 8 + body.len();
        let header = IcHeader {
            pipe_flags: U32::new(1),
            pipe_size: U32::new(ic_size.try_into().unwrap_or(u32::MAX)),
            framework: self.framework,
            message_type: U16::new(self.message_type),
            message: self.message,
            message_size: U16::new(body.len().try_into().unwrap_or(u16::MAX)),
            status: U32::new(status::OK),
            transaction: self.transaction,
            flags: flags::TRANSACTION | flags::REQUEST,
            reserved: [0; 2],
        };
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(body);
        bytes
    }
}

/// The body of a negotiation that offers these versions.
pub fn negotiate_body(frameworks: &[Version], messages: &[Version]) -> Vec<u8> {
    let header = NegotiateHeader {
        framework_count: U16::new(frameworks.len().try_into().unwrap_or(u16::MAX)),
        message_count: U16::new(messages.len().try_into().unwrap_or(u16::MAX)),
        reserved: U32::new(0),
    };
    let mut body = header.as_bytes().to_vec();
    body.extend_from_slice(frameworks.as_bytes());
    body.extend_from_slice(messages.as_bytes());
    body
}

/// The versions of framework and messages that such a body offers, if it is one.
pub(crate) fn parse_offer(body: &[u8]) -> Option<(Vec<Version>, Vec<Version>)> {
    let (header, rest) = NegotiateHeader::read_from_prefix(body).ok()?;
    let count = header.framework_count.get().into();
    let (frameworks, rest) = <[Version]>::ref_from_prefix_with_elems(rest, count).ok()?;
    let count = header.message_count.get().into();
    let (messages, _) = <[Version]>::ref_from_prefix_with_elems(rest, count).ok()?;
    Some((frameworks.to_vec(), messages.to_vec()))
}

/// What the guest chose, from the body of its answer to a negotiation.
///
/// `Ok(None)` when it refused all (it answers with no framework version); `Err` names what is wrong
/// with an answer that is neither.
pub fn parse_negotiated(body: &[u8]) -> Result<Option<(Version, Version)>, &'static str> {
    let (header, rest) =
        NegotiateHeader::read_from_prefix(body).map_err(|_| "too short for the version counts")?;
    match (header.framework_count.get(), header.message_count.get()) {
        (0, _) | (_, 0) => Ok(None),
        (1, 1) => {
            let (framework, rest) =
                Version::read_from_prefix(rest).map_err(|_| "no room for the framework version")?;
            let (message, _) =
                Version::read_from_prefix(rest).map_err(|_| "no room for the message version")?;
            Ok(Some((framework, message)))
        }
        _ => Err("more than one version of a kind"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_negotiation_is_laid_out_as_in_hyperv_h() {
        let envelope = Envelope {
            framework: Version::new(3, 0),
            message_type: message_type::NEGOTIATE,
            message: Version::new(5, 0),
            transaction: 7,
        };
        let body = negotiate_body(&FRAMEWORKS, &[Version::new(5, 0)]);
        let bytes = envelope.request(&body);
        assert_eq!(bytes.len(), 28 + 8 + 12);
        assert_eq!(bytes[..8], [1, 0, 0, 0, 40, 0, 0, 0]);
        assert_eq!(bytes[8..18], [3, 0, 0, 0, 0, 0, 5, 0, 0, 0]);
        assert_eq!(bytes[18..20], [20, 0]);
        assert_eq!(bytes[24..28], [7, 3, 0, 0]);
        assert_eq!(bytes[28..36], [2, 0, 1, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[36..48], [1, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0]);
    }

    #[test]
    fn an_answer_names_one_version_of_each_kind_or_none() {
        let chosen = negotiate_body(&[Version::new(3, 0)], &[Version::new(5, 0)]);
        assert_eq!(
            parse_negotiated(&chosen),
            Ok(Some((Version::new(3, 0), Version::new(5, 0))))
        );
        let mut refused = negotiate_body(&[], &[]);
        refused.extend_from_slice(&[0xaa; 12]);
        assert_eq!(parse_negotiated(&refused), Ok(None));
        let two = negotiate_body(&FRAMEWORKS, &[Version::new(5, 0)]);
        assert!(parse_negotiated(&two).is_err());
        assert!(parse_negotiated(&chosen[..13]).is_err());
        assert!(parse_negotiated(&[]).is_err());
    }
}
