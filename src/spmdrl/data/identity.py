"""Identities of data: digests and counts that a checkpoint keeps, equal on all ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

MARK_BYTES = 8


def row_mark(values: Mapping[str, Any]) -> bytes:
    """Digest of a row's columns, in any order.

    Raises:
        ValueError, RecursionError: the row cannot be written as JSON.
    """
    text = json.dumps(sorted(values.items()), default=_described, skipkeys=True)
    return hashlib.blake2b(text.encode(), digest_size=MARK_BYTES).digest()


def _described(value: Any) -> str:
    """Describe a value that JSON cannot write, equally on every rank: without object addresses."""
    if isinstance(value, bytes | bytearray):
        return hashlib.blake2b(value, digest_size=MARK_BYTES).hexdigest()
    kind = type(value)
    return str(value) if kind.__module__ in ("datetime", "decimal", "uuid") else kind.__qualname__


class Known(Protocol):
    """Set whose items know their rows and their tokens."""

    def __len__(self) -> int: ...

    def marks(self) -> list[bytes]:
        """Digest of each item's row, see `row_mark`."""

    def ids(self) -> Iterator[Sequence[int] | NDArray[np.int32]]:
        """Token ids, text by text."""


@dataclass(frozen=True, kw_only=True)
class SetIdentity:
    """Args:
    count: number of items.
    rows: digest of their rows, in order.
    tokens: digest of their token ids.
    """

    count: int
    rows: str
    tokens: str


def set_identity(data: Known) -> SetIdentity:
    """Identify a set by its count and digests."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in data.ids():
        packed = np.asarray(ids, np.int32).tobytes()
        digest.update(len(packed).to_bytes(8, "little"))
        digest.update(packed)
    return SetIdentity(count=len(data), rows=rows_digest(data.marks()), tokens=digest.hexdigest())


def rows_digest(marks: Sequence[bytes]) -> str:
    """Digest of rows, given by their marks in order."""
    return hashlib.blake2b(b"".join(marks), digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer's vocabulary and special tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = sorted(map(str, tokenizer.all_special_tokens))
    content = json.dumps([vocabulary, special]).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def text_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
