"""Predictions and measurements: seconds and bytes of a run's second step, as a plan has them.

The first steps make caches and compile; the second is a usual one. What the prediction was made of
goes to `RUN_DIR/plan.yaml`, from which `spmdrl plan --calibrate RUN_DIR` makes a machine file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from spmdrl.atomic_files import replace_file
from spmdrl.batch import Batch
from spmdrl.config.sections import Config
from spmdrl.distributed.reduce import world_max, world_sum
from spmdrl.observe import names
from spmdrl.planning.forecast.calibrate import PLAN_FILE
from spmdrl.planning.forecast.forecast import StepFlops, forecast_step
from spmdrl.planning.forecast.host_rates import known_gpu, measured_host
from spmdrl.planning.forecast.machine import Machine
from spmdrl.planning.forecast.machines import load_machine, machine_values
from spmdrl.planning.forecast.peaks import peak_bytes, phase_bytes
from spmdrl.planning.forecast.step import Lengths, StepForecast
from spmdrl.planning.plan import RolePlan
from spmdrl.planning.token_bounds import step_sizes
from spmdrl.run.step_report import DEVICE, PARTS
from spmdrl.world import World

log = logging.getLogger(__name__)

STEP = 2
"""Step whose prediction is told."""

_SHOWN = 0.005
"""Least seconds of a phase that is shown."""


def run_machine(config: Config, world: World) -> Machine | None:
    """The machine that `machine` names, or the known one of this card.

    Returns:
        None: a CPU, whose rates are measured, or a card that no table has.

    Raises:
        ValueError: no machine has the name, or a value of the file is wrong.
        OSError: the file cannot be read.
    """
    size = world.local_size
    sizes = {"num_nodes": world.size // size, "devices_per_node": size}
    if config.machine is not None:
        try:
            return load_machine(config.machine, **sizes)
        except ValueError as error:
            raise ValueError(f"machine={config.machine}: {error}") from None
    if world.device.type != "cuda":
        return None
    name = known_gpu(torch.cuda.get_device_name(world.device))
    return None if name is None else load_machine(name, **sizes)


@dataclass(kw_only=True)
class Predicting:
    """Predicts a run's step, and says how much of the machine its steps use.

    Args:
        machine: None to measure this host.
        process_bytes: host memory of this process before its roles were made.
    """

    config: Config
    world: World
    plan: RolePlan
    machine: Machine | None
    process_bytes: int
    _host: Machine | None = field(default=None, init=False)
    """This host, from the second step on."""

    def efficiency(self, lengths: Lengths, record: Mapping[str, float]) -> dict[str, float]:
        """Metrics of how much a step computes in its time: tokens per second and rank, operations
        per second and rank by phase and in the whole step, and their share of the machine's peak,
        where that is known. Operations are those of `StepFlops`. Only the first rank has any.

        Args:
            record: the step's metrics, its seconds among them.
        """
        seconds = record.get(names.STEP_SECONDS, 0.0)
        if not self.world.is_first or lengths.response == 0 or seconds <= 0:
            return {}
        size = self.world.size
        tokens = step_sizes(self.config).rows * (lengths.prompt + lengths.response)
        found = {names.TOKENS_PER_RANK: tokens / seconds / size}
        flops = self._flops.of(lengths)
        for phase, count in flops.items():
            own = record.get(names.SECONDS + phase, 0.0)
            if own > 0:
                found[names.TFLOPS + phase] = count / own / size / 1e12
        whole = sum(flops.values()) / seconds / size
        found[names.TFLOPS + "step"] = whole / 1e12
        peak = self._peak()
        return found if peak is None else {**found, names.MFU: whole / peak}

    @cached_property
    def _flops(self) -> StepFlops:
        return StepFlops(self.config, self.plan)

    def _peak(self) -> float | None:
        """Products per second of a device in the policy's dtype."""
        machine = self.machine or self._host
        if machine is None:
            return None
        spec = next(iter(self.plan.specs.values()))
        return machine.device.flops.get(str(spec.dtype).removeprefix("torch."))

    def lengths(self, batch: Batch) -> Lengths:
        """Lengths of a step's home rows over all ranks; every rank calls it."""
        whole = batch.lengths.double()
        prompts = torch.zeros_like(whole)
        if self.config.data_kind() == "prompts" and "prompt_lengths" in batch:
            prompts = batch["prompt_lengths"].double()
        responses = whole - prompts
        sums = torch.stack([torch.tensor(len(whole)).double(), prompts.sum(), responses.sum()])
        rows, prompt, response = world_sum(sums).tolist()
        longest = torch.cat([torch.zeros(1, dtype=torch.float64), responses]).max()
        return Lengths(
            prompt=prompt / max(1.0, rows),
            response=response / max(1.0, rows),
            longest=float(world_max(longest[None])),
        )

    def tell(self, number: int, lengths: Lengths, record: Mapping[str, float]) -> None:
        """Log prediction and measurement of the second step, by phase; every rank calls it.

        Args:
            number: number of the step, from 1.
            record: its metrics.
        """
        if number != STEP or lengths.response == 0:
            return
        machine = self.machine
        if machine is None and self.world.device.type == "cpu":
            size = self.world.local_size
            machine = measured_host(num_nodes=self.world.size // size, devices_per_node=size)
            self._host = machine
        if machine is None or not self.world.is_first:
            return
        self._write(machine)
        forecast = forecast_step(self.config, self.plan, machine, lengths)
        base = machine.process_bytes or self.process_bytes
        log.info("%s", comparison(self.config, self.plan, forecast, record, base))

    def _write(self, machine: Machine) -> None:
        values: dict[str, Any] = {
            "ranks": self.world.size,
            "ranks_per_node": self.world.local_size,
            "process_gb": self.process_bytes / 1e9,
            "machine": machine_values(machine),
            "config": self.config.model_dump(mode="json"),
        }
        text = yaml.safe_dump(values, sort_keys=False, width=100)
        replace_file(Path(self.config.run_dir) / PLAN_FILE, text.encode())


def comparison(
    config: Config,
    plan: RolePlan,
    forecast: StepForecast,
    record: Mapping[str, float],
    process_bytes: int,
) -> str:
    """Lines with predicted and measured seconds and GB by phase, and of the step."""
    on_cuda = any(name.startswith(DEVICE) for name in record)
    measured_in = DEVICE if on_cuda else PARTS
    sizes = phase_bytes(config, plan, with_working=on_cuda)
    lines = [f"{'predicted / measured':<22}{'seconds':>17}{'GB':>17}"]
    for phase in names.phases(record):
        seconds = forecast.phase_seconds.get(phase, 0.0), record[names.SECONDS + phase]
        if max(seconds) < _SHOWN:
            continue
        memory = ""
        if phase in sizes and measured_in + phase in record:
            memory = _pair(sizes[phase] / 1e9, record[measured_in + phase])
        lines.append(f"  {phase:<20}{_pair(*seconds):>17}{memory:>17}".rstrip())
    whole = _pair(forecast.seconds, record[names.STEP_SECONDS])
    peak = peak_bytes(plan) + (0 if on_cuda else process_bytes)
    lines.append(f"  {'step':<20}{whole:>17}{_pair(peak / 1e9, record[names.PEAK_MEMORY]):>17}")
    return "\n".join(lines)


def _pair(predicted: float, measured: float) -> str:
    return f"{predicted:.2f} / {measured:.2f}"
