"""Where prompts come from, as a value, and which columns its rows need."""

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
    """Where prompts come from and how a row becomes one.

    Args:
        source: a .jsonl, .json (an object per line) or .parquet file, `hub:NAME`, or
            `reasoning_gym:TASK`. Names of columns may be those of fields
            (`reward_model.ground_truth`).
        parameters: the task's parameters; arguments of `datasets.load_dataset` for `hub:`.
        size: rows at most; None: all. A reasoning_gym task needs it.
        seed: of a reasoning_gym task.
        prompt_column: column of the question (a reasoning_gym task's is `question`): a text, or a
            list of messages.
        answer_column: column of the reference answer (`answer` there); None: there is none. Of a
            conversation, as preference data have them, the last message is the answer; where it is
            the prompt's column too, what precedes the answer is the prompt.
        messages_column: column of a list of `{role, content}`, instead of the prompt column.
        answer_pattern: regular expression found in the answer; its group 1 (or the whole match) is
            the answer. GSM8K: `#### (.+)`.
        template: text around a question that is a text, which replaces `{prompt}`.
        system: system prompt; None: what the chat template does without one (some bring their own).
        chat: through the tokenizer's chat template, or as raw text.
        max_prompt_tokens: longer prompts are skipped, counted and logged; None: no limit.
        keep_shortest: share of the prompts that is kept, the shortest; longer ones are left out
            where `max_prompt_tokens` allows them, counted and logged.
        on_bad_row: what a row that cannot be used is: an `error`, or counted, logged and left out.
        unique: leave out prompts that were there before.
        part: `all`, `2/3`: the second of three disjoint parts, or `2-3/4`, by prompt.
        now: the time that a chat template is told.
        key: of the section that says all this, for messages.
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
    part: str = "all"
    keep_shortest: str = "100%"
    key: str = "data.train"
    now: datetime = field(default_factory=datetime.now, compare=False)

    def __post_init__(self) -> None:
        read_part(self.part)
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
    """With the columns that all tasks of reasoning_gym have, of one of those."""
    if not source.source.startswith("reasoning_gym:"):
        return source
    columns = {"prompt_column": "question", "answer_column": "answer", "messages_column": None}
    return PromptSource(**{**vars(source), **columns})


def needed_columns(source: PromptSource, rows: Sequence[Row]) -> dict[str, str]:
    """Column -> the key that names it. Where answers are conversations, they have the prompts."""
    needed = {source.prompt_column: f"{source.key}.prompt_column"}
    column = source.answer_column
    if source.messages_column is not None:
        needed = {source.messages_column: f"{source.key}.columns.messages"}
    elif column is not None and any(is_conversation(row.get(column)) for row in rows):
        needed = {}
    return needed | ({} if column is None else {column: f"{source.key}.answer_column"})
