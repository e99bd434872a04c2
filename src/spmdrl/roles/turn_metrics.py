"""Metrics of samples that take turns."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from spmdrl.batch import Batch
from spmdrl.distributed.reduce import gather_objects, moments, world_sum
from spmdrl.roles.turn_calls import NUM_TURNS, TURN_END, TURN_REWARDS
from spmdrl.rollout.protocol import Ending
from spmdrl.training.packing import PART_START

COUNTED = ("restarted", "remade")
"""Samples that started again after a stop, and objects that were made again in another worker."""


def turn_metrics(
    batch: Batch, counts: Mapping[str, int], sums: Mapping[str, float]
) -> dict[str, float]:
    """Metrics of turns over the world's rows; every rank calls it.

    `turns/mean` and `turns/max` count a sample's turns, `turns/reward` is a turn's mean reward,
    `turns/given_tokens` a sample's mean of tokens from its environment; `turns/cut_by_turns`,
    `turns/cut_by_room`, `turns/cut_by_seconds` and `turns/failed` are shares of samples that ended
    so; `turns/restarted` and `turns/remade` are counts. Where conversations are rendered,
    `turns/parts` is a sample's mean of parts, `turns/in_parts` the share of samples with several,
    and the contexts of parts count as given. `turns/NAME` of what environments count
    themselves (`Observation.metrics`) is a sample's mean.

    Args:
        batch: home rows of `rollout.generate` that took turns.
        counts: this rank's, of `COUNTED`.
        sums: this rank's, of the metrics of its observations.
    """
    number, ending = batch[NUM_TURNS].double(), batch[TURN_END]
    turns = moments(number)
    rewards = moments(batch.row_sum(batch[TURN_REWARDS].double()))
    after = batch.lengths - batch["prompt_lengths"]
    given = moments((after - batch["response_lengths"]).double())
    shares = {
        name: moments((ending == kind).double()).mean
        for name, kind in (
            ("cut_by_turns", Ending.TURNS),
            ("cut_by_room", Ending.ROOM),
            ("cut_by_seconds", Ending.SECONDS),
            ("failed", Ending.FAILED),
        )
    }
    parted = {}
    if PART_START in batch:
        parts = 1 + batch.row_sum(batch[PART_START].double())
        parted = {"parts": moments(parts).mean, "in_parts": moments((parts > 1).double()).mean}
    own = [len(batch), *(counts.get(name, 0) for name in COUNTED)]
    samples, *counted = world_sum(torch.tensor(own, dtype=torch.float64)).tolist()
    totals: dict[str, float] = {}
    for part in gather_objects(dict(sums)):
        for name, value in part.items():
            totals[name] = totals.get(name, 0.0) + value
    found = {
        **{name: total / samples for name, total in sorted(totals.items())},
        "mean": turns.mean,
        "max": turns.maximum,
        "reward": rewards.mean / turns.mean if turns.mean else 0.0,
        "given_tokens": given.mean,
        **shares,
        **parted,
        **dict(zip(COUNTED, counted, strict=True)),
    }
    return {f"turns/{name}": value for name, value in found.items()}
