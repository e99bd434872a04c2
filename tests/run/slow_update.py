"""A trainer whose update is slow on rank 1, within the call and before it."""

from __future__ import annotations

import os
import time
from typing import Any

from spmdrl.api import Batch, Call, GrpoTrainer, Metrics, Run

WHERE = "SPMDRL_TEST_SLOW"
SLEEP_S = 0.15


class SlowUpdate(GrpoTrainer):
    def __init__(self, run: Run) -> None:
        super().__init__(run)
        if run.world.rank == 1 and os.environ[WHERE] == "inside":
            backend = self.policy.backend
            assert backend is not None
            inner = backend.forward_backward

            def slow(*args: Any, **kwargs: Any) -> Any:
                time.sleep(SLEEP_S)
                return inner(*args, **kwargs)

            backend.forward_backward = slow  # type: ignore[method-assign]

    def step(self, step: int, batch: Batch, *alongside: Call[Any]) -> Metrics:
        with self.run.phase("advantages"):
            if self.run.world.rank == 1 and os.environ[WHERE] == "before":
                time.sleep(SLEEP_S)
        return super().step(step, batch, *alongside)
