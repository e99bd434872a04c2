"""gpt-oss."""

from __future__ import annotations

from family_variants.ropes import YARN
from family_variants.variant_models import DROP, FULL, SLIDING, FamilyVariants

FAMILY = FamilyVariants(
    model_type="gpt_oss",
    base={
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 24,
        "head_dim": 8,
        "sliding_window": 16,
    },
    variants={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "as_many_kv_heads": {"num_key_value_heads": 4},
        "one_kv_head": {"num_key_value_heads": 1},
        "wide_heads": {"head_dim": 16},
        "low_limit": {"swiglu_limit": 0.7},
        "alpha": {"swiglu_alpha": 1.0},
        "no_attention_bias": {"attention_bias": False},
        "all_full": {"layer_types": [FULL, FULL]},
        "all_sliding": {"layer_types": [SLIDING, SLIDING]},
        "full_first": {"layer_types": [FULL, SLIDING]},
        "narrow_window": {"sliding_window": 3},
        "one_expert": {"num_experts_per_tok": 1},
        "all_experts": {"num_experts_per_tok": 4},
        "eight_experts": {"num_local_experts": 8, "num_experts_per_tok": 3},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "yarn": {"rope_parameters": YARN},
        "yarn_not_truncated": {"rope_parameters": {**YARN, "truncate": False}},
        "eps": {"rms_norm_eps": 1e-2},
        "three_layers": {"num_hidden_layers": 3},
        "no_architectures": {"edits": {"architectures": DROP}},
    },
    quick=("low_limit", "yarn"),
)
