"""Renamed keys: what a configuration written before calls them, and what they are now."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import yaml

RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "roles.*.memory": "residency",
        "data.train.part": "share",
        "data.mix.*.part": "share",
        "evaluation.sets.*.data.part": "share",
    }
)
"""Old key -> the new last part of its name; `*` is any one part."""

_ENVIRONMENT = re.compile(r"\$\{[A-Z][^}]*\}")
_REFERENCE = re.compile(r"\$\{([a-z]\w*(?:\.\w+)+)\}")
"""`${section.key}`: the value of another key."""


@dataclass(frozen=True, kw_only=True)
class Rename:
    """A place in a file that has a key's old name.

    Args:
        start, end: the characters to replace by `text`.
        line: from 1.
        old, new: the whole keys.
    """

    start: int
    end: int
    text: str
    line: int
    old: str
    new: str


def new_name(key: str) -> str | None:
    """The key that a renamed key is now; None: it was not renamed."""
    parts = key.split(".")
    for old, name in RENAMED.items():
        wanted = old.split(".")
        if len(wanted) == len(parts) and all(
            want in ("*", part) for want, part in zip(wanted, parts, strict=True)
        ):
            return ".".join([*parts[:-1], name])
    return None


def migrated(values: Any, prefix: str = "") -> Any:
    """Nested values of a configuration, with their keys as they are named now."""
    if isinstance(values, list):
        return [migrated(value, f"{prefix}{number}.") for number, value in enumerate(values)]
    if not isinstance(values, Mapping):
        return values
    return {
        (new_name(f"{prefix}{key}") or f"{prefix}{key}").removeprefix(prefix): migrated(
            value, f"{prefix}{key}."
        )
        for key, value in values.items()
    }


def find_renames(text: str) -> list[Rename]:
    """Old names in the text of a file, in its order.

    Raises:
        ValueError: it is no YAML mapping, or sets a key by both of its names.
    """
    found = {rename.start: rename for rename in _old_keys(composed(text), "")}
    for match in _REFERENCE.finditer(text):
        old = match[1]
        parts = old.split(".")
        heads = (".".join(parts[:end]) for end in range(2, len(parts) + 1))
        for head, new in ((head, new_name(head)) for head in heads):
            if new is not None:
                new = new + old.removeprefix(head)
                start, end = match.span(1)
                line = text.count("\n", 0, start) + 1
                found[start] = Rename(start=start, end=end, text=new, line=line, old=old, new=new)
    return [found[start] for start in sorted(found)]


def renamed(text: str, renames: list[Rename]) -> str:
    """The text with new names; all else stays as it is written."""
    for rename in reversed(renames):
        text = text[: rename.start] + rename.text + text[rename.end :]
    return text


def composed(text: str) -> yaml.MappingNode:
    """YAML's nodes of a file with their places. ValueError: it is no YAML mapping."""
    # of equal length, so that places stay; `${NAME:default}` may stand where braces are YAML's
    plain = _ENVIRONMENT.sub(lambda found: "x" * len(found[0]), text)
    try:
        root = yaml.compose(plain)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("the file must hold `key: value` lines at its top level")
    return root


def _old_keys(node: yaml.Node, prefix: str) -> Iterator[Rename]:
    if isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _old_keys(value, f"{prefix}{number}.")
    if not isinstance(node, yaml.MappingNode):
        return
    names = {f"{prefix}{key.value}" for key, _ in node.value}
    for key, value in node.value:
        old, start, end = f"{prefix}{key.value}", key.start_mark, key.end_mark
        if (new := new_name(old)) is not None:
            line, last = start.line + 1, new.rpartition(".")[2]
            if new in names:
                raise ValueError(f"line {line}: {old} is now {new}, and both are set: remove one")
            yield Rename(start=start.index, end=end.index, text=last, line=line, old=old, new=new)
        yield from _old_keys(value, f"{old}.")
