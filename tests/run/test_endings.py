"""How runs end under torchrun: dead, raising and hung ranks are named, and nobody waits long."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from flow_cases import write_config
from spmdrl.observe.metrics import read_metrics
from tiny_model import make_tiny_model
from torchrun import Torchrun, attempt_of, heartbeat, outcome_of, wait_until

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("endings")
    make_tiny_model(root / "model")
    return root


def start(root: Path, name: str, *words: str, **sections: object) -> Torchrun:
    config = write_config(root / f"{name}.yaml", root / "model", root / name, **sections)
    return Torchrun(config, f"environment={HERE / 'misbehaving.py'}:{name}", *words)


@pytest.mark.full  # tests/commands/test_launcher.py and tests/slurm have ranks that raise, too
def test_a_raising_rank_is_named_and_the_others_end_without_saving(root: Path) -> None:
    with start(root, "Raises") as run:
        assert run.wait(100) != 0
    assert "RuntimeError: rank 1 had enough" in run.output()
    assert "rank      : 1 (local_rank: 1)" in run.output().split("Root Cause")[1]
    assert outcome_of(root / "Raises") == "crashed"
    failed = (attempt_of(root / "Raises") / "failed").read_text()
    assert failed == "rank 1: RuntimeError: rank 1 had enough\n"
    assert not (root / "Raises" / "checkpoints").exists()
    assert [r["step"] for r in read_metrics(root / "Raises" / "metrics.jsonl") if "loss" in r] == [
        1
    ]


def test_a_killed_rank_is_named_and_the_others_end_without_saving(root: Path) -> None:
    with start(root, "Dies") as run:
        assert run.wait(100) != 0
    assert "rank      : 1 (local_rank: 1)" in run.output().split("Root Cause")[1]
    assert outcome_of(root / "Dies") == "crashed"
    failed = (attempt_of(root / "Dies") / "failed").read_text()
    assert failed == "rank 1: died without a word (killed?)\n"
    assert not (root / "Dies" / "checkpoints").exists()


@pytest.mark.full
def test_a_hung_rank_is_named_with_its_stack(root: Path) -> None:
    with start(root, "Hangs", "limits.default=6", "limits.start=60") as run:
        wait_until(lambda: len(list((root / "Hangs").glob("attempt_*/heartbeats/*"))) == 2, 60)
        # a live run shows its stacks, too
        for pid in run.rank_pids().values():
            os.kill(pid, signal.SIGUSR2)
        stacks = sorted((attempt_of(root / "Hangs") / "stacks").glob("*.txt"))
        wait_until(lambda: all("most recent call first" in p.read_text() for p in stacks), 20)
        assert run.wait(100) != 0
    assert outcome_of(root / "Hangs") == "hung"
    failed = (attempt_of(root / "Hangs") / "failed").read_text()
    assert "ranks [1] are behind: step 1" in failed
    assert "rank 0 is ahead: step 1, phase rollout, in rollout.generate (sending)" in failed
    texts = [path.read_text() for path in stacks]
    assert "misbehaving.py" in texts[1].rsplit("---", 1)[1]
    assert "no progress for 6 s" in texts[0]
    assert heartbeat(root / "Hangs", 1)["step"] == 1
