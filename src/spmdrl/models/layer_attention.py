"""The attention of a model's layers, as kernels need to know it."""

from __future__ import annotations

from dataclasses import dataclass

from spmdrl.models.config import ModelConfig
from spmdrl.models.specs import AttentionOptions, GatedDelta, LatentAttention, SoftmaxAttention


@dataclass(frozen=True, kw_only=True)
class AttentionNeeds:
    """Properties of a model's attention that not every kernel computes.

    Args:
        softcap, sinks, window: whether any layer has them.
        widths: dims of a head's keys, or of its values if they have more, in any layer.
    """

    softcap: bool = False
    sinks: bool = False
    window: bool = False
    widths: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """The most dims; 0 without layers of softmax attention."""
        return max(self.widths, default=0)


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
        window=any(each.window is not None for each in options),
        widths=tuple(sorted({_width(m) for m in mixers if not isinstance(m, GatedDelta)})),
    )


def _width(mixer: SoftmaxAttention | LatentAttention) -> int:
    if isinstance(mixer, LatentAttention):
        return max(mixer.head_dim, mixer.v_dim)
    return mixer.head_dim
