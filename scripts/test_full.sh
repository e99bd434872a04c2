#!/usr/bin/env bash
# Everything: the suite of scripts/test.sh, the long sweeps (marker `full`), and what a run survives
# (scripts/test_faults.sh). Words are handed to the sweeps' pytest and then nothing else runs.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE # a module compiled once serves every process
if [ $# = 0 ]; then
    scripts/test.sh
    # for the test that installs spmdrl in a bare Debian
    [ "$(id -u)" != 0 ] || command -v debootstrap >/dev/null || apt-get install -y -qq debootstrap
    OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -m full
    exec scripts/test_faults.sh
fi
scripts/setup.sh requirements-dev.txt
scripts/get_model.sh
OMP_WAIT_POLICY=passive exec .venv/bin/python -m pytest -m full "$@"
