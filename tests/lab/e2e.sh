#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# e2e.sh [--timeout SECONDS] [--cpus COUNT] [--all] GLOB...: runs the end-to-end cases that match, with --all
# also the long ones, in as many parts side by side as this machine has processors, up to four, and adds up
# what came of them. Each part is a run.sh with one processor to itself, which is all that its emulator uses.
# A run of few cases is not divided. COUNT is of the guests' virtual CPUs, where a case is not to have what
# it is made for.
set -euo pipefail
# shellcheck source=tests/lab/lib.sh
. "$(dirname "$0")/lib.sh"

limit=2400
# what the run is told, and what its sum is told too
options=()
of=()
while [ $# -gt 1 ]; do
    case $1 in
    --timeout)
        limit=$2
        shift
        ;;
    --cpus)
        options+=(--cpus "$2")
        shift
        ;;
    --all)
        options+=(--all)
        of+=(--all)
        ;;
    *) break ;;
    esac
    shift
done
[ $# -gt 0 ] || die "usage: e2e.sh [--timeout SECONDS] [--cpus COUNT] [--all] GLOB..."
e2e=$repo/target/lab/e2e

mapfile -t cpus < <(taskset --cpu-list --pid $$ | sed 's/.*: //' | tr ',' '\n' |
    awk -F- '{ for (i = $1; i <= ($2 == "" ? $1 : $2); i++) print i }')
cases=$("$e2e" list "$@" | wc -l)
parts=${#cpus[@]}
[ "$parts" -le 4 ] || parts=4
free_mib=$(awk '/^MemAvailable:/ { print int($2 / 1024) }' /proc/meminfo)
[ "$parts" -le $((free_mib / outer_mib)) ] || parts=$((free_mib / outer_mib))
# another boot takes longer than a few cases
[ "$parts" -le $((cases / 8)) ] || parts=$((cases / 8))
[ "$parts" -ge 1 ] || parts=1
if [ "$parts" = 1 ]; then
    exec "$lab/run.sh" --timeout "$limit" ./e2e run "${options[@]}" "$@"
fi

# made once, and not by all at the same time
"$lab/image.sh"
case $("$e2e" run --archives "${options[@]}" "$@") in
*systemd.cpio*) [ "$kernel" != "$default_kernel" ] || "$lab/systemd.sh" ;;
esac

results=$choice/results
rm -rf "$results" && mkdir -p "$results"
say "$cases cases in $parts parts side by side, with a number before each line"
runs=()
# shellcheck disable=SC2317  # called by the trap
finish() {
    local run
    for run in "${runs[@]}"; do kill "$run" 2>/dev/null || true; done
    wait
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
for ((part = 1; part <= parts; part++)); do
    taskset --cpu-list "${cpus[part - 1]}" "$lab/run.sh" --timeout "$limit" --name "part-$part" \
        --results "$results/part-$part" ./e2e run --shard "$part/$parts" "${options[@]}" "$@" \
        > >(sed -u "s/^/$part| /") 2>&1 &
    runs+=($!)
done
failed=
for run in "${runs[@]}"; do
    # 1 is for cases that failed, which the sum counts; anything else for a run that did not end
    status=0
    wait "$run" || status=$?
    [ "$status" -le 1 ] || failed=$status
done
runs=()
[ -z "$stock" ] || of+=(--stock)
# by name: a part without verdicts is one whose cases all failed
for ((part = 1; part <= parts; part++)); do of+=(--part "$results/part-$part/e2e.json"); done
status=0
"$e2e" sum --results "$results" "${of[@]}" "$@" || status=$?
for ((part = 1; part <= parts; part++)); do
    attempt=$(cat "$results/part-$part/attempt" 2>/dev/null) || continue
    say "part $part: this was attempt $attempt, the emulator had frozen before"
done
[ -z "$failed" ] || die "a part of the run did not end (status $failed); its console is in build/logs"
exit "$status"
