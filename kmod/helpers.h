/* SPDX-License-Identifier: GPL-2.0 */
/*
 * C that Rust cannot call by itself: static inlines, macros, rate limits. One prototype each, read
 * by the C compiler and by bindgen alike. No decisions in here.
 */
#ifndef HV_VSS_HELPERS_H
#define HV_VSS_HELPERS_H

#include <linux/hyperv.h>
#include <linux/timer.h>
#include <linux/types.h>

/* Bytes to ask vmbus_open() for, so that a ring holds @payload bytes of packets. */
u32 hv_vss_ring_size(u32 payload);

/* Largest packet that the ring code will hand out whole; to be set before vmbus_open(). */
void hv_vss_set_max_pkt_size(struct vmbus_channel *channel, u32 size);

/* timer_setup() without flags: @function runs in softirq context. */
void hv_vss_timer_setup(struct timer_list *timer, void (*function)(struct timer_list *));

/* (Re)starts @timer so that it expires not before @us microseconds from now. */
void hv_vss_timer_arm(struct timer_list *timer, u64 us);

/* Whether one more warning may be written now: ten in five seconds. */
bool hv_vss_may_warn(void);

#endif
