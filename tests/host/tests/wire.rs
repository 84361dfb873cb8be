// SPDX-License-Identifier: GPL-2.0-only

//! Compares the host's idea of the wire with the kernel's: every structure, field, offset, size and
//! number of the host's that the kernel's source defines.
//!
//! The kernel's side is generated from its source by bindgen (`tests/lab/wire.sh`), so nobody has
//! copied it by hand. What only Windows and openvmm define is not here: the body of a FREEZE with its
//! disks, which versions a host offers, the sizes of messages. Nor is what the host shows to nobody:
//! the slots of its SynIC, its hypercalls.

#![cfg(wire_bindings)]

use hyperv_sim::balloon::message::{
    self as memory, CapabilitiesBody, Message, PageRange, StatusBody, VersionBody,
};
use hyperv_sim::ic::heartbeat::Beat;
use hyperv_sim::ic::shutdown::ShutdownBody;
use hyperv_sim::ic::timesync::{self, Sample};
use hyperv_sim::ic::vss::{self, Op};
use hyperv_sim::ic::{self, heartbeat, kvp, shutdown, IcHeader, NegotiateHeader, Version};
use hyperv_sim::storage::vstor::{self, ChannelProperties, Header, Request, ScsiRequest};
use hyperv_sim::vmbus::control::{CONNECTION, CONNECTION_V5, MESSAGE_PORT};
use hyperv_sim::vmbus::protocol::{
    message, packet_type, GpaDirect, GpaRange, GpadlBody, GpadlHeader, GuestMessage,
    InitiateContact, MessageHeader, OfferChannel, OneId, OpenChannel, PacketDescriptor, ThreeIds,
    TwoIds, VersionResponse, MAX_MESSAGE, NAMED_PIPE_MODE, PAGE_SIZE, PIPE_MESSAGE,
};
use hyperv_sim::vmbus::ring::Field;
use hyperv_sim::{Guid, VmbusVersion};
use std::mem::{offset_of, size_of};
use zerocopy::IntoBytes;

#[allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unsafe_op_in_unsafe_fn,
    reason = "the names are C's, the code is bindgen's"
)]
mod kernel {
    include!(env!("HV_WIRE_BINDINGS"));
}

/// `Host = kernel { field = path, ... }`: the structures are of one size, and each field of the host's
/// lies where the kernel's does. A structure of the host's may be several of the kernel's, one `then` the
/// other. It may lack what the kernel's starts or ends with: a header that it comes `after`, a union
/// that it comes `before`.
///
/// Neither side has gaps, so the offsets and the size give the fields' sizes too.
macro_rules! same_layout {
    (
        $host:ident $(after $before:ident)? $(before $after:ident)? =
        $($kernel:ident { $($field:ident = $($path:ident).+ $(+ $further:literal)?),* $(,)? }) then +
    ) => {{
        // Fails to compile when the list is not the whole structure.
        #[allow(dead_code)]
        fn whole(host: $host) { let $host { $($($field: _,)*)* } = host; }

        let before = 0 $(+ size_of::<kernel::$before>())?;
        let mut start = 0;
        $(
            $(assert_eq!(
                before + offset_of!($host, $field),
                start + offset_of!(kernel::$kernel, $($path).+) $(+ $further)?,
                "{}::{} does not lie where {}::{} does",
                stringify!($host), stringify!($field), stringify!($kernel), stringify!($($path).+),
            );)*
            start += size_of::<kernel::$kernel>();
        )+
        assert_eq!(
            before + size_of::<$host>() $(+ size_of::<kernel::$after>())?,
            start,
            "{} is not of the kernel's size", stringify!($host),
        );
    }};
}

/// `HOST => KERNEL, ...`: the numbers are the same.
macro_rules! same_numbers {
    ($($host:expr => $kernel:ident),* $(,)?) => {
        $(assert_eq!(
            $host as u64,
            kernel::$kernel as u64,
            "{} is not {}", stringify!($host), stringify!($kernel),
        );)*
    };
}

/// The GUID whose bytes these are.
fn guid(first: i64, second: i64) -> Guid {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&first.to_le_bytes());
    bytes[8..].copy_from_slice(&second.to_le_bytes());
    Guid(bytes)
}

