"""Memory of a step's phases: bytes on the device, and bytes moved for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from spmdrl.distributed.reduce import world_max
from spmdrl.memory.device_parts import DeviceParts
from spmdrl.observe.names import PEAK_MEMORY
from spmdrl.observe.timeline import take_peak_memory

PARTS, DEVICE = "memory/parts_gb/", "memory/device_gb/"  # + phase, 1e9 bytes
MOVED, SPEED = "memory/moved_gb", "memory/gb_per_s"


class PhaseMemory:
    """Reads the parts' meter and the device's peak at both ends of every phase, and charges
    them to the innermost open one.

    Args:
        parts: this rank's parts.
        device: this rank's device.
        take_peak: gives the largest number of bytes since its last call, see `take_peak_memory`.
    """

    def __init__(
        self,
        parts: DeviceParts,
        device: torch.device,
        take_peak: Callable[[torch.device], int] = take_peak_memory,
    ) -> None:
        self._memory, self._device, self._take_peak = parts, device, take_peak
        self._open: list[str] = []
        self._begin_step()
        parts.take_metrics()  # bytes of the start belong to no step
        take_peak(device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the bytes moved inside, and the peak, to `name`."""
        self._charge()
        self._parts.setdefault(name, 0.0)
        self._open.append(name)
        try:
            yield
            self._charge()  # not after an exception: the device may no longer answer
        finally:
            self._open.pop()

    def finish(self) -> dict[str, float]:
        """Metrics since the last `finish`, each the maximum over the ranks; every rank calls it.

        `memory/peak_gb` is the peak in phases and between them, as `take_peak_memory` counts it;
        `memory/parts_gb/<phase>` the peak of parts on the device together; `memory/device_gb/..`
        the peak that torch had allocated on a CUDA device; then `memory/moved_gb` and, if anything
        moved, `memory/gb_per_s`.
        """
        self._charge()
        names = list(self._parts)  # equal on all ranks, since every rank runs every phase
        values = [*self._parts.values(), *(self._peaks.get(name, 0.0) for name in names)]
        values += [self._peak, self._moved, self._seconds]
        most = world_max(torch.tensor(values)).tolist()
        metrics = {PARTS + name: most[i] / 1e9 for i, name in enumerate(names)}
        if self._device.type == "cuda":
            peaks = most[len(names) : 2 * len(names)]
            metrics |= {DEVICE + n: v / 1e9 for n, v in zip(names, peaks, strict=True)}
        peak, moved, seconds = most[-3:]
        metrics |= {PEAK_MEMORY: peak / 1e9, MOVED: moved / 1e9}
        if seconds > 0:
            metrics[SPEED] = moved / seconds / 1e9
        self._begin_step()
        return metrics

    def _begin_step(self) -> None:
        self._parts: dict[str, float] = {}
        self._peaks: dict[str, float] = {}
        self._peak = self._moved = self._seconds = 0.0

    def _charge(self) -> None:
        found, peak = self._memory.take_metrics(), float(self._take_peak(self._device))
        for direction in ("to_host", "to_device"):
            self._moved += found[f"{direction}_bytes"]
            self._seconds += found[f"{direction}_seconds"]
        self._peak = max(self._peak, peak)
        if self._open:
            name = self._open[-1]
            self._parts[name] = max(self._parts[name], found["peak_resident_bytes"])
            self._peaks[name] = max(self._peaks.get(name, 0.0), peak)
