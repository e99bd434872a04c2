"""`spmdrl runs`: states are read from the files that runs leave."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from spmdrl.commands.cli import main
from spmdrl.observe.run_state import FRESH_S, run_state
from spmdrl.supervision.pulse import Pulse


def make_run(root: Path, name: str, steps: int = 0, **files: str) -> Path:
    run = root / name
    attempt = run / "attempt_0000"
    attempt.mkdir(parents=True)
    lines = [{"step": n + 1, "wall_time": time.time(), "reward": n / 10} for n in range(steps)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for file, content in files.items():
        (attempt / file).write_text(content)
    return run


def beat(run: Path, rank: int, **changed: Any) -> None:
    content = {**json.loads(Pulse().heartbeat(rank)), **changed}
    folder = run / "attempt_0000" / "heartbeats"
    folder.mkdir(exist_ok=True)
    (folder / f"rank_{rank:05d}.json").write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_run(tmp_path, "done", 3, outcome="done\n", stopped_by="the detector flat_reward\n")
    make_run(tmp_path, "deep/er/failed", 1, outcome="crashed\n", failed="rank 1: boom\n")
    running = make_run(tmp_path, "running", 2)
    (running / "run.json").write_text(json.dumps({"starts": [{"config": {"steps": 50}}]}))
    beat(running, 0, step=2, calls=9, phase="update", stage="computing", call="policy.update")
    beat(running, 1, step=2, calls=7, phase="rollout", stage="computing", call="rollout.generate")
    lost = make_run(tmp_path, "lost", 1)
    beat(lost, 0, time=time.time() - 2 * FRESH_S)
    old = make_run(tmp_path, "old")  # a start that died before its first heartbeat
    os.utime(old / "attempt_0000", (0, 0))
    saved = "no step more than before (4)"
    make_run(tmp_path, "queued", 4, outcome="stopped\n", stopped_by="why", queued_again=saved)
    (tmp_path / "no run").mkdir()
    return tmp_path


def test_states_are_those_of_the_files(root: Path) -> None:
    names = ("done", "running", "lost", "old", "queued")
    found = {name: run_state(root / name) for name in names}
    assert {name: state.state for name, state in found.items()} == {
        "done": "done",
        "running": "running",
        "lost": "lost",
        "old": "lost",
        "queued": "queued",
    }
    assert found["queued"].detail == "stopped, no step more than before (4): why"
    assert found["running"].detail.startswith("rollout (rollout.generate), quiet for")
    assert (found["done"].step, found["done"].reward) == (3, 0.2)
    assert (found["old"].step, found["old"].changed) == (None, None)


def test_the_table_has_a_row_for_each_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(root)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "state", "step", "reward"]
    assert [row.split()[0] for row in rows] == [
        *("deep/er/failed", "done", "lost", "old", "queued", "running")
    ]
    cells = {row.split()[0]: row.split() for row in rows}
    assert cells["running"][1:4] == ["running", "2/50", "0.100"]
    assert "rank 1: boom" in rows[0] and "the detector flat_reward" in rows[1]


def test_where_there_is_no_run_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", str(tmp_path)]) == 2
    assert "no directory of a run is in it" in capsys.readouterr().err
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "is no directory" in capsys.readouterr().err
