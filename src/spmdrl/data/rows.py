"""Rows of a data source, each with the place it came from; a bad row is told, not raised.

`reasoning_gym` and `datasets` take more than a second to import, so they are imported where used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = "a .jsonl, .json or .parquet file, 'hub:NAME' or 'reasoning_gym:TASK'"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as read.

    Args:
        index: its number in the source, from 0.
        place: where it stands, for messages: `file.jsonl:12`.
        values: its columns; empty when it is bad.
        problem: what is wrong with it; None when nothing is.
    """

    index: int
    place: str
    values: Mapping[str, Any]
    problem: str | None = None


def read_rows(
    source: str, *, parameters: Mapping[str, Any], size: int | None, seed: int
) -> Iterator[Row]:
    """The rows of a source.

    Args:
        source: a local file, `hub:NAME` or `reasoning_gym:TASK`.
        parameters: the task's parameters; arguments of `datasets.load_dataset` (`name`, `split`,
            …: `split` is "train" unless given); none for a file.
        size: rows at most; a reasoning_gym task needs it.
        seed: of a reasoning_gym task.

    Raises:
        ValueError: the source does not exist or cannot be read, or takes no such parameters.
    """
    if source.startswith("reasoning_gym:"):
        return _task_rows(source.removeprefix("reasoning_gym:"), parameters, size, seed)
    if source.startswith("hub:"):
        return _hub_rows(source.removeprefix("hub:"), parameters, size)
    path = Path(source)
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise ValueError(f"data source {source!r} is not known: it must be {KINDS}")
    if not path.is_file():
        raise ValueError(f"data source {source!r} is not a file")
    if parameters:
        raise ValueError(f"data source {source!r} is a file: it takes no {sorted(parameters)}")
    if path.suffix == ".parquet":
        return _parquet_rows(path, size)
    return _json_rows(path, size)


def _json_rows(path: Path, size: int | None) -> Iterator[Row]:
    """A JSON object per line. Read here and not by `datasets`, which names no line."""
    with path.open("rb") as file:
        for index, line in enumerate(file):
            if index == size:
                return
            place = f"{path}:{index + 1}"
            values, problem = _parse(line)
            yield Row(index=index, place=place, values=values, problem=problem)


def _parse(line: bytes) -> tuple[Mapping[str, Any], str | None]:
    if not line.strip():
        return {}, "the line is empty"
    try:
        values = json.loads(line)
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8: {error}"
    except json.JSONDecodeError as error:
        return {}, f"not JSON: {error.msg} at column {error.colno}"
    if not isinstance(values, dict):
        return {}, f"not a JSON object but {type(values).__name__}"
    return values, None


def _parquet_rows(path: Path, size: int | None) -> Iterator[Row]:
    from datasets import load_dataset

    # Streaming reads the file itself instead of a copy in a cache that ranks would share.
    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for index, values in enumerate(rows):
            if index == size:
                return
            yield Row(index=index, place=f"{path}: row {index}", values=values)
    except (OSError, ValueError) as error:
        raise ValueError(f"data source {str(path)!r} cannot be read: {error}") from error


def _hub_rows(name: str, parameters: Mapping[str, Any], size: int | None) -> Iterator[Row]:
    from datasets import Dataset, load_dataset

    try:
        rows = load_dataset(name, **{"split": "train", **parameters})
    # What is missing, misspelt or out of reach comes as one of these.
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"data source 'hub:{name}' with {dict(parameters)} cannot be read: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(rows, Dataset):
        raise ValueError(f"data source 'hub:{name}': split={parameters['split']!r} is no one split")
    for index, values in enumerate(rows):
        if index == size:
            return
        yield Row(index=index, place=f"hub:{name}: row {index}", values=values)


def _task_rows(
    task: str, parameters: Mapping[str, Any], size: int | None, seed: int
) -> Iterator[Row]:
    """Generated tasks: columns `question`, `answer`, `metadata`, `reasoning_gym` (for scoring).

    reasoning_gym draws item i from `Random(seed + i)`, so that neighbouring seeds give almost the
    same items; the seed handed to it is a hash of ours.
    """
    from reasoning_gym import create_dataset
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ValueError(f"reasoning_gym has no task {task!r}; it has {sorted(DATASETS)}")
    if size is None or size < 1:
        raise ValueError(f"data source 'reasoning_gym:{task}' needs a positive size, not {size}")
    spread = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest())
    try:
        items = create_dataset(task, size=size, seed=spread, **parameters)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"reasoning_gym task {task!r} refuses {dict(parameters)}: {error}"
        ) from error
    maker = {"task": task, "parameters": dict(parameters)}
    for index in range(size):
        place = f"reasoning_gym:{task}: item {index} of seed {seed}"
        yield Row(index=index, place=place, values={**items[index], "reasoning_gym": maker})
