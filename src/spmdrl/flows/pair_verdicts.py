"""Pairs of samples by a judge's verdicts, for flows that compare a prompt's samples.

With rewards, these choose the pairs, and the judge says which sample of each is better. Without,
the judge compares all samples of a prompt, and those that win most are its best ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl.algorithms.direct_preference import ordered_pairs, pair_rows
from spmdrl.batch import Batch
from spmdrl.config.data_sets import is_rewarded
from spmdrl.config.sections import Config
from spmdrl.distributed.reduce import world_sum
from spmdrl.rewards.asking import PairJudge, Verdicts
from spmdrl.run.protocols import Metrics


def judged_rows(
    config: Config,
    judge: PairJudge,
    batch: Batch,
    usable: Tensor,  # [B] bool: rows that may be compared
) -> tuple[Tensor, Tensor, Metrics]:
    """Return the rows to compare (int64 `[R]`, ascending), their preferences (float64 `[R]`), and
    metrics, equal on every rank. Every rank of the world calls it.

    A preference is the number of comparisons that the row won, less those that it lost. Two rows of
    a prompt form a pair if these differ.

    Args:
        batch: rows of whole groups with the Python columns `prompt` and `response`.
    """
    settings, has_rewards = config.preference, is_rewarded(config)
    ids, pairing = batch["prompt_ids"], settings.pairs
    if has_rewards:
        rows, order = pair_rows(batch["rewards"], ids, usable, pairing)
        usable = torch.zeros(len(batch), dtype=torch.bool).index_fill(0, rows, value=True)
    else:
        rows = usable.nonzero().flatten()
        order = -torch.arange(len(rows), dtype=torch.float64)  # each pair once
    better, worse = ordered_pairs(order, ids[rows])
    first, second = rows[better], rows[worse]
    verdicts = judge.verdicts(batch, first, second)
    preferred = verdicts.preferred
    if settings.ties == "reward":
        preferred = torch.where(preferred == 0, torch.ones_like(preferred), preferred)
    wins = torch.zeros(len(batch), dtype=torch.float64)
    wins = wins.index_add(0, first, preferred).index_add(0, second, -preferred)
    # the rewards have chosen the pairs: all of them stay
    rows, order = pair_rows(wins, ids, usable, "all" if has_rewards else pairing)
    return rows, order, _metrics(verdicts, has_rewards=has_rewards)


def _metrics(verdicts: Verdicts, *, has_rewards: bool) -> Metrics:
    """Count the pairs of all ranks, and the shares of them that went wrong or otherwise."""
    counts = {
        "tie_share": verdicts.preferred == 0,
        "disagree_share": verdicts.disagrees,
        "failed_share": verdicts.failed,
        "first_bias": verdicts.first,
    }
    if has_rewards:  # the first row of a pair is the one with the larger reward
        counts["reversed_share"] = verdicts.preferred < 0
    own = [float(len(verdicts.preferred)), *[float(c.double().sum()) for c in counts.values()]]
    pairs, *sums = world_sum(torch.tensor(own, dtype=torch.float64)).tolist()
    shares = {f"judge/{n}": total / max(1.0, pairs) for n, total in zip(counts, sums, strict=True)}
    return {"judge/pairs": pairs, **shares}
