#!/usr/bin/env bash
# Set up (once) and run the tests; arguments go to pytest: scripts/run_tests.sh tests/unit/config -x
# Tests marked `gpu` are skipped without a GPU; those marked `slow` are left out unless asked for with -m.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
cd "$repo"
. scripts/setup.sh dev
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# A later -m of the caller's overrides this one.
exec "$PYTHON" -m pytest -n "${TEST_WORKERS:-2}" --dist worksteal -m "not slow" "$@"
