"""What a mixture of experts adds to a model's configuration, and its Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """The experts of a model; all its layers with experts are alike.

    Args:
        top_k: experts that a token goes to.
        intermediate_size: of one expert.
        normalise: the chosen experts' probabilities are divided by their sum.
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
        router: [num_experts, hidden_size].
        gate, up: [intermediate_size, hidden_size], `{}` is the expert's number.
        down: [hidden_size, intermediate_size].
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
"""By architecture, as the safetensors files of the released models have them (`transformers` 5
stacks the experts in memory, and unstacks them when it saves)."""


def parse_experts(source: Mapping[str, Any], architecture: str, origin: str) -> MoeConfig | None:
    """The experts that config.json describes; None for a dense architecture.

    What concerns the training of the released model alone (`router_aux_loss_coef`,
    `router_jitter_noise`) is not read.

    Raises:
        ValueError: a missing key, or fewer experts than a token goes to.
    """
    if architecture not in EXPERT_NAMES:
        return None
    is_mixtral = architecture == "MixtralForCausalLM"
    # transformers 5 writes num_local_experts for both families
    num_experts = source.get("num_local_experts") or source.get("num_experts")
    size_key = "intermediate_size" if is_mixtral else "moe_intermediate_size"
    given = {
        "num_local_experts" if is_mixtral else "num_experts": num_experts,
        "num_experts_per_tok": source.get("num_experts_per_tok"),
        size_key: source.get(size_key),
    }
    missing = [key for key, value in given.items() if value is None]
    if missing:
        raise ValueError(f"{origin}: the keys {missing} are missing for {architecture}")
    num_experts, top_k, size = (int(value) for value in given.values() if value is not None)
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"{origin}: num_experts_per_tok={top_k} must be between 1 and the number of experts, "
            f"{num_experts}"
        )
    every = int(source.get("decoder_sparse_step") or 1)
    dense = source.get("mlp_only_layers") or ()
    num_layers = int(source["num_hidden_layers"])
    return MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=size,
        normalise=is_mixtral or bool(source.get("norm_topk_prob", False)),
        layers=tuple(i for i in range(num_layers) if i not in dense and (i + 1) % every == 0),
    )


def tiny_experts(architecture: str) -> dict[str, Any]:
    """The keys of config.json that a tiny model has instead of its own."""
    sizes: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
    if architecture == "MixtralForCausalLM":
        return sizes
    dense: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return {**sizes, **dense, "num_experts": 8, "moe_intermediate_size": 32}
