# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash disable=SC2034  # whoever sources it uses some of it
#
# What the lab's scripts share: where things are, one line at the start and end of a step, a stamp
# per product, and the way into the build root. Sourced, never run.

lab=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$lab/../.." && pwd)
build=$repo/build
# What a kernel's build says of itself. Inside of a root this folder is alone, and nobody asks.
if [ -e "$repo/kmod/dkms" ]; then
    # shellcheck source=kmod/dkms/kernel.sh
    . "$repo/kmod/dkms/kernel.sh"
fi
root=$build/root
# Which kernel the guest under test runs, KERNEL in the environment:
#   7.3, 7.2 ...        the newest cloud kernel of that series in trixie's backports; 7.3 is the default
#   6.12, 6.1           the newest cloud kernel of trixie itself and of bookworm. They have no Rust, so no
#                       module of ours: the daemon's cases run with the kernel's own
#   testing, unstable   the newest cloud kernel of that suite, whose compilers are in a root of their own
#   debug, debug-kcsan  the default's source with the kernel's own detectors (debug-kernel.sh)
# What is made for another than the default lies in a folder of its own, so that nothing is made anew
# when the choice changes. The outer guest always runs the default.
default_kernel=7.3
# Memory of an outer guest, unless it is given another.
outer_mib=4096
# The one from which packages/kernel-upgrade* come to the default.
older_kernel=7.2
kernel=${KERNEL:-$default_kernel}
# the suite, the root with the compilers, what is made for this kernel, and the kernel as its packages
# lay it out: release, version, usr/lib/modules, usr/src
suite=trixie
tools=$root
choice=$build/kernels/$kernel
unpacked=$choice/kernel
# the suite of a kernel without Rust
stock=
case $kernel in
"$default_kernel")
    choice=$build
    unpacked=$root/kernel
    ;;
6.12) stock=trixie ;;
6.1) stock=bookworm ;;
testing | unstable)
    suite=$kernel
    tools=$choice/root
    unpacked=$tools/kernel
    ;;
esac
me=$(basename "$0" .sh)
mkdir -p "$build/logs" "$build/stamps"

say() { printf '%s: %s\n' "$me" "$*"; }
# 1 is for what a command has found, as test cases that failed; this for one that could not do its work
die() {
    printf '%s: %s\n' "$me" "$*" >&2
    exit 3
}

# Steps that mount or chroot need root; the message is the line to copy.
need_root() {
    [ "$(id -u)" = 0 ] || die "$1 needs root; run: sudo $lab/$me.sh"
}

key_of() { printf '%s\n' "$@" | sha256sum | cut -d ' ' -f 1; }
set_stamp() { printf '%s\n' "$2" >"$build/stamps/$1"; }

# One writer per product: two commands started side by side must not build the same thing twice.
# The lock goes with the process, whatever its end.
lock() {
    exec {lock_fd}>"$build/stamps/$1.lock"
    flock "$lock_fd"
}

# begin STAMP PRODUCT KEY WHAT: leaves the script when the product is there and was made from what
# its inputs are now; else takes the lock, and asks again in case another has made it meanwhile.
begin() {
    is_fresh() { [ -e "$1" ] && [ "$(cat "$build/stamps/$2" 2>/dev/null)" = "$3" ]; }
    if is_fresh "$2" "$1" "$3"; then exit 0; fi
    need_root "$4"
    lock "$1"
    if is_fresh "$2" "$1" "$3"; then exit 0; fi
    # from here on the time is this step's own
    SECONDS=0
}

# quietly LOG COMMAND...: keeps the output in build/logs and shows its end when the command fails.
quietly() {
    local log=$build/logs/$1
    shift
    "$@" >"$log" 2>&1 || {
        tail -n 30 "$log" >&2
        die "failed; the whole log is ${log#"$repo"/}"
    }
}

# enter ROOT [SOURCE:TARGET]... -- COMMAND...: becomes COMMAND in a root, with /proc, /dev and the given
# directories mounted. The mounts live in a namespace of their own and end with it.
enter() {
    local inside=$1 binds=()
    shift
    while [ "$1" != -- ]; do
        mkdir -p "$inside/${1#*:}"
        binds+=("$1")
        shift
    done
    shift
    # shellcheck disable=SC2016  # the inner shell expands these
    exec unshare --mount --propagation private bash -euc '
        root=$1 count=$2
        shift 2
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        for ((; count > 0; count--)); do
            mount --rbind "${1%%:*}" "$root/${1#*:}"
            shift
        done
        exec env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 \
            TERM=dumb chroot "$root" "$@"
    ' enter "$inside" "${#binds[@]}" "${binds[@]}" "$@"
}
enter_root() { enter "$root" "$@"; }
in_root() { (enter_root "$@"); }
# where this kernel's compilers are
in_tools() { (enter "$tools" "$@"); }

# unpack_source KERNEL TARGET [PATTERN]...: the source that came with a kernel, without what none for
# this machine needs, and without these.
unpack_source() {
    local packed=$1/usr/src target=$2 archive name pattern excludes=()
    shift 2
    archive=$(basename "$packed"/linux-source-*.tar.xz)
    name=${archive%.tar.xz}
    for pattern in 'arch/[!x]*.[chS]' 'arch/[!x]*.dts*' 'Documentation/*/*' 'tools/testing/*' 'sound/*.c' "$@"; do
        excludes+=(--exclude "$name/$pattern")
    done
    in_root "$packed:/packed" "$target:/linux" -- tar --extract --file "/packed/$archive" \
        --directory /linux --strip-components 1 "${excludes[@]}"
}

# add_modules KERNEL DIR NAME...: modules of a kernel as it lies in $unpacked, and what they depend on,
# unpacked, with their index.
add_modules() {
    local from=$1 dir=$2 modules file target
    modules=/usr/lib/modules/$(cat "$from/release")
    shift 2
    modprobe --dirname "$from" --set-version "${modules##*/}" --show-depends --all "$@" |
        sed -n 's/^insmod \([^ ]*\).*/\1/p' | sort -u | while read -r file; do
        target=$dir$modules/${file#*"/${modules##*/}/"}
        mkdir -p "$(dirname "$target")"
        case $file in
        *.xz) xz -dc "$file" >"${target%.xz}" ;;
        *) cp "$file" "$target" ;;
        esac
    done
    cp "$from$modules"/modules.{builtin,builtin.modinfo,order} "$dir$modules/"
    depmod --basedir "$dir" "${modules##*/}"
}
