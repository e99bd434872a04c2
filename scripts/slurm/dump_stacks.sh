#!/usr/bin/env bash
# dump_stacks.sh JOB RUN_DIR: let every rank of a running job write the stacks of all its threads.
set -euo pipefail
scancel --signal=USR2 "$1"
sleep 2
attempt=$(find "$2" -maxdepth 1 -name 'attempt_*' -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2-)
tail -n 60 "$attempt"/stacks/rank_*.txt
