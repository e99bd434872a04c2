"""Gemma 3, text."""

from __future__ import annotations

from family_variants.ropes import LINEAR
from family_variants.variant_models import DROP, FULL, SLIDING, FamilyVariants

SIZES = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


FAMILY = FamilyVariants(
    model_type="gemma3_text",
    base={**SIZES, "num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING]},
    variants={
        "plain": {},
        "untied": {"tie_word_embeddings": False},
        "pattern": {"layer_types": None, "sliding_window_pattern": 2},
        "default_pattern": {"layer_types": None, "num_hidden_layers": 7},
        "caps": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 1.0},
        "query_scalar": {"query_pre_attn_scalar": 24},
        "narrow_window": {"sliding_window": 3},
        "all_full": {"layer_types": [FULL, FULL, FULL]},
        "all_sliding": {"layer_types": [SLIDING, SLIDING, SLIDING]},
        "two_ropes": {
            "rope_parameters": {
                "sliding_attention": LOCAL,
                "full_attention": {**LOCAL, "rope_theta": 9000.0},
            }
        },
        "linear": {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": LINEAR}},
        "older_keys": {
            "edits": {
                "rope_parameters": DROP,
                "rope_theta": 9000.0,
                "rope_local_base_freq": 70.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            }
        },
        "as_many_kv_heads": {"num_key_value_heads": 4},
        "one_kv_head": {"num_key_value_heads": 1},
        "wide_heads": {"head_dim": 16},
        "attention_bias": {"attention_bias": True},
        "gelu": {"hidden_activation": "gelu"},
        "silu": {"hidden_activation": "silu"},
        "eps": {"rms_norm_eps": 1e-2},
        "no_padding": {"pad_token_id": None},
        "no_architectures": {"edits": {"architectures": DROP}},
        "vision": {"model_type": "gemma3", "vision_config": VISION, "mm_tokens_per_image": 4},
        "bidirectional": {"use_bidirectional_attention": True},
    },
    quick=("linear", "pattern"),
)