/// A message of so many bytes with these numbers at these offsets, zero elsewhere.
fn bytes_with<const N: usize>(size: usize, numbers: [(usize, u32); N]) -> Vec<u8> {
    let mut bytes = vec![0; size];
    for (offset, number) in numbers {
        bytes[offset..][..4].copy_from_slice(&number.to_le_bytes());
    }
    bytes
}

#[test]
fn control_messages_are_laid_out_as_the_kernels() {
    same_layout!(MessageHeader = vmbus_channel_message_header {
        message_type = msgtype,
        padding = padding,
    });
    same_layout!(InitiateContact after vmbus_channel_message_header = vmbus_channel_initiate_contact {
        version = vmbus_version_requested,
        target_vp = target_vcpu,
        interrupt = __bindgen_anon_1.interrupt_page,
        monitor_page1 = monitor_page1,
        monitor_page2 = monitor_page2,
    });
    same_layout!(VersionResponse = vmbus_channel_version_response {
        header = header,
        supported = version_supported,
        connection_state = connection_state,
        padding = padding,
        connection_id = msg_conn_id,
    });
    same_layout!(OfferChannel = vmbus_channel_offer_channel {
        header = header,
        class = offer.if_type,
        instance = offer.if_instance,
        reserved = offer.reserved1,
        flags = offer.chn_flags,
        mmio_megabytes = offer.mmio_megabytes,
        user_defined = offer.u.std.user_def,
        sub_channel_index = offer.sub_channel_index,
        reserved2 = offer.reserved3,
        relid = child_relid,
        monitor_id = monitorid,
        // The bits of both; which is whose is below.
        monitor_allocated = _bitfield_1,
        is_dedicated_interrupt = _bitfield_1 + 1,
        connection_id = connection_id,
    });
    same_layout!(OpenChannel after vmbus_channel_message_header = vmbus_channel_open_channel {
        relid = child_relid,
        open_id = openid,
        gpadl = ringbuffer_gpadlhandle,
        target_vp = target_vp,
        downstream_page = downstream_ringbuffer_pageoffset,
        user_data = userdata,
    });
    same_layout!(GpadlHeader after vmbus_channel_message_header = vmbus_channel_gpadl_header {
        relid = child_relid,
        gpadl = gpadl,
        range_bytes = range_buflen,
        range_count = rangecount,
    } then gpa_range {
        byte_count = byte_count,
        byte_offset = byte_offset,
    });
    same_layout!(GpadlBody after vmbus_channel_message_header = vmbus_channel_gpadl_body {
        number = msgnumber,
        gpadl = gpadl,
    });
}

#[test]
fn messages_of_a_few_numbers_are_laid_out_as_the_kernels() {
    same_layout!(OneId = vmbus_channel_rescind_offer { header = header, id = child_relid });
    same_layout!(OneId = vmbus_channel_close_channel { header = header, id = child_relid });
    same_layout!(OneId = vmbus_channel_relid_released { header = header, id = child_relid });
    same_layout!(OneId = vmbus_channel_gpadl_torndown { header = header, id = gpadl });
    same_layout!(TwoIds = vmbus_channel_gpadl_teardown {
        header = header,
        relid = child_relid,
        value = gpadl,
    });
    same_layout!(TwoIds = vmbus_channel_modifychannel {
        header = header,
        relid = child_relid,
        value = target_vp,
    });
    same_layout!(TwoIds = vmbus_channel_modifychannel_response {
        header = header,
        relid = child_relid,
        value = status,
    });
    same_layout!(ThreeIds = vmbus_channel_open_result {
        header = header,
        relid = child_relid,
        id = openid,
        status = status,
    });
    same_layout!(ThreeIds = vmbus_channel_gpadl_created {
        header = header,
        relid = child_relid,
        id = gpadl,
        status = creation_status,
    });
}

