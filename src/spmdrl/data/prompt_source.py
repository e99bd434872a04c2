"""`PromptSource`: the source of prompts as a value, and the columns that its rows need."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from spmdrl.data.messages import check_prompt_settings
from spmdrl.data.rows import Row, is_conversation
from spmdrl.data.split import read_part


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """Source of prompts, and settings by which a row becomes one.

    Args:
        source: a .jsonl, .json (an object per line) or .parquet file, `hub:NAME`, or
            `reasoning_gym:TASK`. Names of columns may be those of fields
            (`reward_model.ground_truth`).
        parameters: the task's parameters; arguments of `datasets.load_dataset` for `hub:`.
        size: maximum number of rows; None: all. A reasoning_gym task needs it.
        seed: seed of a reasoning_gym task.
        prompt_column: column of the question (a reasoning_gym task's is `question`): a text, or a
            list of messages.
        answer_column: column of the reference answer (a task's is `answer`); None: there is none.
            If it holds conversations, like preference data, the last message is the answer, and any
            messages before it are the prompt.
        messages_column: column of a list of `{role, content}`, instead of the prompt column.
        answer_pattern: regular expression searched in the answer; its group 1 (or the whole match)
            is the answer. GSM8K: `#### (.+)`.
        template: text in which a question that is a text replaces `{prompt}`.
        system: system prompt; None: the chat template decides (some have their own).
        chat: True renders by the tokenizer's chat template, False takes raw text.
        max_prompt_tokens: longer prompts are left out, counted and logged; None: no limit.
        keep_shortest: share of the prompts to keep, the shortest; longer ones are left out, counted
            and logged, even if `max_prompt_tokens` allows them.
        on_bad_row: `error` refuses an unusable row, `skip` counts, logs and leaves it out.
        unique: leave out prompts that have occurred before.
        share: `all`, `2/3` (the second of three disjoint shares) or `2-3/4`, by prompt.
        now: the time that a chat template is given.
        key: key of the section with these settings, for messages.
    """

    source: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None
    seed: int = 0
    prompt_column: str = "prompt"
    answer_column: str | None = None
    messages_column: str | None = None
    answer_pattern: str | None = None
    template: str = "{prompt}"
    system: str | None = None
    chat: bool = True
    max_prompt_tokens: int | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    unique: bool = False
    share: str = "all"
    keep_shortest: str = "100%"
    key: str = "data.train"
    now: datetime = field(default_factory=datetime.now, compare=False)

    def __post_init__(self) -> None:
        read_part(self.share)
        check_prompt_settings(self)
        if self.answer_pattern is not None:
            try:
                re.compile(self.answer_pattern)
            except re.error as error:
                raise ValueError(f"answer_pattern={self.answer_pattern!r}: {error}") from error
        if self.messages_column is not None and (self.template != "{prompt}" or not self.chat):
            raise ValueError(
                f"messages_column={self.messages_column!r} takes whole conversations: it goes "
                f"with chat=True (not {self.chat}) and no template (not {self.template!r})"
            )

    @property
    def limit(self) -> int | None:
        return self.max_prompt_tokens


def with_task_columns(source: PromptSource) -> PromptSource:
    """Set the columns that all reasoning_gym tasks have, if the source is one."""
    if not source.source.startswith("reasoning_gym:"):
        return source
    columns = {"prompt_column": "question", "answer_column": "answer", "messages_column": None}
    return PromptSource(**{**vars(source), **columns})


def needed_columns(source: PromptSource, rows: Sequence[Row]) -> dict[str, str]:
    """Needed column -> key that names it. Answers that are conversations hold the prompts."""
    needed = {source.prompt_column: f"{source.key}.prompt_column"}
    column = source.answer_column
    if source.messages_column is not None:
        needed = {source.messages_column: f"{source.key}.columns.messages"}
    elif column is not None and any(is_conversation(row.get(column)) for row in rows):
        needed = {}
    return needed | ({} if column is None else {column: f"{source.key}.answer_column"})
