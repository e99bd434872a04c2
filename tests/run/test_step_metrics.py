"""Metrics of a step's parts: joined without loss; those of several weight syncs are told apart."""

from __future__ import annotations

import pytest

from spmdrl.run.step_report import joined, sync_metrics


def test_one_sync_has_plain_names_and_several_have_their_roles() -> None:
    moved = {"sync/gb": 1.0, "sync/canary_gap": 0.1}
    assert sync_metrics({"rollout": moved}) == moved
    assert sync_metrics({"rollout": moved, "judge": {"sync/gb": 2.0}}) == {
        "sync/rollout/gb": 1.0,
        "sync/rollout/canary_gap": 0.1,
        "sync/judge/gb": 2.0,
    }
    assert sync_metrics({}) == {}


def test_a_metric_of_two_parts_is_refused() -> None:
    assert joined({"a": 1.0}, {"b": 2.0}) == {"a": 1.0, "b": 2.0}
    with pytest.raises(ValueError, match=r"metrics called \['a'\] come from two parts"):
        joined({"a": 1.0}, {"a": 2.0})
