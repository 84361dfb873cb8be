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
log=target/fuzz.log
cargo build --release --locked --quiet
total=0
for target in packet frame_v1 frame_v2 sequence; do
    echo "fuzz: $target for $seconds s"
    mkdir -p artifacts "target/corpus/$target"
    "$programs/$target" "target/corpus/$target" "corpus/$target" -max_total_time="$seconds" \
        -print_final_stats=1 -verbosity=0 -artifact_prefix="artifacts/$target-" >"$log" 2>&1 ||
        { cat "$log" >&2; exit 1; }
    tried=$(awk '/^stat::number_of_executed_units/ { print $2 }' "$log")
    echo "fuzz: $target: $tried inputs tried"
    total=$((total + tried))
done
echo "fuzz: no finding in $total inputs"
