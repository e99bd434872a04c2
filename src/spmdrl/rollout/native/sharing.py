"""Rows of a decode step that hold the same pages, as the attention kernel is told of them.

The kernel is `models.kernels.cuda.cascade`, whose file says what the numbers mean. They change only
when rows begin or end: the pages that rows share are full, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spmdrl.rollout.protocol import Request


def may_share(requests: Sequence[Request], prefix: int, block_size: int, least: int) -> bool:
    """Whether rows of a call may hold the same full pages with so many keys.

    Args:
        prefix: tokens with which all prompts begin, if they are computed once.
        least: fewest keys that count.
    """
    shared = [len(request.tokens) for request in requests if len(request.samples) > 1]
    return max([prefix, *shared]) // block_size * block_size >= least


def find_sharing(
    table: NDArray[np.int32],  # [n, W]
    lengths: NDArray[np.int64],  # [n]
    prompts: NDArray[np.int64],  # [n]
    block_size: int,
) -> NDArray[np.int32]:  # [4, n]
    """Order rows by what they share, and find how much that is: see `kernels.cuda.cascade`.

    Args:
        table: each row's blocks.
        lengths: its keys.
        prompts: number of its prompt; rows of one are expected to share more than others do.
    """
    count = len(table)
    found = np.zeros((4, count), np.int32)
    if not count:
        return found
    order = np.lexsort((prompts, table[:, 0]))  # rows that share any pages share the first
    pages, full = table[order], lengths[order] // block_size
    equal = pages[1:] == pages[:-1]
    leading = np.where(equal.all(1), equal.shape[1], equal.argmin(1))
    keys = np.zeros(count + 1, np.int64)  # with the row before; none before the first and the last
    keys[1:-1] = np.minimum(leading, np.minimum(full[1:], full[:-1])) * block_size
    # a group ends where one of the two shares more with its other neighbour
    keys[1:-1] *= (keys[1:-1] >= keys[:-2]) & (keys[1:-1] >= keys[2:])
    begins = keys[:-1] == 0
    found[0], found[2] = order, keys[:-1]
    found[1] = np.maximum.accumulate(np.where(begins, np.arange(count), 0))
    found[3] = np.maximum(keys[:-1], keys[1:])
    return found


def alone(count: int) -> NDArray[np.int32]:  # [4, count]
    """Return the numbers of rows that share nothing."""
    places = np.arange(count, dtype=np.int32)
    return np.stack((places, places, 0 * places, 0 * places))
