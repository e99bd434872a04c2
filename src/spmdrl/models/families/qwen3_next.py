"""Qwen3-Next: three layers of gated DeltaNet to one of gated attention."""

from __future__ import annotations

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import (
    EVERY_LAYER,
    SHARED_EXPERT_NAMES,
    TINY_DELTA,
    TINY_EXPERTS,
    delta_mixers,
    mlps_by_step,
    norm_of,
)
from spmdrl.models.fields import Fields
from spmdrl.models.specs import LayerSpec


def read(fields: Fields) -> Body:
    mixers, mlps = delta_mixers(fields, fused=True), mlps_by_step(fields, has_shared=True)
    pairs = zip(mixers, mlps, strict=True)
    layers = tuple(LayerSpec(mixer=mixer, mlp=mlp) for mixer, mlp in pairs)
    return Body(layers=layers, norm=norm_of(fields, one_plus=True))


FAMILY = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    read=read,
    names=SHARED_EXPERT_NAMES,
    tiny={**TINY_DELTA, **TINY_EXPERTS, **EVERY_LAYER, "shared_expert_intermediate_size": 32},
)
