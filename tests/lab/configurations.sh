#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# configurations.sh [NAME...]: compiles the module for configurations of the lab's kernel that no
# distribution has and somebody may choose: what is a function in one of them is an inline, or missing, in
# another. It lies in the kernel's own tree then, as a driver would. Nothing is linked and nothing is run.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

"$lab/root.sh"
need_root "building in the build root"
choice=$build/kernels/configurations
source=$choice/linux
driver=drivers/hv/hv_vss
mkdir -p "$choice"
lock configurations
[ $# != 0 ] || set -- no-sleep no-unload built-in

# What the configuration of that name lacks of debug-kernel.config's.
lacks() {
    case $1 in
    no-sleep) echo SUSPEND HIBERNATION PM_SLEEP ;;
    no-unload) echo MODULE_UNLOAD ;;
    built-in) echo MODULES ;;
    *) die "there is no configuration $1" ;;
    esac
}

key=$(key_of "$(cat "$root/kernel/version")")
if [ "$(cat "$build/stamps/configurations" 2>/dev/null)" != "$key" ]; then
    rm -rf "$choice"/*
    mkdir -p "$source"
    unpack_source "$root/kernel" "$source" 'drivers/*.c' 'fs/*.c' 'net/*.c'
    # shellcheck disable=SC2016  # that is make's
    printf '\nobj-$(CONFIG_HV_VSS) += hv_vss/\n' >>"$source/$(dirname "$driver")/Makefile"
    set_stamp configurations "$key"
fi
rm -rf "${source:?}/$driver"
make -s -C "$repo" install-dkms DKMS_SOURCE="$source/$driver"

in_linux() { in_root "$source:/linux" "$choice/$name:/objects" -- nice make -C /linux O=/objects CC=clang "$@"; }

for name in "$@"; do
    SECONDS=0
    objects=$choice/$name
    mkdir -p "$objects"
    lacks=$(lacks "$name")
    read -ra options <<<"$lacks"
    {
        cat "$lab/debug-kernel.config"
        printf '# CONFIG_%s is not set\n' "${options[@]}"
    } >"$objects/fragment.config"
    quietly "configuration-$name.log" in_linux KCONFIG_ALLCONFIG=fragment.config allnoconfig
    for option in "${options[@]}"; do
        ! grep -q "^CONFIG_$option=" "$objects/.config" || die "$name: the kernel does not do without $option"
    done
    # Without modules it is part of the kernel.
    as=m
    [ "$name" != built-in ] || as=y
    rm -rf "$objects/$driver/kmod"
    quietly "configuration-$name.log" in_linux -j "$(nproc)" CONFIG_HV_VSS=$as "$driver/"
    for object in hv_vss helpers; do
        [ -e "$objects/$driver/kmod/$object.o" ] || die "$name: there is no $object.o"
    done
    say "$name: compiled in ${SECONDS}s"
done
