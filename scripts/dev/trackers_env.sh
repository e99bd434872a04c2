#!/usr/bin/env bash
# Makes a Python environment with the trackers' packages and prints its directory. Their pins clash
# with requirements-dev.txt, so it lies outside the checkout, in $SPMDRL_TRACKERS_ENV (default:
# spmdrl in the user's cache), is named after its requirements, and is made once (1 GB).
set -euo pipefail
cd "$(dirname "$0")/../.."
wanted=tests/observe/trackers_requirements.txt
base=${SPMDRL_TRACKERS_ENV:-${XDG_CACHE_HOME:-$HOME/.cache}/spmdrl}
env=$base/trackers-$(sha256sum <"$wanted" | cut -c1-12)
if [ ! -e "$env/complete" ]; then
    rm -rf "$env"
    "${PYTHON:-python3}" -m venv "$env"
    "$env/bin/pip" install -q --disable-pip-version-check -r "$wanted" >&2
    touch "$env/complete"
fi
echo "$env"
