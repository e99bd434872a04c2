"""`LoraFile`: the content of PEFT's adapter_config.json, each key used, known or refused.

The keys are those that the versions of PEFT up to 0.21 write for LoRA (`peft.LoraConfig`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmdrl.models.fields import Fields, kind_of, read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"

ALL_LINEAR = "all-linear"
"""PEFT's word for all linear modules but the head."""

HEAD_MODULES = ("score", "classifier")
"""The modules that PEFT saves whole with an adapter of a sequence-classification model."""

_USED = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "init_lora_weights",
)

OF_NO_EFFECT: Mapping[str, str] = {
    "auto_mapping": "names the class of the base",
    "eva_config": "says how A was first drawn (init_lora_weights: eva)",
    "inference_mode": "says whether the adapter was being trained",
    "megatron_core": "names a package, which counts only with megatron_config",
    "merge_weights": "says when PEFT 0.2 merged",
    "peft_version": "names the version that wrote the file",
    "qalora_group_size": "counts only with use_qalora",
    "revision": "names a version of the base",
    "runtime_config": "says where PEFT computes",
}
"""Keys that only say how the file came about, or count only with others: any value is accepted."""

_BASE = "base_model_name_or_path"
_MERGE = "merge it into its base with PEFT (merge_and_unload) and give the merged model"
_PLAIN = "train a plain adapter"

_REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": f"the adapter is active after these tokens only: {_PLAIN}",
    "arrow_config": f"several adapters are routed between: {_PLAIN}",
    "corda_config": "its start changed the base: see init_lora_weights",
    "enable_lora": "parts of fused projections are adapted, which this model does not have",
    "ensure_weight_tying": "no embedding is adapted here, so it has no effect: set it to false",
    "fan_in_fan_out": "it is for layers with transposed weights, which this model does not have: "
    "set it to false, as PEFT does for such a model",
    "kasa_config": f"it changes the base and adds singular values: {_PLAIN}",
    "layer_replication": f"it repeats layers of the base: {_PLAIN}",
    "loftq_config": "its start changed the base: see init_lora_weights",
    "lora_bias": f"B has a bias: {_MERGE}, or train with lora_bias: false",
    "lora_ga_config": "its start changed the base: see init_lora_weights",
    "megatron_config": f"it is for modules of Megatron: {_PLAIN} on the Hugging Face model",
    "monteclora_config": f"it adds random samples to the matrices: {_PLAIN}",
    "trainable_token_indices": f"rows of the embedding are trained: {_MERGE}",
    "use_bdlora": f"the matrices are block-diagonal: {_PLAIN}",
    "use_dora": f"DoRA also trains the outputs' magnitudes: {_MERGE}",
    "use_qalora": f"inputs are pooled before A: {_PLAIN}",
    "velora_config": "the gradient of A is approximated, which is not done here: set it to null to "
    "train the adapter further with exact gradients",
}
"""Keys that must have no value, with the reason and the fix."""

_PLAIN_INITS = ("gaussian", "eva", "orthogonal")
_BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")


_END = r"(.*\.)?({})$"
"""PEFT's expression for modules whose names end like a pattern."""

