"""Mixtures of experts on CUDA: the grouped kernel, decode steps as graphs. Needs one GPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_gpu import SHAPE, answers, needs_graphs

from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from spmdrl.models.linear import Groups, grouped_gemm_is_usable, grouped_linear
from tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("moe_gpu")
    make_tiny_model(
        root / "model", "Qwen3MoeForCausalLM", moe_intermediate_size=128, num_experts=16, **SHAPE
    )
    return root


def test_the_kernel_equals_the_loop():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((40, 64), (5, 32, 64)))
    grad = torch.randn(40, 32, generator=generator)
    counts = torch.tensor([7, 0, 20, 1, 12])
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        a, b = (t.bfloat16().to(device, dtype).requires_grad_() for t in (x, weight))
        assert grouped_gemm_is_usable(dtype, a.device, 32, 64) == (device == "cuda")
        out = grouped_linear(a, b, Groups(counts=counts.to(device)))
        out.backward(grad.bfloat16().to(device, dtype))
        found.append([t.detach().float().cpu() for t in (out, a.grad, b.grad)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=0.15)


@needs_graphs
def test_graphs_give_the_same_greedy_tokens(root):
    arguments = (str(root / "model"), "bfloat16")
    plain = run_ranks(answers, 1, *arguments, False, device="cuda", timeout_s=200)[0]
    graphs = run_ranks(answers, 1, *arguments, True, device="cuda", timeout_s=200)[0]
    assert plain == graphs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_with_replay_on_a_gpu(root, dtype):
    config = write_config(
        root / f"{dtype}.yaml",
        root / "model",
        root / f"run_{dtype}",
        device="cuda",
        model={"dtype": dtype},
        data=questions(root / "questions.jsonl"),
        algorithm={"routing_replay": True},
        train={"num_minibatches": 2, "balance_coef": 0.01, "recompute": "layer"},
    )
    arguments = ([(str(config), [])], str(root))
    records = run_ranks(run_configs, 1, *arguments, device="cuda", timeout_s=300)[0][0]
    for record in records:
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0
        assert record["rollout_gap_max"] < (1e-3 if dtype == "float32" else 0.5)
        assert record["balance_loss"] > 0
