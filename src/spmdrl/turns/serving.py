"""Objects of a user's environment in a worker process: all code here runs outside the rank.

Requests and replies are JSON, one reply to each request with its number, in their order. What a
user's code raises or returns is data here: a request that fails has the reply `{"reason": ...,
"message": ...}`. Imports nothing heavy.
"""

from __future__ import annotations

import base64
import inspect
import json
import reprlib
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from spmdrl.config.user_objects import headline, lacks, load_object, may_have, told
from spmdrl.rewards.process import FLOAT32_MAX, limit_cpu, limit_memory, receive, send
from spmdrl.turns.environment import Observation

MAX_CHARACTERS = 1 << 22
"""Most characters of one object's messages: more would keep a rank at tokenising them."""

METHODS = {"start": ("row",), "step": ("response",)}
OPTIONAL = {"tools": (), "save": (), "load": ("state",), "close": ()}
"""Methods of a `TurnEnvironment`, and the arguments that they take."""


class Refused(ValueError):
    """A method returned what it may not; the text says what."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentWork:
    """The `Work` of a worker that holds objects of one class.

    Args:
        kind: place of the class, `module:Class` or `path/to/file.py:Class`.
        options: keyword arguments of each object.
        key: key of the configuration that has both, for messages.
        cpu_s: CPU seconds that one request may take.
        memory_mb: MiB that the objects of a worker may take together; None: no limit.
        output: file for what they print; None: it is dropped.
        environment: variables in addition to those of the server.
    """

    kind: str
    options: Mapping[str, Any]
    key: str
    cpu_s: float
    memory_mb: int | None
    output: str | None
    environment: Mapping[str, str]

    def serve(self, channel: socket.socket) -> None:
        """Load the class, report it, then answer requests until the channel closes."""
        try:
            kind = self._load()
        except ValueError as error:
            send(channel, json.dumps({"error": str(error)}).encode())
            return
        if self.memory_mb is not None:
            limit_memory(self.memory_mb)
        about = {
            "special_tokens": may_have(kind, "special_tokens") and bool(kind.special_tokens),
            "saves": may_have(kind, "save"),
        }
        send(channel, json.dumps({"about": about}).encode())
        objects = _Objects(kind, self.options, saves=about["saves"])
        while (message := receive(channel)) is not None:
            limit_cpu(self.cpu_s)
            request = json.loads(message)
            reply = {"number": request["number"], **_answered(objects, request)}
            send(channel, json.dumps(reply).encode())

    def _load(self) -> Any:
        """Load the class; ValueError if it lacks a method, or does not take the options."""
        kind, where = load_object(self.kind, f"{self.key}.kind"), f"{self.key}.kind={self.kind}"
        if not inspect.isclass(kind):
            raise ValueError(f"{where} is a {type(kind).__name__}: name a class")
        wrong = lacks(kind, METHODS, OPTIONAL)
        if wrong is not None:
            raise ValueError(f"{where} {wrong}")
        if may_have(kind, "save") != may_have(kind, "load"):
            raise ValueError(f"{where} has only one of 'save' and 'load': add the other")
        try:
            inspect.signature(kind).bind(**self.options)
        except TypeError as error:
            options = f"{self.key}.options={dict(self.options)}"
            raise ValueError(f"{where} is made with {options}: {error}") from None
        return kind


def _answered(objects: _Objects, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reply to a request."""
    try:
        return {"value": objects.do(request)}
    except MemoryError:
        return {"reason": "memory", "message": "MemoryError: it went past the memory limit"}
    except Refused as error:
        return {"reason": "returned", "message": str(error)}
    # Whatever the user's code raises (SystemExit too) is the end of a sample, not of the worker.
    except BaseException as error:
        what = f"{request['do']} failed: {headline(error)}"
        return {"reason": "exception", "message": told(what, error)}


