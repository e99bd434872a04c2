#!/usr/bin/env bash
# status.sh RUN_DIR: how the newest start of a run goes: outcome, what failed, where every rank is.
set -euo pipefail
run_dir=$1
attempt=$(find "$run_dir" -maxdepth 1 -name 'attempt_*' -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2-)
[ -n "$attempt" ] || { echo "status: $run_dir has no attempt yet" >&2; exit 1; }
echo "attempt     $attempt"
echo "owner       $(cat "$run_dir/owner" 2>/dev/null || echo nobody)"
echo "outcome     $(cat "$attempt/outcome" 2>/dev/null || echo 'none (running, or crashed)')"
[ ! -s "$attempt/failed" ] || echo "failed      $(cat "$attempt/failed")"
[ ! -s "$attempt/stopped_by" ] || echo "stopped by  $(cat "$attempt/stopped_by")"
echo "checkpoint  $(cat "$run_dir/checkpoints/latest" 2>/dev/null || echo none)"
now=$(date +%s)
for file in "$attempt"/heartbeats/rank_*.json; do
    [ -e "$file" ] || continue
    value() { sed -n "s/.*\"$1\": \"\{0,1\}\([^,\"}]*\).*/\1/p" "$file"; }
    age=$((now - $(date -r "$file" +%s)))
    printf 'rank %-5s step %-6s phase %-11s %s (%s), quiet for %s s; heartbeat %s s old\n' \
        "$(value rank)" "$(value step)" "$(value phase)" "$(value call)" "$(value stage)" \
        "$(value quiet_s)" "$age"
done
