"""Faults of a configuration: errors that programs read as well as users."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from spmdrl.config.sections import Config

_VALUE = r"\[[^]]*\]|\{[^}]*\}|\([^)]*\)|'[^']*'|\S+?(?=\)?[:;,]?(?:\s|$))"
_KEY = rf"(?:{'|'.join((*Config.model_fields, 'includes'))})(?:\.[\w-]+)*"
_LEADING = re.compile(rf"({_KEY})(?:=({_VALUE})|(?=[:\s]))")
_ANYWHERE = re.compile(rf"(?<![\w./=-])({_KEY})=({_VALUE})")
_COLON = re.compile(r"(\S+): ")
_BRACKETED = re.compile(r"\([^()]*\)|\{[^{}]*\}|\[[^][]*\]|'[^']*'")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One reason for which a configuration is refused.

    Args:
        key: dotted key; "" where the message names none.
        value: the value that is refused; None where the key has none.
        message: what is wrong with it, in one line.
        fix: what to change.
    """

    key: str
    value: Any
    message: str
    fix: str


class ConfigError(ValueError):
    """A configuration that is refused, with all faults found; its text has a line for each.

    Args:
        origin: file that the faults are in, for the text; "" if each names its place.
    """

    def __init__(self, faults: Sequence[Fault], origin: str = "") -> None:
        where = origin and f"{origin}: "
        super().__init__("\n".join(f"{where}{fault.message}" for fault in faults))
        self.faults = tuple(faults)


def faults_of(error: Exception) -> tuple[Fault, ...]:
    """The faults of an error that names a configuration's key, whichever class it has."""
    return error.faults if isinstance(error, ConfigError) else (read_fault(str(error)),)


def read_fault(message: str) -> Fault:
    """Read the fault in a message of the form `KEY=VALUE with KEY=VALUE: reason: fix`.

    The key is the one that the message begins with, else the first that has a value; the fix is the
    text after the last colon outside of brackets.
    """
    found = _LEADING.match(message) or _ANYWHERE.search(message)
    key, value = ("", None) if found is None else found.groups()
    return Fault(key=key, value=_read_value(value), message=message, fix=_fix(message))


def collect(checks: Iterable[Callable[[], object]]) -> None:
    """Make all checks. ConfigError: some failed; it has the faults of all."""
    faults: list[Fault] = []
    for check in checks:
        try:
            check()
        except (ValueError, OSError) as error:
            faults += faults_of(error)
    if faults:
        raise ConfigError(list({fault.message: fault for fault in faults}.values()))


def _fix(message: str) -> str:
    """The text after the last colon, but for those in brackets and of keys (`roles.NAME.pp: 2`)."""
    plain = message
    while (hidden := _BRACKETED.sub(lambda found: "_" * len(found[0]), plain)) != plain:
        plain = hidden
    colons = list(_COLON.finditer(plain))
    ends = [c.end() for c in colons if not re.fullmatch(r"[a-z]\w*(?:\.\w+)+", c[1])]
    ends = ends or [colon.end() for colon in colons]
    return message[ends[-1] :] if ends else ""


def _read_value(text: str | None) -> Any:
    """A value as messages write it: a literal of Python or YAML, else the text itself."""
    named = {None: None, "null": None, "true": True, "false": False}
    if text in named:
        return named[text]
    try:
        return ast.literal_eval(text or "")
    except (ValueError, SyntaxError):
        return text
