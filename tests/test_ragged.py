"""Ragged columns: through selections, journals and the row exchange."""

from __future__ import annotations

import pytest
import torch

from harness import run_ranks
from spmdrl.batch import Batch, Ragged, concat, from_rows
from spmdrl.checkpoint.journal import pack_journal, unpack_journal
from spmdrl.distributed.exchange import (
    Column,
    bring_home,
    gather_rows,
    send_to_role,
)
from spmdrl.distributed.exchange_plan import plan_exchange
from spmdrl.roles.kept import Journal, Kept, Record, origin_of
from spmdrl.world import World


def column(*tokens: list[int]) -> Ragged:
    flat = [value for values in tokens for value in values]
    return Ragged(
        counts=torch.tensor([len(values) for values in tokens], dtype=torch.int32),
        values=torch.tensor(flat, dtype=torch.int32),
    )


def lists(ragged: Ragged) -> list[list[int]]:
    return [part.tolist() for part in torch.split(ragged.values, ragged.counts.tolist())]


def batch_of() -> Batch:
    ids = column([1], [2, 3], [], [4, 5, 6], [], [7])
    return from_rows([[10, 11], [12], [13, 14, 15]]).with_columns(ragged={"ids": ids})


def test_rows_take_their_values_along() -> None:
    batch = batch_of()
    assert "ids" in batch and batch.columns() == ["ids", "tokens"]
    picked = batch.select([2, 0, 2])
    last = [[4, 5, 6], [], [7]]
    assert lists(picked.ragged["ids"]) == [*last, [1], [2, 3], *last]
    assert lists(concat([picked, batch]).ragged["ids"])[:3] == last
    assert lists((batch.keep(["tokens"]) | batch.keep(["ids"])).ragged["ids"])[0] == [1]
    assert not batch.keep(["tokens"]).ragged
    assert [lists(row.ragged["ids"]) for row in batch.split_rows()][1] == [[]]
    assert lists(batch.select([]).ragged["ids"]) == []
    assert batch.ragged["ids"].padded(-1).tolist()[1] == [2, 3, -1]


def test_columns_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'ids' has the shape \(1,\), but the batch has 2 tokens"):
        from_rows([[1, 2]]).with_columns(ragged={"ids": column([3])})
    with pytest.raises(ValueError, match=r"values \(1,\), but its counts make 2"):
        Ragged(counts=torch.tensor([2], dtype=torch.int32), values=torch.tensor([1]))


def test_a_journal_keeps_them() -> None:
    call = Kept(
        name="rollout.generate",
        step=1,
        origin=origin_of({}, batch_of(), ["ids"]),
        writes=False,
        record=Record(rows=batch_of()),
    )
    [kept] = unpack_journal(pack_journal(Journal(calls=(call,)))).calls
    assert kept.record is not None and (found := kept.record.rows) is not None
    assert lists(found.ragged["ids"]) == lists(batch_of().ragged["ids"])


def test_what_they_hold_is_part_of_a_calls_origin() -> None:
    batch = batch_of()
    here = origin_of({}, batch, ["ids"])
    for changed in (
        column([1], [2, 3], [], [4, 5, 8], [], [7]),
        column([1], [2], [3], [4, 5, 6], [], [7]),
    ):
        assert origin_of({}, batch.with_columns(ragged={"ids": changed}), ["ids"]) != here
    assert origin_of({}, batch.select([0, 1, 2]), ["ids"]) == here


def there_and_back(world: World) -> list[list[int]]:
    batch = batch_of() if world.rank == 0 else batch_of().select([])
    count = len(batch)
    table = gather_rows(batch.lengths, torch.arange(count) + 10 * world.rank, torch.arange(count))
    plan = plan_exchange(table, [[0], [1]])
    here = send_to_role(plan, batch, ["tokens", "ids"])
    assert here is not None and len(here) > 0
    doubled = Ragged(counts=here.ragged["ids"].counts, values=here.ragged["ids"].values * 2)
    result = Batch(lengths=here.lengths, ragged={"ids": doubled})
    returns = [Column(name="ids", kind="ragged", dtype=torch.int32)]
    return lists(bring_home(plan, result, returns, count).ragged["ids"])


def test_they_travel_with_the_rows() -> None:
    home, other = run_ranks(there_and_back, 2)
    assert home == [[2], [4, 6], [], [8, 10, 12], [], [14]] and other == []
