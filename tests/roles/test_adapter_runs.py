"""Runs whose policy has an adapter: an engine that applies it otherwise ends the first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from spmdrl.commands.train import FlowError, train
from spmdrl.config.load import load_config
from spmdrl.models.adapters import Adapter
from spmdrl.rewards.server import start_reward_server
from spmdrl.rollout.native import engine as native
from spmdrl.rollout.native.adapters import NO_ADAPTERS
from spmdrl.weights.sync import WeightSync
from spmdrl.world import World
from tiny_model import make_tiny_model

MOVING = ["roles.policy.tp=2", "roles.rollout.tp=1"]
MERGED = [*MOVING, "rollout.adapters=merged"]
FIRST = "model.layers.0.self_attn.q_proj.lora_B.weight"
MODULE = "layers.1.mlp.down"


def with_scale(factor: float) -> Any:
    """`NativeEngine.__init__` with another scale of its adapter."""
    plain = native.NativeEngine.__init__

    def init(self: native.NativeEngine, *given: Any, adapter: Adapter, **named: Any) -> None:
        targets = {n: replace(own, scale=own.scale * factor) for n, own in adapter.targets.items()}
        plain(self, *given, adapter=Adapter(targets=targets), **named)

    return init


def with_other_a() -> Any:
    """`WeightSync.__init__` that is given the A of an adapter with other values."""
    plain = WeightSync.__init__

    def init(self: WeightSync, plan: Any, source: Any, target: Any, tensors: Any, *given: Any, **n):
        others = {
            name: ((torch.rand_like(tensor) if "lora_A" in name else tensor), slices)
            for name, (tensor, slices) in tensors.items()
        }
        plain(self, plan, source, target, others, *given, **n)

    return init


def after_a_sync(spoil: Any) -> Any:
    """`WeightSync.run` after which `spoil(values)` changes the engine's tensors, by local name."""
    plain = WeightSync.run

    def run(self: WeightSync) -> None:
        before = {name: tensor.clone() for name, tensor in engine_tensors(self).items()}
        plain(self)
        spoil(engine_tensors(self), before)

    return run


def engine_tensors(sync: WeightSync) -> dict[str, torch.Tensor]:
    return {
        piece.name: tensor[piece.offset : piece.offset + piece.rows]
        for held in sync.views._target.values()
        for tensor, piece in held
    }


def keep_one(now: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.down_proj.lora_B.weight"
    now[name].copy_(before[name].nan_to_num())


def swap_layers(now: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    for leaf in ("lora_A", "lora_B"):
        one, other = (now[f"model.layers.{i}.mlp.down_proj.{leaf}.weight"] for i in (0, 1))
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)


FAULTS: dict[str, tuple[list[str], Any, str, Any, str]] = {
    # name -> words, object, attribute, what it is replaced by, the tensor that is named
    "not applied": ([], native, "adapters_of", lambda: lambda *_: NO_ADAPTERS, FIRST),
    "not applied, own": (MOVING, native, "adapters_of", lambda: lambda *_: NO_ADAPTERS, FIRST),
    "alpha": ([], native.NativeEngine, "__init__", lambda: with_scale(2.0), FIRST),
    "other role": (MOVING, WeightSync, "__init__", with_other_a, FIRST),
    "stale": (
        *(MOVING, WeightSync, "run", lambda: after_a_sync(keep_one)),
        "model.layers.1.mlp.down_proj.lora_B.weight[",
    ),
    "swapped": (
        *(MOVING, WeightSync, "run", lambda: after_a_sync(swap_layers)),
        "model.layers.0.mlp.down_proj.lora_",
    ),
}


@contextmanager
def planted(fault: str) -> Iterator[None]:
    _, owner, name, make, _ = FAULTS[fault]
    with mock.patch.object(owner, name, make()):
        yield


def stopped(world: World, path: str, run_dir: str) -> dict[str, str]:
    """Fault -> what the run says."""
    found = {}
    with start_reward_server() as server:
        for number, (fault, (words, *_)) in enumerate(FAULTS.items()):
            config = load_config(path, [*words, f"run_dir={run_dir}/{number}"])
            with planted(fault), pytest.raises(FlowError) as raised:
                train(config, world, server)
            found[fault] = str(raised.value)
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapter_runs")
    make_tiny_model(root / "model")
    roles = {"policy": {"adapter": {"rank": 4}}, "rollout": {}}
    return write_config(
        root / "c.yaml",
        root / "model",
        root / "run",
        roles=roles,
        data=questions(root / "questions.jsonl"),
        model={"dtype": "float32"},
        train={"lr": 1e-2},
    )


def test_a_fault_ends_the_run_in_its_first_step_and_the_tensor_is_named(
    path: Path, tmp_path: Path
) -> None:
    for messages in run_ranks(stopped, 2, str(path), str(tmp_path), timeout_s=300):
        for fault, message in messages.items():
            assert message.startswith("in step 1: weight sync 1: "), (fault, message)
            assert FAULTS[fault][-1] in message, (fault, message)


@pytest.mark.full
def test_right_runs_move_the_adapter_or_the_targets(path: Path, tmp_path: Path) -> None:
    """Colocated and alike nothing moves; else the adapter, or with merged weights the targets."""
    cases = {"alike": [], "moving": MOVING, "merged": MERGED}
    configs = [(str(path), [*words, f"run_dir={tmp_path / name}"]) for name, words in cases.items()]
    alike, moving, merged = run_ranks(run_configs, 2, configs, str(tmp_path), timeout_s=300)[0]
    assert all(record.get("sync/gb", 0) == 0 for record in alike)
    for records in (moving, merged):
        assert all(record["sync/canary_gap"] < 2e-5 for record in records)
        assert records[0]["sync/gb"] > records[1]["sync/gb"] == records[2]["sync/gb"] > 0
        assert records[1]["loss"] == pytest.approx(alike[1]["loss"], rel=1e-2, abs=1e-3)
    hidden, width, layers = 32, 64, 2
    matrices = layers * (2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * width)
    # each of two engines lacks the half of every matrix
    assert merged[1]["sync/gb"] == pytest.approx(4 * matrices / 1e9)
    assert moving[1]["sync/gb"] < merged[1]["sync/gb"] / 3
