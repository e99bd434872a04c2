"""Faults that are planted in a backend are caught by the clause that is about them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from contract_candidates import TORCH, report_of
from faulty_backends import (
    ForgetsAMicrobatch,
    GroupsTheWorld,
    KeepsItsPart,
    NormalisesPerRank,
    ShiftsSlices,
    make_faulty,
)

from spmdrl.testing.clause import ContractError
from spmdrl.testing.subject import Layout

pytestmark = pytest.mark.contract

REPLICAS, SHARDS = Layout(degrees={"dp_replicate": 2}), Layout(degrees={"dp_shard": 2})

FAULTS = [
    (NormalisesPerRank, "global normaliser", REPLICAS, "the metric 'loss'"),
    (ForgetsAMicrobatch, "gradient sums", REPLICAS, "in 3 microbatches"),
    (KeepsItsPart, "parts that leave", REPLICAS, "bytes of its parts in other tensors"),
    (ShiftsSlices, "layout", SHARDS, "as planned"),
    (GroupsTheWorld, "no group of the whole world", REPLICAS, "new groups of all ranks"),
]


@pytest.mark.parametrize(("fault", "clause", "layout", "words"), FAULTS)
def test_a_fault_is_caught_and_its_clause_named(
    fault: type, clause: str, layout: Layout, words: str
) -> None:
    faulty = replace(TORCH, name=fault.__name__, make=partial(make_faulty, fault))
    report = report_of(faulty, 2, layout, only=[clause, "frozen roles"])
    assert report.broken == (clause,)
    with pytest.raises(ContractError, match="expected") as error:
        report.require()
    assert error.value.clause == clause
    text = str(error.value)
    assert text.startswith(f"{fault.__name__} on ranks 0-1: ") and repr(clause) in text
    assert words in text and "seen" in text and "rank 0: " in text
