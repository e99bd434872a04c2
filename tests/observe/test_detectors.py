"""Each detector fires on metrics that have its fault, and none on those of a run that learns."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from spmdrl.observe.detectors import DETECTORS, Detecting, detect, replay

PAGE = Path(__file__).parents[2] / "docs" / "detectors.md"


def healthy(step: int) -> dict[str, float]:
    """A record of a run that learns: rewards and lengths rise, the entropy falls a little."""
    wave = math.sin(3 * step)
    return {
        "reward": 0.1 + 0.02 * step + 0.02 * wave,
        "reward_std": 0.3 + 0.02 * wave,
        "samples": 64.0,
        "groups": 8.0,
        "groups_with_signal": 5.0 + round(wave),
        "kl": 1e-4 * (1 + 0.5 * wave),
        "ref_kl": 1e-3 * (step + 1),
        "entropy": 1.2 - 0.02 * step,
        "response_length": 100.0 + 5 * step,
        "cut_fraction": 0.3 + 0.05 * wave,
        "rollout_gap": 0.01 + 0.002 * wave,
        "ratio": 1.0 + 0.01 * wave,
        "value/explained_variance": 0.02 * step,
        "clip_fraction": 0.05,
        "duplicate_fraction": 0.1,
        "reward_failed": 0.0,
        "sample_lag": 0.0,
        "lr": 1e-5,
        "skipped": 0.0,
        "seconds/step": 10.0 + wave + 60.0 * (step == 0),
        "seconds/evaluation": 30.0 * (step == 0),
    }


def run(**changed: Any) -> list[dict[str, float]]:
    """Twelve records; a changed metric is a value, or a function of the step."""
    records = []
    for step in range(12):
        given = {n.replace("__", "/"): v(step) if callable(v) else v for n, v in changed.items()}
        records.append({**healthy(step), **given})
    return records


def after(step: int, late: float, early: float) -> Any:
    return lambda n: late if n >= step else early


FAULTS: dict[str, dict[str, Any]] = {
    "flat_reward": {"reward_std": after(9, 0.0, 0.3), "reward": 0.0},
    "kl_explosion": {"ref_kl": after(11, 5.0, 0.01)},
    "entropy_collapse": {"entropy": after(9, 0.01, 1.2)},
    "length_explosion": {"response_length": after(9, 600.0, 100.0), "reward": 0.1},
    "cut_responses": {"cut_fraction": after(9, 0.9, 0.3)},
    "rollout_gap": {"rollout_gap": after(9, 0.2, 0.01)},
    "ratio_drift": {"ratio": after(9, 1.6, 1.0)},
    "idle_value": {"value__explained_variance": -0.1},
    "clipped_tokens": {"clip_fraction": after(9, 0.7, 0.05)},
    "duplicate_responses": {"duplicate_fraction": after(9, 0.8, 0.1), "reward": 0.1},
    "failing_rewards": {"reward_failed": after(9, 0.4, 0.0)},
    "stale_samples": {"sample_lag": lambda step: float(max(0, step - 7))},
    "zero_rate": {"lr": after(9, 0.0, 1e-5)},
    "no_gradient": {"skipped": after(9, 1.0, 0.0)},
    "slow_step": {"seconds__step": after(11, 150.0, 10.0)},
}


def test_every_detector_has_a_fault_and_a_place_on_the_page() -> None:
    names = [detector.name for detector in DETECTORS]
    assert sorted(FAULTS) == sorted(names)
    headings = re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [heading.replace(" ", "_") for heading in headings] == names


@pytest.mark.parametrize("name", FAULTS)
def test_a_detector_fires_on_its_fault_alone(name: str) -> None:
    records = run(**FAULTS[name])
    [finding] = detect(records)
    assert finding.name == name
    assert f"docs/detectors.md#{name.replace('_', '-')}" in finding.text
    # the fault is new: some steps earlier nothing was said
    assert all(found.name != name for found in detect(records[:9])) or name == "idle_value"


def test_nothing_is_said_of_a_run_that_learns() -> None:
    records = run()
    assert [found for n in range(len(records) + 1) for found in detect(records[:n])] == []


def test_a_policy_that_repeats_what_is_right_is_let_alone() -> None:
    assert detect(run(duplicate_fraction=after(9, 0.8, 0.1))) == []


def test_flat_rewards_are_found_at_the_third_step() -> None:
    records = [{"reward": 0.0, "reward_std": 0.0, "samples": 8.0, "groups": 2.0}] * 3
    assert detect(records[:2]) == []
    assert [found.name for found in detect(records)] == ["flat_reward"]
    grouped = [{"reward_std": 0.4, "samples": 8.0, "groups": 2.0, "groups_with_signal": 0.0}] * 3
    assert [found.name for found in detect(grouped)] == ["flat_reward"]
    # a flow that samples one response of a prompt has no groups
    single = [{"reward_std": 0.4, "samples": 8.0, "groups": 8.0, "groups_with_signal": 0.0}] * 3
    assert detect(single) == []


def test_a_finding_is_told_when_it_is_new() -> None:
    records = run(**FAULTS["cut_responses"])
    looking = Detecting()
    told = [[found.name for found in looking.look(record)] for record in records]
    assert told == [[]] * 11 + [["cut_responses"]]
    assert looking.look(records[-1]) == []
    assert looking.look(healthy(12)) == []
    again = [looking.look(records[-1]) for _ in range(3)]
    assert [len(found) for found in again] == [0, 0, 1]
    # a run that resumes has seen what was told before
    assert Detecting(records).look(records[-1]) == []


def test_numbers_that_are_none_are_a_kl_explosion() -> None:
    records = run(kl=after(11, math.nan, 1e-4))
    assert [found.name for found in detect(records)] == ["kl_explosion"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_replay_finds_what_the_run_was_told(name: str) -> None:
    records = [{**record, "step": n + 1.0} for n, record in enumerate(run(**FAULTS[name]))]
    live = Detecting()
    told = [(int(r["step"]), found) for r in records for found in live.look(r)]
    episodes = replay(records)
    in_order = sorted(told, key=lambda item: (item[0], item[1].name))
    assert [(e.first, e.finding) for e in episodes] == in_order
    assert [e.last for e in episodes if e.finding.name == name][-1] == 12


def test_a_replay_of_a_long_run_compares_with_its_first_and_latest_steps() -> None:
    records = [{**healthy(n % 12), "step": n + 1.0, "entropy": 1.2} for n in range(1000)]
    for record in records[900:905]:
        record["entropy"] = 0.01
    found = [e for e in replay(records) if e.finding.name == "entropy_collapse"]
    assert [(e.first, e.last) for e in found] == [(903, 905)]
