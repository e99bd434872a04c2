"""Accelerators that spmdrl supports: NVIDIA GPUs from compute capability 8.0 on, by the CUDA of
PyPI's torch wheels.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from spmdrl.world import World

CUDA_VERSION = "13.0"
"""CUDA of the wheels on PyPI of torch 2.11 and 2.13, the two that tests run with."""

MIN_CAPABILITY = (8, 0)
"""First compute capability with bfloat16 products and the attention kernels (sm_80, A100)."""


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """The accelerator that torch finds in a process.

    Args:
        kind: torch's device type, such as cuda or mps.
        name: the product's name, empty if torch does not say it.
        capability: compute capability of a CUDA device; None for other kinds.
        cuda, hip: versions of CUDA and ROCm that torch was built for; None: not built for it.
    """

    kind: str
    name: str = ""
    capability: tuple[int, int] | None = None
    cuda: str | None = None
    hip: str | None = None


def find_accelerator(device: torch.device) -> Accelerator | None:
    """Describe `device`, or, where that is the CPU, the accelerator that torch finds besides it."""
    if device.type == "cuda":
        return Accelerator(
            kind="cuda",
            name=torch.cuda.get_device_name(device),
            capability=torch.cuda.get_device_capability(device),
            cuda=torch.version.cuda,
            hip=torch.version.hip,
        )
    if not torch.accelerator.is_available():
        return None
    other = torch.accelerator.current_accelerator()
    return None if other is None else Accelerator(kind=other.type)


def unsupported(found: Accelerator) -> str | None:
    """Say in one line why spmdrl does not support this accelerator; None if it does."""
    supported = "supported are NVIDIA GPUs from compute capability 8.0 on"
    if found.hip is not None:
        return f"torch is built for ROCm {found.hip}, which is not supported: {supported}"
    if found.kind != "cuda":
        return f"torch finds a device of type {found.kind}, which is not used: {supported}"
    if found.capability is not None and found.capability < MIN_CAPABILITY:
        major, minor = found.capability
        return f"{found.name} has compute capability {major}.{minor}: {supported}"
    return None


def untested(found: Accelerator) -> str | None:
    """Say in one line that tests do not run with torch's CUDA version; None if they do."""
    if found.cuda in (None, CUDA_VERSION):
        return None
    return (
        f"torch is built for CUDA {found.cuda}: spmdrl is tested with {CUDA_VERSION}, the CUDA of "
        "PyPI's torch wheels"
    )


def say_hardware(found: Accelerator | None) -> None:
    """Print one line on stderr if the accelerator is not supported, or not tested."""
    text = None if found is None else unsupported(found) or untested(found)
    if text is not None:
        print(f"spmdrl: {text}", file=sys.stderr, flush=True)


def say_world_hardware(world: World, device: str) -> None:
    """Say it on the first rank of each node, unless the configuration's `device` is the CPU."""
    if world.local_rank == 0 and device != "cpu":
        say_hardware(find_accelerator(world.device))
