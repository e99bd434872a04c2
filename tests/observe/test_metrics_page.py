"""docs/metrics.md has a row of every metric that the code names in one place."""

from __future__ import annotations

from metrics_page import undocumented
from spmdrl.algorithms.metrics import RATIO_BINS
from spmdrl.observe import names
from spmdrl.training.experts import EXPERT_METRICS, EXPERT_SUMS
from spmdrl.training.protocol import STEP_METRICS


def test_names_of_the_code_are_on_the_page() -> None:
    known = [*STEP_METRICS, *EXPERT_METRICS, *EXPERT_SUMS, *RATIO_BINS, "reward/brief"]
    known += [names.REWARD, names.LENGTH, names.KL, names.REF_KL, names.ENTROPY]
    known += [names.CLIP_FRACTION, names.PEAK_MEMORY, names.PEAK_SUM, names.STEP_SECONDS]
    known += [names.TOKENS_PER_S + names.ROLLOUT, names.SECONDS + names.OTHER]
    known += [names.TOKENS_PER_RANK, names.TFLOPS + "step", names.MFU, names.IDLE + names.UPDATE]
    known += [f"eval/hard{name}" for name in (names.ACCURACY, names.WIN_RATE, "/pass@8")]
    known += ["eval/hard/pass@8/standard_error", "value/grad_norm", "turns/tool_calls"]
    assert undocumented([dict.fromkeys(known)]) == []


def test_a_name_without_a_row_is_seen() -> None:
    assert undocumented([{"surprise": 1.0, "loss": 0.5}, {"rollout_ratio/below": 0.1}]) == [
        "rollout_ratio/below",
        "surprise",
    ]
