# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash disable=SC2034  # record.sh reads it
about='two btrfs, one with subvolumes and snapshots mounted in several places, one on two disks with a loop-mounted image in a subvolume'

modprobe -a btrfs loop vfat
mkfs.btrfs --quiet /dev/nvme1n1
mkfs.btrfs --quiet --data raid1 --metadata raid1 /dev/nvme2n1 /dev/nvme3n1
mkdir -p /data /pool
mount /dev/nvme1n1 /data
for subvolume in @ @home @snapshots; do btrfs subvolume create "/data/$subvolume"; done
umount /data
mount -o subvol=@ /dev/nvme1n1 /data
mkdir -p /data/home /data/.snapshots /mnt/1 /mnt/2
mount -o subvol=@home /dev/nvme1n1 /data/home
mount -o subvol=@snapshots /dev/nvme1n1 /data/.snapshots
mkdir /data/.snapshots/1 /data/.snapshots/2
btrfs subvolume snapshot -r /data /data/.snapshots/1/snapshot
btrfs subvolume snapshot /data/home /data/.snapshots/2/snapshot
mount -o ro,subvol=@snapshots/1/snapshot /dev/nvme1n1 /mnt/1
mount -o subvol=@snapshots/2/snapshot /dev/nvme1n1 /mnt/2

mount /dev/nvme3n1 /pool
# Not mounted by itself: the image's device number is in no mount table.
btrfs subvolume create /pool/vm
truncate --size 64M /pool/vm/scratch.img
mkfs.ext4 -q /pool/vm/scratch.img
mkdir /pool/scratch
mount -o loop /pool/vm/scratch.img /pool/scratch
