"""Detectors: known ways in which training goes wrong, found in a run's metrics.

Each is a pure function of the records of all steps so far (as `metrics.merge_steps` makes them),
and says what it sees in words, or None. A record that lacks a metric says nothing about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from spmdrl.observe import names

Record = Mapping[str, float]

PAGE = "docs/detectors.md"

STEPS = 3
"""Steps in a row that a state must last, so that one odd step tells nothing."""


@dataclass(frozen=True, kw_only=True)
class Detector:
    """Args:
    name: its heading on the page.
    look: says what is wrong in the last record, given it and all before.
    mend: what to try, with the keys.
    """

    name: str
    look: Callable[[Sequence[Record]], str | None]
    mend: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A fault that a detector sees.

    Args:
        name: the detector's.
        text: what is wrong, what to try, and the place in the documentation.
    """

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Episode:
    """Steps in a row in which a detector sees its fault.

    Args:
        finding: what it saw in the first of them.
        first, last: numbers of the steps.
    """

    finding: Finding
    first: int
    last: int


class Detecting:
    """Looks at each step of a run, and tells of what was not there in the step before.

    Args:
        records: those of the steps before a resume.
    """

    def __init__(self, records: Sequence[Record] = ()) -> None:
        self._records = list(records)
        self._seen = {finding.name for finding in detect(self._records)}

    def look(self, record: Record) -> list[Finding]:
        """Look at the newest step; return the findings that are new."""
        self._records.append(record)
        found = detect(self._records)
        new = [finding for finding in found if finding.name not in self._seen]
        self._seen = {finding.name for finding in found}
        return new


def detect(records: Sequence[Record]) -> list[Finding]:
    """Find what all detectors see in the last record, given it and all before."""
    if not records:
        return []
    looked = ((detector, detector.look(records)) for detector in DETECTORS)
    return [
        Finding(name=d.name, text=f"{said}. {d.mend} ({PAGE}#{d.name.replace('_', '-')})")
        for d, said in looked
        if said is not None
    ]


_FIRST, _LATEST = 20, 200
"""Records that a replay looks at: a step of a long run is compared with these, not with all."""


def replay(records: Sequence[Record]) -> list[Episode]:
    """Find what the detectors saw in every step of a run, in order of the first steps.

    Args:
        records: one per step, with `step`.
    """
    found: list[Episode] = []
    current: dict[str, Episode] = {}
    for end in range(1, len(records) + 1):
        step = int(records[end - 1]["step"])
        begin = max(_FIRST, end - _LATEST)
        seen = detect([*records[: min(_FIRST, end)], *records[begin:end]])
        found += [own for name, own in current.items() if name not in {f.name for f in seen}]
        current = {
            finding.name: replace(current[finding.name], last=step)
            if finding.name in current
            else Episode(finding=finding, first=step, last=step)
            for finding in seen
        }
    found += current.values()
    return sorted(found, key=lambda episode: (episode.first, episode.finding.name))


def _values(records: Sequence[Record], name: str) -> list[float]:
    """Values of a metric in all records that have it; none if the last one does not."""
    if name not in records[-1]:
        return []
    return [record[name] for record in records if name in record]


def _lasting(records: Sequence[Record], name: str, is_bad: Callable[[float], bool]) -> bool:
    """Whether the last `STEPS` values of a metric are bad."""
    last = _values(records, name)[-STEPS:]
    return len(last) == STEPS and all(map(is_bad, last))


def flat_reward(records: Sequence[Record]) -> str | None:
    if _lasting(records, "reward_std", lambda std: std == 0):
        return f"every reward of the last {STEPS} steps is {records[-1][names.REWARD]:g}"
    has_groups = records[-1].get("samples", 0) > records[-1].get("groups", math.inf)
    if has_groups and _lasting(records, "groups_with_signal", lambda count: count == 0):
        return f"in no group of the last {STEPS} steps do two rewards differ"
    return None


def kl_explosion(records: Sequence[Record]) -> str | None:
    for name, whose in ((names.REF_KL, "to the reference"), (names.KL, "of an update")):
        values = _values(records, name)
        if not values:
            continue
        *before, last = values
        usual = median([v for v in before if math.isfinite(v)] or [math.inf])
        if not math.isfinite(last) or (len(before) >= STEPS and last > max(1.0, 10 * usual)):
            return f"the KL {whose} is {last:.3g} nats per token, after {usual:.3g}"
    return None


def entropy_collapse(records: Sequence[Record]) -> str | None:
    values = _values(records, names.ENTROPY)
    if len(values) < 2 * STEPS:
        return None
    first, last = _mean(values[:STEPS]), max(values[-STEPS:])
    if last < 0.02 and last < 0.1 * first:
        return f"the entropy has fallen from {first:.3g} to {last:.3g} nats per token"
    return None


def length_explosion(records: Sequence[Record]) -> str | None:
    lengths, rewards = _values(records, names.LENGTH), _values(records, names.REWARD)
    if len(lengths) < 2 * STEPS or len(rewards) < len(lengths):
        return None
    first, last = _mean(lengths[:STEPS]), _mean(lengths[-STEPS:])
    if last > 3 * first and not _has_gained(rewards):
        return f"responses have grown from {first:.0f} to {last:.0f} tokens, and rewards have not"
    return None


def _mean(values: Sequence[float]) -> float:
    """Compute the mean; of values that are not finite NaN or infinite, where `fmean` raises."""
    return sum(values) / len(values)


def _has_gained(rewards: Sequence[float]) -> bool:
    """Whether the rewards of the last steps are above those of the first."""
    return _mean(rewards[-STEPS:]) > _mean(rewards[:STEPS])


