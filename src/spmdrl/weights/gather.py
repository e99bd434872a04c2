"""Whole tensors on one rank, one after the other, from any layout, for Hugging Face exports."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.models.local_shards import LocalTensors, WeightLayout
from spmdrl.models.sharding import Slice
from spmdrl.weights.layout import key, local_box


@torch.no_grad()
def full_tensors(
    source: WeightLayout, tensors: LocalTensors | None, *, to_rank: int = 0
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield every global tensor in turn on `to_rank` (None elsewhere), assembled on the host.

    All ranks of the world iterate together. At most one whole tensor is in memory at a time.
    """
    rank = dist.get_rank()
    table = tensors or {}
    by_name: dict[str, list[tuple[int, str, Slice]]] = {}
    seen: set[Slice] = set()
    # the receiving rank's own slices first: they need no message
    for holder in sorted(source, key=lambda r: (r != to_rank, r)):
        for local_name, held in source[holder].items():
            for piece in held.slices:
                if key(piece) not in seen:
                    seen.add(key(piece))
                    by_name.setdefault(piece.name, []).append((holder, local_name, piece))
    for name, pieces in by_name.items():
        whole, filled = None, 0
        for holder, local_name, piece in pieces:
            box = local_box(table[local_name][0], piece).cpu() if rank == holder else None
            if box is not None and rank != to_rank:
                dist.send(box.contiguous(), dst=to_rank)
            if rank != to_rank:
                continue
            if box is None:
                box = torch.empty(piece.size, dtype=source[holder][local_name].dtype)
                dist.recv(box, src=holder)
            if whole is None:
                whole = torch.empty(piece.shape, dtype=box.dtype)
            whole[tuple(slice(a, b) for a, b in zip(piece.start, piece.stop, strict=True))] = box
            filled += piece.numel
        assert whole is None or filled == whole.numel(), (name, filled, whole.shape)
        yield name, whole
