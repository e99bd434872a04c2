"""JSON files and the values in them; errors name the file and the key."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs.github.com/"
MOST = 2**31 - 1


def is_pointer(file: Path) -> bool:
    """Whether Git LFS left a pointer where the file should be."""
    with file.open("rb") as opened:
        return opened.read(len(POINTER)) == POINTER


def pointer_error(file: Path) -> str:
    """Make the error message about a pointer."""
    return (
        f"{file} is a Git LFS pointer, the file itself was not downloaded: run `git lfs pull` "
        "in its repository"
    )


def refuse_pointer(file: Path) -> None:
    """Raise ValueError if `file` is a Git LFS pointer."""
    if is_pointer(file):
        raise ValueError(pointer_error(file))


def read_json(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        ValueError: the file holds no JSON object; the message names it.
        OSError: the file cannot be read.
    """
    refuse_pointer(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    # RecursionError: too many brackets; UnicodeDecodeError and JSONDecodeError are ValueErrors
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not {kind_of(content)}")
    return content


def kind_of(value: Any) -> str:
    """Describe a JSON value in a message, by the value itself if it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float | str):
        text = json.dumps(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return "a list" if isinstance(value, list) else "an object"


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Named values of a file, each read as the kind that it must have.

    Args:
        values: the file's values by key.
        origin: the file, with which messages begin.
        defaults: values of keys that the file lacks; a key without one is required. A null is a
            value, not a missing key, as in `transformers`.
    """

    values: Mapping[str, Any]
    origin: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def knows(self, key: str) -> bool:
        """Whether the file or the defaults have a value, be it null."""
        return key in self.values or key in self.defaults

    def value(self, key: str) -> Any:
        """Return a value of any kind."""
        if key in self.values:
            return self.values[key]
        if key in self.defaults:
            return self.defaults[key]
        raise ValueError(f"{self.origin}: the key {key!r} is missing")

    def integer(self, key: str, least: int | None = 1, most: int = MOST) -> int:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "a whole number")
        if least is not None and value < least:
            raise self.wrong(key, f"at least {least}")
        if value > most:
            raise self.wrong(key, f"at most {most}")
        return value

    def number(self, key: str, above: float | None = None, least: float | None = None) -> float:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        # an integer may be too large for a float
        if abs(value) > sys.float_info.max or not math.isfinite(value):
            raise self.wrong(key, "a finite number")
        if above is not None and value <= above:
            raise self.wrong(key, f"above {above:g}")
        if least is not None and value < least:
            raise self.wrong(key, f"at least {least:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def section(self, key: str) -> Mapping[str, Any]:
        """Return an object; null gives an empty one."""
        value = self.value(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value

    def numbers(self, key: str, above: float) -> tuple[float, ...]:
        """Return a list of finite numbers above `above`."""
        value = self.value(key)
        if not isinstance(value, list):
            raise self.wrong(key, "a list of numbers")
        items = Fields(values={f"{key}[{i}]": v for i, v in enumerate(value)}, origin=self.origin)
        return tuple(items.number(name, above=above) for name in items.values)

    def integers(self, key: str) -> tuple[int, ...]:
        """Return a list of whole numbers; null gives an empty one."""
        value = self.value(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.wrong(key, "a list of whole numbers")
        return tuple(value)

    def ids(self, key: str) -> tuple[int, ...]:
        """Return token ids, given as one, a list of them, or null for none."""
        value = self.value(key)
        given = () if value is None else value if isinstance(value, list) else (value,)
        if not all(type(item) is int and 0 <= item <= MOST for item in given):
            raise self.wrong(key, "a token id (a whole number), a list of them, or null")
        return tuple(given)

    def is_null(self, key: str) -> bool:
        return self.value(key) is None

    def wrong(self, key: str, kind: str) -> ValueError:
        """Make the error that says what `key` must be."""
        where = "" if key in self.values else " (the default, as the file does not have it)"
        given = kind_of(self.value(key))
        return ValueError(f"{self.origin}: {key} must be {kind}, not {given}{where}")
