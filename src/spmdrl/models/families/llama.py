"""Llama 2 and 3, SmolLM2."""

from __future__ import annotations

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import alike, dense_mlp, norm_of, plain_attention, rope_of
from spmdrl.models.fields import Fields
from spmdrl.models.specs import LayerSpec


def read(fields: Fields) -> Body:
    attention = plain_attention(fields, rope_of(fields))
    layer = LayerSpec(mixer=attention, mlp=dense_mlp(fields, bias=fields.flag("mlp_bias")))
    return Body(layers=alike(fields.integer("num_hidden_layers"), layer), norm=norm_of(fields))


FAMILY = Family(model_type="llama", architecture="LlamaForCausalLM", read=read)
