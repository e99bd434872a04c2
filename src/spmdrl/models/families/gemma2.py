"""Gemma 2 (https://arxiv.org/abs/2408.00118): norms around both halves, windows in every second
layer, and soft caps of scores and logits.
"""

from __future__ import annotations

from dataclasses import replace

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import norm_of, plain_attention, rope_of, windows_of
from spmdrl.models.fields import Fields
from spmdrl.models.rope import RopeConfig
from spmdrl.models.specs import DenseMlp, LayerSpec, SoftmaxAttention

NAMES = {"post_norm": "pre_feedforward_layernorm"}
UNREAD = ("use_bidirectional_attention",)


def read(fields: Fields) -> Body:
    rope, cap = rope_of(fields), cap_of(fields, "attn_logit_softcapping")
    layers = []
    for window in windows_of(fields):
        attention = attention_of(fields, rope, window)
        capped = replace(attention, options=replace(attention.options, softcap=cap))
        layers.append(layer_of(fields, capped))
    return body_of(fields, layers)


def attention_of(fields: Fields, rope: RopeConfig | None, window: int | None) -> SoftmaxAttention:
    """Read attention whose scores have a scale of their own."""
    attention = plain_attention(fields, rope, window=window)
    scale = fields.number("query_pre_attn_scalar", above=0.0) ** -0.5
    return replace(attention, options=replace(attention.options, scale=scale))


def layer_of(fields: Fields, attention: SoftmaxAttention) -> LayerSpec:
    """Read a layer with norms around its attention and its MLP."""
    width, activation = fields.integer("intermediate_size"), fields.text("hidden_activation")
    mlp = DenseMlp(width=width, activation=activation)
    return LayerSpec(mixer=attention, mlp=mlp, norms="around")


def body_of(fields: Fields, layers: list[LayerSpec]) -> Body:
    """Read what lies around the layers."""
    return Body(
        layers=tuple(layers),
        norm=norm_of(fields, one_plus=True),
        embedding_scale=fields.integer("hidden_size") ** 0.5,
        logit_softcap=cap_of(fields, "final_logit_softcapping"),
    )


def cap_of(fields: Fields, key: str) -> float | None:
    """Read a soft cap; null is none."""
    return None if fields.is_null(key) else fields.number(key, above=0.0)


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read=read,
    names=NAMES,
    vllm_reads_windows=True,
    unread=UNREAD,
)
