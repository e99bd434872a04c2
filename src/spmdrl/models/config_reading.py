"""Values of a config.json as `transformers` has them after it has constructed its configuration
class: its defaults, and what it derives (`layer_types`, rope for each kind of layer).
"""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from spmdrl.models.config_cache import kept
from spmdrl.models.fields import Fields, kind_of
from spmdrl.models.rope import parse_rope, rope_parameters

MOST_LAYERS = 10_000

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_UNTOUCHED = (
    "architectures",
    "attn_implementation",
    "auto_map",
    "dtype",
    "experts_implementation",
    "id2label",
    "label2id",
    "model_type",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "problem_type",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "transformers_weights",
)
"""Keys that are kept as the file has them: the class would make objects of them, or load code."""

_IN_ROPE = ("rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor")
"""Older keys, which the class writes into `rope_parameters`."""

_WORDS = {
    "int": "a whole number",
    "float | int": "a number",
    "float": "a number with a decimal point",
    "bool": "true or false",
    "str": "a text",
    "list[int]": "a list of whole numbers",
    "list[str]": "a list of texts",
}
"""Kinds of values by the beginning of a field's annotation; the first that fits counts."""


def resolved(source: Mapping[str, Any], model_type: str, origin: str) -> Mapping[str, Any]:
    """Compute the values of a config.json as `transformers`' own class has them.

    Keys that the class does not know are kept, and a key with two names has both.

    Args:
        source: config.json as it was read, or its `text_config`.
        model_type: chooses the class.
        origin: the file, with which messages begin.

    Raises:
        ValueError: `transformers` has no class of this type, or that does not take a value.
    """
    return kept(model_type, source, lambda: _resolved(source, model_type, origin))


def _resolved(source: Mapping[str, Any], model_type: str, origin: str) -> Mapping[str, Any]:
    family = configuration_class(model_type, origin)
    _check_sizes(Fields(values=source, origin=origin))
    _check_names(source, family, origin)
    given = {key: value for key, value in source.items() if key not in _UNTOUCHED}
    try:
        with _quiet():
            config = family(**copy.deepcopy(given))
    except _errors() as error:
        raise _explained(error, source, family, origin) from error
    values = {key: _plain(value) for key, value in vars(config).items() if key[0] != "_"}
    values |= {alias: values[key] for alias, key in family.attribute_map.items() if key in values}
    return {**values, **{key: source[key] for key in _UNTOUCHED if key in source}}


def resolved_fields(source: Mapping[str, Any], model_type: str, origin: str) -> Fields:
    """Make `Fields` of `resolved`: what the file lacks is a default, and messages say so."""
    values = resolved(source, model_type, origin)
    gone = _IN_ROPE if values.get("rope_parameters") else ()
    named = {key: values.get(key, value) for key, value in source.items() if key not in gone}
    defaults = {key: value for key, value in values.items() if key not in gone}
    return Fields(values=named, origin=origin, defaults=defaults)


def text_source(source: Mapping[str, Any], origin: str) -> Mapping[str, Any]:
    """Return the text model's part of a config.json, with its `model_type`; `source` if it has no
    other part.

    Raises:
        ValueError: `text_config` is no object, or has no type.
    """
    if "text_config" not in source:
        return source
    section = Fields(values=source, origin=origin).section("text_config")
    if "model_type" in section:
        return section
    whole = configuration_class(model_type_of(source, origin), origin)
    if "text_config" not in whole.sub_configs:
        raise ValueError(f"{origin}: text_config.model_type is missing")
    return {**section, "model_type": whole.sub_configs["text_config"].model_type}


def model_type_of(source: Mapping[str, Any], origin: str) -> str:
    """Return `model_type`, or, if it is missing or unknown to `transformers` (Kimi-K2's), that of
    the only class with the `architectures`.

    Raises:
        ValueError: neither key says it.
    """
    if "model_type" in source:
        model_type = Fields(values=source, origin=origin).text("model_type")
        if _class(model_type) is not None or not source.get("architectures"):
            return model_type
    names = source.get("architectures") or [None]
    if not isinstance(names, list):
        raise ValueError(f"{origin}: architectures must be a list, not {kind_of(names)}")
    base = str(names[0]).replace("ForSequenceClassification", "ForCausalLM")
    types = [kind for kind, name in _causal_names().items() if name == base]
    if len(types) != 1:
        given = source.get("model_type")
        raise ValueError(
            f"{origin}: architectures={names[0]!r} with model_type={given!r} name no model that "
            "transformers has"
        )
    return types[0]


