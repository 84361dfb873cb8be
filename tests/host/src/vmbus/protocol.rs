// SPDX-License-Identifier: GPL-2.0-only

//! Layouts and numbers of VMBus: control messages, and the descriptor of a packet in a ring.
//!
//! The names and numbers are those of `include/linux/hyperv.h` (`vmbus_channel_*`,
//! `CHANNELMSG_*`); all integers are little-endian. Bytes from the guest become a
//! [`GuestMessage`] or an error here, and are not looked at again anywhere else.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A GUID in its wire form: the first three fields little-endian.
#[derive(
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// The GUID that is written `a-b-c-d`, the last two groups together in `d`.
    pub const fn new(a: u32, b: u16, c: u16, d: [u8; 8]) -> Self {
        let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
        Guid([
            a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5],
            d[6], d[7],
        ])
    }
}

impl std::fmt::Display for Guid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a0, a1, a2, a3, b0, b1, c0, c1, d0, d1, rest @ ..] = self.0;
        write!(
            f,
            "{:08x}-{:04x}-{:04x}-{d0:02x}{d1:02x}-",
            u32::from_le_bytes([a0, a1, a2, a3]),
            u16::from_le_bytes([b0, b1]),
            u16::from_le_bytes([c0, c1]),
        )?;
        rest.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Guid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// A VMBus protocol version: major in the upper, minor in the lower half.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmbusVersion(pub u32);

impl VmbusVersion {
    /// 4.0: Windows 10 and Server 2016.
    pub const V4_0: Self = Self(4 << 16);
    /// 4.1.
    pub const V4_1: Self = Self(4 << 16 | 1);
    /// 5.0.
    pub const V5_0: Self = Self(5 << 16);
    /// 5.1.
    pub const V5_1: Self = Self(5 << 16 | 1);
    /// 5.2.
    pub const V5_2: Self = Self(5 << 16 | 2);
    /// 5.3: MODIFYCHANNEL is answered from here on.
    pub const V5_3: Self = Self(5 << 16 | 3);
    /// 6.0.
    pub const V6_0: Self = Self(6 << 16);

    /// All that this host speaks, oldest first.
    pub const ALL: [Self; 7] = [
        Self::V4_0,
        Self::V4_1,
        Self::V5_0,
        Self::V5_1,
        Self::V5_2,
        Self::V5_3,
        Self::V6_0,
    ];
}

impl std::fmt::Display for VmbusVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0 >> 16, self.0 & 0xffff)
    }
}

impl std::fmt::Debug for VmbusVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// Size of a page, as VMBus counts them (`HV_HYP_PAGE_SIZE`).
pub const PAGE_SIZE: usize = 4096;

/// The largest control message in bytes (`HV_MESSAGE_PAYLOAD_BYTE_COUNT`).
pub const MAX_MESSAGE: usize = 240;

/// The types of packets in a ring (`enum vmbus_packet_type`).
pub mod packet_type {
    /// Data that follows the descriptor (`VM_PKT_DATA_INBAND`).
    pub const DATA_INBAND: u16 = 6;
    /// Data, and before it a list of pages that the sender lends (`VM_PKT_DATA_USING_GPA_DIRECT`).
    pub const DATA_USING_GPA_DIRECT: u16 = 9;
    /// Completion (`VM_PKT_COMP`).
    pub const COMPLETION: u16 = 11;
}

/// `struct vmpacket_descriptor`: what starts every packet in a ring.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct PacketDescriptor {
    /// One of [`packet_type`].
    pub packet_type: U16,
    /// Size of the descriptor in units of 8 bytes.
    pub offset8: U16,
    /// Size of the packet with its descriptor in units of 8 bytes.
    pub len8: U16,
    /// 1 asks for a completion.
    pub flags: U16,
    /// Chosen by the sender, repeated in the answer.
    pub transaction: U64,
}

const _: () = assert!(size_of::<PacketDescriptor>() == 16);

/// `struct vmdata_gpa_direct` without its descriptor and ranges: what a packet lends of the guest's memory.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct GpaDirect {
    /// Zero.
    pub reserved: U32,
    /// How many ranges follow.
    pub range_count: U32,
}

