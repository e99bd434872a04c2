"""Plans of many choices at once, in processes of this machine's cores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from types import TracebackType

import torch

from spmdrl.planning.suggest.search import Planner, Trial
from spmdrl.planning.suggest.space import Words

MOST_PROCESSES = 4
"""Each keeps layouts of its own: hundreds of MB for a plan of 512 ranks."""

LEAST_RANKS = 128
"""Smaller worlds are planned before processes that share the work would pay."""


def num_processes(num_ranks: int) -> int:
    """Processes that plan a world of so many ranks."""
    if num_ranks < LEAST_RANKS:
        return 1
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


class Workers:
    """Planners by name, each asked for several plans at once. A context manager.

    The processes are forks, so that planners need not be picklable; each has a copy of them.

    Args:
        count: processes; with 1 the planners are called here.
    """

    def __init__(self, planners: Mapping[str, Planner], count: int) -> None:
        self._planners = planners
        self._pool = None
        if count > 1:
            self._pool = ProcessPoolExecutor(
                count, get_context("fork"), initializer=_begin, initargs=(planners,)
            )

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def plan(self, name: str, words: Sequence[Words]) -> list[Trial]:
        """Make the plans of planner `name` for each list of overrides."""
        if self._pool is None:
            return [self._planners[name](each) for each in words]
        return list(self._pool.map(partial(_plan, name), words))


_OWN: dict[str, Planner] = {}
"""Planners of a process of `Workers`."""


def _begin(planners: Mapping[str, Planner]) -> None:
    # a fork has none of OpenMP's threads, and would wait for them
    torch.set_num_threads(1)
    _OWN.update(planners)


def _plan(name: str, words: Words) -> Trial:
    return _OWN[name](words)
