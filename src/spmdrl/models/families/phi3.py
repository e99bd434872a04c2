"""Phi-3 and Phi-4."""

from __future__ import annotations

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import alike, dense_mlp, norm_of, plain_attention, rope_of
from spmdrl.models.fields import Fields
from spmdrl.models.specs import LayerSpec


def read(fields: Fields) -> Body:
    window = None if fields.is_null("sliding_window") else fields.integer("sliding_window")
    rope = rope_of(fields, partial=True)
    attention = plain_attention(fields, rope, window=window, bias=False)
    layer = LayerSpec(mixer=attention, mlp=dense_mlp(fields))
    return Body(layers=alike(fields.integer("num_hidden_layers"), layer), norm=norm_of(fields))


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read=read,
    tiny={"num_attention_heads": 2, "num_key_value_heads": 1},  # a head has hidden_size / 2 dims
    fused={
        "self_attn.qkv_proj": ("attention.q", "attention.k", "attention.v"),
        "mlp.gate_up_proj": ("mlp.gate", "mlp.up"),
    },
)
