"""The plan of a weight sync: a pure function of two layouts, equal on every rank.

Every rank of the world computes it, so it goes over distinct slices and distinct sets of ranks, not
over pairs of ranks.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from spmdrl.models.sharding import Slice
from spmdrl.weights.layout import Held, Table, WeightLayout, overlap


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One source slice, and who needs it.

    Args:
        local_name: the source's local tensor on `owner`.
        piece: the slice.
        owner: the lowest rank that holds it.
        receivers: target ranks that need a part of it and do not hold it themselves; ascending.
        dtype: as it travels: the target's where that is narrower, else the source's.
    """

    local_name: str
    piece: Slice
    owner: int
    receivers: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class SyncPlan:
    """What `WeightSync` does.

    Args:
        shared: rank -> local names whose target tensor is the source's own storage.
        transfers: source slices that some target rank copies, in the target's order.
        shared_bytes, copied_bytes, gathered_bytes: over all target ranks, in the target's dtype:
            used in place, copied on the rank itself, received from another rank.
    """

    shared: Mapping[int, frozenset[str]]
    transfers: tuple[Transfer, ...]
    shared_bytes: int
    copied_bytes: int
    gathered_bytes: int

    def describe(self) -> str:
        def size(count: int) -> str:
            return f"{count:,} bytes"

        names = len(set().union(*self.shared.values())) if self.shared else 0
        return (
            f"shared {size(self.shared_bytes)} ({names} tensors in place), copied "
            f"{size(self.copied_bytes)}, gathered from other ranks {size(self.gathered_bytes)}"
        )

    def tensor_lines(self, target: WeightLayout) -> list[str]:
        """What becomes of each kind of tensor (layers together), with bytes over all ranks."""
        moved = {t.piece.name for t in self.transfers if t.receivers}
        bytes_by: dict[tuple[str, str], int] = {}
        for table, shared, ranks in _target_groups(target, self.shared):
            for name, held in table.items():
                if name in shared:
                    how = "shared"
                else:
                    gathered = any(piece.name in moved for piece in held.slices)
                    how = "gathered" if gathered else "copied"
                key = (re.sub(r"\.\d+\.", ".*.", name), how)
                bytes_by[key] = bytes_by.get(key, 0) + held.num_bytes * len(ranks)
        return [f"{name:<36} {how:<9} {n:>16,} bytes" for (name, how), n in bytes_by.items()]


def plan_sync(source: WeightLayout, target: WeightLayout) -> SyncPlan:
    """Same tensor: share. Same rank: copy. Else: one transfer for each distinct source slice.

    Raises:
        ValueError: the source does not hold all that the target needs, naming the tensor.
    """
    shared = _shared(source, target)
    sets = _RankSets()
    pieces = _pieces(source, sets)
    transfers: list[Transfer] = []
    copied = gathered = 0
    for name, needs in _needs(target, shared, sets).items():
        for piece, takers in _match(name, pieces.get(name, []), needs):
            for need, num_values in takers:
                num_bytes = num_values * need.dtype.itemsize
                num_outside = len(sets.outside((need.ranks,), piece.holders))
                gathered += num_bytes * num_outside
                copied += num_bytes * (len(sets[need.ranks]) - num_outside)
            wanted = tuple(sorted({need.ranks for need, _ in takers}))
            transfers.append(
                Transfer(
                    local_name=piece.local_name,
                    piece=piece.piece,
                    owner=sets[piece.holders][0],
                    receivers=sets.outside(wanted, piece.holders),
                    dtype=_narrower(piece.dtype, {need.dtype for need, _ in takers}),
                )
            )
    return SyncPlan(
        shared=shared,
        transfers=tuple(transfers),
        shared_bytes=sum(
            table[name].num_bytes * len(ranks)
            for table, names, ranks in _target_groups(target, shared)
            for name in names
        ),
        copied_bytes=copied,
        gathered_bytes=gathered,
    )


def key(piece: Slice) -> Slice:
    """A slice apart from where it lies locally."""
    if piece.offset == 0:
        return piece
    return Slice(name=piece.name, shape=piece.shape, start=piece.start, stop=piece.stop, offset=0)


class _RankSets:
    """Distinct sets of ranks by number (there are few), and the differences between them."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, ...], int] = {}
        self._sets: list[tuple[int, ...]] = []
        self._outside: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}

    def number(self, ranks: Iterable[int]) -> int:
        ordered = tuple(sorted(set(ranks)))
        if ordered not in self._numbers:
            self._numbers[ordered] = len(self._sets)
            self._sets.append(ordered)
        return self._numbers[ordered]

    def __getitem__(self, number: int) -> tuple[int, ...]:
        """The ranks of a set, ascending."""
        return self._sets[number]

    def outside(self, wanted: tuple[int, ...], holders: int) -> tuple[int, ...]:
        """The ranks of any of the sets `wanted` that are not in `holders`, ascending."""
        found = self._outside.get((wanted, holders))
        if found is None:
            union = {rank for number in wanted for rank in self._sets[number]}
            found = tuple(sorted(union.difference(self._sets[holders])))
            self._outside[wanted, holders] = found
        return found


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A distinct slice of the source; `local_name` on its lowest holder."""

    piece: Slice
    local_name: str
    dtype: torch.dtype
    holders: int


