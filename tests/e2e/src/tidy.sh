#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# What Guest::tidy has a guest do, in one go: each step is named before it is begun, so that the last of
# them is the one that failed. In the payload as /payload/tidy, since the way there is slow.

echo "what a case may have set"
echo 500 >/proc/sys/vm/dirty_writeback_centisecs
[ $(($(cat /sys/class/net/lo/flags) & 1)) = 1 ] || ip link set lo up || exit 1

echo "no process of a daemon is left"
while pidof hv_vss_daemon hv_vss_guard >/dev/null; do sleep 0.02; done
# As after a boot: the next daemon is no heir of those that were killed.
rm -rf /run/hv_vss

echo "what was mounted is unmounted"
sync
while grep -q ' /mnt/' /proc/mounts; do
    path=$(grep ' /mnt/' /proc/mounts | tail -n 1 | cut -d ' ' -f 2)
    path=$(printf %b "$path")
    umount "$path" && continue
    # A volume or loop device without a mount may still hold a file there.
    [ ! -e /sys/module/dm_mod ] || dmsetup remove_all --force
    losetup -D
    umount "$path" || exit 1
done
[ ! -e /sys/module/dm_mod ] || dmsetup remove_all --force
losetup -D

echo "no module is left"
for module in hv_vss hv_utils; do
    if grep -q "^$module " /proc/modules; then rmmod $module || exit 1; fi
done
if [ -e /dev/vmbus/hv_vss ]; then exit 1; fi

echo "the driver of SCSI disks can be unloaded"
# What is under way on a disk that is gone holds it for a moment longer. The root may be on one.
grep -q '^/dev/sd[^ ]* / ' /proc/mounts ||
    while grep -q '^hv_storvsc ' /proc/modules && ! rmmod hv_storvsc 2>/dev/null; do sleep 0.02; done
