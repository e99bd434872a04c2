"""Families and their variants, by config.json's `model_type`."""

from __future__ import annotations

from family_variants import (
    deepseek_v3,
    gemma2,
    gemma3_text,
    glm4_moe,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5_moe_text,
    qwen3_5_text,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
)
from family_variants.variant_models import FamilyVariants

_MODULES = (
    llama,
    mistral,
    qwen2,
    qwen3,
    mixtral,
    qwen3_moe,
    gemma2,
    gemma3_text,
    gpt_oss,
    qwen3_next,
    qwen3_5_text,
    qwen3_5_moe_text,
    deepseek_v3,
    glm4_moe,
    olmo2,
    olmo3,
    qwen2_moe,
    smollm3,
    phi3,
    granite,
    seed_oss,
)
FAMILIES: dict[str, FamilyVariants] = {
    module.FAMILY.model_type: module.FAMILY for module in _MODULES
}
