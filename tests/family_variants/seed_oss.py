"""Seed-OSS."""

from __future__ import annotations

from family_variants.ropes import DYNAMIC, LINEAR, YARN
from family_variants.variant_models import DROP, FamilyVariants

FAMILY = FamilyVariants(
    model_type="seed_oss",
    base={"head_dim": 16},
    variants={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "as_many_kv_heads": {"num_key_value_heads": 4},
        "one_kv_head": {"num_key_value_heads": 1},
        "null_head_dim": {"head_dim": None},
        "no_bias": {"attention_bias": False},
        "out_bias": {"attention_out_bias": True},
        "only_out_bias": {"attention_bias": False, "attention_out_bias": True},
        "mlp_bias": {"mlp_bias": True},
        "gelu": {"hidden_act": "gelu"},
        "eps": {"rms_norm_eps": 1e-2},
        "linear": {"rope_parameters": LINEAR},
        "dynamic": {"rope_parameters": DYNAMIC},
        "yarn": {"rope_parameters": YARN},
        "padding": {"pad_token_id": 3},
        "no_architectures": {"edits": {"architectures": DROP}},
    },
    quick=("plain", "out_bias"),
)
