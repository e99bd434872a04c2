"""The attention of a model's layers, as kernels need to know it."""

from __future__ import annotations

from dataclasses import dataclass

from spmdrl.models.config import ModelConfig
from spmdrl.models.specs import AttentionOptions, GatedDelta, SoftmaxAttention


@dataclass(frozen=True, kw_only=True)
class AttentionNeeds:
    """Properties of a model's attention that not every kernel computes.

    Args:
        softcap, sinks: whether any layer has them.
        width: most dims that a head's keys or values have in any layer.
    """

    softcap: bool = False
    sinks: bool = False
    width: int = 0


def attention_options(model: ModelConfig) -> tuple[AttentionOptions | None, ...]:
    """Return the options of every layer; None where a layer has no softmax attention."""
    return tuple(
        None if isinstance(spec.mixer, GatedDelta) else spec.mixer.options for spec in model.layers
    )


def attention_needs(model: ModelConfig) -> AttentionNeeds:
    """Return what a trainer's kernel must compute for all layers."""
    mixers = [spec.mixer for spec in model.layers]
    options = [each for each in attention_options(model) if each is not None]
    return AttentionNeeds(
        softcap=any(each.softcap is not None for each in options),
        sinks=any(isinstance(m, SoftmaxAttention) and m.sinks for m in mixers),
        width=max((m.head_dim for m in mixers if not isinstance(m, GatedDelta)), default=0),
    )
