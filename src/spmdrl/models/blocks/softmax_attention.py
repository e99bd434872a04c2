"""Grouped-query attention: projections, norms of queries and keys, rope, a gate, sinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from spmdrl.distributed.parallel import copy_to
from spmdrl.models.blocks.projections import Build, Norm, WideNorm
from spmdrl.models.kernels import gpu
from spmdrl.models.low_rank import Added, Applied, added_to
from spmdrl.models.rope import Rope
from spmdrl.models.specs import SoftmaxAttention
from spmdrl.models.tensors import GlobalTensor, TpSplit, heads_per_rank


class Attend(Protocol):
    """Attention of one layer over the packed tokens, with that layer's `AttentionOptions`."""

    @property
    def takes_latents(self) -> bool:
        """Whether latent attention gives it latent keys [T, 1, kv_rank + rope_dim], whose first
        kv_rank dims are the values, in place of every head's own.
        """

    def __call__(
        self,
        layer: int,
        q: Tensor,  # [T, H_local, d], after rope
        k: Tensor,  # [T, KVH_local, d], after rope
        v: Tensor,  # [T, KVH_local, v_dim]; q, k, v are strided views, d contiguous
        sinks: Tensor | None = None,  # [H_local]
    ) -> Tensor:  # [T, H_local, v_dim]
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Turning:
    """Names what is done to queries and keys before attention.

    Args:
        q_norm, k_norm: norms of every head by itself; None: there are none.
        rope: None: the layer knows no positions.
    """

    q_norm: Norm | None = None
    k_norm: Norm | None = None
    rope: Rope | None = None


@runtime_checkable
class AttendProjected(Protocol):
    """Attention with a kernel for what comes before it; used where `gpu.serves` the projection."""

    def attend_projected(
        self,
        layer: int,
        qkv: Tensor,  # [T, H_local + 2 KVH_local, d], before norms and rope
        turning: Turning,
        sinks: Tensor | None = None,  # [H_local]
    ) -> Tensor:  # [T, H_local, d]
        """Compute norms, rope and attention, without gradient."""


@runtime_checkable
class AttendTurned(Protocol):
    """Attention with a kernel for rope before it, and their gradient; tried where a layer has rope
    and neither norms of heads nor sinks.
    """

    def attend_turned(
        self,
        layer: int,
        qkv: Tensor,  # [T, H_local + 2 KVH_local, d], before rope
        kv_heads: int,
        rope: Rope,
    ) -> Tensor | None:  # [T, H_local, d]
        """Compute rope and attention; None where the kernel does not serve."""


