"""`StopAsked`, which ends a flow when the world agrees to stop, and `Walltime`, which says when the
next step and the save no longer fit into the job's time.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class StopAsked(BaseException):
    """All ranks have agreed to stop here; `train` then saves.

    Like KeyboardInterrupt it is not an `Exception`, so that a flow's error handling does not
    catch it.
    """


MARGIN = 1.25
"""Factor on predicted seconds, because steps and saves vary."""

SLACK_S = 5.0
"""Seconds for the end of the launcher and the interpreter."""


@dataclass(kw_only=True)
class Walltime:
    """Seconds of the steps so far and of the last save, and predictions from them.

    A step is predicted to take as long as the longest of the last eight, because a step with an
    evaluation or a slow rollout will recur. Before the first save, a save counts as one step.
    """

    steps: list[float] = field(default_factory=list)
    save: float | None = None

    def fits(self, now: float, deadline: float | None) -> bool:
        """Whether a step and a save still fit; True while there is no deadline or no step yet."""
        if deadline is None or not self.steps:
            return True
        return now + MARGIN * (self._step + self._save) + SLACK_S <= deadline

    def stop_by(self, deadline: float | None) -> float | None:
        """Latest time at which a step may be interrupted, so that a save within it still fits."""
        return None if deadline is None else deadline - MARGIN * self._save - SLACK_S

    @property
    def _step(self) -> float:
        return max(self.steps[-8:], default=0.0)

    @property
    def _save(self) -> float:
        return self._step if self.save is None else self.save
