"""Prompts: a source's rows become messages and tokens."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

from spmdrl.batch import Batch, from_rows
from spmdrl.config.turns import turns_key
from spmdrl.data.chat import Chat, Tokenizer, check_chat_template, templates, writes_tools
from spmdrl.data.examples import (
    RowProgress,
    all_rows,
    check_columns,
    leave_out,
    read_mark,
    reported,
    unreported,
)
from spmdrl.data.load_report import (
    LoadReport,
    joined,
    length_limit,
    tell,
    tell_of_keys,
    tell_of_options,
    tell_of_rows,
    tell_of_tools,
)
from spmdrl.data.messages import (
    answer_text,
    checked_messages,
    opening,
    read_prompt,
    read_responses,
    read_tools,
    same_column,
    waiting,
    with_system,
)
from spmdrl.data.plain_text import NO_MARK
from spmdrl.data.row_problems import BadRow
from spmdrl.data.rows import Row, is_conversation, one_line
from spmdrl.data.source import DataSource, check_whole, needed_columns, with_task_columns
from spmdrl.data.split import in_part

ENCODE_ROWS = 1024  # texts handed to the tokenizer at a time


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt.

    Args:
        prompt_id: number of its row in the source, whatever rows were left out.
        text: the last user message, as a reward function gets it.
        messages: the conversation; empty for raw text.
        tokens: token ids, the chat template's generation prompt included.
        answer: the reference answer, or None.
        entry: all columns of the row, for reward functions.
        tools: the tools given to the chat template.
        turns: `turns_key` of the turns that samples take; "" for one.
        options: further variables given to it.
    """

    prompt_id: int
    text: str
    messages: tuple[Mapping[str, Any], ...]
    tokens: tuple[int, ...]
    answer: str | None
    entry: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]] = ()
    turns: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Draft:
    row: Row
    opening: str
    text: str
    messages: tuple[Mapping[str, Any], ...]
    answer: str | None
    tools: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]
    mark: bytes
    turns: str


class PromptSet(Sequence[Prompt]):
    """Prompts of a source, in its order. Token ids are stored packed (4 bytes each)."""

    def __init__(
        self,
        drafts: Sequence[_Draft],
        tokens: NDArray[np.int32],  # [T], the prompts' ids laid end to end
        lengths: NDArray[np.int64],  # [number of prompts]
        report: LoadReport,
    ) -> None:
        self.report = report
        self.lengths = lengths
        self._drafts = drafts
        self._tokens = tokens
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self._drafts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...

    def __getitem__(self, index: int | slice) -> Prompt | PromptSet:
        if isinstance(index, slice):
            return self.subset(range(*index.indices(len(self))))
        draft = self._drafts[index]
        return Prompt(
            prompt_id=draft.row.index,
            text=draft.text,
            messages=draft.messages,
            tokens=tuple(self._ids(index).tolist()),
            answer=draft.answer,
            entry=draft.row.values,
            tools=draft.tools,
            turns=draft.turns,
            options=draft.options,
        )

    @property
    def takes_turns(self) -> bool:
        """Whether samples for some of the prompts take several turns."""
        return any(draft.turns for draft in self._drafts)

    def texts(self) -> list[str]:
        """Texts of the prompts."""
        return [draft.text for draft in self._drafts]

    def openings(self) -> list[str]:
        """First user messages, before any template; they decide the share of a prompt."""
        return [draft.opening for draft in self._drafts]

    def entries(self) -> Iterator[Mapping[str, Any]]:
        """Columns of the prompts' rows."""
        return (draft.row.values for draft in self._drafts)

    def identities(self) -> Sequence[Hashable]:
        return [(draft.opening, draft.text) for draft in self._drafts]

    def marks(self) -> list[bytes]:
        return [draft.mark for draft in self._drafts]

    def ids(self) -> Iterator[NDArray[np.int32]]:
        return (self._ids(index) for index in range(len(self)))

    def rows(self, indices: Sequence[int], first_id: int) -> Batch:
        """Make rows: `tokens`, `prompt_ids` from `first_id` on, and the Python column `prompt`."""
        prompts = [self[i] for i in indices]
        return from_rows(
            [prompt.tokens for prompt in prompts],
            rows={"prompt_ids": torch.arange(first_id, first_id + len(prompts))},
            objects={"prompt": prompts},
        )

    def questions(self) -> list[str]:
        """Text by which a question is told from others: its text; with several turns, the first
        user message; in a reasoning_gym task that records the `expression` it asks for, that
        expression, since the words around it vary ("What is 2 + 3?", "Compute 2 + 3.").
        """
        return [_question(draft) for draft in self._drafts]

    def subset(self, indices: Sequence[int]) -> PromptSet:
        """Prompts at these indices, in their order."""
        return PromptSet(
            [self._drafts[i] for i in indices],
            np.concatenate([np.empty(0, np.int32), *(self._ids(i) for i in indices)]),
            self.lengths[np.asarray(indices, dtype=np.int64)],
            self.report,
        )

    def with_ids(self, ids: Sequence[Sequence[int]]) -> PromptSet:
        """The same prompts with other token ids, one sequence for each."""
        lengths = np.asarray([len(own) for own in ids], dtype=np.int64)
        tokens = np.asarray([token for own in ids for token in own], dtype=np.int32)
        return PromptSet(self._drafts, tokens, lengths, self.report)

    def _ids(self, index: int) -> NDArray[np.int32]:
        end = self._ends[index]
        return self._tokens[end - self.lengths[index] : end]


