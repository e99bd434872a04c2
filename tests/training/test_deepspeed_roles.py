"""Roles on the DeepSpeed backend: experts, adapters over a shared base, frozen parameters and roles
equal the torch backend's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_backends import WithAdded, adapter_of, moe_config, value_loss
from backend_runs import assemble, compare, rows_of_step, train
from deepspeed_cases import Case, asked, brief, case, make_backend
from test_freeze import FROZEN, LOCAL
from torch import Tensor
from training_cases import LivelyCheckpoint, loss_fn, options, tiny_config

from harness import run_ranks
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.sharding import global_shapes
from spmdrl.training.readout import VALUES, next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import World

pytestmark = pytest.mark.deepspeed

SHORT = {"microbatch_tokens": 20}
EXPERTS: dict[str, Case] = {
    "1": case(1, given=SHORT, dp_shard=2),
    "2": case(2, given={"recompute": "layer"}, dp_shard=2),
    "3": case(3, given=SHORT, dp_replicate=2),
}
ADAPTED: dict[str, Case] = {
    "1": case(1, given=SHORT, dp_shard=2),
    "2": case(2, given={"recompute": "layer"}, dp_replicate=2),
    "2 cp": case(2, cp=2),
    "3": case(3, given={**SHORT, "recompute": "layer"}, dp_shard=2),
}
FROZEN_ONES: dict[str, Case] = {str(stage): case(stage, dp_shard=2) for stage in (1, 2, 3)}


def adapters() -> dict[str, tuple[ModelConfig, Adapter]]:
    dense, moe = tiny_config(), moe_config()
    return {
        "dense": (dense, adapter_of(dense, dropout=0.3)),
        "experts": (moe, adapter_of(moe)),
    }


def on_one_rank(world: World) -> dict[str, Any]:
    mesh, cpu = Mesh("policy", [0], {}, "cpu"), torch.device("cpu")

    def backend(model: ModelConfig, source: Any, adapter: Adapter | None = None) -> TorchBackend:
        return TorchBackend(mesh, model, source, options(), cpu, adapter=adapter)

    found = {
        name: train(backend(model, WithAdded(model, adapter), adapter))
        for name, (model, adapter) in adapters().items()
    }
    moe = moe_config()
    return {**found, "moe": train(backend(moe, LivelyCheckpoint(moe)))}


def on_two_ranks(world: World, names: dict[str, list[str]]) -> dict[str, Any]:
    moe, kinds = moe_config(), adapters()
    adapted = [tuple(name.split(", ")) for name in names["adapted"]]
    return {
        "moe": {name: train(make_backend(world, moe, EXPERTS[name])) for name in names["moe"]},
        "adapted": {
            (kind, name): train(
                make_backend(
                    world,
                    kinds[kind][0],
                    ADAPTED[name],
                    adapter=kinds[kind][1],
                    checkpoint=WithAdded(*kinds[kind]),
                )
            )
            for kind, name in adapted
        },
        "frozen": {name: frozen(world, FROZEN_ONES[name]) for name in names["frozen"]},
        "shared": {name: shared(world, int(name)) for name in names["shared"]},
    }


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(on_one_rank, 1)[0]
    return found


@pytest.fixture(scope="module")
def two(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What two ranks found, in one launch for all tests that are asked for."""
    tests = {
        "moe": "test_experts_train_as_on_torch",
        "adapted": "test_adapters_train_as_on_torch",
        "frozen": "test_frozen_parameters_and_roles",
        "shared": "test_roles_share_a_base",
    }
    names = {kind: asked(request, test) for kind, test in tests.items()}
    return run_ranks(on_two_ranks, 2, names, timeout_s=280)


@pytest.mark.full
@pytest.mark.parametrize("name", brief(EXPERTS, "3"))
def test_experts_train_as_on_torch(
    one: dict[str, Any], two: list[dict[str, Any]], name: str
) -> None:
    compare([rank["moe"][name] for rank in two], one["moe"], moe_config())


@pytest.mark.parametrize(
    "name",
    brief([f"{kind}, {n}" for kind in ("dense", "experts") for n in ADAPTED], "dense, 2"),
)
def test_adapters_train_as_on_torch(
    one: dict[str, Any], two: list[dict[str, Any]], name: str
) -> None:
    kind, layout = name.split(", ")
    model, adapter = adapters()[kind]
    compare([rank["adapted"][kind, layout] for rank in two], one[kind], model, adapter)


