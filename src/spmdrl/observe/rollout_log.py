"""Rollouts of steps as files: RUN/rollouts/step_000012/rank_0003.jsonl.zst, a line for each row.

They are written by a thread, which drops what a slow or full file system does not take: a log never
holds up or ends a run.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from queue import Full, Queue
from typing import Any

import zstandard

from spmdrl.atomic_files import replace_file, set_aside

ROLLOUTS_DIR = "rollouts"

log = logging.getLogger(__name__)

_WAITING = 2
"""Steps that may wait to be written; a step that finds them waiting is dropped."""

_CLOSE_S = 20.0
"""Seconds that the end of a run waits for the last files."""


class RolloutLog:
    """Writer of this rank's rows of every `every`th step; 0 writes none.

    Args:
        rank: the rank, whose number the files have.
    """

    def __init__(self, run_dir: Path, rank: int, every: int) -> None:
        self._directory, self._rank, self._every = run_dir / ROLLOUTS_DIR, rank, every
        self._queue: Queue[tuple[int, bytes] | None] = Queue(_WAITING)
        self._thread: threading.Thread | None = None
        self._has_failed = False

    def wants(self, number: int) -> bool:
        """Whether the step that is the run's `number`th is to be written."""
        return self._every > 0 and number % self._every == 0

    def write(self, number: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a step's rows, soon and perhaps; values that JSON lacks become texts."""
        if not rows:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, daemon=True, name="rollouts")
            self._thread.start()
        lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        try:
            self._queue.put_nowait((number, lines.encode("utf-8", "replace")))
        except Full:
            self._warn(f"step {number} is left out: {self._directory} takes too long to write to")

    def close(self) -> None:
        """Wait a while for what is still being written."""
        if self._thread is None:
            return
        try:
            self._queue.put(None, timeout=_CLOSE_S)
        except Full:
            return
        self._thread.join(_CLOSE_S)

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            number, lines = item
            path = self._directory / f"step_{number:06d}" / f"rank_{self._rank:04d}.jsonl.zst"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, zstandard.compress(lines), lasting=False)
            except OSError as error:
                self._warn(f"step {number} is left out: {path}: {error.strerror}")

    def _warn(self, text: str) -> None:
        if not self._has_failed:
            log.warning("rollout log: %s; the run goes on, and later failures are not told", text)
        self._has_failed = True


def forget_rollouts(run_dir: Path, steps_done: int) -> None:
    """Remove the files of steps after `steps_done`, which a run that resumes there makes again; a
    run that begins sets those of an earlier one aside.
    """
    if steps_done == 0:
        set_aside(run_dir / ROLLOUTS_DIR)
        return
    for step in logged_steps(run_dir):
        if step > steps_done:
            shutil.rmtree(run_dir / ROLLOUTS_DIR / f"step_{step:06d}")


def logged_steps(run_dir: Path) -> list[int]:
    """List the steps that a run has written, ascending."""
    found = (run_dir / ROLLOUTS_DIR).glob("step_*")
    return sorted(int(path.name.removeprefix("step_")) for path in found if path.is_dir())


def read_rollouts(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """Read a step's rows of all ranks, by prompt and sample.

    Raises:
        ValueError: the run has not written the step; those that it has are named. Or a file is not
            whole.
    """
    steps = logged_steps(run_dir)
    if step not in steps:
        if not steps:
            raise ValueError(
                f"{run_dir / ROLLOUTS_DIR} has no samples: a flow that samples writes them with "
                "log.rollouts=1; others (dpo, sft, reward_model) have none: spmdrl generate makes "
                "responses of their models"
            )
        known = f"steps {steps[0]} to {steps[-1]}, {len(steps)} in all"
        raise ValueError(
            f"{run_dir / ROLLOUTS_DIR} has no step {step}; it has {known} (log.rollouts says how "
            "often they are written)"
        )
    rows: list[dict[str, Any]] = []
    for path in sorted((run_dir / ROLLOUTS_DIR / f"step_{step:06d}").glob("rank_*.jsonl.zst")):
        rows += _rows(path)
    return sorted(rows, key=lambda row: (row["prompt_id"], row["sample"]))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        try:
            reader = zstandard.ZstdDecompressor().stream_reader(file)
            for line in io.TextIOWrapper(reader, encoding="utf-8"):
                yield json.loads(line)
        except (zstandard.ZstdError, ValueError) as error:
            raise ValueError(f"{path} is not whole: {error}") from None


def given_name(turns: Sequence[Mapping[str, Any]], number: int) -> str:
    """Name, for a reader, of what followed a sample's turn.

    Args:
        turns: the row's.
        number: that of the turn, from 1 on.
    """
    own = turns[number - 1].get("part", 1)
    following = turns[number].get("part", 1) if number < len(turns) else own
    return "given" if following == own else f"part {following}: the conversation, rendered"
