"""`ModelConfig`: the decoder's part of a Hugging Face `config.json`, checked when it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from spmdrl.models.blocks.activations import activation_function
from spmdrl.models.config_reading import class_fields, resolved_fields
from spmdrl.models.family import Body, Family, families, family_of, family_types
from spmdrl.models.fields import Fields, kind_of, read_json
from spmdrl.models.model_classes import causal_name, class_name
from spmdrl.models.quantisation import QUANTIZATION, parse_quantisation
from spmdrl.models.rope import RopeConfig, tiny_rope
from spmdrl.models.specs import (
    ClampedSwiglu,
    DenseMlp,
    GatedDelta,
    LayerSpec,
    MoeMlp,
    NormSpec,
    SoftmaxAttention,
)
from spmdrl.models.text_part import text_part

GENERATION = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder: its layers, and what lies around them; `source` is config.json as it was read.

    `architecture` is the family's name as a language model, whatever head the directory's model
    has; `score_bias` says whether its scalar head has a bias. `embedding_scale`, `logit_scale` and
    `logit_softcap` are those of `family.Body`. `max_position` is the most tokens of a sequence,
    also by `RopeConfig.limit`.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    max_position: int
    tie_embeddings: bool
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = field(default=None, compare=False)
    score_bias: bool = False
    source: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def describe_positions(self) -> str:
        """Format the most positions for a message about a sequence that needs more."""
        limited = [rope for rope in _ropes(self.layers) if rope.limit is not None]
        why = f": {limited[0].describe_limit()}" if limited else ""
        return f"{self.max_position} positions{why}"

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # plans look models up hundreds of times, and large ones have a hundred layers
        return hash((self.architecture, self.vocab_size, self.hidden_size, self.layers, self.norm))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def family(self) -> Family:
        return family_of(self.architecture)

    @cached_property
    def moe(self) -> MoeMlp | None:
        """The experts of the layers that have any; those of all such layers are alike."""
        return next((spec.mlp for spec in self.layers if isinstance(spec.mlp, MoeMlp)), None)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have experts, ascending."""
        return tuple(i for i, spec in enumerate(self.layers) if isinstance(spec.mlp, MoeMlp))

    @property
    def attention(self) -> SoftmaxAttention:
        """The mixer of the first layer that has softmax attention.

        Raises:
            ValueError: no layer has it.
        """
        for spec in self.layers:
            if isinstance(spec.mixer, SoftmaxAttention):
                return spec.mixer
        raise ValueError(f"{self.architecture} has no layer with grouped-query attention")

    @property
    def dense_width(self) -> int | None:
        """The width of the widest dense MLP, None if all layers have experts."""
        widths = [spec.mlp.width for spec in self.layers if isinstance(spec.mlp, DenseMlp)]
        return max(widths, default=None)


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
    source = text_part(source, origin)
    _refuse_indexer(source, origin)
    family = _family(source, origin)
    fields = resolved_fields(source, family.config_type, origin)
    refuse_features(fields, source, family)
    body = family.read(fields)
    _check(body, origin)
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        layers=body.layers,
        norm=body.norm,
        max_position=_max_position(fields, body),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        embedding_scale=body.embedding_scale,
        logit_scale=body.logit_scale,
        logit_softcap=body.logit_softcap,
        bos_id=None if _is_absent(fields, "bos_token_id") else fields.integer("bos_token_id", 0),
        eos_ids=_eos_ids(fields, generation or {}, generation_origin),
        pad_id=None if _is_absent(fields, "pad_token_id") else fields.integer("pad_token_id", -1),
        source=dict(source),
    )


def tiny(model: ModelConfig) -> ModelConfig:
    """Shrink to 2 layers of width 64 with the same vocabulary, for `model.tiny: true`.

    A mixture of experts has 8 experts, and a token is routed to 2.
    """
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the least that vLLM supports on a CPU
        **model.family.tiny,
    }
    sizes |= tiny_rope({**model.source, **sizes}, sizes["head_dim"])
    return resized(model, sizes)


def resized(model: ModelConfig, keys: Mapping[str, Any]) -> ModelConfig:
    """Return the model that config.json describes with other values of some keys."""
    dropped = {"layer_types"} if "num_hidden_layers" in keys else set()
    # lists with one entry per layer would contradict another number of layers
    source = {key: value for key, value in model.source.items() if key not in dropped}
    changed = parse_config({**source, **keys})
    return replace(changed, bos_id=model.bos_id, eos_ids=model.eos_ids)


