"""Sketches of plans: a few ranks stand for all, and a weight sync is a number of bytes.

A sketch takes milliseconds at any number of ranks, so that many layouts can be compared. What it
leaves out (the groups of a sync, bytes that a rank already has) is in the plan of the best ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch

from spmdrl.models.local_shards import (
    KindTable,
    LocalShard,
    Table,
    WeightLayout,
    counted,
    named_bytes,
)
from spmdrl.models.sharding import num_values
from spmdrl.planning.engines import shares_tensors
from spmdrl.planning.layouts import role_layout, state_layout
from spmdrl.planning.parts import table_bytes
from spmdrl.role_spec import RoleSpec
from spmdrl.weights.cells import Cell
from spmdrl.weights.plan import NUM_SLOTS, SyncPlan, find_shared
from spmdrl.weights.rounds import CellRange
from spmdrl.weights.routes import Route

HeldWeights = tuple[RoleSpec, WeightLayout]


@dataclass
class KeptLayouts:
    """Layouts and syncs of one configuration's models: the plans of a search differ in one role
    only, or in none.

    Args:
        sketches: the plans are sketches: of a few ranks, with estimates of the syncs.
    """

    sketches: bool = False
    _layouts: dict[object, WeightLayout] = field(default_factory=dict)
    _states: dict[object, WeightLayout] = field(default_factory=dict)
    _syncs: dict[object, SyncPlan] = field(default_factory=dict)

    def maker(self, specs: Iterable[RoleSpec]) -> Callable[[RoleSpec, int], WeightLayout]:
        """A function in place of `role_layout` for roles that are placed so."""
        return partial(self._layout, sketched_ranks(specs) if self.sketches else None)

    def states(self, spec: RoleSpec, layout: WeightLayout) -> WeightLayout:
        """`state_layout` of a layout that this object keeps."""
        key = (spec.name, spec.backend, id(layout))
        if key not in self._states:
            self._states[key] = state_layout(spec, layout)
        return self._states[key]

    def sync(
        self,
        make: Callable[[HeldWeights, HeldWeights, frozenset[str]], SyncPlan],
        source: HeldWeights,
        target: HeldWeights,
        merged: frozenset[str],
    ) -> SyncPlan:
        """The sync that `make` plans between two layouts that this object keeps."""
        key = (id(source[1]), id(target[1]), shares_tensors(target[0]), merged)
        if key not in self._syncs:
            self._syncs[key] = make(source, target, merged)
        return self._syncs[key]

    def _layout(self, only: frozenset[int] | None, spec: RoleSpec, blocks: int) -> WeightLayout:
        """`role_layout` of the ranks, made once for every place of a role."""
        placement = spec.placement
        degrees = tuple(placement.degrees.items())
        key = (spec.name, spec.backend, spec.adapter, blocks, only, placement.ranks, degrees)
        if key not in self._layouts:
            layout = role_layout(spec, blocks, only)
            if self.sketches:
                made = {id(table): _made(table) for table in layout.values()}
                layout = {rank: made[id(table)] for rank, table in layout.items()}
            self._layouts[key] = layout
        return self._layouts[key]


class _KeptTable(KindTable):
    """A table that makes each of its tensors once: many sketches read the same few tables."""

    def __init__(self, table: KindTable) -> None:
        super().__init__(table.kinds, table.shards)
        self._made: dict[str, LocalShard] = {}

    def __getitem__(self, local_name: str) -> LocalShard:
        if local_name not in self._made:
            self._made[local_name] = super().__getitem__(local_name)
        return self._made[local_name]


def _made(table: Table) -> Table:
    return _KeptTable(table) if isinstance(table, KindTable) else table


def sketched_ranks(specs: Iterable[RoleSpec]) -> frozenset[int]:
    """The first and the last rank of every role: they have most and least to hold."""
    ends = ((spec.placement.ranks[0], spec.placement.ranks[-1]) for spec in specs)
    return frozenset(rank for pair in ends for rank in pair)


def sketch_sync(
    node_size: int,
    bucket_bytes: int,
    source: HeldWeights,
    target: HeldWeights,
    merged: frozenset[str],
) -> SyncPlan:
    """Stand-in for a sync's plan: the bytes that the last rank of the target lacks, in rounds.

    Args:
        source, target: role and layout of the policy and of a rollout.
        merged: see `plan_sync`.
    """
    (policy, held), (rollout, wanted) = source, target
    shared = find_shared(held if shares_tensors(rollout) else {}, wanted, merged)
    rank = rollout.placement.ranks[-1]
    lacking = table_bytes(wanted[rank]) - named_bytes(wanted[rank], shared[rank])
    slot = max(1, 2 * bucket_bytes // NUM_SLOTS)
    moves = any(len(shared[r]) < len(table) for r, table in wanted.items())
    here = held.get(rank)
    copied = here is not None and _numel(here) >= _numel(wanted[rank])
    route = Route((rank,), (), ())
    if not copied:
        server = _server(policy, held, rank, node_size)
        route = Route((), ((server, rank),), ())
    count = max(1, -(-lacking // slot))
    cell = Cell((0,), (-(-lacking // count),), torch.uint8, (rank,), (rank,))
    return SyncPlan(
        shared=shared,
        patterns=(((cell, 0),),),
        routes=(route,),
        groups=(),
        rounds=((CellRange("all", 0, 0, 1),),) * (count * moves),
        frozen_rounds=(),
        slot_bytes=slot,
        world_size=max(*policy.placement.ranks, *rollout.placement.ranks) + 1,
        shared_bytes=0,
        copied_bytes=lacking * copied,
        gathered_bytes=lacking * (not copied),
        moved_bytes=lacking * (not copied),
    )


def _server(policy: RoleSpec, held: WeightLayout, rank: int, node_size: int) -> int:
    """A rank that could send: of the node, if the policy's ranks there hold the whole model."""
    node = rank // node_size
    near = [r for r in policy.placement.ranks if r // node_size == node and r != rank]
    own = _numel(held[policy.placement.ranks[0]])
    if near and own * (len(near) + 1) >= num_values(policy.model):
        return near[0]
    far = (r for r in policy.placement.ranks if r // node_size != node)
    return next(far, near[0] if near else policy.placement.ranks[0])


def _numel(table: Table) -> int:
    return sum(math.prod(shard.shape) * count for shard, count in counted(table))
