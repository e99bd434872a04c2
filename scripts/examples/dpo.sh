#!/usr/bin/env bash
# DPO from end to end on a preference file: a judge from one half of the pairs, then DPO on the others.
#   scripts/examples/dpo.sh --data preferences.jsonl [--model DIR] [--reward-model DIR] [--out DIR]
#       [key=value ...]
# The last line is one JSON object.
set -euo pipefail
name=dpo
source "$(dirname "$0")/preferences.sh"
