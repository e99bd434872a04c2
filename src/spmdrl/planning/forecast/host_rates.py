"""The machine of a run that names none: this host, whose rates are measured, or its known GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from spmdrl.models.linear import in_blocks, linear
from spmdrl.planning.forecast.machine import Device, Machine, Shares
from spmdrl.planning.forecast.machines import known_gpus

_SIZE, _ROWS, _WIDTH = 768, 16, 1024
_COPIED = 1 << 24


def measured_host(*, num_nodes: int, devices_per_node: int) -> Machine:
    """Measure this rank's part of the host's cores and memory, in about a tenth of a second.

    All ranks of a node call it at once, since they share these.
    """
    a, b = torch.ones(_SIZE, _SIZE), torch.ones(_SIZE, _SIZE)
    peak = 2 * _SIZE**3 / _fastest(lambda: a @ b)
    few, weight = torch.ones(_ROWS, _WIDTH), torch.ones(_WIDTH, _WIDTH)
    with torch.inference_mode():
        blocked = in_blocks(weight)
        decode = 2 * _ROWS * _WIDTH**2 / _fastest(lambda: linear(few, weight, blocked=blocked))
    values, copy = torch.zeros(_COPIED // 4), torch.zeros(_COPIED // 4)
    memory = 2 * _COPIED / _fastest(lambda: copy.copy_(values))
    small = torch.zeros(8)
    launch = _fastest(lambda: small.add_(1.0), times=20)
    device = Device(
        name=f"this host's CPU, {torch.get_num_threads()} threads a rank",
        kind="cpu",
        flops={"float32": peak, "bfloat16": peak},
        memory_bytes=host_bytes() // devices_per_node,
        memory_rate=memory,
        node_rate=memory / 4,  # gloo copies into and out of a socket
        host_rate=memory,
        watts=100.0,
    )
    return Machine(
        device=device,
        num_nodes=num_nodes,
        devices_per_node=devices_per_node,
        network_rate=1e9,
        copy_rate=memory,
        host_bytes=host_bytes(),
        host_watts=100.0,
        shares=Shares(
            flops={"matmul": 0.7, "decode": min(1.0, decode / peak), "attention": 0.3},
            memory=0.7,
            links={"node": 0.5, "network": 0.5, "host": 0.7, "copy": 0.7},
            message_s={"node": 1e-4, "network": 2e-4, "host": 1e-6, "copy": 1e-6},
            launch_s=2 * launch,
        ),
    )


def known_gpu(device_name: str) -> str | None:
    """The name in `gpus.yaml` of a card as its driver calls it; None if it is not there."""
    given = device_name.lower().replace(" ", "").replace("-", "")
    found = [name for name in known_gpus() if name.split("-")[0] in given]
    sized = [name for name in found if f"{name.partition('-')[2]}gb" in given]
    # the longest: an H200's name has H20's in it
    return max(sized or found, key=lambda name: len(name.split("-")[0]), default=None)


def host_bytes() -> int:
    """Memory of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes() -> int:
    """Memory of this process that is resident now; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def _fastest(work: Callable[[], object], times: int = 4) -> float:
    work()
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best
