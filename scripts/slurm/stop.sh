#!/usr/bin/env bash
# stop.sh RUN_DIR: the run saves where it is and ends; its job is not queued again.
set -euo pipefail
[ -d "$1" ] || { echo "stop: $1 is not there" >&2; exit 1; }
touch "$1/stop"
