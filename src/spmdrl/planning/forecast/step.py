"""`StepForecast`: the phases of a training step with their work, seconds and bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spmdrl.planning.forecast.seconds import Timed
from spmdrl.planning.forecast.work import Work


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of a step's rows; means over rows, except for the longest.

    Args:
        prompt: tokens of a prompt; 0 for conversations and pairs.
        response: tokens of a response, of a conversation, or of one response of a pair with its
            prompt.
        longest: tokens of the longest response of the step.
    """

    prompt: float
    response: float
    longest: float


@dataclass(frozen=True, kw_only=True)
class CallForecast:
    """Seconds and work of a role's call in a step.

    Args:
        role, call: `policy`, `update`.
        phase: the phase of a run's metrics that it belongs to (`seconds/<phase>`).
        work: the work of the rank that takes longest.
        timed: its seconds.
        ranks: ranks of the role.
    """

    role: str
    call: str
    phase: str
    work: Work
    timed: Timed
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StepForecast:
    """Phases of a usual step, neither the first nor with an evaluation.

    Args:
        calls: in order; those of one phase on disjoint ranks run at once.
        phase_seconds: by phase of a run's metrics, in order.
        seconds: seconds of the step. With `lag: 1`, calls on disjoint ranks overlap.
        tokens: prompts' and responses' tokens of the step, over all ranks.
        idle_share: rank -> share of the step in which it has nothing to do (disjoint placements).
        lag_saves: seconds that `lag: 1` would save, 0 if it is set or the flow has none.
    """

    calls: Sequence[CallForecast]
    phase_seconds: Mapping[str, float]
    seconds: float
    tokens: float
    idle_share: Mapping[int, float]
    lag_saves: float
