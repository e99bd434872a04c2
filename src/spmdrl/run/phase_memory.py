"""Memory of a step's phases: bytes on the device, and bytes moved for them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spmdrl.distributed.reduce import world_max
from spmdrl.memory.device_parts import DeviceParts
from spmdrl.observe.names import PEAK_MEMORY
from spmdrl.observe.timeline import PhaseMeter, take_peak_memory

PARTS, DEVICE = "memory/parts_gb/", "memory/device_gb/"  # + phase, 1e9 bytes
MOVED, SPEED = "memory/moved_gb", "memory/gb_per_s"


class PhaseMemory(PhaseMeter):
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
        super().__init__()
        self._memory, self._device, self._take_peak = parts, device, take_peak
        self._begin_step()
        parts.take_metrics()  # bytes of the start belong to no step
        take_peak(device)

    def finish(self) -> dict[str, float]:
        """Metrics since the last `finish`, each the maximum over the ranks; every rank calls it.

        `memory/peak_gb` is the peak in phases and between them, as `take_peak_memory` counts it;
        `memory/parts_gb/<phase>` the peak of parts on the device together; `memory/device_gb/..`
        the peak that torch had allocated on a CUDA device; then `memory/moved_gb` and, if anything
        moved, `memory/gb_per_s`.
        """
        self._charge()
        names = list(self._charged)  # equal on all ranks, since every rank runs every phase
        values = [*self._charged.values(), *(self._peaks.get(name, 0.0) for name in names)]
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
        self._charged = {}  # of parts
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
            self._charged[name] = max(self._charged[name], found["peak_resident_bytes"])
            self._peaks[name] = max(self._peaks.get(name, 0.0), peak)
