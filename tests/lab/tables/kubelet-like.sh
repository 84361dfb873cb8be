# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash disable=SC2034  # record.sh reads it
about='the mounts that kubelet, containerd and Longhorn make on a k3s node, made by hand in the same places (there is no k3s on it): 40 pods, each with a mount namespace of its own; 8 volumes on iSCSI disks that this machine serves to itself'

modprobe -a xfs overlay iscsi_tcp
kubelet=/var/lib/kubelet
rancher=/var/lib/rancher/k3s/agent/containerd
mkdir -p $kubelet /var/lib/longhorn $rancher
mkfs.xfs -q /dev/nvme1n1
mount /dev/nvme1n1 /var/lib/longhorn

# Longhorn's engine serves each volume by tgt, and the node logs in to itself.
tgtd
until tgtadm --mode system --op show >/dev/null 2>&1; do sleep 0.1; done
for n in {1..8}; do
    truncate --size 32M "/var/lib/longhorn/pvc-$n.img"
    tgtadm --mode target --op new --tid "$n" --targetname "iqn.2019-10.io.longhorn:pvc-$n"
    tgtadm --mode logicalunit --op new --tid "$n" --lun 1 --backing-store "/var/lib/longhorn/pvc-$n.img"
    tgtadm --mode target --op bind --tid "$n" --initiator-address ALL
done
systemctl start iscsid
iscsiadm --mode discovery --type sendtargets --portal 127.0.0.1
iscsiadm --mode node --login
udevadm settle
volume_disk() { readlink -f /dev/disk/by-path/*"longhorn:pvc-$1-lun-1"; }

lower=$rancher/io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs
mkdir -p $lower/{bin,proc,dev,etc,data,conf,old,var/run/secrets}
touch $lower/etc/{hosts,resolv.conf} $lower/conf/app.yaml
cp /bin/busybox $lower/bin/
for n in {1..40}; do
    pod=$(printf '%08d-1c2d-4e5f-8a9b-0123456789ab' "$n")
    dir=$kubelet/pods/$pod
    token=$dir/volumes/kubernetes.io~projected/kube-api-access
    shm=/run/k3s/containerd/io.containerd.grpc.v1.cri/sandboxes/$pod/shm
    rootfs=/run/k3s/containerd/io.containerd.runtime.v2.task/k8s.io/$pod/rootfs
    upper=$rancher/io.containerd.snapshotter.v1.overlayfs/snapshots/$((n + 1))
    mkdir -p "$token" "$shm" "$rootfs" "$upper"/{fs,work} "$dir"/{volumes/kubernetes.io~configmap/conf,volume-subpaths/conf/app/0}
    mount -t tmpfs -o size=128M tmpfs "$token"
    mount -t tmpfs -o nosuid,nodev,noexec,size=65536k shm "$shm"
    mount -t overlay -o "lowerdir=$lower,upperdir=$upper/fs,workdir=$upper/work" overlay "$rootfs"
    touch "$dir/etc-hosts" "$dir/volumes/kubernetes.io~configmap/conf/app.yaml" "$dir/volume-subpaths/conf/app/0/app.yaml"
    # A subPath: one file of a volume, bound.
    mount --bind "$dir/volumes/kubernetes.io~configmap/conf/app.yaml" "$dir/volume-subpaths/conf/app/0/app.yaml"
    data=$dir/volumes/kubernetes.io~empty-dir/data
    mkdir -p "$data"
    if [ "$n" -le 8 ]; then
        global=$kubelet/plugins/kubernetes.io/csi/driver.longhorn.io/$n/globalmount
        data=$dir/volumes/kubernetes.io~csi/pvc-$n/mount
        mkdir -p "$global" "$data"
        mkfs.ext4 -q "$(volume_disk "$n")"
        mount "$(volume_disk "$n")" "$global"
        mount --bind "$global" "$data"
    fi
    # What a runtime does for a container: its own namespace, the volumes below its root, its root
    # in place of the machine's.
    unshare --mount --propagation slave bash -euc '
        rootfs=$1 dir=$2 data=$3 token=$4 shm=$5
        mount --bind "$rootfs" "$rootfs"
        mount -t proc proc "$rootfs/proc"
        mount -t tmpfs -o nosuid,mode=755,size=65536k tmpfs "$rootfs/dev"
        mkdir "$rootfs/dev/shm"
        mount --bind "$shm" "$rootfs/dev/shm"
        mount --bind "$data" "$rootfs/data"
        mount --bind "$token" "$rootfs/var/run/secrets"
        mount --bind "$dir/etc-hosts" "$rootfs/etc/hosts"
        mount --bind "$dir/volume-subpaths/conf/app/0/app.yaml" "$rootfs/conf/app.yaml"
        cd "$rootfs"
        pivot_root . old
        exec /bin/busybox sh -c "busybox umount -l /old; busybox touch /dev/ready; exec busybox sleep 100000"
    ' pod "$rootfs" "$dir" "$data" "$token" "$shm" &
    last=$!
done
until [ -e /proc/$last/root/dev/ready ]; do sleep 0.1; done
