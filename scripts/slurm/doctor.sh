#!/usr/bin/env bash
# `spmdrl doctor` on all nodes of the job that it runs in: doctor.sh [words of the command]
set -euo pipefail
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${nodes[0]} MASTER_PORT=$((20000 + (SLURM_JOB_ID + 5000) % 10000))
export PYTHON=${PYTHON:-.venv/bin/python} RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
read -ra more <<<"${SPMDRL_SRUN_ARGS:-}"
# shellcheck disable=SC2016
exec srun --ntasks="${#nodes[@]}" --ntasks-per-node=1 --kill-on-bad-exit=0 "${more[@]}" bash -c '
    wrap=(${SPMDRL_WRAP:-})
    exec "${wrap[@]}" timeout "${SPMDRL_PREFLIGHT_S:-120}" "$PYTHON" -m torch.distributed.run \
        --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$RANKS_PER_NODE" \
        --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts=0 \
        -m spmdrl doctor "$@"' _ "$@"
