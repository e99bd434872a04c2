"""Llama."""

from __future__ import annotations

from family_variants.ropes import DYNAMIC, LINEAR, LLAMA3, LONGROPE, YARN
from family_variants.variant_models import DROP, FamilyVariants

FAMILY = FamilyVariants(
    model_type="llama",
    base={},
    variants={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "as_many_kv_heads": {"num_key_value_heads": 4},
        "one_kv_head": {"num_key_value_heads": 1},
        "wide_heads": {"head_dim": 16},
        "attention_bias": {"attention_bias": True},
        "mlp_bias": {"mlp_bias": True},
        "both_biases": {"attention_bias": True, "mlp_bias": True},
        "gelu": {"hidden_act": "gelu"},
        "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
        "relu": {"hidden_act": "relu"},
        "eps": {"rms_norm_eps": 1e-2},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "linear": {"rope_parameters": LINEAR},
        "dynamic": {"rope_parameters": DYNAMIC},
        "llama3": {"rope_parameters": LLAMA3},
        "yarn": {"rope_parameters": YARN},
        "yarn_mscale": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
        "longrope": {"rope_parameters": LONGROPE},
        "no_architectures": {"edits": {"architectures": DROP}},
        "older_keys": {
            "edits": {
                "rope_parameters": DROP,
                "rope_theta": 3000.0,
                "rope_scaling": {"type": "linear", "factor": 2.0},
            }
        },
    },
    quick=("tied", "llama3"),
)
