#!/usr/bin/env bash
# Find or make the Python that runs titan_fp8; sourced by run_train.sh and run_tests.sh, runnable alone.
#
#   . scripts/setup.sh [EXTRA]     sets PYTHON; EXTRA is an extra of pyproject.toml ("dev" for the tests)
#
# The current Python is used when it can import the package and what it needs, with a PyTorch and a pydantic that will do.
# Otherwise .venv in the repository is, made on first use with the pinned versions: constraints-gpu.txt where an NVIDIA GPU
# is present, constraints.txt elsewhere. `TITAN_FP8_CONSTRAINTS=FILE` names other pins.

setup_python() {
  local extra=${1:-} repo constraints stamp wanted modules="titan_fp8, torch, pydantic, tomli_w, datasets, tokenizers, safetensors, tensorboard, tqdm"
  repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  [ "$extra" = dev ] && modules="$modules, pytest, xdist, pytest_timeout, hypothesis, transformers"
  # Looking the modules up is a hundred times faster than importing them.
  local probe="
import importlib.metadata, importlib.util, sys
def release(package): return tuple(int(part) for part in importlib.metadata.version(package).split('.')[:2])
sys.path.insert(0, sys.argv[1])
found = all(importlib.util.find_spec(module.strip()) for module in '$modules'.split(','))
sys.exit(not (sys.version_info >= (3, 11) and found and (2, 11) <= release('torch') < (2, 14) and release('pydantic')[0] == 2))"
  if command -v python3 >/dev/null && python3 -c "$probe" "$repo" 2>/dev/null; then
    PYTHON=$(command -v python3); return
  fi
  constraints=${TITAN_FP8_CONSTRAINTS:-$repo/constraints.txt}
  [ -z "${TITAN_FP8_CONSTRAINTS:-}" ] && [ -e /dev/nvidiactl ] && constraints=$repo/constraints-gpu.txt
  stamp=$repo/.venv/.ready${extra:+-$extra}
  wanted=$(cat "$repo/pyproject.toml" "$constraints" | cksum)
  PYTHON=$repo/.venv/bin/python
  # An environment for the tests can train too.
  local ready
  for ready in "$stamp" "$repo/.venv/.ready-dev"; do
    if [ -x "$PYTHON" ] && [ "$(cat "$ready" 2>/dev/null)" = "$wanted" ]; then return; fi
  done
  echo "setting up $repo/.venv with the versions of $(basename "$constraints") (a few minutes, once)" >&2
  # Without pip it is half made: interrupted, or by a Python that lacked the package python3-venv.
  if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    local base
    for base in python3 python3.13 python3.12 python3.11; do
      command -v "$base" >/dev/null && "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
      base=
    done
    [ -n "$base" ] || { echo "titan_fp8 needs Python 3.11 or newer; none of python3, python3.13, python3.12, python3.11 is" >&2; return 1; }
    "$base" -m venv "$repo/.venv" || { echo "'$base -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; return 1; }
  fi
  # Without this pin the package index would decide the build that the package's own range gets.
  "$PYTHON" -m pip install -q --disable-pip-version-check -c "$constraints" "$(grep -m1 '^torch==' "$constraints")" || return 1
  "$PYTHON" -m pip install -q --disable-pip-version-check -c "$constraints" -e "$repo${extra:+[$extra]}" || return 1
  echo "$wanted" > "$stamp"
}

setup_python "${1:-}" || { return 1 2>/dev/null || exit 1; }
