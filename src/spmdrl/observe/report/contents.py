"""Contents of a report: a function of a run's directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spmdrl.config.load import RUN_FILE
from spmdrl.observe.detectors import Episode, replay
from spmdrl.observe.metrics import METRICS_FILE, merge_steps, read_metrics
from spmdrl.observe.report.curves import Records
from spmdrl.observe.report.evaluations import results
from spmdrl.observe.report.samples import Samples, read_samples
from spmdrl.observe.report.starts import Start, read_starts
from spmdrl.observe.run_state import RunState, is_run, run_state

SAMPLES = 3
"""Samples of each kind that a report shows."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All that a page says of a run.

    Args:
        name: the run's name on the page.
        model: path of the model that was trained; None: not recorded.
        records: one per step.
        starts: entries of run.json.
        resumes: for every start but the first, the first step that was recorded after it.
        missing: what the run did not record, and what records it.
    """

    name: str
    directory: Path
    state: RunState
    model: str | None
    records: Records
    starts: Sequence[Start]
    resumes: Sequence[int]
    episodes: Sequence[Episode]
    samples: Samples | None
    missing: Sequence[str]

    @property
    def config(self) -> Mapping[str, str]:
        """Configuration of the last start, dotted key -> value; empty where none is recorded."""
        return self.starts[-1].config if self.starts else {}


def read_run(
    directory: Path, *, name: str | None = None, model: str | None = None, samples: int = SAMPLES
) -> Contents:
    """Read what a run has left so far.

    Args:
        model: model to name if run.json does not.
        samples: most samples of each kind.

    Raises:
        ValueError: the directory is no run's, or a line of its metrics.jsonl is malformed.
    """
    if not directory.is_dir() or not is_run(directory):
        raise ValueError(
            f"{directory} is no directory of a run: it has no {METRICS_FILE}, no {RUN_FILE} and no "
            "attempt_*; has the run started?"
        )
    missing = []
    try:
        starts = read_starts(directory)
    except ValueError as error:
        starts, problem = [], f": {error}"
    else:
        problem = ": runs of spmdrl 0.1 wrote none"
    if not starts:
        missing.append(f"configuration, command, commit, versions and hardware{problem}")
    file = directory / METRICS_FILE
    records = merge_steps(read_metrics(file)) if file.is_file() else []
    if not records:
        missing.append("metrics: no step has been recorded yet")
    elif not results(records):
        missing.append("evaluations: set evaluation.held_out or evaluation.sets")
    found = read_samples(directory, samples)
    if found is None:
        missing.append("samples: log.rollouts=N writes those of every Nth step")
    given = starts[-1].config.get("model.path") if starts else None
    return Contents(
        name=name or directory.resolve().name,
        directory=directory,
        state=run_state(directory),
        model=given or model,
        records=records,
        starts=starts,
        resumes=_resumes(starts, records),
        episodes=replay(records),
        samples=found,
        missing=missing,
    )


def _resumes(starts: Sequence[Start], records: Records) -> list[int]:
    found = []
    for start in starts[1:]:
        later = (r["step"] for r in records if start.began and r.get("wall_time", 0) > start.began)
        found += [int(step) for step in list(later)[:1]]
    return [step for step in dict.fromkeys(found) if step > records[0]["step"]]
