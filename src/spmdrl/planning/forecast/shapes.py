"""`RankShapes`: the matrices that one rank of a role computes with, counted in elements.

All is in closed form, so that a model with many experts takes microseconds. Ranks of a role hold
equally much, apart from the stages of a pipeline: the last one, which has the head, stands for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.sharding import Head, fused_tensors
from spmdrl.models.specs import MoeMlp
from spmdrl.models.tensors import GlobalTensor, TpSplit
from spmdrl.models.widths import layer_kinds
from spmdrl.planning.forecast.mixers import MixerShape, mixer_shape


@dataclass(frozen=True, kw_only=True)
class RankShapes:
    """Elements of matrices over all layers of one rank, and widths.

    Args:
        layers, expert_layers: layers on the rank; those of them that have experts.
        dense: elements of matrices that every token is multiplied by.
        routed: elements of experts that a token is multiplied by, its experts on other ranks
            counted here for the tokens of others that come in exchange.
        experts: elements of the experts that the rank holds.
        first: elements of the first layer's q, k and v.
        last: elements of the last products of dense layers, which a recomputation leaves out:
            torch's checkpoints stop once they have what a backward pass needs.
        head: elements of the head.
        embedding: elements of the token embedding that are not the head's.
        added, added_first, held_added: an adapter's elements: that a token is multiplied by; those
            of the A of the first layer's q, k and v; that the rank holds.
        mixers: each kind of mixer, with the number of layers on the rank that have it.
        width: values of the residual stream.
        mlp: values of the MLP between its products, per token and layer.
        top_k, num_experts: experts of a token, and of a layer; 0 without experts.
    """

    layers: float
    expert_layers: float
    dense: float
    routed: float
    experts: float
    first: float
    last: float
    head: float
    embedding: float
    added: float
    added_first: float
    held_added: float
    mixers: tuple[tuple[MixerShape, float], ...]
    width: int
    mlp: float
    top_k: int
    num_experts: int

    @property
    def held(self) -> float:
        """Elements that the rank holds after a gather, without those of norms and an adapter."""
        return self.dense + self.experts + self.head + self.embedding

    def layer_values(self) -> float:
        """Values that a layer reads and writes between its products, per token, in a forward pass:
        norms, residual sums, rotations, attention's operands, the activation, rows of experts.
        """
        heads = self.total(lambda mixer: mixer.operands) / max(1.0, self.layers)
        rows = 6 * self.top_k * self.width * self.expert_layers / max(1.0, self.layers)
        return 16 * self.width + 6 * heads + 6 * self.mlp + rows

    def total(self, count: Callable[[MixerShape], float]) -> float:
        """Sum a number of each layer's mixer over the rank's layers."""
        return sum(number * count(mixer) for mixer, number in self.mixers)


def rank_shapes(
    model: ModelConfig,
    degrees: Mapping[str, int],
    head: Head = "lm",
    adapter: Adapter | None = None,
) -> RankShapes:
    """Shapes of one rank of a role with these degrees."""
    tp, ep, pp = degrees["tp"], degrees.get("ep", 1), degrees.get("pp", 1)
    width, moe = model.hidden_size, model.moe
    kinds = layer_kinds(model)
    mixers = [(mixer_shape(spec.mixer, width, tp), number) for spec, number in kinds]
    sparse = len(model.moe_layers)
    dense_values = sum(
        number * spec.mlp.width / tp for spec, number in kinds if not isinstance(spec.mlp, MoeMlp)
    )
    dense: float = sum(number * mixer.matrices for mixer, number in mixers)
    dense += 3 * width * dense_values
    routed = experts = 0.0
    values = dense_values
    if moe is not None:
        one = 3 * width * moe.width
        dense += sparse * moe.num_experts * width  # the router, alike on all ranks of tp
        shared = 0 if moe.shared is None else moe.shared.width / tp
        gates = moe.shared is not None and moe.shared.gate
        dense += sparse * width * (3 * shared + (1 if gates else 0))
        routed = sparse * moe.top_k * one / tp
        experts = sparse * moe.num_experts / ep * one / (tp // math.gcd(tp, ep))
        values += (moe.top_k * moe.width / tp + shared) * sparse
    adapted = _adapted(model, adapter)
    rows = model.vocab_size / tp * width
    last = width * dense_values
    if any(local.endswith(".mlp.down.weight") for local, _ in adapted):
        last = 0.0
    added, added_first, held_added = _added(model, adapter, adapted, tp, ep)
    return RankShapes(
        layers=model.num_layers / pp,
        expert_layers=sparse / pp,
        dense=dense / pp,
        routed=routed / pp,
        experts=experts / pp,
        first=mixer_shape(model.layers[0].mixer, width, tp).inputs,
        last=last / pp,
        head=rows if head == "lm" else width,
        embedding=0.0 if head == "lm" and model.tie_embeddings else rows,
        added=added / pp,
        added_first=added_first,
        held_added=held_added / pp,
        mixers=tuple((mixer, number / pp) for mixer, number in mixers),
        width=width,
        mlp=values / model.num_layers,
        top_k=0 if moe is None else moe.top_k,
        num_experts=0 if moe is None else moe.num_experts,
    )


def _adapted(model: ModelConfig, adapter: Adapter | None) -> list[tuple[str, GlobalTensor]]:
    """Return the adapter's targets, each once, with their projections' local names."""
    if adapter is None:
        return []
    table = fused_tensors(model).items()
    found = {t.name: (local, t) for local, tensors in table for t in tensors}
    return [found[name] for name in adapter.targets]


def _added(
    model: ModelConfig,
    adapter: Adapter | None,
    adapted: Sequence[tuple[str, GlobalTensor]],
    tp: int,
    ep: int,
) -> tuple[float, float, float]:
    """Elements of an adapter: A is whole where tp cuts rows, B where it cuts columns."""
    used = first = held = 0.0
    for local, target in adapted:
        assert adapter is not None
        (rows, columns), rank = target.shape, adapter.targets[target.name].rank
        if target.expert is not None:
            assert model.moe is not None, target.name
            size: float = rank * (rows + columns)
            used += size * model.moe.top_k / model.moe.num_experts / tp
            copies = model.moe.num_experts if adapter.shares_experts else ep
            held += size / copies / (tp // math.gcd(tp, ep))
            continue
        by_columns, by_none = (target.split is split for split in (TpSplit.COLUMNS, TpSplit.NONE))
        size = rank * (columns / (tp if by_columns else 1))
        size += rank * (rows / (1 if by_columns or by_none else tp))
        used += size
        held += size
        if local.startswith("layers.0.attention.") and not by_columns:
            first += rank * columns
    return used, first, held
