"""Gated DeltaNet: projections, decay and rate of each head, the recurrence, a gated norm.

The caller computes the recurrence (`Recurs`), as it does attention: it knows which tokens belong
together and where states are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spmdrl.distributed.parallel import copy_to
from spmdrl.models.blocks.activations import activation_function
from spmdrl.models.blocks.delta_rule import DeltaInputs
from spmdrl.models.blocks.projections import Build
from spmdrl.models.fused import rms_norm
from spmdrl.models.low_rank import Applied, added_to
from spmdrl.models.rope import Rope
from spmdrl.models.specs import GatedDelta
from spmdrl.models.tensors import GlobalTensor, TpSplit


class Recurs(Protocol):
    """The part of the decoder's `Attend` for recurrent layers."""

    def recur(self, layer: int, inputs: DeltaInputs) -> Tensor:
        """Compute [T, HV_local, v_dim] over the packed tokens; no state crosses a sequence."""


class GatedNorm(nn.Module):
    """Root-mean-square norm of each head, times silu of a gate; all heads share the weight."""

    def __init__(self, size: int, build: Build) -> None:
        super().__init__()
        self.tp, self.eps = build.tp, build.norm.eps
        self.weight = build.empty(size)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # [T, HV, v_dim] each
        # each rank applies the weight only to its own heads, and its gradients are summed
        normed = rms_norm(x, copy_to(self.weight, self.tp.group), self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        return (normed * F.silu(gate.to(wide))).to(x.dtype)


class DeltaMixer(nn.Module):
    """The module of a `GatedDelta`; tensor parallelism divides heads of keys, with their values.

    The rows of `inputs` are those of the files' projections, one below another: for the fused form
    queries, keys, values and gates head by head, then rates and decays head by head; else all
    queries, keys, values, gates, rates and decays.
    """

    def __init__(self, spec: GatedDelta, hidden: int, build: Build) -> None:
        super().__init__()
        self.spec, self.tp, self.blocks = spec, build.tp, build.blocks
        self.heads, self.v_heads = (
            count // build.tp.size for count in (spec.num_heads, spec.num_v_heads)
        )
        keys, values = self.heads * spec.head_dim, self.v_heads * spec.v_dim
        self.inputs = build.projection(2 * keys + 2 * values + 2 * self.v_heads, hidden)
        self.conv = build.empty(2 * keys + values, spec.conv_size)
        self.log_decay = build.empty(self.v_heads)
        self.step_bias = build.empty(self.v_heads)
        self.norm = GatedNorm(spec.v_dim, build)
        self.out = build.projection(hidden, values)
        self._activate = activation_function(spec.activation)

    def forward(
        self,
        x: Tensor,  # [T, D]
        rope: Rope | None,
        attend: Recurs,
        layer: int,
        adapters: Sequence[Applied] = (),
    ) -> Tensor:  # [T, D]
        assert rope is None, "a recurrence knows no positions"
        to_inputs = added_to(adapters, f"layers.{layer}.attention.inputs")
        to_out = added_to(adapters, f"layers.{layer}.attention.out")
        rows = self.inputs(copy_to(x, self.tp.group), to_inputs)
        mixed, gate, rate, step = self._fused(rows) if self.spec.fused else self._apart(rows)
        wide = torch.promote_types(x.dtype, torch.float32)
        # a decay's logarithm is -exp(A) softplus(a + b), as in Mamba 2
        step = F.softplus(step.to(wide) + self.step_bias.to(wide))
        inputs = DeltaInputs(
            mixed=mixed,
            conv_weight=self._conv_rows(),
            decay=-self.log_decay.to(wide).exp() * step,
            beta=rate.sigmoid(),
            num_heads=self.heads,
            head_dim=self.spec.head_dim,
            activate=self._activate,
        )
        out = self.norm(attend.recur(layer, inputs), gate)
        return self.out.reduced(out.reshape(len(x), -1), self.tp, to_out)

    def _fused(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Split the projections of heads of keys, each with its heads of values: return queries,
        keys and values [T, C], gates [T, HV, v_dim], rates and decays [T, HV].
        """
        spec, count = self.spec, len(rows)
        repeats = spec.num_v_heads // spec.num_heads
        values = repeats * spec.v_dim
        widths = (2 * spec.head_dim + 2 * values, 2 * repeats)
        heads = self.heads // self.blocks
        parts = torch.split(rows.view(count, self.blocks, -1), [heads * n for n in widths], dim=2)
        qkvz, ba = (
            part.reshape(count, self.heads, n) for part, n in zip(parts, widths, strict=True)
        )
        q, k, v, gate = torch.split(qkvz, [spec.head_dim, spec.head_dim, values, values], dim=2)
        rate, step = torch.split(ba, [repeats, repeats], dim=2)
        mixed = torch.cat([part.reshape(count, -1) for part in (q, k, v)], dim=1)
        gate = gate.reshape(count, self.v_heads, spec.v_dim)
        return mixed, gate, rate.reshape(count, -1), step.reshape(count, -1)

    def _apart(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Do what `_fused` does for projections one below another."""
        count, keys = len(rows), self.heads * self.spec.head_dim
        values = self.v_heads * self.spec.v_dim
        if self.blocks == 1:
            channels = 2 * keys + values
            mixed, gate, rate, step = torch.split(
                rows, [channels, values, self.v_heads, self.v_heads], dim=1
            )
        else:
            widths = (keys, keys, values, values, self.v_heads, self.v_heads)
            parts = torch.split(
                rows.view(count, self.blocks, -1), [width // self.blocks for width in widths], dim=2
            )
            q, k, v, gate, rate, step = (part.reshape(count, -1) for part in parts)
            mixed = torch.cat((q, k, v), dim=1)
        return mixed, gate.reshape(count, self.v_heads, self.spec.v_dim), rate, step

    def _conv_rows(self) -> Tensor:  # [C, K]
        """Return the convolution's weights in the order of queries, keys, values."""
        if self.blocks == 1:
            return self.conv
        keys, values = self.heads * self.spec.head_dim, self.v_heads * self.spec.v_dim
        parts = torch.split(
            self.conv.view(self.blocks, -1, self.spec.conv_size),
            [width // self.blocks for width in (keys, keys, values)],
            dim=1,
        )
        return torch.cat([part.flatten(0, 1) for part in parts])


def delta_tensors(spec: GatedDelta, hidden: int) -> dict[str, tuple[GlobalTensor, ...]]:
    """Map local names of a layer's mixer to its tensors, named by `family.STANDARD`'s keys."""
    keys, values = spec.num_heads * spec.head_dim, spec.num_v_heads * spec.v_dim
    channels = 2 * keys + values

    def rows(name: str, *shape: int) -> GlobalTensor:
        return GlobalTensor(name=name, shape=shape, split=TpSplit.ROWS)

    def parts(name: str, *columns: int) -> tuple[GlobalTensor, ...]:
        """Return the rows of queries, keys and values, each of which is divided."""
        ends = (0, keys, 2 * keys, channels)
        return tuple(
            GlobalTensor(name=name, shape=(channels, *columns), split=TpSplit.ROWS, region=region)
            for region in pairwise(ends)
        )

    inputs: tuple[GlobalTensor, ...]
    if spec.fused:
        inputs = (
            rows("delta.qkvz.weight", 2 * keys + 2 * values, hidden),
            rows("delta.ba.weight", 2 * spec.num_v_heads, hidden),
        )
    else:
        inputs = (
            *parts("delta.qkv.weight", hidden),
            rows("delta.z.weight", values, hidden),
            rows("delta.b.weight", spec.num_v_heads, hidden),
            rows("delta.a.weight", spec.num_v_heads, hidden),
        )
    return {
        "attention.inputs.weight": inputs,
        "attention.conv": parts("delta.conv.weight", 1, spec.conv_size),
        "attention.log_decay": (rows("delta.log_decay", spec.num_v_heads),),
        "attention.step_bias": (rows("delta.step_bias", spec.num_v_heads),),
        "attention.norm.weight": (GlobalTensor(name="delta.norm.weight", shape=(spec.v_dim,)),),
        "attention.out.weight": (
            GlobalTensor(name="delta.out.weight", shape=(hidden, values), split=TpSplit.COLUMNS),
        ),
    }
