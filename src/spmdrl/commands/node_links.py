"""Bus bandwidth of all-reduces within nodes and between them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from spmdrl.distributed.reduce import gather_objects
from spmdrl.world import World

_SIZES = (1 << 20, 1 << 24, 1 << 26)
_REPEATS = 3

FEW_NODES = 8
"""Most nodes that are measured one after the other. Links may be shared, but more nodes would take
longer than a minute, and a run uses all of them at the same time, too."""


def within_nodes(world: World) -> list[float]:
    """GB/s within every node; empty if nodes have one rank."""
    if world.local_size == 1:
        return []
    firsts = range(0, world.size, world.local_size)
    return _measure(world, [tuple(range(a, a + world.local_size)) for a in firsts])


def between_nodes(world: World) -> dict[tuple[int, int], float]:
    """GB/s between the first ranks of neighbours, in a ring; empty for one node."""
    pairs = neighbours(world.size // world.local_size)
    groups = [tuple(sorted(node * world.local_size for node in pair)) for pair in pairs]
    return dict(zip(pairs, _measure(world, groups), strict=True))


def neighbours(count: int) -> list[tuple[int, int]]:
    """Pairs of neighbours among `count` nodes, each pair once: first those that do not meet."""
    if count < 3:
        return [(0, 1)] * (count == 2)
    pairs = [(a, (a + 1) % count) for a in range(count)]
    return [*pairs[0 : count - 1 : 2], *pairs[1 : count - 1 : 2], pairs[-1]]


def _measure(world: World, groups: Sequence[tuple[int, ...]]) -> list[float]:
    """GB/s of every group; groups that share no rank run at the same time if there are many."""
    # made by their members only: with all ranks, many groups would take minutes
    made = {
        number: dist.new_group(list(ranks), use_local_synchronization=True)
        for number, ranks in enumerate(groups)
        if world.rank in ranks
    }
    own: dict[int, float] = {}
    dist.barrier()
    for number, ranks in enumerate(groups):
        if number in made:
            own[number] = _bandwidth(world, made[number], len(ranks))
        if world.size // world.local_size <= FEW_NODES:
            dist.barrier()
    found = gather_objects(own)
    return [max(one[number] for one in found if number in one) for number in range(len(groups))]


def _bandwidth(world: World, group: dist.ProcessGroup, size: int) -> float:
    """Best bus bandwidth of an all-reduce, in GB/s: each byte crosses 2 (n - 1) / n times."""
    best = 0.0
    for num_bytes in _SIZES:
        tensor = torch.zeros(num_bytes // 4, device=world.device)
        dist.all_reduce(tensor, group=group)  # the first call opens the connections
        for _ in range(_REPEATS):
            world.synchronize()
            began = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            world.synchronize()
            seconds = time.perf_counter() - began
            best = max(best, 2 * (size - 1) / size * num_bytes / seconds / 1e9)
    return best
