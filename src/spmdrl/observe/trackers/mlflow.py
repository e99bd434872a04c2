"""MLflow (package `mlflow`): an experiment named by `MLFLOW_EXPERIMENT_NAME`, or `spmdrl`.

Without `MLFLOW_TRACKING_URI` the run goes into a SQLite file in its own directory, which
`mlflow ui --backend-store-uri sqlite:///FILE` shows.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from spmdrl.observe.trackers.protocol import TrackedRun

IDENTITY = "spmdrl.identity"
"""Tag by which a later start finds the run."""


class Mlflow:
    """Tracker; see `protocol.Tracker`."""

    def __init__(self, run: TrackedRun) -> None:
        # it would write into the home directory
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        place = run.directory.resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{place / 'mlflow.db'}"
        self._client: Any = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "spmdrl")
        found = self._client.get_experiment_by_name(name)
        if found is None:
            artifacts = (place / "artifacts").as_uri() if uri.startswith("sqlite:") else None
            experiment = self._client.create_experiment(name, artifact_location=artifacts)
        else:
            experiment = found.experiment_id
        earlier = self._client.search_runs(
            [experiment], filter_string=f"tags.`{IDENTITY}` = '{run.identity}'"
        )
        if earlier:
            self._run = earlier[0].info.run_id
        else:
            tags = {IDENTITY: run.identity}
            made = self._client.create_run(experiment, run_name=run.name, tags=tags)
            self._run = made.info.run_id
            self._client.log_dict(self._run, dict(run.config), "config.json")

    def log(self, step: int, values: Mapping[str, float], wall_time: float) -> None:
        from mlflow.entities import Metric

        # it takes no infinite numbers in a database
        metrics = [
            Metric(key=_name(name), value=value, timestamp=int(1000 * wall_time), step=step)
            for name, value in values.items()
            if math.isfinite(value)
        ]
        for first in range(0, len(metrics), 500):  # its limit is 1,000 of a call
            self._client.log_batch(self._run, metrics=metrics[first : first + 500])

    def samples(self, step: int, rows: Sequence[Mapping[str, object]], tag: str) -> None:
        text = json.dumps(list(rows), ensure_ascii=False, indent=1, default=str)
        self._client.log_text(self._run, text, f"{tag}/step_{step:06d}.json")

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _name(metric: str) -> str:
    """A name of the letters that MLflow takes: no `@` (of pass@1), say."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in metric)
