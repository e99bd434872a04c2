"""CUDA operations that the CPU lacks or defines otherwise, in plain torch on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Arguments = Mapping[str, Any]
"""Arguments of an operation by the names of its schema; those not given are absent."""


def _heads(keys: Tensor, count: int) -> Tensor:
    """Key heads repeated for `count` query heads, in float32: `[tokens, count, size]`."""
    return keys.float().repeat_interleave(count // keys.shape[1], 1)


def _hidden(queries: int, keys: int, is_causal: bool, window: Any) -> Tensor:
    """Mask of what queries must not see: `[queries, keys]` bool; both end at the same token."""
    left, right = (-1, -1) if window is None else tuple(window)
    if is_causal:
        right = 0
    ahead = torch.arange(keys)[None] - (torch.arange(queries)[:, None] + keys - queries)
    hidden = torch.zeros(queries, keys, dtype=torch.bool)
    if right >= 0:
        hidden |= ahead > right
    if left >= 0:
        hidden |= ahead < -left
    return hidden


def _scores(query: Tensor, keys: Tensor, given: Arguments) -> Tensor:
    """Scaled and masked products of one sequence: `[heads, queries, keys]` float32."""
    scale = given.get("scale") or query.shape[-1] ** -0.5
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * scale
    hidden = _hidden(len(query), len(keys), bool(given.get("is_causal")), given.get("window_size"))
    return scores.masked_fill(hidden, float("-inf"))


def varlen_attention(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over packed sequences, or with `block_table` over pages.

    Returns:
        output like the query, log-sum-exp `[heads, tokens]`, state of the random numbers.
    """
    query, key, value = given["query"], given["key"], given["value"]
    starts, key_starts = given["cu_seq_q"].tolist(), given["cu_seq_k"]
    table, used = given.get("block_table"), given.get("seqused_k")
    output = torch.zeros(query.shape)
    lse = torch.zeros(query.shape[1], query.shape[0])
    for i, (start, stop) in enumerate(pairwise(starts)):
        if table is not None:
            length = int(used[i])
            pages = table[i, : -(-length // key.shape[1])].long()
            keys, values = (x[pages].flatten(0, 1)[:length] for x in (key, value))
        else:
            keys, values = (x[int(key_starts[i]) : int(key_starts[i + 1])] for x in (key, value))
        keys, values = (_heads(x, query.shape[1]) for x in (keys, values))
        scores = _scores(query[start:stop], keys, given)
        lse[:, start:stop] = scores.logsumexp(-1)
        output[start:stop] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return output.to(query.dtype), lse, torch.zeros(2, dtype=torch.uint64)


def varlen_attention_backward(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the query, the keys and the values of `varlen_attention` without pages."""
    query, key, value, grad = (given[n] for n in ("query", "key", "value", "grad_out"))
    heads, key_heads = query.shape[1], key.shape[1]
    scale = given.get("scale") or query.shape[-1] ** -0.5
    grads = [torch.zeros(x.shape) for x in (query, key, value)]
    starts, key_starts = given["cu_seq_q"].tolist(), given["cu_seq_k"].tolist()
    for i, (a, b) in enumerate(pairwise(starts)):
        here, there = slice(a, b), slice(key_starts[i], key_starts[i + 1])
        keys, values = (_heads(x[there], heads) for x in (key, value))
        shares = _scores(query[here], keys, given).softmax(-1)
        g = grad[here].float()
        d_shares = torch.einsum("qhd,khd->hqk", g, values)
        d_scores = shares * (d_shares - (shares * d_shares).sum(-1, keepdim=True)) * scale
        grads[0][here] += torch.einsum("hqk,khd->qhd", d_scores, keys)
        d_keys = torch.einsum("hqk,qhd->khd", d_scores, query[here].float())
        d_values = torch.einsum("hqk,qhd->khd", shares, g)
        for grad_of, part in zip(grads[1:], (d_keys, d_values), strict=True):
            group = heads // key_heads
            grad_of[there] += part.unflatten(1, (key_heads, group)).sum(2)
    return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype)


def rms_norm(given: Arguments) -> tuple[Tensor, Tensor]:
    """RMS norm over the last dimension, and the reciprocal of the root."""
    x, weight, eps = given["input"], given.get("weight"), given.get("eps")
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    root = x.float().pow(2).mean(-1, keepdim=True).add(eps).rsqrt()
    y = x.float() * root
    return (y if weight is None else y * weight.float()).to(x.dtype), root


def rms_norm_backward(given: Arguments) -> tuple[Tensor, Tensor | None]:
    """Gradients of the input and of the weight of `rms_norm`."""
    grad, x, root = (given[name].float() for name in ("grad_out", "input", "rstd"))
    weight = given.get("weight")
    scaled = grad if weight is None else grad * weight.float()
    d_x = root * scaled - x * root.pow(3) * (scaled * x).mean(-1, keepdim=True)
    if weight is None:
        return d_x.to(given["input"].dtype), None
    d_weight = (grad * x * root).flatten(0, -2).sum(0)
    return d_x.to(given["input"].dtype), d_weight.to(weight.dtype)


def log_sigmoid(given: Arguments) -> tuple[Tensor, Tensor]:
    """Log-sigmoid; CUDA's has an empty buffer where the CPU's keeps one for its backward."""
    x = given["self"]
    return torch.nn.functional.logsigmoid(x.double()).to(x.dtype), x.new_empty(0)


def log_sigmoid_backward(given: Arguments) -> Tensor:
    return given["grad_output"] * torch.sigmoid(-given["self"])


def wide_product(given: Arguments) -> Tensor:
    """Product of half types in float32 (`out_dtype`), of matrices or of batches of them."""
    left, right = (given.get(n) for n in ("self", "mat2"))
    if left is None or right is None:
        left, right = given["batch1"], given["batch2"]
    return torch.matmul(left.float(), right.float()).to(given["out_dtype"])


def wide_added_product(given: Arguments) -> Tensor:
    """`wide_product` with an added term."""
    left, right = (
        given[n] for n in (("mat1", "mat2") if "mat1" in given else ("batch1", "batch2"))
    )
    product = torch.matmul(left.float(), right.float()) * given.get("alpha", 1)
    return (product + given["self"].float() * given.get("beta", 1)).to(given["out_dtype"])


def wide_added_product_into(given: Arguments) -> Tensor:
    """`wide_added_product` in its place."""
    found: Tensor = given["out"].copy_(wide_added_product(given))
    return found


OWN: Mapping[str, Callable[[Arguments], Any]] = {
    "torch_attn::_varlen_attn": varlen_attention,
    "torch_attn::_varlen_attn_backward": varlen_attention_backward,
    "aten::_fused_rms_norm": rms_norm,
    "aten::_fused_rms_norm_backward": rms_norm_backward,
    "aten::log_sigmoid_forward": log_sigmoid,
    "aten::log_sigmoid_backward": log_sigmoid_backward,
    "aten::mm.dtype": wide_product,
    "aten::bmm.dtype": wide_product,
    "aten::addmm.dtype": wide_added_product,
    "aten::addmm.dtype_out": wide_added_product_into,
    "aten::baddbmm.dtype": wide_added_product,
}
"""Keys are operations by name, or by name and overload."""
