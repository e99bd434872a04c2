"""Mixtures of experts in training: replayed choices, the balance loss, and metrics of use."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.memory.host_copies import to_device
from spmdrl.models.config import ModelConfig
from spmdrl.models.routing import EXPERT_CHOICES, Balance, Routing, unpack_choices
from spmdrl.training.context import LocalStream
from spmdrl.training.packing import Microbatch

EXPERT_METRICS = ("expert_load", "experts_idle", "balance_loss")
"""Metrics that describe an optimizer step as a whole."""

EXPERT_SUMS = ("expert_load_max", "replay_changed")
"""Metrics that are a maximum and a sum over tokens."""


def make_routing(
    model: ModelConfig,
    rows: Batch,
    microbatch: Microbatch,
    stream: LocalStream,
    device: torch.device,
    balance: Balance | None = None,
) -> Routing | None:
    """Make the routing of one pass over a microbatch; None for a dense model.

    If the rows have the token column `expert_choices`, it is replayed.
    """
    if model.moe is None:
        return None
    given = None
    if EXPERT_CHOICES in rows.tokens and rows.num_tokens > 0:
        recorded = rows[EXPERT_CHOICES]
        check_choices(recorded, model)
        choices, is_unknown = to_device((recorded[stream.origin], stream.origin < 0), device)
        given = unpack_choices(choices).masked_fill(is_unknown[:, None, None], -1)
    return Routing(model, given=given, balance=balance)


def check_choices(recorded: Tensor, model: ModelConfig) -> None:
    """Raise ValueError unless the recorded choices fit this model's experts."""
    assert model.moe is not None
    wanted = (len(model.moe_layers), model.moe.top_k)
    if tuple(recorded.shape[1:]) != wanted:
        raise ValueError(
            f"the column {EXPERT_CHOICES!r} has {tuple(recorded.shape[1:])} choices for a token, "
            f"the model has {wanted} (layers with experts, experts of a token): was it recorded "
            "with another model?"
        )


def make_balance(
    rows: Batch,
    microbatch: Microbatch,
    stream: LocalStream,
    device: torch.device,
    *,
    coefficient: float,
    normaliser: float,
    group: dist.ProcessGroup | None,
) -> Balance | None:
    """Make the balance loss: the mean over sequences, weighted by `loss_share`. A sequence is the
    loss tokens of a row, so that prompts computed once for several rows change nothing.
    """
    if coefficient == 0 or len(microbatch.predict) == 0:
        return None
    shares = rows["loss_share"][microbatch.rows].float() * (coefficient / normaliser)
    counts = torch.bincount(microbatch.row, minlength=len(microbatch.rows))
    places = stream.predict[: len(stream.read)]
    places, row, counts, scale = to_device(
        (places, microbatch.row[stream.read], counts, shares), device
    )
    return Balance(places=places, row=row, counts=counts, scale=scale, group=group)


class ExpertUse:
    """Sums of expert use over the places that this rank reads in one minibatch."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        assert model.moe is not None
        self._model, self._moe = model, model.moe
        size = len(model.moe_layers) * model.moe.num_experts
        # tokens per expert, layer by layer; choices changed by a replay; balance losses
        self._sums = torch.zeros(size + 2, dtype=torch.float64, device=device)

    def add(self, routing: Routing, stream: LocalStream) -> None:
        numbers = routing.numbers
        if not numbers:  # a pipeline stage of dense layers
            return
        places, layers = to_device(
            (stream.predict[: len(stream.read)], torch.tensor(numbers) * self._moe.num_experts),
            self._sums.device,
        )
        chosen = routing.chosen()[places]  # [M, L, K]
        used = (chosen + layers[:, None]).flatten()
        self._sums.scatter_add_(0, used, torch.ones_like(used, dtype=torch.float64))
        self._sums[-2] += routing.num_changed(places) / (
            len(self._model.moe_layers) * self._moe.top_k
        )
        self._sums[-1] += routing.balance_loss()

    def metrics(
        self, group: dist.ProcessGroup | None, *, coefficient: float, is_replay: bool
    ) -> dict[str, float]:
        """Combine the sums over the ranks of `group`, all of which have different tokens.

        `expert_load_max` and `expert_load` are the tokens of a layer's busiest expert, relative to
        an even share (1): of the worst layer, and the mean over layers. `experts_idle` is the share
        of experts without a token. `replay_changed` sums over tokens the share of choices that the
        trainer would not have made. `balance_loss` is the mean over layers and sequences.
        """
        sums = self._sums.clone()
        if group is not None:
            dist.all_reduce(sums, group=group)
        loads = sums[:-2].view(len(self._model.moe_layers), -1)
        even = loads.mean(dim=1).clamp(min=1e-9)
        busiest = loads.amax(dim=1) / even
        found = {
            "expert_load_max": busiest.max(),
            "expert_load": busiest.mean(),
            "experts_idle": (loads == 0).double().mean(),
        }
        if is_replay:
            found["replay_changed"] = sums[-2]
        if coefficient:
            found["balance_loss"] = sums[-1] / (coefficient * len(self._model.moe_layers))
        values = torch.stack(list(found.values())).tolist()
        return dict(zip(found, values, strict=True))
