"""Which engine a rollout has: what is refused before anything is made, and the cache's size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flow_cases import write_config
from role_specs import specs_of
from spmdrl.config.load import load_config
from spmdrl.memory.device_parts import DeviceParts
from spmdrl.models.config import ModelConfig, read_config
from spmdrl.placement import place_roles
from spmdrl.planning.engines import check_engine, check_installed, longest_sequence, vllm_cache
from spmdrl.planning.plan import RolePlan, plan_roles
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    directory = tmp_path_factory.mktemp("engines") / "model"
    make_tiny_model(
        directory, hidden_size=48, head_dim=32, num_attention_heads=6, num_key_value_heads=3
    )
    return directory, read_config(directory)


def config_of(shape: tuple[Path, ModelConfig], *words: str, **sections: Any) -> Any:
    directory, _ = shape
    settings = {"rollout": {"engine": "vllm"}, **sections}
    path = write_config(
        directory.parent / "c.yaml", directory, directory.parent / "run", **settings
    )
    return load_config(path, list(words))


def plan(shape: tuple[Path, ModelConfig], size: int, *words: str, device: str = "cpu") -> RolePlan:
    config = config_of(shape, *words)
    shapes = dict.fromkeys(config.roles, shape[1])
    return plan_roles(config, place_roles(config, size), shapes, [device] * size)


@pytest.mark.parametrize(
    ("size", "words", "message"),
    [
        (
            2,
            ["roles.rollout.ranks=0"],
            r"roles\.rollout\.ranks=.*of 2.*ranks=all",
        ),
        (2, ["roles.rollout.ranks=1"], "lays its groups over all ranks"),
        (2, ["roles.rollout.cp=2"], r"roles\.rollout\.cp=2.*set roles\.rollout\.tp"),
        (3, ["roles.rollout.tp=3"], r"roles\.rollout\.tp=3: it does not divide the 320 rows"),
        (1, ["roles.second.kind=rollout"], r"rollouts \['rollout', 'second'\]"),
        (1, ["sampling.min_p=0.1", "sampling.top_p=0.9"], r"sampling\.min_p=0.1 and .*top_p=0.9"),
        (1, ["sampling.temperature=0.005"], r"sampling\.temperature=0.005: .* at least 0.01"),
        (
            1,
            ["evaluation.held_out=3", "evaluation.sampling={temperature: 0.001}"],
            r"evaluation\.sets\.held_out\.sampling\.temperature=0.001",
        ),
    ],
)
def test_what_vllm_cannot_do_is_refused(
    shape: tuple[Path, ModelConfig], size: int, words: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(shape, size, *words)
    plan(shape, size, *words, "rollout.engine=native") if "tp=3" not in words[0] else None


def test_a_vllm_that_is_not_there_is_refused(
    shape: tuple[Path, ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spmdrl.planning.engines.installed_version", lambda: None)
    config = config_of(shape)
    with pytest.raises(ValueError, match="vLLM is not installed: pip install vllm"):
        check_installed(specs_of(config, shape[1])["rollout"])
    check_installed(specs_of(config, shape[1])["policy"])


def test_memory_on_a_cpu_is_kept_whatever_is_asked(shape: tuple[Path, ModelConfig]) -> None:
    words = ["roles.rollout.residency={weights: drop, kv_cache: drop}", "memory_gb=0.05"]
    [memory] = plan(shape, 1, *words).memory.values()
    assert memory.plan.residencies["rollout", "weights"] == "keep"
    assert memory.plan.residencies["rollout", "kv_cache"] == "keep"


def test_on_cuda_weights_and_cache_are_one_part(shape: tuple[Path, ModelConfig]) -> None:
    found = plan(shape, 1, "roles.rollout.residency={weights: drop}", "memory_gb=1", device="cuda")
    [memory] = found.memory.values()
    assert memory.plan.residencies["rollout", "weights"] == "drop"
    assert ("rollout", "kv_cache") not in memory.plan.residencies
    assert found.syncs["rollout"].shared_bytes == 0, "vLLM's graphs hold its own addresses"
    with pytest.raises(ValueError, match=r"residency\.kv_cache=drop with rollout\.engine=vllm"):
        plan(shape, 1, "roles.rollout.residency={kv_cache: drop}", device="cuda")


def test_the_cache_holds_the_longest_sequence(shape: tuple[Path, ModelConfig]) -> None:
    config = config_of(
        shape,
        "evaluation.sets={other: {data: {max_tokens: 120}, sampling: {max_tokens: 30}}}",
        "rollout.block_size=20",
    )
    assert longest_sequence(config, shape[1].max_position) == 150

    def cache(*words: str) -> Any:
        words = ("roles.rollout.tp=3", *words)
        changed = config_of(shape, *words, rollout={"engine": "vllm", "block_size": 20})
        return vllm_cache(changed, specs_of(changed, shape[1], 6)["rollout"])

    block = 2 * 2 * 1 * 32 * 4 * 32  # keys and values, layers, heads, values, bytes, tokens
    # 96 + 10 tokens are 4 blocks of 32; 10 samples of each replica, and vLLM's own
    assert (cache().num_bytes, cache().longest) == ((10 * 4 + 1) * block, 106)
    assert cache("rollout.max_running=3").num_bytes == (3 * 4 + 1) * block
    small = cache(f"rollout.kv_cache_gb={3.5 * block / 1e9}")
    assert (small.num_bytes, small.longest) == (3 * block, 64)


def test_what_another_allocator_has_leaves_and_comes() -> None:
    events: list[object] = []
    parts = DeviceParts(torch.device("cpu"))
    weight = torch.ones(4)
    parts.registry.register("policy", "weights", tensors=[weight], residency="host")
    for role, policy in (("kept", "host"), ("lost", "drop")):
        parts.registry.register_foreign(
            role,
            "weights",
            num_bytes=100,
            leave=lambda keeps, role=role: events.append((role, "leave", keeps)),
            bring=lambda role=role: events.append((role, "bring")),
            residency=policy,
        )
    parts.settle()
    assert events == [("lost", "leave", False), ("kept", "leave", True)]
    assert parts.registry.resident_bytes() == 0
    events.clear()
    parts.prepare([("kept", "weights")])
    assert events == [("kept", "bring")] and parts.registry.resident_bytes() == 100
    with pytest.raises(ValueError, match="'lost': its weights were dropped"):
        parts.prepare([("lost", "weights")])
    parts.prepare([("policy", "weights")], fills=[("lost", "weights")])
    parts.filled("lost", "weights")
    parts.prepare([("lost", "weights")])
    assert events[1:] == [("kept", "leave", True), ("lost", "bring")]
    assert parts.registry.resident_bytes() == 100


def test_check_engine_lets_the_native_engine_be(shape: tuple[Path, ModelConfig]) -> None:
    config = config_of(shape, "roles.rollout.ranks=0", "rollout.engine=native")
    check_engine(config, specs_of(config, shape[1], 2), 2)
