"""`RoleStates`: what a checkpoint keeps of the roles on this rank, and how they get it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from spmdrl.checkpoint.index import Tensors
from spmdrl.checkpoint.load import load_tensors, read_private
from spmdrl.checkpoint.owners import frozen_slices, only, owned_slices
from spmdrl.distributed.reduce import gather_objects, world_any
from spmdrl.models.local_shards import WeightLayout
from spmdrl.models.tensors import Slice
from spmdrl.roles.custom import CustomRole
from spmdrl.roles.handles import Policy, Rollout
from spmdrl.roles.judge import Judge
from spmdrl.roles.kept import Journal
from spmdrl.roles.model_calls import OPTIMIZER, WEIGHTS
from spmdrl.roles.policy_sync import SyncState
from spmdrl.run.assembled import Assembly
from spmdrl.weights.layout import trained_layout
from spmdrl.world import World


class RoleStates:
    """State of the trained roles, of users' own roles, and of engines that were stopped in a call.
    Every rank of the world calls its methods. Tensors on the host are read there.

    Args:
        assembly: the roles, and what every rank holds of each of them.
    """

    def __init__(self, world: World, assembly: Assembly) -> None:
        self._world, self._assembly, self._parts = world, assembly, assembly.parts
        self._trained = assembly.trained
        self._syncs = {rollout: sync for (_, rollout), sync in assembly.syncs.items()}

    @property
    def generates(self) -> bool:
        """Whether a role draws samples."""
        return any(isinstance(role, Rollout | Judge) for role in self._assembly.roles.values())

    def versions(self) -> dict[str, int]:
        """Current weight versions of the policies, by role."""
        roles = self._assembly.roles.items()
        return {name: role.version for name, role in roles if isinstance(role, Policy)}

    def layout(self) -> dict[str, Any]:
        """Ranks and meshes that must be the same for a rank to get its own state back."""
        roles = {name: role.mesh.describe() for name, role in self._assembly.roles.items()}
        return {"world_size": self._world.size, "roles": roles}

    def counters(self) -> dict[str, dict[str, int | float]]:
        """Counters of each trained role as its first rank knows them."""
        found = {}
        for name, role in self._trained.items():
            own = role.backend.counters() if role.backend is not None else None
            counters = gather_objects(own)[role.mesh.ranks[0]]
            assert counters is not None, name
            found[name] = dict(counters)
        return found

    def syncs(self, step: int, held: Sequence[str]) -> dict[str, dict[str, Any]]:
        """States of the syncs within a step, by rollout; `held`: see `held_engines`."""
        return {
            name: asdict(sync.state(step, held=name in held)) for name, sync in self._syncs.items()
        }

    def tensors(self, *, owned: bool = False) -> Tensors:
        """State of every trained role as `role.kind/NAME`; with `owned`, what is written here."""
        tensors: dict[str, tuple[Tensor, tuple[Slice, ...]]] = {}
        for name, role in self._trained.items():
            if role.backend is None:
                continue
            state = role.backend.state_tensors()
            held: Tensors = {n: (self._parts.view(t), slices) for n, (t, slices) in state.items()}
            if owned:
                frozen = frozen_slices(self._assembly.state_layouts[name][self._world.rank])
                held = only(held, self._owned[name], frozen)
            tensors |= {f"{name}.{local}": part for local, part in held.items()}
        return tensors

    def held_engines(
        self, counters: Mapping[str, Mapping[str, float]], journal: Journal
    ) -> list[str]:
        """Rollouts whose own weights must be kept: they were stopped in a call, and their policy
        has been updated since their sync (with `lag`, the two run concurrently).
        """
        generating = world_any(
            any(kept.part is not None and kept.part.rows is not None for kept in journal.calls)
        )
        held = []
        for (policy, rollout), sync in self._assembly.syncs.items():
            role = self._assembly.roles[rollout]
            assert isinstance(role, Rollout), rollout
            moved = counters[policy]["num_steps"] != role.version
            can = not world_any(not sync.can_hold())
            if generating and moved and can and sync.plan.moves:
                held.append(rollout)
        return held

    def engine_copies(self, rollouts: Sequence[str]) -> Tensors:
        """Copies of this rank's share of the engines' own weights, without frozen ones, which the
        policy has; later work may send the weights away before everything is staged.
        """
        copies: dict[str, tuple[Tensor, tuple[Slice, ...]]] = {}
        for name in rollouts:
            sync = self._syncs[name]
            owned = self._owned_of(sync.kept_layout(self._assembly.layouts[name]))
            tensors = {
                local: (self._parts.view(tensor).cpu().clone(), slices)
                for local, (tensor, slices) in sync.kept_tensors().items()
            }
            copies |= only(_named(f"{name}.engine", tensors), owned) if tensors else {}
        return copies

    def load(self, path: Path, state: Mapping[str, Any], *, with_engines: bool) -> None:
        """Load the trained roles' tensors and counters, and the engines' own tensors if kept."""
        states = {name: SyncState(**found) for name, found in state["syncs"].items()}
        held = [
            name
            for name, found in states.items()
            if found.held and with_engines and found.merged == self._syncs[name].merges
        ]
        with ExitStack() as stack:
            tensors = dict(self.tensors())
            for name in held:
                stack.enter_context(self._syncs[name].filling())
                tensors |= _named(f"{name}.engine", self._syncs[name].kept_tensors())
            load_tensors(path, tensors)
        for name, found in states.items():
            self._syncs[name].resume(replace(found, held=name in held))
        for name, role in self._trained.items():
            if role.backend is not None:
                self._parts.prepare([(name, WEIGHTS), (name, OPTIMIZER)])
                role.backend.restored(state["counters"][name])
            if isinstance(role, Policy):
                role.version = state["versions"][name]

    def custom(self) -> dict[str, Tensor]:
        """States of the users' own roles on this rank."""
        return {
            f"role/{name}/{key}": tensor
            for name, role in self._custom_roles()
            for key, tensor in role.state().items()
        }

    def restore_custom(self, path: Path, saved: Mapping[str, Any]) -> None:
        """Restore users' own roles: each of their ranks gets back the state that it saved.

        Args:
            path: the checkpoint.
            saved: the `layout` with which it was saved.

        Raises:
            ValueError: a role with a state has other ranks now.
        """
        rank, size = self._world.rank, saved["world_size"]
        for name, role in self._custom_roles():
            if name not in saved["roles"]:
                continue
            prefix = f"role/{name}/"
            if saved["roles"][name] == role.mesh.describe():
                private = read_private(path, rank) if rank < size else {}
                role.restore(
                    {k.removeprefix(prefix): t for k, t in private.items() if k.startswith(prefix)}
                )
            elif any(key.startswith(prefix) for r in range(size) for key in read_private(path, r)):
                raise ValueError(
                    f"roles.{name}: {path} has its state for {saved['roles'][name]}, the "
                    f"configuration gives it {role.mesh.describe()}: the state of a role of your "
                    "own is restored only on the same ranks; give it those, or begin it anew "
                    "under another name"
                )

    def _custom_roles(self) -> Iterator[tuple[str, CustomRole]]:
        for name, role in self._assembly.roles.items():
            if isinstance(role, CustomRole):
                yield name, role

    @cached_property
    def _owned(self) -> dict[str, frozenset[Slice]]:
        """Role -> slices that this rank writes, both of master weights and of moments."""
        specs, layouts = self._assembly.specs, self._assembly.state_layouts
        kept = {
            n: trained_layout(layouts[n]) if specs[n].has_fixed_base else layouts[n]
            for n in self._trained
        }
        return {name: self._owned_of(layout) for name, layout in kept.items()}

    def _owned_of(self, layout: WeightLayout) -> frozenset[Slice]:
        return owned_slices(layout, self._world.rank)


def _named(group: str, tensors: Tensors) -> dict[str, tuple[Tensor, tuple[Slice, ...]]]:
    return {f"{group}/{name}": held for name, held in tensors.items()}
