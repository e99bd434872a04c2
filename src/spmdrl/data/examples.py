"""Examples to learn from: how rows are read, and what messages a row holds."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from spmdrl.data.rows import Row, read_rows
from spmdrl.data.split import in_part, read_part

log = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]
Item = TypeVar("Item")

COLUMNS = ("response", "messages", "chosen", "rejected", "margin")
"""What `ExampleSource.columns` can name, beside the prompt."""


EMPTY_ANSWER = "with an empty answer"


class BadRow(ValueError):
    """What is wrong with one row."""


class Unusable(ValueError):
    """Why a well-formed row is left out: too long, say."""


@dataclass(frozen=True, kw_only=True)
class ExampleSource:
    """Where examples come from and how a row becomes one.

    Args:
        source: a .jsonl, .json (an object per line) or .parquet file, or `hub:NAME`.
        parameters: arguments of `datasets.load_dataset` for `hub:`.
        size: rows at most; None: all.
        prompt_column: column of the prompt: a text, or a list of messages.
        columns: names of the columns of `COLUMNS`, where they differ.
        template: text around a prompt that is a text, which replaces `{prompt}`.
        system: system prompt; None: what the chat template does without one.
        chat: through the tokenizer's chat template, or as raw text.
        max_tokens: longer examples are left out, counted and logged; None: no limit.
        on_bad_row: what a malformed row is: an `error`, or counted, logged and left out.
        unique: leave out examples whose prompt was there before.
        part: `all`, `2/3`: the second of three disjoint parts, or `2-3/4`, by prompt.

    Raises:
        ValueError: an unknown column, a template without `{prompt}`, a malformed part, or settings
            that raw text cannot follow.
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
    part: str = "all"

    def __post_init__(self) -> None:
        check_prompt_settings(self)
        unknown = sorted(set(self.columns) - set(COLUMNS))
        if unknown:
            raise ValueError(f"columns={dict(self.columns)}: {unknown[0]!r} is none of {COLUMNS}")
        read_part(self.part)

    def column(self, name: str) -> str:
        return self.columns.get(name, name)


class PromptSettings(Protocol):
    """How prompts are read, alike in all kinds of data."""

    @property
    def prompt_column(self) -> str: ...

    @property
    def template(self) -> str: ...

    @property
    def system(self) -> str | None: ...

    @property
    def chat(self) -> bool: ...


def check_prompt_settings(settings: PromptSettings) -> None:
    """ValueError for a template without its place, or a system prompt without messages."""
    if "{prompt}" not in settings.template:
        raise ValueError(f"template={settings.template!r} must contain {{prompt}}")
    if settings.system is not None and not settings.chat:
        raise ValueError(f"system={settings.system!r} needs chat=True: raw text has no messages")


@dataclass(frozen=True, kw_only=True)
class Example(Generic[Item]):
    """Args:
    text: what the user says first, before any template: parts and held-out sets go by it.
    prompt: equal for examples with the same prompt: `unique` goes by it.
    item: what the set holds.
    """

    text: str
    prompt: Hashable
    item: Item


def read_examples(
    source: ExampleSource,
    needed: Sequence[str],
    make: Callable[[Row], Example[Item]],
) -> tuple[list[Item], Mapping[str, int]]:
    """The items of all rows that can be used; how many are left out, by reason (also logged).

    Args:
        needed: columns without which no row can be used.
        make: raises `BadRow` or `Unusable`.

    Raises:
        ValueError: the source cannot be read, lacks a column (those it has are named), has a bad
            row (file and line are named) where `on_bad_row` is `error`, or leaves no example.
    """
    rows = list(read_rows(source.source, parameters=source.parameters, size=source.size, seed=0))
    _check_columns(source, needed, rows)
    items: list[Item] = []
    seen: set[Hashable] = set()
    left_out: Counter[str] = Counter()
    for row in rows:
        try:
            example = _made(row, make)
        except BadRow as error:
            if source.on_bad_row == "error":
                raise ValueError(
                    f"{row.place}: {error} (on_bad_row: skip leaves it out)"
                ) from error
            left_out["malformed"] += 1
            log.warning("%s: %s; left out", row.place, error)
            continue
        except Unusable as error:
            left_out[str(error)] += 1
            continue
        if not in_part(example.text, source.part):
            left_out[f"not in part {source.part}"] += 1
        elif source.unique and example.prompt in seen:
            left_out["with a prompt that was there before"] += 1
        else:
            seen.add(example.prompt)
            items.append(example.item)
    reasons = ", ".join(f"{count} {why}" for why, count in sorted(left_out.items()))
    if not items:
        raise ValueError(
            f"data source {source.source!r} leaves no example of {len(rows)} rows"
            + (f": {reasons}" if reasons else "")
        )
    if reasons:
        log.warning("%s: of %d rows are left out: %s", source.source, len(rows), reasons)
    return items, dict(left_out)


def _made(row: Row, make: Callable[[Row], Example[Item]]) -> Example[Item]:
    if row.problem is not None:
        raise BadRow(row.problem)
    return make(row)