/// `struct gpa_range`: a piece of the guest's memory, before the numbers of its pages.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct GpaRange {
    /// Bytes in it.
    pub byte_count: U32,
    /// Where in its first page it starts.
    pub byte_offset: U32,
}

/// Message types (`CHANNELMSG_*`).
pub mod message {
    #![allow(missing_docs, reason = "the names are the header's")]
    pub const OFFERCHANNEL: u32 = 1;
    pub const RESCIND_CHANNELOFFER: u32 = 2;
    pub const REQUESTOFFERS: u32 = 3;
    pub const ALLOFFERS_DELIVERED: u32 = 4;
    pub const OPENCHANNEL: u32 = 5;
    pub const OPENCHANNEL_RESULT: u32 = 6;
    pub const CLOSECHANNEL: u32 = 7;
    pub const GPADL_HEADER: u32 = 8;
    pub const GPADL_BODY: u32 = 9;
    pub const GPADL_CREATED: u32 = 10;
    pub const GPADL_TEARDOWN: u32 = 11;
    pub const GPADL_TORNDOWN: u32 = 12;
    pub const RELID_RELEASED: u32 = 13;
    pub const INITIATE_CONTACT: u32 = 14;
    pub const VERSION_RESPONSE: u32 = 15;
    pub const UNLOAD: u32 = 16;
    pub const UNLOAD_RESPONSE: u32 = 17;
    pub const MODIFYCHANNEL: u32 = 22;
    pub const MODIFYCHANNEL_RESPONSE: u32 = 24;
}

/// `struct vmbus_channel_message_header`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MessageHeader {
    /// One of [`message`].
    pub message_type: U32,
    /// Zero.
    pub padding: U32,
}

impl MessageHeader {
    /// The header of a message of this type.
    pub const fn new(message_type: u32) -> Self {
        MessageHeader {
            message_type: U32::new(message_type),
            padding: U32::new(0),
        }
    }
}

const _: () = assert!(size_of::<MessageHeader>() == 8);

/// `struct vmbus_channel_initiate_contact`, without its header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InitiateContact {
    /// The version that is asked for.
    pub version: U32,
    /// The virtual processor that is to get the host's messages.
    pub target_vp: U32,
    /// Before 5.0 the address of an interrupt page, which is not used; since then the SINT and flags.
    pub interrupt: U64,
    /// Address of a monitor page; this host uses none.
    pub monitor_page1: U64,
    /// Address of the other monitor page.
    pub monitor_page2: U64,
}

const _: () = assert!(size_of::<InitiateContact>() + 8 == 40);

/// `struct vmbus_channel_version_response`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct VersionResponse {
    /// Header.
    pub header: MessageHeader,
    /// 1 when the version is accepted.
    pub supported: u8,
    /// Zero for success.
    pub connection_state: u8,
    /// Zero.
    pub padding: U16,
    /// The connection that the guest uses from here on.
    pub connection_id: U32,
}

const _: () = assert!(size_of::<VersionResponse>() == 16);

/// In [`OfferChannel::flags`]: the channel is a pipe (`VMBUS_CHANNEL_NAMED_PIPE_MODE`).
pub const NAMED_PIPE_MODE: u16 = 0x10;

/// What the user-defined part of a pipe's offer begins with when it carries messages
/// (`VMBUS_PIPE_TYPE_MESSAGE`).
pub const PIPE_MESSAGE: u32 = 4;

/// `struct vmbus_channel_offer_channel`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OfferChannel {
    /// Header.
    pub header: MessageHeader,
    /// Class of the device.
    pub class: Guid,
    /// Instance of the device.
    pub instance: Guid,
    /// Zero.
    pub reserved: [U64; 2],
    /// Channel flags.
    pub flags: U16,
    /// MMIO space that the device needs.
    pub mmio_megabytes: U16,
    /// For the device's driver.
    pub user_defined: [u8; 120],
    /// 0 for a primary channel.
    pub sub_channel_index: U16,
    /// Zero.
    pub reserved2: U16,
    /// The number of the channel in all other messages.
    pub relid: U32,
    /// 0xff: no monitor.
    pub monitor_id: u8,
    /// 0: no monitor.
    pub monitor_allocated: u8,
    /// Bit 0: signals have a connection of their own.
    pub is_dedicated_interrupt: U16,
    /// The connection on which the guest signals this channel.
    pub connection_id: U32,
}

