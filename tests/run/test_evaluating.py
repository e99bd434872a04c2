"""Evaluations: when they are due, and with which weights the engine samples."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from spmdrl.run.run import Run


class Sync:
    """Brings the policy's version to the rollout."""

    def __init__(self, policy: SimpleNamespace, rollout: SimpleNamespace) -> None:
        self.policy, self.rollout, self.count = policy, rollout, 0

    def run(self) -> None:
        self.rollout.version = self.policy.version
        self.count += 1

    def take_metrics(self) -> dict[str, float]:
        return {}


def made(every: int, *, is_first: bool = True) -> tuple[Run, Sync, list[int]]:
    """A run whose policy is 3 optimizer steps ahead of the rollout, its sync, and a list of the
    evaluations' rollout versions.
    """
    policy, rollout, versions = SimpleNamespace(version=3), SimpleNamespace(version=0), []
    sync = Sync(policy, rollout)

    def evaluate(step: int) -> dict[str, float]:
        versions.append(rollout.version)
        return {}

    run = Run(
        SimpleNamespace(
            run_dir="x",
            evaluation=SimpleNamespace(before=True, every=every, stop_after=0),
            checkpoint=SimpleNamespace(keep_best=None),
        ),
        SimpleNamespace(is_first=is_first),
        roles={"policy": policy, "rollout": rollout},
        syncs={("policy", "rollout"): sync},
        data=None,
        held_out={},
        scorer=None,
        evaluators=[SimpleNamespace(evaluate=evaluate)],
        sampling=None,
        report=SimpleNamespace(phase=lambda name: nullcontext()),
        life=None,
    )
    return run, sync, versions


def test_an_evaluation_that_is_due_syncs_if_the_flow_says_so() -> None:
    run, sync, versions = made(every=2)
    for step in range(5):
        run.evaluate(step, syncs=True)
    assert (sync.count, versions) == (3, [3, 3, 3])


@pytest.mark.parametrize("is_first", [True, False])
def test_old_weights_in_an_evaluation_are_told_once(
    is_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run, sync, versions = made(every=0, is_first=is_first)
    with caplog.at_level(logging.WARNING):
        run.evaluate(0)
    assert (sync.count, versions) == (0, [0])
    told = [r.message for r in caplog.records if "3 optimizer steps behind" in r.message]
    assert len(told) == is_first
