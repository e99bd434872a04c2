#!/usr/bin/env bash
# Online DPO from end to end on a preference file: a judge from one half of the pairs, which then
# prefers some of the policy's own samples to others.
#   scripts/examples/online_dpo.sh --data preferences.jsonl [--model DIR] [--reward-model DIR] [--out DIR]
#       [key=value ...]
# The last line is one JSON object.
set -euo pipefail
name=online_dpo
source "$(dirname "$0")/preferences.sh"
