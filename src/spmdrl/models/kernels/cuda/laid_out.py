"""Keys and values for attention of sequences of unequal length: turned and laid out in one pass,
and their gradients brought back in one.

A prompt that a group shares is laid out once for each response. A key's gradients from all its
places are summed in float32, in one order, where torch scatters them by atomic additions, and are
written with the queries' and values' into the gradient of the projection, where torch concatenates.
Queries are turned by the kernel of `rows.rotate`.
"""

from __future__ import annotations

from torch import Tensor

from spmdrl.models.kernels.cuda.language import kernel, tl
from spmdrl.models.kernels.cuda.projected import copy_heads, read_pairs, tile_sizes, turn_pairs
from spmdrl.models.kernels.cuda.rows import rotate, rotate_backward


def lay_out(
    fused: Tensor,  # [T, H + 2 KVH, d], heads side by side; there may be gaps between tokens
    kv_heads: int,
    cos: Tensor,  # [T, 1, r] float32
    sin: Tensor,  # [T, 1, r] float32, the first half negated
    interleaved: bool,
    rows: Tensor | None,  # [M] int64, the token of each place; None: one place for each token
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries [T, H, d] and the keys [M, KVH, d], turned as by `rope.rotate`, and the
    values [M, KVH, d].
    """
    heads, sizes = _sizes(fused, kv_heads, cos, sin)
    places = len(fused) if rows is None else len(rows)
    keys, values = (fused.new_empty(places, kv_heads, fused.shape[2]) for _ in "kv")
    if places:
        lay_out_heads[(places, -(-kv_heads // sizes["ROWS"]))](
            fused[:, heads:],
            fused if rows is None else rows,
            cos,
            sin,
            keys,
            values,
            fused.stride(0),
            kv_heads,
            **sizes,
            INTERLEAVED=interleaved,
            GATHERS=rows is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return rotate(fused[:, :heads], cos, sin, interleaved), keys, values


def lay_out_backward(
    grads: tuple[Tensor, Tensor, Tensor],  # of queries, keys and values, heads side by side
    cos: Tensor,  # [T, 1, r] float32
    sin: Tensor,  # [T, 1, r] float32
    interleaved: bool,
    places: tuple[Tensor, Tensor] | None,
) -> Tensor:  # [T, H + 2 KVH, d]
    """Compute the gradient of `lay_out` by its operand.

    Args:
        places: the places of token 0, of token 1, ... [M] int64, and the first of each token's
            among them [T + 1] int32; None: one place for each token.
    """
    of_queries, of_keys, of_values = grads
    tokens, heads, dims = of_queries.shape
    kv_heads = of_keys.shape[1]
    assert of_keys.is_contiguous() and of_values.is_contiguous(), (of_keys, of_values)
    fused = of_queries.new_empty(tokens, heads + 2 * kv_heads, dims)
    _, sizes = _sizes(fused, kv_heads, cos, sin)
    if tokens:
        order, starts = (of_keys, of_keys) if places is None else places
        assert places is None or len(starts) == tokens + 1, (len(starts), tokens)
        collect_heads[(tokens, -(-kv_heads // sizes["ROWS"]))](
            of_keys,
            of_values,
            order,
            starts,
            cos,
            sin,
            fused[:, heads:],
            fused.stride(0),
            kv_heads,
            **sizes,
            INTERLEAVED=interleaved,
            GATHERS=places is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
    rotate_backward(of_queries, cos, sin, interleaved, out=fused[:, :heads])
    return fused


def _sizes(fused: Tensor, kv_heads: int, cos: Tensor, sin: Tensor) -> tuple[int, dict[str, int]]:
    tokens, count, dims = fused.shape
    assert fused.stride(2) == 1 and fused.stride(1) == dims, fused.stride()
    assert cos.is_contiguous() and sin.is_contiguous() and cos.shape == sin.shape, cos.shape
    assert cos.numel() == tokens * cos.shape[-1] and cos.shape[-1] % 2 == 0, cos.shape
    return count - 2 * kv_heads, tile_sizes(0, kv_heads, dims, cos.shape[-1])


@kernel
def lay_out_heads(
    fused: tl.tensor,  # from the first key's head on
    rows: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    fused_token: tl.tensor,
    heads: tl.tensor,
    DIMS: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    REST: tl.constexpr,
    WHOLE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GATHERS: tl.constexpr,
) -> None:
    """Write some heads' keys and values of one place."""
    place, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(rows + place) if GATHERS else place
    source = fused + token * fused_token
    of_values = source + heads * DIMS
    copy_heads(of_values, values + place * heads * DIMS, part * ROWS, heads, DIMS, ROWS, WHOLE)
    head = part * ROWS + tl.arange(0, ROWS)[:, None]
    exists = head < heads
    source, target = source + head * DIMS, keys + (place * heads + head) * DIMS
    HALF: tl.constexpr = TURNED // 2
    pair = tl.arange(0, WIDE)
    within = pair < HALF
    nothing = fused, fused, 1.0, exists
    a, b = read_pairs(source, exists, nothing, TURNED, WIDE, False, False, INTERLEAVED)
    # sin's first half is negated, and both halves of cos are alike
    c, s = cos + token * TURNED + pair, sin + token * TURNED + HALF + pair
    first, second = turn_pairs(a, b, c, s, within)
    own = exists & within[None, :]
    tl.store(target + pair[None, :], first.to(keys.dtype.element_ty), mask=own)
    tl.store(target + HALF + pair[None, :], second.to(keys.dtype.element_ty), mask=own)
    if REST > 0:
        dim = TURNED + tl.arange(0, REST)[None, :]
        passed = exists & (dim < DIMS)
        tl.store(target + dim, tl.load(source + dim, mask=passed), mask=passed)


@kernel
def collect_heads(
    of_keys: tl.tensor,
    of_values: tl.tensor,
    order: tl.tensor,
    starts: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    fused: tl.tensor,  # from the first key's head on, written
    fused_token: tl.tensor,
    heads: tl.tensor,
    DIMS: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    REST: tl.constexpr,
    WHOLE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GATHERS: tl.constexpr,
) -> None:
    """Sum the gradients of some heads' keys and values over one token's places, and turn back."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = part * ROWS + tl.arange(0, ROWS)[:, None]
    exists = head < heads
    HALF: tl.constexpr = TURNED // 2
    pair, whole = tl.arange(0, WIDE)[None, :], tl.arange(0, WHOLE)[None, :]
    rest = TURNED + tl.arange(0, REST if REST > 0 else 1)[None, :]
    within, is_dim = exists & (pair < HALF), exists & (whole < DIMS)
    is_rest = exists & (rest < DIMS)
    low, high = tl.zeros([ROWS, WIDE], tl.float32), tl.zeros([ROWS, WIDE], tl.float32)
    passed = tl.zeros([ROWS, REST if REST > 0 else 1], tl.float32)
    value = tl.zeros([ROWS, WHOLE], tl.float32)
    first = tl.load(starts + token) if GATHERS else 0
    count = tl.load(starts + token + 1) - first if GATHERS else 1
    for turn in range(count):
        place = tl.load(order + first + turn) if GATHERS else token
        source = of_keys + (place * heads + head) * DIMS
        low += tl.load(source + pair, mask=within, other=0.0).to(tl.float32)
        high += tl.load(source + HALF + pair, mask=within, other=0.0).to(tl.float32)
        if REST > 0:
            passed += tl.load(source + rest, mask=is_rest, other=0.0).to(tl.float32)
        source = of_values + (place * heads + head) * DIMS
        value += tl.load(source + whole, mask=is_dim, other=0.0).to(tl.float32)
    kind: tl.constexpr = fused.dtype.element_ty
    target = fused + token * fused_token + head * DIMS
    c = tl.load(cos + token * TURNED + pair, mask=pair < HALF, other=0.0)
    # sin's first half is negated
    s = tl.load(sin + token * TURNED + HALF + pair, mask=pair < HALF, other=0.0)
    a, b = (low * c + high * s).to(kind), (high * c - low * s).to(kind)
    if INTERLEAVED:
        both = tl.arange(0, 2 * WIDE)[None, :]
        joined = tl.reshape(tl.join(a, b), [ROWS, 2 * WIDE])
        tl.store(target + both, joined, mask=exists & (both < TURNED))
    else:
        tl.store(target + pair, a, mask=within)
        tl.store(target + HALF + pair, b, mask=within)
    if REST > 0:
        tl.store(target + rest, passed.to(kind), mask=is_rest)
    tl.store(target + heads * DIMS + whole, value.to(kind), mask=is_dim)