def join_prompts(sets: Sequence[PromptSet]) -> PromptSet:
    """Join the prompts of all sets, one set after the other."""
    return PromptSet(
        [draft for part in sets for draft in part._drafts],
        np.concatenate([np.empty(0, np.int32), *(part._tokens for part in sets)]),
        np.concatenate([np.empty(0, np.int64), *(part.lengths for part in sets)]),
        joined([part.report for part in sets]),
    )


def load_prompts(
    source: DataSource, tokenizer: Tokenizer, report: RowProgress = unreported
) -> PromptSet:
    """Read, check, render and tokenise all prompts of a source.

    Args:
        report: called with the progress.

    Raises:
        ValueError: the source cannot be read, lacks a column (those it has are named), holds a bad
            row (file and line are named) while `on_bad_row` is `error`, or leaves no prompt.
    """
    check_whole(source)
    check_chat_template(source.source, tokenizer, chat=source.chat)
    source = with_task_columns(source)
    rows = all_rows(source, seed=source.seed, report=report)
    check_columns(source.source, needed_columns(source, rows), rows)
    has_tools = source.chat and writes_tools(tokenizer)
    template = templates(tokenizer) if source.chat else None
    tell_of_tools(source.source, rows, template)
    tell_of_options(source.source, source.key, source.chat_template_kwargs, template)
    tell_of_keys(source.source, rows, needed_columns(source, rows), template)
    found = _read_drafts(rows, source, tokenizer, has_tools=has_tools, report=report)
    drafts, texts = found.drafts, found.texts
    unwritten = [d.row.place for d, t in zip(drafts, texts, strict=True) if d.text.strip() not in t]
    empty = [d.row.place for d in drafts if d.answer is not None and not d.answer.strip()]
    for doubt, places in (
        ("the chat template does not write the question as it is", unwritten),
        # an empty response would then be right
        ("the answer is empty", empty),
    ):
        tell_of_rows(source.source, doubt, places, len(drafts))
    lengths, tokens = _encode(found, source, tokenizer, report)
    limit = length_limit(lengths.tolist(), source)
    fits = [i for i, length in enumerate(lengths) if length <= limit.tokens]
    done = LoadReport(
        num_rows=len(rows),
        num_bad=found.num_bad,
        num_long=len(drafts) - len(fits),
        longest=int(lengths.max(initial=0)),
        num_repeated=found.num_repeated,
        num_elsewhere=found.num_elsewhere,
    )
    left_out = done.left_out(source.share, limit)
    tell(
        source.source,
        source.key,
        num_rows=len(rows),
        num_used=len(fits),
        left_out=left_out,
        longest=done.longest,
        malformed=found.malformed,
    )
    return PromptSet(drafts, tokens, lengths, done).subset(fits)


@dataclass(kw_only=True)
class _Drafts:
    """Drafts of a source's rows with their rendered texts, and how many rows gave none."""

    drafts: list[_Draft] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    spelled: dict[int, list[int]] = field(default_factory=dict)
    """Ids of the texts in which a content spells an added token, by their place."""
    num_bad: int = 0
    num_repeated: int = 0
    num_elsewhere: int = 0
    malformed: str | None = None
    """The first bad row's place and problem."""


