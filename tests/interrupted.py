"""Runs as users start them, to be interrupted at a terminal or by kill, in a phase of choice."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from spmdrl.batch import Batch
from spmdrl.run.protocols import Metrics
from spmdrl.run.run import Run
from stopping import Wrapped
from torchrun import wait_until

PHASE = "SPMDRL_TEST_PHASE"
"""The phase of the second step in which `in_PHASE` appears in the run's directory; a second word
`slow`: saves take some seconds."""

STARTERS: Mapping[str, Sequence[str]] = {
    "launch": ["-m", "spmdrl", "launch", "--nproc-per-node=2"],
    "torchrun": [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "spmdrl",
    ],
    "one": ["-m", "spmdrl"],
}


class InPhase(Wrapped):
    """Says when the phase begins that `PHASE` names; a save takes longer then."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.phase, *slow = [*os.environ.get(PHASE, "").split(), ""]
        run.evaluate_with(self)
        if "slow" in slow:  # and something else exists to be ended
            subprocess.Popen(["sleep", "600"])
        if self.phase == "saving" or "slow" in slow:
            self.save_slowly(0.3 if "slow" in slow else 0.03)

    def save_slowly(self, seconds: float) -> None:
        writer = self.run._life._saver._writer
        inner = writer._progress

        def slow() -> None:
            if threading.current_thread().name == "spmdrl-checkpoint":
                self.mark("saving", 1)
                time.sleep(seconds)
            inner()

        writer._progress = slow

    def mark(self, phase: str, step: int) -> None:
        if (phase, step) == (self.phase, 1) and self.run.world.is_first:
            (self.run.directory / f"in_{phase}").touch()

    def evaluate(self, step: int) -> Metrics:
        self.mark("evaluation", step)
        return {}

    def collect(self, step: int) -> Batch:
        self.mark("rollout", step)
        batch = super().collect(step)
        self.mark("update", step)
        return batch


class Breaks(Wrapped):
    """Is looked at in a debugger in the second step."""

    def collect(self, step: int) -> Batch:
        if step == 1:
            breakpoint()
        return super().collect(step)


class Started:
    """`spmdrl WORDS` by one of `STARTERS`, in a session of its own, with or without a terminal.

    Used in a `with`: whatever is left of it is killed at the end.
    """

    def __init__(
        self, starter: str, *words: str, log: Path, terminal: bool, phase: str = ""
    ) -> None:
        self.starter, self.log, self.began = starter, log, time.monotonic()
        self.terminal = -1
        environment = {**os.environ, "OMP_NUM_THREADS": "1", PHASE: phase}
        command = [sys.executable, *STARTERS[starter], *words]
        output = log.open("wb")
        if not terminal:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            output.close()
            return
        self.terminal, theirs = pty.openpty()
        attributes = termios.tcgetattr(theirs)
        attributes[3] |= termios.ISIG  # the terminal turns Ctrl-C into SIGINT
        termios.tcsetattr(theirs, termios.TCSANOW, attributes)
        # `setsid --ctty`: a new session with this terminal, in its foreground
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
        )
        os.close(theirs)
        self._copier = threading.Thread(target=self._copy, args=(output,), daemon=True)
        self._copier.start()

    def _copy(self, output: IO[bytes]) -> None:
        with output:
            while True:
                try:
                    text = os.read(self.terminal, 4096)
                except OSError:  # the last process has closed it
                    return
                if not text:
                    return
                output.write(text)
                output.flush()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [*self.tree()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        if self.terminal >= 0:
            os.close(self.terminal)

    def interrupt(self, way: str) -> None:
        """Ctrl-C: `typed` at the terminal, by kill to the `first` process, or to `all` at once."""
        if way == "typed":
            os.write(self.terminal, b"\x03")
        elif way == "first":
            os.kill(self.process.pid, signal.SIGINT)
        else:
            for pid in self.tree():
                os.kill(pid, signal.SIGINT)

    def tree(self) -> list[int]:
        """The process and all that come from it and live."""
        parents: dict[int, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            except (OSError, ValueError):
                continue
            if state not in "ZX":
                parents.setdefault(int(parent), []).append(int(path.name))
        found, new = [self.process.pid], [self.process.pid]
        while new:
            new = [child for pid in new for child in parents.get(pid, ())]
            found += new
        return found

    def importing(self) -> int:
        """How many ranks have begun to import torch, or have done it."""
        count = 0
        for pid in self.tree():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                maps = Path(f"/proc/{pid}/maps").read_text()
            except OSError:
                continue
            is_rank = pid == self.process.pid if self.starter == "one" else b"-u" in words
            count += is_rank and b"spmdrl" in words and "libtorch" in maps
        return count

    def reach(self, run_dir: Path, phase: str) -> None:
        """Until the run is in the phase."""
        if phase == "import":
            wait_until(lambda: self.importing() == (1 if self.starter == "one" else 2), 100)
            return
        marked = run_dir / f"in_{phase}"
        wait_until(lambda: marked.exists() or self.process.poll() is not None, 200)
        assert marked.exists(), self.output()

    def wait(self, seconds: float) -> int:
        return self.process.wait(timeout=seconds)

    def output(self) -> str:
        """So far; all of it once the processes have ended."""
        if self.terminal >= 0 and self.process.poll() is not None:
            self._copier.join(5)
        return self.log.read_text(errors="replace")


def living(pids: Sequence[int]) -> list[int]:
    """Those of the processes that have not ended."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found.append(pid)
    return found


def busy() -> float:
    """How many processes share a core of this machine, at least 1."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
