"""The tensors of a model among those of its directory's files.

Of a vision-language model they are those of its text model, under a text model's names. Tensors
that training has no use for are left out by name, and quantised ones are read as floats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from spmdrl.models.files.quantised import dequantised, quantised_note
from spmdrl.models.files.stored_tensors import Entry, StoredTensor
from spmdrl.models.quantisation import parse_quantisation
from spmdrl.models.text_part import is_composite, text_part

_TEXT = (
    (re.compile(r"(?:model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"model\.language_model\.|language_model\.(?:model\.)?"), "model."),
)
"""Prefixes of a composite model's text model, and what they are in a text model."""

_PREDICTION = re.compile(r"(?:model\.)?mtp(?:_\w+)?\.")
_ROTARY = re.compile(r"rotary_emb\.(?:original_)?inv_freq$")
_OTHER_INPUT = re.compile(
    r"(?:model\.)?(?:visual|vision_\w+|vision|image_newline|audio_tower|embed_vision|embed_audio|"
    r"multi_modal_projector|mm_projector|mm_whisper_embeddings|aligner|connector)(?:\.|$)"
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")

NEXT_TOKENS = "num_nextn_predict_layers"
"""config.json's number of layers for multi-token prediction, which follow the model's own."""


def model_entries(
    stored: Mapping[str, StoredTensor], source: Mapping[str, Any], origin: str
) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """Return the model's tensors by name, and notes on what was left out and dequantised.

    Args:
        stored: tensors of the files, by their names there.
        source: config.json's keys, and `origin` the file.

    Raises:
        ValueError: two tensors stand for one, or quantised ones contradict config.json.
    """
    part = text_part(source, origin)
    composite = is_composite(source)
    named: dict[str, StoredTensor] = {}
    first: dict[str, str] = {}
    left: dict[str, list[str]] = {}
    for name, entry in stored.items():
        own = _text_name(name) if composite else name
        kind = _left_out(own, part, composite)
        if kind is not None:
            left.setdefault(kind, []).append(name)
        elif own in named:
            raise ValueError(f"{entry.file}: tensors {first[own]!r} and {name!r} are both {own!r}")
        else:
            named[own], first[own] = entry, name
    notes = [_left_note(origin, left)] if left else []
    format_ = parse_quantisation(part, origin)
    if format_ is None:
        return dict(named), tuple(notes)
    entries, quantised = dequantised(named, format_)
    if quantised:
        notes.append(f"{origin}: {quantised_note(quantised, format_)}")
    return entries, tuple(notes)


def _text_name(name: str) -> str:
    """Return the name in a text model of a composite model's tensor."""
    for prefix, own in _TEXT:
        found = prefix.match(name)
        if found is not None:
            return own + name[found.end() :]
    return name


def _left_out(name: str, part: Mapping[str, Any], composite: bool) -> str | None:
    """Return the kind of a tensor that is left out; None: it is the model's, or foreign."""
    if _ROTARY.search(name):
        return "rotary frequencies"
    if _PREDICTION.match(name) or _is_extra_layer(name, part):
        return "multi-token prediction"
    return "other inputs than text" if composite and _OTHER_INPUT.match(name) else None


def _is_extra_layer(name: str, part: Mapping[str, Any]) -> bool:
    layers, more = part.get("num_hidden_layers"), part.get(NEXT_TOKENS)
    found = _LAYER.match(name)
    if found is None or not isinstance(layers, int) or not isinstance(more, int):
        return False
    return layers <= int(found[1]) < layers + more


def _left_note(origin: str, left: Mapping[str, list[str]]) -> str:
    kinds = (
        f"{len(names)} of {kind} ({min(names)}{' ...' if len(names) > 1 else ''})"
        for kind, names in sorted(left.items())
    )
    return f"{origin}: tensors that are not loaded: {', '.join(kinds)}"
