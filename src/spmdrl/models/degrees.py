"""Checks that tensor- and expert-parallel degrees divide a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spmdrl.models.config import ModelConfig


def check_tp(model: ModelConfig, tp: int, *, ep: int = 1, replicate_kv: bool = False) -> None:
    """Refuse tensor- and expert-parallel degrees that do not divide the model.

    Args:
        replicate_kv: allow more ranks than key/value heads, with each head on several ranks. Only
            for inference: the gradients of such copies would have to be summed.

    Raises:
        ValueError: `tp` or `ep` does not divide some sizes; the message names them.
    """
    has_dense_layers = model.moe is None or len(model.moe.layers) < model.num_layers
    sizes = {
        "num_attention_heads": model.num_heads,
        **({"intermediate_size": model.intermediate_size} if has_dense_layers else {}),
        "vocab_size": model.vocab_size,
    }
    copies = replicate_kv and tp > model.num_kv_heads
    if not copies:
        sizes["num_key_value_heads"] = model.num_kv_heads
    bad = [f"{name}={size}" for name, size in sizes.items() if size % tp]
    if copies and tp % model.num_kv_heads:
        bad.append(f"num_key_value_heads={model.num_kv_heads} (which does not divide it)")
    if bad:
        fix = heads_fix(model, tp, bad)
        raise ValueError(f"tp={tp} does not divide the model's {', '.join(bad)}{fix}")
    check_ep(model, tp, ep)


def heads_fix(model: ModelConfig, tp: int, bad: Sequence[str]) -> str:
    """Explain how `tp` can divide the heads, for messages; empty if `bad` names no heads."""
    if not any("heads" in name for name in bad):
        return ""
    kv_heads = -(-model.num_kv_heads // tp) * tp
    heads = kv_heads * model.num_heads // model.num_kv_heads
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
    if moe.intermediate_size % etp:
        raise ValueError(
            f"tp={tp} with ep={ep} divides each expert over {etp} ranks, which do not divide the "
            f"experts' intermediate_size={moe.intermediate_size}"
        )
