"""The proof of an adapter before the first sync: what the engine does otherwise is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from harness import run_ranks
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.parallel import Parallel
from spmdrl.memory.call_memory import CallMemory
from spmdrl.memory.device_parts import DeviceParts
from spmdrl.models.adapters import (
    Adapter,
    LowRank,
    adapter_shapes,
    find_targets,
    is_lora_name,
    make_adapter,
)
from spmdrl.models.config import ModelConfig, read_config
from spmdrl.models.files.hf import TensorSource, random_tensor
from spmdrl.models.files.weight_files import open_checkpoint
from spmdrl.models.sharding import global_shapes
from spmdrl.models.tensors import Slice
from spmdrl.roles.adapter_noise import AdapterNoise
from spmdrl.roles.canary import Canary
from spmdrl.roles.generation import Rollout
from spmdrl.roles.handles import Policy
from spmdrl.roles.policy_sync import PolicySync
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.protocol import OWN
from spmdrl.training.options import TrainOptions
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.weights.layout import model_layout
from spmdrl.weights.plan import plan_sync
from spmdrl.weights.sync import WeightSync
from spmdrl.weights.views import MergedReader
from spmdrl.world import World
from tiny_model import make_tiny_model

CPU = torch.device("cpu")
B = "lora_B.weight"
FIRST = f"model.layers.0.self_attn.q_proj.{B}"
OTHER_LAYER = f"model.layers.1.mlp.down_proj.{B}"


class Adapted:
    """A checkpoint with an adapter's values: those of B are 0, or `lively`."""

    def __init__(
        self, base: TensorSource, model: ModelConfig, adapter: Adapter, seed: int, *, lively: bool
    ) -> None:
        self._base, self._shapes = base, adapter_shapes(model, adapter)
        self._seed, self._lively = seed, lively
        self.names = base.names | set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name] if name in self._shapes else self._base.shape(name)

    def read(self, part: Slice) -> Tensor:
        if part.name not in self._shapes:
            return self._base.read(part)
        whole = random_tensor(part.name, self._shapes[part.name], self._seed) * 5
        if part.name.endswith(B) and not self._lively:
            whole.zero_()
        return whole[tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))]


@dataclasses.dataclass
class Made:
    """A policy with an adapter, an engine, and the sync between them."""

    backend: TorchBackend
    engine: NativeEngine
    weights: WeightSync
    sync: PolicySync


def backend_of(
    world: World,
    path: Path,
    degrees: dict[str, int],
    adapter: Adapter,
    seed: int,
    *,
    lively: bool,
    residency: DeviceParts | None = None,
) -> tuple[TorchBackend, Mesh]:
    model = read_config(path)
    mesh = Mesh("policy", range(world.size), degrees, "cpu")
    source = Adapted(open_checkpoint(path), model, adapter, seed, lively=lively)
    options = TrainOptions(lr=1e-3, total_steps=4, param_dtype=torch.float32)
    return TorchBackend(mesh, model, source, options, CPU, adapter=adapter), mesh


def make(
    world: World,
    path: Path,
    *,
    moves: bool = False,
    merges: bool = False,
    lively: bool = False,
    away: bool = False,
    engine_adapter: Adapter | None = None,
    seed_of_source: int = 0,
) -> Made:
    """Both roles on all ranks: alike, so that the engine uses the trainer's tensors, or `moves`."""
    model = read_config(path)
    adapter = make_adapter(find_targets(model, ["all"]), rank=4, alpha=8)
    degrees = {"tp": 2} if moves else {"dp_replicate": world.size}
    backend, mesh = backend_of(world, path, degrees, adapter, 0, lively=lively)
    tensors = backend.local_tensors()
    if seed_of_source:
        tensors = backend_of(world, path, degrees, adapter, seed_of_source, lively=lively)[
            0
        ].local_tensors()
    ranks = list(range(world.size))
    source = model_layout(
        *(model, ranks, degrees, torch.float32), adapter=adapter, frozen=global_shapes(model)
    )
    in_engine = None if merges else (engine_adapter or adapter)
    one = {"dp_replicate": world.size}
    target = model_layout(model, ranks, one, torch.float32, adapter=in_engine)
    targets = frozenset(adapter.targets) if merges else frozenset()
    engine = NativeEngine(model, tp=Parallel(), adapter=in_engine)
    parts = DeviceParts(CPU)
    registry, held = parts.registry, backend.parts()
    residency = "host" if away else "keep"
    registry.register("policy", "base", tensors=held["base"], residency="keep", frozen=True)
    registry.register(
        "policy", "weights", tensors=[*held["base"], *held["weights"]], residency=residency
    )
    weights = WeightSync(
        plan_sync(source, target, merged=targets),
        source[world.rank],
        target[world.rank],
        tensors,
        engine,
        CPU,
        parts.view,
        merged=adapter if merges else None,
    )
    own = [tensor for tensor, _ in engine.local_tensors().values()]
    registry.register("rollout", "weights", tensors=own, residency="keep")
    memory = CallMemory(parts=parts)
    policy = Policy("policy", mesh, model, backend, memory)
    rollout_mesh = Mesh("rollout", range(world.size), one, "cpu")
    rollout = Rollout("rollout", rollout_mesh, model, engine, memory, ("weights",))
    canary = Canary(
        world, num_replicas=world.size, vocab_size=model.vocab_size, dtype=torch.float32
    )
    sync = PolicySync(
        policy, rollout, weights, memory, check_every=1000, canary=canary, adapter=adapter
    )
    return Made(backend, engine, weights, sync)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapter_proof")
    make_tiny_model(root / "model")
    return root / "model"


