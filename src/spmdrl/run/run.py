"""`Run` holds what all flows share and no algorithm decides: roles, steps, metrics, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, get_args

from spmdrl.batch import Batch
from spmdrl.config.roles import PartName
from spmdrl.config.sections import Config
from spmdrl.config.user_objects import load_object
from spmdrl.data.item_set import DataItem, ItemSet, items_of
from spmdrl.data.order import DataSet, StepRows, home_rows
from spmdrl.distributed.reduce import moments
from spmdrl.memory.call_memory import CallMemory
from spmdrl.rewards.asking import PairJudge
from spmdrl.rollout.protocol import SamplingParams
from spmdrl.run.best import BestEvaluation
from spmdrl.run.protocols import Evaluates, Life, Metrics, Scores, Syncs
from spmdrl.run.resume_point import Saved
from spmdrl.run.step_report import StepReport, joined, sync_metrics
from spmdrl.run.user_parts import check_made
from spmdrl.world import World

log = logging.getLogger(__name__)

R = TypeVar("R")
T = TypeVar("T", bound=DataItem)


class Run:
    """One run of a flow, the same on every rank.

    Args:
        roles: name -> role; every rank holds all of them.
        syncs: (source role, target role) -> their weight sync.
        data: the training data and their order.
        held_out: name -> set that is never trained on.
        scorer: computes the rewards.
        evaluators: evaluate by generation on held-out prompts.
        sampling: sampling parameters of the training rollouts.
        report: records the steps.
        life: begins and ends steps, saves, and stops the run.

    `saved` holds numbers that a flow needs again after a resume, equal on all ranks.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        roles: Mapping[str, Any],
        syncs: Mapping[tuple[str, str], Syncs],
        data: StepRows,
        held_out: Mapping[str, DataSet],
        scorer: Scores,
        evaluators: Sequence[Evaluates],
        sampling: SamplingParams,
        report: StepReport,
        life: Life,
        pair_judge: PairJudge | None = None,
    ) -> None:
        self.config, self.world, self.sampling = config, world, sampling
        self.directory = Path(config.run_dir)
        self._roles, self._syncs = roles, syncs
        self.data, self._held_out = data, held_out
        self._scorer, self._evaluators = scorer, list(evaluators)
        self._report, self._life = report, life
        self.pair_judge = pair_judge
        wanted = config.checkpoint.keep_best
        self._best = None if wanted is None else BestEvaluation(wanted, life.saved)
        if self._best is not None and self._best.step is not None:
            life.keep_best(self._best.step)
        self.has_begun = self.is_concluded = False

    @property
    def saved(self) -> Saved:
        return self._life.saved

    @property
    def steps_done(self) -> int:
        return self._life.steps_done

    def role(self, name: str, kind: type[R]) -> R:
        """The role `name`; ValueError if the configuration has none, or one of another kind."""
        if name not in self._roles:
            raise ValueError(
                f"flow={self.config.flow} needs roles.{name}; the configuration has "
                f"{sorted(self._roles)}"
            )
        role = self._roles[name]
        if not isinstance(role, kind):
            raise ValueError(f"roles.{name} is a {type(role).__name__}, not a {kind.__name__}")
        return role

    def make(self, where: str | None, default: Callable[[Run], R]) -> R:
        """Make `default(run)`, or an object of the `module:Class` that the configuration names.

        Raises:
            ValueError: the object lacks a method or attribute that the flow needs.
        """
        if where is None:
            return default(self)
        made: R = load_object(where)(self)
        check_made(self.config, where, made)
        return made

    def weight_sync(self, source: str, target: str) -> Syncs:
        """The weight sync from one role to another.

        Raises:
            ValueError: the configuration's roles have no such sync.
        """
        if (source, target) not in self._syncs:
            known = ", ".join(f"{one} -> {other}" for one, other in self._syncs)
            raise ValueError(
                f"flow={self.config.flow} asks for a weight sync {source} -> {target}; the "
                f"configuration's roles have {known or 'none'}"
            )
        return self._syncs[source, target]

    def steps(self) -> Iterator[int]:
        """Steps still to do, by number; a requested stop ends the flow between two of them, and a
        finding of the detectors the loop, if the configuration wants it.
        """
        self._report.begin()
        self.has_begun = True
        for step in range(self._life.first_step, self.config.steps):
            if not self._life.begin(step):
                return
            yield step
            if self.steps_done != step + 1:
                raise ValueError(
                    f"flow={self.config.flow} left the step without run.finish(step, batch, "
                    "metrics) on this rank: it would have no metrics and no checkpoint; a step "
                    "that is cut short (`continue`) needs it too, on all ranks alike"
                )

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Charge the time inside to `name`, and show a bar if the work reports progress."""
        return self._report.phase(name)

    def progress(self, done: int, count: int) -> None:
        """Show the progress of the current phase: rows done of this rank's rows."""
        self._report.progress(done, count)

    @contextmanager
    def resident(self, role: str, *parts: str) -> Iterator[None]:
        """Hold parts of a role on the device during all calls inside the `with`, even if its
        `residency` section would send them away in between. It acts on the role's ranks. The memory
        plan does not count them in other roles' calls, so leave room (`memory_gb`).

        Args:
            parts: any of base, weights, optimizer, kv_cache, graphs.

        Raises:
            ValueError: the role or a part is unknown, or no part is named (on every rank); or the
                role does not have a part (on its ranks).
        """
        handle: Any = self.role(role, object)
        known = get_args(PartName)
        if not parts or not set(parts).issubset(known):
            raise ValueError(f"run.resident({role!r}, {parts}): name some of the parts {known}")
        memory: CallMemory | None = handle.memory if handle.mesh.is_member else None
        with memory.parts.resident(role, *parts) if memory is not None else nullcontext():
            yield

    def rows(self, step: int, *, attempt: int = 0, count: int | None = None) -> Batch:
        """This rank's share of a step's data (or of a refill, at most `count` items): home rows.

        They are prompts, conversations or preference pairs, by `data.kind`; see `data.order`.
        """
        return self.data.batch(step, attempt=attempt, count=count)

    def held_out_sets(self, kind: type[T]) -> dict[str, ItemSet[T]]:
        """Held-out sets with items of one kind (`Pair`, say), by name."""
        found = {name: items_of(data, kind) for name, data in self._held_out.items()}
        return {name: data for name, data in found.items() if data is not None}

    def held_out(self, kind: type[T]) -> Iterator[tuple[str, Batch]]:
        """Names of the held-out sets of one kind, and this rank's home rows of each."""
        for name, data in self.held_out_sets(kind).items():
            yield name, home_rows(self.world, data)

    def score(self, batch: Batch) -> Batch:
        """Add `rewards` and their components to `batch`."""
        return self._scorer.score(batch)

    def reward_metrics(self, batch: Batch) -> Metrics:
        """Means of the reward's components, and the share of rows with a failed reward."""
        components = sorted(name for name in batch.rows if name.startswith("reward/"))
        metrics = {name: moments(batch[name]).mean for name in components}
        return {**metrics, "reward_failed": moments(batch["reward_failed"]).mean}

    def log_rows(self, batch: Batch) -> None:
        """Let the rollout log (`log.rollouts`) have the step's rows as the update reads them, with
        their advantages; without this call it has those that `finish` gets.
        """
        self._report.log_rows(batch)

    def evaluate_with(self, evaluator: Evaluates) -> None:
        """Add an evaluator to those that generate responses to held-out prompts."""
        self._evaluators.insert(0, evaluator)

    def evaluate(self, step: int, *, syncs: bool = False) -> None:
        """Evaluate on the held-out sets if the configuration wants it before this step.

        Args:
            syncs: whether to run the weight syncs first (phase `sync`), as flows need whose steps
                do not: engines get the policy's weights only for evaluations.
        """
        evaluation = self.config.evaluation
        first = step == 0 and evaluation.before
        due = evaluation.every > 0 and step > 0 and step % evaluation.every == 0
        if first or due:
            self._run_evaluation(step, syncs=syncs)

    def _run_evaluation(self, step: int, *, syncs: bool) -> None:
        if not self._evaluators:
            return
        if syncs and self._syncs:
            with self.phase("sync"):
                for sync in self._syncs.values():
                    sync.run()
        self._warn_of_old_weights()
        metrics: dict[str, float] = {}
        with self.phase("evaluation"):
            for evaluator in self._evaluators:
                metrics |= evaluator.evaluate(step)
        if metrics:
            self._report.evaluation(step, metrics)
            self._compare(step, metrics)

    def _compare(self, step: int, metrics: Metrics) -> None:
        """Keep the checkpoint of an evaluation that is the best, or end a run that gets no better,
        if the configuration wants it.
        """
        best, most = self._best, self.config.evaluation.stop_after
        if best is None:
            return
        if best.look(step, metrics):
            self._life.keep_best(step)
            log.info("after %d steps: the best %s so far", step, best.metric)
        elif 0 < most <= best.num_worse and not self.is_concluded:
            self._life.end_early(
                f"evaluation.stop_after={most}: {best.metric} was best after {best.step} steps"
            )

    def _warn_of_old_weights(self) -> None:
        for source, target in self._syncs if self.world.is_first else ():
            trained, held = self._roles[source].version, self._roles[target].version
            if trained != held:
                log.warning(
                    "evaluation with roles.%s %d optimizer steps behind roles.%s: sync before "
                    "run.evaluate(step) and run.conclude(), or pass them syncs=True",
                    *(target, trained - held, source),
                )

    def finish(self, step: int, batch: Batch, metrics: Metrics) -> None:
        """End a step: write metrics and text samples, and save or export if that is due.

        Metrics are recorded under the number of steps done: 1 after the first step.
        """
        moved = sync_metrics({role: sync.take_metrics() for (_, role), sync in self._syncs.items()})
        found = self._report.step(step + 1, batch, joined(metrics, moved))
        if found and self.config.log.on_detect == "stop":
            self._life.end_early(f"the detector {found[0].name}")
        if self.world.is_first and metrics.get("skipped", 0.0) == 1.0:
            log.warning("step %d changed no weight: no gradient of it was finite", step + 1)
        with self.phase("checkpoint"):
            self._life.finish(step)

    def conclude(self, *, syncs: bool = False) -> None:
        """End the run: checkpoint, final evaluation, export. Every flow ends with this call.

        Args:
            syncs: as in `evaluate`.
        """
        self.is_concluded = True
        if self.steps_done > self._life.first_step:
            self._life.save()
        self._life.begin(self.config.steps)
        if self.config.evaluation.after:
            self._run_evaluation(self.steps_done, syncs=syncs)
        self._life.export()

    def close(self) -> None:
        self._report.close()
