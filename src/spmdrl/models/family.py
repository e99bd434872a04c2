"""`Family`: what the `config.json` and the tensors of a kind of model mean. Each is one file of
`families/`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, util
from pathlib import Path
from typing import Any

from spmdrl.config.user_objects import load_object, look_in_working_directory
from spmdrl.models.fields import Fields
from spmdrl.models.model_classes import CLASSIFICATION
from spmdrl.models.specs import LayerSpec, NormSpec

USERS_PACKAGE = "spmdrl_families"
"""Package whose modules add families: a directory of that name in the working directory, or where
else Python finds it."""


@dataclass(frozen=True, kw_only=True)
class Body:
    """A decoder without its vocabulary and its width.

    Args:
        embedding_scale: factor of the embeddings.
        logit_scale: factor of the logits.
        logit_softcap: c in c * tanh(logits / c); None: none.
    """

    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    Args:
        model_type: config.json's `model_type`, by which `transformers` chooses its classes.
        architecture: the name of the language model's class, `...ForCausalLM`.
        read: makes the body of config.json's values, as `transformers`' configuration class has
            them (`config_reading.resolved`); ValueErrors name the key.
        names: names of modules in files, after `model.layers.{i}.`, by the names in `STANDARD`,
            where they differ from those. `{}` stands for an expert's number.
        fused: modules in files that hold several others' rows, below one another.
        tiny: keys of config.json, in addition to the usual ones, that make a tiny model.
        vllm_reads_windows: whether vLLM's own model reads `layer_types`, so that only some of its
            layers can have a window.
        unread: keys that would change the logits in ways that `read` does not know; a value that
            is true or not empty is refused.
        also: further values of `model_type` that mean this family.
        config: the `model_type` whose configuration class of `transformers` reads config.json,
            where it has none for the family's own: a key that this class does not know is kept, and
            has no default.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], Body]
    names: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)
    vllm_reads_windows: bool = False
    unread: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    config: str | None = None

    @property
    def config_type(self) -> str:
        """The `model_type` of the configuration class that reads config.json."""
        return self.model_type if self.config is None else self.config

    def module(self, part: str) -> str:
        """Return a module's name in files by its local name."""
        name = self.names.get(part) or STANDARD.get(part)
        if name is None:
            raise ValueError(f"{self.model_type}: the family names no tensor for {part!r}")
        return name


STANDARD: Mapping[str, str] = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.sinks": "self_attn.sinks",
    "attention.q_down": "self_attn.q_a_proj",
    "attention.q_down_norm": "self_attn.q_a_layernorm",
    "attention.q_up": "self_attn.q_b_proj",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_down_norm": "self_attn.kv_a_layernorm",
    "attention.kv_up": "self_attn.kv_b_proj",
    "delta.qkvz": "linear_attn.in_proj_qkvz",
    "delta.ba": "linear_attn.in_proj_ba",
    "delta.qkv": "linear_attn.in_proj_qkv",
    "delta.z": "linear_attn.in_proj_z",
    "delta.b": "linear_attn.in_proj_b",
    "delta.a": "linear_attn.in_proj_a",
    "delta.conv": "linear_attn.conv1d",
    "delta.log_decay": "linear_attn.A_log",
    "delta.step_bias": "linear_attn.dt_bias",
    "delta.norm": "linear_attn.norm",
    "delta.out": "linear_attn.out_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "mlp.router": "mlp.gate",
    "mlp.router.correction": "mlp.gate.e_score_correction_bias",
    "mlp.experts.gate": "mlp.experts.{}.gate_proj",
    "mlp.experts.up": "mlp.experts.{}.up_proj",
    "mlp.experts.down": "mlp.experts.{}.down_proj",
    "mlp.experts.all_gate_up": "mlp.experts.gate_up_proj",
    "mlp.experts.all_down": "mlp.experts.down_proj",
    "mlp.experts.all_gate_up_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.experts.all_down_bias": "mlp.experts.down_proj_bias",
    "mlp.shared.gate": "mlp.shared_experts.gate_proj",
    "mlp.shared.up": "mlp.shared_experts.up_proj",
    "mlp.shared.down": "mlp.shared_experts.down_proj",
    "mlp.shared_gate": "mlp.shared_expert_gate",
}
"""Local names of modules and bare tensors -> names in files of Llama, which most families share, or
of the first family that has the module."""


@cache
def families() -> Mapping[str, Family]:
    """Return all families by the architecture of their language model.

    Raises:
        ValueError: a user's module has no family, cannot be imported, or has one that exists.
    """
    found: dict[str, Family] = {}
    for name, family in _all_families():
        types = {family.model_type, *family.also}
        for other in found.values():
            if family.architecture == other.architecture or types & {other.model_type, *other.also}:
                raise ValueError(
                    f"{name}: its FAMILY has the architecture or a model_type of another family, "
                    f"{other.architecture} ({other.model_type}): give it names of its own"
                )
        found[family.architecture] = family
    return found


def family_types() -> Mapping[str, Family]:
    """Return all families by each `model_type` that means them."""
    return {kind: own for own in families().values() for kind in (own.model_type, *own.also)}


def _all_families() -> Iterator[tuple[str, Family]]:
    """Yield the names of all modules of families with what they declare, the users' last."""
    for name in _modules("spmdrl.models.families"):
        yield name, import_module(name).FAMILY
    if Path(USERS_PACKAGE).is_dir():
        look_in_working_directory()
    for name in _modules(USERS_PACKAGE):
        family = load_object(f"{name}:FAMILY")
        if not isinstance(family, Family):
            raise ValueError(f"{name}: FAMILY must be a Family, not {type(family).__name__}")
        yield name, family


def _modules(package: str) -> Iterator[str]:
    spec = util.find_spec(package)
    places = None if spec is None else spec.submodule_search_locations
    for info in pkgutil.iter_modules(places if places is not None else ()):
        yield f"{package}.{info.name}"


def family_of(architecture: str) -> Family:
    """Return the family of a language model's architecture.

    Raises:
        ValueError: no family has it; the message lists those there are.
    """
    found = families().get(architecture)
    if found is None:
        raise ValueError(
            f"architecture {architecture!r} is not supported; supported are "
            f"{', '.join(sorted(families()))}, and these as {CLASSIFICATION}"
        )
    return found
