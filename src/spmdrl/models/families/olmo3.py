"""OLMo 3: OLMo 2's layers, of which most have a window and a rope without scaling."""

from __future__ import annotations

from dataclasses import replace

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import (
    FULL,
    SLIDING,
    dense_mlp,
    norm_of,
    plain_attention,
    ropes_of,
    windows_of,
)
from spmdrl.models.fields import Fields
from spmdrl.models.specs import LayerSpec


def read(fields: Fields) -> Body:
    mlp, ropes = dense_mlp(fields), ropes_of(fields, FULL, SLIDING)
    layers = []
    for window in windows_of(fields):
        rope = ropes[FULL if window is None else SLIDING]
        attention = replace(plain_attention(fields, rope, window=window), qk_norm="all")
        layers.append(LayerSpec(mixer=attention, mlp=mlp, norms="after"))
    return Body(layers=tuple(layers), norm=norm_of(fields))


FAMILY = Family(model_type="olmo3", architecture="Olmo3ForCausalLM", read=read)
