# Sourced by the examples on preference files: reads their words, installs, and runs stages.
# They set `name` (of the script) and `configs` (their folder under configs) first.
#   --data FILE          JSONL or Parquet with `prompt`, `chosen` and `rejected`: texts, or the
#                        responses as conversations. PROMPT_COLUMN, CHOSEN_COLUMN and REJECTED_COLUMN
#                        in the environment name other columns
#   --model DIR          what is trained; default: SmolLM2-135M-Instruct, fetched
#   --reward-model DIR   a judge; default: trained here (dpo.sh and online_dpo.sh)
#   --out DIR            results; a run with the same directory goes on where an earlier one ended
#   key=value            overrides of the last stage's configuration
data="" model="" judge="" out="" words=()
while [ $# -gt 0 ]; do
    case "$1" in
        --data) data=$(realpath "$2"); shift 2 ;;
        --model) model=$(realpath "$2"); shift 2 ;;
        --reward-model) judge=$(realpath "$2"); shift 2 ;;
        --out) out=$(realpath -m "$2"); shift 2 ;;
        *=*) words+=("$1"); shift ;;
        *) echo "$name.sh: unknown word $1" >&2; exit 2 ;;
    esac
done
if [ ! -f "$data" ]; then
    echo "$name.sh: --data ${data:-FILE} is no file: give one with prompt, chosen, rejected" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
started=$(date +%s)
out=${out:-$PWD/runs/$name-$(date +%Y%m%d-%H%M%S)}
scripts/setup.sh requirements.txt
[ -n "$model" ] || { scripts/get_model.sh; model=$PWD/models/SmolLM2-135M-Instruct; }
ranks=${RANKS:-$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count() or 2)')}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
# where responses are conversations, the prompts are in them
export DATA=$data ANSWER_COLUMN=${CHOSEN_COLUMN:-chosen}
# CPUs that multiply bfloat16 do it twice as fast; the optimizer's weights are float32 anyway
dtype=auto
if grep -qwE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then dtype=bfloat16; fi

trap 'exit 130' INT # a stage that saved at Ctrl-C is not done, though it exits with 0

fit() { # checks all stages before the first one trains; what differs in them for this file
    echo "== check"
    sizes=$(.venv/bin/python scripts/examples/fit.py "$name" --model "$model" --ranks "$ranks" "$@")
}

stage() { # NAME [key=value ...]
    echo "== $1"
    local fitted
    read -ra fitted <<<"$(sed -n "s/^$1 *//p" <<<"$sizes")"
    set -- "$1" ${fitted[@]+"${fitted[@]}"} "${@:2}"
    .venv/bin/python -m spmdrl launch --standalone --nproc-per-node "$ranks" train \
        "configs/$configs/$1.yaml" "run_dir=$out/$1" "model.path=$model" "model.dtype=$dtype" "${@:2}"
    .venv/bin/python -m spmdrl report "$out/$1"
}

seconds() { # since the script began
    echo $(($(date +%s) - started))
}
