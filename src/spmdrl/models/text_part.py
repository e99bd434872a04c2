"""The text model of a vision-language model's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spmdrl.models.fields import kind_of

TEXT = "text_config"

_SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "quantization_config")
"""Keys that the text model takes from the whole model where its own part lacks them."""

_TIED = "tie_word_embeddings"


def is_composite(source: Mapping[str, Any]) -> bool:
    """Whether config.json's keys describe a model that a text model is only a part of."""
    return source.get(TEXT) is not None


def text_part(source: Mapping[str, Any], origin: str = "config.json") -> Mapping[str, Any]:
    """Return the text model's keys of config.json, as if it were a model of its own.

    A text model's configuration is returned as it is. Of a composite one, it is `text_config`, with
    the architecture that transformers gives its `model_type` as a language model. Embeddings are
    tied if either level says so, as transformers' composite models take it.

    Raises:
        ValueError: `text_config` is no object, or names no language model.
    """
    if not is_composite(source):
        return source
    text = source[TEXT]
    if not isinstance(text, dict):
        raise ValueError(f"{origin}: {TEXT} must be an object, not {kind_of(text)}")
    if "model_type" not in text:
        raise ValueError(f"{origin}: {TEXT} has no model_type, so its architecture is unknown")
    # transformers takes seconds to import, and few models are composite
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    kind = text["model_type"]
    if not isinstance(kind, str) or kind not in NAMES:
        raise ValueError(
            f"{origin}: {TEXT}.model_type={kind!r} is no language model that transformers has on "
            "its own: only the text models of vision-language models that it has are read"
        )
    part = {key: source[key] for key in _SHARED if source.get(key) is not None}
    part |= {key: value for key, value in text.items() if key not in part or value is not None}
    if _TIED in source or _TIED in text:
        part[_TIED] = bool(source.get(_TIED)) or bool(text.get(_TIED))
    return {**part, "architectures": [NAMES[kind]]}
