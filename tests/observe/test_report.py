"""report.png from metrics of runs of several kinds."""

import json
import struct
from pathlib import Path

import pytest

from spmdrl.observe.drawing import series, smooth
from spmdrl.observe.metrics import MetricsWriter
from spmdrl.observe.panels import DETAILS, HELD, MAIN, choose, evaluations
from spmdrl.observe.report import report, summary, write_report


def record(step: int, num_steps: int) -> dict[str, float]:
    done = step / num_steps
    return {
        "reward": done,
        "response_length": 50 - 20 * done,
        "kl": 1e-4 * (1 + done),
        "ref_kl": 0.01 * done,
        "entropy": 1 - done / 2,
        "tokens_per_s/rollout": 900.0,
        "tokens_per_s/update": 1500.0,
        "memory/peak_gb": 2.5,
        "seconds/rollout": 2.0,
        "seconds/update": 1.5,
        "seconds/other": 0.1,
        "seconds/step": 3.6,
    }


def make_run(run: Path, num_steps: int, evaluated: dict[int, dict[str, float]]) -> Path:
    with MetricsWriter(run, is_first=True) as metrics:
        for step in range(num_steps + 1):
            accuracies = {
                f"eval/{name}/{key}": number
                for name, value in evaluated.get(step, {}).items()
                for key, number in (("accuracy", value), ("standard_error", 0.02))
            }
            metrics.write(step, (record(step, num_steps) if step else {}) | accuracies)
    return run


@pytest.mark.parametrize(
    ("num_steps", "evaluated"),
    [
        (40, {0: {"sums": 0.1}, 40: {"sums": 0.9}}),
        (150, {s: {"sums": s / 150, "words": 0.2} for s in (0, 50, 100, 150)}),
        (1, {}),
    ],
)
def test_writes_a_picture(tmp_path, num_steps, evaluated):
    run = make_run(tmp_path, num_steps, evaluated)
    # "$" and "_" mean something to matplotlib, and must not here
    path = write_report(run, run_name="_a $run$ at 5 $", model="SmolLM2-135M-Instruct")
    assert path == run / "report.png"
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1560, 1235)
    assert len(content) > 20_000
    assert {p.name for p in run.iterdir()} == {"metrics.jsonl", "report.png"}


def test_a_run_without_steps_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step"):
        write_report(tmp_path, run_name="a", model="b")
    assert not (tmp_path / "report.png").exists()


def test_what_is_drawn():
    records = [
        {"step": 0, "eval/a/accuracy": 0.1, "eval/a/standard_error": 0.02},
        {"step": 1, "reward": 0.25, "seconds/step": 100.0, "memory/peak_gb": 1.0},
        {"step": 2, "reward": float("nan"), "seconds/step": 20.0, "memory/peak_gb": 3.0},
        {"step": 3, "reward": 0.75, "seconds/step": 6.0, "eval/a/accuracy": 0.9},
    ]
    assert series(records, "reward") == ([1, 3], [0.25, 0.75])
    assert evaluations(records) == {"a": [(0, 0.1, 0.02), (3, 0.9, 0.0)]}
    line = summary(records)
    for part in ("3 steps", "2 min 06 s (42.0 s per step)", "0.25 → 0.75", "3.0 GB"):
        assert part in line


def test_smoothing_keeps_constants_and_length():
    assert smooth([2.0] * 50) == [2.0] * 50
    assert smooth([1.0, 5.0]) == [1.0, 5.0]
    zigzag = [0.0, 1.0] * 40
    assert max(smooth(zigzag)) - min(smooth(zigzag)) < 0.3


def test_panels_follow_what_was_recorded() -> None:
    ppo = [{"step": 1.0, "reward": 0.1, "score": 0.1, "kl_per_response": 0.2, "kl": 0.01}]
    ppo[0] |= {"eval/held_out/reward": 0.3, "response_length": 9.0}
    assert choose(MAIN, ppo, 1) == [MAIN[0].draw]
    assert choose(HELD, ppo, 1) == [HELD[1].draw]
    drawn = choose(DETAILS, ppo, 3)
    names = ("kl_per_response", "response_length", "kl")
    assert drawn == [panel.draw for panel in DETAILS if panel.needs[0] in names]
    sft = [{"step": 1.0, "nll": 1.2, "loss": 1.2, "eval/held_out/nll": 1.1}]
    assert choose(MAIN, sft, 1) == [MAIN[2].draw] and choose(HELD, sft, 1) == [HELD[2].draw]
    pairs = [{"step": 1.0, "loss": 0.7, "accuracy": 0.5, "eval/held_out/accuracy": 0.5}]
    assert choose(MAIN, pairs, 1) == [MAIN[3].draw] and choose(HELD, pairs, 1) == [HELD[3].draw]
    pairs[0] |= {"pairs": 4.0, "eval/answers/win_rate": 0.6}
    assert choose(MAIN, pairs, 1) == [MAIN[1].draw] and choose(HELD, pairs, 1) == [HELD[0].draw]
    assert len(choose(DETAILS, pairs, 3)) == 3


def test_the_last_line_is_json_with_every_set(tmp_path, capsys):
    """NaN (one prompt has no standard error) is null, and no set hides another."""

    def refuse(name):
        raise AssertionError(name)

    nan = float("nan")
    with MetricsWriter(tmp_path / "run", is_first=True) as metrics:
        for step in (0, 2):
            values = {"eval/a/accuracy": 0.1 + step, "eval/a/standard_error": nan}
            values |= {"eval/b/accuracy": 0.25, "eval/b/standard_error": 0.5, "eval/c/nll": 3.0}
            values |= {"memory/peak_sum_gb": 2.5 + step}
            metrics.write(step, {**(record(step, 2) if step else {}), **values})
    report(str(tmp_path / "run"), model="m")
    last = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=refuse)
    assert last["sets"] == {
        "a": {"accuracy_before": 0.1, "accuracy_after": 2.1, "standard_error": None},
        "b": {"accuracy_before": 0.25, "accuracy_after": 0.25, "standard_error": 0.5},
        "c": {"nll_before": 3.0, "nll_after": 3.0, "nll_error": 0.0},
    }
    assert last["peak_gb"] == 4.5, "the last value"
    make_run(tmp_path / "one", 2, {0: {"sums": 0.1}, 2: {"sums": 0.9}})
    report(str(tmp_path / "one"), model="m")
    last = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=refuse)
    assert (last["accuracy_before"], last["accuracy_after"], last["standard_error"]) == (
        0.1,
        0.9,
        0.02,
    )
    assert "sets" not in last and last["peak_gb"] is None
