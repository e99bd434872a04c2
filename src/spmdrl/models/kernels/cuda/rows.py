"""Norm with the addition before it, SwiGLU, and rotary embedding, each in one pass.

Inputs and outputs are float32, bfloat16 or float16; every result is computed in float32 and rounded
once, where torch's operations round after each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl.models.kernels.cuda.language import kernel, power_of_2, tl

BLOCK = 1024
"""Numbers of a program of `swiglu`, and about those of one of `rotate`."""

PARTS = 512
"""Most programs of the norm's backward, of which each sums a part of the weight's gradient."""


def add_rms_norm(
    x: Tensor,  # [T, D]
    out: Tensor | None,  # [T, D], added to x
    weight: Tensor,  # [D]
    eps: float,
    *,
    scale: float = 1.0,
    one_plus: bool = False,
) -> tuple[Tensor, Tensor]:  # [T, D] each
    """Return x + scale * out, and its norm: y / sqrt(mean(y^2) + eps) * weight.

    The norm is of the sum as it is stored, in x's dtype (Zhang & Sennrich 2019, arXiv 1910.07467).

    Args:
        out: what a block gave; None: nothing is added, and x itself is returned.
        one_plus: multiply by 1 + weight.
    """
    assert x.is_contiguous() and weight.is_contiguous() and weight.shape == x.shape[1:]
    assert out is None or (out.is_contiguous() and out.shape == x.shape), (x, out)
    tokens, width = x.shape
    total, normed = x if out is None else torch.empty_like(x), torch.empty_like(x)
    wide = power_of_2(width)
    if tokens:
        add_norm_row[(tokens,)](
            x,
            x if out is None else out,
            weight,
            total,
            normed,
            scale,
            eps,
            WIDTH=width,
            WIDE=wide,
            ADDS=out is not None,
            ONE_PLUS=one_plus,
            num_warps=warps_for(wide),
            enable_fp_fusion=True,
        )
    return total, normed


def add_rms_norm_backward(
    total: Tensor,  # [T, D], x + scale * out
    weight: Tensor,  # [D]
    d_normed: Tensor,  # [T, D]
    d_total: Tensor | None,  # [T, D]
    eps: float,
    *,
    one_plus: bool = False,
) -> tuple[Tensor, Tensor]:  # [T, D], [D] float32
    """Compute the gradients of `add_rms_norm` by x and by the weight, from its sum alone.

    That by x is d_total + r (w d_normed) - total r^3 mean(w d_normed total), r = the row's factor.
    A weight's parts are rows T, T + `PARTS`, ... each, so that they depend on nothing but T.

    Args:
        d_total: the gradient of the sum by its other uses; None: it has none.
    """
    operands = [total, d_normed, *([] if d_total is None else [d_total])]
    assert all(t.is_contiguous() and t.shape == total.shape for t in operands), operands
    assert weight.is_contiguous() and weight.shape == total.shape[1:]
    tokens, width = total.shape
    d = torch.empty_like(total)
    parts = total.new_empty(min(tokens, PARTS), width, dtype=torch.float32)
    wide = power_of_2(width)
    if tokens:
        add_norm_backward_rows[(len(parts),)](
            total,
            weight,
            d_normed,
            d_normed if d_total is None else d_total,
            d,
            parts,
            tokens,
            eps,
            WIDTH=width,
            WIDE=wide,
            ADDS=d_total is not None,
            ONE_PLUS=one_plus,
            num_warps=warps_for(wide),
            enable_fp_fusion=True,
        )
    return d, parts.sum(0)


def warps_for(wide: int) -> int:
    """Return the warps of a program that has so many numbers of each operand in its registers."""
    return max(1, min(16, wide // 512))


def swiglu(gate_up: Tensor) -> Tensor:  # [T, 2 W], gate and up side by side -> [T, W]
    """Compute silu(gate) * up (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""
    assert gate_up.is_contiguous()
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    result = gate_up.new_empty(tokens, width)
    if tokens:
        swiglu_block[(tokens, -(-width // BLOCK))](
            gate_up, result, width, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return result


def swiglu_backward(
    gate_up: Tensor,  # [T, 2 W]
    grad: Tensor,  # [T, W]
) -> Tensor:  # [T, 2 W]
    """Compute the gradient of `swiglu` by its operand, from nothing but that operand."""
    assert gate_up.is_contiguous() and grad.is_contiguous()
    tokens, width = grad.shape
    result = torch.empty_like(gate_up)
    if tokens:
        swiglu_backward_block[(tokens, -(-width // BLOCK))](
            gate_up, grad, result, width, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return result


def rotate(
    x: Tensor,  # [T, H, d], heads and dims side by side; there may be gaps between tokens
    cos: Tensor,  # [T, 1, r] float32
    sin: Tensor,  # [T, 1, r] float32, the first half negated
    interleaved: bool = False,
) -> Tensor:  # [T, H, d]
    """Compute `rope.rotate`: rotary embedding of the first r dims of all heads."""
    return _turn(x, cos, sin, interleaved, backward=False)


def rotate_backward(
    grad: Tensor,  # [T, H, d]
    cos: Tensor,  # [T, 1, r] float32
    sin: Tensor,  # [T, 1, r] float32
    interleaved: bool = False,
    out: Tensor | None = None,  # [T, H, d], written; there may be gaps between tokens
) -> Tensor:  # [T, H, d]
    """Compute the gradient of `rotate` by x: the rotation back."""
    return _turn(grad, cos, sin, interleaved, out, backward=True)


def _turn(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    out: Tensor | None = None,
    *,
    backward: bool,
) -> Tensor:
    tokens, heads, dims = x.shape
    turned = cos.shape[-1]
    assert cos.is_contiguous() and sin.is_contiguous() and turned % 2 == 0 and turned <= dims
    out = x.new_empty(tokens, heads, dims) if out is None else out
    for each in (x, out):
        assert not tokens or (each.stride(2) == 1 and each.stride(1) == dims), each.stride()
    if tokens:
        wide = power_of_2(turned // 2)
        rows = heads_at_once(heads, wide)
        rotate_heads[(tokens, -(-heads // rows))](
            x,
            cos,
            sin,
            out,
            x.stride(0),
            out.stride(0),
            heads,
            DIMS=dims,
            TURNED=turned,
            ROWS=rows,
            WIDE=wide,
            REST=power_of_2(dims - turned) if turned < dims else 0,
            INTERLEAVED=interleaved,
            BACKWARD=backward,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def heads_at_once(heads: int, wide: int) -> int:
    """Return the heads that a program turns.

    Args:
        wide: power of two of half the dims that are turned.
    """
    return max(1, min(power_of_2(heads), BLOCK // wide))


@kernel
def add_norm_row(
    x: tl.tensor,
    out: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    scale: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    ADDS: tl.constexpr,
    ONE_PLUS: tl.constexpr,
) -> None:
    """Add and norm one row."""
    dim = tl.arange(0, WIDE)
    own = dim < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + dim
    row = tl.load(x + at, mask=own, other=0.0)
    if ADDS:
        added = tl.load(out + at, mask=own, other=0.0).to(tl.float32)
        row = (row.to(tl.float32) + scale * added).to(row.dtype)
        tl.store(total + at, row, mask=own)
    wide = row.to(tl.float32)
    factor = tl.load(weight + dim, mask=own, other=0.0).to(tl.float32)
    if ONE_PLUS:
        factor += 1.0
    mean = tl.sum(wide * wide, 0) / WIDTH
    tl.store(normed + at, (wide * tl.rsqrt(mean + eps) * factor).to(row.dtype), mask=own)


@kernel
def add_norm_backward_rows(
    total: tl.tensor,
    weight: tl.tensor,
    d_normed: tl.tensor,
    d_total: tl.tensor,
    d: tl.tensor,
    parts: tl.tensor,  # [programs, WIDTH] float32, written
    tokens: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    ADDS: tl.constexpr,
    ONE_PLUS: tl.constexpr,
) -> None:
    """Compute the gradients of every so many-th row, and sum the weight's."""
    dim = tl.arange(0, WIDE)
    own = dim < WIDTH
    part, step = tl.program_id(0), tl.num_programs(0)
    of_weight = tl.zeros([WIDE], tl.float32)
    for turn in range(tl.cdiv(tokens - part, step)):
        at = (part + turn * step).to(tl.int64) * WIDTH + dim
        row = tl.load(total + at, mask=own, other=0.0).to(tl.float32)
        given = tl.load(d_normed + at, mask=own, other=0.0).to(tl.float32)
        # read again in every row: it is in the cache, and registers hold what is summed
        factor = tl.load(weight + dim, mask=own, other=0.0).to(tl.float32)
        if ONE_PLUS:
            factor += 1.0
        scale = tl.rsqrt(tl.sum(row * row, 0) / WIDTH + eps)
        row *= scale
        of_weight += given * row
        given *= factor
        found = scale * (given - row * (tl.sum(given * row, 0) / WIDTH))
        if ADDS:
            found += tl.load(d_total + at, mask=own, other=0.0).to(tl.float32)
        tl.store(d + at, found.to(d.dtype.element_ty), mask=own)
    tl.store(parts + part * WIDTH + dim, of_weight, mask=own)


@kernel
def swiglu_block(
    gate_up: tl.tensor, result: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Compute a block of one token's row."""
    token = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = dim < width
    at = token * 2 * width + dim
    gate = tl.load(gate_up + at, mask=own, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=own, other=0.0).to(tl.float32)
    found = gate * tl.sigmoid(gate) * up
    tl.store(result + token * width + dim, found.to(result.dtype.element_ty), mask=own)


@kernel
def swiglu_backward_block(
    gate_up: tl.tensor,
    grad: tl.tensor,
    result: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Compute both halves' gradients of a block of one token's row."""
    token = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = dim < width
    at = token * 2 * width + dim
    gate = tl.load(gate_up + at, mask=own, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=own, other=0.0).to(tl.float32)
    d = tl.load(grad + token * width + dim, mask=own, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    # silu' = s + silu (1 - s)
    d_gate, d_up = d * up * (s + silu * (1.0 - s)), d * silu
    tl.store(result + at, d_gate.to(result.dtype.element_ty), mask=own)
    tl.store(result + at + width, d_up.to(result.dtype.element_ty), mask=own)


@kernel
def rotate_heads(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    x_token: tl.tensor,
    out_token: tl.tensor,
    heads: tl.tensor,
    DIMS: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
) -> None:
    """Turn some heads of one token: (a, b) -> (a cos - b sin, b cos + a sin), or back.

    Pairs are dims (i, i + r/2), or with INTERLEAVED (2 i, 2 i + 1) on the side that is not turned.
    """
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = TURNED // 2
    head, pair = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    own = (head < heads)[:, None] & (pair < HALF)[None, :]
    # sin's first half is negated, and both halves of cos are alike
    c = tl.load(cos + token * TURNED + pair, mask=pair < HALF, other=0.0)[None, :]
    s = tl.load(sin + token * TURNED + HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    source = x + token * x_token + head[:, None] * DIMS
    target = out + token * out_token + head[:, None] * DIMS
    whole = tl.arange(0, 2 * WIDE)[None, :]
    ours = (head < heads)[:, None] & (whole < TURNED)
    low, high = pair[None, :], pair[None, :] + HALF
    if INTERLEAVED and not BACKWARD:
        pairs = tl.load(source + whole, mask=ours, other=0.0)
        a, b = tl.split(tl.reshape(pairs, [ROWS, WIDE, 2]))
    else:
        a = tl.load(source + low, mask=own, other=0.0)
        b = tl.load(source + high, mask=own, other=0.0)
    a, b = a.to(tl.float32), b.to(tl.float32)
    if BACKWARD:
        s = -s
    first = (a * c - b * s).to(out.dtype.element_ty)
    second = (b * c + a * s).to(out.dtype.element_ty)
    if INTERLEAVED and BACKWARD:
        tl.store(target + whole, tl.reshape(tl.join(first, second), [ROWS, 2 * WIDE]), mask=ours)
    else:
        tl.store(target + low, first, mask=own)
        tl.store(target + high, second, mask=own)
    if REST > 0:
        dim = TURNED + tl.arange(0, REST)[None, :]
        passed = (head < heads)[:, None] & (dim < DIMS)
        value = tl.load(source + dim, mask=passed, other=0.0)
        tl.store(target + dim, value, mask=passed)
