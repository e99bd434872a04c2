"""Granite: Llama's layers with factors of embeddings, scores, residuals and logits."""

from __future__ import annotations

from dataclasses import replace

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import alike, dense_mlp, norm_of, plain_attention, rope_of
from spmdrl.models.fields import Fields
from spmdrl.models.specs import LayerSpec


def read(fields: Fields) -> Body:
    attention = plain_attention(fields, rope_of(fields))
    options = replace(attention.options, scale=fields.number("attention_multiplier"))
    layer = LayerSpec(
        mixer=replace(attention, options=options),
        mlp=dense_mlp(fields, bias=fields.flag("mlp_bias")),
        residual_scale=fields.number("residual_multiplier"),
    )
    return Body(
        layers=alike(fields.integer("num_hidden_layers"), layer),
        norm=norm_of(fields),
        embedding_scale=fields.number("embedding_multiplier"),
        logit_scale=1 / fields.number("logits_scaling", above=0.0),
    )


FAMILY = Family(model_type="granite", architecture="GraniteForCausalLM", read=read)
