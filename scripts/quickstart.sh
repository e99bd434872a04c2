#!/usr/bin/env bash
# From nothing to a model that learned something: installs, obtains SmolLM2-135M-Instruct, trains it
# with GRPO, and prints accuracy before and after. Words like steps=5 override the configuration.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s)
scripts/setup.sh requirements.txt
scripts/get_model.sh
ranks=${RANKS:-$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count() or 2)')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((($(nproc) + ranks - 1) / ranks)))}
.venv/bin/torchrun --standalone --nproc-per-node "$ranks" -m spmdrl train configs/quickstart.yaml \
    checkpoint.resume=false "$@"
.venv/bin/python -m spmdrl report configs/quickstart.yaml "$@" --seconds $(($(date +%s) - started))
