"""`StepReport`: the record of a run's steps, in metrics.jsonl, TensorBoard and on the console, from
the parts of a step, its optimizer steps, and the memory of its phases (bytes on the device, and
bytes moved for them).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from spmdrl.algorithms.metrics import combine, token_means
from spmdrl.batch import Batch
from spmdrl.distributed.reduce import world_max, world_sum
from spmdrl.memory.device_parts import DeviceParts
from spmdrl.observe import names
from spmdrl.observe.console import Console
from spmdrl.observe.detectors import Detecting, Finding
from spmdrl.observe.log import Relay
from spmdrl.observe.metrics import MetricsWriter
from spmdrl.observe.names import PEAK_MEMORY, PEAK_SUM
from spmdrl.observe.rollout_log import RolloutLog
from spmdrl.observe.timeline import PhaseMeter, PhaseTimer, take_peak_memory, timing_metrics
from spmdrl.planning.forecast.step import Lengths
from spmdrl.run.protocols import Metrics
from spmdrl.run.rollout_rows import fits, rollout_rows
from spmdrl.run.stragglers import Stragglers
from spmdrl.supervision.pulse import Pulse
from spmdrl.training.experts import EXPERT_METRICS
from spmdrl.training.protocol import STEP_METRICS

PER_STEP = (*STEP_METRICS, *EXPERT_METRICS)
"""Metrics of an optimizer step as a whole, not of its tokens."""


def joined(*parts: Metrics) -> Metrics:
    """Join several sets of metrics into one.

    Raises:
        ValueError: two of them have a metric of the same name.
    """
    found: dict[str, float] = {}
    for part in parts:
        taken = sorted(found.keys() & part.keys())
        if taken:
            raise ValueError(
                f"metrics called {taken} come from two parts of the flow (its environment and its "
                "trainer, say), and one would be lost: give one of them another name"
            )
        found |= part
    return found


def update_metrics(records: Sequence[Metrics]) -> Metrics:
    """Metrics of a step from its optimizer steps: token means; plain means of `PER_STEP`."""
    if not records:
        return {"update_tokens": 0.0}
    sums = combine([{k: v for k, v in r.items() if k not in PER_STEP} for r in records])
    whole = {k: sum(r[k] for r in records) / len(records) for k in PER_STEP if k in records[0]}
    means = dict(token_means(sums))
    tokens = means.pop("tokens")
    return {**means, **whole, "update_tokens": tokens}


def sync_metrics(found: Mapping[str, Metrics]) -> Metrics:
    """Join the metrics of the weight syncs, given by the role that receives the weights. If there
    are several, their names get the role's: `sync/ROLE/gb`.
    """
    if len(found) == 1:
        return next(iter(found.values()))
    return {
        name.replace("sync/", f"sync/{role}/", 1): value
        for role, metrics in found.items()
        for name, value in metrics.items()
    }


PARTS, DEVICE = "memory/parts_gb/", "memory/device_gb/"  # + phase, 1e9 bytes
MOVED, SPEED = "memory/moved_gb", "memory/gb_per_s"


class PhaseMemory(PhaseMeter):
    """Reads the parts' meter and the device's peak at both ends of every phase, and charges
    them to the innermost open one.

    Args:
        parts: this rank's parts.
        device: this rank's device.
        take_peak: gives the largest number of bytes since its last call, see `take_peak_memory`.
    """

    def __init__(
        self,
        parts: DeviceParts,
        device: torch.device,
        take_peak: Callable[[torch.device], int] = take_peak_memory,
    ) -> None:
        super().__init__()
        self._memory, self._device, self._take_peak = parts, device, take_peak
        self._highest = 0.0
        """Peak of all steps so far."""
        self._begin_step()
        parts.take_metrics()  # bytes of the start belong to no step
        take_peak(device)

    def finish(self) -> dict[str, float]:
        """Metrics since the last `finish`, each the maximum over the ranks; every rank calls it.

        `memory/peak_gb` is the peak in phases and between them, as `take_peak_memory` counts it,
        and `memory/peak_sum_gb` the sum of the ranks' largest ones so far;
        `memory/parts_gb/<phase>` the peak of parts on the device together; `memory/device_gb/..`
        the peak that was allocated on a CUDA device; then `memory/moved_gb` and, if anything
        moved, `memory/gb_per_s`.
        """
        self._charge()
        names = list(self._charged)  # equal on all ranks, since every rank runs every phase
        values = [*self._charged.values(), *(self._peaks.get(name, 0.0) for name in names)]
        values += [self._peak, self._moved, self._seconds]
        most = world_max(torch.tensor(values)).tolist()
        metrics = {PARTS + name: most[i] / 1e9 for i, name in enumerate(names)}
        if self._device.type == "cuda":
            peaks = most[len(names) : 2 * len(names)]
            metrics |= {DEVICE + n: v / 1e9 for n, v in zip(names, peaks, strict=True)}
        peak, moved, seconds = most[-3:]
        metrics |= {PEAK_MEMORY: peak / 1e9, MOVED: moved / 1e9}
        metrics[PEAK_SUM] = self.total_peak() / 1e9
        if seconds > 0:
            metrics[SPEED] = moved / seconds / 1e9
        self._begin_step()
        return metrics

    def total_peak(self) -> float:
        """Bytes of all ranks' peaks so far, added up; every rank calls it."""
        self._charge()
        return float(world_sum(torch.tensor([self._highest], dtype=torch.float64)))

    def _begin_step(self) -> None:
        self._charged = {}  # of parts
        self._peaks: dict[str, float] = {}
        self._peak = self._moved = self._seconds = 0.0

    def _charge(self) -> None:
        # torch's allocator does not know of mapped memory, which stays as it is within a phase
        mapped = self._memory.registry.mapped_bytes()
        found, peak = self._memory.take_metrics(), float(self._take_peak(self._device) + mapped)
        for direction in ("to_host", "to_device"):
            self._moved += found[f"{direction}_bytes"]
            self._seconds += found[f"{direction}_seconds"]
        self._peak, self._highest = max(self._peak, peak), max(self._highest, peak)
        if self._open:
            name = self._open[-1]
            self._charged[name] = max(self._charged[name], found["peak_resident_bytes"])
            self._peaks[name] = max(self._peaks.get(name, 0.0), peak)


