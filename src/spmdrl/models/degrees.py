"""Checks that tensor- and expert-parallel degrees divide a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spmdrl.models.config import ModelConfig
from spmdrl.models.specs import GatedDelta, Mixer, SoftmaxAttention


def check_tp(model: ModelConfig, tp: int, *, ep: int = 1, replicate_kv: bool = False) -> None:
    """Refuse tensor- and expert-parallel degrees that do not divide the model.

    Args:
        replicate_kv: allow more ranks than key/value heads, with each head on several ranks. Only
            for inference: the gradients of such copies would have to be summed.

    Raises:
        ValueError: `tp` or `ep` does not divide some sizes; the message names them.
    """
    sizes: dict[str, int] = {}
    copied: dict[str, int] = {}
    for spec in model.layers:
        sizes |= _heads(spec.mixer)
        if isinstance(spec.mixer, SoftmaxAttention):
            copied["num_key_value_heads"] = spec.mixer.num_kv_heads
    if model.dense_width is not None:
        sizes["intermediate_size"] = model.dense_width
    if model.moe is not None and model.moe.shared is not None:
        sizes["the shared experts' width"] = model.moe.shared.width
    sizes["vocab_size"] = model.vocab_size
    bad = [f"{name}={size}" for name, size in sizes.items() if size % tp]
    for name, heads in copied.items():
        copies = replicate_kv and tp > heads
        if copies and tp % heads:
            bad.append(f"{name}={heads} (which does not divide it)")
        elif not copies and heads % tp:
            bad.append(f"{name}={heads}")
    if bad:
        fix = heads_fix(model, tp, bad)
        raise ValueError(f"tp={tp} does not divide the model's {', '.join(bad)}{fix}")
    check_ep(model, tp, ep)


def check_cp(model: ModelConfig, cp: int) -> None:
    """Refuse context parallelism for layers that pass a state from token to token.

    Raises:
        ValueError: the model has such layers, and `cp` is more than 1.
    """
    layers = [i for i, spec in enumerate(model.layers) if isinstance(spec.mixer, GatedDelta)]
    if cp > 1 and layers:
        raise ValueError(
            f"cp={cp} divides rows, but layer {layers[0]} of {model.architecture} (gated DeltaNet) "
            "passes a state from token to token: set cp=1, and dp_shard or tp instead"
        )


def _heads(mixer: Mixer) -> dict[str, int]:
    if isinstance(mixer, GatedDelta):
        heads, v_heads = mixer.num_heads, mixer.num_v_heads
        return {"linear_num_key_heads": heads, "linear_num_value_heads": v_heads}
    return {"num_attention_heads": mixer.num_heads}


def heads_divide(model: ModelConfig, tp: int) -> bool:
    """Whether `tp` divides the heads of every layer."""
    return all(n % tp == 0 for spec in model.layers for n in _heads(spec.mixer).values())


def heads_fix(model: ModelConfig, tp: int, bad: Sequence[str]) -> str:
    """Explain how `tp` can divide the heads, for messages; empty if `bad` names no heads."""
    plain = [spec.mixer for spec in model.layers if isinstance(spec.mixer, SoftmaxAttention)]
    if not plain or not any(name.startswith("num_") for name in bad):
        return ""
    kv_heads = -(-plain[0].num_kv_heads // tp) * tp
    heads = kv_heads * plain[0].num_heads // plain[0].num_kv_heads
    return (
        ": take another tp, or a model with heads of zeros as well as its own (spmdrl convert "
        f"MODEL OUT --pad-heads-to {heads}/{kv_heads})"
    )


def check_ep(model: ModelConfig, tp: int, ep: int) -> None:
    """Raise ValueError, with the numbers, unless the degrees divide the model's experts."""
    moe = model.moe
    if moe is None:
        if ep > 1:
            raise ValueError(f"ep={ep}, but {model.architecture} has no experts: set it to 1")
        return
    if moe.num_experts % ep:
        raise ValueError(f"ep={ep} does not divide the model's num_experts={moe.num_experts}")
    etp = tp // math.gcd(tp, ep)  # ranks over which one expert's width is divided
    if moe.width % etp:
        raise ValueError(
            f"tp={tp} with ep={ep} divides each expert over {etp} ranks, which do not divide the "
            f"experts' intermediate_size={moe.width}"
        )
