// SPDX-License-Identifier: GPL-2.0-only

//! Layouts and numbers of the dynamic memory protocol, as the stock `hv_balloon` speaks it.
//!
//! Names and numbers are those of `drivers/hv/hv_balloon.c`; all integers are little-endian, all pages
//! have 4 KiB. Bytes from the guest become a [`Message`] or an error here.

use crate::vmbus::protocol::Guid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Device class of dynamic memory (`HV_DM_GUID`).
pub const CLASS: Guid = Guid::new(
    0x525074dc,
    0x8985,
    0x46e2,
    [0x80, 0x57, 0xa3, 0x07, 0xdc, 0x18, 0xa5, 0x02],
);

/// The version of Windows 10, the only one that current kernels ask for: major in the upper half, minor
/// in the lower (`DYNMEM_PROTOCOL_VERSION_WIN10`).
pub const VERSION: u32 = 2 << 16;

/// Message types, in [`Header::message_type`] (`enum dm_message_type`).
pub mod message_type {
    #![allow(missing_docs, reason = "the names are the driver's")]
    pub const VERSION_REQUEST: u16 = 1;
    pub const VERSION_RESPONSE: u16 = 2;
    pub const CAPABILITIES_REPORT: u16 = 3;
    pub const CAPABILITIES_RESPONSE: u16 = 4;
    pub const STATUS_REPORT: u16 = 5;
    pub const BALLOON_REQUEST: u16 = 6;
    pub const BALLOON_RESPONSE: u16 = 7;
    pub const UNBALLOON_REQUEST: u16 = 8;
    pub const UNBALLOON_RESPONSE: u16 = 9;
}

/// What starts every message (`struct dm_header`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// One of [`message_type`].
    pub message_type: U16,
    /// Bytes of the message, this header included.
    pub size: U16,
    /// Chosen by the sender; a response repeats that of its request here, the guest's do not.
    pub transaction: U32,
}

const _: () = assert!(size_of::<Header>() == 8);

/// The most bytes of a message: what the guest has room for (`recv_buffer`).
pub const MAX_MESSAGE: usize = 4096;

/// The most ranges of a message, after its header and two words.
pub const MAX_RANGES: usize = (MAX_MESSAGE - size_of::<Header>() - 8) / 8;

/// In the word after the header of whoever lists ranges: another message follows (`more_pages`).
const MORE_PAGES: u32 = 1;

/// The body of a version request (`struct dm_version_request`).
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct VersionBody {
    /// Major in the upper half, minor in the lower.
    pub version: U32,
    /// Bit 0: the guest asks for no other.
    pub last_attempt: U32,
}

/// The body of a report of capabilities (`struct dm_capabilities`).
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CapabilitiesBody {
    /// What it can do, with its own layout (`union dm_caps`).
    pub bits: U64,
    /// How many pages it wants to keep.
    pub min_pages: U64,
    /// The number of its last page.
    pub max_page: U64,
}

/// The body of a report (`struct dm_status`).
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct StatusBody {
    /// Pages that it could give out without swapping.
    pub available: U64,
    /// Pages that it has promised, with what the host has taken and what it wants to keep free.
    pub committed: U64,
    /// Page files and the like, which are Windows' own and zero here.
    pub windows: [U64; 3],
}

/// What the guest can do (`union dm_caps`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// It can give pages.
    pub balloon: bool,
    /// It takes more memory than it was started with.
    pub hot_add: bool,
    /// What that memory has to be aligned to, in MiB.
    pub hot_add_alignment_mib: u32,
}

/// How much memory the guest needs (`struct dm_status`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// What it could give out without swapping, in pages.
    pub available_pages: u64,
    /// What it has promised to programs, what the host has taken, and what it wants to keep free, in
    /// pages.
    pub committed_pages: u64,
}

/// Pages that follow each other (`union dm_mem_page_range`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRange {
    /// The number of the first, of 40 bits.
    pub first: u64,
    /// How many, in 24 bits.
    pub count: u32,
}

