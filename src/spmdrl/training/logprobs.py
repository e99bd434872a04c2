"""Log-probabilities and entropy of chosen tokens, without the logits of all tokens at once.

The head's product is computed in tiles of [tokens, vocabulary], small enough for a CPU's caches,
with an online softmax over the vocabulary; the backward recomputes the tiles. Besides its product a
tile takes passes for maximum, exp, sum, dot (forward), or for exp and two updates (backward); by
Triton's kernels on a GPU one each.
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
from spmdrl.models.gradient_sums import GradientSum
from spmdrl.models.kernels import gpu
from spmdrl.models.linear import add_product, wide_linear, wide_product
from spmdrl.models.softcap import cap_logits, cap_slope
from spmdrl.training.online_softmax import add_sums, combine_sums, move_peak
from spmdrl.training.support import Support, add_support_gradients, support_logits

CPU_TILE = 1 << 20
"""Logits in one tile on a CPU: 4 MB in float32. Tiles span the vocabulary on other devices."""

_NOBODY = -(1 << 62)
"""Mark that stands for a token's row of the head where there is no token."""


def token_logprobs(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V_local, D], rows of the head; this rank's part of the vocabulary
    targets: Tensor,  # [N] int64 token ids
    *,
    temperature: float,
    chunk: int,
    tp: Parallel | None = None,
    first_id: int | None = None,
    support: Support | None = None,
    with_entropy: bool = True,
    softcap: float | None = None,
    gradient_sum: GradientSum | None = None,
) -> tuple[Tensor, ...]:
    """Compute log softmax(hidden weight^T / temperature) at the targets, and the softmax's entropy.

    Factors of products have the weight's dtype, all else is in float32 (float64 for float64
    weights); on CPUs products too have the weight's dtype.
    The temperature divides logits, as an engine's sampler does; dividing hidden states would round
    them again. Both results are differentiable in hidden and weight.

    Args:
        chunk: tokens whose logits are held at once.
        tp: with a group, `weight` holds the rows of rank `tp.rank` and the results are the same on
            all ranks; the gradient of `hidden` is summed over them.
        first_id: token id of the weight's first row; by default all ranks have equally many rows.
            A rank may have none.
        support: places whose log-probability is that of a softmax over only some tokens. The
            entropy is always that of the whole vocabulary.
        with_entropy: whether to compute the entropy too.
        softcap: c in c tanh(z / c), which replaces each logit z before the temperature divides it;
            None: none.
        gradient_sum: takes the weight's gradient, unrounded, in place of autograd.

    Returns:
        logprobs [N] and, if wanted, entropy [N] in nats, float32 (or float64).
    """
    tp = Parallel() if tp is None else tp
    hidden = copy_to(hidden, tp.group)
    first = tp.rank * weight.shape[0] if first_id is None else first_id
    rows = ids = at_target = None
    if support is not None:
        rows, at_target = support.rows, support.ids == targets[support.rows, None]
        ids = (support.ids - first).masked_fill_(support.ids < 0, _NOBODY)
    logprobs, entropy = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        *(hidden, weight, targets - first, rows, ids, at_target),
        *(1.0 / temperature, chunk, tp, with_entropy, softcap, gradient_sum),
    )
    return (logprobs, entropy) if with_entropy else (logprobs,)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        local: Tensor,
        rows: Tensor | None,  # [M] rows of the support
        ids: Tensor | None,  # [M, K] its ids as rows of the weight
        at_target: Tensor | None,  # [M, K] bool, which of them are the targets
        scale: float,
        chunk: int,
        tp: Parallel,
        with_entropy: bool,
        softcap: float | None,
        gradient_sum: GradientSum | None,
    ) -> tuple[Tensor, Tensor | None]:
        peak, mass, product, target = _reduce(
            *(hidden, weight, local, scale, chunk, with_entropy, softcap)
        )
        if tp.group is not None:
            peak, mass, product, target = combine_sums(peak, mass, product, target, tp.group)
        log_mass = mass.log()
        # H = log Z - E[logit]; both relative to the peak, so that no large terms cancel.
        entropy = log_mass - product / mass if with_entropy else None
        normaliser = log_mass + peak
        logprobs = target - normaliser
        chances = own_slopes = None
        slopes = None if softcap is None else cap_slope(target, softcap * scale)
        if rows is not None:
            assert ids is not None and at_target is not None
            logits = support_logits(hidden[rows], weight, ids, scale, chunk, softcap)
            if tp.group is not None:
                dist.all_reduce(logits, group=tp.group)
            own_slopes = None if softcap is None else cap_slope(logits, softcap * scale)
            below = logits.masked_fill_(ids == _NOBODY, float("-inf")).log_softmax(1)
            logprobs[rows] = below.masked_fill(~at_target, 0).sum(1)
            chances = below.exp_()
        ctx.save_for_backward(
            *(hidden, weight, local, normaliser, entropy, slopes),
            *(rows, ids, at_target, chances, own_slopes),
        )
        ctx.scale, ctx.chunk, ctx.softcap, ctx.gradient_sum = scale, chunk, softcap, gradient_sum
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, local, normaliser, entropy, slopes, *of_support = ctx.saved_tensors
        rows, ids, at_target, chances, own_slopes = of_support
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        wide, device = normaliser.dtype, hidden.device
        # Chunks are summed in float32 even for bfloat16 weights: a chunk's share may be small.
        total = ctx.gradient_sum or GradientSum()
        # The logits are the products times `scale`, and so are their gradients.
        g = torch.zeros_like(normaliser) if d_logprobs is None else d_logprobs * ctx.scale
        if rows is None and ctx.softcap is None and gpu.serves(weight):
            of_entropy = None if d_entropy is None else (entropy, d_entropy * ctx.scale)
            d_hidden = _fused_gradients(
                *(hidden, weight, local, normaliser, g, of_entropy, ctx.scale, ctx.chunk),
                total if for_weight else None,
                for_hidden=for_hidden,
            )
            return d_hidden, _gradient_of(weight, for_weight, total, ctx), *(None,) * 10
        d_hidden = torch.zeros(hidden.shape, dtype=wide, device=device) if for_hidden else None
        d_weight = total.start(weight) if for_weight else None
        if rows is not None and d_logprobs is not None:
            d_logits = (at_target.to(wide) - chances) * g[rows, None]
            if own_slopes is not None:
                d_logits *= own_slopes
            own = _rows_of(d_hidden, rows)
            add_support_gradients(own, d_weight, hidden[rows], weight, ids, d_logits, ctx.chunk)
            _put_rows(d_hidden, rows, own)
            g = g.index_fill(0, rows, 0)
        at_targets = g if slopes is None else g * slopes
        terms, d_h = (local, normaliser, entropy, g, at_targets), d_hidden
        others: Tensor | None = None
        if d_entropy is not None:
            d_entropy = d_entropy * ctx.scale
        elif rows is not None:
            # without the entropy's gradient only the other rows need the softmax over all tokens
            is_other = torch.ones_like(local, dtype=torch.bool).index_fill_(0, rows, False)
            others = is_other.nonzero().flatten()
            hidden, d_h = hidden[others], _rows_of(d_hidden, others)
            terms = (local[others], normaliser[others], None, g[others], at_targets[others])
        local, normaliser, entropy, g, at_targets = terms
        softmax = (normaliser, entropy, g, d_entropy, ctx.scale, ctx.chunk, ctx.softcap)
        _add_gradients(d_h, d_weight, hidden, weight, *softmax)
        _add_target_gradients(d_h, d_weight, hidden, weight, local, at_targets)
        if others is not None:
            _put_rows(d_hidden, others, d_h)
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            _gradient_of(weight, for_weight, total, ctx),
            *(None,) * 10,
        )


