"""Margins of device memory: the communicators of a rank, counted from placements."""

from __future__ import annotations

from pathlib import Path

import pytest

from flow_cases import write_config
from spmdrl.config.load import load_config
from spmdrl.planning.from_shapes import plan_from_shapes
from spmdrl.planning.margins import (
    NETWORK_BYTES,
    PEER_BYTES,
    RING_BYTES,
    WORKSPACE_BYTES,
    Communicator,
    Margin,
    communicators_on,
)
from spmdrl.planning.plan import RolePlan
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("margins")
    make_tiny_model(root / "model")
    return root


def planned(root: Path, words: list[str], ranks: int, node: int) -> RolePlan:
    config = load_config(write_config(root / "c.yaml", root / "model", root), words)
    return plan_from_shapes(config, ranks, node, device_type="cuda", device_bytes=80 * 10**9)


def uses(communicators: tuple[Communicator, ...]) -> dict[str, int]:
    return {own.use: own.size for own in communicators}


def test_one_gpu_has_none(root: Path) -> None:
    plan = planned(root, [], 1, 1)
    assert plan.margin.communicators == ()
    assert plan.margin.room(10**10) == 10**10 - WORKSPACE_BYTES - int(0.03 * 10**10)


def test_roles_share_those_over_the_same_ranks(root: Path) -> None:
    words = ["roles.policy.dp_shard=2", "roles.rollout.tp=2"]
    plan = planned(root, words, 4, 4)
    found = uses(plan.margin.communicators)
    # pairs of neighbours: shards, and the rollout's tensors; pairs of every second: replicas
    assert found["policy shard, rollout tp, rollout replica"] == 2
    assert found["policy dp_replicate"] == 2
    assert found["world, policy reduce, policy all"] == 4
    assert len(found) == 3


def test_messages_between_two_ranks_have_buffers_of_their_own(root: Path) -> None:
    apart = planned(root, ["roles.policy.ranks=0-1", "roles.rollout.ranks=2-3"], 4, 4)
    world = apart.margin.communicators[0]
    assert world.num_bytes == RING_BYTES + 3 * 32 * PEER_BYTES
    across = planned(root, ["roles.policy.ranks=0-1", "roles.rollout.ranks=2-3"], 4, 2)
    assert across.margin.communicators[0].num_bytes == RING_BYTES + 2 * PEER_BYTES + NETWORK_BYTES
    together = planned(root, [], 4, 4)
    assert together.margin.communicators[0].num_bytes == RING_BYTES


def test_ranks_of_one_role_have_as_many(root: Path) -> None:
    plan = planned(root, ["roles.policy.dp_shard=4", "roles.policy.tp=2"], 8, 4)
    placements = {name: spec.placement for name, spec in plan.specs.items()}
    found = [communicators_on(rank, placements, ["rollout"], plan.syncs, 4, 8) for rank in range(8)]
    assert len({tuple(own.size for own in one) for one in found}) == 1
    assert found[0] == plan.margin.communicators


def test_room_is_never_negative() -> None:
    margin = Margin(communicators=(), workspace_bytes=10**9, fragment_share=0.1)
    assert margin.room(10**8) == 0
    assert margin.room(10**10) == 8 * 10**9
