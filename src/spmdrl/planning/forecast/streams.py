"""`Stream`: the packed tokens that a replica computes when it reads a step's rows, or updates.

Lengths are means. Where only these and the longest are known, the share of responses that are
longer than t tokens is taken to be (1 - t / longest) ** k with the k that gives the mean: all equal
if the longest is the mean, and close to an exponential distribution if it is far from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from spmdrl.config.training import TrainSection
from spmdrl.planning.forecast.step import Lengths
from spmdrl.planning.token_bounds import StepSizes
from spmdrl.training.readout import Places

_FILLED = 0.9
"""Share of a microbatch's tokens that first-fit decreasing fills with rows of mixed lengths."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Packed tokens of one pass of a replica over its rows.

    Args:
        tokens: packed tokens.
        pairs: pairs of a token and one that it sees, itself included.
        places: places whose logits, or values, are read.
        microbatches: number of streams that they are packed into.
        rows: number of rows.
    """

    tokens: float
    pairs: float
    places: float
    microbatches: int
    rows: float


def squared(lengths: Lengths) -> float:
    """The mean of the responses' squared lengths, see the module."""
    mean, longest = lengths.response, max(lengths.longest, lengths.response)
    return 2 * mean**2 * longest / (longest + mean) if mean else 0.0


def survival(lengths: Lengths, tokens: float) -> float:
    """The share of responses that are longer than `tokens`, see the module."""
    mean, longest = lengths.response, max(lengths.longest, lengths.response)
    if tokens >= longest:
        return 0.0
    return float((1 - tokens / longest) ** (longest / mean - 1))


def make_stream(
    sizes: StepSizes,
    lengths: Lengths,
    train: TrainSection,
    places: Places,
    *,
    items: float,
    num_replicas: int,
    whole: bool,
) -> Stream:
    """The stream of the replica that has most of `items` items.

    Args:
        sizes: the step's; its tokens do not count.
        places: places that are read; before loss tokens, a row's last token is left out.
        whole: the rows of an item are never separated.
    """
    own_items = math.ceil(items / num_replicas)
    shares = train.share_prompts and lengths.prompt > 0 and sizes.item_rows > 1
    cut = 1.0 if places == "loss_tokens" else 0.0
    prompt, own = lengths.prompt, max(1.0, lengths.response - cut)
    square = max(own**2, squared(lengths) - (2 * lengths.response - cut) * cut)
    copies, units = _units(sizes.item_rows, prompt, own, train.microbatch_tokens, shares, whole)
    rows = own_items * sizes.item_rows
    before = prompt * (prompt + 1) / 2 * copies
    each = own * prompt + (square + own) / 2
    tokens = own_items * (copies * prompt + sizes.item_rows * own)
    return Stream(
        tokens=tokens,
        pairs=own_items * (before + sizes.item_rows * each),
        places=rows * (lengths.response if lengths.prompt else own)
        if places == "loss_tokens"
        else float(rows),
        microbatches=_microbatches(
            own_items, units, tokens, train.microbatch_tokens, lengths.longest > lengths.response
        ),
        rows=float(rows),
    )


def _units(
    rows: int, prompt: float, own: float, budget: int, shares: bool, whole: bool
) -> tuple[int, list[tuple[int, float]]]:
    """Copies of an item's prompt, and (number, tokens) of the units that it is packed as."""
    if not shares:
        return rows, [(1, rows * (prompt + own))] if whole else [(rows, prompt + own)]
    if whole or prompt + rows * own <= budget:
        return 1, [(1, prompt + rows * own)]
    room = max(1, int((budget - prompt) // own))
    full, rest = divmod(rows, room)
    units = [(full, prompt + room * own)]
    if rest:
        units.append((1, prompt + rest * own))
    return full + (rest > 0), units


def _microbatches(
    items: int, units: list[tuple[int, float]], tokens: float, budget: int, mixed: bool
) -> int:
    most = sum(number for number, _ in units) * items
    if mixed:
        return max(1, min(most, math.ceil(tokens / (_FILLED * budget))))
    return sum(math.ceil(items * number / max(1, int(budget // cost))) for number, cost in units)
