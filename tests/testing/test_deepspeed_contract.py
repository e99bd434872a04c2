"""The DeepSpeed backend passes the contract on two ranks, with every stage of ZeRO."""

from __future__ import annotations

import pytest
from contract_candidates import report_of

from spmdrl.testing.subject import Candidate, Layout

pytestmark = [pytest.mark.contract, pytest.mark.deepspeed, pytest.mark.full]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_passes(stage: int) -> None:
    layout = Layout(degrees={"dp_shard": 2})
    candidate = Candidate(
        name=f"deepspeed {stage}",
        train={"backend": "deepspeed", "deepspeed": {"stage": stage}},
        layouts={2: (layout,)},
        lacks=frozenset({"shared_bases"}) if stage == 3 else frozenset(),
    )
    report = report_of(candidate, 2, layout).require()
    skipped = {verdict.clause for verdict in report.verdicts if verdict.skipped is not None}
    assert skipped == ({"shared bases"} if stage == 3 else set())
