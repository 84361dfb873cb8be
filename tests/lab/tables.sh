#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# tables.sh [NAME]...: records the tables that the plan is tested on (daemon/tests/tables). For each
# situation in tables/ it boots a Debian with systemd under emulation, sets the situation up there
# with the real tools, and keeps what `hv_vss_daemon list --table` says. Not part of the build: the
# tables are in the tree.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"
[ $# -gt 0 ] || set -- btrfs-snapshots container-host kubelet-like lvm-raid-luks
need_root "recording tables"

"$lab/root.sh"
packages=(
    systemd-sysv udev dbus kmod mount util-linux fdisk iproute2 busybox-static
    e2fsprogs xfsprogs btrfs-progs dosfstools lvm2 mdadm cryptsetup-bin
    podman crun netavark nbd-server nbd-client tgt open-iscsi
)
release=$(cat "$root/kernel/release")
work=$(mktemp -d "$build/tables.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT

say "making the machine to record (${packages[*]})"
# Its sources and the way to them are the build root's.
quietly tables-root.log mmdebstrap --variant=minbase --mode=root --architectures=amd64 \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt=force-unsafe-io \
    --aptopt="$root/etc/apt/apt.conf.d/99mmdebstrap" \
    --include="$(IFS=,; printf '%s' "${packages[*]}")" \
    trixie "$work/root" "$root/etc/apt/sources.list"
mkdir -p "$work/root/record"
cp "$repo/target/release/hv_vss_daemon" "$lab"/tables/*.sh "$work/root/record/"
mkdir -p "$work/root/usr/lib/modules"
cp -a "$root/kernel/usr/lib/modules/$release" "$work/root/usr/lib/modules/"
depmod --basedir "$work/root" "$release"
echo machine >"$work/root/etc/hostname"
cat >"$work/root/etc/systemd/system/record.service" <<'END'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/bash /record/record.sh
StandardOutput=file:/dev/ttyS0
StandardError=file:/dev/ttyS0
END
# Services that belong to the situations are started there; nothing else may hold up the boot.
for unit in nbd-server tgt iscsid open-iscsi apt-daily.timer apt-daily-upgrade.timer podman-auto-update.timer; do
    chroot "$work/root" systemctl disable --quiet "$unit" 2>/dev/null || true
done
ln -sf /etc/systemd/system/record.service "$work/root/etc/systemd/system/multi-user.target.wants/"
in_root "$work:/run.work" -- mkfs.ext4 -q -d /run.work/root /run.work/root.img 1500M

for name; do
    say "recording $name"
    disks=()
    for n in 1 2 3; do
        truncate --size 0 "$work/disk$n"
        truncate --size 1G "$work/disk$n"
        disks+=(-drive "file=/run.work/disk$n,format=raw,if=none,id=disk$n" -device "nvme,serial=disk$n,drive=disk$n")
    done
    # The kernel numbers NVMe disks in the order in which they answer: now and then another one is
    # the first, and the kernel finds no root.
    for _ in 1 2 3 4 5; do
        status=0
        (enter_root "$build:/build" "$work:/run.work" -- timeout 400 \
            qemu-system-x86_64 -accel tcg -cpu qemu64,+rdrand -M q35 -m 2048 -smp 1 -display none -monitor none \
            -nodefaults -no-reboot -kernel /build/vmlinuz \
            -append "console=ttyS0 panic=-1 root=/dev/nvme0n1 rw systemd.mask=serial-getty@ttyS0.service record=$name" \
            -drive file=/run.work/root.img,format=raw,if=none,id=root,snapshot=on -device nvme,serial=root,drive=root \
            "${disks[@]}" -serial file:/run.work/console.log -serial file:/run.work/table) </dev/null || status=$?
        [ ! -s "$work/table" ] || break
    done
    cp "$work/console.log" "$build/logs/tables-$name.log"
    if [ "$status" != 0 ] || [ "$(tail -c 2 "$work/table")" != "}" ]; then
        tail -n 30 "$work/console.log" >&2
        die "$name was not recorded; the console is in build/logs/tables-$name.log"
    fi
    cp "$work/table" "$repo/daemon/tests/tables/$name.json"
done
say "done in ${SECONDS}s"
