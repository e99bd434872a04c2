"""Functions of the flash-attention packages' signatures that compute on the CPU.

`FLASH_2` and `FLASH_4` are texts of a module, to follow `causal` under the name `attend`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    scale: float,
    left: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of sequences, the mask aligned at their ends; heads may be grouped. A row
    sees `left` keys before its own (-1: all), and scores are capped if `softcap` is not 0. A head's
    sink is one more score, whose probability is dropped.
    """
    assert k.shape[2] == v.shape[2], "these kernels take one width"
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    parts = []
    for i in range(len(ends_q) - 1):
        rows, keys = slice(*ends_q[i : i + 2].tolist()), slice(*ends_k[i : i + 2].tolist())
        count, length = rows.stop - rows.start, keys.stop - keys.start
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        seen = torch.ones(count, length).tril(length - count)
        if left >= 0:
            seen = seen.triu(length - count - left)
        scores = scores.masked_fill(seen == 0, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(-1, count, 1)), -1)
        weights = scores.softmax(-1)[..., :length]
        parts.append(torch.einsum("hqk,khd->qhd", weights, v[keys]))
    return torch.cat(parts)


FLASH_2 = """
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):
    assert causal and window_size in ((-1, -1), (2, 0))
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0], softcap)
"""

FLASH_4 = """
def flash_attn_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
    softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None,
    mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
    scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):
    assert causal and qv is None and window_size[1] in (None, 0) and num_splits == 1
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    left = -1 if window_size[0] is None else window_size[0]
    of_heads = softmax_scale, left, softcap, learnable_sink
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, *of_heads), None
"""
