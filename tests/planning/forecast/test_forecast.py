"""Forecasts of steps: the calls of each flow, their times on shared and disjoint ranks."""

from __future__ import annotations

from typing import Any

import pytest

from forecast_cases import config_of, llama, machine_of
from spmdrl.config.sections import Config
from spmdrl.planning.forecast.forecast import forecast_step, full_lengths
from spmdrl.planning.forecast.rollout_work import Segment, decode_segments
from spmdrl.planning.forecast.step import Lengths, StepForecast
from spmdrl.planning.forecast.streams import squared, survival
from spmdrl.planning.from_shapes import plan_from_shapes
from spmdrl.planning.plan import RolePlan

SMALL = llama(layers=4, hidden=1024, mlp=2816, heads=16, kv_heads=8, vocab=32000)
SAME = {"ranks": "same as policy"}
JUDGED: dict[str, Any] = {"rewards": [{"role": "reward"}], "algorithm": {"kl_coef": 0.05}}
MATH: dict[str, Any] = {"rewards": [{"function": "math"}]}


def plan_of(config: Config, nodes: int = 1) -> RolePlan:
    models = dict.fromkeys(config.roles, SMALL)
    return plan_from_shapes(
        config, 8 * nodes, 8, device_type="cuda", device_bytes=80 * 10**9, models=models
    )


def forecast_of(config: Config, nodes: int = 1, lengths: Lengths | None = None) -> StepForecast:
    lengths = full_lengths(config) if lengths is None else lengths
    return forecast_step(config, plan_of(config, nodes), machine_of(nodes=nodes), lengths)


def calls_of(found: StepForecast) -> list[str]:
    return [f"{call.phase}: {call.role}.{call.call}" for call in found.calls]


FLOWS: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str]]] = {
    "sft": ("sft", {"policy": {}}, {}, ["update: policy.update"]),
    "reward_model": (
        "reward_model",
        {"reward": {"trained": True, "head": "zero"}},
        {},
        ["update: reward.update"],
    ),
    "dpo": (
        "dpo",
        {"policy": {}, "reference": SAME},
        {},
        ["logprobs: reference.logprobs", "update: policy.update"],
    ),
    "simpo": ("dpo", {"policy": {}}, {"preference": {"loss": "simpo"}}, ["update: policy.update"]),
    "grpo": (
        "grpo",
        {"policy": {}, "rollout": SAME},
        MATH,
        ["sync: rollout.sync", "rollout: rollout.generate", "update: policy.update"],
    ),
    "grpo, several optimizer steps": (
        "grpo",
        {"policy": {}, "rollout": SAME},
        MATH | {"train": {"num_minibatches": 2}},
        [
            "sync: rollout.sync",
            "rollout: rollout.generate",
            "logprobs: policy.logprobs",
            "update: policy.update",
        ],
    ),
    "distillation": (
        "grpo",
        {"policy": {}, "rollout": SAME, "teacher": SAME},
        {"algorithm": {"teacher_coef": 1.0}},
        [
            "sync: rollout.sync",
            "rollout: rollout.generate",
            "logprobs: teacher.logprobs",
            "logprobs: policy.logprobs",
            "update: policy.update",
        ],
    ),
    "ppo": (
        "ppo",
        {"policy": {}, "reference": SAME, "reward": SAME, "value": SAME, "rollout": SAME},
        JUDGED,
        [
            "sync: rollout.sync",
            "rollout: rollout.generate",
            "reward: reward.score",
            "logprobs: value.values",
            "logprobs: reference.logprobs",
            "logprobs: policy.logprobs",
            "update: value.update",
            "update: policy.update",
        ],
    ),
    "online_dpo": (
        "online_dpo",
        {"policy": {}, "reference": SAME, "rollout": SAME},
        MATH,
        [
            "sync: rollout.sync",
            "rollout: rollout.generate",
            "logprobs: reference.logprobs",
            "update: policy.update",
        ],
    ),
}


