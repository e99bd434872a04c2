"""Ranks as threads of one process: turns, the data that collectives move, and where ranks part."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from functools import cached_property

import pytest
import torch
import torch.distributed as dist

import spmdrl.rehearsal.turns as turns_module
from spmdrl.rehearsal.groups import join_world, threads_as_ranks
from spmdrl.rehearsal.meetings import Meetings
from spmdrl.rehearsal.turns import Turns


def rehearse(size: int, function: Callable[[int], object], **options: float) -> Meetings:
    """Run `function(rank)` on all ranks of a world; raises the first rank's error."""
    turns = Turns(size, size, **options)
    meetings, store = Meetings(turns), dist.HashStore()

    def run(rank: int) -> None:
        join_world(meetings, store, rank)
        function(rank)

    with threads_as_ranks():
        turns.run(run)
    for outcome in turns.outcomes:
        if outcome.error is not None:
            raise outcome.error
    return meetings


def test_collectives_move_what_gloo_moves() -> None:
    size, seen = 4, {}

    def run(rank: int) -> None:
        own = torch.tensor([float(rank), 1.0])
        total = own.clone()
        dist.all_reduce(total)
        most = own.clone()
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        first = torch.full((2,), float(rank))
        dist.broadcast(first, src=2)
        parts = [torch.empty(2) for _ in range(size)]
        dist.all_gather(parts, own)
        whole = torch.empty(2 * size)
        dist.all_gather_single(whole, own)
        share = torch.empty(2)
        dist.reduce_scatter_single(share, torch.arange(8.0) * (rank + 1))
        piece = torch.empty(2)
        dist.reduce_scatter(piece, list((torch.arange(8.0) + rank).chunk(size)))
        # rank r sends j rows of its number to rank j
        rows = torch.full((6,), rank)
        got = torch.empty(size * rank, dtype=torch.int64)
        dist.all_to_all_single(got, rows, [rank] * size, list(range(size)))
        objects = [None] * size
        dist.all_gather_object(objects, {"rank": rank, "text": "x" * rank})
        box = [f"of {rank}"]
        dist.broadcast_object_list(box, src=1)
        at_first = [None] * size if rank == 0 else None
        dist.gather_object(rank * rank, at_first, dst=0)
        dist.barrier()
        seen[rank] = (total, most, first, parts, whole, share, piece, got, objects, box, at_first)

    meetings = rehearse(size, run)
    assert meetings.findings() == []
    assert len(seen) == size
    for rank, found in seen.items():
        total, most, first, parts, whole, share, piece, got, objects, box, at_first = found
        assert total.tolist() == [6.0, 4.0]
        assert most.tolist() == [3.0, 1.0]
        assert first.tolist() == [2.0, 2.0]
        assert [part.tolist() for part in parts] == [[float(r), 1.0] for r in range(size)]
        assert whole.tolist() == torch.cat(parts).tolist()
        assert share.tolist() == [20.0 * rank, 20.0 * rank + 10]
        assert piece.tolist() == [8.0 * rank + 6, 8.0 * rank + 10]
        assert got.tolist() == [r for r in range(size) for _ in range(rank)]
        assert objects == [{"rank": r, "text": "x" * r} for r in range(size)]
        assert box == ["of 1"]
        assert at_first == ([0, 1, 4, 9] if rank == 0 else None)


