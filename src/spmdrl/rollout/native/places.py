"""Cells of the key-value cache that a step writes to.

A cell holds the key and the value of one token: its number is that of its block times the block
size, and its place in the block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl.rollout.native.step_plan import StepPlan


def decode_indices(
    plan: StepPlan, block_size: int, *, pad_to: int = 0, idle: int = 0
) -> list[Tensor]:
    """Build on the host the positions of a plan's decodes, int64 [n], their cells, int64 [n], and
    their blocks, int32 [n, W].

    Args:
        pad_to: pad to this many rows, which write to the block `idle`.
    """
    held = [s.blocks[: -(-s.cached // block_size)] for s in plan.decodes]
    positions = [s.cached - 1 for s in plan.decodes]
    held += [[idle]] * (pad_to - len(held))
    positions += [0] * (pad_to - len(positions))
    cells = [
        blocks[i // block_size] * block_size + i % block_size
        for blocks, i in zip(held, positions, strict=True)
    ]
    width = max(map(len, held), default=0)
    table = [blocks + [0] * (width - len(blocks)) for blocks in held]
    return [
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor(cells, dtype=torch.int64),
        torch.tensor(table, dtype=torch.int32).view(len(held), width),
    ]


def chunk_cells(plan: StepPlan, block_size: int) -> Tensor:
    """Build on the host the cells of the tokens of a plan's chunks, int64 [T]."""
    cells = [
        chunk.sample.blocks[i // block_size] * block_size + i % block_size
        for chunk in plan.chunks
        for i in range(chunk.start, chunk.stop)
    ]
    return torch.tensor(cells, dtype=torch.int64)