@pytest.mark.parametrize("name", list(FLOWS))
def test_a_forecast_has_the_calls_that_a_flow_makes(name: str) -> None:
    flow, roles, other, expected = FLOWS[name]
    found = forecast_of(config_of(flow, roles, **other))
    assert calls_of(found) == expected
    assert all(call.timed.seconds > 0 for call in found.calls if call.call != "sync")
    assert found.seconds == pytest.approx(sum(found.phase_seconds.values()))
    # roles on the same ranks take turns
    assert found.seconds == pytest.approx(sum(call.timed.seconds for call in found.calls))
    assert max(found.idle_share.values()) == pytest.approx(0.0)
    assert found.lag_saves == 0.0


def disjoint(**other: Any) -> Config:
    roles = {"policy": {"ranks": "0-3"}, "rollout": {"ranks": "4-7"}}
    return config_of("grpo", roles, **MATH, **other)


def test_disjoint_roles_wait_for_each_other_unless_the_step_ahead_is_drawn() -> None:
    now, ahead = forecast_of(disjoint()), forecast_of(disjoint(lag=1))
    assert now.lag_saves > 0
    assert ahead.seconds == pytest.approx(now.seconds - now.lag_saves)
    assert ahead.lag_saves == 0.0
    assert "rollout" not in ahead.phase_seconds
    by_call = {call.call: call for call in now.calls}
    busy = by_call["update"].timed.seconds + by_call["sync"].timed.seconds
    assert now.idle_share[0] == pytest.approx(1 - busy / now.seconds)
    assert ahead.phase_seconds["update"] == pytest.approx(
        max(by_call["update"].timed.seconds, by_call["generate"].timed.seconds)
    )


def test_more_nodes_are_not_slower_and_more_samples_not_faster() -> None:
    def seconds(nodes: int, prompts: int) -> float:
        data = {"train": {"source": "none.jsonl"}, "prompts_per_step": prompts}
        config = config_of("grpo", {"policy": {}, "rollout": SAME}, data=data, **MATH)
        return forecast_of(config, nodes, Lengths(prompt=200, response=600, longest=1024)).seconds

    assert seconds(2, 512) < seconds(1, 512) < seconds(1, 1024)


def test_responses_that_end_early_take_less_than_full_ones() -> None:
    config = config_of("grpo", {"policy": {}, "rollout": SAME}, **MATH)
    full = full_lengths(config)
    half = Lengths(prompt=full.prompt, response=full.response / 2, longest=full.longest)
    early, late = forecast_of(config, lengths=half), forecast_of(config, lengths=full)
    assert early.phase_seconds["rollout"] < late.phase_seconds["rollout"]
    assert early.phase_seconds["update"] < late.phase_seconds["update"]


@pytest.mark.parametrize(("samples", "running"), [(64, 64), (640, 128)])
@pytest.mark.parametrize("mean", [400.0, 900.0, 1024.0])
def test_decode_steps_yield_all_tokens_but_those_that_come_with_the_prompt(
    samples: int, running: int, mean: float
) -> None:
    lengths = Lengths(prompt=100, response=mean, longest=1024)
    found: list[Segment] = list(decode_segments(samples, running, lengths))
    tokens = sum(segment.steps * segment.rows for segment in found)
    assert tokens == pytest.approx(samples * mean, rel=0.02)
    assert sum(segment.steps for segment in found) == pytest.approx(
        (samples - running) * mean / running + 1023
    )


def test_lengths_between_their_mean_and_the_longest() -> None:
    lengths = Lengths(prompt=0, response=300, longest=1200)
    step = 0.5
    places = [step * (i + 0.5) for i in range(2400)]
    assert step * sum(survival(lengths, t) for t in places) == pytest.approx(300, rel=1e-3)
    assert 2 * step * sum(t * survival(lengths, t) for t in places) == pytest.approx(
        squared(lengths), rel=1e-3
    )
    equal = Lengths(prompt=0, response=300, longest=300)
    assert squared(equal) == 300**2
