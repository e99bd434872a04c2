"""The keys of the configuration: their names, and a table that documents them."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typing_extensions import is_typeddict

from spmdrl.config.sections import Config

WILDCARDS = {"roles": "NAME", "rewards": "0"}
"""Placeholders in `known_keys` for the user's role names and for list indices."""


def known_keys() -> list[str]:
    """All dotted keys of the configuration; a role's keys are under `roles.NAME`."""
    return [key for key, _ in _fields(Config, "")]


def key_table() -> str:
    """Markdown table of all keys: accepted values, default and meaning."""
    lines = ["| key | takes | default | |", "|---|---|---|---|"]
    for key, field in _fields(Config, ""):
        default = (
            "required"
            if field.is_required()
            else f"`{_shown(field.get_default(call_default_factory=True))}`"
        )
        takes = _cell(_takes(field.annotation))
        lines.append(f"| `{key}` | {takes} | {default} | {_cell(field.description or '')} |")
    return "\n".join(lines)


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            yield prefix + name, field
            continue
        wildcard = f".{WILDCARDS[name]}" if name in WILDCARDS else ""
        yield from _fields(inner, f"{prefix}{name}{wildcard}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if (inner := _section_of(argument)) is not None:
            return inner
    return None


def _takes(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _takes(get_args(annotation)[0])
    if origin is Literal:
        return ", ".join(str(value) for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        parts = [_takes(part) for part in get_args(annotation) if part is not type(None)]
        return " or ".join(parts)
    if origin is tuple:
        return f"list of {_takes(get_args(annotation)[0])}"
    if origin is dict or is_typeddict(annotation):
        return "mapping"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(annotation, str(annotation))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) and not value.isidentifier() else str(value)
