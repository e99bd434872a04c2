"""`Saver` writes and restores checkpoints of the trained roles, and exports the models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from spmdrl.checkpoint.index import CHECKPOINTS, Tensors
from spmdrl.checkpoint.journal import merge_journals, pack_journal, unpack_journal
from spmdrl.checkpoint.load import load_tensors, read_private, resume_point, set_aside
from spmdrl.checkpoint.owners import frozen_slices, only, slice_owners
from spmdrl.checkpoint.rng import restore_rng
from spmdrl.checkpoint.writing import CheckpointWriter, Retention, remove_partial
from spmdrl.config.sections import Config
from spmdrl.distributed.reduce import agreed, gather_objects, world_any
from spmdrl.keyed_random import NOISE_VERSION
from spmdrl.models.sharding import Slice
from spmdrl.role_spec import computing_dtype
from spmdrl.roles.custom import CustomRole
from spmdrl.roles.handles import Policy, Rollout
from spmdrl.roles.kept import Journal
from spmdrl.roles.model_calls import OPTIMIZER, WEIGHTS, ModelRole
from spmdrl.roles.policy_sync import SyncState
from spmdrl.run.assembled import Assembly
from spmdrl.run.config_changes import changed_keys, describe_journal
from spmdrl.run.data_identity import DataIdentity
from spmdrl.run.loss_check import TOLERANCES, LossCheck
from spmdrl.run.resume_point import Moment, Resumed
from spmdrl.supervision.attempt import Attempt
from spmdrl.weights.layout import WeightLayout
from spmdrl.world import World

log = logging.getLogger(__name__)


class Saver:
    """Saves and restores the trained roles. Tensors on the host are read there.

    Args:
        config: gives `run_dir`, `checkpoint`, the seed and the roles' models.
        assembly: the roles, and what every rank holds of each of them.
        attempt: checked for ownership before a checkpoint is published; None: no check.
        progress: called while something is written.
        data: identity of the run's data; None: checkpoints keep none.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        assembly: Assembly,
        attempt: Attempt | None = None,
        progress: Callable[[], None] = lambda: None,
        data: DataIdentity | None = None,
    ) -> None:
        self._data = data
        self._config, self._world, self._memory = config, world, assembly.memory
        self._trained, self._layouts = assembly.trained, assembly.layouts
        self._state_layouts = assembly.state_layouts
        self._assembly = assembly
        self._syncs = {rollout: sync for (_, rollout), sync in assembly.syncs.items()}
        self._root = Path(config.run_dir) / "checkpoints"
        self._last_saved: str | None = None
        section = config.checkpoint
        retention = Retention(last=section.keep_last, every=section.keep_every)
        self._writer = CheckpointWriter(self._root, world, retention, progress=progress)
        if attempt is not None:
            self._writer = CheckpointWriter(
                self._root,
                world,
                retention,
                tag=attempt.directory.name,
                permit=attempt.check_owner,
                published=attempt.write_progress,
                progress=progress,
            )
        dtype = computing_dtype(config, "cuda" if "cuda" in world.device_types else "cpu")
        self._check = LossCheck(world, self._trained, TOLERANCES[dtype])

    @cached_property
    def _owned(self) -> dict[str, frozenset[Slice]]:
        """Role -> slices that this rank writes, both of master weights and of moments."""
        return {
            name: self._owned_of(layout)
            for name, layout in self._state_layouts.items()
            if name in self._trained
        }

    def _owned_of(self, layout: WeightLayout) -> frozenset[Slice]:
        rank = self._world.rank
        return frozenset(s for s, owner in slice_owners(layout).items() if owner == rank)

    def versions(self) -> dict[str, int]:
        """Current weight versions of the policies, by role."""
        roles = self._assembly.roles.items()
        return {name: role.version for name, role in roles if isinstance(role, Policy)}

    def save(self, moment: Moment, journal: Journal, *, calls: int | None = None) -> None:
        """Copy everything for a checkpoint and begin to write it; `wait` waits for its end.

        Every rank of the world calls it.

        Args:
            moment: the state after the steps done, or at the beginning of the current step.
            journal: the calls that this rank keeps.
            calls: number of calls that the step has finished; None if the step has not begun:
                nothing is written then if a checkpoint of this moment exists.

        Raises:
            OSError: the previous checkpoint could not be written (raised on every rank).
        """
        name = f"step_{moment.steps_done:08d}"
        if calls is None and name == self._last_saved:
            return
        self._writer.wait()
        counters = {role: self._counters(self._trained[role]) for role in self._trained}
        losses = self._check.losses()  # before tensors are looked up: it moves them
        owned = dict(self._tensors(owned=True))
        held = self._held(counters, journal)
        if calls is not None:
            owned |= self._engine_copies(held)
        syncs = {
            name: asdict(sync.state(moment.steps_done, held=name in held))
            for name, sync in self._syncs.items()
        }
        state = {
            "steps_done": moment.steps_done,
            "seed": self._config.seed,
            "layout": self._layout_name(),
            "counters": counters,
            "versions": moment.versions,
            "losses": losses,
            "saved": moment.saved,
            "metrics_lines": moment.metrics_lines,
            "syncs": {} if calls is None else syncs,
            "config": self._config.model_dump(mode="json"),
            "noise": NOISE_VERSION,
            **({} if self._data is None else {"data": self._data.state}),
        }
        private = {**moment.generators, **pack_journal(journal), **self._custom_states()}
        full_name = name if calls is None else f"{name}+{calls:04d}"
        self._writer.begin(full_name, moment.steps_done, state, owned, private)
        self._last_saved = full_name

    def wait(self) -> None:
        """Wait until the checkpoint that was begun exists. Every rank of the world calls it.

        Raises:
            OSError: it could not be written, on every rank; older checkpoints are untouched.
        """
        self._writer.wait()

    @property
    def seconds(self) -> float | None:
        """Seconds until the last checkpoint was published, on rank 0; None before the first."""
        return self._writer.seconds

    @property
    def has_failed(self) -> bool:
        """Whether writing the checkpoint failed, so that `wait` would raise; only on rank 0."""
        return self._writer.has_failed

    def restore(self) -> Resumed:
        """Load the latest checkpoint if one exists and `checkpoint.resume` is true.

        With `checkpoint.resume: false` older checkpoints are set aside, so that no later start
        resumes from one of them.

        Raises:
            ValueError: the checkpoint is damaged, or of another model, seed or flow; or the loaded
                weights compute something else than when they were saved.
            OSError: older checkpoints could not be set aside.
        """
        if self._world.is_first:
            remove_partial(self._root)
        if not self._config.checkpoint.resume:
            aside = set_aside(self._root)
            if aside is not None:
                log.info("checkpoint.resume=false: the older checkpoints are kept as %s", aside)
            self._writer.adopt([])
            return Resumed()
        found = resume_point(self._root)
        if found is None:
            self._writer.adopt([])
            return Resumed()
        path, state = found
        if CHECKPOINTS in state:
            self._writer.adopt([path.name, *state[CHECKPOINTS]])
        self._compare(path, state)
        is_same = state["layout"] == self._layout_name()
        is_drawn_alike = state.get("noise", 1) == NOISE_VERSION or not self._samples()
        if not is_drawn_alike and self._world.is_first:
            log.warning(
                "%s was sampled with version %s of the noise, and this spmdrl draws with version "
                "%d: from here on the same seed gives other tokens, and a step that was stopped is "
                "done anew",
                *(path, state.get("noise", 1), NOISE_VERSION),
            )
        if not is_drawn_alike:
            state = {**state, "syncs": {}}
        self._load(path, state, with_engines=is_same)
        self._check.compare(state["losses"], str(path))
        journal = agreed(ValueError, lambda: self._restore_private(path, state, is_same=is_same))
        if not is_drawn_alike:
            journal = Journal()
        self._last_saved = path.name.partition(".")[0]
        log.info("continuing after step %d of %s", state["steps_done"], path)
        if state["steps_done"] >= self._config.steps:
            log.info(
                "all of steps=%d are done, only the run's end comes again: raise steps, or choose "
                "another run_dir",
                self._config.steps,
            )
        how = describe_journal(journal, is_same=is_same)
        if how:
            log.info("within the step that was stopped: %s", how)
        return Resumed(
            path=path,
            steps_done=int(state["steps_done"]),
            saved=state["saved"],
            metrics_lines=int(state["metrics_lines"]),
            journal=journal,
        )

    def _compare(self, path: Path, state: Mapping[str, Any]) -> None:
        """Refuse a run that cannot resume from a checkpoint, and warn of changed values and data.

        Raises:
            ValueError: the checkpoint is of another seed or flow.
        """
        if state["seed"] != self._config.seed:
            raise ValueError(
                f"{path} was made with seed={state['seed']}, the configuration has seed="
                f"{self._config.seed}: use that seed, another run_dir, or checkpoint.resume=false"
            )
        flow = state["config"]["flow"]
        # a user's own flow may be a copy of a shipped one, or may have moved to another file
        if flow != self._config.flow and ":" not in flow + self._config.flow:
            raise ValueError(
                f"{path} was made by flow={flow}, the configuration has flow={self._config.flow}: "
                "choose another run_dir, or checkpoint.resume=false"
            )
        if not self._world.is_first:  # all ranks have the same to say
            return
        for difference in changed_keys(state["config"], self._config):
            log.warning("the run goes on with other values: %s", difference)
        if self._data is not None and "data" in state:
            for text in self._data.differences(state["data"], int(state["steps_done"])):
                log.warning("the run goes on with other data: %s", text)

    def _load(self, path: Path, state: Mapping[str, Any], *, with_engines: bool) -> None:
        """Load the roles' tensors and counters, and the engines' own tensors if they were kept."""
        states = {name: SyncState(**found) for name, found in state["syncs"].items()}
        held = [name for name, found in states.items() if found.held and with_engines]
        with ExitStack() as stack:
            tensors = dict(self._tensors())
            for name in held:
                stack.enter_context(self._syncs[name].filling())
                tensors |= _named(f"{name}.engine", self._syncs[name].own_tensors())
            load_tensors(path, tensors)
        for name, found in states.items():
            self._syncs[name].resume(replace(found, held=name in held))
        for name, role in self._trained.items():
            if role.backend is not None:
                self._memory.prepare([(name, WEIGHTS), (name, OPTIMIZER)])
                role.backend.restored(state["counters"][name])
            if isinstance(role, Policy):
                role.version = state["versions"][name]

    def _restore_private(self, path: Path, state: Mapping[str, Any], *, is_same: bool) -> Journal:
        """Restore users' roles and, on as many ranks as before, generators; return the journal."""
        size, rank = state["layout"]["world_size"], self._world.rank
        own = Journal()
        if size == self._world.size:
            private = read_private(path, rank)
            restore_rng(private, self._world.device)
            own = unpack_journal(private)
        for name, role in self._custom_roles():
            self._restore_custom(path, state["layout"], name, role)
        if is_same:
            return own
        journals = [unpack_journal(read_private(path, other)) for other in range(size)]
        return merge_journals(journals, same_homes=size == self._world.size, own=own)

    def _samples(self) -> bool:
        return any(isinstance(role, Rollout) for role in self._assembly.roles.values())

    def _restore_custom(
        self, path: Path, saved: Mapping[str, Any], name: str, role: CustomRole
    ) -> None:
        """Restore a user's own role: each of its ranks gets back the state that it saved."""
        if name not in saved["roles"]:
            return
        prefix, rank, size = f"role/{name}/", self._world.rank, saved["world_size"]
        if saved["roles"][name] == role.mesh.describe():
            private = read_private(path, rank) if rank < size else {}
            role.restore(
                {k.removeprefix(prefix): t for k, t in private.items() if k.startswith(prefix)}
            )
        elif any(key.startswith(prefix) for r in range(size) for key in read_private(path, r)):
            raise ValueError(
                f"roles.{name}: {path} has its state for {saved['roles'][name]}, the "
                f"configuration gives it {role.mesh.describe()}: what a role of your own has "
                "saved comes back on the same ranks alone; give it those, or begin it anew "
                "under another name"
            )

    def _custom_roles(self) -> Iterator[tuple[str, CustomRole]]:
        for name, role in self._assembly.roles.items():
            if isinstance(role, CustomRole):
                yield name, role

    def _custom_states(self) -> dict[str, Tensor]:
        """States of the users' own roles on this rank."""
        return {
            f"role/{name}/{key}": tensor
            for name, role in self._custom_roles()
            for key, tensor in role.state().items()
        }

    def _layout_name(self) -> dict[str, Any]:
        """Ranks and meshes that must be the same for a rank to get its own state back."""
        roles = {name: role.mesh.describe() for name, role in self._assembly.roles.items()}
        return {"world_size": self._world.size, "roles": roles}

    def _held(self, counters: Mapping[str, Mapping[str, float]], journal: Journal) -> list[str]:
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

    def _engine_copies(self, rollouts: Sequence[str]) -> Tensors:
        """Copies of this rank's share of the engines' own weights, which later work may send away
        before everything is staged.
        """
        copies: dict[str, tuple[Tensor, tuple[Slice, ...]]] = {}
        for name in rollouts:
            sync = self._syncs[name]
            owned = self._owned_of(sync.own_layout(self._layouts[name]))
            tensors = {
                local: (self._memory.view(tensor).cpu().clone(), slices)
                for local, (tensor, slices) in sync.own_tensors().items()
            }
            copies |= only(_named(f"{name}.engine", tensors), owned) if tensors else {}
        return copies

    def _tensors(self, *, owned: bool = False) -> Tensors:
        """State of every trained role as `role.kind/NAME`; with `owned`, what is written here."""
        tensors: dict[str, tuple[Tensor, tuple[Slice, ...]]] = {}
        for name, role in self._trained.items():
            if role.backend is None:
                continue
            state = role.backend.state_tensors()
            held: Tensors = {n: (self._memory.view(t), slices) for n, (t, slices) in state.items()}
            if owned:
                frozen = frozen_slices(self._state_layouts[name])
                held = only(held, self._owned[name], frozen)
            tensors |= {f"{name}.{local}": part for local, part in held.items()}
        return tensors

    def _counters(self, role: ModelRole) -> dict[str, int | float]:
        """Counters of a role as its first rank knows them, on every rank."""
        own = role.backend.counters() if role.backend is not None else None
        counters = gather_objects(own)[role.mesh.ranks[0]]
        assert counters is not None, role.name
        return dict(counters)


def _named(group: str, tensors: Tensors) -> dict[str, tuple[Tensor, tuple[Slice, ...]]]:
    return {f"{group}/{name}": held for name, held in tensors.items()}
