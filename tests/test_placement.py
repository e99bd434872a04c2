"""From `roles:` to ranks and degrees, and the fold into a small world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spmdrl.assemble import role_layout
from spmdrl.config import Config
from spmdrl.config_files import load_config
from spmdrl.models import config as model_config
from spmdrl.placement import place_roles, placement_table

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def config(tiny: bool = False, **roles: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "steps": 1,
            "run_dir": "runs/test",
            "model": {"path": "models/toy", "tiny": tiny},
            "roles": roles,
            "data": {"train": {"source": "x"}, "prompts_per_step": 4},
        }
    )


def places(world_size: int, tiny: bool = False, **roles: Any) -> dict[str, tuple[list[int], str]]:
    """Role -> (ranks, degrees above 1 in words)."""
    placed = place_roles(config(tiny, **roles), world_size)
    return {
        name: (
            list(p.ranks),
            " ".join(f"{axis}{n}" for axis, n in p.degrees.items() if n > 1),
        )
        for name, p in placed.items()
    }


def test_ranks_as_all_ranges_lists_and_same_as() -> None:
    assert places(
        4,
        policy={},
        reference={"ranks": "0-1, 3", "dp_replicate": 3},
        rollout={"ranks": "same as reward"},
        reward={"ranks": "same as value"},
        value={"ranks": 2},
    ) == {
        "policy": ([0, 1, 2, 3], "dp_replicate4"),
        "reference": ([0, 1, 3], "dp_replicate3"),
        "rollout": ([2], ""),
        "reward": ([2], ""),
        "value": ([2], ""),
    }


@pytest.mark.parametrize(
    ("role", "degrees"),
    [
        ({"tp": 2}, "dp_replicate4 tp2"),
        ({"tp": 2, "cp": 2}, "dp_replicate2 cp2 tp2"),
        ({"dp_shard": "all"}, "dp_shard8"),
        ({"dp_shard": "all", "tp": 2}, "dp_shard4 tp2"),
        ({"dp_shard": "all", "dp_replicate": 2}, "dp_replicate2 dp_shard4"),
        ({"dp_shard": 4}, "dp_replicate2 dp_shard4"),
    ],
)
def test_open_degrees_are_filled_in(role: dict[str, Any], degrees: str) -> None:
    assert places(8, policy=role)["policy"] == (list(range(8)), degrees)


@pytest.mark.parametrize(
    ("world_size", "role", "message"),
    [
        (2, {"tp": 4}, r"roles\.policy\.tp=4 make 4 ranks, .*ranks='all' are 2"),
        (3, {"tp": 2}, r"tp=2 make 2 ranks, .*'all' are 3"),
        (4, {"dp_replicate": 2}, r"dp_replicate=2 make 2 ranks, .*'all' are 4"),
        (2, {"ranks": "0-3", "tp": 8}, r"'0-3' names ranks \[2, 3\], but the world has 2"),
        (4, {"ranks": "1-"}, r"policy\.ranks='1-': write all"),
        (4, {"ranks": "two"}, r"policy\.ranks='two': write all"),
        (4, {"ranks": -1}, r"policy\.ranks=-1: write all"),
        (4, {"ranks": "3-1"}, r"policy\.ranks='3-1': ranks must ascend"),
        (4, {"ranks": "0,0"}, r"policy\.ranks='0,0': .*once"),
        (4, {"ranks": "2,1"}, r"policy\.ranks='2,1': .*ascend"),
        (4, {"ranks": "same as nobody"}, r"'nobody' is not another role.*\['policy'\]"),
        (4, {"ranks": "same as policy"}, r"'policy' is not another role"),
    ],
)
def test_what_does_not_fit_is_named(world_size: int, role: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_roles(config(policy=role), world_size)


def test_roles_that_name_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="not another role"):
        place_roles(config(a={"ranks": "same as b"}, b={"ranks": "same as a"}), 2)


def test_what_a_rollout_holds_is_never_sharded() -> None:
    roles = {"policy": {"dp_shard": 2, "tp": 2}, "rollout": {"dp_shard": 2, "tp": 2}}
    given = config(**roles)
    shape = model_config.parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 8,
            "hidden_size": 6,
            "intermediate_size": 4,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
    )
    placed = place_roles(given, 4)
    policy, rollout = (
        role_layout(given, placed[name], shape, name, torch.device("cpu")) for name in roles
    )
    assert [policy[rank]["norm.weight"].shape for rank in range(4)] == [(3,)] * 4
    assert [rollout[rank]["norm.weight"].shape for rank in range(4)] == [(6,)] * 4
    # neighbours are the tensor-parallel ranks
    starts = [rollout[rank]["embed_tokens.weight"].slices[0].start[0] for rank in range(4)]
    assert starts == [0, 4, 0, 4]


def test_only_a_tiny_model_is_folded() -> None:
    roles = {"policy": {"ranks": "0-3", "tp": 4}}
    assert places(2, True, **roles) == {"policy": ([0, 1], "tp2")}
    assert places(8, True, **roles) == {"policy": ([0, 1, 2, 3], "tp4")}
    with pytest.raises(ValueError, match="world has 2"):
        place_roles(config(**roles), 2)


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ({"policy": {"tp": 2}}, {"policy": ([0, 1], "tp2")}),
        ({"policy": {"tp": 4, "dp_replicate": 2}}, {"policy": ([0, 1], "tp2")}),
        ({"policy": {"dp_shard": 4, "cp": 2}}, {"policy": ([0, 1], "cp2")}),
        ({"policy": {"dp_shard": 8}}, {"policy": ([0, 1], "dp_shard2")}),
        ({"policy": {"tp": 3}}, {"policy": ([0, 1], "dp_replicate2")}),
        # two thirds of the ranks against one third: both keep a rank of their own
        (
            {"policy": {"ranks": "0-5", "tp": 2}, "rollout": {"ranks": "6-7"}},
            {"policy": ([0], ""), "rollout": ([1], "")},
        ),
        (
            {"policy": {"ranks": "0-5"}, "rollout": {"ranks": "6-7"}, "reference": {"tp": 8}},
            {"policy": ([0], ""), "rollout": ([1], ""), "reference": ([0, 1], "tp2")},
        ),
        # more disjoint roles than ranks: neighbours share
        (
            {"a": {"ranks": 0}, "b": {"ranks": 1}, "c": {"ranks": 2}, "d": {"ranks": 3}},
            {"a": ([0], ""), "b": ([0], ""), "c": ([1], ""), "d": ([1], "")},
        ),
        # the degrees of one role and the ranks of another ask for 6 ranks together
        (
            {"policy": {"ranks": "0-3"}, "rollout": {"tp": 3}},
            {"policy": ([0], ""), "rollout": ([0, 1], "dp_replicate2")},
        ),
    ],
)
def test_fold_to_two_ranks(roles: dict[str, Any], expected: dict[str, Any]) -> None:
    assert places(2, True, **roles) == expected
    ones = places(1, True, **roles)
    assert ones == {name: ([0], "") for name in roles}


def test_fold_gives_the_larger_share_more_ranks_but_never_more_than_it_had() -> None:
    roles = {"policy": {"ranks": "0-5", "tp": 2}, "rollout": {"ranks": "6-7"}}
    assert places(4, True, **roles)["policy"][0] == [0, 1, 2]
    roles = {"policy": {"ranks": "0"}, "rollout": {"ranks": "7"}}
    assert places(4, True, **roles) == {"policy": ([0], ""), "rollout": ([1], "")}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_shipped_config_folds(path: Path, world_size: int) -> None:
    placed = place_roles(load_config(path, ["model.tiny=true"]), world_size)
    for placement in placed.values():
        assert set(placement.ranks) <= set(range(world_size))
    assert placement_table(placed).count("\n") == len(placed) - 1


def test_table_aligns_names() -> None:
    table = placement_table(place_roles(config(policy={"tp": 2}, ref={"ranks": "0,2"}), 4))
    assert table.splitlines() == [
        "  policy  ranks 0-3: dp_replicate=2 x dp_shard=1 x cp=1 x tp=2",
        "  ref     ranks 0,2: dp_replicate=2 x dp_shard=1 x cp=1 x tp=1",
    ]
