"""Names and forms in which vLLM holds a model. Nothing here imports vLLM."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from spmdrl.models.config import ModelConfig
from spmdrl.models.sharding import all_slices, local_parameters

VOCAB_MULTIPLE = 64
"""Multiple to which vLLM pads the vocabulary's rows before it cuts them
(DEFAULT_VOCAB_PADDING_SIZE)."""

_FUSED = {".q_proj.": ".qkv_proj.", ".gate_proj.": ".gate_up_proj."}
_NATIVE = "set rollout.engine=native"

_Parameter = TypeVar("_Parameter", bound=Tensor)


def described(model: ModelConfig) -> dict[str, Any]:
    """Make config.json for vLLM: the model's own, with the language model's architecture."""
    return {**model.source, "architectures": [model.architecture]}


def check_supported(
    model: ModelConfig, known: Collection[str], head_dims: Collection[int] | None
) -> None:
    """Refuse a model that this vLLM cannot run.

    Args:
        known: the architectures that vLLM implements itself.
        head_dims: head dims that its attention supports; None if it supports all.

    Raises:
        ValueError: a property of the model is not supported; the message names it.
    """
    if model.architecture not in known:
        raise ValueError(
            f"rollout.engine=vllm: the trainer has {model.architecture}, this vLLM has not: "
            f"{_NATIVE}"
        )
    if model.moe is not None:
        raise ValueError(
            f"rollout.engine=vllm: {model.architecture} has experts, which vLLM packs in forms "
            f"that no weight sync can update: {_NATIVE}"
        )
    if head_dims is not None and model.head_dim not in head_dims:
        raise ValueError(
            f"rollout.engine=vllm: on a CPU vLLM attends with heads of {sorted(head_dims)} values, "
            f"and {model.architecture} has head_dim={model.head_dim}: {_NATIVE}"
        )


def parameter_names(model: ModelConfig) -> dict[str, str]:
    """Map local names to vLLM's: Hugging Face names, except those of fused parameters."""
    names = {}
    for local, held in all_slices(model, 0, 1).items():
        name = held[0].name
        for part, whole in _FUSED.items():
            name = name.replace(part, whole)
        names[local] = name
    return names


def match_parameters(
    model: ModelConfig,
    tp_size: int,
    dtype: torch.dtype,
    device_type: str,
    found: Mapping[str, _Parameter],
) -> dict[str, _Parameter]:
    """Map local names to vLLM's parameters, all in the form that a sync writes, none left over.

    Args:
        found: this rank's parameters, by vLLM's names.

    Raises:
        ValueError: a parameter is missing, unknown to the model, or in another form.
    """
    names = parameter_names(model)
    if set(found) != set(names.values()):
        raise ValueError(
            f"rollout.engine=vllm: vLLM's {model.architecture} and the policy's differ in the "
            f"parameters {sorted(set(found) ^ set(names.values()))}: {_NATIVE}"
        )
    shapes = local_parameters(model, tp_size, vocab_multiple=VOCAB_MULTIPLE)
    for local, name in names.items():
        held = found[name]
        form = (tuple(held.shape), held.dtype, held.device.type, held.is_contiguous())
        wanted = (shapes[local], dtype, device_type, True)
        if form != wanted:
            raise ValueError(
                f"rollout.engine=vllm: vLLM holds {name} as {form} instead of {wanted} (shape, "
                f"dtype, device, contiguous), so that no weight sync can update it: {_NATIVE}"
            )
    return {local: found[name] for local, name in names.items()}
