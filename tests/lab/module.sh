#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# module.sh [--lab] [MAKE ARGUMENTS...]: builds build/hv_vss.ko with Kbuild. Where the headers of the
# running kernel (or of the release in KVER) carry Rust metadata they are used as they are, else the
# prepared tree of the lab's kernel; --lab asks for the latter, whose module is always
# build/lab/hv_vss.ko as well. Objects go to build/kmod/, none to the sources. CLIPPY=1 lints.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

only_lab=
if [ "${1:-}" = --lab ]; then
    only_lab=1
    shift
fi

# The kernels that the module was tested with; HV_VSS_UNTESTED=1 tries others, too.
known=" $(sed -n 's/^hv_vss_kernels := //p' "$repo/Kbuild") "
release=${KVER:-$(uname -r)}
headers=${KDIR:-/lib/modules/$release/build}

has_rust() { [ -e "$headers/rust/libkernel.rmeta" ] && [ -e "$headers/.config" ]; }
is_known() {
    local series
    series=$(sed 's/^\([0-9]*\.[0-9]*\).*/\1/' <<<"$release")
    [ -n "${HV_VSS_UNTESTED:-}" ] || [ "$known" != "${known/ $series /}" ]
}

native=
if [ -z "$only_lab" ] && has_rust; then
    if is_known; then
        native=1
    else
        say "kernel $release has Rust metadata but is not one of$known; building for the lab's kernel"
    fi
fi

# refuse_other_compiler CONFIG RUSTC-TEXT CC-TEXT: Rust metadata is readable by the very rustc that
# wrote it; of a C compiler the release must be the same.
refuse_other_compiler() {
    local rustc cc
    rustc=$(option "$1" CONFIG_RUSTC_VERSION_TEXT)
    cc=$(option "$1" CONFIG_CC_VERSION_TEXT)
    [ "$rustc" = "$2" ] || die "refused: the kernel was built by '$rustc', this compiler is '$2'"
    [ "${cc##* }" = "${3##* }" ] || die "refused: the kernel was built by '$cc', this compiler is '$3'"
}

if [ -n "$native" ]; then
    config=$headers/.config
    built=$(cat "$headers/include/config/kernel.release")
    [ "$built" = "$release" ] || die "refused: $headers is of kernel $built, not $release"
    for stock in "/boot/config-$release" "/lib/modules/$release/config"; do
        [ -e "$stock" ] || continue
        difference=$(config_diff "$stock" "$config")
        [ -z "$difference" ] || die "refused, $headers is configured unlike $stock:
$difference"
        break
    done
    # The kernel's own compiler by its own name, if that name is there.
    cc=${CC:-$(compiler_of "$config")}
    arguments=()
    if [ "$(option "$config" CONFIG_CC_IS_CLANG)" = y ]; then
        arguments+=(LLVM=1)
    elif ! command -v "$cc" >/dev/null; then
        cc=gcc
    fi
    for tool in "$cc" "${RUSTC:-rustc}" "${BINDGEN:-bindgen}"; do
        command -v "$tool" >/dev/null || die "refused: $headers needs $tool, which is not installed"
    done
    arguments+=("CC=$cc" "RUSTC=${RUSTC:-rustc}" "BINDGEN=${BINDGEN:-bindgen}")
    refuse_other_compiler "$config" "$("${RUSTC:-rustc}" --version)" "$("$cc" --version | head -n 1)"
else
    "$lab/kernel.sh"
    need_root "building in the build root"
    release=$(cat "$unpacked/release")
    cc=$(compiler_of "$choice/linux/.config")
    arguments=("CC=$cc")
    if [ "$kernel" = debug-kcsan ]; then
        # What the kernel's build gives to C for KCSAN, and not yet to Rust (see debug-kernel.sh).
        kcsan=(-Zsanitizer=thread)
        for option in distinguish-volatile=1 instrument-func-entry-exit=0 compound-read-before-write=1; do
            kcsan+=("-Cllvm-args=-tsan-$option")
        done
        arguments+=("KRUSTFLAGS=${kcsan[*]}")
    fi
    refuse_other_compiler "$choice/linux/.config" "$(in_tools -- rustc --version)" \
        "$(in_tools -- "$cc" --version | head -n 1)"
fi

[ -z "${HV_VSS_UNTESTED:-}" ] || arguments+=(HV_VSS_UNTESTED=1)

# The linter takes the compiler's place, so its objects are kept apart.
output=$build/kmod/$release
clippy=
for argument; do
    case $argument in
    CLIPPY=*)
        clippy=1
        output=$output-clippy
        ;;
    esac
done
mkdir -p "$output"
lock module
SECONDS=0

compile() {
    if [ -n "$native" ]; then
        make -C "$headers" M="$repo" MO="$output" "${arguments[@]}" modules "$@"
    else
        in_tools "$choice/linux:/linux" "$repo:/src" "$output:/output" -- \
            make -C /linux M=/src MO=/output "${arguments[@]}" modules "$@"
    fi
}

say "building for $release${clippy:+ with clippy}"
log=$build/logs/module${clippy:+-clippy}.log
if ! compile "$@" >"$log" 2>&1; then
    grep -v '^make' "$log" >&2 || true
    die "failed for $release"
fi
# Kbuild's word on compilers of equal version and other name is not about the code.
if grep -v '^warning: the compiler differs' "$log" | grep -A 12 -E '(^|: )warning: ' >&2 && [ -n "$clippy" ]; then
    # what is built is not linted again
    rm -rf "$output"
    die "clippy has something to say"
fi

if [ -z "$clippy" ]; then
    [ -n "$native" ] || install -D -m 0644 "$output/hv_vss.ko" "$choice/lab/hv_vss.ko"
    [ -n "$only_lab" ] || install -m 0644 "$output/hv_vss.ko" "$build/hv_vss.ko"
fi
say "done in ${SECONDS}s"
