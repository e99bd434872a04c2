"""Log-probabilities and entropy of chosen tokens, without the logits of all tokens at once.

The head's product is computed in tiles of [tokens, vocabulary], small enough for a CPU's caches,
with an online softmax over the vocabulary; the backward computes the tiles again. Passes over a
tile beside its product: maximum, exp, sum, dot in the forward; exp and two updates in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from spmdrl.distributed.parallel import Parallel, copy_to
from spmdrl.models.linear import product

CPU_TILE = 1 << 20
"""Logits in one tile on a CPU: 4 MB in float32. Other devices take the whole vocabulary."""


def token_logprobs(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V_local, D], rows of the head; this rank's part of the vocabulary
    targets: Tensor,  # [N] int64 token ids
    *,
    temperature: float,
    chunk: int,
    tp: Parallel | None = None,
    first_id: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden weight^T / temperature) at the targets, and the softmax's entropy.

    Products are computed in the weight's dtype, all else in float32 (float64 for float64 weights).
    Differentiable in hidden and weight, for both results.

    Args:
        chunk: tokens of logits held at once.
        tp: with a group, `weight` holds the rows of rank `tp.rank` and the results are the same on
            all ranks; the gradient of `hidden` is summed over them.
        first_id: the token of the weight's first row; default: all ranks have equally many rows.
            A rank may have none.

    Returns:
        logprobs [N] and entropy [N] in nats, float32 (or float64).
    """
    tp = Parallel() if tp is None else tp
    hidden = copy_to(hidden, tp.group)
    local = targets - (tp.rank * weight.shape[0] if first_id is None else first_id)
    logprobs, entropy = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, local, 1.0 / temperature, chunk, tp
    )
    return logprobs, entropy


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        local: Tensor,
        scale: float,
        chunk: int,
        tp: Parallel,
    ) -> tuple[Tensor, Tensor]:
        peak, mass, product, target = _reduce(hidden, weight, local, scale, chunk)
        if tp.group is not None:
            peak, mass, product, target = _combine(peak, mass, product, target, tp.group)
        log_mass = mass.log()
        # H = log Z - E[logit]; both relative to the peak, so that no large terms cancel.
        entropy = log_mass - product / mass
        normaliser = log_mass + peak
        ctx.save_for_backward(hidden, weight, local, normaliser, entropy)
        ctx.scale, ctx.chunk = scale, chunk
        ctx.set_materialize_grads(False)
        return target - normaliser, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, local, normaliser, entropy = ctx.saved_tensors
        if d_logprobs is None:
            d_logprobs = torch.zeros_like(normaliser)
        wide = normaliser.dtype
        # Chunks are summed in float32 also for bfloat16 weights: a chunk's share may be small.
        d_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        for tile in _tiles(hidden, weight, ctx.scale, ctx.chunk):
            rows, g = tile.rows, d_logprobs[tile.rows, None]
            factors = tile.logits.sub_(normaliser[rows, None])
            if d_entropy is None:
                # d/dz_v = -g p_v: the factor g is put on the small operands instead.
                factors.exp_()
                _add_product(d_hidden[rows], factors, weight[tile.columns], -g)
                _add_product(d_weight[tile.columns], factors.t(), tile.hidden * -g)
                continue
            # d/dz_v = -p_v (g + d_entropy (log p_v + H))
            p = factors.exp()
            factors.add_(entropy[rows, None]).mul_(-d_entropy[rows, None]).sub_(g).mul_(p)
            _add_product(d_hidden[rows], factors, weight[tile.columns])
            _add_product(d_weight[tile.columns], factors.t(), tile.hidden)
        _add_targets(d_hidden, d_weight, hidden, weight, local, d_logprobs, ctx.scale)
        d_hidden.mul_(ctx.scale)
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), None, None, None, None


def cpu_tile(chunk: int) -> int:
    """Logits in one tile of `chunk` tokens on a CPU: no fewer than 256 columns."""
    return max(256 * chunk, CPU_TILE)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tile:
    """Logits of some rows and some of this rank's vocabulary."""

    rows: slice
    columns: slice
    logits: Tensor
    hidden: Tensor  # [rows, D], divided by the temperature, in the weight's dtype


