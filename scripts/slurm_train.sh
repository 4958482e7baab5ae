#!/usr/bin/env bash
# Train on the nodes of a SLURM allocation. Arguments and CONFIG_FILE go to run_train.sh untouched:
#
#   CONFIG_FILE=train_configs/llama3_8b.toml sbatch --nodes=4 --gpus-per-node=8 scripts/slurm_train.sh --checkpoint.enable
#
# Nodes, GPUs, the head node and its port come from the allocation. When the job is about to lose its nodes (time limit,
# pre-emption), the trainer saves after the step it is at, and the job is put back into the queue. docs/multi_node.md
# explains what happens when, and how to choose the seconds of --signal.
#
# TITAN_FP8_REPO    this repository, the same path on all nodes            (the folder that sbatch was called in)
# NGPU              processes on each node                                 (the GPUs that the job has there)
# OMP_NUM_THREADS, LOG_RANK, ...    as for run_train.sh
#
#SBATCH --job-name=titan_fp8
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

SAVED=75            # the exit code PREEMPTED of titan_fp8/runtime/preemption.py
ENDED_BY_USR1=138   # 128 + 10: the warning came before anybody listened to it
STRAGGLERS_S=600    # for the other nodes once one has ended: longer than the timeouts of comm.*, after which traces are written

refuse() { echo "slurm_train.sh: $*" >&2; exit 2; }
say() { echo "slurm_train.sh: $*" >&2; }

