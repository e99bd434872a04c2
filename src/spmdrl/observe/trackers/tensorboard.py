"""TensorBoard (package `tensorboard`): event files, in `RUN/tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from spmdrl.algorithms.metrics import RATIO_BINS, RATIO_EDGES
from spmdrl.observe.trackers.protocol import TrackedRun

TENSORBOARD_DIR = "tensorboard"


class TensorBoard:
    """Tracker; see `protocol.Tracker`. Events of steps from `first_step` on are hidden, and are
    written again.
    """

    def __init__(self, run: TrackedRun) -> None:
        # seconds of import
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(
            str(run.directory), purge_step=run.first_step or None, flush_secs=10
        )

    def log(self, step: int, values: Mapping[str, float], wall_time: float) -> None:
        for name, value in values.items():
            if name not in RATIO_BINS:
                self._board.add_scalar(name, value, step, walltime=wall_time)
        if RATIO_BINS[0] in values:
            self._add_ratios([values[name] for name in RATIO_BINS], step)
        # its thread reports here, or at the next event, an error that it met
        self._board.flush()

    def samples(self, step: int, rows: Sequence[Mapping[str, object]], tag: str) -> None:
        """Log rows with strings shown verbatim in blocks of their own, other values on one line."""
        for number, row in enumerate(rows):
            self._board.add_text(f"{tag}/{number}", _markdown(row), step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()

    def _add_ratios(self, shares: Sequence[float], step: int) -> None:
        """Add the histogram of per-token ratios of train to rollout probability."""
        limits = [*RATIO_EDGES, 2 * RATIO_EDGES[-1]]
        middles = [(a + b) / 2 for a, b in pairwise([0.0, *limits])]
        self._board.add_histogram_raw(
            "rollout_ratio",
            min=0.0,
            max=limits[-1],
            num=1,
            sum=sum(m * share for m, share in zip(middles, shares, strict=True)),
            sum_squares=sum(m * m * share for m, share in zip(middles, shares, strict=True)),
            bucket_limits=limits,
            bucket_counts=list(shares),
            global_step=step,
        )


def _markdown(sample: Mapping[str, object]) -> str:
    """Strings as indented blocks, which Markdown keeps verbatim; other values in bold lines."""
    parts = []
    for name, value in sample.items():
        if isinstance(value, str):
            block = "\n".join(f"    {line}" for line in value.splitlines()) or "    "
            parts.append(f"**{name}**\n\n{block}")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            parts.append(f"**{name}**: {shown}")
    return "\n\n".join(parts)
