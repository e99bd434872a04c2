"""A run under torchrun, as a user starts it, to be signalled and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


class Torchrun:
    """`spmdrl train CONFIG WORDS` on some ranks of this host; its output goes to a file.

    Used in a `with`: whatever is left of it is killed at the end.
    """

    def __init__(self, config: Path, *words: str, ranks: int = 2, log: Path | None = None) -> None:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        self.log = config.with_suffix(".log") if log is None else log
        self.began = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *launch, "-m", "spmdrl", "train", str(config), *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def rank_pids(self) -> dict[int, int]:
        """Rank -> process, of those that have begun Python's part of the work."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                pairs = (path / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError):
                continue
            variables = dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)
            if parent == self.process.pid and b"RANK" in variables:
                found[int(variables[b"RANK"])] = int(path.name)
        return found

    def wait(self, seconds: float) -> int:
        return self.process.wait(timeout=seconds)

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def attempt_of(run_dir: Path) -> Path:
    """The newest attempt's directory."""
    return max(run_dir.glob("attempt_*"))


def outcome_of(run_dir: Path) -> str:
    file = attempt_of(run_dir) / "outcome"
    return file.read_text().strip() if file.is_file() else "crashed"


def heartbeat(run_dir: Path, rank: int) -> dict[str, object]:
    return json.loads((attempt_of(run_dir) / "heartbeats" / f"rank_{rank:05d}.json").read_text())


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
