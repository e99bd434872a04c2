"""`Saver` writes checkpoints of a run, and restores the run from the latest one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from spmdrl.checkpoint.index import CHECKPOINTS
from spmdrl.checkpoint.journal import merge_journals, pack_journal, unpack_journal
from spmdrl.checkpoint.load import read_private, resume_point, set_aside
from spmdrl.checkpoint.rng import restore_rng
from spmdrl.checkpoint.writing import CheckpointWriter, Retention, remove_partial
from spmdrl.config.sections import Config
from spmdrl.distributed.reduce import agreed
from spmdrl.keyed_random import NOISE_VERSION
from spmdrl.role_spec import computing_dtype
from spmdrl.roles.canary import TOLERANCES, LossCheck
from spmdrl.roles.kept import Journal
from spmdrl.run.assembled import Assembly
from spmdrl.run.base_sums import BASES, BaseSums, base_sums, check_bases
from spmdrl.run.data_identity import DataIdentity
from spmdrl.run.resume_point import Moment, Resumed, changed_keys, describe_journal
from spmdrl.run.role_states import RoleStates
from spmdrl.supervision.attempt import Attempt
from spmdrl.world import World

log = logging.getLogger(__name__)


class Saver:
    """Saves and restores a run: its roles, generators, journal and configuration.

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
        self._config, self._world = config, world
        self.states = RoleStates(world, assembly)
        self._bases = assembly.bases
        self._root = Path(config.run_dir) / "checkpoints"
        self._last_saved: str | None = None
        section = config.checkpoint
        retention = Retention(last=section.keep_last, every=section.keep_every)
        owned: dict[str, Any] = {}
        if attempt is not None:
            owned = {
                "tag": attempt.directory.name,
                "permit": attempt.check_owner,
                "published": attempt.write_progress,
            }
        self._writer = CheckpointWriter(self._root, world, retention, progress=progress, **owned)
        dtype = computing_dtype(config, "cuda" if "cuda" in world.device_types else "cpu")
        self._check = LossCheck(world, assembly.trained, TOLERANCES[dtype])

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
        counters = self.states.counters()
        bases = self._base_sums
        losses = self._check.losses()  # before tensors are looked up: it moves them
        owned = dict(self.states.tensors(owned=True))
        held = self.states.held_engines(counters, journal)
        if calls is not None:
            owned |= self.states.engine_copies(held)
        state = {
            "steps_done": moment.steps_done,
            "seed": self._config.seed,
            "layout": self.states.layout(),
            "counters": counters,
            "versions": moment.versions,
            "losses": losses,
            "saved": moment.saved,
            "metrics_lines": moment.metrics_lines,
            "syncs": {} if calls is None else self.states.syncs(moment.steps_done, held),
            "config": self._config.model_dump(mode="json"),
            "noise": NOISE_VERSION,
            BASES: bases,
            **({} if self._data is None else {"data": self._data.state}),
        }
        private = {**moment.generators, **pack_journal(journal), **self.states.custom()}
        full_name = name if calls is None else f"{name}+{calls:04d}"
        self._writer.begin(full_name, moment.steps_done, state, owned, private)
        self._last_saved = full_name

    def wait(self) -> None:
        """Wait until the checkpoint that was begun exists. Every rank of the world calls it.

        Raises:
            OSError: it could not be written, on every rank; older checkpoints are untouched.
        """
        self._writer.wait()

    @cached_property
    def _base_sums(self) -> BaseSums:
        """The models under adapters; every rank asks for it at once."""
        return base_sums(self._bases) if self._bases else {}

    def keep_best(self, step: int) -> None:
        """Keep the checkpoint after `step` steps until this is called with another one."""
        self._writer.best = step

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
        found = resume_point(self._root)
        if found is None:
            self._writer.adopt([])
            return Resumed()
        return self._resumed(*found)

    def _resumed(self, path: Path, state: Mapping[str, Any]) -> Resumed:
        """Restore the run's state as a checkpoint has it."""
        if CHECKPOINTS in state:
            self._writer.adopt([path.name, *state[CHECKPOINTS]])
        self._compare(path, state)
        is_same = state["layout"] == self.states.layout()
        is_drawn_alike = state.get("noise", 1) == NOISE_VERSION or not self.states.generates
        if not is_drawn_alike and self._world.is_first:
            log.warning(
                "%s was sampled with version %s of the noise, and this spmdrl draws with version "
                "%d: from here on the same seed gives other tokens, and a step that was stopped is "
                "done anew",
                *(path, state.get("noise", 1), NOISE_VERSION),
            )
        if not is_drawn_alike:
            state = {**state, "syncs": {}}
        self.states.load(path, state, with_engines=is_same)
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
            ValueError: the checkpoint is of another seed or flow, or of adapters of other models.
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
        check_bases(state.get(BASES, {}), self._base_sums, str(path))
        if not self._world.is_first:  # all ranks have the same to say
            return
        for difference in changed_keys(state["config"], self._config):
            log.warning("the run resumes with other values: %s", difference)
        if self._data is not None and "data" in state:
            for text in self._data.differences(state["data"], int(state["steps_done"])):
                log.warning("the run resumes with other data: %s", text)

    def _restore_private(self, path: Path, state: Mapping[str, Any], *, is_same: bool) -> Journal:
        """Restore users' roles and, on as many ranks as before, generators; return the journal."""
        size, rank = state["layout"]["world_size"], self._world.rank
        own = Journal()
        if size == self._world.size:
            private = read_private(path, rank)
            restore_rng(private, self._world.device)
            own = unpack_journal(private)
        self.states.restore_custom(path, state["layout"])
        if is_same:
            return own
        journals = [unpack_journal(read_private(path, other)) for other in range(size)]
        return merge_journals(journals, same_homes=size == self._world.size, own=own)
