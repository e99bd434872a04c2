"""Qwen3, dense."""

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
        attention = replace(plain_attention(fields, rope, window=window), qk_norm="heads")
        layers.append(LayerSpec(mixer=attention, mlp=mlp))
    return Body(layers=tuple(layers), norm=norm_of(fields))


FAMILY = Family(model_type="qwen3", architecture="Qwen3ForCausalLM", read=read)