const _: () = assert!(size_of::<OfferChannel>() == 196);

/// A message that is a header and one number: `vmbus_channel_rescind_offer`,
/// `_close_channel`, `_relid_released`, `_gpadl_torndown`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OneId {
    /// Header.
    pub header: MessageHeader,
    /// A relid or a GPADL.
    pub id: U32,
}

const _: () = assert!(size_of::<OneId>() == 12);

/// A message that is a header and two numbers: `vmbus_channel_gpadl_teardown`,
/// `_modifychannel`, `_modifychannel_response`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TwoIds {
    /// Header.
    pub header: MessageHeader,
    /// A relid.
    pub relid: U32,
    /// A GPADL, processor or status.
    pub value: U32,
}

const _: () = assert!(size_of::<TwoIds>() == 16);

/// A message that is a header and three numbers: `vmbus_channel_open_result`,
/// `_gpadl_created`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ThreeIds {
    /// Header.
    pub header: MessageHeader,
    /// A relid.
    pub relid: U32,
    /// The guest's id of the opening, or the GPADL.
    pub id: U32,
    /// 0 for success.
    pub status: U32,
}

const _: () = assert!(size_of::<ThreeIds>() == 20);

/// `struct vmbus_channel_open_channel`, without its header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OpenChannel {
    /// The channel.
    pub relid: U32,
    /// Repeated in the result.
    pub open_id: U32,
    /// The GPADL that holds both rings.
    pub gpadl: U32,
    /// The virtual processor that is to be signalled.
    pub target_vp: U32,
    /// The page in the GPADL where the ring towards the guest starts.
    pub downstream_page: U32,
    /// For the device.
    pub user_data: [u8; 120],
}

const _: () = assert!(size_of::<OpenChannel>() + 8 == 148);

/// `struct vmbus_channel_gpadl_header` without its header, with its first `struct gpa_range`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct GpadlHeader {
    /// The channel.
    pub relid: U32,
    /// The guest's number of the GPADL.
    pub gpadl: U32,
    /// Bytes of all ranges, those in GPADL_BODY messages included.
    pub range_bytes: U16,
    /// How many ranges there are.
    pub range_count: U16,
    /// Bytes in the first range.
    pub byte_count: U32,
    /// Where in its first page the range starts.
    pub byte_offset: U32,
}

const _: () = assert!(size_of::<GpadlHeader>() == 20);

/// `struct vmbus_channel_gpadl_body` without its header and page numbers.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct GpadlBody {
    /// Number of this message among the bodies.
    pub number: U32,
    /// The GPADL that it continues.
    pub gpadl: U32,
}

const _: () = assert!(size_of::<GpadlBody>() == 8);

/// A control message from the guest.
#[derive(Clone, Debug)]
pub enum GuestMessage {
    /// Asks for a version.
    InitiateContact(InitiateContact),
    /// Asks for all offers.
    RequestOffers,
    /// Opens a channel.
    OpenChannel(OpenChannel),
    /// Closes a channel.
    CloseChannel {
        /// Which.
        relid: u32,
    },
    /// Starts the description of a piece of memory.
    GpadlHeader {
        /// The fixed part.
        header: GpadlHeader,
        /// The first page numbers.
        pages: Vec<u64>,
    },
    /// Continues the description of a piece of memory.
    GpadlBody {
        /// Which.
        gpadl: u32,
        /// More page numbers.
        pages: Vec<u64>,
    },
    /// Takes a piece of memory back.
    GpadlTeardown {
        /// Its channel.
        relid: u32,
        /// Which.
        gpadl: u32,
    },
    /// The guest has forgotten a channel that was rescinded.
    RelidReleased {
        /// Which.
        relid: u32,
    },
    /// The guest leaves the bus.
    Unload,
    /// Moves a channel's interrupt to another processor.
    ModifyChannel {
        /// Which channel.
        relid: u32,
        /// Which processor.
        target_vp: u32,
    },
}

