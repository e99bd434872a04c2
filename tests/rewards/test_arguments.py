"""How users' reward functions are called: by name, by position, or not at all."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest

from spmdrl.rewards.arguments import caller_of

COLUMNS = ("question", "tests", "answer", "completion", "response", "data_source")
ENTRY = {"question": "q", "tests": [1], "answer": "#### 5", "completion": "gold", "response": "old"}
CALL = ("the prompt", "the response", "5", ENTRY)
REST = {"question": "q", "tests": [1], "completion": "gold"}
GIVEN = dict(zip(("prompt", "response", "answer", "entry"), CALL, strict=True))


def function(parameters: str) -> Any:
    """A function that returns what it is given, by its own names."""
    names: dict[str, Any] = {}
    exec(f"def f({parameters}): return dict(locals())", names)
    return names["f"]


BY_NAME = {
    "response, answer, **kwargs": {
        "response": "the response",
        "answer": "5",
        "kwargs": {"prompt": "the prompt", "entry": ENTRY, **REST},
    },
    "prompt, response, answer, entry": GIVEN,
    "entry, answer, response, prompt": GIVEN,
    "response, tests, question": {"response": "the response", "tests": [1], "question": "q"},
    "*, answer, response": {"answer": "5", "response": "the response"},
    "**kwargs": {"kwargs": {**GIVEN, **REST}},
    "answer, response=None": {"answer": "5", "response": "the response"},
    "response, tests=(), scale=2": {"response": "the response", "tests": [1], "scale": 2},
    "response, data_source": {"response": "the response", "data_source": None},
    "response, data_source='here'": {"response": "the response", "data_source": "here"},
    "response, *rest, answer": {"response": "the response", "rest": (), "answer": "5"},
    "*rest, response, **kwargs": {
        "rest": (),
        "response": "the response",
        "kwargs": {"prompt": "the prompt", "answer": "5", "entry": ENTRY, **REST},
    },
}


@pytest.mark.parametrize("parameters", BY_NAME)
def test_arguments_go_by_name(parameters: str) -> None:
    caller = caller_of(function(parameters), {}, COLUMNS)
    assert caller(*CALL) == BY_NAME[parameters]
    assert caller.describe().startswith("by name")


TALK = [{"role": "user", "content": "the prompt"}, {"role": "assistant", "content": "yes"}]


def test_the_conversation_is_given_to_a_function_that_names_it() -> None:
    columns = (*COLUMNS, "messages")
    for parameters in ("messages", "response, messages", "*, messages=None"):
        caller = caller_of(function(parameters), {}, columns)
        assert caller.takes_messages and "messages" in caller.describe()
        assert caller(*CALL, TALK)["messages"] == TALK, "not the column"
    rest = caller_of(function("**kwargs"), {}, columns)
    call = (*CALL[:3], {"messages": "the column"})
    assert rest(*call, TALK)["kwargs"]["messages"] == "the column" and not rest.takes_messages
    both = caller_of(function("messages, **kwargs"), {}, columns)
    assert both(*call, TALK)["messages"] == TALK and "messages" not in both(*call)["kwargs"]


BY_POSITION = [
    "question_text, completion_text, solution, meta",
    "data_source, solution_str, ground_truth, extra_info=None",
    "prompt, completion, answer, state",  # completion is a column, and the response would be lost
    "a, b, c, d, scale=1.0",
    "a, b, /, c, d",
    "a, b, answer=None, entry=None",
    "a, *rest",
    "*rest",
    "*rest, **kwargs",
    "prompt, response, *rest",
]


@pytest.mark.parametrize("parameters", BY_POSITION)
def test_or_as_the_four_positional_ones(parameters: str) -> None:
    caller = caller_of(function(parameters), {}, COLUMNS)
    found = caller(*CALL)
    values = [v for n, v in found.items() if n not in ("rest", "kwargs", "scale")]
    assert (*values, *found.get("rest", ())) == CALL
    assert caller.describe().startswith("by position: prompt, response, answer, entry")
    is_named = "data_source" in parameters
    assert is_named == ("'data_source' is the prompt, no column" in caller.describe())


REFUSED = {
    "completions, **kwargs": "'completions' is neither.*column of the row.*here a call has one sam",
    "queries, prompts, labels": "'queries', 'prompts', 'labels' are neither",
    "solution_str, ground_truth": "'solution_str', 'ground_truth' are neither one of prompt",
    "solution_str, ground_truth, method='strict', score=1.0": "'ground_truth' are neither",
    "response, question_text, answer, meta": "'question_text', 'meta' are neither",
    "response, reference": r"it takes \(response, reference\), and 'reference' is neither",
    "response, answer, /": "those before `/` cannot be given by name",
    "a, b, c, d, e": "neither",
    "a, b, c, d, *, e": "neither",
    "prompt, answer": "no parameter of it is `response`",
    "": "no parameter of it is `response`",
}


@pytest.mark.parametrize("parameters", REFUSED)
def test_or_the_function_is_refused_in_one_line(parameters: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[parameters]) as refused:
        caller_of(function(parameters), {}, COLUMNS)
    assert "\n" not in str(refused.value) and "docs/rewards.md" in str(refused.value)


async def waits(response: str, **kwargs: Any) -> float:
    return 1.0


class Scores:
    def __init__(self, response: str = "") -> None: ...

    def __call__(self, response: str, answer: str) -> tuple[str, str]:
        return response, answer


def test_objects_serve_and_classes_and_coroutines_do_not() -> None:
    assert caller_of(Scores(), {}, COLUMNS)(*CALL) == ("the response", "5")
    bound = functools.partial(function("scale, response, answer"), 2.0)
    assert caller_of(bound, {}, COLUMNS)(*CALL) == {
        "scale": 2.0,
        "response": "the response",
        "answer": "5",
    }
    with pytest.raises(ValueError, match="it is a class: name a function"):
        caller_of(Scores, {}, COLUMNS)
    for asynchronous in (waits, functools.partial(waits)):
        with pytest.raises(ValueError, match=r"it is `async`.*write `def`"):
            caller_of(asynchronous, {}, COLUMNS)


def test_a_decorated_function_is_called_as_what_it_wraps() -> None:
    def doubled(inner: Any) -> Any:
        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            return 2 * inner(*args, **kwargs)

        return outer

    @doubled
    def length(response: str, answer: str) -> float:
        return float(len(response) - len(answer))

    assert caller_of(length, {}, COLUMNS)(*CALL) == 22.0


def test_options_win_over_columns_and_are_known_to_the_function() -> None:
    found = caller_of(function("response, tests, scale"), {"scale": 3, "tests": 0}, COLUMNS)
    assert found(*CALL) == {"response": "the response", "tests": 0, "scale": 3}
    rest = caller_of(function("response, **kwargs"), {"tests": 0}, COLUMNS)
    assert rest(*CALL)["kwargs"]["tests"] == 0
    four = caller_of(function("a, b, c, d, scale=1.0"), {"scale": 2.0}, COLUMNS)
    assert four(*CALL)["scale"] == 2.0
    for options, message in (
        ({"size": 1}, "its options have 'size', and its parameters are ['response', 'scale']"),
        ({"response": ""}, "its options have 'response', which every call is given"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            caller_of(function("response, scale=1"), options, COLUMNS)


def test_any_name_may_be_a_column_where_columns_are_not_known() -> None:
    caller = caller_of(function("response, tests, other"), {}, None)
    assert caller(*CALL) == {"response": "the response", "tests": [1], "other": None}
