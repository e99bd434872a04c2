"""Norms of heads, rotary embedding and the cache's write in one pass: all that a decoder does
between its projection to queries, keys and values and attention over a paged cache.

A program takes some heads of one token. Everything is computed in float32 and rounded once, where
torch's operations round after the norm and after the rotation. The projection's bias is added by
the product itself, before it rounds.
"""

from __future__ import annotations

from torch import Tensor

from spmdrl.models.kernels.cuda.language import kernel, power_of_2, tl
from spmdrl.models.kernels.cuda.rows import heads_at_once


def turn_and_store(
    fused: Tensor,  # [T, H + 2 KVH, d], heads side by side; there may be gaps between tokens
    slots: Tensor,  # [T] int64, each token's place in the cache
    keys: Tensor,  # [blocks, block_size, KVH, d], written
    values: Tensor,  # [blocks, block_size, KVH, d], written
    *,
    cos: Tensor | None = None,  # [T, 1, r] float32
    sin: Tensor | None = None,  # [T, 1, r] float32, the first half negated
    interleaved: bool = False,
    q_weight: Tensor | None = None,  # [d]
    k_weight: Tensor | None = None,  # [d]
    eps: float = 0.0,
    one_plus: bool = False,
) -> Tensor:  # [T, H, d]
    """Return the queries, and write keys and values to their places.

    Args:
        cos, sin: tables of `rope.rotate`; None: nothing is turned.
        q_weight, k_weight: weights of the norms of each query and key by itself, which come before
            the rotation; None: there are none.
        one_plus: multiply by 1 + weight.
    """
    tokens, count, dims = fused.shape
    kv_heads = keys.shape[2]
    heads = count - 2 * kv_heads
    _check(fused, slots, keys, values)
    assert (q_weight is None) == (k_weight is None) and (cos is None) == (sin is None)
    turned = 0 if cos is None or sin is None else _turned(cos, sin, tokens, dims)
    out = fused.new_empty(tokens, heads, dims)
    if not tokens:
        return out
    sizes = tile_sizes(heads, kv_heads, dims, turned)
    parts = -(-(heads + kv_heads) // sizes["ROWS"]) + -(-kv_heads // sizes["ROWS"])
    turn_and_store_heads[(tokens, parts)](
        fused,
        slots,
        fused if cos is None else cos,
        fused if sin is None else sin,
        fused if q_weight is None else q_weight,
        fused if k_weight is None else k_weight,
        keys,
        values,
        out,
        eps,
        fused.stride(0),
        heads,
        kv_heads,
        **sizes,
        NORMS=q_weight is not None,
        ONE_PLUS=one_plus,
        INTERLEAVED=interleaved,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def _check(fused: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    assert fused.dtype == keys.dtype == values.dtype, (fused.dtype, keys.dtype)
    tokens, count, dims = fused.shape
    assert fused.stride(2) == 1 and (fused.stride(1) == dims or count == 1), fused.stride()
    assert keys.is_contiguous() and values.is_contiguous() and keys.shape == values.shape
    assert keys.shape[3] == dims and count > 2 * keys.shape[2], (fused.shape, keys.shape)
    assert slots.shape == (tokens,) and slots.stride(0) == 1, slots


def _turned(cos: Tensor, sin: Tensor, tokens: int, dims: int) -> int:
    """Return the dims of a head that are turned."""
    assert cos.is_contiguous() and sin.is_contiguous() and cos.shape == sin.shape
    turned = cos.shape[-1]
    assert turned % 2 == 0 and turned <= dims and cos.numel() == tokens * turned, cos.shape
    return turned


def tile_sizes(heads: int, kv_heads: int, dims: int, turned: int) -> dict[str, int]:
    """Return the sizes that `turn_and_store_heads` is compiled for.

    Args:
        turned: dims of a head that are turned; 0: none.
    """
    wide = power_of_2(turned // 2) if turned else 0
    return {
        "DIMS": dims,
        "TURNED": turned,
        "ROWS": heads_at_once(heads + kv_heads, max(wide, power_of_2(dims) // 2)),
        "WIDE": wide,
        "REST": power_of_2(dims - turned) if turned < dims else 0,
        "WHOLE": power_of_2(dims),
    }


@kernel
def weights_of(
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    dim: tl.tensor,  # [n]
    own: tl.tensor,  # [n] bool
    is_query: tl.tensor,  # [ROWS, 1] bool
    ONE_PLUS: tl.constexpr,
) -> tl.tensor:  # [ROWS, n]
    """Read the norm's weight of some dims of each head."""
    of_query = tl.load(q_weight + dim, mask=own, other=0.0).to(tl.float32)[None, :]
    of_key = tl.load(k_weight + dim, mask=own, other=0.0).to(tl.float32)[None, :]
    weight = tl.where(is_query, of_query, of_key)
    return weight + 1.0 if ONE_PLUS else weight


@kernel
def copy_heads(
    source: tl.tensor,  # pointer to a token's heads
    target: tl.tensor,  # pointer to their places
    start: tl.tensor,
    stop: tl.tensor,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Copy the heads from `start`, at most `ROWS`, and none from `stop` on."""
    head = start + tl.arange(0, ROWS)[:, None]
    dim = tl.arange(0, WHOLE)[None, :]
    own = (head < stop) & (dim < DIMS)
    tl.store(target + head * DIMS + dim, tl.load(source + head * DIMS + dim, mask=own), mask=own)


@kernel
def read_dims(
    source: tl.tensor,  # [ROWS, 1] pointers to heads
    exists: tl.tensor,  # [ROWS, 1] bool
    dim: tl.tensor,  # [n]
    is_dim: tl.tensor,  # [n] bool
    norm: tl.tuple,  # weights of queries and of keys, the factor of each head, which are queries
    NORMS: tl.constexpr,
    ONE_PLUS: tl.constexpr,
) -> tl.tensor:  # [ROWS, n] float32
    """Read some dims of each head, and norm them."""
    found = tl.load(source + dim[None, :], mask=exists & is_dim[None, :], other=0.0)
    found = found.to(tl.float32)
    if NORMS:
        q_weight, k_weight, scale, is_query = norm
        found *= scale * weights_of(q_weight, k_weight, dim, is_dim, is_query, ONE_PLUS)
    return found


@kernel
def read_pairs(
    source: tl.tensor,  # [ROWS, 1] pointers to heads
    exists: tl.tensor,  # [ROWS, 1] bool
    norm: tl.tuple,
    TURNED: tl.constexpr,
    WIDE: tl.constexpr,
    NORMS: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> tl.tuple:  # [ROWS, WIDE] twice, float32
    """Read the pairs of numbers that are turned together, as `read_dims` does."""
    if INTERLEAVED:
        dim = tl.arange(0, 2 * WIDE)
        both = read_dims(source, exists, dim, dim < TURNED, norm, NORMS, ONE_PLUS)
        return tl.split(tl.reshape(both, [source.shape[0], WIDE, 2]))
    pair = tl.arange(0, WIDE)
    within = pair < TURNED // 2
    low = read_dims(source, exists, pair, within, norm, NORMS, ONE_PLUS)
    return low, read_dims(source, exists, pair + TURNED // 2, within, norm, NORMS, ONE_PLUS)


@kernel
def turn_pairs(
    a: tl.tensor,  # [ROWS, WIDE]
    b: tl.tensor,  # [ROWS, WIDE]
    cos: tl.tensor,  # [WIDE] pointers
    sin: tl.tensor,  # [WIDE] pointers
    within: tl.tensor,  # [WIDE] bool
) -> tl.tuple:  # [ROWS, WIDE] twice
    """Turn pairs of numbers."""
    c = tl.load(cos, mask=within, other=0.0)[None, :]
    s = tl.load(sin, mask=within, other=0.0)[None, :]
    return a * c - b * s, b * c + a * s


@kernel
def norm_scale(
    source: tl.tensor,  # [ROWS, 1] pointers to heads
    exists: tl.tensor,  # [ROWS, 1] bool
    eps: tl.tensor,
    DIMS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:  # [ROWS, 1]
    """Compute the factor of each head's norm."""
    dim = tl.arange(0, WHOLE)[None, :]
    read = tl.load(source + dim, mask=exists & (dim < DIMS), other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(read * read, 1) / DIMS + eps)[:, None]


@kernel
def store_dims(
    targets: tl.tuple,  # [ROWS, 1] pointers to where each head is if it is a query, and if a key
    is_query: tl.tensor,  # [ROWS, 1] bool
    dim: tl.tensor,  # [n]
    found: tl.tensor,  # [ROWS, n] float32
    own: tl.tensor,  # [ROWS, n] bool
) -> None:
    """Store some dims of queries to the result, and of keys to the cache."""
    of_query, of_key = targets
    rounded = found.to(of_query.dtype.element_ty)
    tl.store(of_query + dim[None, :], rounded, mask=own & is_query)
    tl.store(of_key + dim[None, :], rounded, mask=own & (is_query == 0))


@kernel
def turn_and_store_heads(
    fused: tl.tensor,
    slots: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    fused_token: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    DIMS: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    REST: tl.constexpr,
    WHOLE: tl.constexpr,
    NORMS: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    """Compute some heads of one token: queries and keys first, then values."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, source = tl.load(slots + token), fused + token * fused_token
    turning, count = tl.cdiv(heads + kv_heads, ROWS), heads + kv_heads
    if part >= turning:
        place = values + slot * kv_heads * DIMS
        copy_heads(
            source + count * DIMS, place, (part - turning) * ROWS, kv_heads, DIMS, ROWS, WHOLE
        )
        return
    head = part * ROWS + tl.arange(0, ROWS)[:, None]
    is_query, exists = head < heads, head < count
    targets = out + (token * heads + head) * DIMS, keys + (slot * kv_heads + head - heads) * DIMS
    source = source + head * DIMS
    scale = tl.full([ROWS, 1], 1.0, tl.float32)
    if NORMS:
        scale = norm_scale(source, exists, eps, DIMS, WHOLE)
    norm = q_weight, k_weight, scale, is_query
    if TURNED > 0:
        HALF: tl.constexpr = TURNED // 2
        pair = tl.arange(0, WIDE)
        within = pair < HALF
        a, b = read_pairs(source, exists, norm, TURNED, WIDE, NORMS, ONE_PLUS, INTERLEAVED)
        # sin's first half is negated, and both halves of cos are alike
        c, s = cos + token * TURNED + pair, sin + token * TURNED + HALF + pair
        first, second = turn_pairs(a, b, c, s, within)
        own = exists & within[None, :]
        store_dims(targets, is_query, pair, first, own)
        store_dims(targets, is_query, pair + HALF, second, own)
    if REST > 0:
        dim = TURNED + tl.arange(0, REST)
        passed = read_dims(source, exists, dim, dim < DIMS, norm, NORMS, ONE_PLUS)
        store_dims(targets, is_query, dim, passed, exists & (dim < DIMS)[None, :])
