"""`Routing`: which experts the tokens of one forward pass go to, given or chosen, and what of it.

A pass without a `Routing` lets every token go to its most probable experts and keeps nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .experts import MoeConfig

EXPERT_CHOICES = "expert_choices"
"""The token column with recorded choices, [T, L, K]: those of each token in every layer that has
experts, packed (see `pack_choices`)."""


def choices_dtype(num_experts: int) -> torch.dtype:
    """In which expert numbers are kept and sent; the dtype's largest value means "not recorded"."""
    return torch.uint8 if num_experts < 256 else torch.int16


def pack_choices(chosen: Tensor, num_experts: int) -> Tensor:  # int64 [..., K], -1: not recorded
    """Expert numbers in `choices_dtype`, same shape."""
    dtype = choices_dtype(num_experts)
    return chosen.masked_fill(chosen < 0, torch.iinfo(dtype).max).to(dtype)


def unpack_choices(packed: Tensor) -> Tensor:  # [..., K]
    """int64 expert numbers, -1 where none was recorded."""
    chosen = packed.long()
    return chosen.masked_fill(chosen == torch.iinfo(packed.dtype).max, -1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Balance:
    """A load-balancing loss for each sequence (DeepSeek-V3, https://arxiv.org/abs/2412.19437,
    equations 17 to 20), over the tokens at `places`:

        L_r = sum_i f_i P_i,  f_i = E / (K T) sum_t [i chosen by t],  P_i = 1 / T sum_t p_{i, t}

    of T tokens with probabilities p over E experts, of which K are chosen. It is 1 where all
    experts are used alike. It looks at one sequence alone, so packing and layout do not change it.

    Args:
        places: int64 [M], tokens of the pass.
        row: int64 [M], the sequence that each belongs to.
        counts: [R], tokens of each sequence, on all ranks of `group`.
        scale: float32 [R], what each sequence's loss is multiplied by.
        group: over whose ranks sequences are split.
    """

    places: Tensor
    row: Tensor
    counts: Tensor
    scale: Tensor
    group: dist.ProcessGroup | None = None

    def loss(self, probabilities: Tensor, chosen: Tensor) -> Tensor:  # [T, E], [T, K]
        """This rank's summands of sum_r scale_r L_r, with gradient."""
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
    """The choices of one forward pass, layer by layer; activations computed again take the same.

    Args:
        given: int64 [T, L, K], for each layer with experts: the choices to take, -1 where a token's
            own are taken (routing replay, Ma et al. 2025, https://arxiv.org/abs/2510.11370: the
            chosen experts' weights are still computed from the router's own probabilities).
        balance: add this loss to the backward pass, for each layer.
    """

    def __init__(
        self, moe: MoeConfig, *, given: Tensor | None = None, balance: Balance | None = None
    ) -> None:
        self._moe, self._given, self._balance = moe, given, balance
        self._number = {layer: number for number, layer in enumerate(moe.layers)}
        self._chosen: dict[int, Tensor] = {}
        self._own: dict[int, Tensor] = {}
        self._losses: dict[int, Tensor] = {}

    def choose(self, layer: int, probabilities: Tensor) -> Tensor:  # [T, E] -> int64 [T, K]
        """The experts of every token in this layer."""
        if layer not in self._chosen:
            own = probabilities.topk(self._moe.top_k, dim=-1).indices
            chosen = own
            if self._given is not None:
                given = self._given[:, self._number[layer]]
                chosen = torch.where(given < 0, own, given)
            self._own[layer], self._chosen[layer] = own, chosen
        return self._chosen[layer]

    def balanced(self, layer: int, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """`probabilities` [T, E], whose backward pass has the layer's balance loss in it."""
        if self._balance is None or not probabilities.requires_grad:
            return probabilities
        loss = self._balance.loss(probabilities, chosen)
        self._losses[layer] = loss.detach()
        result: Tensor = _WithLoss.apply(probabilities, loss)  # type: ignore[no-untyped-call]
        return result

    @property
    def numbers(self) -> list[int]:
        """Which of the model's layers with experts have chosen: in a pipeline, those of a stage."""
        return sorted(self._number[layer] for layer in self._chosen)

    def chosen(self) -> Tensor:
        """int64 [T, L, K]: the experts that were used, in ascending order of layers."""
        return torch.stack([self._chosen[layer] for layer in sorted(self._chosen)], dim=1)

    def num_changed(self, places: Tensor) -> Tensor:  # int64 [M]
        """Of the choices at these tokens, how many are not the router's own."""
        if self._given is None:
            return torch.zeros((), device=places.device)
        chosen, own = (
            self.chosen()[places],
            torch.stack([self._own[layer][places] for layer in sorted(self._own)], dim=1),
        )
        kept = (chosen[..., :, None] == own[..., None, :]).any(dim=-1)
        return (~kept).sum()

    def balance_loss(self) -> Tensor:
        """This rank's summands of the loss that was added, of all layers together."""
        return sum(self._losses.values(), torch.zeros(()))


class _WithLoss(torch.autograd.Function):
    """The identity, through which a loss enters the backward pass: its gradient is 1, as that of
    the loss that the pass begins with (Megatron-Core's `MoEAuxLossAutoScaler` does the same).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())
