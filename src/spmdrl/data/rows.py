"""Rows of a data source, each with its place; a bad row carries its problem and raises nothing.

Libraries that read files raise errors of any type: each kind of read has one place here that turns
them into one line with the source's name. `pyarrow`, `reasoning_gym` and `datasets` take long to
import, so they are imported where used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KINDS = "a .jsonl, .json or .parquet file, 'hub:NAME', 'reasoning_gym:TASK' or 'seeds'"
SEEDS = "seeds"
"""Source of numbered rows, for environments that make their prompts from a seed."""

TOOLS = "tools"
"""Column with the tools that the chat template is given."""

_POINTER = b"version https://git-lfs.github.com/"
_BATCH = 1024  # rows of a Parquet file that are turned into Python values at a time
_SAID = 400  # letters of a library's message


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as read.

    Args:
        index: number of the row in the source, from 0.
        place: its place, for messages: `file.jsonl:12`.
        values: column -> value; empty for a bad row.
        problem: what is wrong with the row; None for a good row.
    """

    index: int
    place: str
    values: Mapping[str, Any]
    problem: str | None = None

    def has(self, column: str) -> bool:
        """Whether such a column or field (`reward_model.ground_truth`) exists."""
        return _found(self.values, column)[0]

    def get(self, column: str) -> Any:
        """Value of a column or a field; None if it does not exist."""
        return _found(self.values, column)[1]


def _found(values: Mapping[str, Any], column: str) -> tuple[bool, Any]:
    if column in values:
        return True, values[column]
    head, _, rest = column.partition(".")
    inner = values.get(head)
    return _found(inner, rest) if rest and isinstance(inner, Mapping) else (False, None)


