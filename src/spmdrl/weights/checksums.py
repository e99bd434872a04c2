"""Proof of a sync: checksums of every cell, on the rank that served it and on its receivers.

The checksums take the routes of the cells, 8 bytes instead of each. Shared tensors are one storage
and need none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.distributed.reduce import gather_objects
from spmdrl.weights.cells import Cell
from spmdrl.weights.rank_rounds import Message, RankRound
from spmdrl.weights.sync import WeightSync
from spmdrl.weights.views import TensorViews

_BLOCK = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Values summed at a time: on the CPU as many as fit the cache, on CUDA few kernels."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(values: Tensor) -> int:
    """Sum of all values' bits, each times an odd weight given by its position, modulo 2^64.

    Any one changed value changes it, and swapping two values of up to 4 bytes in a block does too.
    """
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    flat = values.reshape(-1).view(_BITS[values.element_size()])
    size = _BLOCK[values.device.type]
    weights = torch.arange(1, 2 * min(size, max(1, flat.numel())), 2, device=values.device)
    for number, start in enumerate(range(0, flat.numel(), size)):
        block = flat[start : start + size].to(torch.int64)
        # blocks differ in an odd factor: a block in the place of another is noticed
        total += (block * weights[: block.numel()]).sum() * (2 * number + 1)
    return int(total)


def first_difference(sync: WeightSync) -> str | None:
    """The first tensor, in the plan's order, that some engine does not hold as the trainer does.

    Every rank of the world calls it, after a `run`, while source and target are still resident as
    in the sync. Returns the same text on every rank: the tensor, and the box and rank that differ.
    """
    order = {name: i for i, name in enumerate(dict.fromkeys(n for n, _, _ in sync.plan.cells()))}
    found: list[tuple[int, str]] = []
    for one in (*sync.frozen_rounds, *sync.rounds):
        for (name, cell), there, here in _compare(sync, one):
            if there != here:
                box = ", ".join(f"{a}:{b}" for a, b in zip(cell.start, cell.stop, strict=True))
                text = f"{name}[{box}] on rank {sync.rank} is not what the policy holds"
                found.append((order[name], text))
    sync.views.forget()
    reports = gather_objects(min(found) if found else None)
    differing = sorted(report for report in reports if report is not None)
    return differing[0][1] if differing else None


@torch.no_grad()
def _compare(sync: WeightSync, one: RankRound) -> list[tuple[tuple[str, Cell], int, int]]:
    """(cell, checksum at its server, checksum here) for all cells that this rank gets or copies."""
    views, results = sync.views, []
    known: dict[tuple[str, Cell], int] = {}
    for item in one.copies:
        results += [(item, _at_source(views, item), c) for c in _at_target(views, item)]
    ops, arriving = [], []
    for message in one.sends:
        vector = _vector(sync, message, known)
        ops.append(dist.P2POp(dist.isend, vector, message.peer, tag=message.tag))
    for message in one.receives:
        vector = torch.empty(len(message.cells), dtype=torch.int64, device=sync.device)
        ops.append(dist.P2POp(dist.irecv, vector, message.peer, tag=message.tag))
        arriving.append((message, vector))
    for work in dist.batch_isend_irecv(ops) if ops else []:
        work.wait()
    for message, vector in arriving:
        known.update(zip(message.cells, vector.tolist(), strict=True))
    received = dict(known)
    for message in one.casts:
        assert message.group is not None
        is_root = message.peer == sync.rank
        vector = torch.empty(len(message.cells), dtype=torch.int64, device=sync.device)
        if is_root:
            vector = _vector(sync, message, received)
        dist.broadcast(vector, src=message.peer, group=sync.groups[message.group])
        if not is_root:
            known.update(zip(message.cells, vector.tolist(), strict=True))
    for item, there in known.items():
        results += [(item, there, here) for here in _at_target(views, item)]
    return results


def _vector(sync: WeightSync, message: Message, received: Mapping[tuple[str, Cell], int]) -> Tensor:
    """The checksums of a message's cells: the source's, or those that this rank has received."""
    sums = [
        received[item] if item in received else _at_source(sync.views, item)
        for item in message.cells
    ]
    return torch.tensor(sums, dtype=torch.int64, device=sync.device)


def _at_source(views: TensorViews, item: tuple[str, Cell]) -> int:
    name, cell = item
    value = views.source(name, cell)
    assert value is not None, item
    return checksum(value.to(cell.dtype))


def _at_target(views: TensorViews, item: tuple[str, Cell]) -> list[int]:
    name, cell = item
    # a target of higher precision than the message holds the value that was sent
    return [checksum(view.to(cell.dtype)) for view in views.target(name, cell)]
