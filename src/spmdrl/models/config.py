"""`ModelConfig`: what the decoder needs of a Hugging Face `config.json`, checked as it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .experts import EXPERT_NAMES, MoeConfig, parse_experts, tiny_experts

SUPPORTED = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    *EXPERT_NAMES,
)
CAUSAL, CLASSIFICATION = "ForCausalLM", "ForSequenceClassification"
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; the fields after `factor` belong to `llama3` or `yarn` alone."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of one decoder; `source` is config.json as it was read.

    `architecture` names the family as a language model, whichever head the directory's model has.
    `intermediate_size` is that of dense layers; `moe` describes the layers with experts.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position: int
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    moe: MoeConfig | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    source: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


def read_config(path: str | Path) -> ModelConfig:
    """The configuration in the directory `path` (its config.json, and generation_config.json).

    Raises:
        ValueError: no readable config.json there; an architecture or a feature that the decoder
            lacks (the supported architectures are listed); a required key missing.
    """
    file = Path(path) / "config.json"
    source = _read_json(file)
    generation_file = Path(path) / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.is_file() else {}
    return parse_config(source, generation=generation, origin=str(file))


def parse_config(
    source: Mapping[str, Any],
    *,
    generation: Mapping[str, Any] | None = None,
    origin: str = "config.json",
) -> ModelConfig:
    """`read_config` of a mapping with config.json's keys; `origin` is named in errors."""
    names = source.get("architectures") or [None]
    architecture = str(names[0]).replace(CLASSIFICATION, CAUSAL)
    if architecture not in SUPPORTED:
        raise ValueError(
            f"{origin}: architecture {names[0]!r} is not supported; supported are "
            f"{', '.join(SUPPORTED)}, and these as {CLASSIFICATION}"
        )
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    missing = [key for key in (*required, "num_attention_heads") if source.get(key) is None]
    if missing:
        raise ValueError(f"{origin}: the keys {missing} are missing")
    _refuse_features(source, architecture, origin)
    num_heads = int(source["num_attention_heads"])
    num_kv_heads = int(source.get("num_key_value_heads") or num_heads)
    # transformers' Qwen3Config has a head_dim of 128 where the file has none (Qwen3MoeConfig not).
    default_head_dim = (
        128 if architecture == "Qwen3ForCausalLM" else source["hidden_size"] // num_heads
    )
    max_position = int(source.get("max_position_embeddings") or 2048)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{origin}: num_attention_heads={num_heads} is no multiple of "
            f"num_key_value_heads={num_kv_heads}"
        )
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(source["vocab_size"]),
        hidden_size=int(source["hidden_size"]),
        intermediate_size=int(source["intermediate_size"]),
        num_layers=int(source["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=int(source.get("head_dim") or default_head_dim),
        rms_norm_eps=float(source.get("rms_norm_eps", 1e-6)),
        rope=_parse_rope(source, architecture, max_position, origin),
        max_position=max_position,
        tie_embeddings=bool(source.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        moe=parse_experts(source, architecture, origin),
        bos_id=source.get("bos_token_id"),
        eos_ids=_eos_ids(source, generation or {}),
        source=dict(source),
    )


def tiny(config: ModelConfig) -> ModelConfig:
    """The same architecture and vocabulary with 2 layers of width 64: for `model.tiny: true`.

    A mixture of experts has 8 of them in both layers, and a token goes to 2.
    """
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the least that vLLM has on a CPU
    }
    if config.moe is not None:
        sizes |= tiny_experts(config.architecture)
    # Lists with one entry per layer would contradict the new number of layers.
    source = {key: value for key, value in config.source.items() if key != "layer_types"}
    source |= sizes
    return replace(
        config,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        moe=parse_experts(source, config.architecture, "config.json"),
        source=source,
    )


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> list[float]:
    """The head_dim / 2 angular frequencies in radians per position.

    `llama3` is Llama 3.1's rule (by wavelength), `yarn` is Peng et al. 2023
    (https://arxiv.org/abs/2309.00071), section 3.2.
    """
    plain = [rope.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if rope.kind == "linear":
        return [f / rope.factor for f in plain]
    if rope.kind == "llama3":
        return [_llama3_frequency(f, rope) for f in plain]
    if rope.kind == "yarn":
        low, high = _yarn_range(rope, head_dim)
        ramps = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(head_dim // 2)]
        return [f / rope.factor * r + f * (1 - r) for f, r in zip(plain, ramps, strict=True)]
    return plain


def _llama3_frequency(frequency: float, rope: RopeConfig) -> float:
    turns = rope.original_max_position * frequency / (2 * math.pi)
    if turns > rope.high_freq_factor:
        return frequency
    if turns < rope.low_freq_factor:
        return frequency / rope.factor
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - smooth) * frequency / rope.factor + smooth * frequency


def _yarn_range(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """First and last dimension of YaRN's ramp between extrapolation and interpolation."""

    def dimension(turns: float) -> float:
        length = rope.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # Equal ends would divide by zero; the reference implementation opens the same gap.
    return low, high + 0.001 if low == high else high


def _parse_rope(
    source: Mapping[str, Any], architecture: str, max_position: int, origin: str
) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    given = {**(source.get("rope_scaling") or {}), **(source.get("rope_parameters") or {})}
    default = 1e6 if architecture == "MixtralForCausalLM" else 10000.0
    theta = float(given.get("rope_theta") or source.get("rope_theta") or default)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"{origin}: rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    partial = given.get("partial_rotary_factor") or source.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"{origin}: partial_rotary_factor={partial} is not supported (only 1.0)")
    original = int(given.get("original_max_position_embeddings") or max_position)
    factor = float(given.get("factor") or max_position / original)
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_max_position=original,
        low_freq_factor=float(given.get("low_freq_factor") or 1.0),
        high_freq_factor=float(given.get("high_freq_factor") or 4.0),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        attention_factor=_yarn_attention_factor(given, factor) if kind == "yarn" else 1.0,
        truncate=bool(given.get("truncate", True)),
    )


def _yarn_attention_factor(given: Mapping[str, Any], factor: float) -> float:
    """The factor on cos and sin: YaRN's equation 22, 0.1 ln(s) + 1."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(given["mscale"]) / scale(given["mscale_all_dim"])
    return scale(1.0)


def _refuse_features(source: Mapping[str, Any], architecture: str, origin: str) -> None:
    """ValueError for what would silently give other logits than the model's own."""
    if source.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{origin}: hidden_act={source['hidden_act']!r} is not supported (silu)")
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        if source.get(key):
            raise ValueError(f"{origin}: {key}={source[key]!r} is not supported for {architecture}")
    window = _active_window(source, architecture)
    if window is not None:
        raise ValueError(
            f"{origin}: sliding-window attention (window {window}) is not supported; where all "
            f"sequences are shorter, set max_position_embeddings to at most {window} there"
        )


def _active_window(source: Mapping[str, Any], architecture: str) -> int | None:
    """The attention window, if some layer of the model has one that is shorter than its context."""
    # The configs' default is a window of 4096 (MixtralConfig's is none), where the key is missing.
    default = None if architecture == "MixtralForCausalLM" else 4096
    window = source.get("sliding_window", default)
    if architecture in ("MistralForCausalLM", "MixtralForCausalLM"):
        used = window is not None
    elif architecture == "LlamaForCausalLM":
        used = False
    else:
        kinds = source.get("layer_types")
        if architecture == "Qwen3MoeForCausalLM":
            some_layer = True
        elif kinds is not None:
            some_layer = "sliding_attention" in kinds
        else:
            some_layer = source.get("max_window_layers", 28) < source["num_hidden_layers"]
        used = bool(source.get("use_sliding_window")) and window is not None and some_layer
    long_context = window is not None and source.get("max_position_embeddings", 0) > window
    return int(window) if used and long_context and window is not None else None


def _eos_ids(source: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """All ends of text: chat models often name a second one in generation_config.json alone."""
    found: list[int] = []
    for given in (source.get("eos_token_id"), generation.get("eos_token_id")):
        ids = given if isinstance(given, list) else [given]
        found += [int(i) for i in ids if i is not None and int(i) not in found]
    return tuple(found)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give the directory of a Hugging Face model")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content
