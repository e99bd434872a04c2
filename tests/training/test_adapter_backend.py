"""Adapters on the train backend: layouts against one rank, roles on one base against their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from adapter_backends import make_role, mesh_of
from backend_runs import NUM_STEPS, compare, train
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from training_cases import loss_fn, make_rows, options, tiny_config

from harness import run_ranks
from spmdrl.memory.storages import distinct_storages
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.sharding import SCORE, global_shapes
from spmdrl.testing.cases import WithAdded, value_loss
from spmdrl.testing.cases import tiny_adapter as adapter_of
from spmdrl.testing.cases import tiny_experts as moe_config
from spmdrl.training.readout import VALUES, next_token
from spmdrl.weights.layout import model_layout
from spmdrl.world import World
from sweeps import swept

Case = tuple[dict[str, int], dict[str, Any]]
DENSE: dict[int, list[Case]] = {
    1: [({}, {})],
    2: [
        ({"dp_shard": 2}, {}),
        ({"dp_replicate": 2}, {"microbatch_tokens": 30}),
        ({"tp": 2}, {}),
        ({"cp": 2}, {"recompute": "layer"}),
        ({"dp_shard": 2}, {"recompute": "layer", "microbatch_tokens": 20, "blocks": 2}),
    ],
    4: [
        ({"dp_shard": 2, "tp": 2}, {}),
        ({"dp_replicate": 2, "tp": 2}, {"recompute": "layer"}),
        ({"dp_shard": 2, "cp": 2}, {"microbatch_tokens": 25}),
        ({"cp": 2, "tp": 2}, {}),
    ],
}
EXPERTS: dict[int, list[Case]] = {
    1: [({}, {"microbatch_tokens": 100})],
    2: [
        ({"dp_shard": 2, "ep": 2}, {"recompute": "layer", "microbatch_tokens": 40}),
        ({"cp": 2, "ep": 2}, {}),
        ({"tp": 2, "ep": 2}, {}),
        ({"tp": 2}, {}),
        ({"dp_shard": 2}, {"blocks": 2}),
    ],
}


ONE_FOR_ALL = {"experts": "shared"}
"""All experts of a layer share A and B."""

DROPPED: dict[int, list[Case]] = {
    1: [({}, {"seed": 7})],
    2: [
        ({"dp_shard": 2}, {"seed": 7, "recompute": "layer", "share_prompts": False}),
        ({"dp_replicate": 2}, {"seed": 7, "microbatch_tokens": 20}),
        ({"tp": 2}, {"seed": 7, "recompute": "layer"}),
        ({"cp": 2}, {"seed": 7, "microbatch_tokens": 40}),
    ],
}


def on_ranks(
    world: World, model: ModelConfig, cases: list[Case], given: dict[str, Any]
) -> list[dict[str, Any]]:
    adapter = adapter_of(model, **given)
    return [
        train(make_role(mesh_of(world, degrees), model, adapter, options(**changes)))
        for degrees, changes in cases
    ]


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Any]]:
    return {
        "dense": run_ranks(on_ranks, 1, tiny_config(), DENSE[1], {})[0][0],
        "experts": run_ranks(on_ranks, 1, moe_config(), EXPERTS[1], {})[0][0],
        "shared": run_ranks(on_ranks, 1, moe_config(), EXPERTS[1], ONE_FOR_ALL)[0][0],
        "dropped": run_ranks(on_ranks, 1, tiny_config(), DROPPED[1], {"dropout": 0.4})[0][0],
    }


@pytest.mark.parametrize(
    ("kind", "size"),
    swept(
        [("dense", 2), ("dense", 4), ("experts", 2), ("shared", 2)],
        [("experts", 2)],
    ),
)
def test_layouts_train_alike(single: dict[str, dict[str, Any]], kind: str, size: int) -> None:
    """Losses, norms, weights and moments of several steps; the base does not change."""
    model, cases = (
        (tiny_config(), DENSE[size]) if kind == "dense" else (moe_config(), EXPERTS[size])
    )
    given = ONE_FOR_ALL if kind == "shared" else {}
    results = run_ranks(on_ranks, size, model, cases, given, timeout_s=200)
    adapter = adapter_of(model, **given)
    for number, (degrees, _) in enumerate(cases):
        print(degrees)
        compare([ranks[number] for ranks in results], single[kind], model, adapter)


@pytest.mark.full
def test_dropout_does_not_depend_on_the_layout(single: dict[str, dict[str, Any]]) -> None:
    model, expected = tiny_config(), single["dropped"]
    results = run_ranks(on_ranks, 2, model, DROPPED[2], {"dropout": 0.4}, timeout_s=200)
    for number, (degrees, _) in enumerate(DROPPED[2]):
        print(degrees)
        compare([ranks[number] for ranks in results], expected, model, adapter_of(model))
    plain = single["dense"]
    assert torch.equal(expected["before"], plain["before"]), "no pass but an update drops"
    for (sums, done), (others, other) in zip(expected["steps"], plain["steps"], strict=True):
        assert abs(sums["loss"] - others["loss"]) > 1e-3
        assert abs(done.grad_norm / other.grad_norm - 1) > 1e-3


def lacking(world: World) -> None:
    model = tiny_config()
    adapter = adapter_of(model, dropout=0.1)
    backend = make_role(mesh_of(world, {}), model, adapter, options())
    rows = make_rows([4], 2)
    rows = replace(rows, rows={n: c for n, c in rows.rows.items() if n != "sample_index"})
    backend.forward(rows, next_token())
    with pytest.raises(ValueError, match=r"policy\.adapter\.dropout=0\.1 needs .*'sample_index'"):
        backend.forward_backward(rows, loss_fn, next_token(), normaliser=1.0)


def test_dropout_needs_to_know_the_samples() -> None:
    run_ranks(lacking, 1)


CUT_TWICE = {"num_key_value_heads": 4, "vocab_size": 100}


def experts_cut_twice(world: World) -> list[dict[str, Any]]:
    """Parts of the experts over two pairs of tp ranks, which divide each expert."""
    degrees = {"tp": 4, "ep": 2} if world.size > 1 else {}
    model = moe_config(**CUT_TWICE)
    return [
        train(make_role(mesh_of(world, degrees), model, adapter, options()))
        for adapter in cut_twice(model)
    ]


def cut_twice(model: ModelConfig) -> list[Adapter]:
    return [adapter_of(model, "experts", "o_proj", **given) for given in ({}, ONE_FOR_ALL)]


@pytest.mark.full
def test_shares_of_an_experts_gradients_are_summed() -> None:
    model = moe_config(**CUT_TWICE)
    [wanted] = run_ranks(experts_cut_twice, 1)
    found = run_ranks(experts_cut_twice, 4, timeout_s=200)
    for number, adapter in enumerate(cut_twice(model)):
        compare([ranks[number] for ranks in found], wanted[number], model, adapter)


def test_only_the_adapter_changes_and_has_state(single: dict[str, dict[str, Any]]) -> None:
    record, model = single["dense"], tiny_config()
    source = WithAdded(model, adapter_of(model))
    for name, (tensor, slices) in record["weights"].items():
        before = torch.cat([source.read(piece) for piece in slices])
        assert torch.equal(tensor, before) == ("lora" not in name), name
    assert record["state"] and all("lora" in name for name in record["state"])
    assert len(record["steps"]) == NUM_STEPS


def over_one_base(world: World, degrees: dict[str, int], changes: dict[str, Any]) -> None:
    """Policy, value and reference in turn, on one base and on bases of their own."""
    model, given = tiny_config(), options(**changes)
    mesh = mesh_of(world, degrees)
    wide, narrow = adapter_of(model), adapter_of(model, "attention", rank=2)
    policy = make_role(mesh, model, wide, given, seed=1)
    value = make_role(mesh, model, narrow, given, seed=2, head="score", base=policy)
    reference = make_role(mesh, model, None, given, trainable=False, base=policy)
    own_policy = make_role(mesh, model, wide, given, seed=1)
    own_value = make_role(mesh, model, narrow, given, seed=2, head="score")
    own_reference = make_role(mesh, model, None, given, trainable=False)
    pairs = [(policy, own_policy), (value, own_value), (reference, own_reference)]

    rows = make_rows([6, 3, 9], 2, seed=mesh.coordinate("dp"))
    lm, seen = next_token(0.8), []
    for _ in range(2):
        for one, other in pairs:
            readout = VALUES if one.head == "score" else lm
            (column,) = readout.columns[:1]
            found, expected = (each.forward(rows, readout)[column] for each in (one, other))
            assert torch.equal(found, expected)
            seen.append(found)
            if one is reference:
                continue
            loss = value_loss if one.head == "score" else loss_fn
            sums = [
                each.forward_backward(rows, loss, readout, normaliser=9.0) for each in (one, other)
            ]
            done = [each.optim_step() for each in (one, other)]
            assert sums[0] == sums[1] and done[0] == done[1]
            assert done[0].grad_norm > 0
    assert torch.equal(seen[2], seen[5]), "the reference stays"
    for one, other in pairs:
        assert one.local_tensors().keys() == other.local_tensors().keys()
        for name, (tensor, slices) in other.local_tensors().items():
            assert torch.equal(one.local_tensors()[name][0], tensor), name
            assert one.local_tensors()[name][1] == slices
        assert one.state_tensors().keys() == other.state_tensors().keys()


SHARED: list[Case] = [
    ({}, {}),
    ({}, {"param_dtype": torch.bfloat16, "recompute": "layer"}),
    ({"dp_shard": 2}, {}),
    ({"dp_shard": 2}, {"param_dtype": torch.bfloat16, "recompute": "layer"}),
    ({"tp": 2}, {"param_dtype": torch.bfloat16}),
]


def all_over_one_base(world: World, cases: list[Case]) -> None:
    for degrees, changes in cases:
        over_one_base(world, degrees, changes)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.full)])
def test_roles_on_one_base_do_what_they_do_on_their_own(size: int) -> None:
    cases = [case for case in SHARED if next(iter(case[0].values()), 1) == size]
    run_ranks(all_over_one_base, size, cases)


def storages(tensors: Any) -> set[int]:
    return {storage._cdata for storage in distinct_storages(tensors)}


def parts_of_roles(world: World) -> None:
    model, given = tiny_config(), options(param_dtype=torch.bfloat16)
    mesh = mesh_of(world, {})
    adapter = adapter_of(model)
    policy = make_role(mesh, model, adapter, given)
    value = make_role(mesh, model, adapter, given, head="score", base=policy)
    reference = make_role(mesh, model, None, given, trainable=False, base=policy)
    base = policy.parts()["base"]
    assert len(storages(base)) == len(global_shapes(model)) - 2 * 2 - 2  # fused: q, k, v; gate, up
    assert sum(tensor.numel() for tensor in base) == sum(
        torch.Size(shape).numel() for shape in global_shapes(model).values()
    )
    assert all(tensor.dtype == torch.bfloat16 for tensor in base)
    for role in (value, reference):
        weights = role.parts()["weights"]
        assert storages(weights[: len(base)]) == storages(base)
        own = storages(weights[len(base) :])
        assert not own & storages(policy.parts()["weights"])
        assert len(own) == (0 if role is reference else len(policy.parts()["weights"]) + 1)
    assert "optimizer" not in reference.parts() and reference.state_tensors() == {}
    for role in (policy, value):
        held = {name.partition("/")[2] for name in role.state_tensors()}
        assert {name for name in held if "lora" not in name} == (
            {"head.weight"} if role is value else set()
        )
        assert all(t.dtype == torch.float32 for t, _ in role.state_tensors().values())
        # masters and two moments
        own = sum(t.numel() for t in role.parts()["weights"])
        own -= sum(t.numel() for t in base) if role is value else 0
        assert sum(t.numel() for t in role.parts()["optimizer"]) == 3 * own
    names = {s.name for _, slices in value.local_tensors().values() for s in slices}
    assert SCORE in names and "lm_head.weight" not in names


def test_a_shared_base_is_counted_once() -> None:
    run_ranks(parts_of_roles, 1)


def layouts_agree(world: World, cases: list[Case]) -> None:
    """The computed layout of every role, against what its backend holds."""
    for model in (tiny_config(), moe_config()):
        adapter = adapter_of(model, "attention")
        for degrees, changes in cases:
            mesh = mesh_of(world, degrees)
            given = options(param_dtype=torch.bfloat16, **changes)
            policy = make_role(mesh, model, adapter, given)
            for backend in (
                policy,
                make_role(mesh, model, adapter, given, head="score", base=policy),
                make_role(mesh, model, adapter, given, head="score"),
                make_role(mesh, model, None, given, trainable=False),
            ):
                table = model_layout(
                    model,
                    range(world.size),
                    degrees,
                    torch.bfloat16,
                    head=backend.head,
                    blocks=changes.get("blocks", 1),
                    adapter=None if backend.state_tensors() == {} else adapter,
                )[world.rank]
                tensors = backend.local_tensors()
                assert set(tensors) == set(table)
                for name, held in table.items():
                    tensor, slices = tensors[name]
                    assert (tuple(tensor.shape), tensor.dtype, slices) == (
                        held.shape,
                        held.dtype,
                        held.slices,
                    ), name


@pytest.mark.parametrize("size", [1, 2])
def test_layouts_are_those_that_plans_compute(size: int) -> None:
    cases: list[Case] = [({}, {})]
    if size == 2:
        cases = [({"dp_shard": 2}, {}), ({"dp_shard": 2}, {"blocks": 2}), ({"tp": 2}, {})]
    run_ranks(layouts_agree, size, cases)


def frozen(world: World) -> None:
    model, mesh = tiny_config(), mesh_of(world, {})
    adapter, rows = adapter_of(model), make_rows([4, 6], 2)
    trains = make_role(mesh, model, adapter, options())
    stays = make_role(mesh, model, adapter, options(), trainable=False)
    plain = make_role(mesh, model, None, options(), trainable=False, base=stays)
    found, expected, other = (
        each.forward(rows, next_token())["logprobs"] for each in (stays, trains, plain)
    )
    assert torch.equal(found, expected) and not torch.allclose(found, other, atol=0.1)
    assert stays.state_tensors() == {} and set(stays.parts()) == {"base", "weights"}
    with pytest.raises(ValueError, match="'policy' is frozen"):
        stays.forward_backward(rows, loss_fn, next_token(), normaliser=1.0)


def refused(world: World) -> None:
    model, mesh = tiny_config(), mesh_of(world, {})
    adapter = adapter_of(model)
    whole = make_role(mesh, model, None, options())
    with pytest.raises(ValueError, match=r"roles\.policy\.base.*trains its weights: give it"):
        make_role(mesh, model, adapter, options(), base=whole)
    still = make_role(mesh, model, None, options(), trainable=False, head="score")
    with pytest.raises(ValueError, match=r"it would train the weights it borrows: give it"):
        make_role(mesh, model, None, options(), base=still, head="score")
    with pytest.raises(ValueError, match=r"without a language model's head"):
        make_role(mesh, model, adapter, options(), base=still)


def test_frozen_adapters_and_bases_that_cannot_be_shared() -> None:
    run_ranks(frozen, 1)
    run_ranks(refused, 1)


def collectives(world: World, degrees: dict[str, int]) -> dict[str, int]:
    """Collectives of one optimizer step in several microbatches, by name."""
    model, mesh = tiny_config(), mesh_of(world, degrees)
    backend = make_role(mesh, model, adapter_of(model), options(microbatch_tokens=20))
    rows = make_rows([5, 6], 3, seed=mesh.coordinate("dp"))
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            backend.forward_backward(rows, loss_fn, next_token(1.0), normaliser=9.0)
            backend.optim_step()
    return {event.key: event.count for event in seen.key_averages()}


def test_a_step_reduces_the_adapter_once_and_the_base_never() -> None:
    counts = run_ranks(collectives, 2, {"dp_shard": 2})[0]
    assert not sum(n for op, n in counts.items() if "reduce_scatter" in op), counts
    # the number of microbatches, the gradients, their norm
    assert counts["c10d::allreduce_"] == 3, counts


def kept_shapes(world: World) -> list[set[tuple[int, ...]]]:
    """Shapes of what is kept for the backward pass when all trains, and over a fixed base."""
    found = []
    for model in (tiny_config(), moe_config()):
        for adapter in (None, adapter_of(model, "q_proj")):
            backend = make_role(mesh_of(world, {}), model, adapter, options())
            seen: set[tuple[int, ...]] = set()

            def pack(tensor: Tensor, into: set[tuple[int, ...]] = seen) -> Tensor:
                into.add(tuple(tensor.shape))
                return tensor

            with saved_tensors_hooks(pack, lambda tensor: tensor):
                backend.forward_backward(
                    make_rows([5, 6], 3), loss_fn, next_token(), normaliser=9.0
                )
            found.append(seen)
    return found


def test_a_fixed_base_keeps_no_inputs_of_its_products() -> None:
    """The widths are those of the down projections' inputs."""
    [(dense, over_dense, experts, over_experts)] = run_ranks(kept_shapes, 1)
    for shapes, base, width in ((dense, over_dense, 48), (experts, over_experts, 16)):
        assert any(shape[0] > 32 and shape[1:] == (width,) for shape in shapes)
        assert not any(shape[0] > 32 and shape[1:] == (width,) for shape in base), base
