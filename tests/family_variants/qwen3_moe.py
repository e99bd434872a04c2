"""Qwen3-MoE."""

from __future__ import annotations

from family_variants.ropes import DYNAMIC, LINEAR, LLAMA3, LONGROPE, YARN
from family_variants.variant_models import DROP, FamilyVariants

FAMILY = FamilyVariants(
    model_type="qwen3_moe",
    base={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    variants={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "as_many_kv_heads": {"num_key_value_heads": 4},
        "one_kv_head": {"num_key_value_heads": 1},
        "wide_heads": {"head_dim": 16},
        "attention_bias": {"attention_bias": True},
        "normalised": {"norm_topk_prob": True},
        "one_expert": {"num_experts_per_tok": 1},
        "all_experts": {"num_experts_per_tok": 4},
        "eight_experts": {"num_experts": 8, "num_experts_per_tok": 3},
        "a_dense_layer": {"mlp_only_layers": [0]},
        "every_second": {"decoder_sparse_step": 2},
        "all_dense": {"mlp_only_layers": [0, 1]},
        "no_experts": {"num_experts": 0},
        "window": {"use_sliding_window": True, "sliding_window": 16},
        "gelu": {"hidden_act": "gelu"},
        "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
        "eps": {"rms_norm_eps": 1e-2},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "linear": {"rope_parameters": LINEAR},
        "dynamic": {"rope_parameters": DYNAMIC},
        "llama3": {"rope_parameters": LLAMA3},
        "yarn": {"rope_parameters": YARN},
        "longrope": {"rope_parameters": LONGROPE},
        "older_keys": {
            "edits": {
                "rope_parameters": DROP,
                "rope_theta": 3000.0,
                "rope_scaling": {"type": "linear", "factor": 2.0},
            }
        },
        "no_architectures": {"edits": {"architectures": DROP}},
    },
    quick=("normalised", "every_second"),
)
