"""The architectures of the decoder and the values of keys that their configurations lack; features
that config.json may ask for and the decoder does not compute are refused key by key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from spmdrl.models.experts import EXPERT_NAMES
from spmdrl.models.fields import Fields

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


_FOREIGN = re.compile(r"quanti[sz]|^quant_|compress")
"""Keys of quantised formats: quantization_config, compression_config, MLX's quantization, ..."""

_SILU = ("silu", "swish")


def refuse_features(fields: Fields, architecture: str, num_layers: int, max_position: int) -> None:
    """Raise ValueError for a feature that the decoder lacks and that would change the logits."""
    origin = fields.origin
    model_type = fields.values.get("model_type", MODEL_TYPES[architecture])
    if model_type != MODEL_TYPES[architecture]:
        raise ValueError(
            f"{origin}: model_type {model_type!r} is not that of {architecture}, which is "
            f"{MODEL_TYPES[architecture]!r}: one of architectures and model_type is wrong"
        )
    if fields.text("hidden_act") not in _SILU:
        raise ValueError(
            f"{origin}: hidden_act={fields.value('hidden_act')!r} is not supported (silu)"
        )
    foreign = [key for key in fields.values if _FOREIGN.search(key)]
    # Qwen2's class does not read attention_bias: it always has the biases of q, k and v.
    biases = [] if architecture == "Qwen2ForCausalLM" else ["attention_bias"]
    for key in (*biases, "mlp_bias", "per_layer_config", "transformers_weights", *foreign):
        value = fields.values.get(key)
        if value:
            fix = ": give the directory of the model in float weights" if key in foreign else ""
            raise ValueError(
                f"{origin}: {key}={_short(value)} is not supported for {architecture}{fix}"
            )
    if not fields.values.get("is_causal", True):
        raise ValueError(f"{origin}: is_causal=false is not supported: attention looks back only")
    window = _active_window(fields, architecture, num_layers)
    if window is not None and max_position > window:
        raise ValueError(
            f"{origin}: sliding-window attention (window {window}) is not supported; where all "
            f"sequences are shorter, set max_position_embeddings to at most {window} there"
        )


def _active_window(fields: Fields, architecture: str, num_layers: int) -> int | None:
    """Return the attention window in tokens, if a layer of the model has one."""
    if architecture == "LlamaForCausalLM":
        return None
    if architecture in ("MistralForCausalLM", "MixtralForCausalLM"):
        return None if fields.is_null("sliding_window") else fields.integer("sliding_window")
    window = None
    if fields.flag("use_sliding_window") and not fields.is_null("sliding_window"):
        window = fields.integer("sliding_window")
    if architecture == "Qwen3MoeForCausalLM":
        return window
    kinds = fields.value("layer_types")
    if kinds is None:
        return window if fields.integer("max_window_layers", 0) < num_layers else None
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.wrong("layer_types", f"a list with one text for each of {num_layers} layers")
    strange = [k for k in kinds if k not in ("full_attention", "sliding_attention")]
    if strange:
        raise ValueError(f"{fields.origin}: layer_types has {strange[0]!r}, which is not supported")
    if "sliding_attention" not in kinds:
        return None
    if window is None:
        raise ValueError(
            f"{fields.origin}: layer_types has 'sliding_attention', but use_sliding_window and "
            "sliding_window give no window: set all layer_types to 'full_attention'"
        )
    return window


def _short(value: object) -> str:
    """Format a value for a message, shortened: lists of modules can be long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
