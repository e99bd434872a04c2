"""`Mesh`: groups, coordinates and replicas, on members and outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from harness import run_ranks
from spmdrl.distributed.groups import ProcessGroups
from spmdrl.distributed.mesh import (
    Mesh,
    check_ranks,
    coordinates,
    format_ranks,
    group_backend,
)
from spmdrl.world import World


def describe(world: World) -> dict[str, Any]:
    mesh = Mesh("policy", [0, 1, 2, 3], {"dp_replicate": 2, "tp": 2}, "cpu")
    part = Mesh("reward", [1, 3], {"dp_shard": 2}, "cpu")
    alone = Mesh("value", [2], {}, "cpu")
    axes = ("tp", "dp", "replica", "all")
    seen: dict[str, Any] = {
        "ranks": {a: dist.get_process_group_ranks(mesh.group(a)) for a in axes},
        "places": {a: mesh.coordinate(a) for a in axes},
        "same": {a: mesh.coordinate(a) == dist.get_rank(mesh.group(a)) for a in axes},
        "sizes": [part.size("shard"), part.size("dp"), alone.size("all")],
        "replicas": [mesh.replicas(), part.replicas(), alone.replicas()],
        "member": [mesh.is_member, part.is_member, alone.is_member],
    }
    if part.is_member:
        assert part.shard_mesh is not None
        seen["shard"] = part.shard_mesh.get_local_rank()
    else:
        with pytest.raises(ValueError, match=r"role 'reward' \(ranks 1,3\).*'shard'"):
            part.group("shard")
        with pytest.raises(ValueError, match="role 'reward'"):
            part.coordinate("tp")
        with pytest.raises(ValueError, match="role 'reward'"):
            _ = part.shard_mesh
    if alone.is_member:
        assert alone.group("tp") is None
        assert alone.coordinate("dp") == 0
        assert alone.shard_mesh is None
    return seen


def test_groups_and_coordinates_on_four_ranks() -> None:
    results = run_ranks(describe, 4)
    assert [r["ranks"]["tp"] for r in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["ranks"]["dp"] for r in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [r["ranks"]["replica"] for r in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["places"]["tp"] for r in results] == [0, 1, 0, 1]
    assert [r["places"]["dp"] for r in results] == [0, 0, 1, 1]
    assert [r["places"]["all"] for r in results] == [0, 1, 2, 3]
    for rank, result in enumerate(results):
        assert all(result["same"].values())
        assert result["sizes"] == [2, 2, 1]
        assert result["replicas"] == [[(0, 1), (2, 3)], [(1,), (3,)], [(2,)]]
        assert result["member"] == [True, rank in (1, 3), rank == 2]
    assert [r.get("shard") for r in results] == [None, 0, None, 1]


def sharded(world: World) -> list[Any]:
    mesh = Mesh("policy", [0, 1, 2, 3], {"dp_replicate": 2, "dp_shard": 2}, "cpu")
    assert mesh.shard_mesh is not None
    both = Mesh("policy", [0, 1, 2, 3], {"dp_shard": 2, "cp": 2}, "cpu")
    assert both.shard_mesh is not None
    return [
        mesh.shard_mesh.mesh.tolist(),
        mesh.shard_mesh.mesh_dim_names,
        both.shard_mesh.mesh.tolist(),
        both.replicas(),
        mesh.coordinate("shard") == mesh.shard_mesh["shard"].get_local_rank(),
        both.coordinate("shard") == both.shard_mesh.get_local_rank(),
    ]


def test_the_mesh_that_fsdp_takes() -> None:
    expected = [
        [[0, 1], [2, 3]],
        ("replicate", "shard"),
        [0, 1, 2, 3],
        [(0, 1), (2, 3)],
        True,
        True,
    ]
    assert run_ranks(sharded, 4) == [expected] * 4


def shared(world: World) -> list[bool]:
    groups = ProcessGroups()
    everyone, degrees = list(range(world.size)), {"dp_shard": 2, "tp": 2}
    policy = Mesh("policy", everyone, degrees, "cpu", groups)
    made = len(groups)
    value = Mesh("value", everyone, {"dp_shard": 2, "cp": 2}, "cpu", groups)
    assert policy.shard_mesh is not None and value.shard_mesh is not None
    return [
        len(groups) == made,
        policy.group("tp") is value.group("cp"),
        policy.group("all") is value.shard_mesh.get_group() is dist.group.WORLD,
        policy.shard_mesh.get_group() is policy.group("dp"),
        policy.group("dp") is groups.over([world.rank % 2, world.rank % 2 + 2]),
        groups.over([1, 2]) is groups.over((1, 2)),
    ]


def test_ranks_share_one_group_across_axes_and_roles() -> None:
    assert run_ranks(shared, 4) == [[True] * 6] * 4


def of_experts(world: World) -> list[Any]:
    seen = []
    for degrees in (
        {"dp_replicate": 2, "tp": 2, "ep": 2},
        {"dp_replicate": 2, "tp": 2, "ep": 4},
        {"dp_shard": 4, "ep": 2},
        {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
    ):
        mesh = Mesh("policy", [0, 1, 2, 3], degrees, "cpu")
        groups = {}
        for axis in ("ep", "edp", "exchange", "etp"):
            group = mesh.group(axis)
            groups[axis] = [world.rank] if group is None else dist.get_process_group_ranks(group)
            assert len(groups[axis]) == mesh.size(axis)
            assert groups[axis][mesh.coordinate(axis)] == world.rank
        shards = mesh.expert_shard_mesh
        seen.append((groups, None if shards is None else shards.mesh.tolist()))
    return seen


def test_expert_axes_fold_into_the_others() -> None:
    found = run_ranks(of_experts, 4)
    first = [result[0][0] for result in found]
    # parts on tp first: the ranks of a tp group hold different experts, nothing is exchanged
    assert [g["ep"] for g in first] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [g["edp"] for g in first] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [g["exchange"] for g in first] == [[0], [1], [2], [3]]
    second = [result[1][0] for result in found]
    assert [g["ep"] for g in second] == [[0, 1, 2, 3]] * 4
    assert [g["exchange"] for g in second] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [g["edp"] for g in second] == [[0], [1], [2], [3]]
    third = [result[2] for result in found]
    assert [g["exchange"] for g, _ in third] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [shards for _, shards in third] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    # what is sharded over two ranks is replicated over two: each expert on one rank of a shard
    assert [result[3][1] for result in found] == [[[0], [2]], [[1], [3]], [[0], [2]], [[1], [3]]]


BOTH = "cpu:gloo,cuda:nccl"


@pytest.mark.parametrize(
    ("device_type", "world_backend", "expected"),
    [
        ("cuda", BOTH, None),
        ("cpu", BOTH, None),
        ("cuda", "cpu:gloo,cuda:gloo,xpu:gloo", BOTH),
        ("cpu", "cpu:gloo,cuda:gloo,xpu:gloo", None),
    ],
)
def test_a_mesh_has_the_backend_of_its_devices(
    device_type: str, world_backend: str, expected: str | None
) -> None:
    assert group_backend(device_type, world_backend) == expected


def groups_of_a_world_with_few_gpus(world: World) -> list[Any]:
    """A role that computes on GPUs, as ranks without one see it; then one on all ranks."""
    assert "nccl" not in dist.get_backend_config()
    gpus = Mesh("policy", [0], {}, "cuda")
    # on a member torch would look for its GPU, so they make the mesh's only group by hand
    far = Mesh("far", [0, 1], {"dp_shard": 2}, "cuda") if world.rank == 2 else None
    if far is None:
        dist.new_group([0, 1])
    everyone = Mesh("reward", [0, 1, 2], {"dp_shard": 3}, "cpu")
    assert everyone.shard_mesh is not None
    total = torch.tensor([world.rank])
    dist.all_reduce(total, group=everyone.shard_mesh.get_group())
    dist.all_reduce(total, group=everyone.group("shard"))
    return [gpus.is_member, far is not None and far.is_member, total.item()]


def test_a_rank_outside_makes_the_groups_of_a_cuda_mesh() -> None:
    results = run_ranks(groups_of_a_world_with_few_gpus, 3)
    assert results == [[True, False, 9], [False, False, 9], [False, False, 9]]


@pytest.mark.parametrize(
    ("ranks", "degrees", "message"),
    [
        ([0, 4], {"tp": 2}, r"roles\.a\.ranks names ranks \[4\].*0-3"),
        ([1, 0], {"tp": 2}, r"roles\.a\.ranks must ascend.*\[1, 0\]"),
        ([1, 1], {"tp": 2}, "name each rank once"),
        ([], {}, "must ascend"),
        ([0, 1], {"xp": 2}, r"unknown axes \['xp'\]"),
        ([0, 1, 2], {"dp_replicate": 3, "ep": 2}, r"roles\.a\.ep=2 .* dp x cp, which are 3"),
        (
            [0, 1, 2, 3],
            {"dp_replicate": 2, "dp_shard": 2, "ep": 4},
            r"ep=4 with tp=1 leaves 4 parts .* dp_shard x cp, which are 2.* divides 2",
        ),
        ([0, 1, 2], {"tp": 2}, r"tp=2 make 2 ranks, .*names 3 \(0-2\)"),
        ([0, 1], {}, "degrees of 1 make 1 ranks, .*names 2"),
    ],
)
def test_ranks_and_degrees_that_do_not_fit(
    ranks: list[int], degrees: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_ranks("a", ranks, degrees, 4)


def test_coordinates_and_ranks_in_words() -> None:
    places = coordinates({"dp_shard": 2, "tp": 2})
    assert [(p["dp_shard"], p["tp"], p["cp"]) for p in places] == [
        (0, 0, 0),
        (0, 1, 0),
        (1, 0, 0),
        (1, 1, 0),
    ]
    assert format_ranks([0, 1, 2, 5]) == "0-2,5"
    assert format_ranks([]) == "none"


def collectives(world: World) -> list[Any]:
    """Values and gradients of the differentiable collectives, by hand on two ranks."""
    from spmdrl.distributed.parallel import copy_to, gather_own_grad, gather_sum_grad, reduce_from

    group = dist.new_group([0, 1])
    scale = float(world.rank + 1)
    seen = []
    for function in (copy_to, reduce_from, gather_sum_grad, gather_own_grad):
        x = torch.tensor([[1.0, 2.0]]) * scale
        x.requires_grad_()
        out = function(x, group)
        weight = torch.arange(1.0, out.numel() + 1).reshape(out.shape) * scale
        (out * weight).sum().backward()
        assert x.grad is not None
        seen.append((out.tolist(), x.grad.tolist()))
        assert function(x, None) is x
    return seen


def test_differentiable_collectives_by_hand() -> None:
    first, second = run_ranks(collectives, 2)
    both = [[1.0, 2.0], [2.0, 4.0]]
    assert first == [
        ([[1, 2]], [[3, 6]]),
        ([[3, 6]], [[1, 2]]),
        (both, [[3, 6]]),
        (both, [[1, 2]]),
    ]
    assert second == [
        ([[2, 4]], [[3, 6]]),
        ([[3, 6]], [[2, 4]]),
        (both, [[9, 12]]),
        (both, [[6, 8]]),
    ]
