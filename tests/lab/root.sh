#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Makes build/root: Debian trixie with the kernel's tool chain, QEMU and the tools that go into the
# guest. Below /kernel in it lie the newest 7.3 cloud kernel of trixie's backports, unpacked and not
# installed: binary, modules, headers, source, and the Hyper-V daemons of the same version. For
# another KERNEL (lib.sh) its packages as well, for one of another suite in a root with that suite's
# tool chain.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

packages=(
    # what the kernel needs; pahole too, or options drop out of its configuration
    gcc-14 gcc libc6-dev make flex bison bc cpio kmod libelf-dev libssl-dev pahole python3-minimal
    rustc rust-src bindgen clang rust-clippy rustfmt bzip2 xz-utils zstd
)
if [ "$suite" = trixie ]; then
    packages+=(
        # what runs the outer guest
        qemu-system-x86
        # what goes into the guests
        btrfs-progs busybox-static dmsetup dosfstools e2fsprogs exfatprogs mount strace
        util-linux xfsprogs
    )
else
    # which gcc that suite's kernel is built with, its configuration says; it is the suite's own
    packages=("${packages[@]:1}")
fi
options=(
    --variant=apt --mode=root --architectures=amd64
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*'
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt=force-unsafe-io
    --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"'
)

# unpack_kernel TARGET [PACKAGE]...: the newest cloud kernel that the root's lists have (in trixie, of
# the series), and further packages of its version. apt runs outside of the root; APT_CONFIG leads it
# there.
unpack_kernel() {
    local target=$1 series='' release version
    shift
    [ "$suite" != trixie ] || series=$kernel
    release=$(apt-cache pkgnames "linux-binary-${series:+$series.}" |
        sed -n 's/^linux-binary-\([0-9].*-cloud-amd64\)$/\1/p' | sort --version-sort | tail -n 1)
    [ -n "$release" ] || die "there is no cloud kernel${series:+ of series $series} in $suite and its backports"
    version=$(apt-cache show --no-all-versions "linux-binary-$release" | sed -n 's/^Version: //p')
    series=$(cut -d . -f 1,2 <<<"$version")
    mkdir -p "$target/debs"
    cd "$target/debs"
    # Signed and unsigned packages are of one source and carry one version.
    apt-get -o APT::Sandbox::User=root download {linux-binary,linux-modules,linux-base,linux-headers}-"$release=$version" \
        "linux-source-$series=$version" "${@/%/=$version}"
    for deb in *.deb; do
        dpkg-deb --extract "$deb" "$target"
    done
    cd "$target"
    rm -r debs
    printf '%s\n' "$release" >release
    printf '%s\n' "$version" >version
}

# The hook of mmdebstrap that unpacks the kernel into the new root.
if [ "${1:-}" = --hook ]; then
    export APT_CONFIG=$MMDEBSTRAP_APT_CONFIG
    if [ "$kernel" = "$default_kernel" ]; then
        unpack_kernel "$2/kernel" hyperv-daemons
    else
        unpack_kernel "$2/kernel"
    fi
    gcc=$(compiler_of "$2/kernel/usr/lib/modules/$(cat "$2/kernel/release")/config")
    chroot "$2" dpkg-query --show "${gcc#x86_64-linux-gnu-}" rustc rust-src bindgen 'libclang1-*' pahole binutils \
        >"$2/kernel/tools"
    exit 0
fi

# Another kernel of the suite whose root is there.
if [ "${1:-}" = --unpack ]; then
    rm -rf "$unpacked"
    mkdir -p "$choice"
    printf '%s\n' "Dir \"$root\";" "Dir::State::status \"$root/var/lib/dpkg/status\";" \
        'APT::Architecture "amd64";' 'APT::Architectures "amd64";' >"$choice/apt.conf"
    export APT_CONFIG=$choice/apt.conf
    apt-get update
    unpack_kernel "$unpacked"
    cp "$root/kernel/tools" "$unpacked/"
    exit 0
fi

