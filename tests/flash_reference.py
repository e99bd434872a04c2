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


def flash_attn_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None,
    aux_scalars=None, block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):
    from dense_attention import dense
    from spmdrl.models.specs import AttentionOptions

    assert not causal and qv is None and window_size == (None, None) and not deterministic
    assert len(q) == len(k) == len(v) == 1, "one sequence"
    sizes, block = (q.shape[1], k.shape[1]), block_sparse_tensors.block_size
    pairs = pairs_of(block_sparse_tensors, sizes, block, mask_mod, aux_tensors)
    # lists of the backward say which rows are computed with each block of keys
    back = pairs_of(block_sparse_tensors_bwd, sizes, block, mask_mod, aux_tensors, by_keys=True)
    assert block_sparse_tensors_bwd.block_size == block and torch.equal(pairs, back)
    options = AttentionOptions(scale=softmax_scale, softcap=softcap or None)
    return dense(q[0], k[0], v[0], pairs, options, learnable_sink)[None], None


def pairs_of(lists, sizes, block, mask_mod, tensors, by_keys=False):
    # which pairs of a row and a key are computed: [rows, keys]
    pairs = torch.zeros(sizes, dtype=torch.bool)
    kinds = (
        (lists.mask_block_cnt, lists.mask_block_idx, False),
        (lists.full_block_cnt, lists.full_block_idx, True),
    )
    for count, indices, is_whole in kinds:
        for i in range(count.shape[2]):
            for j in indices[0, 0, i, : count[0, 0, i]].tolist():
                place = (j, i) if by_keys else (i, j)
                starts = [n * size for n, size in zip(place, block)]
                row, key = (
                    torch.arange(a, min(a + n, most)) for a, n, most in zip(starts, block, sizes)
                )
                here = pairs[row[0] : row[-1] + 1, key[0] : key[-1] + 1]
                assert not here.any(), "a block is listed once"
                seen = mask_mod(None, None, row[None, :, None], key[None], None, tensors)
                here |= True if is_whole else seen[0]
    return pairs
"""

FLASH_4_FILES = {
    "flash_attn/cute/__init__.py": FLASH_4,
    "flash_attn/cute/block_sparsity.py": """
from typing import NamedTuple

class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: torch.Tensor | None = None
    dq_write_order_full: torch.Tensor | None = None
    spt: bool | None = None
""",
    "flash_attn/cute/utils.py": "def scalar_to_ssa(a, dtype):\n    return a\n",
    "cutlass/__init__.py": "Int32 = None\n",
    "cutlass/cute.py": "def jit(function):\n    return function\n",
}
"""The package's files by name, and those of the language that its masks are written in."""
