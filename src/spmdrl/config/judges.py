"""A judge's section: its questions, and what is read from its answers."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from spmdrl.config.algorithms import Section
from spmdrl.config.data import Place

SCORE_TEMPLATE = """\
Below are a request and a response to it. Judge how good the response is: whether it is right, does
what was asked, and is clear. Length alone is no merit.

[request]
{prompt}
[end of the request]

[response]
{response}
[end of the response]

Give your reasons in a few sentences. Then end with a whole number from 1 (useless) to 10 (could not
be better) in double brackets, like this: [[5]]
"""
"""The question for a score, without `template`."""

PAIR_TEMPLATE = """\
Below are a request and two responses to it. Judge which of them is better: which is right, does
what was asked, and is clear. Neither their order nor their length is a merit.

[request]
{prompt}
[end of the request]

[response A]
{response_a}
[end of response A]

[response B]
{response_b}
[end of response B]

Give your reasons in a few sentences. Then end with your verdict in double brackets: [[A]] if
response A is better, [[B]] if response B is better, [[C]] if neither is.
"""
"""The question for a verdict, without `pair_template`."""

VERDICTS = {"A": 1.0, "B": -1.0, "C": 0.0, "tie": 0.0}
"""Words that a verdict may be; positive where response A is better."""


class JudgeSection(Section):
    """Questions to a generative model, and the reading of its answers."""

    template: Place | None = Field(
        None,
        description="Ask for a score with this text, or that of this file: {response} and, where "
        "wanted, {prompt} and {answer} are filled in; null takes a rubric from 1 to 10.",
    )
    parse: Place = Field(
        r"\[\[\s*([-+]?\d+(?:\.\d+)?)\s*\]\]",
        description="Read the score with this regular expression (the group of its last match), or "
        "module:function from the answer's text to a number, or None.",
    )
    pair_template: Place | None = Field(
        None,
        description="Ask which of two responses is better with this text, or that of this file: "
        "{response_a}, {response_b} and, where wanted, {prompt} and {answer} are filled in; null "
        "takes a short text.",
    )
    pair_parse: Place = Field(
        r"\[\[\s*(A|B|C|tie)\s*\]\]",
        description="Read the verdict, A, B, C or tie, as parse reads a score.",
    )
    system: str | None = Field(None, description="Put this system message first; null has none.")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Pass these to the judge's chat template (enable_thinking: false, say).",
    )
    min: float | None = Field(
        1.0, description="Take scores below this for failed, any number; null has no bound."
    )
    max: float | None = Field(
        10.0, description="Take scores above this for failed, any number; null has no bound."
    )
    scale: Literal["none", "unit"] = Field(
        "none", description="Leave scores as they are, or map min to 0 and max to 1 (unit)."
    )
    failed: float = Field(
        0.0, description="Give this score, on no scale, where none is found, any number."
    )
    max_tokens: int = Field(
        512, ge=1, description="End an answer after this many tokens, at least 1."
    )
    temperature: float = Field(
        0.0, ge=0, le=1000, description="Draw answers at this temperature, 0 to 1000; 0 is greedy."
    )
    num_samples: int = Field(
        1,
        ge=1,
        description="Draw this many answers to each question, at least 1, and take their mean.",
    )
    max_prompt_tokens: int | None = Field(
        None,
        ge=1,
        description="Reserve room for questions of up to this many tokens, at least 1; longer "
        "ones count as failed. null takes the template's bytes and the most tokens of the texts "
        "in it.",
    )
    kv_cache_gb: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="Reserve this much KV cache per rank, in GB, any number above 0; auto takes "
        "what a step's questions need, as far as the memory plan has room.",
    )

    @field_validator("parse", "pair_parse")
    @classmethod
    def _reads_a_group(cls, value: str) -> str:
        if is_function(value):
            return value
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"it is no regular expression: {error}") from None
        if groups != 1:
            raise ValueError(
                "it must be a regular expression with one group, which is what is read, or "
                "module:function"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, names in FIELDS.items():
            given = getattr(self, key)
            if given is not None and is_text(given):
                _check_fields(key, given, names)
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"num_samples={self.num_samples} with temperature=0: all answers would be the "
                "same: raise temperature, or set num_samples to 1"
            )
        if self.min is not None and self.max is not None and self.min >= self.max:
            raise ValueError(f"min={self.min:g} with max={self.max:g}: raise max above min")
        if self.scale == "unit" and (self.min is None or self.max is None):
            raise ValueError("scale=unit without min and max: set both, or scale to none")
        return self


FIELDS: dict[str, tuple[str, ...]] = {
    "template": ("response",),
    "pair_template": ("response_a", "response_b"),
}
"""Key of a template -> the fields that it must have."""


def is_function(parse: str) -> bool:
    """Whether `parse` names a function: a regular expression has a group."""
    return "(" not in parse and ":" in parse


def is_text(template: str) -> bool:
    """Whether a template is the text itself, and no file's name."""
    return "{" in template


def question_template(role: str, section: JudgeSection, key: str) -> str:
    """Read a judge's template.

    Args:
        key: `template` or `pair_template`.

    Raises:
        ValueError: its file is missing, is no text, or lacks a field.
    """
    given: str | None = getattr(section, key)
    if given is None:
        return SCORE_TEMPLATE if key == "template" else PAIR_TEMPLATE
    if is_text(given):
        return given
    where = f"roles.{role}.judge.{key}"
    try:
        text = Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{where}={given} is no text with {{{FIELDS[key][0]}}}, and no file that can be read: "
            f"{error}"
        ) from None
    _check_fields(f"{where}={given}", text, FIELDS[key])
    return text


def _check_fields(what: str, text: str, names: Collection[str]) -> None:
    missing = [f"{{{name}}}" for name in names if f"{{{name}}}" not in text]
    if missing:
        raise ValueError(f"{what} has no {' and no '.join(missing)}: add it to the text")