/// Why bytes from the guest are no control message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Too few bytes for the message that they claim to be.
    #[error("message type {message_type} of {bytes} bytes is too short")]
    Short {
        /// The type, 0 when not even that is there.
        message_type: u32,
        /// How many bytes there are.
        bytes: usize,
    },
    /// A type that a guest does not send.
    #[error("unknown message type {0}")]
    Unknown(u32),
}

impl GuestMessage {
    /// The message that these bytes are. Bytes beyond its end are ignored, as a host does.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseError> {
        let short = |message_type| ParseError::Short {
            message_type,
            bytes: bytes.len(),
        };
        let (header, rest) = MessageHeader::read_from_prefix(bytes).map_err(|_| short(0))?;
        let kind = header.message_type.get();
        fn read<T: FromBytes>(bytes: &[u8]) -> Option<(T, &[u8])> {
            T::read_from_prefix(bytes).ok()
        }
        fn pages(bytes: &[u8]) -> Vec<u64> {
            let chunks = bytes.chunks_exact(8);
            chunks
                .filter_map(|chunk| Some(u64::from_le_bytes(chunk.try_into().ok()?)))
                .collect()
        }
        let parsed = match kind {
            message::INITIATE_CONTACT => read(rest).map(|(m, _)| Self::InitiateContact(m)),
            message::REQUESTOFFERS => Some(Self::RequestOffers),
            message::OPENCHANNEL => read(rest).map(|(m, _)| Self::OpenChannel(m)),
            message::CLOSECHANNEL => {
                read::<U32>(rest).map(|(m, _)| Self::CloseChannel { relid: m.get() })
            }
            message::GPADL_HEADER => read(rest).map(|(header, rest)| Self::GpadlHeader {
                header,
                pages: pages(rest),
            }),
            message::GPADL_BODY => read::<GpadlBody>(rest).map(|(m, rest)| Self::GpadlBody {
                gpadl: m.gpadl.get(),
                pages: pages(rest),
            }),
            message::GPADL_TEARDOWN => {
                read::<[U32; 2]>(rest).map(|([relid, gpadl], _)| Self::GpadlTeardown {
                    relid: relid.get(),
                    gpadl: gpadl.get(),
                })
            }
            message::RELID_RELEASED => {
                read::<U32>(rest).map(|(m, _)| Self::RelidReleased { relid: m.get() })
            }
            message::UNLOAD => Some(Self::Unload),
            message::MODIFYCHANNEL => {
                read::<[U32; 2]>(rest).map(|([relid, vp], _)| Self::ModifyChannel {
                    relid: relid.get(),
                    target_vp: vp.get(),
                })
            }
            unknown => return Err(ParseError::Unknown(unknown)),
        };
        parsed.ok_or_else(|| short(kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guid_prints_as_the_guest_names_its_directory() {
        let vss = crate::ic::vss::CLASS;
        assert_eq!(vss.to_string(), "35fa2e29-ea23-4236-96ae-3a6ebacba440");
        assert_eq!(vss.0[..4], [0x29, 0x2e, 0xfa, 0x35]);
    }

    #[test]
    fn every_cut_of_every_message_is_an_error_or_a_message() {
        for kind in 0..30u32 {
            for len in 0..MAX_MESSAGE {
                let mut bytes = kind.to_le_bytes().to_vec();
                bytes.resize(MAX_MESSAGE, 0xff);
                bytes.truncate(len);
                let _ = GuestMessage::parse(&bytes);
            }
        }
        assert_eq!(
            GuestMessage::parse(&[1, 2, 3]).err(),
            Some(ParseError::Short {
                message_type: 0,
                bytes: 3
            })
        );
        assert_eq!(
            GuestMessage::parse(&[99, 0, 0, 0, 0, 0, 0, 0]).err(),
            Some(ParseError::Unknown(99))
        );
    }
}
