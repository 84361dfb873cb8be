#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# run.sh [SECONDS]: fuzzes the engine with each target for so many seconds (default 60), starting
# from the corpus and adding to it. A finding ends it with an error and is kept in artifacts/: make
# it a named test in tests/protocol.rs.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${1:-60}
programs=target/x86_64-unknown-linux-gnu/release
mkdir -p artifacts
cargo build --release --locked --quiet
for target in packet frame_v1 frame_v2 sequence; do
    echo "fuzz: $target for $seconds s"
    "$programs/$target" "corpus/$target" -max_total_time="$seconds" -print_final_stats=0 \
        -verbosity=0 -artifact_prefix="artifacts/$target-"
done
echo "fuzz: no finding"