def said(error: Exception) -> str:
    """Write a library's error as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_SAID]}{'…' if len(text) > _SAID else ''}"


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn any error raised inside by a library into a ValueError that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {said(error)}") from error


def read_rows(
    source: str, *, parameters: Mapping[str, Any], size: int | None, seed: int
) -> Iterator[Row]:
    """Read the rows of a source.

    Args:
        source: a local file, `hub:NAME`, `reasoning_gym:TASK` or `seeds`.
        parameters: the task's parameters; arguments of `datasets.load_dataset` (`name`, `split`,
            …: `split` is "train" unless given); none for a file.
        size: maximum number of rows; a reasoning_gym task and seeds need it.
        seed: seed of a reasoning_gym task, and of seeds.

    Raises:
        ValueError: the source does not exist, cannot be read, or takes no such parameters.
    """
    if source.startswith("reasoning_gym:"):
        return _task_rows(source.removeprefix("reasoning_gym:"), parameters, size, seed)
    if source.startswith("hub:"):
        return _hub_rows(source.removeprefix("hub:"), parameters, size)
    if source == SEEDS:
        return _seed_rows(parameters, size, seed)
    path = Path(source)
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise ValueError(f"data source {source!r} is not known: it must be {KINDS}")
    with one_line(f"data source {source!r} cannot be read"):
        is_file = path.is_file()
    if not is_file:
        raise ValueError(f"data source {source!r} is not a file")
    if parameters:
        raise ValueError(f"data source {source!r} is a file: it takes no {sorted(parameters)}")
    with one_line(f"data source {source!r} cannot be read"), path.open("rb") as file:
        head = file.read(len(_POINTER))
    if head == _POINTER:
        raise ValueError(
            f"data source {source!r} is a Git LFS pointer, not the data: `git lfs pull` fetches it"
        )
    return _parquet_rows(path, size) if path.suffix == ".parquet" else _json_rows(path, size)


def _json_rows(path: Path, size: int | None) -> Iterator[Row]:
    """Read a JSON object per line. `datasets` is not used for it, since its errors name no line."""
    with one_line(f"data source {str(path)!r} cannot be read"), path.open("rb") as file:
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
        values = json.loads(line, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8: {error}"
    except json.JSONDecodeError as error:
        return {}, f"not JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # too many digits, nested too deeply
        return {}, f"JSON that cannot be read: {error}"
    if not isinstance(values, dict):
        return {}, f"not a JSON object but {type(values).__name__}"
    return values, None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; ValueError if a key occurs twice: the last would count, unintendedly."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return values


def _parquet_rows(path: Path, size: int | None) -> Iterator[Row]:
    """Read a Parquet file by pyarrow: `datasets` would decode values as its metadata there say."""
    with one_line(f"data source {str(path)!r} cannot be read"):
        from pyarrow import parquet

        index = 0
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"two columns are named {twice!r}")
            for batch in file.iter_batches(batch_size=_BATCH):
                for values, problem in _arrow_rows(batch):
                    if index == size:
                        return
                    place = f"{path}: row {index}"
                    yield Row(index=index, place=place, values=values, problem=problem)
                    index += 1


def _arrow_rows(batch: Any) -> Iterator[tuple[Mapping[str, Any], str | None]]:
    """Yield the values of each row, or what is wrong with it: text that is not UTF-8, say, or a
    time that Python cannot hold.
    """
    rows: list[tuple[Mapping[str, Any], str | None]]
    try:
        rows = [(values, None) for values in batch.to_pylist()]
    except Exception:  # some row's, of whatever type: found below
        rows = [_arrow_row(batch, place) for place in range(batch.num_rows)]
    for values, problem in rows:
        yield _unfilled(_shortened(values, batch.schema)), problem


def _arrow_row(batch: Any, place: int) -> tuple[Mapping[str, Any], str | None]:
    try:
        return batch.slice(place, 1).to_pylist()[0], None
    except Exception as error:  # pyarrow's, of whatever type: the row's fault
        return {}, f"it cannot be read: {said(error)}"


def _shortened(values: Mapping[str, Any], schema: Any) -> Mapping[str, Any]:
    """Replace values of float32 and float16 columns, and of such fields of structs, by their
    shortest decimals: 0.1 stored as float32 would read 0.10000000149011612 as a float64.
    """
    narrow = {field.name: field.type for field in schema if _has_narrow(field.type)}
    if not narrow or not values:
        return values
    return {**values, **{name: _shortest(values[name], kind) for name, kind in narrow.items()}}


def _has_narrow(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(_has_narrow(field.type) for field in kind)
    return bool(types.is_float32(kind) or types.is_float16(kind))


def _shortest(value: Any, kind: Any) -> Any:
    from pyarrow import types

    if value is None:
        return None
    if types.is_struct(kind):
        fields = {field.name: field.type for field in kind if _has_narrow(field.type)}
        return {**value, **{name: _shortest(value[name], of) for name, of in fields.items()}}
    return float(str((np.float32 if types.is_float32(kind) else np.float16)(value)))


def _unfilled(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Remove the nulls that Arrow writes into messages and tools for keys that only others have: a
    chat template would take them for values.
    """
    return {
        name: _without_nulls(value) if name == TOOLS or is_conversation(value) else value
        for name, value in values.items()
    }


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, unlike an answer that is a list of numbers."""
    return isinstance(value, list) and any(isinstance(m, Mapping) and "role" in m for m in value)


def _hub_rows(name: str, parameters: Mapping[str, Any], size: int | None) -> Iterator[Row]:
    # the data may be missing, misspelt, out of reach, or damaged in the cache
    with one_line(f"data source 'hub:{name}' with {dict(parameters)} cannot be read"):
        from datasets import Dataset, load_dataset

        rows = load_dataset(name, **{"split": "train", **parameters})
    if not isinstance(rows, Dataset):
        raise ValueError(f"data source 'hub:{name}': split={parameters['split']!r} is no one split")
    with one_line(f"data source 'hub:{name}' cannot be read"):
        for index, values in enumerate(rows):
            if index == size:
                return
            values = _unfilled(_shortened(values, rows.features.arrow_schema))
            yield Row(index=index, place=f"hub:{name}: row {index}", values=values)


def _task_rows(
    task: str, parameters: Mapping[str, Any], size: int | None, seed: int
) -> Iterator[Row]:
    """Generate tasks: columns `question`, `answer`, `metadata`, `reasoning_gym` (for scoring).

    reasoning_gym draws item i from `Random(seed + i)`, so neighbouring seeds would give almost the
    same items: it is given a hash of our seed.
    """
    from reasoning_gym import create_dataset
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ValueError(f"reasoning_gym has no task {task!r}; it has {sorted(DATASETS)}")
    if size is None or size < 1:
        raise ValueError(f"data source 'reasoning_gym:{task}' needs a positive size, not {size}")
    spread = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest())
    with one_line(f"reasoning_gym task {task!r} refuses {dict(parameters)}"):
        items = create_dataset(task, size=size, seed=spread, **parameters)
    maker = {"task": task, "parameters": dict(parameters)}
    for index in range(size):
        place = f"reasoning_gym:{task}: item {index} of seed {seed}"
        try:
            values = {**items[index], "reasoning_gym": maker}
        except Exception as error:  # a task's own code, of whatever type
            yield Row(index=index, place=place, values={}, problem=said(error))
            continue
        yield Row(index=index, place=place, values=values)


def _seed_rows(parameters: Mapping[str, Any], size: int | None, seed: int) -> Iterator[Row]:
    """Number rows: columns `question` (a text for messages alone) and `seed`, below 2^31."""
    if parameters:
        raise ValueError(f"data source {SEEDS!r} takes no {sorted(parameters)}")
    if size is None or size < 1:
        raise ValueError(f"data source {SEEDS!r} needs a positive size, not {size}")
    for index in range(size):
        number = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest()
        values = {"question": f"game {index}", "seed": int.from_bytes(number) >> 1}
        yield Row(index=index, place=f"{SEEDS}: number {index} of seed {seed}", values=values)
