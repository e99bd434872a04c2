"""Reward functions: the built-in ones, and the loader of a user's own.

A reward function is `fn(prompt, response, answer, entry)`; it returns a float, or a dict of named
floats that contains `score`. A user's function may take fewer arguments, or columns of the row
(`rewards.arguments`). Functions run in worker processes (`rewards.pool`), so nothing heavy is
imported at module level, least of all torch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from spmdrl.config.user_objects import load_object
from spmdrl.rewards.arguments import caller_of
from spmdrl.rewards.code import code
from spmdrl.rewards.expressions import make_comparison
from spmdrl.rewards.texts import last_numeral, last_value, plain_words

RewardFunction = Callable[[str, str, str | None, Mapping[str, Any]], float | Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class RewardSpec:
    """One component of the reward.

    Args:
        name: name of its column.
        function: name of a built-in, `module:function`, or `path/to/file.py:function`.
        weight: its factor in the weighted sum.
        options: options of a built-in, or keyword arguments of a user's function.
    """

    name: str
    function: str
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


def load(spec: RewardSpec, columns: Collection[str] | None = None) -> RewardFunction:
    """Load the function that a component names; a user's function becomes a `Caller`.

    Args:
        columns: columns of the rows that it scores; None: unknown.

    Raises:
        ValueError: no such built-in, module, file or function, a parameter that it does not take,
            a function that cannot be called with the arguments that exist, or an error while the
            user's module was imported (then chained).
    """
    where = f"reward {spec.name!r} ({spec.function})"
    if spec.function in BUILT_IN:
        try:
            return BUILT_IN[spec.function](**spec.options)
        except (TypeError, ValueError, ImportError, re.error) as error:
            raise ValueError(f"{where}: {error}") from error
    if not all(spec.function.rpartition(":")):
        raise ValueError(
            f"reward {spec.name!r}: {spec.function!r} is neither built in ({sorted(BUILT_IN)}) nor "
            "'module:function' nor 'path/to/file.py:function'"
        )
    function = load_object(spec.function, f"reward {spec.name!r}: function")
    if not callable(function):
        raise ValueError(f"{where} is a {type(function).__name__}: name a function")
    try:
        return caller_of(function, spec.options, columns)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def needed_modules(spec: RewardSpec) -> tuple[str, ...]:
    """Modules of a built-in that are slow to import, so they are imported before workers fork."""
    return {"math": ("math_verify",), "reasoning_gym": ("reasoning_gym",)}.get(spec.function, ())


def _reference(answer: str | None) -> str:
    if answer is None:
        raise ValueError("the row has no answer to compare with (data.answer_column)")
    return answer


def number() -> RewardFunction:
    """Score 1 if the last number in the response equals the last number in the answer.

    A fraction (`1/2`) is one number; a time, ratio or power (`10:30`, `2^10`) is compared as a
    whole; exponents and indices do not count.
    """

    def score(prompt: str, response: str, answer: str | None, entry: Mapping[str, Any]) -> float:
        wanted = last_value(_reference(answer))
        if wanted is None:
            raise ValueError(f"the answer {answer!r} holds no number")
        return float(last_value(response) == wanted)

    return score


def exact(*, ignore_case: bool = True, ignore_punctuation: bool = True) -> RewardFunction:
    """Score 1 if the response equals the answer after normalising white space.

    Args:
        ignore_case: capitals and small letters are equal.
        ignore_punctuation: ignore marks that end a sentence, enclose words or mark emphasis, and
            commas between thousands; signs, points, slashes and the like within words or before
            digits are compared.
    """
    normal = functools.partial(
        plain_words, ignore_case=ignore_case, ignore_punctuation=ignore_punctuation
    )

    def score(prompt: str, response: str, answer: str | None, entry: Mapping[str, Any]) -> float:
        return float(normal(response) == normal(_reference(answer)))

    return score


def format_(*, pattern: str, whole: bool = False) -> RewardFunction:
    """Score 1 if `pattern` is found in the response.

    Args:
        pattern: a regular expression; `.` also matches line ends.
        whole: it must match the whole response, except surrounding white space.
    """
    compiled = re.compile(pattern, re.DOTALL)

    def score(prompt: str, response: str, answer: str | None, entry: Mapping[str, Any]) -> float:
        match = compiled.fullmatch(response.strip()) if whole else compiled.search(response)
        return float(match is not None)

    return score


def math() -> RewardFunction:
    """Score 1 if math-verify finds the response's final expression equal to the answer.

    Words are compared as words, and a unit after a number may be omitted (`rewards.expressions`).
    """
    equal = make_comparison()

    def score(prompt: str, response: str, answer: str | None, entry: Mapping[str, Any]) -> float:
        return float(equal(_reference(answer), response))

    return score


def reasoning_gym(*, extract: str = "tag", binary: bool = False) -> RewardFunction:
    """Score by `score_answer` of the task that made the prompt, in [0, 1].

    Args:
        extract: text that the task gets: `tag` (the last `<answer>…</answer>`, or else the whole
            response), `number` (the last number), `whole` (the response, stripped).
        binary: 1 for a full score, otherwise 0. Several tasks give partial credit for a response
            that contains the right answer ("14" for "4" gets 0.5).
    """
    from reasoning_gym import create_dataset
    from reasoning_gym.utils import extract_answer

    if extract not in ("tag", "number", "whole"):
        raise ValueError(f"extract={extract!r}: it must be tag, number or whole")
    scorers: dict[str, Any] = {}  # one task object per task and parameters

    def candidate(response: str) -> str:
        if extract == "number":
            return last_numeral(response)
        tagged = extract_answer(response) if extract == "tag" else None
        return response.strip() if tagged is None else str(tagged)

    def score(prompt: str, response: str, answer: str | None, entry: Mapping[str, Any]) -> float:
        if "reasoning_gym" not in entry:
            raise ValueError("the reasoning_gym reward needs prompts of a reasoning_gym source")
        task = entry["reasoning_gym"]
        key = repr(task)
        if key not in scorers:
            scorers[key] = create_dataset(task["task"], size=1, seed=0, **task["parameters"])
        value = float(scorers[key].score_answer(candidate(response), dict(entry)))
        return float(value >= 1.0) if binary else value

    return score


BUILT_IN: Mapping[str, Callable[..., RewardFunction]] = MappingProxyType(
    {
        "code": code,
        "exact": exact,
        "format": format_,
        "math": math,
        "number": number,
        "reasoning_gym": reasoning_gym,
    }
)
