"""When to stop, so that the next step and the save still fit into the job's time."""

from __future__ import annotations

from dataclasses import dataclass, field

MARGIN = 1.25
"""Of what is predicted: steps and saves vary."""

SLACK_S = 5.0
"""For leaving: the launcher and the interpreter take their time."""


@dataclass(kw_only=True)
class Walltime:
    """Seconds of the steps so far and of the last save, and what follows from them.

    A step is predicted to take as long as the longest of the last eight: a step with an evaluation
    or a slow rollout comes again. A save that was never made counts as one step.
    """

    steps: list[float] = field(default_factory=list)
    save: float | None = None

    def fits(self, now: float, deadline: float | None) -> bool:
        """Whether a step and a save still fit; True while nothing is known."""
        if deadline is None or not self.steps:
            return True
        return now + MARGIN * (self._step + self._save) + SLACK_S <= deadline

    def stop_by(self, deadline: float | None) -> float | None:
        """Until when a step may go on: what is left is for a save in the midst of it."""
        return None if deadline is None else deadline - MARGIN * self._save - SLACK_S

    @property
    def _step(self) -> float:
        return max(self.steps[-8:], default=0.0)

    @property
    def _save(self) -> float:
        return self._step if self.save is None else self.save
