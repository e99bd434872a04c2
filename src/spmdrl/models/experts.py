"""The part of a model's configuration that describes experts, and their Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spmdrl.models.fields import Fields

MOST_EXPERTS = 65_536


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """The experts of a model; all its layers with experts are alike.

    Args:
        top_k: number of experts that a token is routed to.
        intermediate_size: width of one expert.
        normalise: whether the chosen experts' probabilities are divided by their sum.
        layers: the layers that have experts, ascending; the others are dense.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    normalise: bool
    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """The tensors of one layer with experts, after `model.layers.{i}.`.

    Args:
        router: name of the router, [num_experts, hidden_size].
        gate, up: names of tensors [intermediate_size, hidden_size]; `{}` is the expert's number.
        down: name of a tensor [hidden_size, intermediate_size].
    """

    router: str
    gate: str
    up: str
    down: str


def _names(block: str, gate: str, up: str, down: str) -> ExpertNames:
    expert = f"{block}.experts.{{}}"
    return ExpertNames(
        router=f"{block}.gate.weight",
        gate=f"{expert}.{gate}.weight",
        up=f"{expert}.{up}.weight",
        down=f"{expert}.{down}.weight",
    )


EXPERT_NAMES: Mapping[str, ExpertNames] = {
    "Qwen3MoeForCausalLM": _names("mlp", "gate_proj", "up_proj", "down_proj"),
    "MixtralForCausalLM": _names("block_sparse_moe", "w1", "w3", "w2"),
}
"""Names by architecture, as in the safetensors files of the released models (`transformers` 5
stacks the experts in memory, and unstacks them when it saves)."""


def parse_experts(fields: Fields, architecture: str) -> MoeConfig | None:
    """Read the experts that config.json describes; None if no layer has any.

    Keys that only concern the training of the released model (`router_aux_loss_coef`,
    `router_jitter_noise`) are not read.

    Raises:
        ValueError: two numbers of experts contradict each other, or there are fewer than `top_k`.
    """
    if architecture not in EXPERT_NAMES:
        return None
    is_mixtral = architecture == "MixtralForCausalLM"
    num_experts = _num_experts(fields)
    every, dense = 1, frozenset[int]()
    if not is_mixtral:
        every = fields.integer("decoder_sparse_step")
        dense = frozenset(fields.integers("mlp_only_layers"))
    num_layers = fields.integer("num_hidden_layers")
    layers = tuple(i for i in range(num_layers) if i not in dense and (i + 1) % every == 0)
    if not layers or (num_experts == 0 and not is_mixtral):
        return None
    top_k = fields.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise ValueError(
            f"{fields.origin}: num_experts_per_tok={top_k} must be between 1 and the number of "
            f"experts, {num_experts}"
        )
    return MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=fields.integer(
            "intermediate_size" if is_mixtral else "moe_intermediate_size"
        ),
        normalise=is_mixtral or fields.flag("norm_topk_prob"),
        layers=layers,
    )


def _num_experts(fields: Fields) -> int:
    """Read the number under either name, as transformers does; it writes num_local_experts."""
    names = [
        key
        for key in ("num_local_experts", "num_experts")
        if key in fields and not fields.is_null(key)
    ]
    found = {fields.integer(key, 0, MOST_EXPERTS) for key in names} or {
        fields.integer("num_experts", 0, MOST_EXPERTS)
    }
    if len(found) > 1:
        raise ValueError(
            f"{fields.origin}: num_local_experts={fields.value('num_local_experts')} and "
            f"num_experts={fields.value('num_experts')} contradict each other"
        )
    return found.pop()


def tiny_experts(architecture: str) -> dict[str, Any]:
    """Return the keys of config.json by which a tiny model replaces its own."""
    sizes: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
    if architecture == "MixtralForCausalLM":
        return sizes
    dense: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return {**sizes, **dense, "num_experts": 8, "moe_intermediate_size": 32}
