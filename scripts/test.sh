#!/usr/bin/env bash
# The CPU test suite with lint and types, on a machine where nothing is installed yet. It holds every
# invariant; the long sweeps are scripts/test_full.sh's. Some tests of scripts/test_cuda.sh come first.
# Words are handed to pytest and leave out the latter: scripts/test.sh -k exchange
# Three workers: one of them mostly waits for Slurm. WORKERS=0 runs all tests in pytest's own process.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh requirements-dev.txt
scripts/get_model.sh
scripts/dev/install_compiler.sh
scripts/dev/install_slurm.sh
.venv/bin/ruff format --check src tests benchmarks examples scripts
.venv/bin/ruff check src tests benchmarks examples scripts
.venv/bin/mypy
selected="not full"
if [ $# = 0 ]; then
    code=0
    # where making it takes longer than this, it is left to scripts/test_cuda.sh
    said=$(SPMDRL_CUDA_ENV_SECONDS=${SPMDRL_CUDA_ENV_SECONDS:-480} \
        scripts/dev/cuda_env.sh 2>&1 >/dev/null | tail -1) || code=$?
    case $code in
    0)
        scripts/test_cuda.sh --quick
        selected="not full and not fakegpu"
        ;;
    3) export SPMDRL_NO_STAND_IN=$said ;; # tests/conftest.py prints it, with what it leaves out
    *)
        echo "$said" >&2
        exit "$code"
        ;;
    esac
fi
OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -m "$selected" \
    -n "${WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"
