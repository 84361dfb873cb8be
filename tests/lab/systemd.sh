#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Makes build/systemd.cpio, the initramfs of the guest that runs a stock Debian userland: systemd,
# journald, udev and rsyslog on an ext4 root. Our daemon comes into it when it boots, by what
# `make install` puts where. For another KERNEL (lib.sh), after its image.sh: systemd.cpio in that kernel's folder,
# which has its modules alone and comes behind the default's.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

suite=trixie
packages=(systemd-sysv udev rsyslog kmod)
options=(
    --variant=essential --mode=root --architectures=amd64
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*'
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/lib/*/gconv/*'
    --dpkgopt='path-exclude=/usr/share/i18n/*' --dpkgopt='path-exclude=/usr/share/zoneinfo/*'
    --dpkgopt='path-exclude=/usr/share/perl/*' --dpkgopt='path-exclude=/usr/lib/udev/hwdb.d/*'
    --dpkgopt=force-unsafe-io
    --aptopt='APT::Install-Recommends "false"'
)
# Where the root may be, which the initramfs needs as well, and the peer's driver.
root_modules=(brd sd_mod hv_storvsc)
modules=("${root_modules[@]}" hv_utils)
# Units that only cost time in an emulated machine without a console, a network or a user.
masked=(
    getty@.service serial-getty@.service systemd-logind.service systemd-networkd.service
    ldconfig.service systemd-hwdb-update.service systemd-firstboot.service systemd-random-seed.service
    systemd-update-utmp.service systemd-update-done.service systemd-journal-catalog-update.service
    systemd-user-sessions.service systemd-binfmt.service systemd-sysctl.service
    systemd-pcrphase.service systemd-pcrphase-sysinit.service systemd-pcrmachine.service
    dpkg-db-backup.timer systemd-tmpfiles-clean.timer fstrim.timer e2scrub_all.timer
    sys-kernel-config.mount sys-kernel-tracing.mount dev-hugepages.mount dev-mqueue.mount
)

# The part below runs inside the build root, with the kernel's folder at /build, the kernel at /chosen and this
# folder at /lab.
if [ "${1:-}" = --inside ]; then
    ramfs=/tmp/systemd.ramfs
    rm -rf "$ramfs"
    pack() {
        (cd "$ramfs" && find . -mindepth 1 | sort | cpio --quiet -o -H newc -R 0:0) >/build/systemd.cpio.new
        mv /build/systemd.cpio.new /build/systemd.cpio
        rm -rf "$ramfs"
    }
    mkdir -p "$ramfs"/{bin,dev,proc,sys,usr/lib}
    ln -s usr/lib "$ramfs/lib"
    if [ "$kernel" != "$default_kernel" ]; then
        add_modules /chosen "$ramfs" "${modules[@]}"
        pack
        exit 0
    fi
    target=/build/systemd.root
    add_modules /chosen "$target" "${modules[@]}"
    cp /usr/bin/busybox "$ramfs/bin/"
    install -m 0755 /lab/systemd/init "$ramfs/init"
    add_modules /chosen "$ramfs" "${root_modules[@]}"
    # What is on it, and as much again as the tests write.
    size=$(($(du -sm "$target" | cut -f 1) * 11 / 10 + 48))
    mke2fs -q -t ext4 -b 4096 -J size=4 -O ^resize_inode -d "$target" "$ramfs/root.ext4" "${size}M"
    pack
    exit 0
fi

inside() {
    quietly "$stamp.log" in_root "$choice:/build" "$unpacked:/chosen" "$lab:/lab" -- \
        env KERNEL="$kernel" bash /lab/systemd.sh --inside
}

"$lab/root.sh"
stamp=systemd
[ "$kernel" = "$default_kernel" ] || stamp=systemd-$kernel
key=$(key_of "$(cat "$build/stamps/root")" "$(cat "$unpacked/version" "$lab/systemd.sh" "$lab"/systemd/*)")
begin "$stamp" "$choice/systemd.cpio" "$key" "making the guest with systemd"
if [ "$kernel" != "$default_kernel" ]; then
    inside
    set_stamp "$stamp" "$key"
    exit 0
fi
say "making the guest with systemd (Debian $suite: ${packages[*]})"
target=$build/systemd.root
rm -rf --one-file-system "$target"
comma=$(IFS=,; printf '%s' "${packages[*]}")
# From where, and how it is reached, is what the build root was made with.
quietly systemd.log mmdebstrap "${options[@]}" --aptopt="$root/etc/apt/apt.conf.d/99mmdebstrap" \
    --include="$comma" "$suite" "$target" "$root/etc/apt/sources.list"
for unit in "${masked[@]}"; do
    ln -sf /dev/null "$target/etc/systemd/system/$unit"
done
install -m 0644 "$lab/systemd/lab-agent.service" "$target/etc/systemd/system/"
mkdir -p "$target"/etc/systemd/system/multi-user.target.wants "$target"/var/log/journal "$target"/payload
ln -s ../lab-agent.service "$target/etc/systemd/system/multi-user.target.wants/"
# The journal begins a new file when the time is set back, and deletes what it had where the disk has little room left, as
# here it has: the boot would be gone.
mkdir -p "$target/etc/systemd/journald.conf.d"
printf '[Journal]\nSystemKeepFree=1M\n' >"$target/etc/systemd/journald.conf.d/lab.conf"
# Nothing is to wait for a terminal, and the first boot asks nothing.
ln -sf multi-user.target "$target/etc/systemd/system/default.target"
echo guest >"$target/etc/hostname"
printf '%s\n' 0123456789abcdef0123456789abcdef >"$target/etc/machine-id"
inside
rm -rf --one-file-system "$target"
set_stamp "$stamp" "$key"
say "done in ${SECONDS}s (systemd.cpio: $(($(stat -c %s "$build/systemd.cpio") / 1000000)) MB)"
