"""Qwen3.5 with mixtures of experts in every layer."""

from __future__ import annotations

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import (
    SHARED_EXPERT_NAMES,
    TINY_DELTA,
    TINY_EXPERTS,
    delta_mixers,
    norm_of,
    num_experts_of,
    softmax_experts,
)
from spmdrl.models.fields import Fields
from spmdrl.models.specs import LayerSpec


def read(fields: Fields) -> Body:
    experts = softmax_experts(fields, num_experts_of(fields, least=1), has_shared=True)
    layers = tuple(LayerSpec(mixer=m, mlp=experts) for m in delta_mixers(fields, fused=False))
    return Body(layers=layers, norm=norm_of(fields, one_plus=True))


FAMILY = Family(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    read=read,
    names=SHARED_EXPERT_NAMES,
    tiny={**TINY_DELTA, **TINY_EXPERTS, "shared_expert_intermediate_size": 32},
)
