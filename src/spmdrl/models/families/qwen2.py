"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from dataclasses import replace

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import dense_mlp, norm_of, plain_attention, rope_of, windows_of
from spmdrl.models.fields import Fields
from spmdrl.models.specs import LayerSpec


def read(fields: Fields) -> Body:
    mlp, rope = dense_mlp(fields), rope_of(fields)
    layers = []
    for window in windows_of(fields):
        attention = plain_attention(fields, rope, window=window, bias=False)
        # the class has these biases whatever config.json says
        layers.append(LayerSpec(mixer=replace(attention, qkv_bias=True), mlp=mlp))
    return Body(layers=tuple(layers), norm=norm_of(fields))


FAMILY = Family(model_type="qwen2", architecture="Qwen2ForCausalLM", read=read)
