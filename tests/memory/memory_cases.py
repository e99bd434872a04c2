"""Tensors, what of them is resident, and what a memory has moved."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spmdrl.memory.device_parts import DeviceParts
from spmdrl.memory.storages import is_resident, live_bytes

CPU = torch.device("cpu")
ROLES = ("policy", "reference", "reward", "value")


def values(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def watch(*tensors: Tensor) -> Callable[[], list[bool]]:
    """Which are resident. As a closure: pytest prints the arguments of what an assertion calls, and
    printing a freed tensor reads memory that is not there.
    """
    return lambda: [is_resident(tensor) for tensor in tensors]


def weigh(*tensors: Tensor) -> Callable[[], int]:
    """Their bytes that live, see `watch`."""
    return lambda: live_bytes(tensors)


def moved(memory: DeviceParts) -> tuple[int, int]:
    """(bytes to the host, bytes to the device) since the last call."""
    found = memory.take_metrics()
    return int(found["to_host_bytes"]), int(found["to_device_bytes"])
