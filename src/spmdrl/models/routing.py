"""`Routing`: the experts of each token in one forward pass, given or chosen, and their statistics.

A pass without a `Routing` sends every token to its most probable experts and keeps nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.models.config import ModelConfig

EXPERT_CHOICES = "expert_choices"
"""Token column of recorded choices, [T, L, K]: each token's experts in every layer with experts,
packed (see `pack_choices`)."""


def choices_dtype(num_experts: int) -> torch.dtype:
    """Return the dtype that stores expert numbers; its largest value means "not recorded"."""
    return torch.uint8 if num_experts < 256 else torch.int16


def pack_choices(chosen: Tensor, num_experts: int) -> Tensor:  # int64 [..., K], -1: not recorded
    """Pack expert numbers into `choices_dtype`, with the same shape."""
    dtype = choices_dtype(num_experts)
    return chosen.masked_fill(chosen < 0, torch.iinfo(dtype).max).to(dtype)


def unpack_choices(packed: Tensor) -> Tensor:  # [..., K]
    """Unpack to int64 expert numbers, -1 where none was recorded."""
    chosen = packed.long()
    return chosen.masked_fill(chosen == torch.iinfo(packed.dtype).max, -1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Balance:
    """A load-balancing loss per sequence (DeepSeek-V3, https://arxiv.org/abs/2412.19437,
    equations 17 to 20), over the tokens at `places`:

        L_r = sum_i f_i P_i,  f_i = E / (K T) sum_t [i chosen by t],  P_i = 1 / T sum_t p_{i, t}

    for T tokens with probabilities p over E experts, of which K are chosen. It is 1 if all experts
    are used equally. Each sequence has its own loss, so packing and layout do not change it.

    Args:
        places: int64 [M], tokens of the pass.
        row: int64 [M], the sequence that each belongs to.
        counts: [R], the number of tokens of each sequence on all ranks of `group`.
        scale: float32 [R], the factor of each sequence's loss.
        group: the group of ranks that sequences are split over.
    """

    places: Tensor
    row: Tensor
    counts: Tensor
    scale: Tensor
    group: dist.ProcessGroup | None = None

    def loss(self, probabilities: Tensor, chosen: Tensor) -> Tensor:  # [T, E], [T, K]
        """Compute this rank's summands of sum_r scale_r L_r, with gradient."""
        num_experts, top_k = probabilities.shape[1], chosen.shape[1]
        used = chosen[self.places] + self.row[:, None] * num_experts
        loads = torch.zeros(
            len(self.scale) * num_experts, dtype=torch.float32, device=chosen.device
        )
        loads.scatter_add_(0, used.flatten(), torch.ones_like(used, dtype=loads.dtype).flatten())
        if self.group is not None:
            dist.all_reduce(loads, group=self.group)
        factor = self.scale * num_experts / (top_k * self.counts.clamp(min=1).square())
        weights = loads.view(-1, num_experts) * factor[:, None]
        return (probabilities[self.places] * weights[self.row]).sum()


class Routing:
    """The choices of one forward pass, layer by layer; recomputed activations use the same ones.

    Args:
        given: int64 [T, L, K], the choices to use in each layer with experts, -1 where the router
            chooses (routing replay, Ma et al. 2025, https://arxiv.org/abs/2510.11370: the chosen
            experts' weights are still computed from the router's own probabilities).
        balance: the loss to add to the backward pass, for each layer.
    """

    def __init__(
        self, model: ModelConfig, *, given: Tensor | None = None, balance: Balance | None = None
    ) -> None:
        assert model.moe is not None
        self._top_k, self._given, self._balance = model.moe.top_k, given, balance
        self._has_sigmoids = model.moe.scores == "sigmoid"
        self._number = {layer: number for number, layer in enumerate(model.moe_layers)}
        self._chosen: dict[int, Tensor] = {}
        self._own: dict[int, Tensor] = {}
        self._losses: dict[int, Tensor] = {}

    def choose(self, layer: int, ranking: Tensor) -> Tensor:  # [T, E] -> int64 [T, K]
        """Choose the experts of every token in this layer, those of the largest numbers."""
        if layer not in self._chosen:
            own = ranking.topk(self._top_k, dim=-1).indices
            chosen = own
            if self._given is not None:
                given = self._given[:, self._number[layer]]
                chosen = torch.where(given < 0, own, given)
            self._own[layer], self._chosen[layer] = own, chosen
        return self._chosen[layer]

    def balanced(self, layer: int, scores: Tensor, chosen: Tensor) -> Tensor:
        """Return `scores` [T, E], with the layer's balance loss in their backward pass.

        The loss's probabilities are the scores, sigmoids divided by their sum.
        """
        if self._balance is None or not scores.requires_grad:
            return scores
        shares = scores / scores.sum(dim=-1, keepdim=True) if self._has_sigmoids else scores
        loss = self._balance.loss(shares, chosen)
        self._losses[layer] = loss.detach()
        result: Tensor = _WithLoss.apply(scores, loss)  # type: ignore[no-untyped-call]
        return result

    @property
    def numbers(self) -> list[int]:
        """Indices, among the layers with experts, of those that have chosen: a stage's own."""
        return sorted(self._number[layer] for layer in self._chosen)

    def chosen(self) -> Tensor:
        """Return the experts that were used, int64 [T, L, K], in ascending order of layers."""
        return torch.stack([self._chosen[layer] for layer in sorted(self._chosen)], dim=1)

    def num_changed(self, places: Tensor) -> Tensor:  # int64 [M]
        """Count the choices at these tokens that are not the router's own."""
        if self._given is None:
            return torch.zeros((), device=places.device)
        chosen, own = (
            self.chosen()[places],
            torch.stack([self._own[layer][places] for layer in sorted(self._own)], dim=1),
        )
        kept = (chosen[..., :, None] == own[..., None, :]).any(dim=-1)
        return (~kept).sum()

    def balance_loss(self) -> Tensor:
        """Return this rank's summands of the loss that was added, summed over the layers."""
        return sum(self._losses.values(), torch.zeros(()))


class _WithLoss(torch.autograd.Function):
    """The identity, through which a loss enters the backward pass: its gradient is 1, like that of
    the loss with which the pass begins (Megatron-Core's `MoEAuxLossAutoScaler` does the same).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())