def _gradient_of(weight: Tensor, is_wanted: bool, total: GradientSum, ctx: Any) -> Tensor | None:
    """Return the weight's gradient for autograd; None if its own sum has taken it."""
    if not is_wanted or total is ctx.gradient_sum:
        return None
    return total.start(weight).to(weight.dtype)


def _fused_gradients(
    hidden: Tensor,
    weight: Tensor,
    local: Tensor,
    normaliser: Tensor,
    g: Tensor,  # [N] the gradient of the log-probabilities, times `scale`
    of_entropy: tuple[Tensor, Tensor] | None,  # the entropy, and its gradient times `scale`
    scale: float,
    chunk: int,
    d_weight: GradientSum | None,
    *,
    for_hidden: bool,
) -> Tensor | None:
    """Add the weight's gradient, and return that of the hidden states. Each tile's logits are
    passed over once, in addition to its products.
    """
    d_hidden = torch.empty_like(hidden) if for_hidden else None
    for tile in _tiles(hidden, weight, chunk, None):
        rows = tile.rows
        assert tile.columns == slice(0, len(weight)), "a gradient would be rounded tile by tile"
        own = None if of_entropy is None else (of_entropy[0][rows], of_entropy[1][rows])
        factors = gpu.logit_factors(
            *(tile.logits, local[rows], normaliser[rows], g[rows], own, scale, weight.dtype)
        )
        if d_hidden is not None:
            d_hidden[rows] = wide_product(factors, weight.t())
        if d_weight is not None:
            d_weight.add_product(factors.t(), tile.hidden.t())
    return d_hidden


