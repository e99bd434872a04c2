"""Programs that judge code which another process runs: tests see it through proxies.

A proxy sends plain values and gets plain values (`sandbox.values`), so that nothing which the code
does in its own process, from exiting to replacing `assert`, reaches the process that judges.
"""

from __future__ import annotations

import builtins
import json
import socket
import sys
import types
import unittest
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from spmdrl.sandbox.values import of_json, receive, send, to_json


class RemoteError(Exception):
    """The code raised an exception that Python itself has not."""


class Proxies:
    """Names that a module in another process defines, as calls over a socket."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        found = receive(channel)
        if "raised" in found:
            raise _exception(found["raised"])
        self.names = {str(n): self._named(str(n), kind) for n, kind in found["names"].items()}

    def ask(self, message: Mapping[str, Any]) -> Any:
        """Send a call, and return its result or raise its exception."""
        send(self._channel, message)
        reply = receive(self._channel)
        if "raised" in reply:
            raise _exception(reply["raised"])
        return self._read(reply["value"])

    def call(self, where: Mapping[str, Any], *arguments: Any, **named: Any) -> Any:
        """Call what `where` says with plain values or proxies of objects."""
        written = [to_json(value, _number) for value in arguments]
        keywords = {key: to_json(value, _number) for key, value in named.items()}
        return self.ask({**where, "arguments": written, "named": keywords})

    def _named(self, name: str, kind: Mapping[str, Any]) -> Any:
        if "value" in kind:
            return self._read(kind["value"])

        def proxy(*arguments: Any, **named: Any) -> Any:
            return self.call({"name": name}, *arguments, **named)

        proxy.__name__ = proxy.__qualname__ = name
        return proxy

    def _read(self, written: Any) -> Any:
        return of_json(written, lambda number, kind: Remote(self, number, kind))


class Remote:
    """An object of the other process. It equals other objects of that process by their own word,
    and never a plain value.
    """

    def __init__(self, proxies: Proxies, number: int, kind: str) -> None:
        vars(self).update(_proxies=proxies, _number=number, _kind=kind)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = self._proxies.ask({"object": self._number, "read": name})
        if isinstance(found, Remote) and found._kind in ("method", "function"):
            return lambda *a, **k: self._special(name, *a, **k)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        self._special("__setattr__", name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self._special("__eq__", other) is True

    def __hash__(self) -> int:
        return hash(self._number)

    def __iter__(self) -> Iterator[Any]:
        number = 0
        iterator = self._special("__iter__")
        while number < 1_000_000:
            try:
                yield iterator._special("__next__")
            except StopIteration:
                return
            number += 1

    def _special(self, name: str, *arguments: Any, **named: Any) -> Any:
        where = {"object": self._number, "method": name}
        return self._proxies.call(where, *arguments, **named)


def _forwarded(name: str) -> Callable[..., Any]:
    return lambda self, *arguments, **named: self._special(name, *arguments, **named)


for _name in (
    *("__len__", "__getitem__", "__setitem__", "__contains__", "__call__", "__str__", "__repr__"),
    *("__lt__", "__le__", "__gt__", "__ge__", "__add__", "__sub__", "__mul__", "__truediv__"),
    *("__neg__", "__abs__", "__int__", "__float__", "__enter__", "__exit__", "__next__"),
):
    setattr(Remote, _name, _forwarded(_name))


def _number(value: Any) -> int:
    if isinstance(value, Remote):
        return int(vars(value)["_number"])
    raise ValueError(f"a {type(value).__name__} cannot be passed to code in another process")


def _exception(raised: Any) -> Exception:
    name, text = raised
    kind = getattr(builtins, str(name), None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError has five arguments
            pass
    return RemoteError(f"{name}: {text}")


def judge(descriptor: str, verdict: str) -> None:
    """Run the tests that standard input describes against the code behind the socket `descriptor`,
    and write `{"passed": n, "total": n, "failure": text or null}` to the descriptor `verdict`.

    The description has `module` (the code's name for imports) and either `tests`, a list of texts
    of Python code, with `entry_point` (the function that a `check(candidate)` gets, or null), or
    `calls`: {"function": ..., "inputs": [[...]], "outputs": [...]}.
    """
    asked = json.load(sys.stdin)
    out = open(int(verdict), "w", encoding="utf-8")  # noqa: SIM115
    passed, total, failure = 0, 0, None
    try:
        names = Proxies(socket.socket(fileno=int(descriptor))).names
        checks = list(_checks(asked, names))
        total = len(checks)
        for check in checks:
            try:
                check()
                passed += 1
            # a test may raise anything; what it raises is its failure
            except BaseException as error:
                failure = failure or f"{type(error).__name__}: {str(error)[:500]}"
    except BaseException as error:
        failure = f"{type(error).__name__}: {str(error)[:500]}"
    json.dump({"passed": passed, "total": total, "failure": failure}, out)
    out.close()


def _checks(asked: Mapping[str, Any], names: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    if asked.get("calls") is not None:
        calls = asked["calls"]
        function = _function(names, calls["function"])
        for arguments, wanted in zip(calls["inputs"], calls["outputs"], strict=True):
            yield _call_check(function, arguments, wanted)
        return
    solution = types.ModuleType(asked["module"])
    vars(solution).update(names)
    sys.modules[asked["module"]] = solution
    for text in asked["tests"]:
        space: dict[str, Any] = {"__name__": "tests", **names}
        yield from _text_checks(text, space, names, asked["entry_point"])


def _text_checks(
    text: str, space: dict[str, Any], names: Mapping[str, Any], entry_point: str | None
) -> Iterator[Callable[[], None]]:
    """Yield the text itself, then the tests that it has defined: `check(candidate)`, functions
    `test_*`, and cases of unittest.
    """
    code = compile(text, "tests.py", "exec")
    before = dict(space)
    defines = [name for name in code.co_names if name == "check" or name.startswith("test")]
    if not defines and "TestCase" not in code.co_names:
        yield lambda: exec(code, space)
        return
    exec(code, space)
    own = {n: v for n, v in space.items() if n not in before or before[n] is not v}
    if callable(own.get("check")):
        yield lambda: own["check"](_function(names, entry_point))
    for name, value in own.items():
        if name.startswith("test") and isinstance(value, types.FunctionType):
            yield value
        elif isinstance(value, type) and issubclass(value, unittest.TestCase):
            for test in unittest.defaultTestLoader.loadTestsFromTestCase(value):
                yield test.debug


def _function(names: Mapping[str, Any], name: str | None) -> Any:
    if name is None:
        raise NameError("the row names no entry point")
    if name == "Solution" or name in names:
        return names[name]
    if "Solution" in names:  # a class with the function as its method
        return getattr(names["Solution"](), name)
    raise NameError(f"name {name!r} is not defined")


def _call_check(function: Any, arguments: Any, wanted: Any) -> Callable[[], None]:
    def check() -> None:
        found = function(*arguments)
        found = list(found) if isinstance(found, tuple) else found
        if found != wanted:
            raise AssertionError(f"{found!r} is not {wanted!r}")

    return check
