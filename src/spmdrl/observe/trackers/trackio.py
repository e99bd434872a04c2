"""Trackio (package `trackio`): a project named by `TRACKIO_PROJECT`, or `spmdrl`, in a local
database, which `trackio show` reads with `TRACKIO_DIR` set to the tracker's directory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from spmdrl.observe.trackers.protocol import TrackedRun


class Trackio:
    """Tracker; see `protocol.Tracker`."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(run.directory.resolve()))
        import trackio

        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "spmdrl"),
            name=run.name,
            config=dict(run.config),
            resume="allow",
        )

    def log(self, step: int, values: Mapping[str, float], wall_time: float) -> None:
        self._run.log({**values, "wall_time": wall_time}, step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, object]], tag: str) -> None:
        texts = {
            f"{tag}/{number}/{name}": str(value)
            for number, row in enumerate(rows)
            for name, value in row.items()
        }
        self._run.log(texts, step=step)

    def close(self) -> None:
        self._run.finish()
