"""Names and forms in which vLLM holds a model. Nothing here imports vLLM."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from spmdrl.models.config import ModelConfig
from spmdrl.models.layer_attention import attention_options
from spmdrl.models.quantisation import QUANTIZATION
from spmdrl.models.rope import RopeConfig
from spmdrl.models.sharding import all_slices, local_parameters
from spmdrl.models.specs import GatedDelta, LatentAttention, LayerSpec, SoftmaxAttention

VOCAB_MULTIPLE = 64
"""Multiple to which vLLM pads the vocabulary's rows before it cuts them
(DEFAULT_VOCAB_PADDING_SIZE)."""

_FUSED = {".attention.qkv.": "qkv_proj", ".mlp.gate_up.": "gate_up_proj"}
"""Projections of several parts by their local names, and vLLM's names of them in a module."""

_NATIVE = "set rollout.engine=native"

_Parameter = TypeVar("_Parameter", bound=Tensor)


def described(model: ModelConfig) -> dict[str, Any]:
    """Make config.json for vLLM: the model's own, with the language model's architecture."""
    # the engine's weights are floats, whatever the files hold
    source = {key: value for key, value in model.source.items() if key != QUANTIZATION}
    if source.get("sliding_window") and not any(_windows(model)):
        # vLLM gives a window to all layers, whatever config.json's other keys say of it
        source["sliding_window"] = None
    return {**source, "architectures": [model.architecture]}


_TRANSFORMERS = "vllm.model_executor.models.transformers"


def own_models(registered: Mapping[str, Any]) -> frozenset[str]:
    """Name the architectures that vLLM implements: the others, which it runs by way of
    `transformers`, have parameters of other names.

    Args:
        registered: vLLM's registry; `module_name` is a field of its `_LazyRegisteredModel`.
    """
    modules = {name: vars(entry).get("module_name") for name, entry in registered.items()}
    return frozenset(name for name, module in modules.items() if module != _TRANSFORMERS)


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
    for number, spec in enumerate(model.layers):
        if lacks := _lacks(spec, head_dims):
            where = f"layer {number} of {model.architecture}"
            raise ValueError(f"rollout.engine=vllm: {where} has {lacks}: {_NATIVE}")
    if len(set(_windows(model))) > 1 and not model.family.vllm_reads_windows:
        raise ValueError(
            f"rollout.engine=vllm: some layers of {model.architecture} have a sliding window, and "
            f"vLLM gives its model of this kind one for all layers or none: {_NATIVE}"
        )
    mixers = (spec.mixer for spec in model.layers)
    for rope in {mixer.rope for mixer in mixers if isinstance(mixer, SoftmaxAttention)}:
        if lacks := _rope_lacks(model, rope):
            raise ValueError(f"rollout.engine=vllm: {model.architecture} has {lacks}: {_NATIVE}")


def _windows(model: ModelConfig) -> list[int | None]:
    options = attention_options(model)
    return [None if each is None else each.window for each in options]


def _lacks(spec: LayerSpec, head_dims: Collection[int] | None) -> str:
    """Name what no weight sync into vLLM, or no kernel of it, offers; empty if there is nothing."""
    mixer = spec.mixer
    if isinstance(mixer, GatedDelta):
        return "gated DeltaNet, whose projections vLLM holds in an order of its own"
    if isinstance(mixer, LatentAttention):
        return "latent attention, whose projections vLLM holds in an order of its own"
    if mixer.sinks:
        return "attention sinks, which no weight sync into vLLM updates"
    if mixer.gate:
        return "gated attention, whose projection vLLM holds in an order of its own"
    if mixer.rope is None:
        return "no rope, and vLLM's own models have one in all layers"
    if head_dims is not None and mixer.head_dim not in head_dims:
        return (
            f"head_dim={mixer.head_dim}, and on a CPU vLLM attends with heads of "
            f"{sorted(head_dims)} values"
        )
    return ""


def _rope_lacks(model: ModelConfig, rope: RopeConfig | None) -> str:
    """Name what vLLM computes otherwise of a rope; empty if there is nothing."""
    if rope is None:
        return ""
    if rope.kind == "dynamic":
        return "rope of type dynamic, which some versions of vLLM scale for short sequences too"
    if rope.kind != "longrope":
        return ""
    # vLLM computes it from the lengths, and reads no key
    original = rope.original_max_position
    ratio = model.source.get("max_position_embeddings", rope.factor * original) / original
    usual = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
    if math.isclose(rope.attention_factor, usual, rel_tol=1e-6):
        return ""
    return f"attention_factor={rope.attention_factor} in its longrope, and vLLM computes {usual}"


def parameter_names(model: ModelConfig) -> dict[str, str]:
    """Map local names to vLLM's: Hugging Face names, except those of projections that it fuses."""
    names = {}
    for local, held in all_slices(model, 0, 1).items():
        name = held[0].name
        for part, whole in _FUSED.items():
            if part in local:
                module, _, kind = name.rpartition(".")
                name = f"{module.rpartition('.')[0]}.{whole}.{kind}"
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
