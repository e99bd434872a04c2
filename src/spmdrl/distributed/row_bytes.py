"""Rows as bytes: what one rank sends another in a row exchange.

The bytes of some rows are the size of a header and the header (the columns as text), the rows'
lengths, and then every column in turn. A rank exchanges rows with many others, so columns become
bytes once, for all of them, and only slices are taken for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.batch import Batch, Ragged


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column that a call returns or sends: its name, kind, dtype and trailing dims.

    A column of kind `text` is a Python column of str and None; its dtype is that of its bytes. The
    dtype of a ragged column is that of its values.
    """

    name: str
    kind: Literal["token", "row", "text", "ragged"] = "token"
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Bytes of a part of a batch: those of row `i` are `data[ends[i] : ends[i + 1]]`."""

    data: np.ndarray
    ends: np.ndarray


def pack_rows(
    batch: Batch, columns: Sequence[Column], counts: Sequence[int]
) -> list[np.ndarray]:  # uint8 each
    """The bytes of groups of rows.

    Args:
        batch: the rows, group after group.
        counts: number of rows of each group, at least 1.

    Raises:
        ValueError: the batch lacks a column, or has it with another dtype or shape.
    """
    pieces = list(_pieces(batch, columns))
    header = _header(columns)
    prefix = np.concatenate([_words([len(header)]), np.frombuffer(header, dtype=np.uint8)])
    packed, first = [], 0
    for count in counts:
        last = first + count
        own = [piece.data[piece.ends[first] : piece.ends[last]] for piece in pieces]
        packed.append(np.concatenate([prefix, *own]))
        first = last
    return packed


def _pieces(batch: Batch, columns: Sequence[Column]) -> Iterator[_Piece]:
    rows, tokens = np.arange(batch.num_rows + 1), batch.offsets().cpu().numpy()
    yield _Piece(data=_bytes(batch.lengths), ends=rows * 8)
    for column in columns:
        if column.kind == "text":
            encoded = _encoded(batch, column)
            sizes = np.array([-1 if e is None else len(e) for e in encoded], dtype=np.int64)
            data = np.frombuffer(b"".join(e for e in encoded if e is not None), dtype=np.uint8)
            yield _Piece(data=sizes.view(np.uint8), ends=rows * 8)
            yield _Piece(data=data, ends=_sums(np.maximum(sizes, 0)))
        elif column.kind == "ragged":
            ragged = _ragged(batch, column)
            yield _Piece(data=_bytes(ragged.counts), ends=tokens * 4)
            values = _sums(ragged.counts.cpu().numpy())[tokens]
            yield _Piece(data=_bytes(ragged.values), ends=values * column.dtype.itemsize)
        else:
            width = column.dtype.itemsize * math.prod(column.shape)
            ends = tokens if column.kind == "token" else rows
            yield _Piece(data=_bytes(_typed(batch, column)), ends=ends * width)


def unpack_rows(
    data: np.ndarray, num_bytes: Tensor, counts: Tensor, columns: Sequence[Column]
) -> Batch:
    """Rows of all ranks, by rank, from the bytes that came.

    Args:
        data: uint8, the ranks' bytes end to end.
        num_bytes: number of bytes from each rank, `[ranks]`.
        counts: number of rows from each rank, `[ranks]`.

    Raises:
        ValueError: a rank has sent other columns.
    """
    reader = _Reader(data, columns)
    header = _header(columns)
    sources = ((num_bytes > 0) | (counts > 0)).nonzero().flatten()
    found = (sources.tolist(), num_bytes[sources].tolist(), counts[sources].tolist())
    for source, size, count in zip(*found, strict=True):
        reader.read(size, count, header, source)
    return reader.batch()


class _Reader:
    """Collects the parts of each column, rank by rank."""

    def __init__(self, data: np.ndarray, columns: Sequence[Column]) -> None:
        self._data, self._columns, self._position = data, columns, 0
        self._lengths: list[np.ndarray] = []
        self._parts: dict[str, list[np.ndarray]] = {column.name: [] for column in columns}
        self._counts: dict[str, list[np.ndarray]] = {column.name: [] for column in columns}
        """Sizes of texts, and counts of ragged columns."""

    def _take(self, num_bytes: int) -> np.ndarray:
        start = self._position
        self._position = start + num_bytes
        return self._data[start : self._position]

    def read(self, num_bytes: int, count: int, header: bytes, source: int) -> None:
        end = self._position + num_bytes
        (size,) = self._take(8).copy().view(np.int64).tolist()
        received = self._take(size).tobytes()
        if received != header:
            _check_header(received, header, source)
        lengths = self._take(8 * count).copy().view(np.int64)
        self._lengths.append(lengths)
        total = int(lengths.sum())
        for column in self._columns:
            width = column.dtype.itemsize * math.prod(column.shape)
            if column.kind == "text":
                sizes = self._take(8 * count).copy().view(np.int64)
                self._counts[column.name].append(sizes)
                num = int(np.maximum(sizes, 0).sum())
            elif column.kind == "ragged":
                counts = self._take(4 * total).copy().view(np.int32)
                self._counts[column.name].append(counts)
                num = int(counts.sum()) * column.dtype.itemsize
            else:
                num = width * (total if column.kind == "token" else count)
            self._parts[column.name].append(self._take(num))
        assert self._position == end, (self._position, end, count)

    def batch(self) -> Batch:
        lengths = torch.from_numpy(_joined(self._lengths, np.dtype(np.int64)))
        total = int(lengths.sum())
        tokens: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        objects: dict[str, list[str | None]] = {}
        ragged: dict[str, Ragged] = {}
        for column in self._columns:
            data = _joined(self._parts[column.name], np.dtype(np.uint8))
            counts = self._counts[column.name]
            if column.kind == "text":
                objects[column.name] = _texts(_joined(counts, np.dtype(np.int64)), data.tobytes())
                continue
            values = torch.empty(len(data) // column.dtype.itemsize, dtype=column.dtype)
            values.view(torch.uint8).copy_(torch.from_numpy(data))
            if column.kind == "ragged":
                found = torch.from_numpy(_joined(counts, np.dtype(np.int32)))
                ragged[column.name] = Ragged(counts=found, values=values)
            elif column.kind == "token":
                tokens[column.name] = values.reshape(total, *column.shape)
            else:
                rows[column.name] = values.reshape(len(lengths), *column.shape)
        return Batch(lengths=lengths, tokens=tokens, rows=rows, objects=objects, ragged=ragged)


def _joined(parts: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """All parts in a new array, which exists without parts as well."""
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)


def _words(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64).view(np.uint8)


def _sums(counts: np.ndarray) -> np.ndarray:
    """Starts of parts of these sizes, and the end of the last."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _header(columns: Sequence[Column]) -> bytes:
    """The columns as text, so that the receiver can check that it expects the same ones."""
    return "".join(f"{c.kind} {c.name!r} {c.dtype} {c.shape}\n" for c in columns).encode()


