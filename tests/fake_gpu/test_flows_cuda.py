"""Every shipped flow on the stand-in CUDA, in float32 and bfloat16; in float32 as on the CPU."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from spmdrl.memory import host_state
from spmdrl.world import World
from tiny_model import make_tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "flows"))
from test_dpo_layouts import ONLINE, write_dpo
from test_ppo_layouts import ON_HOST, settings
from test_sft_and_reward_model import FLOWS, write, write_pairs

pytestmark = pytest.mark.fakegpu

SHAPE = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "intermediate_size": 512}
"""Heads that the half-precision attention kernels take."""

EXPERTS = {"moe_intermediate_size": 128, "num_experts": 16, **SHAPE}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "windows and soft caps": (
        "Gemma2ForCausalLM",
        {
            "sliding_window": 16,
            "attn_logit_softcapping": 20.0,
            # samples of one token, again and again, have no rewards that differ
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 64,
        },
    ),
    "sinks": (
        "GptOssForCausalLM",
        {
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 128,
        },
    ),
    "gated delta rule": (
        "Qwen3NextForCausalLM",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "shared_expert_intermediate_size": 128,
            "moe_intermediate_size": 128,
        },
    ),
    "latent attention": (
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 128,
        },
    ),
}
"""A model for each kind of block that the cases above lack: its class and keys of config.json."""

SDPA, REPLAY = "model.attention=sdpa", "algorithm.routing_replay=true"
WORDS = {
    "windows and soft caps": [SDPA],
    "sinks": [SDPA, REPLAY],
    "gated delta rule": [REPLAY],
    "latent attention": [REPLAY],
}
"""Settings of these models. In bfloat16 the attention of two would be compiled to Triton's kernels,
which the stand-in launches without computing values, and close choices of experts may differ.
"""

DTYPES = ("float32", "bfloat16")
Written = tuple[Path, list[str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flows_cuda")
    make_tiny_model(root / "model", **SHAPE)
    make_tiny_model(root / "other", seed=1, **SHAPE)
    make_tiny_model(root / "scalar", seed=1, head="score", **SHAPE)
    make_tiny_model(root / "moe", "Qwen3MoeForCausalLM", **EXPERTS)
    for name, (architecture, keys) in FAMILIES.items():
        make_tiny_model(root / name, architecture, **{**SHAPE, **keys})
    write_pairs(root / "pairs.jsonl")
    return root


def sampling(root: Path, name: str, model: str = "model", **sections: Any) -> Path:
    sections.setdefault("train", {"lr": 1e-3, "microbatch_tokens": 300, "num_minibatches": 2})
    return write_config(
        root / f"{name}.yaml",
        root / model,
        root / name,
        **{"data": questions(root / "questions.jsonl"), **sections},
    )


def grpo(root: Path, name: str) -> Written:
    return sampling(root, name, algorithm={"entropy_coef": 0.01}), []


def moe(root: Path, name: str) -> Written:
    train = {"num_minibatches": 2, "balance_coef": 0.01, "recompute": "layer"}
    return sampling(root, name, "moe", algorithm={"routing_replay": True}, train=train), []


def family(name: str) -> Callable[[Path, str], Written]:
    train, words = {"num_minibatches": 2, "lr": 1e-4}, WORDS[name]
    return lambda root, run_name: (sampling(root, run_name, name, train=train), words)


def ppo(root: Path, name: str) -> Written:
    sections = settings(root)
    del sections["environment"]
    return sampling(root, name, **sections), []


def ppo_on_host(root: Path, name: str) -> Written:
    return ppo(root, name)[0], [*ON_HOST, "roles.rollout.residency.weights=drop"]


def in_windows(root: Path, name: str) -> Written:
    return grpo(root, name)[0], ["roles.policy.residency.optimizer=stream"]


def online_dpo(root: Path, name: str) -> Written:
    roles = {"policy": {}, "reference": {"model": str(root / "other")}, "rollout": {}}
    sections = {key: value for key, value in ONLINE.items() if key != "environment"}
    return sampling(root, name, roles=roles, **sections), []


def distillation(root: Path, name: str) -> Written:
    roles = {"policy": {}, "rollout": {}, "teacher": {"model": str(root / "other")}}
    data = {**questions(root / "questions.jsonl"), "group_size": 1}
    algorithm = {"teacher_coef": 1.0}
    return sampling(root, name, roles=roles, algorithm=algorithm, rewards=[], data=data), []


def preferences(loss: str) -> Callable[[Path, str], Written]:
    return lambda root, name: (write_dpo(root, name, loss), [])


def supervised(flow: str) -> Callable[[Path, str], Written]:
    return lambda root, name: (write(root, name, flow, FLOWS[flow][1]), [])


CASES: dict[str, Callable[[Path, str], Written]] = {
    "grpo": grpo,
    "grpo of experts": moe,
    **{f"grpo, {name}": family(name) for name in FAMILIES},
    "ppo": ppo,
    "ppo on host": ppo_on_host,
    "grpo, optimizer in windows": in_windows,
    "online_dpo": online_dpo,
    "distillation": distillation,
    **{loss: preferences(loss) for loss in ("dpo", "kto", "orpo")},
    **{flow: supervised(flow) for flow in FLOWS},
}
QUICK = {("grpo", "bfloat16"), ("ppo on host", "float32")}
PARAMETERS = [
    pytest.param(flow, dtype, marks=[pytest.mark.quick] if (flow, dtype) in QUICK else [])
    for flow in CASES
    for dtype in DTYPES
]


def run_here(world: World, configs: list[tuple[str, list[str]]], replay: str) -> Any:
    """Run configurations; windows of an optimizer's state cut its tensors."""
    host_state.WINDOW_BYTES = 1 << 20
    return run_configs(world, configs, replay)


def run(root: Path, flow: str, dtype: str, device: str) -> list[dict[str, float]]:
    """The metrics of two steps on one rank of `device`."""
    path, words = CASES[flow](root, f"{flow}_{dtype}_{device}".replace(" ", "_"))
    words = [*words, "steps=2", f"device={device}", f"model.dtype={dtype}"]
    arguments = ([(str(path), words)], str(root))
    records: list[dict[str, float]] = run_ranks(
        run_here, 1, *arguments, device=device, timeout_s=600
    )[0][0]
    return records


@pytest.mark.parametrize(("flow", "dtype"), PARAMETERS)
def test_flow(root: Path, flow: str, dtype: str) -> None:
    records = run(root, flow, dtype, "cuda")
    assert len(records) == 2
    for record in records:
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0
        if "rollout_gap_max" in record:
            assert record["rollout_gap_max"] < (1e-3 if dtype == "float32" else 0.5)
    if dtype == "float32":
        expected = run(root, flow, dtype, "cpu")[0]
        for name in ("loss", "grad_norm"):
            assert records[0][name] == pytest.approx(expected[name], rel=2e-3, abs=1e-5), name
