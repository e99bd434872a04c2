"""`tools`: an environment of a list of Python functions, which the model calls.

A turn's calls are read (`turns.tool_calls`) and run in their order, and what they return is the
next message of the role `tool`. A turn without a call is the answer: it ends the sample. Nothing
that a model writes is an error of the run: it is told what was wrong, and may try again.
"""

from __future__ import annotations

import inspect
import json
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from spmdrl.config.user_objects import headline, load_object, make_object
from spmdrl.turns.environment import Message, Observation
from spmdrl.turns.schemas import schema_of
from spmdrl.turns.tool_calls import PARSERS, Parser, ToolCall, ToolCalls

SHIPPED: Mapping[str, str] = MappingProxyType(
    {
        "calculator": "spmdrl.turns.shipped_tools:calculator",
        "python": "spmdrl.turns.shipped_tools:python",
    }
)
"""Name of a shipped tool -> its place."""

MAKERS = frozenset({"python"})
"""Shipped tools that are made with options, none of them needed."""

_KEY = "rollout.turns.options"


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may call.

    Args:
        arguments: the model of its arguments, which checks them.
        names: field of `arguments` -> name of the parameter.
    """

    name: str
    function: Callable[..., Any]
    arguments: type[BaseModel]
    names: Mapping[str, str]

    def run(self, given: Mapping[str, Any]) -> Any:
        """Call the function; what a JSON text gives for a parameter is made its type.

        Raises:
            ValidationError: the arguments do not fit.
            Exception: whatever the function raises.
        """
        checked = self.arguments.model_validate(dict(given))
        values = {self.names[field]: getattr(checked, field) for field in checked.model_fields_set}
        return self.function(**values)


class ToolEnvironment:
    """Environment of a list of functions (Yao et al. 2023, arXiv:2210.03629, without its format).

    Args:
        functions: places of functions with type hints and docstrings (`module:function`,
            `path/to/file.py:function`), or names of shipped ones (`calculator`, `python`). A
            mapping of one place to options is called with them and returns the function.
        format: how the model writes calls: `hermes`, `llama3`, `mistral`, `harmony`, or a parser of
            one's own as `module:function`. `auto`, the chat template's, is replaced before.
        max_result_chars: letters of a result that the model is shown.
        invalid_call_reward: reward of each call that did not run to its end, usually below 0: it
            tells samples apart that all end with a wrong answer.

    Raises:
        ValueError: a function or parser cannot be loaded, or has parameters that no call can give.
    """

    special_tokens = True

    def __init__(
        self,
        functions: Sequence[str | Mapping[str, Any]],
        format: str = "auto",
        max_result_chars: int = 4000,
        invalid_call_reward: float = 0.0,
    ) -> None:
        if max_result_chars < 1:
            raise ValueError(f"{_KEY}.max_result_chars={max_result_chars}: it must be at least 1")
        if not math.isfinite(invalid_call_reward):
            raise ValueError(f"{_KEY}.invalid_call_reward={invalid_call_reward}: it must be finite")
        self._parse = parser_of(format)
        self._tools = tools_of(functions)
        self._max_chars = max_result_chars
        self._invalid_reward = float(invalid_call_reward)
        self._calls = 0

    def start(self, row: Mapping[str, Any]) -> Sequence[Message]:
        """Return the messages of the row's prompt."""
        return list(row["messages"])

    def tools(self) -> list[Mapping[str, Any]]:
        """Return the schemas of the functions, for the chat template."""
        return [schema_of(tool.function) for tool in self._tools.values()]

    def step(self, response: str) -> Observation:
        """Run the calls of a turn, or end the sample if it has none."""
        found = self._parse(response)
        if found.problem is not None:
            message = self._message("", f"error: {found.problem}")
            return self._observation([message], 1, 0)
        if not found.calls:
            return Observation(done=True, metrics={"tool_calls": 0, "valid_calls": 0})
        results = [self._run(call) for call in found.calls]
        messages = [
            self._message(call.name, text)
            for call, (text, _) in zip(found.calls, results, strict=True)
        ]
        valid = sum(is_valid for _, is_valid in results)
        return self._observation(messages, len(results), valid)

    def save(self) -> bytes:
        """Return the number of calls so far: the functions keep nothing."""
        return str(self._calls).encode()

    def load(self, state: bytes) -> None:
        """Take what `save` returned."""
        self._calls = int(state)

    def _observation(self, messages: Sequence[Message], num: int, valid: int) -> Observation:
        counts = {"tool_calls": num, "valid_calls": valid}
        reward = self._invalid_reward * (num - valid)
        return Observation(messages=messages, reward=reward, metrics=counts)

    def _run(self, call: ToolCall) -> tuple[str, bool]:
        """Return what the model is told of a call, and whether it was valid: it ran to its end."""
        tool = self._tools.get(call.name)
        if tool is None:
            return f"error: no tool {call.name!r}: there is {', '.join(self._tools)}", False
        try:
            result = tool.run(call.arguments)
        except ValidationError as error:
            return f"error: {_problems(error)}", False
        # A tool is a user's code and may raise or exit as it likes: the model is told of it.
        except (Exception, SystemExit) as error:
            return self._shown(f"error: {headline(error)}"), False
        return self._shown(_text(result)), True

    def _shown(self, text: str) -> str:
        left = len(text) - self._max_chars
        return text if left <= 0 else f"{text[: self._max_chars]} ... ({left} characters more)"

    def _message(self, name: str, text: str) -> Message:
        """Make a tool message, with the nine letters that Mistral's template wants of an id."""
        self._calls += 1
        number = f"call{self._calls:05d}"
        return {"role": "tool", "name": name, "tool_call_id": number, "content": text}


