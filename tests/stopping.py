"""Runs that ask themselves to stop, where a test says."""

from __future__ import annotations

import os
import time
from typing import Any

from spmdrl.api import Batch, Call, DpoTrainer, GroupEnvironment, Metrics, Run

POLLS = "SPMDRL_TEST_STOP_AT"
"""The number of the poll, counted on each rank by itself, from which on a stop is seen there; a
second number for rank 1 (engines poll at every step, updates at every minibatch)."""


class Wrapped:
    """The shipped environment, to be changed in places."""

    def __init__(self, run: Run) -> None:
        self.inner, self.run = GroupEnvironment(run), run

    def collect(self, step: int) -> Batch:
        return self.inner.collect(step)

    def ahead(self, step: int) -> tuple[Call[Any], ...]:
        return self.inner.ahead(step)

    def metrics(self) -> Metrics:
        return self.inner.metrics()


class StopDpoAfterTwo(DpoTrainer):
    """Touches `run_dir/stop` while it trains on the second step's pairs."""

    def step(self, step: int, batch: Batch) -> Metrics:
        metrics = super().step(step, batch)
        if step == 1:
            (self.run.directory / "stop").touch()
            time.sleep(1.0)  # the watcher looks now and then
        return metrics


class StopAfterTwo(Wrapped):
    """Touches `run_dir/stop` while it collects the second step, as a user would."""

    def collect(self, step: int) -> Batch:
        if step == 1:
            (self.run.directory / "stop").touch()
        return self.inner.collect(step)


class StopsAt(Wrapped):
    """Sees a request to stop at the polls that `POLLS` says; polls are counted in `polls_N`."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        numbers = [int(word) for word in os.environ.get(POLLS, "0").split()]
        rank = min(run.world.rank, len(numbers) - 1)
        self.limit, self.count = numbers[rank], 0
        run._life.ledger._should_stop = self.poll

    def poll(self) -> bool:
        self.count += 1
        seen = 0 < self.limit <= self.count
        watcher = self.run._life.watcher
        watcher.stop_asked = watcher.stop_asked or seen
        path = watcher.attempt.directory / f"polls_{self.run.world.rank}"
        path.write_text(str(self.count))
        return seen
