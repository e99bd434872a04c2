"""Drawing of tokens in one pass over the logits, by the noise of `spmdrl.keyed_random`.

The noise of a token is a function of the row's key and the token's id, so every element computes
its own: the same 32 bits as `keyed_random.Noise`, and e = -log(1 - u) within some units in the last
place (CUDA's and a CPU's log1p differ by as much).

A token is argmax(l / T - log e) (Gumbel-max). A program finds the best of a slice of the
vocabulary, its runner-up, and the slice's largest logit and sum of exponentials; a second kernel
combines the slices of a row. Scores are kept relative to the slice's largest logit, so that large
logits keep their differences. Equal scores are ordered by token id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl import keyed_random
from spmdrl.models.kernels.cuda.language import kernel, power_of_2, tl

SLICE = 4096
"""Logits of a program."""

SLICE_WARPS = 16
"""Warps of a slice's program: with 8 of them its registers do not suffice on sm_80."""

_ID_OFFSET = tl.constexpr(keyed_random.ID_OFFSET)
_MURMUR_1 = tl.constexpr(keyed_random.MURMUR_1)
_MURMUR_2 = tl.constexpr(keyed_random.MURMUR_2)
_MULTIPLIER = tl.constexpr(keyed_random.NOISE_MULTIPLIER)
_TINY = tl.constexpr(keyed_random.TINY)
_HUGE = tl.constexpr(keyed_random.HUGE)
_HALF_ROOT = tl.constexpr(0.5**0.5)
_UNIT = tl.constexpr(2.0**-31)
_LN_2 = tl.constexpr(0.6931471805599453)