_IN_LIST = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
"""PEFT's expression for modules in a list of layers, and their index there."""


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """The adapter that adapter_config.json describes, before it meets a model.

    Args:
        origin: the file, with which messages begin.
        base: name of the model that it was trained on, or None.
        targets, excluded: names of modules, of which the last parts are enough, or a pattern that
            matches whole names; targets may be `ALL_LINEAR`.
        parameters: names of stacked experts, of which the last parts are enough.
        layers: the only layers that have it; None: all.
        layer_lists: names of the lists that `layers` counts in; empty: any.
        ranks, alphas: patterns over the ends of modules' names -> a rank or alpha of their own; the
            first that matches counts.
        saved: modules that are saved whole with it.
        has_head: whether a scalar head belongs to it.
    """

    origin: str
    base: str | None
    rank: int
    alpha: float
    rslora: bool
    dropout: float
    targets: tuple[str, ...] | str
    parameters: tuple[str, ...]
    excluded: tuple[str, ...] | str
    layers: tuple[int, ...] | None
    layer_lists: tuple[str, ...]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    saved: tuple[str, ...]
    has_head: bool

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's adapter."""
        return next((n for key, n in self.ranks.items() if _ends_like(key, module)), self.rank)

    def alpha_of(self, module: str) -> float:
        """Return the alpha of a module's adapter."""
        return next((a for key, a in self.alphas.items() if _ends_like(key, module)), self.alpha)

    def selects(self, module: str, *, is_linear: bool = True) -> bool:
        """Whether PEFT would add the adapter to a module.

        Args:
            is_linear: whether `ALL_LINEAR` stands for it too.
        """
        if _listed(self.excluded, module) or any(_is_within(module, own) for own in self.saved):
            return False
        if isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR:
            return is_linear
        return _listed(self.targets, module) and (module in self.targets or self._has_layer(module))

    def selects_parameter(self, name: str) -> bool:
        """Whether PEFT would add the adapter to a stacked parameter."""
        return _listed(self.parameters, name)

    def _has_layer(self, module: str) -> bool:
        """Whether a module that the end of its name selects is of one of `layers`."""
        if self.layers is None or isinstance(self.targets, str):
            return True
        patterns = [_IN_LIST.format(own) for own in self.layer_lists]
        for pattern in patterns or [_IN_LIST.format("[^.]*")]:
            if (found := re.match(pattern, module)) is not None:
                return int(found["idx"]) in self.layers
        return False

    def unused(
        self, modules: Sequence[str], parameters: Sequence[str]
    ) -> Iterator[tuple[str, str]]:
        """Yield each field with an entry that names none of the modules, or of what it selects.

        Args:
            parameters: the stacked parameters that it selects.
        """
        for name in self.parameters:
            if not any(_listed((name,), parameter) for parameter in parameters):
                yield "target_parameters", name
        for key, names in (("target_modules", self.targets), ("exclude_modules", self.excluded)):
            entries = [(names, names)] if isinstance(names, str) else [(n, (n,)) for n in names]
            for entry, own in entries:
                is_used = entry.lower() in ("", ALL_LINEAR)
                if not is_used and not any(_listed(own, module) for module in modules):
                    yield key, entry
        targets = [*filter(self.selects, modules), *parameters]
        for key, patterns in (("rank_pattern", self.ranks), ("alpha_pattern", self.alphas)):
            for pattern in patterns:
                if not any(_ends_like(pattern, module) for module in targets):
                    yield key, pattern


