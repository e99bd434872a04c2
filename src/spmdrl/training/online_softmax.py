"""Sums of a softmax that is computed part by part: Milakov & Gimelshein 2018,
https://arxiv.org/abs/1805.02867, algorithm 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def add_sums(total: Sequence[Tensor], part: Sequence[Tensor]) -> None:
    """Add the sums of a tile, of which each is relative to its own peak, in place."""
    peak, mass, product, target = total
    new_peak = torch.maximum(peak, part[0])
    move_peak(mass, product, peak, new_peak)
    move_peak(part[1], part[2], part[0], new_peak)
    for own, other in zip((mass, product, target), part[1:], strict=True):
        own.add_(other)
    peak.copy_(new_peak)


def move_peak(mass: Tensor, product: Tensor, old: Tensor, new: Tensor) -> None:
    """Rescale sums relative to the peak `old` to the peak `new`, in place."""
    factor = (old - new).exp_()
    # Where the old peak is -inf nothing has been summed yet: use 0 there, not 0 * inf.
    shift = (old - new).masked_fill_(old == float("-inf"), 0)
    product.addcmul_(mass, shift).mul_(factor)
    mass.mul_(factor)


def combine_sums(
    peak: Tensor, mass: Tensor, product: Tensor, target: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Combine the sums over all ranks' parts of the vocabulary."""
    top = peak.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    move_peak(mass, product, peak, top)
    sums = torch.stack((mass, product, target))
    dist.all_reduce(sums, group=group)
    return top, sums[0], sums[1], sums[2]
