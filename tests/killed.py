"""Runs of which one rank is killed in a phase of the second step, as `kill -9` does it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from flow_cases import run_configs
from harness import run_ranks
from replay import ReplayEnvironment
from spmdrl.batch import Batch
from spmdrl.roles.calls import Call
from spmdrl.run.protocols import Metrics
from spmdrl.run.run import Run
from spmdrl.world import World
from torchrun import wait_until

PHASE = "SPMDRL_TEST_KILL_IN"
"""One of `PHASES`; where it is empty, nothing is killed."""

PHASES = ("rollout", "update", "saving")


class KilledEnvironment:
    """A `ReplayEnvironment` in whose second step a rank is killed: in generation (the first rank),
    between two minibatches (the last one), or while the step's checkpoint is written (the first).
    """

    def __init__(self, run: Run) -> None:
        self.inner, self.run, self.now = ReplayEnvironment(run), run, ""
        self.polls = 0
        phase = os.environ.get(PHASE, "")
        rank = run.world.size - 1 if phase == "update" else 0
        self.phase = phase if run.world.rank == rank else ""
        run._life.ledger._should_stop = self.poll
        run._life._saver._writer._progress = self.written

    def collect(self, step: int) -> Batch:
        if step == 1 and self.phase:
            # what is written behind the steps, so that it is known where the next start begins
            wait_until((self.run.directory / "checkpoints" / "latest").is_file, 60)
        self.now = "rollout" if step == 1 else ""
        batch = self.inner.collect(step)
        self.polls, self.now = 0, "update" if step == 1 else "saving" if step > 1 else ""
        return batch

    def poll(self) -> bool:
        """Asked by engines at every step, and by updates before every minibatch."""
        self.polls += self.now == self.phase
        if self.phase and self.polls == 2:
            self.kill()
        return self.run._life.watcher.stop_asked

    def written(self) -> None:
        """Called by the writer of checkpoints wherever it has written something."""
        if self.phase == "saving" and threading.current_thread().name == "spmdrl-checkpoint":
            partial = list((self.run.directory / "checkpoints").glob(".partial-*/*"))
            if self.run.steps_done == 2 and partial:
                self.kill()

    def kill(self) -> None:
        (self.run.directory / f"killed_in_{self.phase}").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def ahead(self, step: int) -> tuple[Call[Any], ...]:
        return self.inner.ahead(step)

    def metrics(self) -> Metrics:
        return self.inner.metrics()


def run_killed(world: World, config: str, words: list[str], replay: str, phase: str) -> None:
    os.environ[PHASE] = phase
    run_configs(world, [(config, words)], replay)


def kill_in(phase: str, config: Path, words: list[str], replay: Path, run_dir: Path) -> None:
    """Start the run on two ranks, kill one in the phase, and see that one step was saved."""
    with pytest.raises(AssertionError, match=r"died|failed"):
        run_ranks(run_killed, 2, str(config), words, str(replay), phase, timeout_s=400)
    assert (run_dir / f"killed_in_{phase}").exists()
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000001"
