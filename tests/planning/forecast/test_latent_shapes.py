"""Latent attention in forecasts: matrices, the cache, and what every pair of tokens costs."""

from __future__ import annotations

import math

import pytest

from forecast_cases import config_of
from spmdrl.models.adapters import find_targets, make_adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.degrees import heads_divide
from spmdrl.models.sharding import local_parameters
from spmdrl.models.specs import LatentAttention
from spmdrl.models.widths import cached_values
from spmdrl.planning.forecast.forecast import forecast_step, full_lengths
from spmdrl.planning.forecast.machines import load_machine
from spmdrl.planning.forecast.rollout_work import RolloutRank, Segment, decode_work
from spmdrl.planning.forecast.shapes import rank_shapes
from spmdrl.planning.from_shapes import plan_from_shapes
from spmdrl.planning.known_models import known_model


def moonlight() -> ModelConfig:
    return known_model("moonlight")


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("name", ["moonlight", "kimi-k2"])
def test_matrices_are_those_of_the_table(name: str, tp: int) -> None:
    model = known_model(name)
    local = local_parameters(model, tp)
    matrices = {
        own: math.prod(shape)
        for own, shape in local.items()
        if own.startswith("layers.") and "norm" not in own and "correction" not in own
    }
    shapes = rank_shapes(model, {"tp": tp})
    assert shapes.dense + shapes.experts == pytest.approx(sum(matrices.values()), rel=1e-12)
    first = [n for own, n in matrices.items() if own.startswith("layers.0.") and "_down." in own]
    if model.layers[0].mixer.q_rank is None:  # type: ignore[union-attr]
        first.append(matrices["layers.0.attention.q_up.weight"])
    assert shapes.first == sum(first)


def test_an_adapter_of_the_latent_projections_is_whole_on_every_rank() -> None:
    model = known_model("kimi-k2")
    names = find_targets(model, ["q_a_proj", "kv_a_proj_with_mqa"])
    adapter = make_adapter(names, rank=4, alpha=4)
    one, two = (rank_shapes(model, {"tp": tp}, adapter=adapter) for tp in (1, 2))
    assert one.held_added == two.held_added == 4 * 61 * (7168 + 1536 + 7168 + 576)


def test_an_engine_reads_the_latent_cache() -> None:
    model = moonlight()
    mixer = model.layers[0].mixer
    assert isinstance(mixer, LatentAttention)
    assert cached_values(model, 1) == cached_values(model, 8) == 27 * (512 + 64)
    shapes = rank_shapes(model, {"tp": 2})
    [shape] = {shape for shape, _ in shapes.mixers}
    assert (shape.scored, shape.gathered) == (8 * (192 + 128), 8 * (192 + 128))
    assert (shape.engine_scored, shape.cached) == (8 * (512 + 64 + 512), 512 + 64)
    config = config_of("grpo", {"policy": {"dp_shard": 8, "ep": 8}, "rollout": {"tp": 2, "ep": 2}})
    plan = plan_from_shapes(
        config,
        8,
        8,
        device_type="cuda",
        device_bytes=141 * 10**9,
        models=dict.fromkeys(config.roles, model),
    )
    machine = load_machine("h200", num_nodes=1, devices_per_node=8)
    assert forecast_step(config, plan, machine, full_lengths(config)).seconds > 0
    rank = RolloutRank(spec=plan.specs["rollout"], shapes=shapes, captures=True, node_size=8)
    short, long = (
        decode_work(rank, Segment(steps=1, rows=8, context=context)) for context in (100, 101)
    )
    assert long.memory_bytes - short.memory_bytes == pytest.approx(8 * 27 * 576 * 2)
    added = long.flops["attention"] - short.flops["attention"]
    assert added == pytest.approx(8 * 27 * 2 * 8 * (512 + 64 + 512))


def test_heads_are_divided_by_a_search() -> None:
    assert heads_divide(moonlight(), 16) and not heads_divide(moonlight(), 32)
