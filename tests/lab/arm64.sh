#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# arm64.sh [MAKE ARGUMENTS...]: builds the module for Debian's arm64 cloud kernel, of the same version as
# the lab's, with cross compilers: build/kernels/arm64/lab/hv_vss.ko. It is compiled, its layouts are
# asserted, it is linked and checked against that kernel's symbols. It is not run: there is no arm64
# machine in the lab.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

"$lab/root.sh"
need_root "building in the build root"
choice=$build/kernels/arm64
unpacked=$choice/kernel
version=$(cat "$root/kernel/version")
release=$(cat "$root/kernel/release")
release=${release/amd64/arm64}
mkdir -p "$choice"
lock arm64

# The compilers that the configuration names are unpacked beside the root, whose own are of the same
# version; the libraries that they share are in there.
unpack() {
    local apt=$choice/apt gcc
    gcc=$(cut -d ' ' -f 1 <<<"$(compiler_of "$root/kernel/usr/lib/modules/$(cat "$root/kernel/release")/config")")
    gcc=${gcc#x86_64-linux-gnu-}
    rm -rf "$apt" "$unpacked" "$choice/cross"
    mkdir -p "$apt"/{state/lists/partial,cache/archives/partial,debs} "$unpacked" "$choice/cross"
    printf '%s\n' "Dir::Etc \"$root/etc/apt\";" "Dir::State \"$apt/state\";" "Dir::Cache \"$apt/cache\";" \
        "Dir::State::status \"$root/var/lib/dpkg/status\";" 'APT::Sandbox::User "root";' \
        'APT::Architecture "amd64";' 'APT::Architectures { "amd64"; "arm64"; };' >"$apt/apt.conf"
    export APT_CONFIG=$apt/apt.conf
    apt-get update
    cd "$apt/debs"
    apt-get download "linux-base-$release:arm64=$version" "linux-headers-$release:arm64=$version"
    for deb in *.deb; do dpkg-deb --extract "$deb" "$unpacked"; done
    rm -- *.deb
    apt-get download {"$gcc","${gcc/gcc/cpp}",binutils}-aarch64-linux-gnu
    for deb in *.deb; do dpkg-deb --extract "$deb" "$choice/cross"; done
    cd "$repo"
    rm -rf "$apt"
}

# in_cross MAKE ARGUMENTS...: make with the cross compilers; the repository is /src.
in_cross() {
    local cross=/src/${choice#"$repo"/}/cross
    in_tools "$choice/linux:/linux" "$repo:/src" "$choice/objects:/output" -- \
        env PATH="$cross/usr/bin:/usr/bin:/bin" LD_LIBRARY_PATH="$cross/usr/lib/x86_64-linux-gnu" \
        make -C /linux ARCH=arm64 CROSS_COMPILE=aarch64-linux-gnu- CC="$cc" "$@"
}

prepare() {
    local linux=$choice/linux archive=$root/kernel/usr/src name difference
    archive=$(basename "$archive"/linux-source-*.tar.xz)
    name=${archive%.tar.xz}
    rm -rf "$linux"
    mkdir -p "$linux" "$choice/objects"
    # arm64 is one of those with an "a".
    in_root "$root/kernel/usr/src:/packed" "$linux:/linux" -- tar --extract --file "/packed/$archive" \
        --directory /linux --strip-components 1 --exclude "$name/arch/[!a]*.[chS]" \
        --exclude "$name/arch/*.dts*" --exclude "$name/Documentation/*/*" --exclude "$name/tools/testing/*" \
        --exclude "$name/drivers/*.c" --exclude "$name/fs/*.c" --exclude "$name/net/*.c" --exclude "$name/sound/*.c"
    cp "$config" "$linux/.config"
    in_cross -s olddefconfig
    printf '%s\n' "${release#"$(in_cross -s kernelversion)"}" >"$linux/localversion-stock"
    # The cross compilers make no programs, of 64 or 32 bits, nor the vDSO for the latter. No structure
    # depends on that.
    difference=$(config_diff "$config" "$linux/.config" |
        grep -vE '^CONFIG_(CC_CAN_LINK|COMPAT_VDSO|THUMB2_COMPAT_VDSO):' || true)
    [ -z "$difference" ] || die "refused, the configuration is not the kernel's:
$difference"
    in_cross prepare modules_prepare
    [ -e "$linux/rust/libkernel.rmeta" ] || die "the tree has no Rust metadata"
    cp "$unpacked/usr/src/linux-headers-$release/Module.symvers" "$linux/"
}

key=$(key_of "$version" "$(cat "$root/kernel/tools" "$0")")
config=$unpacked/usr/lib/modules/$release/config
if [ "$(cat "$build/stamps/arm64" 2>/dev/null)" != "$key" ]; then
    if [ "$(cat "$unpacked/version" 2>/dev/null)" != "$version" ]; then
        say "unpacking $release and its compilers"
        quietly arm64-unpack.log unpack
        printf '%s\n' "$version" >"$unpacked/version"
    fi
    [ "$(option "$config" CONFIG_RUST)" = y ] || die "refused: $release is built without Rust"
    cc=$(compiler_of "$config")
    say "preparing its tree"
    quietly arm64-prepare.log prepare
    set_stamp arm64 "$key"
fi
cc=$(compiler_of "$config")
say "building for $release"
quietly arm64-module.log in_cross M=/src MO=/output modules "$@"
install -D -m 0644 "$choice/objects/hv_vss.ko" "$choice/lab/hv_vss.ko"
say "done in ${SECONDS}s"
