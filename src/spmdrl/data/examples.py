"""Examples to train on: reading of rows, and reasons to leave them out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, Literal, Protocol, TypeVar

from spmdrl.data.doubts import tell_of_keys, tell_of_tools
from spmdrl.data.identity import row_mark
from spmdrl.data.load_report import MALFORMED, REPEATED, length_limit, not_in, tell
from spmdrl.data.messages import BadRow, check_prompt_settings
from spmdrl.data.rows import Row, read_rows
from spmdrl.data.split import in_part, read_part
from spmdrl.observe.log import ALIKE

log = logging.getLogger(__name__)

T = TypeVar("T")

COLUMNS = ("response", "messages", "chosen", "rejected", "margin")
"""Columns other than the prompt's that `ExampleSource.columns` can name."""


EMPTY_RESPONSE = "with an empty response"
CALL_ALONE = "with a response that calls tools and says nothing, which is not learned from"
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


@dataclass(frozen=True, kw_only=True)
class ExampleSource:
    """Source of examples, and settings by which a row becomes one.

    Args:
        source: a .jsonl, .json (an object per line) or .parquet file, or `hub:NAME`. Names of
            columns may be those of fields (`extra.question`).
        parameters: arguments of `datasets.load_dataset` for `hub:`.
        size: maximum number of rows; None: all.
        prompt_column: column of the prompt: a text, or a list of messages.
        columns: actual names of the columns of `COLUMNS`, if they differ.
        template: text in which a prompt that is a text replaces `{prompt}`.
        system: system prompt; None: the chat template decides.
        chat: True renders by the tokenizer's chat template, False takes raw text.
        max_tokens: longer examples are left out, counted and logged; None: no limit.
        keep_shortest: share of the examples to keep, the shortest; longer ones are left out,
            counted and logged, even if `max_tokens` allows them.
        on_bad_row: `error` refuses a malformed row, `skip` counts, logs and leaves it out.
        unique: leave out examples whose prompt has occurred before.
        share: `all`, `2/3` (the second of three disjoint shares) or `2-3/4`, by prompt.
        now: the time that a chat template is given.
        key: key of the section with these settings, for messages.

    Raises:
        ValueError: an unknown column, a template without `{prompt}`, a malformed share, or a system
            prompt for raw text.
    """

    source: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None
    prompt_column: str = "prompt"
    columns: Mapping[str, str] = field(default_factory=dict)
    template: str = "{prompt}"
    system: str | None = None
    chat: bool = True
    max_tokens: int | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    unique: bool = False
    share: str = "all"
    keep_shortest: str = "100%"
    key: str = "data.train"
    now: datetime = field(default_factory=datetime.now, compare=False)

    def __post_init__(self) -> None:
        check_prompt_settings(self)
        unknown = sorted(set(self.columns) - set(COLUMNS))
        if unknown:
            raise ValueError(f"columns={dict(self.columns)}: {unknown[0]!r} is none of {COLUMNS}")
        read_part(self.share)

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    def column(self, name: str) -> str:
        return self.columns.get(name, name)

    def has_prompts(self, rows: Sequence[Row], responses: Sequence[str]) -> bool:
        """Whether the rows hold prompts: in their column, or in the responses' conversations."""
        if "messages" in self.columns:
            return True
        in_responses = any(isinstance(row.get(name), list) for row in rows for name in responses)
        return in_responses or any(row.has(self.prompt_column) for row in rows)

    def check_part(self, text: str) -> None:
        """Raise Unusable if an example with this opening is in another share."""
        if not in_part(text, self.share):
            raise Unusable(not_in(self.share))


@dataclass(frozen=True, kw_only=True)
class Example(Generic[T]):
    """Args:
    tokens: number of tokens of the whole example; of a pair, with the longer response.
    prompt_tokens: number of tokens of a pair's prompt; 0 for conversations.
    prompt: equal for examples with the same prompt; `unique` compares it.
    item: the item that the set holds.
    """

    prompt: Hashable
    item: T
    tokens: int
    prompt_tokens: int = 0


def read_examples(
    source: ExampleSource,
    needed: Sequence[str],
    make: Callable[[Row], Example[T]],
    template: str | None,
    report: RowProgress,
) -> tuple[list[T], Mapping[str, int]]:
    """Read the items of all usable rows, and count by reason those left out (also logged).

    Args:
        needed: columns without which no row can be used.
        make: makes an example of a row; raises `BadRow` or `Unusable`.
        template: text of the chat templates that `make` uses; None if it uses none.
        report: called with the progress.

    Raises:
        ValueError: the source cannot be read, lacks a column (those it has are named), has a bad
            row (file and line are named) while `on_bad_row` is `error`, or leaves no example.
    """
    rows = all_rows(source, seed=0, report=report)
    keys = dict.fromkeys(needed, f"{source.key}.prompt_column or {source.key}.columns")
    if not source.has_prompts(rows, needed):
        keys[source.prompt_column] = f"{source.key}.prompt_column"
    check_columns(source.source, keys, rows)
    tell_of_tools(source.source, rows, template)
    tell_of_keys(source.source, rows, {source.prompt_column, *needed}, template)
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
    limit = length_limit([example.tokens for example in made], source)
    items: list[T] = []
    seen: set[Hashable] = set()
    for example in made:
        if limit is not None and example.prompt_tokens >= limit.tokens:
            left_out[f"whose prompt leaves no room within {limit.setting}"] += 1
        elif limit is not None and example.tokens > limit.tokens:
            left_out[limit.reason] += 1
        elif source.unique and example.prompt in seen:
            left_out[REPEATED] += 1
        else:
            seen.add(example.prompt)
            items.append(example.item)
    tell(
        source.source,
        source.key,
        num_rows=len(rows),
        num_used=len(items),
        left_out=left_out,
        longest=max((example.tokens for example in made), default=0),
        malformed=malformed,
    )
    return items, dict(left_out)


class SourceSettings(Protocol):
    """Settings that determine the rows of a source."""

    @property
    def source(self) -> str: ...

    @property
    def parameters(self) -> Mapping[str, Any]: ...

    @property
    def size(self) -> int | None: ...


def all_rows(source: SourceSettings, *, seed: int, report: RowProgress) -> list[Row]:
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
    """Raise ValueError if no row has a column of `needed` (column -> key that names it): that is a
    wrong setting, not a bad row.
    """
    there = sorted({name for row in rows for name in row.values})
    for name, key in needed.items():
        if there and not any(row.has(name) for row in rows):
            raise ValueError(
                f"data source {source!r} has no column {name!r} ({key}); it has {there}: name the "
                "one that is meant"
            )


def read_mark(row: Row) -> bytes:
    """Digest that tells a row from others. BadRow: a value cannot be written as JSON."""
    try:
        return row_mark(row.values)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"it holds what cannot be written as JSON: {error}") from error
