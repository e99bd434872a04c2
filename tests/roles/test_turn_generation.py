"""Samples that take turns, as rows: on any layout, over a stop, and from several sources."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import run_ranks
from spmdrl.batch import Batch, from_rows
from spmdrl.config.user_objects import AgreedError
from spmdrl.roles.generation_rows import Generation, spans
from spmdrl.roles.ledger import Interrupted, Stint
from spmdrl.roles.turn_calls import heard_texts
from spmdrl.rollout.protocol import Ending, Finish, SamplingParams
from spmdrl.world import World
from tiny_model import make_tiny_model
from turn_sources import KEY, OTHER, prompts_of, rollout_of

SAMPLING = SamplingParams(max_tokens=6, margins=True, support=True, top_k=20)
GENERATION = Generation(seed=4, step=1, group_size=3, sampling=SAMPLING)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("turns") / "model"
    make_tiny_model(root)
    return root


def rows_of(batch: Batch) -> dict[tuple[int, int], dict[str, list[Any]]]:
    names = ("tokens", "loss_mask", "turn_rewards", "num_turns", "turn_end", "finish")
    found = {
        (int(row["prompt_ids"]), int(row["sample_index"])): {n: row[n].tolist() for n in names}
        for row in batch.split_rows()
    }
    for row, told in zip(found.values(), heard_texts(batch), strict=True):
        row["heard"] = sorted(told.items())
    return found


def generated(world: World, path: Path, tp: int = 1, held: int = 0) -> Any:
    return rows_of(rollout_of(world, path, tp, held).generate(prompts_of(world), GENERATION))


def test_rows_hold_turns_and_any_layout_gives_the_same(path: Path) -> None:
    (whole,) = run_ranks(generated, 1, path)
    assert len(whole) == 12
    turns = [row["num_turns"][0] for row in whole.values()]
    assert max(turns) == 3 and len(set(turns)) > 1
    for (number, _), row in whole.items():
        mask, start = torch.tensor(row["loss_mask"]), 3 + number % 3
        assert not mask[:start].any() and len(spans(mask)) == row["num_turns"][0]
        assert row["tokens"][0] == 6 + number * 5, "the prompt is the environment's"
        rewarded = [i for i, reward in enumerate(row["turn_rewards"]) if reward]
        assert set(rewarded) <= {end - 1 for _, end in spans(mask)}
        # the messages of an answer are at its first token
        given = [row["tokens"][first:last] for first, last in spans(~mask)[1:]]
        told = [json.loads(text)[0]["content"] for _, text in row["heard"]]
        assert told == [f"\u00fc{tuple(tokens)}" for tokens in given]
        assert [place for place, _ in row["heard"]] == [first for first, _ in spans(~mask)[1:]]
        cut = row["turn_end"][0] == Ending.TURNS
        assert row["finish"][0] == (Finish.LENGTH if cut else Finish.STOP)
    assert any(row["turn_rewards"][-1] for row in whole.values())
    for size, tp, held in ((2, 1, 0), (2, 2, 0), (1, 1, 5), (2, 2, 3)):
        parts = run_ranks(generated, size, path, tp, held)
        assert {k: v for part in parts for k, v in part.items()} == whole, (size, tp, held)


def stopped(world: World, path: Path, held: int, *, keeps: bool, state: bool) -> int:
    """Stop the call after every few engine steps; the number of stops."""
    rollout = rollout_of(world, path, held=held, keeps=keeps)
    call = rollout.generate.on(prompts_of(world), GENERATION)
    rows = call.batch
    whole = call.compute(rows, Stint())
    assert isinstance(whole, Batch)
    part, stops = None, 0
    while True:
        steps = iter(range(1000))
        done = call.compute(
            rows, Stint(should_stop=lambda steps=steps: next(steps) > 4, begun=part)
        )
        if isinstance(done, Batch):
            break
        assert isinstance(done, Interrupted)
        kept = {k: v for k, v in done.part.state.items() if state or k.startswith("turns/")}
        part, stops = replace(done.part, state=kept), stops + 1
        # a checkpoint keeps the columns that there are
        assert part.rows is not None and {"turn_waits", "turn_limit"} <= set(part.rows.rows)
    for name in (*whole.tokens, *(n for n in whole.rows if n not in ("turn_waits", "turn_limit"))):
        if name == "rollout_logprobs":  # computed in other batches
            torch.testing.assert_close(done[name], whole[name], rtol=0, atol=2e-5)
        elif name != "margins":
            assert torch.equal(done[name], whole[name]), name
    for name, ragged in whole.ragged.items():
        assert torch.equal(done.ragged[name].values, ragged.values), name
        assert torch.equal(done.ragged[name].counts, ragged.counts), name
    return stops


@pytest.mark.parametrize(
    ("held", "keeps", "state"), [(0, True, True), (3, True, True), (3, False, False)]
)
def test_a_stop_within_a_trajectory_resumes_exactly(
    path: Path, held: int, keeps: bool, state: bool
) -> None:
    (stops,) = run_ranks(resumed, 1, path, held, keeps, state)
    assert stops >= 3


def resumed(world: World, path: Path, held: int, keeps: bool, state: bool) -> int:
    return stopped(world, path, held, keeps=keeps, state=state)


def mixed(world: World, path: Path) -> Any:
    rollout = rollout_of(world, path)
    batch = rollout.generate(prompts_of(world, (KEY, "", OTHER)), GENERATION)
    return rows_of(batch), [rollout.turns[key].source.opened for key in (KEY, OTHER)]


def test_sources_of_a_mix_have_turns_of_their_own_or_none(path: Path) -> None:
    rows, opened = run_ranks(mixed, 1, path)[0]
    (whole,) = run_ranks(generated, 1, path)
    assert opened == [1, 1]
    for (number, sample), row in rows.items():
        if number % 3 == 0:
            assert row == whole[number, sample]
        elif number % 3 == 1:
            assert row["tokens"][:2] == [40, 41 + number] and row["num_turns"] == [1]
            assert row["turn_end"] == [-1] and not any(row["turn_rewards"])
            ends = row["finish"][0] == Finish.LENGTH
            assert ends == (sum(row["loss_mask"]) == SAMPLING.max_tokens and row["tokens"][-1] != 1)
        else:
            assert row["num_turns"][0] <= 2


def too_long(world: World, path: Path) -> str:
    rollout = rollout_of(world, path)
    short = replace(rollout.turns[KEY], longest=4)
    rollout.turns = {**rollout.turns, KEY: short}
    with pytest.raises(AgreedError) as raised:  # row 2's prompt is on one rank alone
        rollout.generate(prompts_of(world, count=3), GENERATION)
    return str(raised.value)


def test_a_prompt_that_is_too_long_is_refused_on_every_rank(path: Path) -> None:
    first, second = run_ranks(too_long, 2, path)
    assert first == second
    assert first.startswith("rank 0: data.train.max_tokens=4: the environment script:ed begins row")
    assert "row 2 of the data with a prompt of 5 tokens" in first


def scored(world: World, path: Path) -> bool:
    """Whether an engine scores a row of two parts as two rows."""
    rollout = rollout_of(world, path)
    parts = [[9, 8, 7, 30], [20, 21, 22], [5, 6, 31]]
    found = []
    for rows, starts in (([parts[0] + parts[1], parts[2]], [4]), (parts, [])):
        batch = from_rows(rows, rows={"prompt_ids": torch.arange(len(rows))})
        begins = torch.zeros(batch.num_tokens, dtype=torch.bool)
        begins[starts] = True
        batch = batch.with_columns(
            tokens={"part_start": begins}, rows={"sample_index": torch.zeros(len(rows)).long()}
        )
        found.append(rollout.logprobs(batch)["engine_logprobs"])
    assert (found[1] == 0).tolist() == [True, *[False] * 3, True, *[False] * 2, True, *[False] * 2]
    return bool(torch.equal(found[0], found[1]))


def test_an_engine_scores_parts_apart(path: Path) -> None:
    assert run_ranks(scored, 1, path) == [True]
