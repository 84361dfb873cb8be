#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Makes build/linux: the stock kernel's source, configured as the stock kernel and prepared for
# modules in Rust. Debian's headers lack the Rust metadata; the same source, configuration and
# compilers give the same again, and whatever is not the same is refused here.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

case $kernel in
"$default_kernel") "$lab/root.sh" ;;
debug | debug-kcsan) exec "$lab/debug-kernel.sh" ;;
*) die "there is no kernel called $kernel; known are $default_kernel, debug and debug-kcsan" ;;
esac
linux=$build/linux.new
release=$(cat "$root/kernel/release")
stock_config=$root/kernel/usr/lib/modules/$release/config
headers=$root/kernel/usr/src/linux-headers-$release
source=$(echo "$root"/kernel/usr/src/linux-source-*.tar.xz)

# The tree is as good as the tools that prepared it.
key=$(key_of "$(cat "$root/kernel/version" "$root/kernel/tools" "$lab/kernel.sh")")
begin kernel "$build/linux/Module.symvers" "$key" "preparing the kernel tree"

say "preparing the tree of $release"
rm -rf "$linux"
mkdir -p "$linux"
# Most of the source is code that a module's build never reads; what it needs are the headers, the
# Kconfig files and the build's own tools.
name=$(basename "$source" .tar.xz)
in_root "$linux:/linux" -- tar --extract --file "${source#"$root"}" --directory /linux --strip-components 1 \
    --exclude "$name/arch/[!x]*.[chS]" --exclude "$name/arch/[!x]*.dts*" --exclude "$name/Documentation/*/*" --exclude "$name/tools/testing/*" \
    --exclude "$name/drivers/*.c" --exclude "$name/fs/*.c" --exclude "$name/net/*.c" --exclude "$name/sound/*.c"

in_linux() { in_root "$linux:/linux" -- make -C /linux CC="$kernel_cc" "$@"; }

cp "$stock_config" "$linux/.config"
in_linux -s olddefconfig >"$build/logs/kernel-config.log" 2>&1 || die "see build/logs/kernel-config.log"
version=$(in_linux -s kernelversion)
case $release in
"$version"*) ;;
*) die "refused: the source is $version, the kernel $release" ;;
esac
printf '%s\n' "${release#"$version"}" >"$linux/localversion-stock"

difference=$(config_diff "$stock_config" "$linux/.config")
[ -z "$difference" ] || die "refused, the configuration is not the kernel's:
$difference"

quietly kernel.log in_linux -j "$(nproc)" prepare modules_prepare
built=$(in_linux -s kernelrelease)
[ "$built" = "$release" ] || die "refused: the tree calls itself $built, the kernel $release"
[ -e "$linux/rust/libkernel.rmeta" ] || die "the tree has no Rust metadata; see build/logs/kernel.log"

# The stock kernel's symbols, and its types for the module's BTF.
cp "$headers/vmlinux" "$linux/"
cp "$headers/Module.symvers" "$linux/"
rm -rf "$build/linux"
mv "$linux" "$build/linux"
set_stamp kernel "$key"
say "done in ${SECONDS}s"
