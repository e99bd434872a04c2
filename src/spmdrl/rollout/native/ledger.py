"""`Ledger`: results of the decoding samples, written for all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmdrl.rollout.native.sample import Sample

_FIRST = 64
"""Results of a seat that there is room for at first."""

_HELD = 32
"""Steps whose results are put into their seats together."""


class Ledger:
    """Tokens that samples have drawn since they were settled, with what belongs to each.

    Results of some steps are held as they came, and then written to the seats of their samples;
    `settle` moves those of one sample into its lists, before anything reads them.

    Args:
        num_seats: most samples that decode at a time.
        experts: whether the experts of their tokens are recorded.
    """

    def __init__(self, num_seats: int, *, experts: bool = False) -> None:
        self._experts = experts
        self._seat: dict[Sample, int] = {}
        self._free = list(range(num_seats))
        # by seat and by number of results
        self._tokens: NDArray[np.int64] = np.zeros((num_seats, _FIRST), np.int64)
        self._logprobs: NDArray[np.float32] = np.zeros((num_seats, _FIRST), np.float32)
        self._margins: NDArray[np.float32] = np.zeros((num_seats, _FIRST), np.float32)
        self._rows: NDArray[np.int64] = np.zeros((num_seats, _FIRST), np.int64)
        self._counts: NDArray[np.int64] = np.zeros(num_seats, np.int64)
        self._samples: Sequence[Sample] = ()
        self._seats: NDArray[np.int64] = np.zeros(0, np.int64)
        self._most = 0
        # tokens, log-probabilities, margins and first rows, since the samples were arranged
        self._held: list[tuple[NDArray[np.generic], ...]] = []
        self._first_rows: list[int] = []

    def write(
        self,
        samples: Sequence[Sample],
        tokens: NDArray[np.int64],  # [n]
        logprobs: NDArray[np.float32],  # [n]
        margins: NDArray[np.float32],  # [n]
        first_row: int | None = None,
    ) -> None:
        """Add one result of each sample.

        Args:
            samples: the same list as before if they are the same samples.
            first_row: row of an `ExpertRecord` for the first sample; the others' follow.
        """
        if samples is not self._samples:
            self._arrange(samples)
        if not samples:
            return
        self._held.append((tokens, logprobs, margins))
        if first_row is not None:
            self._first_rows.append(first_row)
        if len(self._held) == _HELD:
            self._seat_held()

    def settle(self, sample: Sample) -> None:
        """Move a sample's results into its lists."""
        seat = self._seat.get(sample)
        if seat is None:
            return
        self._seat_held()
        count = int(self._counts[seat])
        sample.tokens += self._tokens[seat, :count].tolist()
        sample.logprobs += self._logprobs[seat, :count].tolist()
        if sample.request.sampling.margins:
            sample.margins += self._margins[seat, :count].tolist()
        if self._experts:
            sample.expert_rows += self._rows[seat, :count].tolist()
        self._counts[seat] = 0

    def _seat_held(self) -> None:
        """Write the results that are held to their seats."""
        steps = len(self._held)
        if not steps:
            return
        while self._most + steps > self._tokens.shape[1]:
            self._widen()
        seats, counts = self._seats[:, None], self._counts[self._seats]
        places = counts[:, None] + np.arange(steps)
        columns: tuple[NDArray[Any], ...] = (self._tokens, self._logprobs, self._margins)
        for column, parts in zip(columns, zip(*self._held, strict=True), strict=True):
            column[seats, places] = np.stack(parts, axis=1)
        if self._first_rows:
            ahead = np.arange(len(self._seats))[:, None]
            self._rows[seats, places] = np.array(self._first_rows) + ahead
        self._counts[self._seats] = counts + steps
        self._most += steps
        self._held, self._first_rows = [], []

    def _arrange(self, samples: Sequence[Sample]) -> None:
        """Give seats to these samples alone; those that have left are settled."""
        self._seat_held()
        here = set(samples)
        for sample in [sample for sample in self._seat if sample not in here]:
            self._free.append(self._seat.pop(sample))
        for sample in samples:
            if sample not in self._seat:
                self._seat[sample] = seat = self._free.pop()
                self._counts[seat] = 0
        self._samples = samples
        self._seats = np.array([self._seat[sample] for sample in samples], np.int64)
        self._most = int(self._counts[self._seats].max(initial=0))

    def _widen(self) -> None:
        room = ((0, 0), (0, self._tokens.shape[1]))
        self._tokens, self._rows = np.pad(self._tokens, room), np.pad(self._rows, room)
        self._logprobs = np.pad(self._logprobs, room)
        self._margins = np.pad(self._margins, room)
