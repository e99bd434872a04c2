"""Random numbers of one object, for games that draw from Python's and numpy's global generators."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

MAX_SEED = 1 << 31


def seed_of(row: Mapping[str, Any]) -> int:
    """Return the row's column `seed`, or else a number made of the row, below 2^31.

    Raises:
        ValueError: the column holds no whole number that is at least 0.
    """
    found = row.get("seed")
    if found is None:
        text = json.dumps(row, sort_keys=True, default=str)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) % MAX_SEED
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise ValueError(f"the row's seed is {found!r}: it must be a whole number, at least 0")
    return found % MAX_SEED


class OwnRandom:
    """State of the global generators as one game sees them: several games share a process, and
    what one draws must not depend on the others.
    """

    def __init__(self, seed: int) -> None:
        self._python = random.Random(seed).getstate()
        self._numpy = np.random.RandomState(seed).get_state()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Have the global generators in this state, and keep what they have become."""
        others = random.getstate(), np.random.get_state()
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        try:
            yield
        finally:
            self._python, self._numpy = random.getstate(), np.random.get_state()
            random.setstate(others[0])
            np.random.set_state(others[1])
