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
    header = _header(columns)
    sources = ((num_bytes > 0) | (counts > 0)).nonzero().flatten()
    reader = _Reader(data, num_bytes[sources].numpy())
    _check_headers(reader, header, sources.tolist())
    own = counts[sources].numpy()
    lengths = reader.take(8 * own).view(np.int64)
    totals = _sums_by(lengths, own)
    tokens: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    objects: dict[str, list[str | None]] = {}
    ragged: dict[str, Ragged] = {}
    for column in columns:
        if column.kind == "text":
            sizes = reader.take(8 * own).view(np.int64)
            text = reader.take(_sums_by(np.maximum(sizes, 0), own))
            objects[column.name] = _texts(sizes, text.tobytes())
        elif column.kind == "ragged":
            numbers = reader.take(4 * totals).view(np.int32)
            values = reader.take(_sums_by(numbers, totals) * column.dtype.itemsize)
            ragged[column.name] = Ragged(
                counts=torch.from_numpy(numbers), values=_tensor(values, column)
            )
        else:
            width = column.dtype.itemsize * math.prod(column.shape)
            is_token = column.kind == "token"
            found = _tensor(reader.take(width * (totals if is_token else own)), column)
            count = int(totals.sum()) if is_token else len(lengths)
            (tokens if is_token else rows)[column.name] = found.reshape(count, *column.shape)
    reader.close()
    return Batch(
        lengths=torch.from_numpy(lengths), tokens=tokens, rows=rows, objects=objects, ragged=ragged
    )


class _Reader:
    """Reads the ranks' bytes side by side: some of each, joined in the order of the ranks.

    Args:
        data: uint8, the ranks' bytes end to end.
        num_bytes: number of bytes from each, `[ranks]`.
    """

    def __init__(self, data: np.ndarray, num_bytes: np.ndarray) -> None:
        self._data = data
        self._ends = np.cumsum(num_bytes, dtype=np.int64)
        self._places = self._ends - num_bytes

    def take(self, sizes: np.ndarray) -> np.ndarray:
        """Return the next bytes, `sizes[i]` of rank `i`, in a new array."""
        places, stops = self._places, self._places + sizes
        self._places = stops
        parts = [self._data[a:b] for a, b in zip(places.tolist(), stops.tolist(), strict=True)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint8)

    def close(self) -> None:
        """Check that all bytes were read."""
        assert np.array_equal(self._places, self._ends), (self._places, self._ends)


def _check_headers(reader: _Reader, header: bytes, sources: Sequence[int]) -> None:
    """Read the ranks' headers. ValueError: one is not this rank's."""
    one = np.full(len(sources), 8, dtype=np.int64)
    sizes = reader.take(one).view(np.int64)
    received = reader.take(sizes).tobytes()
    if received == header * len(sources):
        return
    first = 0
    for source, size in zip(sources, sizes.tolist(), strict=True):
        _check_header(received[first : first + size], header, source)
        first += size


def _sums_by(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sum groups of values, `counts[i]` of them in group `i`."""
    sums, ends = _sums(values), np.cumsum(counts, dtype=np.int64)
    return np.asarray(sums[ends] - sums[ends - counts], dtype=np.int64)


def _tensor(data: np.ndarray, column: Column) -> Tensor:
    if not len(data):  # numpy's arrays without values have strides that torch does not view
        return torch.empty(0, dtype=column.dtype)
    return torch.from_numpy(data).view(column.dtype)


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
