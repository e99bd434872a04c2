"""`Running`: the samples that a scheduler computes now, oldest first."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from spmdrl.rollout.native.sample import Clock, Sample


class Running:
    """Samples that hold blocks of their own: those that compute their first tokens, and the seated
    ones, which decode in every step.

    A step costs nothing for a seated sample unless its newest token begins a block.

    Args:
        settle: function that is told of a seated sample that leaves, before anything reads its
            tokens.
    """

    def __init__(self, block_size: int, settle: Callable[[Sample], None]) -> None:
        self._block_size, self._settle = block_size, settle
        self.clock = Clock()
        self.samples: list[Sample] = []
        self.computing: list[Sample] = []
        """Samples that are not seated."""
        self.moved: list[tuple[Sample, int]] = []
        """Seated samples that this step gave another block, and its place."""
        self._seated: list[Sample] = []  # if `_has_changed`, those of an earlier step
        self._has_changed = False
        self._due: dict[int, list[Sample]] = {}  # by the step before which to look at them
        self._next_order = 0

    def __len__(self) -> int:
        return len(self.samples)

    def enter(self, sample: Sample) -> None:
        """Add a sample, as the youngest."""
        self.samples.append(sample)
        self.computing.append(sample)
        sample.order, self._next_order = self._next_order, self._next_order + 1

    def leave(self, sample: Sample) -> None:
        """Remove a sample."""
        self.samples.remove(sample)
        sample.order = sample.due = -1
        if not sample.is_seated:
            self.computing.remove(sample)
            return
        self._settle(sample)
        sample.cached = sample.cached  # it does not grow any more
        self._has_changed = True

    def settle_all(self) -> None:
        """Settle every seated sample, which decodes on."""
        for sample in self.seated():
            self._settle(sample)

    @property
    def most_needed(self) -> int:
        """The most blocks that samples need in the next step for their newest tokens."""
        return len(self._due.get(self.clock.steps, ())) + len(self.computing)

    def due(self) -> list[Sample]:
        """List the samples whose newest token is the first of a block or of their decoding, oldest
        first; called once in a step.
        """
        self.moved, step = [], self.clock.steps
        found = [sample for sample in self._due.pop(step, ()) if sample.due == step]
        found += [sample for sample in self.computing if sample.is_decoding]
        return sorted(found, key=attrgetter("order"))

    def decode(self, sample: Sample) -> None:
        """Note that a sample of `due`, or one that has entered, has a block for its newest token;
        it is seated from now on.
        """
        number = sample.cached // self._block_size
        if sample.is_seated:
            self.moved.append((sample, number))
        else:
            self.computing.remove(sample)
            sample.seat(self.clock)
            self._has_changed = True
        left = (number + 1) * self._block_size - sample.cached
        sample.due = self.clock.steps + left
        self._due.setdefault(sample.due, []).append(sample)

    def seated(self) -> list[Sample]:
        """List the seated samples, oldest first; the same list as before if they are the same."""
        if self._has_changed:
            self._seated = [sample for sample in self.samples if sample.is_seated]
            self._has_changed = False
        return self._seated
