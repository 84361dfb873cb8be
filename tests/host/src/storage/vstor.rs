// SPDX-License-Identifier: GPL-2.0-only

//! Layouts and numbers of the storage protocol on VMBus, as the stock `hv_storvsc` speaks it.
//!
//! Names and numbers are those of `drivers/scsi/storvsc_drv.c`, statuses those of openvmm's
//! `storvsp`; all integers are little-endian. Bytes from the guest become a [`Request`] or an error
//! here.

use crate::vmbus::protocol::Guid;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Device class of a SCSI controller (`HV_SCSI_GUID`).
pub const CLASS: Guid = Guid::new(
    0xba6163d9,
    0x04a1,
    0x4d29,
    [0xb6, 0x05, 0x72, 0xe2, 0xff, 0xb1, 0xdc, 0x7f],
);

/// Operations (`enum vstor_packet_operation`).
pub mod operation {
    #![allow(missing_docs, reason = "the names are the driver's")]
    pub const COMPLETE_IO: u32 = 1;
    pub const EXECUTE_SRB: u32 = 3;
    pub const RESET_LUN: u32 = 4;
    pub const RESET_ADAPTER: u32 = 5;
    pub const RESET_BUS: u32 = 6;
    pub const BEGIN_INITIALIZATION: u32 = 7;
    pub const END_INITIALIZATION: u32 = 8;
    pub const QUERY_PROTOCOL_VERSION: u32 = 9;
    pub const QUERY_PROPERTIES: u32 = 10;
    pub const ENUMERATE_BUS: u32 = 11;
    pub const CREATE_SUB_CHANNELS: u32 = 13;
}

/// Statuses of a whole packet (`NTSTATUS`).
pub mod status {
    #![allow(missing_docs, reason = "the names are those of NTSTATUS")]
    pub const SUCCESS: u32 = 0;
    pub const INVALID_PARAMETER: u32 = 0xc000_000d;
    pub const REVISION_MISMATCH: u32 = 0xc000_0059;
    pub const DEVICE_DOES_NOT_EXIST: u32 = 0xc000_00c0;
    pub const CANCELLED: u32 = 0xc000_0120;
    pub const INVALID_DEVICE_STATE: u32 = 0xc000_0184;
    pub const IO_DEVICE_ERROR: u32 = 0xc000_0185;
}

/// Statuses of a SCSI request (`SRB_STATUS_*`).
pub mod srb_status {
    #![allow(missing_docs, reason = "the names are the driver's")]
    pub const SUCCESS: u8 = 0x01;
    pub const ABORTED: u8 = 0x02;
    pub const ERROR: u8 = 0x04;
    pub const INVALID_REQUEST: u8 = 0x06;
    pub const DATA_OVERRUN: u8 = 0x12;
    pub const INVALID_LUN: u8 = 0x20;
    pub const AUTOSENSE_VALID: u8 = 0x80;
}

/// Statuses of SCSI itself, in [`ScsiRequest::scsi_status`].
pub mod scsi_status {
    /// The command ended well.
    pub const GOOD: u8 = 0;
    /// There are sense data.
    pub const CHECK_CONDITION: u8 = 2;
}

/// In [`Header::flags`]: the sender wants a completion (`REQUEST_COMPLETION_FLAG`).
pub const REQUEST_COMPLETION: u32 = 1;

/// The versions that are spoken: Windows 8.1 and Windows 10 (`VMSTOR_PROTO_VERSION_*`).
pub const VERSIONS: [u16; 2] = [0x0600, 0x0602];

/// In [`ScsiRequest::data_in`]: the guest sends the data (`WRITE_TYPE`).
pub const DATA_OUT: u8 = 0;
/// The guest gets the data (`READ_TYPE`).
pub const DATA_IN: u8 = 1;

/// What starts every message (`struct vstor_packet` without its union).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// One of [`operation`].
    pub operation: U32,
    /// [`REQUEST_COMPLETION`].
    pub flags: U32,
    /// One of [`status`], from the host.
    pub status: U32,
}

const _: () = assert!(size_of::<Header>() == 12);

/// Bytes of the union that follows.
pub const BODY: usize = 0x34;

/// Bytes of a whole message.
pub const MESSAGE: usize = size_of::<Header>() + BODY;

/// A SCSI command, and what became of it (`struct vmscsi_request`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ScsiRequest {
    /// Of this structure.
    pub length: U16,
    /// One of [`srb_status`].
    pub srb_status: u8,
    /// One of [`scsi_status`].
    pub scsi_status: u8,
    /// The guest's number of the controller.
    pub port: u8,
    /// SCSI bus.
    pub path: u8,
    /// Target on it.
    pub target: u8,
    /// Logical unit of that.
    pub lun: u8,
    /// How much of the payload is the command.
    pub cdb_length: u8,
    /// How much of the payload are sense data, or may be.
    pub sense_length: u8,
    /// [`DATA_OUT`], [`DATA_IN`], or none (`UNKNOWN_TYPE`).
    pub data_in: u8,
    /// Zero.
    pub reserved: u8,
    /// Bytes that are to be moved, or that were.
    pub data_length: U32,
    /// The command, or sense data.
    pub payload: [u8; 20],
    /// Zero.
    pub reserved2: U16,
    /// What the guest knows it by.
    pub queue_tag: u8,
    /// Simple, ordered, ...
    pub queue_action: u8,
    /// `SRB_FLAGS_*`.
    pub flags: U32,
    /// What the guest gives it, in seconds.
    pub timeout_s: U32,
    /// For elevators.
    pub sort_key: U32,
}

