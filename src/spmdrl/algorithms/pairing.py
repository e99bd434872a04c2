"""Pairs of a prompt's samples to compare, chosen by their rewards."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spmdrl.algorithms.advantages import group_spread
from spmdrl.batch import Batch, group_index

Pairing = Literal["best_worst", "all"]


def pair_rows(
    rewards: Tensor,  # [B]
    prompt_ids: Tensor,  # [B] int64
    usable: Tensor,  # [B] bool: rows that may be compared
    pairing: Pairing,
) -> tuple[Tensor, Tensor]:
    """The rows to compare (int64 `[R]`, ascending), and their preferences (float64 `[R]`).

    Two rows of a prompt form a pair if their preferences differ; the larger one is better.
    `best_worst`: per prompt, the row with the largest and the row with the smallest reward, the
    first of equal ones (Guo et al. 2024, arXiv 2402.04792, has two samples and so this pair).
    `all`: every row, with its reward as preference. Prompts with equal rewards only have no pair.

    Raises:
        ValueError: shapes differ, or a reward is not finite (its rows are named).
    """
    rows = usable.nonzero().flatten()
    values, ids = rewards[rows].double(), prompt_ids[rows]
    low, high = group_spread(values, ids)
    index, num_groups = group_index(ids)
    alive = (low != high)[index]
    if pairing == "all":
        return rows[alive], values[alive]
    best, worst = (
        _first(values == bound[index], index, num_groups) & alive for bound in (high, low)
    )
    chosen = best | worst
    return rows[chosen], best[chosen].double()


def distinct_responses(batch: Batch) -> Tensor:
    """Mask of rows whose response differs from those of earlier rows of their prompt: bool `[B]`.

    Of equal responses none is preferable, and a reward model's scores of them may differ by
    rounding.
    """
    seen: set[tuple[int, bytes]] = set()
    fresh = []
    parts = torch.split(batch["tokens"], batch.lengths.tolist())
    for tokens, prompt_id, start in zip(
        parts, batch["prompt_ids"].tolist(), batch["prompt_lengths"].tolist(), strict=True
    ):
        key = (prompt_id, tokens[start:].numpy().tobytes())
        fresh.append(key not in seen)
        seen.add(key)
    return torch.tensor(fresh, dtype=torch.bool)


def _first(flags: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """The first row of each group whose flag is set: bool `[R]`."""
    places = torch.arange(len(flags), device=flags.device)
    none = torch.full((num_groups,), len(flags), device=flags.device)
    first = none.scatter_reduce(0, index[flags], places[flags], "amin")
    return flags & (first[index] == places)
