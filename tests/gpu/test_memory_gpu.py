"""Moving parts on CUDA: streams, pinned arenas, what the allocator really has. Needs one GPU."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from spmdrl.memory.arena import HostArena
from spmdrl.memory.device_parts import DeviceParts
from spmdrl.memory.mover import STAGING_BYTES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

MB = 1 << 20
ROLES = ("policy", "reference", "reward", "value")


@pytest.fixture
def device() -> torch.device:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.device("cuda", torch.cuda.current_device())


def bits(device: torch.device, count: int, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator, device=device).int()


def allocated() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def slowly(tensor: Tensor) -> None:
    """Write the tensor at the end of some 50 ms of work that the host does not wait for."""
    torch.cuda._sleep(100_000_000)
    tensor.add_(1)


def test_an_arena_is_pinned_as_large_as_asked_and_freed_with_its_owner(device):
    size = 96 * MB + 4096
    for _ in range(3):  # pinning the same pages again would be an error
        arena = HostArena(size, pinned=True)
        assert arena.bytes.is_pinned() and arena.bytes[4097:].is_pinned()
        assert arena.bytes.nbytes == size
        arena.bytes.fill_(3)
        assert int(arena.bytes.to(device, non_blocking=True).sum()) == 3 * size
        del arena


def test_content_survives_and_memory_is_really_free(device):
    sizes = [3 * MB, 7, 100_000, 1, 20 * MB, 5, *([1000] * 300), 200_000]
    tensors = [bits(device, n, i) for i, n in enumerate(sizes)]
    views = [tensor[len(tensor) // 2 :] for tensor in tensors]
    before = [tensor.cpu() for tensor in tensors]
    memory = DeviceParts(device, staging_bytes=2 * MB)
    start = allocated()
    memory.registry.register("policy", "weights", tensors=[*tensors, *views], residency="host")
    for _ in range(4):
        memory.settle()
        assert allocated() <= start - sum(4 * n for n in sizes) + 2 * MB
        noise = [torch.full((n,), 9, dtype=torch.int32, device=device) for n in sizes]
        del noise
        memory.prepare([("policy", "weights")])
        after = [tensor.cpu() for tensor in tensors]
        assert all(map(torch.equal, after, before))
        halves = [view.cpu() for view in views]
        assert all(torch.equal(h, b[len(b) // 2 :]) for h, b in zip(halves, before, strict=True))
    found = memory.take_metrics()
    assert found["to_host_bytes"] == found["to_device_bytes"] == 4 * 4 * sum(sizes)
    assert found["to_host_gb_per_s"] > 1 and found["to_device_gb_per_s"] > 1


def test_moves_wait_for_the_computation_before_and_hold_up_the_one_after(device):
    weights = [torch.zeros(n, dtype=torch.int32, device=device) for n in (8 * MB, 10, 5000)]
    other = torch.zeros(8 * MB, dtype=torch.int32, device=device)
    memory = DeviceParts(device)
    memory.registry.register("policy", "weights", tensors=weights, residency="host")
    memory.registry.register("reward", "weights", tensors=[other], residency="host")
    for step in range(1, 4):
        memory.prepare([("policy", "weights")])
        for tensor in weights:
            slowly(tensor)
        memory.prepare([("reward", "weights")])  # no synchronisation between
        slowly(other)
        memory.prepare([("policy", "weights")])
        sums = [(tensor == step).all() for tensor in weights]
        assert all(bool(found) for found in sums)
    memory.prepare([("reward", "weights")])
    assert bool((other == 3).all())


def test_the_peak_of_four_roles_is_one_role(device):
    size = 64 * MB
    memory = DeviceParts(device)
    torch.cuda.reset_peak_memory_stats()
    start = allocated()
    held = {}
    for i, role in enumerate(ROLES):
        held[role] = [torch.full((size // 8,), float(i), device=device) for _ in range(2)]
        memory.registry.register(role, "weights", tensors=held[role], residency="host")
        memory.settle()
    for _ in range(3):
        for i, role in enumerate(ROLES):
            memory.prepare([(role, "weights")])
            found = [tensor.mean() for tensor in held[role]]
            assert [value.item() for value in found] == [float(i)] * 2
    peak = torch.cuda.max_memory_allocated() - start
    assert size <= peak <= size + MB + STAGING_BYTES


def test_a_prefetch_runs_beside_the_computation_and_is_waited_for(device):
    size = 256 * MB
    policy = torch.ones(size // 4, device=device)
    reward = torch.full((size // 4,), 2.0, device=device)
    memory = DeviceParts(device, capacity=2 * size)
    memory.registry.register("policy", "weights", tensors=[policy], residency="host")
    memory.registry.register("reward", "weights", tensors=[reward], residency="host", frozen=True)
    memory.settle()
    for _ in range(3):
        memory.prepare([("policy", "weights")])
        assert not memory.prefetch([("reward", "weights")], working_bytes=1)
        assert memory.prefetch([("reward", "weights")])
        slowly(policy)
        memory.prepare([("reward", "weights")])
        found = reward.mean()
        assert found.item() == 2.0
    memory.prepare([("policy", "weights")])
    found = policy.mean()
    assert found.item() == 4.0


def test_graphs_over_kept_parts_replay_while_others_move(device):
    weight = torch.full((1000,), 2.0, device=device)
    moving = torch.zeros(4 * MB, device=device)
    inputs = torch.ones(1000, device=device)
    memory = DeviceParts(device)
    memory.registry.register("rollout", "weights", tensors=[weight], residency="keep")
    memory.registry.register("reward", "weights", tensors=[moving], residency="host")
    captured: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []
    memory.registry.register_droppable(
        "rollout",
        "graphs",
        drop=captured.clear,
        num_bytes=lambda: 0,
        residency="keep",
        holds=[("rollout", "weights")],
    )
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        inputs * weight
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = inputs * weight
    captured.append((graph, outputs))
    for step in range(3):
        memory.prepare([("reward", "weights")])
        moving.add_(1)
        memory.prepare([("rollout", "graphs")])
        weight.fill_(float(step))
        graph.replay()
        assert captured and outputs.tolist() == [float(step)] * 1000
    memory.registry.apply({("rollout", "weights"): "host", ("rollout", "graphs"): "drop"})
    memory.prepare([("reward", "weights")])
    assert captured == []
