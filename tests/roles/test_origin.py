"""What tells a role call's rows and settings from others, on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from spmdrl.batch import Batch, from_rows
from spmdrl.roles.kept import Origin, origin_of

NAMES = ("tokens", "ids", "text", "scores", "values", "mask")


def rows() -> Batch:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(50, (n,), generator=generator).tolist() for n in (3, 1, 4, 2, 5)]
    batch = from_rows(sequences, rows={"ids": torch.tensor([0, 0, 1, 1, 2])})
    return batch.with_columns(
        tokens={
            "values": torch.randn(15, generator=generator),
            "mask": torch.arange(15) % 2 == 0,
        },
        rows={"scores": torch.randn(5, generator=generator)},
        objects={"text": ["a", None, "", "\ud800", "a"]},
    )


def of_world(parts: Sequence[Batch], settings: dict[str, Any] | None = None) -> Origin:
    own = [origin_of(settings or {}, part, NAMES) for part in parts]
    return own[0].of_world(torch.tensor([o.sums for o in own], dtype=torch.float64).sum(0).tolist())


@pytest.mark.parametrize("homes", [[[0, 1], [2, 3, 4]], [[4, 0, 2], [], [3, 1]], [[3, 2, 1, 0, 4]]])
def test_an_origin_does_not_depend_on_the_ranks_of_the_rows(homes: list[list[int]]) -> None:
    batch = rows()
    moved = of_world([batch.select(home) for home in homes])
    assert moved.agrees(of_world([batch])) and of_world([batch]).agrees(moved)


def swapped(column: torch.Tensor) -> torch.Tensor:
    other = column.clone()
    other[0], other[1] = column[1], column[0]
    return other


@pytest.mark.parametrize("name", NAMES)
def test_another_value_in_any_column_is_another_origin(name: str) -> None:
    batch = rows()
    if name == "text":
        changes = [["a", "", "", "\ud800", "a"], ["a", None, "", "\ud801", "a"]]
        others = [batch.with_columns(objects={"text": texts}) for texts in changes]
    else:
        kind = "tokens" if name in batch.tokens else "rows"
        column = batch[name]
        changed = column.clone()
        changed[-1] = ~column[-1] if column.dtype == torch.bool else column[-1] * 1.01 + 1
        values = [changed, swapped(column)]
        if name == "ids":  # the first two rows have one
            values = [changed, torch.tensor([0, 1, 0, 1, 2])]
        others = [batch.with_columns(**{kind: {name: value}}) for value in values]
    for other in others:
        assert not of_world([other]).agrees(of_world([batch])), name


def test_rounding_of_floats_and_wide_columns_are_no_difference_but_settings_are() -> None:
    batch = rows()
    near = batch.with_columns(
        tokens={"values": batch["values"] * (1 + 1e-7), "wide": torch.randn(15, 2)}
    )
    assert of_world([near]).agrees(of_world([batch]))
    assert not of_world([batch], {"epochs": 2}).agrees(of_world([batch], {"epochs": 1}))
    shorter = batch.select([0, 1, 2, 3])
    assert not of_world([shorter]).agrees(of_world([batch]))