const _: () = assert!(size_of::<ScsiRequest>() == BODY);

/// What the host tells of its channels (`struct vmstorage_channel_properties`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChannelProperties {
    /// Zero.
    pub reserved: U32,
    /// How many more channels the guest may ask for.
    pub max_sub_channels: U16,
    /// Zero.
    pub reserved1: U16,
    /// 1: it may ask at all (`STORAGE_CHANNEL_SUPPORTS_MULTI_CHANNEL`).
    pub flags: U32,
    /// The most that one command may move.
    pub max_transfer_bytes: U32,
    /// Zero.
    pub reserved2: [U32; 2],
}

const _: () = assert!(size_of::<ChannelProperties>() == 24);

/// What the guest wants.
#[derive(Clone, Copy, Debug)]
pub enum Request {
    /// Start over.
    BeginInitialization,
    /// Speak this version.
    QueryProtocolVersion(u16),
    /// Tell of the channels.
    QueryProperties,
    /// So many more channels.
    CreateSubChannels(u16),
    /// From now on commands come.
    EndInitialization,
    /// A command.
    ExecuteSrb(ScsiRequest),
    /// Give back all commands that have not ended.
    Reset,
}

/// A message that is none.
#[derive(Debug, thiserror::Error)]
pub enum BadRequest {
    /// It is not as long as all are.
    #[error("a storage message of {0} bytes")]
    Length(usize),
    /// It is of no kind that guests send.
    #[error("a storage message of type {0}")]
    Operation(u32),
}

impl Request {
    /// What these bytes mean.
    pub fn parse(bytes: &[u8]) -> Result<Request, BadRequest> {
        let length = || BadRequest::Length(bytes.len());
        let (header, body) = Header::ref_from_prefix(bytes).map_err(|_| length())?;
        let (request, _) = ScsiRequest::ref_from_prefix(body).map_err(|_| length())?;
        let (number, _) = U16::ref_from_prefix(body).map_err(|_| length())?;
        Ok(match header.operation.get() {
            operation::BEGIN_INITIALIZATION => Request::BeginInitialization,
            operation::QUERY_PROTOCOL_VERSION => Request::QueryProtocolVersion(number.get()),
            operation::QUERY_PROPERTIES => Request::QueryProperties,
            operation::CREATE_SUB_CHANNELS => Request::CreateSubChannels(number.get()),
            operation::END_INITIALIZATION => Request::EndInitialization,
            operation::EXECUTE_SRB => Request::ExecuteSrb(*request),
            operation::RESET_LUN | operation::RESET_ADAPTER | operation::RESET_BUS => {
                Request::Reset
            }
            other => return Err(BadRequest::Operation(other)),
        })
    }
}

/// A message from the host, padded to its full length.
pub fn message(operation: u32, status: u32, body: &[u8]) -> Vec<u8> {
    let header = Header {
        operation: U32::new(operation),
        flags: U32::new(0),
        status: U32::new(status),
    };
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(body);
    bytes.resize(MESSAGE, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_laid_out_as_in_the_driver() {
        let mut bytes = message(operation::EXECUTE_SRB, 0, &[]);
        assert_eq!(bytes.len(), 64);
        bytes[12 + 7] = 3;
        bytes[12 + 8] = 10;
        bytes[12 + 12] = 0x00;
        bytes[12 + 13] = 0x02;
        bytes[12 + 16] = 0x28;
        let Ok(Request::ExecuteSrb(request)) = Request::parse(&bytes) else {
            panic!("a command");
        };
        assert_eq!((request.lun, request.cdb_length), (3, 10));
        assert_eq!(request.data_length.get(), 512);
        assert_eq!(request.payload[0], 0x28);
    }

    #[test]
    fn what_is_short_or_unknown_is_no_request() {
        let bytes = message(operation::BEGIN_INITIALIZATION, 0, &[]);
        assert!(matches!(
            Request::parse(&bytes),
            Ok(Request::BeginInitialization)
        ));
        for len in 0..MESSAGE {
            assert!(matches!(
                Request::parse(&bytes[..len]),
                Err(BadRequest::Length(_))
            ));
        }
        let bytes = message(99, 0, &[]);
        assert!(matches!(
            Request::parse(&bytes),
            Err(BadRequest::Operation(99))
        ));
        let bytes = message(operation::QUERY_PROTOCOL_VERSION, 0, &[2, 6]);
        assert!(matches!(
            Request::parse(&bytes),
            Ok(Request::QueryProtocolVersion(0x0602))
        ));
    }
}
