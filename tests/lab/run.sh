#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# run.sh [--timeout SECONDS] [--memory MIB] [--results FOLDER] [--name NAME] [--module FILE] COMMAND...: runs COMMAND in
# the payload folder (the test programs, the module, the guest's kernel and initramfs) on a machine whose KVM can
# play Hyper-V: this one if it can, else an outer guest (with this much memory) under emulation. Its
# output is shown as it comes and its exit status is ours; what it leaves in results/ is found in
# FOLDER, build/results unless given (for another KERNEL than the default: in that kernel's folder).
# Log of the outer guest: build/logs/, where NAME tells runs side by side apart. The module is that of module.sh
# --lab, unless FILE is another for the same kernel.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

limit=600
memory=$outer_mib
results=$choice/results
name=outer
module=$choice/lab/hv_vss.ko
while [ $# -gt 1 ]; do
    case $1 in
    --timeout) limit=$2 ;;
    --memory) memory=$2 ;;
    --results) results=$2 ;;
    --name) name=$2 ;;
    --module) module=$2 ;;
    *) break ;;
    esac
    shift 2
done
[ $# -gt 0 ] || die "usage: run.sh [--timeout SECONDS] [--memory MIB] [--results FOLDER] [--name NAME] [--module FILE] COMMAND..."
# where cargo puts the lab's programs, and the daemon as it is shipped
programs=$repo/target/lab
daemon=$repo/target/release/hv_vss_daemon

"$lab/image.sh"
# The outer guest runs the default kernel whatever the one under test.
[ "$kernel" = "$default_kernel" ] || KERNEL=$default_kernel "$lab/image.sh"
# What the guests are made of besides: large, and only where there is a case for it.
archives=
if [ "$1 ${2:-}" = "./e2e run" ] && [ "$kernel" = "$default_kernel" ] && [ -x "$programs/e2e" ]; then
    archives=$("$programs/e2e" run --archives "${@:3}")
fi
case $archives in *systemd.cpio*) "$lab/systemd.sh" ;; esac
older=$build/kernels/$older_kernel
case $archives in
*older.cpio*) KERNEL=$older_kernel "$lab/image.sh" && KERNEL=$older_kernel "$lab/systemd.sh" ;;
esac

[ -w "$build" ] || need_root "writing to build/"
# What a killed run could not take away itself; the name tells whose it was.
for left in "$build"/run.*; do
    owner=${left##*/run.}
    [ -e "/proc/${owner%.*}" ] || rm -rf "$left"
done
work=$(mktemp -d "$build/run.$$.XXXXXX")
child=
# shellcheck disable=SC2317  # called by the trap
finish() {
    [ -z "$child" ] || kill "$child" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

payload=$work/payload
mkdir -p "$payload/results"
missing=()
for file in "$programs"/{e2e,bench,hyperv-sim,lab-agent,hv_vss_example{,_32}} "$daemon" \
    "$module" "$choice"/{vmlinuz,guest.cpio}; do
    cp "$file" "$payload/" 2>/dev/null || missing+=("${file##*/}")
done
if [ "$kernel" = "$default_kernel" ] && [ -e "$payload/hv_vss.ko" ] && [ -e "$payload/hv_vss_daemon" ]; then
    # systemd.sh and programs.sh have made them
    for over in systemd databases volumes; do
        case $archives in
        *$over.cpio*) cp "$build/$over.cpio" "$payload/" 2>/dev/null || missing+=("$over.cpio") ;;
        esac
    done
    # the kernel that they are upgraded from
    case $archives in
    *older.cpio*)
        cp "$older/systemd.cpio" "$payload/older.cpio" 2>/dev/null || missing+=(older.cpio)
        cp "$older/vmlinuz" "$payload/vmlinuz.older" 2>/dev/null || missing+=(vmlinuz.older)
        ;;
    esac
    # what the packages' own cases install
    case $archives in
    *packages.cpio*) cp -r "$build/dkms/packages" "$payload/packages" 2>/dev/null || missing+=(packages) ;;
    esac
    # the disk of a server, which programs.sh has made
    case $archives in
    *mariadb.ext4*) cp "$build/mariadb.ext4" "$payload/" 2>/dev/null || missing+=(mariadb.ext4) ;;
    esac
    # the same programs, where an installation puts them
    quietly install.log make --directory "$repo" install DESTDIR="$payload/install" \
        MODULE="$payload/hv_vss.ko" DAEMON="$payload/hv_vss_daemon"
