"""Qwen1.5 and Qwen2 with mixtures of experts and a shared expert."""

from __future__ import annotations

from dataclasses import replace

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import (
    EVERY_LAYER,
    SHARED_EXPERT_NAMES,
    TINY_EXPERTS,
    mlps_by_step,
    norm_of,
    plain_attention,
    rope_of,
    windows_of,
)
from spmdrl.models.fields import Fields
from spmdrl.models.specs import LayerSpec


def read(fields: Fields) -> Body:
    rope, has_bias = rope_of(fields), fields.flag("qkv_bias")
    layers = []
    for window, mlp in zip(windows_of(fields), mlps_by_step(fields, has_shared=True), strict=True):
        attention = plain_attention(fields, rope, window=window, bias=False)
        layers.append(LayerSpec(mixer=replace(attention, qkv_bias=has_bias), mlp=mlp))
    return Body(layers=tuple(layers), norm=norm_of(fields))


FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    read=read,
    names=SHARED_EXPERT_NAMES,
    tiny={**TINY_EXPERTS, **EVERY_LAYER, "shared_expert_intermediate_size": 32},
)
