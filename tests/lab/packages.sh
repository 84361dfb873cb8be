#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Brings in what must be on the machine itself; everything else lives in the build root. As root it
# installs, otherwise it prints the one line that would.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

# A C compiler and its 32-bit half for cargo's linking and the header's tests; mmdebstrap for the
# build root and mount to work in it; kmod for modinfo and depmod in `make install`.
wanted=(gcc libc6-dev gcc-multilib g++-multilib mmdebstrap debian-archive-keyring kmod mount util-linux)

if ! command -v dpkg-query >/dev/null; then
    missing=()
    for tool in gcc g++ mmdebstrap; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
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
