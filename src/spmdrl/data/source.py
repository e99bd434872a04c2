"""`DataSource`: a source of rows as a value, and the columns that its rows need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import Field

from spmdrl.config.data import PromptsSection
from spmdrl.data.rows import SEEDS, Row, is_conversation


class DataSource(PromptsSection):
    """A section that describes a source of rows, with what the run adds to it.

    Args:
        key: key of the section, for messages.
        now: the time that a chat template is given.
    """

    key: str = "data.train"
    now: datetime = Field(default_factory=datetime.now)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The task's parameters, or arguments of `datasets.load_dataset`."""
        own = {"split": self.split} if self.source.startswith("hub:") else {}
        return own | self.task

    def column(self, name: str) -> str:
        return self.columns.get(name, name)


def check_whole(source: DataSource) -> None:
    """Raise ValueError if whole conversations are read and a template or raw text is asked for."""
    column = source.columns.get("messages")
    if column is not None and (source.template != "{prompt}" or not source.chat):
        raise ValueError(
            f"{source.key}.columns.messages={column} takes whole conversations: it goes with "
            f"chat=true (not {source.chat}) and no template (not {source.template!r})"
        )


def with_task_columns(source: DataSource) -> DataSource:
    """Set the columns that all reasoning_gym tasks have, or seeds, if the source is one."""
    if source.source == SEEDS:
        own: dict[str, Any] = {"answer_column": None, "columns": {}}
        return source.model_copy(update={"prompt_column": "question", **own})
    if not source.source.startswith("reasoning_gym:"):
        return source
    columns = {"prompt_column": "question", "answer_column": "answer", "columns": {}}
    return source.model_copy(update=columns)


def needed_columns(source: DataSource, rows: Sequence[Row]) -> dict[str, str]:
    """Needed column -> key that names it. Answers that are conversations hold the prompts."""
    needed = {source.prompt_column: f"{source.key}.prompt_column"}
    column = source.answer_column
    if "messages" in source.columns:
        needed = {source.columns["messages"]: f"{source.key}.columns.messages"}
    elif column is not None and any(is_conversation(row.get(column)) for row in rows):
        needed = {}
    return needed | ({} if column is None else {column: f"{source.key}.answer_column"})
