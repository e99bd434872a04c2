#!/usr/bin/env bash
# The CPU test suite with lint and types, on a machine where nothing is installed yet. It holds every
# invariant; the long sweeps are scripts/test_full.sh's.
# Words are handed to pytest: scripts/test.sh -k exchange
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
OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -m "not full" \
    -n "${WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"
