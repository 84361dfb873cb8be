#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Installs the packages on a clean Debian (trixie with its backports) as an administrator would, and has
# DKMS build the module there for a kernel of the backports and, when that is upgraded, for the next; then
# what must be refused, and what must be gone in the end. Leaves in build/dkms/packages what the guests of packages/*
# install: the packages, DKMS and Debian's daemons; in apt/ that and what it needs; in a folder of each kernel's release the module in DKMS's own form
# for one that was built elsewhere, and the package of the newer kernel; in next/ the packages and the module of a
# later version.
#
# With KERNEL=testing or unstable (lib.sh) on a clean Debian of that suite, for its newest kernel: that it is built,
# and gone in the end. Leaves the module in build/kernels/KERNEL/dkms.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

machine=$choice/dkms.root
out=$choice/dkms
options=(
    --variant=apt --mode=root --architectures=amd64
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*'
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-include=/usr/share/doc/hv-vss-dev/*'
    --dpkgopt=force-unsafe-io
)

# The part below runs on that machine, with the packages in /debs and what is to be kept in /out.
if [ "${1:-}" = --inside ]; then
    release=$2
    shift 2
    export DEBIAN_FRONTEND=noninteractive
    source=linux-source-$(cut -d . -f 1,2 <<<"$release")
    apt() { apt-get --yes -o APT::Sandbox::User=root -o APT::Install-Recommends=false -o Acquire::Retries=3 "$@"; }
    check() { # check WHAT COMMAND...
        local what=$1
        shift
        if "$@"; then echo "ok   $what"; else
            echo "FAIL $what" >&2
            exit 1
        fi
    }
    says() { grep -q -- "$1" "$2"; }
    # modules [RELEASE]: where they are. Headers alone give depmod nothing to make an index of.
    modules() { find "/lib/modules/${1-}" -name 'hv_vss.ko*'; }
    # built_for RELEASE: its module is installed, of that kernel and signed.
    built_for() {
        local module
        module=$(modules "$1")
        says "installed" <(dkms status -m hv_vss -k "$1") &&
            [ "$(modinfo -F vermagic "$module" | cut -d ' ' -f 1)" = "$1" ] && [ -n "$(modinfo -F signer "$module")" ]
    }
    # pack RELEASE FOLDER: the module of the version as DKMS takes it on a machine without a compiler.
    pack() {
        mkdir -p "/out/packages/$2"
        dkms mktarball --binaries-only -m hv_vss -v "$version" -k "$1" \
            --archive "/out/packages/$2/hv_vss-$version.dkms.tar.gz"
    }
    # next_of DEB: the same package as a later version, whose default configuration has changed.
    next_of() {
        local tree=/tmp/next old=${version//./\\.}
        dpkg-deb --raw-extract "$1" "$tree"
        sed -i "s/\b$old\b/$next/" "$tree"/DEBIAN/*
        if [ -e "$tree/usr/src/hv_vss-$version" ]; then
            mv "$tree/usr/src/hv_vss-$version" "$tree/usr/src/hv_vss-$next"
            sed -i "s/\b$old\b/$next/" "$tree/usr/src/hv_vss-$next/dkms.conf"
        fi
        [ ! -e "$tree/etc/hv_vss/daemon.toml" ] || echo "# of version $next" >>"$tree/etc/hv_vss/daemon.toml"
        dpkg-deb --root-owner-group --build "$tree" /out/packages/next
        rm -r "$tree"
    }
    left() { find /etc /usr /var /run /opt -xdev -path /var/lib/apt -prune -o -name '*hv[-_]vss*' -print; }

    # gone: the packages are removed, and nothing is left of them.
    gone() {
        apt purge hv-vss-daemon hv-vss-dkms hv-vss-dev
        check "nothing is left after purge" [ -z "$(left)" ]
    }

    apt update
    if [ "$suite" != trixie ]; then
        apt install linux-headers-cloud-amd64 "$source" openssl /debs/hv-vss-daemon_*.deb /debs/hv-vss-dkms_*.deb \
            /debs/hv-vss-dev_*.deb
        check "built and installed" built_for "$release"
        check "no reason against it" [ -z "$(/usr/src/hv_vss-*/kmod/dkms/build --why-not "$release")" ]
        xz --decompress --stdout --force "$(modules "$release")" >/out/hv_vss.ko
        check "the daemon starts" says '^hv_vss_daemon ' <(/usr/libexec/hv_vss_daemon --version)
        gone
        exit 0
    fi
    older=$1
    older_version=$2
    older_source=linux-source-$(cut -d . -f 1,2 <<<"$older")
    enable=$3
    shift 3
    # As the README has it on a Debian that knows no backports.
    sed -i '/ trixie-backports /d' /etc/apt/sources.list.d/*
    apt update
    check "a fresh Debian has no kernel for the module" [ -z "$(apt-cache madison linux-image-amd64 | grep -F " ${release%%+*}-")" ]
    eval "$enable"
    apt update
    apt install --simulate "$@" >/tmp/readme
    check "what the README has installed is that kernel" says "^Inst linux-image-${release%%-*}-amd64 " /tmp/readme
    check "its headers" says "^Inst linux-headers-${release%%-*}-amd64 " /tmp/readme
    check "and its source" says "^Inst $source " /tmp/readme
    # Also the stock kernel of trixie, which is too old for the module: it is left out, and that is all.
    apt install linux-headers-cloud-amd64
    # The source is what the module's package recommends, and openssl, to sign with, what dkms does; other
    # recommendations take long and add nothing.
    check "the kernel's source is recommended" says "$source" <(dpkg-deb --field /debs/hv-vss-dkms_*.deb Recommends)
    # As the README has it, at the time of the older kernel.
    apt install "linux-source=$older_version" "$older_source=$older_version" openssl pkgconf \
        /debs/hv-vss-daemon_*.deb /debs/hv-vss-dkms_*.deb /debs/hv-vss-dev_*.deb | tee /tmp/install
    check "the old kernel is left out, with the reason, and a newer one is named" \
        says 'is not built for kernel 6.*: it is older than 7.2; .apt install linux-image-cloud-amd64/trixie-backports ' /tmp/install
    check "nothing is built yet" [ -z "$(modules)" ]
    version=$(dpkg-query --show --showformat '${Version}' hv-vss-dkms)
    # A kernel comes.
    apt install "linux-headers-$older"
    check "built and installed with the kernel" built_for "$older"
    cp "$(modules "$older")" /tmp/of-older
    # The next one comes with the metapackages.
    apt install linux-headers-cloud-amd64/trixie-backports linux-source/trixie-backports
    check "an upgrade of the kernel: built for that, too" built_for "$release"
    check "and that of the kernel before is still there" built_for "$older"
    check "as it was" cmp /tmp/of-older "$(modules "$older")"
    check "nothing of the tree is left" [ ! -e /var/lib/dkms/hv_vss/*/build ]
    check "no reason against it" [ -z "$(/usr/src/hv_vss-*/kmod/dkms/build --why-not "$release")" ]
    # What the hand-over has an administrator do where there was nothing to sign with.
    again=$(
        # shellcheck disable=SC2034,SC2317  # the script's functions use these
        sources=/usr/src
        uname() { echo "$release"; }
        eval "$(sed -n '/^newest_build() {/,/^}/p; /^rebuild() {/,/^}/p' /usr/libexec/hv_vss_hand_over)"
        rebuild
    )
    rm "$(modules "$release")"
    check "built again by the line that the hand-over names" sh -c "$again"
    check "and installed, signed" built_for "$release"
    pack "$release" "$release"
    pack "$older" "$older"
    cp "$(modules "$release")" /out/
    # with which it is signed: what an administrator enrols
    cp /var/lib/dkms/mok.pub /out/packages/
    # What the packages of a kernel do when they are removed.
    linux-run-hooks image prerm "$older" "/boot/vmlinuz-$older" -- remove
    apt purge "linux-headers-$older" "$older_source"
    check "the module goes with its kernel" [ -z "$(modules "$older")$(dkms status -m hv_vss | grep -F "$older")" ]
    check "and with none other" built_for "$release"

    check "the header's example compiles" sh -c \
        'gcc -Wall -Werror $(pkg-config --cflags hv-vss) -o /tmp/example /usr/share/doc/hv-vss-dev/examples/hv_vss_example.c'
    tar --extract --file "/usr/src/$source.tar.xz" --directory /tmp --occurrence=1 "$source/tools/hv/hv_vss_daemon.c"
    check "Linux's own daemon compiles with the header" sh -c \
        'gcc -Wall -Werror $(pkg-config --cflags hv-vss) -include hv_vss.h -o /out/packages/hv_vss_daemon "$1"' \
        sh "/tmp/$source/tools/hv/hv_vss_daemon.c"

    # Rust metadata is of use to the very compiler that wrote it: where there is no other, and where another comes first.
    mkdir /tmp/other
    ln -s /usr/bin/* /tmp/other
    rm /tmp/other/rustc
    printf '#!/bin/sh\necho rustc 1.90.0 of another distribution\n' >/tmp/other/rustc
    chmod +x /tmp/other/rustc
    check "another compiler is refused" says "the compiler here is 'rustc 1.90.0" \
        <(PATH=/tmp/other /usr/src/hv_vss-*/kmod/dkms/build --why-not "$release")
    check "another one beside the right one is not" \
        [ -z "$(PATH=/tmp/other:$PATH /usr/src/hv_vss-*/kmod/dkms/build --why-not "$release")" ]
    printf '#!/bin/sh\nexit 1\n' >/tmp/other/rustc
    check "one without a tool chain is refused" says "no compiler here says what it is" \
        <(PATH=/tmp/other /usr/src/hv_vss-*/kmod/dkms/build --why-not "$release")

    check "a kernel that the module is not made for is refused by that" \
        says "it is made for Linux $(sed -n 's/^hv_vss_kernels := //p' /usr/src/hv_vss-*/Kbuild)\$" \
        <(/usr/src/hv_vss-*/kmod/dkms/build --why-not 7.99-rc1-amd64)

    # What cannot be built says why, and breaks no package; nor does another version beside this one. That of before stays.
    module=$(modules)
    cp "$module" /tmp/of-before
    kept=${module%/dkms/*}/hv_vss/${module##*/}
    apt remove "$source" linux-source
    cp -r "/usr/src/hv_vss-$version" /usr/src/hv_vss-0.0.1
    apt install --reinstall /debs/hv-vss-dkms_*.deb | tee /tmp/install
    rm -r /usr/src/hv_vss-0.0.1
    check "without the source DKMS has none" [ -z "$(dkms status -m hv_vss -k "$release" | grep installed)" ]
    check "the module of before is there, and alone" [ "$(modules)" = "$kept" ]
    check "as it was" cmp "$kept" /tmp/of-before
    check "and the reason is told" \
        says "is not built for kernel $release: .*install $source;.* that of the version before stays there" /tmp/install
    check "the package is installed all the same" says '^ii' <(dpkg-query --show --showformat '${db:Status-Abbrev}\n' hv-vss-dkms)
    # Of the kernel neither: it has DKMS try again.
    apt install --reinstall "linux-headers-$release" | tee /tmp/install
    check "DKMS has tried" says 'Autoinstall of module hv_vss/' /tmp/install
    check "the headers are installed all the same" \
        says '^ii' <(dpkg-query --show --showformat '${db:Status-Abbrev}\n' "linux-headers-$release")
    # What the reason says to do is all there is to do, whatever stood in the log of the last try.
    log=/var/lib/dkms/hv_vss/$version/build/make.log
    mkdir -p "${log%/*}"
    echo "hv_vss is not built for kernel $release: it was so once" >"$log"
    apt install "$source" | tee /tmp/install
    check "the source is enough: the module is there" built_for "$release"
    check "and alone" [ "$(modules)" = "$module" ]
    check "DKMS has none that it would put back" [ ! -e /var/lib/dkms/hv_vss/original_module ]

    # An upgrade has DKMS build the module again, and take away that of the version before.
    next=$version.1
    mkdir /out/packages/next
    next_of /debs/hv-vss-daemon_*.deb
    next_of /debs/hv-vss-dkms_*.deb
    apt install /out/packages/next/*.deb
    check "an upgrade: its module is built" says "hv_vss/$next, $release.*installed" <(dkms status)
    check "and that of the version before has gone" [ -z "$(dkms status -m hv_vss -v "$version")" ]
    check "with its source" [ ! -e "/usr/src/hv_vss-$version" ]
    check "and its module" [ "$(modules)" = "$module" ]
    version=$next pack "$release" next

    # Where one is kept, too.
    apt remove "$source"
    apt install --reinstall /out/packages/next/hv-vss-dkms_*.deb
    check "that of before is there again" [ "$(modules)" = "$kept" ]
    gone

    cd /out/packages
    cp /debs/hv-vss-daemon_*.deb /debs/hv-vss-dkms_*.deb .
    apt download dkms hyperv-daemons/trixie-backports
    # What a guest without it has to have of apt: all that it needs, of which some is there.
    mkdir apt
    mapfile -t names < <(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
        --no-replaces --no-enhances apt | grep '^[a-z]' | sort -u)
    mapfile -t names < <(dpkg-query --show --showformat '${db:Status-Status} ${Package}\n' "${names[@]}" 2>/dev/null |
        sed -n 's/^installed //p')
    (cd apt && apt download "${names[@]}")
    cd "$release"
    apt download linux-base "linux-image-$release"
    exit 0
fi

case $kernel in
"$default_kernel")
    stamp=dkms
    KERNEL=$older_kernel "$lab/root.sh"
    before=$build/kernels/$older_kernel/kernel
    # What the README has an administrator do for the module: the line by which apt knows the backports, and what is
    # installed beside our own packages.
    commands=$(sed ':a; /\\$/ { N; s/\\\n */ /; ba }' "$repo/README.md" | sed -n 's/^    //p')
    enable=$(grep ' trixie-backports .*/etc/apt/' <<<"$commands")
    mapfile -t readme < <(grep '^apt install .*hv-vss-dkms' <<<"$commands" | tr -s ' ' '\n' |
        grep -v -e '^apt$' -e '^install$' -e '^\./')
    arguments=("$(cat "$before/release")" "$(cat "$before/version")" "$enable" "${readme[@]}")
    ;;