log = logging.getLogger(__name__)

LENGTHS = (
    "lengths/"  # + prompt, response, longest: tokens of the step's rows, means but for the last
)


class Predicts(Protocol):
    """Lengths of a step's rows, and predictions from them; see `predicting.Predicting`."""

    def lengths(self, batch: Batch) -> Lengths: ...

    def tell(self, number: int, lengths: Lengths, record: Mapping[str, float]) -> None: ...

    def efficiency(self, lengths: Lengths, record: Mapping[str, float]) -> Metrics: ...


class StepReport:
    """Records steps and evaluations, and charges time and memory to phases; the same on every rank.

    Args:
        timer, memory: seconds and bytes by phase.
        stragglers: finds slow ranks.
        relay: shows the progress of a phase.
        pulse: told of the phases.
        text_samples: number of rows per step whose texts are recorded.
        rollouts: writes all rows of some steps.
        detecting: looks for what goes wrong; None on all ranks but the first.
        predicting: predicts steps; None does not.
    """

    def __init__(
        self,
        *,
        writer: MetricsWriter,
        console: Console,
        timer: PhaseTimer,
        memory: PhaseMemory,
        stragglers: Stragglers,
        relay: Relay,
        pulse: Pulse,
        text_samples: int,
        rollouts: RolloutLog,
        detecting: Detecting | None = None,
        predicting: Predicts | None = None,
    ) -> None:
        self._predicting, self._detecting = predicting, detecting
        self._writer, self._console, self._text_samples = writer, console, text_samples
        self._timer, self._memory, self._relay, self._pulse = timer, memory, relay, pulse
        self._stragglers, self._rollouts = stragglers, rollouts
        self._logged: Batch | None = None

    def begin(self) -> None:
        """Begin the first step: the time before it belongs to no step."""
        self._timer.finish()
        self._stragglers.begin()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time inside to `name`, and show a bar if the work reports progress."""
        meters = self._timer.phase(name), self._memory.phase(name), self._stragglers.phase(name)
        with meters[0], meters[1], meters[2], self._relay.bar(name), self._pulse.phase(name):
            yield

    def progress(self, done: int, count: int) -> None:
        """Show the progress of a phase: rows done of this rank's rows."""
        self._pulse.beat()
        self._relay.report(done, count)

    def log_rows(self, batch: Batch) -> None:
        """Keep the step's rows as its update reads them, for the rollout log."""
        self._logged = batch

    def step(self, number: int, batch: Batch, metrics: Metrics) -> list[Finding]:
        """Record the step that is the `number`th of the run, with the texts of its first rows.

        Returns what goes wrong since this step, on the first rank.
        """
        record = joined(metrics, self._timing(metrics))
        if self._predicting is not None:
            lengths = self._predicting.lengths(batch)
            record = joined(record, {LENGTHS + name: own for name, own in vars(lengths).items()})
            self._predicting.tell(number, lengths, record)
            record = joined(record, self._predicting.efficiency(lengths, record))
        self._stragglers.finish_step(int(batch.lengths.sum()))
        self._writer.write(number, record)
        self._writer.write_samples(number, self._samples(batch))
        self._console.step({"step": number, **record})
        if self._rollouts.wants(number):
            logged = self._logged
            own = logged if logged is not None and fits(logged, batch) else batch
            self._rollouts.write(number, rollout_rows(own))
        self._logged = None
        found = [] if self._detecting is None else self._detecting.look(record)
        for finding in found:
            log.warning("step %d, %s: %s", number, finding.name, finding.text)
        return found

    def evaluation(self, number: int, metrics: Metrics) -> None:
        """Record an evaluation after `number` steps."""
        self._writer.write(number, {**metrics, PEAK_SUM: self._memory.total_peak() / 1e9})
        shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        log.info("after %d steps: %s", number, shown)

    def close(self) -> None:
        self._stragglers.close()
        self._writer.close()
        self._rollouts.close()

    def _timing(self, metrics: Metrics) -> dict[str, float]:
        own = self._timer.finish()
        seconds = world_max(torch.tensor(list(own.values())))
        tokens = {
            names.ROLLOUT: metrics.get("rollout_tokens", 0.0),
            names.UPDATE: metrics.get("update_tokens", 0.0),
        }
        phases = dict(zip(own, seconds.tolist(), strict=True))
        idle = self._stragglers.idle(phases)
        return {**timing_metrics(phases, tokens), **idle, **self._memory.finish()}

    def _samples(self, batch: Batch) -> list[Mapping[str, object]]:
        if "response" not in batch.objects:
            return []
        return [
            {
                "prompt": batch.objects["prompt"][i].text,
                "response": batch.objects["response"][i],
                "reward": float(batch["rewards"][i]),
            }
            for i in range(min(self._text_samples, len(batch)))
        ]
