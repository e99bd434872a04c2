"""JSON lines: what trackers are told, one line each, for programs of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spmdrl.atomic_files import finite_json
from spmdrl.observe.trackers.protocol import TrackedRun


class Jsonl:
    """Tracker into `RUN/trackers/jsonl/log.jsonl`; see `protocol.Tracker`."""

    def __init__(self, run: TrackedRun) -> None:
        self._file = (run.directory / "log.jsonl").open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float], wall_time: float) -> None:
        self._write({"step": step, "wall_time": wall_time, **values})

    def samples(self, step: int, rows: Sequence[Mapping[str, object]], tag: str) -> None:
        self._write({"step": step, tag: list(rows)})

    def close(self) -> None:
        self._file.close()

    def _write(self, content: Mapping[str, object]) -> None:
        self._file.write(finite_json(content) + "\n")
        self._file.flush()
