"""`Mesh`: one role's named axes over a subset of the world's ranks.

Every rank of the world constructs every mesh, in the same order, members or not: communicators are
created collectively. Outside its ranks a mesh has `is_member == False`, and asking it for a group
or a coordinate raises an error that names the role.

Expert parallelism folded into a role's other axes: pure functions of degrees.

`ep` adds no ranks. For the experts, the ranks of a pipeline stage (dp_replicate x dp_shard x cp x
tp, tp fastest) are viewed as edp x ep x etp, etp fastest, as Megatron-Core folds them (MoE Parallel
Folding, https://arxiv.org/abs/2504.14960): `etp` ranks divide each expert, `ep` parts hold
different experts, and `edp` ranks hold the same ones and sum their gradients. etp is the rest of tp
that ep leaves, tp / gcd(tp, ep): the parts are placed on the ranks of tp first, since these have
the same tokens and exchange none, and then on those of cp and dp. So ep is exchange x ep_tp: ranks
with the same tp coordinate send tokens to each other along `exchange`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise, product

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from spmdrl.distributed.groups import ProcessGroups

EXPERT_AXES = ("pp", "edp", "exchange", "ep_tp", "etp")
"""Expert axes, outermost first; their degrees multiply to the number of the role's ranks."""


def expert_degrees(degrees: Mapping[str, int]) -> dict[str, int]:
    """The degree of every expert axis; `degrees` are those of `mesh.AXES` and `ep`."""
    tp, ep = degrees.get("tp", 1), degrees.get("ep", 1)
    ep_tp = math.gcd(tp, ep)
    exchange = ep // ep_tp
    return {
        "pp": degrees.get("pp", 1),
        "edp": _data(degrees) // exchange,
        "exchange": exchange,
        "ep_tp": ep_tp,
        "etp": tp // ep_tp,
    }


def expert_place(degrees: Mapping[str, int], place: Mapping[str, int]) -> dict[str, int]:
    """A rank's index along every expert axis, and along `ep`: the part of the experts it holds.

    Args:
        place: the rank's index along every axis of `mesh.AXES`.
    """
    sizes = expert_degrees(degrees)
    data = place["dp_replicate"] * degrees.get("dp_shard", 1) + place["dp_shard"]
    data = data * degrees.get("cp", 1) + place["cp"]
    edp, exchange = divmod(data, sizes["exchange"])
    ep_tp, etp = divmod(place["tp"], sizes["etp"])
    ep = exchange * sizes["ep_tp"] + ep_tp
    return {
        "pp": place["pp"],
        "edp": edp,
        "exchange": exchange,
        "ep_tp": ep_tp,
        "etp": etp,
        "ep": ep,
    }


def check_ep(role: str, degrees: Mapping[str, int]) -> None:
    """Refuse an `ep` that the role's ranks cannot be divided into.

    If weights are sharded (dp_shard), tokens are exchanged within the ranks of one copy of them.

    Raises:
        ValueError: ep does not divide those ranks; the degrees are named.
    """
    tp, ep, cp = (degrees.get(axis, 1) for axis in ("tp", "ep", "cp"))
    shard = degrees.get("dp_shard", 1)
    exchange = ep // math.gcd(tp, ep)
    room, axes = (shard * cp, "dp_shard x cp") if shard > 1 else (_data(degrees), "dp x cp")
    if room % exchange:
        raise ValueError(
            f"roles.{role}.ep={ep} with tp={tp} leaves {exchange} parts of the experts to the "
            f"ranks of {axes}, which are {room}: choose an ep that divides {room * tp}, or other "
            "degrees"
        )


def _data(degrees: Mapping[str, int]) -> int:
    """Number of ranks along the data-parallel axes and cp."""
    return math.prod(degrees.get(axis, 1) for axis in ("dp_replicate", "dp_shard", "cp"))


AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Mesh axes, outermost first: the ranks of one tp group are neighbours."""

_MERGED: dict[str, tuple[str, ...]] = {
    "dp": ("dp_replicate", "dp_shard"),
    "shard": ("dp_shard", "cp"),
    "reduce": ("dp_replicate", "dp_shard", "cp"),
    "replica": ("cp", "tp"),
    "all": AXES,
}
_MERGED_EXPERT: dict[str, tuple[str, ...]] = {
    "ep": ("exchange", "ep_tp"),
    "expert": ("edp", "etp"),
    "every_expert": ("edp", "exchange", "ep_tp"),
}


class Mesh:
    """Named axes `pp, dp_replicate, dp_shard, cp, tp` over `ranks`.

    Merged axes exist too: `dp` (replicas that see different rows), `shard` (over which weights
    are sharded: dp_shard x cp), `reduce` (over which gradients are summed), `replica` (the ranks
    of a stage that see the same rows: cp x tp) and `all`. For experts the same ranks have the axes
    of `expert_degrees`, including `ep`, which adds no ranks, `expert`, the ranks that hold parts of
    the same experts (edp x etp), and `every_expert`, those that hold the same part of whatever
    experts (edp x ep).

    Args:
        role: the role's name, for error messages.
        ranks: world ranks, ascending, in mesh order (tp fastest).
        degrees: axis (or `ep`) -> degree; axes left out have degree 1.
        device_type: cpu or cuda, where the role computes; equal on all ranks of the world. If the
            world has only gloo (some rank has no GPU), the groups of a cuda mesh have NCCL.
        groups: the groups that other meshes may have made already; None: only this one's.

    Raises:
        ValueError: the degrees do not multiply to the number of ranks, or ep does not divide them;
            a rank is outside the world; the ranks do not ascend (torch sorts the ranks of a group,
            and an index along an axis must be the rank in the axis' group).
    """

    def __init__(
        self,
        role: str,
        ranks: Sequence[int],
        degrees: Mapping[str, int],
        device_type: str,
        groups: ProcessGroups | None = None,
    ) -> None:
        check_ranks(role, ranks, degrees, dist.get_world_size())
        self.role = role
        self.ranks = tuple(ranks)
        self.degrees = {axis: degrees.get(axis, 1) for axis in (*AXES, "ep")}
        self._rank = dist.get_rank()
        self.is_member = self._rank in self.ranks
        self._device_type = device_type
        self._backend = group_backend(device_type, dist.get_backend_config())
        shape = [self.degrees[axis] for axis in AXES]
        grid = torch.tensor(self.ranks, dtype=torch.int64).reshape(shape)
        self._grid = grid
        self._expert_degrees = expert_degrees(self.degrees)
        self._expert_grid = grid.reshape([self._expert_degrees[axis] for axis in EXPERT_AXES])
        self._all_groups = ProcessGroups() if groups is None else groups
        self._groups = self._create_groups()
        self._shard_mesh = self._make_shard_mesh(1)
        exchange = self._expert_degrees["exchange"]
        self._expert_shard_mesh = (
            self._shard_mesh if exchange == 1 else self._make_shard_mesh(exchange)
        )

    def _create_groups(self) -> dict[str, dist.ProcessGroup]:
        """This rank's group along every axis; axes over the same ranks share one group."""
        mine = {}
        dense = {**{a: (a,) for a in AXES}, **_MERGED}
        experts = {**{a: (a,) for a in EXPERT_AXES if a != "pp"}, **_MERGED_EXPERT}
        if self.degrees["pp"] > 1:
            del experts["expert"], experts["every_expert"]  # only the torch backend sums over them
        groups = [(name, _groups_of(self._grid, axes)) for name, axes in dense.items()]
        groups += [
            (name, _groups_of(self._expert_grid, axes, EXPERT_AXES))
            for name, axes in experts.items()
        ]
        for name, rows in groups:
            for ranks in rows:
                if len(ranks) == 1:
                    continue
                group = self._all_groups.over(ranks, self._backend)
                if self._rank in ranks:
                    mine[name] = group
        return mine

    def _make_shard_mesh(self, exchange: int) -> DeviceMesh | None:
        """The (replicate, shard) mesh of FSDP2 that this rank is in; all ranks make its groups.

        There is one for each (pp, tp) coordinate and each set of every `exchange`-th rank with it:
        these ranks hold the same experts.
        """
        if self.degrees["dp_shard"] == 1:
            return None
        mine = None
        rows = [
            ranks[i::exchange]
            for ranks in _groups_of(self._grid, ("dp_replicate", "dp_shard", "cp"))
            for i in range(exchange)
        ]
        for ranks in rows:
            grid = torch.tensor(ranks).reshape(self.degrees["dp_replicate"], -1)
            shards = [self._all_groups.over(own, self._backend) for own in grid.tolist()]
            if self.degrees["dp_replicate"] == 1:
                replicas = []
            else:
                replicas = [self._all_groups.over(own, self._backend) for own in grid.t().tolist()]
            if self._rank not in ranks:
                continue
            replica, shard = (grid == self._rank).nonzero()[0].tolist()
            if replicas:
                mine = DeviceMesh.from_group(
                    [replicas[shard], shards[replica]],
                    self._device_type,
                    mesh=grid,
                    mesh_dim_names=("replicate", "shard"),
                )
            else:
                mine = DeviceMesh.from_group(
                    shards[0], self._device_type, mesh_dim_names=("shard",)
                )
        return mine

    @property
    def shard_mesh(self) -> DeviceMesh | None:
        """FSDP2's mesh (1-D, or replicate x shard); None when dp_shard is 1."""
        self._require_member("shard_mesh")
        return self._shard_mesh

    @property
    def expert_shard_mesh(self) -> DeviceMesh | None:
        """FSDP2's mesh for experts: the ranks of `shard_mesh` that hold the same experts."""
        self._require_member("expert_shard_mesh")
        return self._expert_shard_mesh

    def size(self, axis: str) -> int:
        """The degree of an axis or merged axis; known on every rank of the world."""
        if axis == "ep":
            return self.degrees["ep"]
        if axis in self._expert_degrees:
            return self._expert_degrees[axis]
        return self._size_of(_MERGED.get(axis, (axis,)))

    def coordinate(self, axis: str) -> int:
        """This rank's index along an axis or merged axis.

        Raises:
            ValueError: this rank is not a member.
        """
        self._require_member(axis)
        if axis in _MERGED_EXPERT or axis in self._expert_degrees:
            axes = _MERGED_EXPERT.get(axis, (axis,))
            return coordinate_of(self._expert_grid, self._rank, axes, EXPERT_AXES)
        return coordinate_of(self._grid, self._rank, _MERGED.get(axis, (axis,)))

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The process group along an axis or merged axis; None where its degree is 1.

        Raises:
            ValueError: this rank is not a member.
        """
        self._require_member(axis)
        return self._groups.get(axis)

    def replicas(self) -> list[tuple[int, ...]]:
        """The ranks (all of pp, cp, tp) that take the same rows, one tuple per dp coordinate."""
        return _groups_of(self._grid, ("pp", "cp", "tp"))

    def describe(self) -> str:
        axes = " ".join(f"{a}={n}" for a, n in self.degrees.items() if n > 1) or "single"
        return f"ranks {format_ranks(self.ranks)}: {axes}"

    def _size_of(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.degrees[axis] for axis in axes)

    def _require_member(self, what: str) -> None:
        if not self.is_member:
            raise ValueError(
                f"rank {self._rank} is not in the mesh of role {self.role!r} "
                f"(ranks {format_ranks(self.ranks)}) and has no {what!r} there"
            )


def group_backend(device_type: str, world_backend: str) -> str | None:
    """The backend of a mesh's groups; None for the world's backend.

    `world_backend` is `dist.get_backend_config()`.
    """
    is_enough = "nccl" in world_backend or device_type == "cpu"
    return None if is_enough else "cpu:gloo,cuda:nccl"


def coordinates(degrees: Mapping[str, int]) -> list[dict[str, int]]:
    """Axis -> index for every place in mesh order (tp fastest): a pure function, for plans."""
    ranges = [range(degrees.get(axis, 1)) for axis in AXES]
    return [dict(zip(AXES, place, strict=True)) for place in product(*ranges)]


def places_of(
    ranks: Sequence[int], degrees: Mapping[str, int], only: Collection[int] | None = None
) -> Iterator[tuple[int, dict[str, int]]]:
    """Ranks with their coordinates.

    Args:
        only: the ranks to yield; None: all of them.
    """
    for rank, place in zip(ranks, coordinates(degrees), strict=True):
        if only is None or rank in only:
            yield rank, place


def check_ranks(
    role: str, ranks: Sequence[int], degrees: Mapping[str, int], world_size: int
) -> None:
    """ValueError unless `ranks` are ascending world ranks, as many as the degrees multiply to."""
    outside = [r for r in ranks if not 0 <= r < world_size]
    if outside:
        raise ValueError(
            f"roles.{role}.ranks names ranks {outside}, but the world has ranks 0-{world_size - 1}"
        )
    if not ranks or list(ranks) != sorted(set(ranks)):
        raise ValueError(f"roles.{role}.ranks must ascend and name each rank once: {list(ranks)}")
    unknown = set(degrees) - {*AXES, "ep"}
    if unknown:
        raise ValueError(f"roles.{role}: unknown axes {sorted(unknown)}; there are {AXES} and ep")
    needed = math.prod(degrees.get(axis, 1) for axis in AXES)
    if needed != len(ranks):
        shown = " x ".join(f"{a}={degrees.get(a, 1)}" for a in AXES if degrees.get(a, 1) != 1)
        raise ValueError(
            f"roles.{role}: {shown or 'degrees of 1'} make {needed} ranks, "
            f"but roles.{role}.ranks names {len(ranks)} ({format_ranks(ranks)})"
        )
    check_ep(role, degrees)


def _groups_of(
    grid: torch.Tensor, axes: Sequence[str], names: Sequence[str] = AXES
) -> list[tuple[int, ...]]:
    """The rank groups along `axes`, one for each coordinate of the other axes, in grid order."""
    along = [names.index(a) for a in axes]
    rest = [i for i in range(len(names)) if i not in along]
    size = math.prod(grid.shape[i] for i in along)
    return [tuple(row) for row in grid.permute(*rest, *along).reshape(-1, size).tolist()]


def coordinate_of(
    grid: torch.Tensor, rank: int, axes: Sequence[str], names: Sequence[str] = AXES
) -> int:
    position = (grid == rank).nonzero()[0].tolist()
    index = 0
    for axis in axes:
        i = names.index(axis)
        index = index * grid.shape[i] + position[i]
    return index


def format_ranks(ranks: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2,5`."""
    ordered = list(ranks)
    if not ordered:
        return "none"
    runs = [[ordered[0]]]
    for before, rank in pairwise(ordered):
        if rank == before + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
