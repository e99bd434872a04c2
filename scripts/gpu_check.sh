#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the gpu tests, then the benchmarks when there is a model.
#   scripts/gpu_check.sh [MODEL_DIR [DATA.jsonl]]
# PYTHON names an interpreter that has torch with CUDA and the requirements; default: python3.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name())' || exit 1
failed=0
# modules that other tests import need not be there
"$python" -c 'import omegaconf, pydantic, tqdm, xxhash, yaml' || exit 1
"$python" -m pytest tests/gpu tests/flows/test_memory.py -m gpu -v -W default || failed=1
if [ $# -gt 0 ]; then
    for lengths in fixed natural; do
        "$python" benchmarks/rollout.py --model "$1" --engine native --num-prompts 256 \
            --prompt-len 96 --max-tokens 256 --lengths "$lengths" || failed=1
    done
fi
if [ $# -gt 1 ]; then
    "$python" benchmarks/grpo_step.py --model "$1" --data "$2" --num-prompts 64 --group-size 8 \
        --max-tokens 512 || failed=1
fi
exit "$failed"
