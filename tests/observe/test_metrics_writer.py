"""metrics.jsonl and TensorBoard: roundtrip, resumption, torn lines, a full disk."""

import json
import math
import resource
from pathlib import Path

import pytest
import torch

from spmdrl.observe.metrics import MetricsWriter, merge_steps, read_metrics, set_aside_metrics


def writer(run_dir: Path, **options) -> MetricsWriter:
    return MetricsWriter(run_dir, is_first=True, **options)


def test_roundtrip(tmp_path):
    run = tmp_path / "runs" / "a"
    with writer(run) as metrics:
        metrics.write(1, {"reward": 0.5, "seconds/step": 2}, wall_time=100.0)
        metrics.write(2, {"reward": math.nan, "loss": -math.inf}, wall_time=101.5)
        # flushed per line: another reader sees it while the run goes on
        first, second = read_metrics(run / "metrics.jsonl")
        assert metrics.read()[0] == first
    assert first == {"step": 1, "wall_time": 100.0, "reward": 0.5, "seconds/step": 2.0}
    assert math.isnan(second["reward"]) and second["loss"] == -math.inf

    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is not JSON")

    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_other_ranks_touch_nothing(tmp_path):
    with MetricsWriter(tmp_path / "run", is_first=False) as metrics:
        metrics.write(1, {"reward": 0.5})
        metrics.write_samples(1, [{"prompt": "a"}])
        assert metrics.truncate_to(0) == 0
        assert metrics.read() == []
    assert list(tmp_path.iterdir()) == []


def test_appends_and_keeps_steps_in_order(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.write(1, {"a": 1})
    with writer(tmp_path) as metrics:
        metrics.write(2, {"a": 2})
        metrics.write(2, {"b": 3})
        with pytest.raises(ValueError, match="truncate_to"):
            metrics.write(1, {"a": 1})
        with pytest.raises(ValueError, match="wall_time"):
            metrics.write(3, {"wall_time": 1})
    merged = merge_steps(read_metrics(tmp_path / "metrics.jsonl"))
    assert [(m["step"], m["a"], m.get("b")) for m in merged] == [(1, 1, None), (2, 2, 3)]


def test_truncation_drops_later_steps_as_a_whole(tmp_path):
    with writer(tmp_path) as metrics:
        for step in range(5):
            metrics.write(step, {"a": step})
        assert metrics.count_lines() == 5
        assert metrics.truncate_to(3) == 2
        metrics.write(3, {"a": 30})
        assert metrics.count_lines() == 4
        assert [m["a"] for m in metrics.read()] == [0, 1, 2, 30]
        assert metrics.truncate_to(0) == 4
        assert metrics.read() == []
    # what was dropped is kept beside it
    dropped = read_metrics(tmp_path / "metrics.dropped.jsonl")
    assert [m["a"] for m in dropped] == [3, 4, 0, 1, 2, 30]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.dropped.jsonl",
        "metrics.jsonl",
    ]


def test_metrics_of_another_run_are_set_aside_and_empty_ones_not(tmp_path):
    assert set_aside_metrics(tmp_path) is None
    with writer(tmp_path) as metrics:
        assert set_aside_metrics(tmp_path) is None
        metrics.write(1, {"a": 1})
    for number in (1, 2):
        assert set_aside_metrics(tmp_path) == tmp_path / f"metrics.jsonl.old-{number}"
        with writer(tmp_path) as metrics:
            metrics.write(number, {"a": number})
    assert read_metrics(tmp_path / "metrics.jsonl.old-2")[0]["a"] == 1


def test_what_no_rank_may_write_is_refused_on_every_rank(tmp_path):
    for is_first in (True, False):
        metrics = MetricsWriter(tmp_path, is_first=is_first)
        with pytest.raises(ValueError, match=r"may not be called .'step'"):
            metrics.write(1, {"step": 2.0})
        with pytest.raises(ValueError, match="the metric 'note' is 'good', a str: return one"):
            metrics.write(1, {"loss": 1.0, "note": "good"})
        with pytest.raises(ValueError, match="the metric 'both' is tensor"):
            metrics.write(1, {"both": torch.ones(2)})
        metrics.close()


def test_a_torn_last_line_is_dropped(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.write(1, {"a": 1})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 2, "a"')
    assert [m["step"] for m in read_metrics(path)] == [1]
    with writer(tmp_path) as metrics:
        metrics.write(2, {"a": 2})
    assert [m["a"] for m in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("line", ["{", "[1]", '{"a": 1}', '{"step": 1, "a": "x"}', ""])
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        writer(tmp_path)


def test_a_full_disk_names_the_file_and_damages_nothing(tmp_path):
    """A file size limit stands in for the full disk: writes stop midway in a line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics = writer(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"metrics\.jsonl") as caught:
            for step in range(100):
                metrics.write(step, {"reward": 0.5})
        message = str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        metrics.close()
    assert "metrics not written" in message
    before = [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")]
    assert before == list(range(len(before))) and before
    with writer(tmp_path) as metrics:
        metrics.write(len(before), {"reward": 0.5})
        assert len(metrics.read()) == len(before) + 1
