"""The scheduler against a cache of strings: whatever it plans, every token finds its past."""

from __future__ import annotations

import random
from typing import Any

import pytest
from plain_loop import sampled

from spmdrl.rollout.native.blocks import BlockPool
from spmdrl.rollout.native.sample import Sample, samples_of
from spmdrl.rollout.native.scheduler import Scheduler
from spmdrl.rollout.native.shared_prefix import common_prefix
from spmdrl.rollout.native.step_plan import StepPlan
from spmdrl.rollout.protocol import Finish, Request, SamplingParams

Cache = dict[tuple[int, int], tuple[int, ...]]


def groups_of(shapes: list[tuple[int, int, int]], prefix: int = 0) -> list[list[Sample]]:
    """(prompt length, samples, max tokens) of each request; prompts differ after `prefix`."""
    return [
        samples_of(
            Request(
                tokens=tuple(j if j < prefix else 1000 * (i + 1) + j for j in range(length)),
                prompt_id=i,
                samples=tuple(range(samples)),
                sampling=SamplingParams(max_tokens=max_tokens),
            ),
            i,
            seed=0,
            step=0,
        )
        for i, (length, samples, max_tokens) in enumerate(shapes)
    ]


def make(groups: list[list[Sample]], num_blocks: int, **options: Any) -> Scheduler:
    for group in groups:
        group[0].followers = group[1:]
    wanted = {"block_size": 4, "max_running": 100, "prefill_tokens": 1000}
    return Scheduler([g[0] for g in groups], BlockPool(num_blocks), **{**wanted, **options})


def compute(plan: StepPlan, cache: Cache, size: int) -> None:
    """Write every token's whole past in its slot, and check that the past is there."""
    copied = {
        (target, i): cache[source, i]
        for source, target in plan.copies
        for i in range(size)
        if (source, i) in cache
    }
    for _, target in plan.copies:
        for i in range(size):
            cache.pop((target, i), None)
    cache.update(copied)
    spans = [(s, s.cached - 1, s.cached) for s in plan.decodes]
    spans += [(c.sample, c.start, c.stop) for c in plan.chunks]
    for sample, start, stop in spans:
        for i in range(start, stop):
            cache[sample.blocks[i // size], i % size] = tuple(sample.tokens[: i + 1])
    for sample, _, stop in spans:
        for i in range(stop):
            found = cache[sample.blocks[i // size], i % size]
            assert found == tuple(sample.tokens[: i + 1])


def run(scheduler: Scheduler, draw: random.Random | None = None) -> list[StepPlan]:
    """All steps; with `draw` samples end at random, else at max_tokens."""
    cache: Cache = {}
    plans = []
    size = scheduler._block_size
    while scheduler.has_work:
        plan = scheduler.plan()
        plans.append(plan)
        compute(plan, cache, size)
        for sample in sampled(plan, scheduler)[0]:
            sample.tokens.append(10**6 + 1000 * sample.place + sample.num_generated)
            limit = sample.request.sampling.max_tokens
            if sample.num_generated == limit or (draw and draw.random() < 0.1):
                sample.finish = Finish.LENGTH
                scheduler.finish(sample)
        assert len(plans) < 5000
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    return plans


def test_a_prompt_is_computed_once_for_its_group() -> None:
    groups = groups_of([(10, 4, 5)])
    plans = run(make(groups, 50))
    assert [c.stop - c.start for p in plans for c in p.chunks] == [10]
    # the first token of all four comes with the prompt; three write in a copy of the last block
    assert [len(p.decodes) for p in plans] == [0, 4, 4, 4, 4]
    assert len(plans[1].copies) == 3 and not any(p.copies for p in plans[2:])
    assert all(s.num_generated == 5 for s in groups[0])


def test_long_prompts_are_cut_to_the_budget_beside_decodes() -> None:
    scheduler = make(groups_of([(3, 1, 8), (25, 1, 2)]), 50, prefill_tokens=8)
    plans = run(scheduler)
    chunks = [[(c.start, c.stop) for c in p.chunks] for p in plans]
    assert chunks[:5] == [[(0, 3), (0, 5)], [(5, 13)], [(13, 21)], [(21, 25)], []]
    assert [len(p.decodes) for p in plans[:5]] == [0, 1, 1, 1, 2]


def test_at_most_max_running_first_come_first_served() -> None:
    groups = groups_of([(4, 3, 4), (4, 1, 4), (4, 1, 4)])
    plans = run(make(groups, 50, max_running=2))
    assert max(len(p.decodes) + len(p.chunks) for p in plans) == 2
    started = [c.sample.index for p in plans for c in p.chunks]
    assert started == [0, 1, 2]


def test_preempted_samples_are_computed_again_and_share_the_prompt_that_is_there() -> None:
    groups = groups_of([(8, 6, 24)])
    scheduler = make(groups, 9)
    plans = run(scheduler, random.Random(0))
    again = [c for p in plans for c in p.chunks if c.stop > c.sample.prompt_length]
    assert scheduler.num_preempted == len(again) > 0
    # where another sample runs, only the prompt's last block is computed again (for its row)
    assert {c.start for c in again} == {0, 4}


def test_a_large_group_in_a_small_pool_takes_turns() -> None:
    groups = groups_of([(7, 20, 6), (9, 20, 6)])
    scheduler = make(groups, 5)
    run(scheduler)
    assert all(s.num_generated == 6 for group in groups for s in group)


def test_the_common_prefix_leaves_a_token_of_every_prompt() -> None:
    assert common_prefix([(1, 2, 3, 4), (1, 2, 5, 6), (1, 2, 3, 9)]) == 2
    assert common_prefix([(1, 2, 3), (1, 2, 3)]) == 2
    assert common_prefix([(1, 2, 3), (1, 2)]) == 1
    assert common_prefix([(1,), (1, 2)]) == 0 == common_prefix([(1, 2, 3)]) == common_prefix([])


def test_what_all_prompts_begin_with_is_computed_once() -> None:
    groups = groups_of([(12, 2, 6), (9, 1, 6), (20, 1, 6)], prefix=6)
    plans = run(make(groups, 50, prefix=6))
    chunks = [[(c.sample.index, c.start, c.stop) for c in p.chunks] for p in plans]
    assert chunks[:2] == [[(0, 0, 12)], [(1, 6, 9), (2, 6, 20)]]
    # the second block, which the prefix fills in part, is copied for both
    assert len(plans[1].copies) == 2


@pytest.mark.parametrize("seed", range(60))
def test_any_load_is_served(seed: int) -> None:
    draw = random.Random(seed)
    prefix = draw.choice((0, 3, 8))
    shapes = [
        (draw.randint(prefix + 1, 30), draw.choice((1, 1, 2, 5)), draw.randint(1, 20))
        for _ in range(8)
    ]
    size = draw.choice((1, 2, 4, 16))
    largest = max(-(-(length + new) // size) for length, _, new in shapes)
    groups = groups_of(shapes, prefix)
    scheduler = make(
        groups,
        draw.randint(largest, 3 * largest),
        block_size=size,
        max_running=draw.choice((1, 3, 100)),
        prefill_tokens=draw.choice((1, 7, 1000)),
        prefix=prefix,
    )
    plans = run(scheduler, draw)
    assert all(s.finish is Finish.LENGTH for group in groups for s in group)
    budget = scheduler._prefill_tokens
    assert all(sum(c.stop - c.start for c in p.chunks) <= budget for p in plans)
