/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What travels between a guest and its host, in the kernel's own words: read by bindgen (wire.sh) and
 * by nothing else. Structures and numbers come from what is included. Only what bindgen cannot read
 * (macros with arguments or casts) or Rust cannot have is made into numbers here.
 */
#include <linux/hyperv.h>
#include <scsi/scsi_proto.h>

/* What is between the bus and the host alone: connections. */
#include "drivers/hv/hyperv_vmbus.h"

/* The storage protocol has no header. */
#include "drivers/scsi/storvsc_drv.c"

/* Nor has dynamic memory. */
#include "drivers/hv/hv_balloon.c"

/* The host's statuses of storage are NTSTATUS, which the kernel knows from SMB. */
#include "fs/smb/client/nterr.h"

/* The header of a ring, a packed structure that has aligned bits in it. */
static const u32 WIRE_RING_WRITE_INDEX = offsetof(struct hv_ring_buffer, write_index);
static const u32 WIRE_RING_READ_INDEX = offsetof(struct hv_ring_buffer, read_index);
static const u32 WIRE_RING_INTERRUPT_MASK = offsetof(struct hv_ring_buffer, interrupt_mask);
static const u32 WIRE_RING_PENDING_SEND_SZ = offsetof(struct hv_ring_buffer, pending_send_sz);
static const u32 WIRE_RING_FEATURE_BITS = offsetof(struct hv_ring_buffer, feature_bits);
static const u32 WIRE_RING_BUFFER = offsetof(struct hv_ring_buffer, buffer);

static const u64 WIRE_HYP_PAGE_SIZE = HV_HYP_PAGE_SIZE;

static const u32 WIRE_VERSION_WIN10 = VERSION_WIN10;
static const u32 WIRE_VERSION_WIN10_V4_1 = VERSION_WIN10_V4_1;
static const u32 WIRE_VERSION_WIN10_V5 = VERSION_WIN10_V5;
static const u32 WIRE_VERSION_WIN10_V5_1 = VERSION_WIN10_V5_1;
static const u32 WIRE_VERSION_WIN10_V5_2 = VERSION_WIN10_V5_2;
static const u32 WIRE_VERSION_WIN10_V5_3 = VERSION_WIN10_V5_3;
static const u32 WIRE_VERSION_WIN10_V6_0 = VERSION_WIN10_V6_0;

static const u16 WIRE_VMSTOR_WIN8_1 = VMSTOR_PROTO_VERSION_WIN8_1;
static const u16 WIRE_VMSTOR_WIN10 = VMSTOR_PROTO_VERSION_WIN10;

static const u64 WIRE_DM_MAX_MESSAGE = sizeof(recv_buffer);

/* Eight bytes of the GUID of a class, as they lie in memory. */
#define WIRE_BYTE(class, n)	((u64)((struct hv_vmbus_device_id){ class }).guid.b[n] << ((n) % 8 * 8))
#define WIRE_EIGHT(class, n)	(WIRE_BYTE(class, n) | WIRE_BYTE(class, (n) + 1) |	\
				 WIRE_BYTE(class, (n) + 2) | WIRE_BYTE(class, (n) + 3) |	\
				 WIRE_BYTE(class, (n) + 4) | WIRE_BYTE(class, (n) + 5) |	\
				 WIRE_BYTE(class, (n) + 6) | WIRE_BYTE(class, (n) + 7))
#define WIRE_CLASS(name, class)						\
	static const s64 WIRE_##name##_CLASS_0 = WIRE_EIGHT(class, 0);	\
	static const s64 WIRE_##name##_CLASS_8 = WIRE_EIGHT(class, 8)

WIRE_CLASS(VSS, HV_VSS_GUID);
WIRE_CLASS(SHUTDOWN, HV_SHUTDOWN_GUID);
WIRE_CLASS(HEARTBEAT, HV_HEART_BEAT_GUID);
WIRE_CLASS(TIMESYNC, HV_TS_GUID);
WIRE_CLASS(KVP, HV_KVP_GUID);
WIRE_CLASS(SCSI, HV_SCSI_GUID);
WIRE_CLASS(DM, HV_DM_GUID);
