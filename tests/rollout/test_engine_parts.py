"""Samples with parts: what a part draws follows its own context alone, on any schedule, after a
stop, on ranks in lockstep and by rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from rollout_models import make_engine, tiny_model
from test_aborted import begun
from test_engine import CACHE_BLOCK
from test_rounds import ALONE, Drawing
from test_turns import DELAYS, Nobody, Scripted, _turns_of, generate, make, requests, same

from harness import run_ranks
from spmdrl.distributed.parallel import Parallel
from spmdrl.rollout.protocol import Answer, Completion, Finish, Request, Turn
from spmdrl.rollout.rounds import by_rounds
from spmdrl.testing.engine_subject import stop_after
from spmdrl.world import World


def parted(answer: Answer) -> Answer:
    """Two of three answers begin a part."""
    return replace(answer, begins_part=bool(answer.tokens) and sum(answer.tokens) % 3 > 0)


class Parted(Scripted):
    def answers(self, wait_s: float) -> Sequence[Answer]:
        return [parted(answer) for answer in super().answers(wait_s)]


def greedy() -> list[Request]:
    """Requests without chance: alone, a turn would have random numbers of its place in a part."""
    return requests(temperature=0)


def drawn(**options: Any) -> list[list[Completion]]:
    return generate(make(**options), requests(), turns=Parted(DELAYS["late"]))


@pytest.fixture(scope="module")
def expected() -> list[list[Completion]]:
    found = drawn()
    assert sum(bool(c.parts) for group in found for c in group) > 4
    assert any(set(c.parts) < {a for a, _ in c.given} for group in found for c in group if c.parts)
    return found


def alike(found: list[list[Completion]], wanted: list[list[Completion]], what: str) -> None:
    same(found, wanted, what)
    assert [[c.parts for c in g] for g in found] == [[c.parts for c in g] for g in wanted], what


def test_a_part_follows_its_own_context() -> None:
    engine = make()
    wanted = [
        [_turns_of(engine, own, i, sample, change=parted) for sample in own.samples]
        for i, own in enumerate(greedy())
    ]
    for options, delay in (({}, "at once"), ({"kv_cache_gb": 20 * CACHE_BLOCK / 1e9}, "late")):
        found = generate(make(**options), greedy(), turns=Parted(DELAYS[delay]))
        alike(found, wanted, f"{options}, {delay}")
    alike(by_rounds(Drawing(make()), greedy(), Parted(DELAYS["late"]), ALONE), wanted, "rounds")


@pytest.mark.parametrize(
    "options",
    [{"prefill_tokens": 5, "max_running": 3}, {"kv_cache_gb": 20 * CACHE_BLOCK / 1e9}],
    ids=str,
)
def test_schedules_change_nothing(
    options: dict[str, Any], expected: list[list[Completion]]
) -> None:
    for delay in ("at once", "in disorder"):
        found = generate(make(**options), requests(), turns=Parted(DELAYS[delay]))
        alike(found, expected, f"{options}, {delay}")


def test_no_two_tokens_of_a_sample_share_their_random_numbers() -> None:
    """Parts that begin with the same context draw other tokens."""

    class Again(Scripted):
        def answers(self, wait_s: float) -> Sequence[Answer]:
            return [
                replace(a, tokens=(9, 8, 7), begins_part=True, max_tokens=6) if a.tokens else a
                for a in super().answers(wait_s)
            ]

    found = generate(make(), requests(temperature=2.0), turns=Again())
    own = [c for group in found for c in group if len(c.parts) > 1]
    turns = [
        [c.tokens[last : c.given[k + 1][0]] for k, (_, last) in enumerate(c.given[:-1])]
        for c in own
    ]
    assert own and all(len(set(parts)) == len(parts) for parts in turns if len(parts) > 1)


@pytest.mark.parametrize("keeps", [True, False], ids=["with its state", "by what was drawn"])
def test_a_stopped_call_resumes_in_its_part(keeps: bool, expected: list[list[Completion]]) -> None:
    seen = 0
    for count in (6, 11, 17, 26):
        first = make(keeps_aborted=True)
        turns = Parted(DELAYS["late"])
        part = generate(first, requests(), turns=turns, should_stop=stop_after(count))
        state = first.aborted_state() if keeps else {}
        seen += sum(c.finish is Finish.ABORTED and bool(c.parts) for g in part for c in g)
        asked = requests() if keeps else begun(requests(), part)
        found = generate(make(), asked, turns=Parted(DELAYS["late"]), state=state)
        alike(found, expected, f"stopped at {count}")
    assert seen > 3


def test_rounds_resume_in_a_part() -> None:
    wanted = by_rounds(Drawing(make()), greedy(), Parted(), ALONE)
    for count in (9, 20):
        stops = stop_after(count)
        part = by_rounds(Drawing(make(), stops), greedy(), Parted(), ALONE, should_stop=stops)
        asked = begun(greedy(), part)
        alike(by_rounds(Drawing(make()), asked, Parted(), ALONE), wanted, f"stopped at {count}")


class Restarting(Parted):
    """A sample starts again, once, in its second turn, which is in a part."""

    done = False

    def ended(self, turn: Turn) -> None:
        super().ended(turn)
        if turn.number == 1 and not self.done:
            self._open[-1] = (
                0,
                Answer(request=turn.request, sample=turn.sample, restarts=True),
            )
            self.done = True


def test_a_sample_starts_again_after_its_prompt(expected: list[list[Completion]]) -> None:
    turns = Restarting()
    alike(generate(make(), requests(), turns=turns), expected, "restarted")
    assert turns.done
    wanted = by_rounds(Drawing(make()), greedy(), Parted(), ALONE)
    alike(by_rounds(Drawing(make()), greedy(), Restarting(), ALONE), wanted, "rounds")


def on_ranks(world: World) -> list[list[Completion]]:
    tp = Parallel(group=dist.group.WORLD, rank=world.rank, size=world.size)
    engine = make_engine(*tiny_model(), tp=tp, max_running=7)
    turns = Parted(DELAYS["in disorder"]) if world.is_first else Nobody()
    return generate(engine, requests(), turns=turns)


def test_ranks_in_lockstep_begin_the_leaders_parts(expected: list[list[Completion]]) -> None:
    for found in run_ranks(on_ranks, 2):
        alike(found, expected, "tp 2")