fi
[ ${#missing[@]} = 0 ] || say "not built, so not in the payload: ${missing[*]}"

# Which tree all of it is of, as far as git knows: the verdicts say so (tests/e2e/src/origin.rs).
if commit=$(TZ=UTC git -C "$repo" log -1 --date=format-local:%Y-%m-%dT%H:%M:%SZ --format=%cd 2>/dev/null) &&
    described=$(git -C "$repo" describe --always --dirty 2>/dev/null); then
    echo "$commit $described" >"$payload/commit"
fi

keep_results() {
    rm -rf "$results"
    mkdir -p "$(dirname "$results")"
    mv "$payload/results" "$results"
}

if [ -x "$payload/hyperv-sim" ] && "$payload/hyperv-sim" probe >"$build/logs/probe.log" 2>&1; then
    say "this machine's KVM has the Hyper-V capabilities: running directly"
    (cd "$payload" && exec timeout --kill-after 20 "$limit" "$@") </dev/null &
    child=$!
    status=0
    wait "$child" || status=$?
    child=
    keep_results
    [ "$status" != 124 ] || say "timed out after ${limit}s"
    exit "$status"
fi

need_root "the outer guest's QEMU, which lives in the build root,"

# A shell in the outer guest starts the command; single quotes keep each argument as it is.
{
    printf 'cd /payload && exec'
    for argument; do
        printf " '%s'" "${argument//\'/\'\\\'\'}"
    done
    printf '\n'
} >"$payload/run"
chmod -R u+rwX,go+rX "$payload"
in_root "$work:/run.work" -- sh -c 'cd /run.work && find payload | cpio --quiet -o -H newc >payload.cpio'
cat "$build/outer.cpio" "$work/payload.cpio" >"$work/initrd"
console=$work/console.log

# One processor: with two, emulation breaks the outer kernel now and then. rdrand: without it each
# mkfs waits for seconds until its kernel has gathered randomness, in both guests. The longer limit
# is for an outer guest that hangs; its own, which keeps the results, comes first.
grace=120
# QEMU's do_vmexit takes a bit out of an SVM processor's pending interrupts (interrupt_request) without
# a lock, while its main loop adds timer ticks to them: in all likelihood that is how ticks got lost.
# On one CPU the two threads cannot meet in the middle of that instruction.
cpus=$(taskset --cpu-list --pid $$ | sed 's/.*: //')
cpu=$(tr ',' '\n' <<<"$cpus" | awk -F- '{ for (i = $1; i <= ($2 == "" ? $1 : $2); i++) print i }' | shuf -n 1)
# shellcheck disable=SC2054  # the commas are QEMU's
machine=(
    qemu-system-x86_64 -accel tcg,thread=multi -cpu qemu64,+svm,+npt,+nrip-save,+rdrand
    -M q35 -m "$memory" -smp 1 -display none -monitor none -nodefaults -no-reboot
    -kernel /build/vmlinuz -initrd /run.work/initrd
    -drive file=/run.work/results.disk,format=raw,if=none,id=results,cache=unsafe
    -device nvme,serial=results,drive=results
    -serial file:/run.work/console.log -serial stdio
)
# run_outer: one life of the outer guest. Its console shows a sign of life every 5 s; when none has
# come for $silence seconds its processor has stopped taking interrupts (seen a few times before QEMU
# was kept to one CPU: halted for good, with nothing pending), and it is ended.
silence=90
run_outer() {
    local left=$((limit - SECONDS + begun))
    : >"$console"
    # of an attempt before it nothing counts but the verdicts, at the end (outer/init)
    dd if=/dev/zero of="$work/results.disk" bs=512 count=1 conv=notrunc status=none
    enter_root "$build:/build" "$work:/run.work" -- setpriv --pdeathsig TERM \
        timeout --foreground --kill-after 10 $((left + grace)) \
        setpriv --pdeathsig KILL taskset --cpu-list "$cpu" "${machine[@]}" \
        -append "console=ttyS0 panic=-1 lab.timeout=$left" \
        </dev/null 2>"$work/qemu.log" > >(tee "$work/output") &
    child=$!
    ended=0
    frozen=
    while kill -0 "$child" 2>/dev/null; do
        sleep 1
        if [ $(($(date +%s) - $(stat -c %Y "$console"))) -ge $silence ]; then
            frozen=1
            kill "$child" 2>/dev/null || true
            break
        fi
    done
    wait "$child" || ended=$?
    child=
}

truncate --size 512M "$work/results.disk"
begun=$SECONDS
# All attempts together have the limit, and the last of them a minute of it at least.
for attempt in 1 2 3; do
    run_outer
    [ -n "$frozen" ] || break
    kept=$name-console.frozen-$attempt.log
    cp "$console" "$build/logs/$kept"
    say "the emulator froze: no sign of life from the outer guest for $silence s (attempt $attempt of 3, build/logs/$kept)" >&2
    [ $((limit - SECONDS + begun)) -ge 60 ] || break
    # Of the end-to-end cases only those are run that have no verdict yet; of another command all is run
    # again, unless something has failed.
    if [ "$1 ${2:-}" != "./e2e run" ] && grep -q '^FAIL ' "$work/output"; then break; fi
done
mv "$console" "$build/logs/$name-console.log"
mv "$work/qemu.log" "$build/logs/$name-qemu.log"

marker=$(head -c 512 "$work/results.disk" | tr -d '\0')
case $marker in
"end "*)
    status=${marker#end }
    rm -rf "$payload/results"
    # tar stops reading at its end mark, long before the end of the disk
    { tail -c +513 "$work/results.disk" || true; } 2>/dev/null |
        tar --extract --directory "$payload" --no-same-owner
    # for whoever adds up the parts of a run
    [ "$attempt" = 1 ] || echo "$attempt" >"$payload/results/attempt"
    keep_results
    # busybox's timeout ends what it stops with TERM, or KILL if that was not enough
    case $status in 137 | 143) say "stopped after its limit of ${limit}s" ;; esac
    [ "$attempt" = 1 ] || say "this was attempt $attempt: the emulator had frozen before" >&2
    exit "$status"
    ;;
esac
cat "$build/logs/$name-qemu.log" >&2
tail -n 40 "$build/logs/$name-console.log" >&2
[ -z "$frozen" ] || ended=frozen
case $ended in
frozen) what="froze in each of $attempt attempts" ;;
124 | 137) what="hung and was ended $grace s after its limit of $limit s" ;;
*) what="ended without an end marker (QEMU's status: $ended)" ;;
esac
die "the outer guest $what; its console is above and in build/logs/$name-console.log"
