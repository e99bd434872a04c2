"""Plans of many choices at once, in processes of this machine's cores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
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
        self._pipes: list[Connection] = []
        self._processes = []
        context = get_context("fork")
        for _ in range(count if count > 1 else 0):
            here, there = context.Pipe()
            self._pipes.append(here)
            words = (planners, there, list(self._pipes))
            self._processes.append(context.Process(target=_serve, args=words, daemon=True))
            self._processes[-1].start()
            there.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if error is not None:
                process.kill()
            process.join()

    def plan(self, name: str, words: Sequence[Words]) -> list[Trial]:
        """Make the plans of planner `name` for each list of overrides.

        Raises:
            RuntimeError: a process ended, perhaps for lack of memory.
        """
        if not self._pipes:
            return [self._planners[name](each) for each in words]
        found: dict[int, Trial] = {}
        idle, busy = list(self._pipes), dict[Connection, int]()
        for number, own in enumerate(words):
            if not idle:
                idle += _receive(busy, found)
            busy[idle[-1]] = number
            idle.pop().send((name, own))
        while busy:
            _receive(busy, found)
        return [found[number] for number in range(len(words))]


def _receive(busy: dict[Connection, int], found: dict[int, Trial]) -> list[Connection]:
    """Take the plans that are made; returns the pipes that are idle again."""
    ready = [pipe for pipe in wait(busy) if isinstance(pipe, Connection)]
    for pipe in ready:
        try:
            found[busy.pop(pipe)] = pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError("a process that plans ended before its plan was made") from None
    return ready


def _serve(planners: Mapping[str, Planner], pipe: Connection, others: Sequence[Connection]) -> None:
    """Answer with plans until the other end is closed."""
    for other in others:  # copies of that end, here
        other.close()
    torch.set_num_threads(1)  # a fork has none of OpenMP's threads, and would wait for them
    while True:
        try:
            name, words = pipe.recv()
        except EOFError:
            return
        pipe.send(planners[name](words))
