"""Runs in surroundings that are not a workstation's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tiny_model import make_tiny_model

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"
STRANGER = 54321
"""A user that no system knows."""

REWARD = '''"""Zählt."""
def even(prompt, response, answer, entry):
    print("Größe", len(response))  # into a file of the run's
    return float(len(response) % 2 == 0)
'''


@dataclass(frozen=True, kw_only=True)
class Ended:
    status: int
    output: str

    @property
    def lives(self) -> list[str]:
        """Which parts of `life.py` went well."""
        lines = [line.split(": ") for line in self.output.splitlines()]
        return [line[1] for line in lines if line[0] == "life" and line[2] == "0"]


def prepare(root: Path, *, run_dir: Path | None = None) -> Path:
    """A configuration with all that it needs below `root`, in other scripts than Latin ones."""
    root.mkdir(parents=True, exist_ok=True)
    make_tiny_model(root / "model")
    rows = [{"question": f"¿Qué es {i}? 几", "answer": str(i)} for i in range(8)]
    data = root / "fragen.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    (root / "rewards.py").write_text(REWARD, encoding="utf-8")
    source = {"source": str(data), "max_tokens": 64}
    content = {
        "flow": "grpo",
        "run_dir": str(root / "run" if run_dir is None else run_dir),
        "model": {"path": str(root / "model")},
        "roles": {"policy": {}, "rollout": {}},
        "data": {
            "prompts_per_step": 2,
            "group_size": 2,
            "train": source,
        },
        "rewards": [{"function": f"{root / 'rewards.py'}:even"}],
        "sampling": {"max_tokens": 4},
        "train": {"microbatch_tokens": 200},
        "evaluation": {"before": False, "held_out": 2},
        "log": {"progress": False, "tensorboard": True},
        "checkpoint": {"every": 1, "export": True},
        "steps": 2,
    }
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return config


def run(
    *words: str,
    variables: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
    script: str = "life.py",
    home: Path | None = None,
    timeout_s: float = 180.0,
) -> Ended:
    """`script` with no variables but those given, behind a command such as setpriv.

    Args:
        home: the directory of the user; None: there is none.
    """
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "PYTHONPATH": str(SOURCE),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        **({} if home is None else {"HOME": str(home)}),
        **(variables or {}),
    }
    done = subprocess.run(
        [*before, sys.executable, str(HERE / script), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        timeout=timeout_s,
        check=False,
        errors="replace",
        encoding="utf-8",
        cwd=HERE,
    )
    return Ended(status=done.returncode, output=done.stdout)


def as_user(number: int = STRANGER) -> list[str]:
    """A command that goes on as another user; it may read all that lies in the way, as the Python
    of a test may be root's own.
    """
    user = ["--reuid", str(number), "--regid", str(number), "--clear-groups"]
    return ["setpriv", *user, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def give(path: Path, number: int = STRANGER) -> Path:
    """Make a directory of a user's own."""
    path.mkdir(parents=True, exist_ok=True)
    os.chown(path, number, number)
    return path
