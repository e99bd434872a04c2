"""Environments in worker processes answer the native engine's turns: the same on one rank and on
two in lockstep, by rounds, whatever happens to a worker, and after a stop.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "rollout"))

from rollout_models import make_engine, tiny_model
from toy_turns import Numbers, requests_of, rows_of, settings

from harness import run_ranks
from spmdrl.distributed.parallel import Parallel
from spmdrl.rewards.server import start_reward_server
from spmdrl.rollout.lockstep import Lockstep
from spmdrl.rollout.protocol import Completion, Ending, Finish, Request
from spmdrl.rollout.rounds import by_rounds
from spmdrl.turns.call import EnvironmentTurns, Opening
from spmdrl.world import World

Found = list[list[tuple[Any, ...]]]


def asked(openings: Sequence[Opening]) -> list[Request]:
    return requests_of(openings, samples=3, max_tokens=6, room=90)


def facts(found: list[list[Completion]]) -> Found:
    return [[(c.tokens, c.given, c.rewards, c.ending) for c in group] for group in found]


def generated(tp: Parallel, rows: list[dict[str, Any]], **values: Any) -> tuple[Found, Any]:
    """Samples of a call, and the counts of its environments."""
    engine = make_engine(*tiny_model(), tp=tp, max_running=7)
    with (
        start_reward_server() as server,
        EnvironmentTurns(server, Numbers(), settings(**values)) as source,
    ):
        openings = source.openings(rows)
        requests, entries = asked(openings), [opening.entry for opening in openings]
        with source.open(requests, entries) as turns:
            found = engine.generate(requests, seed=3, step=1, turns=turns)
    return facts(found), source.counts()


def on_ranks(world: World, rows: list[dict[str, Any]]) -> tuple[Found, Any]:
    tp = Parallel(group=dist.group.WORLD, rank=world.rank, size=world.size)
    return generated(tp, rows, workers=2)


@pytest.fixture(scope="module")
def expected() -> Found:
    found, counts = generated(Parallel(), rows_of(4))
    assert counts["done"] == 12
    return found


def test_two_ranks_in_lockstep_take_the_same_turns(expected: Found) -> None:
    rows = rows_of(5)
    rows[4] |= {"trouble": "kill", "at": 1}
    (first, counts), (second, idle) = run_ranks(on_ranks, 2, rows)
    assert first == second and first[:4] == expected
    assert all(ending is Ending.FAILED for *_, ending in first[4])
    assert all(len(rewards) == 2 for _, _, rewards, _ in first[4])
    assert counts["failed"] == 3 and counts["remade"] > 0 and not any(idle.values())


@pytest.mark.parametrize(
    ("kind", "keeps"), [("Counting", True), ("Counting", False), ("Saving", False)]
)
def test_a_stop_within_a_trajectory_resumes(kind: str, keeps: bool, expected: Found) -> None:
    """By the engine's own state and without it; objects replay, or load their state."""
    engine = make_engine(*tiny_model(), keeps_aborted=True)
    steps = iter(range(1000))
    with (
        start_reward_server() as server,
        EnvironmentTurns(server, Numbers(), settings(kind, workers=3)) as source,
    ):
        openings = source.openings(rows_of(4))
        requests, entries = asked(openings), [opening.entry for opening in openings]
        with source.open(requests, entries) as turns:
            part = engine.generate(
                requests, seed=3, step=1, turns=turns, should_stop=lambda: next(steps) > 11
            )
            states = turns.states()
        assert any(c.given and c.finish is Finish.ABORTED for group in part for c in group)
        assert bool(states) == (kind == "Saving")
        state = engine.aborted_state() if keeps else None
        begun = [replace(r, begun=tuple(g)) for r, g in zip(requests, part, strict=True)]
        with source.open(begun, entries, states) as turns:
            found = make_engine(*tiny_model()).generate(
                begun, seed=3, step=1, turns=turns, state=state
            )
        assert facts(found) == expected
        assert source.counts()["restarted"] == 0


def test_environments_answer_by_rounds(expected: Found) -> None:
    engine = make_engine(*tiny_model())
    with (
        start_reward_server() as server,
        EnvironmentTurns(server, Numbers(), settings()) as source,
    ):
        openings = source.openings(rows_of(4))
        requests, entries = asked(openings), [opening.entry for opening in openings]
        with source.open(requests, entries) as turns:
            found = by_rounds(
                lambda own, _, report: engine.generate(own, seed=3, step=1, progress=report),
                requests,
                turns,
                Lockstep(Parallel(), torch.device("cpu")),
            )
    assert facts(found) == expected
