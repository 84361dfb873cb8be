/* SPDX-License-Identifier: GPL-2.0 */
/*
 * C that Rust cannot call by itself: static inlines, macros, rate limits. One prototype each, read
 * by the C compiler and by bindgen alike. No decisions in here.
 */
#ifndef HV_VSS_HELPERS_H
#define HV_VSS_HELPERS_H

#include <linux/hyperv.h>
#include <linux/spinlock.h>
#include <linux/timer.h>
#include <linux/types.h>
#include <linux/version.h>

/* Bytes to ask vmbus_open() for, so that a ring holds @payload bytes of packets. */
u32 hv_vss_ring_size(u32 payload);

/* Whether vmbus_open() would find @channel as it must be: offered and not open. */
bool hv_vss_channel_is_closed(const struct vmbus_channel *channel);

/*
 * Lets the ring code hand out every packet that fits a ring of @ring_size bytes, see above, and call
 * back as long as there are any; to be called before vmbus_open().
 */
void hv_vss_prepare_channel(struct vmbus_channel *channel, u32 ring_size);

/* timer_setup() without flags: @function runs in softirq context. */
void hv_vss_timer_setup(struct timer_list *timer, void (*function)(struct timer_list *));

/* (Re)starts @timer so that it expires not before @us microseconds from now. */
void hv_vss_timer_arm(struct timer_list *timer, u64 us);

/* How far a request has come, for hv_vss_trace_request(). */
#define HV_VSS_STAGE_RECEIVED	1
#define HV_VSS_STAGE_HELD	2
#define HV_VSS_STAGE_OFFERED	3
#define HV_VSS_STAGE_READ	4
#define HV_VSS_STAGE_TIMED_OUT	5

/* The tracepoints of trace.h, which says what their arguments are. */
void hv_vss_trace_negotiated(u16 framework_major, u16 framework_minor, u16 vss_major,
			     u16 vss_minor);
void hv_vss_trace_request(u64 id, u64 transaction, u8 operation, u32 stage);
void hv_vss_trace_answer(u64 id, u64 transaction, u8 operation, u32 status, u64 latency_us);
void hv_vss_trace_daemon(u32 abi);
void hv_vss_trace_broken(u64 id, u32 reason);
void hv_vss_trace_bad_packet(u64 len);
void hv_vss_trace_bad_frame(int error);

/* Whether one more warning may be written now: ten in five seconds. */
bool hv_vss_may_warn(void);

#if LINUX_VERSION_CODE < KERNEL_VERSION(7, 3, 0)
/* For the lock in compat.rs. */
unsigned long hv_vss_spin_lock_irqsave(spinlock_t *lock);
bool hv_vss_spin_trylock_irqsave(spinlock_t *lock, unsigned long *flags);
void hv_vss_spin_unlock_irqrestore(spinlock_t *lock, unsigned long flags);
#endif

#endif
