"""The class names in config.json's `architectures`: the family, and how a class reads its score.

A class is named after its family and its head: LlamaForCausalLM, LlamaForSequenceClassification.
Reward models of the hub have classes of their own (Qwen2ForRewardModel, EurusRewardModel), whose
family is `model_type`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CAUSAL = "ForCausalLM"
CLASSIFICATION = "ForSequenceClassification"
TOKEN_CLASSIFICATION = "ForTokenClassification"

_SCALAR = re.compile(
    r"(?P<family>\w*?)(ForSequenceClassification|ForTokenClassification|(For)?RewardModel|"
    r"(For)?ValueModel|ForScore|ModelForScore|ForSequenceRegression|ForCausalLMWithValueHead|"
    r"CriticModel)"
)
"""Names of classes whose head is one scalar, or may be."""


def class_name(source: Mapping[str, Any]) -> str:
    """Return the first of `architectures`, or an empty text."""
    names = source.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def is_scalar_class(name: str) -> bool:
    """Whether a class of this name has a head that classifies or scores."""
    return _SCALAR.fullmatch(name) is not None


def is_labelled(name: str) -> bool:
    """Whether it is one of `transformers`' own classes, whose head has a row for each label."""
    return name.endswith((CLASSIFICATION, TOKEN_CLASSIFICATION))


def causal_name(name: str, model_type: Any, known: Mapping[str, str]) -> str:
    """Return the name of the language model's class of the same family.

    Args:
        name: a class's name.
        model_type: config.json's `model_type`.
        known: `model_type` of each language model's class.
    """
    found = _SCALAR.fullmatch(name)
    if found is None:
        return name
    same = f"{found['family']}{CAUSAL}"
    if same in known and (is_labelled(name) or known[same] == model_type):
        return same
    return next((own for own, given in known.items() if given == model_type), same)


def skipped_token(source: Mapping[str, Any], pad_id: int | None) -> int | None:
    """Return the token that the class passes over at a row's end, to read its score before it.

    `transformers` reads sequence classification at the last token that is not `pad_token_id`
    (GenericForSequenceClassification), on whichever side rows are padded; if the end of text is the
    padding too, that is the token before it. Classes of others read the last token that the
    attention mask covers, whatever it is.
    """
    return pad_id if class_name(source).endswith(CLASSIFICATION) else None


def read_place(source: Mapping[str, Any], pad_id: int | None) -> str:
    """Say at which token of a row the class reads its score, and why."""
    name = class_name(source) or "no class named"
    if skipped_token(source, pad_id) is not None:
        return f"the last token that is not pad_token_id {pad_id}, as {name} does"
    why = "which has no pad_token_id" if name.endswith(CLASSIFICATION) else "as is usual"
    return f"the last token, end of text included ({name}, {why})"
