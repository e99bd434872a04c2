"""`Run` holds what all flows share and no algorithm decides: roles, steps, metrics, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args

import torch

from spmdrl.algorithms.metrics import combine, token_means
from spmdrl.batch import Batch
from spmdrl.config.roles import PartName
from spmdrl.config.sections import Config
from spmdrl.config.user_objects import load_object
from spmdrl.data.home import DataSet, StepRows, home_rows
from spmdrl.distributed.reduce import moments, world_max
from spmdrl.memory.call_memory import Turns
from spmdrl.observe import names
from spmdrl.observe.console import Console
from spmdrl.observe.metrics import MetricsWriter, set_aside_metrics
from spmdrl.observe.progress import Relay
from spmdrl.observe.timeline import PhaseTimer, timing_metrics
from spmdrl.rewards.scorer import Scorer
from spmdrl.roles.calls import Call
from spmdrl.roles.policy_sync import PolicySync
from spmdrl.rollout.sampling import SamplingParams
from spmdrl.run.lifetime import Lifetime
from spmdrl.run.phase_memory import PhaseMemory
from spmdrl.run.resume_point import Saved
from spmdrl.run.saving import Saver
from spmdrl.run.user_parts import check_made
from spmdrl.training.experts import EXPERT_METRICS
from spmdrl.training.protocol import STEP_METRICS
from spmdrl.world import World

log = logging.getLogger(__name__)

Metrics = Mapping[str, float]
R = TypeVar("R")
D = TypeVar("D", bound=DataSet)


class Environment(Protocol):
    """First half of a flow: the methods of a class that `environment` names."""

    def collect(self, step: int) -> Batch:
        """Collect one step's scored samples: home rows with `rewards`."""
        ...

    def ahead(self, step: int) -> tuple[Call[Any], ...]:
        """Calls that prepare `step` and may run alongside the previous update; () for none."""
        ...

    def metrics(self) -> Metrics:
        """Metrics of the samples just collected; every rank calls it."""
        ...


class Trainer(Protocol):
    """Second half of a flow: the method of a class that `trainer` names."""

    def step(self, step: int, batch: Batch, *alongside: Call[Any]) -> Metrics:
        """Compute advantages and update on what `collect` returned; pass the calls of `alongside`
        to the `together` of the updates.
        """
        ...


class Evaluates(Protocol):
    """An evaluator: `Run.evaluate` calls it when an evaluation is due."""

    def evaluate(self, step: int) -> Metrics:
        """Metrics named `eval/SET...`, equal on every rank."""
        ...


PER_STEP = (*STEP_METRICS, *EXPERT_METRICS)
"""Metrics of an optimizer step as a whole, not of its tokens."""


