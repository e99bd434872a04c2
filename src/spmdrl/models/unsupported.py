"""Refusal of features that config.json may ask for and the decoder does not compute, key by key."""

from __future__ import annotations

import re

from spmdrl.models.families import MODEL_TYPES
from spmdrl.models.fields import Fields

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