def _check_columns(source: ExampleSource, needed: Sequence[str], rows: Sequence[Row]) -> None:
    """A column that no row has is a wrong setting, not a bad row."""
    there = {name for row in rows for name in row.values}
    for name in needed:
        if there and name not in there:
            raise ValueError(
                f"data source {source.source!r} has no column {name!r}; it has {sorted(there)} "
                "(prompt_column and columns say which are read)"
            )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Args:
    text: what the user says first, before any template.
    messages: the conversation up to the answers (of raw text: one message).
    answers: one of each column asked for.
    """

    text: str
    messages: Messages
    answers: tuple[str, ...]


def read_answers(row: Row, columns: Sequence[str], settings: PromptSettings) -> Asked:
    """A row's prompt, and the answers in some columns.

    An answer is a text, or a conversation of which it is the last message. What precedes it there
    is the prompt, the same in all columns; the prompt's own column may then be missing.

    Raises:
        BadRow: an answer or the prompt is missing, or columns disagree about the prompt.
    """
    answers: list[str] = []
    contexts: list[Messages] = []
    for column in columns:
        value = row.values.get(column)
        if isinstance(value, str):
            answers.append(value)
            continue
        if not isinstance(value, Sequence):
            raise BadRow(f"column {column!r} holds no text and no conversation but {value!r}")
        context, answer = ending_in_answer(value, column, settings)
        answers.append(answer)
        contexts += [context] if context else []
    column = settings.prompt_column
    given = row.values.get(column)
    if not contexts:
        if column not in row.values:
            raise BadRow(f"there is no column {column!r} for the prompt in {sorted(row.values)}")
        prompt = read_prompt(given, column, settings)
        text = given if isinstance(given, str) else opening(prompt)
        return Asked(text=text, messages=prompt, answers=tuple(answers))
    first = contexts[0]
    if any(prompt_key(context) != prompt_key(first) for context in contexts):
        raise BadRow("the conversations differ before their last answer")
    waiting(first, columns[0])
    if column not in columns and given is not None:
        messages = _with_given(first, given, settings)
    else:
        messages = with_system(first, settings)
    return Asked(text=opening(first), messages=messages, answers=tuple(answers))


def _with_given(context: Messages, given: Any, settings: PromptSettings) -> Messages:
    """What precedes the answers, checked against the prompt's column; a prompt that is one text
    gets its template.
    """
    column = settings.prompt_column
    if not isinstance(given, str):
        if prompt_key(checked_messages(given, column, settings)) != prompt_key(context):
            raise BadRow(f"column {column!r} is not what precedes the answers")
        return with_system(context, settings)
    users = [m["content"] for m in context if m["role"] == "user"]
    if given not in users:
        raise BadRow(
            f"column {column!r} is no message of the user before the answers, but {given!r}: where "
            "they are whole conversations, prompt_column can be their column"
        )
    if len(users) > 1:
        return with_system(context, settings)
    asked = {"role": "user", "content": settings.template.replace("{prompt}", given)}
    return with_system([asked if m["role"] == "user" else m for m in context], settings)


def read_prompt(value: Any, column: str, settings: PromptSettings) -> list[Mapping[str, Any]]:
    """The conversation that a prompt's column holds (a text is one user message).

    Raises:
        BadRow: it is neither a text nor messages that wait for an answer.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        return with_system(waiting(checked_messages(value, column, settings), column), settings)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"column {column!r} holds no text but {value!r}")
    # Not str.format: prompts and templates are full of braces.
    text = settings.template.replace("{prompt}", value)
    return with_system([{"role": "user", "content": text}], settings)


def checked_messages(value: Any, column: str, settings: PromptSettings) -> list[Mapping[str, Any]]:
    """A list of `{role, content}`, as it stands in a column. BadRow for anything else."""
    messages = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    for message in messages:
        parts = message if isinstance(message, Mapping) else {}
        if not isinstance(parts.get("role"), str) or not isinstance(parts.get("content"), str):
            raise BadRow(f"column {column!r}: {message!r} is no message with role and content")
    if not messages:
        raise BadRow(f"column {column!r} holds no conversation but {value!r}")
    if not settings.chat:
        raise BadRow(f"column {column!r} holds messages, which need chat=True")
    return messages


def waiting(messages: Messages, column: str) -> list[Mapping[str, Any]]:
    """The messages; BadRow unless they wait for an answer to a user."""
    if not any(m["role"] == "user" for m in messages) or messages[-1]["role"] == "assistant":
        raise BadRow(
            f"column {column!r} holds no conversation that waits for an answer: {list(messages)!r}"
        )
    return list(messages)


def ending_in_answer(value: Any, column: str, settings: PromptSettings) -> tuple[Messages, str]:
    """A conversation as what stands before its last answer, and that answer.

    Raises:
        BadRow: it does not end with an answer.
    """
    messages = checked_messages(value, column, settings)
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"column {column!r} does not end with an assistant message")
    return messages[:-1], str(messages[-1]["content"])


def with_system(messages: Messages, settings: PromptSettings) -> list[Mapping[str, Any]]:
    """With the settings' system prompt in front, unless the messages bring their own."""
    if settings.system is not None and messages[0]["role"] != "system":
        return [{"role": "system", "content": settings.system}, *messages]
    return list(messages)


def opening(messages: Messages) -> str:
    """What the user says first: the same in all turns and continuations of a conversation."""
    return str(next((m for m in messages if m["role"] == "user"), messages[0])["content"])


def prompt_key(messages: Messages) -> Hashable:
    """Equal for equal prompts."""
    return tuple((m["role"], m["content"]) for m in messages)