impl PageRange {
    /// How far the count is shifted.
    const COUNT: u32 = 40;

    fn from_wire(word: U64) -> Self {
        PageRange {
            first: word.get() & ((1 << Self::COUNT) - 1),
            count: (word.get() >> Self::COUNT) as u32,
        }
    }

    fn to_wire(self) -> U64 {
        U64::new(self.first | u64::from(self.count) << Self::COUNT)
    }
}

/// What the guest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Let us speak this version.
    Version(u32),
    /// That is what I can do.
    Capabilities(Capabilities),
    /// That is how I am.
    Status(Status),
    /// These pages are yours.
    Ballooned {
        /// There will be another message of this kind.
        more: bool,
        /// The pages.
        ranges: Vec<PageRange>,
    },
    /// I have the pages back.
    Unballooned,
}

/// A message that is none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadMessage {
    /// It has no header.
    #[error("a memory message of {0} bytes")]
    Short(usize),
    /// It is of no kind that this host has asked for.
    #[error("a memory message of type {0}")]
    Type(u16),
    /// It is not as long as it says, or as its kind is.
    #[error("a memory message of type {message_type} that says {size}, in {bytes} bytes")]
    Size {
        /// Its type.
        message_type: u16,
        /// What its header says.
        size: u16,
        /// What came.
        bytes: usize,
    },
    /// Bits are set that have no meaning.
    #[error("a memory message of type {0} with reserved bits")]
    Reserved(u16),
}

impl Message {
    /// What these bytes mean, and the transaction's number.
    pub fn parse(bytes: &[u8]) -> Result<(u32, Message), BadMessage> {
        let (header, rest) =
            Header::ref_from_prefix(bytes).map_err(|_| BadMessage::Short(bytes.len()))?;
        let message_type = header.message_type.get();
        let size = || BadMessage::Size {
            message_type,
            size: header.size.get(),
            bytes: bytes.len(),
        };
        // All kinds have a multiple of 8 bytes, so that a packet has no padding.
        if usize::from(header.size.get()) != bytes.len() {
            return Err(size());
        }
        let no_reserved = |is_set: bool| match is_set {
            true => Err(BadMessage::Reserved(message_type)),
            false => Ok(()),
        };
        let message = match message_type {
            message_type::VERSION_REQUEST => {
                let body = VersionBody::ref_from_bytes(rest).map_err(|_| size())?;
                no_reserved(body.last_attempt.get() > 1)?;
                Message::Version(body.version.get())
            }
            message_type::CAPABILITIES_REPORT => {
                let body = CapabilitiesBody::ref_from_bytes(rest).map_err(|_| size())?;
                let bits = body.bits.get();
                no_reserved(bits >> 6 != 0)?;
                Message::Capabilities(Capabilities {
                    balloon: bits & 1 != 0,
                    hot_add: bits & 2 != 0,
                    hot_add_alignment_mib: 1 << (bits >> 2 & 0xf),
                })
            }
            message_type::STATUS_REPORT => {
                let body = StatusBody::ref_from_bytes(rest).map_err(|_| size())?;
                Message::Status(Status {
                    available_pages: body.available.get(),
                    committed_pages: body.committed.get(),
                })
            }
            message_type::BALLOON_RESPONSE => {
                let (words, rest) = <[U32; 2]>::ref_from_prefix(rest).map_err(|_| size())?;
                let [reserved, list] = words.map(U32::get);
                no_reserved(reserved != 0)?;
                let ranges = <[U64]>::ref_from_bytes(rest).map_err(|_| size())?;
                if ranges.len() != (list >> 1) as usize || ranges.len() > MAX_RANGES {
                    return Err(size());
                }
                Message::Ballooned {
                    more: list & MORE_PAGES != 0,
                    ranges: ranges.iter().copied().map(PageRange::from_wire).collect(),
                }
            }
            message_type::UNBALLOON_RESPONSE if rest.is_empty() => Message::Unballooned,
            message_type::UNBALLOON_RESPONSE => return Err(size()),
            other => return Err(BadMessage::Type(other)),
        };
        Ok((header.transaction.get(), message))
    }
}

