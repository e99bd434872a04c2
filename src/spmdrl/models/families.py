"""The architectures of the decoder, and the values of keys that their configurations lack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spmdrl.models.experts import EXPERT_NAMES

CAUSAL, CLASSIFICATION = "ForCausalLM", "ForSequenceClassification"

MODEL_TYPES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
}
"""config.json's `model_type` of each architecture; `transformers` chooses its class by it."""

SUPPORTED = (
    *(name for name in MODEL_TYPES if name not in EXPERT_NAMES),
    *EXPERT_NAMES,
)

_COMMON: Mapping[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
    "sliding_window": None,
    "eos_token_id": None,
    "bos_token_id": None,
}
_QWEN: Mapping[str, Any] = {
    **_COMMON,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
_DENSE_QWEN: Mapping[str, Any] = {**_QWEN, "max_window_layers": 28, "layer_types": None}
_MISTRAL: Mapping[str, Any] = {
    **_COMMON,
    "vocab_size": 32000,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": {
        **_COMMON,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
    },
    "MistralForCausalLM": _MISTRAL,
    "Qwen2ForCausalLM": _DENSE_QWEN,
    "Qwen3ForCausalLM": {**_DENSE_QWEN, "head_dim": 128},
    "Qwen3MoeForCausalLM": {
        **_QWEN,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
    "MixtralForCausalLM": {
        **_MISTRAL,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
}
"""Defaults of `transformers`' configuration classes by architecture, for every key that is read.

Ends of text are left out: the tokenizer decides which tokens end a text, not the class."""
