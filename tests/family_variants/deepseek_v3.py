"""DeepSeek-V3, Moonlight, Kimi-K2."""

from __future__ import annotations

from family_variants.ropes import YARN
from family_variants.variant_models import DROP, FamilyVariants

FAMILY = FamilyVariants(
    model_type="deepseek_v3",
    base={
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
    },
    variants={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "whole_queries": {"q_lora_rank": None},
        "all_groups": {"topk_group": 2},
        "no_groups": {"n_group": 1, "topk_group": 1},
        "four_groups": {"n_group": 4, "topk_group": 2},
        "not_normalised": {"norm_topk_prob": False},
        "scale": {"routed_scaling_factor": 1.7},
        "two_shared_experts": {"n_shared_experts": 2},
        "no_dense_layer": {"first_k_dense_replace": 0},
        "all_dense": {"first_k_dense_replace": 3},
        "four_experts": {"num_experts_per_tok": 4},
        "not_interleaved": {"rope_interleave": False},
        "yarn": {"rope_parameters": YARN},
        "yarn_mscale": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
        "wide_values": {"v_head_dim": 12},
        "narrow_values": {"v_head_dim": 4},
        "wide_rope": {"qk_rope_head_dim": 8},
        "attention_bias": {"attention_bias": True},
        "eps": {"rms_norm_eps": 1e-2},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "gelu": {"hidden_act": "gelu"},
        "no_architectures": {"edits": {"architectures": DROP}},
        "other_type": {"edits": {"model_type": "kimi_k2"}},
    },
    quick=("yarn_mscale", "four_groups"),
)
