# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash disable=SC2034  # record.sh reads it
about='podman with its storage on xfs, a container with volumes and a disk that only it has mounted, images on loop devices, a network block device served from this machine'

modprobe -a xfs loop overlay vfat nbd
mkfs.xfs -q /dev/nvme1n1
mkdir -p /var/lib/containers /boot/efi '/srv/pg data' /srv/registry /srv/layer /srv/remote
mount /dev/nvme1n1 /var/lib/containers
mkfs.vfat /dev/nvme2n1
mount /dev/nvme2n1 /boot/efi
mkfs.ext4 -q /dev/nvme3n1

# An image file, and an image file in it.
truncate --size 200M /var/lib/containers/registry.img
mkfs.ext4 -q /var/lib/containers/registry.img
mount -o loop /var/lib/containers/registry.img /srv/registry
truncate --size 64M /srv/registry/layer.img
mkfs.ext4 -q /srv/registry/layer.img
mount -o loop /srv/registry/layer.img /srv/layer

truncate --size 64M /var/lib/containers/export.img
mkfs.ext4 -q /var/lib/containers/export.img
printf '[generic]\n[disk]\nexportname = /var/lib/containers/export.img\n' >/run/nbd.conf
nbd-server -C /run/nbd.conf
nbd-client -N disk localhost /dev/nbd0
mount /dev/nbd0 /srv/remote

mkdir -p /run/image/bin /run/image/wal
cp /bin/busybox /run/image/bin/
for applet in sh sleep mount; do ln -s busybox "/run/image/bin/$applet"; done
tar --create --directory /run/image . | podman import --quiet - busybox
podman volume create www
podman run --detach --privileged --network none --name db \
    --volume '/srv/pg data:/var/lib/pg' --volume www:/srv/www:ro busybox /bin/sleep infinity
podman run --detach --network none --name web --volume www:/srv/www busybox /bin/sleep infinity
podman exec db mount -t ext4 /dev/nvme3n1 /wal
# The operator sees the volume, too.
mkdir /srv/www
mount --bind /var/lib/containers/storage/volumes/www/_data /srv/www
mount -o remount,bind,ro /srv/www
