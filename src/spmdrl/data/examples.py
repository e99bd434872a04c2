"""Examples to train on: reading of rows, and reasons to leave them out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from spmdrl.data.identity import row_mark
from spmdrl.data.load_report import (
    MALFORMED,
    REPEATED,
    length_limit,
    not_in,
    tell,
    tell_of_keys,
    tell_of_options,
    tell_of_rewriting,
    tell_of_tools,
)
from spmdrl.data.row_problems import BadRow
from spmdrl.data.rows import Row, read_rows
from spmdrl.data.source import DataSource
from spmdrl.data.split import in_part
from spmdrl.observe.log import ALIKE

log = logging.getLogger(__name__)

T = TypeVar("T")

COLUMNS = ("response", "messages", "chosen", "rejected", "margin")
"""Columns other than the prompt's that `DataSource.columns` can name."""


EMPTY_RESPONSE = "with an empty response"
CALL_ALONE = "with a response that only calls tools, which the chat template does not write"
TOLD = 10
"""Number of malformed rows that are shown; the others are only counted."""
REPORTED = 256
"""Number of rows between two reports of progress."""

RowProgress = Callable[[int, int], None]
"""Called with the progress of loading: (rows done, rows); 0 rows if their number is unknown."""


def unreported(done: int, count: int) -> None:
    """Report to nobody."""


class Unusable(ValueError):
    """Reason to leave out a well-formed row: an empty response, say."""


def check_names(source: DataSource) -> None:
    """Raise ValueError if `columns` names one that no kind of example has."""
    unknown = sorted(set(source.columns) - set(COLUMNS))
    if unknown:
        raise ValueError(f"{source.key}.columns: {unknown[0]!r} is none of {COLUMNS}")


def has_prompts(source: DataSource, rows: Sequence[Row], responses: Sequence[str]) -> bool:
    """Whether the rows hold prompts: in their column, or in the responses' conversations."""
    if "messages" in source.columns:
        return True
    in_responses = any(isinstance(row.get(name), list) for row in rows for name in responses)
    return in_responses or any(row.has(source.prompt_column) for row in rows)


def check_part(source: DataSource, text: str) -> None:
    """Raise Unusable if an example with this opening is in another share."""
    if not in_part(text, source.share):
        raise Unusable(not_in(source.share))


@dataclass(frozen=True, kw_only=True)
class Example(Generic[T]):
    """Args:
    tokens: number of tokens of the longest item; of a pair, with the longer response.
    prompt_tokens: number of tokens of a pair's prompt; 0 for conversations.
    prompt: equal for examples with the same prompt; `unique` compares it.
    items: the items that the set holds: one, or several of a conversation whose earlier turns the
        chat template rewrites.
    """

    prompt: Hashable
    items: tuple[T, ...]
    tokens: int
    prompt_tokens: int = 0


def read_examples(
    source: DataSource,
    needed: Sequence[str],
    make: Callable[[Row], Example[T]],
    template: str | None,
    report: RowProgress,
) -> tuple[list[T], Mapping[str, int]]:
    """Read the items of all usable rows, and count by reason those left out (also logged).

    Args:
        needed: parts without whose columns no row can be used, as `columns` names them.
        make: makes an example of a row; raises `BadRow` or `Unusable`.
        template: text of the chat templates that `make` uses; None if it uses none.
        report: called with the progress.

    Raises:
        ValueError: the source cannot be read, lacks a column (those it has are named), has a bad
            row (file and line are named) while `on_bad_row` is `error`, or leaves no example.
    """
    check_names(source)
    rows = all_rows(source, seed=0, report=report)
    keys = {source.column(part): f"{source.key}.columns.{part}" for part in needed}
    if not has_prompts(source, rows, list(keys)):
        keys[source.prompt_column] = f"{source.key}.prompt_column"
    check_columns(source.source, keys, rows)
    tell_of_tools(source.source, rows, template)
    tell_of_options(source.source, source.key, source.chat_template_kwargs, template)
    tell_of_keys(source.source, rows, {source.prompt_column, *keys}, template)
    made: list[Example[T]] = []
    malformed: str | None = None
    left_out: Counter[str] = Counter()
    for row in reported(rows, report):
        try:
            made.append(_made(row, make))
        except BadRow as error:
            left_out[MALFORMED] += 1
            malformed = malformed or f"{row.place}: {error}"
            leave_out(row, error, source.on_bad_row, left_out[MALFORMED])
        except Unusable as error:
            left_out[str(error)] += 1
    used = _fitting(made, source, left_out)
    tell(
        source.source,
        source.key,
        num_rows=len(rows),
        num_used=len(used),
        left_out=left_out,
        longest=max((example.tokens for example in made), default=0),
        malformed=malformed,
    )
    tell_of_rewriting(source.source, [len(example.items) for example in used])
    return [item for example in used for item in example.items], dict(left_out)


