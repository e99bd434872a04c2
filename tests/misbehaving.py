"""Environments that misbehave in the second step, each in its way, on rank 1."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from spmdrl.api import Batch, Call, GroupEnvironment, Metrics, Run


class _Wrapped:
    def __init__(self, run: Run) -> None:
        self.inner, self.run = GroupEnvironment(run), run

    def ahead(self, step: int) -> tuple[Call[Any], ...]:
        return ()

    def metrics(self) -> Metrics:
        return self.inner.metrics()


class Raises(_Wrapped):
    def collect(self, step: int) -> Batch:
        if (step, self.run.world.rank) == (1, 1):
            raise RuntimeError("rank 1 had enough")
        return self.inner.collect(step)


class Dies(_Wrapped):
    def collect(self, step: int) -> Batch:
        if (step, self.run.world.rank) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner.collect(step)


class Hangs(_Wrapped):
    def collect(self, step: int) -> Batch:
        if (step, self.run.world.rank) == (1, 1):
            time.sleep(600)
        return self.inner.collect(step)


class IsSignalled(_Wrapped):
    """Rank 1 gets the warning of a scheduler while it collects."""

    def collect(self, step: int) -> Batch:
        if (step, self.run.world.rank) == (1, 1):
            os.kill(os.getpid(), signal.SIGUSR1)
        return self.inner.collect(step)
