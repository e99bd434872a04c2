"""`spmdrl runs`: a table of the runs below a directory: state, step, reward, age, what they do."""

from __future__ import annotations

import time
from pathlib import Path

from spmdrl.observe.run_state import RunState, find_runs, run_state

COLUMNS = ("run", "state", "step", "reward", "held out", "age", "doing, or why it ended")


def runs_text(directory: Path) -> str:
    """Make the table.

    Raises:
        ValueError: the directory does not exist, or there is no run in it.
    """
    found = [run_state(path) for path in find_runs(directory)]
    if not found:
        raise ValueError(f"{directory}: no directory of a run is in it (none has an attempt_*)")
    now = time.time()
    rows = [COLUMNS, *(_row(directory, state, now) for state in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in padded)


def _row(directory: Path, state: RunState, now: float) -> tuple[str, ...]:
    name = state.path.relative_to(directory) if state.path != directory else state.path
    step = "-" if state.step is None else str(state.step)
    return (
        str(name),
        state.state,
        step if state.steps is None else f"{step}/{state.steps}",
        *("-" if n is None else f"{n:.3f}" for n in (state.reward, state.held_out)),
        "-" if state.changed is None else _age(now - state.changed),
        state.detail if len(state.detail) <= 80 else f"{state.detail[:77]}...",
    )


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
