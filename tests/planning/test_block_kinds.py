"""Plans of released models with each kind of block: weights, the engine's cache, a step's time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import pytest

from forecast_cases import config_of
from spmdrl.memory.parts import Part
from spmdrl.models.sharding import global_shapes
from spmdrl.models.widths import cached_values, state_values
from spmdrl.planning.forecast.forecast import forecast_step, full_lengths
from spmdrl.planning.forecast.machines import load_machine
from spmdrl.planning.from_shapes import plan_from_shapes
from spmdrl.planning.known_models import known_model
from spmdrl.planning.plan import RolePlan

RANKS = 2


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Values that an engine keeps of each token, and of each sequence."""

    token: int
    sequence: int = 0


MODELS = {
    "gpt-oss-20b": Kept(token=24 * 2 * 8 * 64),  # sinks, experts with biases
    "glm-4.5-air": Kept(token=46 * 2 * 8 * 128),  # sigmoids, shared experts, a dense layer
    "gemma-3-27b": Kept(token=62 * 2 * 16 * 128),  # windows, norms around both halves
    "moonlight": Kept(token=27 * (512 + 64)),  # latent attention
    "qwen3-next-80b-a3b": Kept(  # gated delta rule
        token=12 * 2 * 2 * 256, sequence=36 * (32 * 128 * 128 + 3 * (2 * 16 * 128 + 32 * 128))
    ),
}


def parts_of(plan: RolePlan, role: str, name: str) -> Iterator[Part]:
    for memory in plan.memory.values():
        yield from (p for p in memory.plan.parts if (p.role, p.name) == (role, name))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_planned(name: str) -> None:
    model, kept = known_model(name), MODELS[name]
    assert cached_values(model, 1) == kept.token and state_values(model, 1) == kept.sequence
    experts = {} if model.moe is None else {"ep": 2}
    config = config_of("grpo", {"policy": {"dp_shard": RANKS}, "rollout": {"tp": 2, **experts}})
    plan = plan_from_shapes(
        config,
        RANKS,
        RANKS,
        device_type="cuda",
        device_bytes=4 * 10**12,
        models=dict.fromkeys(config.roles, model),
    )
    values = sum(map(prod, global_shapes(model).values()))
    held = [part.num_bytes for part in parts_of(plan, "policy", "weights")]
    copies = [part.num_bytes for part in parts_of(plan, "rollout", "weights")]
    # norms, routers and the like are whole on every rank
    assert len(held) == RANKS and 4 * values <= sum(held) < 1.01 * 4 * values
    assert len(copies) == RANKS and 2 * values < sum(copies) < 1.02 * 2 * values
    longest = config.data.train.max_tokens + config.sampling.max_tokens
    least = 2 * (longest * cached_values(model, 2) + state_values(model, 2))
    assert all(part.num_bytes > least for part in parts_of(plan, "rollout", "kv_cache"))
    machine = load_machine("h200", num_nodes=1, devices_per_node=RANKS)
    forecast = forecast_step(config, plan, machine, full_lengths(config))
    assert 0 < forecast.seconds < float("inf")
