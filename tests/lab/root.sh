#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Makes build/root: Debian trixie with the kernel's tool chain, QEMU and the tools that go into the
# guest. Below /kernel in it lie the newest 7.3 cloud kernel of trixie's backports, unpacked and not
# installed: binary, modules, headers, source, and the Hyper-V daemons of the same version.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

series=$default_kernel
suite=trixie
packages=(
    # what the kernel needs; pahole too, or options drop out of its configuration
    gcc-14 gcc libc6-dev make flex bison bc cpio kmod libelf-dev libssl-dev pahole python3-minimal
    rustc rust-src bindgen clang rust-clippy rustfmt bzip2 xz-utils zstd
    # what runs the outer guest
    qemu-system-x86
    # what goes into the guests
    btrfs-progs busybox-static dmsetup dosfstools e2fsprogs exfatprogs mount strace
    util-linux xfsprogs
)
options=(
    --variant=apt --mode=root --architectures=amd64
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*'
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt=force-unsafe-io
    --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"'
)

# The hook of mmdebstrap that unpacks the kernel; apt runs outside, on the new root's lists.
if [ "${1:-}" = --unpack-kernel ]; then
    export APT_CONFIG=$MMDEBSTRAP_APT_CONFIG
    target=$2/kernel
    release=$(apt-cache pkgnames "linux-binary-$series." |
        sed -n 's/^linux-binary-\(.*-cloud-amd64\)$/\1/p' | sort --version-sort | tail -n 1)
    [ -n "$release" ] || die "$suite-backports has no cloud kernel of series $series"
    version=$(apt-cache show --no-all-versions "linux-binary-$release" | sed -n 's/^Version: //p')
    mkdir -p "$target/debs"
    cd "$target/debs"
    # Signed and unsigned packages are of one source and carry one version.
    apt-get -o APT::Sandbox::User=root download {linux-binary,linux-modules,linux-base,linux-headers}-"$release=$version" \
        "linux-source-$series=$version" "hyperv-daemons=$version"
    for deb in *.deb; do
        dpkg-deb --extract "$deb" "$target"
    done
    cd "$target"
    rm -r debs
    printf '%s\n' "$release" >release
    printf '%s\n' "$version" >version
    chroot "$2" dpkg-query --show gcc-14 rustc rust-src bindgen libclang1-19 pahole binutils >tools
    exit 0
fi

key=$(key_of "$series" "$suite" "${packages[@]}" "${options[@]}")
begin root "$root/kernel/version" "$key" "making the build root"

# The machine's own mirror: whatever its apt calls Debian, be it a host, a cache or a list of both.
own_mirror() {
    # shellcheck disable=SC2016  # apt expands these
    apt-get indextargets --format '$(LABEL) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
        sed -n 's/^Debian main //p' | head -n 1
}
mirror=${DEBIAN_MIRROR:-$(own_mirror)}
if [ -z "$mirror" ]; then
    quietly root.log apt-get update
    mirror=$(own_mirror)
fi
[ -n "$mirror" ] || die "apt knows no Debian mirror; name one with DEBIAN_MIRROR=<address>"

options+=(--aptopt='Acquire::Retries "3"')
# How the machine reaches its mirror (a proxy, for one) holds for the new root as well.
while IFS= read -r line; do
    options+=(--aptopt="$line")
done < <(apt-config dump Acquire::http Acquire::https | grep '::.* "..*";$' || true)

say "making the build root (Debian $suite, tool chain, QEMU, kernel $series)"
rm -rf --one-file-system "$root.new" "$root.old"
comma=$(IFS=,; printf '%s' "${packages[*]}")
quietly root.log mmdebstrap "${options[@]}" --include="$comma" \
    --customize-hook="$(printf '%q' "$lab/root.sh") --unpack-kernel \"\$1\"" \
    "$suite" "$root.new" \
    "deb $mirror $suite main" "deb $mirror $suite-updates main" "deb $mirror $suite-backports main"
[ ! -e "$root" ] || mv "$root" "$root.old"
mv "$root.new" "$root"
rm -rf --one-file-system "$root.old"
set_stamp root "$key"
say "found kernel $(cat "$root/kernel/release") ($(cat "$root/kernel/version")); done in ${SECONDS}s"
