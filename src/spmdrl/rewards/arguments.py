"""Calls of a user's reward function: by the names of its parameters, or by position."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GIVEN = ("prompt", "response", "answer", "entry")
"""Arguments that every call can give besides the row's columns; they win over columns."""

MESSAGES = "messages"
"""Argument that a call gives by name, to a function that names it: the conversation, a list of
messages with `role` and `content`. It wins over a column of that name."""

NAMED = (*GIVEN, MESSAGES)

BATCHES = frozenset({"completions", "prompts", "responses", "queries", "labels", "solution_strs"})
"""Names by which other trainers pass lists, one entry per sample."""

SHOWN = 12
"""Most column names in a message."""

GUIDE = "docs/rewards.md"

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, kw_only=True)
class Caller:
    """A user's function as a function of (prompt, response, answer, entry), and of the conversation
    where it `takes_messages`.

    Args:
        options: keyword arguments of every call.
        names: names from `NAMED` that it takes by name; None: it takes all four by position.
        columns: required columns of the row; a row that lacks one passes None for it.
        optional: columns that it takes if the row has them.
        takes_rest: it has `**kwargs`, which get everything in `GIVEN` and the row that it does not
            name.
        instead: parameters named like columns that get one of the four arguments by position.
    """

    function: Callable[..., Any]
    options: Mapping[str, Any]
    names: tuple[str, ...] | None = None
    columns: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    takes_rest: bool = False
    instead: Mapping[str, str] = field(default_factory=dict)

    @property
    def takes_messages(self) -> bool:
        """Whether a call needs the conversation."""
        return self.names is not None and MESSAGES in self.names

    def __call__(
        self,
        prompt: str,
        response: str,
        answer: str | None,
        entry: Mapping[str, Any],
        messages: Sequence[Mapping[str, Any]] = (),
    ) -> Any:
        if self.names is None:
            return self.function(prompt, response, answer, entry, **self.options)
        given = dict(zip(NAMED, (prompt, response, answer, entry, messages), strict=True))
        arguments = dict(entry) if self.takes_rest else {}
        arguments |= {name: entry.get(name) for name in self.columns}
        arguments |= {name: entry[name] for name in self.optional if name in entry}
        names = (*self.names, *(GIVEN if self.takes_rest else ()))
        arguments |= {name: given[name] for name in names}
        return self.function(**(arguments | dict(self.options)))

    def told(self) -> dict[str, Any]:
        """Return what the rank needs to know of its calls, as JSON values."""
        return {
            "how": self.describe(),
            "columns": self.columns,
            "takes_messages": self.takes_messages,
        }

    def describe(self) -> str:
        """Description of its calls, in words."""
        if self.names is None:
            told = [
                f"; its {name!r} is the {what}, no column" for name, what in self.instead.items()
            ]
            return f"by position: {', '.join(GIVEN)}{''.join(told)}"
        parts = [*self.names, *self.columns, *self.optional]
        parts += ["**the rest of the row"] if self.takes_rest else []
        return f"by name: {', '.join(parts)}"


def caller_of(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    columns: Collection[str] | None,
) -> Caller:
    """Decide how to call a function: by name if all required parameters are in `NAMED` or columns
    of the row and it gets the response, else with the four arguments by position.

    Args:
        options: keyword arguments of the configuration; they win over columns.
        columns: columns of the rows; None: unknown, any name may be one.

    Raises:
        ValueError: neither is possible; the text says why and the fix, as the end of a line.
    """
    if inspect.isclass(function):
        raise ValueError("it is a class: name a function, or an object that can be called")
    if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
        raise ValueError(
            "it is `async`, and a call of it returns no number: write `def`, and asyncio.run inside"
        )
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # some functions of C libraries have no signature
        return Caller(function=function, options=options)
    parameters = list(signature.parameters.values())
    _check_options(parameters, options)
    by_name = _by_name(function, parameters, options, columns)
    if by_name is not None:
        return by_name
    if _takes_four(signature, options):
        places = zip(signature.parameters, GIVEN, strict=False)
        instead = {n: what for n, what in places if n != what and n in (columns or ())}
        return Caller(function=function, options=options, instead=instead)
    raise ValueError(_refusal(signature, parameters, options, columns))


