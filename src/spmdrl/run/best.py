"""The best evaluation of a run so far, by one held-out metric (`checkpoint.keep_best`)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from spmdrl.run.resume_point import Saved


class BestEvaluation:
    """Compares evaluations, the same on every rank.

    Args:
        wanted: name of the metric, with `-` before it if smaller values are better.
        saved: the run's numbers that outlast a resume; it has those of this object, too.
    """

    def __init__(self, wanted: str, saved: Saved) -> None:
        self._wanted, self._saved = wanted, saved
        self.metric = wanted.removeprefix("-")

    @property
    def _state(self) -> dict[str, float]:
        return self._saved.get(f"best of {self._wanted}", {})

    @property
    def step(self) -> int | None:
        """Steps done at the best evaluation; None before the first."""
        return int(self._state["step"]) if self._state else None

    @property
    def num_worse(self) -> int:
        """Number of evaluations in a row that were no better than the best one."""
        return int(self._state.get("num_worse", 0))

    def look(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Compare the evaluation after `step` steps; returns whether it is the best so far. A value
        that is not a number is the worst, and one evaluation that is repeated after a resume counts
        once.

        Raises:
            ValueError: evaluations have no such metric (on every rank).
        """
        if self.metric not in metrics:
            raise ValueError(
                f"checkpoint.keep_best={self._wanted}: evaluations have no such metric; they have "
                f"{', '.join(sorted(metrics))}"
            )
        value, best = metrics[self.metric], self._state
        sign = -1.0 if self._wanted.startswith("-") else 1.0
        is_number = not math.isnan(value)
        is_best = is_number and (not best or sign * value > sign * best["value"])
        if is_best or not best:
            first = value if is_number else -sign * math.inf
            new = {"value": first, "step": float(step), "num_worse": 0.0, "seen": float(step)}
        elif step > best["seen"]:
            new = {**best, "num_worse": best["num_worse"] + 1, "seen": float(step)}
        else:
            new = best
        self._saved[f"best of {self._wanted}"] = new
        return is_best