/// Those that the host reads without a structure.
#[test]
fn a_guests_messages_of_a_few_numbers_are_read_where_the_kernel_puts_them() {
    use kernel::{
        vmbus_channel_close_channel as Close, vmbus_channel_gpadl_teardown as Teardown,
        vmbus_channel_modifychannel as Modify, vmbus_channel_relid_released as Released,
    };
    let parse = |bytes: Vec<u8>| GuestMessage::parse(&bytes);
    let close = bytes_with(
        size_of::<Close>(),
        [
            (offset_of!(Close, header.msgtype), message::CLOSECHANNEL),
            (offset_of!(Close, child_relid), 7),
        ],
    );
    assert!(matches!(
        parse(close),
        Ok(GuestMessage::CloseChannel { relid: 7 })
    ));
    let released = bytes_with(
        size_of::<Released>(),
        [
            (
                offset_of!(Released, header.msgtype),
                message::RELID_RELEASED,
            ),
            (offset_of!(Released, child_relid), 7),
        ],
    );
    assert!(matches!(
        parse(released),
        Ok(GuestMessage::RelidReleased { relid: 7 })
    ));
    let teardown = bytes_with(
        size_of::<Teardown>(),
        [
            (
                offset_of!(Teardown, header.msgtype),
                message::GPADL_TEARDOWN,
            ),
            (offset_of!(Teardown, child_relid), 7),
            (offset_of!(Teardown, gpadl), 8),
        ],
    );
    assert!(matches!(
        parse(teardown),
        Ok(GuestMessage::GpadlTeardown { relid: 7, gpadl: 8 })
    ));
    let modify = bytes_with(
        size_of::<Modify>(),
        [
            (offset_of!(Modify, header.msgtype), message::MODIFYCHANNEL),
            (offset_of!(Modify, child_relid), 7),
            (offset_of!(Modify, target_vp), 8),
        ],
    );
    assert!(matches!(
        parse(modify),
        Ok(GuestMessage::ModifyChannel {
            relid: 7,
            target_vp: 8
        })
    ));
}

#[test]
fn the_bits_of_an_offer_are_the_kernels() {
    use kernel::vmbus_channel_offer_channel as Offer;
    // The host writes 1 to each field.
    assert!(Offer::new_bitfield_1(1, 0, 0, 0).get_bit(0));
    assert!(Offer::new_bitfield_1(0, 0, 1, 0).get_bit(8));
    assert_eq!(
        offset_of!(OfferChannel, user_defined),
        offset_of!(Offer, offer.u.pipe.pipe_mode)
    );
    same_numbers!(
        NAMED_PIPE_MODE => VMBUS_CHANNEL_NAMED_PIPE_MODE,
        PIPE_MESSAGE => VMBUS_PIPE_TYPE_MESSAGE,
    );
}

#[test]
fn the_numbers_of_the_bus_are_the_kernels() {
    same_numbers!(
        message::OFFERCHANNEL => CHANNELMSG_OFFERCHANNEL,
        message::RESCIND_CHANNELOFFER => CHANNELMSG_RESCIND_CHANNELOFFER,
        message::REQUESTOFFERS => CHANNELMSG_REQUESTOFFERS,
        message::ALLOFFERS_DELIVERED => CHANNELMSG_ALLOFFERS_DELIVERED,
        message::OPENCHANNEL => CHANNELMSG_OPENCHANNEL,
        message::OPENCHANNEL_RESULT => CHANNELMSG_OPENCHANNEL_RESULT,
        message::CLOSECHANNEL => CHANNELMSG_CLOSECHANNEL,
        message::GPADL_HEADER => CHANNELMSG_GPADL_HEADER,
        message::GPADL_BODY => CHANNELMSG_GPADL_BODY,
        message::GPADL_CREATED => CHANNELMSG_GPADL_CREATED,
        message::GPADL_TEARDOWN => CHANNELMSG_GPADL_TEARDOWN,
        message::GPADL_TORNDOWN => CHANNELMSG_GPADL_TORNDOWN,
        message::RELID_RELEASED => CHANNELMSG_RELID_RELEASED,
        message::INITIATE_CONTACT => CHANNELMSG_INITIATE_CONTACT,
        message::VERSION_RESPONSE => CHANNELMSG_VERSION_RESPONSE,
        message::UNLOAD => CHANNELMSG_UNLOAD,
        message::UNLOAD_RESPONSE => CHANNELMSG_UNLOAD_RESPONSE,
        message::MODIFYCHANNEL => CHANNELMSG_MODIFYCHANNEL,
        message::MODIFYCHANNEL_RESPONSE => CHANNELMSG_MODIFYCHANNEL_RESPONSE,
        VmbusVersion::V4_0.0 => WIRE_VERSION_WIN10,
        VmbusVersion::V4_1.0 => WIRE_VERSION_WIN10_V4_1,
        VmbusVersion::V5_0.0 => WIRE_VERSION_WIN10_V5,
        VmbusVersion::V5_1.0 => WIRE_VERSION_WIN10_V5_1,
        VmbusVersion::V5_2.0 => WIRE_VERSION_WIN10_V5_2,
        VmbusVersion::V5_3.0 => WIRE_VERSION_WIN10_V5_3,
        VmbusVersion::V6_0.0 => WIRE_VERSION_WIN10_V6_0,
        CONNECTION => VMBUS_MESSAGE_CONNECTION_ID,
        CONNECTION_V5 => VMBUS_MESSAGE_CONNECTION_ID_4,
        MESSAGE_PORT => VMBUS_MESSAGE_PORT_ID,
        MAX_MESSAGE => HV_MESSAGE_PAYLOAD_BYTE_COUNT,
        PAGE_SIZE => WIRE_HYP_PAGE_SIZE,
    );
}