def _check_options(parameters: Sequence[inspect.Parameter], options: Mapping[str, Any]) -> None:
    names = [p.name for p in parameters if p.kind in _BY_NAME]
    takes_rest = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    for name in options:
        if name in GIVEN:
            raise ValueError(f"its options have {name!r}, which every call is given: rename it")
        if name not in names and not takes_rest:
            raise ValueError(f"its options have {name!r}, and its parameters are {names}")


def _by_name(
    function: Callable[..., Any],
    parameters: Sequence[inspect.Parameter],
    options: Mapping[str, Any],
    columns: Collection[str] | None,
) -> Caller | None:
    """Caller by name; None: it cannot be called by name, or would not get the response."""
    takes_rest = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in _BY_NAME and p.name not in options]
    needed = [p.name for p in named if p.default is p.empty]
    first = [p.name for p in parameters if p.kind in _BY_POSITION]
    has_star = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    if has_star and tuple(first) == GIVEN[: len(first)] and set(needed) <= set(first):
        return None  # `*args` is for the others of the four
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
        return None
    if any(name not in NAMED and not _is_column(name, columns) for name in needed):
        return None
    names = [p.name for p in named]
    if not {"response", MESSAGES}.intersection(names) and not takes_rest:
        return None
    optional = [n for n in names if n not in NAMED and n not in needed]
    return Caller(
        function=function,
        options=options,
        names=tuple(name for name in names if name in NAMED),
        columns=tuple(name for name in needed if name not in NAMED),
        optional=tuple(name for name in optional if _is_column(name, columns)),
        takes_rest=takes_rest,
    )


def _is_column(name: str, columns: Collection[str] | None) -> bool:
    return columns is None or name in columns


def _takes_four(signature: inspect.Signature, options: Mapping[str, Any]) -> bool:
    """Whether it takes the four arguments by position: not if one of the four names is in another's
    place, nor if one of the first three parameters has another name and a default (an option).
    """
    try:
        signature.bind(*GIVEN, **options)
    except TypeError:
        return False
    first = [p for p in signature.parameters.values() if p.kind in _BY_POSITION]
    for place, (parameter, name) in enumerate(zip(first, GIVEN, strict=False)):
        if parameter.name in GIVEN and parameter.name != name:
            return False
        if parameter.default is not parameter.empty and parameter.name != name and place < 3:
            return False
    return True


def _refusal(
    signature: inspect.Signature,
    parameters: Sequence[inspect.Parameter],
    options: Mapping[str, Any],
    columns: Collection[str] | None,
) -> str:
    unknown = [
        p.name
        for p in parameters
        if p.kind in _BY_POSITION + _BY_NAME
        and p.default is p.empty
        and p.name not in (*NAMED, *options)
        and not _is_column(p.name, columns)
    ]
    shown = (
        ", ".join([*sorted(columns)[:SHOWN], *["..."] * (len(columns) > SHOWN)]) if columns else ""
    )
    what = "no parameter of it is `response` or `messages`"
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        what = "those before `/` cannot be given by name"
    elif unknown:
        what = (
            f"{', '.join(map(repr, unknown))} {'is' if len(unknown) == 1 else 'are'} neither one "
            f"of {', '.join(NAMED)} nor a column of the row ({shown or 'none'})"
        )
    batches = sorted(BATCHES.intersection(unknown))
    hint = f"; {batches[0]!r} is a batch elsewhere, here a call has one sample" if batches else ""
    return (
        f"it takes {signature}, and {what}{hint}: name its parameters so, or take those four by "
        f"position ({GUIDE})"
    )
