"""Attention of spans by kernels for sequences of unequal length: torch's, `varlen`, is here, and
flash-attention's in `attention_flash`.

The keys of every span are laid end to end (a shared prompt once per response, since keys and values
are a small part of a layer's activations). So each span is a separate sequence, with the causal
mask aligned at its end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from spmdrl.memory.host_copies import to_device
from spmdrl.models.kernels import gpu
from spmdrl.models.kernels.gpu import KeyPlaces
from spmdrl.models.rope import Rope
from spmdrl.models.spans import Span
from spmdrl.models.specs import AttentionOptions

MOST_WIDTH = 256
"""Most dims of a head in FlashAttention's kernels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """Spans as sequences.

    Args:
        key_rows: the row of k of each laid-out key; None if k is laid out already.
        ends_q, ends_k: int32 [n + 1], the start of each sequence, with the total at the end.
        places: the same as `key_rows`, and the way back, where Triton's kernels run.
    """

    key_rows: Tensor | None
    ends_q: Tensor
    ends_k: Tensor
    most_q: int
    most_k: int
    places: KeyPlaces | None = None

    def lay_out(self, x: Tensor) -> Tensor:  # [Tk, KVH, d] -> [sum of keys, KVH, d]
        if self.key_rows is None:
            return x
        out: Tensor = _Take.apply(x, self.key_rows)  # type: ignore[no-untyped-call]
        return out


class VarlenFunction(Protocol):
    """Attention of queries with laid-out keys and values, all of one width."""

    def __call__(
        self,
        q: Tensor,  # [Tq, H, d]
        k: Tensor,  # [sum of keys, KVH, d]
        v: Tensor,  # [sum of keys, KVH, d]
        sequences: Sequences,
        options: AttentionOptions,
        sinks: Tensor | None,  # [H]
        /,
    ) -> Tensor:  # [Tq, H, d]
        """Compute each sequence with a causal mask that is aligned at its end."""


def make_sequences(spans: Sequence[Span], device: torch.device) -> Sequences:
    queries = torch.tensor([0, *(s.num_queries for s in spans)])
    keys = torch.tensor([0, *(s.num_keys for s in spans)])
    rows = torch.cat([torch.arange(*r) for s in spans for r in s.keys])
    in_place = torch.equal(rows, torch.arange(len(rows)))
    maps = [] if in_place else [rows, *(_way_back(rows) if gpu.runs_on(device) else ())]
    ends_q, ends_k, *moved = to_device(
        [queries.cumsum(0).int(), keys.cumsum(0).int(), *maps], device
    )
    back = moved[1:]
    return Sequences(
        key_rows=next(iter(moved), None),
        ends_q=ends_q,
        ends_k=ends_k,
        most_q=int(queries.max()),
        most_k=int(keys.max()),
        places=KeyPlaces(rows=moved[0], order=back[0], starts=back[1]) if back else None,
    )


def _way_back(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of row 0, of row 1, ..., and the first of each row's among them."""
    ends = torch.bincount(rows).cumsum(0).int()
    return torch.sort(rows, stable=True).indices, F.pad(ends, (1, 0))


class VarlenKernel:
    """A kernel around one function of q, laid-out k and v, their sequences, and options.

    Keys or values that are narrower than the others are padded with zeros.
    """

    def __init__(self, function: VarlenFunction) -> None:
        self._function = function

    def prepare(
        self,
        spans: Sequence[Span],
        options: AttentionOptions,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> VarlenAttention:
        return VarlenAttention(self._function, make_sequences(spans, device), options)


class VarlenAttention:
    """A kernel's function for one list of spans, with one `AttentionOptions`."""

    def __init__(
        self, function: VarlenFunction, sequences: Sequences, options: AttentionOptions
    ) -> None:
        self._function, self._sequences, self._options = function, sequences, options

    def __call__(
        self,
        q: Tensor,  # [Tq, H, d]
        k: Tensor,  # [Tk, KVH, d]
        v: Tensor,  # [Tk, KVH, e]
        sinks: Tensor | None = None,  # [H]
    ) -> Tensor:  # [Tq, H, e]
        """Compute what an `AttentionFunction` does."""
        lay_out, width = self._sequences.lay_out, max(k.shape[2], v.shape[2])
        laid_out = _widened(lay_out(k), width), _widened(lay_out(v), width)
        out = self._function(_widened(q, width), *laid_out, self._sequences, self._options, sinks)
        return out[..., : v.shape[2]]

    def projected(
        self,
        qkv: Tensor,  # [T, H + 2 KVH, d], before rope
        kv_heads: int,
        rope: Rope,
    ) -> Tensor:  # [T, H, d]
        """Compute rope and attention with the kernels that `gpu.serves` the projection with."""
        places = self._sequences.places
        assert (places is None) == (self._sequences.key_rows is None), places
        q, k, v = gpu.lay_out(qkv, kv_heads, rope.cos, rope.sin, rope.interleaved, places)
        return self._function(q, k, v, self._sequences, self._options, None)


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[2] == width else F.pad(x, (0, width - x.shape[2]))


def varlen_kernel(function: Callable[..., Any] | None = None) -> VarlenKernel:
    """Make torch's varlen kernel (FlashAttention-2), whose mask is aligned at the end too.

    Args:
        function: what replaces torch's `varlen_attn` in a test without a GPU.
    """
    from torch.nn.attention.varlen import varlen_attn

    attend: Callable[..., Any] = function or varlen_attn
    # Later versions than 2.11 have the argument, and refuse unequal numbers of heads without it.
    has_switch = "enable_gqa" in inspect.signature(attend).parameters
    switch: dict[str, Any] = {"enable_gqa": True} if has_switch else {}

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        s: Sequences,
        options: AttentionOptions,
        sinks: Tensor | None,
    ) -> Tensor:
        assert sinks is None, "resolve_attention chose a kernel without sinks"
        window = (-1 if options.window is None else options.window - 1, 0)
        out = attend(
            *(q, k, v, s.ends_q, s.ends_k, s.most_q, s.most_k),
            scale=options.scale,
            window_size=window,
            **switch,
        )
        assert isinstance(out, Tensor)
        return out

    return VarlenKernel(run)


class _Take(torch.autograd.Function):
    """Rows by index; gradients of rows taken several times are summed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        wide = torch.promote_types(ctx.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=grad.device)
        return total.index_add_(0, rows, grad.to(wide)).to(ctx.dtype), None
