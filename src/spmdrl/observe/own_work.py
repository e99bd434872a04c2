"""Seconds that a rank works by itself, by phase and role call: what a straggler is found by.

A slow rank makes all others wait for it, so all have the same seconds in a phase. Seconds without
those that a rank waits in collectives tell them apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch.distributed as dist
from torch import Tensor

from spmdrl.observe.timeline import PhaseMeter

HOME = ""
"""Name of the work of a phase outside its role calls, in place of a call's."""

UNMEASURED = ("sync", "checkpoint", "other")
"""Phases whose work differs between ranks by nature: the first rank writes files, for example."""

FACTOR, SHARE = 1.25, 0.05
"""Least factor of a straggler, and the least share of the time that it costs."""

_FEW = 16
"""Most ranks of which each is compared with the others only, and not with all of them."""


@dataclass
class Waits:
    """Seconds that this process has waited in collectives."""

    seconds: float = 0.0


@contextmanager
def measured_waits(waits: Waits) -> Iterator[None]:
    """Measure inside the block how long `torch.distributed` blocks this process.

    All collectives that block end in `Work.wait`, those in torch's own code (FSDP) too. That of
    NCCL blocks only the device, so on GPUs a rank that works in lockstep with others (in an update,
    in a group of tp) cannot be told from them by this.
    """
    original = dist.Work.wait

    def wait(work: dist.Work, *args: object, **kwargs: object) -> object:
        began = time.perf_counter()
        try:
            return original(work, *args, **kwargs)  # type: ignore[arg-type]
        finally:
            waits.seconds += time.perf_counter() - began

    dist.Work.wait = wait  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        dist.Work.wait = original  # type: ignore[method-assign]


Key = tuple[str, str]
"""(phase, call, or `HOME`)."""


@dataclass
class _Amount:
    """Work of one key: seconds, tokens, and the kind of rank (its pipeline stage)."""

    seconds: float = 0.0
    tokens: float = 0.0
    kind: int = 0


class OwnWork(PhaseMeter):
    """Meter of this rank's own work.

    Args:
        waits: what `measured_waits` counts.
        clock: returns monotonic seconds.
    """

    def __init__(self, waits: Waits, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self._waits, self._clock = waits, clock
        self._calls: dict[Key, _Amount] = {}
        self._mark = self._now()

    @contextmanager
    def call(self, name: str, kind: int = 0) -> Iterator[Callable[[int], None]]:
        """Charge the block to a role call of the present phase, which every rank has named by
        `expect`.

        Args:
            kind: ranks of different kinds have different work for a token.

        Yields: takes the number of the call's tokens on this rank.
        """
        amount = self._amount(name)
        began = self._now()

        def count(tokens: int) -> None:
            amount.tokens += tokens

        yield count
        amount.seconds += self._now() - began
        amount.kind = kind

    def expect(self, name: str) -> None:
        """Note a call that some ranks will make, so that all ranks have the same keys."""
        self._amount(name)

    def take(self, tokens: int) -> dict[Key, tuple[float, float, int]]:
        """Return seconds, tokens and kind by key since the last call, and start anew.

        Keys are equal on all ranks, and in the same order.

        Args:
            tokens: number of tokens of this rank's home rows, for the work outside role calls.
        """
        self._charge()
        inside: dict[str, float] = {}
        for (phase, _), amount in self._calls.items():
            inside[phase] = inside.get(phase, 0.0) + amount.seconds
        found = {
            (phase, HOME): (seconds - inside.get(phase, 0.0), float(tokens), 0)
            for phase, seconds in self._charged.items()
        }
        found |= {k: (a.seconds, a.tokens, a.kind) for k, a in self._calls.items()}
        self._charged, self._calls = {}, {}
        return {k: v for k, v in found.items() if k[0] not in UNMEASURED and k[0]}

    def _amount(self, name: str) -> _Amount:
        phase = self._open[-1] if self._open else ""
        return self._calls.setdefault((phase, name), _Amount())

    def _now(self) -> float:
        return self._clock() - self._waits.seconds

    def _charge(self) -> None:
        now = self._now()
        name = self._open[-1] if self._open else ""
        self._charged[name] = self._charged.get(name, 0.0) + now - self._mark
        self._mark = now


class WaitedSeconds(PhaseMeter):
    """Meter of the seconds that this rank waits in collectives.

    Args:
        waits: what `measured_waits` counts.
    """

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits, self._mark = waits, waits.seconds

    def take(self) -> dict[str, float]:
        """Return the seconds by phase since the last call, and start anew."""
        self._charge()
        found, self._charged = self._charged, dict.fromkeys(self._charged, 0.0)
        return found

    def _charge(self) -> None:
        if self._open:
            name = self._open[-1]
            self._charged[name] += self._waits.seconds - self._mark
        self._mark = self._waits.seconds


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that takes `factor` times the others' seconds for a key's work."""

    rank: int
    key: Key
    factor: float
    lost: float = field(compare=False)

    def describe(self, host: str) -> str:
        phase, call = self.key
        where = phase if call == HOME else f"{phase}, in {call}"
        return (
            f"rank {self.rank} on {host} is slow in {where}: {self.factor:.2f} times the other "
            f"ranks' seconds for as much work, {self.lost:.2f} s of its own in these steps"
        )


def find_straggler(table: Tensor, keys: Sequence[Key], seconds: float) -> Straggler | None:
    """Find the rank that costs the others most time, if one costs a relevant part.

    A rank must be slower than the median both in seconds and in seconds per token: one with more
    data than others needs longer, and one with little has a larger share of what does not depend on
    the data.

    Args:
        table: each rank's (seconds, tokens, kind) for each key, `[ranks, keys, 3]` float64.
        seconds: duration of the steps that the table is of.
    """
    found: list[Straggler] = []
    values = table.numpy()
    for column, key in enumerate(keys):
        for kind in np.unique(values[:, column, 2]):
            is_in = (values[:, column, 1] > 0) & (values[:, column, 2] == kind)
            ranks = np.flatnonzero(is_in)
            if len(ranks) < 2:
                continue
            own, tokens = values[ranks, column, 0], values[ranks, column, 1]
            factors = np.minimum(_factors(own), _factors(own / tokens))
            lost = own * (1 - 1 / np.maximum(factors, 1.0))
            worst = int(lost.argmax())
            if factors[worst] >= FACTOR and lost[worst] >= SHARE * seconds:
                straggler = Straggler(
                    rank=int(ranks[worst]),
                    key=key,
                    factor=float(factors[worst]),
                    lost=float(lost[worst]),
                )
                found.append(straggler)
    return max(found, key=lambda one: one.lost, default=None)


def _factors(values: np.ndarray) -> np.ndarray:  # [n], n > 1
    """Each value over the median of the others, or of all where they are many."""
    if len(values) > _FEW:
        medians = np.full(len(values), np.median(values))
    else:
        medians = np.array([np.median(np.delete(values, i)) for i in range(len(values))])
    factors: np.ndarray = values / np.maximum(medians, 1e-9)
    return factors
