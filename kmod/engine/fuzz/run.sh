#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# run.sh [SECONDS]: fuzzes the engine with each target for so many seconds (default 60), starting
# from corpus/ and from what earlier runs on this machine found (target/corpus/), and says how many
# inputs were tried. A finding ends it with an error and is kept in artifacts/: make it a named test
# in tests/protocol.rs.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${1:-60}
programs=target/x86_64-unknown-linux-gnu/release
cargo build --release --locked --quiet
fuzz() {
    mkdir -p artifacts "target/corpus/$1"
    "$programs/$1" "target/corpus/$1" "corpus/$1" -max_total_time="$seconds" \
        -print_final_stats=1 -verbosity=0 -artifact_prefix="artifacts/$1-" >"target/$1.log" 2>&1
}
total=0
# Two at a time, each on a processor of its own.
for pair in 'packet frame_v1' 'frame_v2 sequence'; do
    echo "fuzz: ${pair/ / and } for $seconds s"
    runs=()
    for target in $pair; do
        fuzz "$target" &
        runs+=($!)
    done
    for target in $pair; do
        wait "${runs[0]}" || { cat "target/$target.log" >&2; wait; exit 1; }
        runs=("${runs[@]:1}")
        tried=$(awk '/^stat::number_of_executed_units/ { print $2 }' "target/$target.log")
        echo "fuzz: $target: $tried inputs tried"
        total=$((total + tried))
    done
done
echo "fuzz: no finding in $total inputs"
