"""A tensor-parallel group generates in lockstep, and draws the tokens of one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from rollout_models import assert_same, make_engine, naive, prompts_of, request, tiny_model

from harness import run_ranks
from spmdrl.distributed.parallel import Parallel
from spmdrl.rollout.protocol import Completion, Finish, Request
from spmdrl.world import World


def load() -> list[Request]:
    prompts = prompts_of(9, 20, 33)
    settings: list[dict[str, Any]] = [{}, {"temperature": 0}, {"temperature": 0.8}]
    return [
        request(prompts[i], i, 1 + i, max_tokens=20, margins=True, **settings[i]) for i in range(3)
    ]


def _rank(world: World, name: str, stop_after: int) -> list[list[Completion]]:
    tp = Parallel(group=dist.group.WORLD, rank=world.rank, size=world.size)
    engine = make_engine(*tiny_model(name), tp, max_running=4)
    steps = 0

    def should_stop() -> bool:
        nonlocal steps
        steps += 1
        assert world.rank == 0, "only the leader of the group asks"
        return steps == stop_after

    return engine.generate(load(), seed=5, step=1, should_stop=should_stop)


# Mistral's tiny model has one key-value head, which both ranks then hold.
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_two_ranks_draw_the_tokens_of_one(name: str) -> None:
    config, source = tiny_model(name)
    first, second = run_ranks(_rank, 2, name, 0)
    for i, asked in enumerate(load()):
        for sample in asked.samples:
            want = naive(config, source, asked, sample, seed=5, step=1)
            assert_same(first[i][sample], want, f"{name}, prompt {i}, sample {sample}")
            assert first[i][sample].tokens == second[i][sample].tokens
            assert first[i][sample].finish == second[i][sample].finish


def test_the_leaders_stop_request_reaches_the_group() -> None:
    first, second = run_ranks(_rank, 2, "Qwen2", 7)
    assert [[c.finish for c in g] for g in first] == [[c.finish for c in g] for g in second]
    assert [[c.tokens for c in g] for g in first] == [[c.tokens for c in g] for g in second]
    assert any(c.finish == Finish.ABORTED for group in first for c in group)