testing | unstable)
    stamp=dkms-$kernel
    "$lab/root.sh"
    arguments=()
    ;;
*) die "DKMS is tried on trixie, testing and unstable, not on kernel $kernel" ;;
esac
KERNEL=$default_kernel "$lab/deb.sh"
release=$(cat "$unpacked/release")
key=$(key_of "$release" "${arguments[@]}" "$(cat "$build/stamps/deb" "$lab/dkms.sh")" "${options[@]}")
begin "$stamp" "$out" "$key" "building the module with DKMS"
say "building the module with DKMS on a clean Debian ($suite, kernel $release)"
rm -rf --one-file-system "$machine" "$out"
mkdir -p "$out"
[ "$suite" != trixie ] || mkdir "$out/packages"
quietly "$stamp-root.log" mmdebstrap "${options[@]}" --aptopt="$tools/etc/apt/apt.conf.d/99mmdebstrap" \
    "$suite" "$machine" "$tools/etc/apt/sources.list"
on_machine() { (enter "$machine" "$@"); }
quietly "$stamp.log" on_machine "$out:/out" "$build/deb/packages:/debs" "$lab:/lab" -- \
    env KERNEL="$kernel" bash /lab/dkms.sh --inside "$release" "${arguments[@]}"
grep --text '^ok   ' "$build/logs/$stamp.log"
rm -rf --one-file-system "$machine"
set_stamp "$stamp" "$key"
say "done in ${SECONDS}s"
