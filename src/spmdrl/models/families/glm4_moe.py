"""GLM-4.5 and GLM-4.6 with mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import mlps_in_groups, norm_of, plain_attention, rope_of
from spmdrl.models.fields import Fields
from spmdrl.models.specs import LayerSpec


def read(fields: Fields) -> Body:
    mixer = replace(
        plain_attention(fields, rope_of(fields, partial=True), bias=False),
        qkv_bias=fields.flag("attention_bias"),
        qk_norm="heads" if fields.flag("use_qk_norm") else "none",
    )
    layers = tuple(LayerSpec(mixer=mixer, mlp=mlp) for mlp in mlps_in_groups(fields))
    return Body(layers=layers, norm=norm_of(fields))


FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    read=read,
    tiny={
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
    },
)
