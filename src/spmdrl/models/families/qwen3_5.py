"""Qwen3.5: gated DeltaNet and gated attention as in Qwen3-Next, with dense MLPs."""

from __future__ import annotations

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import TINY_DELTA, delta_mixers, dense_mlp, norm_of
from spmdrl.models.fields import Fields
from spmdrl.models.specs import LayerSpec


def read(fields: Fields) -> Body:
    mlp = dense_mlp(fields)
    layers = tuple(LayerSpec(mixer=m, mlp=mlp) for m in delta_mixers(fields, fused=False))
    return Body(layers=layers, norm=norm_of(fields, one_plus=True))


FAMILY = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    read=read,
    tiny=TINY_DELTA,
)
