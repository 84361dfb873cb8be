#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Makes build/kernels/<kernel> for the kernels debug and debug-kcsan: the stock kernel's source, built
# small and with the kernel's own detectors (debug-kernel.config says which), laid out as a Debian
# kernel would be. clang builds it: the kernel wants KASAN in C and in Rust from one compiler.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

case $kernel in
debug) flavour=kasan ;;
debug-kcsan) flavour=kcsan ;;
*) die "KERNEL is $kernel; this builds debug and debug-kcsan" ;;
esac
"$lab/root.sh"
fragments=("$lab/debug-kernel.config" "$lab/debug-kernel.$flavour.config")
linux=$choice/linux
stock=$root/kernel

key=$(key_of "$(cat "$stock/version" "$stock/tools" "$lab/debug-kernel.sh" "${fragments[@]}")")
begin "kernel-$kernel" "$unpacked/version" "$key" "building a kernel"

say "building a kernel with $flavour from the source of $(cat "$stock/version"); this takes a quarter of an hour and more"
rm -rf "$unpacked"
# A tree of this version is built on: make knows what an option changes.
if [ "$(cat "$linux/source-version" 2>/dev/null)" != "$(cat "$stock/version")" ]; then
    rm -rf "$linux"
    mkdir -p "$linux"
    unpack_source "$stock" "$linux" 'drivers/gpu/*.[ch]'
    cp "$stock/version" "$linux/source-version"
fi
# KCSAN sees only what is compiled for it, and the kernel does not let rustc do that yet: its target
# has to know of it. module.sh then asks for it.
[ "$flavour" != kcsan ] ||
    sed -i 's/\["kcfi", "kernel-address"\]/["kcfi", "kernel-address", "thread"]/' "$linux/scripts/generate_rust_target.rs"
cat "${fragments[@]}" >"$linux/fragment.config"
printf -- '-%s\n' "$kernel" >"$linux/localversion-lab"

in_linux() { in_root "$linux:/linux" "$choice:/choice" -- nice make -C /linux CC=clang "$@"; }

quietly "kernel-$kernel.log" in_linux KCONFIG_ALLCONFIG=fragment.config allnoconfig
missing=$(grep -E '^CONFIG_|^# CONFIG_.* is not set$' "$linux/fragment.config" | grep -vxFf "$linux/.config" || true)
[ -z "$missing" ] || die "refused, the source does not give these options:
$missing"
quietly "kernel-$kernel.log" in_linux -j "$(nproc)" bzImage modules
quietly "kernel-$kernel-install.log" in_linux INSTALL_MOD_PATH=/choice/kernel/usr modules_install

release=$(cat "$linux/include/config/kernel.release")
cp "$linux/arch/x86/boot/bzImage" "$unpacked/usr/lib/modules/$release/vmlinuz"
printf '%s\n' "$release" >"$unpacked/release"
cp "$stock/version" "$unpacked/version"
set_stamp "kernel-$kernel" "$key"
say "done in ${SECONDS}s: $release"
