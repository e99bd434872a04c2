"""OLMo 3."""

from __future__ import annotations

from family_variants.ropes import YARN
from family_variants.variant_models import DROP, FULL, SLIDING, FamilyVariants

FAMILY = FamilyVariants(
    model_type="olmo3",
    base={"sliding_window": 16, "layer_types": [SLIDING, FULL], "pad_token_id": 1},
    variants={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "as_many_kv_heads": {"num_key_value_heads": 4},
        "one_kv_head": {"num_key_value_heads": 1},
        "null_kv_heads": {"num_key_value_heads": None},
        "attention_bias": {"attention_bias": True},
        "gelu": {"hidden_act": "gelu"},
        "eps": {"rms_norm_eps": 1e-2},
        "default_layers": {"layer_types": None, "num_hidden_layers": 4},
        "all_full": {"layer_types": [FULL, FULL]},
        "all_sliding": {"layer_types": [SLIDING, SLIDING]},
        "narrow_window": {"sliding_window": 3},
        "yarn": {
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default"},
            }
        },
        "theta": {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 100.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
        "older_keys": {
            "edits": {
                "rope_parameters": DROP,
                "rope_theta": 3000.0,
                "rope_scaling": {**YARN, "type": "yarn"},
            }
        },
        "three_layers": {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING]},
        "no_architectures": {"edits": {"architectures": DROP}},
    },
    quick=("yarn", "narrow_window"),
)
