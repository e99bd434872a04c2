"""GLM-4.5 and GLM-4.6 MoE."""

from __future__ import annotations

from family_variants.variant_models import DROP, FamilyVariants

FAMILY = FamilyVariants(
    model_type="glm4_moe",
    base={
        "num_hidden_layers": 3,
        "head_dim": 8,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
    },
    variants={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "qk_norm": {"use_qk_norm": True},
        "attention_bias": {"attention_bias": True},
        "groups": {"n_group": 2, "topk_group": 1},
        "four_groups": {"n_group": 4, "topk_group": 2},
        "not_normalised": {"norm_topk_prob": False},
        "scale": {"routed_scaling_factor": 1.7},
        "two_shared_experts": {"n_shared_experts": 2},
        "no_dense_layer": {"first_k_dense_replace": 0},
        "all_dense": {"first_k_dense_replace": 3},
        "four_experts": {"num_experts_per_tok": 4},
        "whole_rotary": {"partial_rotary_factor": 1.0},
        "quarter_rotary": {"head_dim": 16, "partial_rotary_factor": 0.25},
        "as_many_kv_heads": {"num_key_value_heads": 4},
        "one_kv_head": {"num_key_value_heads": 1},
        "wide_heads": {"head_dim": 16},
        "eps": {"rms_norm_eps": 1e-2},
        "gelu": {"hidden_act": "gelu"},
        "no_architectures": {"edits": {"architectures": DROP}},
    },
    quick=("qk_norm", "scale"),
)
