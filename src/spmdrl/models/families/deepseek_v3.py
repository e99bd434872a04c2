"""DeepSeek-V3, and what has its architecture: Moonlight, Kimi-K2."""

from __future__ import annotations

from spmdrl.models.family import Body, Family
from spmdrl.models.family_parts import mlps_in_groups, norm_of, rope_of
from spmdrl.models.fields import Fields
from spmdrl.models.rope import rope_parameters, score_factor
from spmdrl.models.specs import AttentionOptions, LatentAttention, LayerSpec

_ONLY = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
"""Keys that the model's own code reads, and the only values that `transformers` computes."""


def read(fields: Fields) -> Body:
    for key, value in _ONLY.items():
        if key in fields and fields.value(key) != value:
            raise fields.wrong(key, f"{value!r}, the only one that is supported,")
    mixer = _attention(fields)
    layers = tuple(LayerSpec(mixer=mixer, mlp=mlp) for mlp in mlps_in_groups(fields))
    return Body(layers=layers, norm=norm_of(fields))


def _attention(fields: Fields) -> LatentAttention:
    heads, kv_heads = fields.integer("num_attention_heads"), fields.value("num_key_value_heads")
    if kv_heads != heads:
        raise fields.wrong("num_key_value_heads", f"num_attention_heads={heads}")
    nope, turned = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
    [given] = rope_parameters(fields).values()
    assert given is not None, "a rope for all layers is an object"
    return LatentAttention(
        num_heads=heads,
        q_rank=None if fields.is_null("q_lora_rank") else fields.integer("q_lora_rank"),
        kv_rank=fields.integer("kv_lora_rank"),
        nope_dim=nope,
        rope_dim=turned,
        v_dim=fields.integer("v_head_dim"),
        rope=rope_of(fields, interleaved=fields.flag("rope_interleave")),
        options=AttentionOptions(scale=(nope + turned) ** -0.5 * score_factor(given)),
        norm_eps=1e-6,
        bias=fields.flag("attention_bias"),
    )


FAMILY = Family(
    model_type="deepseek_v3",
    also=("kimi_k2",),
    architecture="DeepseekV3ForCausalLM",
    read=read,
    tiny={
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
    },
)
