"""Passes over a tile of float32 logits for log-probabilities: one forward, one backward.

`spmdrl.training.logprobs` computes logits by matrix products, tile by tile, and keeps none. torch
takes seven passes over a tile to reduce it, and up to nine for the gradient's factors. Here each
takes one: an online softmax (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867,
algorithm 3), and the factors from the normaliser. All of it is float32; the factors are rounded
once, to the dtype of the products that they enter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl.models.kernels.cuda.language import kernel, tl

BLOCK = 4096
"""Logits that a program holds at once."""


def reduce_logits(
    logits: Tensor,  # [N, K] float32
    places: Tensor,  # [N] int64, the target's column; one outside of the tile counts as 0
    scale: float,
    *,
    with_product: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N] float32 each
    """Reduce z = scale * logits to its peak, sum e^(z - peak), sum e^(z - peak) (z - peak), and z
    at the target.

    Args:
        with_product: whether to compute the third; else it is 0.
    """
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    rows, width = logits.shape
    assert places.shape == (rows,) and places.dtype == torch.int64 and places.is_contiguous()
    found = torch.empty(4, rows, dtype=torch.float32, device=logits.device)
    if rows:
        reduce_row[(rows,)](
            logits,
            places,
            found,
            logits.stride(0),
            width,
            scale,
            BLOCK=BLOCK,
            WITH_PRODUCT=with_product,
            num_warps=8,
            enable_fp_fusion=True,
        )
    peak, mass, product, target = found.unbind()
    return peak, mass, product, target


def logit_factors(
    logits: Tensor,  # [N, K] float32
    places: Tensor,  # [N] int64, the target's column; one outside of the tile is no target
    normaliser: Tensor,  # [N] float32
    g: Tensor,  # [N] float32
    of_entropy: tuple[Tensor, Tensor] | None,  # [N] float32 each
    scale: float,
    dtype: torch.dtype,
) -> Tensor:  # [N, K] of `dtype`
    """Compute the gradient of each logit's product from log p = scale * logits - normaliser: the
    targets' g, less p (g + d_entropy (log p + entropy)).

    At a likely target g - g p is rounded after the difference, and not p before it.

    Args:
        g: the gradient of the log-probability, times `scale`.
        of_entropy: the entropy, and d_entropy, its gradient times `scale`; None: it has none.
    """
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    assert places.dtype == torch.int64, places
    rows, width = logits.shape
    terms = (places, normaliser, g, *(of_entropy or ()))
    assert all(t.is_contiguous() and len(t) == rows for t in terms)
    found = torch.empty(rows, width, dtype=dtype, device=logits.device)
    if rows and width:
        factor_block[(rows, -(-width // BLOCK))](
            logits,
            places,
            normaliser,
            g,
            *((g, g) if of_entropy is None else of_entropy),
            found,
            logits.stride(0),
            width,
            scale,
            BLOCK=BLOCK,
            WITH_ENTROPY=of_entropy is not None,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return found


@kernel
def reduce_row(
    logits: tl.tensor,
    places: tl.tensor,
    found: tl.tensor,  # [4, N] float32, written: peak, mass, product, target
    row_stride: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
    WITH_PRODUCT: tl.constexpr,
) -> None:
    """Reduce one row, block after block."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(places + row)
    peak = tl.full([], float("-inf"), tl.float32)
    mass, product, target = (
        tl.zeros([], tl.float32),
        tl.zeros([], tl.float32),
        tl.zeros([], tl.float32),
    )
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        own = column < width
        z = tl.load(logits + row * row_stride + column, mask=own, other=float("-inf")) * scale
        now = tl.maximum(peak, tl.max(z, 0))
        level = tl.where(now == float("-inf"), 0.0, now)
        kept = tl.exp(peak - level)
        below = z - level
        weight = tl.exp(below)
        if WITH_PRODUCT:
            # 0 where nothing has weight yet, not 0 * inf
            moved = mass * tl.where(peak == float("-inf"), 0.0, peak - level)
            added = tl.sum(tl.where(weight == 0.0, 0.0, weight * below), 0)
            product = kept * (product + moved) + added
        mass = kept * mass + tl.sum(weight, 0)
        target += tl.sum(tl.where(own & (column == place), z, 0.0), 0)
        peak = now
    rows = tl.num_programs(0)
    tl.store(found + row, peak)
    tl.store(found + rows + row, mass)
    tl.store(found + 2 * rows + row, product)
    tl.store(found + 3 * rows + row, target)


@kernel
def factor_block(
    logits: tl.tensor,
    places: tl.tensor,
    normaliser: tl.tensor,
    g: tl.tensor,
    entropy: tl.tensor,
    d_entropy: tl.tensor,
    found: tl.tensor,  # [N, K], written
    row_stride: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
) -> None:
    """Compute a block of one row's factors."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = column < width
    z = tl.load(logits + row * row_stride + column, mask=own, other=float("-inf")) * scale
    logarithm = z - tl.load(normaliser + row)
    p = tl.exp(logarithm)
    of_target = tl.load(g + row)
    spread = of_target
    if WITH_ENTROPY:
        spread += tl.load(d_entropy + row) * (logarithm + tl.load(entropy + row))
    # a token that is ruled out has no gradient
    factor = tl.where(p == 0.0, 0.0, -p * spread)
    factor += tl.where(column == tl.load(places + row), of_target, 0.0)
    at = found + row * width + column
    tl.store(at, factor.to(found.dtype.element_ty), mask=own)
