"""`CallAdapters`: the adapters that apply in one call of the native engine, and the rows of each.

Rows of one step may have different adapters: every adapter's product is computed for all rows, and
a factor of 0 or 1 for each row chooses. A and B are small, so this costs less than sorting rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spmdrl.models.adapter_weights import AdapterWeights
from spmdrl.models.low_rank import Applied
from spmdrl.rollout.native.step_plan import StepPlan
from spmdrl.rollout.protocol import Request


@dataclass(frozen=True, kw_only=True, eq=False)
class CallAdapters:
    """The adapters that the requests of a call name.

    Args:
        weights: name -> adapter.
        by_row: whether some rows have another adapter than others, or none.
        dtype: dtype that is computed in.
        experts_only: whether all other weights have the adapter merged.
    """

    weights: Mapping[str, AdapterWeights]
    by_row: bool = False
    dtype: torch.dtype = torch.float32
    experts_only: bool = False

    @property
    def variant(self) -> Hashable:
        """Value that distinguishes steps with other kernels or other addresses."""
        return (self.by_row, self.experts_only, *self.weights)

    @property
    def only(self) -> AdapterWeights | None:
        """The adapter that applies to all rows, if one does."""
        return next(iter(self.weights.values()), None) if not self.by_row else None

    @property
    def num_factors(self) -> int:
        """Number of the tensors that `factors` returns."""
        return len(self.weights) if self.by_row else 0

    def factors(self, plan: StepPlan, *, pad_to: int = 0) -> list[Tensor]:
        """Build on the host each adapter's factor of every row, [T, 1]; none if all are 1.

        Args:
            pad_to: pad to this many rows, with rows that have no adapter.
        """
        if not self.by_row:
            return []
        asked = [sample.request.adapter for sample in plan.decodes]
        for chunk in plan.chunks:
            asked += [chunk.sample.request.adapter] * (chunk.stop - chunk.start)
        asked += [None] * (pad_to - len(asked))
        return [
            torch.tensor([[name == own] for name in asked], dtype=self.dtype)
            for own in self.weights
        ]

    def applied(self, factors: Sequence[Tensor]) -> list[Applied]:
        """Return the adapters as the decoder takes them, with their `factors` on the device."""
        if not self.by_row:
            return [
                Applied(weights=weights, experts_only=self.experts_only)
                for weights in self.weights.values()
            ]
        return [
            Applied(weights=weights, rows=rows)
            for weights, rows in zip(self.weights.values(), factors, strict=True)
        ]


NO_ADAPTERS = CallAdapters(weights={})


def adapters_of(
    requests: Sequence[Request], held: Mapping[str, AdapterWeights], dtype: torch.dtype
) -> CallAdapters:
    """Find the adapters of a call among those that the engine holds."""
    asked = {request.adapter if request.adapter in held else None for request in requests}
    weights = {name: own for name, own in held.items() if name in asked}
    return CallAdapters(weights=weights, by_row=len(asked) > 1, dtype=dtype)
