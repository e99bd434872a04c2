#!/usr/bin/env bash
# From nothing to a model that learned something: installs, obtains SmolLM2-135M-Instruct, trains it
# with GRPO, and prints accuracy before and after. `adapter` as the first word trains a LoRA adapter
# in place of all weights. Each run has a directory of its own. Words like steps=5 override the
# configuration.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s)
config=configs/quickstart.yaml
if [ "${1:-}" = adapter ]; then
    config=configs/quickstart_adapter.yaml
    shift
fi
scripts/setup.sh requirements.txt
scripts/get_model.sh
ranks=${RANKS:-$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count() or 2)')}
# Ctrl-C: the run saves and ends well, and there is nothing to report on yet
trap 'exit 130' INT
words=("run_dir=runs/$(basename "$config" .yaml | tr _ -)-$(date +%Y%m%d-%H%M%S)" "$@")
.venv/bin/python -m spmdrl launch --nproc-per-node "$ranks" train "$config" "${words[@]}"
.venv/bin/python -m spmdrl report "$config" "${words[@]}" --seconds $(($(date +%s) - started))
