#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Makes the two guests out of the build root: build/outer.cpio, the initramfs of the outer guest of
# a nested run, and build/guest.cpio, that of the guest under test. Both get more appended: the
# payload and what a test brings. For a KERNEL other than the default (lib.sh), guest.cpio alone, in
# that kernel's folder.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

# Modules of the guest under test: file systems, and devices to put them on.
inner_modules=(
    brd loop null_blk nbd dm-mod dm-crypt dm-delay dm-mirror dm-raid dm-snapshot dm-thin-pool raid1 scsi_debug sd_mod
    hv_utils hv_storvsc uio_hv_generic hv_balloon isofs target_core_file tcm_loop
    xfs btrfs vfat nls_cp437 nls_ascii nls_utf8 exfat overlay squashfs autofs4 fuse
)
inner_tools=(
    mke2fs mkfs.ext4 tune2fs dumpe2fs e2fsck mkfs.xfs xfs_io xfs_freeze xfs_logprint xfs_repair mkfs.btrfs btrfs btrfstune mkfs.vfat mkfs.exfat
    dash blkid findmnt flock fsfreeze losetup lsblk mount nsenter umount unshare wipefs dmsetup strace
)

case $kernel in
# What is needed of them by the cases that a debug kernel is built for.
debug*) inner_modules=(brd loop dm-mod hv_utils xfs btrfs) ;;
# It lacks the one that the others have as well.
6.1) ;;
*) inner_modules+=(nvme-loop) ;;
esac

# The part below runs inside the build root, with the kernel's folder at /build, the kernel at /chosen
# and this folder at /lab.
if [ "${1:-}" = --inside ]; then
    release=$(cat /chosen/release)
    modules=/usr/lib/modules/$release
    [ -e /chosen/lib ] || ln -s usr/lib /chosen/lib
    depmod --basedir /chosen "$release"

    # skeleton DIR: an empty, merged-usr root with busybox under all of its names.
    skeleton() {
        rm -rf "$1"
        mkdir -p "$1"/{dev,etc,mnt,payload,proc,root,run,sys,tmp,var} "$1"/usr/{bin,sbin,lib,lib64}
        for name in bin sbin lib lib64; do
            ln -s "usr/$name" "$1/$name"
        done
        ln -s ../run "$1/var/run"
        ln -s ../proc/self/mounts "$1/etc/mtab"
        echo 'root:x:0:0:root:/root:/bin/sh' >"$1/etc/passwd"
        echo 'root:x:0:' >"$1/etc/group"
        cp /usr/bin/busybox "$1/usr/bin/"
        local applet
        for applet in $(busybox --list | grep -vx busybox); do
            ln -sf busybox "$1/usr/bin/$applet"
        done
        # The kernel looks for its helpers in /sbin.
        for applet in modprobe poweroff reboot; do
            ln -s ../bin/busybox "$1/usr/sbin/$applet"
        done
    }

    # add DIR PATH...: copies programs or libraries and the libraries that they are linked with. The
    # path is the real one of the folder (usr is merged), the file keeps its name.
    add() {
        local dir=$1 file
        shift
        for file in "$@" $(ldd "$@" | sed -n 's/^\t\(.* => \)\?\(\/[^ ]*\) (.*/\2/p' | sort -u); do
            install -D -m 0755 "$file" "$dir$(realpath "$(dirname "$file")")/$(basename "$file")"
        done
    }

    # guest_modules DIR NAME...: modules of the kernel under test.
    guest_modules() {
        add_modules /chosen "$@"
        # busybox reads the text files; the binary twins would only make the image larger.
        rm -f "$1$modules"/modules.{*.bin,builtin.modinfo,order,devname,softdep,symbols,weakdep}
    }

    # pack DIR FILE: an initramfs. Uncompressed: where the processor is emulated, and emulated twice,
    # copying is cheaper than unpacking.
    pack() {
        (cd "$1" && find . -mindepth 1 | sort | cpio --quiet -o -H newc -R 0:0) >"$2.new"
        mv "$2.new" "$2"
        rm -rf "$1"
    }

    # Rust programs of the payload need these three in both guests.
    libraries=(/lib/x86_64-linux-gnu/{libc.so.6,libm.so.6,libgcc_s.so.1})

    # The outer guest always runs the default kernel.
    if [ "$kernel" = "$default_kernel" ]; then
        outer=/tmp/outer
        skeleton "$outer"
        add "$outer" "${libraries[@]}"
        guest_modules "$outer" kvm-amd
        install -m 0755 /lab/outer/init "$outer/init"
        pack "$outer" /build/outer.cpio
    fi

    inner=/tmp/inner
    skeleton "$inner"
    add "$inner" "${libraries[@]}"
    for tool in "${inner_tools[@]}"; do
        path=$(realpath "$(command -v "$tool")")
        rm -f "$inner/usr/bin/$tool"
        add "$inner" "$path"
        # mkfs.ext4 is a name of mke2fs
        [ "${path##*/}" = "$tool" ] || ln -s "$path" "$inner/usr/bin/$tool"
    done
    # busybox's own shell would take its own mount, losetup ... whatever PATH says
    ln -sf dash "$inner/usr/bin/sh"
    # The peer's daemon is the default kernel's whatever the kernel: it is linked for this userland.
    add "$inner" /kernel/usr/sbin/hv_vss_daemon
    mv "$inner/kernel/usr/sbin/hv_vss_daemon" "$inner/usr/sbin/"
    rm -r "$inner/kernel"
    guest_modules "$inner" "${inner_modules[@]}"
    install -m 0755 /lab/inner/init "$inner/init"
    install -m 0755 /lab/inner/sbin-init "$inner/usr/sbin/init"
    pack "$inner" /build/guest.cpio
    cp "/chosen/usr/lib/modules/$release/vmlinuz" /build/vmlinuz
    exit 0
fi

"$lab/root.sh"
stamp=image
made_by=root
if [ "$kernel" != "$default_kernel" ]; then
    stamp=image-$kernel
    made_by=root-$kernel
fi
# That one is built, not unpacked.
case $kernel in
debug*)
    "$lab/kernel.sh"
    made_by=kernel-$kernel
    ;;
esac
key=$(key_of "$(cat "$build/stamps/root" "$build/stamps/$made_by" "$unpacked/version" "$lab/image.sh" "$lab"/inner/* "$lab"/outer/*)")
begin "$stamp" "$choice/guest.cpio" "$key" "making the guests' images"
say "making the images of the guests${KERNEL:+ for $kernel}"
quietly "$stamp.log" in_root "$choice:/build" "$unpacked:/chosen" "$lab:/lab" -- env KERNEL="$kernel" bash /lab/image.sh --inside
set_stamp "$stamp" "$key"
say "done in ${SECONDS}s (guest.cpio: $(($(stat -c %s "$choice/guest.cpio") / 1000000)) MB)"
