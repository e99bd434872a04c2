"""`Turns`: the ranks of a world as threads of one process, of which one runs at a time.

A rank runs until it waits for others, so a rehearsal is the same every time. What is a process's
own in a real run (its variables RANK and LOCAL_RANK, Python's and torch's global generators) is put
in place whenever a rank gets its turn.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from spmdrl.rehearsal.lines import Stack, describe, stack_of, stack_of_frame

QUIET_S = 60.0
"""Seconds in which ranks only sleep and poll, after which none of them is expected to continue."""

STILL_S = 300.0
"""Seconds for which a rank may compute between two collectives."""

_NAP_S = 0.001


class Abandoned(BaseException):
    """Ends the thread of a rank that waits for others which never come."""


@dataclass
class _Own:
    """State of one rank that belongs to a process."""

    generator: object
    torch_generator: torch.Tensor


@dataclass(kw_only=True)
class Outcome:
    """End of a rank: complete, failed with an error, or neither (it waits in vain)."""

    is_complete: bool = False
    error: Exception | None = None
    stack: Stack = field(default=())
    """Lines of the error, innermost first."""


class Turns:
    """Threads of `size` ranks and whose turn it is.

    Args:
        node_size: ranks of a node.
        quiet_s: seconds of nothing but polling after which the rehearsal ends.
    """

    def __init__(self, size: int, node_size: int, quiet_s: float = QUIET_S) -> None:
        self.size, self._node_size, self._quiet_s = size, node_size, quiet_s
        self.outcomes = [Outcome() for _ in range(size)]
        self.is_abandoned = False
        self._ready: deque[int] = deque(range(size))
        self._gates = [threading.Semaphore(0) for _ in range(size)]
        self._ranks: dict[int, int] = {}
        """Rank of each thread, by the thread's number."""
        self._current = 0
        self._alive: set[int] = set(range(size))
        self._finished = threading.Event()
        self._moved = time.monotonic()
        self._sleep = time.sleep
        state = random.getstate(), torch.get_rng_state()
        self._own = [_Own(state[0], state[1].clone()) for _ in range(size)]

    def here(self) -> int | None:
        """The rank whose thread this is; None in other threads."""
        return self._ranks.get(threading.get_ident())

    def run(self, function: Callable[[int], Any]) -> None:
        """Run `function(rank)` on every rank until all have ended or none can continue."""
        threads = [
            threading.Thread(target=self._run, args=(function, rank), daemon=True)
            for rank in range(self.size)
        ]
        own = _Own(random.getstate(), torch.get_rng_state())
        with self._as_processes():
            for thread in threads:
                thread.start()
            self._next()
            while not self._finished.wait(0.2):  # so that Ctrl-C is heard
                self._check_still()
            for thread in threads:
                thread.join()
        _restore(own)

    def _check_still(self) -> None:
        """TimeoutError: the rank whose turn it is seems to wait for something outside torch."""
        if time.monotonic() - self._moved < STILL_S:
            return
        # what it waits for may come after all: it must not hand its turn to ranks of no rehearsal
        self._abandon(waiting=self._current)
        frames = sys._current_frames()
        found = next(t for t, rank in self._ranks.items() if rank == self._current)
        raise TimeoutError(
            f"rank {self._current} has reached no collective for {STILL_S:g} s, perhaps since it "
            "waits for a lock, queue or file of another rank: ranks are threads here, and only one "
            f"of them runs: {describe(stack_of_frame(frames.get(found)))}"
        )

    def block(self) -> None:
        """Give the turn away until another rank calls `wake` for this one.

        Raises:
            Abandoned: no rank can continue.
        """
        self._moved = time.monotonic()
        self._give_away()

    def wake(self, ranks: Iterable[int]) -> None:
        """Let blocked ranks have a turn again."""
        self._moved = time.monotonic()
        self._ready.extend(ranks)

    def pause(self, seconds: float, /) -> None:
        """Sleep as `time.sleep` does; other ranks have their turns meanwhile."""
        rank = self.here()
        if rank is None:
            self._sleep(seconds)
            return
        # threads of this rank, which take no turns, may be what it waits for
        self._sleep(min(seconds, _NAP_S))
        if time.monotonic() - self._moved > self._quiet_s and not self.is_abandoned:
            self._abandon()
        if not self.is_abandoned:
            self._ready.append(rank)
        self._give_away()

    def _give_away(self) -> None:
        rank = self.here()
        assert rank is not None, "only a rank has a turn to give away"
        if not self.is_abandoned and not self._ready:
            self._abandon()
        if self.is_abandoned:
            raise Abandoned
        self._own[rank] = _Own(random.getstate(), torch.get_rng_state())
        self._next()
        self._take(rank)

    def _next(self) -> None:
        self._gates[self._ready.popleft()].release()

    def _take(self, rank: int) -> None:
        self._gates[rank].acquire()
        if self.is_abandoned:
            raise Abandoned
        self._current = rank
        os.environ["RANK"], os.environ["LOCAL_RANK"] = str(rank), str(rank % self._node_size)
        _restore(self._own[rank])

    def _abandon(self, waiting: int | None = None) -> None:
        """Let every rank but the one that waits (by default, this one) end at what it waits for."""
        self.is_abandoned = True
        waiting = self.here() if waiting is None else waiting
        self._ready = deque(rank for rank in sorted(self._alive) if rank != waiting)

    def _run(self, function: Callable[[int], Any], rank: int) -> None:
        self._ranks[threading.get_ident()] = rank
        outcome = self.outcomes[rank]
        try:
            self._take(rank)
            function(rank)
            outcome.is_complete = True
        except Abandoned:
            pass
        except Exception as error:  # of any kind: it is a finding, told when all ranks have ended
            outcome.error, outcome.stack = error, stack_of(error)
        self._moved = time.monotonic()
        self._alive.remove(rank)
        if not self._alive:
            self._finished.set()
            return
        if not self._ready:
            self._abandon()
        self._next()

    @contextmanager
    def _as_processes(self) -> Iterator[None]:
        """Set what is one process's for the threads, and restore it afterwards."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        before = {name: os.environ.get(name) for name in names}
        os.environ["WORLD_SIZE"] = str(self.size)
        os.environ["LOCAL_WORLD_SIZE"] = str(self._node_size)
        time.sleep = self.pause  # type: ignore[assignment]  # stubs take any index as well
        getter = vars(cached_property)["__get__"]
        if sys.version_info < (3, 12):
            # it holds a lock that all objects of a class share, while it computes a property
            cached_property.__get__ = _get_unlocked  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            time.sleep = self._sleep
            cached_property.__get__ = getter  # type: ignore[method-assign]
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _restore(own: _Own) -> None:
    random.setstate(own.generator)  # type: ignore[arg-type]
    torch.set_rng_state(own.torch_generator)


def _get_unlocked(self: Any, instance: object, owner: type | None = None) -> object:
    """Get a `cached_property` as Python does from 3.12 on."""
    if instance is None:
        return self
    cache = vars(instance)
    if self.attrname not in cache:
        cache[self.attrname] = self.func(instance)
    return cache[self.attrname]
