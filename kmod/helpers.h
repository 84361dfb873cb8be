/* SPDX-License-Identifier: GPL-2.0 */
/*
 * C that Rust cannot call by itself: static inlines, macros, rate limits. One prototype each, read
 * by the C compiler and by bindgen alike. No decisions in here.
 */
#ifndef HV_VSS_HELPERS_H
#define HV_VSS_HELPERS_H

#include <linux/capability.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/hyperv.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/notifier.h>
#include <linux/spinlock.h>
#include <linux/timer.h>
#include <linux/types.h>
#include <linux/version.h>
#include <linux/wait.h>

/* Bytes to ask vmbus_open() for, so that a ring holds @payload bytes of packets. */
u32 hv_vss_ring_size(u32 payload);

/* Whether vmbus_open() would find @channel as it must be: offered and not open. */
bool hv_vss_channel_is_closed(const struct vmbus_channel *channel);

/*
 * Lets the ring code hand out every packet that fits a ring of @ring_size bytes, see above, and call
 * back as long as there are any; to be called before vmbus_open(). Returns what the longest one was before.
 */
u32 hv_vss_prepare_channel(struct vmbus_channel *channel, u32 ring_size);

/*
 * Leaves a channel to its next driver with @longest_packet, as it was before, and the default mode; to be
 * called after vmbus_close().
 */
void hv_vss_put_back_channel(struct vmbus_channel *channel, u32 longest_packet);

/* The longest packet that the ring code hands out from @channel, as prepared. */
u32 hv_vss_longest_packet(const struct vmbus_channel *channel);

/* No more callbacks for what is left in the ring. From the callback only: the bus looks at it after that. */
void hv_vss_mute_channel(struct vmbus_channel *channel);

/* device_lock() and device_unlock(). */
void hv_vss_device_lock(struct device *dev);
void hv_vss_device_unlock(struct device *dev);

/* ns_capable(): whether the caller may do that, an inline where there is one user only. */
bool hv_vss_ns_capable(struct user_namespace *ns, int capability);

/*
 * The mount that the caller's descriptor @fd was opened through, also as a path only (O_PATH), with a reference
 * to it; NULL when it is not open.
 */
struct vfsmount *hv_vss_mount_of(unsigned int fd);

/*
 * Freezes or thaws the file system of @sb as the kernel does for itself, exclusively for @owner, by the
 * operation of its own that it may have.
 */
int hv_vss_freeze_super(struct super_block *sb, const void *owner);
int hv_vss_thaw_super(struct super_block *sb, const void *owner);

/* Whether it is frozen so. Only for one who does neither meanwhile. */
bool hv_vss_is_frozen_for(const struct super_block *sb, const void *owner);

/*
 * try_module_get(THIS_MODULE), __module_get(THIS_MODULE), for one that cannot be going, and
 * module_put(THIS_MODULE).
 */
bool hv_vss_module_try_get(void);
void hv_vss_module_get(void);
void hv_vss_module_put(void);

/* Bits of kiocb.ki_flags and file.f_mode, whose macros bindgen cannot read. */
static const int HV_VSS_IOCB_NOWAIT = (__force int)IOCB_NOWAIT;
static const fmode_t HV_VSS_FMODE_NOWAIT = FMODE_NOWAIT;

/* rcu_expedite_gp() and rcu_unexpedite_gp(). */
void hv_vss_rcu_expedite(void);
void hv_vss_rcu_unexpedite(void);

/*
 * wait_event_killable_timeout(): for @timeout_ms, or @forever, until @condition(@data). Returns 0 when
 * the time is over, less when the caller is killed.
 */
long hv_vss_wait_killable(struct wait_queue_head *queue, bool (*condition)(void *data), void *data,
			  u32 timeout_ms, bool forever);

/*
 * wait_event_idle_timeout(): for @timeout_ms until @condition(@data), which nothing else ends. Returns 0
 * when the time is over.
 */
long hv_vss_wait_idle(struct wait_queue_head *queue, bool (*condition)(void *data), void *data,
		      u32 timeout_ms);

/* register_pm_notifier() and unregister_pm_notifier(). */
int hv_vss_register_pm_notifier(struct notifier_block *block);
void hv_vss_unregister_pm_notifier(struct notifier_block *block);

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
void hv_vss_trace_freeze(u64 id, u32 major, u32 minor, int error, s64 us);
void hv_vss_trace_thaw(u64 id, u32 major, u32 minor, int error, s64 us);

/* Whether one more warning may be written now: ten in five seconds. */
bool hv_vss_may_warn(void);

#if LINUX_VERSION_CODE < KERNEL_VERSION(7, 3, 0)
/* For the lock in compat.rs. */
unsigned long hv_vss_spin_lock_irqsave(spinlock_t *lock);
bool hv_vss_spin_trylock_irqsave(spinlock_t *lock, unsigned long *flags);
void hv_vss_spin_unlock_irqrestore(spinlock_t *lock, unsigned long flags);
#endif

#endif
