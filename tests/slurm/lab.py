"""A real Slurm on this host, and jobs on it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torchrun import wait_until

ROOT = Path(__file__).parents[2]
PATIENCE_S = 600.0
"""How long anything may take: a start is a few seconds of `import torch` for every process."""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Lab:
    """Two emulated nodes, from `up` to `down`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}

    def up(self) -> None:
        self._control("up")

    def down(self) -> None:
        self._control("down")

    def _control(self, what: str) -> None:
        script = ROOT / "scripts/dev/slurmlab.sh"
        subprocess.run([script, what, str(self.directory)], check=True, timeout=120)

    def run(self, *words: str) -> str:
        done = subprocess.run(
            words, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def submit(
        self, script: str, *words: str, options: tuple[str, ...] = (), **variables: str
    ) -> Job:
        """`sbatch` one of the shipped scripts, from the repository's root."""
        log = self.directory / "jobs"
        log.mkdir(exist_ok=True)
        given = {
            "PYTHON": sys.executable,
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "RANKS_PER_NODE": "1",
            **variables,
        }
        done = subprocess.run(
            ["sbatch", "--parsable", "--time=60", f"--output={log}/%A_%a.log", *options]
            + [str(ROOT / "scripts/slurm" / script), *words],
            env={**self.environment, **given},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip(), log)

    def submit_line(self, line: str, *options: str) -> Job:
        """A batch job of one line of shell."""
        number = self.run("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", line)
        return Job(self, number.strip(), self.directory / "jobs")

    def kill_node(self, number: int) -> None:
        """Its daemon dies without a word."""
        pid = int((self.directory / "run" / f"slurmd.n{number}.pid").read_text())
        os.kill(pid, signal.SIGKILL)

    def start_node(self, number: int) -> None:
        self.run("slurmd", "-N", f"n{number}")


class Job:
    def __init__(self, lab: Lab, number: str, log: Path) -> None:
        self.lab, self.number, self._log = lab, number, log

    def show(self) -> dict[str, str]:
        """The fields of `scontrol show job`; of the first element of an array."""
        text = self.lab.run("scontrol", "show", "job", "-o", self.number).splitlines()[0]
        return dict(re.findall(r"(\w+)=(\S*)", text))

    @property
    def state(self) -> str:
        return self.show()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.show()["Restarts"])

    def signal_batch(self, name: str) -> None:
        """As Slurm does before the time limit, by `--signal=B:...`."""
        self.lab.run("scancel", "--batch", f"--signal={name}", self.number)

    def cancel(self) -> None:
        self.lab.run("scancel", self.number)

    def wait(self, *states: str) -> str:
        """Until the job is in one of the states."""
        wait_until(lambda: self.state in states, PATIENCE_S)
        return self.state

    def reach(self, condition: Callable[[], bool]) -> None:
        """Until the job has brought something about; it must not end before.

        For a while, a job that Slurm queues again looks like one that has ended.
        """
        began = alive = time.monotonic()
        while not condition():
            now = time.monotonic()
            alive = alive if self.state in ENDED else now
            assert now - alive < 20 and now - began < PATIENCE_S, (self.show(), self.output())
            time.sleep(0.2)

    def wait_for_restart(self) -> None:
        """Until the job was queued again and runs, which Slurm delays by AuthInfo=cred_expire.

        An earlier start, which `scontrol update StartTime=now` can force, may meet a node that
        still holds the job's old credential as revoked: the job is then FAILED.
        """
        self.reach(lambda: self.restarts > 0 and self.state == "RUNNING")

    def output(self) -> str:
        parts = [
            path.read_text(errors="replace") for path in sorted(self._log.glob(f"{self.number}_*"))
        ]
        return "\n".join(parts)
