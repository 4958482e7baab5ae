#!/usr/bin/env bash
# Train. Everything after the script's name goes to the trainer untouched:
#
#   ./run_train.sh                                                          the default job, a few minutes on two CPU cores
#   CONFIG_FILE=train_configs/llama3_8b.toml ./run_train.sh --compile.enable
#
# CONFIG_FILE     TOML recipe                                    (train_configs/debug_model.toml)
# NGPU            processes on this machine                      (all GPUs; 1 without a GPU)
# LOG_RANK        ranks whose log is shown, e.g. 0,1             (0)
# NNODES, NODE_RANK, RDZV_ENDPOINT    more machines: how many, which one this is, host:port of the first (1, 0, localhost:0)
set -euo pipefail
repo=$(cd "$(dirname "$0")" && pwd)
. "$repo/scripts/setup.sh"

CONFIG_FILE=${CONFIG_FILE:-$repo/train_configs/debug_model.toml}
LOG_RANK=${LOG_RANK:-0}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
RDZV_ENDPOINT=${RDZV_ENDPOINT:-localhost:0}
if [ -z "${NGPU:-}" ]; then
  NGPU=$( (nvidia-smi --list-gpus 2>/dev/null || true) | grep -c '^GPU' || true)
  [ "$NGPU" -gt 0 ] || NGPU=1
fi
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}

# --help and a mistake in the configuration are answered here, once, before any process group.
for argument in "$@"; do
  [ "$argument" != "--help" ] || exec "$PYTHON" -m titan_fp8.train --job.config_file "$CONFIG_FILE" "$@"
done
WORLD_SIZE=$((NGPU * NNODES)) "$PYTHON" -m titan_fp8.cli.main check --job.config_file "$CONFIG_FILE" "$@"

# torchrun puts a pipe between the trainer and the terminal.
if [ -t 2 ]; then export FORCE_COLOR=${FORCE_COLOR-1}; fi
if [ -z "${OMP_NUM_THREADS:-}" ]; then
  cores=$(nproc 2>/dev/null || echo 1)
  export OMP_NUM_THREADS=$(( cores / NGPU > 0 ? cores / NGPU : 1 ))
fi
if [ "$NNODES" -gt 1 ] && [ "$RDZV_ENDPOINT" = localhost:0 ]; then
  echo "run_train.sh: NNODES=$NNODES needs RDZV_ENDPOINT=HOST:PORT, the same on every node" >&2; exit 2
fi
exec "$PYTHON" -m torch.distributed.run --nproc_per_node "$NGPU" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
  --rdzv_backend c10d --rdzv_endpoint "$RDZV_ENDPOINT" --local-ranks-filter "$LOG_RANK" --role rank --tee 3 \
  -m titan_fp8.train --job.config_file "$CONFIG_FILE" "$@"