#[test]
fn rings_and_packets_are_the_kernels() {
    same_numbers!(
        Field::WriteIndex => WIRE_RING_WRITE_INDEX,
        Field::ReadIndex => WIRE_RING_READ_INDEX,
        Field::InterruptMask => WIRE_RING_INTERRUPT_MASK,
        Field::PendingSendSize => WIRE_RING_PENDING_SEND_SZ,
        Field::FeatureBits => WIRE_RING_FEATURE_BITS,
        // The header is one page.
        PAGE_SIZE => WIRE_RING_BUFFER,
    );
    // Bit 0 of the features is that of the pending send size.
    type Features = kernel::hv_ring_buffer__bindgen_ty_1__bindgen_ty_1;
    assert!(Features::new_bitfield_1(1).get_bit(0));

    same_layout!(PacketDescriptor = vmpacket_descriptor {
        packet_type = type_,
        offset8 = offset8,
        len8 = len8,
        flags = flags,
        transaction = trans_id,
    });
    // What the guest lends with a packet, which the host reads; its page numbers come last.
    same_layout!(GpaDirect after vmpacket_descriptor before gpa_range = vmdata_gpa_direct {
        reserved = reserved,
        range_count = range_cnt,
    });
    same_layout!(GpaRange = gpa_range { byte_count = byte_count, byte_offset = byte_offset });
    assert_eq!(
        size_of::<GpaRange>(),
        offset_of!(kernel::gpa_range, pfn_array)
    );
    same_numbers!(
        packet_type::DATA_INBAND => VM_PKT_DATA_INBAND,
        packet_type::DATA_USING_GPA_DIRECT => VM_PKT_DATA_USING_GPA_DIRECT,
        packet_type::COMPLETION => VM_PKT_COMP,
    );
}

#[test]
fn integration_components_speak_as_the_kernel_does() {
    same_layout!(IcHeader = vmbuspipe_hdr {
        pipe_flags = flags,
        pipe_size = msgsize,
    } then icmsg_hdr {
        framework = icverframe,
        message_type = icmsgtype,
        message = icvermsg,
        message_size = icmsgsize,
        status = status,
        transaction = ictransaction_id,
        flags = icflags,
        reserved = reserved,
    });
    same_layout!(NegotiateHeader = icmsg_negotiate {
        framework_count = icframe_vercnt,
        message_count = icmsg_vercnt,
        reserved = reserved,
    });
    // The fields of a version are its own.
    let version = Version::new(3, 2);
    assert_eq!(size_of::<Version>(), size_of::<kernel::ic_version>());
    assert_eq!(version.as_bytes()[offset_of!(kernel::ic_version, major)], 3);
    assert_eq!(version.as_bytes()[offset_of!(kernel::ic_version, minor)], 2);
    let number = |version: Version| u32::from(version.major()) << 16 | u32::from(version.minor());
    same_numbers!(
        number(ic::FRAMEWORKS[0]) => UTIL_WS2K8_FW_VERSION,
        number(ic::FRAMEWORKS[1]) => UTIL_FW_VERSION,
        ic::message_type::NEGOTIATE => ICMSGTYPE_NEGOTIATE,
        ic::message_type::HEARTBEAT => ICMSGTYPE_HEARTBEAT,
        ic::message_type::KVP => ICMSGTYPE_KVPEXCHANGE,
        ic::message_type::SHUTDOWN => ICMSGTYPE_SHUTDOWN,
        ic::message_type::TIMESYNC => ICMSGTYPE_TIMESYNC,
        ic::message_type::VSS => ICMSGTYPE_VSS,
        ic::flags::TRANSACTION => ICMSGHDRFLAG_TRANSACTION,
        ic::flags::REQUEST => ICMSGHDRFLAG_REQUEST,
        ic::flags::RESPONSE => ICMSGHDRFLAG_RESPONSE,
        ic::status::OK => HV_S_OK,
        ic::status::FAIL => HV_E_FAIL,
        ic::status::NOT_SUPPORTED => HV_ERROR_NOT_SUPPORTED,
    );
}

