"""Programs that run the code to be judged: they answer calls, and never see what is expected."""

from __future__ import annotations

import os
import socket
import sys
import time
import types
from collections.abc import Mapping
from typing import Any

from spmdrl.sandbox.values import of_json, receive, send, to_json


def nothing() -> None:
    """Do nothing, to see whether programs can be confined."""


def sleeping(seconds: str) -> None:
    """Sleep, to see what ends a program."""
    time.sleep(float(seconds))


def program(path: str) -> None:
    """Run the code that the file descriptor holds as a program, with the standard streams."""
    code = os.fdopen(int(path), "rb").read().decode()
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv = ["solution.py"]
    exec(compile(code, "solution.py", "exec"), vars(main))


def serve(descriptor: str, module: str) -> None:
    """Import the code on standard input as a module, name what it defines, and answer calls from
    the socket `descriptor` until that closes.
    """
    code = sys.stdin.read()
    channel = socket.socket(fileno=int(descriptor))
    solution = types.ModuleType(module)
    sys.modules[module] = solution
    kept: list[Any] = []
    try:
        exec(compile(code, f"{module}.py", "exec"), vars(solution))
    # The code may raise anything (SystemExit too): then it defines nothing.
    except BaseException as error:
        send(channel, {"raised": _written(error)})
        return
    own = {name: value for name, value in vars(solution).items() if not name.startswith("__")}
    plain = {n: v for n, v in own.items() if not isinstance(v, types.ModuleType)}
    send(channel, {"names": {name: _kind(name, value, kept) for name, value in plain.items()}})
    while True:
        try:
            asked = receive(channel)
        except EOFError:
            return
        try:
            result = {"value": to_json(_answer(asked, vars(solution), kept), _keeper(kept))}
        except BaseException as error:
            result = {"raised": _written(error)}
        send(channel, result)


def _kind(name: str, value: Any, kept: list[Any]) -> Any:
    if callable(value):
        return {"callable": name}
    try:
        return {"value": to_json(value, _keeper(kept))}
    except ValueError:
        return {"callable": name}


def _answer(asked: Mapping[str, Any], names: Mapping[str, Any], kept: list[Any]) -> Any:
    """Call a function of the module, or a method (or read or set an attribute) of an object."""

    def find(number: int, _: str) -> Any:
        return kept[number]

    owner = names[asked["name"]] if "name" in asked else kept[asked["object"]]
    if "read" in asked:
        return getattr(owner, asked["read"])
    if "method" in asked:
        owner = getattr(owner, asked["method"])
    arguments = [of_json(value, find) for value in asked["arguments"]]
    named = {key: of_json(value, find) for key, value in asked["named"].items()}
    return owner(*arguments, **named)


def _keeper(kept: list[Any]) -> Any:
    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    return keep


def _written(error: BaseException) -> list[str]:
    return [type(error).__name__, str(error)[:2000]]
