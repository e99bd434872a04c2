"""`Saver`: checkpoints of the trained roles, and the model as a Hugging Face directory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from spmdrl.assemble import Assembly
from spmdrl.checkpoint.owners import only, slice_owners
from spmdrl.checkpoint.store import (
    Tensors,
    load_tensors,
    resume_point,
    save_checkpoint,
    set_aside,
)
from spmdrl.config import Config
from spmdrl.distributed.reduce import gather_objects
from spmdrl.models.hf import save_pretrained
from spmdrl.models.sharding import Slice
from spmdrl.passes import OPTIMIZER, WEIGHTS, ModelRole
from spmdrl.role_plan import role_head
from spmdrl.roles import Policy
from spmdrl.weights.gather import full_tensors

log = logging.getLogger(__name__)


Saved = dict[str, dict[str, float]]
"""What a flow wants to find again: by owner, numbers by name, equal on all ranks."""


class Saver:
    """Saves and restores the roles that are trained. What lies on the host is read there.

    Args:
        config: for `run_dir`, `checkpoint`, and the tokenizer's directory.
        assembly: the roles, and what every rank holds of each of them.
    """

    def __init__(self, config: Config, assembly: Assembly) -> None:
        self._config, self._memory = config, assembly.memory
        self._trained, self._layouts = assembly.trained, assembly.layouts
        self._state_layouts = assembly.state_layouts
        self._root = Path(config.run_dir) / "checkpoints"
        self._last_saved: int | None = None

    @cached_property
    def _owned(self) -> dict[str, frozenset[Slice]]:
        """Role -> the slices that this rank writes, of the masters and of the moments alike."""
        rank = dist.get_rank()
        return {
            name: frozenset(s for s, owner in slice_owners(layout).items() if owner == rank)
            for name, layout in self._state_layouts.items()
            if name in self._trained
        }

    def save(self, steps_done: int, saved: Saved) -> None:
        """A checkpoint after `steps_done` steps, unless it was the last one that this saver made.

        Every rank of the world calls it.

        Raises:
            OSError: it could not be written, on every rank; older checkpoints are untouched.
        """
        if steps_done == self._last_saved:
            return
        counters = {name: self._counters(role) for name, role in self._trained.items()}
        state = {
            "steps_done": steps_done,
            "seed": self._config.seed,
            "counters": counters,
            "saved": saved,
        }
        save_checkpoint(
            self._root,
            steps_done,
            self._tensors(owned=True),
            state,
            keep_last=self._config.checkpoint.keep_last,
        )
        self._last_saved = steps_done

    def restore(self) -> tuple[int, Saved]:
        """Load the latest checkpoint, if there is one and it is wanted; the steps it has done, and
        what `save` was given.

        With `checkpoint.resume: false` older checkpoints are set aside, so that a run that resumes
        later cannot go on from one of them.

        Raises:
            ValueError: the checkpoint is damaged, of another model, or of another seed.
            OSError: older checkpoints could not be set aside.
        """
        if not self._config.checkpoint.resume:
            aside = set_aside(self._root)
            if aside is not None:
                log.info("checkpoint.resume=false: the older checkpoints are kept as %s", aside)
            return 0, {}
        found = resume_point(self._root)
        if found is None:
            return 0, {}
        path, state = found
        if state["seed"] != self._config.seed:
            raise ValueError(
                f"{path} was made with seed={state['seed']}, the configuration has seed="
                f"{self._config.seed}: use that seed, another run_dir, or checkpoint.resume=false"
            )
        load_tensors(path, self._tensors())
        for name, role in self._trained.items():
            if role.backend is not None:
                self._memory.prepare([(name, WEIGHTS), (name, OPTIMIZER)])
                role.backend.restored(state["counters"][name])
            if isinstance(role, Policy):
                role.version = state["counters"][name]["num_steps"]
        log.info("continuing after step %d of %s", state["steps_done"], path)
        return int(state["steps_done"]), state["saved"]

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
                held = only(held, self._owned[name])
            tensors |= {f"{name}.{local}": part for local, part in held.items()}
        return tensors

    def _counters(self, role: ModelRole) -> dict[str, int | float]:
        """The role's counters as its first rank knows them, on every rank."""
        own = role.backend.counters() if role.backend is not None else None
        counters = gather_objects(own)[role.mesh.ranks[0]]
        assert counters is not None, role.name
        return dict(counters)


def _present(tensors: Iterator[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        assert tensor is not None, f"{name} was not gathered on this rank"
        yield name, tensor
