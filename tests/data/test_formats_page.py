"""The rows that docs/data-formats.md shows are read as it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from data_cases import CHATML, character_tokenizer

from data_sources import data_source
from spmdrl.data.conversations import load_conversations
from spmdrl.data.preferences import load_preferences
from spmdrl.data.prompts import load_prompts

PAGE = Path(__file__).parents[2] / "docs" / "data-formats.md"

QUESTIONS = {"prompt_column": "question", "answer_column": "answer"}


def shown(title: str) -> list[str]:
    """The rows of a section."""
    section = re.findall(rf"^## {title}\n.*?^```json\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return section[0].splitlines()


@pytest.mark.parametrize(
    ("title", "row", "load", "settings"),
    [
        ("Prompts", 0, load_prompts, QUESTIONS),
        ("Prompts", 1, load_prompts, {**QUESTIONS, "answer_pattern": r"####\s*(.+)"}),
        ("Conversations", 0, load_conversations, {"columns": {"messages": "messages"}}),
        ("Conversations", 1, load_conversations, {"prompt_column": "prompt"}),
        ("Pairs", 0, load_preferences, {"prompt_column": "prompt"}),
        ("Pairs", 1, load_preferences, {}),
    ],
)
def test_rows_of_the_page_are_read(
    tmp_path: Path, title: str, row: int, load: Any, settings: dict[str, Any]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(shown(title)[row] + "\n")
    source = data_source(source=str(file), **settings)
    items = load(source, character_tokenizer(CHATML))
    assert len(items) == 1
    if title == "Prompts":
        assert items[0].answer == ("5", "12")[row]