class Run:
    """One run of a flow, the same on every rank.

    Args:
        config, world: the configuration and the ranks of the run.
        roles: name -> role; every rank holds all of them.
        syncs: (source role, target role) -> their weight sync.
        data: the training data and their order.
        held_out: name -> set that is never trained on.
        scorer: computes the rewards.
        evaluators: evaluate by generation on held-out prompts.
        saver: exports the model.
        lifetime: decides when to save and when to stop.
        sampling: sampling parameters of the training rollouts.
        timer, memory, relay: seconds and bytes by phase; progress bars.

    `saved` holds numbers that a flow needs again after a resume, equal on all ranks.
    """

    def __init__(
        self,
        *,
        config: Config,
        world: World,
        roles: Mapping[str, Any],
        syncs: Mapping[tuple[str, str], PolicySync],
        data: StepRows,
        held_out: Mapping[str, DataSet],
        scorer: Scorer,
        evaluators: Sequence[Evaluates],
        saver: Saver,
        sampling: SamplingParams,
        timer: PhaseTimer,
        memory: PhaseMemory,
        relay: Relay,
        lifetime: Lifetime,
    ) -> None:
        self.config, self.world, self.sampling = config, world, sampling
        self.directory = Path(config.run_dir)
        self._roles, self._syncs = roles, syncs
        self.data, self._held_out, self._scorer = data, held_out, scorer
        self._evaluators, self._saver, self._timer = list(evaluators), saver, timer
        self._syncs_to_evaluate = self.has_begun = self.is_concluded = False
        self._relay, self._memory, self._life = relay, memory, lifetime
        if world.is_first and lifetime.resumed.path is None:
            set_aside_metrics(self.directory)
        self._writer = MetricsWriter(
            self.directory, is_first=world.is_first, tensorboard=config.log.tensorboard
        )
        self._console = Console(is_first=world.is_first, num_steps=config.steps)
        self._writer.truncate_to(lifetime.resumed.metrics_lines)
        lifetime.metrics_lines = self._writer.count_lines

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

    def weight_sync(self, source: str, target: str) -> PolicySync:
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
        """Steps still to do, by number; a requested stop ends the flow between two of them."""
        self._timer.finish()
        self.has_begun = True
        for step in range(self._life.first_step, self.config.steps):
            self._life.begin(step)
            yield step
            if self.steps_done != step + 1:
                raise ValueError(
                    f"flow={self.config.flow} left the step without run.finish(step, batch, "
                    "metrics) on this rank: it would have no metrics and no checkpoint; a step "
                    "that is cut short (`continue`) needs it too, on all ranks alike"
                )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time inside to `name`, and show a bar if the work reports progress."""
        pulse = self._life.watcher.pulse.phase(name)
        with self._timer.phase(name), self._memory.phase(name), self._relay.bar(name), pulse:
            yield

    @contextmanager
    def resident(self, role: str, *parts: str) -> Iterator[None]:
        """Hold parts of a role on the device during all calls inside the `with`, even if its
        `memory` section would send them away in between. It acts on the ranks that have the role.
        The memory plan does not count them in other roles' calls, so leave room (`memory_gb`).

        Args:
            parts: any of weights, optimizer, kv_cache, graphs.

        Raises:
            ValueError: the role or a part is unknown, or no part is named (on every rank); or the
                role does not have a part (on its ranks).
        """
        handle: Any = self.role(role, object)
        known = get_args(PartName)
        if not parts or not set(parts).issubset(known):
            raise ValueError(f"run.resident({role!r}, {parts}): name some of the parts {known}")
        memory: Turns | None = handle.memory if handle.mesh.is_member else None
        with memory.parts.resident(role, *parts) if memory is not None else nullcontext():
            yield

    def rows(self, step: int, *, attempt: int = 0, count: int | None = None) -> Batch:
        """This rank's share of a step's data (or of a refill, at most `count` items): home rows.

        They are prompts, conversations or preference pairs, by `data.kind`; see `data.home`.
        """
        return self.data.batch(step, attempt=attempt, count=count)

    def held_out_sets(self, kind: type[D]) -> dict[str, D]:
        """Held-out sets of one kind (`PairSet`, say), by name."""
        return {name: data for name, data in self._held_out.items() if isinstance(data, kind)}

    def held_out(self, kind: type[D]) -> Iterator[tuple[str, Batch]]:
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

    def evaluate_with(self, evaluator: Evaluates, *, syncs: bool = True) -> None:
        """Add an evaluator to those that generate responses to held-out prompts.

        Args:
            syncs: whether evaluations sync the weights, as the flow's steps do not.
        """
        self._syncs_to_evaluate = syncs
        self._evaluators.insert(0, evaluator)

    def evaluate(self, step: int) -> None:
        """Evaluate on the held-out sets if the configuration wants it before this step."""
        evaluation = self.config.evaluation
        first = step == 0 and evaluation.before
        due = evaluation.every > 0 and step > 0 and step % evaluation.every == 0
        if first or due:
            self._run_evaluation(step)

    def _run_evaluation(self, step: int) -> None:
        if not self._evaluators:
            return
        if self._syncs_to_evaluate and self._syncs:
            with self.phase("sync"):
                for sync in self._syncs.values():
                    sync.run()
        metrics: dict[str, float] = {}
        with self.phase("evaluation"):
            for evaluator in self._evaluators:
                metrics |= evaluator.evaluate(step)
        if not metrics:
            return
        self._writer.write(step, metrics)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        log.info("after %d steps: %s", step, shown)

    def finish(self, step: int, batch: Batch, metrics: Metrics) -> None:
        """End a step: write metrics and text samples, and save or export if that is due.

        Metrics are recorded under the number of steps done: 1 after the first step.
        """
        syncs = [sync.take_metrics() for sync in self._syncs.values()]
        moved = {name: value for found in syncs for name, value in found.items()}
        record = joined(metrics, moved, self._timing(metrics))
        self._writer.write(step + 1, record)
        self._writer.write_samples(step + 1, self._samples(batch))
        self._console.step({"step": step + 1, **record})
        if self.world.is_first and metrics.get("skipped", 0.0) == 1.0:
            log.warning("step %d changed no weight: no gradient of it was finite", step + 1)
        with self.phase("checkpoint"):
            self._life.finish(step)
            export = self.config.checkpoint.export
            if export is not True and export > 0 and self.steps_done % export == 0:
                self._saver.export(self.directory / f"model_step_{self.steps_done:08d}")

    def conclude(self) -> None:
        """End the run: checkpoint, final evaluation, export. Every flow ends with this call."""
        self.is_concluded = True
        if self.steps_done > self._life.first_step:
            self._life.save()
        self._life.begin(self.config.steps)
        if self.config.evaluation.after:
            self._run_evaluation(self.config.steps)
        if self.config.checkpoint.export:
            self._saver.export(self.directory / "model")

    def close(self) -> None:
        self._writer.close()

    def _timing(self, metrics: Metrics) -> dict[str, float]:
        own = self._timer.finish()
        phases = list(own.seconds)
        seconds = world_max(torch.tensor([own.seconds[name] for name in phases]))
        tokens = {
            names.ROLLOUT: metrics.get("rollout_tokens", 0.0),
            names.UPDATE: metrics.get("update_tokens", 0.0),
        }
        timing = timing_metrics(dict(zip(phases, seconds.tolist(), strict=True)), tokens)
        return {**timing, **self._memory.finish()}

    def _samples(self, batch: Batch) -> list[dict[str, object]]:
        count = min(self.config.log.text_samples, len(batch))
        if "response" not in batch.objects:
            return []
        return [
            {
                "prompt": batch.objects["prompt"][i].text,
                "response": batch.objects["response"][i],
                "reward": float(batch["rewards"][i]),
            }
            for i in range(count)
        ]


def joined(*parts: Metrics) -> Metrics:
    """Join several sets of metrics into one.

    Raises:
        ValueError: two of them have a metric of the same name.
    """
    found: dict[str, float] = {}
    for part in parts:
        taken = sorted(found.keys() & part.keys())
        if taken:
            raise ValueError(
                f"metrics called {taken} come from two parts of the flow (its environment and its "
                "trainer, say), and one would be lost: give one of them another name"
            )
        found |= part
    return found


def update_metrics(records: Sequence[Metrics]) -> Metrics:
    """Metrics of a step from its optimizer steps: token means; plain means of `PER_STEP`."""
    if not records:
        return {"update_tokens": 0.0}
    sums = combine([{k: v for k, v in r.items() if k not in PER_STEP} for r in records])
    whole = {k: sum(r[k] for r in records) / len(records) for k in PER_STEP if k in records[0]}
    means = dict(token_means(sums))
    tokens = means.pop("tokens")
    return {**means, **whole, "update_tokens": tokens}
