"""Qwen3 with mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import (
    EVERY_LAYER,
    TINY_EXPERTS,
    mlps_by_step,
    norm_of,
    plain_attention,
    rope_of,
)
from spmdrl.models.fields import Fields
from spmdrl.models.specs import LayerSpec


def read(fields: Fields) -> Body:
    window = None
    if fields.flag("use_sliding_window") and not fields.is_null("sliding_window"):
        window = fields.integer("sliding_window")
    attention = plain_attention(fields, rope_of(fields), window=window)
    mixer = replace(attention, qk_norm="heads")
    layers = [LayerSpec(mixer=mixer, mlp=mlp) for mlp in mlps_by_step(fields)]
    return Body(layers=tuple(layers), norm=norm_of(fields))


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=read,
    tiny={**TINY_EXPERTS, **EVERY_LAYER, "num_local_experts": 8},
)