class Heads(NamedTuple):
    """Operands of attention, strided views of which d is contiguous.

    Args:
        q, k, v: see `Attend`.
        gate: [T, H_local, d], if there is one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None


class Attention(nn.Module):
    """The module of a `SoftmaxAttention`."""

    def __init__(self, spec: SoftmaxAttention, hidden: int, build: Build) -> None:
        super().__init__()
        self.spec, self.tp, self.blocks = spec, build.tp, build.blocks
        self.heads = spec.num_heads // build.tp.size
        self.kv_heads = heads_per_rank(spec.num_kv_heads, build.tp.size)
        self.query_dim = spec.head_dim * (2 if spec.gate else 1)
        q_rows, kv_rows = self.heads * self.query_dim, self.kv_heads * spec.head_dim
        self.qkv = build.projection(q_rows + 2 * kv_rows, hidden, bias=spec.qkv_bias)
        self.q_norm: Norm | WideNorm | None = None
        self.k_norm: Norm | WideNorm | None = None
        if spec.qk_norm == "heads":
            self.q_norm = build.rms_norm(spec.head_dim)
            self.k_norm = build.rms_norm(spec.head_dim)
        elif spec.qk_norm == "all":
            copies = self.kv_heads * build.tp.size // spec.num_kv_heads
            self.q_norm = WideNorm(self.heads * spec.head_dim, build)
            self.k_norm = WideNorm(kv_rows, build, copies)
        self.sinks = build.empty(self.heads) if spec.sinks else None
        self.out = build.projection(hidden, self.heads * spec.head_dim, bias=spec.out_bias)

    def forward(
        self,
        x: Tensor,
        rope: Rope | None,
        attend: Attend,
        layer: int,
        adapters: Sequence[Applied] = (),
    ) -> Tensor:
        to_qkv = added_to(adapters, f"layers.{layer}.attention.qkv")
        to_out = added_to(adapters, f"layers.{layer}.attention.out")
        rows = self._in_order(self.qkv(copy_to(x, self.tp.group), to_qkv))
        if not self.spec.gate:
            turning = self._turning(rope)
            if (
                turning is not None
                and isinstance(attend, AttendProjected)
                and not torch.is_grad_enabled()
                and gpu.serves(rows)
            ):
                found = attend.attend_projected(layer, rows, turning, self.sinks)
                return self.closed(found, None, to_out)
            if (turned := self._turned(layer, rows, rope, attend)) is not None:
                return self.closed(turned, None, to_out)
        heads = self._heads(rows, rope)
        return self.closed(self.attended(layer, heads, attend), heads.gate, to_out)

    def opened(self, x: Tensor, rope: Rope | None, to_qkv: Added) -> Heads:
        """Compute what comes before attention."""
        return self._heads(self._in_order(self.qkv(copy_to(x, self.tp.group), to_qkv)), rope)

    def attended(self, layer: int, heads: Heads, attend: Attend) -> Tensor:  # [T, H_local, d]
        sinks = () if self.sinks is None else (self.sinks,)
        return attend(layer, heads.q, heads.k, heads.v, *sinks)

    def closed(
        self,
        attended: Tensor,  # [T, H_local, d]
        gate: Tensor | None,
        to_out: Added,
    ) -> Tensor:  # [T, D]
        """Compute what follows attention."""
        out = attended.reshape(attended.shape[0], -1)
        if gate is not None:
            out = out * torch.sigmoid(gate.reshape(out.shape))
        return self.out.reduced(out, self.tp, to_out)

    def _heads(self, rows: Tensor, rope: Rope | None) -> Heads:
        gate = None
        if self.spec.gate:
            q, gate, k, v = self._with_gate(rows)
            q, k = self._normed(q, k)
            qk = torch.cat((q, k), dim=1)
        else:
            # Splits, not slices: a split's backward is one copy, each slice's is a tensor of zeros.
            qk, v = torch.split(rows, [self.heads + self.kv_heads, self.kv_heads], dim=1)
            if self.q_norm is not None:
                q, k = self._normed(*torch.split(qk, [self.heads, self.kv_heads], dim=1))
                qk = torch.cat((q, k), dim=1)
        if rope is not None:
            qk = rope.turn(qk)
        q, k = torch.split(qk, [self.heads, self.kv_heads], dim=1)
        return Heads(q=q, k=k, v=v, gate=gate)

    def _turned(self, layer: int, qkv: Tensor, rope: Rope | None, attend: Attend) -> Tensor | None:
        """Compute rope and attention where the caller has a kernel for both."""
        is_plain = self.q_norm is None and self.sinks is None
        if rope is None or not is_plain or not gpu.runs_on(qkv.device):
            return None
        if not isinstance(attend, AttendTurned):
            return None
        return attend.attend_turned(layer, qkv, self.kv_heads, rope)

    def _turning(self, rope: Rope | None) -> Turning | None:
        """Return what a kernel is to do; None for what it does not: norms of all heads together."""
        if isinstance(self.q_norm, WideNorm) or isinstance(self.k_norm, WideNorm):
            return None
        return Turning(q_norm=self.q_norm, k_norm=self.k_norm, rope=rope)

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.q_norm, Norm) and isinstance(self.k_norm, Norm):
            return self.q_norm(q, self.tp), self.k_norm(k, self.tp)
        if isinstance(self.q_norm, WideNorm) and isinstance(self.k_norm, WideNorm):
            return self.q_norm(q), self.k_norm(k)
        return q, k

    def _in_order(self, qkv: Tensor) -> Tensor:  # [T, rows] -> [T, H + 2 KVH, d]
        """Arrange all heads of q, then of k, then of v; with gates rows stay as they are."""
        if self.spec.gate:
            return qkv
        if self.blocks == 1:
            return qkv.view(len(qkv), -1, self.spec.head_dim)
        heads, kv_heads = self.heads // self.blocks, self.kv_heads // self.blocks
        parts = qkv.view(len(qkv), self.blocks, -1, self.spec.head_dim)
        q, k, v = torch.split(parts, [heads, kv_heads, kv_heads], dim=2)
        return torch.cat((q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)), dim=1)

    def _with_gate(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, the gate of each head, k and v; every head's gate follows its query."""
        d = self.spec.head_dim
        rows = self.heads * 2 * d, self.kv_heads * d, self.kv_heads * d
        parts = qkv.view(len(qkv), self.blocks, -1)
        q, k, v = torch.split(parts, [n // self.blocks for n in rows], dim=2)
        q, gate = q.reshape(len(qkv), self.heads, 2 * d).chunk(2, dim=-1)
        return q, gate, k.reshape(len(qkv), -1, d), v.reshape(len(qkv), -1, d)


def attention_tensors(spec: SoftmaxAttention, hidden: int) -> dict[str, tuple[GlobalTensor, ...]]:
    """Map local names of a layer's attention to its tensors, named by `family.STANDARD`'s keys."""
    q_rows = spec.num_heads * spec.head_dim * (2 if spec.gate else 1)
    kv_rows, kv_heads = spec.num_kv_heads * spec.head_dim, spec.num_kv_heads

    def qkv(kind: str, *columns: int) -> tuple[GlobalTensor, ...]:
        return (
            GlobalTensor(name=f"attention.q.{kind}", shape=(q_rows, *columns), split=TpSplit.ROWS),
            *(
                GlobalTensor(
                    name=f"attention.{part}.{kind}",
                    shape=(kv_rows, *columns),
                    split=TpSplit.KV_ROWS,
                    heads=kv_heads,
                )
                for part in ("k", "v")
            ),
        )

    table = {"attention.qkv.weight": qkv("weight", hidden)}
    if spec.qkv_bias:
        table["attention.qkv.bias"] = qkv("bias")
    if spec.qk_norm != "none":
        wide = spec.qk_norm == "all"
        for part, heads in (("q", spec.num_heads), ("k", kv_heads)):
            split = (TpSplit.ROWS if part == "q" else TpSplit.KV_ROWS) if wide else TpSplit.NONE
            name = f"attention.{part}_norm.weight"
            shape = (heads * spec.head_dim if wide else spec.head_dim,)
            table[name] = (GlobalTensor(name=name, shape=shape, split=split, heads=heads),)
    if spec.sinks:
        table["attention.sinks"] = (
            GlobalTensor(name="attention.sinks", shape=(spec.num_heads,), split=TpSplit.ROWS),
        )
    table["attention.out.weight"] = (
        GlobalTensor(
            name="attention.out.weight",
            shape=(hidden, spec.num_heads * spec.head_dim),
            split=TpSplit.COLUMNS,
        ),
    )
    if spec.out_bias:
        table["attention.out.bias"] = (GlobalTensor(name="attention.out.bias", shape=(hidden,)),)
    return table