#[test]
fn the_bodies_of_the_components_are_the_kernels() {
    same_layout!(ShutdownBody = shutdown_msg_data {
        reason = reason_code,
        timeout_s = timeout_seconds,
        flags = flags,
        text = display_message,
    });
    same_layout!(Beat = heartbeat_msg_data { sequence = seq_num, reserved = reserved });
    same_layout!(Sample = ictimesync_data {
        parent_time = parenttime,
        child_time = childtime,
        round_trip_time = roundtriptime,
        flags = flags,
    });
    same_numbers!(
        timesync::SYNC => ICTIMESYNCFLAG_SYNC,
        timesync::BEFORE_UNIX.as_nanos() / 100 => WLTIMEDELTA,
    );
}

#[test]
fn vss_messages_begin_as_the_kernels() {
    let freeze = vss::message(Op::FREEZE, &[]);
    assert_eq!(freeze.len(), size_of::<kernel::hv_vss_hdr>());
    assert_eq!(
        freeze[offset_of!(kernel::hv_vss_hdr, operation)],
        Op::FREEZE.0
    );
    // Where an answer has its flags.
    assert_eq!(
        freeze.len(),
        offset_of!(kernel::hv_vss_msg, __bindgen_anon_2.vss_cf.flags)
    );
    same_numbers!(
        Op::CREATE.0 => VSS_OP_CREATE,
        Op::DELETE.0 => VSS_OP_DELETE,
        Op::HOT_BACKUP.0 => VSS_OP_HOT_BACKUP,
        Op::GET_DM_INFO.0 => VSS_OP_GET_DM_INFO,
        Op::BU_COMPLETE.0 => VSS_OP_BU_COMPLETE,
        Op::FREEZE.0 => VSS_OP_FREEZE,
        Op::THAW.0 => VSS_OP_THAW,
        Op::AUTO_RECOVER.0 => VSS_OP_AUTO_RECOVER,
        vss::HBU_NO_AUTO_RECOVERY => VSS_HBU_NO_AUTO_RECOVERY,
    );
}

#[test]
fn storage_messages_are_laid_out_as_the_drivers() {
    same_layout!(Header before vstor_packet__bindgen_ty_1 = vstor_packet {
        operation = operation,
        flags = flags,
        status = status,
    });
    same_layout!(ScsiRequest = vmscsi_request {
        length = length,
        srb_status = srb_status,
        scsi_status = scsi_status,
        port = port_number,
        path = path_id,
        target = target_id,
        lun = lun,
        cdb_length = cdb_length,
        sense_length = sense_info_length,
        data_in = data_in,
        reserved = reserved,
        data_length = data_transfer_length,
        payload = __bindgen_anon_1,
        reserved2 = reserve,
        queue_tag = queue_tag,
        queue_action = queue_action,
        flags = srb_flags,
        timeout_s = time_out_value,
        sort_key = queue_sort_ey,
    });
    same_layout!(ChannelProperties = vmstorage_channel_properties {
        reserved = reserved,
        max_sub_channels = max_channel_cnt,
        reserved1 = reserved1,
        flags = flags,
        max_transfer_bytes = max_transfer_bytes,
        reserved2 = reserved2,
    });
    assert_eq!(vstor::BODY, size_of::<kernel::vstor_packet__bindgen_ty_1>());
    assert_eq!(vstor::MESSAGE, size_of::<kernel::vstor_packet>());
}

