"""The plan of a weight sync: a pure function of two layouts, equal on every rank."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from spmdrl.models.sharding import Slice
from spmdrl.weights.layout import Held, WeightLayout, overlap


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
        transfers: source slices that some target rank copies, in model order.
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
    """Same tensor: share. Same rank: copy. Else: one transfer for each distinct source slice."""
    shared = {
        rank: frozenset(
            name for name, held in table.items() if source.get(rank, {}).get(name) == held
        )
        for rank, table in target.items()
    }
    needs = _needs(target, shared)
    owners = _owners(source)
    holders = _holders(source)
    transfers: list[Transfer] = []
    copied = gathered = 0
    for name, entries in needs.items():
        for piece, (owner, local_name) in owners[name].items():
            receivers = []
            for rank, held, itemsize in entries:
                ranges = overlap(piece, held)
                if ranges is None:
                    continue
                num_bytes = math.prod(high - low for low, high in ranges) * itemsize
                if rank in holders[name, piece]:
                    copied += num_bytes
                else:
                    gathered += num_bytes
                    receivers.append(rank)
            transfers.append(
                Transfer(
                    local_name=local_name,
                    piece=piece,
                    owner=owner,
                    receivers=tuple(dict.fromkeys(receivers)),
                )
            )
    return SyncPlan(
        shared=shared,
        transfers=tuple(transfers),
        shared_bytes=sum(target[r][n].num_bytes for r, names in shared.items() for n in names),
        copied_bytes=copied,
        gathered_bytes=gathered,
    )


def key(piece: Slice) -> Slice:
    """A slice apart from where it lies locally."""
    return Slice(name=piece.name, shape=piece.shape, start=piece.start, stop=piece.stop, offset=0)


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


def _holders(source: WeightLayout) -> dict[tuple[str, Slice], set[int]]:
    holders: dict[tuple[str, Slice], set[int]] = {}
    for rank, table in source.items():
        for held in table.values():
            for piece in held.slices:
                holders.setdefault((piece.name, key(piece)), set()).add(rank)
    return holders


def find(table: Mapping[str, Held], piece: Slice) -> tuple[str, Slice] | None:
    """The local name and slice of `table` that hold exactly `piece`, or None."""
    for local_name, held in table.items():
        for candidate in held.slices:
            if key(candidate) == key(piece):
                return local_name, candidate
    return None
