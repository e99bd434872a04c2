"""Order of the data, a pure function of seed and step, also after a resume; each rank's contiguous
share of a step's rows is its home.

The shuffle sorts indices by a keyed 64-bit hash (splitmix64) instead of using a library's
generator, so that the order is the same in every version of every library.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from spmdrl.batch import Batch
from spmdrl.world import World


class Stream(Protocol):
    """Order of the items that the steps draw."""

    @property
    def prompts_per_step(self) -> int: ...

    def indices(self, step: int, attempt: int = 0) -> list[int]:
        """Indices of the step's items, or of those of its refill `attempt` (from 1)."""

    def passed(self, step: int) -> list[int]:
        """Items drawn before `step` in the pass over the data (over each source) that it is in."""

    def following(self, step: int) -> list[int]:
        """Items that this pass draws from `step` on."""


def stream_of(seed: int, shares: Sequence[tuple[int, float]], prompts_per_step: int) -> Stream:
    """Make the order of one source, or of several.

    Args:
        shares: (items, weight) of each source.

    Raises:
        ValueError: a source is too small for what a step draws from it.
    """
    if len(shares) == 1:
        return PromptStream(seed=seed, num_prompts=shares[0][0], prompts_per_step=prompts_per_step)
    sizes, weights = zip(*shares, strict=True)
    return MixedStream(seed=seed, sizes=sizes, weights=weights, prompts_per_step=prompts_per_step)


