"""`Saver`: checkpoints of the trained roles, and the model as a Hugging Face directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.assemble import Assembly
from spmdrl.checkpoint.index import Tensors
from spmdrl.checkpoint.owners import frozen_slices, only, slice_owners
from spmdrl.checkpoint.reading import load_tensors, read_private, resume_point, set_aside
from spmdrl.checkpoint.rng import restore_rng, rng_state
from spmdrl.checkpoint.writing import CheckpointWriter, Retention, remove_partial
from spmdrl.config import Config
from spmdrl.distributed.reduce import agreed, gather_objects
from spmdrl.flows.loss_check import TOLERANCES, LossCheck
from spmdrl.launch import World
from spmdrl.models.hf import save_pretrained
from spmdrl.models.sharding import Slice
from spmdrl.passes import OPTIMIZER, WEIGHTS, ModelRole
from spmdrl.role_plan import role_head, training_dtype
from spmdrl.roles import Policy
from spmdrl.runtime.attempt import Attempt
from spmdrl.weights.gather import full_tensors

log = logging.getLogger(__name__)


_NO_MATTER = ("run_dir", "steps", "timeout_s", "limits", "log", "checkpoint", "evaluation")
"""Sections and keys whose changes are nobody's surprise."""

Saved = dict[str, dict[str, float]]
"""What a flow wants to find again: by owner, numbers by name, equal on all ranks."""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """Where a run goes on.

    Args:
        steps_done: before it.
        saved: what `save` was given.
        metrics_lines: of metrics.jsonl that belong to the steps done.
    """

    steps_done: int = 0
    saved: Saved = field(default_factory=dict)
    metrics_lines: int = 0


