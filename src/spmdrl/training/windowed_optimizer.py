"""AdamW whose masters and moments live on the host and pass through the device while it steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from spmdrl.memory.host_state import HostState, Range
from spmdrl.models.local_shards import LocalTensors
from spmdrl.training.optimizer import MOMENTS, device_factors, prepare_step
from spmdrl.training.options import TrainOptions
from spmdrl.training.weights import Leaf

Span = tuple[Leaf, slice, Range]
"""A range of a leaf's elements, and its state on the device."""


class WindowedOptimizer:
    """The same updates as `Optimizer`'s, for a state that the device has no room for.

    Args:
        leaves: those that train; the masters of those that have their own are `state`'s.
        state: what holds the moments too.
    """

    def __init__(self, leaves: Sequence[Leaf], options: TrainOptions, state: HostState) -> None:
        self._leaves, self._options, self._state = tuple(leaves), options, state
        self._moments = {
            leaf.name: tuple(state.hold(leaf.weight) for _ in MOMENTS) for leaf in leaves
        }
        self._live = [leaf for leaf in self._leaves if leaf.weight.numel()]
        self._num_updates: Tensor | None = None
        """Updates that the moments have seen: float32 []."""

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], lr: float, norm: Tensor) -> None:
        """Update masters and weights, see `Optimizer.step`; the host waits until all is home."""
        own = [gradients[leaf.name] for leaf in self._live]
        factors: dict[str, Any] = {}
        if norm.is_cuda:
            factors = device_factors(norm, self._options.clip_norm)
        elif not prepare_step([], own, norm, self._options.clip_norm):
            return
        count = self._count(norm.device)
        after = count
        groups = [(*self._own_master(leaf), *self._moments[leaf.name]) for leaf in self._live]
        for ranges in self._state.passing(groups):
            spans = [(self._live[r.group], slice(r.start, r.stop), r) for r in ranges]
            for decays in (True, False):
                alike = [span for span in spans if span[0].decay is decays]
                if alike:
                    after = self._update(alike, gradients, lr, count, factors)
        self._num_updates = after

    def tensors(self) -> LocalTensors:
        """Return `exp_avg/NAME` and `exp_avg_sq/NAME` of every leaf, on the host."""
        return {
            f"{moment}/{leaf.name}": (self._moments[leaf.name][at], leaf.slices)
            for at, moment in enumerate(MOMENTS)
            for leaf in self._leaves
        }

    def resident(self) -> list[Tensor]:
        """Return nothing: no tensor of its state is on the device between steps."""
        return []

    def set_step_count(self, count: int) -> None:
        """Tell AdamW's bias correction how many updates the moments have seen."""
        self._num_updates = torch.tensor(float(count))

    def _count(self, device: torch.device) -> Tensor:
        if self._num_updates is None:
            self._num_updates = torch.zeros(())
        return self._num_updates.to(device)

    @staticmethod
    def _own_master(leaf: Leaf) -> tuple[Tensor, ...]:
        return (leaf.master,) if leaf.has_own_master else ()

    def _update(
        self,
        spans: Sequence[Span],
        gradients: Mapping[str, Tensor],
        lr: float,
        count: Tensor,
        factors: Mapping[str, Any],
    ) -> Tensor:
        """Update ranges of leaves that all decay or all do not; returns the count after it."""
        masters = [
            state.here[0] if leaf.has_own_master else _within(leaf.weight, span)
            for leaf, span, state in spans
        ]
        # fused kernels count each tensor's updates on the device
        counts = list(count.expand(len(spans)).clone().unbind())
        adamw(
            masters,
            [_within(gradients[leaf.name], span) for leaf, span, _ in spans],
            [state.here[-2] for *_, state in spans],
            [state.here[-1] for *_, state in spans],
            [],
            counts,
            fused=True,
            amsgrad=False,
            beta1=self._options.betas[0],
            beta2=self._options.betas[1],
            lr=lr,
            weight_decay=self._options.weight_decay if spans[0][0].decay else 0.0,
            eps=self._options.eps,
            maximize=False,
            **factors,
        )
        own = [(leaf, span, state.here[0]) for leaf, span, state in spans if leaf.has_own_master]
        if own:
            weights = [_within(leaf.weight, span) for leaf, span, _ in own]
            torch._foreach_copy_(weights, [master for *_, master in own])
        return counts[0]


def _within(tensor: Tensor, span: slice) -> Tensor:
    return tensor.detach().view(-1)[span]