def parser_of(format: str) -> Parser:
    """Return the parser that a format names.

    Raises:
        ValueError: there is no such format or function.
    """
    if format in PARSERS:
        return PARSERS[format]
    if ":" not in format:
        raise ValueError(
            f"{_KEY}.format={format}: it must be {', '.join(PARSERS)}, or module:function"
        )
    own = load_object(format, f"{_KEY}.format")

    def parse(text: str) -> ToolCalls:
        found = own(text)
        if not isinstance(found, ToolCalls):
            raise TypeError(f"{format} returned a {type(found).__name__}, no ToolCalls")
        return found

    return parse


def tools_of(functions: Sequence[str | Mapping[str, Any]]) -> Mapping[str, Tool]:
    """Load functions; name -> tool.

    Raises:
        ValueError: there is none, one cannot be loaded, or two have one name.
    """
    key, found = f"{_KEY}.functions", dict[str, Tool]()
    if isinstance(functions, str) or not functions:
        raise ValueError(f"{key}={functions!r}: it must be a list of functions, at least one")
    for given in functions:
        tool = _tool(_loaded(given, key), key)
        if tool.name in found:
            raise ValueError(f"{key}: two functions are named {tool.name!r}")
        found[tool.name] = tool
    return found


def _loaded(given: str | Mapping[str, Any], key: str) -> Any:
    if isinstance(given, str):
        place = SHIPPED.get(given, given)
        return make_object(place, {}, key, key) if given in MAKERS else load_object(place, key)
    if len(given) != 1:
        raise ValueError(f"{key}: {dict(given)} must name one function, with its options")
    ((name, options),) = given.items()
    return make_object(SHIPPED.get(name, name), options or {}, key, f"options of {name}")


def _tool(function: Any, key: str) -> Tool:
    """Make a tool of a function, with a model of its parameters.

    Raises:
        ValueError: it is no function with a name, or has parameters that no call can name.
    """
    name = getattr(function, "__name__", None)
    if not callable(function) or not isinstance(name, str):
        raise ValueError(f"{key}: {function!r} is no function")
    fields: dict[str, Any] = {}
    names: dict[str, str] = {}
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise ValueError(f"{key}: type hints of {name}: {error}") from error
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(
                f"{key}: parameter {parameter.name!r} of {name}: a call names its arguments, so "
                "tools have parameters with names only"
            )
        field = f"a{len(fields)}"  # a parameter may have a name that pydantic forbids
        names[field] = parameter.name
        is_needed = parameter.default is parameter.empty
        default = ... if is_needed else parameter.default
        fields[field] = (hints.get(parameter.name, Any), Field(default, alias=parameter.name))
    rules = ConfigDict(extra="forbid", coerce_numbers_to_str=True, arbitrary_types_allowed=True)
    model = create_model(f"arguments of {name}", __config__=rules, **fields)
    return Tool(name=name, function=function, arguments=model, names=names)


def _problems(error: ValidationError) -> str:
    """Name the wrong arguments, and what is wrong with each."""
    told = []
    for found in error.errors(include_url=False, include_context=False):
        place = ".".join(map(str, found["loc"]))
        told.append(f"argument {place!r}: {found['msg']}")
    return "; ".join(told)


def _text(result: Any) -> str:
    """Write a result: texts as they are, other values as JSON."""
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):
        return str(result)
