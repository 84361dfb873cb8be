#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# What Guest::tidy has a guest do, in one go: each step is named before it is begun, so that the last of
# them is the one that failed. In the payload as /payload/tidy, since the way there is slow. A program that
# is started takes tens of milliseconds under emulation, and this runs after each case: what the shell can
# find out by itself it does, and nothing is started that has nothing to do.

echo "what a case may have set"
echo 500 >/proc/sys/vm/dirty_writeback_centisecs
read -r flags </sys/class/net/lo/flags
[ $((flags & 1)) = 1 ] || ip link set lo up || exit 1

echo "no process of a daemon is left"
while pidof hv_vss_daemon hv_vss_guard >/dev/null; do sleep 0.02; done
# As after a boot: the next daemon is no heir of those that were killed, and remembers nothing. Under systemd the
# configuration is what was installed.
left=
for folder in /run/hv_vss /var/lib/hv_vss /etc/hv_vss; do
    case $folder in /etc/*) [ ! -d /run/systemd/system ] || continue ;; esac
    [ ! -e $folder ] || left="$left $folder"
done
# shellcheck disable=SC2086  # one word each
[ -z "$left" ] || rm -rf $left || exit 1

echo "what was mounted is unmounted"
# The one below /mnt that was mounted last, empty without any.
last_mount() {
    path=
    while read -r _ at _; do
        case $at in /mnt/*) path=$at ;; esac
    done </proc/mounts
    case $path in *\\*) path=$(printf %b "$path") ;; esac
}
let_go() {
    [ ! -e /sys/module/dm_mod ] || dmsetup remove_all --force
    # Those that are bound have a file.
    for file in /sys/block/loop*/loop; do
        [ ! -e "$file" ] || losetup -D
        return
    done
}
sync
last_mount
while [ -n "$path" ]; do
    umount "$path" || {
        # A volume or loop device without a mount may still hold a file there.
        let_go
        umount "$path" || exit 1
    }
    last_mount
done
let_go

echo "no module is left"
for module in hv_vss hv_utils; do
    # What is built in has no such file.
    [ ! -e /sys/module/$module/initstate ] || rmmod $module || exit 1
done
if [ -e /dev/vmbus/hv_vss ]; then exit 1; fi

echo "the driver of SCSI disks can be unloaded"
# What is under way on a disk that is gone holds it for a moment longer. The root may be on one.
root=
while read -r from at _; do
    [ "$at" != / ] || root=$from
done </proc/mounts
case $root in
/dev/sd*) ;;
*) while [ -e /sys/module/hv_storvsc/initstate ] && ! rmmod hv_storvsc 2>/dev/null; do sleep 0.02; done ;;
esac