class _Objects:
    """Objects by number, as the rank counts them.

    Args:
        saves: whether each step's reply has the state after it.
    """

    def __init__(self, kind: Any, options: Mapping[str, Any], *, saves: bool) -> None:
        self._kind, self._options, self._saves = kind, options, saves
        self._objects: dict[int, Any] = {}

    def do(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a request asks: `start`, `load`, `step` or `close`."""
        number, action = request["object"], request["do"]
        if action == "close":
            held = self._objects.pop(number, None)
            if held is not None and may_have(type(held), "close"):
                held.close()
            return {}
        if action == "step":
            return self._step(self._objects[number], request["text"])
        held = self._objects[number] = self._kind(**self._options)
        if action == "load":
            held.load(base64.b64decode(request["state"]))
            return {}
        return self._start(held, request)

    def _start(self, held: Any, request: Mapping[str, Any]) -> dict[str, Any]:
        messages = _messages(held.start(request["row"]), "start")
        if not messages:
            raise Refused("start returned no message: the prompt would be empty")
        tools = []
        if request["tools"] and may_have(self._kind, "tools"):
            tools = [_schema(tool) for tool in held.tools()]
        return {"messages": messages, "tools": tools}

    def _step(self, held: Any, text: str) -> dict[str, Any]:
        found = observation_of(held.step(text))
        if self._saves and found["messages"]:
            state = held.save()
            if not isinstance(state, bytes | bytearray):
                raise Refused(f"save returned a {type(state).__name__}: it must be bytes")
            found["state"] = base64.b64encode(state).decode()
        return found


def observation_of(found: Any) -> dict[str, Any]:
    """Check what a step returned, and return it as JSON values: `messages`, `reward` and `metrics`;
    without messages, the sample ends.

    Raises:
        Refused: it is no observation, or the reward or a metric no number.
    """
    if not isinstance(found, Observation):
        raise Refused(
            f"step returned a {type(found).__name__}, {reprlib.repr(found)}: return an Observation"
        )
    given: Any = found.reward
    try:
        # a text is not a number, even if it looks like one
        reward = float("nan") if isinstance(given, str | bytes) else float(given)
        done = bool(found.done)
    # `float` and `bool` call the value's own code, which may raise anything
    except Exception as error:
        raise Refused(f"step returned {reprlib.repr(found)}: {headline(error)}") from None
    if not abs(reward) <= FLOAT32_MAX:  # `not <=` because NaN compares as false
        raise Refused(f"step returned the reward {given!r}: it must be a finite number")
    messages = [] if done or found.messages is None else _messages(found.messages, "step")
    if any(message["role"] == "assistant" for message in messages):
        raise Refused("step returned an assistant's message: the model alone writes those")
    return {"messages": messages, "reward": reward, "metrics": _metrics(found.metrics)}


def _metrics(found: Any) -> dict[str, float]:
    """Check the metrics of a turn, and return them as JSON values."""
    if not isinstance(found, Mapping):
        raise Refused(f"step returned the metrics {reprlib.repr(found)}: they are numbers by name")
    numbers: dict[str, float] = {}
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, int | float):
            what = f"{reprlib.repr(name)}: {reprlib.repr(value)}"
            raise Refused(f"step returned the metric {what}: metrics are numbers by name")
        numbers[name] = float(value)
        if not abs(numbers[name]) <= FLOAT32_MAX:
            raise Refused(f"step returned the metric {name!r}: {value}: it must be finite")
    return numbers


def _messages(found: Any, method: str) -> list[dict[str, Any]]:
    """Check messages, and return them as JSON values."""
    if isinstance(found, str | bytes | Mapping) or not isinstance(found, Iterable):
        raise Refused(f"{method} returned {reprlib.repr(found)}: messages are a list of dicts")
    messages = list(found)
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise Refused(f"{method} returned the message {reprlib.repr(message)}: it has no role")
    try:
        text = json.dumps([dict(message) for message in messages], ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is one
        raise Refused(f"{method} returned messages that are no JSON: {error}") from None
    if len(text) > MAX_CHARACTERS:
        raise Refused(f"{method} returned {len(text)} characters, the limit is {MAX_CHARACTERS}")
    found = json.loads(text)
    assert isinstance(found, list)
    return found


def _schema(tool: Mapping[str, Any] | Callable[..., Any]) -> Mapping[str, Any]:
    """Return the JSON schema of a tool, from a function's type hints and docstring."""
    if isinstance(tool, Mapping):
        return dict(tool)
    # only here, because it is slow to import
    from transformers.utils import get_json_schema

    schema: Mapping[str, Any] = get_json_schema(tool)
    return schema
