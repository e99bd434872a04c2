"""State of a run, read from the files of its directory: what runs, what ended, and why."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmdrl.config.load import RUN_FILE
from spmdrl.observe.metrics import METRICS_FILE, merge_steps, read_metrics
from spmdrl.observe.names import ACCURACY, EVAL, REWARD

FRESH_S = 60.0
"""Age of the newest heartbeat from which on a run without an outcome counts as lost."""

QUEUED_AGAIN = "queued_again"
"""File of a start whose job `train.sbatch` has put into the queue again: what it saved."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """State of a run, read from its directory alone.

    Args:
        state: `running`; `done`, `stopped`, `crashed` or `hung` as the last start's outcome says;
            `queued` if its job is in Slurm's queue again after that;
            `lost` if it neither ended nor lives; `empty` if none began.
        step, steps: steps done, and those wanted if run.json says so.
        reward, held_out: mean reward of the last step; accuracy of the last evaluation.
        changed: seconds since 1970 of the last sign of life; None: there is none.
        detail: phase of a running run, cause or request of an end.
    """

    path: Path
    state: str
    step: int | None = None
    steps: int | None = None
    reward: float | None = None
    held_out: float | None = None
    changed: float | None = None
    detail: str = ""


def find_runs(directory: Path) -> list[Path]:
    """Find the directories of runs: the directory itself, and those below it, by name."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory")
    if is_run(directory):
        return [directory]
    below = sorted(path for path in directory.iterdir() if path.is_dir() and path.name[0] != ".")
    return [found for path in below for found in find_runs(path)]


def is_run(directory: Path) -> bool:
    """Whether a run has begun in this directory."""
    if (directory / RUN_FILE).is_file() or (directory / METRICS_FILE).is_file():
        return True
    return any(directory.glob("attempt_*"))


def run_state(directory: Path) -> RunState:
    """Read a run's state; files that are missing or broken count as not written."""
    records = []
    with suppress(OSError, ValueError):
        records = merge_steps(read_metrics(directory / METRICS_FILE))
    last = records[-1] if records else {}
    beats = _heartbeats(_newest(directory))
    signs = [*(float(beat["time"]) for beat in beats), last.get("wall_time", 0.0)]
    state, detail = _state(directory, beats)
    accuracies = [
        value
        for record in records
        for name, value in record.items()
        if name.startswith(EVAL) and name.endswith(ACCURACY)
    ]
    return RunState(
        path=directory,
        state=state,
        step=int(last["step"]) if last else None,
        steps=_steps(directory),
        reward=next((r[REWARD] for r in reversed(records) if REWARD in r), None),
        held_out=accuracies[-1] if accuracies else None,
        changed=max(signs) or None,
        detail=detail,
    )


def _newest(directory: Path) -> Path | None:
    return max(directory.glob("attempt_*"), default=None, key=lambda path: path.stat().st_mtime)


def _heartbeats(attempt: Path | None) -> list[dict[str, Any]]:
    found = []
    for file in [] if attempt is None else sorted((attempt / "heartbeats").glob("rank_*.json")):
        with suppress(OSError, ValueError):
            found.append(json.loads(file.read_text(encoding="utf-8")))
    return found


def _state(directory: Path, beats: Sequence[dict[str, Any]]) -> tuple[str, str]:
    attempt = _newest(directory)
    if attempt is None:
        return "empty", ""
    outcome, why = _text(attempt / "outcome"), _text(attempt / "failed")
    why = why or _text(attempt / "stopped_by")
    if saved := _text(attempt / QUEUED_AGAIN):
        return "queued", f"{outcome or 'crashed'}, {saved}" + (f": {why}" if why else "")
    if outcome:
        return outcome, why
    newest = max((beat["time"] for beat in beats), default=attempt.stat().st_mtime)
    if time.time() - newest > FRESH_S:
        return "lost", why or "no outcome, and no heartbeat any more"
    if not beats:
        return "running", "starting"
    slowest = min(beats, key=lambda beat: (beat["step"], beat["calls"]))
    inside = "" if slowest["stage"] == "between" else f" ({slowest['call']})"
    return "running", f"{slowest['phase']}{inside}, quiet for {slowest['quiet_s']:.0f} s"


def _text(file: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return " ".join(file.read_text(encoding="utf-8").split())
    return ""


def _steps(directory: Path) -> int | None:
    with suppress(OSError, ValueError, KeyError, IndexError, TypeError):
        content = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
        return int(content["starts"][-1]["config"]["steps"])
    return None
