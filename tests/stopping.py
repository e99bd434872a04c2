"""An environment that asks its own run to stop, as a user would: by the stop file."""

from __future__ import annotations

import time
from typing import Any

from spmdrl.batch import Batch
from spmdrl.calls import Call
from spmdrl.flows.dpo import DpoTrainer
from spmdrl.flows.environment import GroupEnvironment
from spmdrl.flows.run import Metrics, Run


class StopAfterTwo:
    """Touches `run_dir/stop` while it collects the second step."""

    def __init__(self, run: Run) -> None:
        self.inner, self.directory = GroupEnvironment(run), run.directory

    def collect(self, step: int) -> Batch:
        if step == 1:
            (self.directory / "stop").touch()
        return self.inner.collect(step)

    def ahead(self, step: int) -> tuple[Call[Any], ...]:
        return ()

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
