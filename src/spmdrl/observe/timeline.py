"""Seconds of a step by phase, tokens per second, and peak memory of this rank."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from spmdrl.observe.names import OTHER, SECONDS, STEP_SECONDS, TOKENS_PER_S


class PhaseMeter(ABC):
    """Charges what it reads to exactly one phase: the innermost open one, if there is one."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._charged: dict[str, float] = {}
        """Phase -> what it was charged, in order of first use."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what is read inside the block to `name`, except that of inner phases."""
        self._charge()
        self._charged.setdefault(name, 0.0)
        self._open.append(name)
        try:
            yield
            self._charge()  # not after an exception: the device may no longer answer
        finally:
            self._open.pop()

    @abstractmethod
    def _charge(self) -> None:
        """Read what has come up since the last call, and charge it to the end of `_open`."""


class PhaseTimer(PhaseMeter):
    """Charges every moment of a step to exactly one phase: the innermost open one, or `other`.

    Args:
        synchronize: waits for the device's queued work (`World.synchronize`), called at both ends
            of a phase so that its seconds are its own.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        *,
        synchronize: Callable[[], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__()
        self._synchronize = synchronize
        self._clock = clock
        self._mark = clock()

    def finish(self) -> dict[str, float]:
        """Return the seconds since the last `finish` (or construction) by phase, in order of first
        use and `other` last, and start anew; they add up to the time that has passed.
        """
        self._charge()
        other = self._charged.pop(OTHER, 0.0)
        seconds, self._charged = {**self._charged, OTHER: other}, {}
        return seconds

    def _charge(self) -> None:
        self._synchronize()
        now = self._clock()
        name = self._open[-1] if self._open else OTHER
        self._charged[name] = self._charged.get(name, 0.0) + now - self._mark
        self._mark = now


def timing_metrics(seconds: Mapping[str, float], tokens: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a step's times: `seconds/<phase>`, `seconds/step`, `tokens_per_s/<phase>`.

    Args:
        seconds: seconds by phase, already reduced over the ranks (their maximum).
        tokens: tokens by phase, already summed over the ranks.
    """
    metrics = {SECONDS + name: value for name, value in seconds.items()}
    metrics[STEP_SECONDS] = sum(seconds.values())
    for name, count in tokens.items():
        if seconds.get(name, 0.0) > 0:
            metrics[TOKENS_PER_S + name] = count / seconds[name]
    return metrics


def take_peak_memory(device: torch.device) -> int:
    """Peak bytes of this rank: allocated on a CUDA device since the last call, or else resident in
    host memory (RSS) since the process began.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage's ru_maxrss survives exec, so a small rank would show its launcher's peak
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on every platform, unlike this module

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
