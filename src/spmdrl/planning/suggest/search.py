"""The search: sketches of many choices, then exact plans of the best.

Sketches take milliseconds (see `planning.sketch`). From the configuration's own choice the search
changes one block at a time as long as a sketch gets better, for the best placements. The best
sketches are planned exactly, and so are those that differ from the best plan in one block. It reads
no clock: the same question has the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from spmdrl.planning.forecast.step import StepForecast
from spmdrl.planning.suggest.space import PLACEMENT, Choice, Space, Words

MOST_ROUNDS = 2
"""Passes over all blocks from one start."""

MOST_PLACES = 2
"""Placements other than the first one's for which all blocks are tried."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A choice as it was planned.

    Args:
        words: overrides to paste; none for the configuration as it is.
        lacking_bytes: bytes that the fullest device or host lacks; 0 if all fits.
        peak_bytes: parts and working memory of the fullest device.
        forecast: the step; None if the choice is refused.
    """

    words: Words
    lacking_bytes: int
    peak_bytes: int
    forecast: StepForecast | None

    @property
    def fits(self) -> bool:
        return self.forecast is not None and self.lacking_bytes == 0

    @property
    def key(self) -> tuple[float, float]:
        """Sort key: what lacks least, then what is fastest."""
        if self.forecast is None:
            return float("inf"), float("inf")
        return self.lacking_bytes, self.forecast.seconds


Planner = Callable[[Words], Trial]
"""Plans one choice."""

Planners = Callable[[Sequence[Words]], Sequence[Trial]]
"""Plans several choices, at once where it can."""


@dataclass
class _Known:
    """Trials by choice; the planners are asked once for each distinct list of overrides."""

    space: Space
    planners: Planners
    by_words: dict[frozenset[str], Trial] = field(default_factory=dict)

    def key(self, choice: Choice) -> tuple[float, float]:
        return self.trial(choice).key

    def trial(self, choice: Choice) -> Trial:
        self.learn([choice])
        return self.by_words[frozenset(self.space.words(choice))]

    def learn(self, choices: Iterable[Choice]) -> None:
        """Ask for all of them together."""
        words = {frozenset(own): own for own in map(self.space.words, choices)}
        new = {at: own for at, own in words.items() if at not in self.by_words}
        if new:
            self.by_words |= zip(new, self.planners(list(new.values())), strict=True)

    def best(self, choices: Iterable[Choice]) -> Choice:
        """The first of the best of them."""
        given = list(choices)
        self.learn(given)
        return min(given, key=self.key)


@dataclass(frozen=True, kw_only=True)
class Found:
    """Exact plans that a search made.

    Args:
        start: the exact plan of the configuration as it is.
        fitting: the exact plans that fit, fastest first.
    """

    start: Trial
    fitting: list[Trial]


def search(space: Space, sketch: Planners, exact: Planners, *, most_exact: int) -> Found:
    """Find the fastest choices.

    Args:
        sketch: estimates choices.
        exact: plans choices.
        most_exact: exact plans to make at most.
    """
    sketched = _Known(space, sketch)
    ends = _descents(space, sketched)
    planned = _Known(space, exact)
    seen: set[Choice] = set()
    first = sorted({space.start, *ends}, key=sketched.key)[: max(1, most_exact // 2)]
    seen |= {space.start, *first}
    planned.learn(dict.fromkeys((space.start, *first)))
    while len(planned.by_words) < most_exact:
        best = min(seen, key=planned.key)
        left = [each for each in _around(space, best, ends) if each not in seen]
        if not left:
            break
        choice = sketched.best(left)
        seen.add(choice)
        if sketched.trial(choice).forecast is not None:
            planned.trial(choice)
    fitting = [trial for trial in planned.by_words.values() if trial.fits]
    # of choices that come to the same, the one with the fewest overrides
    fitting.sort(key=lambda trial: (trial.key, trial.peak_bytes, len(trial.words)))
    distinct = {(trial.key, trial.peak_bytes): trial for trial in reversed(fitting)}
    return Found(start=planned.trial(space.start), fitting=[*distinct.values()][::-1])


def _around(space: Space, best: Choice, ends: Iterable[Choice]) -> list[Choice]:
    return list(dict.fromkeys((*space.neighbours(best), *ends)))


def _descents(space: Space, known: _Known) -> list[Choice]:
    """The choices at which the sketches' search ends, for the best placements."""
    blocks = [name for name in space.blocks if name != PLACEMENT]
    ends = [_descend(space, known, space.start, blocks, MOST_ROUNDS)]
    if PLACEMENT in space.blocks:
        elsewhere = list(space.changed(ends[0], PLACEMENT))
        known.learn(elsewhere)
        elsewhere.sort(key=known.key)
        ends += [_descend(space, known, choice, blocks, 1) for choice in elsewhere[:MOST_PLACES]]
    return ends


def _descend(
    space: Space, known: _Known, start: Choice, blocks: Iterable[str], rounds: int
) -> Choice:
    """Change one block at a time, each to its best option, until nothing gets better."""
    best = start
    for _ in range(rounds):
        before = best
        for block in blocks:
            best = known.best((best, *space.changed(best, block)))
        if best == before:
            break
    return best
