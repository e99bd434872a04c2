"""`Endings`: which of a step's samples may end with their newest token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spmdrl.rollout.native.sample import Sample
from spmdrl.rollout.protocol import Finish
from spmdrl.rollout.stops import StopRule


class Endings:
    """End conditions of one call's samples, looked at only where a token or a length may meet them.

    Args:
        rules: those of the requests.
        watched: tokens that may end a sample by each rule, bool [V]; `check` unmarks those
            that turn out not to.
    """

    def __init__(self, rules: Sequence[StopRule], watched: Sequence[NDArray[np.bool_]]) -> None:
        self._rules, self._watched = rules, watched
        # one row for each distinct table, which several requests may share
        distinct = {id(table): table for table in watched}
        self._tables = list(distinct.values())
        number = {key: i for i, key in enumerate(distinct)}
        self._number = [number[id(table)] for table in watched]
        self._step = 0
        self._ends: dict[int, list[Sample]] = {}  # by the step in which their turn is full
        self._samples: Sequence[Sample] = ()
        self._row: dict[Sample, int] = {}
        self._groups: list[tuple[NDArray[np.bool_], NDArray[np.int64]]] = []

    def find(self, samples: Sequence[Sample], tokens: NDArray[np.int64]) -> list[int]:
        """List the places of samples that may end with their token of this step, ascending; called
        once in every step.

        Args:
            samples: those that decode; the same list as before if they are the same samples.
        """
        if samples is not self._samples:
            self._arrange(samples)
        full = self._ends.pop(self._step, ())
        self._step += 1
        found = {self._row[sample] for sample in full if sample in self._row}
        for table, rows in self._groups:
            hits = np.flatnonzero(table[tokens[rows]])
            if len(hits):
                found.update(rows[hits].tolist())
        return sorted(found)

    def check(self, sample: Sample) -> Finish | None:
        """Return the reason if the newest token ends a sample's turn; its tokens are settled."""
        rule, token = self._rules[sample.index], sample.tokens[-1]
        finish = rule.check(sample.tokens, sample.turn_length, sample.turn_limit)
        if finish is not Finish.STOP and not rule.may_stop(token):
            self._watched[sample.index][token] = False
        return finish

    def _arrange(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            if sample not in self._row:
                limit = self._rules[sample.index].most(sample.turn_limit)
                last = self._step + limit - sample.turn_length - 1
                self._ends.setdefault(last, []).append(sample)
        self._samples, self._row = samples, {sample: i for i, sample in enumerate(samples)}
        places: dict[int, list[int]] = {}
        for i, sample in enumerate(samples):
            places.setdefault(self._number[sample.index], []).append(i)
        self._groups = [(self._tables[n], np.array(rows)) for n, rows in places.items()]
