"""SmolLM3."""

from __future__ import annotations

from family_variants.ropes import LINEAR, YARN
from family_variants.variant_models import DROP, FULL, SLIDING, FamilyVariants

FAMILY = FamilyVariants(
    model_type="smollm3",
    base={"num_hidden_layers": 3, "no_rope_layer_interval": 2},
    variants={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "as_many_kv_heads": {"num_key_value_heads": 4},
        "one_kv_head": {"num_key_value_heads": 1},
        "default_interval": {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
        "all_rope": {"no_rope_layers": [1, 1, 1]},
        "no_rope": {"no_rope_layers": [0, 0, 0]},
        "listed": {"no_rope_layers": [0, 1, 0]},
        "window": {"use_sliding_window": True, "sliding_window": 16},
        "unused_window": {"use_sliding_window": False, "sliding_window": 16},
        "listed_windows": {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": [SLIDING, FULL, SLIDING],
        },
        "attention_bias": {"attention_bias": True},
        "mlp_bias": {"mlp_bias": True},
        "gelu": {"hidden_act": "gelu"},
        "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
        "eps": {"rms_norm_eps": 1e-2},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "linear": {"rope_parameters": LINEAR},
        "yarn": {"rope_parameters": YARN},
        "padding": {"pad_token_id": 3},
        "no_architectures": {"edits": {"architectures": DROP}},
    },
    quick=("plain", "window"),
)
