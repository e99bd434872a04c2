"""Qwen2-MoE."""

from __future__ import annotations

from family_variants.ropes import LINEAR, YARN
from family_variants.variant_models import DROP, FamilyVariants

FAMILY = FamilyVariants(
    model_type="qwen2_moe",
    base={
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
    variants={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "as_many_kv_heads": {"num_key_value_heads": 4},
        "one_kv_head": {"num_key_value_heads": 1},
        "normalised": {"norm_topk_prob": True},
        "no_bias": {"qkv_bias": False},
        "one_expert": {"num_experts_per_tok": 1},
        "all_experts": {"num_experts_per_tok": 4},
        "wide_shared_expert": {"shared_expert_intermediate_size": 40},
        "a_dense_layer": {"mlp_only_layers": [0]},
        "every_second": {"decoder_sparse_step": 2},
        "all_dense": {"mlp_only_layers": [0, 1]},
        "no_experts": {"num_experts": 0},
        "window": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
        "gelu": {"hidden_act": "gelu"},
        "eps": {"rms_norm_eps": 1e-2},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "linear": {"rope_parameters": LINEAR},
        "yarn": {"rope_parameters": YARN},
        "no_architectures": {"edits": {"architectures": DROP}},
    },
    quick=("normalised", "no_bias"),
)
