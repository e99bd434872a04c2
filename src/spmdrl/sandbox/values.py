"""Values between two processes of which one is not trusted: plain values, never pickles.

What arrives is made of exact built-in types, whatever the sender did to its own: an object that
equals everything arrives as a handle, and a subclass of int as an int.
"""

from __future__ import annotations

import base64
import json
import math
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any

MAX_MESSAGE = 1 << 24
MAX_DEPTH = 50

Keep = Callable[[Any], int]
"""Callback that keeps an object which is no plain value, and returns its number."""

_NUMPY = ("numpy", "torch")


def to_json(value: Any, keep: Keep, depth: int = 0) -> Any:
    """Write a value as JSON: numbers, texts, bytes and containers of them by value, all else by a
    number that `keep` gives it.

    Raises:
        ValueError: it is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"the value is nested more than {MAX_DEPTH} deep")
    for kind, write in _SCALARS:
        if isinstance(value, kind):
            return write(value)
    if type(value).__module__.partition(".")[0] in _NUMPY and hasattr(value, "tolist"):
        return to_json(value.tolist(), keep, depth + 1)
    for name, container in _CONTAINERS:
        if type(value) is container:
            return {name: [to_json(item, keep, depth + 1) for item in value]}
    if type(value) is dict:
        pairs = [[to_json(x, keep, depth + 1) for x in pair] for pair in value.items()]
        return {"dict": pairs}
    return {"object": keep(value), "class": type(value).__name__}


def of_json(written: Any, find: Callable[[int, str], Any]) -> Any:
    """Read what `to_json` wrote.

    Args:
        find: returns what stands for the object of a number and a class name.

    Raises:
        ValueError: it is nothing that `to_json` writes.
    """
    if written is None or type(written) in (bool, str):
        return written
    if not isinstance(written, Mapping) or not written:
        raise ValueError("a message of the other process is no value")
    name, content = next(iter(written.items()))
    if name == "int":
        return int(content, 16)
    if name == "float":
        return float.fromhex(content) if content not in _NOT_FINITE else float(content)
    if name == "complex":
        return complex(*(of_json(part, find) for part in content))
    if name == "bytes":
        return base64.b64decode(content)
    if name == "dict":
        return {of_json(key, find): of_json(value, find) for key, value in content}
    if name == "object":
        return find(int(content), str(written["class"]))
    for known, container in _CONTAINERS:
        if name == known:
            return container(of_json(item, find) for item in content)
    raise ValueError(f"a message of the other process has a value of kind {name!r}")


_NOT_FINITE = ("nan", "inf", "-inf")


def _write_int(value: int) -> Any:
    return {"int": hex(int(value))}


def _write_float(value: float) -> Any:
    plain = float(value)
    return {"float": plain.hex() if math.isfinite(plain) else str(plain)}


def _write_complex(value: complex) -> Any:
    return {"complex": [_write_float(value.real), _write_float(value.imag)]}


_SCALARS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (type(None), lambda _: None),
    (bool, bool),
    (int, _write_int),
    (float, _write_float),
    (complex, _write_complex),
    (str, lambda value: "".join(value)),
    ((bytes, bytearray), lambda value: {"bytes": base64.b64encode(bytes(value)).decode()}),
)
_CONTAINERS: tuple[tuple[str, Any], ...] = (
    ("list", list),
    ("tuple", tuple),
    ("set", set),
    ("frozenset", frozenset),
)


def send(channel: socket.socket, message: Any) -> None:
    """Send a message that JSON can hold."""
    payload = json.dumps(message).encode()
    channel.sendall(struct.pack("!I", len(payload)) + payload)


def receive(channel: socket.socket) -> Any:
    """Receive a message.

    Raises:
        EOFError: the other process has ended.
        ValueError: the message is too long or no JSON.
    """
    (length,) = struct.unpack("!I", _read(channel, 4))
    if length > MAX_MESSAGE:
        raise ValueError(f"a message of the other process has {length} bytes")
    return json.loads(_read(channel, length))


def _read(channel: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = channel.recv(min(count - len(parts), 1 << 16))
        if not part:
            raise EOFError("the process that ran the response has ended")
        parts += part
    return bytes(parts)