# 8 for 8, gpu:8, h100:8, gpu:h100:8(S:0-1); the sum of a list of kinds.
count_gpus() {
  local kind total=0
  for kind in ${1//,/ }; do
    kind=${kind%%(*}
    kind=${kind##*:}
    [[ $kind =~ ^[0-9]+$ ]] || return 1
    total=$((total + kind))
  done
  echo "$total"
}

# The numbers of the processes whose parent is $1. Not with pgrep: containers often come without it.
children() {
  local stat line fields
  for stat in /proc/[0-9]*/stat; do
    { read -r line <"$stat"; } 2>/dev/null || continue  # it has ended
    read -ra fields <<<"${line##*) }"  # after the name, which may contain anything: state, parent, ...
    if [ "${fields[1]}" = "$1" ]; then echo "${line%% *}"; fi
  done
}

# What srun starts once on each node: run_train.sh, told of the warning.
on_each_node() {
  local folder launcher warned='' code=0 processes
  folder=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder's name as it is now
  trap "rm -rf '$folder'" EXIT
  trap 'warned=yes' USR1 TERM
  export TITAN_FP8_PREEMPTED_FILE=$folder/preempted
  export NODE_RANK=$SLURM_NODEID
  # Without this torchrun compares names and addresses to find out whether it is the head node, and may be mistaken.
  if [ "$SLURM_NODEID" = 0 ]; then export PET_RDZV_CONF=is_host=1; else export PET_RDZV_CONF=is_host=0; fi

  # Everything down from here ignores USR1 until a trainer listens to it. torchrun never does: it would end at once if
  # it did not ignore it, and would kill its workers 30 s after a TERM.
  (trap '' USR1; exec bash "$TITAN_FP8_REPO/run_train.sh" "$@") &
  launcher=$!
  while kill -0 "$launcher" 2>/dev/null; do
    # Again and again, for the trainers that are still starting. One process alone is its own launcher.
    if [ -n "$warned" ]; then
      mapfile -t processes < <(children "$launcher")
      kill -USR1 "$launcher" "${processes[@]}" 2>/dev/null || true
    fi
    sleep 1 &
    wait $! || true  # the warning interrupts it
  done
  wait "$launcher" || code=$?
  if [ -e "$TITAN_FP8_PREEMPTED_FILE" ]; then code=$SAVED; fi
  return "$code"
}

if [ "${1:-}" = --on-each-node ]; then
  shift
  on_each_node "$@"
  exit
fi

submit="submit it: sbatch --nodes=2 --gpus-per-node=8 scripts/slurm_train.sh"
[ -n "${SLURM_JOB_ID:-}" ] || refuse "SLURM_JOB_ID is not set, so this is no job; $submit"
[[ $SLURM_JOB_ID =~ ^[0-9]+$ ]] || refuse "SLURM_JOB_ID=$SLURM_JOB_ID is no number"
for variable in SLURM_JOB_NUM_NODES SLURM_JOB_NODELIST; do
  [ -n "${!variable:-}" ] || refuse "$variable is not set, so there are no nodes to run on; $submit"
done
for program in scontrol srun; do
  command -v "$program" >/dev/null || refuse "$program is not on PATH; SLURM's programs are needed where the job runs"
done

export TITAN_FP8_REPO=${TITAN_FP8_REPO:-${SLURM_SUBMIT_DIR:-$PWD}}
for file in run_train.sh scripts/slurm_train.sh; do  # SLURM runs a copy of this script from a folder of its own
  [ -f "$TITAN_FP8_REPO/$file" ] ||
    refuse "$TITAN_FP8_REPO has no $file; call sbatch in the repository or set TITAN_FP8_REPO to its path"
done

if [ -z "${NGPU:-}" ]; then
  for variable in SLURM_GPUS_ON_NODE SLURM_GPUS_PER_NODE; do
    [ -n "${!variable:-}" ] || continue
    NGPU=$(count_gpus "${!variable}") || refuse "$variable=${!variable} is no number of GPUs; set NGPU"
    break
  done
  [ "${NGPU:-0}" -gt 0 ] || refuse "the job has no GPUs; ask for some (sbatch --gpus-per-node=8), or set NGPU to train on CPUs"
fi

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") ||
  refuse "scontrol cannot read SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST"
head_node=${nodes%%$'\n'*}
[ -n "$head_node" ] || refuse "scontrol finds no node in SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST"
# Two jobs on one node have different numbers, and ports from 32768 on are given to outgoing connections.
port=$((10000 + SLURM_JOB_ID % 20000))
# Another id after each requeue: a leftover of the last start cannot join.
export NGPU NNODES=$SLURM_JOB_NUM_NODES RDZV_ENDPOINT=$head_node:$port RDZV_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}

step=''
warned=''
interrupted=''
warn() {
  warned=yes
  interrupted=yes
  say "asked to leave the nodes; the trainer saves after this step"
  # srun passes it on to its task on every node.
  if [ -n "$step" ]; then kill -USR1 "$step" 2>/dev/null || true; fi
}
trap warn USR1 TERM

options=(--nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --wait="$STRAGGLERS_S" --kill-on-bad-exit=0 --cpu-bind=none)
# srun takes the CPUs of a task from its own options only.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
say "job $RDZV_ID: $NNODES nodes with $NGPU processes each, rendezvous at $RDZV_ENDPOINT"
srun "${options[@]}" bash "$TITAN_FP8_REPO/scripts/slurm_train.sh" --on-each-node "$@" &
step=$!
if [ -n "$warned" ]; then kill -USR1 "$step" 2>/dev/null || true; fi
code=0
while :; do
  interrupted=''
  code=0
  wait "$step" || code=$?
  # An interrupted wait answers with the signal's number; the job is still there to be waited for.
  [ -n "$interrupted" ] || break
done

if [ "$code" != "$SAVED" ] && { [ -z "$warned" ] || [ "$code" != "$ENDED_BY_USR1" ]; }; then
  exit "$code"
fi
# A cancelled job must not come back, and one that SLURM itself requeues need not be.
state=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -o 'JobState=[A-Z_]*' || true)
case $state in
  '' | JobState=RUNNING) ;;
  *) say "not requeued: $state"; exit "$code" ;;
esac
say "back into the queue; the job goes on from its checkpoint"
scontrol requeue "$SLURM_JOB_ID" || { say "scontrol requeue failed; submit again to go on from the checkpoint"; exit "$code"; }
