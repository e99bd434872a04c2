#!/usr/bin/env bash
# From nothing to a model that learned something: installs, obtains SmolLM2-135M-Instruct, trains it
# with GRPO, and prints accuracy before and after. Each run has a directory of its own. Words like
# steps=5 override the configuration.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s)
scripts/setup.sh requirements.txt
scripts/get_model.sh
ranks=${RANKS:-$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count() or 2)')}
# Ctrl-C: the run saves and ends well, and there is nothing to report on yet
trap 'exit 130' INT
words=("run_dir=runs/quickstart-$(date +%Y%m%d-%H%M%S)" "$@")
.venv/bin/python -m spmdrl launch --nproc-per-node "$ranks" train configs/quickstart.yaml "${words[@]}"
.venv/bin/python -m spmdrl report configs/quickstart.yaml "${words[@]}" \
    --seconds $(($(date +%s) - started))