def _family(source: Mapping[str, Any], origin: str) -> Family:
    """Find the family by `architectures`, or by `model_type` where there are none."""
    names = source.get("architectures") or []
    if not isinstance(names, list):
        raise ValueError(f"{origin}: architectures must be a list, not {names!r}")
    given = source.get("model_type")
    of_type = family_types().get(given) if isinstance(given, str) else None
    if not names:
        if of_type is None:
            raise ValueError(
                f"{origin}: there is no architectures, and model_type {kind_of(given)} is not "
                f"supported; supported are {', '.join(sorted(family_types()))}"
            )
        return of_type
    known = {own.architecture: own.model_type for own in families().values()}
    kind = given if of_type is None else of_type.model_type
    try:
        family = family_of(causal_name(str(names[0]), kind, known))
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    if "model_type" in source and family is not of_type:
        raise ValueError(
            f"{origin}: model_type {given!r} is not that of {family.architecture}, which is "
            f"{family.model_type!r}: one of architectures and model_type is wrong"
        )
    return family


_INDEXER = "index_topk"


def _refuse_indexer(source: Mapping[str, Any], origin: str) -> None:
    """Raise ValueError for sparse attention, whether config.json or its class says so."""
    model_type, known = source.get("model_type"), list(family_types())
    given = source.get(_INDEXER)
    if given is None and (model_type in known or _INDEXER not in class_fields(model_type)):
        return
    name = class_name(source) or f"model_type {kind_of(model_type)}"
    raise ValueError(
        f"{origin}: {name} has a sparse-attention indexer ({_INDEXER}), which chooses the keys of "
        "each query (DeepSeek Sparse Attention): it is not supported"
    )


def _check(body: Body, origin: str) -> None:
    """Refuse what a family may read and no block computes."""
    experts = {spec.mlp for spec in body.layers if isinstance(spec.mlp, MoeMlp)}
    if len(experts) > 1:
        raise ValueError(f"{origin}: its layers have different experts, which is not supported")
    for spec in body.layers:
        if isinstance(spec.mlp.activation, ClampedSwiglu):
            continue
        try:
            activation_function(spec.mlp.activation)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None


_FOREIGN = re.compile(r"quanti[sz]|^quant_|compress")
"""Keys of quantised formats: quantization_config, compression_config, MLX's quantization, ..."""


def refuse_features(fields: Fields, source: Mapping[str, Any], family: Family) -> None:
    """Raise ValueError for a feature that would change the logits and that no block computes."""
    parse_quantisation(source, fields.origin)
    foreign = [key for key in source if _FOREIGN.search(key) and key != QUANTIZATION]
    for key in ("per_layer_config", "transformers_weights", *family.unread, *foreign):
        value = source.get(key)
        if value:
            fix = ": give the directory of the model in float weights" if key in foreign else ""
            raise ValueError(
                f"{fields.origin}: {key}={_short(value)} is not supported for "
                f"{family.architecture}{fix}"
            )
    if not source.get("is_causal", True):
        raise ValueError(
            f"{fields.origin}: is_causal=false is not supported: attention looks back only"
        )


def _short(value: object) -> str:
    """Format a value for a message, shortened: lists of modules can be long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _max_position(fields: Fields, body: Body) -> int:
    """Return the most positions: those of config.json, and those for which its rope is exact."""
    limits = [rope.limit for rope in _ropes(body.layers) if rope.limit is not None]
    return min([fields.integer("max_position_embeddings"), *limits])


def _ropes(layers: Sequence[LayerSpec]) -> list[RopeConfig]:
    found = [spec.mixer.rope for spec in layers if not isinstance(spec.mixer, GatedDelta)]
    return [rope for rope in found if rope is not None]


def _is_absent(fields: Fields, key: str) -> bool:
    return not fields.knows(key) or fields.is_null(key)


def _eos_ids(fields: Fields, generation: Mapping[str, Any], origin: str) -> tuple[int, ...]:
    """Collect all ends of text; chat models often name a second one in generation_config.json."""
    other = Fields(values=generation, origin=origin, defaults={"eos_token_id": None})
    ids = (*fields.ids("eos_token_id"), *other.ids("eos_token_id"))
    return tuple(dict.fromkeys(ids))
