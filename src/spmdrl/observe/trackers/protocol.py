"""`Tracker`: a service that shows metrics, and `TrackedRun`: what it is told of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run, as a tracker is made for it.

    Args:
        directory: the tracker's own files go here, `RUN/trackers/NAME`; it exists.
        name: name of the run: that of its directory.
        identity: text that is equal for all starts of the run, and no other run's.
        config: the configuration as given, as JSON values.
        first_step: steps below it have been logged by an earlier start, or are not to be.
    """

    directory: Path
    name: str
    identity: str
    config: Mapping[str, Any]
    first_step: int = 0


class Tracker(Protocol):
    """An object made as `Class(run)` of a `TrackedRun`, on the first rank, in a thread of its own:
    what it raises, or how long it takes, costs a warning and never a step.
    """

    def log(self, step: int, values: Mapping[str, float], wall_time: float) -> None:
        """Log the metrics of a step, which come in order; a step may come twice, with other names.

        Args:
            values: metrics as metrics.jsonl names them; some may be infinite or NaN.
            wall_time: seconds since 1970.
        """

    def samples(self, step: int, rows: Sequence[Mapping[str, object]], tag: str) -> None:
        """Log samples of text, each a mapping such as prompt, response, reward."""

    def close(self) -> None:
        """Write what is left."""