/// A message from the host.
fn message(message_type: u16, transaction: u32, body: &[u8]) -> Vec<u8> {
    let size = size_of::<Header>() + body.len();
    let header = Header {
        message_type: U16::new(message_type),
        // No body has more than MAX_RANGES ranges.
        size: U16::new(size as u16),
        transaction: U32::new(transaction),
    };
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(body);
    bytes
}

/// The answer to a version request (`struct dm_version_response`).
pub fn version_response(transaction: u32, accepted: bool) -> Vec<u8> {
    let body = U64::new(accepted.into());
    message(message_type::VERSION_RESPONSE, transaction, body.as_bytes())
}

/// The answer to a report of capabilities (`struct dm_capabilities_resp_msg`): they are accepted.
pub fn capabilities_response(transaction: u32) -> Vec<u8> {
    let body = U64::new(1);
    message(
        message_type::CAPABILITIES_RESPONSE,
        transaction,
        body.as_bytes(),
    )
}

/// The wish for so many pages (`struct dm_balloon`).
pub fn balloon_request(transaction: u32, pages: u32) -> Vec<u8> {
    let body = [pages, 0].map(U32::new);
    message(message_type::BALLOON_REQUEST, transaction, body.as_bytes())
}

/// Gives pages back, at most [`MAX_RANGES`] ranges, with a message of this kind to follow or not
/// (`struct dm_unballoon_request`).
pub fn unballoon_request(transaction: u32, ranges: &[PageRange], more: bool) -> Vec<u8> {
    let words = [if more { MORE_PAGES } else { 0 }, ranges.len() as u32].map(U32::new);
    let mut body = words.as_bytes().to_vec();
    for range in ranges {
        body.extend_from_slice(range.to_wire().as_bytes());
    }
    message(message_type::UNBALLOON_REQUEST, transaction, &body)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A report of capabilities.
    pub(crate) fn capabilities(bits: u64) -> Vec<u8> {
        let body = [bits, 0, u64::MAX].map(U64::new);
        message(message_type::CAPABILITIES_REPORT, 2, body.as_bytes())
    }

    /// A response to a wish for pages.
    pub(crate) fn ballooned(ranges: &[(u64, u32)], more: bool) -> Vec<u8> {
        let list = (ranges.len() as u32) << 1 | u32::from(more);
        let mut body = [0, list].map(U32::new).as_bytes().to_vec();
        for (first, count) in ranges.iter().copied() {
            let range = PageRange { first, count };
            body.extend_from_slice(range.to_wire().as_bytes());
        }
        message(message_type::BALLOON_RESPONSE, 4, &body)
    }

    /// Any message with words as its body.
    pub(crate) fn of_words(message_type: u16, words: &[u32]) -> Vec<u8> {
        let words: Vec<U32> = words.iter().copied().map(U32::new).collect();
        message(message_type, 7, words.as_bytes())
    }

    #[test]
    fn what_the_guest_says_is_laid_out_as_in_the_driver() {
        let version = [1, 0, 16, 0, 9, 0, 0, 0, 0, 0, 2, 0, 1, 0, 0, 0];
        assert_eq!(Message::parse(&version), Ok((9, Message::Version(VERSION))));
        // Balloon, hot add, aligned to 2^7 MiB.
        assert_eq!(
            Message::parse(&capabilities(0b01_1111)),
            Ok((
                2,
                Message::Capabilities(Capabilities {
                    balloon: true,
                    hot_add: true,
                    hot_add_alignment_mib: 128
                })
            ))
        );
        let mut status = vec![5, 0, 48, 0, 3, 0, 0, 0];
        status.extend([0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0]);
        status.resize(48, 0);
        assert_eq!(
            Message::parse(&status),
            Ok((
                3,
                Message::Status(Status {
                    available_pages: 256,
                    committed_pages: 512
                })
            ))
        );
        let mut ballooned = vec![7, 0, 24, 0, 4, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0];
        ballooned.extend([0, 2, 0, 0, 1, 0, 2, 0]);
        let range = PageRange {
            first: 0x1_0000_0200,
            count: 512,
        };
        let ranges = vec![range];
        assert_eq!(
            Message::parse(&ballooned),
            Ok((4, Message::Ballooned { more: true, ranges }))
        );
        let unballooned = [9, 0, 8, 0, 5, 0, 0, 0];
        assert_eq!(Message::parse(&unballooned), Ok((5, Message::Unballooned)));
    }

    #[test]
    fn what_the_host_says_is_laid_out_as_in_the_driver() {
        let version = version_response(9, true);
        assert_eq!(version, [2, 0, 16, 0, 9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(version_response(9, false)[8], 0);
        assert_eq!(capabilities_response(1)[..4], [4, 0, 16, 0]);
        let up = balloon_request(1, 0x4000);
        assert_eq!(up, [6, 0, 16, 0, 1, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0]);
        let range = PageRange { first: 2, count: 1 };
        let down = unballoon_request(1, &[range], true);
        assert_eq!(
            down[..16],
            [8, 0, 24, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
        );
        assert_eq!(down[16..], [2, 0, 0, 0, 0, 1, 0, 0]);
        let most = unballoon_request(1, &[range; MAX_RANGES], false);
        assert_eq!((most.len(), most[8]), (MAX_MESSAGE, 0));
    }

    #[test]
    fn what_is_cut_stretched_or_unknown_is_no_message() {
        use message_type::*;
        let good = [
            of_words(VERSION_REQUEST, &[VERSION, 1]),
            capabilities(1),
            of_words(STATUS_REPORT, &[1; 10]),
            ballooned(&[(1, 2), (3, 4)], true),
            ballooned(&[], false),
            of_words(UNBALLOON_RESPONSE, &[]),
        ];
        for mut bytes in good {
            assert!(Message::parse(&bytes).is_ok());
            for len in 0..bytes.len() {
                assert!(Message::parse(&bytes[..len]).is_err());
                // Neither if its header admits it.
                let mut cut = bytes[..len].to_vec();
                if let Some(size) = cut.get_mut(2..4) {
                    size.copy_from_slice(&(len as u16).to_le_bytes());
                }
                assert!(Message::parse(&cut).is_err(), "{cut:?}");
            }
            bytes.extend([0; 8]);
            assert!(Message::parse(&bytes).is_err());
            let size = bytes.len() as u16;
            bytes[2..4].copy_from_slice(&size.to_le_bytes());
            assert!(Message::parse(&bytes).is_err(), "{bytes:?}");
        }
        let unknown = of_words(VERSION_RESPONSE, &[1, 0]);
        assert_eq!(Message::parse(&unknown), Err(BadMessage::Type(2)));
        for (bytes, message_type) in [
            (of_words(VERSION_REQUEST, &[VERSION, 2]), VERSION_REQUEST),
            (capabilities(1 << 6), CAPABILITIES_REPORT),
            (of_words(BALLOON_RESPONSE, &[1, 0]), BALLOON_RESPONSE),
        ] {
            let reserved = BadMessage::Reserved(message_type);
            assert_eq!(Message::parse(&bytes), Err(reserved));
        }
        // A list that claims to be longer or shorter than it is, however long that is.
        for list in [1 << 1, 2, 3 << 1, u32::MAX] {
            let bytes = of_words(BALLOON_RESPONSE, &[0, list, 1, 0, 2, 0]);
            assert!(matches!(
                Message::parse(&bytes),
                Err(BadMessage::Size { .. })
            ));
        }
    }
}
