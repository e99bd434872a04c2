"""JSON schemas of functions, as chat templates are given tools.

They are those of `transformers.utils.get_json_schema`, made without it: a worker process would
import torch for them.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, Union

_PLAIN: Mapping[Any, Mapping[str, Any]] = MappingProxyType(
    {
        int: {"type": "integer"},
        float: {"type": "number"},
        str: {"type": "string"},
        bool: {"type": "boolean"},
        type(None): {"type": "null"},
        list: {"type": "array"},
        tuple: {"type": "array"},
        dict: {"type": "object"},
        Any: {},
    }
)
_CHOICES = re.compile(r"\(choices:\s*(\[.*?\])\)\s*\Z", re.DOTALL)


def schema_of(tool: Mapping[str, Any] | Callable[..., Any]) -> Mapping[str, Any]:
    """Return the schema of a function, from its type hints and its docstring in Google's format; a
    schema is returned as it is.

    Raises:
        ValueError: there is no docstring, or a parameter has no type or no description.
    """
    if isinstance(tool, Mapping):
        return tool
    name = getattr(tool, "__name__", type(tool).__name__)
    text = inspect.getdoc(tool)
    if not text:
        raise ValueError(f"the tool {name} has no docstring, by which a model knows it")
    sections = _sections(text)
    said = _arguments(sections.get("Args", ""))
    hints, required, properties = typing.get_type_hints(tool), [], {}
    for parameter in inspect.signature(tool).parameters.values():
        own = f"the tool {name}: its parameter {parameter.name}"
        if parameter.name not in hints:
            raise ValueError(f"{own} has no type hint")
        if parameter.name not in said:
            raise ValueError(f"{own} is not described under Args in its docstring")
        properties[parameter.name] = _described(hints[parameter.name], said[parameter.name], own)
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    function: dict[str, Any] = {"name": name, "description": sections[""], "parameters": parameters}
    if "return" in hints:
        told = {"description": sections["Returns"].strip()} if "Returns" in sections else {}
        function["return"] = {**_schema(hints["return"], f"the tool {name}: its result"), **told}
    return {"type": "function", "function": function}


def _sections(text: str) -> Mapping[str, str]:
    """Split a docstring at its headings; the description is that of ""."""
    parts = re.split(r"^(Args|Returns|Raises):[ \t]*$", text, flags=re.MULTILINE)
    named = zip(["", *parts[1::2]], parts[::2], strict=True)
    return {name: body.strip("\n").rstrip() for name, body in named} | {"": parts[0].strip()}


def _arguments(text: str) -> Mapping[str, str]:
    """Read `name: description`, whose further lines are indented more."""
    found: dict[str, str] = {}
    for line in inspect.cleandoc(text).splitlines():
        begun = re.match(r"(\w+)\s*(?:\([^)]*\))?:\s*(.*)", line)
        if begun is not None:
            found[begun[1]] = begun[2].strip()
        elif found and line.strip():
            last = next(reversed(found))
            found[last] = f"{found[last]} {line.strip()}".strip()
    return found


def _described(hint: Any, said: str, own: str) -> dict[str, Any]:
    schema = _schema(hint, own)
    choices = _CHOICES.search(said)
    if choices is not None:
        schema["enum"] = [str(choice).strip() for choice in json.loads(choices[1])]
        said = said[: choices.start()].strip()
    return {**schema, "description": said}


def _schema(hint: Any, own: str) -> dict[str, Any]:
    """Return the schema of a type.

    Raises:
        ValueError: JSON has no such type.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is None and hint in _PLAIN:
        return dict(_PLAIN[hint])
    if origin in (Union, types.UnionType):
        kinds = [_schema(part, own) for part in inner if part is not type(None)]
        nullable = {"nullable": True} if type(None) in inner else {}
        return {**_any_of(kinds), **nullable}
    if origin is Literal:
        kinds = list(dict.fromkeys(_PLAIN[type(value)]["type"] for value in inner))
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(inner)}
    if origin is list:
        return {"type": "array", "items": _schema(inner[0], own)}
    if origin is tuple and Ellipsis not in inner and len(inner) > 1:
        return {"type": "array", "prefixItems": [_schema(part, own) for part in inner]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(inner[1], own)}
    raise ValueError(f"{own} has the type {hint}, which JSON has not")


def _any_of(kinds: list[dict[str, Any]]) -> dict[str, Any]:
    if len(kinds) == 1:
        return kinds[0]
    if all(kind.keys() == {"type"} for kind in kinds):
        names = sorted({kind["type"] for kind in kinds})
        return {"type": names[0] if len(names) == 1 else names}
    return {"anyOf": kinds}
