"""The CUDA path: bf16 training with float32 masters, CUDA graphs, paged kernels. Needs one GPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from noise import gumbel
from spmdrl.models.config import read_config
from spmdrl.models.files.hf import fill, open_checkpoint
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.native.varlen import varlen_is_usable
from spmdrl.rollout.native.workspace import NativeOptions
from spmdrl.rollout.protocol import Request, SamplingParams
from spmdrl.training.backend_steps import as_numbers
from spmdrl.world import World
from tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHAPE = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "intermediate_size": 512}
"""Heads that the half-precision attention kernels take."""

needs_graphs = pytest.mark.skipif(
    not torch.cuda.is_available()
    or not varlen_is_usable(torch.bfloat16, SHAPE["head_dim"], torch.device("cuda", 0)),
    reason=f"torch {torch.__version__} has no paged attention, so no step is captured",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("gpu")
    make_tiny_model(root / "model", **SHAPE)
    return root


def test_noise_is_the_same_on_both_devices():
    keys = torch.tensor([1, -5, 2**60])
    on_cpu, on_gpu = gumbel(keys, 3, 1000), gumbel(keys.cuda(), 3, 1000).cpu()
    assert torch.allclose(on_cpu, on_gpu, atol=1e-4)


def test_metrics_of_a_loss_may_lie_on_two_devices():
    part = {"loss": torch.tensor(2.0, device="cuda"), "tokens": torch.tensor(3.0).double()}
    assert as_numbers([part, {"tokens": torch.tensor(1.0)}]) == [
        {"loss": 2.0, "tokens": 3.0},
        {"tokens": 1.0},
    ]


def answers(world: World, model: str, dtype: str, graphs: bool) -> list[tuple[int, ...]]:
    config = read_config(model)
    engine = NativeEngine(
        config,
        options=NativeOptions(cuda_graphs=graphs, kv_cache_gb=0.5),
        device=world.device,
        dtype=getattr(torch, dtype),
    )
    assert engine.captures_graphs == graphs
    table = engine.weights.table()
    fill(((engine.allocate(n), p.slices) for n, p in table.items()), open_checkpoint(model))
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    requests = [
        Request(tokens=tuple(range(10, 20 + i)), prompt_id=i, samples=(0,), sampling=sampling)
        for i in range(8)
    ]
    found = engine.generate(requests, seed=0, step=0)
    return [completion.tokens for group in found for completion in group]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_graphs_all_tokens_come(root, dtype):
    arguments = (str(root / "model"), dtype)
    found = run_ranks(answers, 1, *arguments, False, device="cuda", timeout_s=200)[0]
    assert [len(tokens) for tokens in found] == [24] * 8
    if dtype == "float32":
        on_cpu = run_ranks(answers, 1, *arguments, False, device="cpu", timeout_s=200)[0]
        assert [tokens[:4] for tokens in found] == [tokens[:4] for tokens in on_cpu]


@needs_graphs
def test_graphs_give_the_same_greedy_tokens(root):
    arguments = (str(root / "model"), "bfloat16")
    plain = run_ranks(answers, 1, *arguments, False, device="cuda", timeout_s=200)[0]
    graphs = run_ranks(answers, 1, *arguments, True, device="cuda", timeout_s=200)[0]
    assert plain == graphs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("share_prompts", [True, False])
def test_training_on_a_gpu(root, dtype, share_prompts):
    run_dir = root / f"run_{dtype}_{share_prompts}"
    config = write_config(
        root / f"{dtype}_{share_prompts}.yaml",
        root / "model",
        run_dir,
        device="cuda",
        model={"dtype": dtype},
        data=questions(root / "questions.jsonl"),
        train={"num_minibatches": 2, "share_prompts": share_prompts},
    )
    arguments = ([(str(config), [])], str(root))
    records = run_ranks(run_configs, 1, *arguments, device="cuda", timeout_s=300)[0][0]
    bound = 1e-3 if dtype == "float32" else 0.5
    for record in records:
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0
        assert record["rollout_gap_max"] < bound


def test_first_loss_on_a_gpu_equals_the_cpu(root):
    losses = []
    for device in ("cpu", "cuda"):
        config = write_config(
            root / f"same_{device}.yaml",
            root / "model",
            root / f"same_{device}",
            device=device,
            steps=1,
            model={"dtype": "float32"},
            data=questions(root / "questions.jsonl"),
        )
        arguments = ([(str(config), [])], str(root))
        losses.append(run_ranks(run_configs, 1, *arguments, device=device, timeout_s=300)[0][0])
    for name in ("loss", "grad_norm", "entropy"):
        assert losses[0][0][name] == pytest.approx(losses[1][0][name], rel=2e-3, abs=1e-5), name
