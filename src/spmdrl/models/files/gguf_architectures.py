"""GGUF's architectures: what their keys mean in a config.json, and names of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from spmdrl.models.fields import Fields
from spmdrl.models.files.gguf_tokenizer import token_id, token_list

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

_READ = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
)
"""Keys of every architecture that are read, or that have no effect without keys that are refused.
"""

_ENDS = ("eos", "eot", "eom")
"""The kinds of ids at which llama.cpp ends a text."""


@dataclass(frozen=True, kw_only=True)
class GgufArchitecture:
    """An architecture whose files are converted.

    Args:
        config: the part of config.json that other architectures do not have.
        layer_names: modules in Hugging Face files, by GGUF's names in a layer.
        more: keys that are read in addition to those of every architecture.
        is_permuted: whether the rows of q and k are in llama.cpp's order.
        one_plus: whether norms, whose weight is w in Hugging Face files, are stored as 1 + w.
    """

    config: Callable[[Fields], dict[str, Any]]
    layer_names: Mapping[str, str]
    more: tuple[str, ...] = ()
    is_permuted: bool = False
    one_plus: bool = False


def architecture_of(fields: Fields) -> GgufArchitecture:
    """Find the architecture of a file by its keys.

    Raises:
        ValueError: it is not converted; the message lists those that are.
    """
    name = fields.text("general.architecture")
    if name not in _ARCHITECTURES:
        raise ValueError(
            f"{fields.origin}: GGUF architecture {name!r} is not supported; supported are "
            f"{', '.join(_ARCHITECTURES)} (use the model's Hugging Face directory instead)"
        )
    return _ARCHITECTURES[name]


def config_source(fields: Fields, tensors: list[str]) -> dict[str, Any]:
    """Make config.json's content from GGUF's keys.

    Args:
        tensors: names of the file's tensors.

    Raises:
        ValueError: the file is not a whole model, or has a key that is not converted.
    """
    path, architecture = fields.origin, architecture_of(fields)
    if "rope_freqs.weight" in tensors:
        raise ValueError(f"{path}: scaled rope is not converted from GGUF (rope_freqs.weight)")
    _refuse_parts(fields)
    known = {_key(fields, key) for key in (*_READ, *architecture.more)}
    for key in fields.values:
        if key.startswith(_key(fields, "")) and key not in known:
            raise ValueError(f"{path}: the key {key!r} is not converted from GGUF")
    heads, kv_heads, head_dim = _heads(fields)
    return {
        "vocab_size": len(token_list(fields)),
        "hidden_size": fields.integer(_key(fields, "embedding_length")),
        "intermediate_size": fields.integer(_key(fields, "feed_forward_length")),
        "num_hidden_layers": fields.integer(_key(fields, "block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": _decimal(fields, "attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": fields.integer(_key(fields, "context_length")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
        **architecture.config(fields),
        **_token_ids(fields),
    }


def _llama(fields: Fields) -> dict[str, Any]:
    rope = _rope_source(fields)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "mlp_bias": False,
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
    }


_SWA_THETA = "rope.freq_base_swa"
_LAYERS_27B = 62


def _gemma3(fields: Fields) -> dict[str, Any]:
    """Read Gemma 3's keys; what they lack is as in llama.cpp (llm_build_gemma3)."""
    layers, (heads, _, head_dim) = fields.integer(_key(fields, "block_count")), _heads(fields)
    local = 10000.0
    if _key(fields, _SWA_THETA) in fields:
        local = fields.number(_key(fields, _SWA_THETA), above=0.0)
    # the largest model's scores are scaled by the hidden size, those of the others by a head's
    hidden = fields.integer(_key(fields, "embedding_length"))
    scalar = hidden // heads if layers == _LAYERS_27B else head_dim
    cap = "final_logit_softcapping"
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": fields.integer(_key(fields, "attention.sliding_window")),
        "layer_types": [
            "sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)
        ],
        "rope_parameters": {
            "full_attention": _rope_source(fields, default=1e6),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        cap: _decimal(fields, cap) if _key(fields, cap) in fields else None,
        "attn_logit_softcapping": None,
    }