RIGHT = (
    {},
    {"lively": True},
    {"moves": True},
    {"moves": True, "lively": True, "away": True},
    {"moves": True, "merges": True},
    {"merges": True, "lively": True},
)


def right(world: World, path: Path) -> list[dict[str, float]]:
    found = []
    for case in RIGHT:
        made = make(world, path, **case)
        tensors = {n: t for n, (t, _) in made.backend.local_tensors().items()}
        tensors |= {f"state/{n}": t for n, (t, _) in made.backend.state_tensors().items()}
        before = {name: made.sync._parts.view(t).clone() for name, t in tensors.items()}
        made.sync.run()
        for name, tensor in tensors.items():
            now = made.sync._parts.view(tensor)
            assert torch.equal(now.view(torch.int32), before[name].view(torch.int32)), name
        found.append(made.sync.take_metrics())
        assert made.weights.sums.differing() == []
    return found


def test_a_right_engine_passes_and_the_policy_is_what_it_was(path: Path) -> None:
    for case, metrics in zip(RIGHT, run_ranks(right, 2, path)[0], strict=True):
        if "moves" in case or "merges" in case:
            assert metrics["sync/canary_gap"] < 2e-5
        else:
            assert metrics == {}


@contextmanager
def spoiled_engine(made: Made, kind: str) -> Iterator[None]:
    """An engine on rank 1 that goes wrong; its tensors' bits are those of the policy."""
    score = NativeEngine.score

    def wrong(engine: NativeEngine, rows: object, **given: object) -> object:
        if torch.distributed.get_rank() != 1:
            return score(engine, rows, **given)
        if kind == "one matrix":
            # layer 1's down projection alone
            own = engine._adapters[OWN].addition("layers.1.mlp.down")
            assert own is not None
            zeros = [torch.zeros_like(b) for b in own.b_weights()]
            with mock.patch.object(own, "b_weights", lambda: zeros):
                return score(engine, rows, **given)
        held = dict(engine._adapters)
        engine._adapters.clear()
        found = score(engine, rows, **given)
        engine._adapters.update(held)
        return found

    with mock.patch.object(NativeEngine, "score", wrong):
        yield


def swapped(made: Made) -> None:
    """Let layer 1 use the A and B of layer 0, and the other way round."""
    held = {n: t for n, (t, _) in made.engine.local_tensors().items() if "attention.qkv" in n}
    for name, tensor in held.items():
        if "lora" in name and ".0." in name:
            made.engine.adopt(name, held[name.replace(".0.", ".1.")])
            made.engine.adopt(name.replace(".0.", ".1."), tensor)


def message_of(made: Made) -> str:
    with pytest.raises(ValueError) as raised:
        made.sync.run()
    return str(raised.value)


def engines(world: World, path: Path) -> dict[str, str]:
    """Fault -> what the first sync says; the engine's bits are right, or it shares the tensors."""
    found = {}
    for moves in (False, True):
        for kind in ("not applied", "one matrix"):
            made = make(world, path, moves=moves)
            with spoiled_engine(made, kind):
                found[f"{kind}, moves={moves}"] = message_of(made)
    made = make(world, path, lively=True)
    with spoiled_engine(made, "not applied"):
        found["not applied, from a file"] = message_of(made)
    model = read_config(path)
    wide = make_adapter(find_targets(model, ["all"]), rank=4, alpha=16)
    found["alpha"] = message_of(make(world, path, engine_adapter=wide))
    targets = {n: LowRank(rank=4, scale=2.0) for n in wide.targets}
    targets["model.layers.1.mlp.down_proj.weight"] = LowRank(rank=4, scale=3.0)
    odd = Adapter(targets=targets)
    found["alpha of one matrix"] = message_of(make(world, path, moves=True, engine_adapter=odd))
    made = make(world, path)
    swapped(made)
    found["swapped"] = message_of(made)
    found["another role's"] = message_of(make(world, path, moves=True, seed_of_source=7))
    with mock.patch.object(MergedReader, "__call__", lambda self, tensor: self._read(tensor)):
        found["not merged"] = message_of(make(world, path, merges=True))
    return found


