"""Numbers of microbatches in a step: those of `plan` against those that packing makes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from spmdrl.batch import Batch, from_rows
from spmdrl.config.training import TrainSection
from spmdrl.distributed.exchange_plan import RowTable, plan_exchange
from spmdrl.planning.token_bounds import MicrobatchCounts, StepSizes, num_microbatches
from spmdrl.training.packing import pack
from spmdrl.training.readout import Places

GROUPS = StepSizes(items=8, item_rows=4, prompt_tokens=10, row_tokens=30, whole=False)


def counted(
    sizes: StepSizes, replicas: int, places: Places = "rows", **train: object
) -> MicrobatchCounts:
    section = TrainSection.model_validate(train)
    return num_microbatches(
        sizes, section, places, items=sizes.items, num_replicas=replicas, whole=sizes.whole
    )


def test_by_hand():
    # a group is 10 + 4 x 20 = 90 tokens: two of four on a replica in one microbatch
    assert counted(GROUPS, 2, microbatch_tokens=200).full == 2
    # 60 tokens are two rows and their prompt: eight half groups of 50 tokens, each alone
    assert counted(GROUPS, 2, microbatch_tokens=60).full == 8
    # never parted: each of the four groups by itself, though it exceeds the budget
    assert counted(replace(GROUPS, whole=True), 2, microbatch_tokens=60).full == 4
    # sixteen rows of 30 tokens, two at a time
    assert counted(GROUPS, 2, microbatch_tokens=60, share_prompts=False).full == 8
    # 29 tokens, as a row's last one predicts nothing
    assert counted(GROUPS, 2, "loss_tokens", microbatch_tokens=58, share_prompts=False).full == 8
    assert counted(GROUPS, 2, microbatch_tokens=58, share_prompts=False).full == 16
    assert counted(replace(GROUPS, items=1), 2, microbatch_tokens=200) == MicrobatchCounts(
        full=1, most=1
    )


def rows_of(sizes: StepSizes, rng: random.Random, *, full: bool) -> Batch:
    answer = sizes.row_tokens - sizes.prompt_tokens
    rows, prompts, ids = [], [], []
    for item in range(sizes.items):
        prompt = sizes.prompt_tokens if full else rng.randint(1, sizes.prompt_tokens)
        longest = answer if full or rng.random() < 0.5 else max(1, answer // 5)
        for _ in range(sizes.item_rows):
            length = longest if full else rng.randint(max(1, longest // 2), longest)
            rows.append([7] * (prompt + length))
            prompts.append(prompt)
            ids.append(item)
    columns = {"prompt_ids": torch.tensor(ids), "prompt_lengths": torch.tensor(prompts)}
    return from_rows(rows, rows=columns)


def packed(batch: Batch, replicas: int, train: TrainSection, places: Places, *, whole: bool) -> int:
    """The microbatches of the replica that has most."""
    zeros = torch.zeros(len(batch), dtype=torch.int64)
    table = RowTable(
        home=zeros,
        cost=batch.lengths,
        atom=batch["prompt_ids"],
        order=torch.arange(len(batch)),
        minibatch=zeros,
    )
    found = []
    plan = plan_exchange(table, [(rank,) for rank in range(replicas)])
    for own in map(plan.rows_of, range(replicas)):
        rows = batch.select(own)
        microbatches = pack(
            rows,
            budget_tokens=train.microbatch_tokens,
            share_prompts=train.share_prompts,
            atom=rows["prompt_ids"] if whole else None,
            places=places,
        )
        found.append(len(microbatches))
    return max(found)


@pytest.mark.parametrize("places", ["loss_tokens", "rows"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("tries", [25, pytest.param(500, marks=pytest.mark.full)])
def test_the_count_is_met_at_full_length_and_the_bound_is_never_passed(tries, share, whole, places):
    rng = random.Random(f"{share} {whole}")
    for _ in range(tries):
        prompt = rng.randint(1, 12)
        sizes = StepSizes(
            items=rng.randint(1, 12),
            item_rows=rng.randint(1, 5),
            prompt_tokens=prompt,
            row_tokens=prompt + rng.randint(1, 12),
            whole=whole,
        )
        replicas, budget = rng.randint(1, 4), rng.randint(2, 90)
        train = TrainSection(microbatch_tokens=budget, share_prompts=share)
        found = counted(sizes, replicas, places, microbatch_tokens=budget, share_prompts=share)
        for full in (True, False, False, False):
            batch = rows_of(sizes, rng, full=full)
            count = packed(batch, replicas, train, places, whole=whole)
            assert count <= found.most, (sizes, replicas, budget, count, found)
            if full:
                assert count == found.full, (sizes, replicas, budget, count, found)
