"""`ModelConfig`: the decoder's part of a Hugging Face `config.json`, checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spmdrl.models.experts import MoeConfig, parse_experts, tiny_experts
from spmdrl.models.families import CAUSAL, CLASSIFICATION, DEFAULTS, SUPPORTED, refuse_features
from spmdrl.models.fields import Fields, read_json
from spmdrl.models.rope import RopeConfig, parse_rope

GENERATION = "generation_config.json"
MOST_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of one decoder; `source` is config.json as it was read.

    `architecture` is the family's name as a language model, whatever head the directory's model
    has. `intermediate_size` is that of dense layers; `moe` describes the layers with experts.
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
    """Read the configuration in the directory `path` (config.json and generation_config.json).

    Raises:
        ValueError: there is no readable config.json; the decoder lacks the architecture (the
            message lists those it supports) or a feature; a value is not valid for its key.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        if (Path(path) / "adapter_config.json").is_file():
            raise ValueError(
                f"{path} holds an adapter and no model: give its base here, and this directory as "
                "roles.NAME.adapter.path"
            )
        raise ValueError(f"{file} does not exist: give the directory of a Hugging Face model")
    source = read_json(file)
    generation_file = Path(path) / GENERATION
    generation = read_json(generation_file) if generation_file.is_file() else {}
    return parse_config(
        source, generation=generation, origin=str(file), generation_origin=str(generation_file)
    )


def parse_config(
    source: Mapping[str, Any],
    *,
    generation: Mapping[str, Any] | None = None,
    origin: str = "config.json",
    generation_origin: str = GENERATION,
) -> ModelConfig:
    """Parse a mapping with config.json's keys like `read_config`; errors name `origin`.

    A missing key gets the value that `transformers` gives it (see `families`).
    """
    architecture = _architecture(source, origin)
    fields = Fields(values=source, origin=origin, defaults=DEFAULTS[architecture])
    num_layers = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    max_position = fields.integer("max_position_embeddings")
    refuse_features(fields, architecture, num_layers, max_position)
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_kv_heads = num_heads
    if not fields.is_null("num_key_value_heads"):
        num_kv_heads = fields.integer("num_key_value_heads")
    if num_heads % num_kv_heads:
        absent = "" if "num_key_value_heads" in fields else ", the default of this architecture"
        raise ValueError(
            f"{origin}: num_attention_heads={num_heads} is no multiple of "
            f"num_key_value_heads={num_kv_heads}{absent}"
        )
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, architecture, hidden_size, num_heads),
        rms_norm_eps=fields.number("rms_norm_eps", least=0.0),
        rope=parse_rope(fields, max_position),
        max_position=max_position,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        moe=parse_experts(fields, architecture),
        bos_id=None if fields.is_null("bos_token_id") else fields.integer("bos_token_id", 0),
        eos_ids=_eos_ids(fields, generation or {}, generation_origin),
        source=dict(source),
    )


def tiny(model: ModelConfig) -> ModelConfig:
    """Shrink to 2 layers of width 64 with the same vocabulary, for `model.tiny: true`.

    A mixture of experts has 8 experts in both layers, and a token is routed to 2.
    """
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the least that vLLM supports on a CPU
    }
    if model.moe is not None:
        sizes |= tiny_experts(model.architecture)
    # Lists with one entry per layer would contradict the new number of layers.
    source = {key: value for key, value in model.source.items() if key != "layer_types"}
    source |= sizes
    fields = Fields(values=source, origin="config.json", defaults=DEFAULTS[model.architecture])
    return replace(
        model,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        moe=parse_experts(fields, model.architecture),
        source=source,
    )


def _architecture(source: Mapping[str, Any], origin: str) -> str:
    names = source.get("architectures") or [None]
    if not isinstance(names, list):
        raise ValueError(f"{origin}: architectures must be a list, not {names!r}")
    architecture = str(names[0]).replace(CLASSIFICATION, CAUSAL)
    if architecture not in SUPPORTED:
        raise ValueError(
            f"{origin}: architecture {names[0]!r} is not supported; supported are "
            f"{', '.join(SUPPORTED)}, and these as {CLASSIFICATION}"
        )
    return architecture


def _head_dim(fields: Fields, architecture: str, hidden_size: int, num_heads: int) -> int:
    is_given = not fields.is_null("head_dim")
    if not is_given and architecture == "LlamaForCausalLM" and hidden_size % num_heads:
        raise ValueError(
            f"{fields.origin}: hidden_size={hidden_size} is no multiple of "
            f"num_attention_heads={num_heads}"
        )
    head_dim = fields.integer("head_dim") if is_given else hidden_size // num_heads
    if head_dim % 2 or head_dim == 0:
        raise ValueError(
            f"{fields.origin}: head_dim={head_dim} (hidden_size={hidden_size}, "
            f"num_attention_heads={num_heads}) is not even: rotary embedding turns pairs"
        )
    return head_dim


def _eos_ids(fields: Fields, generation: Mapping[str, Any], origin: str) -> tuple[int, ...]:
    """Collect all ends of text; chat models often name a second one in generation_config.json."""
    other = Fields(values=generation, origin=origin, defaults={"eos_token_id": None})
    ids = (*fields.ids("eos_token_id"), *other.ids("eos_token_id"))
    return tuple(dict.fromkeys(ids))
