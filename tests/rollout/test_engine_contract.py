"""The native engine keeps the contract of engines: on one rank, without a compiler, and as tp2."""

from __future__ import annotations

import pytest
import torch
from engine_candidates import NATIVE, errors_of

from harness import run_ranks
from spmdrl.models.kernels import c_code
from spmdrl.models.kernels import cpu as panels
from spmdrl.testing.engine_contract import ENGINE_CLAUSES, check_engine
from spmdrl.world import World

pytestmark = pytest.mark.contract


def verdicts(world: World) -> dict[str, str | None]:
    """What each clause finds: None where it holds."""
    return errors_of(check_engine(NATIVE, world))


def without_compiler(world: World) -> dict[str, str | None]:
    """What a machine without one runs: torch's own operations."""
    c_code.load = lambda source, **constants: None
    panels._rows.cache_clear()
    panels._code.cache_clear()
    assert panels.rows_for(torch.zeros(1)) is None
    return verdicts(world)


@pytest.mark.parametrize(
    ("ranks", "run"),
    [(1, verdicts), pytest.param(1, without_compiler, marks=pytest.mark.full), (2, verdicts)],
    ids=["1", "no", "2"],
)
def test_the_native_engine_keeps_the_contract(ranks, run) -> None:
    for found in run_ranks(run, ranks):
        assert [error for error in found.values() if error is not None] == []
        assert len(found) == len(ENGINE_CLAUSES) - (ranks == 1)