def frozen(world: World, made: Case) -> dict[str, Any]:
    """One step with frozen parameters on DeepSpeed and torch, and the columns of a frozen role."""
    degrees, deepspeed, _ = made
    model, rows = tiny_config(), rows_of_step(2, 2, world.rank)
    ours = make_backend(world, model, (degrees, deepspeed, {"frozen": FROZEN}))
    mesh = Mesh("policy", range(2), {"dp_replicate": 2}, "cpu")
    cpu = torch.device("cpu")
    theirs = TorchBackend(mesh, model, LivelyCheckpoint(model), options(frozen=FROZEN), cpu)
    norms = []
    for backend in (ours, theirs):
        backend.forward_backward(rows, loss_fn, next_token(1.0), normaliser=9.0)
        norms.append(backend.optim_step().grad_norm)
    reference = make_backend(world, model, made, role="reference", trainable=False)
    other = TorchBackend(mesh, model, LivelyCheckpoint(model), options(), cpu, trainable=False)
    columns = [b.forward(rows, next_token(1.0))["logprobs"] for b in (reference, other)]
    return {
        "norms": norms,
        "weights": {n: (t.clone(), s) for n, (t, s) in ours.local_tensors().items()},
        "wanted": {n: (t.clone(), s) for n, (t, s) in theirs.local_tensors().items()},
        "states": sorted(
            {n.split("/")[1].split(":")[0] for n in ours.state_tensors() if "exp" in n}
        ),
        "columns": columns,
        "parts": list(reference.parts()),
    }


@pytest.mark.parametrize("name", brief(FROZEN_ONES, "3"))
def test_frozen_parameters_and_roles(two: list[dict[str, Any]], name: str) -> None:
    shapes = global_shapes(tiny_config())
    for rank in two:
        found = rank["frozen"][name]
        assert found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-6)
        assert not LOCAL & set(found["states"]) and found["parts"] == ["weights"]
        torch.testing.assert_close(*found["columns"], rtol=1e-5, atol=1e-5)
    weights = assemble([rank["frozen"][name]["weights"] for rank in two], shapes)
    wanted = assemble([two[0]["frozen"][name]["wanted"]], shapes)
    for key, tensor in wanted.items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


def shared(world: World, stage: Any) -> dict[str, list[Tensor | float]]:
    """A policy, a value and a reference over one base, in turn; on DeepSpeed and on torch."""
    model = tiny_config()
    rows, found = rows_of_step(0, 2, world.rank), {}
    for name in ("deepspeed", "torch"):
        made = backends(world, model, name, stage)
        policy, reference, value = made["policy"], made["reference"], made.get("value")
        assert "base" in policy.parts()
        record: list[Tensor | float] = []
        for _ in range(2):
            record.append(reference.forward(rows, next_token(1.0))["logprobs"])
            policy.forward_backward(rows, loss_fn, next_token(1.0), normaliser=9.0)
            if value is not None:
                record.append(value.forward(rows, VALUES)["values"])
                value.forward_backward(rows, value_loss, VALUES, normaliser=9.0)
                record.append(value.optim_step().grad_norm)
            record.append(policy.optim_step().grad_norm)
            record.append(policy.forward(rows, next_token(1.0))["logprobs"])
        found[name] = record
    return found


def backends(world: World, model: ModelConfig, name: str, stage: Any) -> dict[str, Any]:
    """Roles over the policy's base; under ZeRO 3 only such as read it as it is."""
    adapter, made = adapter_of(model), {}
    given: dict[str, dict[str, Any]] = {
        "policy": {"adapter": adapter, "checkpoint": WithAdded(model, adapter)},
        "value": {
            "adapter": adapter,
            "head": "score",
            "checkpoint": WithAdded(model, adapter, seed=3),
        },
        "reference": {"trainable": False, "checkpoint": WithAdded(model)},
    }
    if stage == 3:
        del given["value"]
    for role, kind in given.items():
        kind["base"] = made.get("policy")
        if name == "deepspeed":
            made[role] = make_backend(world, model, case(stage, dp_shard=2), role=role, **kind)
            continue
        mesh = Mesh(role, range(2), {"dp_replicate": 2}, "cpu")
        source, cpu = kind.pop("checkpoint"), torch.device("cpu")
        made[role] = TorchBackend(mesh, model, source, options(), cpu, **kind)
    return made


@pytest.mark.parametrize("name", brief(("1", "2", "3"), "2"))
def test_roles_share_a_base(two: list[dict[str, Any]], name: str) -> None:
    for rank in two:
        record = rank["shared"][name]
        for ours, theirs in zip(record["deepspeed"], record["torch"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
