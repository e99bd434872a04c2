"""`Stragglers` compares the ranks' own work every few steps, and names a slow rank in the log."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist

from spmdrl.distributed.reduce import gather_at_first, world_sum
from spmdrl.observe import names
from spmdrl.observe.own_work import (
    OwnWork,
    WaitedSeconds,
    Waits,
    find_straggler,
    measured_waits,
)
from spmdrl.world import World

log = logging.getLogger(__name__)

EVERY = 5
"""Steps of which the times are added up before ranks are compared; the run's first one is left out,
since it has what happens only once."""


class Stragglers:
    """Finds slow ranks; every rank of the world has one and calls it alike."""

    def __init__(self, world: World, every: int = EVERY) -> None:
        self._world, self._every = world, every
        waits = Waits()
        self.work = OwnWork(waits)
        self._waited = WaitedSeconds(waits)
        self._waits, self._stack = waits, ExitStack()
        self._hosts: list[str] | None = None
        self._steps = -1  # the first one is left out
        self._tokens = 0
        self._began = 0.0

    def begin(self) -> None:
        """Begin to measure."""
        if self._world.size > 1:
            self._stack.enter_context(measured_waits(self._waits))
            self._hosts = gather_at_first(socket.gethostname())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self.work.phase(name), self._waited.phase(name):
            yield

    def idle(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Return by phase the share of its seconds that ranks wait in collectives, on average over
        them; nothing on one rank. Every rank calls it.

        Args:
            seconds: seconds of the step by phase.
        """
        if self._world.size == 1:
            return {}
        waited = {name: own for name, own in self._waited.take().items() if name in seconds}
        sums = world_sum(torch.tensor(list(waited.values()), dtype=torch.float64)).tolist()
        return {
            names.IDLE + name: min(1.0, own / self._world.size / seconds[name])
            for name, own in zip(waited, sums, strict=True)
            if seconds[name] > 0
        }

    def finish_step(self, tokens: int) -> None:
        """End a step, and compare the ranks if that is due.

        Args:
            tokens: number of tokens of this rank's home rows of the step.
        """
        self._steps += 1
        self._tokens += tokens
        if self._steps not in (0, self._every) or self._world.size == 1:
            return
        found = self.work.take(self._tokens)
        now = time.perf_counter()
        if self._steps:
            self._compare(found, now - self._began)
        self._steps = self._tokens = 0
        self._began = now

    def close(self) -> None:
        self._stack.close()

    def _compare(
        self, found: dict[tuple[str, str], tuple[float, float, int]], seconds: float
    ) -> None:
        if not found:
            return
        own = torch.tensor(list(found.values()), dtype=torch.float64)
        tables = None
        if self._world.is_first:
            tables = [torch.empty_like(own) for _ in range(self._world.size)]
        dist.gather(own, tables, dst=0)
        if tables is None:
            return
        assert self._hosts is not None
        straggler = find_straggler(torch.stack(tables), list(found), seconds)
        if straggler is not None:
            log.warning("%s", straggler.describe(self._hosts[straggler.rank]))