/// Those that the host reads without a structure.
#[test]
fn numbers_in_storage_messages_are_read_where_the_driver_puts_them() {
    use kernel::vstor_packet as Packet;
    let packet = |operation, offset, number| {
        let numbers = [(offset_of!(Packet, operation), operation), (offset, number)];
        Request::parse(&bytes_with(size_of::<Packet>(), numbers))
    };
    let version = offset_of!(Packet, __bindgen_anon_1.version.major_minor);
    assert!(matches!(
        packet(vstor::operation::QUERY_PROTOCOL_VERSION, version, 0x0602),
        Ok(Request::QueryProtocolVersion(0x0602))
    ));
    let count = offset_of!(Packet, __bindgen_anon_1.sub_channel_count);
    assert!(matches!(
        packet(vstor::operation::CREATE_SUB_CHANNELS, count, 3),
        Ok(Request::CreateSubChannels(3))
    ));
}

#[test]
fn the_numbers_of_storage_are_the_drivers() {
    same_numbers!(
        vstor::operation::COMPLETE_IO => VSTOR_OPERATION_COMPLETE_IO,
        vstor::operation::EXECUTE_SRB => VSTOR_OPERATION_EXECUTE_SRB,
        vstor::operation::RESET_LUN => VSTOR_OPERATION_RESET_LUN,
        vstor::operation::RESET_ADAPTER => VSTOR_OPERATION_RESET_ADAPTER,
        vstor::operation::RESET_BUS => VSTOR_OPERATION_RESET_BUS,
        vstor::operation::BEGIN_INITIALIZATION => VSTOR_OPERATION_BEGIN_INITIALIZATION,
        vstor::operation::END_INITIALIZATION => VSTOR_OPERATION_END_INITIALIZATION,
        vstor::operation::QUERY_PROTOCOL_VERSION => VSTOR_OPERATION_QUERY_PROTOCOL_VERSION,
        vstor::operation::QUERY_PROPERTIES => VSTOR_OPERATION_QUERY_PROPERTIES,
        vstor::operation::ENUMERATE_BUS => VSTOR_OPERATION_ENUMERATE_BUS,
        vstor::operation::CREATE_SUB_CHANNELS => VSTOR_OPERATION_CREATE_SUB_CHANNELS,
        vstor::VERSIONS[0] => WIRE_VMSTOR_WIN8_1,
        vstor::VERSIONS[1] => WIRE_VMSTOR_WIN10,
        vstor::REQUEST_COMPLETION => REQUEST_COMPLETION_FLAG,
        vstor::DATA_OUT => WRITE_TYPE,
        vstor::srb_status::SUCCESS => SRB_STATUS_SUCCESS,
        vstor::srb_status::ABORTED => SRB_STATUS_ABORTED,
        vstor::srb_status::ERROR => SRB_STATUS_ERROR,
        vstor::srb_status::INVALID_REQUEST => SRB_STATUS_INVALID_REQUEST,
        vstor::srb_status::INVALID_LUN => SRB_STATUS_INVALID_LUN,
        vstor::srb_status::AUTOSENSE_VALID => SRB_STATUS_AUTOSENSE_VALID,
        vstor::scsi_status::GOOD => SAM_STAT_GOOD,
        vstor::scsi_status::CHECK_CONDITION => SAM_STAT_CHECK_CONDITION,
        vstor::status::INVALID_PARAMETER => NT_STATUS_INVALID_PARAMETER,
        vstor::status::REVISION_MISMATCH => NT_STATUS_REVISION_MISMATCH,
        vstor::status::DEVICE_DOES_NOT_EXIST => NT_STATUS_DEVICE_DOES_NOT_EXIST,
        vstor::status::CANCELLED => NT_STATUS_CANCELLED,
        vstor::status::INVALID_DEVICE_STATE => NT_STATUS_INVALID_DEVICE_STATE,
        vstor::status::IO_DEVICE_ERROR => NT_STATUS_IO_DEVICE_ERROR,
    );
}

