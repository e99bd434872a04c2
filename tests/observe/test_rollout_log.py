"""The rollout log: files that `show` reads back, and failures that cost the log only."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from spmdrl.commands.cli import main
from spmdrl.observe import rollout_log
from spmdrl.observe.rollout_log import (
    RolloutLog,
    forget_rollouts,
    logged_steps,
    read_rollouts,
)

ROW: dict[str, Any] = {
    "prompt_id": 7,
    "sample": 1,
    "prompt_tokens": 3,
    "response_tokens": 2,
    "version": 4,
    "reward": 0.5,
    "reward/a": 1.0,
    "reward/b": 0.25,
    "advantage": -0.125,
    "finish": "stop",
    "prompt": "1 + 1",
    "response": "it is 2\u2028\nor so",
    "answer": None,
}


def written(path: Path, rank: int, step: int, rows: list[dict[str, Any]], every: int = 1) -> None:
    log = RolloutLog(path, rank, every)
    if log.wants(step):
        log.write(step, rows)
    log.close()


def test_rows_of_all_ranks_are_read_by_prompt_and_sample(tmp_path: Path) -> None:
    written(tmp_path, 0, 4, [ROW, {**ROW, "prompt_id": 9}], every=2)
    written(tmp_path, 1, 4, [{**ROW, "sample": 0}], every=2)
    written(tmp_path, 0, 5, [ROW], every=2)
    assert logged_steps(tmp_path) == [4]
    found = read_rollouts(tmp_path, 4)
    assert [(row["prompt_id"], row["sample"]) for row in found] == [(7, 0), (7, 1), (9, 1)]
    assert found[1] == ROW
    with pytest.raises(ValueError, match=r"has no samples: .* log.rollouts=1; .*spmdrl generate"):
        read_rollouts(tmp_path / "of_pairs", 1)
    with pytest.raises(ValueError, match=r"has no step 5; it has steps 4 to 4, 1 in all"):
        read_rollouts(tmp_path, 5)


def test_a_run_that_resumes_forgets_later_steps_and_one_that_begins_sets_them_aside(
    tmp_path: Path,
) -> None:
    for step in (1, 2, 3):
        written(tmp_path, 0, step, [ROW])
    forget_rollouts(tmp_path, 2)
    assert logged_steps(tmp_path) == [1, 2]
    forget_rollouts(tmp_path, 0)
    assert logged_steps(tmp_path) == [] and (tmp_path / "rollouts.old-1").is_dir()


def test_a_place_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rollouts").write_text("a file")
    log = RolloutLog(tmp_path, 0, 1)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            log.write(step, [ROW])
        log.close()
    assert len(caplog.records) == 1 and "rollout log: step 1 is left out" in caplog.text


def test_a_step_that_finds_others_waiting_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RolloutLog, "_write_all", lambda self: None)
    monkeypatch.setattr(rollout_log, "_CLOSE_S", 0.01)
    log = RolloutLog(tmp_path, 0, 1)
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            log.write(step, [ROW])
        log.close()
    assert len(caplog.records) == 1 and "step 2 is left out" in caplog.text


def test_show_prints_a_table_and_one_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, 0, 4, [ROW])
    assert main(["show", str(tmp_path)]) == 0
    assert "0.500     -0.125       2  stop     it is 2 or so" in capsys.readouterr().out
    assert main(["show", str(tmp_path), "--step", "4", "--sample", "0"]) == 0
    shown = capsys.readouterr().out
    for text in ("reward 0.5 (a 1  b 0.25)", "advantage -0.125", "--- response ---\nit is 2"):
        assert text in shown
    assert "answer" not in shown
    assert main(["show", str(tmp_path), "--sample", "1"]) == 2
    assert "step 4 has samples 0 to 0" in capsys.readouterr().err
