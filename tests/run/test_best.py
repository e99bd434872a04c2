"""The checkpoint of the best evaluation is kept, and a run that gets no better ends."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from flow_cases import write_config
from harness import run_ranks
from spmdrl.checkpoint.writing import Retention
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.observe.metrics import merge_steps, read_metrics
from spmdrl.rewards.server import start_reward_server
from spmdrl.run.best import BestEvaluation
from spmdrl.run.resume_point import Saved
from spmdrl.world import World
from tiny_model import make_tiny_model
from torchrun import attempt_of, outcome_of

METRIC = "eval/held_out/accuracy"


def course(wanted: str, values: list[float]) -> list[tuple[bool, int | None, int]]:
    saved: Saved = {}
    found = []
    for step, value in enumerate(values):
        best = BestEvaluation(wanted, saved)  # as a resumed run makes it
        found.append((best.look(step, {"a": value}), best.step, best.num_worse))
    return found


def test_evaluations_are_compared() -> None:
    assert course("a", [0.1, 0.3, 0.3, 0.2, 0.4]) == [
        *((True, 0, 0), (True, 1, 0), (False, 1, 1), (False, 1, 2), (True, 4, 0)),
    ]
    assert [best for best, *_ in course("-a", [0.1, 0.3, 0.05])] == [True, False, True]
    nan = math.nan
    assert course("a", [nan, nan, -5.0, nan]) == [
        *((False, 0, 0), (False, 0, 1), (True, 2, 0), (False, 2, 1)),
    ]


def test_an_evaluation_that_is_repeated_counts_once() -> None:
    best = BestEvaluation("a", {})
    told = [best.look(step, {"a": 1.0}) for step in (1, 2, 2, 3)]
    assert told == [True, False, False, False] and best.num_worse == 2
    with pytest.raises(ValueError, match="keep_best=b: evaluations have no such metric; they have"):
        BestEvaluation("b", {}).look(1, {"a": 1.0})


def test_the_best_one_outlasts_newer_checkpoints() -> None:
    rule = Retention(last=1, every=4)
    names = [f"step_{step:08d}" for step in range(9)]
    assert [n for n in range(9) if rule.keeps(names[n], 3)] == [0, 3, 4, 8]
    assert rule.keeps("step_00000003.1", 3) and not rule.keeps("step_00000003+0002", 3)


def trained(world: World, root: str, words: list[str]) -> None:
    with start_reward_server() as server:
        train(load_config(f"{root}/c.yaml", words), world, server)


def test_the_best_checkpoint_is_kept_and_a_run_ends_that_gets_no_better(tmp_path: Path) -> None:
    """All evaluations are alike: the first one, after one step, stays the best."""
    make_tiny_model(tmp_path / "model")
    (tmp_path / "mine.py").write_text("def always(response):\n    return 1.0\n")
    write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run", steps=6)
    words = [
        *(f"rewards=[{{function: '{tmp_path}/mine.py:always'}}]", "evaluation.held_out=2"),
        *("evaluation.before=false", "evaluation.every=1", "checkpoint.every=1"),
        *("checkpoint.keep_last=1", f"checkpoint.keep_best={METRIC}"),
    ]
    run_ranks(trained, 2, str(tmp_path), [*words, "evaluation.stop_after=2"])
    run = tmp_path / "run"
    assert outcome_of(run) == "done" and (run / "last_step").read_text() == "4\n"
    told = f"evaluation.stop_after=2: {METRIC} was best after 1 steps"
    assert (attempt_of(run) / "stopped_by").read_text().strip() == told
    records = merge_steps(read_metrics(run / "metrics.jsonl"))
    assert [record["step"] for record in records if METRIC in record] == [1, 2, 3, 4]
    kept = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert kept == ["step_00000001", "step_00000004"]
    # a run that resumes knows its best evaluation
    run_ranks(trained, 2, str(tmp_path), words)
    kept = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert kept == ["step_00000001", "step_00000006"]
