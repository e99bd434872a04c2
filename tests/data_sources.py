"""Sources of tests, whose prompts are in the column `prompt` unless they say otherwise."""

from __future__ import annotations

from typing import Any

from spmdrl.data.source import DataSource


def data_source(**settings: Any) -> DataSource:
    return DataSource(**{"prompt_column": "prompt", "answer_column": None, **settings})
