"""Mixtral."""

from __future__ import annotations

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import alike, norm_of, num_experts_of, plain_attention, rope_of
from spmdrl.models.fields import Fields
from spmdrl.models.specs import LayerSpec, MoeMlp


def read(fields: Fields) -> Body:
    window = None if fields.is_null("sliding_window") else fields.integer("sliding_window")
    attention = plain_attention(fields, rope_of(fields), window=window, bias=False)
    num_experts = num_experts_of(fields, least=1)
    experts = MoeMlp(
        num_experts=num_experts,
        top_k=fields.integer("num_experts_per_tok", most=num_experts),
        width=fields.integer("intermediate_size"),
        activation=fields.text("hidden_act"),
    )
    layer = LayerSpec(mixer=attention, mlp=experts)
    return Body(layers=alike(fields.integer("num_hidden_layers"), layer), norm=norm_of(fields))


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read=read,
    names={
        "mlp.router": "block_sparse_moe.gate",
        "mlp.experts.gate": "block_sparse_moe.experts.{}.w1",
        "mlp.experts.up": "block_sparse_moe.experts.{}.w3",
        "mlp.experts.down": "block_sparse_moe.experts.{}.w2",
    },
    tiny={"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
)
