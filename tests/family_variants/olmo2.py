"""OLMo 2."""

from __future__ import annotations

from family_variants.ropes import DYNAMIC, LINEAR, LLAMA3, LONGROPE, YARN
from family_variants.variant_models import DROP, FamilyVariants

FAMILY = FamilyVariants(
    model_type="olmo2",
    base={"pad_token_id": 1},
    variants={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "as_many_kv_heads": {"num_key_value_heads": 4},
        "one_kv_head": {"num_key_value_heads": 1},
        "null_kv_heads": {"num_key_value_heads": None},
        "wide_heads": {"head_dim": 16},
        "attention_bias": {"attention_bias": True},
        "gelu": {"hidden_act": "gelu"},
        "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
        "eps": {"rms_norm_eps": 1e-2},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "linear": {"rope_parameters": LINEAR},
        "dynamic": {"rope_parameters": DYNAMIC},
        "llama3": {"rope_parameters": LLAMA3},
        "yarn": {"rope_parameters": YARN},
        "longrope": {"rope_parameters": LONGROPE},
        "three_layers": {"num_hidden_layers": 3},
        "no_padding": {"pad_token_id": None},
        "older_keys": {
            "edits": {
                "rope_parameters": DROP,
                "rope_theta": 3000.0,
                "rope_scaling": {"type": "linear", "factor": 2.0},
            }
        },
        "no_architectures": {"edits": {"architectures": DROP}},
    },
    quick=("plain", "attention_bias"),
)
