"""`Origin`: what a role call was made from, in a few numbers that a later start compares.

Whole numbers, booleans and texts are hashed: they must be the same. Of a float column two sums are
kept, of its values under keyed weights and of their sizes: on another number of ranks the same
values differ in rounding. All are sums over rows, so they do not depend on which rank has which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.keyed import key64

_HALF = 1 << 32
_GOLDEN, _MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""Those of splitmix64, as signed numbers."""

_TOLERANCE = 1e-5
"""Of a float column's sum of sizes: rounding is far below, other values are far above."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Of one call.

    Args:
        settings: a digest of the call's configuration.
        sums: of the rows: those of the halves of their hashes, and two of each float column, in the
            order of their names. Of this rank's rows, or, `of_world`, of the world's.
    """

    settings: str
    sums: tuple[float, ...]

    def of_world(self, totals: Sequence[float]) -> Origin:
        """The same with the sums of all ranks' `sums`."""
        first, second, *floats = totals
        return replace(self, sums=(first % _HALF, second % _HALF, *floats))

    def agrees(self, other: Origin) -> bool:
        """Whether both are of the same call, up to rounding of floats."""
        if self.settings != other.settings or len(self.sums) != len(other.sums):
            return False
        if self.sums[:2] != other.sums[:2]:
            return False
        for at in range(2, len(self.sums), 2):
            mine, theirs = self.sums[at : at + 2], other.sums[at : at + 2]
            limit = _TOLERANCE * max(mine[1], theirs[1])
            if any(abs(a - b) > limit for a, b in zip(mine, theirs, strict=True)):
                return False
        return True


def origin_of(settings: Mapping[str, Any], batch: Batch, names: Sequence[str]) -> Origin:
    """Of a call with home rows.

    Args:
        settings: whose `repr` tells other values from these, on every rank alike.
        names: the columns that the call reads. Of tensors those with one value for a token or a
            row count; wider ones were computed from them.
    """
    text = repr(sorted(settings.items()))
    hashes = _mix(batch.lengths + _salt("lengths"))
    place = _places(batch)
    floats: list[Tensor] = []
    for name in sorted(names):
        salt = _salt(name)
        if name in batch.objects:
            texts = batch.objects[name]
            # anything else does not travel: the exchange refuses it, with its place
            if all(text is None or isinstance(text, str) for text in texts):
                hashes += _mix(_text_hashes(texts) + salt)
        elif name in batch.ragged:
            ragged = batch.ragged[name]
            token = torch.arange(batch.num_tokens).repeat_interleave(ragged.counts.long())
            values = torch.zeros(batch.num_tokens, dtype=torch.int64)
            values.index_add_(0, token, _mix(ragged.values.long()))
            hashes += _mix(batch.row_sum(_mix(values + ragged.counts + place)) + salt)
        elif (column := batch[name]).dim() != 1:
            continue
        elif column.is_floating_point():
            wide = column.detach().double().nan_to_num()
            floats.append(wide if name in batch.tokens else wide[batch.row_of_token()])
        elif name in batch.tokens:
            hashes += _mix(batch.row_sum(_mix(column.long() + place)) + salt)
        else:
            hashes += _mix(column.long() + salt)
    hashes = _mix(hashes)
    weights = (_mix(hashes[batch.row_of_token()] + place) >> 40).double() / (1 << 23)
    sums = [number for f in floats for number in ((f * weights).sum(), f.abs().sum())]
    halves = [int((half & (_HALF - 1)).sum()) % _HALF for half in (hashes >> 32, hashes)]
    return Origin(
        settings=blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest(),
        sums=(*map(float, halves), *map(float, sums)),
    )


def _places(batch: Batch) -> Tensor:
    """A number for every token's place in its row, int64 `[T]`."""
    place = torch.arange(batch.num_tokens) - batch.offsets()[:-1][batch.row_of_token()]
    return (place + 1) * _GOLDEN


def _salt(name: str) -> int:
    return key64(*name.encode())


def _text_hashes(texts: Sequence[str | None]) -> Tensor:
    """int64 `[B]`."""
    digests = [
        blake2b(b"" if t is None else b"t" + t.encode(errors="surrogatepass"), digest_size=8)
        for t in texts
    ]
    numbers = [int.from_bytes(d.digest(), "little", signed=True) for d in digests]
    return torch.tensor(numbers, dtype=torch.int64)


def _mix(x: Tensor) -> Tensor:  # int64, any shape; products wrap
    """splitmix64's finaliser (Steele, Lea, Flood 2014)."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))
