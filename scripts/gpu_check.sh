#!/usr/bin/env bash
# The first minutes on a GPU: measures the card and this project on it, in stages, most valuable first.
#   scripts/gpu_check.sh [--budget SECONDS] [--stages A,B] [--out FILE] [--small]
# Prints one JSON object per line, each prediction with its measurement; ends with 1 if a stage failed.
# Weights are random: nothing is downloaded. docs/gpus.md says what the stages are.
# PYTHON names an interpreter that has torch with CUDA and the requirements; default: python3.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" benchmarks/gpu_check.py "$@"
