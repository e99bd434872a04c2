"""Failed calls of reward functions: they are counted and logged, and too many are an error."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spmdrl.rewards.functions import RewardSpec
from spmdrl.rewards.process import FLOAT32_MAX

log = logging.getLogger(__name__)

MIN_JUDGED = 8  # fewest calls by which a share of failures is judged
MAX_START = 16  # failures after which a component that has never worked is given up


class RewardError(ValueError):
    """A reward component fails so often that the user must fix it."""


@dataclass(frozen=True, kw_only=True)
class RewardJob:
    """One sample to score: the four arguments of a reward function, and the conversation for those
    that ask for it.
    """

    prompt: str
    response: str
    answer: str | None
    entry: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A failed call.

    Args:
        reason: exception, signature (it does not take such arguments), returned (something that is
            not a number), timeout, nan, memory or died.
        message: its first line says what happened, the lines after it where in the user's code.
    """

    component: str
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class RewardResult:
    """The reward of one sample.

    Args:
        score: weighted sum of the components.
        components: each component's unweighted value by its name, and the other numbers that its
            function returned as `name/key`.
        failures: the calls that failed; their value is the pool's `failed`.
    """

    score: float
    components: Mapping[str, float]
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FailureCount:
    """A component's failed calls in a batch, at least one.

    Args:
        calls: number of all its calls.
        reasons: number of failed calls by reason.
        first: message of the first failure.
    """

    component: str
    calls: int
    reasons: Mapping[str, int]
    first: str


Tell = Callable[[Sequence[FailureCount]], None]


def count_failures(
    specs: Sequence[RewardSpec], results: Sequence[RewardResult]
) -> list[FailureCount]:
    """Count the failures of each component that failed in some call."""
    found = []
    for spec in specs:
        own = [f for result in results for f in result.failures if f.component == spec.name]
        if own:
            reasons = Counter(failure.reason for failure in own)
            found.append(
                FailureCount(
                    component=spec.name,
                    calls=len(results),
                    reasons=dict(reasons),
                    first=own[0].message.strip(),
                )
            )
    return found


def add_counts(counts: Sequence[FailureCount]) -> list[FailureCount]:
    """Add the counts of all ranks; one count per component."""
    found: dict[str, FailureCount] = {}
    for count in counts:
        known = found.get(count.component)
        if known is None:
            found[count.component] = count
            continue
        found[count.component] = FailureCount(
            component=count.component,
            calls=known.calls + count.calls,
            reasons=dict(Counter(known.reasons) + Counter(count.reasons)),
            first=known.first,
        )
    return list(found.values())


class Teller:
    """Logger of failures; it shows each place in the user's code only once.

    Args:
        failed: value of a failed call.
    """

    def __init__(self, failed: float) -> None:
        self._failed = failed
        self._said: set[tuple[str, str]] = set()

    def __call__(self, counts: Sequence[FailureCount]) -> None:
        for count in counts:
            message = count.first
            if (count.component, message) in self._said:
                message = message.partition("\n")[0]
            self._said.add((count.component, count.first))
            log.warning(
                "reward %s: %d of %d calls failed %s and count as %g; the first: %s",
                *(count.component, sum(count.reasons.values()), count.calls, dict(count.reasons)),
                *(self._failed, message),
            )


@dataclass(kw_only=True)
class _Tally:
    """Calls of a component since its failures were last judged."""

    calls: int = 0
    failures: int = 0
    worked: bool = False
    first: str = ""


class Judge:
    """Counter of the calls of one pool's components; too many failures are an error.

    Args:
        failed, max_failed: the pool's arguments of these names.

    Raises:
        ValueError: a weight, or `failed` times one, is not finite in float32.
    """

    def __init__(self, specs: Sequence[RewardSpec], *, failed: float, max_failed: float) -> None:
        for spec in specs:
            if not math.isfinite(spec.weight):
                raise ValueError(f"the weight {spec.weight} of reward {spec.name!r} must be finite")
            if not _fits(spec.weight * failed, specs):
                raise ValueError(
                    f"failed={failed} with the weight {spec.weight} of reward {spec.name!r} must "
                    "be finite in float32"
                )
        self._specs, self._failed, self._max_failed = tuple(specs), failed, max_failed
        self._tallies = [_Tally() for _ in specs]
        self._ignored: set[tuple[str, str]] = set()

    def reset(self) -> None:
        """Forget all calls."""
        self._tallies = [_Tally() for _ in self._specs]

    def taken(self, component: int, reply: dict[str, Any]) -> dict[str, Any]:
        """Count a worker's reply; returns it, or a failure if its value is too large.

        Raises:
            RewardError: the component never worked, and is given up.
        """
        spec, tally = self._specs[component], self._tallies[component]
        if "values" in reply and not _fits(spec.weight * reply["values"]["score"], self._specs):
            value = reply["values"]["score"]
            message = f"{spec.weight} x the reward {value} is more than a float32 can hold"
            reply = {"reason": "nan", "message": message}
        tally.calls += 1
        if "values" in reply:
            tally.worked = True
            self._warn_of_ignored(spec.name, reply["ignored"])
            return reply
        tally.failures += 1
        tally.first = tally.first or reply["message"]
        if not tally.worked and tally.failures >= MAX_START:
            raise self._error(component)
        return reply

    def result(self, replies: Sequence[Mapping[str, Any]]) -> RewardResult:
        """Make the result of one sample from the replies of all components, in their order."""
        components: dict[str, float] = {}
        failures = []
        score = 0.0
        for spec, reply in zip(self._specs, replies, strict=True):
            if "values" not in reply:
                failures.append(
                    Failure(component=spec.name, reason=reply["reason"], message=reply["message"])
                )
            values = reply.get("values", {"score": self._failed})
            score += spec.weight * values["score"]
            components[spec.name] = values["score"]
            components |= {f"{spec.name}/{k}": v for k, v in values.items() if k != "score"}
        return RewardResult(score=score, components=components, failures=tuple(failures))

    def check(self) -> None:
        """Judge the failures so far. RewardError: a component's share of them is too large."""
        for component, tally in enumerate(self._tallies):
            if tally.calls < MIN_JUDGED:
                continue  # a small batch is judged together with the next ones
            if tally.failures and tally.failures >= self._max_failed * tally.calls:
                raise self._error(component)
            self._tallies[component] = _Tally(worked=tally.worked)

    def _warn_of_ignored(self, component: str, keys: Sequence[str]) -> None:
        """Warn once for each key of a function's dict."""
        for key in keys:
            if (component, key) not in self._ignored:
                self._ignored.add((component, key))
                log.warning(
                    "reward %s: the entry %r of its dict is no number and is left out of the "
                    "metrics",
                    *(component, key),
                )

    def _error(self, component: int) -> RewardError:
        spec, tally = self._specs[component], self._tallies[component]
        return RewardError(
            f"reward {spec.name!r} ({spec.function}): {tally.failures} of {tally.calls} calls "
            f"failed (reward_pool.max_failed_share={self._max_failed:g}: so many end the run); "
            f"the first: {tally.first}"
        )


def _fits(weighted: float, specs: Sequence[RewardSpec]) -> bool:
    """Whether a weighted value, and so the sum of all components, is finite in float32."""
    return abs(weighted) <= FLOAT32_MAX / len(specs)
