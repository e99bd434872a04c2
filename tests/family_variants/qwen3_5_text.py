"""Qwen3.5, text."""

from __future__ import annotations

from family_variants.variant_models import DROP, FULL, LINEAR_LAYER, FamilyVariants

FAMILY = FamilyVariants(
    model_type="qwen3_5_text",
    base={
        # a row's first outputs are near 0, and norms of them would amplify rounding
        "rms_norm_eps": 1e-3,
        "num_hidden_layers": 3,
        "layer_types": [LINEAR_LAYER, FULL, LINEAR_LAYER],
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    variants={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "every_fourth": {"layer_types": None, "num_hidden_layers": 4},
        "every_second": {"layer_types": None, "full_attention_interval": 2, "num_hidden_layers": 4},
        "all_full": {"layer_types": [FULL, FULL, FULL]},
        "all_linear": {"layer_types": [LINEAR_LAYER, LINEAR_LAYER, LINEAR_LAYER]},
        "as_many_values": {"linear_num_value_heads": 2},
        "four_values_a_key": {"linear_num_value_heads": 8},
        "wide_values": {"linear_value_head_dim": 16},
        "wide_keys": {"linear_key_head_dim": 16},
        "short_convolution": {"linear_conv_kernel_dim": 2},
        "half_rotary": {"partial_rotary_factor": 0.5},
        "whole_rotary": {"partial_rotary_factor": 1.0},
        "attention_bias": {"attention_bias": True},
        "as_many_kv_heads": {"num_key_value_heads": 4},
        "one_kv_head": {"num_key_value_heads": 1},
        "eps": {"rms_norm_eps": 1e-2},
        "gelu": {"hidden_act": "gelu"},
        "no_architectures": {"edits": {"architectures": DROP}},
    },
    quick=("all_linear", "half_rotary"),
)
