#!/usr/bin/env bash
# The CPU test suite with lint and types, on a machine where nothing is installed yet. It holds every
# invariant; the long sweeps are scripts/test_full.sh's. Some tests of scripts/test_cuda.sh come first.
# Words are handed to pytest and leave out the latter: scripts/test.sh -k exchange
# Three workers: one of them mostly waits for Slurm. WORKERS=0 runs all tests in pytest's own process.
set -euo pipefail
cd "$(dirname "$0")/.."
# pip would compile every module of every package, for minutes: those that are imported are enough,
# and those are kept, also where the machine's variables say otherwise
export PIP_COMPILE=0
unset PYTHONDONTWRITEBYTECODE
scripts/dev/install_compiler.sh
said=$(mktemp) types=$(mktemp) making="" typing=""
trap 'kill $making $typing 2>/dev/null || true; rm -f "$said" "$types"' EXIT
if [ $# = 0 ]; then
    # while the rest is prepared: pip mostly unpacks, on one core. Where making it takes longer than this,
    # it is left to scripts/test_cuda.sh
    SPMDRL_CUDA_ENV_SECONDS=${SPMDRL_CUDA_ENV_SECONDS:-480} scripts/dev/cuda_env.sh >/dev/null 2>"$said" &
    making=$!
fi
scripts/setup.sh requirements-dev.txt
.venv/bin/ruff format --check src tests benchmarks examples scripts
.venv/bin/ruff check src tests benchmarks examples scripts
.venv/bin/mypy >"$types" 2>&1 & # as long as one core has nothing else to do
typing=$!
scripts/get_model.sh
scripts/dev/install_slurm.sh
selected="not full"
if [ $# = 0 ]; then
    code=0
    wait "$making" || code=$?
    why=$(tail -1 "$said")
    case $code in
    0)
        scripts/test_cuda.sh --quick
        selected="not full and not fakegpu"
        ;;
    3) export SPMDRL_NO_STAND_IN=$why ;; # tests/conftest.py prints it, with what it leaves out
    *)
        echo "$why" >&2
        exit "$code"
        ;;
    esac
fi
code=0
wait "$typing" || code=$?
cat "$types"
[ "$code" = 0 ] || exit "$code"
typing=""
OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -m "$selected" \
    -n "${WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"