@dataclass(frozen=True, kw_only=True)
class PromptStream:
    """Shuffled epochs over `num_prompts` prompts, `prompts_per_step` at a time.

    An epoch is as many whole steps as the data give; the rest (less than a step, other prompts in
    every epoch) waits for a later epoch. So no prompt occurs twice in an epoch, hence none twice
    in a step.

    Raises:
        ValueError: fewer prompts than one step draws.
    """

    seed: int
    num_prompts: int
    prompts_per_step: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.prompts_per_step <= self.num_prompts:
            raise ValueError(
                f"a step draws {self.prompts_per_step} prompts, the data have {self.num_prompts}: "
                "prompts per step must be between 1 and the prompts there are"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_prompts // self.prompts_per_step

    def epoch(self, step: int) -> int:
        """Epoch (from 0) of a step (from 0)."""
        return step // self.steps_per_epoch

    def indices(self, step: int, attempt: int = 0) -> list[int]:
        """Indices of a step's prompts in the data.

        Args:
            step: counts from 0.
            attempt: 0 for the step's own prompts; 1, 2, … for refills (of groups without signal),
                drawn without repetition from the prompts that the step's earlier attempts left,
                whichever step of the epoch they belong to.

        Returns:
            `prompts_per_step` indices; fewer, at last none, when refills have used up the data.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        first = within * self.prompts_per_step
        own = order[first : first + self.prompts_per_step]
        if attempt == 0:
            return [int(i) for i in own]
        rest = np.delete(order, slice(first, first + self.prompts_per_step))
        rest = rest[permutation(len(rest), self.seed, 1, step)]
        first = (attempt - 1) * self.prompts_per_step
        return [int(i) for i in rest[first : first + self.prompts_per_step]]

    def passed(self, step: int) -> list[int]:
        epoch, within = divmod(step, self.steps_per_epoch)
        return [int(i) for i in self._order(epoch)[: within * self.prompts_per_step]]

    def following(self, step: int) -> list[int]:
        epoch, within = divmod(step, self.steps_per_epoch)
        places = slice(within * self.prompts_per_step, self.steps_per_epoch * self.prompts_per_step)
        return [int(i) for i in self._order(epoch)[places]]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.num_prompts, dtype=np.int64)
        return permutation(self.num_prompts, self.seed, 0, epoch)


@dataclass(frozen=True, kw_only=True)
class MixedStream:
    """Several sources mixed by weight, each with its own shuffled epochs.

    The shares hold over steps, not within each one: after any number of steps a source has given
    its share of the items, rounded. If an epoch of a source ends within a step, a prompt may occur
    twice in that step.

    Args:
        sizes: number of items of each source; indices count through all sources in order.
        weights: positive weight of each source; only their ratios count.

    Raises:
        ValueError: no source, a weight that is not positive, or a source of fewer items than one
            step draws from it.
    """

    seed: int
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    prompts_per_step: int

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.weights):
            raise ValueError(f"{len(self.sizes)} sources with {len(self.weights)} weights")
        if not all(math.isfinite(w) and w > 0 for w in self.weights):
            raise ValueError(f"weights={self.weights}: each must be positive and finite")
        for number, (size, weight) in enumerate(zip(self.sizes, self.weights, strict=True)):
            most = math.ceil(self.prompts_per_step * weight / math.fsum(self.weights)) + 1
            if size < min(most, self.prompts_per_step):
                raise ValueError(
                    f"source {number} has {size} items, and a step draws up to {most} of them: "
                    "lower its weight or data.prompts_per_step"
                )

    def indices(self, step: int, attempt: int = 0) -> list[int]:
        """Indices of a step's items, source by source; `attempt`: see `PromptStream.indices`.

        A refill's items are shuffled, so that its first ones, too, come from all sources.
        """
        before = seats(self.weights, step * self.prompts_per_step)
        after = seats(self.weights, (step + 1) * self.prompts_per_step)
        drawn: list[int] = []
        offset = 0
        for source, size in enumerate(self.sizes):
            places = range(before[source], after[source])
            own = self._items(source, places)
            if attempt > 0:
                rest = np.setdiff1d(np.arange(size, dtype=np.int64), own)
                rest = rest[permutation(len(rest), self.seed, 3, source, step)]
                own = rest[(attempt - 1) * len(places) : attempt * len(places)].tolist()
            drawn += [offset + item for item in own]
            offset += size
        if attempt > 0:
            drawn = [drawn[i] for i in permutation(len(drawn), self.seed, 4, step, attempt)]
        return drawn

    def passed(self, step: int) -> list[int]:
        return [item for own, at in self._passes(step) for item in own[:at].tolist()]

    def following(self, step: int) -> list[int]:
        return [item for own, at in self._passes(step) for item in own[at:].tolist()]

    def _passes(self, step: int) -> Iterator[tuple[NDArray[np.int64], int]]:
        """Yield the pass over each source that a step is in, and its number of items before it."""
        offset = 0
        for source, place in enumerate(seats(self.weights, step * self.prompts_per_step)):
            size = self.sizes[source]
            epoch, at = divmod(place, size)
            yield permutation(size, self.seed, 2, source, epoch) + offset, at
            offset += size

    def _items(self, source: int, places: range) -> list[int]:
        """Items at these places of a source's endless sequence of shuffled epochs."""
        size = self.sizes[source]
        items: list[int] = []
        for epoch in range(places.start // size, -(-places.stop // size)):
            order = permutation(size, self.seed, 2, source, epoch)
            first = epoch * size
            items += order[max(places.start - first, 0) : places.stop - first].tolist()
        return items


def seats(weights: Sequence[float], total: int) -> list[int]:
    """Share `total` seats by weight, so that no share shrinks when `total` grows.

    Webster's method, a divisor method (Balinski & Young 1982, "Fair Representation"): the seats go
    one by one to the largest w / (2 c + 1), where c are its seats so far; ties go to the earlier.
    All but the last few are counted at once: after the seats with w / (2 c + 1) >= 1 / (2 x) each
    has floor(w x + 1/2). The arithmetic is exact, since rounding could take a seat away again.
    """
    exact = [Fraction(weight) for weight in weights]
    whole = sum(exact)
    shares = [weight / whole for weight in exact]
    x = max(Fraction(0), Fraction(total) - Fraction(len(shares) + 1, 2))
    counts = [math.floor(share * x + Fraction(1, 2)) for share in shares]
    while sum(counts) < total:
        priorities = [share / (2 * c + 1) for share, c in zip(shares, counts, strict=True)]
        counts[priorities.index(max(priorities))] += 1
    assert sum(counts) == total, (weights, total, counts)
    return counts


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """Permutation of `range(count)` that depends only on the key's integers: int64 `[count]`."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _mix(state ^ np.uint64(part % 2**64))
    return np.argsort(_mix(np.arange(count, dtype=np.uint64) ^ state), kind="stable")


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix by splitmix64 (Steele et al. 2014, 'Fast splittable pseudorandom number generators')."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class DataSet(Protocol):
    """Prompts, conversations or preference pairs, known to every rank in the same order."""

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int], first_id: int) -> Batch:
        """Make rows of some items; `prompt_ids` count from `first_id`, item by item.

        The columns are the same for any number of items, even for none.
        """

    def texts(self) -> list[str]:
        """Texts of the prompts."""


class StepRows:
    """Rows of each step: every rank knows all items, `batch` gives those whose home is here."""

    def __init__(self, world: World, data: DataSet, stream: Stream) -> None:
        self.world, self.data, self.stream = world, data, stream

    def batch(self, step: int, *, attempt: int = 0, count: int | None = None) -> Batch:
        """Home rows of a step's items, or of its refill `attempt`, at most `count` items.

        `prompt_ids` number the step's items, and continue in its refills.
        """
        indices = self.stream.indices(step, attempt)[:count]
        first = attempt * self.stream.prompts_per_step
        return home_rows(self.world, self.data, indices, first_id=first)


def home_rows(
    world: World, data: DataSet, indices: Sequence[int] | None = None, *, first_id: int = 0
) -> Batch:
    """This rank's contiguous share of the items at `indices` (None: of all items), as rows of
    `DataSet.rows`.
    """
    chosen = range(len(data)) if indices is None else indices
    low = len(chosen) * world.rank // world.size
    high = len(chosen) * (world.rank + 1) // world.size
    return data.rows(chosen[low:high], first_id + low)
