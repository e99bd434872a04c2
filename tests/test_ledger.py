"""What a run keeps of its role calls."""

from __future__ import annotations

import pytest
import torch

from harness import run_ranks
from spmdrl.calls import together
from spmdrl.launch import World
from spmdrl.ledger import Ledger, keeping
from spmdrl.runtime.pulse import Pulse
from test_calls import home_rows, toy


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
