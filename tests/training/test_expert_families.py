"""Experts with biases, corrections, groups and shared experts on the train backend: layouts against
one rank, and a router's correction, which no step changes and no dtype rounds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_runs import compare, make_backend, rows_of_step, run_layouts
from safetensors.torch import load_file
from torch import Tensor
from training_cases import LivelyCheckpoint, loss_fn, make_rows, options, tiny_config

from harness import run_ranks
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.tensors import Slice
from spmdrl.training.readout import next_token
from spmdrl.verification.trainer import whole
from spmdrl.weights.layout import model_layout
from spmdrl.world import World

MODELS: dict[str, ModelConfig] = {
    "gpt_oss": tiny_config(
        "GptOssForCausalLM",
        vocab_size=100,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=16,
        sliding_window=5,
        swiglu_limit=1.5,
        num_key_value_heads=4,
    ),
    "glm4_moe": tiny_config(
        "Glm4MoeForCausalLM",
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=12,
        routed_scaling_factor=1.5,
        use_qk_norm=True,
        attention_bias=True,
    ),
    "qwen2_moe": tiny_config(
        "Qwen2MoeForCausalLM",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        tie_word_embeddings=True,
    ),
}
Case = tuple[str, dict[str, int], dict[str, Any]]
TWO: list[Case] = [
    ("gpt_oss", {"tp": 2}, {}),
    ("gpt_oss", {"dp_shard": 2}, {"recompute": "layer"}),
    ("glm4_moe", {"dp_shard": 2, "ep": 2}, {"microbatch_tokens": 40}),
    ("qwen2_moe", {"dp_shard": 2}, {"blocks": 2}),
]
MORE: list[Case] = [
    ("gpt_oss", {"dp_shard": 2, "ep": 2}, {"microbatch_tokens": 40}),
    ("gpt_oss", {"tp": 2, "ep": 2}, {"recompute": "layer"}),
    ("gpt_oss", {"cp": 2, "ep": 2}, {}),
    ("gpt_oss", {"dp_replicate": 2, "ep": 2}, {"share_prompts": False}),
    ("glm4_moe", {"tp": 2}, {}),
    ("glm4_moe", {"cp": 2}, {"recompute": "layer"}),
    ("glm4_moe", {"dp_replicate": 2, "ep": 2}, {}),
    ("qwen2_moe", {"tp": 2}, {}),
    ("qwen2_moe", {"tp": 2, "ep": 2}, {}),
]
FOUR: list[Case] = [
    ("gpt_oss", {"tp": 4, "ep": 2}, {}),
    ("gpt_oss", {"dp_shard": 2, "tp": 2}, {}),
    ("gpt_oss", {"dp_shard": 4, "ep": 2}, {}),
    ("gpt_oss", {"dp_shard": 2, "tp": 2, "ep": 4}, {"recompute": "layer"}),
    ("glm4_moe", {"dp_replicate": 2, "dp_shard": 2, "ep": 2}, {}),
]
CASES = {"two": (2, TWO), "more": (2, MORE), "four": (4, FOUR)}


def on_ranks(world: World, cases: list[Case]) -> list[dict[str, Any]]:
    return [
        run_layouts(world, MODELS[name], [(degrees, given)], rows_of_step)[0]
        for name, degrees, given in cases
    ]


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, Any]]:
    cases: list[Case] = [(name, {}, {"microbatch_tokens": 100}) for name in MODELS]
    return dict(zip(MODELS, run_ranks(on_ranks, 1, cases)[0], strict=True))


@pytest.mark.parametrize(
    "cases",
    [
        "two",
        pytest.param("more", marks=pytest.mark.full),
        pytest.param("four", marks=pytest.mark.full),
    ],
)
def test_layouts_train_as_one_rank_does(one: dict[str, dict[str, Any]], cases: str) -> None:
    """Metrics, gradients, weights and moments of three steps."""
    size, listed = CASES[cases]
    results = run_ranks(on_ranks, size, listed, timeout_s=300)
    for number, (name, degrees, _) in enumerate(listed):
        print(name, degrees)
        compare([result[number] for result in results], one[name], MODELS[name])


CORRECTION = "layers.1.mlp.router.correction"


def narrow(world: World, degrees: dict[str, int]) -> tuple[Tensor, Tensor, set[str]]:
    """The correction before and after a step in bfloat16, and parts of this rank whose shape or
    dtype are not those of the role's layout.
    """
    model = MODELS["glm4_moe"]
    backend = make_backend(world, options(param_dtype=torch.bfloat16), model, **degrees)
    before = backend.local_tensors()[CORRECTION][0].clone()
    rows = make_rows([6, 3, 9, 4], 3)
    backend.forward_backward(rows, loss_fn, next_token(), normaliser=1.0)
    assert backend.optim_step().grad_norm > 0
    held = backend.local_tensors()
    [table] = [
        model_layout(
            model,
            range(world.size),
            degrees,
            torch.bfloat16,
            shard_dtype=torch.float32,
        )[world.rank]
    ]
    wrong = {
        name
        for name, shard in table.items()
        if (tuple(held[name][0].shape), held[name][0].dtype) != (shard.shape, shard.dtype)
    }
    assert table.keys() == held.keys()
    assert [name for name, shard in table.items() if shard.frozen] == [CORRECTION]
    assert f"exp_avg/{CORRECTION}" not in backend.state_tensors()
    assert f"weights/{CORRECTION}" in backend.state_tensors()
    return before, held[CORRECTION][0].clone(), wrong


@pytest.mark.parametrize("degrees", [{}, {"dp_shard": 2, "ep": 2}])
def test_no_step_changes_the_correction_and_no_dtype_rounds_it(degrees: dict[str, int]) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    whole_of = Slice(name=name, shape=(8,), start=(0,), stop=(8,), offset=0)
    in_file = LivelyCheckpoint(MODELS["glm4_moe"]).read(whole_of)
    for before, after, wrong in run_ranks(narrow, max(1, len(degrees)), degrees):
        assert torch.equal(before, in_file) and torch.equal(after, in_file)
        assert not torch.equal(in_file, in_file.bfloat16().float())
        assert wrong == set()


def exported(world: World, directory: str) -> None:
    model = MODELS["glm4_moe"]
    backend = make_backend(world, options(), model)
    tensors = whole([backend.local_tensors()], model)
    save_pretrained(tensors.items(), model, directory, None, dtype=torch.bfloat16)


def test_an_export_in_bfloat16_has_the_correction_in_float32(tmp_path: Path) -> None:
    run_ranks(exported, 1, str(tmp_path / "out"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    wide = {name for name, tensor in tensors.items() if tensor.dtype != torch.bfloat16}
    assert wide == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    assert tensors[wide.pop()].dtype == torch.float32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
