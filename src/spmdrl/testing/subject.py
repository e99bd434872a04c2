"""`Candidate`: what is held to a contract. `Subject`: a candidate on one layout of the ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch

from spmdrl.batch import Batch
from spmdrl.config.roles import RoleSection
from spmdrl.config.training import TrainSection
from spmdrl.distributed.groups import ProcessGroups
from spmdrl.distributed.mesh import AXES, Mesh, format_ranks
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.hf import TensorSource
from spmdrl.models.sharding import Head
from spmdrl.placement import Placement
from spmdrl.planning.frozen import frozen_names
from spmdrl.planning.layouts import check_model
from spmdrl.planning.systems.protocol import TrainSystem
from spmdrl.planning.systems.registry import named_system
from spmdrl.role_spec import RoleSpec
from spmdrl.run.assembly.make_backend import make_backend
from spmdrl.testing.cases import WithAdded, tiny_config
from spmdrl.training.options import TrainOptions
from spmdrl.training.protocol import TrainBackend
from spmdrl.world import World

Feature = Literal[
    "adapters", "shared_bases", "freeze", "frozen_roles", "scalar_heads", "experts", "bfloat16"
]
"""Abilities that a backend may lack, if it refuses at start what would need them."""

MakeBackend = Callable[
    [RoleSpec, Mesh, TensorSource, TrainOptions, torch.device, TrainBackend | None],
    TrainBackend | None,
]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to spread a role over some ranks.

    Args:
        degrees: axis -> degree; they multiply to the number of ranks.
        section: keys of `roles.NAME` that say more of it (Megatron's, say).
        train: keys of `train` that differ with it.
        blocks: see `models.sharding.all_slices`.
    """

    degrees: Mapping[str, int] = field(default_factory=dict)
    section: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    blocks: int = 1

    def describe(self) -> str:
        found = {**self.degrees, **self.section, **self.train}
        if self.blocks > 1:
            found["blocks"] = self.blocks
        return " ".join(f"{name}={value}" for name, value in found.items()) or "one rank"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A train backend that is held to the contract.

    Args:
        name: its name in reports.
        train: keys of `train` that choose it: `backend`, and what else it needs.
        layouts: number of ranks -> layouts to try there.
        lacks: abilities that it does not have, and refuses, as well as those that its system says
            it lacks.
        model: the model of its roles, but for a mixture of experts.
        make: constructor of a role's backend; None on ranks outside the role's mesh.
    """

    name: str
    train: Mapping[str, Any]
    layouts: Mapping[int, Sequence[Layout]]
    lacks: frozenset[Feature] = frozenset()
    model: ModelConfig = field(default_factory=tiny_config)
    make: MakeBackend = make_backend

    @cached_property
    def system(self) -> TrainSystem:
        """The training system behind it, as plans know it."""
        options = self.train.get("backend_options", {})
        return named_system("train.backend", self.train["backend"], options)

    @property
    def lacking(self) -> frozenset[Feature]:
        """The abilities that it lacks."""
        system = self.system
        found: set[Feature] = set(self.lacks)
        if not system.has_adapters:
            found |= {"adapters", "shared_bases"}
        if not system.freezes:
            found.add("freeze")
        return frozenset(found)


def layouts_of(axes: Collection[str], size: int) -> tuple[Layout, ...]:
    """Return a layout of `size` ranks for each axis, and one with half of them along each of two.

    Args:
        axes: the axes that a system can divide a model over; `ep` is left out.
    """
    known = [axis for axis in AXES if axis in axes]
    if size == 1:
        return (Layout(),)
    degrees = [{axis: size} for axis in known if size == 2 or axis.startswith("dp")]
    if size % 2 == 0 and size > 2:
        degrees += [{one: size // 2, other: 2} for one, other in combinations(known, 2)]
    return tuple(Layout(degrees=own) for own in degrees)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A role that a clause asks for.

    Args:
        ranks: its world ranks; None: all.
        layout: how it is spread; None: the subject's layout.
        base: the role whose weights it shares.
        seed: that of the values of its adapter and scalar head; other weights have one.
        train: keys of `train` that differ from `TRAIN`.
        freeze: its `roles.NAME.freeze`.
    """

    model: ModelConfig
    name: str = "policy"
    trained: bool = True
    head: Head = "lm"
    adapter: Adapter | None = None
    base: Role | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0
    weights: TensorSource | None = None
    ranks: tuple[int, ...] | None = None
    layout: Layout | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()

    @property
    def source(self) -> TensorSource:
        if self.weights is not None:
            return self.weights
        return WithAdded(self.model, self.adapter, seed=self.seed)


TRAIN: Mapping[str, Any] = {
    "microbatch_tokens": 64,
    "lr": 1e-2,
    # with AdamW's usual eps a gradient of 0 up to rounding (a key's bias) moves its weight by lr
    "eps": 1e-3,
    "weight_decay": 0.1,
    "head_chunk": 16,
}
TOTAL_STEPS = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Role:
    """A role as made.

    Args:
        backend: its backend on this rank; None outside its mesh.
    """

    ask: Ask
    spec: RoleSpec
    mesh: Mesh
    options: TrainOptions
    backend: TrainBackend | None

    @property
    def held(self) -> TrainBackend:
        """The backend on a rank of the mesh."""
        assert self.backend is not None, f"rank outside of {self.mesh.describe()}"
        return self.backend

    def share(self, rows: Batch, empty: int | None = None) -> Batch:
        """Return the rows of this rank's replica: whole groups, unequal numbers of them.

        Args:
            empty: a replica that gets none, if there are others.
        """
        return shares(rows, self.mesh.size("dp"), empty)[self.mesh.coordinate("dp")]


