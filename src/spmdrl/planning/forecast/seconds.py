"""Seconds of `Work` on a `Machine`, and the bound that holds.

Products and memory traffic overlap within a kernel, so the slower of both counts (the roofline of
Williams, Waterman and Patterson, https://doi.org/10.1145/1498765.1498785); a device starts kernels
while others run, so launches count only where they are slower still. Messages between devices take
turns with computation, except for the share that it hides; an exchange with the host is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spmdrl.planning.forecast.machine import Machine
from spmdrl.planning.forecast.work import Work

Bound = Literal["compute", "bandwidth", "latency", "host", "links"]
"""The cause that a call waits for most: products, memory traffic, messages' latency, launches, or
messages' bytes."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Seconds of a call.

    Args:
        seconds: all of it.
        parts: seconds of each bound if it were alone.
    """

    seconds: float
    parts: dict[Bound, float]

    @property
    def bound(self) -> Bound:
        """The bound that takes longest."""
        return max(self.parts, key=lambda bound: self.parts[bound])


def seconds_of(work: Work, machine: Machine, dtype: str) -> Timed:
    """Seconds of one rank's work.

    Args:
        dtype: dtype of the products, a key of `Device.flops`.
    """
    shares, device = machine.shares, machine.device
    parts: dict[Bound, float] = {
        "compute": sum(
            count / (device.flops[dtype] * shares.flops[kind]) for kind, count in work.flops.items()
        ),
        "bandwidth": work.memory_bytes / (device.memory_rate * shares.memory),
        "host": work.launches * shares.launch_s,
        "links": sum(size / machine.link_rate(link) for link, size in work.link_bytes.items()),
        "latency": sum(count * shares.message_s[link] for link, count in work.messages.items()),
    }
    busy = max(parts["compute"], parts["bandwidth"])
    # a CPU does nothing else while it starts a library call
    busy = busy + parts["host"] if device.kind == "cpu" else max(busy, parts["host"])
    waits = parts["links"] + parts["latency"]
    alone = work.link_bytes.get("host", 0.0) / machine.link_rate("host")
    alone += work.messages.get("host", 0.0) * shares.message_s["host"]
    hidden = min(machine.overlap * (waits - alone), busy)
    return Timed(seconds=busy + waits - hidden, parts=parts)
