// SPDX-License-Identifier: GPL-2.0
/*
 * C that Rust cannot call by itself; see helpers.h.
 */

#include <linux/jiffies.h>
#include <linux/math64.h>
#include <linux/ratelimit.h>

#include "helpers.h"

u32 hv_vss_ring_size(u32 payload)
{
	return VMBUS_RING_SIZE(payload);
}

void hv_vss_set_max_pkt_size(struct vmbus_channel *channel, u32 size)
{
	channel->max_pkt_size = size;
}

void hv_vss_timer_setup(struct timer_list *timer, void (*function)(struct timer_list *))
{
	timer_setup(timer, function, 0);
}

void hv_vss_timer_arm(struct timer_list *timer, u64 us)
{
	u64 ms = min_t(u64, div_u64(us, USEC_PER_MSEC), INT_MAX - 1) + 1;

	mod_timer(timer, jiffies + msecs_to_jiffies(ms));
}

bool hv_vss_may_warn(void)
{
	static DEFINE_RATELIMIT_STATE(warnings, DEFAULT_RATELIMIT_INTERVAL,
				      DEFAULT_RATELIMIT_BURST);

	return __ratelimit(&warnings);
}
