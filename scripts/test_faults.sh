#!/usr/bin/env bash
# What a run survives, beyond what scripts/test.sh tries: all Slurm cases, stops at every few polls,
# and ranks killed at random moments. About half an hour on two cores.
#   scripts/test_faults.sh                     everything; 30 kills
#   scripts/test_faults.sh --kills N [--seed S]   the kills alone
# The last line is one JSON object: kills, resumed_exactly, named.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE # a module compiled once serves every process
scripts/setup.sh requirements-dev.txt
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1
words=("$@")
if [ $# = 0 ]; then
    scripts/dev/install_compiler.sh
    scripts/dev/install_slurm.sh
    SPMDRL_TEST_FAULTS=1 SPMDRL_TEST_EVERY_STOP=4 .venv/bin/python -m pytest \
        tests/slurm tests/supervision tests/run/test_endings.py tests/run/test_exact_resume.py \
        tests/checkpoint tests/rollout/test_aborted.py
    words=(--kills 30)
fi
exec .venv/bin/python tests/kills.py "${words[@]}"
