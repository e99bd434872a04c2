"""The five shipped trackers with their real packages, without a network: each step once, and no
file in the home directory.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "track_a_run.py"


def environment_of(name: str) -> str:
    """The Python that has the tracker's package."""
    if name in ("tensorboard", "jsonl"):
        return sys.executable
    made = subprocess.run(
        [ROOT / "scripts/dev/trackers_env.sh"], capture_output=True, text=True, check=True
    )
    return f"{made.stdout.strip()}/bin/python"


def can_leave_the_network() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-n", "-r", "true"], check=False).returncode == 0


def run_program(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    offline = ["unshare", "-n", "-r"] if can_leave_the_network() else []
    words = [environment_of(name), PROGRAM, site.getsitepackages()[0], tmp_path / "run", name]
    done = subprocess.run(
        [*offline, *words],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "PYTHONPATH": str(ROOT / "src"),
            "WANDB_MODE": "offline",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    steps = {step: round(value, 3) for step, value in found["reward"]}
    assert steps == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    assert len(found["reward"]) == 4, "a step was logged twice"
    assert [value for _, value in found["eval/held_out/pass@1"]][:2] == [0.5, 0.5]
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize("name", ["tensorboard", "jsonl"])
def test_a_tracker_has_each_step_once(tmp_path: Path, name: str) -> None:
    run_program(tmp_path, name)


@pytest.mark.full  # their packages are a GB, in an environment of their own
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_service_has_each_step_once(tmp_path: Path, name: str) -> None:
    run_program(tmp_path, name)
