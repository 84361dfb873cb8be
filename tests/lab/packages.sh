#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Brings in what must be on the machine itself; everything else lives in the build root. As root it
# installs, otherwise it prints the one line that would. What the machine lacks besides is a line here, and
# not an error of some tool minutes later. GOALS is what make was asked for.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

[ "$(uname -m)" = x86_64 ] || die "this is $(uname -m), the lab wants an x86-64 machine; there 'make module-arm64' builds the module for arm64"

# paths are words of make's, and of lists with colons
case $repo in
*[[:space:]:]*) die "the path '$repo' has a blank or a colon in it, which make cannot do with: move the checkout" ;;
esac

# cargo says which; what makes no use of it is not held up
rust=1.85
have=$(rustc --version 2>/dev/null | cut -d ' ' -f 2) || have=
case " ${GOALS:-} " in
*" module "* | *" module-arm64 "*) ;;
*)
    [ -n "$have" ] || die "there is no rustc: Rust $rust or later is wanted (Debian 13: cargo rustc rust-clippy rustfmt)"
    [ "$(printf '%s\n' "$rust" "$have" | sort --version-sort | head -n 1)" = "$rust" ] ||
        die "Rust $rust or later is wanted, this is $have"
    ;;
esac
case " ${GOALS:-} " in
*" lint "* | *" test "* | *" test-all "*)
    for tool in clippy fmt; do
        cargo "$tool" --version >/dev/null 2>&1 ||
            die "there is no 'cargo $tool' (Debian 13: rust-clippy rustfmt; else: rustup component add clippy rustfmt)"
    done
    ;;
esac

# all of build/ and target/ together, for one kernel
needed_mib=9000
if [ ! -e "$build/root" ]; then
    free_mib=$(($(stat --file-system --format '%a * %S' "$repo") >> 20))
    [ "$free_mib" -ge "$needed_mib" ] || die "only $free_mib MiB are free where $repo is, the first build takes $needed_mib"
fi

# A C compiler and its 32-bit half for cargo's linking and the header's tests; mmdebstrap for the
# build root and mount to work in it; kmod for modinfo and depmod in `make install`.
wanted=(gcc libc6-dev gcc-multilib g++-multilib mmdebstrap debian-archive-keyring kmod mount util-linux)

if ! command -v dpkg-query >/dev/null; then
    missing=()
    for tool in gcc g++ mmdebstrap; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    # the daemon has its part of it inside; without a path it is not there
    case $(gcc -print-file-name=libc.a 2>/dev/null) in
    /*) ;;
    *) missing+=("the static C library (glibc-static, glibc-devel-static)") ;;
    esac
    [ ${#missing[@]} = 0 ] || die "not a Debian: install ${missing[*]} with this system's package manager"
    exit 0
fi

missing=()
for package in "${wanted[@]}"; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) || state=
    [ "$state" = installed ] || missing+=("$package")
done
[ ${#missing[@]} != 0 ] || exit 0

install="apt-get install --yes --no-install-recommends ${missing[*]}"
[ "$(id -u)" = 0 ] || die "packages are missing; run: sudo $install"

say "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# A source that does not answer need not be one that is asked for these: the installation decides.
apt-get -o Acquire::Retries=3 update >"$build/logs/packages-update.log" 2>&1 || true
# shellcheck disable=SC2086  # a list of words
quietly packages.log $install -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120
say "done in ${SECONDS}s"