def shares(rows: Batch, count: int, empty: int | None = None) -> list[Batch]:
    """Divide rows among replicas: whole groups, and unequal numbers of them.

    Args:
        empty: a replica that gets none, if there are others.
    """
    used = [i for i in range(count) if i != empty] if count > 1 else [0]
    groups = rows["prompt_ids"].tolist()
    order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    owner = [used[min(order[group], len(used) - 1)] for group in groups]
    return [
        rows.select([i for i, other in enumerate(owner) if other == replica])
        for replica in range(count)
    ]


class Subject:
    """A candidate on one layout of the ranks of a process group that runs.

    Args:
        layout: the layout of roles that do not ask for another one.
        groups: process groups that earlier subjects have made.
    """

    def __init__(
        self,
        candidate: Candidate,
        world: World,
        layout: Layout,
        groups: ProcessGroups | None = None,
    ) -> None:
        self.candidate, self.world, self.layout = candidate, world, layout
        self.groups = ProcessGroups() if groups is None else groups

    def has(self, feature: str) -> bool:
        return feature not in self.candidate.lacking

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes that the candidate computes in."""
        return (torch.float32, torch.bfloat16) if self.has("bfloat16") else (torch.float32,)

    def ask(self, **given: Any) -> Ask:
        """Describe a role with the candidate's model; `given` are fields of `Ask`."""
        return Ask(**{"model": self.candidate.model, **given})

    def spec(self, ask: Ask) -> RoleSpec:
        """Make the spec of a role, as a configuration would make it."""
        layout = self.layout if ask.layout is None else ask.layout
        ranks = tuple(range(self.world.size)) if ask.ranks is None else ask.ranks
        keys = {**TRAIN, **self.candidate.train, **layout.train, **ask.train}
        return _spec(ask, ranks, layout, keys, self.world.device)

    def check(self, ask: Ask) -> None:
        """Refuse a role that cannot be, before anything is made, as a run does at its start.

        Raises:
            ValueError: the backend does not take it.
        """
        spec = self.spec(ask)
        specs = {spec.name: spec}
        if ask.base is not None:
            specs[ask.base.spec.name] = ask.base.spec
        check_model(spec, specs, replays_routing=False)
        frozen_names(spec)

    def role(self, ask: Ask) -> Role:
        """Make a role. Every rank of the world asks for the same ones in the same order."""
        self.check(ask)
        spec = self.spec(ask)
        layout = self.layout if ask.layout is None else ask.layout
        mesh = self.mesh(spec)
        base = None if ask.base is None else ask.base.backend
        options = _options(spec, layout.blocks)
        backend = None
        if mesh.is_member:
            device = self.world.device
            backend = self.candidate.make(spec, mesh, ask.source, options, device, base)
        return Role(ask=ask, spec=spec, mesh=mesh, options=options, backend=backend)

    def mesh(self, spec: RoleSpec) -> Mesh:
        """Make the mesh of a role; all ranks of the world call it."""
        place = spec.placement
        return Mesh(spec.name, place.ranks, place.degrees, spec.device_type, self.groups)

    def reference(self, ask: Ask, base: Role | None = None) -> Role:
        """Make the same role with the torch backend on this rank only.

        Args:
            base: a role that `reference` made, whose weights it shares.
        """
        keys = {**TRAIN, **ask.train, "backend": "torch"}
        own = replace(ask, base=base, layout=Layout())
        spec = _spec(own, (self.world.rank,), Layout(), keys, self.world.device)
        mesh = self.mesh(spec)
        options = _options(spec, 1)
        below = None if base is None else base.backend
        backend = make_backend(spec, mesh, own.source, options, self.world.device, below)
        return Role(ask=own, spec=spec, mesh=mesh, options=options, backend=backend)

    def describe(self) -> str:
        ranks = format_ranks(range(self.world.size))
        return f"{self.candidate.name} on ranks {ranks}: {self.layout.describe()}"


def _spec(
    ask: Ask,
    ranks: tuple[int, ...],
    layout: Layout,
    keys: Mapping[str, Any],
    device: torch.device,
) -> RoleSpec:
    train = TrainSection.model_validate(keys)
    section: dict[str, Any] = {**layout.section, "freeze": ask.freeze}
    if ask.base is not None:
        section["base"] = ask.base.spec.name
    kind = "value" if ask.head == "score" else ("policy" if ask.trained else "reference")
    return RoleSpec(
        name=ask.name,
        kind=kind,
        section=RoleSection.model_validate({**section, "trained": ask.trained}),
        train=train,
        placement=Placement(
            ranks=ranks, degrees={axis: layout.degrees.get(axis, 1) for axis in (*AXES, "ep")}
        ),
        path=Path(ask.name),
        model=ask.model,
        device_type="cuda" if device.type == "cuda" else "cpu",
        dtype=ask.dtype,
        trained=ask.trained,
        backend=train.backend,
        is_tiny=False,
        adapter=ask.adapter,
        base=section.get("base"),
    )


def _options(spec: RoleSpec, blocks: int) -> TrainOptions:
    return TrainOptions(
        **spec.train.model_dump(),
        total_steps=TOTAL_STEPS,
        param_dtype=spec.dtype,
        frozen=frozen_names(spec),
        blocks=blocks,
        seed=7,
    )
