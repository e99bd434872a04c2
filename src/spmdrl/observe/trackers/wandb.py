"""Weights & Biases (package `wandb`): a run of a project named by `WANDB_PROJECT`, or `spmdrl`.

`WANDB_MODE=offline` keeps everything in the run's directory for `wandb sync`; other variables of
wandb mean what they mean there. Its files are never in the home directory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from spmdrl.observe.trackers.protocol import TrackedRun

_PLACES = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")


class Wandb:
    """Tracker; see `protocol.Tracker`."""

    def __init__(self, run: TrackedRun) -> None:
        for name in _PLACES:
            os.environ.setdefault(name, str(run.directory))
        import wandb

        self._wandb: Any = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "spmdrl"),
            name=run.name,
            id=run.identity,
            resume="allow",
            config=dict(run.config),
            dir=str(run.directory),
            settings=wandb.Settings(console="off", silent=True),
        )
        # its own counter of steps only grows, and a resumed run repeats some
        self._run.define_metric("*", step_metric="train_step")

    def log(self, step: int, values: Mapping[str, float], wall_time: float) -> None:
        self._run.log({**values, "train_step": step, "wall_time": wall_time})

    def samples(self, step: int, rows: Sequence[Mapping[str, object]], tag: str) -> None:
        if not rows:
            return
        names = list(rows[0])
        table = self._wandb.Table(columns=names)
        for row in rows:
            table.add_data(*(row.get(name) for name in names))
        self._run.log({tag: table, "train_step": step})

    def close(self) -> None:
        self._run.finish()