def draw_tokens(
    logits: Tensor,  # [R, V], unchanged
    keys: Tensor,  # [n] int64
    temperatures: Tensor,  # [n] float32; 0: greedy
    rows: Tensor,  # [n] int32, each draw's row of logits
) -> tuple[Tensor, Tensor, Tensor]:  # [n] int64, [n] float32, [n] float32
    """Draw n tokens: their ids, log-probabilities, and the scores' margins to the next token.

    Launches two kernels and waits for nothing. A greedy row takes its largest logit without noise;
    its log-probability is that of temperature 1, and its margin that of logits. A row whose logits
    hold NaN or +inf, or nothing but -inf, has a log-probability of NaN.
    """
    count, vocabulary = len(keys), logits.shape[1]
    assert logits.stride(1) == 1 and keys.dtype == torch.int64 and keys.is_contiguous()
    assert rows.shape == temperatures.shape == keys.shape, (rows.shape, keys.shape)
    slices = -(-vocabulary // SLICE)
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    logprobs, margins = (
        torch.empty(count, dtype=torch.float32, device=logits.device) for _ in range(2)
    )
    if not count:
        return tokens, logprobs, margins
    found = torch.empty(5, count, slices, dtype=torch.float32, device=logits.device)
    ids = torch.empty(count, slices, dtype=torch.int32, device=logits.device)
    draw_slice[(count, slices)](
        logits,
        keys,
        temperatures,
        rows,
        found,
        ids,
        logits.stride(0),
        vocabulary,
        SLICE=SLICE,
        num_warps=SLICE_WARPS,
        enable_fp_fusion=True,
    )
    combine_slices[(count,)](
        found,
        ids,
        tokens,
        logprobs,
        margins,
        slices,
        WIDE=power_of_2(slices),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return tokens, logprobs, margins


@kernel
def exponential(
    token: tl.tensor,  # [...] int32
    low: tl.tensor,  # the key's low 32 bits, int32
    high: tl.tensor,  # its high 32 bits made odd, int32
) -> tl.tensor:
    """Compute `keyed_random.exponential_at`: Exponential(1) noise of tokens, float32 [...]."""
    x = token.to(tl.uint32) + _ID_OFFSET
    x = (x ^ (x >> 16)) * _MURMUR_1
    x = (x ^ (x >> 13)) * _MURMUR_2
    x = x ^ (x >> 16)
    mixed = (x.to(tl.int32, bitcast=True) ^ low) * high
    mixed = (mixed + (mixed >> 15)) * _MULTIPLIER
    u = tl.abs(mixed.to(tl.float32)) * _UNIT
    return tl.minimum(tl.maximum(negative_log1m(u), _TINY), _HUGE)


@kernel
def negative_log1m(u: tl.tensor) -> tl.tensor:
    """Compute -log(1 - u) of float32 in [0, 1] to some units in the last place; of 1: infinity.

    With 1 - u = 2^-k g and g within [1/sqrt(2), sqrt(2)) it is k log(2) + 2 atanh((1 - g)/(1 + g)).
    For k = 0 the numerator is u itself, so that a small u (the winners') loses nothing to 1 - u.
    """
    rest = 1.0 - u
    bits = rest.to(tl.int32, bitcast=True)
    k = 127 - (bits >> 23)
    g = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # [1, 2)
    above = g >= 2.0 * _HALF_ROOT
    g = tl.where(above, g * 0.5, g)
    k = tl.where(above, k - 1, k)
    s = tl.where(k == 0, u, 1.0 - g) / tl.where(k == 0, 2.0 - u, 1.0 + g)
    z = s * s
    series = 1.0 / 9 + z * (1.0 / 11)
    series = 1.0 / 7 + z * series
    series = 1.0 / 5 + z * series
    series = 1.0 / 3 + z * series
    found = k.to(tl.float32) * _LN_2 + 2.0 * (s + s * z * series)
    return tl.where(rest == 0.0, float("inf"), found)


@kernel
def draw_slice(
    logits: tl.tensor,
    keys: tl.tensor,
    temperatures: tl.tensor,
    rows: tl.tensor,
    found: tl.tensor,  # [5, n, slices] float32, written: largest, sum, best, second, its logit
    ids: tl.tensor,  # [n, slices] int32, written: the best one's token
    row_stride: tl.tensor,
    vocabulary: tl.tensor,
    SLICE: tl.constexpr,
) -> None:
    """Find what `combine_slices` needs of one slice of a row's logits.

    The best and the second score are relative to the slice's largest logit, as is the sum of
    exponentials; the logit is that of the best score, over the temperature.
    """
    draw, part = tl.program_id(0), tl.program_id(1)
    key, temperature = tl.load(keys + draw), tl.load(temperatures + draw)
    row = tl.load(rows + draw).to(tl.int64)
    token = part * SLICE + tl.arange(0, SLICE)
    own = token < vocabulary
    logit = tl.load(logits + row * row_stride + token, mask=own, other=float("-inf"))
    greedy = temperature == 0.0
    # a quotient as torch rounds it
    logit = tl.div_rn(logit.to(tl.float32), tl.where(greedy, 1.0, temperature))
    largest = tl.max(logit, 0)
    lead = logit - tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(lead), 0)
    low, high = key.to(tl.int32), (key >> 32).to(tl.int32) | 1
    score = lead - tl.where(greedy, 0.0, tl.log(exponential(token, low, high)))
    best = tl.max(score, 0)
    chosen = tl.min(tl.where(score == best, token, vocabulary), 0)
    second = tl.max(tl.where(token == chosen, float("-inf"), score), 0)
    value = tl.max(tl.where(token == chosen, logit, float("-inf")), 0)
    slices = tl.num_programs(1)
    at, size = draw * slices + part, tl.num_programs(0) * slices
    tl.store(found + at, largest)
    tl.store(found + size + at, total)
    tl.store(found + 2 * size + at, best)
    tl.store(found + 3 * size + at, second)
    tl.store(found + 4 * size + at, value)
    tl.store(ids + at, tl.minimum(chosen, vocabulary - 1))


@kernel
def combine_slices(
    found: tl.tensor,
    ids: tl.tensor,
    tokens: tl.tensor,
    logprobs: tl.tensor,
    margins: tl.tensor,
    slices: tl.tensor,
    WIDE: tl.constexpr,
) -> None:
    """Combine a row's slices into its token, log-probability and margin."""
    draw, part = tl.program_id(0), tl.arange(0, WIDE)
    at, size, own = draw * slices + part, tl.num_programs(0) * slices, part < slices
    nothing = float("-inf")
    largest = tl.load(found + at, mask=own, other=nothing)
    total = tl.load(found + size + at, mask=own, other=0.0)
    best = tl.load(found + 2 * size + at, mask=own, other=nothing)
    second = tl.load(found + 3 * size + at, mask=own, other=nothing)
    value = tl.load(found + 4 * size + at, mask=own, other=nothing)
    token = tl.load(ids + at, mask=own, other=0)
    highest = tl.max(largest, 0)
    behind = largest - tl.where(highest == nothing, 0.0, highest)
    # an empty slice has -inf for a sum of 0
    whole = tl.sum(tl.where(largest == nothing, total, total * tl.exp(behind)), 0)
    best, second = best + behind, second + behind
    top = tl.max(best, 0)
    winner = tl.min(tl.where(best == top, part, WIDE - 1), 0)
    mine = part == winner
    runner_up = tl.maximum(
        tl.max(tl.where(mine, nothing, best), 0), tl.max(tl.where(mine, second, nothing), 0)
    )
    logit = tl.max(tl.where(mine, value, nothing), 0)
    tl.store(tokens + draw, tl.sum(tl.where(mine, token, 0), 0).to(tl.int64))
    tl.store(logprobs + draw, logit - highest - tl.log(whole))
    tl.store(margins + draw, top - runner_up)
