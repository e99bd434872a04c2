"""Interfaces around a `Run`: a flow's parts on one side, what keeps a run going on the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from spmdrl.batch import Batch
from spmdrl.roles.calls import Call
from spmdrl.run.resume_point import Saved

Metrics = Mapping[str, float]


class Environment(Protocol):
    """First half of a flow: the methods of a class that `environment` names."""

    def collect(self, step: int) -> Batch:
        """Collect one step's scored samples: home rows with `rewards`."""

    def ahead(self, step: int) -> tuple[Call[Any], ...]:
        """Calls that prepare `step` and may run alongside the previous update; () for none."""

    def metrics(self) -> Metrics:
        """Metrics of the samples just collected; every rank calls it."""


class Trainer(Protocol):
    """Second half of a flow: the method of a class that `trainer` names."""

    def step(self, step: int, batch: Batch, *alongside: Call[Any]) -> Metrics:
        """Compute advantages and update on what `collect` returned; pass the calls of `alongside`
        to the `together` of the updates.
        """


class Evaluates(Protocol):
    """An evaluator: `Run.evaluate` calls it when an evaluation is due."""

    def evaluate(self, step: int) -> Metrics:
        """Metrics named `eval/SET...`, equal on every rank."""


class Syncs(Protocol):
    """A weight sync from one role to another. Every rank of the world calls its methods."""

    def run(self) -> None:
        """Give the target role the source's weights, and prove that it has them."""

    def take_metrics(self) -> Metrics:
        """Metrics of the last run, empty if it moved no weights."""


class Scores(Protocol):
    """A scorer of responses."""

    def score(self, batch: Batch) -> Batch:
        """Add `rewards` and their components to home rows."""


class Life(Protocol):
    """Steps of a run from its start or resume point to its end or to a stop.

    `saved` holds numbers that a flow needs again after a resume, equal on all ranks.
    """

    saved: Saved
    steps_done: int
    first_step: int

    def begin(self, step: int) -> bool:
        """Begin a step, or stop the run here; returns whether there are steps to do."""

    def end_early(self, reason: str) -> None:
        """Let no further step begin; the first rank's word decides."""

    def keep_best(self, step: int) -> None:
        """Keep the checkpoint after `step` steps until this is called with another one."""

    def finish(self, step: int) -> None:
        """End a step, and save or export what is due."""

    def save(self) -> None:
        """Begin a checkpoint of the steps done, unless it exists."""

    def export(self) -> None:
        """Export the trained models at the end of the run, if the configuration wants it."""
