"""Trackers get each line once, and one that fails or hangs costs a warning."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from spmdrl.algorithms.metrics import RATIO_BINS, RATIO_EDGES
from spmdrl.commands.cli import main
from spmdrl.observe.metrics import MetricsWriter
from spmdrl.observe.trackers.outbox import SIZE, Outbox
from spmdrl.observe.trackers.registry import SHIPPED, find_tracker, outbox_of

OWN = """
import json

class Own:
    def __init__(self, run):
        self.file = (run.directory / "seen").open("a")
        print(json.dumps([run.name, len(run.identity), dict(run.config)]), file=self.file)

    def log(self, step, values, wall_time):
        print(json.dumps([step, dict(values)]), file=self.file)

    def samples(self, step, rows, tag):
        print(json.dumps([step, tag, [dict(row) for row in rows]]), file=self.file)

    def close(self):
        self.file.close()

class Lacking:
    def __init__(self, run): ...
    def log(self, step): ...
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path / 'own.py'}:Own"


def seen(run: Path) -> list[Any]:
    return [json.loads(line) for line in (run / "trackers/Own/seen").read_text().splitlines()]


def test_a_users_tracker_gets_each_line_once_also_after_a_resume(tmp_path: Path, own: str) -> None:
    run = tmp_path / "run"
    with MetricsWriter(run, is_first=True) as metrics:
        metrics.track([outbox_of(run, own, {"seed": 1})])
        for step in (1, 2, 3):
            metrics.write(step, {"reward": step / 10})
        metrics.write(3, {"eval/held_out/accuracy": 0.5})
        metrics.write_samples(3, [{"prompt": "What?", "reward": 0.25}])
    lines = [[1, {"reward": 0.1}], [2, {"reward": 0.2}], [3, {"reward": 0.3}]]
    lines += [[3, {"eval/held_out/accuracy": 0.5}]]
    head = ["run", 32, {"seed": 1}]
    told = [3, "samples", [{"prompt": "What?", "reward": 0.25}]]
    assert seen(run) == [head, *lines, told]
    with MetricsWriter(run, is_first=True) as metrics:
        metrics.truncate_to(2)  # a checkpoint of step 2
        metrics.track([outbox_of(run, own, {})])
        for step in (3, 4, 5):
            metrics.write(step, {"reward": step / 10})
    assert seen(run)[6:] == [["run", 32, {}], [5, {"reward": 0.5}]]  # four lines were there


def test_sync_sends_what_is_missing_once(
    tmp_path: Path, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with MetricsWriter(run, is_first=True) as metrics:
        for step in range(2 * SIZE):
            metrics.write(step, {"reward": step / 10, "loss": float("nan")})
    (run / "run.json").write_text(json.dumps({"starts": [{"config": {"steps": 3}}]}))
    assert main(["sync", str(run), "--to", own, "jsonl"]) == 0
    assert f"jsonl: {2 * SIZE} lines of metrics.jsonl sent" in capsys.readouterr().out
    head, *lines = seen(run)
    assert head[2] == {"steps": 3, "run_dir": str(run)}
    assert [line[0] for line in lines] == list(range(2 * SIZE))
    written = (run / "trackers/jsonl/log.jsonl").read_text().splitlines()
    assert json.loads(written[7]) == {
        "step": 7,
        "reward": 0.7,
        "loss": None,
        "wall_time": json.loads(written[7])["wall_time"],
    }
    assert main(["sync", str(run), "--to", own]) == 0
    assert len(seen(run)) == 1 + 2 * SIZE  # nothing was missing, so it was not made again


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_a_faulty_tracker_costs_a_warning_and_no_time(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    freed = threading.Event()

    class Faulty:
        def log(self, step: int, values: Any, wall_time: float) -> None:
            if fault == "raises":
                raise ConnectionError("no network")
            freed.wait()

        def samples(self, *given: Any) -> None: ...

        def close(self) -> None: ...

    box = Outbox("wandb", Faulty, tmp_path / "wandb.lines", "spmdrl sync RUN --to wandb")
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for number in range(SIZE + 10 if fault == "hangs" else 3):
            box.log(number + 1, number, {"a": 1.0}, 0.0)
        assert not box.close(wait_s=0.2)
    assert time.monotonic() - began < 5
    freed.set()
    [record] = caplog.records
    word = "failed: ConnectionError: no network" if fault == "raises" else "takes too long"
    assert word in record.message and "spmdrl sync RUN --to wandb" in record.message


def test_what_is_no_tracker_is_refused_by_name(tmp_path: Path, own: str) -> None:
    with pytest.raises(ValueError, match="no tracker 'wandbb': it is one of tensorboard, wandb"):
        find_tracker("wandbb")
    with pytest.raises(ValueError, match=r"Lacking cannot be used, as its 'log'"):
        find_tracker(own.replace("Own", "Lacking"))
    for name in SHIPPED:
        try:
            found = find_tracker(name)
        except ValueError as error:
            assert f"log.trackers: {name} needs the package" in str(error)
        else:
            assert found is SHIPPED[name]


def test_tensorboard_has_scalars_and_samples_and_forgets_truncated_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def events() -> EventAccumulator:
        return EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    with MetricsWriter(tmp_path, is_first=True) as metrics:
        metrics.track([outbox_of(tmp_path, "tensorboard", {})])
        for step in (1, 2, 3, 4):
            metrics.write(step, {"policy/reward": step / 10})
        sample = {"prompt": "What\n# is *this*?", "reward": 0.25, "finish": "stop"}
        metrics.write_samples(2, [sample])
    read = events()
    assert [e.step for e in read.Scalars("policy/reward")] == [1, 2, 3, 4]
    assert read.Scalars("policy/reward")[2].value == pytest.approx(0.3)
    (text,) = read.Tensors("samples/0/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert "    # is *this*?" in shown and "**reward**: 0.25" in shown
    with MetricsWriter(tmp_path, is_first=True) as metrics:
        metrics.truncate_to(2)
        metrics.track([outbox_of(tmp_path, "tensorboard", {}, first_step=metrics.next_step)])
        metrics.write(3, {"policy/reward": 0.9})
    scalars = events().Scalars("policy/reward")
    assert [(e.step, round(e.value, 3)) for e in scalars] == [(1, 0.1), (2, 0.2), (3, 0.9)]


def test_tensorboard_has_the_histogram_of_ratios(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, is_first=True) as metrics:
        metrics.track([outbox_of(tmp_path, "tensorboard", {})])
        shares = [0.0, 0.0, 0.1, 0.1, 0.6, 0.1, 0.0, 0.0, 0.1]
        metrics.write(1, {"loss": 1.0, **dict(zip(RATIO_BINS, shares, strict=True))})
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert read.Tags()["scalars"] == ["loss"]
    (event,) = read.Histograms("rollout_ratio")
    assert event.histogram_value.bucket_limit == [*RATIO_EDGES, 4.0]
    assert event.histogram_value.bucket == shares
