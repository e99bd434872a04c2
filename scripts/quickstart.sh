#!/usr/bin/env bash
# From nothing to a model that learned something: installs, obtains SmolLM2-135M-Instruct, trains it
# with GRPO, and prints accuracy before and after. `adapter` as the first word trains a LoRA adapter
# in place of all weights. `--model gemma3-270m` trains an adapter of Gemma 3 270M, pretrained only;
# it is licensed under the Gemma Terms of Use. Each run has a directory of its own. Words like
# steps=5 override the configuration.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s)
config=configs/quickstart.yaml
directory=SmolLM2-135M-Instruct
case "${1:-}" in
    adapter)
        config=configs/quickstart_adapter.yaml
        shift
        ;;
    --model)
        if [ "${2:-}" != gemma3-270m ]; then
            echo "$0: no model '${2:-}': give --model gemma3-270m, or nothing for SmolLM2" >&2
            exit 2
        fi
        config=configs/quickstart_gemma.yaml
        directory=gemma-3-270m
        shift 2
        ;;
esac
scripts/setup.sh requirements.txt
scripts/get_model.sh "$directory"
ranks=${RANKS:-$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count() or 2)')}
# Ctrl-C: the run saves and ends well, and there is nothing to report on yet
trap 'exit 130' INT
words=("run_dir=runs/$(basename "$config" .yaml | tr _ -)-$(date +%Y%m%d-%H%M%S)" "$@")
.venv/bin/python -m spmdrl launch --nproc-per-node "$ranks" train "$config" "${words[@]}"
run=$(printf '%s\n' "${words[@]}" | sed -n 's/^run_dir=//p' | tail -n 1)
.venv/bin/python -m spmdrl report "$run" --seconds $(($(date +%s) - started))