def _fitting(
    made: Sequence[Example[T]], source: DataSource, left_out: Counter[str]
) -> list[Example[T]]:
    """List the examples that the limit lets through, and count by reason those left out."""
    limit = length_limit([example.tokens for example in made], source)
    used, seen = list[Example[T]](), set[Hashable]()
    for example in made:
        if example.prompt_tokens >= limit.tokens:
            left_out[f"whose prompt leaves no room within {limit.setting}"] += 1
        elif example.tokens > limit.tokens:
            left_out[limit.reason] += 1
        elif source.unique and example.prompt in seen:
            left_out[REPEATED] += 1
        else:
            seen.add(example.prompt)
            used.append(example)
    return used


def all_rows(source: DataSource, *, seed: int, report: RowProgress) -> list[Row]:
    """Read every row of a source. ValueError: see `data.rows.read_rows`."""
    rows = []
    for row in read_rows(source.source, parameters=source.parameters, size=source.size, seed=seed):
        rows.append(row)
        if len(rows) % REPORTED == 0:
            report(len(rows), 0)
    return rows


def reported(rows: Sequence[Row], report: RowProgress) -> Iterator[Row]:
    """Yield the rows, and report how many are done."""
    for number, row in enumerate(rows):
        if number % REPORTED == 0:
            report(number, len(rows))
        yield row


def leave_out(row: Row, error: BadRow, on_bad_row: Literal["error", "skip"], number: int) -> None:
    """Log a bad row, if it is one of the first; ValueError with its place if it is an `error`.

    Args:
        number: number of bad rows so far, including this one.
    """
    if on_bad_row == "error":
        raise ValueError(f"{row.place}: {error} (on_bad_row: skip leaves it out)") from error
    if number <= TOLD:
        more = " (more like these are only counted)" if number == TOLD else ""
        log.warning("%s: %s; left out%s", row.place, error, more, extra=ALIKE)


def _made(row: Row, make: Callable[[Row], Example[T]]) -> Example[T]:
    if row.problem is not None:
        raise BadRow(row.problem)
    return make(row)


def check_columns(source: str, needed: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Raise ValueError that names the columns of `needed` (column -> key that names it) which no
    row has: that is a wrong setting, not a bad row.
    """
    there = sorted({name for row in rows for name in row.values})
    keys = {name: key for name, key in needed.items() if not any(row.has(name) for row in rows)}
    if there and keys:
        missing = ", ".join(f"no column {name!r} ({key})" for name, key in keys.items())
        which = "the one that is" if len(keys) == 1 else "those that are"
        # a reward may need nothing but the response
        has_none = any(key.endswith(".answer_column") for key in keys.values())
        or_none = ", or null as answer_column for rows without one" if has_none else ""
        raise ValueError(
            f"data source {source!r} has {missing}; it has {there}: name {which} meant{or_none}"
        )


def read_mark(row: Row) -> bytes:
    """Digest that tells a row from others. BadRow: a value cannot be written as JSON."""
    try:
        return row_mark(row.values)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"it holds what cannot be written as JSON: {error}") from error
