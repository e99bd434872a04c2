# Sourced by dpo.sh and online_dpo.sh: the judge, then the stage of that name, then the figures.
configs=preferences
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
fit ${judge:+--judge "$judge"} --judge-words "${JUDGE_WORDS:-}" ${words[@]+"${words[@]}"}
if [ -z "$judge" ]; then
    judge=$out/judge/model
    # shellcheck disable=SC2206  # words for the judge's stage: JUDGE_WORDS="steps=2 ..."
    [ -f "$judge/config.json" ] || stage judge ${JUDGE_WORDS:-}
fi
stage "$name" "roles.reward.model=$judge" ${words[@]+"${words[@]}"}
.venv/bin/python scripts/examples/preferences_summary.py "$out/$name" --judge "$out/judge" \
    --seconds "$(seconds)"
