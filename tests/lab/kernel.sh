#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Makes build/linux: the stock kernel's source, configured as the stock kernel and prepared for
# modules in Rust. Debian's headers lack the Rust metadata; the same source, configuration and
# compilers give the same again, and whatever is not the same is refused here. For another KERNEL
# (lib.sh) the same in that kernel's folder.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

case $kernel in debug*) exec "$lab/debug-kernel.sh" ;; esac
"$lab/root.sh"
linux=$choice/linux.new
release=$(cat "$unpacked/release")
stock_config=$unpacked/usr/lib/modules/$release/config
headers=$unpacked/usr/src/linux-headers-$release
cc=$(compiler_of "$stock_config")

# The tree is as good as the tools that prepared it.
key=$(key_of "$(cat "$unpacked/version" "$unpacked/tools" "$lab/kernel.sh")")
stamp=kernel
[ "$kernel" = "$default_kernel" ] || stamp=kernel-$kernel
begin "$stamp" "$choice/linux/Module.symvers" "$key" "preparing the kernel tree"

say "preparing the tree of $release"
rm -rf "$linux"
mkdir -p "$linux"
# Most of the source is code that a module's build never reads; what it needs are the headers, the
# Kconfig files and the build's own tools.
unpack_source "$unpacked" "$linux" 'drivers/*.c' 'fs/*.c' 'net/*.c'

in_linux() { in_tools "$linux:/linux" -- make -C /linux CC="$cc" "$@"; }

cp "$stock_config" "$linux/.config"
in_linux -s olddefconfig >"$build/logs/$stamp-config.log" 2>&1 || die "see build/logs/$stamp-config.log"
version=$(in_linux -s kernelversion)
case $release in
"$version"*) ;;
*) die "refused: the source is $version, the kernel $release" ;;
esac
printf '%s\n' "${release#"$version"}" >"$linux/localversion-stock"

difference=$(config_diff "$stock_config" "$linux/.config")
[ -z "$difference" ] || die "refused, the configuration is not the kernel's:
$difference"

quietly "$stamp.log" in_linux -j "$(nproc)" prepare modules_prepare
built=$(in_linux -s kernelrelease)
[ "$built" = "$release" ] || die "refused: the tree calls itself $built, the kernel $release"
[ -e "$linux/rust/libkernel.rmeta" ] || die "the tree has no Rust metadata; see build/logs/$stamp.log"

# The stock kernel's symbols, and its types for the module's BTF.
cp "$headers/vmlinux" "$linux/"
cp "$headers/Module.symvers" "$linux/"
rm -rf "$choice/linux"
mv "$linux" "$choice/linux"
set_stamp "$stamp" "$key"
say "done in ${SECONDS}s"
