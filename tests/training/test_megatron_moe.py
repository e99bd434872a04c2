"""Experts on Megatron with replayed choices and a balance loss: as the torch backend's."""

from __future__ import annotations

from typing import Any

import pytest
from backend_runs import compare, train
from megatron_cases import Case, case, make_backend
from test_moe_backend import CASES, COEFFICIENT, moe_config, on_ranks, recorded_rows

from harness import run_ranks
from spmdrl.world import World
from sweeps import swept

pytestmark = pytest.mark.megatron

BALANCED = {"balance_coef": COEFFICIENT}
RECOMPUTED = {**BALANCED, "recompute": "layer", "microbatch_tokens": 40}
LAYOUTS: dict[int, list[Case]] = {
    2: [
        case(dp_shard=2, ep=2, given=RECOMPUTED),
        case(tp=2, ep=2, sp=True, given=BALANCED),
        case(pp=2, given=RECOMPUTED),
        case(cp=2, given=BALANCED),
    ],
    4: [
        case(tp=2, pp=2, ep=2, sp=True, given=RECOMPUTED),
        case(tp=2, dp_shard=2, ep=4, sp=True, given=BALANCED),
        case(tp=2, cp=2, sp=True, given=BALANCED),
    ],
}


def on_megatron(world: World, cases: list[Case]) -> list[dict[str, Any]]:
    return [train(make_backend(world, moe_config(), made), recorded_rows) for made in cases]


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return run_ranks(on_ranks, 1, CASES[1])[0][0]


@pytest.mark.parametrize("size", swept(LAYOUTS, [2]))
def test_replay_balance_and_expert_metrics_equal_the_torch_backend(one, size):
    assert {"balance_loss", "replay_changed", "expert_load"} <= one["steps"][1][0].keys()
    results = run_ranks(on_megatron, size, LAYOUTS[size], timeout_s=200)
    for number, made in enumerate(LAYOUTS[size]):
        print(made)
        compare([result[number] for result in results], one, moe_config())
