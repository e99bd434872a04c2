"""Gated DeltaNet on the train backend: layouts, packing and shared prompts against one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from adapter_backends import make_role, mesh_of
from backend_runs import compare, make_backend, rows_of_step, run_layouts, train
from torch import Tensor
from training_cases import loss_fn, make_rows, options, tiny_config

from harness import run_ranks
from spmdrl.models.blocks import recurrence
from spmdrl.models.blocks.delta_layout import Segment, segments_of
from spmdrl.models.config import ModelConfig
from spmdrl.models.spans import Span
from spmdrl.testing.cases import tiny_adapter as adapter_of
from spmdrl.training.readout import next_token
from spmdrl.world import World

Case = tuple[dict[str, int], dict[str, Any]]
CASES: dict[int, list[Case]] = {
    1: [({}, {"microbatch_tokens": 100}), ({}, {"microbatch_tokens": 30, "share_prompts": False})],
    2: [
        ({"tp": 2}, {}),
        ({"dp_shard": 2}, {"recompute": "layer"}),
        ({"dp_replicate": 2}, {"share_prompts": False}),
    ],
}


def delta_config(num_experts: int = 0, architecture: str = "Qwen3NextForCausalLM") -> ModelConfig:
    return tiny_config(
        architecture,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=6,
        num_experts=num_experts,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
    )


def gradients(world: World, budget: int) -> dict[str, Tensor]:
    """Gradients of one step, by local name, in microbatches of so many tokens."""
    given = options(microbatch_tokens=budget, share_prompts=False)
    backend = make_backend(world, given, delta_config(num_experts=4))
    # longer than a chunk, and shorter than the convolution
    rows = make_rows([70, 2, 20], 3, longest=90)
    backend.forward_backward(rows, loss_fn, next_token(), normaliser=float(rows.num_tokens))
    found = {leaf.name: leaf.gradient() for leaf in backend._leaves}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def leaking(spans: Sequence[Span]) -> tuple[Segment, ...]:
    """Cut spans so that every row continues the state of the row before it."""
    own = enumerate(segments_of(spans))
    return tuple(replace(segment, parent=i - 1 if i else None) for i, segment in own)


def in_microbatches(world: World) -> tuple[float, float]:
    """The largest difference of packed gradients from those of rows by themselves, relative to the
    largest value of a tensor; and the same with states that leak.
    """
    one_by_one, packed = gradients(world, 1), gradients(world, 10_000)
    recurrence.segments_of = leaking
    leaky = gradients(world, 10_000)
    recurrence.segments_of = segments_of
    return difference(packed, one_by_one), difference(leaky, one_by_one)


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys() and any("step_bias" in name for name in wanted)
    scale = max(float(values.abs().max()) for values in wanted.values())
    gaps = (float((found[name] - values).abs().max()) for name, values in wanted.items())
    return max(gaps) / scale


def test_gradients_of_a_packed_microbatch_equal_those_of_its_rows_one_by_one() -> None:
    """Planted: states that leak from row to row are seen."""
    [(gap, leaky)] = run_ranks(in_microbatches, 1)
    assert gap < 1e-5 and leaky > 1e-3


def on_ranks(world: World, cases: list[Case]) -> list[dict[str, Any]]:
    # at larger rates the steps amplify rounding: tiny keys are scaled to length one
    slow = [(degrees, {"lr": 1e-3, **given}) for degrees, given in cases]
    return run_layouts(world, delta_config(), slow, rows_of_step)


@pytest.fixture(scope="module")
def one() -> list[dict[str, Any]]:
    return run_ranks(on_ranks, 1, CASES[1])[0]


@pytest.mark.full
def test_prompts_of_their_own_train_as_shared_ones_do(one: list[dict[str, Any]]) -> None:
    compare([one[1]], one[0], delta_config())


@pytest.mark.full
def test_layouts_train_as_one_rank_does(one: list[dict[str, Any]]) -> None:
    """Metrics, gradients, weights and moments of three steps."""
    results = run_ranks(on_ranks, 2, CASES[2], timeout_s=200)
    for number, (degrees, _) in enumerate(CASES[2]):
        print(degrees)
        compare([result[number] for result in results], one[0], delta_config())


def with_adapter(world: World, cases: list[Case]) -> list[dict[str, Any]]:
    model = delta_config(architecture="Qwen3_5ForCausalLM")
    return [
        train(make_role(mesh_of(world, degrees), model, adapter_of(model), options(**given)))
        for degrees, given in cases
    ]


@pytest.mark.full
def test_adapters_of_a_projection_with_three_regions_train_alike() -> None:
    """Queries, keys and values of the recurrence are one target, and tp cuts each by itself."""
    model = delta_config(architecture="Qwen3_5ForCausalLM")
    adapter = adapter_of(model)
    assert "model.layers.0.linear_attn.in_proj_qkv.weight" in adapter.targets
    slow = {"lr": 1e-4}  # larger steps amplify rounding in the third step's gradients
    [[one]] = run_ranks(with_adapter, 1, [({}, slow)])
    cases: list[Case] = [({"tp": 2}, slow), ({"dp_shard": 2}, slow)]
    results = run_ranks(with_adapter, 2, cases, timeout_s=200)
    for number in range(len(cases)):
        compare([result[number] for result in results], one, model, adapter)


def refused(world: World) -> str:
    with pytest.raises(ValueError) as error:
        run_layouts(world, delta_config(), [({"cp": 2}, {})], rows_of_step)
    return str(error.value)


@pytest.mark.full
def test_context_parallelism_is_refused_before_it_begins() -> None:
    assert all("cp=2 divides rows" in message for message in run_ranks(refused, 2))