def test_messages_arrive_by_tag_and_in_order() -> None:
    got = {}

    def run(rank: int) -> None:
        values = [torch.tensor([float(i)]) for i in range(3)]
        if rank == 0:
            ops = [dist.P2POp(dist.isend, value, 1, tag=i % 2) for i, value in enumerate(values)]
        else:
            received = [torch.empty(1) for _ in range(3)]
            got[rank] = received
            tags = (1, 0, 0)
            ops = [
                dist.P2POp(dist.irecv, t, 0, tag=tag) for t, tag in zip(received, tags, strict=True)
            ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    meetings = rehearse(2, run)
    assert [value.item() for value in got[1]] == [1.0, 0.0, 2.0]
    assert (meetings.num_messages, meetings.findings()) == (3, [])


def test_every_rank_has_generators_and_variables_of_its_own() -> None:
    drawn, named = {}, {}

    def run(rank: int) -> None:
        random.seed(5)
        torch.manual_seed(5)
        numbers = []
        for _ in range(3):
            numbers += [random.random(), torch.rand(1).item()]
            dist.barrier()
            named.setdefault(rank, set()).add((os.environ["RANK"], os.environ["WORLD_SIZE"]))
        drawn[rank] = numbers

    before, state = os.environ.get("RANK"), torch.get_rng_state()
    rehearse(3, run)
    assert drawn[0] == drawn[1] == drawn[2]
    assert named == {rank: {(str(rank), "3")} for rank in range(3)}
    assert os.environ.get("RANK") == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rank_that_polls_lets_the_others_work() -> None:
    order = []

    def run(rank: int) -> None:
        done = threading.Event()
        if rank == 0:
            while "late" not in order:
                time.sleep(0.05)
            # a thread of the rank's own, which takes no turns
            threading.Timer(0.05, done.set).start()
            while not done.is_set():
                time.sleep(0.01)
        dist.barrier()
        order.append("late" if rank == 1 else "end")

    def polls(rank: int) -> None:
        if rank == 1:
            order.append("late")
        run(rank)

    assert rehearse(2, polls).findings() == []
    assert order[0] == "late"
    sleep = time.sleep
    assert sleep is time.sleep
    assert rehearse(1, run).findings() == []


class Holder:
    def __init__(self, rank: int) -> None:
        self.rank = rank

    @cached_property
    def total(self) -> float:
        value = torch.tensor(float(self.rank))
        dist.all_reduce(value)
        return value.item()


def test_cached_properties_of_ranks_do_not_wait_for_each_other() -> None:
    found = {}

    def run(rank: int) -> None:
        found[rank] = Holder(rank).total

    rehearse(3, run)
    assert found == {0: 3.0, 1: 3.0, 2: 3.0}
    assert isinstance(Holder.total, cached_property)


def test_a_rank_that_waits_outside_torch_is_named(monkeypatch) -> None:
    monkeypatch.setattr(turns_module, "STILL_S", 0.3)
    never, before, ran = threading.Event(), set(threading.enumerate()), []
    try:
        with pytest.raises(TimeoutError, match=r"rank 0 has reached no collective.*test_rehearsal"):
            rehearse(3, lambda rank: never.wait() if rank == 0 else ran.append(rank))
    finally:
        never.set()
    # what rank 0 waited for has come too late: no rank joins the process's own world
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert not ran
    assert not dist.is_initialized()
    assert "RANK" not in os.environ


def test_polling_in_vain_ends() -> None:
    def run(rank: int) -> None:
        while rank == 0:
            time.sleep(0.01)
        dist.barrier()

    [finding] = rehearse(2, run, quiet_s=0.2).findings()
    assert [(side.ranks, side.text) for side in finding.sides] == [
        ((1,), "barrier"),
        ((0,), "polls"),
    ]


def missing(rank: int) -> None:
    if rank != 2:
        dist.barrier()


def other_shape(rank: int) -> None:
    dist.all_reduce(torch.ones(1 if rank < 2 else 2))


def other_splits(rank: int) -> None:
    got = torch.empty(3 if rank else 4)
    dist.all_to_all_single(got, torch.ones(3), [2 if not rank else 1, 1, 1], [1, 1, 1])


def other_root(rank: int) -> None:
    dist.broadcast(torch.ones(1), src=rank // 2)


def no_receiver(rank: int) -> None:
    if rank == 0:
        dist.send(torch.ones(5), dst=1)


def other_groups(rank: int) -> None:
    dist.new_group([0, 1] if rank else [0, 2])


@pytest.mark.parametrize(
    ("function", "sides"),
    [
        (missing, [((0, 1), "barrier"), ((2,), "ended without it")]),
        (
            other_shape,
            [
                ((0, 1), "all_reduce(sum) of float32 [1]"),
                ((2,), "all_reduce(sum) of float32 [2]"),
            ],
        ),
        (other_splits, [((0, 1, 2), "all_to_all_single of float32 [*]")]),
        (
            other_root,
            [
                ((0, 1), "broadcast from member 0 of float32 [1]"),
                ((2,), "broadcast from member 1 of float32 [1]"),
            ],
        ),
        (no_receiver, [((0,), "message from rank 0 to rank 1 (tag 0) of 5 x float32")]),
    ],
)
def test_what_differs_is_found(function, sides) -> None:
    [finding] = rehearse(3, function).findings()
    assert [(side.ranks, side.text) for side in finding.sides] == sides
    assert all(side.stack[0][2] == function.__name__ for side in finding.sides if side.stack)


def test_groups_are_the_same_on_all_ranks() -> None:
    with pytest.raises(ValueError, match=r"process group number 1 has ranks \[0, 2\].*\[0, 1\]"):
        rehearse(3, other_groups)


def test_equal_calls_from_different_lines_are_noted_or_refused() -> None:
    def run(rank: int) -> None:
        if rank == 0:
            dist.barrier()
        else:
            dist.barrier()

    [finding] = rehearse(2, run).findings()
    assert [side.text for side in finding.sides] == ["barrier", "barrier"]
    turns = Turns(2, 2)
    meetings, store = Meetings(turns, lambda stack: ()), dist.HashStore()
    with threads_as_ranks():
        turns.run(lambda rank: (join_world(meetings, store, rank), run(rank)))
    assert meetings.findings() == []
    [note] = meetings.notes.values()
    lines = [side.stack[0][1] for side in note.sides]
    assert lines[1] == lines[0] + 2