def causal_architecture(model_type: str, origin: str) -> str:
    """Return the name of `transformers`' language model of this type."""
    names = _causal_names()
    if model_type not in names:
        raise ValueError(f"{origin}: transformers has no language model of type {model_type!r}")
    return names[model_type]


def configuration_class(model_type: str, origin: str) -> Any:
    """Import `transformers`' configuration class: about 2 s for the first one in a process.

    Raises:
        ValueError: it has none of this type.
    """
    found = _class(model_type)
    if found is None:
        raise ValueError(
            f"{origin}: transformers has no configuration of model_type {model_type!r}: update "
            "transformers if the model is newer than it"
        )
    return found


def class_fields(model_type: Any) -> frozenset[str]:
    """Return the keys that the configuration class of a type has; none if there is no class."""
    found = _class(model_type) if isinstance(model_type, str) else None
    return frozenset() if found is None else frozenset(found.__dataclass_fields__)


@functools.lru_cache(maxsize=64)
def _class(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    return CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING_NAMES else None


def _causal_names() -> Mapping[str, str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    return {kind: name for kind, name in names if isinstance(name, str)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the library says of values: those that change the logits are refused here."""
    library = logging.getLogger("transformers")
    was = library.level
    library.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library.setLevel(was)


def _check_sizes(fields: Fields) -> None:
    """Check what the class would divide by, or make a list of, before it looks at it."""
    layers = "num_hidden_layers"
    if layers in fields:
        count = fields.integer(layers, most=MOST_LAYERS)
        kinds = fields.values.get("layer_types")
        is_list = isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)
        if kinds is not None and not (is_list and len(kinds) == count):
            raise fields.wrong("layer_types", f"a list with one text for each of {count} layers")
    for key in _SIZES:
        if key in fields and not (key in _OPTIONAL and fields.is_null(key)):
            fields.integer(key)


_OPTIONAL = ("num_key_value_heads", "head_dim")


def _check_names(source: Mapping[str, Any], family: Any, origin: str) -> None:
    for alias, key in family.attribute_map.items():
        if alias in source and key in source and source[alias] != source[key]:
            raise ValueError(
                f"{origin}: {key}={kind_of(source[key])} and {alias}={kind_of(source[alias])} "
                "contradict: they name one value"
            )


def _errors() -> tuple[type[Exception], ...]:
    """Collect what a class raises for values that it cannot compute with."""
    from huggingface_hub.errors import StrictDataclassError

    return (
        StrictDataclassError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
    )


def _explained(error: Exception, source: Mapping[str, Any], family: Any, origin: str) -> ValueError:
    """Make the error in this project's words, as far as it is about a type or about rope."""
    fields = Fields(values=source, origin=origin, defaults={"rope_theta": 10000.0})
    for key in source:
        name = family.attribute_map.get(key, key)
        if f"field '{name}'" in str(error):
            if key == "eos_token_id":
                fields.ids(key)  # raises the error in the words that all files share
            annotation = str(family.__dataclass_fields__[name].type).removeprefix("<class '")
            words = [text for kind, text in _WORDS.items() if annotation.startswith(kind)]
            if words:
                return fields.wrong(key, words[0])
    try:
        for given in rope_parameters(fields).values():
            if given is not None and not any(isinstance(v, dict) for v in given.values.values()):
                parse_rope(given, max_position=4096, head_dim=_head_dim(fields), partial=True)
    except ValueError as own:
        return own
    said = " ".join(str(error).split())
    return ValueError(f"{origin}: transformers refuses its values: {said}")


def _head_dim(fields: Fields) -> int:
    if fields.knows("head_dim") and not fields.is_null("head_dim"):
        return fields.integer("head_dim")
    if fields.knows("hidden_size") and fields.knows("num_attention_heads"):
        return max(fields.integer("hidden_size") // fields.integer("num_attention_heads"), 2)
    return 128


def _plain(value: Any) -> Any:
    """Turn configurations inside of others into objects of values."""
    from transformers.configuration_utils import PreTrainedConfig

    if isinstance(value, PreTrainedConfig):
        return {key: _plain(item) for key, item in vars(value).items() if key[0] != "_"}
    return value
