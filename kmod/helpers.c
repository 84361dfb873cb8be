// SPDX-License-Identifier: GPL-2.0
/*
 * C that Rust cannot call by itself; see helpers.h.
 */
#include <linux/device.h>
#include <linux/jiffies.h>
#include <linux/math64.h>
#include <linux/module.h>
#include <linux/ratelimit.h>
#include <linux/rcupdate.h>
#include <linux/suspend.h>

#include "helpers.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

u32 hv_vss_ring_size(u32 payload)
{
	return VMBUS_RING_SIZE(payload);
}

bool hv_vss_channel_is_closed(const struct vmbus_channel *channel)
{
	/* The name of the state says that it may be opened; an open one is in CHANNEL_OPENED_STATE. */
	return channel->state == CHANNEL_OPEN_STATE;
}

u32 hv_vss_prepare_channel(struct vmbus_channel *channel, u32 ring_size)
{
	u32 before = channel->max_pkt_size;

	/*
	 * A packet has a trailer of eight bytes, and one that filled the ring would leave it empty. No
	 * more than that: from a host whose write index lies outside of the ring, the ring code takes
	 * this many bytes at a time, and moves on by them and the trailer. It comes back around the
	 * end of the ring only if that is less than the ring.
	 */
	channel->max_pkt_size = ring_size - sizeof(struct hv_ring_buffer) - 2 * sizeof(u64);

	/*
	 * The default, but hv_utils leaves another mode behind, in which the callback is not called
	 * again for what it has left in the ring.
	 */
	set_channel_read_mode(channel, HV_CALL_BATCHED);
	return before;
}

void hv_vss_put_back_channel(struct vmbus_channel *channel, u32 longest_packet)
{
	channel->max_pkt_size = longest_packet;
	set_channel_read_mode(channel, HV_CALL_BATCHED);
}

u32 hv_vss_longest_packet(const struct vmbus_channel *channel)
{
	return channel->max_pkt_size;
}

void hv_vss_mute_channel(struct vmbus_channel *channel)
{
	unsigned long flags;

	/* Under which the interrupt looks at the mode. */
	spin_lock_irqsave(&channel->sched_lock, flags);
	set_channel_read_mode(channel, HV_CALL_DIRECT);
	spin_unlock_irqrestore(&channel->sched_lock, flags);
}

void hv_vss_device_lock(struct device *dev)
{
	device_lock(dev);
}

void hv_vss_device_unlock(struct device *dev)
{
	device_unlock(dev);
}

bool hv_vss_ns_capable(struct user_namespace *ns, int capability)
{
	return ns_capable(ns, capability);
}

struct vfsmount *hv_vss_mount_of(unsigned int fd)
{
	struct file *file = fget_raw(fd);
	struct vfsmount *mount;

	if (!file)
		return NULL;
	mount = mntget(file->f_path.mnt);
	fput(file);
	return mount;
}

#define HV_VSS_HOLDER	((enum freeze_holder)(FREEZE_HOLDER_KERNEL | FREEZE_EXCL))

int hv_vss_freeze_super(struct super_block *sb, const void *owner)
{
	if (sb->s_op->freeze_super)
		return sb->s_op->freeze_super(sb, HV_VSS_HOLDER, owner);
	return freeze_super(sb, HV_VSS_HOLDER, owner);
}

int hv_vss_thaw_super(struct super_block *sb, const void *owner)
{
	if (sb->s_op->thaw_super)
		return sb->s_op->thaw_super(sb, HV_VSS_HOLDER, owner);
	return thaw_super(sb, HV_VSS_HOLDER, owner);
}

bool hv_vss_is_frozen_for(const struct super_block *sb, const void *owner)
{
	/* Under s_umount, but only the owner itself is asking. */
	return READ_ONCE(sb->s_writers.frozen) == SB_FREEZE_COMPLETE &&
	       READ_ONCE(sb->s_writers.freeze_owner) == owner;
}

bool hv_vss_module_try_get(void)
{
	return try_module_get(THIS_MODULE);
}

void hv_vss_module_get(void)
{
	__module_get(THIS_MODULE);
}

void hv_vss_module_put(void)
{
	module_put(THIS_MODULE);
}

/* Exported for modules, but declared only in kernel/rcu/rcu.h; with tiny RCU there is nothing to do. */
#ifdef CONFIG_TINY_RCU
static inline void rcu_expedite_gp(void) { }
static inline void rcu_unexpedite_gp(void) { }
#else
void rcu_expedite_gp(void);
void rcu_unexpedite_gp(void);
#endif

void hv_vss_rcu_expedite(void)
{
	rcu_expedite_gp();
}

void hv_vss_rcu_unexpedite(void)
{
	rcu_unexpedite_gp();
}

long hv_vss_wait_killable(struct wait_queue_head *queue, bool (*condition)(void *data), void *data,
			  u32 timeout_ms, bool forever)
{
	long timeout = forever ? MAX_SCHEDULE_TIMEOUT : msecs_to_jiffies(timeout_ms);

	return wait_event_killable_timeout(*queue, condition(data), timeout);
}

long hv_vss_wait_idle(struct wait_queue_head *queue, bool (*condition)(void *data), void *data,
		      u32 timeout_ms)
{
	return wait_event_idle_timeout(*queue, condition(data), msecs_to_jiffies(timeout_ms));
}

int hv_vss_register_pm_notifier(struct notifier_block *block)
{
	return register_pm_notifier(block);
}

void hv_vss_unregister_pm_notifier(struct notifier_block *block)
{
	unregister_pm_notifier(block);
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

void hv_vss_trace_negotiated(u16 framework_major, u16 framework_minor, u16 vss_major,
			     u16 vss_minor)
{
	trace_hv_vss_negotiated(framework_major, framework_minor, vss_major, vss_minor);
}

void hv_vss_trace_request(u64 id, u64 transaction, u8 operation, u32 stage)
{
	trace_hv_vss_request(id, transaction, operation, stage);
}

void hv_vss_trace_answer(u64 id, u64 transaction, u8 operation, u32 status, u64 latency_us)
{
	trace_hv_vss_answer(id, transaction, operation, status, latency_us);
}

void hv_vss_trace_daemon(u32 abi)
{
	trace_hv_vss_daemon(abi);
}

void hv_vss_trace_broken(u64 id, u32 reason)
{
	trace_hv_vss_broken(id, reason);
}

void hv_vss_trace_bad_packet(u64 len)
{
	trace_hv_vss_bad_packet(len);
}

void hv_vss_trace_bad_frame(int error)
{
	trace_hv_vss_bad_frame(error);
}

void hv_vss_trace_freeze(u64 id, u32 major, u32 minor, int error, s64 us)
{
	trace_hv_vss_freeze(id, major, minor, error, us);
}

void hv_vss_trace_thaw(u64 id, u32 major, u32 minor, int error, s64 us)
{
	trace_hv_vss_thaw(id, major, minor, error, us);
}

#if LINUX_VERSION_CODE < KERNEL_VERSION(7, 3, 0)
unsigned long hv_vss_spin_lock_irqsave(spinlock_t *lock)
{
	unsigned long flags;

	spin_lock_irqsave(lock, flags);
	return flags;
}

bool hv_vss_spin_trylock_irqsave(spinlock_t *lock, unsigned long *flags)
{
	return spin_trylock_irqsave(lock, *flags);
}

void hv_vss_spin_unlock_irqrestore(spinlock_t *lock, unsigned long flags)
{
	spin_unlock_irqrestore(lock, flags);
}
#endif
