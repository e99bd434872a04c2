"""Trackers by name, and the outboxes of a run."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

from spmdrl.atomic_files import replace_file
from spmdrl.config.user_objects import lacks, load_object
from spmdrl.observe.metrics import METRICS_FILE, numbered_metrics
from spmdrl.observe.trackers.jsonl import Jsonl
from spmdrl.observe.trackers.mlflow import Mlflow
from spmdrl.observe.trackers.outbox import Outbox
from spmdrl.observe.trackers.protocol import TrackedRun, Tracker
from spmdrl.observe.trackers.tensorboard import TENSORBOARD_DIR, TensorBoard
from spmdrl.observe.trackers.trackio import Trackio
from spmdrl.observe.trackers.wandb import Wandb

TRACKERS_DIR = "trackers"
SHIPPED: Mapping[str, Callable[[TrackedRun], Tracker]] = MappingProxyType(
    {
        "tensorboard": TensorBoard,
        "wandb": Wandb,
        "mlflow": Mlflow,
        "trackio": Trackio,
        "jsonl": Jsonl,
    }
)
PACKAGES: Mapping[str, str] = MappingProxyType(
    {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
)
"""Tracker -> the package that it needs."""

_SYNC_S = 600.0
"""Seconds for which `spmdrl sync` waits for a tracker."""

_LOCK = Lock()

_METHODS = {"log": ("step", "values", "wall_time"), "samples": ("step", "rows", "tag"), "close": ()}


def find_tracker(name: str) -> Callable[[TrackedRun], Tracker]:
    """Find a tracker's class: a shipped one by name, or `module:Class`.

    Raises:
        ValueError: there is none, its package is not installed, or it lacks a method.
    """
    if name in SHIPPED:
        _check_installed(name)
        return SHIPPED[name]
    if ":" not in name:
        raise ValueError(
            f"log.trackers: there is no tracker {name!r}: it is one of {', '.join(SHIPPED)}, or "
            "module:Class"
        )
    found: Callable[[TrackedRun], Tracker] = load_object(name, "log.trackers")
    if missing := lacks(found, _METHODS):
        raise ValueError(f"log.trackers: {name} {missing}")
    return found


def _check_installed(name: str) -> None:
    from importlib.util import find_spec

    package = PACKAGES.get(name)
    if package is not None and find_spec(package) is None:
        raise ValueError(f"log.trackers: {name} needs the package {package}: pip install {package}")


def outbox_of(
    run_dir: Path, name: str, config: Mapping[str, Any], *, first_step: int = 0
) -> Outbox:
    """Make the outbox of one tracker of a run.

    Args:
        first_step: the first step that this start logs.
    """
    make = find_tracker(name)
    short = name.rpartition(":")[2]
    rewrites = name == "tensorboard"
    place = run_dir / TENSORBOARD_DIR if rewrites else run_dir / TRACKERS_DIR / short

    def made() -> Tracker:
        place.mkdir(parents=True, exist_ok=True)
        run = TrackedRun(
            directory=place,
            name=run_dir.resolve().name,
            identity=_identity(run_dir),
            config=config,
            first_step=first_step,
        )
        return make(run)

    done = None if rewrites else run_dir / TRACKERS_DIR / f"{short}.lines"
    return Outbox(name, made, done, f"spmdrl sync {run_dir} --to {name} sends what is missing")


def send_metrics(run_dir: Path, names: Sequence[str], config: Mapping[str, Any]) -> dict[str, int]:
    """Send the lines of metrics.jsonl that trackers do not have yet; returns their numbers.

    Raises:
        ValueError: there is no such tracker, or metrics.jsonl is malformed.
        OSError: it does not exist; or a tracker failed, as the log says.
    """
    lines, sent = numbered_metrics(run_dir / METRICS_FILE), {}
    for name in names:
        outbox = outbox_of(run_dir, name, config)
        sent[name] = 0
        for number, record in lines:
            values = {n: v for n, v in record.items() if n not in ("step", "wall_time")}
            step, wall_time = int(record["step"]), record.get("wall_time", 0.0)
            sent[name] += outbox.log(number, step, values, wall_time, wait_s=_SYNC_S)
        if not outbox.close(_SYNC_S):
            raise OSError(f"{name} has not taken all lines of {run_dir / METRICS_FILE}")
    return sent


def _identity(run_dir: Path) -> str:
    """Identity of a run, made once; several trackers may ask at once, so the first one's stays."""
    file = run_dir / TRACKERS_DIR / "identity"
    file.parent.mkdir(parents=True, exist_ok=True)
    with _LOCK:
        if not file.is_file():
            replace_file(file, f"{uuid.uuid4().hex}\n".encode())
        return file.read_text(encoding="utf-8").strip()
