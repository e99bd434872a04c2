"""The plan of a weight sync: a pure function of two layouts, equal on every rank."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from spmdrl.models.sharding import Slice
from spmdrl.weights.layout import WeightLayout, overlap


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One source slice, and who needs it.

    Args:
        local_name: the source's local tensor on `owner`.
        piece: the slice.
        owner: the lowest rank that holds it.
        receivers: target ranks that need a part of it and do not hold it themselves.
    """

    local_name: str
    piece: Slice
    owner: int
    receivers: tuple[int, ...]


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
        for rank, table in target.items():
            for name, held in table.items():
                if name in self.shared[rank]:
                    how = "shared"
                else:
                    gathered = any(piece.name in moved for piece in held.slices)
                    how = "gathered" if gathered else "copied"
                key = (re.sub(r"\.\d+\.", ".*.", name), how)
                bytes_by[key] = bytes_by.get(key, 0) + held.num_bytes
        return [f"{name:<36} {how:<9} {n:>16,} bytes" for (name, how), n in bytes_by.items()]


def plan_sync(source: WeightLayout, target: WeightLayout) -> SyncPlan:
    """Same tensor: share. Same rank: copy. Else: one transfer for each distinct source slice.

    Raises:
        ValueError: the source does not hold all that the target needs, naming the tensor.
    """
    shared = {
        rank: frozenset(
            name for name, held in table.items() if source.get(rank, {}).get(name) == held
        )
        for rank, table in target.items()
    }
    owners, holders = _owners(source), _holders(source)
    transfers: list[Transfer] = []
    copied = gathered = 0
    for name, entries in _needs(target, shared).items():
        pieces = owners.get(name, {})
        _check_covered(name, pieces, [held for _, held, _ in entries])
        for piece, (owner, local_name) in pieces.items():
            takers = [
                (rank, itemsize * math.prod(high - low for low, high in ranges))
                for rank, held, itemsize in entries
                if (ranges := overlap(piece, held)) is not None
            ]
            if not takers:
                continue
            receivers = dict.fromkeys(r for r, _ in takers if r not in holders[piece])
            gathered += sum(num_bytes for rank, num_bytes in takers if rank in receivers)
            copied += sum(num_bytes for rank, num_bytes in takers if rank not in receivers)
            transfers.append(
                Transfer(
                    local_name=local_name, piece=piece, owner=owner, receivers=tuple(receivers)
                )
            )
    return SyncPlan(
        shared=shared,
        transfers=tuple(transfers),
        shared_bytes=sum(target[r][n].num_bytes for r, names in shared.items() for n in names),
        copied_bytes=copied,
        gathered_bytes=gathered,
    )


def _check_covered(name: str, pieces: Iterable[Slice], needed: Iterable[Slice]) -> None:
    for held in set(map(key, needed)):
        ranges = [found for piece in pieces if (found := overlap(piece, held)) is not None]
        count = sum(math.prod(high - low for low, high in found) for found in ranges)
        if count != held.numel or any(piece.shape != held.shape for piece in pieces):
            raise ValueError(
                f"weight sync: the source holds {count} of the {held.numel} values of {name} "
                f"{held.shape} that the target needs: are both roles of one model?"
            )


def key(piece: Slice) -> Slice:
    """A slice apart from where it lies locally."""
    return replace(piece, offset=0)


def _needs(
    target: WeightLayout, shared: Mapping[int, frozenset[str]]
) -> dict[str, list[tuple[int, Slice, int]]]:
    """HF name -> (rank, slice, item size) of every target slice that is not shared."""
    needs: dict[str, list[tuple[int, Slice, int]]] = {}
    for rank, table in target.items():
        for local_name, held in table.items():
            if local_name in shared[rank]:
                continue
            for piece in held.slices:
                needs.setdefault(piece.name, []).append((rank, piece, held.dtype.itemsize))
    return needs


def _owners(source: WeightLayout) -> dict[str, dict[Slice, tuple[int, str]]]:
    """HF name -> distinct slice -> (lowest rank that holds it, its local name)."""
    owners: dict[str, dict[Slice, tuple[int, str]]] = {}
    for rank in sorted(source):
        for local_name, held in source[rank].items():
            for piece in held.slices:
                owners.setdefault(piece.name, {}).setdefault(key(piece), (rank, local_name))
    return owners


def _holders(source: WeightLayout) -> dict[Slice, set[int]]:
    """Distinct slice -> all ranks that hold it."""
    holders: dict[Slice, set[int]] = {}
    for rank, table in source.items():
        for held in table.values():
            for piece in held.slices:
                holders.setdefault(key(piece), set()).add(rank)
    return holders