def test_an_engine_that_applies_the_adapter_otherwise_is_stopped_and_the_tensor_named(
    path: Path,
) -> None:
    for messages in run_ranks(engines, 2, path, timeout_s=300):
        named = {"one matrix": OTHER_LAYER, "alpha of one matrix": OTHER_LAYER}
        for fault, message in messages.items():
            name = named.get(fault.split(", moves")[0], FIRST)
            assert message.startswith("weight sync 1: "), (fault, message)
            assert f"bit for bit, but {name} is not applied" in message.replace(
                "bit for bit: ", "bit for bit, but "
            ), (fault, message)


def skipping(made: Made, local: str) -> Any:
    """`WeightSync.run` that leaves out a tensor of the engine, which is 0 in the beginning."""
    plain = WeightSync.run
    held = made.engine.local_tensors()[local][0].zero_()

    def run(self: WeightSync) -> None:
        old = held.clone()
        plain(self)
        held.copy_(old)

    return run


def stale(world: World, path: Path) -> dict[str, str]:
    """Fault -> what the first sync says; the engine does not hold the policy's bits."""
    found = {}
    for merges in (False, True):
        local = "layers.1.mlp.down." + ("weight" if merges else "lora_B.down_proj")
        made = make(world, path, moves=True, merges=merges)
        with mock.patch.object(WeightSync, "run", skipping(made, local)):
            found[f"stale, merges={merges}"] = message_of(made)
    made = make(world, path, moves=True)
    plain = WeightSync.run

    def swaps(self: WeightSync) -> None:
        plain(self)
        held = made.engine.local_tensors()
        for leaf in ("lora_A", "lora_B.down_proj"):
            one, other = (held[f"layers.{i}.mlp.down.{leaf}"][0] for i in (0, 1))
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)

    with mock.patch.object(WeightSync, "run", swaps):
        found["swapped"] = message_of(made)
    return found


def test_an_engine_that_holds_other_values_is_stopped_and_the_tensor_named(path: Path) -> None:
    for messages in run_ranks(stale, 2, path):
        module = "model.layers.1.mlp.down_proj"
        assert messages["stale, merges=False"].startswith(f"weight sync 1: {module}.{B}[")
        assert messages["stale, merges=True"].startswith(f"weight sync 1: {module}.weight[")
        assert "model.layers.0.mlp.down_proj.lora_" in messages["swapped"]
        assert all(
            message.endswith("is not what the policy holds") for message in messages.values()
        )


def untrained(world: World, path: Path) -> str:
    made = make(world, path)
    made.backend._weights = dataclasses.replace(made.backend._weights, added=None)
    return message_of(made)


def test_a_policy_that_does_not_apply_its_adapter_is_stopped(path: Path) -> None:
    message = run_ranks(untrained, 1, path)[0]
    assert message == (
        f"the policy's log-probabilities do not depend on {FIRST}, nor on any other B of its "
        "adapter: training does not apply it"
    )


def not_a_number(world: World, path: Path) -> str:
    made = make(world, path)
    made.backend.local_tensors()["norm.weight"][0][0] = float("nan")
    return message_of(made)


def test_a_policy_without_finite_numbers_proves_nothing(path: Path) -> None:
    [text] = run_ranks(not_a_number, 1, path)
    assert "are not finite" in text and "NaN" in text


def noise_of(world: World, path: Path) -> dict[str, Tensor]:
    model = read_config(path)
    adapter = make_adapter(find_targets(model, ["all"]), rank=4, alpha=8, experts="shared")
    degrees = {"tp": 2} if world.size == 2 else {}
    backend, _ = backend_of(world, path, degrees, adapter, 0, lively=True)
    tensors = backend.local_tensors()
    noise = AdapterNoise(adapter, tensors, lambda tensor: tensor)
    only = [t for t in adapter.distinct if ".layers.0." in t]
    noise.fill(1.0, only)
    return {
        f"{piece.name} {piece.start}": tensor[piece.offset : piece.offset + piece.rows].clone()
        for tensor, slices in tensors.values()
        for piece in slices
        if is_lora_name(piece.name)
    }


@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
def test_noise_does_not_depend_on_the_layout(tmp_path: Path, family: str) -> None:
    path = tmp_path / "model"
    make_tiny_model(path, f"{family}ForCausalLM")
    [whole] = run_ranks(noise_of, 1, path)
    has_experts = [".experts.gate_proj.lora_B." in name for name in whole]
    assert any(has_experts) == (family == "Qwen3Moe")
    halves = run_ranks(noise_of, 2, path)
    for at, values in whole.items():
        name = at.split()[0]
        parts = {k: v for found in halves for k, v in found.items() if k.split()[0] == name}
        dim = next((d for d in (0, 1) if values.shape[d] != next(iter(parts.values())).shape[d]), 0)
        joined = torch.cat([parts[k] for k in sorted(parts)], dim)
        torch.testing.assert_close(joined, values, rtol=1e-6, atol=0)
        if name.endswith(B):
            assert bool(values.any()) == (".layers.0." in name)
            assert values.abs().max() < 10 * values.abs().mean() or ".layers.1." in name
