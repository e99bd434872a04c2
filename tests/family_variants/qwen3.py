"""Qwen3."""

from __future__ import annotations

from family_variants.ropes import DYNAMIC, LINEAR, LLAMA3, YARN
from family_variants.variant_models import DROP, FULL, SLIDING, FamilyVariants

FAMILY = FamilyVariants(
    model_type="qwen3",
    base={"head_dim": 16},
    variants={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "as_many_kv_heads": {"num_key_value_heads": 4},
        "one_kv_head": {"num_key_value_heads": 1},
        "narrow_heads": {"head_dim": 4},
        "attention_bias": {"attention_bias": True},
        "window": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        "listed_layers": {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": [SLIDING, FULL],
        },
        "unused_window": {
            "use_sliding_window": False,
            "sliding_window": 16,
            "max_window_layers": 0,
        },
        "gelu": {"hidden_act": "gelu"},
        "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
        "eps": {"rms_norm_eps": 1e-2},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "linear": {"rope_parameters": LINEAR},
        "dynamic": {"rope_parameters": DYNAMIC},
        "llama3": {"rope_parameters": LLAMA3},
        "yarn": {"rope_parameters": YARN},
        "padding": {"pad_token_id": 3},
        "older_keys": {
            "edits": {
                "rope_parameters": DROP,
                "rope_theta": 3000.0,
                "rope_scaling": {"type": "linear", "factor": 2.0},
            }
        },
        "no_architectures": {"edits": {"architectures": DROP}},
    },
    quick=("tied", "yarn"),
)