def _ragged(batch: Batch, column: Column) -> Ragged:
    if column.name not in batch.ragged:
        raise ValueError(
            f"the call declared the ragged column {column.name!r} but returned {batch.columns()}"
        )
    ragged = batch.ragged[column.name]
    if ragged.values.dtype != column.dtype:
        raise ValueError(
            f"column {column.name!r} was declared {column.dtype} but is {ragged.values.dtype}"
        )
    return ragged


def _encoded(batch: Batch, column: Column) -> list[bytes | None]:
    if column.name not in batch.objects:
        raise ValueError(
            f"the call declared the text column {column.name!r} but returned {batch.columns()}"
        )
    texts = batch.objects[column.name]
    for row, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"the Python column {column.name!r} has a {type(text).__name__} in row {row}: only "
                "str and None leave their home rank, so write it as text"
            )
    # surrogatepass: JSON may hold a lone surrogate, which must arrive unchanged
    return [None if text is None else text.encode(errors="surrogatepass") for text in texts]


def _texts(sizes: np.ndarray, data: bytes) -> list[str | None]:  # sizes int64 [B]
    texts: list[str | None] = []
    start = 0
    for size in sizes.tolist():
        if size < 0:
            texts.append(None)
            continue
        texts.append(data[start : start + size].decode(errors="surrogatepass"))
        start += size
    return texts


def _typed(batch: Batch, column: Column) -> Tensor:
    values: Mapping[str, Tensor] = batch.tokens if column.kind == "token" else batch.rows
    if column.name not in values:
        raise ValueError(
            f"the call declared the {column.kind} column {column.name!r} but returned "
            f"{batch.columns()}"
        )
    tensor = values[column.name]
    if tensor.dtype != column.dtype or tuple(tensor.shape[1:]) != column.shape:
        raise ValueError(
            f"column {column.name!r} was declared {column.dtype} {column.shape} but is "
            f"{tensor.dtype} {tuple(tensor.shape[1:])}"
        )
    return tensor


def _check_header(received: bytes, expected: bytes, source: int) -> None:
    if received != expected:
        theirs, mine = received.decode().splitlines(), expected.decode().splitlines()
        raise ValueError(
            f"rank {source} sends the columns {sorted(set(theirs) - set(mine))} where rank "
            f"{dist.get_rank()} has {sorted(set(mine) - set(theirs))}: a column has one kind, "
            "dtype and trailing shape on all ranks, those without rows included"
        )
