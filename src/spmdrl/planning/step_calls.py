"""The calls of a step on one rank, as the memory plan sees them: those of the shipped flows.

A user's own flow is planned as if it made the same calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spmdrl.config.data_sets import described_sets
from spmdrl.config.sections import Config
from spmdrl.memory.schedule import PlannedCall

READ_ORDER = ("value", "reference", "teacher", "policy", "reward")
"""Kinds of roles in the order in which flows read from them; updates use it too."""


@dataclass(frozen=True, kw_only=True)
class RankCalls:
    """Calls of one rank's roles in a step; each group may be empty.

    Args:
        sync: brings the policy's weights to the rollout.
        generate: calls of rollouts.
        score: calls of the roles that `rewards` names.
        read: calls of the other models.
        update: calls of the trained models.
    """

    sync: tuple[PlannedCall, ...]
    generate: tuple[PlannedCall, ...]
    score: tuple[PlannedCall, ...]
    read: tuple[PlannedCall, ...]
    update: tuple[PlannedCall, ...]


def usual_step(config: Config, calls: RankCalls) -> list[PlannedCall]:
    """A step that follows another; with `lag: 1` it draws the samples of the next one."""
    if config.lag:
        # together with the update, which changes its weights: readers go first
        return [*calls.sync, *calls.score, *calls.read, *calls.generate, *calls.update]
    return [*calls.sync, *calls.generate, *calls.score, *calls.read, *calls.update]


def unusual_steps(config: Config, calls: RankCalls) -> dict[str, list[PlannedCall]]:
    """Steps with further calls, by the setting that causes them."""
    sampled = [*calls.generate, *calls.score]
    last = [*calls.read, *(calls.generate if config.lag else ()), *calls.update]
    again = [*calls.sync, *sampled, *sampled, *last]
    found = {}
    if (setting := _evaluation_between_syncs(config)) is not None:
        found[setting] = again
    if config.algorithm.refill_attempts > 0:
        found[f"algorithm.refill_attempts={config.algorithm.refill_attempts}"] = again
    if config.lag:  # the first step draws its own samples, and those of the next one
        found[f"lag={config.lag}"] = [*calls.sync, *sampled, *last]
    return found


def _evaluation_between_syncs(config: Config) -> str | None:
    """The setting that makes the rollout respond to held-out prompts and then, before the next
    sync, to others: those of the step, or of another set.
    """
    evaluation = config.evaluation
    sets = list(described_sets(config))
    if evaluation.before or evaluation.every > 0 or len(sets) > 1:
        if evaluation.sets:
            return f"evaluation.sets={sorted(evaluation.sets)}"
        return f"evaluation.held_out={evaluation.held_out}" if sets else None
    return None


def in_read_order(kinds: Mapping[str, str]) -> list[str]:
    """The roles of kinds in `READ_ORDER`, in that order."""
    return [name for kind in READ_ORDER for name, own in kinds.items() if own == kind]
