"""Gemma 2."""

from __future__ import annotations

from family_variants.ropes import LINEAR
from family_variants.variant_models import DROP, FULL, SLIDING, FamilyVariants

FAMILY = FamilyVariants(
    model_type="gemma2",
    base={
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
    variants={
        "plain": {},
        "untied": {"tie_word_embeddings": False},
        "no_final_cap": {"final_logit_softcapping": None},
        "no_attention_cap": {"attn_logit_softcapping": None},
        "low_caps": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 1.0},
        "query_scalar": {"query_pre_attn_scalar": 24},
        "narrow_window": {"sliding_window": 3},
        "all_full": {"layer_types": [FULL, FULL]},
        "all_sliding": {"layer_types": [SLIDING, SLIDING]},
        "three_layers": {"num_hidden_layers": 3},
        "full_first": {"layer_types": [FULL, SLIDING]},
        "as_many_kv_heads": {"num_key_value_heads": 4},
        "one_kv_head": {"num_key_value_heads": 1},
        "wide_heads": {"head_dim": 16},
        "attention_bias": {"attention_bias": True},
        "gelu": {"hidden_activation": "gelu"},
        "silu": {"hidden_activation": "silu"},
        "eps": {"rms_norm_eps": 1e-2},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "linear": {"rope_parameters": LINEAR},
        "no_padding": {"pad_token_id": None},
        "no_architectures": {"edits": {"architectures": DROP}},
        "bidirectional": {"use_bidirectional_attention": True},
    },
    quick=("low_caps", "three_layers"),
)
