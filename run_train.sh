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
# RDZV_ID         name of the run, the same on all machines      (none)
set -euo pipefail
repo=$(cd "$(dirname "$0")" && pwd)
. "$repo/scripts/setup.sh" ""  # without an argument it would see this script's first

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

refuse() { echo "run_train.sh: $*" >&2; exit 2; }
[[ $NGPU =~ ^[1-9][0-9]*$ ]] || refuse "NGPU=$NGPU is no number of processes; write 1 or more"
[[ $NNODES =~ ^[1-9][0-9]*$ ]] || refuse "NNODES=$NNODES is no number of machines; write 1 or more"
[[ $NODE_RANK =~ ^(0|[1-9][0-9]*)$ ]] && [ "$NODE_RANK" -lt "$NNODES" ] ||
  refuse "NODE_RANK=$NODE_RANK is none of the $NNODES machines; they count from 0"
[[ $LOG_RANK =~ ^[0-9]+(,[0-9]+)*$ ]] || refuse "LOG_RANK=$LOG_RANK is no list of ranks; write for example 0,1"
for rank in ${LOG_RANK//,/ }; do
  [ "$rank" -lt "$NGPU" ] || refuse "LOG_RANK=$LOG_RANK names rank $rank, but the $NGPU processes of a machine count from 0"
done
if [ "$NNODES" -gt 1 ] && [ "$RDZV_ENDPOINT" = localhost:0 ]; then
  refuse "NNODES=$NNODES needs RDZV_ENDPOINT=HOST:PORT, the same on every node"
fi

# What another launcher has left in the environment is not of this run.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE TORCHELASTIC_USE_AGENT_STORE

# --help is answered here, once. A mistake in the configuration is, before any process group, by what is started below.
for argument in "$@"; do
  case $argument in
    -h | --help | --help=*) exec "$PYTHON" -m titan_fp8.train --job.config_file "$CONFIG_FILE" "$@" ;;
  esac
done

if [ -z "${OMP_NUM_THREADS:-}" ]; then
  cores=$(nproc 2>/dev/null || echo 1)
  export OMP_NUM_THREADS=$(( cores / NGPU > 0 ? cores / NGPU : 1 ))
fi
# Segments grow, so that what is freed in one size serves another, in place of lying idle in pieces.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}
# One process needs no launcher, whose trace would bury what the trainer says: only what a launcher sets.
if [ "$NGPU" = 1 ] && [ "$NNODES" = 1 ]; then
  export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=0
  exec "$PYTHON" -m titan_fp8.train --job.config_file "$CONFIG_FILE" "$@"
fi
# torchrun puts a pipe between the trainer and the terminal.
if [ -t 2 ]; then export FORCE_COLOR=${FORCE_COLOR-1}; fi
WORLD_SIZE=$((NGPU * NNODES)) exec "$PYTHON" -m titan_fp8.launch \
  --nproc_per_node "$NGPU" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
  --rdzv_backend c10d --rdzv_endpoint "$RDZV_ENDPOINT" --rdzv_id "${RDZV_ID:-none}" \
  --local-ranks-filter "$LOG_RANK" --role rank --tee 3 \
  -- --job.config_file "$CONFIG_FILE" "$@"
