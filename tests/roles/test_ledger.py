"""What a run keeps of its role calls."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from test_calls import home_rows, toy

from harness import run_ranks
from spmdrl.batch import Batch
from spmdrl.roles.calls import together
from spmdrl.roles.kept import Journal, Kept, Origin, PartialResult
from spmdrl.roles.ledger import Interrupted, Ledger, Stint, keeping
from spmdrl.supervision.pulse import Pulse
from spmdrl.supervision.stopping import StopAsked
from spmdrl.world import World


def diverge(world: World, how: str) -> None:
    a, b = toy("a", [0, 1], dp_replicate=2), toy("b", [0, 1], dp_replicate=2)
    batch = home_rows(world, 2)
    with keeping(Ledger(world, "test", Pulse())):
        for _ in range(100):  # more than are kept in the store
            together(a.add(batch), b.add(batch))
        if world.rank == 1 and how == "another call":
            together(b.add(batch))
        if world.rank == 1 and how == "another dtype":
            batch = batch.with_columns(tokens={"tokens": batch["tokens"].float()})
        if world.rank == 1 and how == "another order":
            a, b = b, a
        together(a.add(batch), b.add(batch))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("another call", "rank 1, step -1: b.add(tokens int64[])"),
        ("another dtype", "rank 1, step -1: a.add+b.add(tokens float32[]; tokens float32[])"),
        ("another order", "rank 1, step -1: b.add+a.add"),
    ],
)
def test_ranks_that_part_are_noticed_before_they_hang(how: str, words: str) -> None:
    with pytest.raises(AssertionError) as caught:
        run_ranks(diverge, 2, how, timeout_s=60)
    text = str(caught.value)
    assert "Diverged: role call 101 of the run is not the same on all ranks" in text
    assert words in text and "rank 0, step -1: a.add+b.add(tokens int64[]" in text


def positions(world: World) -> list[tuple[str, int, str]]:
    role = toy("a", [1])
    pulse, batch = Pulse(), home_rows(world, 2)
    with keeping(Ledger(world, "test", pulse)):
        seen = [(pulse.position.call, pulse.position.calls, pulse.position.stage)]
        call = role.add(batch)
        together(call, call)
        seen.append((pulse.position.call, pulse.position.calls, pulse.position.stage))
    together(call)
    assert pulse.position.calls == 1 and torch.equal(call.batch["tokens"], batch["tokens"])
    return seen


def test_calls_are_counted_within_a_ledger_alone() -> None:
    assert run_ranks(positions, 2) == [[("", 0, "between"), ("a.add+a.add", 1, "between")]] * 2


def stop_twice_beside_a_finished_call(world: World) -> tuple[int, int, list[list[bool]]]:
    """A role trains beside one that is stopped, in two starts; the third comes to the end."""
    trained, stopped = toy("a", [0]), toy("b", [0])
    batch, starts = home_rows(world, 2), 0

    def compute(rows: Batch, stint: Stint) -> Batch | Interrupted:
        nonlocal starts
        starts += 1
        if stint.should_stop():
            return Interrupted(part=PartialResult(rows=Batch(lengths=rows.lengths)))
        return Batch(lengths=rows.lengths, tokens={"b": rows["tokens"]})

    call = replace(stopped.add(batch), compute=compute)
    journal, left = Journal(), []
    for start in range(3):
        ledger = Ledger(world, f"{start}", Pulse(), lambda at=start: at < 2, journal)
        with keeping(ledger):
            if start < 2:
                with pytest.raises(StopAsked):
                    together(trained.train(batch), call)
            else:
                together(trained.train(batch), call)
        journal = ledger.journal()
        left.append(sorted(kept.record is not None for kept in journal.calls))
    return trained.number, starts, left


def test_a_finished_call_is_not_made_again_after_two_stops_beside_it() -> None:
    found = run_ranks(stop_twice_beside_a_finished_call, 1)
    assert found == [(1, 3, [[False, True], [False, True], [True, True]])]


def ask_for_objects(world: World) -> str:
    role, batch = toy("a", [0]), home_rows(world, 2).with_columns(objects={"prompt": ["a", 3]})
    with keeping(Ledger(world, "test", Pulse())), pytest.raises(ValueError) as caught:
        together(replace(role.add(batch), needs=("tokens", "prompt")))
    return str(caught.value)


def test_what_is_no_text_is_refused_with_its_place() -> None:
    [message] = run_ranks(ask_for_objects, 1)
    assert message.startswith("the Python column 'prompt' has a int in row 1: only str and None")


def finish_without_asking(world: World) -> list[str]:
    """What is said at the end of a step that has not asked for what was kept."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("spmdrl")
    logger.addHandler(handler)
    kept = Kept(name="a.add", step=0, origin=Origin(settings="", sums=()))
    ledger = Ledger(world, "test", Pulse(), journal=Journal(calls=(kept, kept)))
    for step in range(2):
        ledger.begin_step(step)
        ledger.finish_step()
    logger.removeHandler(handler)
    return told


def test_what_was_not_used_is_said_once_and_by_one_rank() -> None:
    [message], nothing = run_ranks(finish_without_asking, 2)
    assert message.endswith("is not asked for any more, and was not used: a.add") and not nothing
