"""OLMo 2: norms behind attention and MLP, and of all heads of queries or keys together."""

from __future__ import annotations

from dataclasses import replace

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import alike, dense_mlp, norm_of, plain_attention, rope_of
from spmdrl.models.fields import Fields
from spmdrl.models.specs import LayerSpec


def read(fields: Fields) -> Body:
    attention = replace(plain_attention(fields, rope_of(fields)), qk_norm="all")
    layer = LayerSpec(mixer=attention, mlp=dense_mlp(fields), norms="after")
    return Body(layers=alike(fields.integer("num_hidden_layers"), layer), norm=norm_of(fields))


FAMILY = Family(model_type="olmo2", architecture="Olmo2ForCausalLM", read=read)