def _read_drafts(
    rows: Sequence[Row],
    source: DataSource,
    tokenizer: Tokenizer,
    *,
    has_tools: bool,
    report: RowProgress,
) -> _Drafts:
    found = _Drafts()
    seen: set[str] = set()
    chat = Chat(tokenizer=tokenizer, now=source.now, options=source.chat_template_kwargs)
    for row in reported(rows, report):
        try:
            draft = _draft(row, source, has_tools=has_tools)
            is_here = in_part(draft.opening, source.share)
            text, ids = _render(draft, chat) if is_here and source.chat else (draft.text, None)
        except BadRow as error:
            found.num_bad += 1
            found.malformed = found.malformed or f"{row.place}: {error}"
            leave_out(row, error, source.on_bad_row, found.num_bad)
            continue
        if not is_here:
            found.num_elsewhere += 1
        elif source.unique and text in seen:
            found.num_repeated += 1
        else:
            seen.add(text)
            if ids is not None:
                found.spelled[len(found.texts)] = ids
            found.texts.append(text)
            found.drafts.append(draft)
    return found


def _draft(row: Row, source: DataSource, *, has_tools: bool) -> _Draft:
    if row.problem is not None:
        raise BadRow(row.problem)
    answer = None if source.answer_column is None else row.get(source.answer_column)
    if "messages" in source.columns:
        column = source.columns["messages"]
        given = waiting(checked_messages(row.get(column), column, source), column)
        first, messages = opening(given), with_system(given, source)
    elif source.answer_column is not None and is_conversation(answer):
        asked = read_responses(row, [source.answer_column], source)
        first, messages, answer = asked.text, list(asked.messages), asked.responses[0]
    else:
        value = row.get(source.prompt_column)
        if isinstance(value, str) and source.answer_column == source.prompt_column:
            raise BadRow(same_column(source.prompt_column))
        messages = read_prompt(value, source.prompt_column, source)
        first = value if isinstance(value, str) else opening(messages)
    if source.answer_column is not None:
        answer = answer_text(answer, source.answer_column, source.answer_pattern)
    return _Draft(
        row=row,
        opening=first,
        text=next(m["content"] for m in reversed(messages) if m["role"] == "user"),
        messages=tuple(messages) if source.chat else (),
        answer=answer,
        tools=read_tools(row) if has_tools else (),
        options=source.chat_template_kwargs,
        mark=read_mark(row),
        turns=turns_key(source.turns or None, source.chat_template_kwargs),
    )


def _question(draft: _Draft) -> str:
    if "reasoning_gym" in draft.row.values:
        expression = draft.row.values["metadata"].get("expression")
        if isinstance(expression, str):
            return expression
    # the last turn of many conversations is the same: "Go on."
    is_one_turn = sum(message["role"] == "user" for message in draft.messages) <= 1
    return draft.text if is_one_turn else draft.opening


def _render(draft: _Draft, chat: Chat) -> tuple[str, list[int] | None]:
    """Render a prompt; its ids too if a content spells an added token."""
    talk = chat.prepare(draft.messages, draft.tools)
    text = chat.render(talk, prompt=True)
    if not text:
        raise BadRow("the chat template writes nothing for it")
    if talk.mark is NO_MARK:
        return text, None
    return talk.mark.removed(text), chat.ids(text, talk.mark)


def _encode(
    found: _Drafts, source: DataSource, tokenizer: Tokenizer, report: RowProgress
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Encode texts, raw ones with special tokens: lengths `[number of texts]` and ids `[T]`."""
    lengths: list[int] = []
    packed = [np.empty(0, np.int32)]
    for first in range(0, len(found.texts), ENCODE_ROWS):
        report(first, len(found.texts))
        some = found.texts[first : first + ENCODE_ROWS]
        with one_line(f"data source {source.source!r}: the tokenizer refuses its prompts"):
            rows = tokenizer(some, add_special_tokens=not source.chat)["input_ids"]
        rows = [found.spelled.get(first + place, row) for place, row in enumerate(rows)]
        lengths += [len(row) for row in rows]
        packed += [np.asarray(row, np.int32) for row in rows]
    return np.asarray(lengths, np.int64), np.concatenate(packed)
