"""Variants of the families that load: what transformers writes, and config.json edited after."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Mixtral", "Qwen3Moe")
DROP = "a key that is left out"

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
MORE: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": None},
    "Qwen3": {"head_dim": 16},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One directory.

    Args:
        made: what the model is made with, besides `SIZES` and `MORE`.
        edits: changes of config.json after that; `DROP` leaves a key out.
        dtype: of the files.
        max_shard: bytes of a file.
    """

    name: str
    family: str
    made: dict[str, Any] = field(default_factory=dict)
    edits: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    max_shard: int = 1 << 30
    seed: int = 0

    def write(self, directory: Path) -> None:
        import transformers

        kinds = {**SIZES, **MORE.get(self.family, {}), **self.made}
        config = getattr(transformers, f"{self.family}Config")(**kinds)
        config._experts_implementation = "eager"
        model = getattr(transformers, f"{self.family}ForCausalLM")(config).float()
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(noise + (1.0 if parameter.ndim == 1 else 0.0))
        model.to(self.dtype).save_pretrained(directory, max_shard_size=self.max_shard)
        file = directory / "config.json"
        content = json.loads(file.read_text())
        for key, value in self.edits.items():
            content[key] = value
            if value is DROP:
                del content[key]
        file.write_text(json.dumps(content))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 3.0}