def _listed(names: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def _is_within(module: str, own: str) -> bool:
    return re.match(rf"(^|.*\.){own}($|\..*)", module) is not None


def _ends_like(pattern: str, module: str) -> bool:
    return re.match(_END.format(pattern), module) is not None


def read_lora_file(path: str | Path) -> LoraFile:
    """Read adapter_config.json of a PEFT directory.

    Raises:
        ValueError: there is none, or a key has a value that has no meaning here; the message names
            file, key and fix.
        OSError: the file cannot be read.
    """
    file = _config_file(Path(path))
    values = read_json(file)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type is {kind_of(kind)}: only LORA adapters are read")
    for key, value in values.items():
        _refuse(file, key, value)
    fields = Fields(values=values, origin=str(file), defaults=_DEFAULTS)
    _check_init(fields)
    layers = _layers(fields)
    layer_lists = _patterns(fields, "layers_pattern")
    if layer_lists and layers is None:
        raise ValueError(f"{file}: layers_pattern needs layers_to_transform, or remove it")
    targets = _modules(fields, "target_modules")
    parameters = _texts(fields, "target_parameters")
    if not targets and not parameters:
        raise ValueError(f"{file}: target_modules is empty: name the modules that the file adds to")
    if isinstance(targets, str) and layers is not None:
        raise ValueError(
            f"{file}: layers_to_transform counts only if target_modules is a list: put the layers "
            "into the pattern"
        )
    saved = _saved_modules(fields)
    ranks, alphas = _by_pattern(fields, "rank_pattern"), _by_pattern(fields, "alpha_pattern")
    return LoraFile(
        origin=str(file),
        base=None if fields.is_null(_BASE) else fields.text(_BASE),
        rank=fields.integer("r"),
        alpha=fields.number("lora_alpha", above=0),
        rslora=fields.flag("use_rslora"),
        dropout=_dropout(fields),
        targets=targets,
        parameters=parameters,
        excluded=_modules(fields, "exclude_modules"),
        layers=layers,
        layer_lists=layer_lists,
        ranks={key: own.integer(key) for key, own in ranks},
        alphas={key: own.number(key, above=0) for key, own in alphas},
        saved=saved,
        has_head="score" in saved or values.get("task_type") == "SEQ_CLS",
    )


_DEFAULTS: Mapping[str, Any] = {
    "base_model_name_or_path": None,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "target_parameters": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": None,
    "alpha_pattern": None,
    "modules_to_save": None,
    "init_lora_weights": True,
    "eva_config": None,
}
"""PEFT's values of keys that older versions do not write."""


def _config_file(path: Path) -> Path:
    file = path / ADAPTER_CONFIG
    if file.is_file():
        return file
    within = sorted(str(other.parent) for other in path.glob(f"*/{ADAPTER_CONFIG}"))
    if within:
        raise ValueError(f"{file} does not exist: give the directory {' or '.join(within)}")
    raise ValueError(f"{file} does not exist: give the directory of a PEFT adapter")


def _refuse(file: Path, key: str, value: Any) -> None:
    """Raise ValueError if a key's value would have an effect that it does not have here."""
    if key in _USED or key in OF_NO_EFFECT:
        return
    if key == "bias":
        if value != "none":
            raise ValueError(
                f"{file}: bias is {kind_of(value)}, and trained biases are not read: {_MERGE}, or "
                "set it to none if the base has no bias"
            )
        return
    if value is None or value is False or value in ("", [], {}):
        return
    if key not in _REFUSED:
        raise ValueError(
            f"{file}: the key {key!r} ({kind_of(value)}) is of no PEFT known here (up to 0.21): "
            "remove it if the adapter is plain LoRA"
        )
    raise ValueError(f"{file}: {key} is {kind_of(value)}: {_REFUSED[key]}")


def _check_init(fields: Fields) -> None:
    value = fields.value("init_lora_weights")
    text = value.lower() if isinstance(value, str) else value
    if fields.value("eva_config") is not None and text != "eva":
        raise ValueError(
            f"{fields.origin}: eva_config counts only if init_lora_weights is eva: remove it"
        )
    if isinstance(text, bool) or (isinstance(text, str) and text in _PLAIN_INITS):
        return
    given = f"{fields.origin}: init_lora_weights is {kind_of(value)}"
    if isinstance(text, str) and text.startswith(_BASE_CHANGED):
        raise ValueError(
            f"{given}, which changed the base, so that the file is no adapter of the unchanged "
            "model: save it with path_initial_model_for_weight_conversion, which makes it one"
        )
    if text == "mica":
        raise ValueError(
            f"{given}, which trains A only: set it to true to train A and B from these values"
        )
    raise ValueError(f"{given}: it must be one of true, false, gaussian, eva, orthogonal")


def _dropout(fields: Fields) -> float:
    value = fields.number("lora_dropout", least=0)
    if value >= 1:
        raise fields.wrong("lora_dropout", "below 1")
    return value


def _layers(fields: Fields) -> tuple[int, ...] | None:
    value = fields.value("layers_to_transform")
    if value is None or value == []:
        return None
    if type(value) is int:
        return (value,)
    return fields.integers("layers_to_transform")


def _texts(fields: Fields, key: str) -> tuple[str, ...]:
    value = fields.value(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise fields.wrong(key, "a list of names")
    return tuple(value)


def _modules(fields: Fields, key: str) -> tuple[str, ...] | str:
    value = fields.value(key)
    if not isinstance(value, str):
        return _texts(fields, key)
    _check_pattern(fields, key, value, "{}")
    return value


def _patterns(fields: Fields, key: str) -> tuple[str, ...]:
    value = fields.value(key)
    if isinstance(value, str):
        found: tuple[str, ...] = (value,) if value else ()
    else:
        found = _texts(fields, key)
    for pattern in found:
        _check_pattern(fields, key, pattern, _IN_LIST)
    return found


def _saved_modules(fields: Fields) -> tuple[str, ...]:
    saved = _texts(fields, "modules_to_save")
    other = [name for name in saved if name not in HEAD_MODULES]
    if other:
        raise ValueError(
            f"{fields.origin}: modules_to_save has {other[0]!r}, and only a scalar head (score) is "
            f"read with an adapter: {_MERGE}"
        )
    return saved


def _by_pattern(fields: Fields, key: str) -> Iterator[tuple[str, Fields]]:
    """Yield each pattern with the fields that hold its value."""
    values = fields.section(key)
    for pattern in values:
        _check_pattern(fields, key, pattern, _END)
        yield pattern, Fields(values=values, origin=f"{fields.origin}: {key}")


def _check_pattern(fields: Fields, key: str, pattern: str, within: str) -> None:
    try:
        re.compile(within.format(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{fields.origin}: {key} has {pattern!r}, which is no regular expression: {error}"
        ) from None
