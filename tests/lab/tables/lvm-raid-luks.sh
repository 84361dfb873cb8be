# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash disable=SC2034  # record.sh reads it
about='two disks: /boot on a mirror, the rest LVM on a mirror of two LUKS partitions, a guest image with its own LVM inside'

modprobe -a raid1 dm-mod dm-crypt loop xfs
for disk in nvme1n1 nvme2n1; do
    printf ',64M\n,\n' | sfdisk --quiet "/dev/$disk"
done
udevadm settle
mdadm --create /dev/md0 --run --level 1 --metadata 1.0 --raid-devices 2 /dev/nvme[12]n1p1
printf secret >/run/key
for disk in nvme1n1 nvme2n1; do
    cryptsetup luksFormat --batch-mode --pbkdf pbkdf2 --pbkdf-force-iterations 1000 "/dev/${disk}p2" /run/key
    cryptsetup open --key-file /run/key "/dev/${disk}p2" "crypt-$disk"
done
mdadm --create /dev/md1 --run --level 1 --assume-clean --metadata 1.2 --raid-devices 2 /dev/mapper/crypt-nvme[12]n1
pvcreate /dev/md1
vgcreate vg0 /dev/md1
for volume in var:64M home:64M archive:64M images:400M; do
    lvcreate --yes --name "${volume%:*}" --size "${volume#*:}" vg0
done
for device in md0 vg0/var vg0/home vg0/archive; do mkfs.ext4 -q "/dev/$device"; done
mkfs.xfs -q /dev/vg0/images
mkdir -p /srv/var /srv/home /srv/archive /srv/images /srv/inner
mount /dev/md0 /boot
mount /dev/vg0/var /srv/var
mount /dev/vg0/home /srv/home
mount -o ro /dev/vg0/archive /srv/archive
mount /dev/vg0/images /srv/images

# A disk image as a virtual machine has it: partitioned, with a volume group of its own.
truncate --size 128M /srv/images/guest.img
printf ',\n' | sfdisk --quiet /srv/images/guest.img
image=$(losetup --find --show --partscan /srv/images/guest.img)
udevadm settle
pvcreate "${image}p1"
vgcreate inner "${image}p1"
lvcreate --yes --name root --extents 100%FREE inner
mkfs.ext4 -q /dev/inner/root
mount /dev/inner/root /srv/inner
