"""The keys of the configuration: their names and groups, and tables that document them."""

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


PLACEMENT = (
    *("ranks", "device", "dp_replicate", "dp_shard", "cp", "tp", "ep", "pp", "megatron"),
    "tp_across_nodes",
)
"""Keys of a role that say where it computes: a group of their own."""


def key_fields() -> Iterator[tuple[str, FieldInfo]]:
    """All keys in the order of `known_keys`, each with its field."""
    return _fields(Config, "")


def is_basic(field: FieldInfo) -> bool:
    """Whether a key's field is marked `Basic`."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and "basic" in extra


def known_keys() -> list[str]:
    """All dotted keys of the configuration; a role's keys are under `roles.NAME`."""
    return [key for key, _ in key_fields()]


def basic_keys() -> list[str]:
    """Keys marked `Basic`, which are all that README, quickstart and recipes set."""
    return [key for key, field in key_fields() if is_basic(field)]


def group_of(key: str) -> str:
    """Name the group of a key: its section, `run` without one, `placement` where a role computes.

    Args:
        key: one of `known_keys`.
    """
    parts = key.split(".")
    if len(parts) == 1:
        return "run"
    if parts[0] == "roles" and parts[-1] in PLACEMENT:
        return "placement"
    return "rewards" if parts[0] == "reward_pool" else parts[0]


def key_table(group: str | None = None, *, basic: bool = False) -> str:
    """Markdown tables of keys, one for each group: accepted values, default and meaning.

    Args:
        group: the only group to show; None: all, each with a heading.
        basic: leave out advanced keys.

    Raises:
        ValueError: no such group.
    """
    tables: dict[str, list[str]] = {}
    for key, field in key_fields():
        rows = tables.setdefault(group_of(key), [])
        if is_basic(field) or not basic:
            rows.append(_row(key, field))
    if group is not None and group not in tables:
        raise ValueError(
            f"--group={group}: there is no such group: give one of {', '.join(tables)}"
        )
    head = ["| key | level | takes | default | meaning |", "|---|---|---|---|---|"]
    if group is not None:
        return "\n".join([*head, *tables[group]])
    shown = (["", f"### {name}", "", *head, *rows] for name, rows in tables.items() if rows)
    return "\n".join(line for lines in shown for line in lines).lstrip()


def _row(key: str, field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    default = "required" if field.is_required() else f"`{_shown(value)}`"
    cells = (
        f"`{key}`",
        "basic" if is_basic(field) else "advanced",
        _takes(field.annotation),
        default,
    )
    return f"| {' | '.join(map(_cell, (*cells, field.description or '')))} |"


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
