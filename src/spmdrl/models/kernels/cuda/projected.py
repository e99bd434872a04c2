"""What a decoder does between its projection to queries, keys and values and attention over a paged
cache, in one pass: norms of heads, rotary embedding, and the cache's write.

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
    assert fused.dtype == keys.dtype == values.dtype, (fused.dtype, keys.dtype)
    tokens, count, dims = fused.shape
    kv_heads = keys.shape[2]
    heads = count - 2 * kv_heads
    assert fused.stride(2) == 1 and (fused.stride(1) == dims or count == 1), fused.stride()
    assert keys.is_contiguous() and values.is_contiguous() and keys.shape == values.shape
    assert keys.shape[3] == dims and heads > 0 and slots.shape == (tokens,) and slots.stride(0) == 1
    assert (q_weight is None) == (k_weight is None) and (cos is None) == (sin is None)
    turned = 0
    if cos is not None and sin is not None:
        assert cos.is_contiguous() and sin.is_contiguous() and cos.shape == sin.shape
        turned = cos.shape[-1]
        assert turned % 2 == 0 and turned <= dims and cos.numel() == tokens * turned
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
    slot = tl.load(slots + token)
    source = fused + token * fused_token
    turning = tl.cdiv(heads + kv_heads, ROWS)
    if part >= turning:
        head = (part - turning) * ROWS + tl.arange(0, ROWS)[:, None]
        dim = tl.arange(0, WHOLE)[None, :]
        own = (head < kv_heads) & (dim < DIMS)
        value = tl.load(source + (heads + kv_heads + head) * DIMS + dim, mask=own, other=0.0)
        tl.store(values + (slot * kv_heads + head) * DIMS + dim, value, mask=own)
        return
    head = part * ROWS + tl.arange(0, ROWS)[:, None]
    is_query, is_key = head < heads, (head >= heads) & (head < heads + kv_heads)
    exists = head < heads + kv_heads
    of_query = out + (token * heads + head) * DIMS
    of_key = keys + (slot * kv_heads + head - heads) * DIMS
    source = source + head * DIMS
    scale = tl.full([ROWS, 1], 1.0, tl.float32)
    if NORMS:
        dim = tl.arange(0, WHOLE)[None, :]
        read = tl.load(source + dim, mask=exists & (dim < DIMS), other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(read * read, 1) / DIMS + eps)[:, None]
    if TURNED > 0:
        HALF: tl.constexpr = TURNED // 2
        pair = tl.arange(0, WIDE)
        within = pair < HALF
        own = exists & within[None, :]
        # sin's first half is negated, and both halves of cos are alike
        c = tl.load(cos + token * TURNED + pair, mask=within, other=0.0)[None, :]
        s = tl.load(sin + token * TURNED + HALF + pair, mask=within, other=0.0)[None, :]
        low, high = pair, pair + HALF
        if INTERLEAVED:
            whole = tl.arange(0, 2 * WIDE)[None, :]
            pairs = tl.load(source + whole, mask=exists & (whole < TURNED), other=0.0)
            a, b = tl.split(tl.reshape(pairs, [ROWS, WIDE, 2]))
            low, high = 2 * pair, 2 * pair + 1
        else:
            a = tl.load(source + low[None, :], mask=own, other=0.0)
            b = tl.load(source + high[None, :], mask=own, other=0.0)
        a, b = a.to(tl.float32), b.to(tl.float32)
        if NORMS:
            a *= scale * weights_of(q_weight, k_weight, low, within, is_query, ONE_PLUS)
            b *= scale * weights_of(q_weight, k_weight, high, within, is_query, ONE_PLUS)
        first = (a * c - b * s).to(out.dtype.element_ty)
        second = (b * c + a * s).to(out.dtype.element_ty)
        to_low, to_high = pair[None, :], pair[None, :] + HALF
        tl.store(of_query + to_low, first, mask=own & is_query)
        tl.store(of_query + to_high, second, mask=own & is_query)
        tl.store(of_key + to_low, first, mask=own & is_key)
        tl.store(of_key + to_high, second, mask=own & is_key)
    if REST > 0:
        dim = TURNED + tl.arange(0, REST)
        own = exists & (dim < DIMS)[None, :]
        passed = tl.load(source + dim[None, :], mask=own, other=0.0).to(tl.float32)
        if NORMS:
            passed *= scale * weights_of(q_weight, k_weight, dim, dim < DIMS, is_query, ONE_PLUS)
        passed = passed.to(out.dtype.element_ty)
        tl.store(of_query + dim[None, :], passed, mask=own & is_query)
        tl.store(of_key + dim[None, :], passed, mask=own & is_key)
