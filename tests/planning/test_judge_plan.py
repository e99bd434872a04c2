"""Plans of judges: their questions, memory, calls and seconds, before any of them exists."""

from __future__ import annotations

from typing import Any

import pytest

from forecast_cases import config_of, llama, machine_of
from spmdrl.commands.plan_sections import plan_sections
from spmdrl.config.sections import Config
from spmdrl.models.config import ModelConfig
from spmdrl.planning.forecast.forecast import forecast_step, full_lengths
from spmdrl.planning.from_shapes import plan_from_shapes
from spmdrl.planning.plan import RolePlan
from spmdrl.planning.questions import questions_of

POLICY = llama(layers=4, hidden=1024, mlp=2816, heads=16, kv_heads=8, vocab=32000)
OTHER = llama(layers=8, hidden=1024, mlp=2816, heads=16, kv_heads=8, vocab=64000)
SAME = {"ranks": "same as policy"}
SCORES: dict[str, Any] = {"rewards": [{"role": "judge"}]}
PAIRS: dict[str, Any] = {"preference": {"judge": "judge"}}


def configured(flow: str = "grpo", judge: dict[str, Any] | None = None, **other: Any) -> Config:
    roles: dict[str, dict[str, Any]] = {"policy": {}, "rollout": SAME}
    roles |= {"reference": SAME} if flow == "online_dpo" else {}
    own = {**SAME, "model": "models/other", **(judge or {})}
    data = {"train": {"source": "data/none.jsonl", "max_tokens": 100}, "prompts_per_step": 64}
    given = {"data": {**data, "group_size": 4}, "sampling": {"max_tokens": 50}, **other}
    return config_of(flow, {**roles, "judge": own}, **given)


def planned(config: Config) -> RolePlan:
    models: dict[str, ModelConfig] = {
        name: OTHER if name == "judge" else POLICY for name in config.roles
    }
    return plan_from_shapes(
        config, 8, 8, device_type="cuda", device_bytes=80 * 10**9, models=models
    )


CASES = {"scores": configured(**SCORES), "pairs": configured("online_dpo", **PAIRS)}


@pytest.mark.parametrize("name", list(CASES))
def test_a_judge_has_an_engine_with_weights_of_its_own(name: str) -> None:
    config = CASES[name]
    plan = planned(config)
    assert list(plan.syncs) == ["rollout"], "no sync reaches it"
    parts = {part.key: part for part in plan.memory[0].plan.parts}
    weights = parts["judge", "weights"]
    assert weights.frozen and weights.rests_on == ()
    assert weights.num_bytes == sum(held.num_bytes for held in plan.layouts["judge"][0].values())
    assert parts["judge", "kv_cache"].num_bytes > 0 and parts["judge", "graphs"].droppable
    (call,) = [c for c in plan.memory[0].plan.calls if c.name == "judge.generate"]
    assert {("judge", "weights"), ("judge", "kv_cache")} <= set(call.resident)
    names = [c.name for c in plan.memory[0].plan.calls]
    assert names.index("rollout.generate") < names.index("judge.generate")
    assert names.index("judge.generate") < names.index("policy.update")
    assert plan.memory[0].working_bytes["judge.generate"] > 0


def test_little_memory_sends_a_judge_away_between_its_calls() -> None:
    """Its weights never change: they have one copy on the host, and are not dropped."""
    config = configured(**SCORES, memory_gb=3.2)
    plan = planned(config).memory[0].plan
    assert plan.residencies["judge", "weights"] == "host"
    assert plan.residencies["judge", "kv_cache"] == "drop"


def test_questions_are_counted() -> None:
    def asked(config: Config) -> tuple[int, int, int]:
        found = questions_of(config, "judge", OTHER.max_position)
        return found.scores, found.pairs, found.largest_call

    assert asked(configured(**SCORES)) == (256, 0, 256)
    drawn = {"judge": {"temperature": 1, "num_samples": 3}}
    assert asked(configured("grpo", drawn, **SCORES)) == (256, 0, 768)
    # all samples of a prompt, 6 pairs of 4, or the best and the worst; both orders
    assert asked(configured("online_dpo", **PAIRS)) == (0, 768, 768)
    math = {"rewards": [{"function": "math"}]}
    assert asked(configured("online_dpo", **PAIRS, **math)) == (0, 128, 128)
    every = {"preference": {"judge": "judge", "pairs": "all"}}
    assert asked(configured("online_dpo", **every, **math)) == (0, 768, 768)
    evaluated = {"sets": {"x": {"data": {}, "max_items": 500, "rewards": SCORES["rewards"]}}}
    assert asked(configured(**math, evaluation=evaluated)) == (0, 0, 500)


def test_a_question_has_the_bytes_of_its_template_and_the_tokens_of_its_texts() -> None:
    template = {"judge": {"template": "Rate {response} of {prompt}, which is {answer}"}}
    found = questions_of(configured("grpo", template, **SCORES), "judge", 4096)
    assert found.prompt_tokens == len(template["judge"]["template"]) + 100 + 50 + 50
    given = {"judge": {"max_prompt_tokens": 300}}
    assert questions_of(configured("grpo", given, **SCORES), "judge", 4096).prompt_tokens == 300
    assert questions_of(configured("grpo", given, **SCORES), "judge", 600).prompt_tokens == 88
    with pytest.raises(ValueError, match="max_tokens=512: the judge's model has 512 positions"):
        questions_of(configured(**SCORES), "judge", 512)


def lines_of(config: Config) -> list[str]:
    sections = plan_sections(config, planned(config), 8, 8)
    return "\n".join(section.text() for section in sections).split("\n")


def test_the_plan_names_its_questions_and_its_weights() -> None:
    lines = lines_of(configured("online_dpo", **PAIRS))
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "questions on pairs per step 768 384 pairs, each in both orders" in text
    assert "most tokens of an answer 512 roles.judge.judge.max_tokens" in text
    assert "judge: read from models/other" in text
    adapted = configured("grpo", {"adapter": {"path": "x"}}, **SCORES)
    assert planned(adapted).specs["judge"].adapter is None, "merged"


def test_answers_take_their_time() -> None:
    config = configured(**SCORES)

    def seconds(config: Config) -> dict[str, float]:
        lengths = full_lengths(config)
        found = forecast_step(config, planned(config), machine_of(nodes=1), lengths)
        calls = {f"{call.phase}: {call.role}.{call.call}": call for call in found.calls}
        assert list(calls)[:3] == [
            *("sync: rollout.sync", "rollout: rollout.generate", "reward: judge.generate"),
        ]
        return {name: call.timed.seconds for name, call in calls.items()}

    found = seconds(config)
    shorter = seconds(configured("grpo", {"judge": {"max_tokens": 128}}, **SCORES))
    # 512 tokens of a model twice as deep against 50
    assert found["reward: judge.generate"] > 5 * found["rollout: rollout.generate"]
    assert 2 < found["reward: judge.generate"] / shorter["reward: judge.generate"] < 5
