"""Results and partial states of role calls that a run keeps, to resume a step at a later start.

`Origin`: the inputs of a role call in a few numbers, which a later start compares.

Whole numbers, booleans and texts are hashed and must be equal. For a float column two sums are
kept, of its values with keyed weights and of their magnitudes: on another number of ranks, the same
values differ in rounding. All are sums over rows, whatever the distribution of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.keyed_random import key64

_HALF = 1 << 32
_GOLDEN, _MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""Constants of splitmix64, as signed numbers."""

_TOLERANCE = 1e-5
"""Tolerance relative to a float column's sum of magnitudes: far above rounding errors."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Fingerprint of one call's inputs.

    Args:
        settings: digest of the call's configuration.
        sums: sums over the rows: of the two halves of their hashes, and two for each float column,
            in the order of the names. Over this rank's rows or, from `of_world`, over the world's.
    """

    settings: str
    sums: tuple[float, ...]

    def of_world(self, totals: Sequence[float]) -> Origin:
        """The world's origin, from the sums over all ranks of their `sums`."""
        first, second, *floats = totals
        return replace(self, sums=(first % _HALF, second % _HALF, *floats))

    def agrees(self, other: Origin) -> bool:
        """Whether both describe the same call, up to rounding of floats."""
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
    """The origin of a call with home rows.

    Args:
        settings: values whose `repr` identifies them, the same on every rank.
        names: the columns that the call reads. Tensors count if they have one value per token or
            row; wider ones were computed from these.
    """
    text = repr(sorted(settings.items()))
    hashes = _mix(batch.lengths + _salt("lengths"))
    place = _places(batch)
    floats: list[Tensor] = []
    for name in sorted(names):
        salt = _salt(name)
        if name in batch.objects:
            texts = batch.objects[name]
            # other objects do not travel: the exchange refuses them, naming their row
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
    """A number for every token's index in its row, int64 `[T]`."""
    place = torch.arange(batch.num_tokens) - batch.offsets()[:-1][batch.row_of_token()]
    return (place + 1) * _GOLDEN


def _salt(name: str) -> int:
    return key64(*name.encode())


def _text_hashes(texts: Sequence[str | None]) -> Tensor:
    """Hashes of texts, int64 `[B]`."""
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """The home result of a finished call.

    Args:
        rows: home rows; None if the result is `values`.
        places: (atom, index within the atom) of every row, `[B, 2]`; None without atoms.
        values: JSON values, equal on all ranks.
    """

    rows: Batch | None = None
    places: Tensor | None = None
    values: Any = None

    @property
    def home(self) -> Any:
        """The call's home result."""
        return self.values if self.rows is None else self.rows


@dataclass(frozen=True, kw_only=True, eq=False)
class PartialResult:
    """One rank's partial result of a stopped call.

    Args:
        rows: result rows, in the role's layout.
        values: JSON values, equal on all of the role's ranks.
        state: further state that only this rank can resume from, in the same layout.
    """

    rows: Batch | None = None
    values: Any = None
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """Kept data of one call: a record if it was finished, else a part.

    Args:
        name: `role.method`, or the call's label.
        step: step in which it ran.
        origin: origin of the world's rows; equal on all ranks.
        writes: whether the call changes its role.
        is_ahead: made for the next step, which looks it up.
        is_foreign: the record has the rows of the whole world, which find home by their places.
        part: empty on ranks outside the role.
    """

    name: str
    step: int
    origin: Origin
    writes: bool = False
    is_ahead: bool = False
    is_foreign: bool = False
    record: Record | None = None
    part: PartialResult | None = None


@dataclass(frozen=True, kw_only=True)
class Journal:
    """The kept calls that a stop saves, and that a resumed run starts with.

    Args:
        calls: kept calls, the same ones in the same order on all ranks.
    """

    calls: tuple[Kept, ...] = ()
