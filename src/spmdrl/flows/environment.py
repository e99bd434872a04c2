"""`GroupEnvironment`: prompts -> groups of samples -> rewards, with refills for dead groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spmdrl.algorithms.rewards import has_signal
from spmdrl.batch import Batch, concat, group_index
from spmdrl.distributed.reduce import gather_tables, moments, world_sum
from spmdrl.roles.calls import Call
from spmdrl.roles.handles import Generation, Rollout, together
from spmdrl.rollout.protocol import Finish
from spmdrl.run.protocols import Metrics
from spmdrl.run.run import Run


class GroupEnvironment:
    """Collects `data.prompts_per_step` groups of `data.group_size` scored samples.

    With `algorithm.refill_attempts` > 0, groups whose rewards are all equal are dropped and others
    are drawn in their place (dynamic sampling, DAPO, arXiv 2503.14476, section 3.2).
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rollout = run.role("rollout", Rollout)
        self.sampled: list[Batch] = []
        self.drawn: dict[int, Batch] = {}
        """Step -> samples drawn ahead of it, not yet scored."""

    def collect(self, step: int) -> Batch:
        """Collect one step's home rows: the columns of `rollout.generate` and `rewards`, `[B]`."""
        wanted = self.run.config.data.prompts_per_step
        refills = self.run.config.algorithm.refill_attempts
        batch = self._sample(step, attempt=0, count=wanted)
        self.sampled = [batch]
        if refills == 0:
            return batch
        parts = [_alive(batch)]
        for attempt in range(1, refills + 1):
            missing = wanted - _num_groups(parts)
            if missing <= 0:
                break
            drawn = self._sample(step, attempt=attempt, count=missing)
            self.sampled.append(drawn)
            parts.append(_alive(drawn))
        # a step without any signal still takes place: it moves nothing, but the metrics show it
        return concat(parts) if _num_groups(parts) else batch

    def ahead(self, step: int) -> tuple[Call[Any], ...]:
        """Call that draws `step`'s samples alongside the previous update, with `lag: 1`; or ()."""
        if self.run.config.lag == 0 or step >= self.run.config.steps:
            return ()
        count = self.run.config.data.prompts_per_step
        call = self._draw(step, attempt=0, count=count, is_ahead=True)

        def keep(samples: Batch) -> Batch:
            self.drawn[step] = samples
            return samples

        return (call.then(keep),)

    def _draw(self, step: int, *, attempt: int, count: int, is_ahead: bool = False) -> Call[Batch]:
        config = self.run.config
        generation = Generation(
            seed=config.seed,
            step=step,
            group_size=config.data.group_size,
            sampling=self.run.sampling,
        )
        rows = self.run.rows(step, attempt=attempt, count=count)
        call = self.rollout.generate.on(rows, generation)
        if config.lag > 0 and attempt == 0:
            # a run that resumes with the next step finds by its label what was drawn ahead
            return call.labelled(f"{self.rollout.name} for step {step}", is_ahead=is_ahead)
        return call

    def _sample(self, step: int, *, attempt: int, count: int) -> Batch:
        batch = self.drawn.pop(step, None) if attempt == 0 else None
        if batch is None:
            with self.run.phase("rollout"):
                (batch,) = together(self._draw(step, attempt=attempt, count=count))
        with self.run.phase("reward"):
            return self.run.score(batch)

    def metrics(self) -> Metrics:
        """Metrics of the step's samples on all ranks, dropped ones too; every rank calls it."""
        batch = concat(self.sampled)
        groups = _num_groups(self.sampled)
        with_signal = world_sum(has_signal_of(batch).sum()).item()
        responses = batch["response_lengths"]
        rewards, lengths = moments(batch["rewards"]), moments(responses.double())
        cut = moments((batch["finish"] == Finish.LENGTH).double())
        return {
            "reward": rewards.mean,
            "reward_std": rewards.std,
            "response_length": lengths.mean,
            "response_length_max": lengths.maximum,
            "cut_fraction": cut.mean,
            "duplicate_fraction": moments(repeats(batch)).mean,
            "rollout_tokens": lengths.mean * lengths.count,
            "samples": lengths.count,
            "groups": float(groups),
            "groups_with_signal": with_signal,
            **self.rollout.turn_metrics(batch),
            **self.run.reward_metrics(batch),
        }


def has_signal_of(batch: Batch) -> Tensor:
    """Whether the rewards of each group differ: bool `[num_groups]`, empty without rows."""
    if len(batch) == 0:
        return torch.zeros(0, dtype=torch.bool)
    return has_signal(batch["rewards"], batch["prompt_ids"])


def repeats(batch: Batch) -> Tensor:
    """Whether a sample has the tokens of an earlier one of its group: float64 `[B]`."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    found = []
    for prompt_id, tokens in zip(
        batch["prompt_ids"].tolist(),
        torch.split(batch["tokens"], batch.lengths.tolist()),
        strict=True,
    ):
        key = prompt_id, tuple(tokens.tolist())
        found.append(key in seen)
        seen.add(key)
    return torch.tensor(found, dtype=torch.float64)


def _alive(batch: Batch) -> Batch:
    """Rows of the groups whose rewards differ."""
    index, _ = group_index(batch["prompt_ids"])
    return batch.select(has_signal_of(batch)[index].nonzero().flatten())


def _num_groups(parts: list[Batch]) -> int:
    """Number of groups over all parts and ranks."""
    own = torch.cat([torch.unique(part["prompt_ids"]) for part in parts]).unsqueeze(1)
    return sum(len(table) for table in gather_tables(own))
