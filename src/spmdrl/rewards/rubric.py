"""`Rubric`: a judge's questions as tokens, and what is read from its answers.

A question goes through the judge's own chat template as one user message. The texts in it are the
policy's: none of their letters become a special token, so that a response which spells an end of
turn can add no turn to the conversation.

One answer scores one response (G-Eval, Liu et al. 2023, https://arxiv.org/abs/2303.16634, takes the
mean of several). Which of two responses is better is asked in both orders, since judges favour a
position (Zheng et al. 2023, https://arxiv.org/abs/2306.05685, sections 3.3 and 3.4).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from spmdrl.config.judges import VERDICTS, JudgeSection, is_function, question_template
from spmdrl.config.user_objects import headline, load_object, misfit
from spmdrl.models.files.token_texts import TokenTexts
from spmdrl.rollout.protocol import SamplingParams

Encode = Callable[[str], Sequence[int]]
"""A question -> the tokens of the conversation, up to the beginning of the answer."""

_FIELD = re.compile(r"\{(prompt|response|response_a|response_b|answer)\}")

SHOWN = 200
"""Most characters of an answer that a reason shows: its end."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Reading of an answer.

    Args:
        value: the score, or the verdict: 1 for A, -1 for B, 0 for a tie. None: there is none.
        reason: why there is none.
    """

    value: float | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """A judge's questions and the reading of its answers.

    Args:
        role: the judge's name.
        section: its settings.
        score_text, pair_text: the templates.
        texts: texts of the judge's tokens.
        encode: makes tokens of a question.
        most: most tokens of a question.
        own_score, own_verdict: the user's functions that read answers; None: regular expressions.
    """

    role: str
    section: JudgeSection
    score_text: str
    pair_text: str
    texts: TokenTexts
    encode: Encode
    most: int
    own_score: Callable[[str], Any] | None = None
    own_verdict: Callable[[str], Any] | None = None

    def sampling(self) -> SamplingParams:
        """Options of the answers' sampling."""
        return SamplingParams(
            temperature=self.section.temperature, max_tokens=self.section.max_tokens
        )

    def score_question(self, prompt: str, response: str, answer: str | None) -> str:
        """Fill in the question for a response's score."""
        given = {"prompt": prompt, "response": response, "answer": answer or ""}
        return _filled(self.score_text, given)

    def pair_question(self, prompt: str, first: str, second: str, answer: str | None) -> str:
        """Fill in the question whether the first response (A) is better than the second (B)."""
        given = {"prompt": prompt, "response_a": first, "response_b": second}
        return _filled(self.pair_text, {**given, "answer": answer or ""})

    def score(self, answer: str) -> Reading:
        """Read an answer's score, from `min` to `max`, as it is written."""
        read = self._read(answer, self.section.parse, self.own_score)
        if isinstance(read, Reading):
            return read
        try:
            value = float(read)
        except (TypeError, ValueError):
            return Reading(value=None, reason=f"{read!r} is no number")
        low, high = self.section.min, self.section.max
        inside = (low is None or value >= low) and (high is None or value <= high)
        if not inside or value != value or abs(value) == float("inf"):
            return Reading(value=None, reason=f"{value:g} is not within min and max")
        return Reading(value=value)

    def verdict(self, answer: str) -> Reading:
        """Read an answer's verdict."""
        read = self._read(answer, self.section.pair_parse, self.own_verdict)
        if isinstance(read, Reading):
            return read
        value = VERDICTS.get(str(read).strip())
        if value is None:
            return Reading(value=None, reason=f"{read!r} is none of {', '.join(VERDICTS)}")
        return Reading(value=value)

    def scaled(self, score: float) -> float:
        """Map a score to the scale that the reward has."""
        low, high = self.section.min, self.section.max
        if self.section.scale == "none" or low is None or high is None:
            return score
        return (score - low) / (high - low)

    def identity(self) -> str:
        """Digest of all that decides a score, but for the model and user functions' code."""
        values = {**self.section.model_dump(mode="json"), "template": self.score_text}
        return blake2b(repr(sorted(values.items())).encode(), digest_size=8).hexdigest()

    def _read(self, answer: str, parse: str, own: Callable[[str], Any] | None) -> Any:
        """Find the text or value that `parse` reads, or a reading without one."""
        if own is None:
            found = re.findall(parse, answer)
            if found:
                return found[-1]
            return Reading(value=None, reason=f"no match in {_end_of(answer)!r}")
        try:
            value = own(answer)
        # The user's own code may raise anything; one answer that it cannot read is no reason to
        # end a run.
        except Exception as error:
            return Reading(value=None, reason=f"{parse}: {headline(error)}")
        if value is None:
            return Reading(value=None, reason=f"{parse} finds none in {_end_of(answer)!r}")
        return value


def make_rubric(
    role: str, section: JudgeSection, texts: TokenTexts, encode: Encode, most: int
) -> Rubric:
    """Make a judge's rubric.

    Args:
        most: most tokens of a question.

    Raises:
        ValueError: a template's file, or a function of the user's, cannot be read or used.
    """
    return Rubric(
        role=role,
        section=section,
        score_text=question_template(role, section, "template"),
        pair_text=question_template(role, section, "pair_template"),
        texts=texts,
        encode=encode,
        most=most,
        own_score=_function(role, "parse", section.parse),
        own_verdict=_function(role, "pair_parse", section.pair_parse),
    )


def prompt_text(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Write a prompt as a question shows it: its only user message, or every message by its role.

    Args:
        text: the last user message, or raw text.
        messages: the conversation; empty for raw text.
    """
    if len(messages) < 2:
        return text
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


def _function(role: str, key: str, parse: str) -> Callable[[str], Any] | None:
    if not is_function(parse):
        return None
    where = f"roles.{role}.judge.{key}"
    function: Callable[[str], Any] = load_object(parse, where)
    if not callable(function):
        raise ValueError(f"{where}={parse} is a {type(function).__name__}: name a function")
    if (lacking := misfit(function, ("answer",))) is not None:
        raise ValueError(f"{where}={parse} {lacking}")
    return function


def _filled(template: str, given: Mapping[str, str]) -> str:
    """Fill in all fields at once: texts that spell a field stay as they are."""
    return _FIELD.sub(lambda match: given.get(match[1], match[0]), template)


def _end_of(answer: str) -> str:
    return answer if len(answer) <= SHOWN else f"... {answer[-SHOWN:]}"
