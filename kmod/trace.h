/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Tracepoints: one event for each step of a request, with its id, which is what a v2 daemon sees, and
 * the host's own number for it, the transaction id in the descriptor of its packet.
 *
 *	echo 1 > /sys/kernel/tracing/events/hv_vss/enable
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM hv_vss

#if !defined(HV_VSS_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define HV_VSS_TRACE_H

#include <linux/tracepoint.h>

#define hv_vss_operation(operation)		\
	__print_symbolic(operation,		\
		{ 0, "CREATE" },		\
		{ 1, "DELETE" },		\
		{ 2, "HOT_BACKUP" },		\
		{ 3, "GET_DM_INFO" },		\
		{ 4, "BU_COMPLETE" },		\
		{ 5, "FREEZE" },		\
		{ 6, "THAW" },			\
		{ 7, "AUTO_RECOVER" })

TRACE_EVENT(hv_vss_negotiated,
	TP_PROTO(u16 framework_major, u16 framework_minor, u16 vss_major, u16 vss_minor),
	TP_ARGS(framework_major, framework_minor, vss_major, vss_minor),
	TP_STRUCT__entry(
		__field(u16, framework_major)
		__field(u16, framework_minor)
		__field(u16, vss_major)
		__field(u16, vss_minor)
	),
	TP_fast_assign(
		__entry->framework_major = framework_major;
		__entry->framework_minor = framework_minor;
		__entry->vss_major = vss_major;
		__entry->vss_minor = vss_minor;
	),
	TP_printk("framework=%u.%u vss=%u.%u",
		  __entry->framework_major, __entry->framework_minor,
		  __entry->vss_major, __entry->vss_minor)
);

TRACE_EVENT(hv_vss_request,
	TP_PROTO(u64 id, u64 transaction, u8 operation, u32 stage),
	TP_ARGS(id, transaction, operation, stage),
	TP_STRUCT__entry(
		__field(u64, id)
		__field(u64, transaction)
		__field(u8, operation)
		__field(u32, stage)
	),
	TP_fast_assign(
		__entry->id = id;
		__entry->transaction = transaction;
		__entry->operation = operation;
		__entry->stage = stage;
	),
	TP_printk("id=%llu operation=%s stage=%s transaction=%llu",
		  __entry->id, hv_vss_operation(__entry->operation),
		  __print_symbolic(__entry->stage,
			{ HV_VSS_STAGE_RECEIVED, "received" },
			{ HV_VSS_STAGE_HELD, "held" },
			{ HV_VSS_STAGE_OFFERED, "offered" },
			{ HV_VSS_STAGE_READ, "read" },
			{ HV_VSS_STAGE_TIMED_OUT, "timed-out" }),
		  __entry->transaction)
);

/* id 0: answered without the daemon. */
TRACE_EVENT(hv_vss_answer,
	TP_PROTO(u64 id, u64 transaction, u8 operation, u32 status, u64 latency_us),
	TP_ARGS(id, transaction, operation, status, latency_us),
	TP_STRUCT__entry(
		__field(u64, id)
		__field(u64, transaction)
		__field(u64, latency_us)
		__field(u32, status)
		__field(u8, operation)
	),
	TP_fast_assign(
		__entry->id = id;
		__entry->transaction = transaction;
		__entry->latency_us = latency_us;
		__entry->status = status;
		__entry->operation = operation;
	),
	TP_printk("id=%llu operation=%s status=0x%08x latency_us=%llu transaction=%llu",
		  __entry->id, hv_vss_operation(__entry->operation), __entry->status,
		  __entry->latency_us, __entry->transaction)
);

/* abi 0: the daemon is gone. */
TRACE_EVENT(hv_vss_daemon,
	TP_PROTO(u32 abi),
	TP_ARGS(abi),
	TP_STRUCT__entry(
		__field(u32, abi)
	),
	TP_fast_assign(
		__entry->abi = abi;
	),
	TP_printk("abi=%u", __entry->abi)
);

/* The freeze did not last until its THAW; reason as in struct hv_vss_thawed, 0: daemon gone. */
TRACE_EVENT(hv_vss_broken,
	TP_PROTO(u64 id, u32 reason),
	TP_ARGS(id, reason),
	TP_STRUCT__entry(
		__field(u64, id)
		__field(u32, reason)
	),
	TP_fast_assign(
		__entry->id = id;
		__entry->reason = reason;
	),
	TP_printk("id=%llu reason=%u", __entry->id, __entry->reason)
);

/* A packet of this many bytes was dropped. */
TRACE_EVENT(hv_vss_bad_packet,
	TP_PROTO(u64 len),
	TP_ARGS(len),
	TP_STRUCT__entry(
		__field(u64, len)
	),
	TP_fast_assign(
		__entry->len = len;
	),
	TP_printk("len=%llu", __entry->len)
);

/* A write of the daemon was refused with this errno. */
TRACE_EVENT(hv_vss_bad_frame,
	TP_PROTO(int error),
	TP_ARGS(error),
	TP_STRUCT__entry(
		__field(int, error)
	),
	TP_fast_assign(
		__entry->error = error;
	),
	TP_printk("error=%d", __entry->error)
);

/* What the module did to one file system for request id, and how long that took. */
DECLARE_EVENT_CLASS(hv_vss_file_system,
	TP_PROTO(u64 id, u32 major, u32 minor, int error, s64 us),
	TP_ARGS(id, major, minor, error, us),
	TP_STRUCT__entry(
		__field(u64, id)
		__field(s64, us)
		__field(u32, major)
		__field(u32, minor)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->id = id;
		__entry->us = us;
		__entry->major = major;
		__entry->minor = minor;
		__entry->error = error;
	),
	TP_printk("id=%llu device=%u:%u error=%d us=%lld", __entry->id, __entry->major,
		  __entry->minor, __entry->error, __entry->us)
);

DEFINE_EVENT(hv_vss_file_system, hv_vss_freeze,
	TP_PROTO(u64 id, u32 major, u32 minor, int error, s64 us),
	TP_ARGS(id, major, minor, error, us)
);

DEFINE_EVENT(hv_vss_file_system, hv_vss_thaw,
	TP_PROTO(u64 id, u32 major, u32 minor, int error, s64 us),
	TP_ARGS(id, major, minor, error, us)
);

#endif

/* Outside of the guard: read once for each thing that the tracing core makes of it. */
#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
