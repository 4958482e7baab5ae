#!/usr/bin/env bash
# Compare with torchtitan 0.2.2 + torchao 0.17.0: install them into a folder of their own, then run scripts/bench_peers.py.
#
#   scripts/bench_peers.sh --data TOKENS --tokenizer DIR --out RUNS [OPTIONS of bench_peers.py]
#   scripts/bench_peers.sh --wheels WHEELS --data TOKENS --tokenizer DIR --out RUNS        without network
#   scripts/bench_peers.sh --install-only --site DIR [--wheels WHEELS]                     for later calls with --site DIR
#
# --wheels DIR    take the peer, and what it needs that is missing here, from this folder instead of the package registry
# --site DIR      folder to install into (OUT/peer_site); one that has the peer already is used as it is
#
# TOKENS is what `titan-fp8 prepare --tokenizer DIR` wrote. The environment is left as it is: the peer's processes alone see
# its folder. Wheels for a machine without network come from one with a network and the same version of Python:
#   pip download --no-deps -d WHEELS torchtitan==0.2.2 torchao==0.17.0 torchdata==0.11.0 tyro docstring-parser typeguard einops
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
script=$repo/scripts/${BENCH_SCRIPT:-bench_peers}.py  # bench_8gpu.sh names its own
refuse() { echo "bench_peers.sh: $*" >&2; exit 2; }

from=() options=() site='' out='' install_only=false help=false
while [ $# -gt 0 ]; do
  case $1 in
    --wheels=* | --site=* | --out=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
    --wheels | --site | --out)
      [ $# -gt 1 ] || refuse "$1 needs a folder"
      case $1 in
        --wheels) from=(--wheels "$2") ;;
        --site) site=$2 ;;
        --out) out=$2; options+=(--out "$2") ;;
      esac
      shift ;;
    --install-only) install_only=true ;;
    -h | --help) help=true ;;
    *) options+=("$1") ;;
  esac
  shift
done
if [ -z "$site" ]; then
  $help || [ -n "$out" ] || refuse "--out is missing; name a folder for the runs"
  site=$out/peer_site
fi

. "$repo/scripts/setup.sh" ""  # without an argument it would see this script's first
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}

if $help; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
  exec "$PYTHON" "$script" --help
fi
if ! $install_only && ! "$PYTHON" -c 'import sys, torch; sys.exit(torch.cuda.device_count() == 0)'; then
  refuse "no CUDA device here; this benchmark needs GPUs with FP8 tensor cores (--install-only needs none)"
fi
"$PYTHON" "$repo/scripts/peer/install.py" --site "$site" "${from[@]}"
if $install_only; then exit; fi
exec "$PYTHON" "$script" --site "$site" "${options[@]}"
