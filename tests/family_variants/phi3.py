"""Phi-3 and Phi-4."""

from __future__ import annotations

from family_variants.ropes import LONGROPE
from family_variants.variant_models import DROP, FamilyVariants

FAMILY = FamilyVariants(
    model_type="phi3",
    base={"original_max_position_embeddings": 256},
    variants={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "as_many_kv_heads": {"num_key_value_heads": 4},
        "one_kv_head": {"num_key_value_heads": 1},
        "null_kv_heads": {"num_key_value_heads": None},
        "half_rotary": {"partial_rotary_factor": 0.5},
        "three_quarters_rotary": {"partial_rotary_factor": 0.75},
        "window": {"sliding_window": 16},
        "narrow_window": {"sliding_window": 3},
        "longrope_below": {
            "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 128},
            "original_max_position_embeddings": 128,
        },
        "longrope_across": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
        "longrope_half": {
            "partial_rotary_factor": 0.5,
            "rope_parameters": {
                **LONGROPE,
                "short_factor": [1.0, 1.3],
                "long_factor": [2.0, 4.0],
                "original_max_position_embeddings": 128,
            },
            "original_max_position_embeddings": 128,
        },
        "gelu": {"hidden_act": "gelu"},
        "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
        "eps": {"rms_norm_eps": 1e-2},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "three_layers": {"num_hidden_layers": 3},
        "padding": {"pad_token_id": 3},
        "no_architectures": {"edits": {"architectures": DROP}},
    },
    quick=("half_rotary", "window"),
)
