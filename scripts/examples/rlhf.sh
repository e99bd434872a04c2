#!/usr/bin/env bash
# RLHF from end to end on a preference file: supervised fine-tuning on the chosen responses, a reward
# model from the pairs, PPO against it. The file has `prompt`, `chosen` and `rejected`.
#   scripts/examples/rlhf.sh --data preferences.jsonl [--model DIR] [--out DIR] [key=value ...]
# Further words override keys of the PPO stage. The last line is one JSON object.
set -euo pipefail
name=rlhf configs=rlhf
source "$(dirname "$0")/common.sh"
[ -z "$judge" ] || { echo "rlhf.sh: it trains the reward model itself: no --reward-model" >&2; exit 2; }
fit ${words[@]+"${words[@]}"}
stage sft
stage reward_model "model.path=$out/sft/model"
stage ppo "model.path=$out/sft/model" "roles.reward.model=$out/reward_model/model" \
    "roles.value.model=$out/reward_model/model" ${words[@]+"${words[@]}"}
.venv/bin/python scripts/examples/rlhf_summary.py "$out" --seconds "$(seconds)"
