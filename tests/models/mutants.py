"""Damaged copies of a model's directory and of a GGUF file: each a name and a change in place."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Mutant(NamedTuple):
    """`change` is made to the directory; a message about it has to name one of `files`."""

    name: str
    files: tuple[str, ...]
    change: Callable[[Path], None]


VALUES: dict[str, Any] = {
    "null": None,
    "text": "x",
    "empty": "",
    "digits": "2",
    "minus": -1,
    "zero": 0,
    "fraction": 1.5,
    "nan": float("nan"),
    "huge": 10**30,
    "beyond": 10**400,
    "true": True,
    "list": [],
    "nested": [None],
    "object": {},
    "objects": {"x": {"y": [1]}},
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123abcd\nsize 123456\n"
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)


def of_directory(start: Path) -> Iterator[Mutant]:
    """Of a directory with `JSON_FILES` and two safetensors files."""
    shards = tuple(sorted(f.name for f in start.glob("*.safetensors")))
    assert len(shards) == 2, shards
    for file in (*JSON_FILES, *shards):
        yield from _bytes(file)
    for file in JSON_FILES:
        content = json.loads((start / file).read_text())
        for path in _paths(content, depth=2 if "token" in file or "index" in file else 1):
            for kind, value in VALUES.items():
                yield _put(file, path, kind, value)
            yield _drop(file, path)
    for file in shards:
        yield from _headers(file)
    yield from _tensors(shards)


def _bytes(file: str) -> Iterator[Mutant]:
    def rewrite(name: str, change: Callable[[bytes], bytes]) -> Mutant:
        def apply(directory: Path) -> None:
            (directory / file).write_bytes(change((directory / file).read_bytes()))

        return Mutant(f"{file}: {name}", (file,), apply)

    for part in (0, 1, 8, 25, 50, 75, 99):
        yield rewrite(f"cut at {part} %", lambda b, p=part: b[: len(b) * p // 100])
    yield rewrite("without its last byte", lambda b: b[:-1])
    yield rewrite("zeros", lambda b: bytes(len(b)))
    yield rewrite("zeros at its start", lambda b: bytes(64) + b[64:])
    yield rewrite("a pointer", lambda b: POINTER.encode())
    yield rewrite("no text", lambda b: b"\xff\xfe\x00" + b)
    yield rewrite("brackets", lambda b: b"[" * 100_000)
    yield rewrite("a page", lambda b: b"<!DOCTYPE html><html><body>Not Found</body></html>")
    for kind, value in (("null", None), ("list", [1]), ("text", "x"), ("number", 3)):
        yield rewrite(kind, lambda b, v=value: json.dumps(v).encode())

    def remove(directory: Path) -> None:
        (directory / file).unlink()

    def nest(directory: Path) -> None:
        (directory / file).unlink()
        (directory / file).mkdir()

    shard_names = (file, "model.safetensors.index.json")
    yield Mutant(f"{file}: missing", shard_names, remove)
    yield Mutant(f"{file}: a directory", shard_names, nest)


def _paths(content: Any, depth: int) -> Iterator[tuple[str | int, ...]]:
    items: list[tuple[str | int, Any]] = []
    if isinstance(content, dict):
        items = list(content.items())[:60]
    elif isinstance(content, list):
        items = list(enumerate(content))[:3]
    for key, value in items:
        yield (key,)
        if depth > 1:
            # the vocabulary and the names of tensors: a few stand for all
            few = list(_paths(value, depth - 1))[:8]
            yield from ((key, *path) for path in few)


def _put(file: str, path: tuple[str | int, ...], kind: str, value: Any) -> Mutant:
    def apply(directory: Path) -> None:
        content = json.loads((directory / file).read_text())
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (directory / file).write_text(json.dumps(content))

    where = ".".join(str(key) for key in path)
    return Mutant(f"{file}: {where} {kind}", (file,), apply)


def _drop(file: str, path: tuple[str | int, ...]) -> Mutant:
    def apply(directory: Path) -> None:
        content = json.loads((directory / file).read_text())
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        (directory / file).write_text(json.dumps(content))

    return Mutant(f"{file}: without {'.'.join(str(key) for key in path)}", (file,), apply)


def _headers(file: str) -> Iterator[Mutant]:
    """Of a safetensors file: what its header says of the first tensor."""

    def edit(name: str, change: Callable[[dict[str, Any]], None]) -> Mutant:
        def apply(directory: Path) -> None:
            content = (directory / file).read_bytes()
            length = struct.unpack("<Q", content[:8])[0]
            header = json.loads(content[8 : 8 + length])
            change(header)
            text = json.dumps(header).encode()
            body = content[8 + length :]
            (directory / file).write_bytes(struct.pack("<Q", len(text)) + text + body)

        return Mutant(f"{file}: header, {name}", (file,), apply)

    def first(header: dict[str, Any]) -> dict[str, Any]:
        held: dict[str, Any] = header[next(k for k in header if k != "__metadata__")]
        return held

    for dtype in ("F8_E4M3", "F8_E5M2", "I32", "U8", "BOOL", "F4", "NONE", 3, None):
        yield edit(f"dtype {dtype}", lambda h, d=dtype: first(h).update(dtype=d))
    for shape in ([], [1], [264], [32, 264], [-1, 2], ["x"], None, [2**62, 4]):
        yield edit(f"shape {shape}", lambda h, s=shape: first(h).update(shape=s))
    for offsets in ([0, 0], [4, 0], [0, 2**62], [-4, 4], None, ["a", "b"], [1]):
        yield edit(f"offsets {offsets}", lambda h, o=offsets: first(h).update(data_offsets=o))
    yield edit("no tensors", lambda h: h.clear())
    yield edit("a number", lambda h: h.update({next(iter(h)): 3}))
    for size in (0, 7, 2**40, 2**63):

        def lie(directory: Path, size: int = size) -> None:
            content = (directory / file).read_bytes()
            (directory / file).write_bytes(struct.pack("<Q", size) + content[8:])

        yield Mutant(f"{file}: header of {size} bytes", (file,), lie)


def _tensors(shards: tuple[str, ...]) -> Iterator[Mutant]:
    """Values and names of tensors."""
    from safetensors.torch import load_file, save_file

    def edit(name: str, change: Callable[[dict[str, Any]], None]) -> Mutant:
        def apply(directory: Path) -> None:
            for file in shards:
                held = load_file(directory / file)
                change(held)
                save_file(held, directory / file, metadata={"format": "pt"})

        return Mutant(f"weights: {name}", shards, apply)

    def poison(held: dict[str, Any], value: float) -> None:
        for tensor in held.values():
            tensor.view(-1)[-1] = value

    for value in (float("nan"), float("inf"), -float("inf")):
        yield edit(f"{value}", lambda h, v=value: poison(h, v))
    for suffix in ("_scale_inv", "_scale", ".absmax", "_packed", "_zero_point", ".lora_A.weight"):

        def add(held: dict[str, Any], suffix: str = suffix) -> None:
            name = min(held)
            held[name + suffix] = held[name].flatten()[:1].clone()

        yield edit(f"with {suffix}", add)


GGUF_VALUES: dict[str, Any] = {
    "text": "x",
    "minus": -1,
    "zero": 0,
    "fraction": 1.5,
    "large": 2**31 - 1,
    "true": True,
    "list": [1, 2],
    "texts": ["a", "b"],
}


def of_gguf(path: Path) -> Iterator[Mutant]:
    """Of the GGUF file at `path`: every key with values of other kinds, and damaged bytes."""
    import gguf

    name = path.name
    yield from (m for m in _bytes(name) if "directory" not in m.name)
    keys = [k for k in gguf.GGUFReader(path).fields if not k.startswith("GGUF.")]
    for key in keys:
        for kind, value in GGUF_VALUES.items():
            yield Mutant(f"{name}: {key} {kind}", (name,), _copied(name, key, value))
        yield Mutant(f"{name}: without {key}", (name,), _copied(name, key, None))
    size = path.stat().st_size
    for i in range(40):
        place = 24 + (size // 2 - 24) * i // 40

        def flip(directory: Path, place: int = place) -> None:
            content = bytearray((directory / name).read_bytes())
            content[place : place + 8] = b"\xff" * 8
            (directory / name).write_bytes(bytes(content))

        yield Mutant(f"{name}: byte {place}", (name,), flip)


def _copied(file: str, changed: str, value: Any) -> Callable[[Path], None]:
    """A copy of a GGUF file with one key's value changed, or left out (None)."""

    def apply(directory: Path) -> None:
        import gguf

        reader = gguf.GGUFReader(directory / file)
        values = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        types = {k: f.types for k, f in reader.fields.items()}
        tensors = [(t.name, np.array(t.data), t.tensor_type) for t in reader.tensors]
        del reader
        writer = gguf.GGUFWriter(directory / file, "llama")
        for name, held in values.items():
            if name == "general.architecture":
                del writer.kv_data[0][name]
            if name == changed:
                if value is not None:
                    kind = gguf.GGUFValueType.get_type(value)
                    writer.add_key_value(name, value, kind)
            elif types[name][0] == gguf.GGUFValueType.ARRAY:
                writer.add_array(name, held)
            else:
                writer.add_key_value(name, held, types[name][0])
        for name, data, kind in tensors:
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return apply
