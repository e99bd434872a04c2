"""Granite."""

from __future__ import annotations

from family_variants.ropes import LINEAR, LLAMA3, YARN
from family_variants.variant_models import DROP, FamilyVariants

FAMILY = FamilyVariants(
    model_type="granite",
    base={
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
    },
    variants={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "as_many_kv_heads": {"num_key_value_heads": 4},
        "one_kv_head": {"num_key_value_heads": 1},
        "no_factors": {
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
        },
        "embedding_factor": {"embedding_multiplier": 12.0},
        "logits_factor": {"logits_scaling": 0.5},
        "residual_factor": {"residual_multiplier": 0.22},
        "attention_factor": {"attention_multiplier": 0.02},
        "attention_bias": {"attention_bias": True},
        "mlp_bias": {"mlp_bias": True},
        "gelu": {"hidden_act": "gelu"},
        "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
        "eps": {"rms_norm_eps": 1e-2},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "linear": {"rope_parameters": LINEAR},
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
    quick=("plain", "attention_factor"),
)
