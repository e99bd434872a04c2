"""Files as they arrive: cut, zeroed, of other formats, with any type in any column. Each is read or
refused in one line that names the file; with `on_bad_row: skip` what is left is read.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import random
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data_cases import CHATML, character_tokenizer, turns
from pyarrow import parquet

from data_sources import data_source
from spmdrl.data.conversations import load_conversations
from spmdrl.data.preferences import load_preferences
from spmdrl.data.prompts import load_prompts

TOOLED = "{% for t in tools or [] %}{{ t.name }}{% endfor %}" + CHATML

ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "prompts": lambda i: {"question": f"What is {i}?", "answer": str(i), "tools": None},
    "conversations": lambda i: {"messages": turns(f"Say {i}", f"{i}."), "tools": None},
    "preferences": lambda i: {"prompt": f"Say {i}", "chosen": "y", "rejected": "n", "margin": 0.5},
}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 99\n"
DEEP = 3000


def load(kind: str, path: Path, on_bad_row: Any) -> int:
    """How many items a file gives."""
    tokenizer = character_tokenizer(TOOLED)
    if kind == "prompts":
        source = data_source(
            source=str(path),
            prompt_column="question",
            answer_column="answer",
            on_bad_row=on_bad_row,
        )
        return len(load_prompts(source, tokenizer))
    names = {"messages": "messages"} if kind == "conversations" else {"margin": "margin"}
    examples = data_source(source=str(path), columns=names, on_bad_row=on_bad_row)
    if kind == "conversations":
        return len(load_conversations(examples, tokenizer))
    return len(load_preferences(examples, tokenizer))


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def packed(table: pa.Table) -> bytes:
    file = io.BytesIO()
    parquet.write_table(table, file)
    return file.getvalue()


def with_line(kind: str, line: bytes) -> bytes:
    """A bad line among good ones."""
    good = lines([ROWS[kind](i) for i in range(4)]).splitlines(keepends=True)
    return b"".join([*good[:2], line + b"\n", *good[2:]])


def json_files(kind: str) -> Iterator[tuple[str, bytes]]:
    rows = [ROWS[kind](i) for i in range(6)]
    whole, row = lines(rows), json.dumps(ROWS[kind](9))
    key = next(iter(rows[0]))
    for share in range(1, 10):
        yield f"cut_{share}", whole[: len(whole) * share // 10]
    yield "zeroed", bytes(len(whole))
    for at in range(0, len(whole), len(whole) // 4):
        yield f"zeroed_at_{at}", whole[:at] + bytes(40) + whole[at + 40 :]
    yield "empty", b""
    yield "blank", b"\n\n \n"
    yield "pointer", LFS
    yield "bom", b"\xef\xbb\xbf" + whole
    for coding in ("utf-16", "utf-16-le", "utf-32", "utf-7"):
        yield coding, whole.decode().encode(coding)
    yield "gzip", gzip.compress(whole)
    yield "parquet_inside", packed(pa.table({"a": [1]}))
    yield "array", json.dumps(rows).encode()
    yield "pretty", json.dumps(rows, indent=1).encode()
    yield "crlf", whole.replace(b"\n", b"\r\n")
    yield "cr", whole.replace(b"\n", b"\r")
    yield "page", b"<!DOCTYPE html>\n<html><body>404</body></html>\n"
    yield "noise", random.Random(0).randbytes(3000)
    for seed in range(8):
        drawn = random.Random(seed)
        changed = bytearray(whole)
        for _ in range(3):
            changed[drawn.randrange(len(changed))] = drawn.randrange(256)
        yield f"flipped_{seed}", bytes(changed)
    odd = {
        "scalar": "5",
        "null": "null",
        "text": '"a"',
        "no_columns": "{}",
        "other_columns": '{"x": 1}',
        "comma": row[:-1] + ",}",
        "quotes": row.replace('"', "'"),
        "two": row + row,
        "comment": "// " + row,
        "twice": row[:-1] + f', "{key}": 5}}',
        "huge_integer": row[:-1] + f', "{key}": {"9" * 5000}}}',
        "large_integer": row[:-1] + f', "{key}": {"9" * 4000}}}',
        "huge_elsewhere": row[:-1] + f', "x": {"9" * 4000}}}',
        "exponent": row[:-1] + f', "{key}": 1e999}}',
        "nan": row[:-1] + f', "{key}": NaN}}',
        "infinity": row[:-1] + f', "{key}": -Infinity}}',
        "deep_list": row[:-1] + f', "{key}": {"[" * DEEP}{"]" * DEEP}}}',
        "deep_elsewhere": row[:-1] + f', "x": {"[" * DEEP}{"]" * DEEP}}}',
        "nearly_deep": row[:-1] + f', "x": {"[" * 930}{"]" * 930}}}',
        "deep_object": row[:-1] + f', "{key}": ' + '{"a":' * DEEP + "1" + "}" * DEEP + "}",
        "surrogate": row.replace("9", "\\ud83d"),
        "letter_zero": row.replace("9", "\\u0000"),
        "long": row.replace("9", "9" * 200_000),
    }
    for name, line in odd.items():
        yield name, with_line(kind, line.encode())
    yield "not_utf8", with_line(kind, row.replace("9", "\xe9").encode("latin-1"))
    yield "raw_surrogate", with_line(kind, row.encode().replace(b"9", b"\xed\xa0\xbd"))
    yield "overlong", with_line(kind, row.encode().replace(b"9", b"\xc0\x80"))
    yield "raw_zero", with_line(kind, row.encode().replace(b"9", b"\x00"))


VALUES: dict[str, Any] = {
    "null": None,
    "zero": 0,
    "number": 1.5,
    "flag": True,
    "nothing": "",
    "blank": " \t",
    "list": [],
    "object": {},
    "numbers": [1],
    "lists": [[]],
    "nulls": [None],
    "huge": 10**400,
    "message": {"role": "user", "content": "a"},
    "role_alone": [{"role": "user"}],
    "number_role": [{"role": 1, "content": "a"}],
    "null_content": [{"role": "user", "content": None}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    "answer_alone": [{"role": "assistant", "content": "a"}],
    "two_users": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "calls": [*turns("a", ""), {"role": "assistant", "content": "b", "tool_calls": 5}],
    "half": "\ud83d",
    "letter_zero": "\0",
    "json": '{"a": 1}',
}


def typed_files(kind: str) -> Iterator[tuple[str, bytes]]:
    """Any type in any column, of one row and of all."""
    good = [ROWS[kind](i) for i in range(3)]
    for column in good[0]:
        for name, value in VALUES.items():
            yield f"{column}_{name}", lines([*good, {**ROWS[kind](7), column: value}])
        yield (
            f"{column}_missing",
            lines([{k: v for k, v in r.items() if k != column} for r in good]),
        )
        yield f"{column}_all_null", lines([{**row, column: None} for row in good])


def columns() -> dict[str, pa.Array]:
    """Four values of many Arrow types."""
    count = 4
    text = b"".join([b"ab", b"\xff\xfe", b"cd", b"ef"])
    offsets = pa.array([0, 2, 4, 6, 8], pa.int32()).buffers()[1]
    return {
        "bytes": pa.array([b"a"] * count),
        "fixed_bytes": pa.array([b"ab"] * count, pa.binary(2)),
        "bytes_list": pa.array([[b"a"]] * count),
        "not_utf8": pa.StringArray.from_buffers(count, offsets, pa.py_buffer(text)),
        "struct": pa.array([{"a": 1, "b": None}] * count),
        "map": pa.array([[("a", 1)]] * count, pa.map_(pa.string(), pa.int32())),
        "null": pa.nulls(count),
        "flag": pa.array([True] * count),
        "byte": pa.array([1] * count, pa.int8()),
        "unsigned": pa.array([2**64 - 1] * count, pa.uint64()),
        "half_float": pa.array([1.5] * count, pa.float16()),
        "not_a_number": pa.array([float("nan")] * count),
        "mixed_nan": pa.array([1.0, float("nan"), None, float("inf")]),
        "decimal": pa.array([Decimal("1.50")] * count),
        "wide_decimal": pa.array([Decimal("9" * 60)] * count, pa.decimal256(76, 0)),
        "date": pa.array([date(2026, 1, 2)] * count),
        "time": pa.array([1] * count, pa.time64("ns")),
        "moment": pa.array([datetime(2026, 1, 2)] * count, pa.timestamp("ns")),
        "far_moment": pa.array([2**62] * count, pa.timestamp("us")),
        "odd_zone": pa.array([0] * count, pa.timestamp("us", tz="Nowhere/City")),
        "duration": pa.array([timedelta(days=1)] * count),
        "words": pa.array(["a", "b", "a", "b"]).dictionary_encode(),
        "large_text": pa.array(["a"] * count, pa.large_string()),
        "view": pa.array(["a"] * count, pa.string_view()),
        "list": pa.array([["a"]] * count, pa.large_list(pa.string())),
        "fixed_list": pa.array([[1, 2]] * count, pa.list_(pa.int32(), 2)),
        "messages": pa.array([turns("a")] * count),
        "null_messages": pa.array(
            [turns("a"), None, [], [None]],
            pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        ),
    }


def parquet_files(kind: str) -> Iterator[tuple[str, bytes]]:
    rows = [ROWS[kind](i) for i in range(4)]
    table = pa.Table.from_pylist(rows)
    whole = packed(table)
    for cut in (1, 4, 8, 60, len(whole) // 2, len(whole) - 4):
        yield f"cut_{cut}", whole[:-cut]
    yield "no_head", whole[4:]
    yield "zeroed", bytes(len(whole))
    yield "zeroed_footer", whole[:-8] + bytes(8)
    yield "long_footer", whole[:-8] + b"\xff\xff\xff\x7f" + whole[-4:]
    yield "pointer", LFS
    yield "empty", b""
    yield "lines", lines(rows)
    yield "garbage", b"PAR1garbagePAR1"
    yield "no_rows", packed(table.slice(0, 0))
    yield "no_columns", packed(pa.table({}))
    yield "twice", packed(pa.table([table[0], table[1]], names=[table.column_names[0]] * 2))
    for at in range(8, len(whole), len(whole) // 24):
        yield f"zeroed_at_{at}", whole[:at] + bytes(8) + whole[at + 8 :]
    for column in table.column_names:
        for name, values in columns().items():
            place = table.column_names.index(column)
            yield f"{column}_{name}", packed(table.set_column(place, column, values))


def cases() -> list[tuple[str, str, bytes]]:
    """(kind, file name, content)."""
    found = []
    for kind in ROWS:
        for name, content in [*json_files(kind), *typed_files(kind)]:
            found.append((kind, f"{name}.jsonl", content))
        for name, content in parquet_files(kind):
            found.append((kind, f"{name}.parquet", content))
    return found


def check(folder: Path, kind: str, name: str, content: bytes, caplog: Any) -> bool:
    """Read a file both ways; whether it was refused."""
    path = folder / name
    path.write_bytes(content)
    refused = False
    counts = {}
    for on_bad_row in ("error", "skip"):
        caplog.clear()
        try:
            counts[on_bad_row] = load(kind, path, on_bad_row)
        except ValueError as error:
            refused = True
            text = str(error)
            assert name in text and "\n" not in text and len(text) < 2000, (kind, name, text)
        except BaseException as error:
            raise AssertionError(f"{kind} {name} {on_bad_row}: {error!r}") from error
        for record in caplog.records:
            said = record.getMessage()
            assert name in said and "\n" not in said and record.exc_info is None, said
    if "error" in counts:
        assert counts["skip"] == counts["error"], (kind, name)
    return refused


def check_all(some: list[tuple[str, str, bytes]], folder: Path, caplog: Any) -> int:
    with caplog.at_level(logging.WARNING):
        return sum(check(folder, *case, caplog) for case in some)


def test_a_sample_of_mutated_files_is_read_or_refused_by_name(tmp_path, caplog):
    some = cases()[::8]
    assert len(some) > 80
    assert len(some) // 4 < check_all(some, tmp_path, caplog) < len(some)


@pytest.mark.full
def test_every_mutated_file_is_read_or_refused_by_name(tmp_path, caplog):
    some = cases()
    assert len({(kind, name) for kind, name, _ in some}) == len(some) > 600
    refused = check_all(some, tmp_path, caplog)
    logging.getLogger(__name__).warning("%d files, %d refused", len(some), refused)
    assert 100 < refused < len(some) - 100
