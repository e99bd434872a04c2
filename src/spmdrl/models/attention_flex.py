"""Attention of spans by torch's `flex_attention`, which computes every option: kernel `flex`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spmdrl.memory.host_copies import to_device
from spmdrl.models.attention_varlen import make_sequences
from spmdrl.models.spans import AttentionFunction, Span
from spmdrl.models.specs import AttentionOptions

BLOCK_SIZE = 128
"""Rows and keys of a block, of which those that no row sees are passed over."""


class FlexKernel:
    """`flex_attention` with a block mask; compiled on CUDA, eager (slow) on CPUs."""

    def __init__(self) -> None:
        from torch.nn.attention import flex_attention as flex

        self._flex = flex
        self._compiled: Any = None

    def prepare(
        self,
        spans: Sequence[Span],
        options: AttentionOptions,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> AttentionFunction:
        sequences = make_sequences(spans, device)
        run = partial(
            self._function(device),
            score_mod=None if options.softcap is None else _capped(options.softcap),
            block_mask=make_block_mask(spans, options.window, device),
            scale=options.scale,
        )
        with_lse = self._flex.AuxRequest(lse=True)

        def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
            k, v = sequences.lay_out(k), sequences.lay_out(v)
            heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
            grouped = q.shape[1] != k.shape[1]
            if sinks is None:
                out: Tensor = run(*heads, enable_gqa=grouped)
            else:
                out, more = run(*heads, enable_gqa=grouped, return_aux=with_lse)
                # of the sum of e^score with the sink's, the keys' share
                kept = torch.sigmoid(more.lse - sinks[:, None])
                out = (out * kept[..., None]).to(q.dtype)
            return out[0].transpose(0, 1)

        return attend

    def _function(self, device: torch.device) -> Any:
        if device.type != "cuda":
            return self._flex.flex_attention
        if self._compiled is None:
            # Dynamic shapes, because the number of tokens differs between microbatches.
            self._compiled = torch.compile(self._flex.flex_attention, dynamic=True)
        return self._compiled


def make_block_mask(spans: Sequence[Span], window: int | None, device: torch.device) -> Any:
    """Make the `BlockMask` of rows and laid-out keys."""
    from torch.nn.attention.flex_attention import BlockMask

    seen, num_keys = _Seen.of(spans, window), sum(span.num_keys for span in spans)
    first, last, *blocks = to_device([seen.first, seen.last, *seen.blocks(num_keys)], device)

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j >= first[i]) & (j <= last[i])

    part, part_indices, whole, whole_indices = blocks
    return BlockMask.from_kv_blocks(
        part,
        part_indices,
        whole,
        whole_indices,
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=visible,
        seq_lengths=(len(first), num_keys),
    )


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Laid-out keys that each row sees, on the host: `first` to `last`, both included: int64 [Tq].

    A mask of all rows and keys, of which `create_block_mask` makes its blocks, would have gigabytes
    for microbatches of some ten thousand tokens.
    """

    first: Tensor
    last: Tensor

    @classmethod
    def of(cls, spans: Sequence[Span], window: int | None) -> _Seen:
        queries = torch.tensor([span.num_queries for span in spans])
        keys = torch.tensor([span.num_keys for span in spans])
        last = torch.arange(int(queries.sum()))
        last += torch.repeat_interleave(keys.cumsum(0) - queries.cumsum(0), queries)
        first = torch.repeat_interleave(keys.cumsum(0) - keys, queries)
        if window is not None:
            first = torch.maximum(first, last - window + 1)
        return cls(first=first, last=last)

    def blocks(self, num_keys: int) -> list[Tensor]:
        """Find the blocks of keys that a block of rows sees in part, and those that it sees whole:
        of both the numbers, int32 [1, 1, blocks of rows], and the indices, int32 [1, 1, blocks of
        rows, blocks of keys], those that count first.
        """
        starts = torch.arange(0, num_keys, BLOCK_SIZE)
        stops = starts + BLOCK_SIZE
        missing = -len(self.first) % BLOCK_SIZE  # rows behind the last see nothing
        first = F.pad(self.first, (0, missing), value=num_keys + BLOCK_SIZE)[:, None]
        last = F.pad(self.last, (0, missing), value=-1)[:, None]
        some = ((first < stops) & (last >= starts)).view(-1, BLOCK_SIZE, len(starts)).any(1)
        every = ((first <= starts) & (last >= stops - 1)).view(-1, BLOCK_SIZE, len(starts)).all(1)
        found = []
        for mask in (some & ~every, every):
            number = mask.sum(1, dtype=torch.int32)
            order = mask.int().argsort(dim=1, descending=True, stable=True).int()
            found += [number[None, None], order[None, None]]
        return found


def _capped(softcap: float) -> Callable[..., Tensor]:
    def score(s: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(s / softcap)

    return score
