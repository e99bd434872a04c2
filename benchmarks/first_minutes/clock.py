"""Timing on the device and on the host."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_TOP = 15


def device_s(function: Callable[[], object], *, repeats: int = 10, warm: int = 3) -> float:
    """Return the median seconds of a call on the device, between two events."""
    for _ in range(warm):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / 1e3)
    return sorted(times)[len(times) // 2]


def wall_s(function: Callable[[], object], *, repeats: int = 1) -> float:
    """Return the least seconds of a call until the device has done its work."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def profiled(function: Callable[[], object]) -> list[tuple[str, int, int]]:
    """Return (kernel, calls, microseconds) of the kernels that take most time in a call."""
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        function()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda entry: -entry.self_device_time_total)
    times = [(e.key[:60], e.count, round(e.self_device_time_total)) for e in found[:_TOP]]
    return [entry for entry in times if entry[2] > 0]