# The newest cloud kernel of a release itself: one package, laid out as the others are.
if [ "${1:-}" = --unpack-stock ]; then
    mirror=$2
    lists=$choice/apt
    rm -rf "$unpacked" "$lists"
    mkdir -p "$unpacked/usr/lib/modules" "$lists"/{lists,cache}
    : >"$lists/status"
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' \
        "$mirror" "$stock" >"$lists/sources.list"
    printf '%s\n' "Dir::Etc::SourceList \"$lists/sources.list\";" 'Dir::Etc::SourceParts "-";' \
        "Dir::State::Lists \"$lists/lists\";" "Dir::State::status \"$lists/status\";" \
        "Dir::Cache \"$lists/cache\";" 'APT::Architecture "amd64";' 'APT::Architectures "amd64";' \
        'APT::Sandbox::User "root";' >"$lists/apt.conf"
    export APT_CONFIG=$lists/apt.conf
    apt-get update
    release=$(apt-cache pkgnames "linux-image-$kernel." |
        sed -n 's/^linux-image-\([0-9].*-cloud-amd64\)$/\1/p' | sort --version-sort | tail -n 1)
    [ -n "$release" ] || die "there is no cloud kernel of series $kernel in $stock"
    cd "$unpacked"
    apt-get download "linux-image-$release"
    dpkg-deb --extract linux-image-*.deb .
    dpkg-deb --field linux-image-*.deb Version >version
    rm linux-image-*.deb
    # Before trixie modules are in /lib.
    [ ! -e lib/modules ] || mv lib/modules/"$release" usr/lib/modules/
    rm -rf lib
    for file in vmlinuz config; do
        mv "boot/$file-$release" "usr/lib/modules/$release/$file"
    done
    printf '%s\n' "$release" >release
    exit 0
fi

# The machine's own mirror: whatever its apt calls Debian, be it a host, a cache or a list of both.
own_mirror() {
    # shellcheck disable=SC2016  # apt expands these
    apt-get indextargets --format '$(LABEL) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
        sed -n 's/^Debian main //p' | head -n 1
}

find_mirror() {
    mirror=${DEBIAN_MIRROR:-$(own_mirror)}
    if [ -z "$mirror" ]; then
        quietly "$stamp.log" apt-get update
        mirror=$(own_mirror)
    fi
    [ -n "$mirror" ] || die "apt knows no Debian mirror; name one with DEBIAN_MIRROR=<address>"
}

make_root() {
    local mirror comma line new=$tools.new old=$tools.old sources
    find_mirror
    sources=("deb $mirror $suite main")
    [ "$suite" != trixie ] || sources+=("deb $mirror $suite-updates main" "deb $mirror $suite-backports main")

    options+=(--aptopt='Acquire::Retries "3"')
    # How the machine reaches its mirror (a proxy, for one), and whether its apt minds that the mirror
    # stands still (the signature of testing lapses in a week), holds for the new root as well.
    while IFS= read -r line; do
        options+=(--aptopt="$line")
    done < <(apt-config dump Acquire::http Acquire::https Acquire::Check-Valid-Until Acquire::Check-Date |
        grep '::.* "..*";$' || true)

    mkdir -p "$(dirname "$tools")"
    rm -rf --one-file-system "$new" "$old"
    comma=$(IFS=,; printf '%s' "${packages[*]}")
    quietly "$stamp.log" mmdebstrap "${options[@]}" --include="$comma" \
        --customize-hook="KERNEL=$kernel $(printf '%q' "$lab/root.sh") --hook \"\$1\"" \
        "$suite" "$new" "${sources[@]}"
    [ ! -e "$tools" ] || mv "$tools" "$old"
    mv "$new" "$tools"
    rm -rf --one-file-system "$old"
}

# QEMU and what goes into the guests come from the default's root.
[ "$kernel" = "$default_kernel" ] || KERNEL=$default_kernel "$lab/root.sh"
case $kernel in
"$default_kernel") stamp=root ;;
debug*) exit 0 ;;
*) stamp=root-$kernel ;;
esac
key=$(key_of "$kernel" "$suite" "${packages[@]}" "${options[@]}")
begin "$stamp" "$unpacked/version" "$key" "making the build root"

if [ -n "$stock" ]; then
    say "unpacking the newest kernel $kernel of $stock"
    find_mirror
    quietly "$stamp.log" "$lab/root.sh" --unpack-stock "$mirror"
elif [ "$tools" != "$root" ] || [ "$kernel" = "$default_kernel" ]; then
    say "making the build root (Debian $suite: the tool chain and a kernel)"
    make_root
else
    say "unpacking the newest kernel $kernel"
    quietly "$stamp.log" "$lab/root.sh" --unpack
fi
set_stamp "$stamp" "$key"
say "found kernel $(cat "$unpacked/release") ($(cat "$unpacked/version")); done in ${SECONDS}s"
