#!/usr/bin/env bash
# From nothing to a model that uses a tool: SmolLM2-135M-Instruct learns to answer sums and products
# beyond its reach with a calculator. Supervised fine-tuning on traces of calls stops where 30 to 60 %
# of held-out questions are answered; GRPO with the tool continues from there. The same stages without
# the tool, with as many steps, show what it is worth.
#   scripts/examples/tools.sh [--model DIR] [--out DIR] [key=value ...]
# Further words override keys of the GRPO stages; SFT_STEPS="4 6 8 ..." are the steps after which
# fine-tuning is measured. The last line is one JSON object.
set -euo pipefail
model="" out="" words=()
while [ $# -gt 0 ]; do
    case "$1" in
        --model) model=$(realpath "$2"); shift 2 ;;
        --out) out=$(realpath -m "$2"); shift 2 ;;
        *=*) words+=("$1"); shift ;;
        *) echo "tools.sh: unknown word $1" >&2; exit 2 ;;
    esac
done
cd "$(dirname "$0")/../.."
started=$(date +%s)
out=${out:-$PWD/runs/tools-$(date +%Y%m%d-%H%M%S)}
scripts/setup.sh requirements.txt
[ -n "$model" ] || { scripts/get_model.sh; model=$PWD/models/SmolLM2-135M-Instruct; }
ranks=${RANKS:-$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count() or 2)')}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
dtype=auto
if grep -qwE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then dtype=bfloat16; fi
trap 'exit 130' INT # a stage that saved at Ctrl-C is not done, though it exits with 0

python() { .venv/bin/python "$@"; }

spmdrl() { # COMMAND CONFIG [key=value ...]
    python -m spmdrl launch --standalone --nproc-per-node "$ranks" "$1" "configs/tools/$2.yaml" \
        "model.dtype=$dtype" "${@:3}"
}

data=$out/data
python scripts/examples/tools_data.py "$model" "$data"
export QUESTIONS=$data/questions.jsonl HELD_OUT=$data/held_out.jsonl

echo "== supervised fine-tuning on traces, until the tool helps"
for steps in ${SFT_STEPS:-2 3 4 5 6 8 10 12 16 20}; do
    spmdrl train sft "run_dir=$out/sft" "model.path=$data/model" "data.train.source=$data/traces.jsonl" \
        "steps=$steps"
    spmdrl eval grpo "run_dir=$out/measured/$steps" "model.path=$out/sft/model" \
        evaluation.sets.held_out.max_items=60
    if python scripts/examples/tools_summary.py enough "$out/measured/$steps"; then break; fi
done

echo "== GRPO with the tool"
spmdrl train grpo "run_dir=$out/grpo" "model.path=$out/sft/model" ${words[@]+"${words[@]}"}

echo "== the same stages without the tool"
spmdrl train sft "run_dir=$out/sft_without" "model.path=$data/model" \
    "data.train.source=$data/direct.jsonl" "steps=$steps"
spmdrl train grpo "run_dir=$out/grpo_without" "model.path=$out/sft_without/model" \
    rollout.turns=null evaluation.before=false ${words[@]+"${words[@]}"}

python -m spmdrl report "$out/grpo"
python scripts/examples/tools_summary.py figures "$out" --seconds $(($(date +%s) - started))
