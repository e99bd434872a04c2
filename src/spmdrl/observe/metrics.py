"""metrics.jsonl: the numbers of every step."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from spmdrl.atomic_files import replace_file, set_aside

METRICS_FILE = "metrics.jsonl"
DROPPED_FILE = "metrics.dropped.jsonl"
"""File for lines of steps that were repeated because the run resumed from an earlier checkpoint."""
RESERVED = ("step", "wall_time")
# JSON has no such numbers; Python's own NaN and Infinity literals stop other readers
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Tracks(Protocol):
    """A service that shows metrics elsewhere; see `trackers.outbox.Outbox`."""

    def log(
        self, number: int, step: int, values: Mapping[str, float], wall_time: float
    ) -> object: ...

    def samples(self, step: int, rows: Sequence[Mapping[str, object]], tag: str) -> None: ...

    def close(self) -> object: ...


class MetricsWriter(AbstractContextManager["MetricsWriter"]):
    """Appends a run's metrics to `run_dir`/metrics.jsonl, and tells the run's trackers.

    Every rank has one and calls it alike; only the first rank's touches files. A line is one write
    to an unbuffered file, so a killed run leaves whole lines and at most one partial one, which the
    next writer drops.

    Args:
        run_dir: directory of the run; created if it does not exist.
        is_first: whether this rank writes.

    Raises:
        ValueError: an existing metrics.jsonl has a malformed line (file and line named).
    """

    def __init__(self, run_dir: Path, *, is_first: bool) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self._is_first = is_first
        self._trackers: tuple[Tracks, ...] = ()
        self._file: BinaryIO | None = None
        self._last_step: int | None = None
        self._num_lines = 0
        if is_first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()

    def write(
        self, step: int, values: Mapping[str, float], *, wall_time: float | None = None
    ) -> None:
        """Write one line for `step`; a second line of the same step may add other names.

        Args:
            step: step of the line, not below the step of the last line.
            values: numbers; non-finite ones are stored as strings and read back as floats.
            wall_time: seconds since 1970, the present time by default.

        Raises:
            ValueError: a reserved name, or a value that is not a number, on every rank; a step
                before the last one (a resumed run calls `truncate_to` first).
            OSError: the line could not be written; the error names the file.
        """
        reserved = [name for name in RESERVED if name in values]
        if reserved:
            raise ValueError(f"metrics may not be called {reserved}: these name the line itself")
        numbers = {name: _number(name, value) for name, value in values.items()}
        if not self._is_first:
            return
        if self._last_step is not None and step < self._last_step:
            raise ValueError(
                f"{self.path} already holds step {self._last_step}, and step {step} is to be "
                "written: call truncate_to when a run resumes"
            )
        now = time.time() if wall_time is None else wall_time
        record: dict[str, float | str] = {"step": step, "wall_time": round(now, 3)}
        record |= {name: _to_json(value) for name, value in numbers.items()}
        self._append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._last_step = step
        self._num_lines += 1
        for tracker in self._trackers:
            tracker.log(self._num_lines, step, numbers, now)

    def write_samples(
        self, step: int, samples: Sequence[Mapping[str, object]], *, tag: str = "samples"
    ) -> None:
        """Show text samples, each a mapping such as prompt, response, reward, in the trackers."""
        for tracker in self._trackers:
            tracker.samples(step, samples, tag)

    def count_lines(self) -> int:
        """Number of lines written so far; 0 on ranks that do not write."""
        return self._num_lines

    def truncate_to(self, num_lines: int) -> int:
        """Keep the first `num_lines`, for a run that resumes from where it had written that many;
        returns the number of dropped lines.

        The dropped lines are first appended to `DROPPED_FILE` in the same directory, then the file
        is replaced as a whole.
        """
        if not self._is_first:
            return 0
        lines = [line for _, line in _whole_lines(self.path)]
        kept, dropped = lines[:num_lines], lines[num_lines:]
        self.close()
        if dropped:
            with (self.path.parent / DROPPED_FILE).open("ab") as file:
                file.write(b"".join(line + b"\n" for line in dropped))
                file.flush()
                os.fsync(file.fileno())
        replace_file(self.path, b"".join(line + b"\n" for line in kept))
        self._open()
        return len(lines) - len(kept)

    def track(self, trackers: Sequence[Tracks]) -> None:
        """Tell trackers of what is written from now on; they are closed with this."""
        self._trackers = tuple(trackers)

    @property
    def next_step(self) -> int:
        """The first step that is not yet written; 0 before the first."""
        return 0 if self._last_step is None else self._last_step + 1

    def read(self) -> list[dict[str, float]]:
        """The lines written so far (see `read_metrics`); empty on ranks that do not write."""
        return read_metrics(self.path) if self._is_first else []

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        for tracker in self._trackers:
            tracker.close()
        self._trackers = ()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        lines = _whole_lines(self.path) if self.path.exists() else []
        steps = [int(_parse(self.path, number, line)["step"]) for number, line in lines]
        self._last_step = steps[-1] if steps else None
        self._num_lines = len(lines)
        self._file = self.path.open("ab", buffering=0)
        whole = sum(len(line) + 1 for _, line in lines)
        if self._file.tell() > whole:
            self._file.truncate(whole)

    def _append(self, line: bytes) -> None:
        assert self._file is not None, f"{self.path}: written after close()"
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(
                error.errno, f"metrics not written: {error.strerror}", str(self.path)
            ) from error


def set_aside_metrics(run_dir: Path) -> Path | None:
    """Set aside the metrics.jsonl of an earlier run in `run_dir` that this one does not resume, as
    metrics.jsonl.old-N; returns its new path, None if it is missing or empty.
    """
    path = run_dir / METRICS_FILE
    return set_aside(path) if path.is_file() and path.stat().st_size else None


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, each with `step`, `wall_time` and its metrics as numbers.

    A last line without its newline (left by a killed run) is omitted.

    Raises:
        ValueError: a line is malformed; file and line are named.
        FileNotFoundError: the file does not exist.
    """
    return [_parse(path, number, line) for number, line in _whole_lines(path)]


def numbered_metrics(path: Path) -> list[tuple[int, dict[str, float]]]:
    """The lines of a metrics.jsonl with their numbers from 1, as `read_metrics` reads them."""
    return [(number, _parse(path, number, line)) for number, line in _whole_lines(path)]


def merge_steps(records: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Merge records into one per step, in order of steps; of equal names the later line's wins."""
    merged: dict[float, dict[str, float]] = {}
    for record in records:
        merged.setdefault(record["step"], {}).update(record)
    return [merged[step] for step in sorted(merged)]


def _whole_lines(path: Path) -> list[tuple[int, bytes]]:
    """(line number from 1, line without newline) for each line that ends in a newline."""
    return list(enumerate(path.read_bytes().split(b"\n")[:-1], start=1))


def _parse(path: Path, number: int, line: bytes) -> dict[str, float]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: not a line of JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError(f"{path}:{number}: not an object with an integer 'step'")
    values: dict[str, float] = {}
    for name, value in record.items():
        number_or_none = NOT_FINITE.get(value) if isinstance(value, str) else value
        if not isinstance(number_or_none, int | float):
            raise ValueError(f"{path}:{number}: {name!r} is {value!r}, not a number")
        values[name] = number_or_none
    return values


def _number(name: str, value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]  # what users' flows return
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"the metric {name!r} is {value!r}, a {type(value).__name__}: return one number"
        ) from None


def _to_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
