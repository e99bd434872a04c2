"""From `roles:` to ranks and degrees, and the fold into a small world."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from role_specs import specs_of
from spmdrl.config.load import load_config
from spmdrl.config.sections import Config
from spmdrl.models import config as model_config
from spmdrl.placement import (
    fold_text,
    kept_megatron,
    place_roles,
    placement_table,
    role_device_type,
)
from spmdrl.planning.layouts import role_layout

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("**/[!_]*.yaml"))
CONFIGS = [path for path in CONFIGS if path.parent.name != "methods"]


def config(fold: bool = False, *, tiny: bool = False, **roles: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "steps": 1,
            "run_dir": "runs/test",
            "fold": fold,
            "model": {"path": "models/toy", "tiny": tiny},
            "roles": roles,
            "data": {"train": {"source": "x"}, "prompts_per_step": 4},
        }
    )


def places(
    world_size: int,
    fold: bool = False,
    *,
    tiny: bool = False,
    local_size: int | None = None,
    **roles: Any,
) -> dict[str, tuple[list[int], str]]:
    """Role -> (ranks, degrees above 1 in words)."""
    placed = place_roles(config(fold, tiny=tiny, **roles), world_size, local_size)
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
        ({"dp_shard": 4, "ep": 4}, "dp_replicate2 dp_shard4 ep4"),
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
        (4, {"ep": 3}, r"roles\.policy\.ep=3 with tp=1 leaves 3 parts .* dp x cp, which are 4"),
        (4, {"tp": 2, "dp_shard": 2, "ep": 8}, r"ep=8 with tp=2 leaves 4 .* which are 2"),
        (4, {"ranks": "1-"}, r"policy\.ranks='1-': write all"),
        (4, {"ranks": "two"}, r"policy\.ranks='two': write all"),
        (4, {"ranks": -1}, r"policy\.ranks=-1: write all"),
        (4, {"ranks": "3-1"}, r"policy\.ranks='3-1': ranks must ascend"),
        (4, {"ranks": "0,0"}, r"policy\.ranks='0,0': .*once"),
        (4, {"ranks": "2,1"}, r"policy\.ranks='2,1': .*ascend"),
        (4, {"ranks": "nodes"}, r"policy\.ranks='nodes': write all"),
        (4, {"ranks": "nodes a"}, r"policy\.ranks='nodes a': write all, .*nodes 0-1"),
        (4, {"ranks": "nodes 1,0"}, r"policy\.ranks='nodes 1,0': .*ascend"),
        (4, {"ranks": "nodes 1"}, r"'nodes 1' names ranks \[4, 5, 6, 7\], .* has 4 \(0-3\), 4 per"),
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
            "hidden_size": 8,
            "intermediate_size": 4,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
    )
    specs = specs_of(given, shape, 4)
    policy, rollout = (role_layout(specs[name]) for name in roles)
    name = "layers.0.mlp.down.weight"
    assert [policy[rank][name].shape for rank in range(4)] == [(4, 2)] * 4
    assert [rollout[rank][name].shape for rank in range(4)] == [(8, 2)] * 4
    # neighbours are the tensor-parallel ranks
    starts = [rollout[rank]["embed_tokens.weight"].slices[0].start[0] for rank in range(4)]
    assert starts == [0, 4, 0, 4]


def test_a_fold_is_asked_for() -> None:
    roles = {"policy": {"ranks": "0-3", "tp": 4}}
    assert places(2, fold=True, **roles) == {"policy": ([0, 1], "tp2")}
    assert places(8, fold=True, **roles) == {"policy": ([0, 1, 2, 3], "tp4")}
    # a tiny model is folded as well, to what divides its layers and heads
    assert places(2, tiny=True, **roles) == {"policy": ([0, 1], "tp2")}
    assert places(8, tiny=True, **roles) == {"policy": ([0, 1, 2, 3], "dp_replicate2 tp2")}
    for world_size, message in ((2, r"ranks='0-3'.* world has 2 .*--fold"), (3, "--fold")):
        with pytest.raises(ValueError, match=message):
            place_roles(config(**roles), world_size)


def test_degrees_that_do_not_fit_name_the_fold() -> None:
    with pytest.raises(ValueError, match=r"tp=4 make 4 ranks, .*'all' are 6: .*--fold"):
        place_roles(config(policy={"tp": 4}), 6)


@pytest.mark.parametrize(
    ("world_size", "role", "expected"),
    [
        # for 8, the next number of ranks that tp divides
        (6, {"tp": 4}, ([0, 1, 2, 3, 4, 5], "dp_replicate3 tp2")),
        (7, {"tp": 4, "dp_shard": "all"}, ([0, 1, 2, 3, 4, 5, 6], "dp_shard7")),
        # for 4 and no other number: two ranks have no role
        (6, {"tp": 4, "dp_replicate": 1}, ([0, 1, 2, 3], "tp4")),
        # weights stay sharded: the whole model may not fit on a rank
        (3, {"dp_shard": 4}, ([0, 1, 2], "dp_shard3")),
        (6, {"dp_shard": 4, "dp_replicate": 2}, ([0, 1, 2, 3, 4, 5], "dp_replicate2 dp_shard3")),
        (2, {"pp": 4, "cp": 2}, ([0, 1], "pp2")),
        (4, {"pp": 4, "cp": 2, "tp": 2}, ([0, 1, 2, 3], "pp2 tp2")),
        (3, {"pp": 4}, ([0, 1, 2], "dp_replicate3")),
    ],
)
def test_any_number_of_ranks_is_used(
    world_size: int, role: dict[str, Any], expected: tuple[list[int], str]
) -> None:
    assert places(world_size, fold=True, policy=role) == {"policy": expected}


def test_a_fold_keeps_tp_groups_within_nodes() -> None:
    role = {"tp": 4, "dp_shard": "all"}
    assert places(8, True, local_size=2, policy=role)["policy"][1] == "dp_shard4 tp2"
    assert places(4, True, local_size=1, policy=role)["policy"][1] == "dp_shard4"
    role["tp_across_nodes"] = True
    assert places(8, True, local_size=2, policy=role)["policy"][1] == "dp_shard2 tp4"
    with_base = {"policy": role, "reference": {"tp": 4, "dp_shard": "all", "base": "policy"}}
    placed = places(8, True, local_size=2, **with_base)
    assert placed["policy"] == placed["reference"]


def test_a_fold_is_told_in_one_line() -> None:
    roles: dict[str, Any] = {
        "policy": {"ranks": "0-7", "tp": 2, "dp_shard": "all"},
        "value": {"ranks": "same as policy", "tp": 2, "dp_shard": "all"},
        "reference": {"ranks": "8-15", "tp": 2},
        "rollout": {"ranks": "all", "tp": 2},
    }
    told = {n: fold_text(c, place_roles(c, n), n) for c in [config(True, **roles)] for n in (2, 16)}
    assert told == {
        2: "folded from 16 ranks to 2: policy, value: ranks 0-7 -> 0, dp_shard 4 -> 1, tp 2 -> 1; "
        "reference: ranks 8-15 -> 1, dp_replicate 4 -> 1, tp 2 -> 1; "
        "rollout: ranks 0-15 -> 0-1, dp_replicate 8 -> 1",
        16: None,
    }
    few = config(True, policy={"tp": 4, "dp_replicate": 1})
    assert fold_text(few, place_roles(few, 4), 4) is None
    assert fold_text(few, place_roles(few, 6), 6) is None
    few = config(True, policy={"ranks": "0-1"}, rollout={"ranks": "2", "tp": 1})
    assert fold_text(few, place_roles(few, 2), 2) == (
        "folded from 3 ranks to 2: policy: ranks 0-1 -> 0, dp_replicate 2 -> 1; "
        "rollout: ranks 2 -> 1"
    )


def test_megatrons_settings_fold_with_their_axes() -> None:
    role = {"pp": 2, "tp": 2, "megatron": {"vpp": 4, "sp": True}, "train": {"backend": "megatron"}}
    given = config(True, policy=role)
    section = given.roles["policy"]
    kept = {n: kept_megatron(section, place_roles(given, n)["policy"]) for n in (1, 2, 4)}
    assert kept == {1: {}, 2: {"sp": True}, 4: {"vpp": 4, "sp": True}}
    assert fold_text(given, place_roles(given, 1), 1) == (
        "folded from 4 ranks to 1: policy: ranks 0-3 -> 0, pp 2 -> 1, tp 2 -> 1, "
        "megatron.vpp 4 -> 1, megatron.sp true -> false"
    )


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
    placed = place_roles(load_config(path, ["fold=true"]), world_size)
    for placement in placed.values():
        assert set(placement.ranks) <= set(range(world_size))
    assert placement_table(placed).count("\n") == len(placed)


def test_expert_parallelism_folds_to_what_divides_the_ranks() -> None:
    roles: dict[str, Any] = {
        "policy": {"dp_shard": "all", "ep": 8},
        "rollout": {"tp": 4, "ep": 4},
        "value": {"tp": 2, "dp_replicate": 4, "ep": 8},
    }
    assert places(2, fold=True, **roles) == {
        "policy": ([0, 1], "dp_shard2 ep2"),
        "rollout": ([0, 1], "tp2 ep2"),
        "value": ([0, 1], "tp2 ep2"),
    }
    assert places(1, fold=True, **roles)["policy"] == ([0], "")


def test_table_aligns_names() -> None:
    placed = place_roles(config(policy={"tp": 2}, ref={"ranks": "0,2"}), 4)
    assert placement_table(placed).splitlines() == [
        "  role    ranks  dp_replicate  dp_shard  cp  tp",
        "  policy  0-3               2         1   1   2",
        "  ref     0,2               2         1   1   1",
    ]
    stages = place_roles(config(policy={"tp": 2, "pp": 2}), 4)
    row = "  policy  0-3     2             1         1   1   2"
    assert placement_table(stages).splitlines()[1] == row
    experts = place_roles(config(policy={"tp": 2, "ep": 4}, ref={"ranks": "0,2"}), 4)
    assert placement_table(experts).splitlines()[:2] == [
        "  role    ranks  dp_replicate  dp_shard  cp  tp  ep",
        "  policy  0-3               2         1   1   2   4",
    ]
    assert placement_table(placed, {"policy": "weights keep"}).splitlines() == [
        "  role    ranks  dp_replicate  dp_shard  cp  tp  memory",
        "  policy  0-3               2         1   1   2  weights keep",
        "  ref     0,2               2         1   1   1",
    ]


def test_nodes_are_ranks_by_the_number_of_ranks_per_node() -> None:
    roles: dict[str, Any] = {
        "policy": {"ranks": "nodes 0,2", "dp_shard": "all"},
        "rollout": {"ranks": "nodes 1-2", "tp": 2},
        "reference": {"ranks": "same as rollout"},
    }
    assert places(6, local_size=2, **roles) == {
        "policy": ([0, 1, 4, 5], "dp_shard4"),
        "rollout": ([2, 3, 4, 5], "dp_replicate2 tp2"),
        "reference": ([2, 3, 4, 5], "dp_replicate4"),
    }
    # without a number all ranks are one node
    assert places(3, policy={"ranks": "nodes 0"}) == {"policy": ([0, 1, 2], "dp_replicate3")}
    with pytest.raises(ValueError, match=r"names ranks \[4, 5\], .*has 4 \(0-3\), 2 per node"):
        place_roles(config(**roles), 4, 2)


@pytest.mark.parametrize(
    ("local_size", "role", "group", "nodes"),
    [
        (2, {"tp": 4}, "0-3", "0-1"),
        (1, {"tp": 2}, "0-1", "0-1"),
        # as many ranks as a node has, but not the ranks of one node
        (4, {"ranks": "2-5", "tp": 4}, "2-5", "0-1"),
        (4, {"ranks": "0,1,3,4", "tp": 2}, "3-4", "0-1"),
        (2, {"ranks": "0,1,2,7", "tp": 2}, "2,7", "1,3"),
    ],
)
def test_a_tp_group_over_several_nodes_must_be_asked_for(
    local_size: int, role: dict[str, Any], group: str, nodes: str
) -> None:
    with pytest.raises(ValueError, match=r"roles\.policy\.tp_across_nodes=true") as caught:
        place_roles(config(policy=role), 8, local_size)
    message = str(caught.value)
    assert f"roles.policy.tp={role['tp']} " in message
    assert f"{local_size} per node" in message
    assert f"group {group} on the nodes {nodes}," in message
    asked = config(policy={**role, "tp_across_nodes": True})
    assert place_roles(asked, 8, local_size)["policy"].degrees["tp"] == role["tp"]


def test_tp_groups_inside_nodes_and_other_axes_across_them_are_fine() -> None:
    role = {"tp": 2, "cp": 2, "dp_shard": "all"}
    assert places(8, local_size=2, policy=role)["policy"][1] == "dp_shard2 cp2 tp2"
    assert places(8, local_size=4, policy={"ranks": "2-5", "tp": 2})["policy"][0] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        # nodes of a laptop's two ranks
        (
            {"policy": {"ranks": "nodes 0-1"}, "rollout": {"ranks": "nodes 2"}},
            {"policy": ([0], ""), "rollout": ([1], "")},
        ),
        # nodes of eight, four and two ranks, as the degrees ask for; tp over nodes included
        ({"policy": {"ranks": "nodes 0", "tp": 8}}, {"policy": ([0, 1], "tp2")}),
        (
            {"policy": {"ranks": "nodes 0-1", "tp": 4, "dp_replicate": 2}},
            {"policy": ([0, 1], "tp2")},
        ),
        ({"policy": {"ranks": "nodes 0-1", "tp": 4}}, {"policy": ([0, 1], "tp2")}),
        (
            {
                "policy": {"ranks": "nodes 0", "dp_shard": 2, "tp": 2, "dp_replicate": 1},
                "rollout": {"ranks": "nodes 1", "tp": 2},
            },
            {"policy": ([0], ""), "rollout": ([1], "")},
        ),
    ],
)
def test_nodes_fold_to_two_ranks(roles: dict[str, Any], expected: dict[str, Any]) -> None:
    assert places(2, True, **roles) == expected
    # two nodes of one rank: tp spans them only where that is allowed
    apart = {
        name: (ranks, degrees.replace("tp", "dp_replicate"))
        for name, (ranks, degrees) in expected.items()
    }
    assert places(2, True, local_size=1, **roles) == apart
    spanning = {name: {**role, "tp_across_nodes": True} for name, role in roles.items()}
    assert places(2, True, local_size=1, **spanning) == expected
    assert places(1, True, **roles) == {name: ([0], "") for name in roles}


KINDS = ("cuda", "cuda", "cpu", "cpu")


@pytest.mark.parametrize(
    ("wish", "ranks", "expected"),
    [
        ("auto", (0, 1), "cuda"),
        ("auto", (2, 3), "cpu"),
        ("auto", (1,), "cuda"),
        ("cpu", (0, 1), "cpu"),
        ("cpu", (0, 1, 2, 3), "cpu"),
    ],
)
def test_a_role_computes_where_its_ranks_can(
    wish: Literal["auto", "cpu"], ranks: tuple[int, ...], expected: str
) -> None:
    assert role_device_type("policy", wish, ranks, KINDS) == expected


def test_a_role_on_ranks_with_and_without_a_gpu_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"roles\.reward\.ranks=1-3: ranks 1 have a GPU, ranks 2-3 .*reward\.device=cpu",
    ):
        role_device_type("reward", "auto", (1, 2, 3), KINDS)