#[test]
fn memory_messages_are_laid_out_as_the_drivers() {
    use memory::Header;
    same_layout!(Header = dm_header {
        message_type = type_,
        size = size,
        transaction = trans_id,
    });
    same_layout!(VersionBody after dm_header = dm_version_request {
        version = version,
        last_attempt = _bitfield_1,
    });
    same_layout!(CapabilitiesBody after dm_header = dm_capabilities {
        bits = caps,
        min_pages = min_page_cnt,
        max_page = max_page_number,
    });
    same_layout!(StatusBody after dm_header = dm_status {
        available = num_avail,
        committed = num_committed,
        windows = page_file_size,
    });
}

/// So many bytes of a memory message of the guest's, zero but for its header and these words.
fn memory_message(message_type: u16, size: usize, words: &[(usize, u64)]) -> Vec<u8> {
    use kernel::dm_header as Header;
    let mut bytes = vec![0; size];
    for (offset, word) in words {
        bytes[*offset..][..8].copy_from_slice(&word.to_le_bytes());
    }
    for (offset, number) in [
        (offset_of!(Header, type_), message_type),
        (offset_of!(Header, size), size as u16),
        (offset_of!(Header, trans_id), 9),
    ] {
        bytes[offset..][..2].copy_from_slice(&number.to_le_bytes());
    }
    bytes
}

/// The number that lies there.
fn number_at<const N: usize>(bytes: &[u8], offset: usize) -> u64 {
    let mut number = [0; 8];
    number[..N].copy_from_slice(&bytes[offset..][..N]);
    u64::from_le_bytes(number)
}

/// Those that the host reads and writes bit by bit.
#[test]
fn bits_and_ranges_of_memory_messages_are_the_drivers() {
    use kernel::{
        dm_balloon as Balloon, dm_balloon_response as Ballooned, dm_capabilities as Capabilities,
        dm_capabilities_resp_msg as CapabilitiesResponse, dm_unballoon_request as Unballoon,
        dm_version_request as VersionRequest, dm_version_response as VersionResponse,
    };
    use memory::message_type::*;
    type Caps = kernel::dm_caps__bindgen_ty_1;
    type Range = kernel::dm_mem_page_range__bindgen_ty_1;
    let range = PageRange {
        first: 0xab_cdef_0123,
        count: 0x45_6789,
    };
    let of_driver = Range::new_bitfield_1(range.first, range.count.into()).get(0, 64);

    // The bit after the version is of no interest, so it may be set.
    let last = VersionRequest::new_bitfield_1(1, 0).get(0, 32);
    let version = (
        offset_of!(VersionRequest, version),
        last << 32 | u64::from(memory::VERSION),
    );
    assert_eq!(
        Message::parse(&memory_message(
            VERSION_REQUEST,
            size_of::<VersionRequest>(),
            &[version]
        )),
        Ok((9, Message::Version(memory::VERSION)))
    );
    let caps = [
        (1, 0, 0, (true, false, 1)),
        (0, 1, 0, (false, true, 1)),
        (0, 0, 7, (false, false, 128)),
    ];
    for (balloon, hot_add, alignment, expected) in caps {
        let bits = Caps::new_bitfield_1(balloon, hot_add, alignment, 0).get(0, 64);
        let words = [(offset_of!(Capabilities, caps), bits)];
        let bytes = memory_message(CAPABILITIES_REPORT, size_of::<Capabilities>(), &words);
        let Ok((9, Message::Capabilities(it))) = Message::parse(&bytes) else {
            panic!("capabilities {bits:#x} are not understood");
        };
        let seen = (it.balloon, it.hot_add, it.hot_add_alignment_mib);
        assert_eq!(seen, expected);
    }
    for more in [false, true] {
        // They follow a reserved word.
        let list = Ballooned::new_bitfield_1(more.into(), 1).get(0, 32);
        assert_eq!(
            offset_of!(Ballooned, _bitfield_1),
            offset_of!(Ballooned, reservedz) + 4
        );
        let words = [
            (offset_of!(Ballooned, reservedz), list << 32),
            (offset_of!(Ballooned, range_array), of_driver),
        ];
        let size = size_of::<Ballooned>() + size_of::<kernel::dm_mem_page_range>();
        let bytes = memory_message(BALLOON_RESPONSE, size, &words);
        let ranges = vec![range];
        let expected = Message::Ballooned { more, ranges };
        assert_eq!(Message::parse(&bytes), Ok((9, expected)));
    }
    let bytes = memory_message(
        UNBALLOON_RESPONSE,
        size_of::<kernel::dm_unballoon_response>(),
        &[],
    );
    assert_eq!(Message::parse(&bytes), Ok((9, Message::Unballooned)));

    for accepted in [false, true] {
        let bytes = memory::version_response(9, accepted);
        let bits = VersionResponse::new_bitfield_1(accepted.into(), 0).get(0, 64);
        assert_eq!(bytes.len(), size_of::<VersionResponse>());
        let offset = offset_of!(VersionResponse, _bitfield_1);
        assert_eq!(number_at::<8>(&bytes, offset), bits);
    }
    let bytes = memory::capabilities_response(9);
    let bits = CapabilitiesResponse::new_bitfield_1(1, 0).get(0, 64);
    assert_eq!(bytes.len(), size_of::<CapabilitiesResponse>());
    let offset = offset_of!(CapabilitiesResponse, _bitfield_1);
    assert_eq!(number_at::<8>(&bytes, offset), bits);

    let bytes = memory::balloon_request(9, 0x1234_5678);
    assert_eq!(bytes.len(), size_of::<Balloon>());
    let offset = offset_of!(Balloon, num_pages);
    assert_eq!(number_at::<4>(&bytes, offset), 0x1234_5678);
    assert_eq!(number_at::<4>(&bytes, offset_of!(Balloon, reservedz)), 0);
    for more in [false, true] {
        let bytes = memory::unballoon_request(9, &[range], more);
        let bits = Unballoon::new_bitfield_1(more.into(), 0).get(0, 32);
        let offset = offset_of!(Unballoon, _bitfield_1);
        assert_eq!(number_at::<4>(&bytes, offset), bits);
        let offset = offset_of!(Unballoon, range_count);
        assert_eq!(number_at::<4>(&bytes, offset), 1);
        let offset = offset_of!(Unballoon, range_array);
        assert_eq!(number_at::<8>(&bytes, offset), of_driver);
        assert_eq!(bytes.len(), offset + 8);
    }
}

