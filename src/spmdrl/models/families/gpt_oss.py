"""gpt-oss: experts with biases, attention with sinks, alternating windows."""

from __future__ import annotations

from dataclasses import replace

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import (
    norm_of,
    num_experts_of,
    plain_attention,
    rope_of,
    windows_of,
)
from spmdrl.models.fields import Fields
from spmdrl.models.specs import ClampedSwiglu, LayerSpec, MoeMlp


def read(fields: Fields) -> Body:
    rope, num_experts = rope_of(fields), num_experts_of(fields, least=1)
    experts = MoeMlp(
        num_experts=num_experts,
        top_k=fields.integer("num_experts_per_tok", most=num_experts),
        width=fields.integer("intermediate_size"),
        activation=ClampedSwiglu(
            alpha=fields.number("swiglu_alpha"), limit=fields.number("swiglu_limit", above=0.0)
        ),
        router_bias=True,
        expert_bias=True,
        form="transposed",
    )
    layers = []
    for window in windows_of(fields):
        mixer = replace(plain_attention(fields, rope, window=window), sinks=True)
        layers.append(LayerSpec(mixer=mixer, mlp=experts))
    return Body(layers=tuple(layers), norm=norm_of(fields))


FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    read=read,
    names={"mlp.router": "mlp.router"},
    tiny={"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
)
