#!/usr/bin/env bash
# Llama 3 8B in float8 on all GPUs of one host, beside torchtitan 0.2.2 + torchao 0.17.0. A call ends within ten minutes;
# what it had no time for, the same call with --resume does.
#
#   scripts/bench_8gpu.sh --data TOKENS --tokenizer DIR --out RUNS [OPTIONS of bench_8gpu.py]
#
# --wheels, --site and --install-only are those of scripts/bench_peers.sh, which installs the peer.
BENCH_SCRIPT=bench_8gpu BENCH_BEGAN=$(date +%s) exec "$(dirname "$0")/bench_peers.sh" "$@"
