"""The nearest changes that make a plan fit: mild ones first, together where none is enough."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from flow_cases import write_config
from spmdrl.config.load import load_config
from spmdrl.config.sections import Config
from spmdrl.planning.from_shapes import plan_from_shapes
from spmdrl.planning.nearest import Change, Lack, lacking_bytes, nearest_changes
from spmdrl.planning.plan import RolePlan
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def unfit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RolePlan]:
    root = tmp_path_factory.mktemp("nearest")
    make_tiny_model(root / "model")
    words = ["memory_gb=0.001", "train.microbatch_tokens=1024", "train.head_chunk=1024"]
    config = load_config(write_config(root / "c.yaml", root / "model", root), words)
    plan = plan_from_shapes(config, 4, 2, device_type="cuda", refuses=False)
    assert lacking_bytes(plan) > 0
    return config, plan


def lack_of(helps: Mapping[str, int], lacking: int) -> Lack:
    """So many bytes are lacking, less those that each word of a change helps."""
    return lambda change: max(
        0, lacking - sum(helps.get(word, 0) for word in change.describe(1).split())
    )


def described(unfit: tuple[Config, RolePlan], lack: Lack) -> list[str]:
    config, plan = unfit
    return [change.describe(1) for change in nearest_changes(config, plan, 2, lack)]


def test_the_mildest_level_that_is_enough(unfit: tuple[Config, RolePlan]) -> None:
    helps = {f"train.microbatch_tokens={n}": 2000 - n for n in (512, 256, 128)}
    assert described(unfit, lack_of(helps, 1700)) == ["train.microbatch_tokens=256"]


def test_three_at_most_and_mild_ones_first(unfit: tuple[Config, RolePlan]) -> None:
    found = described(unfit, lambda change: 0 if change.words or change.nodes > 1 else 1)
    assert len(found) == 3
    assert found[0] == "train.recompute=layer"
    assert not any("--nodes" in change for change in found)


def test_two_where_one_is_not_enough(unfit: tuple[Config, RolePlan]) -> None:
    helps = {"train.recompute=layer": 6, "train.microbatch_tokens=512": 5}
    helps |= {"train.microbatch_tokens=256": 5, "train.microbatch_tokens=128": 5}
    found = described(unfit, lack_of(helps, 11))
    assert found == ["train.recompute=layer train.microbatch_tokens=512"]


def test_as_many_as_it_takes_and_no_more(unfit: tuple[Config, RolePlan]) -> None:
    helps = {"train.recompute=layer": 4, "rollout.prefill_tokens=256": 1}
    helps |= {f"train.head_chunk={n}": 3 for n in (512, 256, 128)}
    helps |= {"roles.policy.dp_shard=all": 4}
    found = described(unfit, lack_of(helps, 11))
    assert len(found) == 1
    assert set(found[0].split()) == {
        *("train.recompute=layer", "train.head_chunk=512", "roles.policy.dp_shard=all"),
    }


def test_nothing_where_nothing_helps(unfit: tuple[Config, RolePlan]) -> None:
    assert described(unfit, lambda change: 7) == []
    assert described(unfit, lambda change: None if change.words else 7) == []


def test_more_nodes_are_refused_down_to_what_the_batch_allows(
    unfit: tuple[Config, RolePlan],
) -> None:
    def lack(change: Change) -> int | None:
        if change.nodes > 4:
            return None
        return 0 if change.nodes == 4 else 5

    assert described(unfit, lack) == ["--nodes 4"]
