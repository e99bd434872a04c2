"""A machine file from a run: the shares that its phases reached of what was forecast for them.

The run has written what its own prediction was made of (`run.predicting`), and each step's lengths.
Every step is forecast again, and the medians of both are compared, so that neither the first step
nor a step that something else disturbed counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from spmdrl.config.load import parse_config
from spmdrl.config.sections import Config
from spmdrl.observe.metrics import METRICS_FILE, read_metrics
from spmdrl.planning.forecast.forecast import forecast_step
from spmdrl.planning.forecast.machine import Machine
from spmdrl.planning.forecast.machines import machine_of_values
from spmdrl.planning.forecast.peaks import peak_bytes
from spmdrl.planning.forecast.step import Lengths
from spmdrl.planning.from_shapes import plan_from_shapes
from spmdrl.planning.plan import RolePlan

PLAN_FILE = "plan.yaml"

LEAST_STEPS = 3
"""Steps that a run must have; its first one does not count."""

_EXPLAINED = 0.05
"""Least part of a phase that must have been forecast to scale it; else it is a constant."""

_LEAST_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """Figures that a run wrote about itself.

    Args:
        plan: the plan of its roles.
        machine: the machine of its own prediction.
        records: metrics of its steps without the first, those of evaluations left out.
    """

    config: Config
    plan: RolePlan
    machine: Machine
    records: Sequence[Mapping[str, float]]

    def lengths(self, record: Mapping[str, float]) -> Lengths:
        return Lengths(
            prompt=record["lengths/prompt"],
            response=record["lengths/response"],
            longest=record["lengths/longest"],
        )

    def measured(self) -> dict[str, float]:
        """Median seconds by phase, and `step`."""
        names = [name for name in self.records[-1] if name.startswith("seconds/")]
        return {
            name.removeprefix("seconds/"): statistics.median(
                record.get(name, 0.0) for record in self.records
            )
            for name in names
        }

    def predicted(self, machine: Machine) -> dict[str, float]:
        """Median forecast seconds by phase, and `step`."""
        found: list[dict[str, float]] = []
        for record in self.records:
            forecast = forecast_step(self.config, self.plan, machine, self.lengths(record))
            found.append({**forecast.phase_seconds, "step": forecast.seconds})
        return {name: statistics.median(own[name] for own in found) for name in found[0]}

    def peak_bytes(self) -> float:
        """The largest resident memory of a rank."""
        return max(record["memory/peak_gb"] for record in self.records) * 1e9


def calibrated(run_dir: Path) -> Machine:
    """The machine that a run was on, with the shares that its phases reached.

    Raises:
        ValueError: the directory has no finished run of at least `LEAST_STEPS` steps, or its
            models' files are gone.
    """
    run = read_run(run_dir)
    plain = replace(run.machine, phase_shares={}, phase_s={})
    predicted, measured = run.predicted(plain), run.measured()
    shares: dict[str, float] = {}
    rest: dict[str, float] = {}
    for phase, seconds in measured.items():
        if phase == "step" or seconds < _LEAST_SECONDS:
            continue
        forecast = predicted.get(phase, 0.0)
        if forecast >= _EXPLAINED * seconds:
            shares[phase] = forecast / seconds
        else:
            rest[phase] = seconds - forecast
    process = plain.process_bytes
    if plain.device.kind == "cpu":
        process = max(0, int(run.peak_bytes() - peak_bytes(run.plan)))
    return replace(plain, phase_shares=shares, phase_s=rest, process_bytes=process)


def read_run(run_dir: Path) -> RunFigures:
    """Read the figures that a run wrote about itself.

    Raises:
        ValueError: see `calibrated`.
    """
    file = run_dir / PLAN_FILE
    if not file.is_file():
        raise ValueError(
            f"{file} does not exist: a run writes it after its second step, so name the run_dir of "
            f"a run of at least {LEAST_STEPS} steps"
        )
    values: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    config = parse_config(values["config"], str(file))
    size, ranks_per_node = values["ranks"], values["ranks_per_node"]
    machine = machine_of_values(
        values["machine"], num_nodes=size // ranks_per_node, devices_per_node=ranks_per_node
    )
    plan = plan_from_shapes(
        config,
        size,
        ranks_per_node,
        device_type=machine.device.kind,
        device_bytes=machine.device.memory_bytes,
        refuses=False,
    )
    records = _records(run_dir / METRICS_FILE)
    if len(records) < LEAST_STEPS - 1:
        raise ValueError(
            f"{run_dir / METRICS_FILE} has {len(records) + 1} steps: a calibration needs at least "
            f"{LEAST_STEPS}"
        )
    return RunFigures(config=config, plan=plan, machine=machine, records=records)


def _records(file: Path) -> list[dict[str, float]]:
    """Records of steps after the first one."""
    records = read_metrics(file) if file.is_file() else []
    return [record for record in records if "seconds/step" in record and record["step"] > 1]