OUTSIDE = {"original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": LINEAR,
    "llama3": {**LLAMA3, **OUTSIDE},
    "llama3 without a length": LLAMA3,
    "yarn": {**YARN, **OUTSIDE},
    "yarn without a length": YARN,
    "yarn null factor": {**YARN, **OUTSIDE, "factor": None},
    "yarn attention": {**YARN, **OUTSIDE, "attention_factor": 0.7},
    "yarn mscale": {**YARN, **OUTSIDE, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn one mscale": {**YARN, **OUTSIDE, "mscale": 0.7},
    "yarn betas": {**YARN, **OUTSIDE, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn below 1": {**YARN, **OUTSIDE, "factor": 0.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    "linear without a factor": {"rope_type": "linear"},
    "an unknown kind": {"rope_type": "spiral"},
}


def all_variants() -> list[Variant]:
    return [*_ropes(), *_keys(), *_files(), *_experts(), *_drawn(120)]


def _ropes() -> Iterator[Variant]:
    for family in FAMILIES:
        for name, rope in ROPES.items():
            new = {**rope, "rope_theta": 5000.0}
            yield Variant(name=f"{name}", family=family, edits={"rope_parameters": new})
        old = {"rope_parameters": DROP, "rope_theta": 3000.0}
        for name, rope in (("llama3", LLAMA3), ("yarn", YARN), ("linear", LINEAR)):
            before = {**{k: v for k, v in rope.items() if k != "rope_type"}, "type": name}
            edits = {**old, "rope_scaling": before, **OUTSIDE}
            yield Variant(name=f"old {name}, length outside", family=family, edits=edits)
            both = {"rope_scaling": {**before, "original_max_position_embeddings": 16}}
            yield Variant(name=f"{name}, two lengths", family=family, edits={**edits, **both})
            two = {**both, "rope_theta": 3000.0}
            yield Variant(name=f"{name}, both spellings", family=family, edits=two)
        for name, edits in {
            "no rope at all": {"rope_parameters": DROP},
            "null rope": {"rope_parameters": None, "rope_scaling": None, "rope_theta": 700.0},
            "partial rope": {**old, "partial_rotary_factor": 0.5},
            "whole partial rope": {**old, "partial_rotary_factor": 1.0},
            "two names of the kind": {
                **old,
                "rope_scaling": {**LINEAR, "type": "yarn"},
            },
        }.items():
            yield Variant(name=name, family=family, edits=edits)


def _keys() -> Iterator[Variant]:
    dropped = (
        *("rms_norm_eps", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
        *("tie_word_embeddings", "head_dim", "attention_bias", "intermediate_size", "vocab_size"),
        *("num_hidden_layers", "num_attention_heads", "hidden_size", "sliding_window"),
    )
    for family in FAMILIES:
        kinds = {**SIZES, **MORE.get(family, {})}
        for key in dropped:
            made: dict[str, Any] = {}
            if key == "num_key_value_heads":
                # what each class has without the key, where so many heads are made at all
                count = {"Llama": 4, "Qwen2": 32, "Qwen3": 32, "Qwen3Moe": 4}.get(family, 8)
                heads = max(count, 4)
                made = {"num_attention_heads": heads, key: count, "hidden_size": 8 * heads}
            if key == "head_dim" and family == "Qwen3":
                made = {"head_dim": 128}
            if key == "rms_norm_eps":
                made = {key: 1e-5 if family == "Mixtral" else 1e-6}
            edits = {key: DROP}
            if key not in kinds and key not in ("rms_norm_eps", "hidden_act"):
                edits = {key: None}
            yield Variant(name=f"without {key}", family=family, made=made, edits=edits)
        for name, more in {
            "attention_bias": {"attention_bias": True},
            "mlp_bias": {"mlp_bias": True},
            "gelu": {"hidden_act": "gelu"},
            "swish": {"hidden_act": "swish"},
        }.items():
            yield Variant(name=name, family=family, made=more)
        for name, edits in {
            "null eps": {"rms_norm_eps": None},
            "text size": {"vocab_size": "97"},
            "no heads": {"num_attention_heads": 0},
            "another type": {"model_type": "llama" if family != "Llama" else "qwen2"},
            "not causal": {"is_causal": False},
            "a window": {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0},
            "a wide window": {"sliding_window": 128, "use_sliding_window": True},
            "an unused window": {"sliding_window": 16, "use_sliding_window": False},
            "sliding layers": {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "more layers": {"num_hidden_layers": 3},
            "fewer layers": {"num_hidden_layers": 1},
            "another head_dim": {"head_dim": 4},
        }.items():
            yield Variant(name=name, family=family, edits=edits)


def _files() -> Iterator[Variant]:
    for family in FAMILIES:
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            yield Variant(name=f"{dtype}", family=family, dtype=dtype)
        yield Variant(name="sharded", family=family, max_shard=9000)
        yield Variant(name="tied", family=family, made={"tie_word_embeddings": True})
        yield Variant(name="tied by hand", family=family, edits={"tie_word_embeddings": True})


def _experts() -> Iterator[Variant]:
    for family, key in (("Mixtral", "num_local_experts"), ("Qwen3Moe", "num_experts")):
        for experts, top_k in ((4, 1), (4, 4), (6, 3), (8, 2)):
            made = {key: experts, "num_experts_per_tok": top_k}
            yield Variant(name=f"{top_k} of {experts}", family=family, made=made)
        for drop in ("num_local_experts", "num_experts", "num_experts_per_tok"):
            yield Variant(name=f"null {drop}", family=family, edits={drop: None})
        yield Variant(
            name="eight by default",
            family=family,
            made={key: 8},
            edits={"num_local_experts": DROP} if family == "Mixtral" else {},
        )
        yield Variant(name="two counts", family=family, edits={"num_experts": 3})
    for name, made in {
        "normalised": {"norm_topk_prob": True},
        "a dense layer": {"mlp_only_layers": [0]},
        "all dense": {"mlp_only_layers": [0, 1]},
        "every second": {"decoder_sparse_step": 2},
        "none by step": {"decoder_sparse_step": 3},
        "no experts": {"num_experts": 0},
        "top of 8 by default": {"num_experts": 8, "num_experts_per_tok": 8},
    }.items():
        edits = {"num_experts_per_tok": DROP} if "default" in name else {}
        yield Variant(name=name, family="Qwen3Moe", made=made, edits=edits)


def _drawn(count: int) -> Iterator[Variant]:
    """Shapes and settings at random."""
    for seed in range(count):
        draw = random.Random(seed)
        family = FAMILIES[seed % len(FAMILIES)]
        kv_heads = draw.choice((1, 2, 3, 4))
        heads = kv_heads * draw.choice((1, 2, 3))
        rope = dict(draw.choice([r for n, r in ROPES.items() if "with" not in n][:9]))
        made = {
            "vocab_size": draw.choice((53, 96, 131)),
            "hidden_size": heads * draw.choice((4, 8, 12)),
            "intermediate_size": draw.choice((16, 40, 72)),
            "num_hidden_layers": draw.choice((1, 2, 3)),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": draw.choice((8, 16, 24)),
            "rms_norm_eps": draw.choice((1e-6, 1e-5, 1e-3)),
            "tie_word_embeddings": draw.random() < 0.4,
            "rope_parameters": {**rope, "rope_theta": draw.choice((100.0, 1e4, 1e6))},
        }
        yield Variant(
            name=f"drawn {seed}",
            family=family,
            made=made,
            dtype=draw.choice((torch.float32, torch.bfloat16, torch.float16)),
            max_shard=draw.choice((1 << 30, 8000)),
            seed=seed,
        )