_ARCHITECTURES = {
    "gemma3": GgufArchitecture(
        config=_gemma3,
        layer_names={
            **LAYER_NAMES,
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        more=("attention.sliding_window", "final_logit_softcapping", _SWA_THETA),
        one_plus=True,
    ),
    "llama": GgufArchitecture(config=_llama, layer_names=LAYER_NAMES, is_permuted=True),
}


def _key(fields: Fields, name: str) -> str:
    """Return the name of a key of the file's architecture."""
    return f"{fields.text('general.architecture')}.{name}"


def _decimal(fields: Fields, name: str) -> float:
    """Read a number that GGUF stores as a float32: its shortest decimal is what was meant."""
    return float(str(np.float32(fields.number(_key(fields, name)))))


def _heads(fields: Fields) -> tuple[int, int, int]:
    """Read the numbers of heads and key-value heads, and a head's dims."""
    heads = fields.integer(_key(fields, "attention.head_count"))
    kv_heads = heads
    head_dim = fields.integer(_key(fields, "embedding_length")) // heads
    if _key(fields, "attention.head_count_kv") in fields:
        kv_heads = fields.integer(_key(fields, "attention.head_count_kv"))
    turned = _key(fields, "rope.dimension_count")
    for key in (_key(fields, "attention.key_length"), turned):
        if key in fields:
            head_dim = fields.integer(key)
            break
    for key in (_key(fields, "attention.value_length"), turned):
        if key in fields and fields.integer(key) != head_dim:
            raise ValueError(
                f"{fields.origin}: {key}={fields.value(key)} with heads of {head_dim} values"
            )
    return heads, kv_heads, head_dim


def _refuse_parts(fields: Fields) -> None:
    """Raise ValueError for a file that is not a complete model, or whose keys disagree."""
    if fields.values.get("general.type", "model") != "model" or "adapter.type" in fields:
        raise ValueError(
            f"{fields.origin}: general.type={fields.values.get('general.type')!r} is no model: "
            "give the file of the model that it belongs to, with an adapter merged into it"
        )
    if "split.count" in fields and fields.integer("split.count", 0) > 1:
        raise ValueError(
            f"{fields.origin} is one of {fields.value('split.count')} parts: join them first "
            "(`llama-gguf-split --merge`)"
        )
    key, count = _key(fields, "vocab_size"), len(token_list(fields))
    if key in fields and fields.integer(key) != count:
        raise fields.wrong(key, f"{count}, the number of tokenizer.ggml.tokens")


def _rope_source(fields: Fields, default: float = 10000.0) -> dict[str, Any]:
    """Read rope like llama.cpp: without a type the factor is linear, and 0 means no factor.

    Args:
        default: theta where the file has none.
    """
    theta = default
    if _key(fields, "rope.freq_base") in fields:
        theta = fields.number(_key(fields, "rope.freq_base"), above=0.0)
    key = _key(fields, "rope.scaling.type")
    kind = fields.text(key) if key in fields else "linear"
    if kind not in ("none", "linear"):
        raise ValueError(f"{fields.origin}: scaled rope is not converted from GGUF: {key}={kind!r}")
    factors = (_key(fields, "rope.scaling.factor"), _key(fields, "rope.scale_linear"))
    given = next((key for key in factors if key in fields), None)
    factor = 1.0 if given is None else fields.number(given, least=0.0) or 1.0
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    return rope


def _token_ids(fields: Fields) -> dict[str, Any]:
    """Make config.json's ids of special tokens."""
    found: dict[str, Any] = {
        f"{kind}_token_id": token_id(fields, key)
        for kind, key in (("bos", "bos"), ("pad", "padding"))
    }
    ends = dict.fromkeys(end for kind in _ENDS if (end := token_id(fields, kind)) is not None)
    if ends:
        found["eos_token_id"] = next(iter(ends)) if len(ends) == 1 else list(ends)
    return {key: value for key, value in found.items() if value is not None}