def cut_responses(records: Sequence[Record]) -> str | None:
    if _lasting(records, "cut_fraction", lambda share: share > 0.75):
        return f"{records[-1]['cut_fraction']:.0%} of the responses are cut at the most tokens"
    return None


def rollout_gap(records: Sequence[Record]) -> str | None:
    values = _values(records, "rollout_gap")
    usual = _mean(values[:STEPS]) if values else 0.0
    limit = max(0.05, 5 * usual)
    if len(values) >= 2 * STEPS and _lasting(records, "rollout_gap", lambda gap: gap > limit):
        return (
            "engine and trainer differ ever more in the log-probabilities of the same tokens: by "
            f"{values[-1]:.3g} nats, after {usual:.3g} at first"
        )
    return None


def ratio_drift(records: Sequence[Record]) -> str | None:
    if _lasting(records, "ratio", lambda ratio: not 0.8 <= ratio <= 1.25):
        return f"the mean ratio of new to old probability is {records[-1]['ratio']:.3g}, not 1"
    return None


def idle_value(records: Sequence[Record]) -> str | None:
    values = _values(records, "value/explained_variance")
    if len(values) >= 10 and max(values[-5:]) <= 0.05:
        return f"the value model explains {values[-1]:.2g} of the returns' variance after 10 steps"
    return None


def clipped_tokens(records: Sequence[Record]) -> str | None:
    if _lasting(records, names.CLIP_FRACTION, lambda share: share > 0.5):
        return f"{records[-1][names.CLIP_FRACTION]:.0%} of the tokens are clipped, and move nothing"
    return None


def duplicate_responses(records: Sequence[Record]) -> str | None:
    # a policy that learns short right answers repeats them: that alone is no fault
    rewards = _values(records, names.REWARD)
    if rewards and _has_gained(rewards):
        return None
    if _lasting(records, "duplicate_fraction", lambda share: share > 0.5):
        share = records[-1]["duplicate_fraction"]
        return (
            f"{share:.0%} of the responses repeat another one of their group, word for word, and "
            "rewards are no higher than at first"
        )
    return None


def failing_rewards(records: Sequence[Record]) -> str | None:
    if _lasting(records, "reward_failed", lambda share: share > 0.2):
        return f"reward functions fail on {records[-1]['reward_failed']:.0%} of the responses"
    return None


def stale_samples(records: Sequence[Record]) -> str | None:
    lags = _values(records, "sample_lag")[-STEPS - 1 :]
    if len(lags) == STEPS + 1 and all(a < b for a, b in pairwise(lags)):
        return f"samples come from a policy of ever more steps ago: {lags[-1]:g} optimizer steps"
    return None


def zero_rate(records: Sequence[Record]) -> str | None:
    if _lasting(records, "lr", lambda rate: rate == 0):
        return f"the learning rate of the last {STEPS} steps is 0"
    return None


def no_gradient(records: Sequence[Record]) -> str | None:
    if _lasting(records, "skipped", lambda skipped: skipped == 1):
        return f"no gradient of the last {STEPS} steps was finite, and no weight has changed"
    return None


def slow_step(records: Sequence[Record]) -> str | None:
    seconds = [_own_seconds(record) for record in records if names.STEP_SECONDS in record]
    if names.STEP_SECONDS not in records[-1] or len(seconds) < 6:
        return None
    usual = median(seconds[1:-1])  # the first has what happens once
    if seconds[-1] > max(10 * usual, usual + 1.0):
        return f"the step took {seconds[-1]:.1f} s, and steps before it {usual:.1f} s"
    return None


def _own_seconds(record: Record) -> float:
    apart = sum(record.get(names.SECONDS + phase, 0.0) for phase in ("evaluation", "checkpoint"))
    return record[names.STEP_SECONDS] - apart


DETECTORS = tuple(
    Detector(name=look.__name__, look=look, mend=mend)
    for look, mend in (
        (
            flat_reward,
            "Nothing can be learned from them: read samples (log.rollouts, spmdrl show), try the "
            "rewards on a right answer, take easier prompts or more of them",
        ),
        (kl_explosion, "Lower train.lr, or raise algorithm.kl_coef"),
        (
            entropy_collapse,
            "The policy tries nothing new: raise algorithm.clip_high, algorithm.entropy_coef or "
            "sampling.temperature, or lower train.lr",
        ),
        (
            length_explosion,
            "Look for a reward that length pleases; algorithm.overlong_penalty takes from it",
        ),
        (
            cut_responses,
            "Raise sampling.max_tokens, or see that the prompts make the model end its answers",
        ),
        (
            rollout_gap,
            "Set algorithm.importance_cap, and look at sync/canary_gap and the engine's dtype",
        ),
        (ratio_drift, "Lower train.lr, train.epochs or train.num_minibatches"),
        (
            idle_value,
            "Raise the value's learning rate, or let it learn first: algorithm.value_warmup_steps",
        ),
        (clipped_tokens, "Lower train.lr, train.epochs or train.num_minibatches"),
        (
            duplicate_responses,
            "Groups then hold few samples: raise sampling.temperature, or lower train.lr",
        ),
        (failing_rewards, "The log has their first error; spmdrl check tries them on some rows"),
        (stale_samples, "The flow must sync before it samples: sync.run() at each step's start"),
        (zero_rate, "Set train.lr, or a schedule that does not end before the run: train.schedule"),
        (no_gradient, "Lower train.lr, or load the model in float32; look at loss and grad_norm"),
        (slow_step, "Look at seconds/* of the step, and at the log for slow ranks"),
    )
)
