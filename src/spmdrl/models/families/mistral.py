"""Mistral, and what its class is taken for where config.json has `layer_types`."""

from __future__ import annotations

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import dense_mlp, norm_of, plain_attention, rope_of, windows_of
from spmdrl.models.fields import Fields
from spmdrl.models.specs import LayerSpec


def read(fields: Fields) -> Body:
    mlp, rope = dense_mlp(fields), rope_of(fields)
    layers = []
    for window in _windows(fields):
        attention = plain_attention(fields, rope, window=window, bias=False)
        layers.append(LayerSpec(mixer=attention, mlp=mlp))
    return Body(layers=tuple(layers), norm=norm_of(fields))


def _windows(fields: Fields) -> list[int | None]:
    # transformers' Auto classes make Ministral of such a file
    if fields.knows("layer_types") and not fields.is_null("layer_types"):
        return windows_of(fields)
    window = None if fields.is_null("sliding_window") else fields.integer("sliding_window")
    return [window] * fields.integer("num_hidden_layers")


FAMILY = Family(model_type="mistral", architecture="MistralForCausalLM", read=read)
