"""Shipped environments by name, and what `rollout.turns.kind` and `options` mean.

Imports nothing heavy: worker processes read it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from spmdrl.turns.tool_calls import format_of

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "tools": "spmdrl.turns.tools:ToolEnvironment",
        "gymnasium": "spmdrl.turns.adapters.gymnasium:GymnasiumGame",
        "textarena": "spmdrl.turns.adapters.textarena:TextArenaGame",
        "reasoning_gym": "spmdrl.turns.adapters.reasoning_gym:ReasoningGymFeedback",
    }
)
"""Name of a shipped environment -> its class."""

_SLOW: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"textarena": ("textarena",), "reasoning_gym": ("reasoning_gym",)}
)
"""Name -> modules that take long to import."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentKind:
    """A class of environments, and the keyword arguments with which its objects are made.

    Args:
        where: `module:Class`, or `path/to/file.py:Class`.
        modules: modules that are slow to import, so they are imported before workers fork.
    """

    where: str
    options: Mapping[str, Any]
    modules: tuple[str, ...] = ()


def environment_kind(
    kind: str, options: Mapping[str, Any], template: str, key: str = "rollout.turns"
) -> EnvironmentKind:
    """Return the class that a kind names; a format of tool calls `auto` is the chat template's.

    Args:
        kind: a shipped name, or the place of a user's class.
        template: text of the tokenizer's chat templates.
        key: the section, for errors.

    Raises:
        ValueError: no such name; the format is `auto`, and the template shows none.
    """
    if ":" not in kind and kind not in KINDS:
        raise ValueError(
            f"{key}.kind={kind}: it must be {', '.join(KINDS)}, or module:Class of your own"
        )
    where, options = KINDS.get(kind, kind), dict(options)
    if kind == "tools" and options.get("format", "auto") == "auto":
        options["format"] = format_of(template)
        if options["format"] is None:
            raise ValueError(
                f"{key}.options.format=auto: the model's chat template shows no tool calls: name "
                "the format that the model writes (hermes, llama3, mistral, harmony), or a "
                "parser of your own (module:function)"
            )
    return EnvironmentKind(where=where, options=options, modules=_SLOW.get(kind, ()))