#[test]
fn the_numbers_of_memory_are_the_drivers() {
    use memory::message_type;
    same_numbers!(
        message_type::VERSION_REQUEST => DM_VERSION_REQUEST,
        message_type::VERSION_RESPONSE => DM_VERSION_RESPONSE,
        message_type::CAPABILITIES_REPORT => DM_CAPABILITIES_REPORT,
        message_type::CAPABILITIES_RESPONSE => DM_CAPABILITIES_RESPONSE,
        message_type::STATUS_REPORT => DM_STATUS_REPORT,
        message_type::BALLOON_REQUEST => DM_BALLOON_REQUEST,
        message_type::BALLOON_RESPONSE => DM_BALLOON_RESPONSE,
        message_type::UNBALLOON_REQUEST => DM_UNBALLOON_REQUEST,
        message_type::UNBALLOON_RESPONSE => DM_UNBALLOON_RESPONSE,
        memory::VERSION => DYNMEM_PROTOCOL_VERSION_WIN10,
        memory::MAX_MESSAGE => WIRE_DM_MAX_MESSAGE,
    );
}

#[test]
fn the_classes_of_devices_are_the_kernels() {
    use kernel::*;
    for (host, first, second) in [
        (vss::CLASS, WIRE_VSS_CLASS_0, WIRE_VSS_CLASS_8),
        (
            shutdown::CLASS,
            WIRE_SHUTDOWN_CLASS_0,
            WIRE_SHUTDOWN_CLASS_8,
        ),
        (
            heartbeat::CLASS,
            WIRE_HEARTBEAT_CLASS_0,
            WIRE_HEARTBEAT_CLASS_8,
        ),
        (
            timesync::CLASS,
            WIRE_TIMESYNC_CLASS_0,
            WIRE_TIMESYNC_CLASS_8,
        ),
        (kvp::CLASS, WIRE_KVP_CLASS_0, WIRE_KVP_CLASS_8),
        (vstor::CLASS, WIRE_SCSI_CLASS_0, WIRE_SCSI_CLASS_8),
        (memory::CLASS, WIRE_DM_CLASS_0, WIRE_DM_CLASS_8),
    ] {
        assert_eq!(host, guid(first, second));
    }
}
