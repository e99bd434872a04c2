"""What data are known by: digests and counts that a checkpoint keeps, equal on all ranks."""

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
    """A digest of a row's columns, whatever their order.

    Raises:
        ValueError, RecursionError: it cannot be written as JSON.
    """
    text = json.dumps(sorted(values.items()), default=_described, skipkeys=True)
    return hashlib.blake2b(text.encode(), digest_size=MARK_BYTES).digest()


def _described(value: Any) -> str:
    """What JSON does not know: equal on every rank, so no address of an object."""
    if isinstance(value, bytes | bytearray):
        return hashlib.blake2b(value, digest_size=MARK_BYTES).hexdigest()
    kind = type(value)
    return str(value) if kind.__module__ in ("datetime", "decimal", "uuid") else kind.__qualname__


class Known(Protocol):
    """A set whose items know their rows and their tokens."""

    def __len__(self) -> int: ...

    def marks(self) -> list[bytes]:
        """Of each item's row, see `row_mark`."""
        ...

    def ids(self) -> Iterator[Sequence[int] | NDArray[np.int32]]:
        """Token ids, text by text."""
        ...


@dataclass(frozen=True, kw_only=True)
class SetIdentity:
    """Args:
    count: items.
    rows: a digest of their rows, in order.
    tokens: a digest of what they are encoded as.
    """

    count: int
    rows: str
    tokens: str


def set_identity(data: Known) -> SetIdentity:
    """What a set is known by."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in data.ids():
        packed = np.asarray(ids, np.int32).tobytes()
        digest.update(len(packed).to_bytes(8, "little"))
        digest.update(packed)
    return SetIdentity(count=len(data), rows=rows_digest(data.marks()), tokens=digest.hexdigest())


def rows_digest(marks: Sequence[bytes]) -> str:
    """Of rows in order."""
    return hashlib.blake2b(b"".join(marks), digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Of what its ids mean."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = sorted(map(str, tokenizer.all_special_tokens))
    content = json.dumps([vocabulary, special]).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def text_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