def _rows_of(total: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if total is None else total[rows]


def _put_rows(total: Tensor | None, rows: Tensor, values: Tensor | None) -> None:
    if total is not None and values is not None:
        total[rows] = values


def _add_gradients(
    d_hidden: Tensor | None,  # [N, D], added to
    d_weight: Tensor | None,  # [V_local, D], added to
    hidden: Tensor,
    weight: Tensor,
    normaliser: Tensor,
    entropy: Tensor | None,  # None only if its gradient is
    g: Tensor,  # [N] the gradient of the log-probabilities, times `scale`
    d_entropy: Tensor | None,  # [N] likewise
    scale: float,
    chunk: int,
    softcap: float | None,
) -> None:
    """Add the gradients through the softmax over all tokens."""
    for tile in _tiles(hidden, weight, chunk, softcap):
        rows = tile.rows
        # d/dz_v = -g p_v: the factor g is put on the small operands instead.
        minus = -g[rows, None] if d_entropy is None else None
        of_entropy = None
        if d_entropy is not None:
            assert entropy is not None
            of_entropy = entropy[rows], g[rows], d_entropy[rows]
        slope = None if softcap is None else cap_slope(tile.logits, softcap)
        factors = _factors(tile.logits, normaliser[rows], of_entropy, scale)
        narrow = (factors if slope is None else factors.mul_(slope)).to(weight.dtype)
        _add_products(d_hidden, d_weight, tile, weight, narrow, minus)


def _factors(
    logits: Tensor,  # [N, K], overwritten
    normaliser: Tensor,  # [N]
    of_entropy: tuple[Tensor, Tensor, Tensor] | None,  # [N] each
    scale: float,
) -> Tensor:  # [N, K]
    """Compute p, or with the entropy's gradient -p (g + d_entropy (log p + entropy))."""
    factors = _scaled_below(logits, normaliser, scale)
    if of_entropy is None:
        return factors.exp_()
    # d/dz_v = -p_v (g + d_entropy (log p_v + H))
    entropy, g, d_entropy = of_entropy
    p = factors.exp()
    return factors.add_(entropy[:, None]).mul_(-d_entropy[:, None]).sub_(g[:, None]).mul_(p)


def _add_products(
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    tile: _Tile,
    weight: Tensor,
    factors: Tensor,  # [rows, columns], in the weight's dtype
    minus: Tensor | None,  # [rows, 1], a factor of every row that is put on the small operands
) -> None:
    """Add a tile's products, summed in float32 and not rounded before that."""
    rows, columns = tile.rows, tile.columns
    if d_hidden is not None and minus is None:
        add_product(d_hidden[rows], factors, weight[columns].t())
    elif d_hidden is not None and minus is not None:
        d_hidden[rows].addcmul_(wide_product(factors, weight[columns].t()), minus)
    if d_weight is not None:
        own = tile.hidden if minus is None else (tile.hidden * minus).to(weight.dtype)
        add_product(d_weight[columns], factors.t(), own.t())


def _add_target_gradients(
    d_hidden: Tensor | None,  # [N, D], added to
    d_weight: Tensor | None,  # [V_local, D], added to
    hidden: Tensor,
    weight: Tensor,
    local: Tensor,
    g: Tensor,  # [N] the gradient of the targets' products
) -> None:
    """Add the gradients through the targets' own logits.

    Those of other ranks count as 0, since to leave them out the host would wait for their number.
    """
    if not len(weight):
        return
    places = local.remainder(len(weight))
    g = g.masked_fill(places != local, 0)[:, None]
    if d_hidden is not None:
        d_hidden.add_(weight[places].to(g.dtype) * g)
    if d_weight is not None:
        d_weight.index_add_(0, places, hidden.to(g.dtype) * g)


def cpu_tile(chunk: int) -> int:
    """Return the logits in one tile of `chunk` tokens on a CPU: it has at least 256 columns."""
    return max(256 * chunk, CPU_TILE)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tile:
    """Logits of some rows and some of this rank's vocabulary, capped, before the temperature."""

    rows: slice
    columns: slice
    logits: Tensor
    hidden: Tensor  # [rows, D], in the weight's dtype


def _tiles(hidden: Tensor, weight: Tensor, chunk: int, softcap: float | None) -> Iterator[_Tile]:
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    chunk = max(1, min(chunk, num_rows))
    width = vocab if weight.device.type != "cpu" else min(vocab, cpu_tile(chunk) // chunk)
    width = max(1, width)
    for start in range(0, num_rows, chunk):
        rows = slice(start, min(start + chunk, num_rows))
        own = hidden[rows].to(weight.dtype)
        for first in range(0, vocab, width):
            columns = slice(first, min(first + width, vocab))
            logits = cap_logits(wide_linear(own, weight[columns]), softcap)
            yield _Tile(rows=rows, columns=columns, logits=logits, hidden=own)


def _reduce(
    hidden: Tensor,
    weight: Tensor,
    local: Tensor,
    scale: float,
    chunk: int,
    with_product: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduce this rank's vocabulary to [N] each: peak = max z, sum exp(z - peak),
    sum exp(z - peak) (z - peak) if wanted, and the target's logit (0 if it is another rank's).
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    peak, mass, product, target = (
        torch.zeros(hidden.shape[0], dtype=wide, device=hidden.device) for _ in range(4)
    )
    peak.fill_(float("-inf"))
    for tile in _tiles(hidden, weight, chunk, softcap):
        rows = tile.rows
        place = local[rows] - tile.columns.start
        if softcap is None and gpu.serves(tile.logits):
            part = gpu.reduce_logits(tile.logits, place, scale, with_product=with_product)
            add_sums((peak[rows], mass[rows], product[rows], target[rows]), part)
            continue
        inside = (place >= 0) & (place < tile.logits.shape[1])
        found = tile.logits.gather(1, place.masked_fill(~inside, 0)[:, None])[:, 0]
        target[rows] += found.masked_fill_(~inside, 0).mul_(scale)
        new_peak = torch.maximum(peak[rows], tile.logits.amax(1).mul_(scale))
        move_peak(mass[rows], product[rows], peak[rows], new_peak)
        below = _scaled_below(tile.logits, new_peak, scale)
        weights = below.exp() if with_product else below.exp_()
        mass[rows] += weights.sum(1)
        if with_product:
            product[rows] += torch.linalg.vecdot(weights, below)
        peak[rows] = new_peak
    return peak, mass, product, target


def _scaled_below(logits: Tensor, level: Tensor, scale: float) -> Tensor:  # [N, K], [N]
    """Compute scale * logits - level in place, in one pass whatever the scale."""
    return torch.add(-level[:, None], logits, alpha=scale, out=logits)
