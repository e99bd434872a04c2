"""Seed-OSS: Llama's layers with biases of q, k and v; the bias of the output has its own key."""

from __future__ import annotations

from dataclasses import replace

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import alike, dense_mlp, norm_of, plain_attention, rope_of
from spmdrl.models.fields import Fields
from spmdrl.models.specs import LayerSpec


def read(fields: Fields) -> Body:
    attention = plain_attention(fields, rope_of(fields))
    mixer = replace(attention, out_bias=fields.flag("attention_out_bias"))
    layer = LayerSpec(mixer=mixer, mlp=dense_mlp(fields, bias=fields.flag("mlp_bias")))
    return Body(layers=alike(fields.integer("num_hidden_layers"), layer), norm=norm_of(fields))


FAMILY = Family(model_type="seed_oss", architecture="SeedOssForCausalLM", read=read)
