"""Environments of the jobs: slow enough to be met in the middle, and with a place of their own."""

from __future__ import annotations

import os
import time

from spmdrl.batch import Batch
from spmdrl.run.run import Run
from stopping import Wrapped


class Slow(Wrapped):
    """Half a second more for every step; says on which node every rank is."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        seat = run.directory / f"seat_{run.world.rank}"
        seat.write_text(os.environ.get("SLURM_NODEID", "none"))

    def collect(self, step: int) -> Batch:
        time.sleep(0.5)
        return super().collect(step)


class SlowAtFirst(Slow):
    """The job's first start outlives the time in which Slurm notices that a node is lost."""

    def collect(self, step: int) -> Batch:
        if "SLURM_RESTART_COUNT" not in os.environ:
            time.sleep(8)
        return super().collect(step)


class CrashesAtThree(Slow):
    """Rank 1 raises in the fourth step, whenever it comes there."""

    def collect(self, step: int) -> Batch:
        if (step, self.run.world.rank) == (3, 1):
            raise RuntimeError("rank 1 does not like the fourth step")
        return super().collect(step)
