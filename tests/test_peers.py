"""benchmarks/peers.py: both sides do the same work, and figures of different work are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny_model import make_tiny_model

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from peers import check, summary  # noqa: E402

STEP = {"seconds": 2.0, "tokens": 100, "gb": 1.0, "rows": 8.0, "updates": 3, "dtype": "float32"}


def test_ratios_are_of_medians_and_of_rates_for_rollouts() -> None:
    ours = [STEP, {**STEP, "seconds": 4.0}]
    theirs = [{**STEP, "seconds": 12.0, "gb": 2.5, "rows": 8}] * 2
    expected = {"ours_seconds": 3.0, "theirs_seconds": 12.0, "ratio": 4.0}
    assert summary("grpo", ours, theirs) == {
        "work": "grpo",
        "ours_gb": 1.0,
        "theirs_gb": 2.5,
        **expected,
    }
    fewer = [{**one, "tokens": 96} for one in theirs]
    assert summary("rollout", [STEP] * 2, fewer)["ratio"] == pytest.approx(6.25)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"rows": 6}, "differ in rows: 6, 8"),
        ({"updates": 2}, "differ in updates: 2, 3"),
        ({"dtype": "bfloat16"}, "differ in dtype: bfloat16, float32"),
        ({"tokens": 94}, "tokens of a step differ by more than 5%: ours 100, theirs 94"),
    ],
)
def test_different_work_is_refused(other: dict[str, Any], said: str) -> None:
    check([STEP], [{**STEP, "tokens": 96}])
    with pytest.raises(SystemExit, match=said):
        check([STEP], [{**STEP, **other}])


@pytest.mark.full
@pytest.mark.parametrize("work", ["grpo", "lora", "dpo", "rollout"])
def test_both_sides_run(work: str, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    words = ["--work", work, "--model", str(tmp_path / "model"), "--runs", "1", "--steps", "1"]
    command = [sys.executable, "benchmarks/peers.py", *words, "--prompts", "4"]
    done = subprocess.run(
        [*command, "--max-tokens", "12"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["work"] == work and min(v for v in last.values() if v != work) > 0
