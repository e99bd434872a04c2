"""Which phase a peak is charged to, and what the step's is."""

from __future__ import annotations

import pytest
import torch

from harness import run_ranks
from spmdrl.memory.device_parts import DeviceParts
from spmdrl.run.step_report import PhaseMemory
from spmdrl.world import World


class Allocator:
    """Counts as CUDA's does: a new peak begins at what is allocated."""

    def __init__(self) -> None:
        self.allocated = self.peak = 0

    def hold(self, num_bytes: float) -> None:
        self.allocated = int(num_bytes)
        self.peak = max(self.peak, self.allocated)

    def take(self, device: torch.device) -> int:
        peak, self.peak = self.peak, self.allocated
        return peak


def steps(world: World) -> list[dict[str, float]]:
    allocator = Allocator()
    allocator.hold(9e9)  # at the start, which is no step's
    allocator.hold(0)
    device = torch.device("cuda")
    memory = PhaseMemory(DeviceParts(torch.device("cpu")), device, allocator.take)
    with memory.phase("rollout"):
        allocator.hold((5 + world.rank) * 1e9)
        with memory.phase("sync"):
            allocator.hold(1e9)
        allocator.hold(2e9)
    with memory.phase("update"):
        allocator.hold(3e9)
        allocator.hold(1e9)
    found = [memory.finish()]
    allocator.hold(4e9)  # between phases
    with memory.phase("update"):
        allocator.hold(2e9)
    return [*found, memory.finish(), {"total": memory.total_peak()}]


def test_the_peak_of_a_step_is_the_largest_of_its_phases():
    first, second, end = run_ranks(steps, 2)[0]
    assert first["memory/peak_gb"] == pytest.approx(6), "of rank 1 in its rollout"
    wanted = {"rollout": 6, "sync": 6, "update": 3}
    for name, gigabytes in wanted.items():
        # an inner phase begins with what the outer one has
        assert first[f"memory/device_gb/{name}"] == pytest.approx(gigabytes), name
    assert second["memory/peak_gb"] == pytest.approx(4)
    assert second["memory/device_gb/update"] == pytest.approx(4)
    assert "memory/device_gb/rollout" not in second
    assert end["total"] == 5e9 + 6e9, "the peaks of both ranks, without the start's"
