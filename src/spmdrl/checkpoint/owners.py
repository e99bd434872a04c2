"""Owners of slices: one rank writes each slice, and holders write about equally many values."""

from __future__ import annotations

from collections.abc import Set

from spmdrl.checkpoint.index import Tensors
from spmdrl.models.local_shards import WeightLayout
from spmdrl.models.sharding import Slice
from spmdrl.weights.layout import key


def slice_owners(layout: WeightLayout) -> dict[Slice, int]:
    """Every distinct slice of a layout (apart from its local place) -> the rank that writes it.

    A pure function, so that ranks need no messages. Slices that only one rank holds come first,
    then larger ones first; each goes to its holder with the fewest values so far.
    """
    holders: dict[Slice, list[int]] = {}
    for rank in sorted(layout):
        for held in layout[rank].values():
            for piece in held.slices:
                holders.setdefault(key(piece), []).append(rank)
    load = dict.fromkeys(layout, 0)
    owners = {}
    for piece, ranks in sorted(
        holders.items(), key=lambda item: (len(item[1]) > 1, -item[0].numel)
    ):
        owner = min(ranks, key=lambda rank: (load[rank], rank))
        load[owner] += piece.numel
        owners[piece] = owner
    return owners


def frozen_slices(layout: WeightLayout) -> frozenset[Slice]:
    """The slices of a layout (apart from their local places) that have no optimizer state."""
    return frozenset(
        key(piece)
        for table in layout.values()
        for held in table.values()
        if held.frozen
        for piece in held.slices
    )


def only(tensors: Tensors, owned: Set[Slice], frozen: Set[Slice] = frozenset()) -> Tensors:
    """The tensors, each with those of its slices that are in `owned`.

    Each group of tensors must contain all of `owned`, or the checkpoint would lack some of it;
    `frozen` slices are required only of the weights.
    """
    kept = {
        name: (tensor, tuple(piece for piece in slices if key(piece) in owned))
        for name, (tensor, slices) in tensors.items()
    }
    found: dict[str, set[Slice]] = {}
    for name, (_, slices) in kept.items():
        found.setdefault(name.split("/", 1)[0], set()).update(map(key, slices))
    for group, here in found.items():
        needed = owned if group == "weights" else owned - frozen
        assert here == needed, (group, needed - here)
    return kept
