"""`StepReport`: the record of a run's steps, in metrics.jsonl, TensorBoard and on the console."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from spmdrl.batch import Batch
from spmdrl.distributed.reduce import world_max
from spmdrl.observe import names
from spmdrl.observe.console import Console
from spmdrl.observe.metrics import MetricsWriter
from spmdrl.observe.progress import Relay
from spmdrl.observe.timeline import PhaseTimer, timing_metrics
from spmdrl.run.phase_memory import PhaseMemory
from spmdrl.run.protocols import Metrics
from spmdrl.run.step_metrics import joined
from spmdrl.supervision.pulse import Pulse

log = logging.getLogger(__name__)


class StepReport:
    """Records steps and evaluations, and charges time and memory to phases; the same on every rank.

    Args:
        timer, memory: seconds and bytes by phase.
        relay: shows the progress of a phase.
        pulse: told of the phases.
        text_samples: number of rows per step whose texts are recorded.
    """

    def __init__(
        self,
        *,
        writer: MetricsWriter,
        console: Console,
        timer: PhaseTimer,
        memory: PhaseMemory,
        relay: Relay,
        pulse: Pulse,
        text_samples: int,
    ) -> None:
        self._writer, self._console, self._text_samples = writer, console, text_samples
        self._timer, self._memory, self._relay, self._pulse = timer, memory, relay, pulse

    def begin(self) -> None:
        """Begin the first step: the time before it belongs to no step."""
        self._timer.finish()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time inside to `name`, and show a bar if the work reports progress."""
        phases = self._timer.phase(name), self._memory.phase(name), self._relay.bar(name)
        with phases[0], phases[1], phases[2], self._pulse.phase(name):
            yield

    def progress(self, done: int, count: int) -> None:
        """Show the progress of a phase: rows done of this rank's rows."""
        self._pulse.beat()
        self._relay.report(done, count)

    def step(self, number: int, batch: Batch, metrics: Metrics) -> None:
        """Record the step that is the `number`th of the run, with the texts of its first rows."""
        record = joined(metrics, self._timing(metrics))
        self._writer.write(number, record)
        self._writer.write_samples(number, self._samples(batch))
        self._console.step({"step": number, **record})

    def evaluation(self, number: int, metrics: Metrics) -> None:
        """Record an evaluation after `number` steps."""
        self._writer.write(number, metrics)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        log.info("after %d steps: %s", number, shown)

    def close(self) -> None:
        self._writer.close()

    def _timing(self, metrics: Metrics) -> dict[str, float]:
        own = self._timer.finish()
        seconds = world_max(torch.tensor(list(own.values())))
        tokens = {
            names.ROLLOUT: metrics.get("rollout_tokens", 0.0),
            names.UPDATE: metrics.get("update_tokens", 0.0),
        }
        timing = timing_metrics(dict(zip(own, seconds.tolist(), strict=True)), tokens)
        return {**timing, **self._memory.finish()}

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