def _tiles(hidden: Tensor, weight: Tensor, scale: float, chunk: int) -> Iterator[_Tile]:
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    chunk = max(1, min(chunk, num_rows))
    width = vocab if weight.device.type != "cpu" else min(vocab, cpu_tile(chunk) // chunk)
    width = max(1, width)
    wide = torch.promote_types(weight.dtype, torch.float32)
    for start in range(0, num_rows, chunk):
        rows = slice(start, min(start + chunk, num_rows))
        scaled = (hidden[rows] * scale).to(weight.dtype)
        for first in range(0, vocab, width):
            columns = slice(first, min(first + width, vocab))
            logits = product(scaled, weight[columns])
            yield _Tile(rows=rows, columns=columns, logits=logits.to(wide), hidden=scaled)


def _reduce(
    hidden: Tensor, weight: Tensor, local: Tensor, scale: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over this rank's vocabulary, each [N]: peak = max z, sum exp(z - peak),
    sum exp(z - peak) (z - peak), and the target's logit (0 where it is another rank's).
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    peak, mass, product, target = (
        torch.zeros(hidden.shape[0], dtype=wide, device=hidden.device) for _ in range(4)
    )
    peak.fill_(float("-inf"))
    for tile in _tiles(hidden, weight, scale, chunk):
        rows = tile.rows
        place = local[rows] - tile.columns.start
        inside = (place >= 0) & (place < tile.logits.shape[1])
        found = tile.logits.gather(1, place.masked_fill(~inside, 0)[:, None])[:, 0]
        target[rows] += found.masked_fill_(~inside, 0)
        new_peak = torch.maximum(peak[rows], tile.logits.amax(1))
        # Online softmax (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867, alg. 3).
        _move_peak(mass[rows], product[rows], peak[rows], new_peak)
        below = tile.logits.sub_(new_peak[:, None])
        weights = below.exp()
        mass[rows] += weights.sum(1)
        product[rows] += torch.linalg.vecdot(weights, below)
        peak[rows] = new_peak
    return peak, mass, product, target


def _move_peak(mass: Tensor, product: Tensor, old: Tensor, new: Tensor) -> None:
    """Rescale sums relative to the peak `old` to the peak `new`, in place."""
    factor = (old - new).exp_()
    # Nothing has been summed where the old peak is -inf: 0 there, not 0 * inf.
    shift = (old - new).masked_fill_(old == float("-inf"), 0)
    product.addcmul_(mass, shift).mul_(factor)
    mass.mul_(factor)


def _combine(
    peak: Tensor, mass: Tensor, product: Tensor, target: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums over all ranks' parts of the vocabulary."""
    top = peak.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    _move_peak(mass, product, peak, top)
    sums = torch.stack((mass, product, target))
    dist.all_reduce(sums, group=group)
    return top, sums[0], sums[1], sums[2]


def _add_product(total: Tensor, a: Tensor, b: Tensor, row_scale: Tensor | None = None) -> None:
    """total += row_scale * (a b), the product in b's dtype."""
    part = product(a.to(b.dtype), b.t())
    if row_scale is None:
        total.add_(part)
    else:
        total.addcmul_(part.to(total.dtype), row_scale)


def _add_targets(
    d_hidden: Tensor,
    d_weight: Tensor,
    hidden: Tensor,
    weight: Tensor,
    local: Tensor,
    d_logprobs: Tensor,
    scale: float,
) -> None:
    """The gradient through the targets' own logits: of hidden (before its scale) and weight."""
    held = ((local >= 0) & (local < weight.shape[0])).nonzero().flatten()
    rows, g = local[held], d_logprobs[held, None]
    d_hidden.index_add_(0, held, weight[rows].to(g.dtype) * g)
    d_weight.index_add_(0, rows, hidden[held].to(g.dtype) * (g * scale))