@dataclass(frozen=True, kw_only=True)
class _Need:
    """A distinct slice of the target, and the ranks to fill it on."""

    piece: Slice
    dtype: torch.dtype
    ranks: int


def _match(
    name: str, pieces: Sequence[_Piece], needs: Iterable[_Need]
) -> Iterator[tuple[_Piece, list[tuple[_Need, int]]]]:
    """Each of the source's pieces of a tensor with who needs how many values of it."""
    shapes = {piece.piece.shape for piece in pieces}
    ordered = sorted(pieces, key=lambda piece: piece.piece.start)
    firsts = [piece.piece.start[0] for piece in ordered]
    # of the pieces up to each one, so that it ascends whatever their ranges are
    stops = list(accumulate((piece.piece.stop[0] for piece in ordered), max))
    takers: list[list[tuple[_Need, int]]] = [[] for _ in ordered]
    for need in needs:
        held, num_found = need.piece, 0
        if not shapes <= {held.shape}:
            raise ValueError(
                f"weight sync: the target's {name} {held.shape} has the shapes {sorted(shapes)} "
                "at the source: are both roles of one model?"
            )
        low, high = bisect_right(stops, held.start[0]), bisect_left(firsts, held.stop[0])
        for i in range(low, high):
            ranges = overlap(ordered[i].piece, held)
            if ranges is not None:
                num_values = math.prod(stop - start for start, stop in ranges)
                takers[i].append((need, num_values))
                num_found += num_values
        if num_found != held.numel:
            raise ValueError(
                f"weight sync: the source holds {num_found} of the {held.numel} values of {name} "
                f"{held.shape} that the target needs: are both roles of one model?"
            )
    return ((piece, taken) for piece, taken in zip(ordered, takers, strict=True) if taken)


def _narrower(source: torch.dtype, wanted: set[torch.dtype]) -> torch.dtype:
    """The one dtype that is wanted where it takes fewer bytes than the source's."""
    first = min(wanted, key=str)
    return first if len(wanted) == 1 and first.itemsize < source.itemsize else source


def _shared(source: WeightLayout, target: WeightLayout) -> dict[int, frozenset[str]]:
    """Target rank -> local names that the source holds alike there."""
    found: dict[tuple[int, int], frozenset[str]] = {}
    shared = {}
    nothing: Table = {}
    for rank, table in target.items():
        own = source.get(rank, nothing)
        pair = (id(own), id(table))
        if pair not in found:
            found[pair] = frozenset(n for n, held in table.items() if own.get(n) == held)
        shared[rank] = found[pair]
    return shared


def _target_groups(
    target: WeightLayout, shared: Mapping[int, frozenset[str]]
) -> list[tuple[Table, frozenset[str], list[int]]]:
    """Ranks that hold the same table and share the same part of it, together."""
    groups: dict[tuple[int, frozenset[str]], tuple[Table, frozenset[str], list[int]]] = {}
    for rank, table in target.items():
        at = (id(table), shared[rank])
        groups.setdefault(at, (table, shared[rank], []))[2].append(rank)
    return list(groups.values())


def _needs(
    target: WeightLayout, shared: Mapping[int, frozenset[str]], sets: _RankSets
) -> dict[str, list[_Need]]:
    """HF name -> every distinct target slice that is not shared, in the target's order."""
    ranks_of: dict[str, dict[tuple[Slice, torch.dtype], list[int]]] = {}
    for table, names, ranks in _target_groups(target, shared):
        for local_name, held in table.items():
            for piece in held.slices if local_name not in names else ():
                at = (key(piece), held.dtype)
                ranks_of.setdefault(piece.name, {}).setdefault(at, []).extend(ranks)
    return {
        name: [
            _Need(piece=piece, dtype=dtype, ranks=sets.number(ranks))
            for (piece, dtype), ranks in found.items()
        ]
        for name, found in ranks_of.items()
    }


def _pieces(source: WeightLayout, sets: _RankSets) -> dict[str, list[_Piece]]:
    """HF name -> every distinct source slice."""
    tables: dict[int, tuple[Table, list[int]]] = {}
    for rank in sorted(source):
        tables.setdefault(id(source[rank]), (source[rank], []))[1].append(rank)
    found: dict[str, dict[Slice, tuple[str, Held, list[int]]]] = {}
    # in order of their lowest ranks: the first table to hold a slice is its owner's
    for table, ranks in tables.values():
        for local_name, held in table.items():
            for piece in held.slices:
                by_slice = found.setdefault(piece.name, {})
                by_slice.setdefault(key(piece), (local_name, held, []))[2].extend(ranks)
    return {
        name: [
            _Piece(piece=piece, local_name=local_name, dtype=held.dtype, holders=sets.number(ranks))
            for piece, (local_name, held, ranks) in by_slice.items()
        ]
        for name, by_slice in found.items()
    }
