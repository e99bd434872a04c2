"""`SupportRecord`: tokens that each token of a sample was drawn from.

They are kept as bytes: lists of ids take tenfold memory.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
import torch

from spmdrl.batch import Ragged


@dataclass(kw_only=True, eq=False)
class SupportRecord:
    """Supports of the tokens drawn so far: the number of ids for each token, and all ids, int32."""

    counts: array[int] = field(default_factory=lambda: array("i"))
    ids: array[int] = field(default_factory=lambda: array("i"))

    @classmethod
    def of(cls, column: Ragged) -> SupportRecord:
        record = cls()
        record.counts.frombytes(column.counts.numpy().tobytes())
        record.ids.frombytes(column.values.numpy().tobytes())
        return record

    def append(self, ids: bytes) -> None:
        """Add the ids that the next token was drawn from, as bytes of this machine's int32."""
        self.counts.append(len(ids) // self.ids.itemsize)
        self.ids.frombytes(ids)

    def column(self, num_tokens: int) -> Ragged:
        """Return the column; it must have `num_tokens` tokens."""
        assert len(self.counts) == num_tokens, (len(self.counts), num_tokens)
        counts, ids = (np.array(part, dtype=np.int32) for part in (self.counts, self.ids))
        return Ragged(counts=torch.from_numpy(counts), values=torch.from_numpy(ids))


def rows_of(column: Ragged) -> list[bytes]:
    """Return each token's ids as bytes."""
    data, size = column.values.numpy().tobytes(), column.values.itemsize
    found, start = [], 0
    for count in column.counts.tolist():
        found.append(data[start : start + count * size])
        start += count * size
    return found