class Saver:
    """Saves and restores the roles that are trained. What lies on the host is read there.

    Args:
        config: for `run_dir`, `checkpoint`, and the tokenizer's directory.
        assembly: the roles, and what every rank holds of each of them.
        attempt: who may write; None: whoever comes.
        progress: told while something is written.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        assembly: Assembly,
        attempt: Attempt | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._world, self._memory = config, world, assembly.memory
        self._trained, self._layouts = assembly.trained, assembly.layouts
        self._state_layouts = assembly.state_layouts
        self._root = Path(config.run_dir) / "checkpoints"
        self._last_saved: int | None = None
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
        has_gpu = "cuda" in world.device_types
        dtype = training_dtype(config, torch.device("cuda" if has_gpu else "cpu"))
        self._check = LossCheck(world, self._trained, TOLERANCES[dtype])

    @cached_property
    def _owned(self) -> dict[str, frozenset[Slice]]:
        """Role -> the slices that this rank writes, of the masters and of the moments alike."""
        rank = self._world.rank
        return {
            name: frozenset(s for s, owner in slice_owners(layout).items() if owner == rank)
            for name, layout in self._state_layouts.items()
            if name in self._trained
        }

    def save(self, steps_done: int, saved: Saved, *, metrics_lines: int = 0) -> None:
        """Copy all for a checkpoint after `steps_done` steps, and begin to write it, unless it is
        there. `wait` ends it.

        Every rank of the world calls it.

        Raises:
            OSError: the checkpoint before it could not be written, on every rank.
        """
        if steps_done == self._last_saved:
            return
        self._writer.wait()
        state = {
            "steps_done": steps_done,
            "seed": self._config.seed,
            "world_size": self._world.size,
            "counters": {name: self._counters(role) for name, role in self._trained.items()},
            "losses": self._check.losses(),
            "saved": saved,
            "metrics_lines": metrics_lines,
            "config": self._config.model_dump(mode="json"),
        }
        self._writer.begin(
            f"step_{steps_done:08d}",
            steps_done,
            state,
            self._tensors(owned=True),
            rng_state(self._world.device),
        )
        self._last_saved = steps_done

    def wait(self) -> None:
        """Until the checkpoint that was begun is there. Every rank of the world calls it.

        Raises:
            OSError: it could not be written, on every rank; older checkpoints are untouched.
        """
        self._writer.wait()

    @property
    def has_failed(self) -> bool:
        """Rank 0: what was begun could not be written, and `wait` would raise."""
        return self._writer.has_failed

    def restore(self) -> Resumed:
        """Load the latest checkpoint, if there is one and it is wanted.

        With `checkpoint.resume: false` older checkpoints are set aside, so that a run that resumes
        later cannot go on from one of them.

        Raises:
            ValueError: the checkpoint is damaged, of another model, or of another seed; or what was
                loaded computes something else than what was saved.
            OSError: older checkpoints could not be set aside.
        """
        if self._world.is_first:
            remove_partial(self._root)
        if not self._config.checkpoint.resume:
            aside = set_aside(self._root)
            if aside is not None:
                log.info("checkpoint.resume=false: the older checkpoints are kept as %s", aside)
            return Resumed()
        found = resume_point(self._root)
        if found is None:
            return Resumed()
        path, state = found
        if state["seed"] != self._config.seed:
            raise ValueError(
                f"{path} was made with seed={state['seed']}, the configuration has seed="
                f"{self._config.seed}: use that seed, another run_dir, or checkpoint.resume=false"
            )
        for difference in changed_keys(state["config"], self._config):
            log.warning("the run goes on with other values: %s", difference)
        load_tensors(path, self._tensors())
        for name, role in self._trained.items():
            if role.backend is not None:
                self._memory.prepare([(name, WEIGHTS), (name, OPTIMIZER)])
                role.backend.restored(state["counters"][name])
            if isinstance(role, Policy):
                role.version = state["counters"][name]["num_steps"]
        self._check.compare(state["losses"], str(path))
        if state["world_size"] == self._world.size:
            private = agreed(ValueError, lambda: read_private(path, self._world.rank))
            restore_rng(private, self._world.device)
        self._last_saved = int(state["steps_done"])
        log.info("continuing after step %d of %s", state["steps_done"], path)
        return Resumed(
            steps_done=int(state["steps_done"]),
            saved=state["saved"],
            metrics_lines=int(state["metrics_lines"]),
        )

    def export(self, directory: Path) -> None:
        """Every trained role as a directory that `transformers` loads: the policy (or the only one)
        as `directory`, each other as `directory_NAME`. Every rank calls it.

        Raises:
            OSError: it could not be written, on every rank; an older directory is untouched.
        """
        first = "policy" if "policy" in self._trained else next(iter(self._trained))
        for name in self._trained:
            own = directory.with_name(f"{directory.name}_{name}")
            self._export(name, directory if name == first else own)

    def _export(self, name: str, directory: Path) -> None:
        role = self._trained[name]
        tensors = None
        if role.backend is not None:
            held = role.backend.local_tensors()
            tensors = {n: (self._memory.view(t), slices) for n, (t, slices) in held.items()}
        gathered = full_tensors(self._layouts[name], tensors)
        failure = None
        if dist.get_rank() == 0:
            try:
                save_pretrained(
                    _present(gathered),
                    role.config,
                    directory,
                    self._config.model_path(name),
                    head=role_head(self._config, name),
                )
            except OSError as error:
                failure = str(error)
        # whatever is left of the exchange, so that no rank waits for another
        for _ in gathered:
            pass
        failures = [text for text in gather_objects(failure) if text is not None]
        if failures:
            raise OSError(failures[0])

    def _tensors(self, *, owned: bool = False) -> Tensors:
        """Every trained role's state as `role.kind/NAME`; with `owned` what is written here."""
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
        """The role's counters as its first rank knows them, on every rank."""
        own = role.backend.counters() if role.backend is not None else None
        counters = gather_objects(own)[role.mesh.ranks[0]]
        assert counters is not None, role.name
        return dict(counters)


def changed_keys(saved: Mapping[str, Any], config: Config) -> list[str]:
    """What of the configuration decides results and differs from a checkpoint's."""
    before, now = _flat(saved), _flat(config.model_dump(mode="json"))
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.split(".")[0] not in _NO_MATTER
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        found |= inner or {prefix + key: value}
    return found


def _present(tensors: Iterator[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        assert tensor is not None, f"{name} was not gathered on this rank"
        yield name, tensor
