"""Places in the key-value cache that decodes write to and read from."""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl.rollout.native.step_plan import StepPlan


def decode_indices(
    plan: StepPlan, block_size: int, *, pad_to: int = 0, idle: int = 0
) -> list[Tensor]:
    """Build on the host the positions of a plan's decodes, int64 [n], and their blocks, int32
    [n, W].

    Args:
        pad_to: pad to this many rows, which write to the block `idle`.
    """
    held = [s.blocks[: -(-s.cached // block_size)] for s in plan.decodes]
    positions = [s.cached - 1 for s in plan.decodes]
    held += [[idle]] * (pad_to - len(held))
    positions += [0] * (pad_to - len(positions))
    width = max(map(len, held), default=0)
    table = [blocks + [0] * (width - len(blocks)) for blocks in held]
    return [
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor(table, dtype=torch.int32).view(len(held), width),
    ]


def places_of(
    positions: Tensor,  # [n] int64
    table: Tensor,  # [n, W] int32
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Find the block and the offset in it of each row's position, int64 [n] each."""
    numbers = torch.div(positions, block_size, rounding_mode="floor")
    blocks = table.gather(1, numbers[:, None])[:, 0].long()
    return blocks, positions - numbers * block_size
